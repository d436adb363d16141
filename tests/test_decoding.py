"""Token by token and without a way back: the same numbers as forward, known bytes, clear errors."""

import copy
from itertools import pairwise

import numpy as np
import pytest
from conftest import seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlab.context import SharedAttentionContext
from ctxlab.models.block import _FreshWorkspace, _room
from ctxlab.models.diffusion import DiffusionBlock
from ctxlab.models.language import LanguageModel, _draw_token
from ctxlab.models.ssm import SSMBlock
from ctxlab.models.stack import _KINDS, _Stack
from ctxlab.models.transformer import TransformerBlock
from ctxlab.testing import assert_equiv, no_allocation
from ctxlab.witness import _has_memray
from ctxlab.workspace import Workspace

# Without it large objects of Python count as arrays.
needs_memray = pytest.mark.skipif(not _has_memray(), reason="memray is not installed")

D = 8
KINDS = "Transformer", "SSM"
by_kind = pytest.mark.parametrize("kind", KINDS)


def context(rng, dtype=np.float32, rate=0.1, **options):
    ctx = SharedAttentionContext(0.5, rate, dtype=dtype, **options)
    ctx.set_incoming(np.tanh(rng.standard_normal((D, D))).astype(dtype))
    return ctx


def make(kind, seed=0, mixes=False, workspace=None, dtype=np.float32, **options):
    rng = np.random.default_rng(seed)
    ctx = context(rng, dtype, workspace=workspace) if mixes else None
    shared = dict(rng=rng, dtype=dtype, context=ctx, workspace=workspace) | options
    if kind == "SSM":
        return SSMBlock(D, ffn_dim=12, **shared)
    return TransformerBlock(D, 2, 12, **shared)


