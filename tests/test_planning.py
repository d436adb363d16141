"""The planner against the smallest packing, and lifetimes that are recorded from a run."""

import copy
import itertools
import math
import re
import sys

import numpy as np
import pytest
from conftest import debugging, few, in_threads, no_memory, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlab import planning, reference
from ctxlab.planning import _EXACT, _ORDERS, _live_curve, _Recorder, plan, record
from ctxlab.workspace import Workspace

f4, f8, u1 = np.float32, np.float64, np.uint8

# --- the planner ---


def units(nbytes):
    return -(-nbytes // 64) * 64


def as_numbers(requests):
    """(size, first, last) by name, without the planner's help."""
    return {
        n: (units(math.prod(s) * np.dtype(d).itemsize), a, b)
        for n, (s, d, a, b, *_) in requests.items()
    }


def live_maximum(requests):
    items = as_numbers(requests).values()
    moments = {t for _, first, last in items for t in range(first, last + 1)}
    return max(
        (sum(n for n, first, last in items if first <= t <= last) for t in moments), default=0
    )


def smallest(requests):
    """The optimum: whatever the packing, its buffers in order of offset lie on those that they
    meet.
    """
    items = list(as_numbers(requests).values())
    best = sum(size for size, *_ in items)

    def stack(placed, left, height):
        nonlocal best
        if height >= best:
            return
        if not left:
            best = height
        for i in left:
            size, first, last = items[i]
            end = size + max((e for e, f, t in placed if f <= last and first <= t), default=0)
            stack([*placed, (end, first, last)], left - {i}, max(height, end))

    stack([], frozenset(range(len(items))), 0)
    return best


def assert_valid(p, requests):
    numbers = as_numbers(requests)
    assert list(p.offsets) == list(p.requests) == list(requests)
    assert all(p.size(name) == size for name, (size, *_) in numbers.items())
    assert all(
        at % 64 == 0 and 0 <= at <= at + numbers[n][0] <= p.nbytes for n, at in p.offsets.items()
    )
    for (a, (m, first_a, last_a)), (b, (n, first_b, last_b)) in itertools.combinations(
        numbers.items(), 2
    ):
        if first_a <= last_b and first_b <= last_a:
            assert p.offsets[a] + m <= p.offsets[b] or p.offsets[b] + n <= p.offsets[a], (a, b)
    assert live_maximum(requests) == p.bound <= p.nbytes
    assert p.nbytes == max(
        (p.offsets[name] + size for name, (size, *_) in numbers.items()), default=0
    )


spans = st.tuples(st.integers(-5, 15), st.integers(0, 8)).map(lambda s: (s[0], s[0] + s[1]))
requested = st.tuples(
    st.lists(st.integers(0, 12), max_size=3).map(tuple), st.sampled_from([f4, "f8", bool]), spans
).map(lambda r: (r[0], r[1], *r[2]))


def requests_up_to(n):
    return st.lists(requested, max_size=n).map(lambda rs: {f"r{i}": r for i, r in enumerate(rs)})


@given(requests_up_to(40))
def test_plans_are_valid(requests):
    best = plan(requests)
    assert_valid(best, requests)
    for order in _ORDERS:
        p = plan(requests, order)
        assert_valid(p, requests)
        assert best.nbytes <= p.nbytes
    assert plan(requests) == best  # the same each time
    assert best.gap == (best.nbytes / best.bound - 1 if best.bound else 0) >= 0


@settings(max_examples=100)
@given(requests_up_to(6))
def test_small_plans_are_the_smallest(requests):
    assert plan(requests).nbytes == smallest(requests)


small_units = st.tuples(st.integers(1, 6), spans).map(lambda r: ((64 * r[0],), u1, *r[1]))


@few
@given(
    st.lists(small_units, min_size=5, max_size=_EXACT).map(
        lambda rs: {f"r{i}": r for i, r in enumerate(rs)}
    )
)
def test_small_plans_of_few_sizes_are_the_smallest(requests):
    p = plan(requests)
    assert_valid(p, requests)
    assert p.nbytes == smallest(requests)


@given(requests_up_to(20))
def test_the_curve_says_what_is_alive(requests):
    p, numbers = plan(requests), as_numbers(requests).values()
    curve, alive = _live_curve(p.requests), 0
    assert list(curve) == sorted(curve)
    for t in range(-7, 27):
        alive = curve.get(t, alive)
        assert alive == sum(n for n, first, last in numbers if first <= t <= last)


def test_the_search_finds_what_no_order_does(monkeypatch):
    hard = [(4, 2, 4), (5, 3, 3), (2, 7, 8), (5, 6, 8), (2, 4, 9)]
    requests = {f"r{i}": ((64 * n,), u1, first, last) for i, (n, first, last) in enumerate(hard)}
    assert smallest(requests) == plan(requests).nbytes == live_maximum(requests) == 9 * 64
    monkeypatch.setattr("ctxlab.planning._EXACT", 0)
    greedy = plan(requests)
    assert greedy.nbytes == 11 * 64
    assert_valid(greedy, requests)


def test_plans_of_little():
    assert plan({}).nbytes == plan({}).bound == plan({}).gap == 0
    p = plan({"x": ((3,), f4, 7, 7)})
    assert (p.offsets, p.nbytes, p.bound, p.gap) == ({"x": 0}, 64, 64, 0)
    empty = {f"e{i}": ((0, 3), f4, i, i + 2) for i in range(10)}
    assert plan(empty).nbytes == plan(empty).bound == 0
    p = plan(empty | {"x": ((3,), f4, 0, 9)})
    assert p.nbytes == 64
    assert_valid(p, empty | {"x": ((3,), f4, 0, 9)})
    touching = plan({"a": ((16,), f4, 0, 3), "b": ((16,), f4, 3, 4), "c": ((16,), f4, 5, 6)})
    assert touching.offsets["a"] != touching.offsets["b"]  # both ends belong to a lifetime
    assert touching.nbytes == 128


@pytest.mark.parametrize(
    ("request_", "error", "match"),
    [
        (
            ((3,), f4, 5, 4),
            ValueError,
            "^requests: 'x' ends at step 4, before its first use at step 5$",
        ),
        (((3,), f4, 0.5, 4), TypeError, "^requests: steps 0.5 and 4 of 'x' are not integers$"),
        (((3,), f4, 0, None), TypeError, "^requests: steps 0 and None of 'x'"),
        (((3,), f4, 0), TypeError, "^requests: 'x' is .* needed "),
        (((3,), f4, 0, 1, 2), TypeError, "^requests: 'x' reuses 2, needed the name of a request$"),
        (((3,), f4, 0, 1, "fine", 2), TypeError, "^requests: 'x' is .* needed "),
        (((3,), f4), TypeError, "^requests: 'x' is .* needed "),
        (7, TypeError, "^requests: 'x' is 7, needed "),
        (None, TypeError, "^requests: 'x' is None, needed "),
        (((-3,), f4, 0, 1), ValueError, "^shape: .*'x'"),
        (((2.5,), f4, 0, 1), TypeError, "^shape: .*'x'"),
        (((3,), object, 0, 1), TypeError, "^dtype: .*'x'"),
        (((3,), None, 0, 1), TypeError, "^dtype: .*'x'"),
    ],
)
def test_bad_requests_are_named_by_the_planner(request_, error, match):
    with pytest.raises(error, match=match):
        plan({"fine": ((3,), f4, 0, 1), "x": request_})


def hard(seed, n=30):
    "Requests that no order packs to the bound, mostly."
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 40, n)
    last = first + rng.integers(1, 15, n)
    sizes = rng.integers(1, 30, n) * 64
    rows = zip(sizes.tolist(), first.tolist(), last.tolist(), strict=True)
    return {f"r{i}": ((size,), u1, a, b) for i, (size, a, b) in enumerate(rows)}


