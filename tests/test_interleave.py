"""Every order of the steps: what is found is what a model without threads finds."""

import _thread
import collections
import concurrent.futures
import contextlib
import dataclasses
import enum
import functools
import itertools
import os
import queue
import threading
import time
import typing
import zlib
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from math import comb, factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlab.interleave import (
    Deadlock,
    Endless,
    Refused,
    _Explored,
    _Sharing,
    _Step,
    explore,
    replay,
)

TOO_MANY = 250  # orders; a program with more is not run in each of them


class Seen(Exception):
    """What a thread has observed."""


class Spot:
    def __init__(self, x=0, y=None):
        self.x, self.y = x, y


class Count:
    n = 0
    table: typing.ClassVar = {"n": 0}


class Slotted:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


class Locks(Spot):
    def __init__(self):
        super().__init__()
        self.d, self.s, self.deep, self.slots = {"p": 0}, set(), Spot(), Slotted()
        self.array = np.zeros(2)
        self.a, self.b, self.r = threading.Lock(), threading.Lock(), threading.RLock()


def errors(found):
    return set(map(told, found.races))


def told(race):
    if isinstance(race.error, Deadlock):  # its text tells the lines, too
        return "Deadlock"
    return f"{type(race.error).__name__}: {race.error}"


def both_ways(scenario):
    """Explore with memory, and hold the result against every order."""
    pruned, every = explore(scenario), explore(scenario, prune=False)
    assert errors(pruned) == errors(every)
    assert pruned.interleavings == every.interleavings == every.runs
    assert pruned.runs <= every.runs
    return pruned


def repeated(scenario, found, most=3):
    """The races of an exploration happen again, step by step."""
    for race in found.races[:most]:
        again = replay(scenario, race.path)
        assert (type(again.failure), str(again.failure)) == (type(race.error), str(race.error))
        assert (tuple(again.path), again.steps) == (race.path, race.steps)


def threads_left(before):
    """Threads that have not ended, once those that are about to have had the time."""
    deadline = time.monotonic() + 20
    while _thread._count() > before and time.monotonic() < deadline:
        time.sleep(0)
    return _thread._count() - before


def sharing(cls, *bodies, aside=()):
    """A scenario in which every body gets the same object; aside: notes of the test."""

    def scenario(schedule):
        schedule.aside(*aside)
        shared = schedule.share(cls)
        return [lambda body=body: body(shared) for body in bodies]

    return scenario


def stepping(n):
    """A body of n steps."""

    def body(spot):
        for _ in range(n):
            _ = spot.x

    return body


# How many orders there are


@pytest.mark.parametrize(
    "lengths",
    [(1,), (2, 2), (4, 1), (1, 1, 1), (2, 2, 1), (2, 1, 1, 1), (0, 2, 2), (2, 0), (0, 0), ()],
)
def test_the_orders_are_counted_as_a_multinomial(lengths):
    found = both_ways(sharing(Spot, *map(stepping, lengths)))
    orders = factorial(sum(lengths))
    for n in lengths:
        orders //= factorial(n)
    assert found.interleavings == orders
    assert found.races == []


def test_memory_needs_one_situation_for_each_pair_of_positions():
    found = explore(sharing(Spot, stepping(12), stepping(12)))
    assert found.interleavings == comb(24, 12)
    assert found.situations == 13 * 13 - 1


def test_situations_are_steps_of_the_scenario_and_no_others():
    def scenario(schedule):
        spot = schedule.share(Spot)
        spot.x += 5  # before the threads: no steps

        def body():
            assert hasattr(spot, "x")

        return [body]

    assert len(replay(scenario, ()).steps) == 1
    assert explore(scenario).interleavings == 1


# Lock and count, against a model that has no threads

NESTS = st.lists(st.sampled_from("abr"), max_size=3).map(tuple)
LOCKING = st.lists(
    st.lists(st.tuples(NESTS, st.booleans()), min_size=1, max_size=2), min_size=2, max_size=3
)


def locking(program):
    """Threads that add one under nested locks; the last of them tells the sum."""

    def scenario(schedule):
        spot = schedule.share(Locks)

        def body(parts):
            for nest, add in parts:
                with ExitStack() as stack:
                    for name in nest:
                        stack.enter_context(getattr(spot, name))
                    if add:
                        spot.x += 1

        def tell():
            raise Seen(spot.x)

        schedule.afterwards(tell)
        return [lambda parts=parts: body(parts) for parts in program]

    return scenario


def model(program):
    """The orders of `locking(program)` and what comes of them, by recursion."""
    todo = []
    for parts in program:
        steps = []
        for nest, add in parts:
            steps += [("take", name) for name in nest] + [("load",), ("store",)] * add
            steps += [("give", name) for name in reversed(nest)]
        todo.append(steps)
    outcomes = set()

    def go(at, x, local, held):
        orders = 0
        able = False
        for t, steps in enumerate(todo):
            if at[t] == len(steps):
                continue
            what, *name = steps[at[t]]
            x_, local_, held_ = x, local, held
            if what == "load":
                local_ = (*local[:t], x, *local[t + 1 :])
            elif what == "store":
                x_ = local[t] + 1
            else:
                owner, depth = held.get(name[0], (None, 0))
                if what == "take" and owner is not None and not (name[0] == "r" and owner == t):
                    continue
                depth += 1 if what == "take" else -1
                held_ = held | {name[0]: (t, depth) if depth else (None, 0)}
            able = True
            orders += go((*at[:t], at[t] + 1, *at[t + 1 :]), x_, local_, held_)
        if able:
            return orders
        done = all(a == len(steps) for a, steps in zip(at, todo, strict=True))
        outcomes.add(f"Seen: {x}" if done else "Deadlock")
        return 1

    none = (0,) * len(program)
    return go(none, 0, none, {}), outcomes


@pytest.mark.slow
@given(LOCKING)
@settings(max_examples=30)
def test_locks_and_counts_agree_with_a_model_without_threads(program):
    orders, outcomes = model([parts[:1] for parts in program])
    if orders > TOO_MANY:
        program, (orders, outcomes) = program[:2], model([parts[:1] for parts in program[:2]])
    scenario = locking([parts[:1] for parts in program])
    found = explore(scenario)
    assert found.interleavings == orders
    assert errors(found) == outcomes
    repeated(scenario, found)
    if orders <= TOO_MANY:
        both_ways(scenario)


