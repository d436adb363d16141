"""`SharedAttentionContext` against the reference: any input, any order of calls, many threads."""

import contextlib
import copy
import io
import math
import pickle
import threading
import tracemalloc
from functools import partial

import numpy as np
import pytest
from conftest import DTYPES, LAYOUTS, dtypes, kinds, lay, layouts, make, seeds
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ctxlab.context import (
    SharedAttentionContext,
    _fold,
    _Gate,
    _is_usual,
    _largest_square,
    _panel_shape,
    _spread,
    _standardise,
    _update_requirement,
    backward_into,
    update_into,
    update_step_into,
)
from ctxlab.measure import traced_peak
from ctxlab.reference import (
    apply_context,
    apply_context_vjp,
    context_gradient,
    ema,
    sample_rows,
    similarity,
    similarity_step,
)
from ctxlab.testing import assert_equiv
from ctxlab.workspace import Workspace

STRENGTHS = [0.0, 0.5, -1.3, 1 / 3, 100.0, 1e-12, 1e-40, 1e30, -1e30]
RATES = [0.0, 1e-12, 0.01, 0.5, 1.0]
floors = st.sampled_from([0.0, 1e-12, 3.0])
strengths, rates = st.sampled_from(STRENGTHS), st.sampled_from(RATES)
widths, lengths = st.integers(1, 7), st.integers(0, 9)


def context(C=None, strength=0.5, rate=0.1, dtype=np.float32, **options):
    ctx = SharedAttentionContext(strength, rate, dtype=dtype, **options)
    ctx.set_incoming(C)
    return ctx


# --- what "equals the reference" means ---
#
# Sums of D products are allowed what `tolerance` gives, times the size of their terms. Below the
# smallest normal number, `tiny`, rounding no longer shrinks with the number: hence the `+ tiny`.
# Where the size of the terms leaves the range of the dtype (or is not a number) sums may overflow
# in one order and not in another. There the package must have taken the reference's own path, and
# no difference at all is allowed.


def held_to(actual, expected, scale, depth, dtype):
    with np.errstate(all="ignore"):
        scale = np.where(np.isfinite(np.asarray(scale).astype(dtype)), scale, 0.0)
    c = 4 * float(np.finfo(dtype).eps / np.finfo(expected.dtype).eps)
    assert_equiv(actual, expected, depth=depth, scale=scale, c=c)


def sizes_of(*arrays):
    return [np.abs(a.astype(np.float64)) for a in arrays]


def assert_applies(out, x, C, s):
    """`out` is what `apply` must give for these."""
    with np.errstate(all="ignore"):
        if C is None or s == 0:
            assert_equiv(out, x, scale=0.0)
            return
        rows = x.reshape(-1, len(C)) if x.ndim == 3 else x
        want = apply_context(rows, C, s).reshape(x.shape)
        X, size, tiny = *sizes_of(x, C), np.finfo(x.dtype).tiny
        factor = abs(s) / len(C)
        scale = X @ (np.eye(len(C)) + factor * size + tiny) + tiny * (1 + factor)
    held_to(out, want, scale, len(C), x.dtype)


def assert_gradients(got, x, C, s, G):
    """`got` is what `backward` must give for these."""
    grad_x, grad_s = got
    with np.errstate(all="ignore"):
        if C is None:
            assert_equiv(grad_x, G, scale=0.0)
            assert grad_s == 0
            return
        X, g = (a.reshape(-1, len(C)) for a in (x, G))
        want_x, want_s = apply_context_vjp(X, C, s, g)
        tiny, factor, D = np.finfo(x.dtype).tiny, abs(s) / len(C), len(C)
        xs, cs, gs = sizes_of(X, C, g)
        scale_x = gs + factor * (gs @ cs.T + tiny)
        # What is not finite is no term of the sum: entries of G, and whole rows of X C.
        xs[~np.isfinite(xs).all(axis=1)] = 0
        gs[~np.isfinite(gs)] = 0
        scale_s = np.sum((gs @ cs.T + tiny) * xs + tiny * (gs + 1)) / D
        roots = np.sqrt(np.sum(gs**2 @ cs.T**2 * xs**2)) + tiny * np.sum(xs + gs + 1)
        if np.isfinite(x.dtype.type(scale_s)):
            scale_s = min(scale_s, roots / D)
    held_to(grad_x, want_x.reshape(x.shape), scale_x.reshape(x.shape), D, x.dtype)
    held_to(grad_s, np.float64(want_s), scale_s, D + int(np.sqrt(x.size)), x.dtype)


def assert_learned(outgoing, before, sim, rate, n):
    with np.errstate(all="ignore"):
        want = ema(before, sim, rate)
    size = rate + np.abs(0.0 if before is None else before) + np.finfo(sim.dtype).tiny
    held_to(outgoing, want, size, n, sim.dtype)


@pytest.fixture(autouse=True)
def _quiet():
    """Overflow is a subject here; NumPy's warnings about it, which the reference gives, are not."""
    with np.errstate(all="ignore"):
        yield


# --- apply and backward ---


@given(
    seeds,
    lengths,
    widths,
    dtypes,
    kinds,
    kinds,
    strengths,
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_apply_is_the_reference(seed, S, D, dtype, kind_x, kind_c, s, ndim, into):
    rng = np.random.default_rng(seed)
    x = make(rng, {1: (D,), 2: (S, D), 3: (2, S, D)}[ndim], dtype, kind_x)
    C = make(rng, (D, D), dtype, kind_c)
    ctx, kept = context(C, s, dtype=dtype), x.copy()
    out = np.full_like(x, np.nan) if into else None
    got = ctx.apply(x, out=out)
    assert got is out if into else (got is x) == (s == 0)
    assert_applies(got, kept, C, s)
    assert np.array_equal(x, kept, equal_nan=True)


@given(
    seeds,
    lengths,
    widths,
    dtypes,
    kinds,
    kinds,
    kinds,
    strengths,
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_backward_is_the_reference(seed, S, D, dtype, kind_x, kind_c, kind_g, s, ndim, into):
    rng = np.random.default_rng(seed)
    shape = {1: (D,), 2: (S, D), 3: (2, S, D)}[ndim]
    x, G = make(rng, shape, dtype, kind_x), make(rng, shape, dtype, kind_g)
    C = make(rng, (D, D), dtype, kind_c)
    kept, out = (x.copy(), G.copy()), np.full_like(x, np.nan) if into else None
    got = context(C, s, dtype=dtype).backward(x, G, out=out)
    assert (got[0] is out) == into
    assert type(got[1]) is float
    assert_gradients(got, kept[0], C, s, kept[1])
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip((x, G), kept, strict=True))


@given(
    seeds,
    lengths,
    widths,
    dtypes,
    kinds,
    kinds,
    st.sampled_from([0.0, 0.5, -3.0, 1e-12]),
    st.booleans(),
)
def test_context_gradient_is_the_reference(seed, S, D, dtype, kind_x, kind_g, s, into):
    rng = np.random.default_rng(seed)
    x, G = make(rng, (2, S, D), dtype, kind_x), make(rng, (2, S, D), dtype, kind_g)
    ctx = context(None, s, dtype=dtype)  # it does not depend on the context itself
    for shape in ((2, S, D), (2 * S, D)):
        out = np.full((D, D), np.nan, dtype) if into else None
        got = ctx.context_gradient(x.reshape(shape), G.reshape(shape), out=out)
        assert (got is out) == into
        X, g = x.reshape(-1, D), G.reshape(-1, D)
        xs, gs = sizes_of(X, g)
        # Where x^T G may overflow the scale is not finite, whatever the strength.
        scale = (xs.T @ gs).astype(dtype) + np.finfo(dtype).tiny
        size = scale * (abs(s) / D) + np.finfo(dtype).tiny
        held_to(got, context_gradient(X, s, g), size, 2 * S + 2, dtype)


def test_a_contexts_gradient_is_refused_what_apply_is_refused():
    ctx = context(C4)
    for x, G, out in (
        (X, Y[:5], None),
        (X[:, ::2], Y[:, ::2], None),
        (X, Y, np.empty((4, 5), np.float32)),
        (X[:4], Y[:4], X[:4]),
        (X, Y, np.empty((4, 8), np.float32)[:, ::2]),
    ):
        with pytest.raises(ValueError, match=r"^(x|grad_out|out): "):
            ctx.context_gradient(x, G, out=out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_strength_gradient_of_large_finite_values(dtype):
    # x C and G C^T are far within the range, and so is the reference's sum; (G C^T) * x are not.
    big = float(np.sqrt(np.finfo(dtype).max)) / 100
    C = np.array([[1, 0], [0, 1]], dtype) * dtype(1e6)
    x, G = np.array([[big, big]], dtype), np.array([[big, -big]], dtype)
    assert_gradients(context(C, dtype=dtype).backward(x, G), x, C, 0.5, G)


@pytest.mark.parametrize("s", [0.5, 1e-8, 1e-11])
def test_the_strength_gradient_of_small_gradients(s):
    # Every factor and the result are normal float32 numbers; the entries of (s/D) G C^T are not.
    x, C, G = make(np.random.default_rng(0), (3, 4, 4))
    G *= np.float32(1e-32)
    assert_gradients(context(C, s).backward(x, G), x, C, s, G)


@given(seeds, lengths, widths, layouts, layouts, layouts)
def test_layouts_change_nothing(seed, S, D, lx, lg, lo):
    rng = np.random.default_rng(seed)
    x, G, C = make(rng, (S, D)), make(rng, (S, D)), make(rng, (D, D))
    ctx, out = context(C), lay(np.full((S, D), np.nan, np.float32), lo)
    ctx.set_incoming(lay(C, lx))
    assert_applies(ctx.apply(lay(x, lx), out=out), x, C, 0.5)
    assert_gradients(ctx.backward(lay(x, lx), lay(G, lg), out=out), x, C, 0.5, G)
    # Nothing to mix is a copy into `out`, whatever its layout.
    ctx.set_incoming(None)
    assert_applies(ctx.apply(lay(x, lx), out=out), x, None, 0.5)
    assert_gradients(ctx.backward(lay(x, lx), lay(G, lg), out=out), x, None, 0.5, G)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("S", "D"), [(2, 200), (70, 1), (50, 300), (700, 65), (1000, 129)])
def test_sizes_that_need_several_panels(S, D, dtype):
    rng = np.random.default_rng(S)
    x, y, G = (make(rng, (S, D), dtype) for _ in range(3))
    C = similarity(x, y)
    ctx = context(C, rate=0.25, dtype=dtype)
    assert_applies(ctx.apply(x), x, C, 0.5)
    assert_gradients(ctx.backward(x, G), x, C, 0.5, G)
    for _ in range(2):
        before = None if ctx.outgoing is None else ctx.outgoing.copy()
        ctx.update(x, y)
        assert_learned(ctx.outgoing, before, similarity(x, y), 0.25, 32)
    for tokens in (0, slice(0, 2)):
        before = ctx.outgoing.copy()
        ctx.update_step(x[tokens], y[tokens])
        assert_learned(ctx.outgoing, before, similarity_step(x[tokens], y[tokens]), 0.25, D)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["x", "C", "G"])
