"""Threads that share something, for two explorers of their orders; prints a verdict as JSON.

python docs/example_races.py ctxlab NAME
frontrun python docs/example_races.py frontrun NAME
"""

import itertools
import json
import queue
import sys
import threading
import time
from collections import deque
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ctxlab.norm_cache import (
    DerivedValue,
    EarlyFlag,
    LockedFlag,
    PerThread,
    PlainFlag,
    VersionCounter,
)

LIMIT = 10  # seconds for all runs of a scenario


class Race(NamedTuple):
    make: Any  # gives what is shared
    bodies: Any  # what each thread does with it
    holds: Any  # what must be true of it afterwards
    broken: bool  # whether it is false after some order, or an order does not end


def counted(cls, broken=True):
    """Two threads add one."""
    return Race(cls, [cls.add] * 2, lambda shared: shared.total() == 2, broken)


class Attribute:
    def __init__(self):
        self.n = 0

    def add(self):
        self.n += 1

    def total(self):
        return self.n


class Slots(Attribute):
    __slots__ = ("n",)


class Names(Attribute):
    def add(self):
        vars(self)["n"] = vars(self)["n"] + 1


class Nested:
    def __init__(self):
        self.inner = Attribute()

    def add(self):
        self.inner.n += 1

    def total(self):
        return self.inner.n


class OfClass:
    n = 0

    def __init__(self):
        OfClass.n = 0

    def add(self):
        OfClass.n += 1

    def total(self):
        return OfClass.n


CELL = {"__name__": "__main__"}  # code as in a cell of a notebook, which lies in no file
source = "class OfCell:\n    def __init__(self):\n        self.n = 0\n"
source += "    def add(self):\n        self.n += 1\n    def total(self):\n        return self.n\n"
exec(compile(source, "<cell>", "exec"), CELL)
OfCell = CELL["OfCell"]


TOTAL = 0


class Global:
    def __init__(self):
        global TOTAL
        TOTAL = 0

    def add(self):
        global TOTAL
        TOTAL += 1

    def total(self):
        return TOTAL


class Entry:
    def __init__(self, make):
        self.it = make()

    def add(self):
        self.it[0] += 1

    def total(self):
        return self.it[0]


def entry(make):
    return Race(partial(Entry, make), [Entry.add] * 2, lambda shared: shared.it[0] == 2, True)


class Members:
    def __init__(self):
        self.it = set()

    def add(self):
        self.it.add(len(self.it))

    def total(self):
        return len(self.it)


class Ticket:
    def __init__(self):
        self.it, self.last = itertools.count(1), 0

    def add(self):
        self.last = next(self.it)

    def total(self):
        return self.last


class Array:
    def __init__(self):
        self.it = np.zeros(1)

    def total(self):
        return self.it[0]


class InPlace(Array):
    def add(self):
        self.it += 1


class IntoOut(Array):
    def add(self):
        np.add(self.it, 1, out=self.it)


class Copied(Array):
    def add(self):
        np.copyto(self.it, self.it + 1)


class Field:
    def __init__(self):
        self.it = np.zeros(1, [("n", float)])

    def add(self):
        self.it["n"] += 1

    def total(self):
        return self.it["n"][0]


class Locked(Attribute):
    def __init__(self):
        self.n, self.lock = 0, threading.Lock()

    def add(self):
        with self.lock:
            self.n += 1


class LockedArray(Array):
    def __init__(self):
        self.it, self.lock = np.zeros(1), threading.Lock()

    def add(self):
        with self.lock:
            self.it += 1


class Opposite:
    def __init__(self):
        self.a, self.b = threading.Lock(), threading.Lock()

    def ab(self):
        with self.a, self.b:
            pass

    def ba(self):
        with self.b, self.a:
            pass


class Announced:
    """The event is set before what it announces."""

    def __init__(self):
        self.ready, self.value, self.seen = threading.Event(), 0, 1

    def put(self):
        self.ready.set()
        self.value = 1

    def get(self):
        self.ready.wait()
        self.seen = self.value


class Queue:
    def __init__(self):
        self.it = queue.Queue()

    def put(self):
        self.it.put(1)

    def get(self):
        self.it.get()


