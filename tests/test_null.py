"""The noise floor and the permutation null."""

import numpy as np
import pytest
from test_moments import related, stats_of

from ctxlab.streaming.null import noise_floor, permutation_null
from ctxlab.testing import assert_equiv

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_permutation_null_at_any_scale():
    x, y = related(np.random.default_rng(26), 40, 6, np.float64)
    want = permutation_null(x, y, rounds=3).rms
    for scale in (1e-300, 1e-160, 1e160, 1e300):
        assert_equiv(permutation_null(x * scale, y, rounds=3).rms, want, depth=40)


def test_noise_floor():
    assert noise_floor(101) == pytest.approx(0.1)
    for bad in (1, 0, -3):
        with pytest.raises(ValueError, match="n: "):
            noise_floor(bad)


# With fewer rows than features, the norm comes from Gram matrices.
@pytest.mark.parametrize("shape", [(40, 90), (300, 12)])
def test_permutation_null_is_a_shuffle(shape):
    x, y = related(np.random.default_rng(16), *shape, np.float32)
    null = permutation_null(x, y, rounds=6, seed=3)
    rng = np.random.default_rng(3)
    for got, off in zip(null.rms, null.rms_off, strict=True):
        r = stats_of(x.astype(float), y.astype(float)[rng.permutation(len(y))]).correlation()
        assert got == pytest.approx(np.sqrt(np.mean(r * r)), rel=1e-9)
        assert off == pytest.approx(np.sqrt(np.mean(r[~np.eye(len(r), dtype=bool)] ** 2)), rel=1e-9)
    for bad in (dict(rounds=0), dict(x=x[:1], y=y[:1]), dict(y=y[:-1])):
        with pytest.raises(ValueError, match=r"^(rounds|x|y): "):
            permutation_null(**dict(x=x, y=y) | bad)


def test_a_permutation_takes_dependence_away_and_the_noise_keeps_it():
    x, y = np.random.default_rng(17).standard_normal((2, 600, 40))
    for t in range(1, 600):
        x[t] += 0.9 * x[t - 1]
        y[t] += 0.9 * y[t - 1]
    permuted = permutation_null(x, y, rounds=3).mean
    assert permuted == pytest.approx(noise_floor(600), rel=0.05)
    assert np.sqrt(np.mean(stats_of(x, y).noise() ** 2)) > 2.5 * permuted
