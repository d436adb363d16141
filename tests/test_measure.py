"""The instruments, on data whose truth is known and on a clock that the test turns by hand."""

import json
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlab import measure
from ctxlab.measure import (
    AGAIN,
    Comparison,
    Interval,
    Timings,
    apart,
    blas_threads,
    machine,
    machine_line,
    median_interval,
    megabytes,
    page_faults,
    time_paired,
    traced_peak,
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
    assert i.low <= i.median <= i.high
    assert i.median == 2 * factor + offset


NOISE = {  # what one sample costs, in units of its true cost
    "quiet": lambda rng, n: 1 + 0.001 * rng.random(n),
    "lognormal": lambda rng, n: np.exp(0.5 * rng.standard_normal(n)),
    "bursts": lambda rng, n: 1 + 0.02 * rng.random(n) + 20 * (rng.random(n) < 0.2),
    "heavy tail": lambda rng, n: 1 + rng.pareto(0.7, n),  # no mean, no variance
    "coarse clock": lambda rng, n: rng.integers(10, 13, n) / 10,
}


def synthetic(rng, noise, rounds, effect):
    drift = 1 + np.linspace(0, 0.5, rounds)
    seconds = {name: drift * NOISE[noise](rng, rounds) for name in ("a", "a" + AGAIN, "b")}
    seconds["b"] = effect * seconds["b"]
    return Timings(seconds, "a", 1).compare("b").outcome


@pytest.mark.parametrize("rounds", [6, 12, 41])
@pytest.mark.parametrize("noise", NOISE)
def test_false_alarms_are_rare(noise, rounds):
    rng = np.random.default_rng([rounds, len(noise)])
    alarms = [synthetic(rng, noise, rounds, 1.0) != "no difference" for _ in range(600)]
    assert np.mean(alarms) <= 0.05


def lucky(rng, noise, placed):
    """No difference, but where the arrays lie favours one function by a few percent."""
    block = np.repeat(np.arange(7), 6)
    names = ("a", "a" + AGAIN, "b")
    luck = {
        name: np.exp(0.03 * rng.standard_normal(7 if placed else 1))[block if placed else 0]
        for name in names
    }
    seconds = {name: luck[name] * NOISE[noise](rng, len(block)) for name in names}
    return Timings(seconds, "a", 1, block if placed else None).compare("b").outcome


@pytest.mark.parametrize("noise", NOISE)
def test_false_alarms_are_rare_over_placements(noise):
    rng = np.random.default_rng(len(noise))
    assert np.mean([lucky(rng, noise, True) != "no difference" for _ in range(400)]) <= 0.05


def test_in_one_placement_luck_looks_like_a_difference():
    # Why nothing that decides on a few percent may rest on one placement.
    rng = np.random.default_rng(0)
    assert np.mean([lucky(rng, "quiet", False) != "no difference" for _ in range(400)]) > 0.25


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=6))
def test_widened_leaves_out_one_exactly_where_there_is_a_difference(ends):
    made = [Interval((a + b) / 2, min(a, b), max(a, b)) for a, b in (ends[:2], ends[2:4])]
    c = Comparison(*made)
    w = c.widened
    assert w.low <= c.ratio.low <= c.ratio.high <= w.high
    # Division rounds, so an edge within rounding of 1 says nothing.
    if min(abs(w.low - 1), abs(w.high - 1)) > 1e-12:
        assert c.outcome == ("faster" if w.high < 1 else "slower" if w.low > 1 else "no difference")
    assert apart(c, c) is False
    assert c.noise >= 0


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
        ((1.05, 1.3), (0.9, 1.1), "no difference"),  # the intervals meet
        ((1.01, 1.02), (0.9, 0.95), "slower"),  # a control beside 1 is widened to hold 1 ...
        ((0.96, 0.99), (0.9, 0.95), "no difference"),  # ... and takes nothing away
        ((1.0, 1.0), (1.0, 1.0), "no difference"),
    ],
)
def test_outcomes(ratio, control, outcome):
    made = [Interval((low + high) / 2, low, high) for low, high in (ratio, control)]
    assert Comparison(*made).outcome == outcome


def test_compare_takes_another_base():
    costs = {"a": 1.0, "a" + AGAIN: 1.0, "b": 2.0, "c": 6.0}
    t = Timings({name: np.full(8, cost) for name, cost in costs.items()}, "a", 1)
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
        n: (rounds,) for n in ("a", "b", "a" + AGAIN)
    }
    assert np.all(t.seconds["a"] == 0.5)
    assert np.all(t.seconds["a" + AGAIN] == 0.5)
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
    assert t.calls == calls | {t.control + AGAIN: calls[t.control]}
    assert {n: clock.calls.count(n) for n in costs} == {
        n: 20 * calls[n] * (1 + (n == t.control)) + 3
        for n in costs  # and 3 to warm up
    }


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


@pytest.mark.parametrize("n", [10_000, 3_000_000])
def test_traced_peak_sees_temporaries_and_results(n):
    assert n <= traced_peak(lambda: np.empty(n, np.uint8)) < n + 2_000
    assert (
        2 * n
        <= traced_peak(lambda: (np.empty(n, np.uint8), np.empty(n, np.uint8))[0][0])
        < 2 * n + 2_000
    )


def test_traced_peak_does_not_count_what_was_there_or_what_warmed_up():
    kept = {}

    def lazy():
        if "buffer" not in kept:
            kept["buffer"] = np.empty(10**6)

    assert traced_peak(lazy) < 2_000
    kept.clear()
    assert traced_peak(lazy, warmup=0) >= 8 * 10**6