@pytest.mark.parametrize(
    "program",
    [
        [[("", True), ("", True)], [("", True), ("", True)]],
        [[("a", True), ("ab", True)], [("ba", True)]],
        [[("r", True), ("rr", True)], [("ra", True), ("", True)]],
        [[("", True)], [("a", True)], [("a", True)]],
        [[("ab", True)], [("b", True)], [("ra", False)]],
        [[("ab", False)], [("br", False)], [("ra", False)]],
    ],
)
def test_memory_agrees_with_the_model_where_all_orders_are_too_many(program):
    orders, outcomes = model(program)
    found = explore(locking(program))
    assert found.interleavings == orders
    assert errors(found) == outcomes


# Random programs over everything that can be shared

FIELDS = st.sampled_from("xy")
SIMPLE = st.one_of(
    st.tuples(st.sampled_from(["load", "add", "token", "fresh", "push", "len", "first"]), FIELDS),
    st.tuples(st.just("put"), FIELDS, st.sampled_from([0, 1, 2.5, "a", None, (1, None)])),
    st.tuples(st.just("move"), FIELDS),
    st.tuples(st.sampled_from(["log", "look", "count", "fail", "total", "whole", "walk", "take"])),
    st.tuples(st.sampled_from(["key", "drop", "member", "entry"]), st.sampled_from("pq")),
    st.tuples(st.sampled_from(["deep", "slot"])),
)
NESTED = st.one_of(
    SIMPLE,
    SIMPLE,
    st.tuples(st.just("with"), st.sampled_from("abr"), SIMPLE),
    st.tuples(st.just("if"), FIELDS, SIMPLE),
    st.tuples(st.just("caught"), st.sampled_from("ab"), SIMPLE),
)
PROGRAMS = st.one_of(
    st.tuples(st.lists(NESTED, max_size=3), st.lists(NESTED, max_size=2)),
    st.tuples(
        st.lists(NESTED, max_size=1), st.lists(NESTED, max_size=1), st.lists(SIMPLE, max_size=2)
    ),
)


class Observer:
    """What one thread has seen, in a form that is the same in every run."""

    def __init__(self):
        self.seen, self.things = [], []

    def note(self, value):
        if isinstance(value, list):  # never its length: that would be a step
            value = "list", self.number(value)
        elif type(value) is object:
            value = "token", self.number(value)
        self.seen.append(value)

    def number(self, thing):
        for i, other in enumerate(self.things):
            if other is thing:
                return i
        self.things.append(thing)
        return len(self.things) - 1

    def tell(self):
        """Fail, for about every third observation."""
        if zlib.crc32(repr(self.seen).encode()) % 3 == 0:
            raise Seen(repr(self.seen))


def perform(op, spot, log, observer):
    what, *rest = op
    if what == "load":
        observer.note(getattr(spot, rest[0]))
    elif what == "put":
        setattr(spot, *rest)
    elif what == "add":
        value = getattr(spot, rest[0])
        setattr(spot, rest[0], value + 1 if isinstance(value, int) else 1)
    elif what == "move":  # an object comes to lie in two places
        setattr(spot, "y" if rest[0] == "x" else "x", getattr(spot, rest[0]))
    elif what == "token":
        setattr(spot, rest[0], object())
    elif what == "fresh":
        setattr(spot, rest[0], [])
    elif what in ("push", "len", "first"):
        value = getattr(spot, rest[0])
        if isinstance(value, list):
            if what == "push":
                value.append(len(observer.seen))
            else:
                observer.note(len(value) if what == "len" else tuple(value[:1]))
    elif what == "log":
        log.append(len(observer.seen))
    elif what == "look":
        observer.note(tuple(log))
    elif what == "count":
        observer.note(len(log))
    elif what == "total":
        observer.note(float(spot.array.sum()))
    elif what == "whole":
        spot.array += 1
    elif what == "entry":
        spot.array["pq".index(rest[0])] += 1
    elif what == "walk":
        observer.note([*spot.d])
    elif what == "take":
        try:
            observer.note(log.pop())
        except IndexError:
            observer.note("nothing to take")
    elif what == "key":
        spot.d[rest[0]] = spot.d.get(rest[0], 0) + 1
    elif what == "drop":
        try:
            del spot.d[rest[0]]
        except KeyError:
            observer.note("nothing to drop")
    elif what == "member":
        spot.s ^= {rest[0]}
    elif what == "deep":
        spot.deep.x += 1
    elif what == "slot":
        spot.slots.n += 1
    elif what == "fail":
        raise Seen(f"in the middle: {observer.seen}")
    elif what == "if":
        if getattr(spot, rest[0]):
            perform(rest[1], spot, log, observer)
    elif what == "with":
        with getattr(spot, rest[0]):
            perform(rest[1], spot, log, observer)
    elif what == "caught":
        try:
            with getattr(spot, rest[0]):
                perform(rest[1], spot, log, observer)
        except Seen:
            observer.note("caught")


def running(program, settled):
    """Threads that do what the program says; `settled`: each forgets what it saw."""

    def scenario(schedule):
        spot, log = schedule.share(Locks), schedule.share(list, name="log")

        def body(ops):
            observer = Observer()
            for i, op in enumerate(ops):
                if settled:
                    observer = Observer()
                    schedule.settle(i)
                perform(op, spot, log, observer)
                if settled:
                    observer.tell()
            if not settled:
                observer.tell()

        def outcome():
            kept = dict(spot.d), sorted(spot.s), spot.deep.x, spot.slots.n, spot.array.tolist()
            raise Seen(f"{kept} {len(log)}")

        if not settled:
            schedule.afterwards(outcome)
        return [lambda ops=ops: body(ops) for ops in program]

    return scenario


