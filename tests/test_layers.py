"""Every layer against its reference: shapes, layouts, extreme values, aliases, gradients,
memory.
"""

import math
import sys
import warnings

import numpy as np
import pytest
from conftest import DTYPES, LAYOUTS, dtypes, kinds, lay, layouts, make, seeds
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.gemm import _PANEL_BYTES, panels, unbuffered
from ctxlab.measure import traced_peak
from ctxlab.models import layers
from ctxlab.models.layers import (
    _APPROXIMATE,
    _CUBIC,
    _add_rows,
    _check_form,
    _check_operands,
    _norm_requirement,
    _renorm_into,
    _sigmoid,
    adam_into,
    cross_entropy,
    cross_entropy_into,
    embedding_backward_into,
    embedding_into,
    gelu,
    gelu_backward_into,
    gelu_into,
    gelu_vjp,
    gradient_norm,
    layer_norm,
    layer_norm_vjp,
    linear,
    linear_backward_into,
    linear_into,
    norm_backward_into,
    norm_into,
    rms_norm,
    swiglu,
    swiglu_backward_into,
    swiglu_into,
)
from ctxlab.testing import assert_equiv, numeric_gradient
from ctxlab.workspace import Workspace

heights, widths = st.integers(0, 7), st.integers(1, 7)
forms = st.sampled_from(_APPROXIMATE)
epsilons = st.sampled_from([1e-5, 1e-12, 0.1])
SEVERAL = [
    (700, 300),
    (3, 70_000),
    (70_000, 3),
    (1, 9),
    (9, 1),
]  # panels: 4, 3 of one row each, 4, 1, 1


pytestmark = pytest.mark.usefixtures("one_thread")


# --- what "equals the reference" means ---
#
# A sum of D products may be off by c * eps * D times the size of its terms; `tiny` is for numbers
# below the smallest normal one. Where the size itself leaves the range of the dtype there is
# nothing to compare.


def agree(actual, expected, scale, depth=1, c=4.0):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    info = np.finfo(expected.dtype)
    with np.errstate(all="ignore"):
        scale = np.broadcast_to(np.asarray(scale, np.float64), expected.shape) + float(info.tiny)
        fine = np.isfinite(expected) & (scale < float(info.max))
    assert_equiv(actual[fine], expected[fine], depth=depth, scale=scale[fine], c=c)


