"""The diffusion block against its reference, in every option; schedules, DDIM identities, bad
input.
"""

import itertools
import math
from functools import partial

import numpy as np
import pytest
from conftest import DTYPES, dtypes, make, refuses_misfits, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlab.context import SharedAttentionContext
from ctxlab.measure import traced_peak
from ctxlab.models import diffusion as d
from ctxlab.models.block import _FreshWorkspace
from ctxlab.models.layers import _APPROXIMATE
from ctxlab.models.optimiser import AdamW
from ctxlab.testing import assert_equiv, numeric_gradient
from ctxlab.workspace import Workspace

few = settings(max_examples=25)
COSINE = d.cosine_schedule(1000)
levels = st.integers(0, 999)


def block_of(D, H, F, *, seed=1, strength=None, dtype=np.float32, **options):
    """A block whose gates are open, perhaps with a context."""
    rng, ctx = np.random.default_rng(seed), None
    if strength is not None:
        ctx = SharedAttentionContext(strength, 0.1, dtype=dtype)
        ctx.set_incoming(np.tanh(rng.standard_normal((D, D))).astype(dtype))
    block = d.DiffusionBlock(D, H, F, rng=rng, dtype=dtype, context=ctx, **options)
    for name, p in block.parameters().items():
        if name != "context.strength":
            p += 0.3 * rng.standard_normal(p.shape)
    return block


def reference(block, x, t):
    context = None if block.context is None else block.context.incoming
    return d.diffusion(
        block.parameters(),
        x,
        t,
        block.n_heads,
        n_steps=block.n_steps,
        context=context,
        approximate=block.approximate,
        eps=block.eps,
    )


def data(B, S, D, dtype=np.float32, seed=0, n_steps=1000):
    rng = np.random.default_rng(seed)
    x, G = (make(rng, (B, S, D), dtype) for _ in range(2))
    return x, G, rng.integers(0, n_steps, B)


def results(block, x, t, G):
    y = block.forward(x, t).copy()
    return [y, block.backward(G).copy(), *(g.copy() for g in block.gradients().values())]


# The schedule


@pytest.mark.parametrize("T", [1, 2, 3, 10, 100, 1000, 4000])
def test_the_schedule_falls_from_almost_one_to_almost_nothing(T):
    a = d.cosine_schedule(T)
    assert a.shape == (T,)
    assert a.dtype == np.float64
    assert np.all((a > 0) & (a < 1))
    assert np.all(np.diff(a) < 0)
    ratios = a / np.r_[1.0, a[:-1]]
    assert ratios.min() >= 0.001 * (1 - 1e-9)  # no step takes more than 99.9 % of the signal
    if T > 1:
        assert a[-1] == pytest.approx(0.001 * a[-2])
    if T >= 100:
        assert a[0] > 0.99
        assert a[-1] < 1e-5


def test_a_finer_schedule_passes_through_the_same_levels():
    coarse, fine = d.cosine_schedule(100), d.cosine_schedule(1000)
    assert_equiv(fine[9::10][:-1], coarse[:-1], depth=1000)


@pytest.mark.parametrize("T", [0, -1])
def test_a_schedule_needs_a_step(T):
    with pytest.raises(ValueError, match="n_steps"):
        d.cosine_schedule(T)


def test_a_schedule_needs_a_whole_number():
    with pytest.raises(TypeError):
        d.cosine_schedule(10.5)


@few
@given(seeds, dtypes, st.integers(1, 4), st.integers(1, 30), st.integers(1, 9))
def test_noise_is_added_level_by_level(seed, dtype, B, S, D):
    x0, noise, t = data(B, S, D, dtype, seed)
    want = d.add_noise(x0, noise, t, COSINE)
    size = np.abs(x0) + np.abs(noise)
    for out in (np.full_like(x0, np.nan), x0.copy(), noise.copy()):
        same_x0, same_noise = x0, noise
        if np.array_equal(out, x0):
            same_x0 = out
        elif np.array_equal(out, noise):
            same_noise = out
        assert_equiv(
            d._add_noise_into(same_x0, same_noise, t, COSINE, out, Workspace()), want, scale=size
        )


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 65])
def test_embeddings_differ_and_have_one_length(dim):
    e = d._timestep_embedding(np.arange(1000), dim)
    assert e.shape == (1000, dim)
    assert_equiv((e**2).sum(axis=1), np.full(1000, dim // 2, float), depth=dim, c=100)
    if dim > 3:
        assert len(np.unique(e.round(9), axis=0)) == 1000


# The block


SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 1, 6, 2, 5),
    (2, 7, 12, 3, 20),
    (3, 33, 8, 8, 8),
    (1, 300, 16, 2, 12),
]


