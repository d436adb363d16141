"""`Workspace` against a model of it, what it refuses, stale views, threads, formulas."""

import asyncio
import contextvars
import copy
import gc
import itertools
import math
import operator
import os
import pickle
import re
import signal
import sys
import threading
import tracemalloc
import types
from contextlib import (
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)

import numpy as np
import pytest
from conftest import debugging, few, figures, in_threads, make, no_memory, refused, seeds
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ctxlab import reference, workspace
from ctxlab.gemm import blend, gemm
from ctxlab.measure import page_faults, traced_peak
from ctxlab.models.block import _FreshWorkspace
from ctxlab.planning import _Recorder, plan
from ctxlab.workspace import _GROWTH, Buffer, Workspace, all_of, any_of

f4, f8, u1 = np.float32, np.float64, np.uint8
policies = st.sampled_from(sorted(_GROWTH))


def memory(view):
    """Addresses of a contiguous array."""
    a = np.asarray(view)
    start = a.__array_interface__["data"][0]
    return range(start, start + a.nbytes)


# --- what `take` hands out ---

KINDS = [bool, "i1", np.uint16, int, np.float16, f4, "f8", np.longdouble, np.complex64, complex]
KINDS += [">f4", "S5", "U3", "V7", "M8[ns]", "m8[s]", [("a", "f4"), ("b", "i2")]]
KINDS += [np.dtype([("a", "f8", (2,)), ("b", "?")], align=True), np.dtype("f4,f4")]
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@pytest.mark.slow
@given(
    st.lists(st.tuples(shapes, st.sampled_from(KINDS)), min_size=1, max_size=12),
    policies,
    st.booleans(),
)
def test_a_view_is_exactly_what_was_asked_for(stream, growth, debug):
    ws, capacity, address = Workspace(growth=growth, debug=debug), -1, None
    for shape, dtype in stream:
        view = ws.take("x", shape, dtype)
        need = math.prod(shape) * np.dtype(dtype).itemsize
        assert (view.shape, view.dtype, view.nbytes) == (shape, np.dtype(dtype), need)
        assert view.flags.c_contiguous
        assert view.flags.writeable
        assert view.flags.aligned
        assert not view.flags.owndata
        assert view.ctypes.data % 64 == 0 or not need
        again = ws.take("x", shape, dtype)
        assert (memory(again), again.shape, again.dtype) == (memory(view), view.shape, view.dtype)
        if need <= capacity:  # storage is used again, whatever the shape and dtype
            assert view.ctypes.data == address
        capacity, address = max(capacity, ws.nbytes), view.ctypes.data
        assert ws.used_bytes == need <= ws.nbytes
        ws.next_generation()


@debugging
def test_each_name_has_memory_of_its_own(debug):
    ws = Workspace(debug=debug)
    taken = [memory(ws.take(f"b{i}", (i,), u1)) for i in range(1, 100)]
    taken.sort(key=lambda r: r.start)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(taken))


@debugging
@pytest.mark.parametrize(
    ("shape", "want"),
    [
        (7, (7,)),
        (np.int64(7), (7,)),
        ([2, 3], (2, 3)),
        ((np.int8(2), np.uint64(3)), (2, 3)),
        (range(2, 4), (2, 3)),
        ((), ()),
        ([], ()),
        ((1,) * 64, (1,) * 64),
        ((0, 2**40), (0, 2**40)),
        ((True, 3), (1, 3)),
    ],
    ids=str,
)
def test_shapes_may_be_written_in_many_ways(shape, want, debug):
    ws = Workspace(debug=debug)
    for _ in range(2):
        first, again = ws.take("x", shape), ws.take("x", want)
        assert first.shape == again.shape == ws.take("x", shape).shape == want
        assert all(type(n) is int for n in first.shape)
        assert memory(first) == memory(again)
        ws.next_generation()
    assert ws.allocation_count == 1


def test_dtypes_may_be_written_in_many_ways():
    ws = Workspace()
    first = ws.take("x", (3,), f4)
    for dtype in ("f4", "float32", np.dtype("<f4"), "=f", f4):
        assert memory(ws.take("x", (3,), dtype)) == memory(first)
    assert memory(ws.take("x", (3,))) == memory(first)  # the default
    with refused(ws, ValueError, "^name: 'x' is .* float32 .* int32"):
        ws.take("x", (3,), np.int32)
    with refused(ws, ValueError, "^name: 'x'"):
        ws.take("x", (3,), ">f4")


@debugging
@pytest.mark.parametrize("growth", _GROWTH)
def test_a_steady_state_allocates_nothing(growth, debug):
    ws = Workspace(growth=growth, debug=debug)

    def one_pass(rows):
        ws.next_generation()
        for name, shape in [("a", (rows, 300)), ("b", [np.int64(rows), 300]), ("c", rows * 300)]:
            ws.take(name, shape, f8)
        with ws.scope():
            ws.take("d", (rows, rows), f4 if rows % 2 else np.int8)

    one_pass(201)
    count = ws.allocation_count
    # Python objects, which are larger without a global lock; the array of 3 rows has 7 200 bytes.
    # A debug workspace compares all bytes with the poison: an array of flags, and it is gone.
    allowed = 6_000 + debug * 600_000
    assert (
        max(traced_peak(lambda rows=rows: one_pass(rows)) for rows in (201, 3, 200, 0, 201))
        < allowed
    )
    assert ws.allocation_count == count == 4


# --- what is refused ---

HUGE = sys.maxsize // 2
BAD_SHAPES = {
    "negative": ((2, -1), ValueError),
    "negative number": (-1, ValueError),
    "negative beside zero": ((0, -1), ValueError),
    "float": ((2.5, 3), TypeError),
    "a number that is a float": (6.0, TypeError),
    "text": ("23", TypeError),
    "nothing": (None, TypeError),
    "nested": (((2, 3), 4), TypeError),
    "too many dimensions": ((1,) * 65, ValueError),
    "too many dimensions of zero": ((0,) * 65, ValueError),
    "too many bytes": ((HUGE, 5), ValueError),
    "too many bytes beside zero": ((0, HUGE, HUGE), ValueError),
    "more than an integer": ((2**70,), ValueError),
    "NaN": ((float("nan"),), TypeError),
}
BAD_DTYPES = {
    "unknown": "float99",
    "number": 3.5,
    "object": object,
    "record with objects": [("a", "f4"), ("b", "O")],
    "strings of any length": np.dtypes.StringDType(),
    "subarray": "(2,3)f4",
    "subarray pair": ("f4", (2,)),
    "S0": "S0",
    "U0": str,
    "V0": "V0",
    "empty record": np.dtype([]),
    "abstract": np.floating,
}
BAD = (
    {f"shape: {k}": (("x", shape, f4), error, "shape") for k, (shape, error) in BAD_SHAPES.items()}
    | {f"dtype: {k}": (("x", (2, 3), dtype), TypeError, "dtype") for k, dtype in BAD_DTYPES.items()}
    | {
        f"name: {n!r}": ((n, (2, 3), f4), TypeError, "name")
        for n in (None, 3, b"x", ("x",), np.float64(1))
    }
)


def prepared(state, debug):
    """A workspace in which `x` is unknown, idle or handed out, and whose `kept` holds ones."""
    ws = Workspace(debug=debug)
    if state != "unknown":
        ws.take("x", (2, 3))
    if state == "idle":
        ws.next_generation()
    kept = ws.take("kept", (10,))
    kept.fill(1)
    return ws, kept


@debugging
@pytest.mark.parametrize("state", ["unknown", "idle", "taken"])
@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_named_and_change_nothing(case, state, debug):
    (name, shape, dtype), error, argument = BAD[case]
    ws, kept = prepared(state, debug)
    with refused(ws, error, f"^{argument}: "):
        ws.take(name, shape, dtype)
    with refused(ws, error, f"^{argument}: "):
        ws.ensure_capacity({"fine": ((3,), f4), name: (shape, dtype)})
    assert np.all(kept == 1)
    assert ws.take("x", (2, 3)).shape == (2, 3)


@debugging
def test_another_shape_in_the_same_generation_is_refused(debug):
    ws, kept = prepared("taken", debug)
    for shape, dtype in [((3, 2), f4), ((6,), f4), ((2, 3), np.int32), ((), f4), ((200, 3), f4)]:
        with refused(ws, ValueError, r"^name: 'x' is \(2, 3\) float32 in this generation"):
            ws.take("x", shape, dtype)
    assert np.all(kept == 1)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"growth": "double"},
            ValueError,
            "growth: 'double', needed one of 'exact', 'pow2', 'geometric'",
        ),
        ({"growth": None}, ValueError, "growth: None"),
        ({"limit_bytes": -1}, ValueError, "limit_bytes: -1"),
    ],
)
def test_a_workspace_that_cannot_be(options, error, match):
    with pytest.raises(error, match=match):
        Workspace(**options)
    with pytest.raises(TypeError):
        Workspace("pow2")  # keywords only


# --- growth, and a model of everything that has a number ---