@pytest.mark.slow
@pytest.mark.parametrize("settled", [False, True], ids=["remembering", "settled"])
@given(program=PROGRAMS)
@settings(max_examples=40)
def test_memory_hides_nothing(settled, program):
    scenario = running(program, settled)
    found = explore(scenario)
    repeated(scenario, found)
    if found.interleavings <= TOO_MANY:
        both_ways(scenario)


@given(PROGRAMS)
@settings(max_examples=20)
def test_settling_changes_neither_orders_nor_races_where_threads_forget(program):
    """The same bodies, with `settle` switched off: only the number of runs may differ."""
    told = running(program, settled=True)

    def untold(schedule):
        schedule.settle = lambda at: None
        return told(schedule)

    with_it, without = explore(told), explore(untold)
    assert errors(with_it) == errors(without)
    assert with_it.interleavings == without.interleavings
    assert with_it.runs <= without.runs


@given(PROGRAMS)
@settings(max_examples=8)
def test_exploring_is_repeatable(program):
    one, other = (explore(running(program, settled=True)) for _ in range(2))
    # Two errors are never equal, so races are compared by what they say.
    assert replace(one, races=[]) == replace(other, races=[])
    assert list(map(repr, one.races)) == list(map(repr, other.races))


# Threads that end in unusual ways


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_body_that_raises_fails_every_run(steps, error):
    def failing(spot):
        stepping(steps)(spot)
        raise error("on purpose")

    found = explore(sharing(Spot, failing, stepping(2)), prune=False)
    assert len(found.races) == found.runs == found.interleavings
    assert {type(race.error) for race in found.races} == {error}
    repeated(sharing(Spot, failing, stepping(2)), found)
    assert errors(explore(sharing(Spot, failing, stepping(2)))) == errors(found)


def test_a_run_that_fails_stops_the_others():
    after = []

    def failing(spot):
        _ = spot.x
        raise Seen("first")

    def other(spot):
        _ = spot.x
        after.append(spot.x)

    run = replay(sharing(Spot, failing, other, aside=[after]), (0,))
    assert str(run.failure) == "first"
    assert run.path == [0]
    assert after == []


def test_threads_without_a_step_are_no_part_of_any_order():
    ran = []
    found = both_ways(
        sharing(
            Spot,
            lambda spot: ran.append(1),
            stepping(2),
            lambda spot: ran.append(1),
            stepping(2),
            aside=[ran],
        )
    )
    assert found.interleavings == 6
    assert len(ran) >= 12


def test_an_error_within_a_lock_gives_it_back():
    def failing(spot):
        try:
            with spot.a:
                spot.x = 1
                raise Seen("within")
        except Seen:
            spot.y = "after"

    def other(spot):
        with spot.a:
            assert spot.x in (0, 1)

    assert both_ways(sharing(Locks, failing, other)).races == []


# Locks


def test_a_lock_taken_twice_waits_for_itself():
    def twice(spot):
        with spot.a, spot.a:
            pass

    found = both_ways(sharing(Locks, twice))
    assert [type(race.error) for race in found.races] == [Deadlock]


def test_a_reentrant_lock_is_held_until_it_is_given_back_as_often():
    inside = []

    def nested(spot):
        with spot.r, spot.r:
            with spot.r:
                inside.append(1)
                spot.x += 1
            spot.x += 1
            inside.pop()

    def other(spot):
        with spot.r:
            assert not inside
            assert spot.x in (0, 2)

    assert both_ways(sharing(Locks, nested, other, aside=[inside])).races == []


@pytest.mark.parametrize(
    ("orders", "expected"), [(("ab", "ab", "ab"), False), (("ab", "ab", "ba"), True)]
)
def test_three_threads_and_two_locks(orders, expected):
    def body(order):
        def run(spot):
            with getattr(spot, order[0]), getattr(spot, order[1]):
                pass

        return run

    found = explore(sharing(Locks, *map(body, orders)))
    assert bool(found.races) == expected
    assert {type(race.error) for race in found.races} <= {Deadlock}
    repeated(sharing(Locks, *map(body, orders)), found)


def test_three_in_a_circle_wait_for_each_other_only_together():
    class Table(Spot):
        def __init__(self):
            self.f0, self.f1, self.f2 = threading.Lock(), threading.Lock(), threading.Lock()

    def eats(i):
        def run(table):
            with getattr(table, f"f{i}"), getattr(table, f"f{(i + 1) % 3}"):
                pass

        return run

    found = both_ways(sharing(Table, *map(eats, range(3))))
    assert {len(race.path) for race in found.races} == {3}  # each holds one
    assert {type(race.error) for race in found.races} == {Deadlock}
    assert len(explore(sharing(Table, *map(eats, range(2)))).races) == 0


# What is reported


def test_the_shortest_race_has_the_fewest_switches():
    def add(spot):
        spot.x += 1

    def scenario(schedule):
        spot = schedule.share(Spot)

        def both():
            if spot.x != 2:
                raise Seen("lost")

        schedule.afterwards(both)
        return [lambda: add(spot)] * 2

    found = explore(scenario, prune=False)
    assert len(found.races) == 4
    assert found.shortest.switches == min(race.switches for race in found.races) == 2
    assert found.shortest.switches == sum(
        a != b for a, b in itertools.pairwise(found.shortest.path)
    )
    assert [step.thread for step in found.shortest.steps] == list(found.shortest.path)
    repeated(scenario, found, most=4)


def test_a_step_says_who_did_what_where():
    assert str(_Step(0, "Spot.x", "load", "1")) == "A load Spot.x 1"
    assert str(_Step(1, "a", "acquire", "")) == "B acquire a"

    def scenario(schedule):
        spot, log = schedule.share(Locks), schedule.share(list, name="log")

        def body():
            with spot.a:
                spot.y = 1, None
                spot.x = []
                spot.y = object()
                log.append("what")
                _ = log[:]

        return [body]

    assert [str(step)[2:] for step in replay(scenario, ()).steps] == [
        "acquire Locks.a",
        "store Locks.y (1, None)",
        "store Locks.x [0]",
        "store Locks.y object",
        "append log 'what'",
        "load log [1]",
        "release Locks.a",
    ]