class Spinning:
    def __init__(self):
        self.n = 0

    def put(self):
        self.n = 1

    def look(self):
        _ = self.n

    def spin(self):
        while not self.n:
            pass


class Cached:
    """A value of what has been written, kept until `invalidate`."""

    def __init__(self, variant):
        self.writes, self.announced, self.stale = [], [], False
        self.cache = variant(lambda: tuple(self.writes[:]))

    def read(self):
        known = self.announced[:]
        if set(known) - set(self.cache.get() or ()):
            self.stale = True

    def write_and_read(self):
        self.writes.append(1)
        self.cache.invalidate()
        self.announced.append(1)
        self.read()


def cached(variant, broken=False):
    bodies = [Cached.read, Cached.write_and_read]
    return Race(partial(Cached, variant), bodies, lambda shared: not shared.stale, broken)


def ends(_):
    return True


RACES = {
    "attribute": counted(Attribute),
    "slot": counted(Slots),
    "`__dict__`": counted(Names),
    "nested object": counted(Nested),
    "class attribute": counted(OfClass),
    "global name": counted(Global),
    "attribute, in a cell": counted(OfCell),
    "dict": entry(lambda: {0: 0}),
    "list": entry(lambda: [0]),
    "deque": entry(lambda: deque([0])),
    "set": counted(Members),
    "bytearray": entry(lambda: bytearray(1)),
    "iterator": counted(Ticket),
    "array, one entry": entry(lambda: np.zeros(1)),
    "array, in place": counted(InPlace),
    "array, `out=`": counted(IntoOut),
    "array, `copyto`": counted(Copied),
    "array, a field": counted(Field),
    "counter, locked": counted(Locked, broken=False),
    "array, locked": counted(LockedArray, broken=False),
    "opposite locks": Race(Opposite, [Opposite.ab, Opposite.ba], ends, True),
    "event, set too early": Race(
        Announced, [Announced.put, Announced.get], lambda shared: shared.seen == 1, True
    ),
    "queue": Race(Queue, [Queue.put, Queue.get], ends, False),
    "queue, nobody puts": Race(Queue, [Queue.get] * 2, ends, True),
    "spins until told": Race(Spinning, [Spinning.spin, Spinning.put], ends, False),
    "spins for ever": Race(Spinning, [Spinning.spin, Spinning.look], ends, True),
    "`PlainFlag`": cached(PlainFlag, broken=True),
    "`EarlyFlag`": cached(EarlyFlag, broken=True),
    "`LockedFlag`": cached(LockedFlag),
    "`VersionCounter`": cached(VersionCounter),
    "`PerThread`": cached(PerThread),
    "`DerivedValue`": cached(DerivedValue),
}


def with_ctxlab(race):
    """Verdict, and number of runs."""
    from ctxlab.interleave import Endless, Refused, explore

    def scenario(schedule):
        shared = schedule.share(race.make)

        def check():
            assert race.holds(shared)

        schedule.afterwards(check)
        return [partial(body, shared) for body in race.bodies]

    try:
        found = explore(scenario)
    except Refused:
        return "refused", 0
    except Endless:
        return "stopped", 1
    return verdict(race, bool(found.races)), found.runs


def with_frontrun(race):
    """The same, with every order asked for."""
    import frontrun

    begin = time.monotonic()
    result = frontrun.explore(
        setup=race.make,
        workers=list(race.bodies),
        invariant=race.holds,
        preemption_bound=None,  # default: two
        stop_on_first=False,
        reproduce_on_failure=0,
        timeout_per_run=2,
        deadlock_timeout=2,
        total_timeout=LIMIT,
        trace_packages=["ctxlab.*"],
    )
    if result.property_holds is None:
        return "stopped", result.num_explored
    told = verdict(race, not result.property_holds)
    if time.monotonic() - begin > LIMIT:  # how many runs depends on the machine
        return f"{told} by its time limit", 0
    return told, result.num_explored


def verdict(race, found):
    if found:
        return "found" if race.broken else "false alarm"
    return "passed unseen" if race.broken else "passed"


if __name__ == "__main__":
    explorer, name = sys.argv[1:]
    print(json.dumps({"ctxlab": with_ctxlab, "frontrun": with_frontrun}[explorer](RACES[name])))
