"""Caches of one value: what they promise, in every order, and what breaks two of them."""

import copy
import gc
import math
import pickle
import sys
import sysconfig
import threading
import time
import weakref
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from itertools import product
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlab.interleave import explore, replay
from ctxlab.norm_cache import (
    _SAFE,
    _VARIANTS,
    DerivedValue,
    EarlyFlag,
    LockedFlag,
    PerThread,
    PlainFlag,
    Recompute,
    VersionCounter,
    _asking,
    _break_even,
    _contended,
    _costs,
    _interpreter_line,
    _nanoseconds,
    _norms,
    _nothing,
    _per_change,
    _search,
    _Stale,
    _Stress,
    _stress,
    _Trial,
    _trial,
    _word_pairs,
)

every = pytest.mark.parametrize("variant", _VARIANTS.values(), ids=list(_VARIANTS))
safe = pytest.mark.parametrize("variant", [_VARIANTS[name] for name in _SAFE], ids=_SAFE)
CACHES = [name for name in _VARIANTS if name != "recompute"]
caches = pytest.mark.parametrize("variant", [_VARIANTS[name] for name in CACHES], ids=CACHES)
Waitless = partial(DerivedValue, once=False)
WAITLESS = {
    name: Waitless if name == "snapshot swap" else _VARIANTS[name]
    for name in _SAFE
    if name != "locked flag"
}
waitless = pytest.mark.parametrize("variant", WAITLESS.values(), ids=list(WAITLESS))
GUARDED = [name for name in _SAFE if name != "recompute"]
guarded = pytest.mark.parametrize("variant", [_VARIANTS[name] for name in GUARDED], ids=GUARDED)


class Broken(Exception):
    """Raised on purpose."""


class Interrupt(BaseException):
    """As KeyboardInterrupt, but of nobody else."""


class Thread(threading.Thread):
    """A thread whose result or error comes out of `end`."""

    def __init__(self, body):
        super().__init__(daemon=True)
        self.body, self.error, self.result = body, None, None
        self.start()

    def run(self):
        try:
            self.result = self.body()
        except BaseException as e:
            self.error = e

    def end(self):
        self.join(60)
        assert not self.is_alive(), "a thread that waits for ever"
        if self.error is not None:
            raise self.error
        return self.result


class Slow:
    """A compute function of a state, whose first call stops half-way until it is told to go on."""

    def __init__(self, state, error=None):
        self.state, self.error, self.calls, self.log = state, error, 0, []
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __call__(self):
        self.calls += 1
        first, seen = self.calls == 1, self.state
        if first:
            self.inside.set()
            assert self.go_on.wait(60)
            self.log.append("computed")
            if self.error is not None:
                raise self.error
        return seen


def half_way(variant, state, error=None):
    """A cache of a slow compute function, and the thread of a reader that is inside it."""
    compute = Slow(state, error)
    cache = variant(compute)
    reader = Thread(cache.get)
    assert compute.inside.wait(60)
    return compute, cache, reader


# One thread


@every
@pytest.mark.parametrize(
    "compute", [None, 5.0, "norm", [], np.ones(3)], ids=lambda x: type(x).__name__
)
def test_what_cannot_be_called_is_refused(variant, compute):
    with pytest.raises(TypeError, match=rf"compute: a {type(compute).__name__}, needed a function"):
        variant(compute)


@every
def test_nothing_is_computed_before_it_is_asked_for(variant):
    cache = variant(lambda: 1 / 0)
    cache.invalidate()
    cache.invalidate()


@every
def test_a_function_that_needs_arguments_says_so_each_time(variant):
    cache = variant(lambda x: x)
    for _ in range(2):
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            cache.get()


@caches
@pytest.mark.parametrize(
    "value",
    [None, 0, False, "", (), (1, "a"), math.nan, np.nan, object(), NotImplemented],
    ids=lambda value: "object" if type(value) is object else repr(value),
)
def test_any_value_is_kept(variant, value):
    calls = []

    def compute():
        calls.append(1)
        return value

    cache = variant(compute)
    assert all(cache.get() is value for _ in range(3))
    assert len(calls) == 1
    cache.invalidate()
    assert cache.get() is value
    assert len(calls) == 2