def complaints(f):
    """What `f()` gives, and the kinds of floating-point trouble that NumPy warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = f()
    return result, {str(w.message).partition(" encountered")[0] for w in caught}


def quieter(f, reference, scale=0.0):
    """`f()`, which must warn of nothing that the reference does not warn of, and what the reference
    gives. A sum whose terms, of that size, leave the range may overflow in one order and not in
    another.
    """
    (want, known), (got, heard) = complaints(reference), complaints(f)
    if not np.all(scale < float(np.finfo(want.dtype).max)):
        known = known | {"invalid value", "overflow"}
    assert heard <= known
    return got, want


def full(shape, dtype):
    return np.full(shape, np.nan, dtype)


def wide(*arrays):
    return [np.abs(a.astype(np.float64)) for a in arrays]


def norm_scale(x, w, b, eps):
    """Size of the terms behind an entry of a normalised row."""
    with np.errstate(all="ignore"):
        X, W = wide(x, w)
        centred = x.astype(np.float64) - (
            0 if b is None else x.astype(np.float64).mean(axis=1, keepdims=True)
        )
        var = np.mean(centred**2, axis=1, keepdims=True)
        largest = X.max(axis=1, keepdims=True, initial=0)
        # Rounding the mean moves each entry by eps |x|, and the variance by twice that.
        return largest / np.sqrt(var + eps) * (1 + largest / np.sqrt(var + eps)) * W + (
            0 if b is None else wide(b)[0]
        )


def normed(x, w, b, eps):
    return rms_norm(x, w, eps) if b is None else layer_norm(x, w, b, eps)


def assert_gradients(f, G, arguments, gradients, c=3e7):
    """`gradients` of sum(G * f(*arguments)), by central differences."""
    for i, gradient in enumerate(gradients):

        def of(a, i=i):
            return float(np.sum(G * f(*arguments[:i], a, *arguments[i + 1 :])))

        assert_equiv(
            gradient,
            numeric_gradient(of, arguments[i]),
            c=c,
            scale=max(1.0, np.abs(gradient).max(initial=0)),
        )


# --- norms ---


@given(seeds, heights, widths, dtypes, layouts, layouts, epsilons, st.booleans())
def test_norms_are_the_reference(seed, N, D, dtype, lx, lo, eps, shifted):
    rng = np.random.default_rng(seed)
    x, w, b = (
        lay(make(rng, (N, D), dtype), lx),
        make(rng, D, dtype),
        make(rng, D, dtype) if shifted else None,
    )
    out, stats, kept = lay(full((N, D), dtype), lo), full((2, N), dtype), x.copy()
    assert norm_into(x, w, b, out, stats, eps) is out
    agree(out, normed(x, w, b, eps), norm_scale(x, w, b, eps), depth=D)
    assert np.array_equal(x, kept)
    again = lay(full((N, D), dtype), lo)
    assert _renorm_into(x, stats, w, b, again) is again
    assert np.array_equal(again, out)  # to the bit
    assert norm_into(x, w, b, x, stats, eps) is x  # the docment allows it
    agree(x, out, norm_scale(kept, w, b, eps), depth=D)


@given(seeds, st.integers(1, 7), widths, dtypes, kinds, epsilons, st.booleans())
def test_norms_of_extreme_rows(seed, N, D, dtype, kind, eps, shifted):
    rng = np.random.default_rng(seed)
    x, w, b = (
        make(rng, (N, D), dtype, kind),
        make(rng, D, dtype),
        make(rng, D, dtype) if shifted else None,
    )
    got, want = quieter(
        lambda: norm_into(x, w, b, full((N, D), dtype), full((2, N), dtype), eps),
        lambda: normed(x, w, b, eps),
    )
    agree(got, want, norm_scale(x, w, b, eps), depth=D)
    assert np.array_equal(np.isnan(got), np.isnan(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30, 1e30, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("shifted", [True, False])
def test_norms_of_constant_rows(value, shifted, dtype):
    x, w, b = (
        np.full((3, 5), value, dtype),
        np.ones(5, dtype),
        np.full(5, 2, dtype) if shifted else None,
    )
    stats = full((2, 3), dtype)
    got, want = quieter(
        lambda: norm_into(x, w, b, full((3, 5), dtype), stats), lambda: normed(x, w, b, 1e-5)
    )
    agree(got, want, norm_scale(x, w, b, 1e-5), depth=5)
    if not math.isfinite(value):
        assert np.isnan(got).all() == np.isnan(want).all()
        return
    ws, dx, dw, db = (
        Workspace(),
        full((3, 5), dtype),
        full(5, dtype),
        full(5, dtype) if shifted else None,
    )
    norm_backward_into(x, stats, w, np.ones((3, 5), dtype), dx, dw, db, ws)  # warnings are errors
    assert np.isfinite(dx).all()
    assert np.isfinite(dw).all()
    if shifted:
        assert_equiv(
            dx, np.zeros_like(dx), scale=math.sqrt(1e5), depth=5
        )  # what has no spread has no direction


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
@pytest.mark.parametrize("D", [3, 41, 47, 384, 1000])
def test_rows_without_spread_give_the_bias_where_sums_are_exact(D, eps):
    # The mean of D ones is 1: one that is off in its last digit counts as spread where eps is
    # small.
    x = np.arange(1, 9, dtype=np.float32)[:, None] * np.ones(D, np.float32)
    w, b = np.ones(D, np.float32), np.full(D, 2, np.float32)
    assert (layer_norm(x, w, b, eps) == 2).all()
    assert (norm_into(x, w, b, np.empty_like(x), np.empty((2, 8), np.float32), eps) == 2).all()


def test_rows_do_not_meet():
    x = make(np.random.default_rng(0), (6, 4))
    w, b, stats = np.ones(4, np.float32), np.zeros(4, np.float32), full((2, 6), np.float32)
    clean = norm_into(x, w, b, np.empty_like(x), stats).copy()
    x[2], x[4] = np.nan, 1e30
    with np.errstate(over="ignore"):
        dirty = norm_into(x, w, b, np.empty_like(x), stats)
    assert np.array_equal(np.delete(clean, [2, 4], axis=0), np.delete(dirty, [2, 4], axis=0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("shape", SEVERAL, ids=str)
def test_norms_over_several_panels(shape, shifted, dtype):
    (N, D), rng, ws = shape, np.random.default_rng(0), Workspace(growth="exact")
    x, G = make(rng, (2, N, D), dtype)
    w, b = make(rng, D, dtype), make(rng, D, dtype) if shifted else None
    stats, out = full((2, N), dtype), full((N, D), dtype)
    agree(norm_into(x, w, b, out, stats), normed(x, w, b, 1e-5), norm_scale(x, w, b, 1e-5), depth=D)
    assert np.array_equal(_renorm_into(x, stats, w, b, full((N, D), dtype)), out)
    dx, dw, db = full((N, D), dtype), full(D, dtype), full(D, dtype) if shifted else None
    norm_backward_into(x, stats, w, G, dx, dw, db, ws)
    X, S, g = x.astype(np.float64), stats.astype(np.float64), G.astype(np.float64) * w
    hat = (X - S[0, :, None]) * S[1, :, None]
    inner = (
        g
        - hat * np.mean(g * hat, axis=1, keepdims=True)
        - (g.mean(axis=1, keepdims=True) if shifted else 0)
    )
    size = np.abs(hat).max() ** 2 * np.abs(g).max()
    agree(dx, (inner * S[1, :, None]).astype(dtype), S[1, :, None] * size, depth=D)
    agree(dw, np.sum(G * hat, axis=0).astype(dtype), np.linalg.norm(G * hat, axis=0), depth=N)
    if shifted:
        agree(db, G.sum(axis=0, dtype=np.float64).astype(dtype), np.linalg.norm(G, axis=0), depth=N)
    m = next(panels(N, D * x.itemsize)).stop
    assert ws.peak_bytes == _norm_requirement(dtype).nbytes(D=D, m=m)
    aliased, same = G.copy(), [full(D, dtype) for _ in range(2)]
    norm_backward_into(x, stats, w, aliased, aliased, same[0], same[1] if shifted else None, ws)
    assert np.array_equal(aliased, dx)
    assert np.array_equal(same[0], dw)
    assert not shifted or np.array_equal(same[1], db)


@given(seeds, heights, widths, layouts, layouts, st.booleans())
def test_gradients_of_norms(seed, N, D, lx, lg, shifted):
    rng = np.random.default_rng(seed)
    x, G = lay(make(rng, (N, D), np.float64), lx), lay(make(rng, (N, D), np.float64), lg)
    w, b = make(rng, D, np.float64), make(rng, D, np.float64) if shifted else None
    stats, dx = full((2, N), np.float64), lay(full((N, D), np.float64), lg)
    eps = 0.1  # far from the kink of a row without spread
    norm_into(x, w, b, np.empty_like(x), stats, eps)
    dw, db = full(D, np.float64), full(D, np.float64) if shifted else None
    assert norm_backward_into(x, stats, w, G, dx, dw, db, Workspace(debug=True)) is dx
    given_, found = ((x, w, b), (dx, dw, db)) if shifted else ((x, w), (dx, dw))
    assert_gradients(lambda x, w, b=None: normed(x, w, b, eps), G, given_, found)
    if shifted:
        for got, want in zip((dx, dw, db), layer_norm_vjp(x, w, G, eps), strict=True):
            assert_equiv(
                got, want, depth=N + D, scale=1 + np.abs(G).sum() * np.abs(w).max(initial=0) / eps
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 33, 70_000])
@pytest.mark.parametrize("N", [0, 1, 5, 300])
def test_the_scratch_of_a_norm_is_known(N, D, dtype):
    if N * D > 1e6:
        N = 4
    ws, x = Workspace(growth="exact"), np.ones((N, D), dtype)
    norm_backward_into(
        x,
        np.ones((2, N), dtype),
        x[0] if N else np.ones(D, dtype),
        x,
        np.empty_like(x),
        *full((2, D), dtype),
        ws,
    )
    m = next((rows.stop for rows in panels(N, D * x.itemsize)), 0)
    assert ws.peak_bytes == _norm_requirement(dtype).nbytes(D=D, m=m)
    assert ws.used_bytes == 0


# --- linear maps ---


@given(seeds, heights, widths, widths, dtypes, layouts, layouts, layouts, st.booleans(), kinds)
def test_linear_is_the_reference(seed, N, D, F, dtype, lx, lw, lo, shifted, kind):
    rng = np.random.default_rng(seed)
    x, w = lay(make(rng, (N, D), dtype, kind), lx), lay(make(rng, (F, D), dtype), lw)
    b, out = make(rng, F, dtype) if shifted else None, lay(full((N, F), dtype), lo)
    with np.errstate(all="ignore"):
        X, W = wide(x, w)
        scale = X @ W.T + (wide(b)[0] if shifted else 0)
    got, want = quieter(lambda: linear_into(x, w, b, out), lambda: linear(x, w, b), scale)
    assert got is out
    agree(got, want, scale, depth=D + 1)


@given(seeds, heights, widths, widths, layouts, layouts, layouts, st.booleans(), st.booleans())
def test_gradients_of_a_linear_map(seed, N, D, F, lx, lw, lg, shifted, wanted):
    rng = np.random.default_rng(seed)
    x, w, G = (
        lay(make(rng, shape, np.float64), layout)
        for shape, layout in (((N, D), lx), ((F, D), lw), ((N, F), lg))
    )
    b, out = (
        make(rng, F, np.float64) if shifted else None,
        full((N, D), np.float64) if wanted else None,
    )
    dw, db = full((F, D), np.float64), full(F, np.float64) if shifted else None
    assert linear_backward_into(x, w, G, out, dw, db) is out
    if wanted:
        assert_gradients(lambda x: linear(x, w, b), G, (x,), (out,))
    assert_gradients(lambda w: linear(x, w, b), G, (w,), (dw,))
    if shifted:
        assert_gradients(lambda b: linear(x, w, b), G, (b,), (db,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SEVERAL, ids=str)
def test_a_vector_is_added_to_every_row(shape, layout, dtype):
    rng = np.random.default_rng(0)
    x, v = make(rng, shape, dtype), make(rng, shape[1], dtype)
    out = lay(x, layout)
    assert _add_rows(out, v) is out
    assert np.array_equal(out, x + v)
    assert _add_rows(out, None) is out
    assert np.array_equal(out, x + v)


# --- GELU ---


def gelu_pair(x, b, ws, form, layout="C"):
    """x + b, Phi of it, and GELU of it, as `gelu_into` leaves them."""
    z, cdf, out = (
        lay(x, layout),
        lay(full(x.shape, x.dtype), layout),
        lay(full(x.shape, x.dtype), layout),
    )
    assert gelu_into(z, b, cdf, out, ws, form) is out
    return z, cdf, out


@given(seeds, heights, widths, dtypes, layouts, forms, st.booleans(), kinds)
def test_gelu_is_the_reference(seed, N, F, dtype, layout, form, shifted, kind):
    rng, ws = np.random.default_rng(seed), Workspace(debug=True)
    x, b = 2 * make(rng, (N, F), dtype, kind), make(rng, F, dtype) if shifted else None
    shifted_x = x if b is None else x + b
    (z, cdf, out), want = quieter(
        lambda: gelu_pair(x, b, ws, form, layout), lambda: gelu(shifted_x, form)
    )
    assert np.array_equal(z, shifted_x, equal_nan=True)
    agree(out, want, np.abs(shifted_x), c=8)
    assert np.array_equal(np.isnan(out), np.isnan(want))
    assert np.all((cdf >= 0) & (cdf <= 1) | np.isnan(x))
    assert ws.used_bytes == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", _APPROXIMATE)
def test_the_distribution_function_holds_over_the_whole_range(form, dtype):
    # The float32 polynomial was fitted up to 6.5; beyond it must neither turn round nor overflow
    # into NaN.
    near, far = np.linspace(-60, 60, 120_001), np.geomspace(60, np.finfo(dtype).max / 4, 4001)
    x = np.concatenate([-far[::-1], near, far]).astype(dtype)[:, None]
    _, cdf, out = gelu_pair(x, None, Workspace(), form)
    with np.errstate(over="ignore"):
        want = gelu(x, form)
    agree(out, want, np.abs(x), c=8)
    assert np.array_equal(cdf[x > 10], np.ones_like(cdf[x > 10]))
    assert np.all(np.abs(cdf[x < -10]) < 4 * np.finfo(dtype).eps)
    exact = 0.5 * (1 + np.vectorize(math.erf)(near / math.sqrt(2)))
    error = np.abs(gelu_pair(near.astype(dtype)[:, None], None, Workspace(), form)[1][:, 0] - exact)
    assert error.max() < (4 * np.finfo(dtype).eps if form == "none" else 5e-4)
    assert form == "none" or error.max() > 1e-4  # the two forms can be told apart


@given(seeds, heights, widths, layouts, forms)
def test_gradients_of_gelu(seed, N, F, layout, form):
    rng, ws = np.random.default_rng(seed), Workspace(debug=True)
    x, G = 2 * make(rng, (N, F), np.float64), lay(make(rng, (N, F), np.float64), layout)
    z, cdf, _ = gelu_pair(x, None, ws, form)
    dx = lay(full((N, F), np.float64), layout)
    assert gelu_backward_into(z, cdf, G, dx, ws, form) is dx
    assert_gradients(lambda x: gelu(x, form), G, (x,), (dx,))
    agree(gelu_vjp(x, G, form), dx, np.abs(G) * slope_scale(x, form))
    assert gelu_backward_into(z, cdf, G, G, ws, form) is G  # the docment allows it
    assert np.array_equal(G, dx)


def slope_scale(x, form):
    """Size of the terms of the derivative: Phi, and x times a slope that tanh gets by
    cancellation.
    """
    X = np.abs(x.astype(np.float64))
    return 1 + (X if form == "none" else np.where(X < 10, 2 * X * (1 + 3 * _CUBIC * X * X), 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", _APPROXIMATE)
@pytest.mark.parametrize("shape", SEVERAL, ids=str)
def test_gelu_over_several_panels(shape, form, dtype):
    rng, ws = np.random.default_rng(0), Workspace(growth="exact")
    x, G = 3 * make(rng, (2, *shape), dtype)
    b = make(rng, shape[1], dtype)
    z, cdf, out = gelu_pair(x, b, ws, form)
    agree(out, gelu(x + b, form), np.abs(x + b), c=8)
    rows = next(panels(shape[0], shape[1] * x.itemsize)).stop
    assert ws.peak_bytes == rows * shape[1] * x.itemsize
    dx = full(shape, dtype)
    gelu_backward_into(z, cdf, G, dx, ws, form)
    assert ws.peak_bytes == 2 * rows * shape[1] * x.itemsize
    want = gelu_vjp(z.astype(np.float64), G.astype(np.float64), form).astype(dtype)
    agree(dx, want, np.abs(G) * slope_scale(z, form))
    again = full(shape, dtype)
    gelu_backward_into(z, cdf, G, G, ws, form, activated=again)
    assert np.array_equal(G, dx)
    assert np.array_equal(again, out)  # what the forward pass gave, to the bit
    gelu_backward_into(z, cdf, np.ones_like(x), dx, ws, form, activated=cdf)
    assert np.array_equal(cdf, out)  # in place of what it is made from


def test_gelu_far_out_has_the_slope_of_its_asymptote():
    # Squares of such numbers overflow in float32. The slope is 1 on the right and 0 on the left all
    # the same. (PyTorch's tanh form and ours give NaN beyond 1.8e19.)
    for dtype, form, largest in (
        (np.float32, "none", 1e30),
        (np.float32, "tanh", 1e18),
        (np.float64, "tanh", 1e30),
    ):
        far = np.geomspace(1e3, largest, 30)
        x = np.concatenate([far, -far]).astype(dtype)[None]
        z, cdf, out = gelu_pair(x, None, Workspace(), form)
        assert np.array_equal(out, np.maximum(x, 0))
        with np.errstate(over="ignore"):
            dx = gelu_backward_into(z, cdf, np.ones_like(x), np.empty_like(x), Workspace(), form)
        assert np.array_equal(dx, (x > 0).astype(dtype))


UNKNOWN = {
    "gelu": lambda x: gelu(x, "fast"),
    "gelu_vjp": lambda x: gelu_vjp(x, x, "fast"),
    "gelu_into": lambda x: gelu_into(x, np.ones(3), x.copy(), x.copy(), Workspace(), "fast"),
    "gelu_backward_into": lambda x: gelu_backward_into(x, x, x, x, Workspace(), "fast"),
}


@pytest.mark.parametrize("function", UNKNOWN)
def test_a_form_that_is_not_known_changes_nothing(function):
    x = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"^approximate: 'fast', needed one of \('none', 'tanh'\)"):
        UNKNOWN[function](x)
    assert (x == 1).all()


# --- SwiGLU ---


@given(seeds, heights, widths, dtypes, layouts, kinds)
def test_swiglu_is_the_reference(seed, N, F, dtype, layout, kind):
    rng = np.random.default_rng(seed)
    a, b = (lay(make(rng, (N, F), dtype, k), layout) for k in (kind, "normal"))
    out = lay(full((N, F), dtype), layout)
    got, want = quieter(lambda: swiglu_into(a, b, out), lambda: swiglu(a, b))
    assert got is out
    with np.errstate(all="ignore"):
        agree(got, want, np.abs(a * b))
    assert np.array_equal(np.isnan(got), np.isnan(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [4, 8])
def test_columns_a_few_entries_apart_are_seen_as_such(step, dtype):
    # np.negative of NumPy 2.4 takes them for contiguous, and writes between them.
    x, out = np.ones((6, step), dtype), np.zeros((6, step), dtype)
    x[:, 0] = np.arange(6)
    swiglu_into(x[:, :1], x[:, :1], out[:, :1])
    agree(out[:, :1], swiglu(x[:, :1].copy(), x[:, :1].copy()), np.square(x[:, :1]))
    assert not out[:, 1:].any()


@given(seeds, heights, widths, layouts)
def test_gradients_of_swiglu(seed, N, F, layout):
    rng, ws = np.random.default_rng(seed), Workspace(debug=True)
    a, b, G = (lay(make(rng, (N, F), np.float64), layout) for _ in range(3))
    da, db, kept = lay(full((N, F), np.float64), layout), full((N, F), np.float64), G.copy()
    swiglu_backward_into(a, b, G, da, db, ws)
    assert_gradients(swiglu, kept, (a, b), (da, db))
    assert np.array_equal(G, kept)
    assert ws.used_bytes == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SEVERAL, ids=str)
def test_swiglu_over_several_panels(shape, dtype):
    rng, ws = np.random.default_rng(0), Workspace(growth="exact")
    a, b, G = 3 * make(rng, (3, *shape), dtype)
    agree(swiglu_into(a, b, full(shape, dtype)), swiglu(a, b), np.abs(a * b))
    da, db = full((2, *shape), dtype)
    swiglu_backward_into(a, b, G, da, db, ws)
    A = a.astype(np.float64)
    sigma = 1 / (1 + np.exp(-A))
    agree(
        da, (G * b * sigma * (1 + A * (1 - sigma))).astype(dtype), np.abs(G * b) * (1 + np.abs(a))
    )
    agree(db, (G * A * sigma).astype(dtype), np.abs(G * a))
    assert (
        ws.peak_bytes == next(panels(shape[0], shape[1] * a.itemsize)).stop * shape[1] * a.itemsize
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_far_out_has_the_slope_of_its_asymptote(dtype):
    a = np.array([[1e10, 1e30, -1e10, -1e30]], dtype)
    b = np.ones_like(a)
    assert np.array_equal(swiglu_into(a, b, np.empty_like(a)), np.maximum(a, 0))
    da, db = np.empty((2, *a.shape), dtype)
    swiglu_backward_into(a, b, b, da, db, Workspace())
    assert np.array_equal(da, (a > 0).astype(dtype))
    assert np.array_equal(db, np.maximum(a, 0))


# --- embedding ---

id_types = st.sampled_from([np.int8, np.int32, np.int64, np.uint8, np.uint16, np.uint64])


@given(seeds, heights, widths, widths, dtypes, id_types)
def test_embedding_is_the_reference(seed, N, V, D, dtype, id_type):
    rng = np.random.default_rng(seed)
    table, ids = make(rng, (V, D), dtype, "hostile"), rng.integers(0, V, N).astype(id_type)
    out = full((N, D), dtype)
    assert embedding_into(table, ids, out) is out
    assert np.array_equal(out, table[ids], equal_nan=True)


@given(seeds, heights, widths, widths, layouts)
def test_gradients_of_an_embedding(seed, N, V, D, layout):
    rng = np.random.default_rng(seed)
    table, ids, G = (
        make(rng, (V, D), np.float64),
        rng.integers(0, V, N),
        lay(make(rng, (N, D), np.float64), layout),
    )
    grad = full((V, D), np.float64)
    assert embedding_backward_into(ids, G, grad) is grad
    assert_gradients(lambda table: table[ids], G, (table,), (grad,))
    order = np.zeros_like(table)
    np.add.at(order, ids, G)  # in the order of the tokens: to the bit
    assert np.array_equal(grad, order)


@pytest.mark.parametrize("ids", [[0, 3], [-1, 0], [2**40, 0], [3]], ids=str)
def test_token_numbers_beyond_the_table_are_named(ids):
    out = np.full((len(ids), 2), 7.0)
    with pytest.raises(ValueError, match=r"^ids: .*, needed 0\.\.2$"):
        embedding_into(np.ones((3, 2)), np.array(ids), out)
    with pytest.raises(ValueError, match=r"^targets: .*, needed 0\.\.2$"):
        cross_entropy_into(logits := np.full((len(ids), 3), 7.0), np.array(ids), Workspace())
    assert (out == 7).all()
    assert (logits == 7).all()


@pytest.mark.parametrize("ids", [[0.5], [True], ["a"], [None], [1j], np.array([], float)], ids=repr)
def test_what_is_no_token_number_is_refused(ids):
    with pytest.raises(TypeError, match=r"^ids: "):
        embedding_into(np.ones((3, 2)), ids, np.ones((len(ids), 2)))
    with pytest.raises(TypeError, match=r"^targets: "):
        cross_entropy_into(np.zeros((len(ids), 3)), ids, Workspace())


@pytest.mark.parametrize("ids", [[-1, 0], [0, 3]], ids=str)
def test_the_gradient_of_an_embedding_checks_its_tokens(ids):
    grad = np.full((3, 2), 7.0)
    with pytest.raises(ValueError, match=r"^ids: .*, needed 0\.\.2$"):
        embedding_backward_into(np.array(ids), np.ones((2, 2)), grad)
    assert (grad == 7).all()


# --- cross-entropy ---


@given(seeds, st.integers(1, 7), widths, dtypes, layouts, st.sampled_from([0.1, 3, 100]))
def test_cross_entropy_is_the_reference(seed, N, V, dtype, layout, size):
    rng = np.random.default_rng(seed)
    z, targets = size * make(rng, (N, V), dtype), rng.integers(0, V, N)
    logits, ws = lay(z, layout), Workspace(debug=True)
    loss = cross_entropy_into(logits, targets, ws)
    assert type(loss) is float
    scale = 1 + float(np.abs(z).max())
    assert_equiv(
        np.asarray(loss, dtype),
        np.asarray(cross_entropy(z, targets), dtype),
        depth=V,
        scale=scale,
        c=8,
    )
    assert_equiv(logits.sum(axis=1), np.zeros(N, dtype), depth=V, scale=1.0)
    if dtype == np.float64 and size < 100:
        assert_gradients(lambda z: cross_entropy(z, targets), 1.0, (z,), (logits,))
    assert ws.used_bytes == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(700, 300), (3, 70_000), (5000, 3)], ids=str)
def test_cross_entropy_of_large_logits(shape, dtype):
    rng, ws = np.random.default_rng(0), Workspace(growth="exact")
    z, targets = 5 * make(rng, shape, dtype), rng.integers(0, shape[1], shape[0])
    Z, rows = z.astype(np.float64), np.arange(len(z))
    P = np.exp(Z - Z.max(axis=1, keepdims=True))
    P /= P.sum(axis=1, keepdims=True)
    want = -np.mean(np.log(P[rows, targets]))
    P[rows, targets] -= 1
    assert_equiv(
        np.asarray(cross_entropy_into(z, targets, ws)),
        np.asarray(want),
        c=4 * (2**29 if dtype == np.float32 else 64),
    )
    size = np.abs(P) * (1 + np.abs(Z).max())  # an error of a logit is one of its exponential
    size[rows, targets] = 1  # 1 - p
    agree(z, (P / len(z)).astype(dtype), size / len(z), depth=shape[1])
    assert ws.peak_bytes == len(z) * z.itemsize


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits_cost_what_they_should(dtype):
    def loss(*logits, target):
        z = np.array([logits], dtype)
        return cross_entropy_into(z, np.array([target]), Workspace()), z[0].tolist()

    assert loss(1000, 0, target=0) == (0.0, [0.0, 0.0])
    assert loss(1000, 0, target=1) == (1000.0, [1.0, -1.0])
    assert loss(1e30, -1e30, target=1) == (2 * float(dtype(1e30)), [1.0, -1.0])
    assert loss(1e30, 1e30, target=0) == (pytest.approx(math.log(2), rel=1e-6), [-0.5, 0.5])
    assert loss(-1e30, -np.inf, target=0) == (0.0, [0.0, 0.0])
    assert loss(0, -np.inf, target=1) == (math.inf, [1.0, -1.0])
    for bad in (np.nan, np.inf):
        with np.errstate(invalid="ignore"):
            assert math.isnan(loss(bad, 0, target=1)[0]) or bad == np.inf


@pytest.mark.parametrize(
    ("shape", "targets", "why"),
    [
        ((3, 2), [0, 1], r"shape \(2,\), needed \(N,\) = \(3,\)"),
        ((2, 2), [0, 1, 1], r"shape \(3,\), needed \(N,\) = \(2,\)"),
        ((0, 2), [], "none to learn from"),
        ((2, 2), [0, 2], r"0\.\.2, needed 0\.\.1"),
        ((2, 2), [0, -1], r"-1\.\.0, needed 0\.\.1"),
    ],
    ids=str,
)
def test_targets_must_fit_their_logits(shape, targets, why):
    z = np.full(shape, 7.0)
    for form in (lambda z, t: cross_entropy_into(z, t, Workspace()), cross_entropy):
        with pytest.raises(ValueError, match=f"^targets: {why}"):
            form(z, np.array(targets, int))
    assert (z == 7).all()


@given(seeds, st.integers(1, 7), widths, dtypes)
def test_ignored_targets_count_nowhere(seed, N, V, dtype):
    rng = np.random.default_rng(seed)
    z, targets = make(rng, (N, V), dtype), rng.integers(0, V, N)
    targets[rng.random(N) < 0.5] = -100
    some, dz = targets != -100, z.copy()
    for form in (lambda z, t, i: cross_entropy_into(z, t, Workspace(), i), cross_entropy):
        if not some.any():
            with pytest.raises(ValueError, match=r"^targets: none to learn from"):
                form(z.copy(), targets, -100)
            return
    want, dwant = cross_entropy(z[some], targets[some]), z[some].copy()
    cross_entropy_into(dwant, targets[some], Workspace())
    assert cross_entropy(z, targets, -100) == want
    got = cross_entropy_into(dz, targets, Workspace(), -100)
    assert abs(got - want) <= 64 * np.finfo(dtype).eps * (1 + np.abs(z).max())
    assert not dz[~some].any()
    assert_equiv(dz[some], dwant, scale=1 / some.sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits_and_tokens_that_are_ruled_out(dtype):
    big = float(np.finfo(dtype).max)
    z = np.array([[big, -big, 0.0], [-np.inf, 1.0, 1.0], [5.0, -np.inf, 3.0]], dtype)
    targets, ws = np.array([1, 2, 0]), Workspace()
    dz, want = z.copy(), cross_entropy(z, targets)
    assert_equiv(cross_entropy_into(dz, targets, ws), want)  # inf in float64, not in float32
    assert np.isfinite(dz).all()
    assert dz[0].tolist() == [dtype(1 / 3), dtype(-1 / 3), 0]
    assert_equiv(dz.sum(axis=1), np.zeros(3, dtype), scale=1.0)
    for bad in (np.nan, np.inf):
        z = np.array([[0.0, bad], [0.0, 1.0]], dtype)
        with np.errstate(invalid="ignore"):
            losses = cross_entropy(z, [0, 1]), cross_entropy_into(z, np.array([0, 1]), ws)
        assert np.isnan(losses).all()


@pytest.mark.parametrize("form", ["fast", "", None, "TANH"])
def test_a_form_of_gelu_that_does_not_exist_is_named(form):
    with pytest.raises(ValueError, match=r"^approximate: "):
        _check_form(form)


def test_targets_must_be_a_vector():
    z = np.full((2, 3), 7.0)
    with pytest.raises((ValueError, TypeError), match=r"^targets: "):
        cross_entropy_into(z, np.array([[1], [2]]), Workspace())
    assert (z == 7).all()


# --- Adam ---


def adam_plain(
    p, g, m, v, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, scale=1.0
):
    (b1, b2), g = betas, g * scale
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    return p - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + weight_decay * p), m, v


OPTIONS = [
    {},
    dict(lr=0.05, weight_decay=0.3),
    dict(betas=(0.0, 0.5), eps=1e-3),
    dict(scale=0.01, weight_decay=0.01, betas=(0.8, 0.9)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "shape", [(), (1,), (0,), (7, 3), (2, 3, 4), (50_001,), (300, 301)], ids=str
)
def test_adam_is_its_formula(shape, options, dtype):
    rng, ws, steps = (
        np.random.default_rng(0),
        Workspace(growth="exact"),
        3 if math.prod(shape) > 1000 else 25,
    )
    p, m, v = np.asarray(make(rng, shape, dtype)), np.zeros(shape, dtype), np.zeros(shape, dtype)
    plain = [a.astype(np.float64) for a in (p, m, v)]
    for t in range(1, steps + 1):
        g = np.asarray(make(rng, shape, dtype))
        adam_into(p, g, m, v, t, ws, **options)
        plain = adam_plain(plain[0], g.astype(np.float64), *plain[1:], t, **options)
    for got, want in zip((p, m, v), plain, strict=True):
        agree(got, want.astype(dtype), np.abs(want).max(initial=0), depth=steps, c=16)
    assert ws.peak_bytes == min(p.nbytes, _PANEL_BYTES // 4)


@pytest.mark.parametrize(
    ("gradient", "scale"), [(1e25, 1e-25), (1e18, 1e-22), (1e-18, 1e18), (3e19, 1e-3)]
)
def test_adam_takes_a_gradient_that_clipping_tamed(gradient, scale):
    # What counts is gradient * scale, which float32 holds with ease; its parts squared would leave
    # the range.
    p, m, v = (np.zeros(3, np.float32) for _ in range(3))
    adam_into(p, np.full(3, gradient, np.float32), m, v, 1, Workspace(), lr=0.01, scale=scale)
    want = adam_plain(
        np.zeros(3), np.full(3, gradient), np.zeros(3), np.zeros(3), 1, lr=0.01, scale=scale
    )
    for got, plain in zip((p, m, v), want, strict=True):
        assert_equiv(got, plain.astype(np.float32), c=32)


def test_adam_ignores_a_gradient_whose_scale_is_zero():
    p, m, v = (np.ones(3, np.float32) for _ in range(3))
    adam_into(p, np.full(3, 1e25, np.float32), m, v, 1, Workspace(), scale=0.0)
    assert_equiv(m, np.full(3, 0.9, np.float32))
    assert_equiv(v, np.full(3, 0.999, np.float32))
    assert np.isfinite(p).all()


@pytest.mark.parametrize("place", ["param", "grad", "m", "v"])
def test_adam_takes_any_layout_or_refuses_it(place):
    # To reshape what is not in C order makes a copy, and a step into a copy would be lost without a
    # word.
    rng = np.random.default_rng(0)
    arrays = dict(
        zip(("param", "grad", "m", "v"), np.abs(make(rng, (4, 3, 4), np.float64)), strict=True)
    )
    want = dict(zip(("param", "m", "v"), adam_plain(*arrays.values(), 1), strict=True))
    arrays[place] = lay(arrays[place], "F")
    kept = {name: a.copy() for name, a in arrays.items()}
    try:
        adam_into(*arrays.values(), 1, Workspace())
    except ValueError as error:
        assert str(error).startswith(f"{place}: ")  # noqa: PT017
        want = kept
    for name, value in want.items():
        assert_equiv(arrays[name], value)


@given(seeds, st.integers(0, 5), dtypes)
def test_the_norm_of_all_gradients(seed, n, dtype):
    rng = np.random.default_rng(seed)
    gradients = {str(i): lay(make(rng, (i, 3), dtype), LAYOUTS[i % 5]) for i in range(n)}
    want = math.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in gradients.values()))
    assert gradient_norm(gradients) == pytest.approx(
        want, rel=1e-5 if dtype == np.float32 else 1e-13
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad):
    norm = gradient_norm({"a": np.ones(3, np.float32), "b": np.array([1, bad], np.float32)})
    assert not math.isfinite(norm)


# --- PyTorch ---


def compare(dtype, tensors, want, got, gradients, G=None, depth=1, scale=None):
    """`got` is `want`, and `gradients` are what PyTorch finds for the tensors behind sum(G
    want).
    """
    torch = sys.modules["torch"]
    (want if G is None else (want * torch.tensor(G)).sum()).backward()
    want = want.detach().numpy()
    assert_equiv(np.asarray(got, dtype), want, depth=depth, c=8, scale=size_of(want))
    for mine, tensor in zip(gradients, tensors, strict=True):
        theirs = tensor.grad.numpy()
        size = size_of(theirs) if scale is None else scale
        assert_equiv(np.asarray(mine, dtype), theirs, depth=depth, c=8, scale=size)


def size_of(a):
    """Size of the terms behind each entry: its own, and that of the entries in the mean."""
    return np.abs(a) + np.sqrt(np.mean(np.square(a, dtype=np.float64)))


def with_gradients(*arrays):
    return [sys.modules["torch"].tensor(a, requires_grad=True) for a in arrays]


TORCH_SHAPES = [(1, 1), (5, 1), (1, 6), (37, 24), (700, 300)]
both = pytest.mark.parametrize("dtype", DTYPES)
shaped = pytest.mark.parametrize("shape", TORCH_SHAPES, ids=str)


@both
@shaped
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_norms_are_those_of_pytorch(torch, shape, eps, dtype):
    rng, ws, (N, D) = np.random.default_rng(0), Workspace(), shape
    x, G = make(rng, (2, *shape), dtype)
    w, b = make(rng, (2, D), dtype)
    out, dx, dw, db, stats = (full(s, dtype) for s in (shape, shape, D, D, (2, N)))
    for bias, norm in ((b, torch.nn.functional.layer_norm), (None, torch.nn.functional.rms_norm)):
        norm_into(x, w, bias, out, stats, eps)
        norm_backward_into(x, stats, w, G, dx, dw, None if bias is None else db, ws)
        tensors = with_gradients(x, w) if bias is None else with_gradients(x, w, bias)
        # A row of one entry has no direction: what is left of its gradient is rounding of such
        # terms.
        scale = (
            None
            if D > 1
            else np.abs(G).max()
            * stats[1].max() ** (2 if bias is None else 1)
            * (1 + np.abs(w).max())
        )
        compare(
            dtype,
            tensors,
            norm(tensors[0], (D,), *tensors[1:], eps=eps),
            out,
            (dx, dw, db)[: len(tensors)],
            G,
            max(shape),
            scale,
        )


@both
@shaped
@pytest.mark.parametrize("shifted", [True, False])
def test_a_linear_map_is_that_of_pytorch(torch, shape, shifted, dtype):
    rng, F, (N, D) = np.random.default_rng(0), 17, shape
    x, w, b, G = (make(rng, s, dtype) for s in (shape, (F, D), F, (N, F)))
    out, dx, dw, db = (full(s, dtype) for s in ((N, F), shape, (F, D), F))
    linear_into(x, w, b if shifted else None, out)
    linear_backward_into(x, w, G, dx, dw, db if shifted else None)
    tensors = with_gradients(x, w, b) if shifted else with_gradients(x, w)
    compare(
        dtype,
        tensors,
        torch.nn.functional.linear(*tensors),
        out,
        (dx, dw, db)[: len(tensors)],
        G,
        max(shape),
    )


@both
@shaped
@pytest.mark.parametrize("form", _APPROXIMATE)
def test_gelu_is_that_of_pytorch(torch, shape, form, dtype):
    rng, ws = np.random.default_rng(0), Workspace()
    x, G = 3 * make(rng, (2, *shape), dtype)
    z, cdf, out = gelu_pair(x, None, ws, form)
    dx, (tensor,) = gelu_backward_into(z, cdf, G, full(shape, dtype), ws, form), with_gradients(x)
    want = torch.nn.functional.gelu(tensor, approximate=form)
    compare(dtype, [tensor], want, out, [dx], G, scale=np.abs(G) * slope_scale(x, form))


@both
@shaped
def test_swiglu_is_that_of_pytorch(torch, shape, dtype):
    rng, ws = np.random.default_rng(0), Workspace()
    a, b, G = 3 * make(rng, (3, *shape), dtype)
    da, db = full((2, *shape), dtype)
    out, tensors = swiglu_into(a, b, full(shape, dtype)), with_gradients(a, b)
    swiglu_backward_into(a, b, G, da, db, ws)
    compare(dtype, tensors, torch.nn.functional.silu(tensors[0]) * tensors[1], out, (da, db), G)


@both
@shaped
def test_an_embedding_is_that_of_pytorch(torch, shape, dtype):
    rng = np.random.default_rng(0)
    table, ids, G = (
        make(rng, (11, shape[1]), dtype),
        rng.integers(0, 11, shape[0]),
        make(rng, shape, dtype),
    )
    out, grad = (
        embedding_into(table, ids, full(shape, dtype)),
        embedding_backward_into(ids, G, np.empty_like(table)),
    )
    (tensor,) = with_gradients(table)
    compare(
        dtype,
        [tensor],
        torch.nn.functional.embedding(torch.tensor(ids), tensor),
        out,
        [grad],
        G,
        shape[0],
    )


@both
@shaped
@pytest.mark.parametrize("size", [1, 1000])
def test_cross_entropy_is_that_of_pytorch(torch, shape, size, dtype):
    rng = np.random.default_rng(0)
    z, targets = size * make(rng, shape, dtype), rng.integers(0, shape[1], shape[0])
    (tensor,), dz = with_gradients(z), z.copy()
    loss = cross_entropy_into(dz, targets, Workspace())
    want = torch.nn.functional.cross_entropy(tensor, torch.tensor(targets))
    compare(dtype, [tensor], want, loss, [dz], depth=max(shape), scale=1 / len(z))


@both
@pytest.mark.parametrize("options", [o for o in OPTIONS if "scale" not in o], ids=str)
def test_adam_is_the_adamw_of_pytorch(torch, options, dtype):
    rng, ws, shape = np.random.default_rng(0), Workspace(), (120, 200)  # two panels
    p = make(rng, shape, dtype)
    theirs = torch.nn.Parameter(torch.tensor(p))
    optimiser = torch.optim.AdamW([theirs], **dict(lr=1e-3, weight_decay=0.0) | options)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t in range(1, 8):
        g = make(rng, shape, dtype)
        theirs.grad = torch.tensor(g)
        optimiser.step()
        adam_into(p, g, m, v, t, ws, **options)
    state = optimiser.state[theirs]
    for got, want in ((p, theirs.detach()), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        assert_equiv(got, want.numpy(), depth=7, c=8, scale=size_of(want.numpy()))


# --- memory ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_steady_state_allocates_no_array(dtype):
    rng, (N, D, F) = np.random.default_rng(0), (500, 256, 640)
    a = lambda *shape: make(rng, shape, dtype)  # noqa: E731
    x, G, y, w, b, dw, db, stats = a(N, D), a(N, D), a(N, D), a(D), a(D), a(D), a(D), a(2, N)
    W, dW, m, v, c, dc = (
        a(F, D),
        a(F, D),
        np.zeros((F, D), dtype),
        np.zeros((F, D), dtype),
        a(F),
        a(F),
    )
    h, dh, cdf, out, gate = a(N, F), a(N, F), a(N, F), a(N, F), a(N, F)
    assert min(x.nbytes, h.nbytes) > 1.9 * _PANEL_BYTES
    table, ids, targets, ws = a(300, D), rng.integers(0, 300, N), rng.integers(0, F, N), Workspace()
    calls = {
        "norm": lambda: norm_into(x, w, b, y, stats),
        "rms norm": lambda: norm_into(x, w, None, y, stats),
        "renorm": lambda: _renorm_into(x, stats, w, b, y),
        "norm backward": lambda: norm_backward_into(x, stats, w, G, y, dw, db, ws),
        "rms norm backward": lambda: norm_backward_into(x, stats, w, G, y, dw, None, ws),
        "linear": lambda: linear_into(x, W, c, h),
        "linear backward": lambda: linear_backward_into(x, W, h, y, dW, dc),
        "gelu": lambda: gelu_into(h, None, cdf, out, ws),
        "gelu backward": lambda: gelu_backward_into(h, cdf, dh, out, ws),
        "gelu tanh": lambda: gelu_into(h, None, cdf, out, ws, "tanh"),
        "gelu tanh backward": lambda: gelu_backward_into(h, cdf, dh, out, ws, "tanh"),
        "swiglu": lambda: swiglu_into(h, gate, out),
        "swiglu backward": lambda: swiglu_backward_into(h, gate, dh, out, cdf, ws),
        "embedding": lambda: embedding_into(table, ids, y),
        "embedding backward": lambda: embedding_backward_into(ids, y, table),
        "cross entropy": lambda: cross_entropy_into(out, targets, ws),
        "adam": lambda: adam_into(W, dW, m, v, 1, ws, weight_decay=0.1),
        "gradient norm": lambda: gradient_norm({"W": dW, "c": dc}),
    }
    with unbuffered():
        peaks = {name: traced_peak(call, warmup=2) for name, call in calls.items()}
    assert {name: peak for name, peak in peaks.items() if peak >= 8_000} == {}
    count = ws.allocation_count
    for name in ("gelu", "norm backward", "adam", "cross entropy"):
        calls[name]()
    assert (ws.allocation_count, ws.used_bytes) == (count, 0)


def test_every_layer_is_covered():
    # So that a layer that is added later is not forgotten here.
    public = {n for n in layers.__all__ if callable(getattr(layers, n))}
    used = set(globals())
    assert public <= used


# --- what is refused ---


def call_of(name, dtype=np.float64):
    """Arrays of a call that works, by name; which of them are written to; and the call."""
    rng, ws = np.random.default_rng(0), Workspace()
    N, D, F = 6, 4, 3
    a = lambda *shape: make(rng, shape, dtype)  # noqa: E731
    rows, wide_rows = a(N, D), a(N, F)
    stats = np.ones((2, N), dtype)
    form = getattr(layers, name)
    return {
        "norm_into": (dict(x=rows, weight=a(D), bias=a(D), out=a(N, D), stats=stats), 2, form),
        "norm_backward_into": (
            dict(
                x=rows,
                stats=stats,
                weight=a(D),
                grad_out=a(N, D),
                out=a(N, D),
                grad_weight=a(D),
                grad_bias=a(D),
            ),
            3,
            lambda *given: form(*given, ws),
        ),
        "linear_into": (dict(x=rows, weight=a(F, D), bias=a(F), out=a(N, F)), 1, form),
        "linear_backward_into": (
            dict(
                x=rows,
                weight=a(F, D),
                grad_out=wide_rows,
                out=a(N, D),
                grad_weight=a(F, D),
                grad_bias=a(F),
            ),
            3,
            form,
        ),
        "gelu_into": (
            dict(bias=a(F), x=wide_rows, cdf=a(N, F), out=a(N, F)),
            3,
            lambda b, x, c, o: form(x, b, c, o, ws),
        ),
        "gelu_backward_into": (
            dict(x=rows, cdf=a(N, D), grad_out=a(N, D), out=a(N, D), activated=a(N, D)),
            2,
            lambda x, c, G, o, z: form(x, c, G, o, ws, activated=z),
        ),
        "swiglu_into": (dict(a=rows, b=a(N, D), out=a(N, D)), 1, form),
        "swiglu_backward_into": (
            dict(a=rows, b=a(N, D), grad_out=a(N, D), grad_a=a(N, D), grad_b=a(N, D)),
            2,
            lambda *given: form(*given, ws),
        ),
        "embedding_into": (
            dict(table=rows, out=a(3, D)),
            1,
            lambda t, o: form(t, np.array([1, 0, 5]), o),
        ),
        "embedding_backward_into": (
            dict(grad_out=a(3, D), grad_table=rows),
            1,
            lambda G, t: form(np.array([1, 0, 5]), G, t),
        ),
        "cross_entropy_into": (
            dict(logits=rows),
            1,
            lambda z: form(z, np.zeros(len(z), int), ws),
        ),
        "adam_into": (
            dict(grad=rows, param=a(N, D), m=a(N, D), v=np.ones((N, D), dtype)),
            3,
            lambda g, p, m, v: form(p, g, m, v, 1, ws),
        ),
    }[name]


IN_PLACE = [n for n in layers.__all__ if n.endswith("_into")]


def refuses(call, arrays, kind, name):
    """`call` raises an error that begins with the name, and changes nothing."""
    before = {n: a.tobytes() for n, a in arrays.items()}
    with pytest.raises(kind, match=rf"^{name}: "):
        call(*arrays.values())
    assert before == {n: a.tobytes() for n, a in arrays.items()}


@pytest.mark.parametrize("name", IN_PLACE)
def test_misfits_are_named_and_nothing_is_written(name):
    arrays, written, call = call_of(name)
    call(*arrays.values())
    leading = next((n for n in ("x", "a", "table", "grad_table", "logits") if n in arrays), None)
    for wrong, a in arrays.items():
        other = np.concatenate([a, a], axis=-1)
        if wrong != leading:
            kind, culprit = ValueError, wrong
            if wrong == "param":
                culprit = "(grad|m|v)"
            if wrong == "weight" and name.startswith("linear"):
                other = a[:, :-1].copy()
            refuses(call, arrays | {wrong: other}, kind, culprit)
            if wrong != "param":
                refuses(call, arrays | {wrong: a.astype(np.float32)}, TypeError, wrong)
        refuses(call, arrays | {wrong: a.astype(np.float16)}, TypeError, "[a-z_]+")
    for target in list(arrays)[-written:]:
        frozen = arrays[target].copy()
        frozen.flags.writeable = False
        refuses(call, arrays | {target: frozen}, ValueError, target)


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_written_lies_in_no_other_array(name):
    arrays, written, call = call_of(name)
    for target in list(arrays)[-written:]:
        for other, b in arrays.items():
            if other == target:
                continue
            store = np.ones(arrays[target].size + b.size)
            near = store[: arrays[target].size].reshape(arrays[target].shape)
            far = store[arrays[target].size - 1 :][: b.size].reshape(b.shape)  # one entry in common
            refuses(call, arrays | {target: near, other: far}, ValueError, "[a-z_]+")
        broadcast = np.lib.stride_tricks.as_strided(
            np.ones(64), arrays[target].shape, [0] * arrays[target].ndim, writeable=True
        )
        refuses(call, arrays | {target: broadcast}, ValueError, target)


@given(seeds, st.lists(st.integers(-9, 9), min_size=2, max_size=2), st.integers(0, 9))
def test_overlap_of_entries_is_found(seed, strides, start):
    # A view may be written to if and only if no two of its entries share memory.
    store = np.zeros(64)
    view = np.lib.stride_tricks.as_strided(store[30:], (3, 2), [8 * s for s in strides])
    np.add.at(store, 30 + np.add.outer(strides[0] * np.arange(3), strides[1] * np.arange(2)), 1)
    shared = store.max() > 1
    if shared:
        with pytest.raises(ValueError, match=r"^out: entries share memory"):
            _check_operands(np.float64, {}, {"out": (view, (3, 2))})


@pytest.mark.parametrize(
    "wrong",
    [
        dict(step=0),
        dict(step=-3),
        dict(betas=(1.0, 0.9)),
        dict(betas=(0.9, 1.0)),
        dict(betas=(-0.1, 0.9)),
        dict(betas=(0.9, np.nan)),
        dict(lr=-1e-3),
        dict(lr=np.nan),
        dict(lr=np.inf),
        dict(eps=0.0),
        dict(eps=-1e-8),
        dict(eps=1e-60),
        dict(eps=np.nan),
        dict(weight_decay=-0.1),
        dict(weight_decay=np.nan),
        dict(scale=np.nan),
        dict(scale=-1.0),
    ],
    ids=str,
)
def test_adam_refuses_what_it_cannot_serve(wrong):
    arrays = np.ones((4, 3), np.float32), *np.zeros((3, 3), np.float32)
    p, g, m, v = arrays[0][0], *arrays[1:]
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: "):
        adam_into(p, g, m, v, **dict(step=1, ws=Workspace()) | wrong)
    assert (p == 1).all()
    assert not m.any()
    assert not v.any()


@pytest.mark.parametrize("eps", [0.0, -1.0, np.nan, np.inf, 1e-60])
def test_a_norm_needs_a_positive_eps(eps):
    x, stats = np.ones((2, 3), np.float32), np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match=r"^eps: "):
        norm_into(x, x[0].copy(), None, np.empty_like(x), stats, eps)


# --- exact zeros, and tails ---


@given(
    st.integers(1, 900),
    st.floats(-(2.0**100), 2.0**100, width=32)
    | st.sampled_from([333.33334, 3333333.25, 0.1, 7e-3, 1e-45]),
    dtypes,
)
def test_a_constant_row_has_no_spread(D, value, dtype):
    x, ones, zeros = np.full((3, D), value, dtype), np.ones(D, dtype), np.zeros(D, dtype)
    x[1] = np.arange(D)  # a neighbour that is not constant
    out, stats, dx, dw, db = full((3, D), dtype), full((2, 3), dtype), x.copy(), ones.copy(), ones
    assert not layer_norm(x, ones, zeros)[::2].any()
    assert not norm_into(x, ones, zeros, out, stats)[::2].any()
    assert not _renorm_into(x, stats, ones, zeros, out)[::2].any()
    G = make(np.random.default_rng(0), (3, D), dtype)
    norm_backward_into(x, stats, zeros + 1, G, dx, dw, db.copy(), Workspace())
    assert np.isfinite(dx).all()
    assert np.isfinite(dw).all()
    assert np.isfinite(layer_norm_vjp(x, ones, G)[0]).all()


def slope_of(form, x):
    cdf, out = np.empty_like(x), np.empty_like(x)
    gelu_into(x.copy(), None, cdf, out, Workspace(), form)
    return gelu_backward_into(x, cdf, np.ones_like(x), np.empty_like(x), Workspace(), form)


@pytest.mark.parametrize("form", _APPROXIMATE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_keeps_its_tails(form, dtype):
    far = 12.5 if form == "none" else 9.0
    x = np.linspace(-far, 40, 20_001).astype(dtype)[:, None]
    wide_x, (_, _, out) = x.astype(np.longdouble), gelu_pair(x, None, Workspace(), form)
    if form == "none":
        from scipy.special import ndtr

        cdf = ndtr(x.astype(np.float64))
        slope = cdf + wide_x * np.exp(-wide_x * wide_x / 2) / np.sqrt(2 * np.longdouble(np.pi))
    else:
        u = np.sqrt(2 / np.longdouble(np.pi)) * (wide_x + _CUBIC * wide_x**3)
        cdf = 1 / (1 + np.exp(-2 * u))
        slope = cdf + wide_x * 2 * cdf * (1 - cdf) * np.sqrt(2 / np.longdouble(np.pi)) * (
            1 + 3 * _CUBIC * wide_x**2
        )
    # The exponent is up to 80 here, and its rounding is relative.
    limit = 200 * float(np.finfo(dtype).eps) + (0 if dtype == np.float64 else 4e-6)
    assert np.max(np.abs(out / (wide_x * cdf) - 1)[x != 0]) < limit
    assert np.max(np.abs(gelu(x, form) / (wide_x * cdf) - 1)[x != 0]) < limit
    for got in (slope_of(form, x), gelu_vjp(x, np.ones_like(x), form)):
        assert np.max(np.abs(got - slope) / np.maximum(np.abs(slope), 1e-30)) < 100 * limit
        assert np.max(np.abs(got - slope) / cdf / (1 + x * x)) < limit


@pytest.mark.parametrize("form", _APPROXIMATE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_gelu_are_finite_everywhere(form, dtype):
    x = np.append(np.geomspace(1e-40, 1e38, 300), np.finfo(dtype).max)
    x = np.concatenate([-x[::-1], [0], x])[:, None].astype(dtype)
    for got in (slope_of(form, x), gelu_vjp(x, np.ones_like(x), form)):
        assert np.isfinite(got).all()
        assert np.array_equal(got[np.abs(x) > 200], (x[np.abs(x) > 200] > 0).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoids_keep_their_tails(dtype):
    x = np.linspace(-87, 60, 4001).astype(dtype)[:, None]
    ones, wide_x = np.ones_like(x), x.astype(np.longdouble)
    want = 1 / (1 + np.exp(-wide_x))
    silu_slope = want * (1 + wide_x * (1 - want))
    limit, rows = 16 * np.finfo(dtype).eps, x != 0
    assert np.max(np.abs(_sigmoid(x) / want - 1)) < limit
    assert np.max(np.abs(swiglu(x, ones) / (wide_x * want) - 1)[rows]) < limit
    assert (
        np.max(np.abs(swiglu_into(x, ones, np.empty_like(x)) / (wide_x * want) - 1)[rows]) < limit
    )
    da, db = np.empty_like(x), np.empty_like(x)
    swiglu_backward_into(x, ones, ones, da, db, Workspace())
    assert np.max(np.abs(db / (wide_x * want) - 1)[rows]) < limit
    assert np.max(np.abs(da - silu_slope) / want / (1 + np.abs(x))) < limit
    big = np.array([[-np.finfo(dtype).max, -1e30, 1e30, np.finfo(dtype).max]], dtype)
    swiglu_backward_into(
        big, *np.ones((2, 1, 4), dtype), *(pair := np.empty((2, 1, 4), dtype)), Workspace()
    )
    assert np.isfinite(pair).all()


@pytest.mark.parametrize("name", ["linear_into", "linear_backward_into"])
def test_a_matrix_that_blas_would_copy_is_named(name):
    arrays, _, call = call_of(name)
    for wrong, a in arrays.items():
        if a.ndim == 2:
            gaps = np.repeat(np.repeat(a, 2, axis=0), 2, axis=1)[::2, ::2]
            refuses(call, arrays | {wrong: gaps}, ValueError, wrong)
