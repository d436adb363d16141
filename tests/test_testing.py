"""Edges of the comparison itself: a check that cannot fail would let everything else pass."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import DTYPES, dtypes, make, seeds
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.testing import (
    _SPECIALS,
    _sprinkle,
    assert_equiv,
    expect_fail,
    no_allocation,
    numeric_gradient,
    same,
    tolerance,
)


@given(dtypes, st.integers(1, 10**6), st.floats(0.5, 100))
def test_tolerance_grows_with_the_root_of_the_depth(dtype, depth, c):
    assert tolerance(dtype, depth, c=c) == pytest.approx(
        depth**0.5 * c * float(np.finfo(dtype).eps)
    )


@pytest.mark.parametrize("depth", [0, -3])
def test_tolerance_of_an_empty_reduction_is_that_of_one_term(depth):
    assert tolerance(np.float32, depth) == tolerance(np.float32, 1)


@pytest.mark.parametrize(
    "thing",
    [
        1.5,
        np.float32(2),
        np.array(3.0),
        np.empty(0),
        np.empty((0, 3), np.float32),
        np.float16(0.1),
        np.array([np.nan, np.inf, -np.inf]),
        np.array(np.nan),
    ],
    ids=repr,
)
def test_equal_things_are_equal(thing):
    assert_equiv(thing, thing)
    assert same(thing, thing) is True


@pytest.mark.parametrize(
    ("actual", "expected", "why"),
    [
        (np.empty((0, 3)), np.empty((3, 0)), "shape"),
        (np.array([1.0]), np.array(1.0), "shape"),
        (1, 1.0, "dtype"),
        (np.float32(1), 1.0, "dtype"),
        (np.empty(0, np.float32), np.empty(0), "dtype"),
        (np.array(1.0), np.array(1.5), "values"),
        (np.array(np.nan), np.array(1.0), "NaN"),
        (np.array([[0.0, -np.inf]]), np.array([[0.0, np.inf]]), r"\+inf"),
        (np.array([-np.inf]), np.array([1.0]), "-inf"),
        (-1.7e308, 1.7e308, "values"),  # their difference overflows
        (5e-324, 0.0, "values"),  # nothing is allowed where everything expected is 0
    ],
)
def test_each_difference_is_named(actual, expected, why):
    for check in (assert_equiv, same):
        with pytest.raises(AssertionError, match=rf"^{why}"):
            check(actual, expected)


@pytest.mark.parametrize("kind", [int, bool])
def test_values_without_eps_are_refused_not_waved_through(kind):
    with pytest.raises(ValueError, match=r"dtype|inexact"):
        assert_equiv(np.zeros(3, kind), np.ones(3, kind))


@given(seeds, dtypes, st.integers(1, 1000))
def test_the_bound_is_where_it_is_said_to_be(seed, dtype, depth):
    rng = np.random.default_rng(seed)
    expected = make(rng, (4, 3), dtype)
    scale = 2.0 ** rng.integers(3, 9, expected.shape)  # exact, and above every entry
    actual, at = expected.copy(), tuple(rng.integers(0, (4, 3)))
    actual[at] += 0.9 * tolerance(dtype, depth) * scale[at]
    assert_equiv(actual, expected, depth=depth, scale=scale)
    actual[at] = (
        expected[at] + 1.2 * tolerance(dtype, depth) * scale[at] + 2 * np.spacing(abs(expected[at]))
    )
    with pytest.raises(
        AssertionError, match=re.escape(f"1 of 12 differ; worst at {tuple(map(int, at))}")
    ):
        assert_equiv(actual, expected, depth=depth, scale=scale)


def test_scale_broadcasts_but_only_to_the_result():
    expected = np.zeros((2, 3))
    actual = np.array([[0, 0, 0], [1e-13, 0, 0]])
    assert_equiv(actual, expected, scale=np.array([[0.0], [1e3]]))
    with pytest.raises(AssertionError, match="values"):
        assert_equiv(actual, expected, scale=np.array([[1e3], [0.0]]))
    with pytest.raises(ValueError, match="dimensions"):
        assert_equiv(actual, expected, scale=np.ones((4, 2, 3)))


@pytest.mark.parametrize("entry", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("shape", [(), (2,)], ids=["scalar", "array"])
def test_a_scale_that_says_nothing_passes_nothing(entry, shape):
    # Such a scale arises by itself, as |A| @ |B| of an input with a NaN in it or beyond the dtype.
    with pytest.raises(AssertionError, match="values: 2 of 2"):
        assert_equiv(np.array([1.0, 5.0]), np.array([1.0, 1.0]), scale=np.full(shape, entry))


@pytest.mark.parametrize("entry", [np.nan, np.inf])
def test_a_scale_need_not_be_finite_where_the_result_is_not(entry):
    expected = np.array([1.0, np.nan, np.inf, -np.inf])
    assert_equiv(expected, expected, scale=np.array([1.0, entry, entry, entry]))


def test_each_entry_is_its_own_scale():
    expected = np.array([1.0, -1e6, 1e-9, 0.0, np.inf, np.nan])
    for i in range(4):
        for wrong in (-expected[i], 2 * expected[i], 0.0, expected[i] * (1 + 1e-12)):
            actual = expected.copy()
            actual[i] = wrong or 1e-300
            with pytest.raises(AssertionError, match=f"1 of 6 differ; worst at \\({i},\\)"):
                assert_equiv(actual, expected)


PRODUCTS = {  # what a product may be instead, and at which sizes
    "sign": lambda a, b: -(a @ b),
    "factor 2": lambda a, b: 2 * (a @ b),
    "factor 0": lambda a, b: 0 * (a @ b),
    "transposed": lambda a, b: (a @ b).T,
    "operands swapped": lambda a, b: b @ a,
    "a missing term": lambda a, b: a[:, 1:] @ b[1:],
    "a term twice": lambda a, b: a @ b + a[:, :1] @ b[:1],
    "one operand transposed": lambda a, b: a.T @ b,
}


@pytest.mark.parametrize("mutant", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 31, 768])
def test_a_right_product_passes_and_a_wrong_one_is_found(n, dtype, mutant):
    a, b = np.random.default_rng(n).standard_normal((2, n, n)).astype(dtype)
    bound = dict(depth=n, scale=np.sqrt(a**2 @ b**2))
    assert_equiv(a[:, ::-1].copy() @ b[::-1].copy(), a @ b, **bound)
    with pytest.raises(AssertionError, match="values"):
        assert_equiv(PRODUCTS[mutant](a, b), a @ b, **bound)


def test_a_missing_term_is_found_in_a_sum_of_hundreds_of_thousands():
    a, b = np.random.default_rng(0).standard_normal((2, 512 * 768)).astype(np.float32)
    terms = a.astype(np.float64) * b
    bound = dict(depth=terms.size, scale=np.sqrt(np.sum(terms**2)))
    assert_equiv(np.vdot(a, b), np.float32(terms.sum()), **bound)
    typical = np.argmin(np.abs(np.abs(terms) - np.median(np.abs(terms))))
    with pytest.raises(AssertionError, match="values"):
        assert_equiv(np.vdot(a, b) - np.float32(terms[typical]), np.float32(terms.sum()), **bound)


def test_expect_fail_passes_on_the_right_error(capsys):
    with expect_fail(ValueError, "why"):
        raise ValueError("this is why")
    assert capsys.readouterr().out == "ValueError: this is why\n"
    with expect_fail(OSError, show=False):  # a subclass will do
        raise FileNotFoundError
    assert capsys.readouterr().out == ""


def test_expect_fail_fails_otherwise():
    with pytest.raises(AssertionError, match=r"no AssertionError was raised"), expect_fail():
        pass
    with pytest.raises(AssertionError, match="without 'size'"), expect_fail(ValueError, "size"):
        raise ValueError("shape")
    with pytest.raises(KeyError), expect_fail(ValueError):  # another error keeps its own name
        raise KeyError("x")


@given(seeds, dtypes, st.sampled_from([(), (0,), (0, 4), (3,), (2, 2), (6,), (5, 7)]))
def test_sprinkle_puts_each_value_once(seed, dtype, shape):
    x = np.full(shape, 7, dtype)
    out = _sprinkle(x, np.random.default_rng(seed))
    assert out.shape == shape
    assert out.dtype == dtype
    assert (x == 7).all()
    new = np.sort(out[out != 7])
    assert np.array_equal(new, np.sort(np.asarray(_SPECIALS[: x.size], dtype)), equal_nan=True)


def test_sprinkle_follows_the_seed_and_keeps_views_apart():
    x = np.ones((6, 8), np.float32)[::2, ::-1]
    first, second = (_sprinkle(x, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, second, equal_nan=True)
    assert not np.shares_memory(first, x)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3)])
def test_numeric_gradient_of_a_quadratic(shape):
    # Central differences of a quadratic have no truncation error: what is left is rounding over h.
    x = np.random.default_rng(0).standard_normal(shape)
    kept = x.copy()
    assert_equiv(numeric_gradient(lambda v: float(np.sum(v * v)), x), 2 * x, c=1e6, scale=1.0)
    assert np.array_equal(x, kept)


def test_numeric_gradient_of_a_view():
    x = np.arange(12.0).reshape(3, 4)[:, ::2]
    assert_equiv(
        numeric_gradient(lambda v: float(np.sum(np.arange(6).reshape(3, 2) * v)), x),
        np.arange(6.0).reshape(3, 2),
        c=1e6,
        scale=11.0,
    )


@pytest.mark.parametrize("dtype", [np.float32, int, complex])
def test_numeric_gradient_needs_float64(dtype):
    with pytest.raises(TypeError, match="float64"):
        numeric_gradient(np.sum, np.ones(2, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_entry_of_a_large_result_is_found(dtype):
    expected = make(np.random.default_rng(0), (200, 300), dtype)
    actual = expected.copy()
    actual[123, 45] += 1e-3
    with pytest.raises(AssertionError, match=r"values: 1 of 60000 differ; worst at \(123, 45\)"):
        assert_equiv(actual, expected, depth=30)


@pytest.mark.parametrize(
    "thing", [3, True, "text", [1, 2, 3], np.array(["a", "b"]), np.arange(6).reshape(2, 3), b"x"]
)
def test_what_has_no_rounding_is_the_same_as_itself(thing):
    assert same(thing, thing) is True


@pytest.mark.parametrize(
    ("actual", "expected", "why"),
    [
        ([1, 2, 4], [1, 2, 3], r"^values: 1 of 3 differ, first at \(2,\): .*4.*expected .*3"),
        (2**53, 2**53 + 1, "^values"),  # equal as float64
        ([True, False], [True, True], "^values"),
        (True, 1, "^dtype"),
        (np.int32(1), np.int64(1), "^dtype"),
        ([1, 2], [[1, 2]], "^shape"),
        ("a", "b", "^values"),
    ],
)
def test_what_has_no_rounding_must_be_equal(actual, expected, why):
    with pytest.raises(AssertionError, match=why):
        same(actual, expected)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_numbers_round_by_their_size(dtype):
    eps = np.finfo(dtype).eps
    z = np.array([1 + 1e-3j, 3 - 4j, np.nan, complex(np.inf, 1), 0], dtype)
    close = z + np.array([0.5j * eps, 10 * eps, 0, 0, 0], dtype)
    assert same(close, z)  # by the size of the number, not of its part
    for i, wrong in ((0, 6j * eps), (1, 30 * eps), (1, 30j * eps), (4, 1e-30)):
        other = z.copy()
        other[i] += wrong
        with pytest.raises(AssertionError, match=rf"1 of 5 differ; worst at \({i},\)"):
            same(other, z)
    for i, wrong in ((2, 0), (3, complex(-np.inf, 1)), (3, complex(np.inf, 2)), (1, np.nan)):
        other = z.copy()
        other[i] = wrong
        with pytest.raises(AssertionError):
            same(other, z)


def test_same_takes_what_the_tolerance_is_made_of():
    a, b = np.array([1.0]), np.array([1.0 + 1e-13])
    with pytest.raises(AssertionError, match="values"):
        same(a, b)
    for loose in (dict(depth=10**6), dict(scale=1e3), dict(c=1e3)):
        assert same(a, b, **loose)
        assert same(a + 0j, b + 0j, **loose)


def test_no_allocation_passes_in_place_and_names_the_line_otherwise():
    x, out = np.ones((2, 1000))
    assert no_allocation(lambda: np.add(x, x, out=out)) is None
    says = r"^a steady-state call makes .*1 allocation, 8\d\d\d "
    with pytest.raises(AssertionError, match=says) as e:
        no_allocation(lambda: np.add(x, x))
    assert re.search(r"\n  \S*test_testing\.py:\d+: 8\d\d\d bytes", str(e.value))


def test_no_allocation_without_memray_says_what_it_cannot_see(monkeypatch):
    monkeypatch.setitem(sys.modules, "memray", None)
    x, out = np.ones((2, 1000))
    no_allocation(lambda: np.add(x, x, out=out))
    with pytest.raises(AssertionError, match="at least 1 allocation") as e:
        no_allocation(lambda: np.add(x, x))
    assert "memray is not installed" in str(e.value)


def test_no_allocation_passes_on_what_it_is_told():
    kept = {}

    def lazy():
        kept.setdefault("first", np.empty(1000))  # makes an array each time ...

    def once():
        if "array" not in kept:
            kept["array"] = np.empty(1000)

    with pytest.raises(AssertionError):
        no_allocation(lazy)
    no_allocation(once)
    kept.clear()
    calls = []
    no_allocation(lambda: calls.append(0), warmup=5)
    assert len(calls) >= 6
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with pytest.raises(AssertionError, match="allocation"):
            no_allocation(lambda: pool.submit(np.ones, 10**6).result(), threads=True)


@pytest.mark.parametrize(
    ("fn", "error"), [(None, TypeError), (lambda: 1 / 0, ZeroDivisionError), (np.add, TypeError)]
)
def test_no_allocation_of_what_cannot_be_called(fn, error):
    with pytest.raises(error):
        no_allocation(fn)