def test_traced_peak_of_freeing_is_not_negative():
    held = [np.empty(10**6)]
    assert 0 <= traced_peak(held.clear, warmup=0) < 2_000


def test_traced_peak_works_inside_another_trace():
    tracemalloc.start()
    try:
        held = np.empty(10**6)  # is no part of what follows
        assert 80_000 <= traced_peak(lambda: np.empty(10_000)) < 90_000
        assert tracemalloc.is_tracing()
        del held
    finally:
        tracemalloc.stop()
    assert 80_000 <= traced_peak(lambda: traced_peak(lambda: np.empty(10_000))) < 90_000
    assert not tracemalloc.is_tracing()


SEES_ALL = measure._has_native_peak() or tuple(map(int, np.__version__.split(".")[:2])) >= (2, 5)


@pytest.mark.skipif(not SEES_ALL, reason="no witness of NumPy's own copies here")
@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.3.0", reason="no copy: it multiplies without BLAS"
)
@pytest.mark.parametrize("n", [256, 700, 1024])
def test_traced_peak_sees_the_copy_of_a_strided_operand(n):
    big, b = np.ones((n, 2 * n), np.float32), np.ones((n, n), np.float32)
    out = np.empty((n, n), np.float32)
    holes = [np.ones(n * n, np.float32) for _ in range(5)]
    del holes[::2]  # free blocks in which the copy would fit
    size = n * n * 4
    for _ in range(3):
        assert size <= traced_peak(lambda: np.matmul(big[:, ::2], b, out=out)) < size + 10_000
        assert traced_peak(lambda: np.matmul(b, b, out=out)) < 2_000


def test_temporaries_one_after_another_are_no_sum():
    a = np.ones(10**6)
    assert 8e6 <= traced_peak(lambda: [(a + 1).sum() for _ in range(10)]) < 8e6 + 20_000


@contextmanager
def busy(name):
    stop = threading.Event()

    def run():
        while not stop.is_set():
            np.empty(1_000_000)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_without_clocks_a_thread_that_has_moved_is_named(monkeypatch):
    monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)
    go, moved = ([threading.Event() for _ in range(4)] for _ in range(2))

    def run():  # waits at another place after each call
        go[0].wait()
        moved[0].set()
        go[1].wait()
        moved[1].set()
        go[2].wait()
        moved[2].set()
        go[3].wait()

    calls = iter(range(3))

    def fn():
        call = next(calls)
        go[call].set()
        moved[call].wait()
        time.sleep(0.05)

    thread = threading.Thread(target=run, name="moving")
    thread.start()
    try:
        with pytest.raises(RuntimeError, match=r"other threads ran .*moving"):
            traced_peak(fn, warmup=0)
    finally:
        for event in go:
            event.set()
        thread.join()


def test_a_thread_that_ran_once_by_chance_costs_one_more_call():
    go, done, stop, calls = threading.Event(), threading.Event(), threading.Event(), []

    def run():
        go.wait()
        held = [bytes(1000) for _ in range(3000)]
        done.set()
        stop.wait()
        held.clear()

    def fn():
        calls.append("call")
        go.set()
        done.wait()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert traced_peak(fn, warmup=0) < 100_000  # of the second call: the first saw 3 MB
    finally:
        stop.set()
        thread.join()
    assert len(calls) == 2


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clocks of threads here")
def test_a_thread_beside_the_call_is_named():
    with busy("noisy"), pytest.raises(RuntimeError, match=r"other threads ran .*noisy"):
        traced_peak(lambda: time.sleep(0.05))
    assert not tracemalloc.is_tracing()


def test_a_thread_that_starts_meanwhile_is_named():
    with ExitStack() as stack, pytest.raises(RuntimeError, match="late"):
        traced_peak(lambda: (stack.enter_context(busy("late")), time.sleep(0.05)), warmup=0)


@pytest.mark.parametrize("clock", [True, False])
def test_threads_that_wait_or_belong_to_the_call_are_no_matter(monkeypatch, clock):
    if not clock:
        monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)

    def own():
        with busy("own"):
            time.sleep(0.01)

    stop = threading.Event()
    waiting = threading.Thread(target=stop.wait)
    waiting.start()
    try:
        assert traced_peak(lambda: time.sleep(0.01)) < 4_000
        assert traced_peak(own) >= 8_000_000
    finally:
        stop.set()
        waiting.join()


def test_threads_of_a_pool_count_where_that_is_asked_for():
    with ThreadPoolExecutor(1) as pool:
        assert traced_peak(lambda: pool.submit(np.ones, 10**6).result(), threads=True) >= 8e6
        with pytest.raises(RuntimeError, match="other threads ran"):
            traced_peak(lambda: pool.submit(np.ones, 10**7).result())


def test_an_error_ends_the_trace():
    with pytest.raises(ZeroDivisionError):
        traced_peak(lambda: 1 / 0, warmup=0)
    assert not tracemalloc.is_tracing()


@pytest.mark.parametrize("witness", [traced_peak, page_faults])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_witnesses_call_as_often_as_they_say(witness, warmup):
    pytest.importorskip("resource")
    calls = []
    witness(lambda: calls.append(0), warmup=warmup)
    assert len(calls) == warmup + 1


def test_page_faults_tell_fresh_memory_from_reused():
    pytest.importorskip("resource")
    big = np.empty(64 << 20, np.uint8)
    reused, fresh = (
        page_faults(lambda: big.fill(1)),
        page_faults(lambda: np.ones(64 << 20, np.uint8)),
    )
    assert isinstance(fresh, int)
    assert 0 <= reused < fresh


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
    assert megabytes(n) == text
