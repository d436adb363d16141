"""The state-space block: scans of every length, steps against sequences, gradients, threads, bad
input.
"""

import threading

import numpy as np
import pytest
from conftest import DTYPES, dtypes, make, refuses_misfits, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlab.context import SharedAttentionContext
from ctxlab.gemm import unbuffered
from ctxlab.measure import traced_peak
from ctxlab.models.block import _FreshWorkspace
from ctxlab.models.ssm import (
    SSMBlock,
    _chunk_count,
    _ffn_width,
    _initial_decay,
    _sigmoid,
    _ssm_shapes,
    rg_lru,
    rg_lru_backward_into,
    rg_lru_into,
    scan,
    scan_backward_into,
    scan_into,
    ssm,
)
from ctxlab.testing import assert_equiv, numeric_gradient, tolerance
from ctxlab.workspace import Workspace

DECAYS = {
    "random": lambda rng, *s: rng.random(s),
    "zero": lambda rng, *s: np.zeros(s),
    "one": lambda rng, *s: np.ones(s),
    "zero or one": lambda rng, *s: np.round(rng.random(s)),
    "tiny": lambda rng, *s: 1e-30 * rng.random(s),
    "subnormal": lambda rng, *s: np.full(s, 1e-42),
    "near one": lambda rng, *s: 1 - 1e-6 * rng.random(s),
    "every size": lambda rng, *s: 10.0 ** rng.uniform(-40, 0, s),
    "negative": lambda rng, *s: rng.uniform(-1, 1, s),
}
decays = st.sampled_from(list(DECAYS))
small = st.integers(1, 5)


def normal(rng, dtype, *shape):
    return rng.standard_normal(shape).astype(dtype)


def assert_scan(got, a, b, state):
    """Equal to the reference, at the size of the terms."""
    size = scan(np.abs(a), np.abs(b), None if state is None else np.abs(state))
    floor = np.finfo(b.dtype).tiny / np.finfo(b.dtype).eps
    assert_equiv(got, scan(a, b, state), depth=b.shape[1], scale=size + floor)


def block_and_data(seed, B, S, D, dtype=np.float32, context=None, **options):
    rng = np.random.default_rng(seed)
    block = SSMBlock(D, rng=rng, dtype=dtype, context=context, **options)
    for p in block.parameters().values():
        p += normal(rng, dtype, *p.shape) * 0.2
    return block, *(normal(rng, dtype, B, S, D) for _ in range(2))


def mixing_context(rng, D, dtype, **options):
    context = SharedAttentionContext(0.5, 0.0, dtype=dtype, **options)
    context.set_incoming(np.tanh(normal(rng, dtype, D, D)))
    return context


# the scan


@given(
    seeds,
    dtypes,
    decays,
    small,
    st.integers(1, 200),
    small,
    st.integers(1, 200),
    st.booleans(),
    st.booleans(),
)
def test_scan_is_the_reference(seed, dtype, kind, B, S, D, chunks, from_state, in_place):
    rng = np.random.default_rng(seed)
    a, b = DECAYS[kind](rng, B, S, D).astype(dtype), normal(rng, dtype, B, S, D)
    state = normal(rng, dtype, B, D) if from_state else None
    given_a, given_b = a.copy(), b.copy()
    out = b if in_place else np.full_like(b, np.nan)
    assert scan_into(a, b, out, Workspace(debug=True), state, chunks=min(chunks, S)) is out
    assert_scan(out, given_a, given_b, state)
    assert np.array_equal(a, given_a)
    if not in_place:
        assert np.array_equal(b, given_b)


@given(seeds, dtypes, small, st.integers(1, 200), small)
def test_one_chunk_is_the_reference_to_the_bit(seed, dtype, B, S, D):
    rng = np.random.default_rng(seed)
    a, b, state = (
        rng.random((B, S, D)).astype(dtype),
        normal(rng, dtype, B, S, D),
        normal(rng, dtype, B, D),
    )
    assert np.array_equal(
        scan_into(a, b, np.empty_like(b), Workspace(), state, chunks=1), scan(a, b, state)
    )