def tokens(B, S, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((B, S, D)).astype(dtype)


def decoded(block, x, cuts, keep=None):
    """All of `x`: prompts up to the last cut, then steps."""
    y = np.full_like(x, np.nan)
    for a, b in pairwise([0, *cuts]):
        some = {} if keep is None else {"keep": np.ascontiguousarray(keep[:, a:b])}
        y[:, a:b] = block.prompt(np.ascontiguousarray(x[:, a:b]), **some)
    for t in range(cuts[-1] if cuts else 0, x.shape[1]):
        some = {} if keep is None else {"keep": np.ascontiguousarray(keep[:, t])}
        y[:, t] = block.step(np.ascontiguousarray(x[:, t]), **some)
    return y


# --- the same numbers


@settings(max_examples=60)
@given(
    seeds,
    st.sampled_from(KINDS),
    st.integers(1, 3),
    st.integers(1, 12),
    st.lists(st.integers(0, 12), max_size=3),
    st.booleans(),
    st.sampled_from([np.float32, np.float64]),
    st.booleans(),
)
def test_prompts_and_steps_are_the_sequence(seed, kind, B, S, cuts, mixes, dtype, post_norm):
    options = {"norm_first": not post_norm} if kind == "Transformer" else {}
    block, x = make(kind, seed, mixes, dtype=dtype, **options), tokens(B, S, seed, dtype)
    want = block.forward(x).copy()
    size = dict(depth=D + 12 + S, scale=np.abs(want).max() + 4)
    assert_equiv(block.forward(x, training=False), want, **size)
    block.start(B, S)
    assert_equiv(decoded(block, x, sorted(min(c, S) for c in cuts)), want, **size)


@settings(max_examples=60)
@given(
    seeds,
    st.integers(1, 3),
    st.integers(1, 10),
    st.lists(st.integers(0, 10), max_size=3),
    st.booleans(),
)
def test_padding_is_not_seen_wherever_it_is(seed, B, S, cuts, post_norm):
    x, keep = tokens(B, S, seed), np.random.default_rng(seed).random((B, S)) < 0.6
    x[~keep] = np.nan
    block = make("Transformer", seed, mixes=True, norm_first=not post_norm)
    want = block.forward(x, keep=keep).copy()
    size = dict(depth=D + 12 + S, scale=np.abs(want).max() + 4)
    assert_equiv(block.forward(x, keep=keep, training=False), want, **size)
    block.start(B, S)
    y = decoded(block, x, sorted(min(c, S) for c in cuts), keep)
    assert_equiv(y, want, **size)
    assert not y[~keep].any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keep_weights", [True, False])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_pass_that_keeps_nothing_is_the_pass(causal, keep_weights, approximate):
    options = dict(causal=causal, keep_weights=keep_weights, approximate=approximate)
    block, x = make("Transformer", **options), tokens(2, 40)
    want = block.forward(x).copy()
    assert_equiv(block.forward(x, training=False), want, depth=60, scale=8.0)


def test_a_diffusion_block_may_keep_nothing():
    block = DiffusionBlock(D, 2, 12, rng=np.random.default_rng(0), context=context(np.random))
    for p in block.parameters().values():
        p += 0.1 * np.random.default_rng(1).standard_normal(p.shape).astype(p.dtype)
    x, t = tokens(3, 9), np.array([0, 500, 999])
    want = block.forward(x, t).copy()
    assert np.array_equal(block.forward(x, t, training=False), want)
    with pytest.raises(TypeError, match=r"^start: a DiffusionBlock sees all tokens at once"):
        block.start(1, 4)


@by_kind
def test_a_long_prompt_in_many_panels(kind):
    block, x = make(kind), tokens(1, 700)
    want = block.forward(x).copy()
    block.start(1, 700)
    assert_equiv(decoded(block, x, [300, 690]), want, depth=700, scale=np.abs(want).max() + 4)


@by_kind
def test_what_a_context_learns_on_the_way(kind):
    rng, x = np.random.default_rng(0), tokens(3, 5)
    block = make(kind, mixes=True)
    twin = SharedAttentionContext(0.5, 0.1)
    block.start(3, 5)
    first = np.ascontiguousarray(x[:, :3])
    twin.update(first.reshape(-1, D), block.prompt(first).reshape(-1, D))
    for t in (3, 4):
        token = np.ascontiguousarray(x[:, t])
        twin.update_step(token, block.step(token))
    assert np.array_equal(block.context.outgoing, twin.outgoing)
    assert rng is not None


# --- memory


@by_kind
def test_debug_fresh_and_pooled_are_the_same_bits(kind):
    x, found = tokens(2, 9), []
    for ws in (None, Workspace(debug=True), _FreshWorkspace()):
        block = make(kind, mixes=True, workspace=ws)
        if ws is not None:
            ws.next_generation()
        block.start(2, 9)
        found.append(decoded(block, x, [4]))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


@by_kind
@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize(
    ("B", "prompt", "max_len"), [(1, 0, 5), (1, 1, 9), (3, 7, 20), (2, 64, 66)]
)
def test_bytes_of_a_decoding_are_known(kind, mixes, B, prompt, max_len):
    ws = Workspace(growth="exact")
    block, x = make(kind, mixes=mixes, workspace=ws), tokens(B, max_len)
    block.start(B, max_len)
    y = decoded(block, x, [prompt] if prompt else [])
    assert np.isfinite(y).all()
    assert ws.peak_bytes == block.workspace_bytes(B, prompt, max_len=max_len)


def test_bytes_of_a_decoding_with_padding_are_known():
    ws = Workspace(growth="exact")
    block, x = make("Transformer", mixes=True, workspace=ws), tokens(2, 20)
    block.start(2, 20)
    decoded(block, x, [9], np.random.default_rng(0).random((2, 20)) < 0.5)
    assert ws.peak_bytes == block.workspace_bytes(2, 9, max_len=20, keep=True)


@pytest.mark.parametrize("kind", _KINDS)
def test_many_layers_take_little_more_than_one(kind):
    held, x = {}, np.random.default_rng(0).standard_normal((1, 128, 64), np.float32)
    for layers in (1, 2, 12):
        stack = _Stack(kind, layers, 64)
        for _ in range(2):
            y = stack.forward(x, training=False)
        held[layers] = stack.workspace.nbytes
        with pytest.raises(RuntimeError, match="no forward pass to follow"):
            stack.blocks[-1].backward(y)
    assert held[12] == held[2] < 1.2 * held[1]


@pytest.mark.parametrize("kind", _KINDS)
def test_bytes_of_a_pass_that_keeps_nothing_are_known(kind):
    ws = Workspace(growth="exact")
    ctx = SharedAttentionContext(0.5, 0.1, workspace=ws)
    ctx.set_incoming(np.eye(64, dtype=np.float32))
    block = _KINDS[kind](64, context=ctx, workspace=ws)
    x = np.random.default_rng(0).standard_normal((2, 30, 64), np.float32)
    options = {"t": np.array([3, 400])} if kind == "Diffusion" else {}
    block.forward(x, training=False, **options)
    assert ws.peak_bytes == block.workspace_bytes(2, 30, training=False)
    assert block.workspace_bytes(2, 30, training=False) < block.workspace_bytes(2, 30)


@needs_memray
@by_kind
@pytest.mark.parametrize("mixes", [True, False])
def test_steps_and_prompts_allocate_no_array(kind, mixes):
    B = 8 if mixes else 64  # a context has vectors of B numbers for what it learns from tokens
    block, x = make(kind, mixes=mixes), tokens(B, 4)
    one = np.ascontiguousarray(x[:, 0])
    block.start(B, 10_000)
    no_allocation(lambda: block.step(one))
    if kind == "SSM":  # the keys of a Transformer become more, and with them a block of scores
        no_allocation(lambda: block.prompt(x))


def test_outputs_go_to_few_places():
    ws, x = Workspace(), tokens(1, 100)
    block = make("SSM", workspace=ws)
    block.start(1, 10_000)
    for S in (*range(1, 100), *range(1, 100)):
        block.prompt(np.ascontiguousarray(x[:, :S]))
    places = {name for name in ws._buffers if name.startswith("decoding.")}
    assert places == {f"decoding.{_room(n)}.y0" for n in (1, 2, 4, 8, 16, 32, 64, 128)}


@by_kind
def test_blocks_in_a_row_hand_on_in_two_places(kind):
    ws, x = Workspace(), tokens(2, 6)
    blocks = [make(kind, i, workspace=ws) for i in range(4)]
    alone = [make(kind, i) for i in range(4)]
    want = x
    for block in alone:
        want = block.forward(want)
    for block in blocks:
        block.start(2, 6)
    for t in range(6):
        y = np.ascontiguousarray(x[:, t])
        for block in blocks:
            y = block.step(y)
        assert_equiv(y, np.ascontiguousarray(want[:, t]), depth=100, scale=np.abs(want).max() + 4)
    assert sum(name.startswith("decoding.") for name in ws._buffers) == 2


@by_kind
def test_a_result_may_go_where_one_likes(kind):
    block, x, out = make(kind), tokens(2, 3), np.zeros((2, 3, D), np.float32)
    block.start(2, 9)
    assert block.prompt(x, out=out).base is out or block.prompt(x, out=out) is out
    row = np.zeros((2, D), np.float32)
    block.step(np.ascontiguousarray(x[:, 0]), out=row)
    assert row.any()
    for bad in (row[:1], row.astype(np.float64), np.zeros((2, 2 * D), np.float32)[:, ::2]):
        with pytest.raises((TypeError, ValueError), match=r"^out: "):
            block.step(np.ascontiguousarray(x[:, 0]), out=bad)
    with pytest.raises(ValueError, match=r"^out: overlaps x"):
        block.step(row, out=row)


# --- order of calls, bad input


@by_kind
def test_calls_out_of_order(kind):
    block, x = make(kind), tokens(2, 3)
    one = np.ascontiguousarray(x[:, 0])
    for call, given_ in ((block.step, one), (block.prompt, x)):
        with pytest.raises(
            RuntimeError, match=r"^(step|prompt): comes after start\(batch, max_len"
        ):
            call(given_)
    block.start(2, 9)
    block.step(one)
    block.forward(x)  # starts a generation of the block's own workspace
    with pytest.raises(RuntimeError, match=r"^step: start\(\) was in generation .* call start"):
        block.step(one)
    block.start(2, 9)
    block.load_state_dict(block.state_dict())
    with pytest.raises(RuntimeError, match=r"^step: comes after start"):
        block.step(one)
    block.start(2, 9)
    block.step(one)
    with pytest.raises(RuntimeError, match="no forward pass"):
        block.backward(x)


@by_kind
def test_another_workspace_has_none_of_it(kind):
    block, x = make(kind, workspace=Workspace()), tokens(2, 1)
    block.start(2, 9)
    block.workspace = Workspace()
    with pytest.raises(RuntimeError, match=r"^step: start\(\) was in generation"):
        block.step(x[:, 0].copy())


@by_kind
def test_a_refused_token_is_as_if_it_had_not_been(kind):
    block, twin, x = make(kind), make(kind), tokens(2, 4)
    for each in (block, twin):
        each.start(2, 3)
        each.prompt(np.ascontiguousarray(x[:, :2]))
    one = np.ascontiguousarray(x[:, 2])
    refused = {
        r"^x: 3 sequences, start\(\) was given 2": np.ones((3, D), np.float32),
        r"^x: shape \(2, 9\), needed \(B, 8\)": np.ones((2, D + 1), np.float32),
        r"^x: float64": one.astype(np.float64),
        r"^x: shape \(8,\)": one[0],
        r"^x: is not C-contiguous": np.ones((D, 2), np.float32).T,
    }
    for message, bad in refused.items():
        with pytest.raises((TypeError, ValueError), match=message):
            block.step(bad)
    with pytest.raises(ValueError, match=r"^x: 2 tokens after 2, start\(\) was given max_len = 3"):
        block.prompt(np.ascontiguousarray(x[:, 2:]))
    with pytest.raises(TypeError):
        block.step(one, nonsense=1)
    assert np.array_equal(block.step(one), twin.step(one))
    with pytest.raises(ValueError, match=r"^x: 1 tokens after 3"):
        block.step(one)


@by_kind
@pytest.mark.parametrize(
    ("batch", "max_len", "message"),
    [
        (0, 5, "^batch: 0"),
        (2, 0, "^max_len: 0, needed"),
        (2, 7, "^max_len: 7, needed 1..6"),
        (1.5, 5, "^batch: 1.5 is not an integer"),
        (2, None, "^max_len: None is not an integer"),
    ],
)
def test_a_start_that_is_refused_ends_nothing(kind, batch, max_len, message):
    block, x = make(kind, max_len=6), tokens(2, 1)[:, 0]
    block.start(2, 6)
    block.step(x)
    with pytest.raises((TypeError, ValueError), match=message):
        block.start(batch, max_len)
    block.step(x)
    assert block._decoding.length == 2


def test_a_block_that_sees_later_tokens_cannot_decode():
    with pytest.raises(ValueError, match=r"^start: the block is not causal"):
        make("Transformer", causal=False).start(1, 5)


def test_an_ssm_knows_of_no_padding():
    block, x = make("SSM"), tokens(2, 3)
    block.start(2, 9)
    for call in (
        lambda: block.forward(x, keep=np.ones((2, 3), bool)),
        lambda: block.prompt(x, keep=np.ones((2, 3), bool)),
        lambda: block.step(x[:, 0].copy(), keep=np.ones(2, bool)),
    ):
        with pytest.raises(TypeError, match=r"^keep: an SSM block knows of no padding"):
            call()


def test_a_mask_of_padding_has_one_bool_a_token():
    block, x = make("Transformer"), tokens(2, 3)
    block.start(2, 9)
    with pytest.raises(ValueError, match=r"^keep: shape"):
        block.prompt(x, keep=np.ones((2, 2), bool))
    with pytest.raises(ValueError, match=r"^keep: shape"):
        block.step(x[:, 0].copy(), keep=np.ones(3, bool))
    with pytest.raises(TypeError, match=r"^keep: "):
        block.step(x[:, 0].copy(), keep=[True, True])


@by_kind
@pytest.mark.parametrize("S", [0])
def test_an_empty_prompt_changes_nothing(kind, S):
    block, twin, x = make(kind), make(kind), tokens(2, 3)
    for each in (block, twin):
        each.start(2, 3)
    assert block.prompt(np.ascontiguousarray(x[:, :S])).shape == (2, 0, D)
    assert np.array_equal(block.prompt(x), twin.prompt(x))


@by_kind
def test_a_copy_has_not_begun(kind):
    block, x = make(kind), tokens(2, 1)[:, 0]
    block.start(2, 3)
    with pytest.raises(RuntimeError, match="comes after start"):
        copy.deepcopy(block).step(x)
    block.step(x)


# --- the language model

SMALL = dict(dim=D, n_heads=2, ffn_dim=12, n_layers=3, max_len=12, vocab=23)


def model(kind, seed=0, **options):
    return LanguageModel(**SMALL | options, kind=kind, rng=np.random.default_rng(seed))


def ids(B, S, seed=0):
    return np.random.default_rng(seed).integers(0, 23, (B, S))


@settings(max_examples=30)
@given(seeds, st.sampled_from(KINDS), st.integers(1, 3), st.integers(1, 12), st.integers(1, 12))
def test_a_model_goes_on_as_it_would_have_seen_it(seed, kind, B, S, cut):
    lm, text, cut = model(kind, seed, strength=0.8, update_rate=0.5), ids(B, S, seed), min(cut, S)
    for _ in range(2):
        lm.loss(text, text)
    whole = lm.forward(text, training=False, learn=False).copy()
    assert whole.shape == (B, S, 23)
    size = dict(depth=D + 12 + S, scale=np.abs(whole).max() + 4)
    lm.start(B, S)
    assert_equiv(lm.prompt(text[:, :cut]), whole[:, cut - 1].copy(), **size)
    for t in range(cut, S):
        assert_equiv(lm.step(text[:, t]), whole[:, t].copy(), **size)


@by_kind
def test_logits_have_a_gradient(kind):
    lm, text = model(kind, dtype=np.float64), ids(2, 5)
    lm.loss(text, text)
    logits = lm.last_outputs()["logits"].copy()  # of the loss: not yet their gradient
    lm.backward()
    want = {n: g.copy() for n, g in lm.gradients().items()}
    z = lm.forward(text).copy()
    shares = np.exp(z - z.max(axis=2, keepdims=True))
    shares /= shares.sum(axis=2, keepdims=True)
    np.put_along_axis(
        shares, text[:, :, None], np.take_along_axis(shares, text[:, :, None], 2) - 1, 2
    )
    lm.backward(shares / text.size)
    for name, g in lm.gradients().items():
        assert_equiv(g, want[name], depth=100, scale=np.abs(want[name]).max() + 1e-3)
    assert logits.shape == (10, 23)
    lm.forward(text)
    with pytest.raises(RuntimeError, match=r"^backward: follows forward\(\), so grad_out"):
        lm.backward()
    with pytest.raises(ValueError, match=r"^grad_out: shape"):
        lm.backward(shares[:1])
    lm.forward(text, training=False)
    with pytest.raises(RuntimeError, match="no loss to follow"):
        lm.backward(shares)


@by_kind
@pytest.mark.parametrize(("B", "S", "max_len"), [(1, 1, 12), (2, 8, 12), (3, 12, 12)])
def test_bytes_of_a_model_are_known(kind, B, S, max_len):
    lm, text = model(kind, strength=0.5), ids(B, 12)
    for _ in range(2):
        lm.loss(text, text)
    lm.workspace.clear()
    lm.forward(text[:, :S], training=False)
    assert lm.workspace.peak_bytes == lm.workspace_bytes(B, S, training=False)
    lm.workspace.clear()
    lm.start(B, max_len, learn=True)
    lm.prompt(text[:, :S])
    for t in range(S, 12):
        lm.step(text[:, t])
    assert lm.workspace.peak_bytes == lm.workspace_bytes(B, S, max_len=max_len)


@needs_memray
@by_kind
def test_a_step_of_a_model_allocates_no_array(kind):
    lm, token = model(kind, strength=0.5, max_len=5000), ids(64, 1)[:, 0]
    lm.start(64)
    no_allocation(lambda: lm.step(token))


@by_kind
def test_generated_tokens_are_those_of_the_distribution(kind):
    lm, text = model(kind), ids(2, 4)
    for token in lm.generate(text, 6, temperature=0):
        likeliest = lm_likeliest(kind, text)
        assert np.array_equal(token, likeliest)
        text = np.concatenate([text, token[:, None]], axis=1)


def lm_likeliest(kind, text):
    return model(kind).forward(text, training=False)[:, -1].argmax(axis=1)


@by_kind
def test_text_depends_on_the_generator_alone(kind):
    lm = model(kind, strength=0.5)
    lm.loss(ids(2, 4), ids(2, 4))

    def run(seed):
        return np.stack(list(lm.generate(ids(2, 4), 8, rng=np.random.default_rng(seed))), axis=1)

    first = run(1)
    assert first.shape == (2, 8)
    assert np.array_equal(first, run(1))
    assert not np.array_equal(first, run(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-1), r"^temperature: -1, needed"),
        (dict(temperature=np.nan), r"^temperature: nan"),
        (dict(temperature=np.inf), r"^temperature: inf"),
        (dict(temperature="hot"), r"^temperature: "),
        (dict(top_k=0), r"^top_k: 0, needed 1..23"),
        (dict(top_k=24), r"^top_k: 24, needed 1..23"),
        (dict(n=0), r"^n: 0, needed 1..9"),
        (dict(n=10), r"^n: 10, needed 1..9"),
        (dict(ids=ids(2, 0)), r"^ids: shape \(2, 0\)"),
        (dict(ids=ids(2, 13)), r"^ids: 13 tokens"),
        (dict(ids=ids(2, 4) + 20), r"^ids: "),
    ],
)
def test_bad_wishes_are_refused_at_once(options, message):
    lm = model("Transformer")
    lm.start(2)
    lm.step(ids(2, 1)[:, 0])
    with pytest.raises((TypeError, ValueError), match=message):
        lm.generate(**dict(ids=ids(2, 4), n=2) | options)
    lm.step(ids(2, 1)[:, 0])  # what had begun goes on