@every
@pytest.mark.parametrize(
    "error", [Broken, Interrupt, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration]
)
def test_an_error_reaches_the_caller_and_leaves_the_value_out_of_date(variant, error):
    raised, state = error("on purpose"), [1.0]
    cache = variant(lambda: state[0] if isinstance(state[0], float) else throw(state[0]))
    assert cache.get() == 1.0
    state[0] = raised
    cache.invalidate()
    for _ in range(3):
        with pytest.raises(error) as caught:
            cache.get()
        assert caught.value is raised
    state[0] = 2.0  # without another word
    assert cache.get() == 2.0


def throw(error):
    raise error


@every
@given(
    st.lists(st.sampled_from(["change", "get", "get", "break", "mend", "invalidate"]), max_size=30)
)
@settings(max_examples=25)
def test_one_thread_sees_every_change_and_computes_only_when_it_must(variant, operations):
    state, broken, calls, dirty = 0, False, 0, True

    def compute():
        nonlocal calls
        calls += 1
        if broken:
            raise Broken
        return state

    cache = variant(compute)
    for operation in operations:
        before = calls
        if operation == "change":
            state += 1
        if operation in ("change", "invalidate"):
            cache.invalidate()
            dirty = True
        elif operation in ("break", "mend"):
            broken = operation == "break"
        elif operation == "get":
            computes = dirty or variant is Recompute
            if computes and broken:
                with pytest.raises(Broken):
                    cache.get()
            else:
                assert cache.get() == state
                dirty = False
            assert calls - before == computes
            continue
        assert calls == before


# A compute function that asks again


@pytest.mark.parametrize(
    "name", [name for name in _VARIANTS if name not in ("recompute", "early flag")]
)
def test_a_cache_that_asks_itself_says_so_and_can_be_used_afterwards(name):
    asks = [True]
    cache = _VARIANTS[name](lambda: cache.get() if asks[0] else 3.0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="compute: asks for the value that it computes"):
            cache.get()
    asks[0] = False
    assert cache.get() == cache.get() == 3.0
    cache.invalidate()
    assert Thread(cache.get).end() == 3.0


@pytest.mark.parametrize(("one", "other"), [*product(GUARDED, repeat=2)])
def test_caches_that_ask_each_other_say_so_and_can_be_used_afterwards(one, other):
    circle = [True]
    a = _VARIANTS[one](lambda: b.get() + 1)
    b = _VARIANTS[other](lambda: a.get() if circle[0] else 1.0)
    for cache in (a, b, a):
        with pytest.raises(RuntimeError, match="asks for the value"):
            cache.get()
    circle[0] = False
    assert (a.get(), b.get()) == (2.0, 1.0)


@guarded
def test_a_compute_function_may_catch_the_error_of_asking_again(variant):
    def compute():
        try:
            return cache.get()
        except RuntimeError:
            return "first"

    cache = variant(compute)
    assert cache.get() == cache.get() == "first"


# A change while the value is computed


@pytest.mark.parametrize(
    "name", [name for name in _VARIANTS if name not in ("plain flag", "locked flag")]
)
def test_a_change_made_by_compute_itself_is_not_lost(name):
    state = [0]

    def compute():
        seen = state[0]
        if seen < 2:
            state[0] += 1
            cache.invalidate()
        return seen

    cache = _VARIANTS[name](compute)
    assert [cache.get() for _ in range(5)] == [0, 1, 2, 2, 2]


def test_the_lock_refuses_a_change_made_by_compute_itself():
    changes = [True]

    def compute():
        if changes[0]:
            cache.invalidate()
        return 1.0

    cache = LockedFlag(compute)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="invalidate: called by the compute function"):
            cache.get()
    changes[0] = False
    cache.invalidate()
    assert cache.get() == 1.0


@waitless
def test_what_was_computed_from_before_a_change_is_not_kept(variant):
    """Nobody waits for the slow reader, and its late value does not replace the new one."""
    compute, cache, slow = half_way(variant, "old")
    compute.state = "new"
    cache.invalidate()
    assert cache.get() == "new"
    compute.go_on.set()
    assert slow.end() == "old"  # it began before the change
    assert cache.get() == Thread(cache.get).end() == "new"


