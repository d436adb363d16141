"""A lost update is found, or what it lies in is refused, wherever that is."""

import _thread
import array
import collections
import contextvars
import copy
import ctypes
import dataclasses
import enum
import functools
import heapq
import itertools
import operator
import os
import threading
import types
import typing
import weakref

import numpy as np
import pytest

from ctxlab.interleave import Refused, explore


class Seen(Exception):
    """What a check has found."""


class Box:
    def __init__(self, it):
        self.it = it


class Slotted:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


@dataclasses.dataclass(frozen=True)
class Frozen:
    n: int = 0


class Colour(enum.Enum):
    RED = 1


class ListOf(list):
    pass


class DictOf(dict):
    pass


class ArrayOf(np.ndarray):
    pass


class Lazily:
    @functools.cached_property
    def it(self):
        return [0]


def counting():
    n = 0

    def add():
        nonlocal n
        n += 1
        return n

    return add


def generator():
    yield from itertools.count(1)


def named(n):
    return types.SimpleNamespace(n=n)


def function():
    def bare():
        pass

    bare.n = 0
    return bare


def with_n(value):
    value.n = 0
    return value


def up(place, key=0):
    place[key] = place[key] + 1


def bump(place):
    place.n = place.n + 1


def past_the_class(frozen):
    object.__setattr__(frozen, "n", frozen.n + 1)


def by_slot(slotted):
    slot = Slotted.__dict__["n"]
    slot.__set__(slotted, slot.__get__(slotted) + 1)


def kept_view(box):
    view = np.asarray(box.it)
    box.it[0] = view[0] + 1


def through_a_view(box):
    view = np.reshape(box.it, (1, -1))
    first = view[0, 0]
    del view
    box.it[0] = first + 1


def elsewhere(box):
    thread = threading.Thread(target=bump, args=(box.it,))
    thread.start()
    thread.join()


def environment():
    os.environ["CTXLAB_COUNT"] = "0"


def in_the_environment(box):
    os.environ["CTXLAB_COUNT"] = str(int(os.environ["CTXLAB_COUNT"]) + 1)


def new_names(box):
    box.it.__dict__ = {"n": box.it.n + 1}


def read(n):
    return n.it.n


def first(box):
    return box.it[0]


MODULE = types.ModuleType("made")
MODULE.n = 0

ENTRIES = {  # what they give counts at 0
    "list": lambda: [0],
    "dict": lambda: {0: 0},
    "deque": lambda: collections.deque([0]),
    "deque of one": lambda: collections.deque([0], maxlen=1),
    "defaultdict": lambda: collections.defaultdict(int),
    "Counter": lambda: collections.Counter({0: 0}),
    "OrderedDict": lambda: collections.OrderedDict({0: 0}),
    "ChainMap": lambda: collections.ChainMap({0: 0}),
    "UserDict": lambda: collections.UserDict({0: 0}),
    "UserList": lambda: collections.UserList([0]),
    "a subclass of list": lambda: ListOf([0]),
    "a subclass of dict": lambda: DictOf({0: 0}),
    "bytearray": lambda: bytearray(1),
    "memoryview": lambda: memoryview(bytearray(1)),
    "array.array": lambda: array.array("i", [0]),
    "an array of ctypes": lambda: (ctypes.c_int * 1)(),
    "array": lambda: np.zeros(1),
    "view of an array": lambda: np.zeros(4)[1:3],
    "array of a buffer": lambda: np.frombuffer(bytearray(8)),
    "a subclass of an array": lambda: np.zeros(1).view(ArrayOf),
    "masked array": lambda: np.ma.zeros(1),
    "array of objects": lambda: np.zeros(1, object),
}
NUMBERED = {  # what they give counts in an attribute `n`
    "SimpleNamespace": lambda: named(0),
    "function": function,
    "member of an enumeration": lambda: with_n(Colour.RED),
    "exception": lambda: with_n(ValueError()),
    "module": lambda: with_n(MODULE),
    "class": lambda: with_n(type("Made", (), {})),
    "slots": Slotted,
    "dataclass with slots": dataclasses.make_dataclass(
        "Made", [("n", int, dataclasses.field(default=0))], slots=True
    ),
}
OTHERS = {  # make, add, total
    "iterator": (itertools.count, lambda b: setattr(b, "n", next(b.it) + 1), lambda b: b.n),
    "generator": (generator, lambda b: setattr(b, "n", next(b.it)), lambda b: b.n),
    "variable of an outer function": (counting, lambda b: b.it(), lambda b: b.it() - 1),
    "cache of a function": (
        lambda: functools.lru_cache(lambda: [0]),
        lambda b: up(b.it()),
        lambda b: b.it()[0],
    ),
    "arguments of a partial": (
        lambda: functools.partial(up, [0]),
        lambda b: b.it(),
        lambda b: b.it.args[0][0],
    ),
    "cached property": (Lazily, lambda b: up(b.it.it), lambda b: b.it.it[0]),
    "default argument": (
        lambda: types.FunctionType(up.__code__, {}, "up", ([0], 0)),
        lambda b: b.it(),
        lambda b: b.it.__defaults__[0][0],
    ),
    "weak reference": (lambda: weakref.ref(MODULE), lambda b: bump(b.it()), lambda b: b.it().n),
    "context variable": (
        lambda: contextvars.ContextVar("made", default=0),
        lambda b: b.it.set(b.it.get() + 1),
        lambda b: b.it.get(),
    ),
    "arguments of an exception": (
        lambda: ValueError([0]),
        lambda b: up(b.it.args[0]),
        lambda b: b.it.args[0][0],
    ),
    "frozen, past its class": (Frozen, lambda b: past_the_class(b.it), read),
    "slot, past its class": (Slotted, lambda b: by_slot(b.it), read),
    "`__dict__` that is replaced": (lambda: with_n(Box(0)), new_names, read),
    "environment": (environment, in_the_environment, lambda b: int(os.environ["CTXLAB_COUNT"])),
    "thread that a body starts": (lambda: named(0), elsewhere, read),
    "own object in a thread of its own": (Slotted, elsewhere, read),
    "view that is kept": (lambda: np.zeros(2), kept_view, first),
    "view by a function": (lambda: np.zeros(2), through_a_view, first),
    "`copyto`": (lambda: np.zeros(1), lambda b: np.copyto(b.it, b.it + 1), first),
    "`put`": (lambda: np.zeros(1), lambda b: np.put(b.it, [0], b.it[0] + 1), first),
    "`out=`": (lambda: np.zeros(1), lambda b: np.add(b.it, 1, out=b.it), first),
    "`at`": (lambda: np.zeros(1), lambda b: np.add.at(b.it, [0], 1), first),
    "field of an array": (
        lambda: np.zeros(1, [("n", float)]),
        lambda b: up(b.it["n"]),
        lambda b: b.it["n"][0],
    ),
    "record of an array": (
        lambda: np.zeros(1, [("n", float)]),
        lambda b: operator.setitem(b.it[0], "n", b.it[0]["n"] + 1),
        lambda b: b.it["n"][0],
    ),
    "flat iterator": (lambda: np.zeros(1), lambda b: up(b.it.flat), first),
    "heap": (lambda: [0], lambda b: heapq.heappush(b.it, len(b.it)), lambda b: len({*b.it}) - 1),
}
KINDS = {
    **{name: (make, lambda b: up(b.it), first) for name, make in ENTRIES.items()},
    **{name: (make, lambda b: bump(b.it), read) for name, make in NUMBERED.items()},
    **OTHERS,
}