@pytest.mark.parametrize(("B", "S", "D", "H", "F"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [None, 0.8])
def test_a_block_is_its_reference(B, S, D, H, F, dtype, strength):
    x, _, t = data(B, S, D, dtype)
    for approximate, kept in itertools.product(_APPROXIMATE, (False, True)):
        block = block_of(
            D, H, F, strength=strength, dtype=dtype, approximate=approximate, keep_weights=kept
        )
        want = reference(block, x, t)
        assert_equiv(
            block.forward(x, t), want, depth=D + F + S, scale=10 * max(1.0, np.abs(want).max())
        )


@pytest.mark.parametrize("T", [1, 7, 50])
def test_levels_are_those_of_the_blocks_own_schedule(T):
    x, _, t = data(4, 3, 4, np.float64, n_steps=T)
    block = block_of(4, 2, 6, strength=0.8, dtype=np.float64, n_steps=T)
    want = reference(block, x, t)
    assert_equiv(block.forward(x, t), want, depth=20, scale=10 * np.abs(want).max())


@pytest.mark.parametrize(
    ("B", "S", "D", "H", "F"), [(1, 1, 2, 1, 3), (3, 4, 4, 2, 6), (2, 3, 5, 1, 2)]
)
@pytest.mark.parametrize("strength", [None, 0.8])
def test_every_gradient_agrees_with_differences(B, S, D, H, F, strength):
    x, G, t = data(B, S, D, np.float64)
    block = block_of(D, H, F, strength=strength, dtype=np.float64)
    found = dict(zip(("y", "x", *block.parameters()), results(block, x, t, G), strict=True))
    parameters = block.parameters()

    def loss(name, value):
        if name == "x":
            return float(np.sum(G * reference(block, value, t)))
        kept = parameters[name].copy()
        parameters[name][...] = value
        total = float(np.sum(G * reference(block, x, t)))
        parameters[name][...] = kept
        return total

    for name in ("x", *parameters):
        at = x if name == "x" else parameters[name].copy()
        want = numeric_gradient(lambda value, name=name: loss(name, value), at)
        assert_equiv(found[name], want, c=1e8, scale=max(1.0, np.abs(want).max()))


@few
@given(seeds, levels, st.floats(-3, 3))
def test_the_strength_counts_by_the_signal(seed, level, strength):
    # One sequence at level t with strength s is one that is mixed beforehand with s
    # sqrt(alpha_bar).
    x, G, _ = data(1, 5, 4, np.float64, seed)
    t = np.array([level])
    ctx, plain = (
        block_of(4, 2, 6, strength=strength, dtype=np.float64),
        block_of(4, 2, 6, dtype=np.float64),
    )
    plain.load_state_dict({n: p for n, p in ctx.parameters().items() if n != "context.strength"})
    before = SharedAttentionContext(strength * math.sqrt(COSINE[level]), dtype=np.float64)
    before.set_incoming(ctx.context.incoming)
    h = before.apply(x, np.empty_like(x))
    y = plain.forward(h, t)
    assert_equiv(ctx.forward(x, t), y, c=1e4, scale=max(1.0, np.abs(y).max()))
    dx, ds = before.backward(x, plain.backward(G), out=np.empty_like(x))
    assert_equiv(ctx.backward(G), dx, c=1e5, scale=max(1.0, np.abs(dx).max()))
    found, want = ctx.gradients()["context.strength"], np.array([ds * math.sqrt(COSINE[level])])
    assert_equiv(found, want, c=1e5, scale=max(1.0, np.abs(G).sum() * np.abs(x).max()))


def test_sequences_do_not_meet():
    x, G, t = data(3, 6, 8, np.float64)
    block = block_of(8, 2, 12, strength=0.8, dtype=np.float64)
    together = [a.copy() for a in (block.forward(x, t), block.backward(G))]
    for b in range(3):
        alone = (
            block.forward(x[b : b + 1].copy(), t[b : b + 1]),
            block.backward(G[b : b + 1].copy()),
        )
        for a, all_of_them in zip(alone, together, strict=True):
            assert_equiv(a[0], all_of_them[b], c=1e4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_block_is_the_identity(dtype):
    x, G, t = data(2, 5, 6, dtype)
    block = d.DiffusionBlock(6, 3, 10, dtype=dtype)
    assert np.array_equal(block.forward(x, t), x)
    assert np.array_equal(block.backward(G), G)
    assert {n for n, g in block.gradients().items() if g.any()} == {
        "modulation.weight",
        "modulation.bias",
    }


OTHERS = [_FreshWorkspace, lambda: Workspace(debug=True), lambda: Workspace(growth="pow2")]


@pytest.mark.parametrize("workspace", OTHERS, ids=["fresh", "debug", "pow2"])
@pytest.mark.parametrize("strength", [None, 0.8])
def test_pooled_fresh_and_rehearsed_are_one(workspace, strength):
    x, G, t = data(3, 40, 16)
    want = results(block_of(16, 2, 24, strength=strength), x, t, G)
    got = results(block_of(16, 2, 24, strength=strength, workspace=workspace()), x, t, G)
    assert all(map(np.array_equal, got, want))


def test_a_second_pass_leaves_no_trace_of_the_first():
    x, G, t = data(2, 9, 8)
    block = block_of(8, 2, 12)
    first = results(block, x, t, G)
    results(block, *(data(4, 30, 8, seed=5)[i] for i in (0, 2, 1)))
    assert all(map(np.array_equal, results(block, x, t, G), first))


def test_levels_may_change_after_forward():
    x, G, t = data(2, 5, 8)
    block = block_of(8, 2, 12, strength=0.8)
    want = results(block, x, t, G)
    mine = t.copy()
    block.forward(x, mine)
    mine[...] = 0
    assert np.array_equal(block.backward(G), want[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [None, 0.8])
@pytest.mark.parametrize(("B", "S"), [(1, 1), (2, 17), (9, 3), (1, 200)])
def test_bytes_are_known_beforehand(B, S, dtype, strength):
    x, G, t = data(B, S, 24, dtype)
    for kept in (False, True):
        block = block_of(24, 4, 40, strength=strength, dtype=dtype, keep_weights=kept)
        block.forward(x, t)
        block.backward(G)
        assert block.workspace.peak_bytes == block.workspace_bytes(B, S)


def test_nothing_is_allocated_in_a_steady_state():
    x, G, t = data(2, 128, 64)
    block = block_of(64, 4, 128, strength=0.8)
    block.context.update_rate = 0

    def step():
        block.forward(x, t)
        block.backward(G)

    assert traced_peak(step, warmup=2) < x.nbytes / 4


def test_without_its_context_the_strength_has_no_gradient():
    x, G, t = data(2, 5, 4)
    block = block_of(4, 2, 6, strength=0.8)
    results(block, x, t, G)
    assert block.gradients()["context.strength"][0] != 0
    block.context.set_incoming(None)
    results(block, x, t, G)
    assert block.gradients()["context.strength"][0] == 0


def test_a_state_travels():
    x, _, t = data(2, 5, 4)
    block, twin = block_of(4, 2, 6, strength=0.8), block_of(4, 2, 6, seed=9, strength=0.1)
    twin.load_state_dict(block.state_dict())
    assert np.array_equal(twin.forward(x, t), block.forward(x, t))


# What is refused


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(dim=10, n_heads=3), "n_heads"),
        (dict(n_heads=0), "n_heads"),
        (dict(approximate="fast"), "approximate"),
        (dict(n_steps=0), "n_steps"),
        (dict(dtype=np.float16), "dtype"),
        (dict(workspace=3), "workspace"),
        (dict(context=SharedAttentionContext(dtype=np.float64)), "context"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises((ValueError, TypeError), match=f"^{match}: "):
        d.DiffusionBlock(**dict(dim=8, n_heads=2, ffn_dim=12) | options)


GOOD = np.array([0, 999])
BAD_LEVELS = [
    np.array([0]),
    np.array([0, 1, 2]),
    np.array([[0, 1]]),
    3,
    [0, 1000],
    [-1, 0],
    [0.0, 1.0],
    [True, False],
    ["0", "1"],
    None,
]


@pytest.mark.parametrize("t", BAD_LEVELS, ids=repr)
def test_bad_levels_are_refused_and_change_nothing(t):
    x, G, _ = data(2, 5, 8)
    block = block_of(8, 2, 12)
    want = results(block, x, GOOD, G)
    block.forward(x, GOOD)
    generation = block.workspace.generation
    with pytest.raises((ValueError, TypeError), match=r"^t: "):
        block.forward(x, t)
    assert block.workspace.generation == generation
    assert np.array_equal(block.backward(G), want[1])  # of the forward pass that was accepted


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64])
def test_any_integers_are_levels(kind):
    x, _, _ = data(2, 5, 8)
    block = block_of(8, 2, 12)
    want = block.forward(x, np.array([3, 100])).copy()
    assert np.array_equal(block.forward(x, np.array([3, 100], kind)), want)
    assert np.array_equal(block.forward(x, [3, 100]), want)


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: x.astype(np.float64),
        lambda x: x[0],
        lambda x: x[:, :, :4].copy(),
        lambda x: x[:0],
        lambda x: x[:, ::2],
        lambda x: x.tolist(),
    ],
)
def test_bad_input_is_refused(bad):
    x, _, _ = data(2, 6, 8)
    with pytest.raises((ValueError, TypeError), match=r"^x: "):
        block_of(8, 2, 12).forward(bad(x), GOOD)


