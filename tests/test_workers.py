"""Processes that make one form's calls: what they tell, and that nothing of them is left."""

import os
import signal
import sys
import time
from pathlib import Path

import cloudpickle
import numpy as np
import pytest

from ctxlab import workers
from ctxlab.workers import WorkerError, _allocator_variables, _load_function, _Worker

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes of POSIX")
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def adds(seed):
    return lambda: seed + 1


def started(factory, seconds=30, seed=0, **options):
    form = factory if isinstance(factory, str | tuple) else cloudpickle.dumps(factory)
    return _Worker("mine", form, seed, deadline=time.monotonic() + seconds, **options)


@pytest.fixture
def start():
    all_of_them = []

    def start(*args, **options):
        all_of_them.append(started(*args, **options))
        return all_of_them[-1]

    yield start
    for worker in all_of_them:
        worker.close()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone(pid):
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_its_life(start):
    worker = start(adds, seed=41)
    assert worker.answer() >= 0
    assert worker.ask("result") == 42
    sample = worker.sample(1000)
    assert 0 < sample.seconds < 1
    assert sample.cpu_seconds >= 0
    assert sample.faults >= 0
    worker.close()
    assert gone(worker.process.pid)


def counts_living_results(seed):
    import weakref

    import numpy as np

    given = []

    def call():
        result = np.array([sum(r() is not None for r in given)])  # those that others hold
        given.append(weakref.ref(result))
        return result

    return call


@pytest.mark.parametrize("asked", [False, True])
def test_no_result_is_left_when_calls_are_timed(start, asked):
    """Else a form is timed in a heap that holds a result more than the form does."""
    worker = start(counts_living_results)
    worker.answer()
    if asked:
        assert worker.ask("result") == [0]
        assert worker.ask("result") == [0]
    worker.sample(1)
    assert worker.ask("call", "operator:call") == [0]
    worker.close()


def test_faults_are_those_of_the_calls(start):
    def factory(seed):
        # Not a bytearray: without a global lock Python's own allocator keeps its pages.
        return lambda: np.ones(8 << 20)

    worker = start(factory)
    worker.answer()
    pages = (64 << 20) / os.sysconf("SC_PAGE_SIZE")
    assert worker.sample(2).faults >= pages / 600  # huge pages fault 512 at once


def sleeper(seed):
    return lambda: time.sleep(0.02)


@pytest.mark.slow
def test_time_is_that_of_a_call(start):
    worker = start(sleeper)
    worker.answer()
    sample = worker.sample(50)
    assert 0.02 <= sample.seconds < 0.5  # 50 of them take a second or more
    assert sample.cpu_seconds < sample.seconds


def raises(seed):
    raise KeyError("no\nsuch thing")


def raises_later(seed):
    def call(calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) > 2:
            raise ZeroDivisionError("at last")

    return call


FAILURES = {
    "raises": (raises, r"^form 'mine': KeyError: .*no.*such thing"),
    "no callable": (lambda seed: 3, r"^form 'mine': TypeError: the factory returned int, needed"),
    "an argument": (lambda seed: lambda x: x, r"^form 'mine': TypeError: .*argument"),
    "no seed": (lambda: 3, r"^form 'mine': TypeError: .*argument"),
    "exits": (lambda seed: sys.exit(3), r"^form 'mine': SystemExit: 3"),
    "leaves": (lambda seed: os._exit(3), r"^form 'mine': its process ended with code 3"),
    "dies": (
        lambda seed: os.kill(os.getpid(), signal.SIGSEGV),
        r"^form 'mine': its process died of SIGSEGV",
    ),
    "last words": (
        lambda seed: (print("alas", file=sys.stderr, flush=True), os._exit(1)),
        r"ended with code 1; it said: alas$",
    ),
}


@pytest.mark.parametrize("what", FAILURES)
def test_what_goes_wrong_is_told_in_a_line(what, start):
    factory, message = FAILURES[what]
    with pytest.raises(WorkerError, match=message) as caught:
        start(factory).answer()
    assert "\n" not in str(caught.value)


def test_a_call_that_fails_later(start):
    worker = start(raises_later)
    worker.answer()
    with pytest.raises(WorkerError, match=r"^form 'mine': ZeroDivisionError: at last"):
        worker.sample(5)


@pytest.mark.parametrize("where", ["factory", "call"])
def test_without_end(where, start):
    def factory(seed):
        if where == "factory":
            time.sleep(60)
        return lambda: time.sleep(60)

    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^form 'mine': a call did not end"):
        start(factory, seconds=1).answer()
    assert time.monotonic() - begun < 20


def hoards(seed):
    held = []
    while True:
        held.append(bytearray(1 << 20))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit needs Linux")
def test_memory_without_end(start):
    with pytest.raises(WorkerError, match=r"^form 'mine': MemoryError"):
        start(hoards, limit_bytes=200 << 20).answer()


