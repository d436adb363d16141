"""Growth policies on streams of shapes: what is counted is what a plain model of each policy
says.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.audit.growth import (
    _BUFFERS,
    _POLICIES,
    _power_of_two,
    _replay,
    _sentence_lengths,
    _study,
)

shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=30)


def nbytes(shape):
    return 4 * int(np.prod(shape))


@given(st.integers(1, 2**40))
def test_a_power_of_two_is_the_next_one(n):
    p = _power_of_two(n)
    assert n <= p < 2 * n
    assert p & (p - 1) == 0


@given(shapes)
def test_exact_shapes_reallocate_at_every_change(stream):
    run = _replay(stream, _POLICIES["exact shape (original)"])
    assert run.reallocations == 1 + sum(a != b for a, b in itertools.pairwise(stream))
    assert list(run.held) == list(run.needed) == [nbytes(shape) for shape in stream]


@given(shapes)
def test_kept_exact_sizes_grow_at_records_only(stream):
    run = _replay(stream, _POLICIES["exact"])
    records = list(itertools.accumulate(map(nbytes, stream), max))
    assert list(run.held) == records
    assert run.reallocations == len(set(records))


@given(shapes, st.sampled_from(list(_POLICIES)))
def test_capacity_is_always_enough_and_bounded(stream, name):
    run = _replay(stream, _POLICIES[name])
    most = max(map(nbytes, stream))
    bound = {
        "exact shape (original)": 1,
        "exact": 1,
        "geometric 1.5": 1.5,
        "pow2, flat size": 2,
    }.get(name, 4)
    assert all(run.held >= run.needed)
    assert run.held.max() <= bound * most
    assert run.wasted >= 0
    assert run.overhead == run.held.max() / most


def test_the_worst_of_rounding_each_dimension_is_four_times():
    run = _replay([(513, 1025)], _POLICIES["pow2 per dimension"])
    assert 3.98 < run.overhead < 4


def test_alternating_shapes_reallocate_only_in_the_original():
    stream = [(100, 30), (101, 30)] * 50
    counts = {name: _replay(stream, policy).reallocations for name, policy in _POLICIES.items()}
    assert counts.pop("exact shape (original)") == 100
    assert max(counts.values()) <= 2


def test_the_study_covers_every_policy_on_every_buffer():
    found = _study([3, 50, 7])
    assert list(found) == list(_BUFFERS)
    assert all(list(runs) == list(_POLICIES) for runs in found.values())


def test_the_text_is_a_real_one():
    lengths = _sentence_lengths()
    assert lengths == _sentence_lengths()
    assert len(lengths) > 2000
    assert min(lengths) >= 1
    assert len(set(lengths)) > 50


@pytest.mark.parametrize("policy", _POLICIES.values(), ids=list(_POLICIES))
def test_an_empty_stream_holds_nothing(policy):
    assert _replay([], policy).reallocations == 0
