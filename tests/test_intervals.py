"""Intervals that hold under repeated looks, and the rule of decision."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.intervals import _decide, _sequential_interval, _sequential_ranks


def exact_miss(ranks):
    """Probability that any look's interval misses the median, by going through all walks."""
    N = len(ranks)
    below = np.array(list(np.ndindex(*(2,) * N))).cumsum(axis=1)  # (2^N, N): samples below so far
    n = np.arange(1, N + 1)
    missed = (below < ranks) | (n - below < ranks)
    return missed.any(axis=1).mean()


@pytest.mark.parametrize("looks", [1, 5, 6, 8, 12, 15])
@pytest.mark.parametrize("error", [0.01, 0.05, 0.3])
def test_the_error_is_what_all_walks_give(looks, error):
    ranks = _sequential_ranks(looks, error)
    assert exact_miss(np.array(ranks)) <= error
    if looks >= 8 and error == 0.05:  # no error is left that another rank could spend
        assert exact_miss(np.array([*ranks[:-1], ranks[-1] + 1])) > error


def test_ranks_by_hand():
    """Of six looks the last alone can have an interval at 5 %: 2 of 64 walks leave it."""
    assert _sequential_ranks(6) == [0, 0, 0, 0, 0, 1]
    assert _sequential_ranks(5) == [0] * 5


@given(st.integers(1, 300), st.sampled_from([0.001, 0.05, 0.5]))
def test_ranks_grow_and_stay_in_the_lower_half(looks, error):
    ranks = _sequential_ranks(looks, error)
    assert len(ranks) == looks
    assert all(0 <= k <= (n + 1) // 2 for n, k in enumerate(ranks, 1))
    late = [k for k in ranks if k]
    assert all(b >= a - 1 for a, b in pairwise(late))


@pytest.mark.parametrize("error", [0, 1, -0.1, float("nan")])
def test_an_error_that_is_none(error):
    with pytest.raises(ValueError, match=r"^error: "):
        _sequential_ranks(10, error)


def test_before_the_first_interval_there_are_no_limits():
    assert _sequential_interval([3.0, 1.0], _sequential_ranks(8)) == (2.0, -np.inf, np.inf)


def test_the_samples_of_an_interval_in_any_order():
    ranks = _sequential_ranks(10)
    k = ranks[-1]
    samples = np.random.default_rng(0).permutation(10).astype(float)
    assert _sequential_interval(samples, ranks) == (4.5, k - 1, 10 - k)


CALM = np.tile([0.999, 1.001], 10)
RANKS = _sequential_ranks(20)


@pytest.mark.parametrize(
    ("ratios", "control", "resolution", "outcome"),
    [
        (CALM, CALM, 0.02, "same"),
        (CALM * 1.05, CALM, 0.02, "slower"),
        (CALM / 1.05, CALM, 0.02, "faster"),
        (CALM * 1.05, CALM, 0.1, "same"),
        (CALM * 1.01, CALM, 0.001, "slower"),
        (CALM / 1.01, CALM, 0.001, "faster"),
        (np.tile([0.97, 1.03], 10), CALM, 0.02, "not told apart"),
        (CALM * 1.05, CALM * 1.01, 0.02, "not told apart"),
        (CALM * 1.05, CALM / 1.01, 0.02, "not told apart"),
        (CALM[:6] * 1.05, CALM[:6], 0.02, "not told apart"),
    ],
)
def test_outcomes(ratios, control, resolution, outcome):
    assert _decide(ratios, control, resolution, RANKS)[0] == outcome


def test_the_interval_is_that_of_the_ratios():
    _, ratio, control = _decide(CALM * 2, CALM, 0.02, RANKS)
    assert ratio.low == pytest.approx(2 * 0.999)
    assert ratio.high == pytest.approx(2 * 1.001)
    assert control.low == pytest.approx(0.999)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [8, 20, 40])
def test_a_form_is_seldom_told_apart_from_itself(blocks):
    """Heavy tails, a look after every block, an end at the first decision."""
    rng, ranks, wrong = np.random.default_rng(blocks), _sequential_ranks(blocks), 0
    for _ in range(1000):
        spread = np.where(rng.random((2, blocks)) < 0.1, 0.3, 0.02)
        ratios, control = np.exp(spread * rng.standard_normal((2, blocks)))
        for n in range(6, blocks + 1):
            outcome = _decide(ratios[:n], control[:n], 0.02, ranks)[0]
            if outcome != "not told apart":
                wrong += outcome != "same"
                break
    assert wrong / 1000 <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 1000)