HARD = next(requests for requests in map(hard, range(50)) if plan(requests).gap)


@pytest.mark.parametrize("seed", range(4))
def test_a_solver_is_at_least_as_good_as_the_orders(seed):
    pytest.importorskip("omnimalloc")
    requests = hard(seed)
    quick, slow = plan(requests), plan(requests, seconds=0.5)
    assert quick.bound <= slow.nbytes <= quick.nbytes
    assert slow.gap <= quick.gap
    assert_valid(slow, requests)


def test_a_solver_finds_what_the_orders_do_not():
    pytest.importorskip("omnimalloc")
    gains = [plan(hard(s)).nbytes - plan(hard(s), seconds=0.5).nbytes for s in range(6)]
    assert max(gains) > 0


def test_buffers_of_no_size_need_no_solver():
    pytest.importorskip("omnimalloc")
    requests = hard(1) | {"nothing": ((0, 3), f4, 0, 50)}
    assert_valid(plan(requests, seconds=0.1), requests)


@pytest.mark.parametrize("shift", [lambda a: 0, lambda a: a.offset + 1, lambda a: a.offset - 2**30])
def test_a_packing_in_which_buffers_do_not_fit_is_refused(monkeypatch, shift):
    omnimalloc = pytest.importorskip("omnimalloc")
    honest = omnimalloc.allocate

    def lying(asked, solver):
        return [a.with_offset(max(shift(a), 0)) for a in honest(asked, "greedy")]

    monkeypatch.setattr(omnimalloc, "allocate", lying)
    with pytest.raises(RuntimeError, match=r"^seconds: omnimalloc gave a packing in which"):
        plan(HARD, seconds=0.1)


def test_a_solver_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "omnimalloc", None)
    with pytest.raises(ImportError, match=r"^seconds: needs omnimalloc; run pip install"):
        plan(HARD, seconds=1)
    chain = {"a": ((64,), u1, 0, 1), "b": ((64,), u1, 1, 2)}
    assert plan(chain, seconds=1).gap == 0  # the bound is reached, so nobody is asked


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "long", None])
def test_bad_seconds_are_refused(seconds):
    with pytest.raises((TypeError, ValueError), match=r"^seconds: "):
        plan(HARD, seconds=seconds)