def adding(make, add, total):
    def scenario(schedule):
        box = schedule.share(lambda: Box(make()))

        def both():
            if total(box) != 2:
                raise Seen("lost")

        schedule.afterwards(both)
        return [functools.partial(add, box)] * 2

    return scenario


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", KINDS)
def test_a_lost_update_is_found_or_refused(name):
    try:
        found = explore(adding(*KINDS[name]), seconds=5)
    except Refused:
        return
    assert {str(race.error) for race in found.races} == {"lost"}
    assert len(found.races) < found.runs  # one after the other is right


def test_a_view_that_changes_in_the_hands_of_a_thread_is_refused():
    """A thread that looks twice would see two values; the copy that it got has one."""

    def scenario(schedule):
        box = schedule.share(lambda: Box(np.zeros(2)))

        def looks():
            view = np.asarray(box.it)
            before = view[0]
            _ = box.it
            assert view[0] == before

        def writes():
            box.it[0] = 1

        return [looks, writes]

    with pytest.raises(Refused, match="while a view of it that no step can see is in use"):
        explore(scenario)


def locked(add):
    def body(box, lock):
        with lock:
            add(box)

    return body


@pytest.mark.parametrize("name", ["list", "dict", "array", "`copyto`", "`put`", "`out=`", "slots"])
def test_under_a_lock_no_update_is_lost(name):
    make, add, total = KINDS[name]

    def scenario(schedule):
        box, lock = schedule.share(lambda: Box(make())), threading.Lock()

        def both():
            if total(box) != 2:
                raise Seen("lost")

        schedule.afterwards(both)
        return [functools.partial(locked(add), box, lock)] * 2

    assert explore(scenario).races == []


def test_a_copy_of_what_is_shared_is_no_second_name():
    def add(box):
        whole = copy.deepcopy(box.it)
        box.it["list"][0] = whole["list"][0] + 1
        box.it["array"][0] = whole["array"][0] + 1

    def total(box):
        assert box.it["list"][0] == box.it["array"][0]
        return box.it["list"][0]

    found = explore(adding(lambda: {"list": [0], "array": np.zeros(1)}, add, total))
    assert "lost" in {str(race.error) for race in found.races}


def test_what_is_put_aside_before_the_run_is_used_without_a_step():
    cache = functools.lru_cache(abs)

    def scenario(schedule):
        schedule.aside(cache)
        box = schedule.share(Box, 0)

        def body():
            box.it = cache(-1)

        return [body, body]

    assert explore(scenario).interleavings == 2


def test_a_scenario_that_differs_from_run_to_run_is_refused():
    turns = itertools.count()

    def scenario(schedule):
        schedule.aside(turns)
        box = schedule.share(Box, next(turns))

        def body():
            box.it = box.it

        return [body, body]

    with pytest.raises(Refused, match=r"^scenario: not the same in every run"):
        explore(scenario)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, StopIteration, Refused])
def test_a_check_may_raise_anything(error):
    def scenario(schedule):
        box = schedule.share(Box, 0)

        def check():
            raise error("of the check")

        schedule.afterwards(check)
        return [lambda: box.it] * 2

    before = _thread._count()
    found = explore(scenario)
    assert {type(race.error) for race in found.races} == {error}
    assert _thread._count() == before


def test_threads_that_share_nothing_have_one_order():
    found = explore(lambda schedule: [lambda: sum(range(10))] * 3)
    assert (found.interleavings, found.runs, found.races) == (1, 1, [])


Body = typing.Callable[[], typing.Any]


def asynchronous() -> list[Body]:
    async def coroutine():
        return 1

    async def suspended():
        yield 1

    return [coroutine, suspended, generator, functools.partial(generator)]


@pytest.mark.parametrize("body", asynchronous())
def test_bodies_that_nobody_would_run_are_refused(body):
    with pytest.raises(Refused, match=r"^bodies\[0\]: gives a"):
        explore(lambda schedule: [body])