def test_a_model_in_use_elsewhere_says_so():
    lm = model("Transformer")
    stream = lm.generate(ids(2, 4), 5)
    next(stream)
    lm.forward(ids(2, 4), training=False)
    with pytest.raises(RuntimeError, match=r"^generate: the model has been used"):
        next(stream)


def test_two_streams_of_one_model_do_not_mix():
    lm = model("Transformer")
    first, second = (lm.generate(ids(2, 4, seed), 5) for seed in (0, 1))
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match=r"^generate: the model has been used"):
        next(first)
    next(second)


def test_a_token_that_its_reader_changes_is_not_what_is_gone_on_from():
    def run(change):
        lm, found = model("Transformer"), []
        for token in lm.generate(ids(2, 4), 6, temperature=0):
            found.append(token.copy())
            token += change
        return found

    assert np.array_equal(run(0), run(1))


@by_kind
@pytest.mark.parametrize("change", ["strength", "incoming"])
def test_a_context_that_changes_ends_the_decoding(kind, change):
    block, x = make(kind, mixes=True), tokens(2, 1)[:, 0].copy()
    block.start(2, 5)
    block.step(x)
    if change == "strength":
        block.context.strength = 0.75
    else:
        block.context.set_incoming(2 * block.context.incoming)
    with pytest.raises(RuntimeError, match=r"^step: strength or incoming .* call start\(\) again"):
        block.step(x)