def test_one_value_that_is_not_finite(place, value, dtype):
    rng = np.random.default_rng(2)
    arrays = {name: make(rng, (4, 4), dtype) for name in "xCG"}
    for i in range(4):
        for j in range(4):
            spoilt = {name: a.copy() for name, a in arrays.items()}
            spoilt[place][i, j] = value
            x, C, G = spoilt.values()
            ctx = context(C, dtype=dtype)
            assert_applies(ctx.apply(x), x, C, 0.5)
            assert_gradients(ctx.backward(x, G), x, C, 0.5, G)


# --- spoilt rows ---

SPOILT = {
    "NaN": [np.nan],
    "inf": [np.inf],
    "-inf": [-np.inf],
    "both infinities": [np.inf, -np.inf],
    "all kinds": [np.nan, np.inf, -np.inf],
    "large": [1e30],
    "large and NaN": [1e30, np.nan, -1e30],
    "largest": ["max"],
}


def spoil(a, rng, rows, values):
    """A copy in which some of the entries of these rows have such values."""
    a = a.copy()
    top = float(np.finfo(a.dtype).max)
    for row in rows:
        columns = rng.permutation(a.shape[1])[: rng.integers(1, 4)]
        a[row, columns] = [top if v == "max" else v for v in rng.choice(values, len(columns))]
    return a


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("n", [1, 2, 7, 30], ids="{} rows".format)
def test_spoilt_rows_of_a_batch(n, values, dtype):
    rng = np.random.default_rng(n)
    for S, D, s in [(30, 1, 0.5), (30, 5, -2.0), (70, 33, 1e-3)]:
        x, G, C = make(rng, (S, D), dtype), make(rng, (S, D), dtype), make(rng, (D, D), dtype)
        some, others = (rng.choice(S, n, replace=False) for _ in range(2))
        bad, bad_G = spoil(x, rng, some, values), spoil(G, rng, others, values)
        for layout in ("C", "columns", "F"):
            ctx, out = context(C, s, dtype=dtype), lay(np.zeros_like(x), layout)
            for a, g in ((bad, G), (x, bad_G), (bad, bad_G)):
                a, g = lay(a, layout), lay(g, layout)
                assert_applies(ctx.apply(a, out=out), a, C, s)
                assert_gradients(ctx.backward(a, g, out=out), a, C, s, g)
        batches = bad.reshape(2, S // 2, D), bad_G.reshape(2, S // 2, D)
        assert_applies(ctx.apply(batches[0]), batches[0], C, s)
        assert_gradients(ctx.backward(*batches), batches[0], C, s, batches[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_context(values, dtype):
    rng = np.random.default_rng(3)
    x, G, C = make(rng, (40, 6), dtype), make(rng, (40, 6), dtype), make(rng, (6, 6), dtype)
    x[::3, ::2] = 0  # and 0 times infinity is no number
    for rows in ([0], [2, 5], range(6)):
        ctx = context(spoil(C, rng, rows, values), dtype=dtype)
        for a in (x, spoil(x, rng, [4], [np.nan]), 1e10 * x):
            assert_applies(ctx.apply(a), a, ctx.incoming, 0.5)
            assert_gradients(ctx.backward(a, G), a, ctx.incoming, 0.5, G)


@given(seeds, st.integers(20, 60), widths, dtypes, kinds, kinds, kinds, strengths)
def test_long_batches_are_the_reference(seed, S, D, dtype, kind_x, kind_c, kind_g, s):
    rng = np.random.default_rng(seed)
    x, G = make(rng, (S, D), dtype, kind_x), make(rng, (S, D), dtype, kind_g)
    C = make(rng, (D, D), dtype, kind_c)
    ctx = context(C, s, dtype=dtype)
    assert_applies(ctx.apply(x), x, C, s)
    assert_gradients(ctx.backward(x, G), x, C, s, G)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["x", "grad_out", "context"])
def test_what_is_not_finite_is_no_warning_and_needs_no_batch_of_memory(place, value):
    rng = np.random.default_rng(5)
    shapes = dict(x=(300, 96), grad_out=(300, 96), context=(96, 96))
    arrays = {name: make(rng, shape) for name, shape in shapes.items()}
    arrays[place][17, 5:7] = value, -value  # whose sum is no number
    x, G, C = arrays.values()
    ctx, out = context(C), np.empty_like(x)
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        assert traced_peak(lambda: ctx.apply(x, out=out), warmup=2) < x.nbytes / 4
        if place != "context":  # whose rule for backward is the reference's
            assert traced_peak(lambda: ctx.backward(x, G, out=out), warmup=2) < x.nbytes / 4


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_what_is_not_finite_needs_no_matrix_of_memory_to_learn_from(value):
    x, y = make(np.random.default_rng(0), (2, 64, 256))
    x[0, 3] = value
    ctx = context(rate=0.5)
    for learn, rows in ((ctx.update, 64), (ctx.update_step, 32)):
        assert traced_peak(lambda learn=learn, n=rows: learn(x[:n], y[:n]), warmup=2) < 32 * 256 * 4


def test_an_overflow_in_one_row_leaves_the_output():
    x, C = np.full((40, 2), 1.0, np.float32), np.full((2, 2), 1e5, np.float32)
    x[3] = 1e18
    x[5, 0] = np.nan
    ctx, out = context(C, 1e16), np.full_like(x, 7)
    for call in (lambda: ctx.apply(x, out=out), lambda: ctx.backward(x, x, out=out)):
        with np.errstate(over="raise"), pytest.raises(FloatingPointError):
            call()
        assert (out == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_on_squares_is_the_bound_on_norms(dtype):
    dtype = np.dtype(dtype)
    limit = float(np.finfo(dtype).max) / 8
    for norm in (0.0, 1e-3, 1.0, 7.0, 1e30, limit / 2):
        largest = _largest_square(dtype, norm)
        assert max(norm, 1.0) * math.sqrt(largest) <= limit * (1 + 1e-6)
        assert math.isfinite(dtype.type(largest))
        assert largest >= min(1.0, limit / max(norm, 1.0))
    for norm in (limit, 2 * limit, math.inf, math.nan):
        assert _largest_square(dtype, norm) == 0


# --- update ---


@given(
    seeds,
    st.integers(2, 70),
    st.integers(0, 7),
    dtypes,
    kinds,
    kinds,
    rates,
    st.sampled_from([2, 5, 32, None]),
    st.sampled_from(LAYOUTS),
    floors,
)
def test_update_is_the_reference(seed, S, D, dtype, kind_x, kind_y, rate, max_rows, layout, floor):
    rng = np.random.default_rng(seed)
    ctx, before = context(rate=rate, dtype=dtype, max_rows=max_rows, floor=floor), None
    for _ in range(3):
        x, y = make(rng, (S, D), dtype, kind_x), make(rng, (S, D), dtype, kind_y)
        ctx.update(lay(x, layout), y)
        if rate == 0:
            assert ctx.outgoing is None
            assert ctx.nbytes == 0
            continue
        assert_learned(
            ctx.outgoing,
            before,
            similarity(x, y, max_rows=max_rows, floor=floor),
            rate,
            min(S, max_rows or S),
        )
        before = ctx.outgoing.copy()


@given(seeds, st.integers(0, 5), st.integers(0, 9), dtypes, kinds, kinds, rates, floors)
def test_update_step_is_the_reference(seed, B, D, dtype, kind_x, kind_y, rate, floor):
    rng, shape = np.random.default_rng(seed), (B, D) if B else (D,)
    ctx, before = context(rate=rate, dtype=dtype, floor=floor), None
    for _ in range(3):
        x, y = make(rng, shape, dtype, kind_x), make(rng, shape, dtype, kind_y)
        ctx.update_step(x, y)
        if rate == 0:
            assert ctx.outgoing is None
            continue
        want = similarity_step(x, y, floor=floor)
        assert_learned(ctx.outgoing, before, want, rate, max(B * D, 1))
        before = ctx.outgoing.copy()


@given(seeds, st.integers(2, 20), st.data())
def test_rows_may_be_chosen(seed, S, data):
    x, y = make(np.random.default_rng(seed), (2, S, 3))
    rows = data.draw(
        st.lists(st.integers(0, S - 1), min_size=2, max_size=9)
    )  # in any order, and repeated
    rows += [(rows[0] + 1) % S]
    ctx = context(rate=1.0)
    for given_ in (rows, np.array(rows, np.uint8)):
        ctx.update(x, y, rows=given_)
        assert_learned(ctx.outgoing, None, similarity(x, y, rows=np.array(rows)), 1.0, len(rows))


@pytest.mark.parametrize("rows", [[], [2], [3, 3, 3]], ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_fewer_than_two_rows_are_refused_and_weaken_nothing(rate, rows):
    ctx = context(rate=0.5)
    ctx.update(X, Y)
    before, ctx.update_rate = ctx.outgoing.copy(), rate
    for call in (
        lambda: ctx.update(X, Y, rows=np.array(rows, int)),
        lambda: ctx.update(X[: min(len(rows), 1)], Y[: min(len(rows), 1)]),
    ):
        with pytest.raises(ValueError, match=r"^rows: fewer than two .* update_step"):
            call()
    assert np.array_equal(ctx.outgoing, before)


@given(seeds, st.integers(2, 40), st.integers(0, 6), st.integers(0, 3), st.integers(0, 3))
def test_dim_uses_the_first_columns_of_both(seed, S, dim, more_x, more_y):
    rng = np.random.default_rng(seed)
    x, y = make(rng, (S, dim + more_x)), make(rng, (S, dim + more_y))
    ctx, plain = context(rate=1.0), context(rate=1.0)
    ctx.update(x, y, dim=dim)
    plain.update(x[:, :dim], y[:, :dim])
    assert_equiv(ctx.outgoing, plain.outgoing, scale=0.0)
    for tokens in (0, slice(0, 2)):
        ctx.update_step(x[tokens], y[tokens], dim=dim)
        plain.update_step(x[tokens][..., :dim], y[tokens][..., :dim])
        assert_equiv(ctx.outgoing, plain.outgoing, scale=0.0)


@pytest.mark.parametrize(("size_x", "size_y"), [(1e150, 1e-160), (1e160, 1e-170), (1e-160, 1e155)])
@pytest.mark.parametrize("how", ["update", "update_step"])
def test_norms_whose_squares_underflow(how, size_x, size_y):
    # float64 only: no float32 column has a norm whose square is not a float64.
    x, y = make(np.random.default_rng(0), (2, 16, 3), np.float64)
    x, y, ctx = x * size_x, y * size_y, context(rate=1.0, dtype=np.float64)
    if how == "update":
        ctx.update(x, y)
        assert_learned(ctx.outgoing, None, similarity(x, y), 1.0, 16)
    else:
        ctx.update_step(x[:, 0].copy(), y[:, 0].copy())
        assert_learned(ctx.outgoing, None, similarity_step(x[:, 0], y[:, 0]), 1.0, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("floor", [0.5, 2.0])
@pytest.mark.parametrize("D", [3, 300])
def test_the_floor_is_on_the_product_of_norms(D, floor, dtype):
    # Norms of x from 1e-15 to 1, of y all 1e-6 or so: some products lie below 1e-12, some above.
    rng = np.random.default_rng(4)
    x, y = make(rng, (8, D), np.float64), make(rng, (8, D), np.float64)
    x *= np.geomspace(1e-15, 1, D)
    y *= 1e-6 * floor
    x, y = x.astype(dtype), y.astype(dtype)
    ctx, want = context(rate=1.0, dtype=dtype), similarity(x, y)
    assert (want == 0).any()
    assert (want != 0).any()
    ctx.update(x, y)
    assert_learned(ctx.outgoing, None, want, 1.0, 8)


def test_what_is_learned_stays_within_its_bound():
    x = make(np.random.default_rng(0), (64, 9), kind="steps")
    ctx = context(rate=0.3)
    for _ in range(30):
        ctx.update(x, x)
        ctx.update_step(x[0], x[0])
        assert np.max(np.abs(ctx.outgoing)) <= math.tanh(1) + 1e-6


def test_a_context_may_learn_from_what_it_handed_out():
    x = make(np.random.default_rng(0), (16, 5))
    ctx, before = context(rate=0.5), None
    for _ in range(3):
        ctx.update(x, x)
        before = ctx.outgoing.copy()
        ctx.update(ctx.outgoing, ctx.outgoing.T)
        assert_learned(ctx.outgoing, before, similarity(before, before.T.copy()), 0.5, 5)


@given(
    seeds,
    st.integers(2, 40),
    widths,
    dtypes,
    st.sampled_from(["normal", "steps", "tiny", "hostile"]),
)
def test_guards_are_silent(seed, S, D, dtype, kind):
    # Zero norms, values not finite and the floor are expected: none of them is worth a warning.
    rng = np.random.default_rng(seed)
    x, y = make(rng, (S, D), dtype, kind), make(rng, (S, D), dtype, kind)
    ctx = context(similarity(x, y), rate=0.5, dtype=dtype)
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        ctx.update(x, y)
        ctx.update_step(x[0], y[0])
        ctx.apply(x)
        if kind != "hostile":  # where the reference itself sums infinities
            ctx.backward(x, y)


# --- an oracle of its own ---
#
# The package imports the reference's centring for unusual values, so comparing the two cannot show
# a fault in it. This is the definition in extended precision, with exponents that fit the squares.

EXTENDED = np.finfo(np.longdouble).maxexp > 10_000
extended = pytest.mark.skipif(not EXTENDED, reason="long double has the range of double here")


def centred(a, axis):
    a = np.where(np.isfinite(a), a, 0).astype(np.longdouble)
    a = a - a.take([0], axis)
    return a - a.mean(axis, keepdims=True)


def tanh_of(c, d, floor):
    return np.tanh(np.where(d > floor, c / np.where(d > 0, d, 1), 0).astype(np.float64))


def rows_by_definition(x, y, floor):
    X, Y = centred(x, 0), centred(y, 0)
    d = np.sqrt(np.multiply.outer((X * X).sum(0), (Y * Y).sum(0)))
    return tanh_of(X.T @ Y, d, floor)


def tokens_by_definition(x, y, floor):
    X, Y = centred(x, 1), centred(y, 1)
    d = np.sqrt((X * X).sum(1) * (Y * Y).sum(1))[:, None, None]
    return tanh_of(X[:, :, None] * Y[:, None, :], d, floor).mean(0)


@extended
@given(seeds, st.integers(2, 40), widths, dtypes, kinds, kinds, floors)
def test_what_is_learned_is_the_definition(seed, n, D, dtype, kind_x, kind_y, floor):
    rng = np.random.default_rng(seed)
    x, y = make(rng, (n, D), dtype, kind_x), make(rng, (n, D), dtype, kind_y)
    for learn, definition in (
        (SharedAttentionContext.update, rows_by_definition),
        (SharedAttentionContext.update_step, tokens_by_definition),
    ):
        ctx = context(rate=1.0, dtype=dtype, max_rows=None, floor=floor)
        learn(ctx, x, y)
        want = definition(x, y, floor).astype(dtype)
        assert_equiv(ctx.outgoing, want, depth=8 * n * D, scale=np.ones((D, D)))


@pytest.mark.parametrize("how", ["update", "update_step"])
@pytest.mark.parametrize(("floor", "kept"), [(1.0, False), (1 + 1e-9, False), (1 - 1e-9, True)])
def test_a_product_of_norms_at_the_floor_counts_as_none(how, floor, kept):
    x = np.array([1.0, 1.0, -1.0, -1.0]).repeat(4).reshape(4, 4)  # norms of 2, exactly
    ctx = context(rate=1.0, dtype=np.float64, floor=floor)
    if how == "update":
        ctx.update(x, x / 4)
    else:
        ctx.update_step(x.T, x.T / 4)
    assert ctx.outgoing.any() == kept


# --- tokens ---


def learned(x, y, rate=1.0, **options):
    ctx = context(rate=rate, dtype=x.dtype, **options)
    ctx.update_step(x, y)
    return ctx.outgoing


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_token_statistic_does_not_depend_on_the_batch(dtype):
    x, y = make(np.random.default_rng(0), (2, 64, 16), dtype)
    single = [learned(a, b) for a, b in zip(x, y, strict=True)]
    assert np.array_equal(learned(x[:1], y[:1]), single[0])
    size = np.abs(np.array(single)).mean(0)
    assert_equiv(learned(x, y), np.mean(single, 0), depth=64, scale=size)
    assert_equiv(learned(x[::-1], y[::-1]), learned(x, y), depth=64, scale=size)
    for B in (2, 7):
        copies = learned(x[[3] * B], y[[3] * B])
        assert_equiv(copies, single[3], depth=B, scale=np.abs(single[3]))
    # The same tokens in batches of any size: the mean of what the batches teach is the same.
    for B in (1, 2, 8):
        batches = [learned(x[i : i + B], y[i : i + B]) for i in range(0, 64, B)]
        assert_equiv(np.mean(batches, 0), np.mean(single, 0), depth=64, scale=size)


def test_what_one_token_teaches_is_small_whatever_the_batch():
    # The batch form over two rows gives tanh 1 everywhere.
    x, y = make(np.random.default_rng(0), (2, 32, 16))
    medians = [float(np.median(np.abs(learned(x[:B], y[:B])))) for B in (1, 2, 8)]
    assert max(medians) < 2 * 0.5 / 16


def test_a_token_without_a_norm_counts_as_0_in_the_mean():
    x, y = make(np.random.default_rng(0), (2, 4, 6))
    x[1], y[2] = 3.0, 0.0
    want = (learned(x[0], y[0]) + learned(x[3], y[3])) / 4
    assert_equiv(learned(x, y), want, depth=4, scale=np.abs(want))
    x[:2] *= np.float32(1e-15)  # below the floor of one token alone
    assert_equiv(learned(x, y), learned(x[3], y[3]) / 4, depth=4, scale=np.abs(want))
    all_but_the_flat_ones = (learned(x[0], y[0], floor=0.0) + learned(x[3], y[3])) / 4
    assert_equiv(learned(x, y, floor=0.0), all_but_the_flat_ones, depth=4, scale=np.abs(want))


# --- the floor ---


@pytest.mark.parametrize("how", ["update", "update_step"])
@pytest.mark.parametrize("exponent", [-600, -500, -100, -60, 0, 300])
def test_without_a_floor_scale_changes_nothing(how, exponent):
    x, y = make(np.random.default_rng(0), (2, 16, 5), np.float64)
    found = []
    for factor in (1.0, 2.0**exponent):
        ctx = context(rate=1.0, dtype=np.float64, floor=0.0)
        getattr(ctx, how)(x * factor, y * factor)
        found.append(ctx.outgoing)
        statistic = similarity if how == "update" else similarity_step
        want = statistic(x * factor, y * factor, floor=0.0)
        assert_equiv(found[-1], want, depth=16, scale=np.ones((5, 5)))
    assert found[0].all()
    assert_equiv(found[1], found[0], depth=16, scale=np.ones((5, 5)))


def test_the_floor_is_the_originals_unless_it_is_set():
    x = make(np.random.default_rng(0), (16, 5), np.float64) * 1e-8
    for options, learns in (({}, False), (dict(floor=1e-15), True), (dict(floor=0), True)):
        ctx = context(rate=1.0, dtype=np.float64, **options)
        ctx.update(x, x)
        assert ctx.outgoing.any() == learns
        twin = SharedAttentionContext(dtype=np.float64)
        twin.load_state_dict(ctx.state_dict())
        assert twin.floor == ctx.floor == options.get("floor", 1e-12)
    old = {name: value for name, value in ctx.state_dict().items() if name != "floor"}
    twin.load_state_dict(old)  # of a file from before there was a floor
    assert twin.floor == 1e-12


@pytest.mark.parametrize("statistic", [similarity, similarity_step])
@pytest.mark.parametrize("floor", [-1e-9, math.inf, math.nan])
def test_the_reference_refuses_what_is_no_floor(statistic, floor):
    with pytest.raises(ValueError, match=r"^floor: .* at least 0"):
        statistic(X, Y, floor=floor)


# --- warnings ---


def test_folding_a_context_that_overflows_is_silent():
    # s/D times C is infinite, and no entry of the result is.
    C, x = np.full((2, 2), 3e38, np.float32), np.full((3, 2), 1e-38, np.float32)
    ctx = context(C, 4.0)
    with np.errstate(over="raise", invalid="raise"):
        got = ctx.apply(x)
    assert_equiv(got, apply_context(x, C, 4.0), scale=np.abs(got))


def test_an_underflow_is_silent():
    tiny, C, out = (np.full((2, 2), v, np.float32) for v in (3e-20, 1e-20, 7))
    for strength in (0.5, 2.0):  # 2: the factor of the gradient of the context is 1
        ctx = context(C, strength)
        with np.errstate(all="raise"):
            grad_x, grad_s = ctx.backward(tiny, tiny)
            ctx.context_gradient(tiny, C, out=out)
        assert np.array_equal(grad_x, tiny)
        assert grad_s >= 0
        want = context_gradient(tiny, strength, C)
        assert_equiv(out, want, scale=float(np.finfo(np.float32).tiny))


def test_folding_a_context_that_underflows_is_silent():
    ctx, x = context(np.full((2, 2), 1e-38, np.float32)), np.ones((3, 2), np.float32)
    with np.errstate(all="raise"):
        assert np.array_equal(ctx.apply(x), x)


def test_an_underflow_in_a_spoilt_batch_leaves_the_output():
    C, x = np.full((2, 2), 1e-20, np.float32), np.ones((8, 2), np.float32)
    tiny, out = np.full_like(x, 3e-20), np.full_like(x, 7)
    x[3] = 1e-20, np.nan
    ctx = context(C)
    for call in (lambda: ctx.apply(x, out=out), lambda: ctx.backward(x, tiny, out=out)):
        with np.errstate(under="raise"), pytest.raises(FloatingPointError):
            call()
        assert (out == 7).all()
    tiny[3] = np.nan
    with np.errstate(all="raise"):
        ctx.apply(tiny, out=out)
    assert_applies(out, tiny, C, 0.5)


@pytest.mark.parametrize("how", ["update", "update_step"])
def test_what_underflows_is_learned_from_in_silence(how):
    D = 700  # several panels, the last of which underflows
    x, y = make(np.random.default_rng(0), (2, 4, D))
    ctx = context(rate=0.5, floor=0.0)
    learn = getattr(ctx, how)
    learn(x, y)
    before = ctx.outgoing.copy()
    assert _panel_shape(D, np.float32)[0] < D - 2
    if how == "update":
        x[:, -1] = y[:, -1] = 1e-30, -1e-30, 1, -1
    else:
        x[...] = 0
        x[:, [0, 1, -2, -1]] = 1, -1, 1e-30, -1e-30
        y = x
    with np.errstate(all="raise"):
        learn(x, y)
    new = {"update": similarity, "update_step": similarity_step}[how](x, y, floor=0.0)
    assert_equiv(ctx.outgoing, ema(before, new, 0.5), depth=4, scale=1.0)


def test_an_overflow_obeys_errstate_and_leaves_the_output():
    big, C, out = (np.full((2, 2), v, np.float32) for v in (1e18, 1e5, 7))
    ctx = context(C, 1e16)
    for call in (
        lambda: ctx.apply(big, out=out),
        lambda: ctx.backward(X[:2, :2].copy(), big, out=out),
        lambda: ctx.context_gradient(big, big, out=out),
    ):
        with np.errstate(over="raise"), pytest.raises(FloatingPointError):
            call()
        assert (out == 7).all()
        call()
        assert np.isinf(out).all()
        out[...] = 7


# --- no features, no rows ---


@pytest.mark.parametrize("shape", [(0,), (0, 0), (3, 0), (2, 3, 0)])
def test_no_features(shape):
    x = np.empty(shape, np.float32)
    ctx = context(np.empty((0, 0), np.float32), 0.5, 1.0)
    assert ctx.apply(x).shape == shape
    grad_x, grad_s = ctx.backward(x, x)
    assert (grad_x.shape, grad_s) == (shape, 0)
    if x.ndim < 3 and shape != (0, 0):
        ctx.update_step(x, x)
        assert ctx.outgoing.shape == (0, 0)
    if shape == (3, 0):
        ctx.update(x, x)
        assert ctx.outgoing.shape == (0, 0)


# --- any order of calls ---


class Contexts(RuleBasedStateMachine):
    """A context beside the plainest model of it: four values, and the reference functions."""

    @initialize(dtype=dtypes, max_rows=st.sampled_from([2, 4, 32, None]), floor=floors)
    def begin(self, dtype, max_rows, floor):
        self.dtype, self.max_rows, self.strength, self.rate = dtype, max_rows, 0.0, 0.01
        self.incoming, self.outgoing, self.floor = None, None, floor
        self.ctx = SharedAttentionContext(max_rows=max_rows, dtype=dtype, floor=floor)

    def draw(self, seed, shape, kind):
        return make(np.random.default_rng(seed), shape, self.dtype, kind)

    @rule(s=strengths)
    def set_strength(self, s):
        self.ctx.strength = self.strength = s

    @rule(s=strengths)
    def optimise(self, s):
        array = self.ctx.parameters()["strength"]
        array[0] = s
        # Where this is what a strength that was set was rounded to, that one is back, to the digit.
        assert self.dtype(self.ctx.strength) == array[0]
        self.strength = self.ctx.strength

    @rule(how=st.sampled_from([copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]))
    def go_on_with_a_copy(self, how):
        old, self.ctx = self.ctx, how(self.ctx)
        old.parameters()["strength"][0] = 77  # nothing of it is in the copy
        old.set_incoming(np.ones((1, 1), self.dtype))
        old.reset()

    @rule(r=st.sampled_from([*RATES, -3.0, 7, math.inf]))
    def set_rate(self, r):
        self.ctx.update_rate, self.rate = r, min(max(r, 0), 1)

    @rule(
        name=st.sampled_from(["strength", "update_rate"]),
        value=st.sampled_from([math.nan, None, "fast", 1j]),
    )
    def set_nonsense(self, name, value):
        with pytest.raises((ValueError, TypeError)):
            setattr(self.ctx, name, value)

    @rule(seed=seeds, D=widths, kind=kinds)
    def set_incoming(self, seed, D, kind):
        given_ = self.draw(seed, (D, D), kind)
        self.incoming = given_.copy()
        self.ctx.set_incoming(given_)
        given_[...] = 99  # it was copied

    @rule(
        bad=st.sampled_from(
            [
                np.ones((2, 3)),
                np.ones(4),
                [[1.0]],
                np.ones((2, 2), int),
                np.ones((2, 2), np.float16),
            ]
        )
    )
    def set_bad_incoming(self, bad):
        with pytest.raises((ValueError, TypeError), match=r"^context: "):
            self.ctx.set_incoming(
                bad.astype(self.dtype) if getattr(bad, "dtype", None) == np.float64 else bad
            )

    @rule()
    def clear_incoming(self):
        self.ctx.set_incoming(None)
        self.incoming = None

    @precondition(lambda self: self.incoming is not None)
    @rule()
    def set_incoming_to_its_own_transpose(self):
        self.ctx.set_incoming(self.ctx.incoming.T)
        self.incoming = self.incoming.T.copy()

    @precondition(lambda self: self.outgoing is not None)
    @rule()
    def feed_outgoing_back(self):
        self.ctx.set_incoming(self.ctx.outgoing)
        self.incoming = self.outgoing.copy()

    @rule(
        seed=seeds,
        S=lengths,
        D=widths,
        kind=kinds,
        ndim=st.sampled_from([1, 2, 3]),
        into=st.booleans(),
    )
    def apply_and_backward(self, seed, S, D, kind, ndim, into):
        D = D if self.incoming is None else len(self.incoming)
        x, G = self.draw(seed, (2, *{1: (D,), 2: (S, D), 3: (2, S, D)}[ndim]), kind)
        out = np.empty_like(x) if into else None
        assert_applies(self.ctx.apply(x, out=out), x, self.incoming, self.strength)
        assert_gradients(self.ctx.backward(x, G, out=out), x, self.incoming, self.strength, G)

    @precondition(lambda self: self.incoming is not None)
    @rule(S=lengths, more=st.sampled_from([-1, 1]))
    def apply_to_another_width(self, S, more):
        x = np.ones((S, len(self.incoming) + more), self.dtype)
        for call in (self.ctx.apply, lambda x: self.ctx.backward(x, x)):
            with pytest.raises(
                ValueError,
                match=rf"\({S}, .*does not fit the incoming context: \({len(self.incoming)}",
            ):
                call(x)

    def learn(self, how, x, y, sim, n, **options):
        if self.outgoing is not None and len(self.outgoing) != len(sim):
            with pytest.raises(
                ValueError, match=r"does not fit the outgoing context: .* call reset\(\) first"
            ):
                how(x, y, **options)
            return
        how(x, y, **options)
        if self.rate > 0:
            assert_learned(self.ctx.outgoing, self.outgoing, sim, self.rate, n)
            self.outgoing = self.ctx.outgoing.copy()

    @rule(seed=seeds, S=st.integers(0, 40), D=widths, kind=kinds, own_rows=st.booleans())
    def update(self, seed, S, D, kind, own_rows):
        x, y = self.draw(seed, (S, D), kind), self.draw(seed + 1, (S, D), kind)
        rows = sample_rows(S, 3)[::-1] if own_rows else sample_rows(S, self.max_rows)
        options = dict(rows=rows) if own_rows else {}
        if S < 2:
            with pytest.raises(ValueError, match=r"^rows: "):
                self.ctx.update(x, y, **options)
            return
        sim = similarity(x, y, rows=rows, floor=self.floor)
        self.learn(self.ctx.update, x, y, sim, len(rows), **options)

    @rule(seed=seeds, D=widths, kind=kinds, B=st.integers(0, 3))
    def update_step(self, seed, D, kind, B):
        shape = (B, D) if B else (D,)
        x, y = self.draw(seed, shape, kind), self.draw(seed + 1, shape, kind)
        sim = similarity_step(x, y, floor=self.floor)
        self.learn(self.ctx.update_step, x, y, sim, D * max(B, 1))

    @rule()
    def reset(self):
        self.ctx.reset()
        self.outgoing = None

    @rule(fresh=st.booleans())
    def save_and_load(self, fresh):
        file = io.BytesIO()
        np.savez(file, **self.ctx.state_dict())
        file.seek(0)
        if fresh:
            self.ctx = SharedAttentionContext(3.0, 0.7, max_rows=9, dtype=self.dtype)
            self.ctx.set_incoming(np.ones((2, 2), self.dtype))
            self.ctx.apply(np.ones((2, 2), self.dtype))  # folds what is about to be replaced
        with np.load(file, allow_pickle=False) as state:
            self.ctx.load_state_dict(state)

    @rule(
        change=st.sampled_from(
            [
                dict(strength=math.nan),
                dict(update_rate=math.nan),
                dict(max_rows=-1),
                dict(outgoing=np.ones((2, 3))),
                dict(incoming=[[1.0]]),
                dict(incoming=np.ones((2, 2), int)),
                dict(momentum=0.9),
            ]
        )
    )
    def load_nonsense(self, change):
        state = self.ctx.state_dict() | dict(
            strength=42.0, update_rate=0.42, incoming=np.ones((1, 1), self.dtype)
        )
        with pytest.raises((ValueError, TypeError)):
            self.ctx.load_state_dict(state | change)

    @invariant()
    def the_state_is_the_models(self):
        if not hasattr(self, "ctx"):
            return
        ctx = self.ctx
        assert (ctx.strength, ctx.update_rate, ctx.max_rows, ctx.floor) == (
            self.strength,
            self.rate,
            self.max_rows,
            self.floor,
        )
        assert ctx.parameters()["strength"] == np.array([self.strength], self.dtype)
        assert (ctx.weight_norm(), ctx.parameter_count) == (abs(self.strength), 1)
        for held, model in ((ctx.incoming, self.incoming), (ctx.outgoing, self.outgoing)):
            assert (held is None) == (model is None)
            if model is not None:
                assert_equiv(held, model, scale=0.0)
                assert not held.flags.writeable


TestAnyOrderOfCalls = Contexts.TestCase


# --- the table of what the original did silently ---

X, Y = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
C4 = np.eye(4, dtype=np.float32)


@pytest.mark.parametrize("shape", [(6, 3), (6, 5), (3,), (5,), (2, 6, 3), (6, 0)])
@pytest.mark.parametrize("s", [0.5, 0.0])
def test_a_context_of_the_wrong_shape_is_an_error_with_both_shapes(shape, s):
    x = np.ones(shape, np.float32)
    for call in (lambda: context(C4, s).apply(x), lambda: context(C4, s).backward(x, x)):
        with pytest.raises(
            ValueError, match=r"^x: shape \(.*\) does not fit the incoming context: \(4, 4\)"
        ):
            call()


@pytest.mark.parametrize("value", [math.nan, np.float32(np.nan)])
@pytest.mark.parametrize("name", ["strength", "update_rate"])
def test_numbers_that_are_none_are_errors_when_set(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        SharedAttentionContext(**{name: value})
    ctx = context(C4)
    with pytest.raises(ValueError, match=f"^{name}: "):
        setattr(ctx, name, value)
    assert_applies(ctx.apply(X), X, C4, 0.5)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_strength_is_an_error(value):
    with pytest.raises(ValueError, match=r"^strength: "):
        context().strength = value


# --- the strength and its array ---


def test_the_array_of_the_strength_is_the_strength():
    ctx = context(C4, 0.9)
    array = ctx.parameters()["strength"]
    assert (array.shape, array.dtype, array[0]) == ((1,), np.float32, np.float32(0.9))
    assert ctx.strength == 0.9  # with all digits, as it was set
    assert_applies(ctx.apply(X), X, C4, 0.9)
    array[0] = -2
    assert (ctx.strength, ctx.weight_norm(), ctx.state_dict()["strength"]) == (-2, 2, -2)
    assert_applies(ctx.apply(X), X, C4, -2)
    array[0] = 3
    assert_gradients(ctx.backward(X, Y), X, C4, 3, Y)
    array[0] = 4
    assert_equiv(ctx.context_gradient(X, Y), context_gradient(X, 4.0, Y), depth=6, scale=100.0)
    ctx.strength = 0.25
    assert array[0] == 0.25
    ctx.load_state_dict(ctx.state_dict() | dict(strength=0.75))
    assert ctx.parameters()["strength"] is array
    assert array[0] == 0.75
    array[0] = 0
    assert ctx.apply(X) is X


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_optimiser_that_ruins_the_strength_is_noticed_at_the_next_use(value):
    ctx = context(C4)
    array = ctx.parameters()["strength"]
    out = np.full_like(X, 7)
    for call in (
        lambda: ctx.apply(X, out=out),
        lambda: ctx.backward(X, Y, out=out),
        lambda: ctx.context_gradient(X, Y),
    ):
        array[0] = value
        with pytest.raises(ValueError, match=r"^strength: (nan|-?inf), needed .* finite in float"):
            call()
        array[0] = 0.5
        assert (out == 7).all()
        assert_applies(ctx.apply(X), X, C4, 0.5)


def test_float64_has_room_for_more():
    big = SharedAttentionContext(1e39, 1e-46, dtype=np.float64)
    assert (big.strength, big.update_rate) == (1e39, 1e-46)
    with pytest.raises(ValueError, match=r"^strength: 1e\+39, needed .* finite in float32"):
        SharedAttentionContext().load_state_dict(big.state_dict() | dict(update_rate=0.1))
    largest = float(np.finfo(np.float32).max)
    assert SharedAttentionContext(-largest).strength == -largest
    assert SharedAttentionContext(np.float32(0.1)).strength == np.float32(0.1)
    assert SharedAttentionContext(np.array(0.5)).strength == 0.5


def test_the_smallest_rate_learns():
    ctx = context(rate=1.0)
    ctx.update_rate = least = float(np.nextafter(np.float32(0), np.float32(1)))
    ctx.update(X, X)
    assert ctx.outgoing.any()
    with pytest.raises(ValueError, match=r"^update_rate: .* too small for float32"):
        ctx.update_rate = least / 2


def test_another_width_is_an_error_until_reset():
    ctx = context(rate=1.0)
    ctx.update(X, Y)
    before = ctx.outgoing.copy()
    for call in (
        lambda: ctx.update(X[:, :3], Y[:, :3]),
        lambda: ctx.update(X, Y, dim=3),
        lambda: ctx.update_step(X[0, :3], Y[0, :3]),
        lambda: ctx.update_step(X[0], Y[0], dim=0),
    ):
        with pytest.raises(
            ValueError, match=r"does not fit the outgoing context: \(4, 4\); call reset\(\) first"
        ):
            call()
    assert np.array_equal(ctx.outgoing, before)
    ctx.reset()
    ctx.update(X, Y, dim=3)
    assert ctx.outgoing.shape == (3, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda ctx: ctx.update(X, Y[:5]),
        lambda ctx: ctx.update(X, Y[:, :3]),
        lambda ctx: ctx.update(X[:, :3], Y),
        lambda ctx: ctx.update_step(X[0], Y[0, :3]),
        lambda ctx: ctx.update(X, Y[:5], dim=4),
        lambda ctx: ctx.update(X, Y, dim=5),
        lambda ctx: ctx.update(X, Y[:, :2], dim=3),
        lambda ctx: ctx.update(X, Y, dim=-1),
        lambda ctx: ctx.update_step(X[0], Y[0], dim=5),
        lambda ctx: ctx.update(X[0], Y[0]),
        lambda ctx: ctx.update_step(X[None], Y[None]),
        lambda ctx: ctx.update_step(X, Y[0]),
        lambda ctx: ctx.update_step(X[:0], Y[:0]),
        lambda ctx: ctx.update(X[None], Y[None]),
        lambda ctx: ctx.update(X, Y, rows=[6]),
        lambda ctx: ctx.update(X, Y, rows=[-1]),
        lambda ctx: ctx.backward(X, Y[:5]),
        lambda ctx: ctx.backward(X, Y[0]),
        lambda ctx: ctx.backward(X[0], Y),
        lambda ctx: ctx.apply(X[:, None, None]),
        lambda ctx: ctx.set_incoming(X),
        lambda ctx: ctx.set_incoming(X[0]),
        lambda ctx: ctx.apply(X[:0, :0]),
    ],
)
def test_shapes_that_do_not_fit_are_value_errors_and_change_nothing(call):
    ctx = context(C4, rate=1.0)
    with pytest.raises(ValueError, match=r"^(x|y|dim|rows|grad_out|context): "):
        call(ctx)
    assert ctx.outgoing is None
    assert np.array_equal(ctx.incoming, C4)


@pytest.mark.parametrize(
    "bad",
    [
        X.tolist(),
        None,
        X.astype(np.float64),
        X.astype(int),
        X.astype(np.float16),
        X.astype(">f4"),
        np.ma.masked_array(X),
    ],
    ids=lambda a: type(a).__name__ + str(getattr(a, "dtype", "")),
)
@pytest.mark.parametrize(
    "call",
    [
        lambda ctx, a: ctx.apply(a),
        lambda ctx, a: ctx.backward(a, X),
        lambda ctx, a: ctx.backward(X, a),
        lambda ctx, a: ctx.update(a, X),
        lambda ctx, a: ctx.update(X, a),
    ],
    ids=["apply", "backward x", "backward grad_out", "update x", "update y"],
)
def test_what_is_no_array_of_the_dtype_is_a_type_error(call, bad):
    with pytest.raises(TypeError, match=r"^(x|y|grad_out): "):
        call(context(C4), bad)


@pytest.mark.parametrize("rows", [[0.0, 1.0], np.ones(6, bool), [[0, 1]], 3, "all"], ids=repr)
def test_rows_are_a_vector_of_integers(rows):
    with pytest.raises(TypeError, match=r"^rows: "):
        context().update(X, Y, rows=rows)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(dtype=np.float16), TypeError),
        (dict(dtype=int), TypeError),
        (dict(dtype=">f4"), TypeError),
        (dict(max_rows=0), ValueError),
        (dict(max_rows=-5), ValueError),
        (dict(max_rows=1), ValueError),
        (dict(max_rows=2.5), TypeError),
        (dict(strength="strong"), TypeError),
        (dict(strength="0.5"), TypeError),
        (dict(strength=[0.5]), TypeError),
        (dict(strength=10**400), ValueError),
        (dict(strength=1e39), ValueError),
        (dict(strength=-1e39), ValueError),
        (dict(update_rate=None), TypeError),
        (dict(update_rate=1j), TypeError),
        (dict(update_rate=1e-46), ValueError),
        (dict(update_rate=5e-324), ValueError),
        (dict(floor=-1e-300), ValueError),
        (dict(floor=math.nan), ValueError),
        (dict(floor=math.inf), ValueError),
        (dict(floor="low"), TypeError),
        (dict(workspace={}), TypeError),
    ],
    ids=str,
)
def test_bad_options(options, error):
    (name,) = options
    with pytest.raises(error, match=f"^{name}: .*") as caught:
        SharedAttentionContext(**options)
    assert "\n" not in str(caught.value)
    if name in ("strength", "update_rate", "max_rows"):
        ctx = context(C4, 0.5, 0.1)
        with pytest.raises(error, match=f"^{name}: "):
            setattr(ctx, name, options[name])
        assert (ctx.strength, ctx.update_rate, ctx.max_rows) == (0.5, 0.1, 32)
        assert_applies(ctx.apply(X), X, C4, 0.5)


def test_rates_are_clipped_and_a_rate_of_zero_does_nothing():
    assert [context(rate=r).update_rate for r in (-1, 0, 0.25, 1, 9)] == [0, 0, 0.25, 1, 1]
    ctx = context(rate=1.0)
    ctx.update(X, Y)
    before, ctx.update_rate = ctx.outgoing.copy(), 0
    ctx.update(Y, X)
    ctx.update_step(X[0], Y[0])
    assert np.array_equal(ctx.outgoing, before)
    with pytest.raises(ValueError, match=r"^y: "):  # idle is no excuse for bad input
        ctx.update(X, Y[:3])


# --- out= ---

BAD_OUTS = {
    "shape": (
        lambda: np.empty((5, 4), np.float32),
        ValueError,
        r"^out: shape \(5, 4\), needed \(6, 4\)",
    ),
    "transposed": (lambda: np.empty((4, 6), np.float32), ValueError, "^out: shape"),
    "dimensions": (lambda: np.empty((1, 6, 4), np.float32), ValueError, "^out: .* 3 dimensions"),
    "dtype": (lambda: np.empty((6, 4)), TypeError, "^out: float64"),
    "list": (lambda: [[0.0] * 4] * 6, TypeError, "^out: .* not list"),
    "masked": (lambda: np.ma.zeros((6, 4), np.float32), TypeError, "^out: "),
    "read-only": (lambda: np.broadcast_to(np.float32(0), (6, 4)), ValueError, "^out: is read-only"),
    "every other column": (
        lambda: np.empty((6, 8), np.float32)[:, ::2],
        ValueError,
        "^out: strides",
    ),
    "backwards": (lambda: np.empty((6, 4), np.float32)[::-1], ValueError, "^out: strides"),
    "unaligned": (
        lambda: np.zeros(97, np.uint8)[1:].view(np.float32).reshape(6, 4),
        ValueError,
        "^out: is not aligned",
    ),
    "byte order": (lambda: np.empty((6, 4), ">f4"), TypeError, "^out: >f4"),
    "x itself": (lambda: X, ValueError, "^out: overlaps x"),
    "a view of x": (lambda: X[:], ValueError, "^out: overlaps x"),
}


@pytest.mark.parametrize("with_context", [True, False])
@pytest.mark.parametrize("case", BAD_OUTS)
def test_bad_outs_are_refused_before_anything_is_written(case, with_context):
    make_out, error, why = BAD_OUTS[case]
    ctx, kept = context(C4 if with_context else None), X.copy()
    for call in (lambda out: ctx.apply(X, out=out), lambda out: ctx.backward(X, Y, out=out)):
        out = make_out()
        before = np.array(out)
        with pytest.raises(error, match=why):
            call(out)
        assert np.array_equal(np.array(out), before, equal_nan=True)
    assert np.array_equal(X, kept)


def test_out_must_not_be_the_gradient():
    with pytest.raises(ValueError, match=r"^out: overlaps grad_out"):
        context(C4).backward(X, Y, out=Y)


def test_out_may_be_another_panel_of_the_inputs_buffer():
    buffer = np.zeros((6, 12), np.float32)
    buffer[:, :4], buffer[:, 4:8] = X, Y
    C = make(np.random.default_rng(1), (4, 4))
    ctx = context(C)
    assert_applies(ctx.apply(buffer[:, :4], out=buffer[:, 8:]), X, C, 0.5)
    assert_gradients(ctx.backward(buffer[:, :4], buffer[:, 4:8], out=buffer[:, 8:]), X, C, 0.5, Y)
    assert np.array_equal(buffer[:, :8], np.hstack([X, Y]))


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("with_context", [True, False])
def test_out_at_every_distance_from_the_inputs(with_context, shape):
    # Whether two arrays overlap is told by a quick way for usual arrays, and by another for others.
    n, C = math.prod(shape), make(np.random.default_rng(1), (4, 4)) if with_context else None
    ctx, G = context(C), make(np.random.default_rng(2), shape)
    for kind in (np.ndarray, Mapped):
        for start in range(2 * n + 1):
            store = make(np.random.default_rng(start), 3 * n)
            x, out = (store[i : i + n].reshape(shape).view(kind) for i in (n, start))
            before, kept = store.copy(), np.array(x)
            for call in (
                lambda x=x, out=out: ctx.apply(x, out=out),
                lambda x=x, out=out: ctx.backward(x, G, out=out),
                lambda x=x, out=out: ctx.backward(G, x, out=out),
            ):
                if abs(start - n) < n:
                    with pytest.raises(ValueError, match=r"^out: overlaps (x|grad_out)"):
                        call()
                    assert np.array_equal(store, before)
                else:
                    call()
                    assert np.array_equal(x, kept)
            if abs(start - n) >= n:
                assert ctx.apply(x, out=out) is out
                assert_applies(np.array(out), kept, C, 0.5)


class Mapped(np.ndarray):
    """As a memory map: a subclass, which is used as what it is derived from."""


def test_what_the_quick_check_lets_through():
    x, out = np.zeros((2, 6, 4), np.float32)
    for a in (x, x[0], x[None], x[:, :0], x[:0]):
        assert _is_usual(x.dtype, a, None)
        assert _is_usual(x.dtype, a, np.empty_like(a))
    fixed = x.copy()
    fixed.flags.writeable = False
    assert _is_usual(x.dtype, fixed, out)
    shifted = np.zeros(97, np.uint8)[1:].view(np.float32).reshape(6, 4)
    refused = {
        "a list": x.tolist(),
        "a subclass": x.view(Mapped),
        "another dtype": x.astype(np.float64),
        "another byte order": x.astype(">f4"),
        "a number": x[0, 0],
        "no dimension": np.zeros((), np.float32),
        "four dimensions": x[None, None],
        "Fortran order": np.asfortranarray(x),
        "a panel": np.zeros((6, 8), np.float32)[:, :4],
        "unaligned": shifted,
    }
    assert {name for name, a in refused.items() if _is_usual(x.dtype, a, None)} == set()
    refused |= {"read-only": fixed, "another shape": x[:3], "x itself": x, "a view of x": x[:]}
    assert {name for name, a in refused.items() if _is_usual(x.dtype, x, a)} == set()


@pytest.mark.parametrize("call", [lambda ctx, a: ctx.apply(a), lambda ctx, a: ctx.backward(a, a)])
@pytest.mark.parametrize(
    "view",
    [
        lambda: np.empty((6, 8), np.float32)[:, ::2],
        lambda: X[::-1],
        lambda: np.broadcast_to(X[0], (6, 4)),
        lambda: np.empty((2, 6, 8), np.float32)[:, :, :4],
        lambda: np.empty((4, 2), np.float32)[:, 0],
    ],
)
def test_inputs_that_would_need_a_copy_are_refused(call, view):
    with pytest.raises(ValueError, match=r"^x: strides .* would need a copy"):
        call(context(C4), view())


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_unaligned_inputs_are_refused_in_every_shape(shape):
    # NumPy copies them, silently and whole.
    size = 4 * math.prod(shape)
    x = np.zeros(size + 1, np.uint8)[1:].view(np.float32).reshape(shape)
    assert not x.flags.aligned
    with pytest.raises(ValueError, match=r"^x: "):
        context(C4).apply(x)


def test_what_is_handed_out_cannot_be_written():
    ctx = context(C4, rate=1.0)
    ctx.update(X, Y)
    for view in (ctx.incoming, ctx.outgoing):
        with pytest.raises(ValueError, match="read-only"):
            view[0, 0] = 1
    state = ctx.state_dict()
    state["incoming"][:] = state["outgoing"][:] = 9  # a state is a copy
    assert np.array_equal(ctx.incoming, C4)
    assert ctx.outgoing.max() < 1


# --- state ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_rows", [7, None])
@pytest.mark.parametrize("holds", [(), ("incoming",), ("outgoing",), ("incoming", "outgoing")])
def test_states_survive_a_file(holds, max_rows, dtype, tmp_path):
    x, y = make(np.random.default_rng(0), (2, 50, 4), dtype)
    ctx = context(
        similarity(x, y) if "incoming" in holds else None, -0.3, 0.2, dtype, max_rows=max_rows
    )
    if "outgoing" in holds:
        ctx.update(x, y)
    np.savez(tmp_path / "state.npz", **ctx.state_dict())
    twin = context(np.ones((9, 9), dtype), dtype=dtype)
    twin.update(np.ones((3, 9), dtype), np.ones((3, 9), dtype))
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        twin.load_state_dict(state)
    assert {"strength", "update_rate", "max_rows", "floor", *holds} == set(ctx.state_dict())
    for c in (ctx, twin):
        c.update(y, x)
    assert np.array_equal(ctx.outgoing, twin.outgoing)
    assert np.array_equal(ctx.apply(x), twin.apply(x))


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"strength": 1.0},
        dict(strength=1.0, update_rate=0.1, max_rows=32, extra=1),
        None,
        [],
        "state",
        dict(strength="strong", update_rate=0.1, max_rows=32),
        dict(strength=1.0, update_rate=math.nan, max_rows=32),
        dict(strength=math.inf, update_rate=0.1, max_rows=32),
        dict(strength=1.0, update_rate=0.1, max_rows=-3),
        dict(strength=1.0, update_rate=0.1, max_rows="few"),
        dict(strength=1e39, update_rate=0.1, max_rows=32),
        dict(strength=1.0, update_rate=1e-50, max_rows=32),
        dict(strength=1.0, update_rate=0.1, max_rows=32, floor=-1.0),
        dict(strength=1.0, update_rate=0.1, max_rows=32, incoming=np.ones((4, 4))),
        dict(strength=1.0, update_rate=0.1, max_rows=32, outgoing=np.ones((4, 3), np.float32)),
        dict(
            strength=1.0, update_rate=0.1, max_rows=32, incoming=C4, outgoing=np.ones(4, np.float32)
        ),
    ],
    ids=repr,
)
def test_a_state_that_fails_to_load_leaves_everything(state):
    ctx = context(2 * C4, rate=0.5)
    ctx.update(X, Y)
    before, applied = ctx.state_dict(), ctx.apply(X)
    with pytest.raises((ValueError, TypeError)):
        ctx.load_state_dict(state)
    after = ctx.state_dict()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], after[k]) for k in before)
    assert np.array_equal(ctx.apply(X), applied)