def test_bad_orders_and_names_are_refused():
    with pytest.raises(
        ValueError, match=r"^order: 'alphabet', needed one of 'size', 'breadth', 'length'$"
    ):
        plan({}, "alphabet")
    with pytest.raises(TypeError, match=r"^name: 3 "):
        plan({3: ((3,), f4, 0, 1)})


def transformer(layers, S, D, H, F):
    """Forward and backward of a stack of blocks: step t of layer i forward, its mirror image
    backward.
    """
    requests, end = {}, 24 * layers

    def add(name, shape, first, last):
        requests[name] = shape, f4, first, last

    for i in range(layers):
        t, back = 12 * i, end - 12 * i  # the backward pass of this layer ends at `back`
        for k, (name, columns) in enumerate(
            [("x", D), ("norm", D), ("q", D), ("k", D), ("v", D), ("heads", D)]
        ):
            add(f"{name} {i}", (S, columns), t + k // 2, back - k // 2)
        add(f"weights {i}", (H, S, S), t + 3, back - 4)
        add(f"out {i}", (S, D), t + 5, t + 6)
        add(f"middle {i}", (S, D), t + 6, back - 7)
        add(f"hidden {i}", (S, F), t + 7, back - 8)
        add(f"activated {i}", (S, F), t + 8, back - 9)
        add(f"ffn {i}", (S, D), t + 9, t + 11)
        for name, shape, first, last in [
            ("d y", (S, D), 12, 7),
            ("d activated", (S, F), 10, 8),
            ("d hidden", (S, F), 8, 7),
            ("d middle", (S, D), 7, 0),
            ("d heads", (S, D), 5, 4),
            ("d weights", (H, S, S), 4, 3),
            ("d qkv", (3, S, D), 3, 1),
            ("d norm", (S, D), 1, 0),
        ]:
            add(f"{name} {i}", shape, back - first, back - last)
    return requests


@pytest.mark.parametrize("layers", [1, 2, 6])
@pytest.mark.parametrize(
    "sizes", [(512, 768, 12, 3072), (128, 512, 8, 2048), (1000, 300, 5, 1111)], ids=str
)
def test_plans_of_transformers_are_close_to_the_bound(sizes, layers):
    requests = transformer(layers, *sizes)
    p = plan(requests)
    assert_valid(p, requests)
    assert p.gap <= 0.05
    assert p.nbytes < 0.95 * sum(size for size, *_ in as_numbers(requests).values())


# --- lifetimes from a run ---

SIDE = 4
operands = st.integers(0, 6)
programs = st.lists(
    st.tuples(operands, operands, operands, st.sampled_from("+-@mTk")), min_size=1, max_size=14
)


def interpret(ws, program, retake):
    """Each step writes one buffer from two others (at first they are `x`); the last three are the
    result.
    """
    x = np.arange(SIDE * SIDE, dtype=f8).reshape(SIDE, SIDE) / 7 - 1
    views = {}

    def read(i):
        if i not in views:
            return x
        return ws.take(f"b{i}", (SIDE, SIDE), f8) if retake else views[i]

    def write(i):
        views[i] = ws.take(f"b{i}", (SIDE, SIDE), f8)
        return views[i]

    for target, a, b, op in program:
        a, b, known = read(a), read(b), target in views
        out = write(target)
        if op in "+-@":
            if not known or op != "@":
                {"+": np.add, "-": np.subtract, "@": np.matmul}[op](a, b, out=out)
            else:
                out += a @ b
        elif op == "m":
            np.mean(np.stack([a, b]), axis=0, out=out)
        elif op == "T":
            with ws.scope():
                temporary = ws.take("temporary", (SIDE, SIDE), f8)
                np.multiply(a, 0.5, out=temporary)
                out[...] = temporary.T if not known else temporary
        else:
            np.copyto(out, np.where(a > b, a, b))
    return [np.add(read(target), 0) for target, *_ in program[-3:]]


def same_bits(a, b):
    return [x.tobytes() for x in a] == [y.tobytes() for y in b]


@given(programs, st.booleans())
def test_a_planned_workspace_computes_the_same_bits(program, retake):

    def run(ws):
        return interpret(ws, program, retake)

    simple, planned, rehearsal = Workspace(growth="exact"), Workspace(), Workspace(debug=True)
    want = run(simple)
    lifetimes = record(run)
    p = plan(lifetimes)
    assert_valid(p, lifetimes)
    for ws in (planned, rehearsal):
        ws.arrange(p)
        for _ in range(2):
            assert same_bits(run(ws), want)
            ws.next_generation()
        assert (ws.allocation_count, ws.nbytes) == (1, p.nbytes)
    assert p.nbytes <= simple.nbytes  # 128 bytes each: nothing is lost by alignment


@settings(max_examples=150)
@given(
    programs,
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6)), min_size=8, max_size=8),
)
def test_a_rehearsal_is_right_or_raises(program, retake, wrong):

    def run(ws):
        return interpret(ws, program, retake)

    lifetimes = {
        name: r._replace(first=first, last=first + more)
        for (name, r), (first, more) in zip(record(run).items(), wrong, strict=False)
    }
    rehearsal = Workspace(debug=True)
    rehearsal.arrange(plan(lifetimes))
    try:
        got, error = run(rehearsal), ""
    except RuntimeError as e:
        got, error = None, str(e)
    if got is None:
        assert re.match(
            r"buffer '\w+' of generation 1 is stale: the plan gave its memory to '\w+'", error
        )
    else:
        assert same_bits(got, run(Workspace()))


