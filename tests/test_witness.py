"""The witnesses of allocation: what they must see, what they must not, and who is in the way."""

import ctypes
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from ctxlab import measure, witness
from ctxlab.measure import page_faults, resident_bytes, traced_peak
from ctxlab.witness import _NOWHERE, Allocations, _by_lines, _has_memray, _site, allocations
from ctxlab.workers import _allocator_variables, _find_allocator

HERE = Path(__file__).resolve()
needs_memray = pytest.mark.skipif(not _has_memray(), reason="memray is not installed")


@pytest.fixture
def no_memray(monkeypatch):
    """As if memray were not installed."""
    monkeypatch.setitem(sys.modules, "memray", None)


@pytest.fixture(params=[pytest.param(True, marks=needs_memray), False], ids=["memray", "tracer"])
def native(request, monkeypatch):
    """Both ways to see allocations, one after the other."""
    if not request.param:
        monkeypatch.setitem(sys.modules, "memray", None)
    return request.param


def line_of(text):
    """'file:line' of the one line of this file that ends with `# text`, as it is run from here."""
    lines = HERE.read_text(encoding="utf-8").splitlines()
    (at,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"  # {text}")]
    return f"{str(HERE).removeprefix(f'{Path.cwd()}/')}:{at}"


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


LIBC, LIBC_VERSION = platform.libc_ver()
GLIBC = LIBC == "glibc" and tuple(map(int, LIBC_VERSION.split(".")[:2])) >= (2, 33)
SEES_ALL = GLIBC or tuple(map(int, np.__version__.split(".")[:2])) >= (2, 5)


@pytest.mark.skipif(not GLIBC, reason="needs a C library that keeps a record")
def test_a_native_block_is_seen_whatever_is_traced_beside_it():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

    def both(traced, native):
        array = np.empty(traced, np.uint8)
        libc.free(libc.malloc(ctypes.c_size_t(native)))
        return array

    for traced in (0, 1 << 20, 8 << 20):
        for native in (1 << 20, 4 << 20):
            peak = traced_peak(partial(both, traced, native))
            assert traced + native <= peak < traced + native + 50_000
    # Less than the traced bytes' own rounding is not told apart from it.
    assert traced_peak(partial(both, 1 << 20, 1 << 16)) < (1 << 20) + 50_000


@pytest.mark.skipif(not GLIBC, reason="needs a C library that keeps a record")
def test_after_a_trace_blocks_come_from_the_heap_again():
    # Were the threshold left low, each later call would pay for mappings and faults of its own.
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.mallinfo2.restype = witness._MallInfo
    traced_peak(lambda: np.empty(1 << 20))
    before = libc.mallinfo2().mapped
    block = libc.malloc(ctypes.c_size_t(1 << 20))
    assert libc.mallinfo2().mapped == before
    libc.free(block)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_resident_bytes_are_those_that_the_system_tells():
    told = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert resident_bytes() == pytest.approx(1024 * int(told[1]), rel=0.1)


@pytest.mark.slow
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
        assert traced_peak(lambda: np.matmul(b, b, out=out)) < 10_000


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


def no_clock(thread):
    """As on a system without clocks of threads."""
    raise OSError(f"no clock of thread {thread.name}")


def test_without_clocks_a_thread_that_has_moved_is_named(monkeypatch):
    monkeypatch.setattr(witness, "_processor_seconds", no_clock)
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