def test_the_order_of_calls_is_kept():
    x, G, _ = data(2, 5, 8)
    block = block_of(8, 2, 12)
    with pytest.raises(RuntimeError, match="backward: "):
        block.backward(G)
    block.forward(x, GOOD)
    with pytest.raises(ValueError, match="grad_out: "):
        block.backward(G[:, :4].copy())
    block.backward(G)
    with pytest.raises(RuntimeError, match="backward: "):
        block.backward(G)


def test_sequences_may_have_a_limit():
    block = block_of(8, 2, 12, max_len=4)
    with pytest.raises(ValueError, match="x: 5 tokens"):
        block.forward(data(2, 5, 8)[0], GOOD)


def test_a_state_that_does_not_fit_is_refused_as_a_whole():
    block = block_of(8, 2, 12)
    before = block.state_dict()
    with pytest.raises(ValueError, match=r"time2\.weight has shape") as error:
        block.load_state_dict(before | {"time2.weight": np.zeros((2, 2)), "gate": 1})
    assert "extra gate" in str(error.value)
    assert all(np.array_equal(before[n], p) for n, p in block.state_dict().items())


# DDIM


@few
@given(seeds, levels, levels)
def test_with_the_true_noise_a_step_stays_on_the_path(seed, now, then):
    x0, noise, _ = data(1, 7, 5, np.float64, seed)
    at = [d.add_noise(x0, noise, np.array([level]), COSINE)[0] for level in (now, then)]
    ratio = math.sqrt(
        max(1.0, COSINE[then] / COSINE[now])
    )  # a division by a small signal loses digits
    size = 10 * ratio * max(np.abs(x0).max(), np.abs(noise).max())
    assert_equiv(d._ddim_step(at[0], noise[0], COSINE[now], COSINE[then]), at[1], scale=size)
    out = np.empty_like(at[0])
    got = d._ddim_step_into(at[0], noise[0], COSINE[now], COSINE[then], out, Workspace())
    assert got is out
    assert_equiv(got, at[1], scale=size)


