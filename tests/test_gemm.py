"""`gemm` over shapes, layouts and factors; what it refuses; and what the three forms cost."""

import ctypes
import math
import re
import sys
import threading
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DTYPES, LAYOUTS, dtypes, kinds, lay, layouts, make, seeds
from hypothesis import given
from hypothesis import strategies as st

from ctxlab import gemm as module
from ctxlab.gemm import (
    _check_apart,
    _declare,
    _forms,
    _leading,
    _numpy_blas,
    _numpy_library,
    _overlaps_itself,
    _Routine,
    aligned_empty,
    blas_layout,
    blend,
    check_out,
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


# What NumPy says of itself, and whether its platform's linker searches dependencies.
NUMPY_IS_ON_OPENBLAS = (
    "openblas" in np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    and sys.platform != "win32"
)


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


def follow(advice, **names):
    """Run what an error message tells its reader to do, and return the names as they are then."""
    exec(advice, {}, names)
    return names


@pytest.mark.parametrize("case", NEED_A_COPY)
@pytest.mark.parametrize("place", ["a", "b"])
def test_operands_that_need_a_copy_are_refused_with_advice_that_works(case, place):
    view = NEED_A_COPY[case]()
    m, n = view.shape
    operands = {"a": np.ones((8, m), np.float32), "b": np.ones((n, 8), np.float32)} | {place: view}
    out = np.full((8, n) if place == "b" else (m, 8), 7, np.float32)
    with pytest.raises(ValueError, match=rf"^{place}: .* would need a copy; pass ") as refused:
        gemm(**operands, out=out)
    assert (out == 7).all()
    advice = str(refused.value).rsplit("pass ", 1)[1]
    operands[place] = follow(f"copied = {advice}", **{place: view})["copied"]
    gemm(**operands, out=out)
    a, b = (operands | {place: view}).values()
    assert_equiv(out, a.copy() @ b.copy(), depth=8, scale=np.abs(a.copy()) @ np.abs(b.copy()))


OUTS = {
    "every other column": lambda: np.full((8, 16), 7, np.float32)[:, ::2],
    "rows backwards": lambda: np.full((8, 8), 7, np.float32)[::-1],
    "Fortran order backwards": lambda: np.full((8, 8), 7, np.float32).T[:, ::-1],
    "no alignment": lambda: unaligned(np.full((8, 8), 7, np.float32)),
    "a field of records": lambda: filled(np.zeros((8, 8), "f4,i2")["f0"]),
}


def unaligned(a):
    raw = np.zeros(a.nbytes + 1, np.uint8)
    view = raw[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def filled(a):
    a[...] = 7
    return a


@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("case", OUTS)
def test_outs_that_need_a_copy_are_refused_with_advice_that_works(case, beta):
    out = OUTS[case]()
    with pytest.raises(ValueError, match=r"^out: .* would need a copy; pass `") as refused:
        gemm(A, A, out, beta=beta)
    assert (out == 7).all()
    before, after = re.search("pass `(.*)`, then `(.*)`$", str(refused.value)).groups()
    names = follow(before, out=out)
    gemm(A, A, names["result"], beta=beta)
    follow(after, **names)
    want = A @ A + np.float32(beta * 7)
    assert_equiv(out.copy(), want, depth=9, scale=np.abs(A) @ np.abs(A) + beta * 7)


@pytest.mark.parametrize("place", ["a", "b", "out"])
def test_a_column_or_a_row_may_have_any_step(place):
    column, row = A[:, 3][:, None], A[3][None, :]
    assert (column.strides[1], row.strides[0]) == (0, 0)  # NumPy writes 0 for an axis that it adds
    wide = np.zeros((8, 20), np.float32)
    calls = {
        "a": (column, row[:, :5], np.zeros((8, 5), np.float32)),
        "b": (A, column, np.zeros((8, 1), np.float32)),
        "out": (A, A[:, :1], wide[:, 7][:, None]),
    }
    a, b, out = calls[place]
    for alpha, beta in ((1, 0), (0.5, 2.0)):
        for way in WAYS:
            with calling(way):
                assert_product(a, b, out, alpha, beta)
    wide[:, 7] = 0
    assert not wide.any()


@pytest.mark.parametrize(
    ("view", "layout"),
    [
        (A, (True, 8)),
        (A.T, (False, 8)),
        (A[:, 2:5], (True, 8)),
        (A[1:4].T, (False, 8)),
        (A[:3, 2:5].T, (False, 8)),
        (A[:, :1], (True, 8)),
        (A[:, :1].T, (False, 8)),
        (A[:1, ::2], (False, 2)),  # one row: its entries are columns of length 1
        (A[::2, :1], (True, 16)),
        (A[::-1, :1], None),
        (A[:1, ::-1], None),
        (A[::2], (True, 16)),
        (A[:0, ::2], (True, 4)),
        (A[:, :0], (True, 1)),
    ],
)
def test_leading_dimensions(view, layout):
    assert _leading(view) == layout


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


@pytest.mark.parametrize("dtype", [np.int64, np.float16, np.longdouble, np.complex128, bool, ">f4"])
def test_another_dtype_is_refused_where_all_three_have_it(dtype):
    out = np.zeros((2, 2), dtype)
    with pytest.raises(TypeError, match=r"^a: .* is not supported here; use float32 or float64"):
        gemm(np.ones((2, 2), dtype), np.ones((2, 2), dtype), out)
    assert not out.any()


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
@pytest.mark.parametrize("value", ["two", "2", 1j, None, np.ones(1), 1e39, 10**400], ids=repr)
def test_factors_are_checked_before_anything_is_written(value, name, way):
    out = np.full((4, 4), 7, np.float32)
    x, factors = ok(), {"alpha": 0.5, "beta": 2.0, name: value}
    with calling(way):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
            gemm(ok(), ok(), out, **factors)
        with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
            blend(x, out, **factors)
    assert (out == 7).all()
    assert (x == 1).all()


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), 1, True])
def test_numbers_of_every_type_are_factors(value):
    assert_equiv(gemm(ok(), ok(), ok(), alpha=value), np.full((4, 4), 4 * float(value), np.float32))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("factor", [1e-46, -1e-300])
