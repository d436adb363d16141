"""Comparisons in processes: outcomes, errors by name, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import cloudpickle
import numpy as np
import pytest

from ctxlab import measure
from ctxlab.intervals import Interval
from ctxlab.measure import Comparison, DisagreementError, _agree, compare, machine
from ctxlab.workers import WorkerError, _find_allocator, _Sample, _usable_cores

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes of POSIX")
cloudpickle.register_pickle_by_value(sys.modules[__name__])

BRIEF = dict(budget=30, resolution=0.5, error=0.3, progress=False)
SURE = BRIEF | dict(budget=60, error=0.05)


def sums(seed):
    x = np.random.default_rng(seed).standard_normal(2000)
    return lambda: float(x.sum())


def twice(seed):
    call = sums(seed)
    return lambda: (call(), call())[0]


def fivefold(seed):
    call = sums(seed)
    return lambda: max(call() for _ in range(5))


def children():
    """Processes of a worker that this process, or one of its children, has started."""
    done = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 3) for line in done.stdout.splitlines()]
    return [r for r in rows if "_ctxlab_worker" in r[3] and int(r[1]) == os.getpid()]


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert children() == []


@pytest.fixture(scope="module")
def once_and_five():
    return compare({"once": sums, "five": fivefold}, **SURE)


@pytest.mark.slow
def test_a_form_of_five_times_the_work(once_and_five):
    c = once_and_five
    assert c["five"].outcome == "slower"
    assert c["five"].ratio.low > 2
    assert c["five"].control.low <= 1 <= c["five"].control.high
    assert c["once"].outcome == "same"
    assert c["five"].seconds > c["once"].seconds > 0
    assert c["five"].cpu_seconds > 0
    assert len(c["five"].ratios) >= 6
    assert (c.base, c.threads, c.allocator, c.agreement) == ("once", 1, "default", "results agree")
    assert c.seconds < 60 + measure._GRACE


@pytest.mark.slow
def test_it_is_a_mapping_that_prints_and_travels(once_and_five):
    c = once_and_five
    assert isinstance(c, Comparison)
    assert len(c) == 2
    assert "five" in c
    text = str(c)
    assert all(word in text for word in ("once", "five", "control", "1 BLAS thread", "NumPy"))
    assert c["five"].outcome in text
    plain = json.loads(json.dumps(c.to_dict()))
    assert plain["forms"]["five"]["ratio"] == list(c["five"].ratio)
    assert plain["machine"]["cores"] == len(_usable_cores())


@pytest.mark.thorough
def test_the_base_may_be_another():
    c = compare({"once": sums, "five": fivefold}, base="five", **SURE)
    assert c["once"].outcome == "faster"
    assert c["once"].ratio.high < 0.5


@pytest.mark.slow
def test_bytes_and_faults_of_a_call():
    def makes(n):
        def factory(seed):
            return lambda: np.ones(n)[:5].copy()

        return factory

    c = compare({"little": makes(10), "much": makes(5_000_000)}, **BRIEF)
    assert c["little"].nbytes < 10_000
    assert c["little"].faults < 100
    assert c["much"].nbytes >= 40e6
    assert c["much"].peak >= 40e6
    assert c["much"].faults > 10  # 9766 pages, or 20 huge ones
    assert c["much"].kept < 10_000


further = partial(pytest.param, marks=pytest.mark.thorough)  # as quick, for further cases


@pytest.mark.slow
@pytest.mark.parametrize(
    "allocator", [further("default"), "no-trim", further("jemalloc"), further("mimalloc")]
)
def test_the_allocator_is_the_one_that_was_asked_for(allocator):
    if allocator in ("jemalloc", "mimalloc") and _find_allocator(allocator) is None:
        pytest.skip(f"{allocator} is not installed")
    c = compare({"a": sums, "b": twice}, allocator=allocator, **BRIEF)
    assert c.allocator == allocator
    loaded = [] if allocator in ("default", "no-trim") else [allocator]
    assert c.machine.get("allocators", loaded) == loaded


@pytest.mark.slow
def test_names_of_factories(tmp_path, monkeypatch):
    (tmp_path / "my_forms.py").write_text(
        "def one(seed): return lambda: seed\ndef other(seed): return lambda: 1 * seed\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    c = compare({"one": "my_forms:one", "other": f"{tmp_path}/my_forms.py:other"}, **BRIEF)
    assert list(c) == ["one", "other"]


def test_what_has_no_interval_yet_is_still_json():
    early = Interval(1.0, 0.0, np.inf)
    m = measure.Measured("not told apart", early, early, 1, 1, 0, 0, 0, 0, True, (1.0,))
    c = Comparison({"a": m}, "a", 0.02, 0.05, 1, "default", 0, 1.0, "results agree", machine())
    plain = json.loads(json.dumps(c.to_dict(), allow_nan=False))
    assert plain["forms"]["a"]["ratio"] == [1.0, 0.0, None]
    assert "inf" in str(c)


def seedless(seed):
    x = np.random.default_rng().standard_normal(10)
    return lambda: x


def off(seed):
    call = sums(seed)
    return lambda: call() * (1 + 1e-6)


def spoilt(seed):
    """Right in its first call; then it adds to what it kept from that."""
    call, kept = sums(seed), []

    def add():
        kept.append(call())
        return sum(kept)

    return add


@pytest.mark.parametrize(
    ("forms", "said"),
    [
        (dict(right=sums, off=off), r"^forms: 'off' gives another result than 'right': "),
        (dict(right=sums, spoilt=spoilt), r"^forms: 'spoilt' gives another result than 'right': "),
        (dict(one=seedless, two=seedless), r"^forms: 'one' gives other results of the same seed"),
    ],
)
def test_results_that_differ_are_named_before_anything_is_timed(forms, said, monkeypatch):
    monkeypatch.setattr(measure, "_turns", None)  # a block that is timed would fail
    with pytest.raises(DisagreementError, match=said):
        compare(forms, **BRIEF)


@pytest.mark.thorough
def test_results_may_be_left_alone():
    c = compare({"right": sums, "off": off}, agree=None, **BRIEF)
    assert c.agreement == "results not compared"


@pytest.mark.thorough
def test_results_that_are_nothing():
    def nothing(seed):
        return lambda: None

    assert compare({"a": nothing, "b": nothing}, **BRIEF).agreement == "no results to compare"


def generates(seed):
    return lambda: (i for i in range(3))


def bad(seed):
    raise OSError("no such data")


def late(seed):
    """Fails in a block that counts, and in no other process."""

    def call(calls=[0]):  # noqa: B006
        calls[0] += 1
        if calls[0] > 30:
            os._exit(7)
        time.sleep(1e-3)

    return call


def patient(seed):
    return lambda: time.sleep(1e-3)


def asleep(seed):
    return lambda: time.sleep(60)


@pytest.mark.slow
def test_a_result_that_cannot_be_compared():
    forms = {"a": generates, "b": generates}
    with pytest.raises(WorkerError, match=r"^form 'a': TypeError: its result, generator, cannot"):
        compare(forms, **BRIEF)
    assert compare(forms, agree=None, **BRIEF).agreement == "results not compared"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "kind", "said"),
    [
        (bad, WorkerError, r"^form 'mine': OSError: no such data$"),
        (late, WorkerError, r"^form 'mine': its process ended with code 7$"),
        (lambda seed: [], WorkerError, r"^form 'mine': TypeError: the factory returned list"),
        (lambda seed: lambda x: 1, WorkerError, r"^form 'mine': TypeError: .*argument"),
        ("no_such_module:f", WorkerError, "^form 'mine': ValueError: .* no module no_such_module"),
    ],
)
def test_a_form_that_fails_is_named(form, kind, said):
    with pytest.raises(kind, match=said):
        compare({"patient": patient, "mine": form}, agree=None, **BRIEF)


@pytest.mark.slow
def test_a_call_that_does_not_end(monkeypatch):
    monkeypatch.setattr(measure, "_GRACE", 1.0)
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^form 'mine': a call did not end in the time it had"):
        compare({"patient": patient, "mine": asleep}, budget=1, progress=False)
    assert time.monotonic() - begun < 20


def test_a_form_that_cannot_travel():
    lock = __import__("threading").Lock()
    with pytest.raises(TypeError, match=r"^forms: 'b' cannot be sent to another process: .*lock"):
        compare({"a": sums, "b": lambda seed: lambda: lock.locked()})


def nan():
    return float("nan")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(forms={"a": sums}), "^forms: needed a mapping of two"),
        (dict(forms=[sums, sums]), "^forms: needed a mapping of two"),
        (dict(forms={"a": sums, "b (again)": sums}), "^forms: 'b \\(again\\)' is no name"),
        (dict(forms={"a": sums, 1: sums}), "^forms: 1 is no name"),
        (dict(forms={"a": sums, "b": 1}), "^forms: 'b' is int, needed a factory"),
        (dict(forms={"a": sums, "b": "nothing"}), r"^'nothing': needed 'module:function'"),
        (dict(base="c"), "^base: 'c', needed one of a, b"),
        (dict(budget=0), "^budget: 0, needed"),
        (dict(budget=-1), "^budget: -1, needed"),
        (dict(budget=nan()), "^budget: nan, needed"),
        (dict(budget=0.1), "^budget: 0.1 s is too short for 6 blocks"),
        (dict(resolution=0), "^resolution: 0, needed"),
        (dict(resolution=1), "^resolution: 1, needed"),
        (dict(error=0), "^error: 0, needed"),
        (dict(threads=0), "^threads: 0, needed 1 to"),
        (dict(threads=10**6), "^threads: 1000000, needed 1 to"),
        (dict(allocator="best"), "^allocator: 'best', needed one of"),
    ],
)
def test_arguments_that_make_no_sense(options, said):
    options = dict(forms={"a": sums, "b": sums}, progress=False) | options
    with pytest.raises((ValueError, TypeError), match=said):
        compare(options.pop("forms"), **options)


RUN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
sys.path.insert(0, {tests!r})
from test_engine import patient
from ctxlab.measure import compare
print("begun", flush=True)
compare({{"a": patient, "b": patient}}, budget=60, resolution=1e-9, progress=False)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_end_in_the_middle_leaves_no_process(how, threads):
    if threads > len(_usable_cores()):
        pytest.skip("needs two cores")
    code = RUN.format(tests=os.path.dirname(__file__)).replace(
        "budget=60", f"budget=60, threads={threads}"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == "begun\n"
    time.sleep(2.5)
    before = workers_of(parent.pid)
    assert before
    parent.send_signal(how)
    parent.communicate(timeout=20)
    assert parent.returncode == -how
    for _ in range(100):
        if not any(os.path.exists(f"/proc/{pid}") for pid in before):
            return
        time.sleep(0.05)
    pytest.fail("a process is left")


def workers_of(parent):
    for _ in range(100):  # between two blocks there are none
        done = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True
        )
        if done.stdout.split():
            return done.stdout.split()
        time.sleep(0.01)
    return []


def test_the_error_is_spent_for_the_blocks_that_were_planned():
    """A tally with made-up samples: it decides as soon as `_decide` does, and drops the form."""
    question = measure._Question(1, 0.02, 0.05, 0, None, False)
    setting = measure._Setting({"a": "", "b": "", "c": ""}, "a", 1, "default")
    tally = measure._Tally(setting, question, 8)

    def samples(seconds):
        return [_Sample(seconds, seconds, 0.0), _Sample(2 * seconds, seconds, 0.0)]

    for i in range(8):
        block = {"a": samples(1), "a (again)": samples(1)}
        block |= {name: samples(v) for name, v in {"b": 1.1, "c": 0.8 + 0.1 * i}.items()}
        tally.add({name: v for name, v in block.items() if name != "b" or "b" in tally.open})
        assert ("b" in tally.open) == (i < 5)
    memory = dict(nbytes=0, peak=0, kept=0, native=False)
    b = tally.measured("b", memory)
    assert (b.outcome, b.ratio, len(b.ratios)) == ("slower", (1.1, 1.1, 1.1), 6)
    assert b.seconds == pytest.approx(1.65)
    c = tally.measured("c", memory)
    assert (c.outcome, len(c.ratios)) == ("not told apart", 8)
    assert tally.measured("a", memory).ratio == (1, 1, 1)


def test_what_must_be_decided_besides():
    question = measure._Question(
        1, 0.02, 0.05, 0, None, False, lambda form, outcome, ratio: ratio.low > 2
    )
    setting = measure._Setting({"a": "", "b": ""}, "a", 1, "default")
    tally = measure._Tally(setting, question, 8)
    for _ in range(8):
        tally.add(
            {name: [_Sample(1, 1, 0)] for name in ("a", "a (again)")} | {"b": [_Sample(1.5, 1, 0)]}
        )
    assert tally.open == ["b"]
    assert tally.decided["b"][0] == "slower"


ARRAY = np.linspace(-1, 1, 7)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (ARRAY, ARRAY * (1 + 1e-15)),
        (ARRAY.astype(np.float32), (ARRAY * (1 + 1e-6)).astype(np.float32)),
        (ARRAY * 1j, ARRAY * 1j * (1 + 1e-15)),
        ([1, "a", None], (1, "a", None)),
        ({"x": ARRAY, "n": 3}, {"x": ARRAY, "n": 3}),
        (np.array([np.nan, np.inf, 1]), np.array([np.nan, np.inf, 1])),
        (np.empty((0, 3)), np.empty((0, 3))),
        (True, True),
    ],
)
def test_results_that_agree(actual, expected):
    _agree(actual, expected)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (ARRAY, ARRAY * (1 + 1e-9)),
        (ARRAY, -ARRAY),
        (ARRAY, ARRAY.astype(np.float32)),
        (ARRAY, ARRAY[:6]),
        (ARRAY * 1j, ARRAY * 1j + 1e-6),
        (ARRAY * 1j, ARRAY),
        ([1, 2], [1, 3]),
        ([1, 2], [1, 2, 3]),
        ({"x": 1}, {"y": 1}),
        ({"x": 1}, [1]),
        (3, [3]),
        ("a", "b"),
        (None, 1.0),
        (np.array([np.nan, 1]), np.array([1, np.nan])),
        (np.arange(3), np.arange(4)),
        (True, False),
    ],
)
def test_results_that_do_not_agree(actual, expected):
    with pytest.raises(AssertionError):
        _agree(actual, expected)


def test_the_plan_of_a_budget():
    filled = {"a": (3, 1e-3), "b": (1, 50e-3)}
    assert measure._turn_seconds(filled, "a", warm=True) == pytest.approx(2 * 4e-3 + 100e-3)
    assert measure._turn_seconds(filled, "a", warm=False) == pytest.approx(2 * 3e-3 + 50e-3)
    assert measure._plan(20, 19, 0.25, 0.012) == (16, 39)  # 0.25 + 16 * 0.0144 s a block
    assert measure._plan(5, 4.5, 0.25, 0.012) == (5, 13)
    assert measure._plan(1000, 999, 0.25, 0.012) == (16, 200)
    assert measure._plan(20, 19, 2.0, 0.1) == (3, 8)
    with pytest.raises(
        ValueError, match=r"^budget: 20 s is too short for 6 blocks of 3\.9 s; need"
    ):
        measure._plan(20, 19, 2.0, 0.52)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "warm"), [further(1e-3, True), (99e-3, True), further(0.2, False)]
)
def test_every_form_is_warmed_up_or_none_whatever_its_calls_in_a_sample(monkeypatch, seconds, warm):
    filled = {"a": (1, seconds), "b": (2, seconds / 2), "c": (1, 3 * seconds)}
    monkeypatch.setattr(measure, "_calls_that_fill", lambda worker, end: filled[worker.name])
    sample, warmed = measure._Worker.sample, []

    def noted(worker, n, *, warm, deadline):
        warmed.append(warm)
        return sample(worker, n, warm=warm, deadline=deadline)

    monkeypatch.setattr(measure._Worker, "sample", noted)
    monkeypatch.setattr(measure, "_plan", lambda *args: (3, 6))
    compare(dict.fromkeys("abc", sums), budget=20, progress=False)
    assert set(warmed) == {warm}


@pytest.mark.slow
def test_a_first_start_that_reads_files_from_the_disk_does_not_end_a_short_comparison(monkeypatch):
    starts = []

    def plan(budget, left, start, turn):
        starts.append(start)
        if len(starts) == 1:
            raise measure._BudgetError("budget: too short")
        return 3, 6

    monkeypatch.setattr(measure, "_plan", plan)
    monkeypatch.setattr(measure, "_start_seconds", lambda *args: 0.125)
    found = compare({"a": sums, "b": sums}, budget=5, progress=False)
    assert starts[1] == 0.125
    assert len(found["b"].ratios) <= 6