@safe
def test_a_change_that_nobody_else_read_is_not_lost(variant):
    compute, cache, slow = half_way(variant, "old")
    compute.state = "new"
    changing = Thread(lambda: [cache.invalidate(), compute.log.append("invalidated")])
    if variant is not LockedFlag:  # there it waits
        changing.end()
    compute.go_on.set()
    assert slow.end() == "old"
    changing.end()
    assert compute.log == ["computed", "invalidated"][:: 1 if variant is LockedFlag else -1]
    assert cache.get() == "new"


@pytest.mark.parametrize("attempt", range(5))
def test_the_plain_flag_loses_a_change_every_time(attempt):
    compute, cache, slow = half_way(PlainFlag, "old")
    compute.state = "new"
    cache.invalidate()
    compute.go_on.set()
    slow.end()
    assert cache.get() == cache.get() == "old"  # and so it stays


@pytest.mark.parametrize("attempt", range(5))
def test_the_early_flag_is_clean_before_its_value_is_there_every_time(attempt):
    compute, cache, slow = half_way(EarlyFlag, "value")
    assert cache.get() is None
    compute.go_on.set()
    assert slow.end() == cache.get() == "value"


# Errors while others read


@waitless
@pytest.mark.parametrize("error", [Broken, Interrupt])
def test_an_error_of_one_reader_is_not_that_of_another(variant, error):
    compute, cache, failing = half_way(variant, 1.0, error("first"))
    assert cache.get() == Thread(cache.get).end() == 1.0  # nobody waits
    compute.go_on.set()
    with pytest.raises(error, match="first"):
        failing.end()
    assert cache.get() == 1.0


@safe
@pytest.mark.parametrize("error", [Broken, Interrupt])
def test_readers_beside_an_error_are_not_blocked(variant, error):
    compute, cache, failing = half_way(variant, 1.0, error("first"))
    others = [Thread(cache.get) for _ in range(3)] + [Thread(cache.invalidate)]
    compute.go_on.set()
    with pytest.raises(error, match="first"):
        failing.end()
    assert [other.end() for other in others] == [1.0] * 3 + [None]
    assert cache.get() == 1.0


# Racing readers


@pytest.mark.parametrize("n", [2, 8])
def test_racing_first_readers_of_a_derived_value_get_the_same_object(n):
    together, calls = threading.Barrier(n), []

    def compute():
        together.wait(60)  # every reader has found the cell empty
        calls.append(1)
        return object()

    cache = Waitless(compute)
    for _ in range(5):
        calls.clear()
        found = [reader.end() for reader in [Thread(cache.get) for _ in range(n)]]
        assert len(calls) == n
        assert len(set(map(id, found))) == 1
        assert cache.get() is found[0]
        cache.invalidate()


def test_racing_first_readers_beside_a_change_get_the_object_of_their_own_cell():
    compute = Slow("old")
    cache = Waitless(lambda: (compute(),))
    slow = Thread(cache.get)
    assert compute.inside.wait(60)
    early = Thread(cache.get).end()
    compute.state = "new"
    cache.invalidate()
    new = cache.get()
    compute.go_on.set()
    assert slow.end() is early
    assert (early, new) == (("old",), ("new",))
    assert cache.get() is new


def test_only_the_value_that_was_first_is_kept():
    class Large:
        pass

    n, made = 4, []
    together = threading.Barrier(n)

    def compute():
        together.wait(60)
        large = Large()
        made.append(weakref.ref(large))
        return large

    cache = Waitless(compute)
    readers = [Thread(cache.get) for _ in range(n)]
    kept = {id(reader.end()) for reader in readers}
    del readers
    assert len(kept) == 1
    assert sum(ref() is not None for ref in made) == 1


def test_the_lock_computes_once_for_all():
    start, calls = threading.Barrier(8), []
    cache = LockedFlag(lambda: calls.append(1) or object())
    found = [
        reader.end()
        for reader in [Thread(lambda: [start.wait(60), cache.get()][1]) for _ in range(8)]
    ]
    assert len(calls) == len(set(map(id, found))) == 1