# --- copies ---

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda a: pickle.loads(pickle.dumps(a)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copy_is_the_same_and_shares_nothing(how, dtype):
    x, y, C = (a.astype(dtype) for a in (X, Y, C4))
    ctx = context(C, 1 / 3, 0.3, dtype, max_rows=5, floor=1e-9)
    ctx.update(x, y)
    want = ctx.apply(x)
    twin = COPIES[how](ctx)
    assert twin.state_dict().keys() == ctx.state_dict().keys()
    assert all(np.array_equal(a, twin.state_dict()[n]) for n, a in ctx.state_dict().items())
    for make_ in (lambda c: c.incoming, lambda c: c.outgoing, lambda c: c.parameters()["strength"]):
        assert not np.shares_memory(make_(ctx), make_(twin))
    before = twin.outgoing.copy()
    ctx.parameters()["strength"][0] = 5
    ctx.set_incoming(7 * C)
    ctx.update(y, x)
    assert np.array_equal(twin.apply(x), want)
    assert np.array_equal(twin.outgoing, before)
    twin.strength = 0
    assert ctx.strength == 5
    with ctx._mixing.writing(), ctx._learning.writing():  # nor a lock
        twin.apply(x)
        twin.update(x, y)


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_subclasses_and_of_empty_contexts(how):
    class Mine(SharedAttentionContext):
        pass

    globals()["Mine"] = Mine  # where pickle looks for it
    Mine.__qualname__ = "Mine"
    twin = COPIES[how](Mine(0.5))
    assert type(twin) is Mine
    assert (twin.incoming, twin.outgoing, twin.strength) == (None, None, 0.5)


def test_contexts_that_share_a_workspace_share_one_after_a_deepcopy():
    pool = Workspace(growth="exact")
    pair = [context(rate=0.5, workspace=pool) for _ in range(2)]
    pair[0].update(X, Y)
    first, second = copy.deepcopy(pair)
    assert first.workspace is second.workspace is not pool
    assert (first.workspace.growth, first.workspace.nbytes) == ("exact", 0)
    assert copy.copy(pair[0]).workspace is pool


def test_a_context_in_use_cannot_be_copied():
    ctx = context(C4)
    with ctx._learning.writing(), pytest.raises(RuntimeError, match="outgoing context"):
        copy.deepcopy(ctx)


# --- memory ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 33, 256])
def test_nbytes_is_what_is_really_held(D, dtype):
    x, y = make(np.random.default_rng(0), (2, 40, D), dtype)
    C = np.ones((D, D), dtype)
    warm = context(C, dtype=dtype)
    warm.update(x, y)  # whatever NumPy or Python cache on first use
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        ctx = context(C, dtype=dtype)
        ctx.apply(x, out=np.empty_like(x))
        ctx.update(x, y)
        ctx.update_step(x[0], y[0])
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    # Beyond the arrays there are some Python objects, and the slack that aligns each buffer.
    assert ctx.nbytes <= held < ctx.nbytes + 8_000
    assert ctx.nbytes >= 3 * C.nbytes  # incoming, folded, outgoing


def test_nbytes_adds_up_and_starts_at_nothing():
    pool = Workspace(growth="exact")
    ctx = SharedAttentionContext(0.5, workspace=pool)
    assert ctx.nbytes == 0
    ctx.set_incoming(C4)
    assert ctx.nbytes == 2 * C4.nbytes
    ctx.update(X, Y)
    assert ctx.nbytes == 3 * C4.nbytes + pool.nbytes > 3 * C4.nbytes
    ctx.reset()
    assert ctx.nbytes == 2 * C4.nbytes + pool.nbytes
    ctx.set_incoming(None)
    assert ctx.nbytes == pool.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("S", "D"), [(512, 768), (64, 256), (300, 96), (33, 512), (2000, 128)])