@given(policies, st.lists(st.integers(0, 5000), min_size=1, max_size=20))
def test_capacity_follows_the_policy_and_never_shrinks(growth, needs):
    ws, held = Workspace(growth=growth), None
    for need in needs:
        ws.take("x", need, u1)
        want = {"exact": need, "geometric": max(need, 3 * (held or 0) // 2), "pow2": ws.nbytes}[
            growth
        ]
        if held is None or need > held:
            assert need <= ws.nbytes == want
            if growth == "pow2" and need:
                assert ws.nbytes.bit_count() == 1
                assert ws.nbytes < 2 * need
        else:
            assert ws.nbytes == held
        held = ws.nbytes
        ws.next_generation()


class Model:
    """What a workspace should say of itself: plain sums, written once more."""

    def __init__(self, growth, limit):
        self.growth, self.limit = growth, math.inf if limit is None else limit
        self.capacity, self.live, self.marks = {}, {}, []
        self.allocations, self.peak, self.generation = 0, 0, 1

    def grow(self, need):
        others = sum(size for name, size in self.capacity.items() if name not in need)
        policy = {
            "exact": lambda n, held: n,
            "pow2": lambda n, held: next(1 << k for k in range(99) if 1 << k >= n),
            "geometric": lambda n, held: max(n, 3 * held // 2),
        }[self.growth]
        generous = {name: policy(n, self.capacity.get(name, 0)) for name, n in need.items()}
        for sizes in (generous, need):
            if others + sum(sizes.values()) <= self.limit:
                self.capacity |= sizes
                self.allocations += len(sizes)
                return None
        return MemoryError

    def lacking(self, need):
        return {name: n for name, n in need.items() if self.capacity.get(name, -1) < n}

    def take(self, name, count, dtype):
        if name in self.live:
            return None if self.live[name] == (count, dtype) else ValueError
        error = self.grow(self.lacking({name: count * np.dtype(dtype).itemsize}))
        if error is None:
            self.live[name] = count, dtype
        self.peak = max(self.peak, self.used)
        return error

    def ensure(self, requests):
        need = self.lacking(
            {n: count * np.dtype(dtype).itemsize for n, (count, dtype) in requests.items()}
        )
        return RuntimeError if need.keys() & self.live.keys() else self.grow(need)

    def scope(self):
        self.marks.append(len(self.live))

    def leave(self):
        self.live = dict(list(self.live.items())[: self.marks.pop()])

    def next_generation(self, what):
        if self.marks:
            return RuntimeError
        self.live, self.generation = {}, self.generation + 1
        if what != "next_generation":
            self.peak = 0
        if what == "release":
            self.capacity = {}
        return None

    @property
    def used(self):
        return sum(count * np.dtype(dtype).itemsize for count, dtype in self.live.values())

    @property
    def figures(self):
        return sum(self.capacity.values()), self.used, self.peak, self.allocations, self.generation


names, counts = st.sampled_from("abcd"), st.integers(0, 200)
kinds_of = st.sampled_from(["u1", "f4", "f8"])
takes = st.tuples(st.just("take"), names, counts, kinds_of)
steps = st.one_of(
    takes,
    takes,  # as often as all the rest
    st.tuples(st.just("ensure"), st.dictionaries(names, st.tuples(counts, kinds_of), max_size=3)),
    st.sampled_from(
        [("scope",), ("leave",), ("leave",), ("next_generation",), ("clear",), ("release",)]
    ),
)


@pytest.mark.slow
@settings(max_examples=150)
@given(st.lists(steps, max_size=30), policies, st.none() | st.integers(0, 3000), st.booleans())
@example(
    [("take", "a", 100, "u1"), ("next_generation",), ("take", "a", 110, "u1")],
    "geometric",
    149,
    False,
)
@example(
    [("take", "a", 100, "u1"), ("next_generation",), ("take", "a", 110, "u1")],
    "geometric",
    150,
    True,
)
@example([("take", "a", 8, "u1"), ("take", "b", 9, "u1")], "pow2", 16, False)
def test_a_workspace_is_its_model(program, growth, limit, debug):
    ws, model = Workspace(growth=growth, limit_bytes=limit, debug=debug), Model(growth, limit)
    scopes, views = [], {}

    def checked(shape, dtype):  # at the moment of an allocation
        assert math.prod(shape) <= model.limit
        return np.empty(math.prod(shape) + 64, u1)[: math.prod(shape)]

    def call(what, *args):
        if what == "take":
            return ws.take(args[0], (args[1],), args[2])
        if what == "ensure":
            return ws.ensure_capacity(
                {name: ((count,), dtype) for name, (count, dtype) in args[0].items()}
            )
        if what == "scope":
            scopes.append(ws.scope())
            assert scopes[-1].__enter__() is ws
        elif what == "leave":
            scopes.pop().__exit__(None, None, None)
        else:
            getattr(ws, what)()
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctxlab.workspace.aligned_empty", checked)
        for number, (what, *args) in enumerate(program, 1):
            if what == "leave" and not scopes:
                continue
            known = getattr(model, what, None)
            error = (
                known(*args) if known and what != "next_generation" else model.next_generation(what)
            )
            if error is not None:
                with pytest.raises(error):
                    call(what, *args)
            else:
                view = call(what, *args)
                if what == "take":
                    name = args[0]
                    if name in views:
                        assert memory(view) == memory(views[name][0])
                    else:
                        view.fill(number)
                        views[name] = view, number
            views = {name: view for name, view in views.items() if name in model.live}
            assert figures(ws) == model.figures
            assert ws.nbytes <= model.limit
            assert all(
                np.all(np.asarray(view) == number) for view, number in views.values()
            )  # nobody wrote there


def test_growth_beyond_the_limit_is_trimmed_to_the_need():
    ws = Workspace(growth="pow2", limit_bytes=10_000)
    kept = ws.take("kept", 4096, u1)
    kept.fill(1)
    ws.take("tight", 5_600, u1)  # 8192 would be too much
    assert ws.nbytes == 4096 + 5600
    for growing in (
        lambda: ws.take("more", 305, u1),
        lambda: ws.ensure_capacity({"a": (4, u1), "b": (301, u1)}),
    ):
        with refused(
            ws, MemoryError, "^workspace: .* would need .* bytes in all, limit_bytes is 10000$"
        ):
            growing()
    assert ws.take("rest", 304, u1).nbytes == 304
    assert ws.nbytes == ws.limit_bytes
    assert np.all(kept == 1)
    assert Workspace(limit_bytes=0).take("empty", (0, 3)).size == 0


def test_the_limit_counts_what_the_others_hold():
    ws = Workspace(growth="exact", limit_bytes=5)
    ws.take("kept", 3, u1)
    with ws.scope():
        ws.take("x", 1, u1)
    ws.take("x", 2, u1)
    assert ws.nbytes == 5


@pytest.mark.parametrize("kinds", [("f8", "f4"), ("f4", "f8"), ("i4", "f4")], ids=str)
def test_an_equal_shape_of_another_dtype_is_another_request(kinds):
    ws = Workspace()
    for dtype in map(np.dtype, kinds):
        for _ in range(2):
            assert ws.take("x", (3,), dtype).dtype == dtype
        ws.next_generation()


@pytest.mark.parametrize("dtype", [f4, np.dtype("f4"), "f4"], ids=str)
def test_a_repetition_is_not_checked_again(dtype, monkeypatch):
    ws = Workspace()
    ws.take("x", (3,), dtype)
    monkeypatch.setattr(workspace, "_take_new", no_memory)
    assert ws.take("x", (3,), dtype).shape == (3,)
    with pytest.raises(MemoryError):
        ws.take("x", (4,), dtype)


@debugging
def test_the_limit_leaves_an_idle_buffer_as_it_was(debug):
    ws = Workspace(growth="exact", limit_bytes=1000, debug=debug)
    address = ws.take("x", 900, u1).ctypes.data
    ws.next_generation()
    with refused(ws, MemoryError, "'x' would need 1001 bytes in all"):
        ws.take("x", 1001, u1)
    assert ws.take("x", 900, u1).ctypes.data == address


def test_growing_touches_no_memory_and_fails_without_loss():
    # Old and new storage exist together for a moment; the new pages have not been written to yet.
    size, ws = 64_000_000, Workspace(growth="exact")
    ws.take("x", size, u1).fill(1)
    ws.next_generation()
    assert page_faults(lambda: ws.take("x", 2 * size, u1), warmup=0) < 200
    ws.next_generation()
    with pytest.raises(MemoryError, match="no memory"):
        ws.take("x", 2**60, u1)
    assert ws.nbytes == 2 * size


def test_memory_that_the_system_does_not_have():
    ws = Workspace()
    kept = ws.take("kept", (10,))
    kept.fill(1)
    with pytest.raises(MemoryError, match=r"no memory for the .* bytes of 'x'"):
        ws.take("x", (2**60,), u1)
    assert np.all(kept == 1)
    assert ws.used_bytes == 40
    assert ws.take("x", (3,)).shape == (3,)


# --- generations and scopes ---


@debugging
def test_scopes_nest_and_give_back_what_they_took(debug):
    ws = Workspace(growth="exact", debug=debug)
    outer = ws.take("outer", (10,))
    outer.fill(1)
    with ws.scope():
        first = ws.take("a", (5,))
        with ws.scope() as inner:
            assert inner is ws
            assert memory(ws.take("a", (5,))) == memory(
                first
            )  # taken outside: stays until the end of its scope
            ws.take("b", (7,))
            assert ws.used_bytes == 88
        assert ws.used_bytes == 60
        assert ws.take("b", (2, 2), f8).shape == (2, 2)  # a sibling may have another shape
        with pytest.raises(ValueError, match=r"^name: 'a'"):
            ws.take("a", (6,))
    with ws.scope():
        ws.take("a", (3, 1), np.int8)
    assert (ws.used_bytes, ws.peak_bytes, ws.generation) == (40, 92, 1)
    assert np.all(outer == 1)


@debugging
def test_an_exception_leaves_nothing_behind(debug):
    ws = Workspace(debug=debug)
    for error in (ZeroDivisionError, KeyboardInterrupt, GeneratorExit, StopIteration):
        with pytest.raises(error), ws.scope():  # noqa: PT012 -- the state inside is the point
            ws.take("a", (5,))
            with ws.scope():
                ws.take("b", (5,))
                raise error
        assert ws.used_bytes == 0
        ws.next_generation()  # no scope is left open
    assert ws.take("a", (6,)).shape == (6,)


@debugging
@pytest.mark.parametrize("what", ["next_generation", "clear", "release", "arrange"])
def test_a_scope_forbids_what_would_end_it(what, debug):
    ws = Workspace(debug=debug)
    with ws.scope():
        view = ws.take("x", (5,))
        view.fill(1)
        for _ in range(2):
            with refused(ws, RuntimeError, r"inside a scope \(.*\); leave it first$"):
                ws.arrange(plan({})) if what == "arrange" else getattr(ws, what)()
        assert np.all(view == 1)
    ws.next_generation()


def test_clear_keeps_capacity_and_release_frees_it():
    ws = Workspace()
    view = ws.take("x", (100,))
    view.fill(1)
    ws.clear()
    assert (ws.nbytes, ws.used_bytes, ws.peak_bytes, ws.generation) == (512, 0, 0, 2)
    again = ws.take("x", (100,))
    assert memory(again) == memory(view)
    assert ws.peak_bytes == 400
    ws.release()
    assert (ws.nbytes, ws.used_bytes, ws.peak_bytes, ws.allocation_count) == (0, 0, 0, 1)
    other = ws.take("x", (100,))
    other.fill(2)
    assert np.all(view == 1)  # keeps its own memory
    assert not np.shares_memory(view, other)
    assert ws.allocation_count == 2


def test_release_frees_memory():
    size = 3_000_000
    tracemalloc.start()
    try:
        ws = Workspace(growth="exact")
        ws.take("x", size, u1)
        held = tracemalloc.get_traced_memory()[0]
        ws.release()
        assert held - tracemalloc.get_traced_memory()[0] > 0.99 * size
    finally:
        tracemalloc.stop()


def test_ensure_capacity_is_all_or_nothing():
    ws = Workspace(growth="exact")
    ws.take("x", (10,))
    for requests, error, match in [
        ({"a": ((5,), f4), "x": ((11,), f4)}, RuntimeError, "^requests: 'x' is handed out"),
        ({"a": ((5,), f4), "b": ((-5,), f4)}, ValueError, "^shape: "),
        ({"a": ((5,), f4), "b": ((5,), object)}, TypeError, "^dtype: "),
    ]:
        with refused(ws, error, match):
            ws.ensure_capacity(requests)
    ws.ensure_capacity({"x": ((5, 2), np.int32), "a": ((5,), f8)})  # `x` has room for it
    assert (ws.nbytes, ws.allocation_count, ws.used_bytes) == (80, 2, 40)
    assert ws.take("a", (10,)).ctypes.data % 64 == 0
    ws.ensure_capacity({})
    assert ws.allocation_count == 2


def test_repr_and_summary():
    ws = Workspace(limit_bytes=10_000_000)
    assert (
        repr(Workspace())
        == "Workspace(0 buffers, 0 MB held, 0 MB in use, generation 1, 0 allocations)"
    )
    ws.take("small", (3,), np.int16)
    ws.next_generation()
    ws.take("large", (1000, 250))
    assert repr(ws) == (
        "Workspace(2 buffers, 1.05 MB held of at most 10.00 MB, 1.00 MB in use, generation 2, 2 "
        "allocations)"
    )
    head, large, small, total = ws.summary().splitlines()
    assert head.split() == ["name", "capacity,", "B", "view,", "B", "shape", "and", "dtype"]
    assert large.split() == [
        "large",
        "1,048,576",
        "1,000,000",
        "(1000,",
        "250)",
        "float32,",
        "in",
        "use",
    ]
    assert small.split() == ["small", "8", "6", "(3,)", "int16,", "idle"]
    assert total.split()[:3] == ["held", "1,048,584", "1,000,000"]


# --- debug mode: who still holds the last pass? ---

P = np.arange(1, 17, dtype=f4).reshape(4, 4)  # an ordinary array


def watched(shape=(4, 4), dtype=f4, name="x", value=1):
    """A debug workspace in generation 3, and a view from it."""
    ws = Workspace(debug=True)
    ws.next_generation()
    ws.next_generation()
    view = ws.take(name, shape, dtype)
    view[...] = value
    return ws, view


ENDS = {
    "next_generation": Workspace.next_generation,
    "clear": Workspace.clear,
    "release": Workspace.release,
}


def test_results_of_ufuncs_are_ordinary_arrays():
    _, view = watched()
    assert type(view + 1) is np.ndarray
    assert np.add(P, P, out=view) is view  # but `out` is returned as it came


def fresh():
    return watched(name="fresh")[1]


ROUTES = {  # what is done with a view `v` of shape (4, 4)
    "ufunc": lambda v: np.exp(v),
    "operator": lambda v: v + 1,
    "reflected operator": lambda v: P - v,
    "between two workspaces": lambda v: fresh() + v,
    "comparison": lambda v: v == P,
    "abs": lambda v: abs(v),
    "power": lambda v: v**2,
    "divmod": lambda v: divmod(P, v),
    "out": lambda v: np.add(P, P, out=v),
    "out in its place": lambda v: np.add(P, P, v),
    "second out": lambda v: np.divmod(P, P, out=(np.empty_like(P), v)),
    "one out of two": lambda v: np.divmod(P, P, out=(None, v)),
    "in place": lambda v: operator.iadd(v, 1),
    "right of an in-place operator": lambda v: operator.iadd(P.copy(), v),
    "where": lambda v: np.add(P, P, out=P.copy(), where=v.view(bool)[:, :4]),
    "matmul": lambda v: v @ P,
    "right of matmul": lambda v: P @ v,
    "matmul out": lambda v: np.matmul(P, P, out=v),
    "in-place matmul": lambda v: operator.imatmul(v, P),
    "reduce": lambda v: np.add.reduce(v),
    "reduce out": lambda v: np.add.reduce(P[None], axis=0, out=v),
    "accumulate": lambda v: np.multiply.accumulate(v),
    "accumulate out": lambda v: np.multiply.accumulate(P, out=v),
    "reduceat": lambda v: np.add.reduceat(v, [0, 2]),
    "outer": lambda v: np.add.outer(P, v),
    "at": lambda v: np.add.at(v, 0, 1),
    "values of at": lambda v: np.add.at(P.copy(), slice(None), v),
    "item": lambda v: v[0, 0],
    "slice": lambda v: v[1:],
    "ellipsis": lambda v: v[...],
    "fancy index": lambda v: v[[0, 1]],
    "as an index": lambda v: fresh()[v > 0],
    "store": lambda v: operator.setitem(v, 0, 1),
    "store a slice": lambda v: operator.setitem(v, slice(None), P),
    "store from": lambda v: operator.setitem(fresh(), slice(None), v),
    "store a list from": lambda v: operator.setitem(fresh(), slice(0, 1), [v[0]]),
    "iterate": lambda v: list(v),
    "unpack": lambda v: [*v],
    "reversed": lambda v: list(reversed(v)),
    "in": lambda v: 3 in v,
    "sum of Python": lambda v: sum(v),
    "method sum": lambda v: v.sum(),
    "unbound method": lambda v: np.ndarray.sum(v),
    "method dot": lambda v: v.dot(P),
    "method fill": lambda v: v.fill(0),
    "method sort": lambda v: v.sort(),
    "method copy": lambda v: v.copy(),
    "method tolist": lambda v: v.tolist(),
    "method tobytes": lambda v: v.tobytes(),
    "method view": lambda v: v.view(np.ndarray),
    "attribute T": lambda v: v.T,
    "attribute shape": lambda v: v.shape,
    "attribute flat": lambda v: v.flat,
    "attribute real": lambda v: v.real,
    "attribute ctypes": lambda v: v.ctypes.data,
    "attribute data": lambda v: v.data,
    "attribute base": lambda v: v.base,
    "array interface": lambda v: v.__array_interface__,
    "DLPack": lambda v: np.from_dlpack(v),
    "str": lambda v: str(v),
    "repr": lambda v: repr(v),
    "copy.copy": lambda v: copy.copy(v),
    "copy.deepcopy": lambda v: copy.deepcopy(v),
    "pickle": lambda v: pickle.dumps(v),
    "concatenate": lambda v: np.concatenate([P, v]),
    "concatenate out": lambda v: np.concatenate([P[:2], P[:2]], out=v),
    "stack": lambda v: np.stack((v, P)),
    "block": lambda v: np.block([[P, P], [P, v]]),
    "np.where": lambda v: np.where(P > 2, v, 0),
    "einsum": lambda v: np.einsum("ij,jk->ik", P, v),
    "einsum out": lambda v: np.einsum("ij,jk->ik", P, P, out=v),
    "einsum, optimized": lambda v: np.einsum("ij,jk,kl->il", P, P, v, optimize=True),
    "np.dot": lambda v: np.dot(v, P),
    "np.dot out": lambda v: np.dot(P, P, out=v),
    "tensordot": lambda v: np.tensordot(P, v),
    "linalg.norm": lambda v: np.linalg.norm(v),
    "linalg.svd": lambda v: np.linalg.svd(v),
    "linalg.multi_dot": lambda v: np.linalg.multi_dot([P, P, v]),
    "fft": lambda v: np.fft.fft(v),
    "np.sum": lambda v: np.sum(v, axis=0),
    "np.sum out": lambda v: np.sum(P[None], axis=0, out=v),
    "np.mean out": lambda v: np.mean(P[None], axis=0, out=v),
    "np.var": lambda v: np.var(v),
    "np.sort": lambda v: np.sort(v),
    "np.take": lambda v: np.take(v, [0, 1]),
    "np.take out": lambda v: np.take(P, [0, 1, 2, 3], axis=0, out=v, mode="clip"),
    "np.clip": lambda v: np.clip(P, v, 20),
    "np.copyto": lambda v: np.copyto(v, P),
    "np.copyto from": lambda v: np.copyto(P.copy(), v),
    "np.reshape": lambda v: np.reshape(v, -1),
    "np.transpose": lambda v: np.transpose(v),
    "np.broadcast_to": lambda v: np.broadcast_to(v, (2, 4, 4)),
    "np.empty_like": lambda v: np.empty_like(v),
    "np.median": lambda v: np.median(v),
    "np.isfinite": lambda v: np.isfinite(v).all(),
    "np.array_equal": lambda v: np.array_equal(P, v),
    "np.shares_memory": lambda v: np.shares_memory(P, v),
    "np.put": lambda v: np.put(v, [0], 1),
    "np.putmask": lambda v: np.putmask(v, P > 2, 1),
    "a random generator": lambda v: np.random.default_rng(0).random(out=v, dtype=f4),
    "gemm a": lambda v: gemm(v, P, np.empty_like(P)),
    "gemm b": lambda v: gemm(P, v, np.empty_like(P), alpha=2),
    "gemm out": lambda v: gemm(P, P, v, alpha=0.5, beta=2),
    "blend x": lambda v: blend(v, P.copy(), 0.5, 2),
    "blend y": lambda v: blend(P.copy(), v, 0.5, 2),
    "blend a slice": lambda v: blend(P[:, ::2].copy(), v[:, ::2], 0.5, 2),
    "similarity": lambda v: reference.similarity(P, v),
    "apply_context": lambda v: reference.apply_context(P, v, 0.5),
    "bool()": lambda v: bool(v[:1, :1]),
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_stale_view_is_found_by_every_route(route):
    use = ROUTES[route]
    ws, view = watched()
    use(view)  # while it is on loan, all is well
    ws.next_generation()
    with pytest.raises(
        RuntimeError, match=r"^buffer 'x' of generation 3 is stale: .* generation 4; take it again$"
    ):
        use(view)


@pytest.mark.parametrize("end", ENDS)
def test_a_stale_view_is_found_after_every_end(end):
    ws, view = watched()
    ENDS[end](ws)
    with pytest.raises(RuntimeError, match=r"^buffer 'x' of generation 3 is stale"):
        view + 1
    assert np.isnan(np.asarray(view)).all()  # poison


def test_a_stale_view_is_found_after_its_scope():
    ws, outer = watched()
    with ws.scope():
        inner = ws.take("inner", (3,))
        inner.fill(2)
        with ws.scope():
            assert np.all(ws.take("inner", (3,)) == 2)
        assert np.all(inner == 2)
    with pytest.raises(
        RuntimeError, match=r"^buffer 'inner' of generation 3 is stale: its scope has ended"
    ):
        inner + outer
    with ws.scope():
        again = ws.take("inner", (3,))
        assert np.isnan(again).all()
        again.fill(0)
        with pytest.raises(
            RuntimeError, match="'inner' of generation 3"
        ):  # although the name is in use again
            inner + again
    assert np.all(outer == 1)


INDEXED = {
    "copy of an index": lambda i: P[i.copy()],  # see below for P[i]
    "index of a watched array": lambda i: fresh()[i],
    "mask of a watched array": lambda i: fresh()[(P[0] > 2) & (i == i)],
    "store to": lambda i: operator.setitem(fresh(), i, 1),
    "store to a part": lambda i: operator.setitem(fresh(), (i, 0), 1),
    "fetch a part": lambda i: fresh()[i, 1:],
    "at": lambda i: np.add.at(P.copy(), i, 1),
    "at a part": lambda i: np.add.at(fresh(), (i, 0), 1),
    "reduceat": lambda i: np.add.reduceat(P, i),
    "take_along_axis": lambda i: np.take_along_axis(P, i[None], 0),
    "where": lambda i: np.exp(P, out=P.copy(), where=i),
    "where of a sum": lambda i: np.sum(P, where=i),
    "initial": lambda i: np.add.reduce(P, initial=i[0]),
}


@pytest.mark.parametrize("case", INDEXED)
def test_a_stale_index_or_mask_is_found(case):
    ws, i = watched((4,), bool if case.startswith("where") else np.intp, value=1)
    INDEXED[case](i)
    ws.next_generation()
    with pytest.raises(RuntimeError, match=r"^buffer 'x' of generation 3 is stale"):
        INDEXED[case](i)


VIEWS = {
    "itself": lambda v: v,
    "slice": lambda v: v[1:],
    "empty slice": lambda v: v[2:2],
    "row": lambda v: v[2],
    "row by iteration": lambda v: list(v)[1],
    "strides": lambda v: v[1:, ::2].T,
    "backwards": lambda v: v[::-1, ::-1],
    "last entry": lambda v: v[3:, 3:],
    "zero dimensions": lambda v: v[3, 3, ...],
    "T": lambda v: v.T,
    "reshape": lambda v: v.reshape(2, 8),
    "ravel": lambda v: v.ravel(),
    "other dtype": lambda v: v.view(np.int16),
    "new axis": lambda v: v[None, ..., None],
    "real": lambda v: v.real,
    "diagonal": lambda v: v.diagonal(),
    "swapaxes": lambda v: v.swapaxes(0, 1),
    "astype without a copy": lambda v: v.astype(f4, copy=False),
    "asanyarray": lambda v: np.asanyarray(v),
    "array with subok": lambda v: np.array(v, copy=None, subok=True),
    "split": lambda v: np.split(v, 2)[1],
    "flip": lambda v: np.flip(v),
    "moveaxis": lambda v: np.moveaxis(v, 0, 1),
    "expand_dims": lambda v: np.expand_dims(v, 1),
    "atleast_3d": lambda v: np.atleast_3d(v),
    "broadcast_to with subok": lambda v: np.broadcast_to(v, (2, 4, 4), subok=True),
    "broadcast_to": lambda v: np.broadcast_to(v, (2, 4, 4)),
    "sliding_window_view": lambda v: np.lib.stride_tricks.sliding_window_view(v, (2, 2)),
    "result of out": lambda v: np.add(v, 1, out=v),
    "result of gemm": lambda v: gemm(P, P, v),
    "result of an operator": lambda v: operator.iadd(v, 1),
    "view of a view of a view": lambda v: v.T[1:][::2].view(np.int32)[..., None],
}


@pytest.mark.parametrize("case", VIEWS)
def test_a_view_of_a_view_inherits_the_lease(case):
    ws, v = watched()
    view = VIEWS[case](v)
    assert np.may_share_memory(np.asarray(v), np.asarray(view)) or view.size == 0
    ws.next_generation()
    for use in (lambda: view + 1, lambda: view[...], lambda: view.shape, lambda: np.stack([view])):
        with pytest.raises(RuntimeError, match="'x' of generation 3"):
            use()


def test_parts_of_complex_numbers_and_of_records_inherit_the_lease():
    ws, z = watched(dtype=np.complex64)
    record = ws.take("r", (3,), [("a", "i2"), ("b", f4)])
    parts = z.real, z.imag, record["a"], record["b"], record[["b"]]
    for part in parts:
        assert part[...] is not None
    ws.next_generation()
    for part in parts:
        with pytest.raises(RuntimeError, match="of generation 3"):
            part[...]


COPIES = {
    "copy": lambda v: v.copy(),
    "copy.copy": lambda v: copy.copy(v),
    "copy.deepcopy": lambda v: copy.deepcopy(v),
    "pickle": lambda v: pickle.loads(pickle.dumps(v)),
    "flatten": lambda v: v.flatten(),
    "astype": lambda v: v.astype(f8),
    "np.array": lambda v: np.array(v),
    "np.array with subok": lambda v: np.array(v, subok=True),
    "np.copy": lambda v: np.copy(v, subok=True),
    "fancy index": lambda v: v[[0, 2]],
    "mask": lambda v: v[v > 0],
    "entry": lambda v: v[1, 1],
    "sum": lambda v: v.sum(axis=0),
    "operator": lambda v: v * 2,
    "matmul": lambda v: v.T @ v,
    "concatenate": lambda v: np.concatenate([v, v]),
    "where": lambda v: np.where(v > 0, v, 0),
    "sort": lambda v: np.sort(v),
    "take": lambda v: v.take([0, 1]),
    "repeat": lambda v: v.repeat(2, axis=0),
    "einsum": lambda v: np.einsum("ij,jk->ik", v, v),
    "dot": lambda v: v.dot(v),
    "list": lambda v: v.tolist(),
    "copy of a slice": lambda v: v[1:, ::2].copy(),
    "an ordinary out": lambda v: np.add(v, 1, out=np.empty_like(P)),
    "empty_like": lambda v: np.ones_like(v),
}


@pytest.mark.parametrize("case", COPIES)
def test_copies_are_free_to_stay(case):
    ws, v = watched(value=P)
    made = COPIES[case](v)
    kept = np.array(made)
    for _ in range(3):
        ws.next_generation()
        ws.take("x", (4, 4)).fill(7)
        assert np.array_equal(made, kept)
        assert np.all(np.add(made, 1) == kept + 1)
        if isinstance(made, np.ndarray) and made.ndim:
            made[...] = kept
    ws.next_generation()
    ws.take("x", (4, 4))  # and nobody wrote to the buffer through them


def test_everything_given_back_is_poisoned():
    ws = Workspace(debug=True)
    for dtype in (f4, f8, np.complex64, np.int16):
        view = ws.take("x", (100,), dtype)
        poison = np.full(view.nbytes, 0xFF, u1)
        assert np.array_equal(np.asarray(view).view(u1), poison)  # also when it is new
        view[...] = 0
        plain = np.asarray(view)
        ws.next_generation()
        assert np.array_equal(plain.view(u1), poison)
    ws.ensure_capacity({"y": ((50,), f4)})
    assert np.isnan(ws.take("y", (7, 7))).all()


@pytest.mark.parametrize(
    "write", [lambda a: a.fill(0), lambda a: operator.setitem(a.reshape(-1), -1, 0)]
)
@pytest.mark.parametrize(
    "escape", [np.asarray, lambda v: v.view(np.ndarray), memoryview, np.ascontiguousarray]
)
def test_a_write_through_an_escaped_view_is_found(escape, write):
    ws, view = watched()
    escaped = escape(view)
    ws.next_generation()
    assert np.isnan(np.asarray(escaped)).all()
    write(np.asarray(escaped))
    ws.next_generation()
    ws.take("other", (3,))
    before = figures(ws)
    with pytest.raises(
        RuntimeError, match=r"^buffer 'x' was written to after generation 3 had given it back"
    ):
        ws.take("x", (2,))  # the whole storage is looked at, not what is asked for now
    assert figures(ws) == before
    assert np.isnan(ws.take("x", (2,))).all()  # said once


def test_a_write_beyond_the_last_request_is_found():
    ws, view = watched()
    escaped = np.asarray(view)
    for _ in range(2):
        ws.next_generation()
        ws.take("x", (2,))
    ws.next_generation()
    escaped[3, 3] = 1
    with pytest.raises(RuntimeError, match=r"^buffer 'x' was written to after generation 5"):
        ws.take("x", (2,))


def test_what_stays_out_of_sight_reads_poison():
    # NumPy asks nobody here. If one of these is found one day, so much the better: move it to
    # ROUTES.
    ws, view = watched()
    index = ws.take("index", (2,), np.intp)
    escaped = np.asarray(view)
    ws.next_generation()
    target = np.zeros_like(P)
    target[...] = view
    reads = [target, escaped, np.array(view), np.array([view, view]), np.asarray(memoryview(view))]
    assert all(np.isnan(read).all() for read in [*reads, np.add([view], 1)])
    target = np.arange(3)
    np.add.at(target, (index,), 1)  # poison is -1
    assert target[2] == 4
    assert np.array_equal(target[index], [4, 4])
    assert np.array_equal(np.take(target, index), [4, 4])


def pipeline(ws, seed):
    """Attention and more, everything in buffers; bytes of all that is made on the way."""
    rng = np.random.default_rng(seed)
    x, w = make(rng, (6, 8)), make(rng, (3, 8, 8))
    out = []
    take = ws.take

    def note(*arrays):
        out.extend(np.asarray(a).tobytes() for a in arrays)

    for _ in range(2):  # the second time in storage that was used
        ws.next_generation()
        q, k, v = (np.matmul(x, w[i], out=take("qkv"[i], (6, 8))) for i in range(3))
        with ws.scope():
            s = np.einsum("id,jd->ij", q, k, out=take("s", (6, 6)))
            s -= np.max(s, axis=1, keepdims=True, out=take("max", (6, 1)))
            np.exp(s, out=s)
            s /= np.add.reduce(s, axis=1, keepdims=True, out=take("sum", (6, 1)))
            note(s, s.sum(axis=0), s.T @ v, np.mean(s, axis=0, out=take("mean", (6,))))
            h = gemm(s, v, take("h", (6, 8)))
        h = take("after", (6, 8))
        h[...] = 0
        with ws.scope():
            index = take("index", (9,), np.intp)
            index[:] = np.arange(9) % 6
            np.add.at(h, index, q[:1])
            note(h, h[index], np.subtract.at(h, (index, 0), 1), h)
        np.multiply.accumulate(q, axis=0, out=h)
        note(
            h,
            np.add.reduceat(q, [0, 3, 4], axis=0, out=take("three", (3, 8))),
            np.minimum.reduce(q, axis=None),
        )
        note(*np.divmod(q, k, out=(take("d", (6, 8)), take("m", (6, 8)))))
        note(*np.divmod(q, k, out=(None, take("m", (6, 8)))), *np.modf(q))
        note(*np.frexp(q, take("f", (6, 8)), take("e", (6, 8), np.int32)))
        positive = np.greater(q, 0, out=take("positive", (6, 8), bool))
        note(
            np.sqrt(q, out=h, where=positive),
            np.sum(q, axis=1, where=positive),
            np.where(positive, q, k),
        )
        note(
            q.std(axis=0, out=take("std", (8,))),
            np.linalg.norm(q),
            np.cumsum(k, axis=1, out=h),
            q.argmax(axis=0),
        )
        note(
            q[1:, ::2] @ k[:, ::2].T,
            np.concatenate([q, k], out=take("cat", (12, 8))),
            np.clip(q, -1, k, out=h),
        )
        blend(q, v, 0.25, 2.0)
        gemm(q, w[0], k, alpha=0.5, beta=-1.0)
        gemm(q.T, k, take("square", (8, 8)))
        note(
            v,
            k,
            take("square", (8, 8)),
            *(a.copy() for a in (q, h)),
            q.tolist(),
            float(q[0, 0]),
            q.dot(w[1]),
        )
        note(reference.similarity(q, k), reference.apply_context(q, take("square", (8, 8)), 0.5))
        note(
            reference.context_gradient(q, 0.5, k),
            reference.ema(None, q, 0.25),
            reference.similarity_step(q[0], k[0]),
        )
        note(
            reference.apply_context_vjp(q, take("square", (8, 8)), 0.5, k)[0],
            np.sort(q),
            q.T.copy(),
            -k,
            q == k,
        )
    return out


@pytest.mark.slow
@few
@given(seeds, policies)
def test_debugging_changes_no_bit(seed, growth):
    want = pipeline(Workspace(growth=growth), seed)
    assert pipeline(Workspace(growth=growth, debug=True), seed) == want
    assert pipeline(_Recorder(), seed) == want


UFUNCS = sorted({f for f in vars(np).values() if isinstance(f, np.ufunc)}, key=lambda f: f.__name__)


def test_every_ufunc_gives_the_same_bits_in_debug_mode():
    tried = 0
    for ufunc in UFUNCS:
        for dtype in (f4, np.int16):
            plain = [make(np.random.default_rng(i), (3, 3)).astype(dtype) for i in range(ufunc.nin)]
            with np.errstate(all="ignore"):
                try:
                    want = ufunc(*plain)
                except (TypeError, ValueError):  # not for this dtype, or not for these values
                    continue
                ws = Workspace(debug=True)
                inputs = [ws.take(f"in {i}", (3, 3), dtype) for i in range(ufunc.nin)]
                for view, a in zip(inputs, plain, strict=True):
                    view[...] = a
                got = ufunc(*inputs)
                wants, gots = (r if ufunc.nout > 1 else (r,) for r in (want, got))
                outs = tuple(ws.take(f"out {i}", r.shape, r.dtype) for i, r in enumerate(wants))
                returned = ufunc(*inputs, out=outs)
                assert all(
                    r is o
                    for r, o in zip(returned if ufunc.nout > 1 else (returned,), outs, strict=True)
                )
            for a, b, out in zip(wants, gots, outs, strict=True):
                assert type(b) is type(a)
                assert a.tobytes() == b.tobytes() == out.tobytes(), ufunc
            tried += 1
    assert tried > 100


# --- threads ---


@contextmanager
def unless_foreign():
    """Another thread may have the workspace; nothing else may go wrong."""
    try:
        yield
    except RuntimeError as e:
        if FOREIGN not in str(e):
            raise


@contextmanager
def switching_fast():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


FOREIGN = "in use by another thread"


@debugging
@pytest.mark.parametrize("way", ["scope", "generation"])
def test_exactly_one_thread_wins(way, debug):
    n, rounds, ws = 6, 30, Workspace(debug=debug)
    start, tried, done = (threading.Barrier(n, timeout=60) for _ in range(3))
    winners, refusals = [[] for _ in range(rounds)], [0] * n

    def hold(me, i, view):
        view.fill(me)
        winners[i].append(me)
        tried.wait()
        assert np.all(view == me)  # nobody else has written there

    def worker(me):
        for i in range(rounds):
            start.wait()
            try:
                if way == "scope":
                    with ws.scope():
                        hold(me, i, ws.take("x", (1 + (me + i) % 5, 100)))
                else:
                    hold(me, i, ws.take("x", (1 + (me + i) % 5, 100)))
                    ws.next_generation()
            except RuntimeError as e:
                if FOREIGN not in str(e):
                    raise
                refusals[me] += 1
                for forbidden in (
                    ws.next_generation,
                    ws.clear,
                    ws.release,
                    lambda: ws.ensure_capacity({}),
                ):
                    with pytest.raises(RuntimeError, match=FOREIGN):
                        forbidden()
                tried.wait()
            done.wait()

    with switching_fast():
        in_threads(*(lambda me=me: worker(me) for me in range(n)))
    assert [len(w) for w in winners] == [1] * rounds
    assert sum(refusals) == (n - 1) * rounds
    assert ws.used_bytes == 0


@debugging
def test_no_two_threads_hold_the_same_memory(debug):
    n, ws, inside, wins = 4, Workspace(debug=debug), [], [0] * 4
    start = threading.Barrier(n, timeout=60)

    def critical(me, view):
        inside.append(me)
        view.fill(me)
        for _ in range(3):
            assert inside == [me]
            assert np.all(view == me)
        inside.remove(me)
        wins[me] += 1

    def worker(me):
        rng = np.random.default_rng(me)
        start.wait()
        for shape, how in zip(
            rng.integers(0, 50, (150, 2)).tolist(), rng.integers(0, 4, 150), strict=True
        ):
            with unless_foreign():
                if how == 0:
                    with ws.scope(), ws.scope():
                        critical(me, ws.take("x", shape))
                elif how == 1:
                    with suppress(ZeroDivisionError), ws.scope():
                        critical(me, ws.take("x", shape, f8))
                        1 / 0  # noqa: B018
                elif how == 2:
                    critical(me, ws.take("x", shape))
                    ws.next_generation()
                else:
                    ws.ensure_capacity({"x": (shape, f8)})

    with switching_fast():
        in_threads(*(lambda me=me: worker(me) for me in range(n)))
    assert sum(wins) > 0
    assert ws.used_bytes == 0
    assert ws.take("x", (3,)).shape == (3,)


@debugging
@pytest.mark.parametrize(
    "how", ["next_generation", "scope", "exception in a scope", "clear", "release"]
)
def test_a_workspace_moves_from_thread_to_thread(how, debug):
    ws, turns = Workspace(debug=debug), []

    def turn():
        me = threading.get_ident()
        if "scope" in how:
            with suppress(ZeroDivisionError), ws.scope():
                ws.take("x", (3,)).fill(1)
                with ws.scope():
                    ws.take("y", (3,))
                with pytest.raises(RuntimeError, match=FOREIGN):
                    in_threads(lambda: ws.take("z", (3,)))
                if how != "scope":
                    1 / 0  # noqa: B018
        else:
            ws.take("x", (3,)).fill(1)
            with pytest.raises(RuntimeError, match=FOREIGN):
                in_threads(getattr(ws, how))
            getattr(ws, how)()
        turns.append(me)

    for _ in range(3):
        turn()
        in_threads(turn)
    assert len(turns) == 6
    assert ws.used_bytes == 0


def test_a_scope_inside_what_is_taken_keeps_the_owner():
    ws = Workspace()
    ws.take("x", (3,))
    with ws.scope():
        ws.take("y", (3,))
    with pytest.raises(RuntimeError, match=FOREIGN):
        in_threads(lambda: ws.take("y", (3,)))
    ws.next_generation()
    in_threads(lambda: ws.take("y", (3,)))


def test_looking_needs_no_ownership():
    ws = Workspace()
    ws.take("x", (3,))
    seen = []
    in_threads(lambda: seen.append((figures(ws), repr(ws), ws.summary())))
    assert seen == [(figures(ws), repr(ws), ws.summary())]


def test_the_claim_of_a_dead_thread_is_void():
    ws = Workspace()
    in_threads(lambda: ws.take("x", (3,)))
    assert ws.take("y", (3,)).shape == (3,)
    with pytest.raises(RuntimeError, match=FOREIGN):
        in_threads(lambda: ws.take("y", (3,)))  # now it is ours
    ws.next_generation()
    assert ws.take("x", (4,)).shape == (4,)


def test_one_workspace_for_each_thread():
    n, results = 4, {}
    start = threading.Barrier(n, timeout=60)

    def worker(me):
        ws = Workspace(debug=me % 2 == 0)
        start.wait()
        results[me] = [pipeline(ws, seed) for seed in (me, 99)]

    with switching_fast():
        in_threads(*(lambda me=me: worker(me) for me in range(n)))
    assert results == {me: [pipeline(Workspace(), seed) for seed in (me, 99)] for me in range(n)}


# --- bytes before running ---

letters = {
    "B": st.integers(0, 4),
    "S": st.integers(0, 4),
    "D": st.integers(1, 5),
    "d_k": st.integers(1, 3),
}
sizes_of_letters = st.fixed_dictionaries(letters)
dims = st.integers(0, 5) | st.sampled_from([*letters, "2 D", "B S", "3 d_k D", "2 2", "B B B"])
leaves = st.tuples(
    st.just("buffer"),
    st.lists(dims, max_size=3).map(tuple),
    st.sampled_from([f4, "f8", bool, "u2"]),
)
trees = st.recursive(
    leaves,
    lambda t: st.tuples(st.sampled_from(["all", "any"]), st.lists(t, max_size=3).map(tuple)),
    max_leaves=8,
)


def named(tree, numbers):
    """The tree with a name of its own for every buffer."""
    if tree[0] == "buffer":
        return ("buffer", f"b{next(numbers)}", *tree[1:])
    return tree[0], tuple(named(part, numbers) for part in tree[1])


def requirement(tree):
    if tree[0] == "buffer":
        return Buffer(*tree[1:])
    return (all_of if tree[0] == "all" else any_of)(*map(requirement, tree[1]))


def follow(ws, todo, sizes):
    """Do what a requirement says: alternatives each in a scope, and whatever comes with them inside
    it.
    """
    if not todo:
        return
    (kind, *rest), later = todo[0], todo[1:]
    if kind == "buffer":
        name, shape, dtype = rest
        factors = [[int(f) if f.isdigit() else sizes[f] for f in str(n).split()] for n in shape]
        ws.take(name, tuple(map(math.prod, factors)), dtype)
        follow(ws, later, sizes)
    elif kind == "all":
        follow(ws, [*rest[0], *later], sizes)
    else:
        for part in rest[0] or [("all", ())]:
            with ws.scope():
                follow(ws, [part, *later], sizes)


def evaluated(formula, sizes):
    """The formula as Python reads it: `*` between neighbours, `**` for `^`."""
    tokens = re.findall(r"\d+|[A-Za-z_]\w*|[-+^,()]", formula)
    assert re.sub(r"\s", "", formula) == "".join(tokens)
    ends_term, starts_term = re.compile(r"\w+$|\)$"), re.compile(r"\w+$")
    text = tokens[0]
    for before, token in itertools.pairwise(tokens):
        product = ends_term.match(before) and starts_term.match(token)
        text += ("*" if product else "") + {"^": "**"}.get(token, token)
    return eval(text, {"__builtins__": {}, "max": lambda *parts: max(parts, default=0)}, sizes)


@pytest.mark.slow
@settings(max_examples=150)
@given(trees, sizes_of_letters, policies)
@example(
    ("all", (("any", (("buffer", ("B",), f4),)), ("any", (("buffer", ("B",), f4),)))),
    dict.fromkeys(letters, 3),
    "exact",
)
@example(("any", ()), dict.fromkeys(letters, 3), "exact")
def test_a_requirement_is_what_running_takes(tree, sizes, growth):
    tree = named(tree, itertools.count())
    need = requirement(tree)
    nbytes = need.nbytes(**sizes)
    ws = Workspace(growth=growth)
    follow(ws, [tree], sizes)
    assert ws.peak_bytes == nbytes
    assert evaluated(str(need), sizes) == nbytes

    ready = Workspace(growth=growth)
    ready.ensure_capacity(need.requests(**sizes))
    count = ready.allocation_count
    follow(ready, [tree], sizes)
    assert ready.allocation_count == count == len(list(need.buffers()))


def test_formulas_read_well():
    stream, qkv = Buffer("stream", ("B", "S", "D")), Buffer("qkv", ("3 B", "S", "D"))
    scores = Buffer("scores", ("B", "H", "S", "S"), "f2")
    need = all_of(
        stream,
        any_of(all_of(qkv, scores), Buffer("hidden", ("B", "S", 7), bool)),
        Buffer("one", ()),
    )
    assert str(need) == "4 B S D + max(12 B S D + 2 B H S^2, 7 B S) + 4"
    assert [b.name for b in need.buffers()] == ["stream", "qkv", "scores", "hidden", "one"]
    assert str(all_of(stream, qkv)) == "16 B S D"
    assert str(Buffer("flag", (), bool)) == "1"
    assert str(Buffer("flags", ("N",), bool)) == "N"
    assert str(all_of()) == "0"
    assert all_of(stream, all_of(stream, qkv)).nbytes(B=1, S=2, D=3) == 96  # named twice, it is one


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({}, "^sizes: B is missing, given are none$"),
        ({"B": 2}, "^sizes: S is missing, given are B$"),
    ],
)
def test_missing_sizes_are_named(sizes, match):
    need = all_of(Buffer("a", ("2 B",)), any_of(Buffer("b", ("B", "S"))))
    for ask in (need.nbytes, need.requests):
        with pytest.raises(ValueError, match=match):
            ask(**sizes)
    with pytest.raises(ValueError, match=r"^shape: .*'a' has a negative dimension"):
        need.nbytes(B=-1, S=1)


def test_requests_keep_the_largest_shape_of_a_name():
    need = any_of(Buffer("x", ("B", 3)), Buffer("x", ("S",), f8), Buffer("x", (2, 2), np.int8))
    assert need.requests(B=1, S=2) == {"x": ((2,), f8)}
    assert need.requests(B=9, S=2) == {"x": ((9, 3), f4)}


# --- scopes that overlap on one thread ---


def holder(ws, name, shape=(4,)):
    """A generator that keeps a scope open while it is suspended."""
    with ws.scope(name):
        view = ws.take(f"{name}.buf", shape)
        view.fill(1)
        while (sent := (yield view)) is not None:
            view = sent()


def overlap(*names):
    """The message of a refusal: both scopes, with the lines where they were opened."""
    where = r"scope '{}' \(.*test_workspace.py:\d+, in \w+\)"
    return " overlaps ".join(where.format(name) for name in names) + ", which is open"


def steps_alone(*coroutines):
    """Run coroutines as a loop does: contexts of their own, one step of each in turn."""
    contexts = [contextvars.copy_context() for _ in coroutines]
    results = [None] * len(coroutines)
    left = dict(enumerate(coroutines))
    while left:
        for i, coroutine in list(left.items()):
            try:
                contexts[i].run(coroutine.send, None)
            except StopIteration as stop:
                results[i] = stop.value
                del left[i]
            except RuntimeError as error:
                results[i] = error
                del left[i]
    return results


@types.coroutine
def pause():
    yield


async def request(ws, name, pauses):
    with ws.scope(name):
        view = ws.take(f"{name}.buf", (4,))
        view.fill(1)
        for _ in range(pauses):
            await pause()
        return np.array(view)


@debugging
def test_a_scope_in_another_task_is_refused_when_it_is_opened(debug):
    ws = Workspace(debug=debug)
    first, second, third = steps_alone(
        request(ws, "a", 3), request(ws, "b", 1), request(ws, "c", 1)
    )
    assert np.all(first == 1)
    for error, name in ((second, "b"), (third, "c")):
        assert re.search(overlap(name, "a"), str(error))
    assert (ws.used_bytes, list(ws._buffers)) == (0, ["a.buf"])
    assert np.all(steps_alone(request(ws, "b", 1))[0] == 1)  # when the first has ended
    in_threads(lambda: ws.take("x", (3,)))


def test_tasks_of_asyncio_cannot_reach_one_another():
    ws = Workspace()

    async def late():
        await asyncio.sleep(0)
        with ws.scope("late"):
            ws.take("first.buf", (2, 2)).fill(7)

    async def slow(name):
        with ws.scope(name):
            view = ws.take(f"{name}.buf", (4,))
            view.fill(1)
            await asyncio.sleep(0.01)
            return view.copy()

    async def main():
        tasks = slow("first"), slow("second"), late()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = asyncio.run(main())
    assert np.all(first == 1)
    for error, name in zip(others, ("second", "late"), strict=True):
        assert re.search(overlap(name, "first"), str(error))
    assert ws.used_bytes == 0


FROM_OUTSIDE = {
    "take": lambda ws: ws.take("x", (3,)),
    "take the same": lambda ws: ws.take("a.buf", (4,)),
    "take what was taken before": lambda ws: ws.take("before", (3,)),
    "ensure_capacity": lambda ws: ws.ensure_capacity({"x": ((3,), f4)}),
    "next_generation": Workspace.next_generation,
    "clear": Workspace.clear,
    "release": Workspace.release,
    "arrange": lambda ws: ws.arrange(plan({})),
}


@debugging
@pytest.mark.parametrize("what", FROM_OUTSIDE)
def test_nothing_is_possible_while_another_task_has_a_scope(what, debug):
    ws = Workspace(debug=debug)
    ws.take("before", (3,))
    task, context = request(ws, "a", 1), contextvars.copy_context()
    context.run(task.send, None)
    match = r"a request from outside of scopes overlaps scope 'a' \(.*:\d+, in request\)"
    with refused(ws, RuntimeError, match):
        FROM_OUTSIDE[what](ws)
    with pytest.raises(StopIteration) as end:
        context.run(task.send, None)
    assert np.all(end.value.value == 1)
    assert ws.used_bytes == 12


def test_a_task_may_have_a_scope_inside_that_of_the_task_that_waits_for_it():
    ws = Workspace()

    async def child(name):
        with ws.scope(name):
            view = ws.take(f"{name}.buf", (3,))
            view.fill(3)
            await asyncio.sleep(0)
            return float(view.sum())

    async def parent():
        with ws.scope("parent"):
            view = ws.take("parent.buf", (4,))
            view.fill(1)
            one = await asyncio.create_task(child("one"))
            two = await asyncio.create_task(child("two"))
            with pytest.raises(RuntimeError, match=overlap("b", "a")):
                await asyncio.gather(child("a"), child("b"))
            return one, two, float(view.sum())

    assert asyncio.run(parent()) == (9, 9, 4)
    assert ws.used_bytes == 0


def test_a_task_that_leaves_before_its_child_is_refused():
    ws, seen = Workspace(), []

    async def child(go):
        with ws.scope("child"):
            view = ws.take("parent.buf", (4,)) if not go else ws.take("child.buf", (4,))
            view.fill(2)
            await go.wait()
            seen.append(float(view.sum()))

    tasks = []

    async def parent(go):
        with ws.scope("parent"):
            ws.take("parent.buf", (4,))
            tasks.append(asyncio.create_task(child(go)))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match=overlap("parent", "child")):
                ws.take("more", (4,))

    async def main():
        go = asyncio.Event()
        with pytest.raises(RuntimeError, match=overlap("parent", "child")):
            await parent(go)
        assert ws.used_bytes == 32  # the parent's too: the child may have been handed it
        with pytest.raises(RuntimeError, match="a request from outside of scopes overlaps"):
            ws.take("parent.buf", (2,))
        go.set()
        await tasks[0]

    asyncio.run(main())
    assert seen == [8]
    assert ws.used_bytes == 0
    ws.next_generation()


