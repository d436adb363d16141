"""The instruments, on data whose truth is known and on a clock that the test turns by hand."""

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlab import measure
from ctxlab.measure import (
    _AGAIN,
    Interval,
    _apart,
    _Comparison,
    _megabytes,
    _Timings,
    blas_threads,
    machine,
    machine_line,
    median_interval,
    time_paired,
)

DISTRIBUTIONS = {  # name -> (sampler, true median)
    "uniform": (lambda rng, n: rng.uniform(size=n), 0.5),
    "cauchy": (lambda rng, n: rng.standard_cauchy(n), 0.0),
    "pareto": (lambda rng, n: 1 + rng.pareto(0.5, n), 4.0),  # infinite mean
    "steps": (lambda rng, n: rng.integers(0, 3, n).astype(float), 1.0),  # a coarse clock: many ties
}


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("n", [6, 7, 25, 60])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_interval_covers_the_true_median(name, n, confidence):
    draw, truth = DISTRIBUTIONS[name]
    rng = np.random.default_rng([n, len(name)])
    found = [median_interval(draw(rng, n), confidence) for _ in range(600)]
    hits = np.mean([i.low <= truth <= i.high for i in found])
    assert hits >= confidence - 4 * np.sqrt(confidence * (1 - confidence) / 600)


@given(st.lists(st.floats(-1e9, 1e9), min_size=6, max_size=60), st.floats(0.5, 0.96))
def test_interval_is_made_of_samples_and_holds_the_median(samples, confidence):
    i = median_interval(samples, confidence)
    assert i.low <= i.median <= i.high
    assert {i.low, i.high} <= set(samples)
    assert median_interval(samples[::-1], confidence) == i


@pytest.mark.parametrize(
    ("n", "confidence"), [(0, 0.95), (1, 0.5), (5, 0.95), (7, 0.99), (100, 1.0)]
)
def test_too_few_samples_are_refused(n, confidence):
    with pytest.raises(ValueError, match=f"{n} are too few"):
        median_interval(np.ones(n), confidence)


def test_thousands_of_samples_do_not_overflow():
    i = median_interval(np.arange(2001.0))  # 2**2001 is beyond a float
    assert 900 < i.low < i.median == 1000 < i.high < 1100


@pytest.mark.parametrize(("factor", "offset"), [(2.0, 0.0), (-1.0, 1.0), (0.0, 3.0)])
def test_scaled_intervals_stay_ordered(factor, offset):
    i = Interval(2.0, 1.0, 4.0).scaled(factor, offset)
    assert i.median == 2 * factor + offset
    assert [i.low, i.high] == sorted([factor + offset, 4 * factor + offset])


NOISE = {  # what one sample costs, in units of its true cost
    "quiet": lambda rng, n: 1 + 0.001 * rng.random(n),
    "lognormal": lambda rng, n: np.exp(0.5 * rng.standard_normal(n)),
    "bursts": lambda rng, n: 1 + 0.02 * rng.random(n) + 20 * (rng.random(n) < 0.2),
    "heavy tail": lambda rng, n: 1 + rng.pareto(0.7, n),  # no mean, no variance
    "coarse clock": lambda rng, n: rng.integers(10, 13, n) / 10,
}


def synthetic(rng, noise, rounds, effect):
    drift = 1 + np.linspace(0, 0.5, rounds)
    seconds = {name: drift * NOISE[noise](rng, rounds) for name in ("a", "a" + _AGAIN, "b")}
    seconds["b"] = effect * seconds["b"]
    return _Timings(seconds, "a", 1).compare("b").outcome


@pytest.mark.parametrize("rounds", [6, 12, 41])
@pytest.mark.parametrize("noise", NOISE)
def test_false_alarms_are_rare(noise, rounds):
    rng = np.random.default_rng([rounds, len(noise)])
    alarms = [synthetic(rng, noise, rounds, 1.0) != "not told apart" for _ in range(600)]
    assert np.mean(alarms) <= 0.05


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=6))
def test_widened_leaves_out_one_exactly_where_there_is_a_difference(ends):
    made = [Interval((a + b) / 2, min(a, b), max(a, b)) for a, b in (ends[:2], ends[2:4])]
    c = _Comparison(*made)
    w = c.widened
    assert w.low <= c.ratio.low <= c.ratio.high <= w.high
    # Division rounds, so an edge within rounding of 1 says nothing.
    if min(abs(w.low - 1), abs(w.high - 1)) > 1e-12:
        assert c.outcome == (
            "faster" if w.high < 1 else "slower" if w.low > 1 else "not told apart"
        )
    assert _apart(c, c) is False