def test_each_thread_computes_once_for_itself():
    calls = []
    cache = PerThread(lambda: calls.append(threading.get_ident()) or len(calls))
    start = threading.Barrier(3)
    readers = [
        Thread(lambda: [start.wait(60), [cache.get() for _ in range(50)]][1]) for _ in range(3)
    ]
    assert all(len(set(reader.end())) == 1 for reader in readers)
    assert len(calls) == 3


def test_no_change_goes_uncounted():
    cache, start = VersionCounter(_nothing), threading.Barrier(4)

    def write():
        start.wait(60)
        for _ in range(2000):
            cache.invalidate()

    for writer in [Thread(write) for _ in range(4)]:
        writer.end()
    assert cache._version == 8000


# One computation for all, and a value that nobody can write to


class Gate:
    """Counts its calls; each waits to be let on."""

    def __init__(self, *outcomes):
        self.outcomes, self.calls = list(outcomes), 0
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __call__(self):
        self.calls += 1
        self.inside.set()
        assert self.go_on.wait(60)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


@pytest.mark.parametrize("value", [1.0, None, ()])
def test_first_readers_compute_once(value):
    compute = Gate(value)
    cache = DerivedValue(compute)
    readers = [Thread(cache.get) for _ in range(8)]
    assert compute.inside.wait(60)
    time.sleep(0.02)  # the others come to wait; that they do is not needed for what is checked
    compute.go_on.set()
    assert [reader.end() for reader in readers] == [value] * 8
    assert compute.calls == 1


def test_an_error_goes_to_the_reader_that_computed_and_the_next_one_computes():
    compute = Gate(Broken("first"), Interrupt("second"), 3.0)
    cache = DerivedValue(compute)
    readers = [Thread(cache.get) for _ in range(5)]
    assert compute.inside.wait(60)
    compute.go_on.set()
    ends = []
    for reader in readers:
        try:
            ends.append(reader.end())
        except (Broken, Interrupt) as e:
            ends.append(str(e))
    assert sorted(map(str, ends)) == ["3.0", "3.0", "3.0", "first", "second"]
    assert compute.calls == 3


def test_a_reader_after_a_change_does_not_wait_for_the_computation_before_it():
    compute, cache, slow = half_way(DerivedValue, "old")
    compute.state = "new"
    cache.invalidate()
    assert Thread(cache.get).end() == "new"
    compute.go_on.set()
    assert (slow.end(), cache.get()) == ("old", "new")


# A compute function of which nobody knows whether it ends


@pytest.mark.parametrize("variant", [DerivedValue, *WAITLESS.values()])
def test_who_blocks_for_ever_holds_up_nobody_after_the_next_change(variant):
    compute, cache, blocked = half_way(variant, "old")
    compute.state = "new"
    Thread(cache.invalidate).end()  # does not wait
    assert Thread(cache.get).end() == "new"
    assert blocked.is_alive()
    compute.go_on.set()  # only so that no thread is left
    blocked.end()


def test_readers_wait_for_who_blocks_unless_nobody_is_to_wait():
    compute, cache, blocked = half_way(DerivedValue, "value")
    waiting = Thread(cache.get)
    waiting.join(0.1)
    assert waiting.is_alive()
    compute.go_on.set()
    assert (blocked.end(), waiting.end(), compute.calls) == ("value", "value", 1)
    compute, cache, blocked = half_way(Waitless, "value")
    assert Thread(cache.get).end() == "value"
    assert blocked.is_alive()
    compute.go_on.set()
    assert (blocked.end(), compute.calls) == ("value", 2)


def test_two_that_compute_do_not_wait_so_one_buffer_may_be_written_by_both():
    """Why what is computed into prepared memory is no `DerivedValue`, here or in a context."""
    buffer, halves, other = np.zeros(2), threading.Event(), threading.Event()

    def fold():
        buffer[:] = 0
        if not halves.is_set():
            halves.set()
            assert other.wait(60)
        buffer[:] += 1
        return buffer

    folded = DerivedValue(fold)
    first = Thread(folded.get)
    assert halves.wait(60)
    outer = DerivedValue(lambda: folded.get().sum())
    assert outer.get() == 2
    other.set()
    assert first.end() is folded.get()
    assert folded.get().tolist() == [2, 2]  # one too many