@debugging
def test_generators_that_take_turns_are_refused_and_keep_their_buffers(debug):
    ws = Workspace(debug=debug)
    a, b = holder(ws, "a"), holder(ws, "b")
    first, second = next(a), next(b)
    with pytest.raises(RuntimeError, match=overlap("a", "b")):
        a.send(lambda: ws.take("more", (3,)))  # would be given back with b
    assert np.all(second == 1)
    assert ws.used_bytes == 32  # also what a took: nobody says that b does not use it
    with pytest.raises(RuntimeError, match=r"'b.buf' is in use in scope 'b'"):
        ws.take("b.buf", (2,))
    b.close()
    assert ws.used_bytes == 0
    if debug:
        for view in (first, second):
            with pytest.raises(RuntimeError, match=r"stale: its scope has ended"):
                view + 1
    ws.next_generation()
    assert list(holder(ws, "a")) is not None


def test_a_generator_that_ends_before_a_later_one_is_refused():
    ws = Workspace()
    a, b = holder(ws, "a"), holder(ws, "b")
    next(a)
    kept = next(b)
    with pytest.raises(RuntimeError, match=overlap("a", "b")):
        next(a)
    assert b.send(lambda: ws.take("b.buf", (4,))) is not None
    assert np.all(kept == 1)
    with pytest.raises(StopIteration):
        next(b)
    assert ws.used_bytes == 0
    assert ws.take("a.buf", (7,)).shape == (7,)