@few
@given(seeds, levels)
def test_the_last_step_finds_the_data(seed, now):
    x0, noise, _ = data(1, 7, 5, np.float64, seed)
    x = d.add_noise(x0, noise, np.array([now]), COSINE)
    size = 10 * np.abs(noise).max() / math.sqrt(COSINE[now]) + np.abs(x0).max()
    assert_equiv(d._ddim_step(x, noise, COSINE[now], 1.0), x0, scale=size)


@few
@given(seeds, levels, levels, levels)
def test_steps_with_one_noise_can_be_joined(seed, first, second, third):
    x, noise, _ = data(1, 4, 3, np.float64, seed)
    a, b, c = COSINE[[first, second, third]]
    joined = d._ddim_step(d._ddim_step(x, noise, a, b), noise, b, c)
    size = (
        50
        * math.sqrt(max(1, b / a) * max(1, c / b, c / a))
        * (np.abs(x).max() + np.abs(noise).max())
    )
    assert_equiv(joined, d._ddim_step(x, noise, a, c), scale=size)


@few
@given(seeds, dtypes, levels)
def test_a_step_to_the_same_level_stays(seed, dtype, level):
    x, noise, _ = data(1, 6, 4, dtype, seed)
    ws, a = Workspace(), COSINE[level]
    for out in (np.empty_like(x[0]), x[0].copy()):
        got = d._ddim_step_into(x[0] if out[0, 0] != x[0, 0, 0] else out, noise[0], a, a, out, ws)
        assert_equiv(got, x[0], scale=np.abs(x).max() + np.abs(noise).max())


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, math.nan])
def test_a_level_without_signal_is_refused(value):
    x = np.ones((2, 3))
    for name, pair in (("now", (value, 0.5)), ("then", (0.5, value))):
        with pytest.raises(ValueError, match=f"^{name}: "):
            d._ddim_step_into(x, x, *pair, np.empty_like(x), Workspace())