def test_values_that_need_each_other_in_two_threads_do_not_wait_for_each_other():
    both = threading.Barrier(2)
    circle = [True]

    def compute_a():
        if circle[0]:
            both.wait(60)
        return b.get() + 1

    def compute_b():
        if circle[0]:
            both.wait(60)
            return a.get()
        return 1

    a, b = DerivedValue(compute_a), DerivedValue(compute_b)
    readers = [Thread(a.get), Thread(b.get)]
    for reader in readers:
        with pytest.raises(RuntimeError, match="asks for the value"):
            reader.end()
    circle[0] = False
    assert (a.get(), b.get()) == (2, 1)


ARRAYS = {
    "array": (lambda: np.zeros(3), lambda value: value),
    "tuple": (lambda: (np.zeros(3), 1), lambda value: value[0]),
    "list": (lambda: [np.zeros(3)], lambda value: value[0]),
    "dict": (lambda: {"a": [np.zeros(3)]}, lambda value: value["a"][0]),
    "transposed": (lambda: np.zeros((3, 2)).T, lambda value: value),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("once", [True, False])
def test_no_reader_can_write_to_what_all_share(name, once):
    compute, array_in = ARRAYS[name]
    cache = DerivedValue(compute, once=once)
    for _ in range(2):
        with pytest.raises(ValueError, match="read-only"):
            array_in(cache.get())[0] = 99
    assert not array_in(cache.get()).any()
    assert cache.get() is cache.get()


def test_lists_and_dicts_cannot_be_changed_by_a_reader():
    cache = DerivedValue(lambda: {"a": [1, 2]})
    assert cache.get() == {"a": (1, 2)}
    assert isinstance(cache.get(), MappingProxyType)


def test_the_array_of_the_owner_stays_writable():
    mine = np.zeros(3)
    cache = DerivedValue(lambda: mine)
    assert cache.get() is not mine
    assert np.shares_memory(cache.get(), mine)
    mine[0] = 1  # of the owner, who must invalidate
    assert mine.flags.writeable


def number():
    return 5.0


class Layer:
    def __init__(self, weight):
        self.weight, self.calls = weight, 0
        self.twice = DerivedValue(self.double)

    def double(self):
        return 2 * self.weight

    @DerivedValue
    def norm(self):
        self.calls += 1
        return abs(self.weight)


class Parent(Layer):
    __slots__ = ()


def copies(value):
    return copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))


def test_a_copy_computes_anew_by_the_same_function():
    cache = DerivedValue(number, once=False)
    cache.get()
    for other in copies(cache):
        assert other.get() == 5.0
        assert other._cell is not cache._cell
        assert other._once is False


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_the_value_of_a_copied_object_is_that_of_the_copy(duplicate):
    layer = Layer(-3.0)
    assert (layer.norm, layer.twice.get()) == (3.0, -6.0)
    other = duplicate(layer)
    other.weight = 4.0
    del other.norm
    other.twice.invalidate()
    assert (other.norm, other.twice.get()) == (4.0, 8.0)
    assert (layer.norm, layer.twice.get()) == (3.0, -6.0)


def test_an_attribute_of_a_shallow_copy_is_its_own():
    layer = Layer(-3.0)
    assert layer.norm == 3.0
    other = copy.copy(layer)
    other.weight = 4.0
    del other.norm
    assert (other.norm, layer.norm) == (4.0, 3.0)
    layer.weight = 5.0
    del layer.norm
    assert (other.norm, layer.norm) == (4.0, 5.0)


def test_what_outlives_the_original_of_a_copy_can_be_copied():
    layer = Layer(-3.0)
    assert layer.norm == 3.0
    other = copy.copy(layer)
    del layer
    for each in copies(other):
        assert each.norm == 3.0


def test_an_attribute_does_not_keep_its_object_alive():
    class Owner:
        @DerivedValue
        def norm(self):
            return 3.0

    owner = Owner()
    assert owner.norm == 3.0
    alive = weakref.ref(owner)
    gc.disable()
    try:
        del owner  # the last one who knew it
        assert alive() is None
    finally:
        gc.enable()


