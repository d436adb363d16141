"""`gemm` over shapes, layouts and factors; what it refuses; and what the three forms of a hot path cost."""

from contextlib import contextmanager
from ctypes import ArgumentError

import numpy as np
import pytest
from conftest import DTYPES, LAYOUTS, dtypes, kinds, lay, layouts, make, seeds
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.gemm import (
    _numpy_blas,
    aligned_empty,
    blas_layout,
    blend,
    forms,
    gemm,
    panels,
    unbuffered,
)
from ctxlab.measure import traced_peak
from ctxlab.testing import assert_equiv

sizes = st.integers(0, 9)
factors = st.sampled_from([0, 1, -1, 0.5, -2.5, 1 / 3, 1e-6, 1e6, np.float32(0.5), np.int64(2)])
WAYS = ("OpenBLAS", "NumPy alone")  # `gemm` calls BLAS where it finds one, and must not need to
ways = st.sampled_from(WAYS)


@contextmanager
def calling(way):
    """Where there is no BLAS to call directly, both ways are the same, and that is fine."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "NumPy alone":
            patch.setattr("ctxlab.gemm._numpy_blas", lambda routine, dtype: None)
        yield


def assert_product(a, b, out, alpha, beta):
    """`gemm` equals the formula in float64, within what rounding of its terms allows."""
    A, B, before = (v.astype(np.float64) for v in (a, b, out))
    if beta == 0:
        before[...] = 0  # whatever it was
    want = alpha * (A @ B) + beta * before
    scale = abs(alpha) * (np.abs(A) @ np.abs(B)) + np.abs(beta * before)
    assert gemm(a, b, out, alpha=alpha, beta=beta) is out
    assert_equiv(out, want.astype(out.dtype), depth=a.shape[1] + 2, scale=scale)


@given(seeds, sizes, sizes, sizes, dtypes, layouts, layouts, layouts, factors, factors, ways)
def test_gemm_is_its_formula(seed, m, k, n, dtype, la, lb, lc, alpha, beta, way):
    rng = np.random.default_rng(seed)
    a, b, out = (
        lay(make(rng, s, dtype), la_) for s, la_ in (((m, k), la), ((k, n), lb), ((m, n), lc))
    )
    with calling(way):
        assert_product(a, b, out, alpha, beta)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("beta", [0.0, -0.5])
@pytest.mark.parametrize(
    "shape",
    [
        (900, 40, 500),  # several panels, the last one short
        (2, 3, 300_000),  # one row is more than a panel
        (300_000, 3, 2),
        (300_000, 1, 1),
        (1, 700, 1),
    ],
    ids=str,
)
def test_large_and_lopsided_results(shape, beta, layout, way):
    m, k, n = shape
    rng = np.random.default_rng(0)
    a, b, out = make(rng, (m, k)), make(rng, (k, n)), lay(make(rng, (m, n)), layout)
    with calling(way):
        assert_product(a, b, out, 0.5, beta)


panel_layouts = st.sampled_from(["rows", "columns", "F columns"])


@given(seeds, sizes, sizes, sizes, dtypes, panel_layouts, factors, factors, ways)
def test_nothing_around_a_panel_is_written(seed, m, k, n, dtype, layout, alpha, beta, way):
    rng = np.random.default_rng(seed)
    out = lay(make(rng, (m, n), dtype), layout, fill=7)
    with calling(way):
        gemm(make(rng, (m, k), dtype), make(rng, (k, n), dtype), out, alpha=alpha, beta=beta)
    out[...] = 7
    assert (out.base == 7).all()


@given(seeds, sizes, sizes, sizes, dtypes, layouts, factors, ways)
def test_beta_zero_never_reads_out(seed, m, k, n, dtype, layout, alpha, way):
    rng = np.random.default_rng(seed)
    a, b = make(rng, (m, k), dtype), make(rng, (k, n), dtype)
    clean, dirty = (lay(np.full((m, n), fill, dtype), layout) for fill in (0, np.nan))
    with calling(way):
        gemm(a, b, clean, alpha=alpha)
        gemm(a, b, dirty, alpha=alpha)
    assert np.array_equal(clean, dirty)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("beta", [0, 1, 2])
def test_alpha_zero_never_reads_the_factors(beta, way):
    nan, out = np.full((3, 3), np.nan), np.ones((3, 3))
    with calling(way):
        assert_equiv(gemm(nan, nan, out, alpha=0, beta=beta), np.full((3, 3), float(beta)))


@given(seeds, dtypes, kinds, ways)
def test_values_that_are_not_finite_go_where_the_formula_sends_them(seed, dtype, kind, way):
    rng = np.random.default_rng(seed)
    a, b, c = (make(rng, (4, 4), dtype, kind) for _ in range(3))
    with np.errstate(all="ignore"), calling(way):
        want = a @ b
        assert_equiv(gemm(a, b, np.empty_like(c)), want)
        assert_equiv(gemm(a, b, c.copy(), beta=1), c + want)


# --- what BLAS takes ---


@given(seeds, sizes, sizes, dtypes, layouts)
def test_each_layout_is_taken_in_both_orders(seed, m, n, dtype, layout):
    a = lay(make(np.random.default_rng(seed), (m, n), dtype), layout)
    assert blas_layout(a)
    assert blas_layout(a.T)


@given(st.integers(0, 4), st.integers(0, 4), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_whatever_is_contiguous_is_taken(m, n, step_m, step_n, transposed):
    # An axis of length 1 may have any stride, and `ascontiguousarray` would not change it.
    view = np.zeros((5, 5), np.float32)[:m:step_m, :n:step_n]
    view = view.T if transposed else view
    assert blas_layout(view) or not (view.flags.c_contiguous or view.flags.f_contiguous)


A = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
NEED_A_COPY = {
    "every other column": lambda: A[:, ::2],
    "every other column and row": lambda: A[::2, ::2],
    "rows backwards": lambda: A[::-1],
    "columns backwards": lambda: A[:, ::-1],
    "Fortran order backwards": lambda: A.T[:, ::-1],
    "one row many times": lambda: np.broadcast_to(A[0], (8, 8)),
    "one number many times": lambda: np.broadcast_to(A[:1, :1], (8, 8)),
    "rows that overlap": lambda: np.lib.stride_tricks.as_strided(A, (8, 8), (4 * 4, 4)),
    "no alignment": lambda: (
        np.frombuffer(bytes(1) + A.tobytes(), np.uint8)[1:].view(np.float32).reshape(8, 8)
    ),
    "a field of records": lambda: np.zeros((8, 8), "f4,i2")["f0"],
}


@pytest.mark.parametrize("case", NEED_A_COPY)
@pytest.mark.parametrize("place", ["a", "b"])
def test_operands_that_need_a_copy_are_refused(case, place):
    view = NEED_A_COPY[case]()
    out = np.empty((8, 8), np.float32)
    other = np.ones((view.shape[1], 8) if place == "a" else (8, view.shape[0]), np.float32)
    with pytest.raises(
        ValueError,
        match=rf"^{place}: strides .* would need a copy; pass np.ascontiguousarray\({place}\)",
    ):
        gemm(
            *((view, other) if place == "a" else (other, view)),
            out[: len(view) if place == "a" else 8],
        )


def test_an_out_that_needs_a_copy_is_refused():
    for out in (np.empty((8, 16), np.float32)[:, ::2], np.empty((16, 8), np.float32)[::-2]):
        with pytest.raises(ValueError, match=r"^out: strides"):
            gemm(A, A, out)


# --- memory that overlaps ---


@given(st.integers(0, 8), st.integers(0, 8), st.sampled_from(["rows", "columns"]))
def test_overlap_is_refused_exactly_when_there_is_one(start, length, axis):
    buffer = np.zeros((16, 16), np.float32)
    cut = (lambda s: buffer[s]) if axis == "rows" else (lambda s: buffer[:, s])
    a, out = cut(slice(4, 12)), cut(slice(start, start + length))
    if axis == "rows":
        operands = a, np.ones((16, 16), np.float32)  # (8, 16) @ (16, 16) -> (8, 16)
    else:
        operands = np.ones((16, 16), np.float32), a  # (16, 16) @ (16, 8) -> (16, 8)
    if length != 8:
        with pytest.raises(ValueError, match=r"^out: shape"):
            gemm(*operands, out)
    elif -8 < start - 4 < 8:
        with pytest.raises(ValueError, match=r"^out: overlaps [ab] in memory"):
            gemm(*operands, out)


@pytest.mark.parametrize("beta", [0, 1])
def test_interleaved_panels_of_one_buffer_are_no_overlap(beta):
    # Their ranges of addresses overlap; their elements do not.
    buffer = make(np.random.default_rng(1), (6, 18))
    a, b, out = buffer[:, :6], buffer[:, 6:12], buffer[:, 12:]
    for panel in (a, b, out):
        assert blas_layout(panel)
    assert np.may_share_memory(a, out)
    kept = buffer[:, :12].copy()
    assert_product(a, b, out, 2.0, beta)
    assert np.array_equal(buffer[:, :12], kept)


def test_a_matrix_times_itself_is_allowed():
    assert_product(A, A, np.empty_like(A), 1, 0)
    assert_product(A, A.T, np.empty_like(A), 1, 0)


# --- bad input ---


def read_only(a):
    a.flags.writeable = False
    return a


def ok(*shape):
    return np.ones(shape or (4, 4), np.float32)


BAD_CALLS = {
    "a: list": (
        lambda out: gemm([[1.0]], ok(), out),
        TypeError,
        "^a: a NumPy array is needed, not list",
    ),
    "b: list": (lambda out: gemm(ok(), ok().tolist(), out), TypeError, "^b: "),
    "a: None": (lambda out: gemm(None, ok(), out), TypeError, "NoneType"),
    "a: masked": (lambda out: gemm(np.ma.masked_array(ok()), ok(), out), TypeError, "MaskedArray"),
    "a: float16": (
        lambda out: gemm(ok().astype("f2"), ok(), out),
        TypeError,
        "float16 is not supported",
    ),
    "a: int": (lambda out: gemm(ok().astype(int), ok(), out), TypeError, "int64"),
    "a: float64": (lambda out: gemm(ok().astype("f8"), ok(), out), TypeError, "^b: float32"),
    "b: float64": (lambda out: gemm(ok(), ok().astype("f8"), out), TypeError, "^b: float64"),
    "b: big endian": (lambda out: gemm(ok(), ok().astype(">f4"), out), TypeError, "^b: "),
    "a: vector": (lambda out: gemm(ok(4), ok(), out), ValueError, "^a: .* 1 dimensions, needed 2"),
    "b: stack": (lambda out: gemm(ok(), ok(4, 4, 4), out), ValueError, "^b: .* 3 dimensions"),
    "inner sizes": (
        lambda out: gemm(ok(4, 3), ok(), out),
        ValueError,
        r"^b: shape \(4, 4\) does not fit a: \(4, 3\)",
    ),
    "rows of out": (
        lambda out: gemm(ok(3, 4), ok(), out),
        ValueError,
        r"^out: shape \(4, 4\), needed \(3, 4\)",
    ),
    "columns of out": (lambda out: gemm(ok(), ok(4, 5), out), ValueError, r"needed \(4, 5\)"),
    "out is a": (lambda out: gemm(out, ok(), out), ValueError, "overlaps a"),
    "out is b, transposed": (lambda out: gemm(ok(), out.T, out), ValueError, "overlaps b"),
    "read-only": (
        lambda out: gemm(ok(), ok(), read_only(out.view())),
        ValueError,
        "^out: is read-only",
    ),
    "out: transposed shape": (
        lambda out: gemm(ok(4, 4), ok(4, 2), out[:2]),
        ValueError,
        "^out: shape",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_errors_name_the_culprit_and_leave_out_untouched(case):
    call, error, why = BAD_CALLS[case]
    out = np.full((4, 4), 7, np.float32)
    with pytest.raises(error, match=why):
        call(out)
    assert (out == 7).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("value", ["two", 1j, None], ids=repr)
def test_factors_are_checked_before_anything_is_written(value, name, way):
    out = np.full((4, 4), 7, np.float32)
    with calling(way), pytest.raises((TypeError, ValueError, ArgumentError)):
        gemm(ok(), ok(), out, **{name: value})
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("out", "error"),
    [
        ([[0.0]], TypeError),
        (None, TypeError),
        (np.zeros((4, 4)), TypeError),
        (np.zeros((4, 4), int), TypeError),
        (np.ma.zeros((4, 4), np.float32), TypeError),
        (np.zeros(4, np.float32), ValueError),
        (np.zeros((1, 4, 4), np.float32), ValueError),
        (np.broadcast_to(np.float32(0), (4, 4)), ValueError),
    ],
    ids=lambda v: getattr(v, "__name__", type(v).__name__),
)
def test_bad_outs(out, error):
    with pytest.raises(error, match=r"^out: "):
        gemm(ok(), ok(), out)


def test_memory_maps_are_taken(tmp_path):
    mapped = [np.memmap(tmp_path / name, np.float32, "w+", shape=(5, 5)) for name in "abc"]
    for m in mapped[:2]:
        m[:] = A[:5, :5]
    assert gemm(*mapped) is mapped[2]
    assert_equiv(
        mapped[2], A[:5, :5] @ A[:5, :5], depth=5, scale=np.abs(A[:5, :5]) @ np.abs(A[:5, :5])
    )
    locked = np.memmap(tmp_path / "c", np.float32, "r", shape=(5, 5))
    with pytest.raises(ValueError, match="read-only"):
        gemm(mapped[0], mapped[1], locked)


# --- memory ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), [(600, 50, 700), (64, 768, 768), (50, 20, 60)])
def test_no_call_needs_a_temporary(m, k, n, dtype, layout):
    rng = np.random.default_rng(0)
    a, b, out = (
        make(rng, (m, k), dtype),
        make(rng, (k, n), dtype),
        lay(make(rng, (m, n), dtype), layout),
    )
    if _numpy_blas("gemm", out.dtype) is None:
        pytest.skip("no OpenBLAS to call")
    for alpha, beta in ((1, 0), (0.5, 0), (1, 1), (0.5, -0.5)):
        assert traced_peak(lambda: gemm(a, b, out, alpha=alpha, beta=beta)) < 4_000  # noqa: B023


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("beta", [0, 0.5])
def test_numpy_alone_needs_no_temporary_of_the_results_size(beta, layout):
    rng = np.random.default_rng(0)
    a, b, out = make(rng, (1800, 20)), make(rng, (20, 1700)), lay(make(rng, (1800, 1700)), layout)
    with calling("NumPy alone"):
        assert traced_peak(lambda: gemm(a, b, out, alpha=0.5, beta=beta)) < out.nbytes / 8
        assert traced_peak(lambda: gemm(a, b, out)) < 4_000


@given(st.integers(0, 5000), st.integers(0, 300_000), st.integers(1, 300_000))
def test_panels_cover_the_rows_once_and_stay_in_size(n_rows, row_bytes, panel_bytes):
    cut = list(panels(n_rows, row_bytes, panel_bytes))
    assert all(s.start < s.stop for s in cut)
    assert sum(s.stop - s.start for s in cut) == n_rows
    assert [s.stop for s in cut[:-1]] == [s.start for s in cut[1:]]
    assert all((s.stop - s.start) * row_bytes <= max(panel_bytes, row_bytes) for s in cut)


@given(st.lists(st.integers(0, 5), max_size=4), dtypes, st.sampled_from([0, 8, 16, 48, 64]))
def test_aligned_buffers(shape, dtype, offset):
    a = aligned_empty(tuple(shape), dtype, offset)
    assert a.shape == tuple(shape)
    assert a.dtype == dtype
    assert a.flags.c_contiguous
    assert a.flags.writeable
    assert a.flags.aligned
    assert a.ctypes.data % 64 == offset % 64 or a.size == 0


def test_the_buffer_size_comes_back_after_an_error():
    before = np.getbufsize()
    with unbuffered():
        assert np.getbufsize() < before
    with pytest.raises(ZeroDivisionError), unbuffered():
        raise ZeroDivisionError
    assert np.getbufsize() == before


# --- three forms ---


@given(seeds, sizes, sizes, sizes, dtypes, layouts, layouts)
def test_the_forms_agree_to_the_bit(seed, m, k, n, dtype, la, lb):
    rng = np.random.default_rng(seed)
    a, b = lay(make(rng, (m, k), dtype), la), lay(make(rng, (k, n), dtype), lb)
    first, *others = [form("site", a, b) for form in forms().values()]
    for other in others:
        assert_equiv(other, first, scale=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), [(512, 96, 384), (96, 512, 96), (33, 700, 129)])
def test_only_reuse_saves_memory(m, k, n, dtype):
    rng = np.random.default_rng(0)
    a, b = make(rng, (m, k), dtype), make(rng, (k, n), dtype)
    results = {name: form("site", a, b).copy() for name, form in forms().items()}
    peaks = {
        name: traced_peak(lambda form=form: form("site", a, b)) for name, form in forms().items()
    }
    size = results["dot"].nbytes
    assert all(np.array_equal(r, results["dot"]) for r in results.values())
    assert size <= peaks["dot"] < size + 8_000
    assert size <= peaks["zeros + gemm"] < size + 8_000
    assert peaks["reused out"] < 8_000


def test_reuse_is_per_site_shape_and_dtype():
    reused = forms()["reused out"]
    first = reused("one", A, A)
    assert reused("one", A, A) is first
    assert reused("two", A, A) is not first
    assert reused("one", A[:4], A) is not first
    assert forms()["reused out"]("one", A, A) is not first
    assert reused("two", A.astype(np.float64), A.astype(np.float64)).dtype == np.float64


# --- the blend ---


@given(seeds, sizes, sizes, dtypes, layouts, layouts, factors, factors, ways)
def test_blend_is_its_formula(seed, m, n, dtype, lx, ly, alpha, beta, way):
    rng = np.random.default_rng(seed)
    x, y = lay(make(rng, (m, n), dtype), lx), lay(make(rng, (m, n), dtype), ly)
    terms = alpha * x.astype(np.float64), beta * y.astype(np.float64)
    before = x.copy()
    with calling(way):
        blend(x, y, alpha, beta)
    assert_equiv(y, sum(terms).astype(dtype), depth=2, scale=sum(map(np.abs, terms)))
    if alpha == 1:
        assert np.array_equal(x, before)