def test_a_factor_below_the_dtype_is_0_on_every_way(factor, way):
    # So a NaN that it would be multiplied with is not read: one way must not differ from the other.
    nan = np.full((4, 4), np.nan, np.float32)
    for call in (
        lambda out: gemm(nan, nan, out, alpha=factor, beta=0.5),
        lambda out: blend(nan, out, factor, 0.5),
    ):
        out = np.full((4, 4), 7, np.float32)
        with calling(way):
            call(out)
        assert (out == 3.5).all()
    for call in (
        lambda out: gemm(ok(), ok(), out, alpha=0.5, beta=factor),
        lambda out: blend(ok() * 4, out, 0.5, factor),
    ):
        out = nan.copy()
        with calling(way):
            call(out)
        assert (out == 2).all()


def test_the_largest_factor_of_the_dtype_is_taken():
    top = float(np.finfo(np.float32).max)
    assert (gemm(ok(4, 1), ok(1, 4), ok(), alpha=top) == np.float32(top)).all()
    assert np.isinf(gemm(ok(4, 1), ok(1, 4), ok(), alpha=math.inf)).all()
    assert np.isnan(gemm(ok(4, 1), ok(1, 4), ok(), alpha=math.nan)).all()


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


def least_peak(call):
    """Of three looks: a thread of the test runner may allocate a buffer during one of them."""
    return min(traced_peak(call) for _ in range(3))


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
    if not NUMPY_IS_ON_OPENBLAS:
        pytest.skip("NumPy runs on another BLAS")
    for alpha, beta in ((1, 0), (0.5, 0), (1, 1), (0.5, -0.5)):
        assert least_peak(lambda: gemm(a, b, out, alpha=alpha, beta=beta)) < 4_000  # noqa: B023


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("beta", [0, 0.5])
def test_numpy_alone_needs_no_temporary_of_the_results_size(beta, layout):
    rng = np.random.default_rng(0)
    a, b, out = make(rng, (1800, 20)), make(rng, (20, 1700)), lay(make(rng, (1800, 1700)), layout)
    with calling("NumPy alone"):
        assert least_peak(lambda: gemm(a, b, out, alpha=0.5, beta=beta)) < out.nbytes / 8
        assert least_peak(lambda: gemm(a, b, out)) < 4_000