@pytest.mark.parametrize("steps", [1, 2, 17, 1000])
def test_sampling_ends_at_the_only_point_there_is(steps):
    point = np.random.default_rng(0).standard_normal((3, 4))
    asked = []

    def predict(x, t):
        asked.append(int(t[0]))
        a = COSINE[t[0]]
        return (x - math.sqrt(a) * point) / math.sqrt(1 - a)

    x = np.random.default_rng(1).standard_normal((2, 3, 4))
    assert d.sample(predict, x, COSINE, steps) is x
    assert_equiv(x, np.stack([point, point]), c=1e6)
    assert len(asked) == len(set(asked)) == steps
    assert asked == sorted(asked, reverse=True)
    assert asked[0] == 999


def test_bad_samples_are_refused():
    x, never = np.zeros((1, 2, 3)), lambda x, t: pytest.fail("asked")
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="steps"):
            d.sample(never, x, COSINE, steps)
    read_only = x.copy()
    read_only.flags.writeable = False
    for bad in (x[0], x.swapaxes(0, 2), read_only, x.astype(int)):
        with pytest.raises((ValueError, TypeError)):
            d.sample(never, bad, COSINE, 3)


# The denoiser


def noisy(dtype=np.float32, B=3, S=6, features=5):
    rng = np.random.default_rng(2)
    x0, noise = (make(rng, (B, S, features), dtype) for _ in range(2))
    return x0, noise, np.array([10, 500, 999])[:B]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_blocks", [0, 1, 3])
def test_a_new_denoiser_is_the_best_guess_for_white_data(dtype, n_blocks):
    x0, noise, t = noisy(dtype)
    model = d.Denoiser(5, 8, 2, 12, n_blocks=n_blocks, dtype=dtype)
    x = d.add_noise(x0, noise, t, COSINE)
    want = np.sqrt(1 - COSINE[t]).astype(dtype)[:, None, None] * x
    assert_equiv(model.forward(x, t), want, scale=np.abs(x).max())