def test_a_generator_that_goes_on_inside_a_later_scope_is_refused():
    ws = Workspace()
    a = holder(ws, "a")
    next(a)
    with ws.scope("inner"):
        with pytest.raises(RuntimeError, match=overlap("a", "inner")):
            a.send(lambda: ws.take("more", (3,)))
        assert ws.used_bytes == 16
    assert ws.used_bytes == 0


@debugging
def test_whoever_uses_a_generator_keeps_what_it_takes(debug):
    ws = Workspace(debug=debug)
    for view in holder(ws, "a"):
        mine = ws.take("mine", (3,))
        mine.fill(5)
        with pytest.raises(RuntimeError, match=r"name: 'a.buf' is in use in scope 'a' .*suspended"):
            ws.take("a.buf", (4,))
        assert np.all(view == 1)
    assert np.all(mine == 5)
    assert ws.used_bytes == 12
    with refused(ws, ValueError, "'mine' is"):
        ws.take("mine", (4,))
    with ws.scope("outer"):
        for _ in holder(ws, "a"):
            ws.take("inner", (3,))
        assert ws.used_bytes == 24
    assert ws.used_bytes == 12


@debugging
def test_generators_in_proper_order_work(debug):
    ws = Workspace(debug=debug)
    for _ in range(2):
        for a in holder(ws, "a"):
            for b in holder(ws, "b"):
                with ws.scope("innermost"):
                    ws.take("x", (5,)).fill(a[0] + b[0])
        a = holder(ws, "a")
        next(a)
        assert a.send(lambda: ws.take("more", (3,))).shape == (3,)
        a.close()
        assert ws.used_bytes == 0
        ws.next_generation()