@pytest.mark.parametrize("shape", [(40, 30_000), (30_000, 40)])
def test_panels_of_a_lopsided_result_are_of_the_stated_size(shape):
    a, b = np.ones((shape[0], 3), np.float32), np.ones((3, shape[1]), np.float32)
    out = np.ones(shape, np.float32)
    with calling("NumPy alone"):
        assert least_peak(lambda: gemm(a, b, out, alpha=0.5, beta=2.0)) < 2**20 + 10_000


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
    assert a.base.nbytes == a.nbytes + 64 + offset


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
    first, *others = [form("site", a, b) for form in _forms().values()]
    for other in others:
        assert_equiv(other, first, scale=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), [(512, 96, 384), (96, 512, 96), (33, 700, 129)])
def test_only_reuse_saves_memory(m, k, n, dtype):
    rng = np.random.default_rng(0)
    a, b = make(rng, (m, k), dtype), make(rng, (k, n), dtype)
    results = {name: form("site", a, b).copy() for name, form in _forms().items()}
    peaks = {
        name: traced_peak(lambda form=form: form("site", a, b)) for name, form in _forms().items()
    }
    size = results["dot"].nbytes
    assert all(np.array_equal(r, results["dot"]) for r in results.values())
    assert size <= peaks["dot"] < size + 8_000
    assert size <= peaks["zeros + gemm"] < size + 8_000
    assert peaks["reused out"] < 8_000


def test_reuse_is_per_site_shape_and_dtype():
    reused = _forms()["reused out"]
    first = reused("one", A, A)
    assert reused("one", A, A) is first
    assert reused("two", A, A) is not first
    assert reused("one", A[:4], A) is not first
    assert _forms()["reused out"]("one", A, A) is not first
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
    assert np.array_equal(x, before)