def chain(ws, n=4, rows=16):
    h = np.linspace(-1, 1, rows * 8, dtype=f4).reshape(rows, 8)
    w = np.eye(8, dtype=f4)[::-1] + 0.25
    for i in range(n):
        h = np.matmul(h, w, out=ws.take(f"h{i}", (rows, 8)))
        np.tanh(h, out=h)
    return h.copy()


@pytest.mark.parametrize(
    ("size", "tight", "lowest"),
    [(2, 40, 10), (3, 40, 10), (4, 60, 10), (1, 40, 10), (6, 10, 10), (7, 70, 70)],
)
def test_a_place_is_the_smallest_gap_or_the_lowest(size, tight, lowest):
    occupied = [(0, 10), (16, 40), (43, 50), (45, 60), (64, 70)]  # gaps: 6, 3, 4
    assert planning._place(size, occupied, True) == tight
    assert planning._place(size, occupied, False) == lowest
    assert planning._place(size, [(9, 20)], True) == 0
    assert planning._place(size, [], False) == 0


def clear_place(size, taken, tight):
    """The lowest of the free places, or of the smallest ones; `taken` are (start, end)."""
    ends = sorted({0, *(end for _, end in taken)})
    free = []  # size of the gap, where it begins
    for at in ends:
        ahead = [start for start, end in taken if end > at]
        if all(start >= at for start in ahead):
            gap = min(ahead, default=math.inf) - at
            if gap >= size:
                free.append((gap, at))
    return min(free)[1] if tight else min(at for _, at in free)


def clear_packing(order, tight):
    """Offsets of items, each against all that were placed before."""
    placed = []
    for item in order:
        meeting = [
            (at, at + other.size)
            for other, at in placed
            if other.first <= item.last and item.first <= other.last
        ]
        placed.append((item, clear_place(item.size, meeting, tight)))
    height = max(at + item.size for item, at in placed)
    return height, {item.number: at for item, at in placed}


def clear_plan(requests):
    """The first of the best packings."""
    lifetimes = {name: planning._Lifetime(*r) for name, r in requests.items()}
    items, live = planning._items(lifetimes), _live_curve(lifetimes)
    found = [clear_packing(o(items, live), t) for o in _ORDERS.values() for t in (True, False)]
    height, places = min(found, key=lambda packing: packing[0])
    return height, {name: places[i] for i, name in enumerate(requests)}