def test_threads_are_limited_and_given_back():
    before = [blas["num_threads"] for blas in machine()["blas"]]
    with blas_threads(1):
        assert all(blas["num_threads"] == 1 for blas in machine()["blas"])
        with blas_threads(None):
            pass
    assert [blas["num_threads"] for blas in machine()["blas"]] == before


@pytest.mark.parametrize("count", [0, -3, 10**6])
def test_threads_that_cannot_be_had(count):
    before = [blas["num_threads"] for blas in machine()["blas"]]
    with pytest.raises(ValueError, match="threads: "), blas_threads(count):
        pytest.fail("it would have run with another number")
    assert [blas["num_threads"] for blas in machine()["blas"]] == before


def test_limits_of_two_threads_do_not_overlap():
    before = [blas["num_threads"] for blas in machine()["blas"]]
    with ThreadPoolExecutor(1) as pool:
        with blas_threads(1):
            with pytest.raises(RuntimeError, match=r"^threads: another thread has set a limit"):
                pool.submit(blas_threads(1).__enter__).result()
            pool.submit(blas_threads(None).__enter__).result()
        assert pool.submit(enter_and_leave).result() is None
    assert [blas["num_threads"] for blas in machine()["blas"]] == before


def enter_and_leave():
    with blas_threads(1):
        pass


@pytest.mark.parametrize(("effect", "outcome"), [(3.0, "slower"), (1 / 3, "faster")])
@pytest.mark.parametrize("noise", [name for name in NOISE if name != "heavy tail"])
def test_a_factor_of_three_is_found(noise, effect, outcome):
    rng = np.random.default_rng(5)
    assert np.mean([synthetic(rng, noise, 41, effect) == outcome for _ in range(200)]) >= 0.95


@pytest.mark.parametrize(
    ("ratio", "control", "outcome"),
    [
        ((1.2, 1.3), (0.9, 1.1), "slower"),
        ((0.7, 0.8), (0.9, 1.1), "faster"),
        ((1.05, 1.3), (0.9, 1.1), "not told apart"),  # the intervals meet
        ((1.01, 1.02), (0.9, 0.95), "slower"),  # a control beside 1 is widened to hold 1 ...
        ((0.96, 0.99), (0.9, 0.95), "not told apart"),  # ... and takes nothing away
        ((1.0, 1.0), (1.0, 1.0), "not told apart"),
    ],
)
def test_outcomes(ratio, control, outcome):
    made = [Interval((low + high) / 2, low, high) for low, high in (ratio, control)]
    assert _Comparison(*made).outcome == outcome