def test_the_steady_state_allocates_no_array(S, D, dtype):
    x, y, G, out = make(np.random.default_rng(0), (4, S, D), dtype)
    stack, stack_out, token = x.reshape(1, S, D), out.reshape(1, S, D), np.empty(D, dtype)
    ctx, rows = context(similarity(x, y), 0.5, 0.1, dtype), sample_rows(S, 8)
    applying = {
        "apply": lambda: ctx.apply(x, out=out),
        "apply to a batch": lambda: ctx.apply(stack, out=stack_out),
        "apply to a token": lambda: ctx.apply(x[0], out=token),
    }
    learning = {
        "backward": lambda: ctx.backward(x, G, out=out),
        "backward of a batch": lambda: ctx.backward(stack, stack, out=stack_out),
        "backward of a token": lambda: ctx.backward(x[0], G[0], out=token),
        "update": lambda: ctx.update(x, y),
        "update with rows": lambda: ctx.update(x, y, rows=rows),
        "update with dim": lambda: ctx.update(x, y, dim=D),
        "update_step": lambda: ctx.update_step(x[0], y[0]),
        "update_step of 32 tokens": lambda: ctx.update_step(x[:32], y[:32]),
    }
    # Vectors are allowed; the smallest matrix in play holds the rows that are sampled.
    for calls, allowed in ((applying, 4_000), (learning, min(S, D, 32) * D * x.itemsize)):
        peaks = {name: traced_peak(call, warmup=2) for name, call in calls.items()}
        assert {name: peak for name, peak in peaks.items() if peak >= allowed} == {}