def test_first_readers_of_an_attribute_compute_once():
    compute, start = Gate(3.0), threading.Barrier(4)

    class Slow:
        @DerivedValue
        def norm(self):
            return compute()

    one = Slow()
    readers = [Thread(lambda: [start.wait(60), one.norm][1]) for _ in range(4)]
    assert compute.inside.wait(60)
    compute.go_on.set()
    assert [reader.end() for reader in readers] == [3.0] * 4
    assert compute.calls == 1


def test_a_method_becomes_an_attribute_that_is_computed_once():
    one, other = Layer(-3.0), Parent(7.0)
    assert (one.norm, one.norm, other.norm) == (3.0, 3.0, 7.0)
    one.weight = 5.0
    assert one.norm == 3.0
    del one.norm
    assert one.norm == 5.0
    assert (one.calls, other.calls) == (2, 1)
    assert isinstance(Layer.norm, DerivedValue)
    with pytest.raises(AttributeError):
        one.norm = 3


def test_an_attribute_needs_somewhere_to_be_kept():
    class Slotted:
        __slots__ = ()

        @DerivedValue
        def norm(self):
            return 1.0

    with pytest.raises(TypeError, match="norm: Slotted has no __dict__"):
        _ = Slotted().norm


# In bulk


@safe
@pytest.mark.parametrize(("readers", "writers"), [(2, 2)])
def test_a_hundred_thousand_operations_without_a_stale_read(variant, readers, writers):
    found = _stress(variant, 100_000, readers=readers, writers=writers, interval=1e-4)
    assert found.operations == 100_000
    assert found.reads == 100_000 * readers // (readers + writers)
    assert found.stale == 0


@safe
def test_no_stale_read_where_computing_lets_others_run(variant):
    assert _stress(variant, 4000, pause=lambda: time.sleep(0)).stale == 0


def test_what_a_stress_test_does_is_counted():
    found = _stress(Recompute, 10, readers=2, writers=1)
    assert (found.operations, found.reads, found.stale) == (12, 8, 0)
    assert _stress(DerivedValue, 9, readers=3, writers=0)[:3] == (9, 9, 0)
    assert _stress(DerivedValue, 9, readers=0, writers=3)[:3] == (9, 0, 0)
    assert _stress(DerivedValue, 0)[:3] == (0, 0, 0)


class Forgetful:
    """Answers after the last change, and knows nothing of any."""

    def __init__(self, compute):
        self.changes, self.last = 0, threading.Event()

    def get(self):
        assert self.last.wait(60)
        return (0,)

    def invalidate(self):
        self.changes += 1
        if self.changes == 50:
            self.last.set()


def test_stale_reads_are_counted_by_a_stress_test():
    found = _stress(Forgetful, 100, readers=1, writers=1)
    assert found.reads == 50
    assert found.stale in (49, 50)  # the first read may have begun before any change


@pytest.mark.parametrize("error", [Broken, Interrupt])
def test_an_error_under_stress_comes_out_and_the_interpreter_is_as_before(error, monkeypatch):
    before, threads, asked = sys.getswitchinterval(), threading.active_count(), []
    monkeypatch.setattr(
        sys, "setswitchinterval", asked.append
    )  # of the whole process: leave it alone
    with pytest.raises(error):
        _stress(DerivedValue, 100, pause=lambda: throw(error()), interval=1e-3)
    assert asked == [1e-3, before]
    assert threading.active_count() == threads


# Every order


@pytest.mark.slow
@safe
def test_three_threads_in_every_order(variant):
    found = explore(_asking(variant, ["R", "R", "W"]))
    assert found.races == []
    assert found.interleavings > 50


@safe
def test_two_threads_in_every_order(variant):
    for found in _search(variant, [("R", "WR"), ("RR", "W")]).values():
        assert found.races == []


@pytest.mark.parametrize("variant", [PlainFlag, EarlyFlag])
def test_the_flags_fail_every_time(variant):
    found = [explore(_asking(variant, ["R", "WR"])) for _ in range(2)]
    assert len({(len(f.races), f.interleavings, f.shortest.path) for f in found}) == 1
    assert {type(race.error) for race in found[0].races} == {_Stale}
    for race in found[0].races[:5]:
        for _ in range(2):
            assert isinstance(replay(_asking(variant, ["R", "WR"]), race.path).failure, _Stale)