@given(seeds, st.lists(st.integers(0, 4), max_size=4), dtypes, factors, factors, ways)
def test_blend_takes_any_number_of_dimensions(seed, shape, dtype, alpha, beta, way):
    rng = np.random.default_rng(seed)
    x, y = (np.asarray(make(rng, tuple(shape), dtype)) for _ in range(2))
    terms = alpha * x.astype(np.float64), beta * y.astype(np.float64)
    with calling(way):
        blend(x, y, alpha, beta)
    assert_equiv(y, np.asarray(sum(terms), dtype), depth=2, scale=sum(map(np.abs, terms)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["C", "F", "columns"])
@pytest.mark.parametrize("shape", [(900, 500), (2, 300_000), (300_000, 2)])
def test_blends_of_several_panels(shape, layout, way):
    rng = np.random.default_rng(0)
    x, y = (lay(make(rng, shape), layout) for _ in range(2))
    kept, want = x.copy(), 0.5 * x.astype(np.float64) - 0.25 * y
    with calling(way):
        blend(x, y, 0.5, -0.25)
    assert_equiv(y, want.astype(np.float32), depth=2, scale=np.abs(kept) + np.abs(want))
    assert np.array_equal(x, kept)


def test_a_blend_by_numpy_needs_a_panel_of_memory():
    objects = 2**15  # bytes, for those of Python; a panel has 2**18
    rng = np.random.default_rng(0)
    x, y = make(rng, (4000, 500)), make(rng, (4000, 500))
    with calling("NumPy alone"):
        assert least_peak(lambda: blend(x, y, 0.5, 0.5)) < 2**18 + objects
        assert least_peak(lambda: blend(x, y, 1.0, 0.5)) < objects
        assert least_peak(lambda: blend(x, y, 0.5, 0.0)) < objects
    assert least_peak(lambda: blend(x, y, 0.5, 0.5)) < (objects if NUMPY_IS_ON_OPENBLAS else 2**19)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_factor_of_0_leaves_its_array_unread(layout, way):
    number, nan = (lay(np.full((5, 6), v, np.float32), layout) for v in (3, np.nan))
    with calling(way):
        blend(number, (out := nan.copy()), 2.0, 0.0)
        assert (out == 6).all()
        blend(nan, (out := number.copy()), 0.0, 2.0)
        assert (out == 6).all()
        blend(nan, (out := nan.copy()), 0.0, 0.0)
        assert (out == 0).all()


def overlapping():
    return np.lib.stride_tricks.as_strided(np.zeros(9, np.float32), (4, 4), (4, 8))


BAD_BLENDS = {
    "a longer x": (lambda x, y: (ok(5, 4), y), ValueError, r"^y: shape \(4, 4\), needed \(5, 4\)"),
    "a shorter x": (lambda x, y: (x[:3], y), ValueError, "^y: shape"),
    "x transposed": (lambda x, y: (ok(2, 8), y), ValueError, "^y: shape"),
    "a vector x": (lambda x, y: (x.reshape(-1), y), ValueError, "^y: shape .* 2 dimensions"),
    "x in float64": (lambda x, y: (x.astype("f8"), y), TypeError, "^y: float32 is not supported"),
    "y in float64": (lambda x, y: (x, y.astype("f8")), TypeError, "^y: float64 is not supported"),
    "x big endian": (lambda x, y: (x.astype(">f4"), y), TypeError, "^x: >f4 is not supported"),
    "y big endian": (lambda x, y: (x, y.astype(">f4")), TypeError, "^y: >f4 is not supported"),
    "both float16": (lambda x, y: (x.astype("f2"), y.astype("f2")), TypeError, "^x: float16"),
    "both complex": (lambda x, y: (x.astype("F"), y.astype("F")), TypeError, "^x: complex64"),
    "both integers": (lambda x, y: (x.astype(int), y.astype(int)), TypeError, "^x: int64"),
    "x a list": (lambda x, y: (x.tolist(), y), TypeError, "^x: a NumPy array"),
    "y a list": (lambda x, y: (x, y.tolist()), TypeError, "^y: a NumPy array"),
    "y masked": (lambda x, y: (x, np.ma.masked_array(y)), TypeError, "^y: .* MaskedArray"),
    "y read-only": (lambda x, y: (x, read_only(y.view())), ValueError, "^y: is read-only"),
    "y broadcast": (lambda x, y: (x, np.broadcast_to(y[:1], (4, 4))), ValueError, "read-only"),
    "y over itself": (lambda x, y: (x, overlapping()), ValueError, "^y: entries share memory"),
    "x is y": (lambda x, y: (y, y), ValueError, "^y: overlaps x"),
    "x is y transposed": (lambda x, y: (y.T, y), ValueError, "^y: overlaps x"),
    "x begins in y": (
        lambda x, y: (y.reshape(-1)[:12], y.reshape(-1)[4:]),
        ValueError,
        "^y: overlaps x",
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", BAD_BLENDS)
def test_blends_that_do_not_fit_are_refused_and_write_nothing(case, way):
    spoil, error, why = BAD_BLENDS[case]
    whole = np.full((4, 4), 7, np.float32)
    x, y = spoil(ok(), whole)
    kept = np.array(x)
    with calling(way), pytest.raises(error, match=why):
        blend(x, y, 0.5, 0.0)
    assert (whole == 7).all()
    assert np.array_equal(np.array(x), kept)


def test_an_order_of_its_own_for_each_is_taken():
    x, y = make(np.random.default_rng(0), (2, 5, 7))
    want = 0.5 * x + 0.25 * y
    other = np.asfortranarray(y)
    blend(x, other, 0.5, 0.25)
    blend(x, y, 0.5, 0.25)
    for got in (y, other):
        assert_equiv(got, want, depth=3, scale=np.abs(x) + np.abs(want))


# --- floating-point errors ---


@pytest.mark.parametrize("way", WAYS)
def test_errstate_holds_for_the_plain_product_alone(way):
    """As the docstrings say. Nothing is half-written, since nothing is raised on the other ways."""
    big, out = np.full((3, 3), 1e30, np.float32), np.zeros((3, 3), np.float32)
    with calling(way), np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FloatingPointError):
            gemm(big, big, out)
        for call in (
            lambda out: gemm(big, big, out, alpha=0.5),
            lambda out: gemm(big, big, out, beta=1.0),
            lambda out: gemm(big, big, out, alpha=0.0, beta=1e30),
            lambda out: blend(big, out, 1e20, 1e20),
            lambda out: blend(big, out.T, 1e20, 1e20),
            lambda out: blend(big, out, 1e20, 0.0),
            lambda out: blend(big, out, 0.0, 1e30),
        ):
            out = big.copy()
            call(out)
            assert np.isinf(out).all()
    with np.errstate(all="warn"), pytest.warns(RuntimeWarning, match="overflow"):
        gemm(big, big, out)


# --- which BLAS ---


@pytest.fixture
def fresh():
    """`_numpy_blas` forgets what it found, before and after."""
    _numpy_blas.cache_clear()
    yield
    _numpy_blas.cache_clear()


@pytest.mark.skipif(not NUMPY_IS_ON_OPENBLAS, reason="NumPy runs on another BLAS")
@pytest.mark.parametrize("routine", ["gemm", "axpby"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpys_own_openblas_is_found_whatever_else_is_loaded(routine, dtype, fresh):
    import scipy.linalg.blas  # noqa: F401  it brings an OpenBLAS of its own

    version = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["version"]
    library = _numpy_library()
    config = next(
        getattr(library, name)
        for name in ("scipy_openblas_get_config64_", "openblas_get_config")
        if hasattr(library, name)
    )
    config.restype = ctypes.c_char_p
    assert version.rsplit(".", 1)[0] in config().decode()
    assert _numpy_blas(routine, np.dtype(dtype)) is not None


class Library:
    """Stands for a shared library; its functions note how they are called."""

    def __init__(
        self, prefix="", suffix="", config=b"OpenBLAS 0.3 USE64BITINT", routines=("gemm",)
    ):
        self.calls = []
        for letter in "sd":
            for routine in routines:
                self._add(f"{prefix}cblas_{letter}{routine}{suffix}", self._note)
        if config is not None:
            self._add(f"{prefix}openblas_get_config{suffix}", lambda: config)

    def _note(self, *args):
        self.calls.append(args)

    def _add(self, name, work):
        function = lambda *args: work(*args)  # noqa: E731  a function may have argtypes
        setattr(self, name, function)


@pytest.mark.parametrize("prefix", ["", "scipy_"])
@pytest.mark.parametrize("suffix", ["", "64_"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("config", "integer", "largest"),
    [
        (b"OpenBLAS 0.3.31 USE64BITINT", ctypes.c_int64, 2**63 - 1),
        (b"OpenBLAS", ctypes.c_int32, 2**31 - 1),
    ],
)
def test_integers_are_as_wide_as_the_library_says(prefix, suffix, dtype, config, integer, largest):
    found = _declare(Library(prefix, suffix, config), "gemm", np.dtype(dtype))
    real = {np.float32: ctypes.c_float, np.float64: ctypes.c_double}[dtype]
    assert found.largest == largest
    assert found.call.restype is None
    enum, pointer = ctypes.c_int, ctypes.c_void_p
    assert found.call.argtypes == [
        *[enum] * 3,
        *[integer] * 3,
        real,
        *[pointer, integer] * 2,
        real,
        pointer,
        integer,
    ]


@pytest.mark.parametrize(
    "library",
    [
        Library(config=None),  # MKL, BLIS, Accelerate: their integers may have either width
        Library(routines=()),
        Library("scipy_", "64_", routines=("dot",)),
        SimpleNamespace(cblas_sgemm=None),
    ],
)
def test_what_does_not_describe_itself_is_never_called(library, fresh, monkeypatch):
    monkeypatch.setattr(module, "_numpy_library", lambda: library)
    assert _numpy_blas("gemm", np.dtype(np.float32)) is None
    assert not getattr(library, "calls", [])
    assert_product(A, A, A.copy(), 0.5, 2.0)


def test_axpby_may_be_missing_where_gemm_is_not(fresh, monkeypatch):
    monkeypatch.setattr(module, "_numpy_library", Library)
    assert _declare(Library(), "gemm", np.dtype(np.float32)) is not None
    assert _numpy_blas("axpby", np.dtype(np.float32)) is None
    y = np.ones(5, np.float32)
    blend(np.ones(5, np.float32), y, 2.0, 3.0)
    assert (y == 5).all()


@pytest.mark.parametrize("error", [OSError, ImportError])
def test_a_numpy_that_cannot_be_asked_is_no_error(error, fresh, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(module.importlib, "import_module", fail)
    assert _numpy_library() is None
    assert _numpy_blas("gemm", np.dtype(np.float32)) is None
    assert_product(A, A, A.copy(), 0.5, 2.0)


def matrix_at(address, rows, columns, leading, dtype, transposed):
    """What a C function sees at an address."""
    if transposed:
        rows, columns = columns, rows
    count = (rows - 1) * leading + columns
    flat = np.ctypeslib.as_array((ctypes.c_char * (count * dtype.itemsize)).from_address(address))
    steps = (leading * dtype.itemsize, dtype.itemsize)
    view = np.lib.stride_tricks.as_strided(flat.view(dtype), (rows, columns), steps)
    return view.T if transposed else view


def c_gemm(dtype, fault=None):
    """The routine in NumPy, right or with a fault."""

    def call(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
        columns = order == 102
        a = matrix_at(a, m, k, lda, dtype, (ta == 112) != columns)
        b = matrix_at(b, k, n, ldb, dtype, (tb == 112) != columns)
        out = matrix_at(c, m, n, ldc, dtype, columns)
        product = alpha * (a @ b)
        if fault == "sign":
            product = -product
        elif fault == "column" and columns:
            product[:, -1] += 1
        elif fault == "inner":
            product -= alpha * np.outer(a[:, -1], b[-1])
        elif fault == "beta":
            beta = 0 if beta else beta
        if fault == "reads out":
            out[...] = product + beta * out
        else:
            out[...] = product + beta * out if beta else product
        if fault == "frame":
            matrix_at(c - dtype.itemsize, 1, 1, 1, dtype, False)[...] = 0

    return _Routine(call, 2**63 - 1)


FAULTS = ["sign", "column", "inner", "beta", "reads out", "frame"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_routine_that_is_wrong_is_refused(fault, dtype, fresh, monkeypatch):
    dtype = np.dtype(dtype)
    routine = c_gemm(dtype, fault)
    monkeypatch.setattr(module, "_declare", lambda library, name, kind: routine)
    assert _numpy_blas("gemm", dtype) is (routine if fault is None else None)
    a = A.astype(dtype)
    assert_product(a, a.T, a.copy(), 0.5, 2.0)  # what is refused is not used


def c_axpby(dtype, fault=None):
    def call(n, alpha, x, x_step, beta, y, y_step):
        assert (x_step, y_step) == (1, 1)
        n -= fault == "short"
        x, out = (matrix_at(p, 1, n, n, dtype, False)[0] for p in (x, y))
        out[...] = (alpha if fault != "sign" else -alpha) * x + beta * out
        if fault == "frame":
            matrix_at(y + n * dtype.itemsize, 1, 1, 1, dtype, False)[...] = 0

    return _Routine(call, 2**63 - 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", [None, "sign", "short", "frame"])
def test_a_wrong_blend_is_refused(fault, dtype, fresh, monkeypatch):
    dtype = np.dtype(dtype)
    routine = c_axpby(dtype, fault)
    monkeypatch.setattr(module, "_declare", lambda library, name, kind: routine)
    assert _numpy_blas("axpby", dtype) is (routine if fault is None else None)
    y = np.ones(5, dtype)
    blend(np.ones(5, dtype), y, 2.0, 3.0)
    assert (y == 5).all()


def test_nothing_is_kept_before_it_was_tried(fresh, monkeypatch):
    dtype = np.dtype(np.float32)

    def interrupted(blas, kind):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(module._TRIALS, "gemm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _numpy_blas("gemm", dtype)
        assert _numpy_blas.cache_info().currsize == 0
    if NUMPY_IS_ON_OPENBLAS:
        assert _numpy_blas("gemm", dtype) is not None


def test_threads_that_come_first_together_all_get_it(fresh):
    start, results = threading.Barrier(8), []

    def work():
        out = A.copy()
        start.wait()
        results.append(gemm(A, A, out, alpha=0.5, beta=2.0))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(np.array_equal(r, results[0]) for r in results)


@pytest.mark.parametrize(
    ("m", "k", "n", "leading"),
    [(6, 2, 2, 5), (2, 6, 2, 6), (2, 2, 6, 6), (5, 5, 5, 6), (5, 5, 5, 5)],
    ids=["rows", "inner", "columns", "leading", "fits"],
)
@pytest.mark.parametrize("place", ["a", "b", "out"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_sizes_beyond_the_integers_of_a_blas_are_not_handed_to_it(
    m, k, n, leading, place, order, monkeypatch
):
    calls = []
    narrow = _Routine(lambda *args: calls.append(args), 5)  # 5 stands for 2**31 - 1
    monkeypatch.setattr(module, "_numpy_blas", lambda routine, dtype: narrow)
    rng = np.random.default_rng(0)
    arrays = {}
    for name, (r, c) in {"a": (m, k), "b": (k, n), "out": (m, n)}.items():
        rows, columns = (r, c) if order == "C" else (c, r)
        wide = np.zeros((rows, max(columns, leading if name == place else 0)), np.float32)
        view = wide[:, :columns]
        view[...] = rng.standard_normal(view.shape)
        arrays[name] = view if order == "C" else view.T
    a, b, out = arrays.values()
    want = 0.5 * (a @ b) + 2 * out
    gemm(a, b, out, alpha=0.5, beta=2.0)
    if max(m, k, n, leading) > 5:
        assert not calls
        assert_equiv(out, want, depth=8, scale=np.abs(a) @ np.abs(b) + np.abs(want))
    else:
        assert len(calls) == 1


@pytest.mark.parametrize("k", [5, 6])
def test_an_inner_size_that_no_leading_dimension_shows(k, monkeypatch):
    calls = []
    narrow = _Routine(lambda *args: calls.append(args), 5)
    monkeypatch.setattr(module, "_numpy_blas", lambda routine, dtype: narrow)
    a, b = np.ones((k, 2), np.float32).T, np.ones((k, 2), np.float32)
    gemm(a, b, np.zeros((2, 2), np.float32), alpha=0.5)
    assert len(calls) == (k == 5)


@pytest.mark.parametrize("size", [5, 6])
def test_a_blend_beyond_the_integers_of_a_blas_is_not_handed_to_it(size, monkeypatch):
    calls = []
    narrow = _Routine(lambda *args: calls.append(args), 5)
    monkeypatch.setattr(module, "_numpy_blas", lambda routine, dtype: narrow)
    y = np.ones(size, np.float32)
    blend(np.ones(size, np.float32), y, 2.0, 3.0)
    assert len(calls) == (size == 5)
    assert (y == (1 if calls else 5)).all()


# --- outs in general ---


def strided(shape, strides):
    return np.lib.stride_tricks.as_strided(np.zeros(400, np.float32)[200:], shape, strides)


@pytest.mark.parametrize(
    ("a", "overlaps"),
    [
        (strided((3, 4), (16, 4)), False),
        (strided((3, 4), (12, 4)), True),
        (strided((3, 4), (4, 12)), False),
        (strided((3, 4), (-16, -4)), False),
        (strided((3, 4), (-12, 4)), True),
        (strided((3, 4), (16, 0)), True),
        (strided((3, 1), (16, 0)), False),
        (strided((0, 4), (0, 0)), False),
        (strided((4,), (3,)), True),
        (strided((2, 3, 4), (48, 16, 4)), False),
        (strided((2, 3, 4), (44, 16, 4)), True),
    ],
)
def test_entries_that_share_memory_are_noticed(a, overlaps):
    assert _overlaps_itself(a) == overlaps
    if overlaps:
        with pytest.raises(ValueError, match=r"^out: entries share memory"):
            check_out(a, a.shape, a.dtype, {})
    else:
        assert check_out(a, a.shape, a.dtype, {}) is a


def test_an_overlap_that_is_hard_to_tell_is_refused_in_time():
    flat = np.zeros(192_163_377, np.int8)  # never touched; an exact answer takes a minute
    a = np.lib.stride_tricks.as_strided(flat, (1049, 1049, 1049), (36674, 61119, 85569))
    b = np.lib.stride_tricks.as_strided(flat[64_023_025:], (1049, 1049, 1), (12223, 12224, 1))
    with pytest.raises(ValueError, match=r"^out: may overlap x in memory; it needs storage"):
        _check_apart("out", b, {"x": a})


@pytest.mark.parametrize(
    ("shape", "dtype", "offset", "error", "why"),
    [
        ((-1, 2), "f4", 0, ValueError, r"^shape: \(-1, 2\) is negative"),
        ((2, -1), "f4", 0, ValueError, "^shape: "),
        (-1, "f4", 0, ValueError, "^shape: -1"),
        ((-2, -2), "f4", 0, ValueError, "^shape: "),
        ((2**33, 2**31), "f4", 0, ValueError, "^shape: .* more than an array can hold"),
        ((2**62,), "f8", 0, ValueError, "^shape: "),
        ((2.0, 2), "f4", 0, TypeError, "integer"),
        ((2, 2), "O", 0, TypeError, "^dtype: object holds Python objects"),
        ((2, 2), "f4", 2, ValueError, "^offset: 2 bytes, needed a multiple of 4"),
        ((2, 2), "f8", 4, ValueError, "^offset: "),
        ((2, 2), "f4", -4, ValueError, "^offset: -4"),
        ((2, 2), "f4", 4.0, TypeError, "integer"),
    ],
)
def test_buffers_that_cannot_be(shape, dtype, offset, error, why):
    with pytest.raises(error, match=why):
        aligned_empty(shape, dtype, offset)


def test_a_number_is_a_shape():
    assert aligned_empty(3).shape == (3,)
    assert aligned_empty(()).shape == ()


def test_panels_of_a_negative_number_of_rows():
    with pytest.raises(ValueError, match=r"^n_rows: -1 is negative"):
        panels(-1, 4)