@pytest.mark.parametrize("place", ["x", "grad_out", "out"])
@pytest.mark.parametrize("layout", ["F", "columns"])
@pytest.mark.parametrize(("S", "D"), [(64, 256), (300, 96)])
def test_the_steady_state_allocates_no_array_in_any_layout(S, D, layout, place):
    arrays = {name: make(np.random.default_rng(0), (S, D)) for name in ("x", "grad_out", "out")}
    arrays[place] = lay(arrays[place], layout)
    ctx = context(similarity(arrays["x"], arrays["x"]))
    smallest = min(S, D) * D * 4
    assert traced_peak(lambda: ctx.apply(arrays["x"], out=arrays["out"]), warmup=2) < smallest
    assert traced_peak(lambda: ctx.backward(**arrays), warmup=2) < min(smallest, 32 * D * 4)


def test_alternating_shapes_reuse_what_is_there():
    # The original rounds a number up and reallocates all the same.
    lengths_, D = (200, 40, 117, 31, 8), 128
    batches = [make(np.random.default_rng(n), (2, n, D)) for n in lengths_]
    ctx = context(np.eye(D, dtype=np.float32), rate=0.1)
    outs = [np.empty((n, D), np.float32) for n in lengths_]

    def everything():
        for (x, y), out in zip(batches, outs, strict=True):
            ctx.apply(x, out=out)
            ctx.backward(x, y, out=out)
            ctx.update(x, y)

    everything()
    held = ctx.nbytes
    assert (
        traced_peak(everything) < 6 * 2 * D * 8
    )  # a few vectors of 2 D doubles, whatever the shapes
    assert ctx.nbytes == held


