"""What all blocks share: names, the strength of a context, copies, sequences of one token."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from ctxlab.context import SharedAttentionContext
from ctxlab.models.block import Block, _FreshWorkspace, _kept
from ctxlab.models.diffusion import Denoiser, DiffusionBlock
from ctxlab.models.language import LanguageModel
from ctxlab.models.ssm import SSMBlock
from ctxlab.models.stack import _KINDS, _Stack
from ctxlab.models.transformer import TransformerBlock
from ctxlab.testing import assert_equiv
from ctxlab.workspace import Workspace, all_of

D = 8
MAKE = {
    "Transformer": lambda **o: TransformerBlock(D, 2, 16, rng=np.random.default_rng(0), **o),
    "Diffusion": lambda **o: DiffusionBlock(D, 2, 16, rng=np.random.default_rng(0), **o),
    "SSM": lambda **o: SSMBlock(D, ffn_dim=16, rng=np.random.default_rng(0), **o),
}
COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda a: pickle.loads(pickle.dumps(a)),
}
by_kind = pytest.mark.parametrize("kind", MAKE)
by_copy = pytest.mark.parametrize("how", COPIES)


def context(strength=0.5, rate=0.1, **options):
    ctx = SharedAttentionContext(strength, rate, **options)
    ctx.set_incoming(np.eye(D, dtype=np.float32))
    return ctx


def block_of(kind, **options):
    block = MAKE[kind](**options)
    for name, p in block.parameters().items():
        if name.startswith("modulation"):  # or a diffusion block does nothing
            p[...] = 0.1 * np.random.default_rng(1).standard_normal(p.shape)
    return block


def inputs(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal((2, *shape), np.float32)


def forward(block, x):
    return block.forward(x, *[np.full(len(x), 300)] * isinstance(block, DiffusionBlock))


def run(block, x, G):
    """Output, gradient of the input, and of the parameters; copies."""
    y = forward(block, x).copy()
    return [y, block.backward(G).copy(), *(g.copy() for g in block.gradients().values())]


def same(found, wanted):
    return all(map(np.array_equal, found, wanted))


# --- names ---


@by_kind
def test_all_buffers_follow_a_new_name(kind):
    ws, (x, G) = Workspace(growth="exact"), inputs(2, 5, D)
    block = block_of(kind, context=context(workspace=ws), workspace=ws)
    want = run(block, x, G)
    ws.next_generation()
    before, sizes = set(ws._buffers), block.workspace_bytes(2, 5)
    block.name = "layer0"
    block.context.reset()
    assert same(run(block, x, G), want)
    new = set(ws._buffers) - before
    assert new
    assert all(name.startswith("layer0.") for name in new)
    named = {b.name for b in block.requirement().buffers()}
    assert new == {name for name in named if name.startswith("layer0.")}
    assert block.workspace_bytes(2, 5) == sizes


@by_kind
def test_a_name_may_change_between_forward_and_backward(kind):
    (x, G), block, twin = inputs(2, 5, D), block_of(kind), block_of(kind)
    want = run(twin, x, G)
    forward(block, x)
    block.name = "other"
    assert np.array_equal(block.backward(G), want[1])
    assert same(block.gradients().values(), want[2:])


def test_a_step_follows_a_new_name():
    block, twin = (block_of("SSM") for _ in range(2))
    tokens = inputs(3, D)[0]
    block.name = "layer0"
    for each in (block, twin):
        each.start(3, 2)
    for _ in range(2):
        assert np.array_equal(block.step(tokens), twin.step(tokens))
    assert not any(name.startswith("SSMBlock") for name in block.workspace._buffers)


@by_kind
def test_two_blocks_of_one_name_use_a_workspace_in_turn_or_not_at_all(kind):
    ws, (x, G) = Workspace(), inputs(2, 5, D)
    first, second = (block_of(kind, workspace=ws) for _ in range(2))
    second.name = first.name
    want = run(block_of(kind), x, G)
    y = forward(first, x)
    with pytest.raises(RuntimeError, match=rf"^name: .*'{first.name}' has used the workspace"):
        forward(second, x)
    if kind == "SSM":
        with pytest.raises(RuntimeError, match=r"^name: "):
            second.start(2, 5)
    assert np.array_equal(y, want[0])  # what the first handed out is as it was
    assert np.array_equal(first.backward(G), want[1])
    ws.next_generation()
    assert same(run(second, x, G), want)
    with pytest.raises(RuntimeError, match=r"^name: "):
        forward(first, x)
    first.name = "another"
    assert same(run(first, x, G), want)
    del second, first
    ws.next_generation()


def test_blocks_of_a_model_may_be_renamed():
    model = LanguageModel(D, 2, 16, 2, max_len=8, strength=0.5, rng=np.random.default_rng(0))
    ids = np.arange(8).reshape(1, 8)
    for _ in range(2):
        loss = model.loss(ids, ids)
    twin = copy.deepcopy(model)
    twin.blocks[1].name = "last"
    assert twin.workspace_bytes(1, 8) == model.workspace_bytes(1, 8)
    losses = [m.loss(ids, ids) for m in (model, twin)]
    assert losses[0] == losses[1] != loss
    for m in (model, twin):
        m.backward()
    assert same(model.gradients().values(), twin.gradients().values())
    assert {n.partition(".")[0] for n in twin.parameters()} == {
        "embedding",
        "positions",
        "norm",
        "blocks",
        "last",
    }
    assert twin.parameters().keys() == twin.gradients().keys()
    twin.load_state_dict(twin.state_dict())


# --- the strength ---


@by_kind
def test_a_strength_that_is_set_stays(kind):
    ctx, (x, G) = context(0.1), inputs(2, 5, D)
    block = block_of(kind, context=ctx)
    run(block, x, G)
    ctx.strength = 0.9
    ctx.reset()
    found = run(block, x, G)
    assert ctx.strength == 0.9
    assert block.parameters()["context.strength"][0] == np.float32(0.9)
    assert same(found, run(block_of(kind, context=context(0.9)), x, G))


@by_kind
@pytest.mark.parametrize("change", ["strength", "array", "incoming", "state"])
def test_backward_refuses_another_context_than_forward_had(kind, change):
    ctx, (x, G) = context(), inputs(2, 5, D)
    block = block_of(kind, context=ctx)
    want = run(block, x, G)
    state = ctx.state_dict()
    forward(block, x)
    if change == "strength":
        ctx.strength = 0.75
    elif change == "array":
        block.parameters()["context.strength"][0] = 0.75
    elif change == "incoming":
        ctx.set_incoming(2 * ctx.incoming)
    else:
        ctx.load_state_dict(state)
    with pytest.raises(RuntimeError, match="changed since the forward pass"):
        block.backward(G)
    ctx.load_state_dict(state)
    assert same(run(block, x, G), want)


def test_a_state_that_is_loaded_ends_the_pass():
    block, (x, G) = block_of("SSM"), inputs(1, 4, D)
    forward(block, x)
    block.load_state_dict(block.state_dict())
    with pytest.raises(RuntimeError, match="no forward pass"):
        block.backward(G)


def test_a_context_stays_with_its_block():
    block = block_of("SSM", context=context())
    with pytest.raises(AttributeError, match="context"):
        block.context = context()


def test_a_model_loads_all_or_nothing():
    model = LanguageModel(D, 2, 16, 2, max_len=8, strength=0.5, rng=np.random.default_rng(0))
    before = model.state_dict()
    for name, value in (("strength", [1e39]), ("strength", [np.nan])):
        state = {n: a + 1 for n, a in before.items()} | {
            f"blocks.1.context.{name}": np.array(value)
        }
        with pytest.raises(ValueError, match=r"^state: blocks\.1\.context\.strength "):
            model.load_state_dict(state)
        assert same(model.state_dict().values(), before.values())


# --- sequences of one token ---


@by_kind
def test_sequences_of_one_token_teach_the_token_statistic(kind):
    (x, _), twin = inputs(3, 1, D), SharedAttentionContext(0.0, 0.5)
    block = block_of(kind, context=SharedAttentionContext(0.0, 0.5))
    for seed in range(2):
        x, _ = inputs(3, 1, D, seed=seed)
        y = forward(block, x)
        twin.update_step(x[:, 0], y[:, 0])
        assert np.array_equal(block.context.outgoing, twin.outgoing)


@by_kind
@pytest.mark.parametrize("B", [1, 4])
def test_tokens_without_a_statistic_weaken_nothing(kind, B):
    block = block_of(kind, context=SharedAttentionContext(0.1, 0.5))
    forward(block, inputs(2, 40, D)[0])
    before = block.context.outgoing.copy()
    flat = np.ones((B, 1, D), np.float32)
    for _ in range(5):
        forward(block, flat)
    if kind == "SSM":
        block.start(B, 1)
        block.step(np.ascontiguousarray(flat[:, 0]))
    assert np.array_equal(block.context.outgoing, before)


@by_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("B", "S"), [(1, 1), (40, 1), (20, 2), (1, 40)])
@pytest.mark.parametrize("max_rows", [2, None])
def test_bytes_are_known_whatever_is_learned_from(kind, B, S, max_rows, dtype):
    ws = Workspace(growth="exact")
    ctx = SharedAttentionContext(0.5, 0.1, max_rows=max_rows, dtype=dtype, workspace=ws)
    block = MAKE[kind](context=ctx, workspace=ws, dtype=dtype)
    x, G = inputs(B, S, D)
    run(block, x.astype(dtype), G.astype(dtype))
    assert ws.peak_bytes == block.workspace_bytes(B, S)


@by_kind
def test_a_kind_is_a_block_and_holds_parameters(kind):
    names = [base.__name__ for base in type(MAKE[kind]()).__mro__]
    assert names == [f"{kind}Block", "Block", "_Kind", "_Parametric", "object"]


@by_kind
def test_what_a_block_keeps_has_names_and_types(kind):
    block = MAKE[kind]()
    forward(block, inputs(2, 3, D)[0])
    fields = dataclasses.fields(block._saved.kept)
    buffers = {b.name.removeprefix(f"{block.name}.") for b in _kept(block)}
    assert buffers <= {field.name for field in fields}
    for field in fields:
        if field.name in buffers:
            assert isinstance(getattr(block._saved.kept, field.name), np.ndarray)


def test_a_kind_without_its_parts_is_refused():
    class Partial(Block):
        """Has no forward pass."""

    with pytest.raises(TypeError, match=r"abstract.*_backward"):
        Partial(D, {}, rng=None, dtype=np.float32, context=None, workspace=None)


class Same(Block):
    """Hands its input on, so that nothing takes as much as what the context learns with."""

    def _forward(self, h, y, shape, arrays):
        y[...] = h

    def _backward(self, h, kept, G, grad_h, shape):
        grad_h[...] = G

    def _kept_shapes(self):
        return {}

    def _forward_scratch(self):
        return all_of()

    _backward_scratch = _forward_scratch

    def _sizes(self, batch, seq_len):
        return {}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("B", "S"), [(1, 1), (40, 1), (20, 2), (1, 40)])
@pytest.mark.parametrize("max_rows", [2, None])
def test_what_learning_takes_is_known(B, S, max_rows, dtype):
    ws = Workspace(growth="exact")
    ctx = SharedAttentionContext(0.5, 0.1, max_rows=max_rows, dtype=dtype, workspace=ws)
    block = Same(D, {}, rng=None, dtype=dtype, context=ctx, workspace=ws)
    x, G = inputs(B, S, D)
    run(block, x.astype(dtype), G.astype(dtype))
    assert ws.peak_bytes == block.workspace_bytes(B, S)


def test_a_model_learns_from_sequences_of_one_token():
    model = LanguageModel(D, 2, 16, 2, max_len=8, strength=0.5, rng=np.random.default_rng(0))
    ids = np.arange(40).reshape(40, 1)
    for _ in range(2):
        model.loss(ids, ids)
        model.backward()
    model.workspace.release()
    model.workspace._peak = 0
    model.loss(ids, ids)
    model.backward()
    assert model.blocks[0].context.outgoing.any()
    assert model.workspace.peak_bytes == model.workspace_bytes(40, 1)


# --- copies ---


def arrays_of(model):
    contexts = [b.context for b in getattr(model, "blocks", [model]) if b.context is not None]
    held = [a for c in contexts for a in (c.incoming, c.outgoing) if a is not None]
    return [*model.parameters().values(), *model.gradients().values(), *held]


def assert_apart(a, b):
    first, second = arrays_of(a), arrays_of(b)
    assert same(first, second)
    assert not any(np.shares_memory(p, q) for p in first for q in second)
    assert a.workspace is not b.workspace


@by_kind
@by_copy
def test_a_copied_block_goes_on_by_itself(kind, how):
    x, G = inputs(2, 5, D)
    block = block_of(kind, context=context())
    run(block, x, G)
    twin = COPIES[how](block)
    assert_apart(block, twin)
    flat = list(twin.parameters().values())[:-1]  # the last is the strength
    assert len({id(p.base) for p in flat}) == 1  # one array, as before
    assert twin.parameters()["context.strength"] is twin.context.parameters()["strength"]
    want = [run(block, x, G), run(block, x, G)]
    assert same(run(twin, x, G), want[0])
    assert same(run(twin, x, G), want[1])
    twin.context.strength = 7
    next(iter(twin.parameters().values()))[...] = 0
    assert block.context.strength == 0.5
    assert next(iter(block.parameters().values())).any()


@by_kind
@by_copy
def test_a_copy_has_no_pass_to_follow(kind, how):
    (x, G), block = inputs(2, 5, D), block_of(kind)
    want = run(block, x, G)
    forward(block, x)
    twin = COPIES[how](block)
    with pytest.raises(RuntimeError, match="no forward pass to follow"):
        twin.backward(G)
    assert np.array_equal(block.backward(G), want[1])  # and the pass stays with the original
    assert same(run(twin, x, G), want)


@by_copy
@pytest.mark.parametrize("kind", _KINDS)
def test_copied_stacks(how, kind):
    x, G = inputs(1, 40, 64)
    stack = _Stack(kind, 3, 64)
    stack.step(x, G)
    twin = COPIES[how](stack)
    for a, b in zip(stack.blocks, twin.blocks, strict=True):
        assert_apart(a, b)
        assert b.workspace is b.context.workspace is twin.workspace
    for _ in range(2):
        assert np.array_equal(stack.step(x, G), twin.step(x, G))


@by_copy
def test_copied_language_models(how):
    model = LanguageModel(D, 2, 16, 3, max_len=8, strength=0.5, rng=np.random.default_rng(0))
    ids = np.arange(16).reshape(2, 8)
    for _ in range(2):
        model.loss(ids, ids)
    twin = COPIES[how](model)
    assert_apart(model, twin)
    assert all(b.workspace is b.context.workspace is twin.workspace for b in twin.blocks)
    with pytest.raises(RuntimeError, match="no loss to follow"):
        twin.backward()
    model.backward()
    for _ in range(2):
        assert model.loss(ids, ids) == twin.loss(ids, ids)
        for m in (model, twin):
            m.backward()
            for p, g in zip(m.parameters().values(), m.gradients().values(), strict=True):
                p -= 0.1 * g
        assert same(model.parameters().values(), twin.parameters().values())


@by_copy
def test_copied_denoisers(how):
    x, G = inputs(2, 6, 4)
    model, t = Denoiser(4, D, 2, 16, rng=np.random.default_rng(0)), np.array([10, 900])
    model.parameters()["out.weight"][...] = 0.1
    model.forward(x, t)
    twin = COPIES[how](model)
    assert_apart(model, twin)
    with pytest.raises(RuntimeError, match="no forward pass to follow"):
        twin.backward(G)
    model.backward(G)
    assert np.array_equal(model.forward(x, t), twin.forward(x, t))
    for m in (model, twin):
        m.backward(G)
    assert same(model.gradients().values(), twin.gradients().values())
    assert model.parameter_count == sum(p.size for p in model.parameters().values())


def test_blocks_that_share_a_context_share_the_copy_of_it():
    ctx = context()
    pair = [block_of(kind, context=ctx) for kind in ("SSM", "Transformer")]
    first, second = copy.deepcopy(pair)
    assert first.context is second.context is not ctx
    first.parameters()["context.strength"][0] = 3
    assert second.parameters()["context.strength"][0] == 3
    assert ctx.strength == 0.5


@by_copy
def test_a_copy_of_a_workspace_that_does_not_pool_does_not_either(how):
    ws = _FreshWorkspace()
    ws.take("a", (3,))
    twin = COPIES[how](ws)
    assert type(twin) is _FreshWorkspace
    assert twin.taken_count == 0


def test_copies_compute_as_the_original_in_the_same_digits():
    (x, G), block = inputs(2, 40, D), block_of("Transformer", context=context())
    want, found = run(copy.deepcopy(block), x, G), run(block, x, G)
    for a, b in zip(found, want, strict=True):
        assert_equiv(a, b, scale=np.zeros(a.shape))