def test_compare_takes_another_base():
    costs = {"a": 1.0, "a" + _AGAIN: 1.0, "b": 2.0, "c": 6.0}
    t = _Timings({name: np.full(8, cost) for name, cost in costs.items()}, "a", 1)
    assert t.compare("c").ratio.median == 6
    assert t.compare("c", "b").ratio.median == 3
    assert t.compare("c", "b").control.median == 1


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when a timed function says so, in place of the real one."""
    now = SimpleNamespace(time=0.0, calls=[])
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now.time))

    def costing(name, seconds):
        def fn():
            now.calls.append(name)
            now.time += seconds

        return fn

    now.costing = costing
    return now


@pytest.mark.parametrize(("budget", "rounds"), [(1e-9, 12), (1e9, 40), (33.0, 14)])
def test_rounds_follow_the_budget_within_their_limits(clock, budget, rounds):
    # A round costs 0.5 + 0.5 + 1.5 seconds: the control runs twice.
    t = time_paired(
        {"a": clock.costing("a", 0.5), "b": clock.costing("b", 1.5)}, budget=budget, rounds=(12, 40)
    )
    assert {name: v.shape for name, v in t.seconds.items()} == {
        n: (rounds,) for n in ("a", "b", "a" + _AGAIN)
    }
    assert np.all(t.seconds["a"] == 0.5)
    assert np.all(t.seconds["a" + _AGAIN] == 0.5)
    assert np.all(t.seconds["b"] == 1.5)


@pytest.mark.parametrize("control", [None, "b"])
def test_every_function_fills_its_samples_and_no_more(clock, control):
    costs = {"a": 0.25, "b": 0.5, "c": 0.125}
    t = time_paired(
        {n: clock.costing(n, s) for n, s in costs.items()},
        control=control,
        rounds=(20, 20),
        least=1.0,
    )
    assert t.control == (control or "a")
    calls = {"a": 4, "b": 2, "c": 8}  # that fill a second
    assert t.calls == calls | {t.control + _AGAIN: calls[t.control]}
    assert {n: clock.calls.count(n) for n in costs} == {
        n: 20 * calls[n] * (1 + (n == t.control)) + 3
        for n in costs  # and 3 to warm up
    }


@pytest.mark.parametrize(("seconds", "warm"), [(0.01, 1), (0.2, 0)])
def test_every_sample_is_warmed_up_or_none(clock, seconds, warm):
    # A function that fills a sample by itself must not find the caches in another state than one
    # that is called twice; where calls are long, both go without.
    costs = {"a": seconds, "b": 0.9 * seconds}
    fns = {n: clock.costing(n, s) for n, s in costs.items()}
    t = time_paired(fns, rounds=(20, 20), least=0.95 * seconds)
    assert t.calls == {"a": 1, "a" + _AGAIN: 1, "b": 2}
    assert clock.calls.count("a") == 3 + 2 * 20 * (1 + warm)
    assert clock.calls.count("b") == 3 + 20 * (2 + warm)
    assert np.allclose(t.seconds["b"], costs["b"])


def test_a_slow_function_beside_a_quick_one_keeps_the_budget(clock):
    fns = {"quick": clock.costing("quick", 1e-7), "slow": clock.costing("slow", 1e-4)}
    time_paired(fns, budget=0.1)
    assert clock.time < 0.1 + 0.01  # a round more, at most, and the warm-up


def test_functions_longer_than_the_budget_run_six_rounds(clock):
    t = time_paired({"a": clock.costing("a", 5.0)}, budget=0.1)
    assert t.seconds["a"].shape == (6,)
    t.compare("a")  # six are enough for an interval


@pytest.mark.parametrize("budget", [0, -1.0, float("nan"), float("-inf")])
def test_a_budget_that_is_none_is_refused_before_anything_runs(budget):
    with pytest.raises(ValueError, match=r"^budget: must be a number of seconds above 0"):
        time_paired({"a": lambda: pytest.fail("it ran")}, budget=budget)


def test_the_order_varies_with_round_and_seed(clock):
    def order(seed):
        clock.calls.clear()
        time_paired({n: clock.costing(n, 1.0) for n in "abc"}, rounds=(50, 50), seed=seed)
        return clock.calls[-200:]

    first = order(0)
    assert len({tuple(first[i : i + 4]) for i in range(0, 200, 4)}) > 6
    assert order(0) == first != order(1)


def test_functions_slower_than_the_least_run_once_a_sample(clock):
    assert time_paired({"a": clock.costing("a", 2.0)}, least=1.0, budget=1e-9).calls["a"] == 1


def test_an_unknown_control_is_refused():
    with pytest.raises(ValueError, match="control: 'nobody', needed one of a, b"):
        time_paired({"a": lambda: None, "b": lambda: None}, control="nobody")


def test_the_machine_goes_into_json_and_back():
    facts = machine()
    assert json.loads(json.dumps(facts)) == facts
    assert "\n" not in machine_line(facts)


@pytest.mark.parametrize("pools", [[], [{"user_api": "openmp", "num_threads": 2}]])
def test_a_machine_without_a_known_blas(monkeypatch, pools):
    monkeypatch.setattr(measure, "threadpool_info", lambda: pools)
    facts = machine()
    assert facts["blas"] == []
    assert machine_line(facts).endswith("BLAS: unknown")


def test_a_blas_that_tells_little(monkeypatch):
    monkeypatch.setattr(
        measure,
        "threadpool_info",
        lambda: [{"user_api": "blas", "internal_api": "mkl", "version": None, "num_threads": 2}],
    )
    facts = machine()
    assert facts["blas"][0]["architecture"] is None
    assert "mkl" in machine_line(json.loads(json.dumps(facts)))


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 MB"), (4999, "0 MB"), (5000, "0.01 MB"), (1e9, "1000.00 MB"), (-1e6, "-1.00 MB")],
)
def test_megabytes_at_the_edges(n, text):
    assert _megabytes(n) == text
