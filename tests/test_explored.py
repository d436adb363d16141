"""What threads share in this package, in every order of their steps up to a stated depth.

Derived values are explored in test_norm_cache.py.
"""

import importlib.util
import json
import subprocess
import sys
import textwrap
import threading
from functools import partial
from itertools import combinations_with_replacement, product
from pathlib import Path

import numpy as np
import pytest

from ctxlab import workspace
from ctxlab.context import SharedAttentionContext, _Gate
from ctxlab.gemm import _numpy_blas
from ctxlab.interleave import explore

# What no step can see and is safe: a cache of a pure function, what watches views in debug mode.
SAFE = (
    *(_numpy_blas, workspace._claims, workspace._lease, workspace._set_lease),
    workspace._Watched.__dict__["__getattribute__"],
)


def thorough(*values):
    """A case that takes seconds, of what the others hold already."""
    return pytest.param(*values, marks=pytest.mark.thorough)


def pairs(letters, depth):
    words = ["".join(word) for n in range(1, depth + 1) for word in product(letters, repeat=n)]
    return list(combinations_with_replacement(words, 2))


def speaking(make, operations, words, check=lambda shared: None):
    """A thread for every word; a letter is an operation on what they share."""

    def scenario(schedule):
        schedule.aside(*SAFE)
        shared = schedule.share(make)

        def body(word):
            for i, letter in enumerate(word):
                schedule.settle(word[i:])
                operations[letter](shared)

        schedule.afterwards(lambda: check(shared))
        return [partial(body, word) for word in words]

    return scenario


def unless_refused(operation):
    """What a gate turns away is right, too."""

    def tried(shared):
        try:
            operation(shared)
        except RuntimeError as e:
            if "by another thread" not in str(e):
                raise

    return tried


# A gate: many readers, or one writer


class Guarded:
    def __init__(self):
        self.gate, self.a, self.b = _Gate("it"), 0, 0

    def read(self):
        with self.gate.reading():
            assert self.a == self.b, "torn"

    def write(self):
        with self.gate.writing():
            n = self.a + 1
            self.a = n
            self.b = n


def is_open(gate):
    assert gate._readers == 0
    assert not gate._writing


def all_open(guarded):
    is_open(guarded.gate)


GATE = {"R": unless_refused(Guarded.read), "W": unless_refused(Guarded.write)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        *(words for words in pairs("RW", 2) if len("".join(words)) < 4),
        *(thorough(words) for words in pairs("RW", 2) if len("".join(words)) == 4),
        thorough(("RWR", "WRW")),
    ],
)
def test_a_gate_lets_in_many_readers_or_one_writer(words):
    assert explore(speaking(Guarded, GATE, words, all_open)).races == []


def test_a_gate_that_looks_without_its_lock_is_caught():
    class Open(Guarded):
        def write(self):
            if not self.gate._writing and not self.gate._readers:
                self.gate._writing = True
                n = self.a + 1
                self.a = n
                self.b = n
                self.gate._writing = False

    operations = {"R": unless_refused(Open.read), "W": Open.write}
    assert explore(speaking(Open, operations, ("R", "W"))).races


# The fold of a context: of several first readers one folds, and a change is never seen by halves

TWICE = 2 * np.eye(2, dtype=np.float32)


class Folding:
    """What `apply` and `set_incoming` share, with their own code."""

    dtype = np.dtype(np.float32)
    _fold_first = SharedAttentionContext._fold_first

    def __init__(self):
        self._mixing, self._folding = _Gate("the incoming context"), threading.Lock()
        self._norm, self._largest, self._strength, self._arrivals = None, 0.0, 0.5, 0
        self._incoming, self._folded = np.eye(2, dtype=np.float32), np.zeros((2, 2), np.float32)

    def read(self):
        with self._mixing.reading():
            C = self._incoming
            if self._norm is None:
                self._fold_first(C)
            assert self._largest > 1
            assert (float(C[0, 0]), float(self._folded[0, 0])) in ((1.0, 1.25), (2.0, 1.5))

    def write(self):
        SharedAttentionContext.set_incoming(self, TWICE)


FOLD = {"R": unless_refused(Folding.read), "W": unless_refused(Folding.write)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "preemptions"),
    [
        (("R", "R"), 2),
        (("R", "W"), None),
        (("W", "W"), None),
        thorough(("R", "R"), None),
        thorough(("RR", "W"), None),
    ],
)
def test_the_fold_of_a_context_in_every_order(words, preemptions):
    assert explore(speaking(Folding, FOLD, words), preemptions=preemptions).races == []


@pytest.mark.slow
def test_a_fold_without_its_lock_is_caught():
    class Unlocked(Folding):
        def read(self):
            with self._mixing.reading():
                if self._norm is None:
                    self._norm = 1.0
                    self._folded[:] = 1.25
                assert float(self._folded[0, 0]) == 1.25

    operations = {"R": unless_refused(Unlocked.read)}
    assert explore(speaking(Unlocked, operations, ("R", "R")), preemptions=2).races


@pytest.mark.slow
def test_a_fold_whose_flag_is_set_before_it_is_done_is_caught():
    class Early(Folding):
        def read(self):
            with self._mixing.reading():
                if self._norm is None:
                    with self._folding:
                        if self._norm is None:
                            self._norm = 1.0
                            self._folded[:] = 1.25
                assert float(self._folded[0, 0]) == 1.25

    operations = {"R": unless_refused(Early.read)}
    assert explore(speaking(Early, operations, ("R", "R")), preemptions=2).races


# The strength of a context: of several readers that find another one in its array, one sets it