@pytest.mark.parametrize("floor", [1.0, 0.05])
def test_gradients_of_the_whole_model(floor):
    x0, noise, t = noisy(np.float64, B=2, S=3, features=2)
    model = d.Denoiser(2, 2, 1, 2, floor=floor, dtype=np.float64, rng=np.random.default_rng(0))
    rng = np.random.default_rng(1)
    for p in model.parameters().values():
        p += 0.2 * rng.standard_normal(p.shape)
    loss = model.loss(x0, noise, t)
    model.backward()
    found, x = (
        {n: g.copy() for n, g in model.gradients().items()},
        d.add_noise(x0, noise, t, COSINE),
    )
    weights = 1 / np.maximum(COSINE[t], floor)
    squares = (model.forward(x, t) - noise) ** 2
    assert_equiv(model.error(x0, noise, t), np.mean(squares), c=100)
    assert_equiv(loss, np.mean(weights[:, None, None] * squares), c=100)
    for name, p in model.parameters().items():
        at = p.copy()

        def loss(value, p=p):
            p[...] = value
            return float(np.mean(weights[:, None, None] * (model.forward(x, t) - noise) ** 2))

        want = numeric_gradient(loss, at)
        p[...] = at
        assert_equiv(found[name], want, c=1e8, scale=max(1.0, np.abs(want).max()))


def test_training_falls_and_repeats_to_the_bit():
    x0, noise, t = noisy()

    def train():
        model = d.Denoiser(5, 8, 2, 12, rng=np.random.default_rng(0))
        optimiser, errors = AdamW(model, workspace=model.workspace), []
        for _ in range(30):
            model.loss(x0, noise, t)
            model.backward()
            optimiser.step(3e-3)
            errors.append(model.error(x0, noise, t))
        return errors

    errors = train()
    assert errors == train()
    assert errors[-1] < 0.9 * errors[0]


def test_a_denoiser_allocates_once():
    x0, noise, t = noisy(B=3, S=64)
    model = d.Denoiser(5, 8, 2, 12)
    model.loss(x0, noise, t)
    model.backward()
    model.error(x0, noise, t)
    count = model.workspace.allocation_count
    for _ in range(3):
        model.loss(x0[:, :40].copy(), noise[:, :40].copy(), t)
        model.backward()
        model.error(x0[:, :40].copy(), noise[:, :40].copy(), t)
    assert model.workspace.allocation_count == count


def test_a_denoiser_hands_on_what_was_learned_before_and_learns_when_told():
    x0, noise, t = noisy()
    model = d.Denoiser(5, 8, 2, 12, strength=0.5, rng=np.random.default_rng(0))
    first, second = (block.context for block in model.blocks)
    model.loss(x0, noise, t)
    assert second.incoming is None
    learned = first.outgoing.copy()
    assert np.any(learned)
    for call in (model.error, partial(model.loss, learn=False)):
        call(x0, noise, t)
        assert np.array_equal(second.incoming, learned)
        assert np.array_equal(first.outgoing, learned)
    model.loss(x0, noise, t)
    assert np.array_equal(second.incoming, learned)
    assert not np.array_equal(first.outgoing, learned)


def test_levels_that_change_after_the_loss_change_no_gradient():
    x0, noise, t = noisy()
    model = d.Denoiser(5, 8, 2, 12, rng=np.random.default_rng(0))
    found = []
    for later in (t.copy(), np.zeros_like(t)):
        levels = t.copy()
        model.loss(x0, noise, levels)
        levels[:] = later
        model.backward()
        found.append({name: g.copy() for name, g in model.gradients().items()})
    assert all(np.array_equal(g, found[1][name]) for name, g in found[0].items())
    assert np.any(found[0]["out.weight"])