@contextmanager
def wrapped(ws):
    with ws.scope("wrapped"):
        ws.take("before", (3,))
        yield ws


@asynccontextmanager
async def wrapped_async(ws):
    with ws.scope("wrapped"):
        ws.take("before", (3,))
        yield ws


def test_the_scope_of_a_context_manager_is_that_of_whoever_enters_it():
    ws = Workspace()
    with wrapped(ws):
        ws.take("x", (5,))
        ws.take("before", (3,))
        with wrapped(ws):
            ws.take("y", (5,))
        assert ws.used_bytes == 32
    assert ws.used_bytes == 0
    with ExitStack() as stack:
        stack.enter_context(wrapped(ws))
        stack.enter_context(ws.scope())
        ws.take("x", (5,))
    assert ws.used_bytes == 0

    async def main():
        async with wrapped_async(ws), AsyncExitStack() as stack:
            await stack.enter_async_context(wrapped_async(ws))
            await asyncio.sleep(0)
            ws.take("x", (5,))
            ws.take("before", (3,))

    asyncio.run(main())
    assert ws.used_bytes == 0


def test_an_exit_stack_in_the_wrong_order_is_refused():
    ws, a, b = Workspace(), ExitStack(), ExitStack()
    a.enter_context(ws.scope("a"))
    ws.take("x", (3,)).fill(1)
    b.enter_context(ws.scope("b"))
    shared, own = ws.take("x", (3,)), ws.take("y", (3,))
    own.fill(2)
    with pytest.raises(RuntimeError, match=overlap("a", "b")):
        a.close()
    for name in "xy":
        with refused(ws, ValueError, f"'{name}' is"):
            ws.take(name, (4,))
    assert np.all(shared == 1)
    assert np.all(own == 2)
    b.close()
    assert ws.used_bytes == 0
    assert ws.take("x", (4,)).shape == (4,)