@pytest.mark.parametrize("words", [("RR", "W"), ("R", "WR")], ids="-".join)
@pytest.mark.parametrize("name", ["recompute", "plain flag", "early flag", "locked flag"])
def test_memory_hides_nothing_of_a_cache(name, words):
    scenario = _asking(_VARIANTS[name], words)
    pruned = explore(scenario)
    if pruned.interleavings <= 300:
        every_order = explore(scenario, prune=False)
        assert pruned.interleavings == every_order.interleavings
        assert bool(pruned.races) == bool(every_order.races)


def test_memory_hides_nothing_of_a_cache_for_each_thread():
    scenario = _asking(PerThread, ["RR", "W"])
    assert explore(scenario).interleavings == explore(scenario, prune=False).interleavings


class LatePerThread(PerThread):
    """Reads the version after it has computed."""

    def get(self):
        mine = self._local
        if getattr(mine, "version", None) is not self._version:
            value = self._compute()
            mine.value, mine.version = value, self._version
        return mine.value


def test_a_late_version_of_a_thread_is_found():
    scenario = _asking(LatePerThread, ["RR", "W"])
    assert explore(scenario, prune=False).races
    assert explore(scenario).races


def test_the_steps_of_a_snapshot_are_those_of_its_lines():
    """A read: announced, _cell, [0], [0], turn, length, writes, append, del, [0], turn, [1]."""
    steps = [str(step)[2:] for step in replay(_asking(DerivedValue, ["R", "W"]), ()).steps]
    assert len(steps) == 12 + 3


@pytest.mark.parametrize("words", [["RX", "W"], ["r", "W"], [1, "W"]])
def test_words_are_made_of_two_letters(words):
    with pytest.raises((ValueError, TypeError), match="words"):
        explore(_asking(DerivedValue, words))


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_word_pairs_are_all_that_can_show_something(depth):
    words = [w for n in range(1, depth + 1) for w in map("".join, product("RW", repeat=n))]
    expected = {frozenset((a, b)) for a in words for b in words if set("RW") <= set(a + b)}
    found = _word_pairs(depth)
    assert {frozenset(pair) for pair in found} == expected
    assert len(found) == len(expected)
    assert all(1 <= len(word) <= depth for pair in found for word in pair)


class Twice(DerivedValue):
    """Forgets to look again once it is its turn."""

    def _fill(self, cell):
        with cell[0] or nullcontext():
            cell.append(self._compute())
            cell[0] = None


class Once:
    """A compute function that tells how often it has been called for one cell."""

    def __init__(self):
        self.calls = []

    def __call__(self):
        self.calls.append(1)
        return 1.0


def first_readers(variant):
    def scenario(schedule):
        compute = schedule.share(Once)
        cache = schedule.share(variant, compute)

        def check():
            assert len(compute.calls) == 1, "computed more than once"

        schedule.afterwards(check)
        return [cache.get, cache.get]

    return scenario


def test_first_readers_compute_once_in_every_order():
    assert explore(first_readers(DerivedValue)).races == []
    assert explore(first_readers(Twice)).races
    assert explore(first_readers(Waitless)).races


def test_a_derived_value_that_nobody_waits_for_in_every_order():
    for found in _search(Waitless, [("R", "WR"), ("RR", "W")]).values():
        assert found.races == []


@pytest.mark.parametrize(
    ("stale", "verdict"),
    [
        ({}, "proves nothing"),
        ({"plain flag": 3}, "proves nothing"),
        ({"plain flag": 3, "early flag": 1}, "the safe ones none"),
    ],
)
def test_a_trial_proves_something_where_the_broken_variants_fail(stale, verdict):
    results = {name: _Stress(100, 50, stale.get(name, 0), 1.0) for name in _VARIANTS}
    assert verdict in _Trial(results).check()
    for name in _SAFE:
        with pytest.raises(AssertionError, match=f"stale reads of {name}"):
            _Trial(results | {name: _Stress(100, 50, 1, 1.0)}).check()