@pytest.mark.parametrize("fails", [1, 2])
def test_a_context_that_finds_no_memory_changes_nothing(fails, monkeypatch):
    calls = []

    def no_memory(shape, dtype):
        calls.append(shape)
        if len(calls) == fails:
            raise MemoryError
        return np.full(shape, np.nan, dtype)

    ctx, new = context(C4), np.ones((5, 5), np.float32)
    applied, before = ctx.apply(X), ctx._applied_with()
    monkeypatch.setattr("ctxlab.context.aligned_empty", no_memory)
    with pytest.raises(MemoryError):
        ctx.set_incoming(new)
    monkeypatch.undo()
    assert len(calls) == fails
    assert np.array_equal(ctx.incoming, C4)
    assert ctx._applied_with() == before
    assert np.array_equal(ctx.apply(X), applied)


def test_setting_a_context_of_the_same_shape_allocates_nothing():
    C = make(np.random.default_rng(0), (256, 256))
    ctx, x, out = (
        context(C),
        make(np.random.default_rng(1), (64, 256)),
        np.empty((64, 256), np.float32),
    )

    def change():
        ctx.set_incoming(C)
        ctx.strength = -ctx.strength
        ctx.apply(x, out=out)

    assert traced_peak(change) < 4_000


class Noted(Workspace):
    """Hands out NaN, so that reading before writing shows, and remembers what was asked for."""

    def __init__(self):
        super().__init__(debug=True)
        self.taken = []

    def take(self, name, shape, dtype=np.float32):
        self.taken.append((name, tuple(shape), np.dtype(dtype)))
        return super().take(name, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "hostile", "steps", "tiny"])
