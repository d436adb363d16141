"""Stacks of blocks on one workspace: three kinds, with and without a pool, arranged by a plan."""

import numpy as np
import pytest

from ctxlab.gemm import unbuffered
from ctxlab.measure import page_faults, traced_peak
from ctxlab.models.block import _FreshWorkspace
from ctxlab.models.layers import adam_into
from ctxlab.models.stack import _KINDS, _Stack, memory
from ctxlab.planning import plan, record
from ctxlab.workspace import Workspace

SHAPE = (1, 40, 64)
by_kind = pytest.mark.parametrize("kind", _KINDS)


def inputs(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal((2, *shape), np.float32)


@by_kind
def test_a_pool_changes_no_bit(kind):
    x, G = inputs()
    stacks = [_Stack(kind, 3, SHAPE[2], pooled=p) for p in (True, False)]
    for _ in range(3):
        first, second = (stack.step(x, G).copy() for stack in stacks)
        assert np.array_equal(first, second)
    for a, b in zip(*(stack.blocks for stack in stacks), strict=True):
        assert all(map(np.array_equal, a.gradients().values(), b.gradients().values()))
        assert np.array_equal(a.context.outgoing, b.context.outgoing)


@by_kind
def test_a_training_step_allocates_no_array_once_it_is_warm(kind):
    shape = (1, 256, 128)
    (x, G), stack, ws = inputs(shape), _Stack(kind, 2, shape[2]), Workspace()
    moments = [
        (p, g, np.zeros_like(p), np.zeros_like(p))
        for block in stack.blocks
        for p, g in zip(block.parameters().values(), block.gradients().values(), strict=True)
    ]
    steps = iter(range(1, 1000))

    def train():
        stack.step(x, G)
        t = next(steps)
        with unbuffered():
            for p, g, m, v in moments:
                adam_into(p, g, m, v, t, ws, lr=1e-4)

    # Vectors of the contexts' updates are allowed; the smallest matrix of tokens has 131 KB.
    assert traced_peak(train, warmup=3) < x.nbytes / 2
    held = stack.workspace.nbytes, stack.workspace.allocation_count, ws.allocation_count
    assert page_faults(train, warmup=2) < 40
    assert held == (stack.workspace.nbytes, stack.workspace.allocation_count, ws.allocation_count)


@by_kind
def test_shapes_may_change_from_step_to_step(kind):
    stack = _Stack(kind, 2, 64)
    for rows in (40, 7, 33, 40):
        x, G = inputs((1, rows, 64), seed=rows)
        fresh = _Stack(kind, 2, 64, pooled=False)
        fresh_first = fresh.step(x, G)
        one = _Stack(kind, 2, 64)
        one.move_to(stack.workspace)
        assert np.array_equal(one.step(x, G), fresh_first)
    count = stack.workspace.allocation_count
    stack.step(*inputs((1, 40, 64)))
    assert stack.workspace.allocation_count >= count


@by_kind
@pytest.mark.parametrize("debug", [True, False])
def test_an_arena_planned_from_one_run_serves_the_next(kind, debug):
    x, G = inputs()
    stack, plain = (_Stack(kind, 3, SHAPE[2]) for _ in range(2))
    for _ in range(2):
        stack.step(x, G)
        plain.step(x, G)
    requests = record(lambda ws: stack.move_to(ws).step(x, G))
    plain.step(x, G)
    space = Workspace(debug=debug)
    space.arrange(plan(requests))
    stack.move_to(space)
    for seed in range(3):  # the plan is of shapes, not of values
        x, G = inputs(seed=seed)
        assert np.array_equal(stack.step(x, G), plain.step(x, G))
    assert space.allocation_count == 1
    assert space.nbytes < sum(
        int(np.prod(r.shape)) * np.dtype(r.dtype).itemsize for r in requests.values()
    )


@by_kind
def test_memory_is_what_the_words_say(kind):
    m = memory(kind, 2, SHAPE, backward=True)
    assert m.traffic > m.fresh > 0
    assert m.planned <= m.pooled


def test_a_stack_of_no_known_kind_is_refused():
    with pytest.raises(ValueError, match=r"^kind: 'Conv'"):
        _Stack("Conv", 1, 8)


def test_contexts_go_from_layer_to_layer():
    x, G = inputs()
    stack = _Stack("Transformer", 2, SHAPE[2])
    stack.step(x, G)
    learned = stack.blocks[0].context.outgoing.copy()
    assert stack.blocks[1].context.incoming is None
    stack.step(x, G)
    assert np.array_equal(stack.blocks[1].context.incoming, learned)


def test_a_fresh_workspace_counts_what_it_hands_out():
    ws = _FreshWorkspace()
    a, b = ws.take("x", (3, 4)), ws.take("x", (5,), np.float64)
    assert not np.shares_memory(a, b)
    assert (ws.taken_count, ws.taken_bytes, ws.nbytes) == (2, 48 + 40, 0)