@pytest.mark.parametrize("prune", [True, False])
def test_most_is_just_enough_or_says_so(prune):
    scenario = sharing(Spot, stepping(3), stepping(3))
    runs = explore(scenario, prune=prune).runs
    assert explore(scenario, prune=prune, most=runs).runs == runs
    with pytest.raises(RuntimeError, match=f"most: {runs - 1} runs"):
        explore(scenario, prune=prune, most=runs - 1)


def test_a_race_tells_the_lines_that_made_it():
    race = explore(counting(Slots)).shortest
    first = Slots.add.__code__.co_firstlineno + 1
    assert [step.line for step in race.steps] == [f"test_interleave.py:{first}"] * 4
    assert {step.source for step in race.steps} == {"self.n += 1"}
    lines = str(race).splitlines()
    assert len(lines) == 5
    assert all(f"test_interleave.py:{first}  self.n += 1" in line for line in lines[:4])
    assert lines[4] == "Seen: lost"


def test_the_line_of_a_step_is_that_of_the_code_under_test():
    """Not of NumPy or of Python, which it calls."""

    def body(spot):
        spot.array += 1
        functools.reduce(lambda _, x: spot.d.get(x), "pp")

    first = body.__code__.co_firstlineno
    run = replay(sharing(Locks, body), ())
    lines = [int(step.line.partition(":")[2]) - first for step in run.steps]
    assert lines == sorted(lines)
    assert set(lines) == {1, 2}


def test_a_cell_of_a_notebook_has_no_changing_name():
    cells = ["<ipython-input-3-0a1b>", "/tmp/ipykernel_77/123.py"]
    assert [_Step(0, "x", "load", "1", (cell, 7)).line for cell in cells] == ["cell:7"] * 2
    assert _Step(0, "x", "load", "1").line == _Step(0, "x", "load", "1").source == ""


def test_a_deadlock_names_who_waits_and_where():
    def one(spot):
        with spot.a, spot.b:
            pass

    def other(spot):
        with spot.b, spot.a:
            pass

    found = explore(sharing(Locks, one, other))
    lines = [body.__code__.co_firstlineno + 1 for body in (one, other)]
    assert {str(race.error) for race in found.races} == {
        f"every thread waits: A acquire Locks.b (test_interleave.py:{lines[0]}); "
        f"B acquire Locks.a (test_interleave.py:{lines[1]})"
    }


# Fewer orders than all


def bounded(lengths, most):
    """Orders of threads that never wait with at most so many preemptions, by recursion."""

    def go(left, last, most):
        if not any(left):
            return 1
        ways = 0
        for t, n in enumerate(left):
            price = last is not None and t != last and left[last] > 0
            if n and price <= most:
                ways += go((*left[:t], n - 1, *left[t + 1 :]), t, most - price)
        return ways

    return go(lengths, None, most)


@pytest.mark.parametrize("most", range(6))
@pytest.mark.parametrize("lengths", [(2, 2), (3, 2), (1, 1, 1), (2, 2, 1), (4, 3)])
def test_orders_with_few_preemptions_are_counted_by_a_model(lengths, most):
    scenario = sharing(Spot, *map(stepping, lengths))
    pruned = explore(scenario, preemptions=most)
    every = explore(scenario, preemptions=most, prune=False)
    assert pruned.interleavings == every.interleavings == every.runs == bounded(lengths, most)
    assert pruned.runs <= every.runs


def within(scenario, most):
    """The errors of the orders with few preemptions, taken from all orders."""
    outcomes = set()
    for race in explore(scenario, prune=False).races:
        run = replay(scenario, race.path)
        if run.preemptions <= most:
            outcomes.add(told(race))
    return outcomes


@pytest.mark.slow
@given(program=PROGRAMS, most=st.integers(0, 2))
@settings(max_examples=30)
def test_a_bound_hides_nothing_within_it(program, most):
    """Memory beside a bound: the same errors, and as many orders, as without memory."""
    scenario = running(program, settled=True)
    if explore(scenario).interleavings > TOO_MANY:
        return
    pruned = explore(scenario, preemptions=most)
    every = explore(scenario, preemptions=most, prune=False)
    assert errors(pruned) == errors(every) == within(scenario, most)
    assert pruned.interleavings == every.interleavings == every.runs
    repeated(scenario, pruned)


def test_without_a_preemption_no_update_is_lost():
    assert explore(counting(Slots), preemptions=0).races == []
    assert errors(explore(counting(Slots), preemptions=1)) == {"Seen: lost"}


@pytest.mark.slow
@given(LOCKING)
@settings(max_examples=15)
def test_a_bound_that_no_order_reaches_changes_nothing(program):
    scenario = locking([parts[:1] for parts in program[:2]])
    bounded_, every = explore(scenario, preemptions=1000), explore(scenario)
    assert errors(bounded_) == errors(every)
    assert bounded_.interleavings == every.interleavings


@pytest.mark.parametrize("program", [[[("", True)]] * 2, [[("ab", True)], [("ba", True)]]])
def test_random_orders_are_some_of_all(program):
    scenario = locking(program)
    every, some = explore(scenario, prune=False), explore(scenario, random=40)
    assert some.runs == 40
    assert some.interleavings <= every.interleavings
    assert errors(some) == errors(every)
    repeated(scenario, some)


def test_random_orders_are_those_of_the_seed():
    scenario = locking([[("a", True), ("", True)], [("", True), ("a", True)]])
    one, again, other = (explore(scenario, random=10, seed=seed) for seed in (1, 1, 2))
    paths = [[race.path for race in found.races] for found in (one, again, other)]
    assert paths[0] == paths[1] != paths[2]


def test_random_priorities_change_as_often_as_said():
    """Without a change, a thread goes on until it ends."""
    scenario = sharing(Spot, stepping(9), stepping(9))
    assert explore(scenario, random=50, preemptions=0).interleavings == 2
    assert 2 < explore(scenario, random=50, preemptions=1).interleavings <= 2 + 2 * 8


def deep(spot):
    for i in range(60):
        spot.x = i