def test_a_denoiser_names_what_is_wrong():
    x0, noise, t = noisy()
    model = d.Denoiser(5, 8, 2, 12, max_len=6)
    long = np.zeros((3, 7, 5), np.float32)
    for bad in (x0[:, :, :4].copy(), x0[:0], x0[:, :0], long, x0[:, ::2], x0.astype(np.float64)):
        with pytest.raises((ValueError, TypeError), match=r"^x: "):
            model.forward(bad, t)
    with pytest.raises(ValueError, match=r"^t: "):
        model.forward(x0, t + 1)
    with pytest.raises(RuntimeError, match=r"^backward: "):
        model.backward(noise)
    model.forward(x0, t)
    with pytest.raises(ValueError, match=r"^grad_out: "):
        model.backward(noise[:2].copy())
    model.workspace.next_generation()
    with pytest.raises(
        RuntimeError, match=r"^backward: the forward pass was in generation 2 .* 3$"
    ):
        model.backward(noise)
    with pytest.raises(TypeError, match=r"^workspace: dict is no "):
        d.Denoiser(5, 8, 2, 12, workspace={})
    for floor in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"^floor: "):
            d.Denoiser(5, 8, 2, 12, floor=floor)
    for call in (model.loss, model.error):
        with pytest.raises(ValueError, match=r"^noise: "):
            call(x0, noise[:2].copy(), t)
        with pytest.raises(ValueError, match=r"^x0: "):
            call(long, long, t)
    model.forward(x0, t)
    with pytest.raises(
        RuntimeError, match=r"^backward: follows forward\(\), so grad_out is needed"
    ):
        model.backward()


# What is refused, and tails


def call_of(name):
    rng, ws = np.random.default_rng(0), Workspace()
    a = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    x, t = a(6, 4), np.array([3, 7])
    return {
        "combine": (
            dict(x=x, y=a(6, 4), out=a(6, 4)),
            1,
            lambda x, y, out: d._combine_into(x, y, 0.5, 2.0, out, ws),
        ),
        "add_noise": (
            dict(x0=a(2, 3, 4), noise=a(2, 3, 4), out=a(2, 3, 4)),
            1,
            lambda x, e, out: d._add_noise_into(x, e, t, COSINE, out, ws),
        ),
        "silu": (dict(a=x, out=a(6, 4)), 1, d.silu_into),
        "silu backward": (
            dict(a=x, grad_out=a(6, 4), out=a(6, 4)),
            1,
            lambda *given: d.silu_backward_into(*given, ws),
        ),
        "part way": (dict(start=x, out=a(6, 4)), 1, lambda x, out: d._part_way_into(x, out, 0.5)),
        "ddim": (
            dict(x=x, y=a(6, 4), out=a(6, 4)),
            1,
            lambda x, e, out: d._ddim_step_into(x, e, 0.5, 0.9, out, ws),
        ),
    }[name]


@pytest.mark.parametrize(
    "name",
    ["combine", "add_noise", "silu", "silu backward", "part way", "ddim"],
)
def test_misfits_are_named_and_nothing_is_written(name):
    arrays, written, call = call_of(name)
    refuses_misfits(call, arrays, written)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_keeps_its_tails(dtype):
    a = np.linspace(-87, 60, 4001).astype(dtype)
    wide, ones = a.astype(np.longdouble), np.ones_like(a)
    sigma, rows = 1 / (1 + np.exp(-wide)), a != 0
    limit = 16 * np.finfo(dtype).eps
    for got in (d.silu(a), d.silu_into(a, np.empty_like(a))):
        assert np.max(np.abs(got / (wide * sigma) - 1)[rows]) < limit
    slope = sigma * (1 + wide * (1 - sigma))
    got = d.silu_backward_into(a, ones, np.empty_like(a), Workspace())
    assert np.max(np.abs(got - slope) / sigma / (1 + np.abs(a))) < limit
    big = np.array([-np.finfo(dtype).max, -1e30, 1e30, np.finfo(dtype).max], dtype)
    got = d.silu_backward_into(big, np.ones_like(big), np.empty_like(big), Workspace())
    assert np.array_equal(got, np.array([0, 0, 1, 1], dtype))


@pytest.mark.parametrize(
    "bad", [np.float64(0.5), np.ones((3, 1)), np.array([0.5, 0.0]), [1.5], [np.nan]]
)
def test_a_schedule_that_cannot_be_walked_is_named(bad):
    x = np.ones((1, 2, 3))
    with pytest.raises(ValueError, match=r"^alpha_bar: "):
        d.sample(lambda x, t: 0 * x, x, bad, 1)
    assert (x == 1).all()