@given(seeds, st.integers(2, 100), st.integers(1, 99), st.integers(1, 100))
def test_a_scan_can_be_cut_anywhere(seed, S, cut, chunks):
    rng, cut, ws = np.random.default_rng(seed), min(cut, S - 1), Workspace()
    a, b, state = rng.random((2, S, 3)), normal(rng, float, 2, S, 3), normal(rng, float, 2, 3)
    first = scan_into(a[:, :cut], b[:, :cut], np.empty((2, cut, 3)), ws, state, min(chunks, cut))
    rest = scan_into(
        a[:, cut:], b[:, cut:], np.empty((2, S - cut, 3)), ws, first[:, -1], min(chunks, S - cut)
    )
    assert_scan(np.concatenate([first, rest], axis=1), a, b, state)


@given(seeds, small, st.integers(1, 60))
def test_scan_takes_any_strides(seed, B, S):
    rng = np.random.default_rng(seed)
    wide, b = rng.random((2 * B, 3, S + 1, 4)), normal(rng, float, S, B, 4)
    a, b, out = wide[::2, 1, :0:-1], b.swapaxes(0, 1)[..., ::-1], np.empty((B, 4, S)).swapaxes(1, 2)
    assert_scan(scan_into(a, b, out, Workspace()), a, b, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", DECAYS)
def test_long_scans(kind, dtype):
    rng = np.random.default_rng(0)
    a, b = DECAYS[kind](rng, 1, 20_000, 2).astype(dtype), normal(rng, dtype, 1, 20_000, 2)
    assert_scan(scan_into(a, b, np.empty_like(b), Workspace()), a, b, None)


@given(seeds, decays, small, st.integers(1, 12), small, st.integers(1, 11))
def test_scan_gradients(seed, kind, B, S, D, chunks):
    rng = np.random.default_rng(seed)
    a, b, G, state = (
        DECAYS[kind](rng, B, S, D),
        *(normal(rng, float, B, S, D) for _ in "bG"),
        normal(rng, float, B, D),
    )
    before = np.concatenate([state[:, None], scan(a, b, state)[:, :-1]], axis=1)
    db, da = np.empty_like(a), np.empty_like(a)
    scan_backward_into(a, before, G, db, da, Workspace(), min(chunks, max(S - 1, 1)))
    tangent_a, tangent_b = normal(rng, float, B, S, D), normal(rng, float, B, S, D)
    along = lambda e: np.sum(G * scan(a + e * tangent_a, b + e * tangent_b, state))  # noqa: E731
    slope = numeric_gradient(lambda e: along(e[0]), np.zeros(1))[0]
    assert_equiv(
        np.sum(da * tangent_a) + np.sum(db * tangent_b),
        slope,
        c=3e7,
        scale=max(10.0, np.abs(da).sum()),
    )


@pytest.mark.parametrize("S", [1, 5])
@pytest.mark.parametrize("chunks", [0, -1, 6])
def test_chunks_out_of_range(S, chunks):
    a, out = np.full((1, S, 2), 0.5), np.zeros((1, S, 2))
    with pytest.raises(ValueError, match="chunks: "):
        scan_into(a, a, out, Workspace(), chunks=chunks)
    assert not out.any()


@given(st.integers(0, 10_000), st.integers(1, 10_000))
def test_chunk_count_is_possible(S, width):
    assert 1 <= _chunk_count(S, width) <= max(S, 1)


def test_scan_allocates_no_array():
    a = np.full((2, 400, 700), 0.5, np.float32)
    out, ws = np.empty_like(a), Workspace()
    for chunks in (1, 28, None):
        with unbuffered():
            assert (
                traced_peak(lambda k=chunks: scan_into(a, a, out, ws, chunks=k), warmup=2) < 6_000
            )


# gates


@given(seeds, dtypes, small, st.integers(1, 40), small, st.floats(-30, 30))
def test_rg_lru_is_the_reference(seed, dtype, B, S, D, level):
    rng = np.random.default_rng(seed)
    u, r, i = normal(rng, dtype, B, S, D), *_sigmoid(3 * normal(rng, dtype, 2, B, S, D))
    decay, states = normal(rng, dtype, D) + dtype(level), np.zeros((B, S + 1, D), dtype)
    states[:, 0] = normal(rng, dtype, B, D)
    want = rg_lru(u, r, i, decay, states[:, 0].copy())
    rg_lru_into(u, r, i, decay, np.empty_like(u), states, Workspace(debug=True))
    assert_equiv(states[:, 1:], want, depth=S, scale=10 * (1 + np.abs(u).max()), c=16)


@pytest.mark.parametrize("level", [-1e4, -110.0, -90.0, -30.0, 30.0, 90.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [0.0, 1e-30, 0.5, 1.0])
def test_extreme_gates_have_finite_gradients(level, dtype, r):
    rng = np.random.default_rng(0)
    u, G = normal(rng, dtype, 2, 9, 3), normal(rng, dtype, 2, 9, 3)
    r, i, decay = np.full_like(u, r), _sigmoid(u), np.full(3, level, dtype)
    a, states, grads = (
        np.empty_like(u),
        np.ones((2, 10, 3), dtype),
        [np.empty_like(u) for _ in "uri"],
    )
    rg_lru_into(u, r, i, decay, a, states, Workspace())
    grad_decay = np.empty(3, dtype)
    rg_lru_backward_into(u, r, i, decay, a, states, G.copy(), *grads, grad_decay, Workspace())
    assert all(np.isfinite(g).all() for g in (states, a, *grads, grad_decay))
    assert 0 <= a.min() <= a.max() <= 1


@given(seeds)
def test_initial_decay(seed):
    decay = _initial_decay(200, np.random.default_rng(seed))
    at_one = np.exp(-8 * np.logaddexp(0, decay))
    assert 0.9 - 1e-9 <= at_one.min() <= at_one.max() <= 0.999 + 1e-9


# the block


@given(
    seeds, dtypes, small, st.integers(1, 200), st.integers(1, 12), st.integers(1, 20), st.booleans()
)
def test_forward_is_the_reference(seed, dtype, B, S, D, F, from_state):
    block, x, other = block_and_data(seed, B, S, D, dtype, ffn_dim=F)
    state = other[:, 0].copy() if from_state else None
    want = ssm(block.parameters(), x, state)
    got = block.forward(x) if state is None else block.forward(x, state=state)
    assert_equiv(got, want, depth=D + F + S, scale=np.abs(want).max() + 10)


@given(seeds, small, st.integers(1, 40), st.integers(1, 8), st.integers(0, 40), st.booleans())
def test_steps_are_the_sequence(seed, B, S, D, prompt, mixes):
    rng, dtype, prompt = np.random.default_rng(seed), np.float64, min(prompt, S)
    context = mixing_context(rng, D, dtype) if mixes else None
    block, x, other = block_and_data(seed, B, S, D, dtype, context, ffn_dim=5)
    start, y = other[:, 0].copy(), np.empty_like(x)
    last, state = start.copy(), start.copy()
    whole = block.forward(x, state=last).copy()
    block.start(B, S)
    block._decoding.memory["state"][...] = state
    y[:, :prompt] = block.prompt(np.ascontiguousarray(x[:, :prompt]))
    for t in range(prompt, S):
        y[:, t] = block.step(np.ascontiguousarray(x[:, t]))
    state = block._decoding.memory["state"]
    size = dict(depth=D + 5 + S, scale=np.abs(whole).max() + 10)
    assert_equiv(y, whole, **size)
    assert_equiv(state, last, **size)


@settings(max_examples=25)
@given(
    seeds, st.integers(1, 3), st.integers(1, 5), st.integers(2, 5), st.integers(1, 5), st.booleans()
)
def test_gradients(seed, B, S, D, F, mixes):
    rng = np.random.default_rng(seed)
    context = mixing_context(rng, D, np.float64) if mixes else None
    block, x, G = block_and_data(seed, B, S, D, np.float64, context, ffn_dim=F)
    block.forward(x)
    found = {"x": block.backward(G).copy()} | {
        name: g.copy() for name, g in block.gradients().items()
    }
    parameters = {name: p.copy() for name, p in block.parameters().items()}
    for (
        name,
        gradient,
    ) in found.items():  # along a random direction each; the notebook takes every entry
        tangent = normal(rng, float, *gradient.shape)

        def along(e, name=name, tangent=tangent):
            if name == "x":
                return float(np.sum(G * block.forward(x + e[0] * tangent)))
            block.parameters()[name][...] = parameters[name] + e[0] * tangent
            total = float(np.sum(G * block.forward(x)))
            block.parameters()[name][...] = parameters[name]
            return total

        slope, coarse = (numeric_gradient(along, np.zeros(1), h)[0] for h in (6e-6, 1.2e-5))
        scale = 10 + abs(slope) + np.abs(gradient * tangent).sum()
        # Two features in a norm bend quickly. What differences lose to the third derivative grows
        # with the square of the step: a third of what doubling the step changes.
        scale += abs(coarse - slope) / tolerance(np.float64, c=1e9)
        assert_equiv(np.sum(gradient * tangent), slope, c=1e9, scale=scale)


@given(
    seeds,
    small,
    st.integers(1, 200),
    st.integers(1, 40),
    st.sampled_from([None, 2, 30]),
    st.booleans(),
    st.booleans(),
)
def test_bytes_are_known_before(seed, B, S, D, F, mixes, shares):
    ws, rng = Workspace(growth="exact"), np.random.default_rng(seed)
    context = SharedAttentionContext(0.5, 0.1, workspace=ws if shares else None)
    if mixes:
        context.set_incoming(np.tanh(normal(rng, np.float32, D, D)))
    block, x, G = block_and_data(seed, B, S, D, context=context, ffn_dim=F, workspace=ws)
    block.forward(x)
    block.backward(G)
    assert ws.peak_bytes == block.workspace_bytes(B, S)


@pytest.mark.parametrize(
    "make", [_FreshWorkspace, lambda: Workspace(debug=True), lambda: Workspace(growth="exact")]
)
def test_the_workspace_does_not_matter(make):
    def run(workspace):
        block, x, G = block_and_data(3, 2, 150, 20, workspace=workspace)
        state = np.ones((2, 20), np.float32)
        if workspace is not None:
            workspace.next_generation()
        y = block.forward(x, state=state).copy()
        results = [
            y,
            state,
            block.backward(G).copy(),
            *(g.copy() for g in block.gradients().values()),
        ]
        if workspace is not None:
            workspace.next_generation()
        block.start(2, 1)
        return [*results, block.step(np.ascontiguousarray(x[:, 0])).copy()]

    assert all(map(np.array_equal, run(None), run(make())))


def test_steady_state_allocates_no_array():
    block, x, G = block_and_data(
        0, 4, 150, 64, context=mixing_context(np.random.default_rng(0), 64, np.float32)
    )
    tokens, decoder = np.repeat(x[:, 0], 64, axis=0), SSMBlock(64)
    decoder.start(256, 1000)

    def step():
        decoder.step(tokens)

    def train():
        block.forward(x)
        block.backward(G)

    for call in (train, step):
        assert traced_peak(call, warmup=2) < 20_000 < tokens.nbytes
    counts = [b.workspace.allocation_count for b in (block, decoder)]
    for call in (train, step, train, step):
        call()
    assert counts == [b.workspace.allocation_count for b in (block, decoder)]


def test_blocks_share_a_workspace():
    ws, rng = Workspace(growth="exact"), np.random.default_rng(0)
    x = normal(rng, np.float32, 2, 9, 8)
    blocks = [SSMBlock(8, ffn_dim=16, rng=np.random.default_rng(i), workspace=ws) for i in range(3)]
    alone = [SSMBlock(8, ffn_dim=16, rng=np.random.default_rng(i)) for i in range(3)]
    for _ in range(2):
        ws.next_generation()
        h, g, want_h, want_g = x, x, x, x
        for block, single in zip(blocks, alone, strict=True):
            h, want_h = block.forward(h), single.forward(want_h)
        for block, single in zip(blocks[::-1], alone[::-1], strict=True):
            g, want_g = block.backward(g), single.backward(want_g)
        assert np.array_equal(h, want_h)
        assert np.array_equal(g, want_g)
    ws.next_generation()
    for block in blocks:
        block.start(2, 9)
    for t in range(9):
        y = np.ascontiguousarray(x[:, t])
        for block in blocks:
            y = block.step(y)
        assert_equiv(y, np.ascontiguousarray(want_h[:, t]), depth=100, scale=np.abs(want_h).max())


def test_threads_with_their_own_blocks():
    def run(block, x, G):
        y = block.forward(x).copy()
        return [y, block.backward(G).copy(), *(g.copy() for g in block.gradients().values())]

    want = {seed: run(*block_and_data(seed, 2, 60, 16)) for seed in range(2)}
    got = {seed: [] for seed in want}

    def repeat(seed):
        data = block_and_data(seed, 2, 60, 16)
        for _ in range(20):
            got[seed].append(run(*data))

    threads = [threading.Thread(target=repeat, args=(seed,)) for seed in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, runs in got.items():
        assert len(runs) == 20
        assert all(
            np.array_equal(a, b)
            for results in runs
            for a, b in zip(results, want[seed], strict=True)
        )


@pytest.mark.parametrize("B", [1, 3])
def test_the_context_learns_in_a_step(B):
    rng = np.random.default_rng(0)
    block = SSMBlock(6, rng=rng, context=SharedAttentionContext(0.0, 0.1))
    tokens, twin = normal(rng, np.float32, B, 6), SharedAttentionContext(0.0, 0.1)
    block.start(B, 1)
    y = block.step(tokens)
    twin.update_step(tokens, y)
    assert np.array_equal(block.context.outgoing, twin.outgoing)


def test_states_travel():
    block, x, _ = block_and_data(0, 2, 5, 6)
    twin = SSMBlock(6)
    twin.load_state_dict(block.state_dict())
    assert np.array_equal(block.forward(x), twin.forward(x))
    before = twin.state_dict()
    for bad in (
        {},
        block.state_dict() | {"decay": np.zeros(5)},
        block.state_dict() | {"extra": np.zeros(1)},
    ):
        with pytest.raises(ValueError, match="state: "):
            twin.load_state_dict(bad)
    assert all(np.array_equal(before[name], p) for name, p in twin.state_dict().items())
    assert list(before) == list(_ssm_shapes(6, _ffn_width(6)))


# bad input


@pytest.mark.parametrize(
    "options", [dict(dim=0), dict(dim=-1), dict(dim=3, ffn_dim=0), dict(dim=3, ffn_dim=-2)]
)
def test_bad_sizes(options):
    with pytest.raises(ValueError, match="dim: "):
        SSMBlock(**options)


@pytest.mark.parametrize(
    "options",
    [dict(dim=2.5), dict(dim="3"), dict(dim=3, dtype=np.int32), dict(dim=3, workspace={})],
)
def test_bad_kinds(options):
    with pytest.raises(TypeError):
        SSMBlock(**options)


def frozen(shape):
    a = np.zeros(shape, np.float32)
    a.flags.writeable = False
    return a


SHAPES = [(3, 4), (2, 5), (4,), (2, 1, 4)]


@pytest.mark.parametrize(
    "bad",
    [
        *(np.zeros(shape, np.float32) for shape in SHAPES),
        np.zeros((2, 4)),
        [[0.0] * 4] * 2,
        0.0,
        frozen((2, 4)),
    ],
)
def test_bad_states_change_nothing(bad):
    context = SharedAttentionContext(0.5, 0.1)
    block, x, G = block_and_data(0, 2, 3, 4, context=context)
    y = block.forward(x).copy()
    learned, generation = context.outgoing.copy(), block.workspace.generation
    with pytest.raises((TypeError, ValueError), match="state: "):
        block.forward(x, state=bad)
    assert np.array_equal(context.outgoing, learned)
    assert block.workspace.generation == generation
    block.backward(G)  # of the pass before the refused ones
    assert np.array_equal(block.forward(x), y)


@pytest.mark.parametrize(
    "bad",
    [*(np.zeros(shape, np.float32) for shape in [(2, 3), (0, 4), (2, 1, 4)]), np.zeros((2, 4))],
)
def test_bad_tokens(bad):
    block = SSMBlock(4)
    block.start(2, 5)
    block.step(np.ones((2, 4), np.float32))
    before = block._decoding.memory["state"].copy()
    with pytest.raises((TypeError, ValueError), match="x: "):
        block.step(bad)
    with pytest.raises(ValueError, match="contiguous"):
        block.step(np.zeros((4, 2), np.float32).T)
    assert np.array_equal(block._decoding.memory["state"], before)
    assert block._decoding.length == 1


def test_states_that_overlap():
    block, x, _ = block_and_data(0, 2, 3, 4)
    with pytest.raises(ValueError, match="state: overlaps x"):
        block.forward(x, state=x[:, 1])


def test_order_of_calls():
    block, x, G = block_and_data(0, 2, 3, 4)
    with pytest.raises(RuntimeError, match="no forward pass"):
        block.backward(G)
    block.forward(x)
    block.start(2, 1)
    block.step(np.ascontiguousarray(x[:, 0]))
    with pytest.raises(RuntimeError, match="no forward pass"):
        block.backward(G)
    block.forward(x)
    with pytest.raises(ValueError, match="grad_out: "):
        block.backward(G[:, :2].copy())
    with pytest.raises(TypeError):
        block.forward(x, keep=None)


def test_longer_than_declared():
    block = SSMBlock(4, max_len=3)
    with pytest.raises(ValueError, match="at most 3"):
        block.forward(np.zeros((1, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"^max_len: 4, needed 1\.\.3"):
        block.start(1, 4)


# --- decays beyond 1, and near it ---


@given(seeds, st.integers(1, 60), dtypes, st.sampled_from(["mixed", "large", "hostile"]))
def test_decays_beyond_one_give_what_the_plain_scan_gives(seed, S, dtype, kind):
    rng = np.random.default_rng(seed)
    a, b = make(rng, (2, S, 3), dtype), make(rng, (2, S, 3), dtype)
    if kind == "large":  # products of a few leave the range; zeros bring the states back
        a = (10.0 ** rng.uniform(-30, 30, a.shape) * rng.integers(-1, 2, a.shape)).astype(dtype)
        b *= (rng.random(b.shape) < 0.2).astype(dtype)
    if kind == "hostile":
        a, b = make(rng, a.shape, dtype, "hostile"), make(rng, a.shape, dtype, "hostile")
    with np.errstate(all="ignore"):
        want = scan(a, b)
        size = scan(np.abs(a).astype(np.float64), np.abs(b).astype(np.float64))
        size += float(np.finfo(dtype).tiny) / float(np.finfo(dtype).eps)
        for chunks in range(1, S + 1):
            got = scan_into(a, b, np.empty_like(b), Workspace(debug=True), chunks=chunks)
            fine = np.isfinite(want) & (size < float(np.finfo(dtype).max) / 2)
            assert np.array_equal(np.isfinite(got[fine]), np.isfinite(want[fine]))
            assert_equiv(got[fine], want[fine], depth=S, scale=size[fine])


@pytest.mark.parametrize(
    ("dtype", "powers", "start"),
    [
        (np.float32, [0, -21, -21, 30, 0], 6),  # below the range, and back
        (np.float64, [0, -160, -160, 200, 0], 14),
        (np.float32, [-2, -30, -20, -2, -2], 30),  # a large state: the product leaves some of it
        (np.float64, [-2, -240, -230, -2, -2], 240),
    ],
)
def test_a_product_below_the_range_loses_no_state(dtype, powers, start):
    a = np.tile(np.power(10.0, powers), 20).astype(dtype)[None, :, None]
    b, state = np.zeros_like(a), np.full((1, 1), 10.0**start, dtype)
    tiny = np.finfo(dtype).tiny
    assert np.prod(a[:, 1:3]) < tiny
    want = scan(a, b, state)
    assert want[0, :4].min() > tiny
    for chunks in (1, 2, 20, 33):
        got = scan_into(a, b, np.empty_like(b), Workspace(), state, chunks)
        assert np.array_equal(got, want)
    # The gradient of the last state goes back through the same decays.
    back = np.concatenate([np.ones_like(state[None]), a[:, ::-1]], axis=1)
    G = np.concatenate([b, state[None]], axis=1)
    for chunks in (1, 2, 20, 33):
        got = scan_backward_into(back, None, G, np.empty_like(G), None, Workspace(), chunks)
        assert np.array_equal(got[:, -2::-1], want)


def test_products_that_overflow_send_no_nan():
    for dtype in DTYPES:
        a, b = np.full((1, 300, 2), 1e30, dtype), np.zeros((1, 300, 2), dtype)
        b[:, -1] = 1
        for chunks in (1, 7, None):
            got = scan_into(a, b, np.empty_like(b), Workspace(), chunks=chunks)
            assert np.array_equal(got, b)
            G = b[:, ::-1].copy()
            assert np.array_equal(
                scan_backward_into(a, b, G, np.empty_like(b), np.empty_like(b), Workspace()), G
            )


@given(seeds, st.sampled_from([0.99, 0.999, 0.9999, 0.99999]))
def test_states_keep_their_digits_near_decay_one(seed, most):
    rng, (S, D) = np.random.default_rng(seed), (2000, 4)
    u = normal(rng, np.float32, 1, S, D)
    r, i = _sigmoid(normal(rng, np.float32, 2, 1, S, D))
    decay = np.full(D, np.log(np.expm1(-np.log(most) / 8)), np.float32)
    a, states = np.empty_like(u), np.zeros((1, S + 1, D), np.float32)
    rg_lru_into(u, r, i, decay, a, states, Workspace())
    wide = [v.astype(np.float64) for v in (u, r, i, decay)]
    exact = rg_lru(*wide)
    assert np.abs(states[:, 1:] - exact).max() < 1e-5 * np.abs(exact).max()
    assert np.abs(rg_lru(u, r, i, decay) - exact).max() < 1e-5 * np.abs(exact).max()
    right = np.exp(-8 * np.logaddexp(0, wide[3]) * wide[1])
    assert np.abs(a - right).max() < 0.6 * np.finfo(np.float32).eps  # half a digit below 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_decays_of_every_size_keep_their_digits(dtype):
    decay = np.linspace(-60, 6, 500).astype(dtype)
    u = np.ones((1, 1, 500), dtype)
    a, states = np.empty_like(u), np.zeros((1, 2, 500), dtype)
    rg_lru_into(u, u, u, decay, a, states, Workspace())
    log_a = -8 * np.logaddexp(0, decay.astype(np.longdouble))
    limit = 16 * np.finfo(dtype).eps * (1 + np.abs(log_a))
    assert np.all(np.abs(a[0, 0] / np.exp(log_a) - 1) < limit)
    scale = np.sqrt(-np.expm1(2 * log_a))
    assert np.all(np.abs(states[0, 1] / scale - 1) < limit)
    for extreme in (-200.0, -90.0, 90.0, 1e4):
        rg_lru_into(u, u, u, np.full(500, extreme, dtype), a, states, Workspace())
        grads = [np.empty_like(u) for _ in range(3)]
        gates = (u / 2, u / 2, np.full(500, extreme, dtype))
        dh, dd = u.copy(), np.empty(500, dtype)
        rg_lru_backward_into(u, *gates, a, states, dh, *grads, dd, Workspace())
        assert all(np.isfinite(g).all() for g in (*grads, dd, dh))


# --- what is refused ---


def call_of(name):
    rng, (B, S, D), ws = np.random.default_rng(0), (2, 6, 3), Workspace()
    a = lambda *shape: normal(rng, np.float64, *shape)  # noqa: E731
    r, i = rng.random((2, B, S, D))
    u = dict(u=a(B, S, D), r=r, i=i, decay=a(D))
    return {
        "scan": (
            dict(b=a(B, S, D), a=a(B, S, D), state=a(B, D), out=a(B, S, D)),
            1,
            lambda b, a, state, out: scan_into(a, b, out, ws, state),
        ),
        "scan backward": (
            dict(a=a(B, S, D), before=a(B, S, D), g=a(B, S, D), out=a(B, S, D), grad_a=a(B, S, D)),
            2,
            lambda *given: scan_backward_into(*given, ws),
        ),
        "rg_lru": (
            u | dict(a=a(B, S, D), states=a(B, S + 1, D)),
            2,
            lambda *given: rg_lru_into(*given, ws),
        ),
        "rg_lru backward": (
            u
            | dict(a=rng.random((B, S, D)), states=a(B, S + 1, D), dh=a(B, S, D), du=a(B, S, D))
            | dict(dr=a(B, S, D), di=a(B, S, D), grad_decay=a(D)),
            5,
            lambda *given: rg_lru_backward_into(*given, ws),
        ),
    }[name]


NAMES = ("scan", "scan backward", "rg_lru", "rg_lru backward")


@pytest.mark.parametrize("name", NAMES)
def test_misfits_of_the_recurrence_are_named_and_nothing_is_written(name):
    arrays, written, call = call_of(name)
    refuses_misfits(call, arrays, written)


def test_a_gradient_of_decays_needs_the_states():
    a = np.full((1, 4, 2), 0.5)
    out, grad = np.zeros_like(a), np.zeros_like(a)
    with pytest.raises(ValueError, match=r"^before: "):
        scan_backward_into(a, None, a.copy(), out, grad, Workspace())
    with pytest.raises(ValueError, match=r"^chunks: 4, needed 1..3"):
        scan_backward_into(a, a.copy(), a.copy(), out, grad, Workspace(), 4)
    assert not out.any()
    assert not grad.any()


def test_a_state_with_entries_in_one_place_is_refused():
    block, x = SSMBlock(4, rng=np.random.default_rng(0)), np.ones((2, 4), np.float32)
    shared = np.lib.stride_tricks.as_strided(np.zeros(4, np.float32), (2, 4), (0, 4))
    with pytest.raises(ValueError, match=r"^state: entries share memory"):
        block.forward(x[:, None], state=shared)
    assert not shared.any()