@pytest.mark.slow
def test_a_race_deep_in_long_threads_is_found():
    """Every order would be out of reach."""

    def other(spot):
        if spot.x == 40 and spot.x == 41:
            raise Seen("in the middle")

    def once(spot):
        if spot.x == 40:
            raise Seen("in the middle")

    found = explore(sharing(Spot, deep, other), preemptions=3)
    assert errors(found) == {"Seen: in the middle"}
    assert found.runs < 10_000
    assert errors(explore(sharing(Spot, deep, once), random=1000)) == {"Seen: in the middle"}


def test_a_random_run_finds_a_race_as_often_as_promised():
    """A lost update needs two constraints: 1 / (n k) for two threads of k steps in all."""

    def scenario(schedule):
        counter, spot = schedule.share(Slots), schedule.share(Spot)

        def body():
            stepping(8)(spot)
            counter.add()

        def both():
            if counter.n != 2:
                raise Seen("lost")

        schedule.afterwards(both)
        return [body, body]

    found = explore(scenario, random=400, preemptions=1)
    assert len(found.races) >= 400 / (2 * 20)


@pytest.mark.parametrize("name", ["preemptions", "random"])
@pytest.mark.parametrize("value", [-1, 1.5, "two"])
def test_what_limits_the_orders_must_be_a_number(name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        explore(sharing(Spot, stepping(1)), **{name: value})


# Nothing is left behind


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="cores can be chosen on Linux only"
)
@pytest.mark.parametrize("end", ["well", "races", "most", "scenario raises"])
def test_the_cores_come_back(end):
    before, during = os.sched_getaffinity(0), []

    def scenario(schedule):
        schedule.aside(during)
        during.append(os.sched_getaffinity(0))
        if end == "scenario raises":
            raise Seen("scenario")
        spot = schedule.share(Spot)

        def body():
            during.append(os.sched_getaffinity(0))
            _ = spot.x
            if end == "races":
                raise Seen("body")

        return [body, body]

    try:
        explore(scenario, most=1 if end == "most" else 100)
    except (RuntimeError, Seen):
        assert end in ("most", "scenario raises")
    assert os.sched_getaffinity(0) == before
    assert {len(cores) for cores in during} == {1}


@pytest.mark.parametrize("prune", [True, False])
def test_no_thread_is_left_behind(prune):
    before = _thread._count()

    def deadlocking(spot):
        with spot.a, spot.b:
            pass

    def other(spot):
        with spot.b, spot.a:
            spot.x = 1

    def failing(spot):
        with spot.r:
            raise Seen("here")

    explore(sharing(Locks, deadlocking, other, lambda spot: None), prune=prune)
    explore(sharing(Locks, deadlocking, failing, stepping(1)), prune=prune)
    explore(sharing(Spot, stepping(3), stepping(3)), prune=prune)
    assert threads_left(before) == 0


def test_a_schedule_that_is_over_lets_everybody_act():
    run = replay(sharing(Spot, stepping(2)), ())
    spot = run.share(Spot, 7)
    assert spot.x == 7
    assert len(run.steps) == 2
    run.settle("anything")