def test_an_error_inside_stays_the_context_of_a_refusal():
    ws = Workspace()

    def divide_between_scopes():
        with ws.scope("a"):
            ws.scope("b").__enter__()
            return 1 / 0

    with pytest.raises(RuntimeError, match=overlap("a", "b")) as caught:
        divide_between_scopes()
    assert isinstance(caught.value.__context__, ZeroDivisionError)


@pytest.mark.parametrize("name", ["", "loss"])
def test_a_scope_says_where_it_was_opened(name):
    ws = Workspace()
    line = sys._getframe().f_lineno + 1
    scope = ws.scope(name)
    shown = f"scope {name!r} (" if name else "scope ("
    assert str(scope) == f"{shown}{__file__}:{line}, in {sys._getframe().f_code.co_name})"


def test_a_scope_is_entered_once_and_left_once():
    ws = Workspace()
    with ws.scope("outer"):
        ws.take("x", (3,)).fill(1)
        scope = ws.scope("inner")
        with pytest.raises(RuntimeError, match=r"^scope 'inner' .* never entered$"):
            scope.__exit__(None, None, None)
        with scope:
            with pytest.raises(RuntimeError, match=r"^scope 'inner' .* was entered before"):
                scope.__enter__()
            ws.take("y", (3,))
        assert ws.used_bytes == 12
        with pytest.raises(RuntimeError, match=r"^scope 'inner' .* it was left before$"):
            scope.__exit__(None, None, None)
        with pytest.raises(RuntimeError, match=r"^scope 'inner' .* was entered before"):
            scope.__enter__()
        assert ws.used_bytes == 12
    assert ws.used_bytes == 0
    ws.next_generation()