def test_scratch_comes_from_the_workspace_and_is_written_before_it_is_read(kind, dtype):
    rng, space = np.random.default_rng(0), Noted()
    ctx, plain = (context(rate=0.5, dtype=dtype, workspace=w) for w in (space, None))
    for _ in range(2):
        x, y = make(rng, (40, 6), dtype, kind), make(rng, (40, 6), dtype, kind)
        for c in (ctx, plain):
            c.update(x, y)
            c.update_step(x[0], y[0])
        assert_equiv(ctx.outgoing, plain.outgoing, scale=0.0)
    first, second = np.array_split(np.array(space.taken, object), 2)
    assert np.array_equal(first, second)  # the same requests each time, so that a plan can be made
    assert all(name.startswith("context.") for name, _, _ in space.taken)


def test_a_workspace_may_be_shared():
    pool = Workspace(growth="exact")
    pairs = [make(np.random.default_rng(D), (2, 40, D)) for D in (3, 9, 5)]
    shared = [context(rate=0.5, workspace=pool) for _ in pairs]
    for _ in range(2):
        for ctx, (x, y) in zip(shared, pairs, strict=True):
            ctx.update(x, y)
    for ctx, (x, y) in zip(shared, pairs, strict=True):
        alone = context(rate=0.5)
        alone.update(x, y)
        alone.update(x, y)
        assert_equiv(ctx.outgoing, alone.outgoing, scale=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("S", "D"), [(2, 1), (5, 3), (40, 700), (100, 1000)])
def test_what_an_update_takes_is_known_before_it_runs(S, D, dtype):
    space = Workspace(growth="exact")
    sizes = {"D": D, "n": min(S, 32), "p": _panel_shape(D, dtype)[0]}
    space.ensure_capacity(_update_requirement(dtype).requests(**sizes))
    count, ctx = space.allocation_count, context(rate=0.5, dtype=dtype, workspace=space)
    x, y = make(np.random.default_rng(0), (2, S, D), dtype)
    ctx.update(x, y)
    ctx.update_step(x[:32], y[:32])
    assert space.peak_bytes == _update_requirement(dtype).nbytes(**sizes)
    assert (space.allocation_count, space.used_bytes) == (count, 0)


def test_a_limit_too_low_for_an_update_loses_nothing():
    ctx = context(C4, rate=1.0, workspace=Workspace(limit_bytes=100))
    with pytest.raises(MemoryError, match="limit_bytes is 100"):
        ctx.update(X, Y)
    assert ctx.outgoing is None
    assert np.getbufsize() > 16


@pytest.mark.parametrize("bad", [np.empty, {}, 3, "workspace"])
def test_only_a_workspace_is_a_workspace(bad):
    with pytest.raises(TypeError, match=r"^workspace: "):
        SharedAttentionContext(workspace=bad)


def test_a_workspace_shared_by_two_threads_refuses_the_second():
    space = Workspace()
    first, second = (context(rate=0.5, workspace=space) for _ in range(2))
    held, tried = threading.Barrier(2), threading.Barrier(2)

    def hold():
        with space.scope():
            held.wait()
            tried.wait()
            first.update(X, Y)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with pytest.raises(RuntimeError, match="another thread"):
        second.update(X, Y)
    assert second.outgoing is None
    tried.wait()
    thread.join()
    second.update(X, Y)
    assert_equiv(second.outgoing, first.outgoing, scale=0.0)


def test_a_workspace_that_gives_nothing_loses_nothing():
    class Full(Workspace):
        def take(self, *args, **kwargs):
            raise MemoryError("full")

    ctx = context(C4, rate=1.0, workspace=Full())
    for call in (lambda: ctx.update(X, Y), lambda: ctx.update_step(X[0], Y[0])):
        with pytest.raises(MemoryError):
            call()
    assert ctx.outgoing is None
    assert np.getbufsize() > 16
    assert_applies(ctx.apply(X), X, C4, 0.5)


# --- threads ---


def from_threads(n, work):
    """Run `work(i)` for i < n at the same time; errors come back."""
    start, errors = threading.Barrier(n), []

    def run(i):
        start.wait()
        try:
            work(i)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("kind", ["normal", "hostile"])
@pytest.mark.parametrize(("S", "D"), [(16, 32), (64, 128)])
def test_many_threads_may_apply_one_context(S, D, kind):
    rng = np.random.default_rng(0)
    x, G, C = make(rng, (S, D), kind=kind), make(rng, (S, D)), make(rng, (D, D))
    ctx = context(C)
    want, (want_x, want_s) = ctx.apply(x), ctx.backward(x, G)
    outs = np.full((8, 2, S, D), np.nan, np.float32)

    def work(i):
        for _ in range(4):
            ctx.apply(x, out=outs[i, 0])
            _, grad_s = ctx.backward(x, G, out=outs[i, 1])
            assert grad_s == want_s

    from_threads(8, work)
    for out in outs:
        assert_equiv(out[0], want, scale=0.0)
        assert_equiv(out[1], want_x, scale=0.0)