ENDED = """
import os, threading, time
from ctxlab import witness
threading.stack_size(1 << 26)  # so large that the C library gives back those that ended before
ends = [threading.Event() for _ in range(3)]
threads = [threading.Thread(target=end.wait) for end in ends]
for thread in threads:
    thread.start()
for end, thread in zip(ends, threads):
    end.set()
    thread.join()
    while str(thread.native_id) in os.listdir("/proc/self/task"):
        time.sleep(0.01)
threading.enumerate = lambda: threads  # as it was just before
assert witness._marks() == dict.fromkeys(threads)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no clocks of threads here")
def test_a_thread_that_ends_just_then_has_no_mark():
    # In a process of its own, since a clock asked for by the thread's identity ended it.
    done = subprocess.run(
        [sys.executable, "-c", "import os" + ENDED], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="no clocks of threads here")
def test_the_processor_time_of_a_thread():
    spent, stop = [], threading.Event()

    def run():
        while time.thread_time() < 0.05:
            pass
        spent.append(time.thread_time())
        stop.wait()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not spent:
            time.sleep(0.01)
        assert spent[0] <= witness._processor_seconds(thread) < spent[0] + 0.02
    finally:
        stop.set()
        thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="no clocks of threads here")
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
        monkeypatch.setattr(witness, "_processor_seconds", no_clock)

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


@pytest.mark.slow
def test_page_faults_tell_fresh_memory_from_reused():
    pytest.importorskip("resource")
    size = 256 << 20  # more than a heap keeps that has grown in other tests
    big = np.empty(size, np.uint8)
    reused, fresh = (
        page_faults(lambda: big.fill(1)),
        page_faults(lambda: np.ones(size, np.uint8)),
    )
    assert isinstance(fresh, int)
    assert 0 <= reused < fresh


def test_the_witnesses_are_offered_by_measure_too():
    for name in ("allocations", "page_faults", "resident_bytes", "traced_peak"):
        assert getattr(measure, name) is getattr(witness, name)


def test_a_call_without_arrays_allocates_nothing(native):
    a, out = np.ones((2, 300, 300))
    for fn in (lambda: None, lambda: np.add(a, a, out=out), lambda: np.matmul(a, a, out=out)):
        found = allocations(fn)
        assert found == Allocations(0, 0, 0, 0, {}, native)


@pytest.mark.slow
@needs_memray
@pytest.mark.parametrize(
    "fn",
    [
        lambda: list(range(100_000)),
        lambda: [object() for _ in range(100_000)],  # takes new arenas
        lambda: dict.fromkeys(range(10_000)),
        lambda: "x" * 10**6,
        lambda: bytearray(10**6),
        lambda: np.arange(64.0).reshape(8, 8).sort(axis=1),  # an iterator of 2632 bytes
        lambda: Path(__file__).read_text(encoding="utf-8"),
    ],
)
def test_python_objects_and_iterators_do_not_count(fn):
    assert allocations(fn).count == 0


@pytest.mark.slow
@needs_memray
def test_arrays_count_from_a_stated_size():
    least = 1024 if np.lib.NumpyVersion(np.__version__) < "2.5.0" else 4096
    for n in (1, 100, least - 1):
        assert allocations(lambda n=n: np.empty(n, np.uint8)).count == 0
    for n in (least, least + 1, 10**7):
        found = allocations(lambda n=n: np.empty(n, np.uint8))
        assert (found.count, found.nbytes, found.peak, found.kept) == (1, n, n, n)


def test_figures_of_arrays_and_their_lines(native):
    held = []

    def fn():
        np.empty(10_000)  # the temporary
        held[:] = [np.empty(20_000)]  # the one that stays
        return np.empty(30_000)  # the result

    slack = 0 if native else 2_000
    found = allocations(fn)
    assert found.count == 3
    assert list(found.sites) == [
        line_of(f"the {which}") for which in ("result", "one that stays", "temporary")
    ]
    assert found.nbytes == pytest.approx(480_000, abs=slack)
    assert found.nbytes == sum(found.sites.values())
    # The buffer of the call before is given back when its successor takes its place.
    assert found.peak == pytest.approx(400_000, abs=slack)
    assert found.native is native


@pytest.mark.slow
@needs_memray
def test_what_stays_and_what_goes():
    held = []
    found = allocations(lambda: held.append(np.empty(10_000)))
    assert (found.count, found.kept) == (1, 80_000)
    found = allocations(lambda: np.ones(10_000).sum())
    assert (found.count, found.peak, found.kept) == (1, 80_000, 0)
    found = allocations(lambda: [np.ones(10_000).sum() for _ in range(7)])
    assert (found.count, found.nbytes, found.peak) == (7, 560_000, 80_000)
    assert len(found.sites) == 1


@pytest.mark.slow
@needs_memray
def test_an_array_that_grows_is_counted_each_time_and_kept_once():
    found = allocations(lambda: np.fromiter((n for n in range(100_000)), np.float64))
    assert found.count > 1
    assert found.kept == 800_000
    assert found.peak <= found.nbytes


@pytest.mark.slow
@needs_memray
@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.3.0", reason="no copy: it multiplies without BLAS"
)
@pytest.mark.parametrize("nbytes", [2**k for k in range(14, 25)])
def test_the_copy_of_a_strided_operand_is_seen_from_16_kb_to_16_mb(nbytes):
    rows = 32
    wide = np.ones((rows, 2 * nbytes // (8 * rows)))
    tall, out = np.ones((wide.shape[1] // 2, rows)), np.empty((rows, rows))
    found = allocations(lambda: np.matmul(wide[:, ::2], tall, out=out))  # copied
    assert (found.count, found.nbytes, found.kept) == (1, nbytes, 0)
    assert list(found.sites) == [line_of("copied")]
    assert allocations(lambda: np.matmul(wide[:, : len(tall)], tall, out=out)).count == 0


@pytest.mark.slow
@needs_memray
@pytest.mark.parametrize("n", [1 << 10, 1 << 13, 1 << 20])
def test_buffers_of_casts_are_seen(n):
    single, double, out = np.ones(n, np.float32), np.ones(n), np.empty(n)
    found = allocations(lambda: np.add(single, double, out=out))
    assert (found.count, found.nbytes) == (1, 8 * min(n, 8192))
    narrow = allocations(lambda: np.add(double, double, out=single, casting="same_kind"))
    assert narrow.count == 1
    assert allocations(lambda: np.copyto(single, double, casting="same_kind")).count == 0


@needs_memray
def test_what_numpy_calls_python_for_is_booked_to_the_line_that_called_numpy():
    a, out = np.ones((200, 200)), np.empty(200)
    found = allocations(lambda: np.var(a, axis=0, out=out))  # by var
    assert list(found.sites) == [line_of("by var")]
    assert found.nbytes >= a.nbytes


@needs_memray
def test_a_call_written_in_c_is_booked_to_the_line_of_the_witness():
    found = allocations(partial(np.empty, 1000))  # in C
    assert list(found.sites) == [line_of("in C")]


def test_lines_of_libraries_are_told_from_where_they_are_installed():
    installed = str(Path("/usr/lib/python3/site-packages/scipy/linalg/_basic.py"))
    assert _site([(installed, 3)]) == "scipy/linalg/_basic.py:3"
    assert _site([("/elsewhere/main.py", 1)]) == "/elsewhere/main.py:1"
    assert _site([]) == _NOWHERE


@pytest.mark.skipif(not GLIBC, reason="needs a C library that keeps a record")
def test_without_memray_large_native_blocks_count_on_glibc(no_memray):
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    found = allocations(lambda: libc.free(libc.malloc(ctypes.c_size_t(1 << 22))))
    assert found.count == 1
    assert (1 << 22) <= found.nbytes < (1 << 22) + 20_000
    assert list(found.sites) == [_NOWHERE]


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_allocations_calls_as_often_as_it_says(native, warmup):
    calls = []
    allocations(lambda: calls.append(0), warmup=warmup)
    assert len(calls) == warmup + (2 if native else 3)


def test_what_is_built_once_is_no_allocation(native):
    kept = {}
    assert allocations(lambda: kept.setdefault("x", None) or kept.update(x=1)).count == 0

    def lazy():
        if "buffer" not in kept:
            kept["buffer"] = np.empty(10_000)

    assert allocations(lazy).count == 0


def test_blas_runs_with_one_thread_meanwhile(native):
    counts = []
    with threadpool_limits(2, user_api="blas"):
        before = measure._blas_counts()
        allocations(lambda: counts.append(measure._blas_counts()))
        assert measure._blas_counts() == before
    assert {count for found in counts for count in found} <= {1}


def test_an_error_of_the_call_leaves_nothing_behind(native, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    usual, trace = bytes(witness._raw_allocator()), sys.gettrace()
    with pytest.raises(ZeroDivisionError):
        allocations(lambda: 1 / 0, warmup=0)
    assert bytes(witness._raw_allocator()) == usual
    assert sys.gettrace() is trace
    assert not tracemalloc.is_tracing()
    assert not list(tmp_path.iterdir())
    assert allocations(lambda: np.empty(10_000)).count == 1


@pytest.mark.slow
@needs_memray
def test_the_raw_allocator_is_put_back():
    def allocators():
        found = [witness._Allocator() for _ in range(3)]
        for domain, allocator in enumerate(found):
            ctypes.pythonapi.PyMem_GetAllocator(domain, ctypes.byref(allocator))
        return [bytes(allocator) for allocator in found]

    usual = allocators()
    for _ in range(3):
        allocations(lambda: np.empty(1000))
        assert allocators() == usual


def test_another_trace_is_no_matter(native):
    tracemalloc.start()
    try:
        a, out = np.ones((2, 100, 100))
        assert allocations(lambda: np.add(a, a, out=out)).count == 0
        found = allocations(lambda: np.empty(10_000))
        assert found.count == 1
        assert 80_000 <= found.nbytes < 82_000
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()


@needs_memray
def test_a_second_memray_is_refused_in_one_line(tmp_path):
    import memray

    with memray.Tracker(tmp_path / "outer"):
        with pytest.raises(RuntimeError, match=r"^fn: memray is tracing this process already.*$"):
            allocations(lambda: None)
    with pytest.raises(RuntimeError, match=r"^fn: memray is tracing"):
        allocations(lambda: allocations(lambda: None, warmup=0), warmup=0)
    assert allocations(lambda: np.empty(1000)).count == 1


def test_a_trace_function_comes_back(no_memray):
    seen = []
    sys.settrace(lambda *event: seen.append(event))
    try:
        mine = sys.gettrace()
        allocations(lambda: np.empty(10_000))
        assert sys.gettrace() is mine
    finally:
        sys.settrace(None)


@pytest.mark.parametrize("wrong", [None, 3, np.ones(2), "np.empty"])
def test_what_cannot_be_called_is_refused(wrong):
    with pytest.raises(
        TypeError, match=r"^fn: must be called without arguments, and \w+ cannot be$"
    ):
        allocations(wrong)


def test_a_negative_warmup_is_refused():
    with pytest.raises(ValueError, match=r"^warmup: must be 0 or more calls, not -1$"):
        allocations(lambda: pytest.fail("it ran"), warmup=-1)


def test_threads_that_the_call_starts_belong_to_it(native):
    def fn():
        thread = threading.Thread(target=np.ones, args=(10_000,))
        thread.start()
        thread.join()

    assert allocations(fn).nbytes >= 80_000


@pytest.mark.slow
def test_a_thread_that_allocates_beside_the_call_is_refused(native):
    with busy("noisy"), pytest.raises(RuntimeError, match=r"^fn: other threads (ran|allocated)"):
        allocations(lambda: time.sleep(0.01))
    assert allocations(lambda: None).count == 0


@pytest.mark.slow
@needs_memray
def test_a_thread_beside_the_call_that_allocates_nothing_is_no_matter():
    stop = threading.Event()

    def spin():
        while not stop.is_set():
            sum(range(100))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        found = allocations(lambda: (time.sleep(0.02), np.empty(10_000)))
        assert (found.count, found.nbytes) == (1, 80_000)
    finally:
        stop.set()
        thread.join()


@needs_memray
def test_a_thread_that_allocated_once_by_chance_costs_more_calls_and_no_error():
    go, done, stop, calls = threading.Event(), threading.Event(), threading.Event(), []

    def run():
        go.wait()
        np.empty(10_000)
        done.set()
        stop.wait()

    def fn():
        calls.append(0)
        if len(calls) == 2:
            go.set()
            done.wait()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert allocations(fn, warmup=0).count == 0
    finally:
        go.set()
        stop.set()
        thread.join()
    assert len(calls) == 4


@pytest.mark.slow
def test_threads_of_a_pool_are_refused_or_counted(native):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        if native:  # the tracer refuses by the clock of the thread, which here hardly moves
            with pytest.raises(RuntimeError, match=r"at concurrent|at .*thread\.py:\d+"):
                allocations(lambda: pool.submit(np.ones, 10_000).result())
        found = allocations(lambda: pool.submit(np.ones, 10_000).result(), threads=True)
        assert found.nbytes >= 80_000


def test_without_memray_the_figures_say_what_they_are(no_memray):
    found = allocations(lambda: np.empty(10_000))
    assert not found.native
    text = repr(found).splitlines()
    assert text[0].startswith("at least 1 allocation, 8")
    assert "lower bounds" in text[-1]
    assert "pip install 'ctxlab[memory]'" in text[-1]


@needs_memray
def test_the_text_of_what_was_found():
    text = repr(allocations(lambda: np.empty(10_000)))  # told
    assert text == (
        f"1 allocation, 80000 bytes (peak 80000, kept 80000)\n  {line_of('told')}: 80000 bytes"
    )


def test_lines_of_calls_within_calls_are_told_apart(no_memray):
    def inner():
        x = np.empty(10_000)  # within
        return x

    def outer():
        np.empty(20_000)  # before
        y = inner()
        z = np.empty(40_000)  # after
        return y, z, np.negative(inner()).repeat(8)  # after its return

    lines, kept = _by_lines(outer)
    assert {site: n // 10_000 for site, n in lines.sites.items() if n > 10_000} == {
        line_of("within"): 16,
        line_of("after its return"): 64,  # the operand has gone by then
        line_of("before"): 16,
        line_of("after"): 32,
    }
    assert 1_040_000 <= kept < 1_050_000


def test_a_line_in_a_loop_counts_each_time(no_memray):
    def fn():
        for _ in range(5):
            np.empty(10_000)

    found = allocations(fn)
    assert (found.count, len(found.sites)) == (5, 1)


@pytest.mark.parametrize("allocator", ["jemalloc", "mimalloc"])
def test_another_allocator_has_no_record_and_is_not_asked_for_one(allocator):
    """Its blocks are not those of the C library, in which the witness looks."""
    if _find_allocator(allocator) is None:
        pytest.skip(f"{allocator} is not installed")
    program = (
        "from ctxlab.witness import _has_native_peak, traced_peak\n"
        "print(_has_native_peak(), traced_peak(lambda: bytes(100_000)) > 100_000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | _allocator_variables(allocator),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "False True\n", done.stderr