@pytest.mark.slow
def test_a_generator_that_is_dropped_gives_back():
    ws = Workspace()
    a = holder(ws, "a")
    next(a)
    del a
    gc.collect()
    assert ws.used_bytes == 0
    a = holder(ws, "a")
    cycle = [a]
    cycle.append(cycle)
    next(a)
    gc.disable()  # a collection of its own accord would come too early
    try:
        del a, cycle
        assert ws.used_bytes == 16
    finally:
        gc.enable()
    gc.collect()
    assert ws.used_bytes == 0


def test_a_generator_that_another_thread_closes_takes_nothing_from_the_owner():
    ws = Workspace()
    generator = holder(ws, "a")
    next(generator)

    def close():
        with pytest.raises(RuntimeError, match="cannot be left by another thread"):
            generator.close()

    in_threads(close)
    mine = ws.take("mine", (3,))
    mine.fill(1)
    assert ws.used_bytes == 12
    with ws.scope("b"):
        ws.take("a.buf", (9,)).fill(2)
    assert np.all(mine == 1)
    ws.next_generation()
    in_threads(lambda: ws.take("x", (3,)))


def test_a_scope_that_another_thread_leaves_ends_with_the_owners_next_request():
    ws = Workspace()
    scope = ws.scope("a")
    scope.__enter__()
    ws.take("x", (3,))

    def leave():
        with pytest.raises(RuntimeError, match=r"^scope 'a' .* cannot be left by another thread"):
            scope.__exit__(None, None, None)

    in_threads(leave)
    assert ws.take("x", (4,)).shape == (4,)
    assert ws.used_bytes == 16


def test_a_scope_that_has_ended_leaves_nothing_in_the_context():
    ws = Workspace()
    with ws.scope(), ws.scope():
        assert ws._here in contextvars.copy_context()
    assert ws._here not in contextvars.copy_context()


def test_a_scope_may_be_left_in_a_copy_of_its_context():
    ws = Workspace()
    with ws.scope("outer"):
        scope = ws.scope("inner")
        scope.__enter__()
        ws.take("x", (3,))

        def leave():
            scope.__exit__(None, None, None)
            assert ws.take("y", (3,)).shape == (3,)

        contextvars.copy_context().run(leave)
        assert ws.used_bytes == 12
        assert ws.take("x", (4,)).shape == (4,)
    assert ws.used_bytes == 0


def test_two_workspaces_do_not_mind_each_other():
    one, two = Workspace(), Workspace()
    a, b = holder(one, "a"), holder(two, "b")
    next(a)
    next(b)
    with pytest.raises(StopIteration):
        next(a)
    with pytest.raises(StopIteration):
        next(b)
    with one.scope(), two.scope(), one.scope():
        one.take("x", (3,))
        two.take("y", (3,))
    assert one.used_bytes == two.used_bytes == 0


# --- owners that are lost, and errors in the middle ---


def test_the_scope_of_a_dead_thread_is_void():
    ws, left = Workspace(debug=True), []

    def worker():
        ws.take("base", (3,)).fill(1)
        left.extend([ws.scope("outer"), ws.scope("inner")])
        left[0].__enter__()
        ws.take("x", (3,)).fill(1)
        left[1].__enter__()
        left.append(ws.take("y", (3,)))

    in_threads(worker)
    assert ws.take("z", (3,)).shape == (3,)
    assert ws.used_bytes == 48  # what it had taken stays for this generation
    with pytest.raises(ValueError, match="'y' is"):
        ws.take("y", (4,))
    for scope in left[:2]:
        with pytest.raises(
            RuntimeError, match="cannot be left: the thread that opened it has ended"
        ):
            scope.__exit__(None, None, None)
    ws.next_generation()
    assert ws.used_bytes == 0
    with pytest.raises(RuntimeError, match="stale"):
        left[2] + 1


def test_a_generator_whose_thread_has_ended_can_only_be_closed():
    ws = Workspace()
    a = holder(ws, "a")
    in_threads(lambda: next(a))
    ws.take("x", (3,))
    with pytest.raises(RuntimeError, match="the thread that opened it has ended"):
        a.close()
    ws.next_generation()
    assert ws.used_bytes == 0