@pytest.mark.slow
def test_many_threads_may_be_the_first_to_apply():
    # Whoever comes first folds the context. The others must not see it half done or do it again.
    x, C = make(np.random.default_rng(0), (4, 512)), make(np.random.default_rng(1), (512, 512))
    outs = np.empty((6, 4, 512), np.float32)
    for _ in range(15):
        ctx = context(C)
        from_threads(6, lambda i, ctx=ctx: ctx.apply(x, out=outs[i]))
        for out in (*outs, ctx.apply(x)):
            assert_applies(out, x, C, 0.5)


def test_a_change_while_others_apply_is_refused_or_complete():
    x, C = make(np.random.default_rng(0), (4, 256)), make(np.random.default_rng(1), (256, 256))
    ctx = context(C)
    contexts = {(s, k): (s, k * C) for s in (0.5, -0.25) for k in (1, -2)}
    want = {key: context(K, s).apply(x) for key, (s, K) in contexts.items()}
    counts = {"applied": 0, "refused": 0}

    def change():
        for i in range(200):
            try:
                if i % 2:
                    ctx.strength = (0.5, -0.25)[i // 2 % 2]
                else:
                    ctx.set_incoming((1, -2)[i // 2 % 2] * C)
            except RuntimeError as e:
                assert "in use by another thread" in str(e)  # noqa: PT017
                counts["refused"] += 1

    def apply():
        for _ in range(100):
            try:
                out = ctx.apply(x)
            except RuntimeError as e:
                assert "is being changed by another thread" in str(e)  # noqa: PT017
                continue
            assert any(np.array_equal(out, w) for w in want.values())
            counts["applied"] += 1

    from_threads(4, lambda i: apply() if i else change())
    assert counts["applied"] > 0
    assert any(np.array_equal(ctx.apply(x), w) for w in want.values())


def test_many_threads_may_be_the_first_to_see_a_new_strength():
    x, C = make(np.random.default_rng(0), (4, 256)), make(np.random.default_rng(1), (256, 256))
    outs, ctx = np.empty((6, 4, 256), np.float32), context(C)
    for i in range(1, 15):
        ctx.parameters()["strength"][0] = i
        from_threads(6, lambda k: ctx.apply(x, out=outs[k]))
        for out in outs:
            assert_applies(out, x, C, float(i))


def test_who_is_overtaken_by_another_first_reader_is_not_refused():
    class Slow(SharedAttentionContext):
        def _settle_first(self):  # meanwhile another thread sees the new strength, and applies
            super()._settle_first()
            other.enter_context(self._mixing.reading())
            super()._settle_first()

    ctx = Slow(0.5)
    ctx.set_incoming(C4)
    ctx.parameters()["strength"][0] = 2
    with contextlib.ExitStack() as other:
        assert_applies(ctx.apply(X), X, C4, 2.0)
        assert ctx._mixing._readers == 1


def test_an_array_that_changes_while_others_apply_is_refused():
    ctx = context(C4)
    with ctx._mixing.reading():  # another thread applies
        ctx.apply(X)
        ctx.parameters()["strength"][0] = 2
        with pytest.raises(RuntimeError, match="incoming context is in use"):
            ctx.apply(X)
    assert_applies(ctx.apply(X), X, C4, 2.0)


class Overtaken(_Gate):
    """Another thread gets to the gate first."""

    def __init__(self, other):
        super().__init__("the outgoing context")
        self.other = other

    def writing(self):
        other, self.other = self.other, None
        if other is not None:
            other()
        return super().writing()


@pytest.mark.parametrize("how", ["update", "update_step"])
def test_the_width_is_checked_behind_the_gate(how):
    ctx = context(rate=1.0)
    learn = getattr(ctx, how)
    ctx._learning = Overtaken(lambda: learn(X[:, :3], Y[:, :3]))
    with pytest.raises(ValueError, match=r"does not fit the outgoing context: \(3, 3\)"):
        learn(X, Y)
    before = ctx.outgoing.copy()
    ctx._learning = Overtaken(ctx.reset)  # and a reset in the last moment makes room
    learn(X, Y)
    assert before.shape == (3, 3)
    assert ctx.outgoing.shape == (4, 4)


def test_threads_that_learn_nothing_do_not_mind_each_other():
    ctx = context(rate=0.0)
    with ctx._learning.reading():
        ctx.update(X, Y)
        ctx.update_step(X[0], Y[0])


def test_one_context_learns_from_one_thread_at_a_time():
    x = make(np.random.default_rng(0), (40, 256))
    ctx, counts = context(rate=1.0), {"learned": 0}

    def learn():
        for _ in range(30):
            try:
                ctx.update(x, x)
                counts["learned"] += 1
            except RuntimeError as e:
                assert "outgoing context is in use" in str(e)  # noqa: PT017

    from_threads(4, lambda i: learn())
    assert counts["learned"] > 0
    assert_learned(
        ctx.outgoing, None, similarity(x, x), 1.0, 32
    )  # with a rate of 1 each update gives the same


def test_a_gate_lets_many_read_or_one_write():
    gate = _Gate("the thing")
    with gate.reading(), gate.reading():
        with pytest.raises(RuntimeError, match="the thing is in use"), gate.writing():
            pass
    with gate.writing():
        for enter in (gate.reading, gate.writing):
            with pytest.raises(RuntimeError, match="the thing is"), enter():
                pass
    for enter in (gate.reading, gate.writing):  # an error inside leaves it open
        with pytest.raises(KeyError), enter():
            raise KeyError
    with gate.writing():
        pass


def test_contexts_of_different_threads_do_not_meet():
    pairs = [make(np.random.default_rng(i), (2, 50, 40)) for i in range(8)]
    contexts, alone = ([context(rate=0.2) for _ in pairs] for _ in range(2))

    def learn(ctx, x, y):
        for _ in range(10):
            ctx.update(x, y)
            ctx.update_step(x[0], y[0])

    from_threads(8, lambda i: learn(contexts[i], *pairs[i]))
    for ctx, single, (x, y) in zip(contexts, alone, pairs, strict=True):
        learn(single, x, y)
        assert_equiv(ctx.outgoing, single.outgoing, scale=0.0)


# --- the functions by themselves ---

SPARE = np.ones((4, 4), np.float32)
BAD_MATRICES = {
    "another dtype": np.ones((4, 4)),
    "an integer": np.ones((4, 4), int),
    "another shape": np.ones((3, 4), np.float32),
    "a vector": np.ones(4, np.float32),
    "a number": np.float32(1),
    "one row for all": np.broadcast_to(np.ones(4, np.float32), (4, 4)),
    "one row for all, writeable": np.lib.stride_tricks.as_strided(SPARE, (4, 4), (0, 4)),
    "Fortran order": np.asfortranarray(np.arange(16, dtype=np.float32).reshape(4, 4)),
    "every other column": np.ones((4, 8), np.float32)[:, ::2],
    "unaligned": np.zeros(65, np.uint8)[1:].view(np.float32).reshape(4, 4),
}


def took(*args):
    return np.empty(args[1], args[2])


@pytest.mark.parametrize("bad", BAD_MATRICES)
@pytest.mark.parametrize(
    "call",
    [
        lambda C: _fold(C4, 0.5, C),
        lambda C: update_into(X, Y, slice(None), 0.5, C, took),
        lambda C: update_step_into(X, Y, 0.5, C, took),
        lambda C: update_step_into(X[0], Y[0], 0.5, C, took),
    ],
    ids=["fold", "update_into", "update_step_into", "update_step_into, one token"],
)
def test_a_matrix_that_cannot_be_written_to_is_refused_whole(call, bad):
    C = BAD_MATRICES[bad]
    before = np.array(C)
    with pytest.raises((TypeError, ValueError), match=r"^(out|C): "):
        call(C)
    assert np.array_equal(C, before)


BACKWARD = dict(x=X, context=C4, grad_out=Y, out=np.zeros_like(X))


@pytest.mark.parametrize("place", BACKWARD)
@pytest.mark.parametrize(
    "bad",
    [
        X.astype(np.float64),
        X.astype(int),
        X[0],
        X[:, :3],
        X[:3],
        X[::-1],
        np.broadcast_to(X[0], X.shape),
        None,
    ],
    ids=lambda a: f"{getattr(a, 'shape', a)} {getattr(a, 'dtype', '')}",
)
def test_backward_into_refuses_misfits_before_it_writes(place, bad):
    given_ = BACKWARD | {"out": np.zeros_like(X)}
    out = given_["out"]
    given_[place] = bad
    with pytest.raises((TypeError, ValueError), match=r"^(x|context|grad_out|out): "):
        backward_into(given_["x"], given_["context"], 0.5, given_["grad_out"], given_["out"])
    assert not out.any()


@pytest.mark.parametrize("place", ["x", "grad_out"])
def test_backward_into_refuses_an_output_that_overlaps(place):
    operands = BACKWARD | {"out": BACKWARD[place]}
    before = operands["out"].copy()
    with pytest.raises(ValueError, match=f"^out: overlaps {place}"):
        backward_into(
            operands["x"], operands["context"], 0.5, operands["grad_out"], operands["out"]
        )
    assert np.array_equal(operands["out"], before)


@pytest.mark.parametrize(
    ("x", "y"), [(X, Y[:5]), (X, Y[0]), (X[0], X), (X, Y.astype(np.float64)), (X[None], Y[None])]
)
@pytest.mark.parametrize("into", ["update_into", "update_step_into"])
def test_pairs_that_do_not_fit_are_refused_before_anything_is_written(into, x, y):
    C = C4.copy()
    learn = {
        "update_into": partial(update_into, x, y, slice(None)),
        "update_step_into": partial(update_step_into, x, y),
    }[into]
    with pytest.raises((TypeError, ValueError), match=r"^(x|y): "):
        learn(0.5, C, took)
    assert np.array_equal(C, C4)


def test_rows_of_update_into_are_checked():
    for rows in ([0, 6], [0.5, 1.0], [[0, 1]]):
        with pytest.raises((TypeError, ValueError), match=r"^rows: "):
            update_into(X, Y, np.array(rows), 0.5, C4.copy(), took)


def test_usual_values_take_the_quick_way():
    # Same results either way; but the quick one is why the function is written as it is.
    assert _spread(64, 32) == slice(0, 64, 2)
    columns = np.ones((6, 3)) * [1.0, 2.0, 0.0]
    columns[:, 1] = X[:, 0]
    assert _standardise(columns, False).exponent is None


@pytest.mark.parametrize("width", [3, 5])
def test_rows_of_another_width_than_the_context_are_refused(width):
    x, out = np.ones((6, width), np.float32), np.zeros((6, width), np.float32)
    with pytest.raises(ValueError, match=r"^context: shape \(4, 4\)"):
        backward_into(x, np.eye(4, dtype=np.float32), 0.5, x.copy(), out)
    assert not out.any()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-7, 1e5 + 0.1])
def test_a_constant_feature_in_float64_has_no_spread_even_without_a_floor(value):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 29, 4))
    x[:, 1] = value
    ctx = SharedAttentionContext(update_rate=1.0, dtype=np.float64, floor=0.0)
    ctx.update(x, y)
    assert not ctx.outgoing[1].any()
    assert ctx.outgoing[[0, 2, 3]].all()