def test_exploring_within_threads_does_not_mix():
    found, scenario = [], sharing(Spot, stepping(3), stepping(2))
    threads = [
        threading.Thread(target=lambda: found.append(explore(scenario, prune=False)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [_Explored(10, found[0].situations, 10, [])] * 3


def test_a_list_is_stored_and_loaded_in_one_step():
    def store(spot):
        spot.x = []

    def load(spot):
        _ = spot.x
        _ = spot.x

    assert len(replay(sharing(Spot, store), ()).steps) == 1
    assert both_ways(sharing(Spot, store, load)).interleavings == 3


# Where memory took different things for the same


def test_true_and_one_are_not_the_same():
    for one, other in [(True, 1), (0.0, -0.0), (0, False), (1, 1.0)]:

        def scenario(schedule, one=one, other=other):
            spot, log = schedule.share(Spot), schedule.share(list)

            def put(value):
                spot.x = value
                log.append(0)

            def look():
                if len(log) == 2:
                    raise Seen(repr(spot.x))

            return [lambda: put(one), lambda: put(other), look]

        assert len(both_ways(scenario).races) >= 2


class Point(typing.NamedTuple):
    n: int


@dataclasses.dataclass(frozen=True)
class Frozen:
    n: int


class Box:
    def __init__(self, n):
        self.n = n

    def __eq__(self, other):
        return self.n == other.n

    __hash__ = None


TOKENS = {1: object(), 2: object()}


def returning(n):
    return lambda: n


MAKES = {
    "list": lambda n: [n],
    "dict": lambda n: {0: n},
    "set": lambda n: {n},
    "bytes": lambda n: bytes([n]),
    "frozenset": lambda n: frozenset({n}),
    "complex": complex,
    "fraction": Fraction,
    "named tuple": Point,
    "frozen dataclass": Frozen,
    "object": Box,
    "tuple of objects": lambda n: (Box(n),),
    "error": lambda n: ValueError(n).args,
    "token": lambda n: TOKENS[n],
    "array": lambda n: tuple(np.full(1, n)),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))
def test_what_a_value_is_made_of_counts(make):
    """A thread that has settled left something whose contents depend on what it had seen."""

    def scenario(schedule):
        flag, spot = schedule.share(Spot, None), schedule.share(Spot, None)

        def one():
            spot.x = make(1 if flag.x is None else 2)
            schedule.settle(1)
            value = spot.x
            if value == make(2):
                raise Seen("two")

        def other():
            flag.x = 1
            schedule.settle(0)
            flag.x = 1

        return [one, other]

    assert errors(both_ways(scenario)) == {"Seen: two"}


def test_what_a_function_has_captured_counts():
    def scenario(schedule):
        flag, calls = schedule.share(Spot, None), schedule.share(list, name="calls")

        def one():
            calls.append(returning(1 if flag.x is None else 2))
            schedule.settle(1)
            if calls[0]() == 2:
                raise Seen("two")

        def other():
            flag.x = 1
            schedule.settle(0)
            flag.x = 1

        return [one, other]

    assert errors(both_ways(scenario)) == {"Seen: two"}


def test_how_often_a_lock_is_held_counts():
    def scenario(schedule):
        spot = schedule.share(Locks)

        def one():
            spot.r.acquire()
            if spot.x:
                spot.r.acquire()
            schedule.settle(1)
            spot.r.release()

        def other():
            spot.x = 1
            with spot.r:
                pass

        return [one, other]

    assert errors(both_ways(scenario)) == {"Deadlock"}


def test_the_number_of_a_thread_stands_for_its_identity():
    run = _Sharing()
    run._idents[12345] = 1
    assert run._label(12345) == ("thread", 1)


def test_each_access_to_the_contents_of_an_array_is_a_step():
    def scenario(schedule):
        array = np.zeros((2, 2))

        def body():
            array[0, 1] += 1
            row = array[1]
            row += 1
            np.sqrt(array, out=array)
            _ = array.T.sum(), array.shape, np.asarray(array), np.concatenate([array, array])

        return [body]

    seen = [str(step).split()[1] for step in replay(scenario, ()).steps]
    assert seen == ["load", "store"] * 3 + ["load"] * 4


def test_what_would_write_past_the_steps_of_an_array_fails():
    def body(spot):
        np.asarray(spot.array)[0] = 1

    assert errors(explore(sharing(Locks, body))) == {
        "ValueError: assignment destination is read-only"
    }


def test_a_change_through_a_hidden_name_is_refused():
    def body(spot):
        hidden = ([],)
        spot.x = hidden[0]
        hidden[0].append(1)

    with pytest.raises(Refused, match=r"Spot\.x: a list was changed without a step"):
        explore(sharing(Spot, body))


def test_what_a_thread_keeps_for_itself_counts():
    """Thread-local data outlives `settle`."""

    class Own(Spot):
        def __init__(self):
            super().__init__()
            self.mine = threading.local()

    def scenario(schedule):
        spot = schedule.share(Own)

        def one():
            spot.mine.x = spot.x
            schedule.settle(1)
            if spot.x == spot.mine.x == 1:
                raise Seen("late")

        def other():
            spot.x = 1

        return [one, other]

    assert errors(both_ways(scenario)) == {"Seen: late"}


# Where a run went astray


def test_an_abandoned_run_has_no_races():
    """What threads raise while a run is given up has not happened in any order."""

    def body(spot):
        complete = False
        try:
            _ = spot.x
            spot.x = 1
            complete = True
        finally:
            if not complete:
                raise Seen("stopped half-way")

    assert both_ways(sharing(Spot, body, body)).races == []


@pytest.mark.slow
def test_long_threads_are_counted_as_well():
    assert explore(sharing(Spot, stepping(700))).interleavings == 1


def test_a_thread_without_a_step_never_chooses():
    """Its end may come as late as the system likes."""
    run, late, choosers = _Sharing(), [], []
    release, choose = run._done.release, run._next

    class Done:
        acquire = run._done.acquire

        def release(self):
            release()
            if threading.get_ident() in late:
                late.clear()
                while not run.path:
                    time.sleep(0)

    def chosen_by(me):
        choosers.append(threading.get_ident())
        return choose(me) if choosers[-1] != idents[0] else None

    idents = []

    def none(spot):
        idents.append(threading.get_ident())
        late.append(threading.get_ident())

    def one(spot):
        _ = spot.x
        while run._ended[0].locked():
            time.sleep(0)

    run._done, run._next = Done(), chosen_by
    run.run(sharing(Spot, none, one, aside=[idents, late, run])(run))
    assert run.path == [1]
    assert idents[0] not in choosers


def test_what_is_settled_may_be_a_list():
    before, runs = _thread._count(), []

    def scenario(schedule):
        runs.append(schedule)
        spot = schedule.share(Spot)

        def body():
            schedule.settle(["what is left"])
            _ = spot.x

        return [body, body]

    try:
        assert explore(scenario).interleavings == 2
        assert threads_left(before) == 0
    finally:  # let go who still waits
        for run in runs:
            run._over = True
            for turn in run._turn:
                if turn.locked():
                    turn.release()


def test_a_path_that_cannot_be_taken_is_refused():
    def body(spot):
        with spot.a:
            spot.x += 1

    with pytest.raises(ValueError, match="path"):
        replay(sharing(Locks, body, body), (0, 1))  # the lock is held by thread 0


def test_a_path_through_a_thread_that_has_ended_is_refused():
    with pytest.raises(ValueError, match="path"):
        replay(sharing(Spot, stepping(1), stepping(2)), (0, 0))


def test_many_threads_have_names():
    assert len({str(_Step(i, "Spot.x", "load", "1")) for i in range(30)}) == 30


# What is shared must behave as what it stands for


def test_a_property_stays_one():
    class Doubling:
        def __init__(self):
            self._value = 0

        @property
        def value(self):
            return self._value

        @value.setter
        def value(self, x):
            self._value = 2 * x

    def body(doubling):
        doubling.value = 3
        assert doubling.value == 6

    assert explore(sharing(Doubling, body)).races == []


def test_a_default_of_the_class_is_loaded_in_a_step():
    class Default:
        n = 0

    def scenario(schedule):
        shared = schedule.share(Default)

        def body():
            shared.n += 1

        def both():
            assert shared.n == 2

        schedule.afterwards(both)
        return [body, body]

    found = explore(scenario)
    assert found.interleavings > 2
    assert len(found.races) < found.runs  # one after the other is right


def test_functions_that_are_replaced_are_refused():
    def look(spot):
        if spot.y is None and spot.y is not None:
            raise Seen("changed")

    def put(spot):
        spot.x = 1
        spot.y = len

    def back(spot):
        spot.y = len
        if spot.y is not len:
            raise Seen("taken back")

    def take(spot):
        spot.y = None

    for bodies in ((look, put), (back, take)):
        with pytest.raises(Refused, match=r"Spot\.y: a thread stores a function"):
            explore(sharing(Spot, *bodies))


def test_deleting_is_a_step():
    def look(spot):
        if hasattr(spot, "x"):
            _ = spot.x

    def delete(spot):
        del spot.x

    assert errors(explore(sharing(Spot, look, delete)))


OPERATIONS = {
    "pop": lambda c: c.pop(),
    "extend": lambda c: c.extend([1]),
    "clear": lambda c: c.clear(),
    "insert": lambda c: c.insert(0, 1),
    "remove": lambda c: c.remove(1),
    "set": lambda c: c.__setitem__(0, 5),
    "delete": lambda c: c.__delitem__(0),
    "sort": lambda c: c.sort(),
    "reverse": lambda c: c.reverse(),
    "in": lambda c: 1 in c,
    "count": lambda c: c.count(1),
    "copy": lambda c: c.copy(),
    "add": lambda c: c.__add__([2]),
    "equal": lambda c: c == [1],
    "unequal": lambda c: c != [1],
    "less": lambda c: c < [1],
    "greater, from the other side": lambda c: [1] < c,
    "at least": lambda c: c >= [1],
    "at most": lambda c: c <= [1],
    "reversed": lambda c: [*reversed(c)],
    "times": lambda c: c * 2,
    "times, from the other side": lambda c: 2 * c,
    "repeat in place": lambda c: c.__imul__(2),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_operation_of_a_list_passes_unseen(name):
    """It is a step, or it is refused."""

    def scenario(schedule):
        cell = schedule.share(list, [1])
        return [lambda: OPERATIONS[name](cell)]

    run = replay(scenario, ())
    assert run.steps or isinstance(run.failure, TypeError)


@pytest.mark.parametrize("name", ["a", "r"])
def test_giving_back_a_lock_that_is_not_held_fails(name):
    assert errors(explore(sharing(Locks, lambda spot: getattr(spot, name).release())))


def test_giving_back_the_reentrant_lock_of_another_fails():
    assert errors(
        explore(sharing(Locks, lambda spot: spot.r.acquire(), lambda spot: spot.r.release()))
    )


WAITING = {
    "event": threading.Event,
    "condition": threading.Condition,
    "semaphore": threading.Semaphore,
    "barrier": lambda: threading.Barrier(2),
    "queue": queue.Queue,
    "simple queue": queue.SimpleQueue,
    "thread": threading.Thread,
    "future": concurrent.futures.Future,
    "event in a list": lambda: [threading.Event()],
    "event in a tuple": lambda: (threading.Event(),),
    "event in a dict": lambda: {"event": threading.Event()},
}


@pytest.mark.parametrize("name", WAITING)
def test_what_would_wait_outside_of_the_schedule_is_refused(name):
    class Waiting:
        def __init__(self):
            self.it = WAITING[name]()

    with pytest.raises(Refused, match=r"Waiting\.it: a \w+"):
        explore(sharing(Waiting, lambda waiting: None))


@pytest.mark.parametrize("most", [-1, 2.5, "many"])
def test_most_must_be_a_positive_number(most):
    with pytest.raises((ValueError, TypeError), match="most"):
        explore(sharing(Spot, stepping(1), stepping(1)), most=most)


def test_without_races_there_is_no_shortest():
    with pytest.raises(ValueError, match="race"):
        _ = explore(sharing(Spot, stepping(1))).shortest


# Every kind of shared state is seen, or refused by name


class Slots:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0

    def add(self):
        self.n += 1

    def total(self):
        return self.n


class Inner:
    def __init__(self):
        self.n = 0


class Holding:
    """Counts in what it holds."""

    make = None

    def __init__(self):
        self.it = type(self).make()

    def total(self):
        return self.it[0]

    def add(self):
        self.it[0] += 1


class Dict(Holding):
    make = staticmethod(lambda: {0: 0})


class List(Holding):
    make = staticmethod(lambda: [0])


class Deque(Holding):
    make = staticmethod(lambda: collections.deque([0]))


class Default(Holding):
    make = staticmethod(lambda: collections.defaultdict(int))


class Array(Holding):
    make = staticmethod(lambda: np.zeros(2))


class WholeArray(Array):
    def add(self):
        self.it += 1


class ArrayView(Array):
    def add(self):
        view = self.it[:1].reshape(1, 1)
        np.add(view, 1, out=view)


class ArrayRead(Array):
    def add(self):
        self.it[:] = np.asarray(self.it) + 1


class Deep(Holding):
    make = staticmethod(lambda: {"a": ([{"n": 0}],)})

    def add(self):
        self.it["a"][0][0]["n"] += 1

    def total(self):
        return self.it["a"][0][0]["n"]


class Nested(Holding):
    make = Inner

    def add(self):
        self.it.n += 1

    def total(self):
        return self.it.n


class Names:
    def __init__(self):
        self.n = 0

    def total(self):
        return self.n

    def add(self):
        self.__dict__["n"] = vars(self)["n"] + 1


class Unique(Holding):
    make = staticmethod(set)

    def add(self):
        if len(self.it) < 1:
            self.it.add("first")
        elif "second" not in self.it:
            self.it.add("second")

    def total(self):
        return len(self.it)


class Made(Holding):
    """Its threads make what they share."""

    make = staticmethod(lambda: None)

    def add(self):
        new = Inner()
        new.n = 1 if self.it is None else self.it.n + 1
        self.it = new

    def total(self):
        return self.it.n


SEEN = [
    *(Slots, Dict, List, Deque, Default, Array, WholeArray, ArrayView, ArrayRead, Deep, Nested),
    *(Names, Unique, Made),
]


def counting(cls):
    def scenario(schedule):
        counter = schedule.share(cls)

        def both():
            if counter.total() != 2:
                raise Seen("lost")

        schedule.afterwards(both)
        return [counter.add, counter.add]

    return scenario


@pytest.mark.parametrize("cls", SEEN, ids=lambda cls: cls.__name__)
def test_a_lost_update_is_found_wherever_it_lies(cls):
    found = both_ways(counting(cls))
    assert errors(found) == {"Seen: lost"}
    assert len(found.races) < found.runs  # one after the other is right
    repeated(counting(cls), found)


def test_a_list_dict_or_array_that_bodies_capture_is_seen():
    def captured(make):
        def scenario(schedule):
            counter = make()

            def body():
                counter[0] += 1

            def both():
                if counter[0] != 2:
                    raise Seen("lost")

            schedule.afterwards(both)
            return [body, body]

        return scenario

    for make in (lambda: [0], lambda: {0: 0}, lambda: np.zeros(1)):
        assert errors(both_ways(captured(make))) == {"Seen: lost"}


def test_objects_locks_defaults_and_partials_that_bodies_capture_are_seen():
    def scenario(schedule):
        inner, lock, notes = Inner(), threading.Lock(), []

        def body(me, guard=lock, notes=notes):
            with guard:
                inner.n += 1
            notes.append(me)

        def both():
            assert inner.n == 2
            raise Seen(str(notes))

        schedule.afterwards(both)
        return [functools.partial(body, 0), functools.partial(body, 1)]

    assert errors(both_ways(scenario)) == {"Seen: [0, 1]", "Seen: [1, 0]"}


TOTAL, TABLE, PLACE, GLOBAL_LOCK = 0, {"n": 0}, Inner(), threading.Lock()


class Tally:
    n = 0
    table: typing.ClassVar = {"n": 0}
    lock = threading.Lock()


def rebinding(schedule):
    n = 0

    def body():
        nonlocal n
        n += 1

    return [body, body]


def stores_global():
    global TOTAL
    TOTAL += 1


def adds_to(place, name):
    setattr(place, name, getattr(place, name) + 1)


def adds_to_item(table):
    table["n"] += 1


class Raw:
    def __init__(self):
        self.n = 0

    def add(self):
        object.__setattr__(self, "n", object.__getattribute__(self, "n") + 1)


class SecondName:
    def __init__(self):
        self.it = None

    def add(self):
        mine = []
        self.it = mine
        mine.append(1)


class OfC(dict):
    def add(self):
        self["n"] = self.get("n", 0) + 1


def generator():
    yield 1


async def coroutine():
    return 1


def takes_global_lock():
    with GLOBAL_LOCK:
        pass


def twice(body):
    return lambda schedule: [body, body]


def adding_in(cls):
    def scenario(schedule):
        counter = schedule.share(cls)
        return [counter.add, counter.add]

    return scenario


def captured_second_name(schedule):
    counts = [0]
    view = memoryview(bytearray(1))

    def body():
        counts[0] += view[0]

    return [body, body]


REFUSED = {
    "a variable that is rebound": ("^n: a variable", rebinding),
    "a global name": ("^TOTAL: a global", twice(stores_global)),
    "a global dict": ("^TABLE: ", twice(lambda: adds_to_item(TABLE))),
    "a global object": ("^PLACE: ", twice(lambda: adds_to(PLACE, "n"))),
    "a class": ("^Count: ", twice(lambda: adds_to(Count, "n"))),
    "a dict of a class": ("^Count.*table: ", twice(lambda: adds_to_item(Count.table))),
    "a lock of a class": ("^Tally.lock: ", twice(lambda: adds_to(Tally, "n"))),
    "a global lock": ("^GLOBAL_LOCK: a lock", twice(takes_global_lock)),
    "access past the class": ("^Raw: ", adding_in(Raw)),
    "a second name": ("it: a list that the thread also calls 'mine'", adding_in(SecondName)),
    "a class made in C": ("^OfC: ", adding_in(OfC)),
    "a view of bytes": ("^view: a memoryview", captured_second_name),
    "a generator": (r"^bodies\[0\]: gives a generator", twice(generator)),
    "a coroutine": (r"^bodies\[0\]: gives a coroutine", twice(coroutine)),
    "a number as a body": (r"^bodies\[0\]: a int", twice(3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_seen_is_refused_by_name(name):
    message, scenario = REFUSED[name]
    before = _thread._count()
    with pytest.raises(Refused, match=message):
        explore(scenario)
    assert threads_left(before) == 0


def test_a_refusal_cannot_be_caught_by_a_thread():
    def body(spot):
        with contextlib.suppress(Exception):
            spot.y = len

    with pytest.raises(Refused, match=r"Spot\.y"):
        explore(sharing(Spot, body, body))


def test_notes_that_are_put_aside_are_not_looked_at():
    notes = []

    def body(spot):
        spot.x = 1
        notes.append(1)

    with pytest.raises(Refused, match=r"^notes: outlives a run"):
        explore(sharing(Spot, body))
    assert explore(sharing(Spot, body, aside=[notes])).interleavings == 1


def test_a_variable_of_one_thread_alone_may_be_rebound():
    def scenario(schedule):
        spot = schedule.share(Spot)

        def make():
            n = 0

            def body():
                nonlocal n
                n += spot.x

            return body

        return [make(), make()]

    assert explore(scenario).interleavings == 2


# No run goes on for ever


def spins(spot):
    while not spot.x:
        pass


def spins_without_a_step(spot):
    while True:
        pass


def waits_in_the_system(spot):
    threading.Event().wait(20)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (spins, "^steps: 100 were not enough"),
        (spins_without_a_step, "^seconds: .* in spins_without_a_step"),
        (waits_in_the_system, "^seconds: .* in wait"),
    ],
)
def test_no_scenario_hangs(body, message):
    with pytest.raises(Endless, match=message):
        explore(sharing(Spot, body, stepping(1)), steps=100, seconds=0.5)


# What a thread learns from an error counts


def test_what_follows_a_caught_error_is_explored():
    """The situation after the error is not the one before it."""

    def scenario(schedule):
        items, spot = schedule.share(list, name="items"), schedule.share(Spot)

        def takes():
            try:
                items.pop()
            except IndexError:
                if spot.x:
                    raise Seen("empty, then put") from None

        def puts():
            items.append(1)
            spot.x = 1

        return [takes, puts]

    found = both_ways(scenario)
    assert errors(found) == {"Seen: empty, then put"}
    assert all(len(race.steps) == len(race.path) for race in found.races)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1], ("list", 1)),
        (1.5, ("float", "1.5")),
        (Color := enum.IntEnum("Color", "RED"), 1),
        (len, max),
        (np.float32(1), np.float64(1)),
        (frozenset([1]), frozenset([True])),
    ],
    ids=["list", "float", "enum", "function", "width", "frozenset"],
)
def test_no_two_values_have_one_label(one, other):
    run = _Sharing()
    run._started = True
    one = one.RED if one is Color else one
    assert run._label(one) != run._label(other)