def in_a_child(check):
    """Exit status of a forked child that runs `check`."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a deadlock is an end, too
        try:
            check()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("how", ["scope", "take", "claim"])
def test_a_forked_child_owns_what_its_lost_thread_held(how):
    ws, ready, done = Workspace(), threading.Event(), threading.Event()

    def hold():
        with ws.scope("a") if how == "scope" else nullcontext():
            ws.take("x", (3,))
            if how == "claim":
                with workspace._claims:
                    ready.set()
                    done.wait(1)
            else:
                ready.set()
                done.wait(60)

    def check():
        assert ws.take("y", (3,)).shape == (3,)
        ws.next_generation()
        ws.take("x", (4,))

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    try:
        assert in_a_child(check) == 0
    finally:
        done.set()
        thread.join()


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_goes_on_with_an_open_scope():
    ws = Workspace()
    scope = ws.scope("a")
    scope.__enter__()
    kept = ws.take("x", (3,))
    kept.fill(1)

    def check():
        ws.take("x", (3,)).fill(2)
        scope.__exit__(None, None, None)
        assert ws.used_bytes == 0

    assert in_a_child(check) == 0
    assert np.all(kept == 1)
    scope.__exit__(None, None, None)


GROWING = {
    "take": lambda ws: ws.take("new", (3,)),
    "take more": lambda ws: ws.take("idle", (100,)),
    "ensure_capacity": lambda ws: ws.ensure_capacity({"idle": ((100,), f4), "new": ((3,), f4)}),
}


@debugging
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "in a scope"])
@pytest.mark.parametrize("what", GROWING)
def test_memory_that_runs_out_in_the_middle_changes_nothing(what, inside, debug, monkeypatch):
    ws = Workspace(debug=debug)
    with ws.scope():
        ws.take("idle", (5,))
    with ws.scope() if inside else nullcontext():
        kept = ws.take("kept", (3,))
        kept.fill(1)
        with monkeypatch.context() as patch:
            patch.setattr("ctxlab.workspace.aligned_empty", no_memory)
            with refused(ws, MemoryError, "no memory"):
                GROWING[what](ws)
        assert np.all(kept == 1)
        GROWING[what](ws)
    ws.next_generation()
    assert ws.used_bytes == 0


@pytest.mark.parametrize("what", ["take", "ensure_capacity"])
def test_memory_that_runs_out_claims_nothing(what, monkeypatch):
    ws = Workspace()
    with monkeypatch.context() as patch:
        patch.setattr("ctxlab.workspace.aligned_empty", no_memory)
        with refused(ws, MemoryError, "no memory"):
            GROWING[what](ws)
    in_threads(lambda: ws.take("new", (3,)))


# --- copies ---

COPYING = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda ws: pickle.loads(pickle.dumps(ws)),
}


@debugging
@pytest.mark.parametrize("how", COPYING)
def test_a_copy_is_an_empty_workspace_with_the_same_settings(how, debug):
    ws = Workspace(growth="geometric", limit_bytes=1000, debug=debug)
    with ws.scope():
        view = ws.take("x", (3,))
        view.fill(1)
        new = COPYING[how](ws)
        assert (new.growth, new.limit_bytes, new.debug) == ("geometric", 1000, debug)
        assert figures(new) == (0, 0, 0, 0, 1)
        new.take("x", (7,)).fill(2)
        new.next_generation()  # it is outside of the scope
        assert np.all(view == 1)
    in_threads(lambda: new.take("y", (3,)))
    assert ws.used_bytes == 0


@pytest.mark.parametrize("how", COPYING)
@pytest.mark.parametrize("kind", [_FreshWorkspace, _Recorder])
def test_a_copy_has_the_class_of_its_original(how, kind):
    ws = kind()
    ws.take("x", (3,))
    new = COPYING[how](ws)
    assert type(new) is kind
    assert new.take("x", (4,)).shape == (4,)
    assert (new.growth, new.debug) == (ws.growth, ws.debug)
    if kind is _Recorder:
        assert list(new.requests()) == ["x"]
        assert new.requests()["x"].shape == (4,)
    else:
        assert (new.taken_count, ws.taken_count) == (1, 1)


# --- corners ---


@debugging
@pytest.mark.parametrize("shape", [(2.0, 3), (np.float64(2), 3), (2, 3 + 0j)], ids=str)
@pytest.mark.parametrize("state", ["idle", "taken"])
def test_a_shape_equal_to_the_last_one_is_checked_all_the_same(state, shape, debug):
    # `b.shape != shape` lets (2.0, 3) pass as (2, 3); in a new generation the buffer then counts as
    # taken.
    ws, _ = prepared(state, debug)
    with refused(ws, TypeError, "^shape: "):
        ws.take("x", shape)


@debugging
def test_a_shape_may_be_an_array_each_time(debug):
    # The second call compares a tuple with an array: "truth value is ambiguous".
    ws = Workspace(debug=debug)
    for _ in range(2):
        assert ws.take("x", np.array([2, 3])).shape == (2, 3)


@debugging
@pytest.mark.parametrize("state", ["ensured", "taken", "grown", "planned"])
def test_no_dtype_is_refused_each_time(state, debug):
    # `asked` begins as None, and `None is None`: no check, `used_bytes` is wrong, and no lease in
    # debug mode.
    ws, shape = Workspace(debug=debug), (2, 3)
    if state == "ensured":
        shape = ()
        ws.ensure_capacity({"x": (shape, f4)})
    elif state == "planned":
        shape = ()
        ws.arrange(plan({"x": (shape, f4, 0, 1)}))
    else:
        ws.take("x", shape)
    if state == "grown":
        ws.next_generation()
        ws.ensure_capacity({"x": ((100,), f4)})
    with refused(ws, TypeError, "^dtype: None"):
        ws.take("x", shape, None)


def test_a_name_that_cannot_be_a_key_is_named():
    ws = Workspace()
    with refused(ws, TypeError, r"^name: \['x'\] is not a string"):
        ws.take(["x"], (3,))


@pytest.mark.parametrize(
    "dtype",
    [
        "f4,,",
        "(2,",
        [("a", "f4"), ("a", "f4")],
        ("f4", (-1,)),
        {"names": ["a"], "formats": ["f4"], "offsets": [-4]},
    ],
    ids=str,
)
def test_a_dtype_that_numpy_refuses_in_its_own_way_is_named(dtype):
    # SyntaxError and ValueError, beside TypeError.
    ws = Workspace()
    with refused(ws, (TypeError, ValueError), "^dtype: "):
        ws.take("x", (3,), dtype)


def test_a_dtype_that_changes_is_read_again():
    # `asked is dtype` holds for a list that has been written to.
    ws, fields = Workspace(), [("a", "f4")]
    ws.take("x", (3,), fields)
    ws.next_generation()
    fields.append(("b", "f8"))
    assert ws.take("x", (3,), fields).dtype == np.dtype(fields)


def test_as_many_bytes_as_can_be_counted():
    # 64 more for the alignment are too many: NumPy's ValueError, after `x` has lost its storage.
    ws = Workspace()
    with pytest.raises((MemoryError, ValueError), match="'x'"):
        ws.take("x", (sys.maxsize,), u1)


@pytest.mark.parametrize("growth", _GROWTH)
def test_empty_buffers_are_aligned_as_well(growth):
    # `aligned_empty` of 0 bytes: a slice of no length forgets its offset.
    ws = Workspace(growth=growth)
    assert all(
        ws.take(f"x{i}", (0, 3)).ctypes.data % 64 == 0 for i in range(40)
    )  # by chance some are


def test_ensure_capacity_is_all_or_nothing_when_memory_runs_out():
    # "or raise and leave all as it was": 'a' has been grown, and `x` has lost what it had.
    ws = Workspace()
    ws.take("x", (100,))
    ws.next_generation()
    with refused(ws, MemoryError, "'x'"):
        ws.ensure_capacity({"a": ((10,), f4), "x": ((2**60,), u1)})


@pytest.mark.parametrize("request_", [((3,),), ((3,), f4, 0), 7], ids=str)
def test_requests_of_the_wrong_length_are_named(request_):
    ws = Workspace()
    with refused(ws, TypeError, "^requests: .*'x'"):
        ws.ensure_capacity({"x": request_})


@pytest.mark.parametrize(
    "options", [{"limit_bytes": 1e6}, {"limit_bytes": "1 MB"}, {"growth": ["pow2"]}], ids=str
)
def test_options_of_the_wrong_type_are_named(options):
    (name,) = options
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: "):
        Workspace(**options)


def test_a_refused_request_claims_nothing():
    # The claim comes before the check of the request, and is not given back.
    ws = Workspace()
    with pytest.raises(ValueError, match=r"^shape: "):
        ws.take("x", (-1,))
    in_threads(lambda: ws.take("x", (3,)))


def test_the_claim_of_a_dead_thread_is_void_when_its_number_is_used_again():
    # The system gives the number of a thread that has ended to the next, which need not know the
    # workspace.
    for _ in range(300):
        ws, go, ids = Workspace(), threading.Event(), []
        in_threads(lambda ws=ws, ids=ids: ids.append((threading.get_ident(), ws.take("x", (3,)))))
        stranger = threading.Thread(target=go.wait, args=(60,))
        stranger.start()
        try:
            if stranger.ident == ids[0][0]:
                assert ws.take("y", (3,)).shape == (3,)
                return
        finally:
            go.set()
            stranger.join()
    pytest.skip("no number was used again")


def test_looking_is_possible_while_the_owner_works():
    # "dictionary changed size during iteration": `nbytes` and `summary` walk through what the owner
    # adds to.
    ws, done = Workspace(), threading.Event()

    def work():
        try:
            for i in range(2000):
                ws.take(f"b{i}", (1,))
        finally:
            done.set()

    def look():
        while not done.is_set():
            assert ws.nbytes >= 0

    with switching_fast():
        in_threads(work, look)


SCALAR_ROUTES = {
    "float": (float, f4),
    "int": (int, np.int32),
    "bool": (bool, f4),
    "index": (operator.index, np.int32),
    "format": (lambda v: f"{v:.2f}", f4),
    "percent": (lambda v: "%g" % v, f4),  # noqa: UP031
    "math": (math.sqrt, f4),
    "list index": (lambda v: [1, 2, 3][v], np.int32),
    "set real": (lambda v: setattr(v, "real", 0), f4),
    "set flat": (lambda v: setattr(v, "flat", 0), f4),
}


@pytest.mark.parametrize("route", SCALAR_ROUTES)
def test_a_stale_number_is_found(route):
    # Python looks these up in the type: __float__, __int__, __bool__, __index__, __format__,
    # __setattr__.
    use, dtype = SCALAR_ROUTES[route]
    ws, view = watched((), dtype)
    use(view)
    ws.next_generation()
    with pytest.raises(RuntimeError, match="'x' of generation 3"):
        use(view)


@pytest.mark.parametrize(
    ("shape", "sizes", "match"),
    [
        ((-1,), {}, "^shape: .*'x'"),  # "sizes: -1 is missing"
        ((2.5,), {}, "^shape: .*'x'"),  # "sizes: 2.5 is missing"
        (("B",), {"B": 2.5}, "^sizes: .*B"),  # "'float' object cannot be interpreted as an integer"
    ],
)
def test_bad_dimensions_of_a_requirement_are_named(shape, sizes, match):
    with pytest.raises((TypeError, ValueError), match=match):
        Buffer("x", shape).nbytes(**sizes)


def test_a_buffer_named_twice_is_one_however_it_is_written():
    # By equality of what was written: np.float32 and 'f4' differ, and a list has no hash at all.
    assert all_of(Buffer("x", ("B",), f4), Buffer("x", ("B",), "f4")).nbytes(B=10) == 40
    assert all_of(Buffer("x", [3]), Buffer("x", (3,))).nbytes() == 12


@pytest.mark.parametrize("shape", [(2.5, 3), (-1,), "ab"], ids=str)
@pytest.mark.parametrize("name", ["x", "new"])
def test_an_error_stands_alone(name, shape):
    ws = Workspace()
    ws.take("x", (2, 3))
    with pytest.raises((TypeError, ValueError), match=r"^shape: ") as caught:
        ws.take(name, shape)
    assert caught.value.__context__ is None or caught.value.__suppress_context__