class Settling:
    """What the strength and all who read it share, with their own code."""

    dtype = np.dtype(np.float32)
    strength = SharedAttentionContext.strength
    _settle = SharedAttentionContext._settle
    _settle_first = SharedAttentionContext._settle_first

    def __init__(self, held=0.5):
        self._mixing, self._folding = _Gate("the incoming context"), threading.Lock()
        self._parameter = np.array([held], np.float32)
        self._strength = self._rounded = self._norm = 0.5
        self.told = held  # what was set or written last

    def read(self, among=(0.5, 0.9, 1.0)):
        self._settle()
        with self._mixing.reading():
            assert self._strength in among

    def set(self, value):
        self.strength = value
        self.told = value

    def write(self, value):
        self._parameter[0] = value
        self.told = value


def holds_what_was_told(settling):
    is_open(settling._mixing)
    assert settling.strength == settling.told
    if settling._rounded == settling.told:  # who comes next uses it as it is
        assert settling._strength == settling.told


changed_meanwhile = partial(Settling, 1.0)  # the array, while nobody applied

STRENGTH = {
    "r": Settling.read,  # and must not be refused
    "R": unless_refused(Settling.read),
    "s": unless_refused(partial(Settling.set, value=1.0)),
    "t": unless_refused(partial(Settling.set, value=0.9)),
    "w": partial(Settling.write, value=1.0),
    "v": partial(Settling.write, value=0.5),
    "V": unless_refused(partial(Settling.read, among=(0.5,))),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Settling, ("st", "R")),  # no value is lost to a reader
        thorough(Settling, ("ss", "RR")),
        (changed_meanwhile, ("t", "R")),  # nor one of its digits
        (changed_meanwhile, ("r", "r")),  # any number may read
        thorough(Settling, ("wR", "R")),
        thorough(changed_meanwhile, ("vV", "R")),  # who has written finds that, or is refused
    ],
)
def test_the_strength_of_a_context_with_two_preemptions(make, words):
    scenario = speaking(make, STRENGTH, words, holds_what_was_told)
    assert explore(scenario, preemptions=2).races == []


# Whole contexts, with a bound on the switches


def a_context():
    context = SharedAttentionContext(0.5)
    context.workspace = None  # which only learning uses
    context._incoming = np.eye(2, dtype=np.float32)
    context._folded = np.zeros((2, 2), np.float32)
    return context


def applied(context):
    y = context.apply(np.ones((1, 2), np.float32))
    assert float(y[0, 0]) in (1.25, 1.5, 2.0)


def strengthened(context):
    context.strength = 1.0


def written(context):
    context.parameters()["strength"][0] = 1.0


def a_context_changed_meanwhile():
    context = a_context()
    written(context)
    return context


CONTEXT = {
    "A": unless_refused(applied),
    "S": unless_refused(lambda context: context.set_incoming(TWICE)),
    "s": unless_refused(strengthened),
    "w": written,
    "a": applied,  # and must not be refused
}


@pytest.mark.slow
@pytest.mark.parametrize("words", [("A", "A"), ("A", "S"), ("A", "s"), ("AS", "A"), ("A", "wA")])
def test_a_whole_context_in_every_order_with_one_preemption(words):
    assert explore(speaking(a_context, CONTEXT, words), preemptions=1).races == []


@pytest.mark.slow
def test_all_may_apply_after_the_array_has_changed():
    scenario = speaking(a_context_changed_meanwhile, CONTEXT, ("a", "a"))
    assert explore(scenario, preemptions=1).races == []


# A workspace and a stream of moments, whose locks outlive a run: by another explorer

EXPLORED = """
    import json
    import sys
    import threading

    import frontrun
    import numpy as np

    from ctxlab import workspace
    from ctxlab.streaming import ContextStats
    from ctxlab.workspace import Workspace

    ROWS = np.ones((2, 1), np.float32)


    class Used:
        def __init__(self):
            self.workspace, self.inside, self.seen = Workspace(), 0, []

        def take(self):
            try:
                with self.workspace.scope():
                    self.workspace.take("a", (2,))
                    self.inside += 1
                    alone = self.inside == 1
                    self.inside -= 1
                self.seen.append(alone)
            except RuntimeError as e:
                self.seen.append("in use by another thread" in str(e))


    class Streamed:
        def __init__(self):
            self.stats, self.seen = ContextStats(1), []

        def update(self):
            try:
                self.stats.update(ROWS, ROWS)
                self.seen.append(True)
            except RuntimeError as e:
                self.seen.append("in use by another thread" in str(e))


    def made():
        workspace._claims = threading.RLock()  # one that the explorer hands out
        return make()


    def held(shared):
        return len(shared.seen) == 2 and all(shared.seen)


    make, body = {"workspace": (Used, Used.take), "stats": (Streamed, Streamed.update)}[sys.argv[1]]
    found = frontrun.explore(
        setup=made,
        workers=[body, body],
        invariant=held,
        preemption_bound=1,
        reproduce_on_failure=0,
        timeout_per_run=30,
        deadlock_timeout=30,
        total_timeout={"workspace": 60, "stats": 10}[sys.argv[1]],
        trace_packages=["ctxlab.*"],
    )
    print(json.dumps([found.property_holds, found.num_explored, found.explanation]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("frontrun"), reason="frontrun is not installed")
@pytest.mark.parametrize("what", ["workspace", thorough("stats")])
def test_one_thread_at_a_time_uses_a_workspace(what, tmp_path):
    file = tmp_path / "explored.py"
    file.write_text(textwrap.dedent(EXPLORED))
    command = [Path(sys.executable).with_name("frontrun"), sys.executable, file, what]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    holds, orders, why = json.loads(run.stdout.splitlines()[-1])
    if holds is None:
        pytest.skip(why)  # as on a busy machine
    assert holds, why
    assert orders > 1