def many(seed, n=60, steps=40, length=15):
    """Requests of few sizes, so that places are of equal merit, or of many."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6 if seed % 2 else 10**6, n).tolist()
    first = rng.integers(-steps, steps, n).tolist()
    last = [a + int(rng.integers(0, length)) for a in first]
    rows = zip(sizes, first, last, strict=True)
    return {f"r{i}": ((size,), f4, a, b) for i, (size, a, b) in enumerate(rows)}


@few
@given(st.integers(0, 2**32 - 1), st.integers(_EXACT + 1, 60), st.integers(1, 60))
def test_the_quick_orders_are_the_clear_ones(seed, n, length):
    requests = many(seed, n, length=length)
    p = plan(requests)
    assert_valid(p, requests)
    height, offsets = clear_plan(requests)
    assert p.nbytes == height
    assert p.offsets == offsets


def test_the_orders_of_the_planner():
    requests = {  # 64 bytes a piece of alignment; most is alive at step 4, then at step 0
        "early": ((64,), u1, 0, 1),
        "wide": ((192,), u1, 4, 4),
        "long": ((64,), u1, 2, 9),
        "large": ((128,), u1, 0, 0),
    }
    lifetimes = {name: planning._Lifetime(*r) for name, r in requests.items()}
    items, live = planning._items(lifetimes), _live_curve(lifetimes)
    names = list(requests)
    orders = {o: [names[i.number] for i in fn(items, live)] for o, fn in _ORDERS.items()}
    assert orders == {
        "size": ["wide", "large", "early", "long"],
        "breadth": ["wide", "long", "large", "early"],
        "length": ["long", "early", "wide", "large"],
    }


def test_a_chain_needs_two_buffers():
    p = plan(record(chain))
    assert p.nbytes == p.bound == 2 * 16 * 8 * 4
    assert [*record(chain)] == ["h0", "h1", "h2", "h3"]


def test_every_shortened_lifetime_of_a_chain_is_found():
    lifetimes = record(chain)
    for name, r in list(lifetimes.items())[:-1]:
        wrong = lifetimes | {name: r._replace(last=r.first)}
        p = plan(wrong)
        follower = f"h{int(name[1]) + 1}"
        assert p.nbytes >= 512
        rehearsal = Workspace(debug=True)
        rehearsal.arrange(p)
        if p.offsets[name] == p.offsets[follower]:
            with pytest.raises(
                RuntimeError,
                match=f"'{name}' of generation 1 is stale: the plan gave its memory to "
                f"'{follower}'",
            ):
                chain(rehearsal)
        else:
            chain(rehearsal)
    all_short = plan({name: r._replace(last=r.first) for name, r in lifetimes.items()})
    assert all_short.nbytes == 512
    rehearsal = Workspace(debug=True)
    rehearsal.arrange(all_short)
    with pytest.raises(
        RuntimeError, match="'h0' of generation 1 is stale: the plan gave its memory to 'h1'"
    ):
        chain(rehearsal)


def test_a_recorder_notes_first_and_last_use():
    recorder = _Recorder()
    for name, shape in [("a", (2,)), ("b", (5, 4)), ("a", (4,)), ("b", (3,))]:
        with recorder.scope():
            view = recorder.take(name, shape)
            view.fill(1)
            part = view[1:]
            recorder.take("tick", (1,))
            part += 1
    found = recorder.requests()
    assert {n: r.shape for n, r in found.items()} == {
        "a": (4,),
        "b": (5, 4),
        "tick": (1,),
    }  # the largest
    assert (
        found["a"].first < found["tick"].first < found["b"].first < found["a"].last
    )  # first to last
    assert found["a"].last < found["tick"].last < found["b"].last
    assert plan(found).bound == 64 + 128 + 64
    with pytest.raises(RuntimeError, match="is stale: its scope has ended"):
        part += 1
    assert record(lambda ws: None) == {}


def test_a_buffer_that_lost_its_memory_to_the_plan_is_not_handed_out_again():
    ws = Workspace(debug=True)
    ws.arrange(plan({"a": ((3,), f4, 0, 1), "b": ((3,), f4, 2, 3)}))
    for _ in range(2):
        a, b = ws.take("a", (3,)), ws.take("b", (3,))
        b.fill(1)
        for use in (lambda: ws.take("a", (3,)), lambda a=a: a.fill(2)):
            with pytest.raises(
                RuntimeError, match=r"'a' of generation .* the plan gave its memory to 'b'"
            ):
                use()
        assert np.all(b == 1)
        ws.next_generation()


def test_a_copy_by_copyto_is_a_use():
    target = np.empty(3, f4)

    def fn(ws):
        a = ws.take("a", (3,))
        a.fill(1)
        ws.take("b", (3,)).fill(2)
        np.copyto(target, a)  # `target[...] = a` is out of sight, see above

    found = record(fn)
    assert found["a"].last > found["b"].first
    assert plan(found).nbytes == 128


def test_growth_beyond_the_plan_falls_back_to_own_storage():
    p, ws = plan(record(chain)), Workspace(growth="exact")
    ws.arrange(p)
    for rows, held, allocations in [(8, 0, 1), (32, 4 * 1024, 5), (16, 4 * 1024, 5)]:
        assert same_bits([chain(ws, rows=rows)], [chain(Workspace(), rows=rows)])
        assert (ws.nbytes, ws.allocation_count) == (p.nbytes + held, allocations)
        ws.next_generation()
    ws.take("unplanned", (3,))
    assert (ws.nbytes, ws.allocation_count) == (p.nbytes + 4 * 1024 + 12, 6)


def test_growth_beyond_the_plan_obeys_the_limit():
    p = plan(record(chain))
    for spare, fits in ((4 * 1024, True), (4 * 1024 - 1, False)):
        ws = Workspace(growth="exact", limit_bytes=p.nbytes + spare)
        ws.arrange(p)
        if fits:
            assert same_bits([chain(ws, rows=32)], [chain(Workspace(), rows=32)])
            assert (ws.nbytes, ws.allocation_count) == (ws.limit_bytes, 5)
        else:
            with pytest.raises(MemoryError, match=r"^workspace: 'h3' would need"):
                chain(ws, rows=32)
            assert (ws.nbytes, ws.allocation_count) == (p.nbytes + 3 * 1024, 4)


def test_the_limit_holds_for_a_plan():
    p = plan(record(chain))
    ws = Workspace(limit_bytes=p.nbytes - 1)
    address = ws.take("x", (3,)).ctypes.data
    ws.next_generation()
    with refused(ws, MemoryError, f"^plan: {p.nbytes} bytes, limit_bytes is {p.nbytes - 1}$"):
        ws.arrange(p)
    assert ws.take("x", (3,)).ctypes.data == address
    exact = Workspace(limit_bytes=p.nbytes)
    exact.take("x", (3,))
    exact.clear()
    exact.arrange(p)  # what it held before goes first
    assert exact.nbytes == p.nbytes
    assert exact.take("h0", (1,)).ctypes.data % 64 == 0


@debugging
def test_a_plan_waits_until_everything_is_given_back(debug):
    p, ws = plan(record(chain)), Workspace(debug=debug)
    view = ws.take("x", (3,))
    view.fill(1)
    with refused(
        ws, RuntimeError, r"^arrange: buffers are handed out; call next_generation\(\) first$"
    ):
        ws.arrange(p)
    assert np.all(view == 1)
    ws.next_generation()
    ws.arrange(p)
    assert ws.nbytes == p.nbytes
    chain(ws)
    ws.release()
    assert ws.nbytes == 0
    chain(ws)


@debugging
def test_a_plan_that_finds_no_memory_leaves_what_was_held(debug, monkeypatch):
    ws = Workspace(debug=debug)
    p, address = plan(record(chain)), ws.take("x", (3,)).ctypes.data
    ws.next_generation()
    with monkeypatch.context() as patch:
        patch.setattr("ctxlab.workspace.aligned_empty", no_memory)
        with refused(ws, MemoryError, r"^plan: no memory for \d+ bytes$"):
            ws.arrange(p)
    assert ws.take("x", (3,)).ctypes.data == address
    ws.next_generation()
    in_threads(lambda: ws.take("x", (3,)))


def test_an_order_of_the_wrong_type_is_named():
    with pytest.raises((TypeError, ValueError), match=r"^order: "):
        plan({}, ["size"])


def assert_plannable(fn):
    """The plan of a recorded run computes the same."""
    want = copy.deepcopy(fn(Workspace()))
    planned = Workspace()
    planned.arrange(plan(record(fn)))
    assert np.array_equal(fn(planned), want)


def test_a_recorder_sees_that_a_number_is_read():
    def fn(ws):
        loss = ws.take("loss", ())
        loss[...] = 3
        ws.take("gradient", (8,)).fill(1)
        return float(loss)

    assert_plannable(fn)


def test_a_recorder_knows_that_what_is_returned_is_still_needed():
    # `record` drops the result; `_ask(fn(recorder))` would note it.
    def fn(ws):
        a, b = ws.take("a", (8,)), ws.take("b", (8,))
        a.fill(1)
        b.fill(2)
        return a, b

    def one_after_the_other(ws):
        a = ws.take("a", (8,))
        a.fill(1)
        b = ws.take("b", (8,))
        b.fill(2)
        return a, b

    assert_plannable(fn)
    assert_plannable(one_after_the_other)


def test_a_recorder_follows_through_check_array():
    # `check_array` makes an ordinary view of a subclass: all later uses in the package are out of
    # sight.
    def double(x, ws):
        x = reference._check_array("x", x)
        out = ws.take("doubled", x.shape)
        out.fill(2)
        out *= x
        return out

    def fn(ws):
        h = ws.take("h", (4, 4))
        h[...] = np.arange(1, 17).reshape(4, 4)
        return double(h, ws).copy()

    assert_plannable(fn)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint64], ids=lambda t: t.__name__)
def test_steps_may_be_of_any_integer_type(kind):
    # They are checked by `operator.index`, but used as they are: `last + 1` and `first - last`
    # overflow.
    top = min(int(np.iinfo(kind).max), 2**62)
    p = plan({"x": ((3,), f4, kind(3), kind(top)), "y": ((3,), f4, kind(top), kind(top))})
    assert (p.nbytes, p.bound) == (128, 128)


def test_steps_may_be_any_integers():
    # In one array, -1 and 2**63 become floating point, and 2**63 + 1 is the same as 2**63.
    p = plan(
        {
            "z": ((3,), f4, -1, -1),
            "x": ((3,), f4, 2**63, 2**63),
            "y": ((3,), f4, 2**63 + 1, 2**63 + 1),
        }
    )
    assert p.nbytes == p.bound == 64


# --- a place that is reused ---


def in_line(*more):
    """A chain whose second and third buffers lie in the place of the first, and more."""
    chain = {
        "a": ((64,), u1, 0, 2),
        "b": ((64,), u1, 2, 4, "a"),
        "c": ((16,), u1, 4, 6, "b"),
    }
    return chain | dict(more)


def test_a_request_lies_in_the_place_that_it_reuses():
    alone = {name: r[:4] for name, r in in_line().items()}
    assert plan(alone).nbytes == 128
    p = plan(in_line())
    assert p.offsets == {"a": 0, "b": 0, "c": 0}
    assert p.nbytes == p.bound == 64


def test_a_reused_place_is_free_of_others_for_as_long_as_it_is_used():
    requests = in_line(("d", ((128,), u1, 6, 6)), ("e", ((64,), u1, 3, 3)))
    p = plan(requests)
    assert p.offsets["a"] == p.offsets["b"] == p.offsets["c"]
    place = range(p.offsets["a"], p.offsets["a"] + 64)
    assert p.offsets["d"] not in place
    assert p.offsets["e"] not in place
    assert p.bound == 192  # d and the place, which c needs at step 6
    assert p.nbytes == 192


REFUSED = {
    "begins before": ({"b": ((64,), u1, 1, 4, "a")}, "'b' begins at step 1, needed the last step"),
    "begins after": ({"b": ((64,), u1, 3, 4, "a")}, "'b' begins at step 3, needed the last step"),
    "larger": ({"b": ((65,), u1, 2, 4, "a")}, "'b' has 65 bytes, needed at most the 64 of 'a'"),
    "unknown": ({"b": ((64,), u1, 2, 4, "z")}, "'b' reuses 'z', needed the name of an earlier"),
    "itself": ({"b": ((64,), u1, 2, 2, "b")}, "'b' reuses 'b', needed the name of an earlier"),
    "later": ({"a": ((64,), u1, 2, 2, "b")}, "'a' reuses 'b', needed the name of an earlier"),
    "twice": ({"z": ((64,), u1, 2, 2, "a")}, "'b' and 'z' both reuse 'a'"),
}


@pytest.mark.parametrize(("change", "match"), REFUSED.values(), ids=REFUSED)
def test_a_reuse_that_cannot_be_is_named(change, match):
    requests = in_line() | change
    if "z" not in change:
        del requests["c"]
    with pytest.raises(ValueError, match=f"^requests: {match}") as caught:
        plan(requests)
    assert "\n" not in str(caught.value)


@few
@given(requests_up_to(12), st.data())
def test_plans_with_reuse_are_valid(requests, data):
    """What reuses a place begins where the other ends; all else that is alive lies apart."""
    place_of = {name: name for name in requests}
    for name, (shape, dtype, _, last) in list(requests.items()):
        if data.draw(st.booleans()):
            new = f"{name} again"
            place_of[new] = name
            requests[new] = shape, dtype, last, last + data.draw(st.integers(0, 5)), name
    p = plan(requests)
    sizes = {n: units(math.prod(r[0]) * np.dtype(r[1]).itemsize) for n, r in requests.items()}
    dropped = {n for n, place in place_of.items() if n != place and p.requests[n].reuses is None}
    place_of |= {n: n for n in dropped}
    assert all(p.offsets[n] == p.offsets[place] for n, place in place_of.items())
    assert p.bound <= p.nbytes
    for a, b in itertools.combinations(requests, 2):
        meet = requests[a][2] <= requests[b][3] and requests[b][2] <= requests[a][3]
        if meet and place_of[a] != place_of[b] and sizes[a] and sizes[b]:
            low, high = sorted((a, b), key=p.offsets.get)
            assert p.offsets[low] + sizes[low] <= p.offsets[high]
    for order in (None, *_ORDERS):
        plain = plan({n: r[:4] for n, r in requests.items()}, order)
        shared = plan(requests, order)
        assert shared.nbytes <= plain.nbytes
        assert shared.bound == p.bound <= plain.bound
    wanted = {n: planning._Lifetime(*r) for n, r in requests.items()}
    granted = planning._arena(wanted, None)[0]
    assert p.nbytes <= granted
    assert not dropped or p.nbytes < granted


LARGE_AND_SHORT = {
    "z": ((48,), f4, 0, 1),
    "a": ((16,), f4, 1, 5, "z"),
    "b": ((32,), f4, 2, 5),
}


def test_a_reuse_that_enlarges_the_arena_is_dropped():
    p = plan(LARGE_AND_SHORT)
    assert (p.nbytes, p.bound) == (256, 192)
    assert p.requests["a"].reuses is None
    later = {f"{n}2": (s, d, f + 9, last + 9) for n, (s, d, f, last, *_) in in_line().items()}
    later = {n: (*r, "a2") if n == "b2" else r for n, r in later.items()}
    both = plan(LARGE_AND_SHORT | later)  # the other wish costs nothing, and stays
    assert both.requests["b2"].reuses == "a2"
    assert both.nbytes == 256


def test_all_reuses_are_dropped_where_one_at_a_time_does_not_help(monkeypatch):
    monkeypatch.setattr(planning, "_EXACT", 0)  # by the orders alone
    units = {
        "r0": (3, 4, 6),
        "r1": (3, 1, 1),
        "q1": (2, 1, 2, "r1"),
        "r2": (4, 2, 4),
        "q2": (1, 4, 7, "r2"),
        "r3": (4, 2, 3),
        "q3": (1, 3, 6, "r3"),
    }
    requests = {name: ((64 * n,), u1, *life) for name, (n, *life) in units.items()}
    assert planning._arena({n: planning._Lifetime(*r) for n, r in requests.items()}, None)[0] == 704
    p = plan(requests)
    assert p.nbytes == plan({n: r[:4] for n, r in requests.items()}).nbytes == 640
    assert not any(r.reuses for r in p.requests.values())


@debugging
def test_a_workspace_follows_a_plan_that_dropped_a_reuse(debug):
    ws = Workspace(debug=debug)
    ws.arrange(plan(LARGE_AND_SHORT))
    z = ws.take("z", (48,))
    z.fill(0.5)
    a = np.tanh(z[:16], out=ws.take("a", (16,)))
    assert np.all(z == 0.5)  # still its own
    assert np.all(a == np.tanh(f4(0.5)))


def test_a_bound_that_is_reached_needs_no_other_packing(monkeypatch):
    packed = []
    honest = planning._arena
    monkeypatch.setattr(planning, "_arena", lambda *a: packed.append(a) or honest(*a))
    plan({n: r[:4] for n, r in in_line().items()})
    assert len(packed) == 1  # without reuse nothing is tried
    plan(in_line())
    assert len(packed) == 3
    plan(LARGE_AND_SHORT)
    assert len(packed) <= 3 + 4


def stages(ws, late=False):
    """Layers with a wide middle, whose activation may lie in the place of its input."""
    h = np.linspace(-1, 1, 32).reshape(8, 4)
    total = 0.0
    for i in range(3):
        z = np.matmul(h, np.ones((4, 16)) / 4, out=ws.take(f"z{i}", (8, 16), f8))
        a = np.tanh(z, out=ws.take(f"a{i}", (8, 16), f8))
        h = np.matmul(a, np.eye(16, 4) + i, out=ws.take(f"h{i}", (8, 4), f8))
        if late:
            total += float(np.sum(z))
    return h + total


REUSES = {f"a{i}": f"z{i}" for i in range(3)}


def test_recorded_lifetimes_reuse_what_they_may():
    plain, reused = record(stages), record(stages, reuses=REUSES)
    wide, narrow = 8 * 16 * 8, 8 * 4 * 8
    assert plan(plain).nbytes >= plan(plain).bound == 2 * wide
    assert plan(reused).nbytes == wide + narrow
    assert {n: plan(reused).offsets[n] for n in REUSES} == {
        n: plan(reused).offsets[z] for n, z in REUSES.items()
    }


@debugging
def test_a_run_in_reused_places_gives_the_same_bits(debug):
    ws = Workspace(debug=debug)
    ws.arrange(plan(record(stages, reuses=REUSES)))
    ws._arena.fill(0xFF)  # NaN
    want = stages(Workspace(growth="exact"))
    for _ in range(3):
        assert np.array_equal(stages(ws), want)
        ws.next_generation()


def test_what_is_read_after_its_place_was_reused_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^reuses: 'z0' is used after the first use of 'a0'"):
        record(lambda ws: stages(ws, late=True), reuses=REUSES)
    with pytest.raises(ValueError, match=r"^reuses: 'x' was not taken, needed one of z0, a0, h0"):
        record(stages, reuses={"x": "z0"})
    with pytest.raises(ValueError, match=r"^reuses: 'x' was not taken"):
        record(stages, reuses={"a0": "x"})
    with pytest.raises(
        ValueError, match=r"^reuses: 'a0' has its own place, needed that of another$"
    ):
        record(stages, reuses={"a0": "a0"})


def test_what_is_taken_before_the_place_it_wants_is_refused_by_name():
    def fn(ws):
        a, z = ws.take("a", (4,)), ws.take("z", (4,))
        z.fill(1)
        np.tanh(z, out=a)

    with pytest.raises(ValueError, match=r"^reuses: 'a' is taken before 'z', needed after$"):
        record(fn, reuses={"a": "z"})


def test_a_rehearsal_finds_what_is_read_after_its_place_was_reused():
    ws = Workspace(debug=True)
    ws.arrange(plan(record(stages, reuses=REUSES)))
    with pytest.raises(RuntimeError, match=r"'z0' of generation 1 is stale: the plan gave its"):
        stages(ws, late=True)


def test_a_place_whose_owner_was_given_back_is_poisoned():
    ws = Workspace(debug=True)
    ws.arrange(plan({"x": ((4,), f8, 0, 1), "y": ((4,), f8, 1, 2, "x")}))
    with ws.scope():
        x = ws.take("x", (4,), f8)
        x[...] = 1
    y = ws.take("y", (4,), f8)
    assert np.isnan(y).all()
    with pytest.raises(RuntimeError, match="'x' of generation 1 is stale"):
        x[0]


def test_a_place_that_was_reused_is_poisoned_when_it_is_taken_again():
    ws = Workspace(debug=True)
    ws.arrange(plan({"x": ((4,), f8, 0, 1), "y": ((4,), f8, 1, 2, "x")}))
    x = ws.take("x", (4,), f8)
    x[...] = 1
    with ws.scope():
        assert np.array_equal(np.tanh(x, out=ws.take("y", (4,), f8)), np.tanh(np.ones(4)))
    with ws.scope():
        assert np.isnan(ws.take("y", (4,), f8)).all()