def test_a_trial_runs_every_variant():
    found = _trial(400, pause=lambda: time.sleep(0))
    assert list(found.results) == list(_VARIANTS)
    assert all(each.operations == 400 for each in found.results.values())


# What it costs


nanos = st.integers(1, 10_000).map(Fraction)


@given(recompute=nanos, hit=nanos, overhead=st.integers(0, 10_000).map(Fraction), most=st.just(400))
def test_the_cache_pays_beyond_break_even_and_not_before(recompute, hit, overhead, most):
    """Against a clock that a pretended cache moves."""
    clock = {"with": Fraction(0), "without": Fraction(0)}
    least, filled = _break_even(recompute, hit, overhead), False
    for k in range(1, most):
        clock["without"] += recompute
        clock["with"] += hit if filled else recompute + overhead
        filled = True
        assert (clock["with"] < clock["without"]) == (k > least)


@given(st.floats(1e-9, 1e3), st.floats(1e-9, 1e3), st.floats(0, 1e3))
def test_break_even_is_never_below_one(recompute, hit, overhead):
    k = _break_even(recompute, hit, overhead)
    assert k >= 1
    assert (k == math.inf) == (recompute <= hit or math.isinf(overhead / (recompute - hit)))


@pytest.mark.parametrize("asks", [0, 1, 7])
def test_a_change_and_its_requests_compute_once_or_each_time(asks):
    calls = []
    bodies = _per_change(lambda: calls.append(1), asks)
    for name, expected in (("recompute", asks), ("cached", min(asks, 1))):
        calls.clear()
        bodies[name]()
        assert len(calls) == expected


def test_norms_are_norms():
    found = _norms(7, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    v, m = rng.standard_normal(7, np.float32), rng.standard_normal(49, np.float32)
    assert list(found) == ["vector of 7", "7 x 7 matrix"]
    assert found["vector of 7"]() == pytest.approx(np.linalg.norm(v), rel=1e-5)
    assert found["7 x 7 matrix"]() == pytest.approx(np.linalg.norm(m), rel=1e-5)


@pytest.mark.parametrize("names", [list, iter])
def test_costs_are_timed_for_each_name(names):
    found = _costs(names(["snapshot swap"]), budget=0.01)
    assert {
        "compute",
        *(f"snapshot swap {what}" for what in ("hit", "invalidate", "cycle")),
    } <= set(found.seconds)
    assert 0 < _nanoseconds(found, "compute").low <= _nanoseconds(found, "compute").high
    assert _contended(DerivedValue, 2, gets=50) > 0


ARGUMENTS = {
    "stress without threads": ("readers", lambda: _stress(DerivedValue, 10, readers=0, writers=0)),
    "stress with fewer than no readers": (
        "readers",
        lambda: _stress(DerivedValue, 10, readers=-1, writers=2),
    ),
    "stress with fewer than no operations": ("operations", lambda: _stress(DerivedValue, -5)),
    "stress with half an operation": ("operations", lambda: _stress(DerivedValue, 10.5)),
    "contended without threads": ("threads", lambda: _contended(DerivedValue, 0)),
    "contended with fewer than no threads": ("threads", lambda: _contended(DerivedValue, -1)),
    "contended without requests": ("gets", lambda: _contended(DerivedValue, 1, 0)),
    "costs of a stranger": ("names: .*stranger", lambda: _costs(["stranger"])),
    "costs of the letters of a name": ("names", lambda: _costs("recompute")),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments_are_named(name):
    match, call = ARGUMENTS[name]
    with pytest.raises((ValueError, TypeError), match=match):
        call()


@pytest.mark.parametrize(
    ("lock", "built", "expected"),
    [
        (None, None, "with a global lock:"),
        (True, 0, "with a global lock:"),
        (True, 1, "with a global lock (switched on in a free-threaded build):"),
        (False, 1, "without a global lock:"),
    ],
)
def test_the_interpreter_says_which_it_is(lock, built, expected, monkeypatch):
    monkeypatch.delattr(sys, "_is_gil_enabled", raising=False)
    if lock is not None:
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda: lock, raising=False)
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: built)
    line = _interpreter_line()
    assert expected in line
    assert line.startswith(f"Python {sys.version_info.major}.{sys.version_info.minor} ")
    assert "\n" not in line