def test_what_is_printed_is_in_nobodys_way(start, capfd):
    def factory(seed):
        print("x" * 100_000)
        os.write(1, b"y" * 100_000)
        return lambda: sys.stderr.write("z" * 100_000)

    worker = start(factory)
    worker.answer()
    assert worker.ask("result") == 100_000
    worker.sample(2)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def typed():
    """Standard input with something in it."""
    kept, (reads, writes) = os.dup(0), os.pipe()
    os.write(writes, b"typed")
    os.close(writes)
    os.dup2(reads, 0)
    yield
    os.dup2(kept, 0)
    os.close(kept)
    os.close(reads)


def test_standard_input_is_empty(start, typed):
    worker = start(lambda seed: lambda: sys.stdin.read())
    worker.answer()
    assert worker.ask("result") == ""


def forks(seed):
    child = os.fork()
    if child == 0:
        return lambda: time.sleep(60)
    return lambda: child


def quick_fork(seed):
    child = os.fork()
    return lambda: child


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("factory", [forks, quick_fork])
def test_a_fork_does_not_speak_and_does_not_stay(factory, start):
    worker = start(factory)
    worker.answer()
    child = worker.ask("result")
    assert child > 0  # the parent's answer
    assert worker.sample(2).seconds < 1
    worker.close()
    assert gone(child)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and Linux's signal")
def test_it_ends_with_its_parent(tmp_path):
    """Even a parent that is killed, and even while the worker is stopped."""
    import subprocess

    code = (
        "import cloudpickle, time, signal\n"
        "from ctxlab.workers import _Worker\n"
        "w = _Worker('a', cloudpickle.dumps(lambda seed: lambda: 1), 0,"
        " deadline=time.monotonic() + 30)\n"
        "w.answer()\n"
        "w.signal(signal.SIGSTOP)\n"
        "print(w.process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid)


def variable(name):
    return lambda seed: lambda: os.environ.get(name)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_blas(threads, start):
    worker = start(variable("OPENBLAS_NUM_THREADS"), threads=threads)
    worker.answer()
    assert worker.ask("result") == str(threads)


def test_the_environment_of_an_allocator(start):
    worker = start(variable("MALLOC_TRIM_THRESHOLD_"), variables=_allocator_variables("no-trim"))
    worker.answer()
    assert int(worker.ask("result")) >= 1 << 30


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_the_allocator_keeps_what_it_was_told_to(start):
    """Two blocks that are given back and asked for again: with every call new pages, or none."""

    def factory(seed):
        def call():
            held = [bytearray(20 << 20), bytearray(20 << 20)]
            held.clear()

        return call

    faults = {}
    for allocator in ("default", "no-trim"):
        worker = start(factory, variables=_allocator_variables(allocator))
        worker.answer()
        worker.sample(5)
        faults[allocator] = worker.sample(5).faults
    assert faults["no-trim"] < 5


def test_an_allocator_that_is_missing(monkeypatch):
    monkeypatch.setattr(workers, "_find_allocator", lambda name: None)
    with pytest.raises(ValueError, match=r"^allocator: jemalloc is not installed"):
        _allocator_variables("jemalloc")
    with pytest.raises(ValueError, match=r"^allocator: 'tcmalloc', needed one of default"):
        _allocator_variables("tcmalloc")


def test_an_allocator_is_loaded_beside_what_is_loaded_anyway(monkeypatch):
    monkeypatch.setattr(workers, "_find_allocator", lambda name: f"lib{name}.so.2")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert _allocator_variables("jemalloc") == {"LD_PRELOAD": "libjemalloc.so.2"}
    monkeypatch.setenv("LD_PRELOAD", "other.so")
    assert _allocator_variables("mimalloc") == {"LD_PRELOAD": "libmimalloc.so.2:other.so"}


@pytest.mark.slow
def test_names(tmp_path, start):
    file = tmp_path / "forms.py"
    file.write_text(
        "import helper\n"
        "def add(a, b=1): return a + b\n"
        "def pair(seed): return 1, seed\n"
        "def named(seed): return dict(a=seed, b=10)\n"
        "def one(seed): return seed\n"
        "def factory(seed): return lambda: seed\n"
    )
    (tmp_path / "helper.py").write_text("")
    for form, result in (
        ((f"{file}:add", f"{file}:pair"), 4),
        ((f"{file}:add", f"{file}:named"), 13),
        ((f"{file}:add", f"{file}:one"), 4),
        (f"{file}:factory", 3),
    ):
        worker = start(form, seed=3)
        worker.answer()
        assert worker.ask("result") == result
    worker = start(("builtins:dict", None))
    worker.answer()
    assert worker.ask("result") == {}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sqrt", "needed 'module:function'"),
        ("math:", "needed 'module:function'"),
        (":sqrt", "needed 'module:function'"),
        ("maths:sqrt", "there is no module maths"),
        ("math:root", "math has no function root"),
        ("math:pi", "math has no function pi"),
        ("nowhere.py:f", "there is no file nowhere.py"),
    ],
)
def test_names_of_nothing(name, said):
    with pytest.raises(ValueError, match=said):
        _load_function(name)


def test_its_answers_need_no_package():
    """The process may be there to load another version of it."""
    factory = lambda seed: lambda: "ctxlab" in sys.modules  # noqa: E731
    worker = started(factory)
    try:
        worker.answer()
        assert worker.ask("result") is False
        assert worker.sample(1).seconds > 0
    finally:
        worker.close()