@pytest.mark.parametrize("kind", _KINDS)
def test_what_may_be_written_over_is_no_input_of_training(kind):
    ws, x = Workspace(), np.random.default_rng(0).standard_normal((1, 6, 64)).astype(np.float32)
    first, second = (_KINDS[kind](64, workspace=ws) for _ in range(2))
    options = {"t": np.array([300])} if kind == "Diffusion" else {}
    y = first.forward(x, training=False, **options)
    for bad in (y, y[:, :3]):
        with pytest.raises(ValueError, match=r"^x: is what forward\(training=False\) gave"):
            second.forward(bad, **options)
    second.forward(y.copy(), **options)


def test_logits_that_are_not_finite_draw_nothing():
    with pytest.raises(FloatingPointError, match=r"^logits: not all are finite"):
        _draw_token(np.array([[0.0, np.nan]]), 1.0, None, np.random.default_rng(0))


@given(seeds, st.integers(1, 5), st.floats(0.1, 10))
def test_what_top_k_leaves_out_is_not_drawn(seed, k, temperature):
    rng = np.random.default_rng(seed)
    z = np.repeat(rng.standard_normal((1, 5)), 300, axis=0)
    drawn = _draw_token(z, temperature, k, rng)
    assert set(drawn) <= set(np.argsort(z[0])[-k:])


def test_a_state_of_another_kind_of_block_is_refused():
    lm = model("Transformer")
    before = lm.state_dict()
    with pytest.raises(ValueError, match=r"^state: missing .*extra "):
        lm.load_state_dict(model("SSM").state_dict())
    assert all(np.array_equal(a, before[n]) for n, a in lm.state_dict().items())
    with pytest.raises(ValueError, match=r"^kind: 'Diffusion', needed one of"):
        model("Diffusion")


@by_kind
@pytest.mark.parametrize("of_model", [False, True])
def test_what_broke_off_does_not_go_on(kind, of_model, monkeypatch):
    def broken(context, x, y):
        if context is block.context:
            raise MemoryError("no room to learn")

    if of_model:
        whole, token = model(kind, strength=0.5), ids(2, 1)[:, 0]
        block = whole.blocks[1]
    else:
        whole = block = make(kind, mixes=True)
        token = tokens(2, 1)[:, 0]
    whole.start(2, 5)
    whole.step(token)
    with monkeypatch.context() as patch:
        patch.setattr("ctxlab.models.block._learn", broken)
        with pytest.raises(MemoryError):
            whole.step(token)
    with pytest.raises(RuntimeError, match=r"^step: comes after start\(.*; nothing goes on"):
        whole.step(token)
    whole.start(2, 5)
    whole.step(token)
