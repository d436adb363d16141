"""Properties that the mathematics promises, and oracles in loops for values not finite."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
from conftest import DTYPES, dtypes, kinds, make, seeds
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.reference import (
    _as_rate,
    _centred,
    _check_array,
    _check_number,
    _check_rows,
    _check_whole,
    _real,
    apply_context,
    apply_context_vjp,
    context_gradient,
    ema,
    sample_rows,
    similarity,
    similarity_step,
)
from ctxlab.testing import assert_equiv, numeric_gradient, tolerance

TOP = math.tanh(1)
FLOOR = 1e-12  # the original's, which is the default
small = st.integers(1, 6)


# --- which rows ---


@given(st.integers(0, 10**7), st.integers(1, 300))
def test_sampled_rows_are_spread_and_distinct(n_rows, max_rows):
    rows = sample_rows(n_rows, max_rows)
    assert rows.dtype == np.intp
    assert len(rows) == min(n_rows, max_rows)
    assert np.all(np.diff(rows) >= 1)
    if len(rows):
        assert rows[0] == 0
        assert rows[-1] < n_rows
        # Even: steps differ by at most one, and what is left at the end is no longer than a step.
        steps = np.diff(np.append(rows, n_rows))
        assert steps.max() - steps.min() <= 1


@given(st.integers(1, 64), st.integers(0, 40))
def test_rows_are_the_originals_where_those_cover_the_sequence(max_rows, batches):
    for n_rows in {*range(max_rows + 1), batches * max_rows}:
        original = np.arange(n_rows)[:: max(n_rows // max_rows, 1)][:max_rows]
        assert np.array_equal(sample_rows(n_rows, max_rows), original)


@given(st.integers(0, 1000))
def test_none_takes_every_row(n_rows):
    assert np.array_equal(sample_rows(n_rows, None), np.arange(n_rows))


# --- similarity ---


def integers(seed, shape, dtype=np.float64):
    """Small whole numbers, so that shifts and scalings by powers of two are exact."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(dtype)


def similarity_in_loops(x, y):
    """The definition, entry by entry, with exactly rounded sums."""

    def column(a, i):
        v = [float(e) if math.isfinite(e) else 0.0 for e in a[:, i]]
        mean = math.fsum(v) / len(v)
        return [e - mean for e in v]

    out = np.zeros((x.shape[1], y.shape[1]))
    for i in range(x.shape[1]):
        for j in range(y.shape[1]):
            u, v = column(x, i), column(y, j)
            d = math.sqrt(math.fsum(e * e for e in u)) * math.sqrt(math.fsum(e * e for e in v))
            out[i, j] = (
                math.tanh(math.fsum(map(math.prod, zip(u, v, strict=True))) / d) if d > 1e-12 else 0
            )
    return out


@given(seeds, st.integers(1, 9), small, st.sampled_from([0.0, 0.3]))
def test_similarity_is_its_definition(seed, n, D, spoilt):
    x, y = integers(seed, (2, n, D))
    rng = np.random.default_rng(seed)
    for a in (x, y):
        a[rng.random(a.shape) < spoilt] = rng.choice([np.nan, np.inf, -np.inf])
    assert_equiv(similarity(x, y, max_rows=None), similarity_in_loops(x, y), depth=n, scale=1.0)


@given(seeds, st.integers(2, 40), small, st.integers(-15, 400), st.integers(-1000, 1000))
def test_similarity_ignores_scale_and_shift(seed, n, D, exponent, shift):
    x, y = integers(seed, (2, n, D))
    want = similarity(x, y)
    assert_equiv(similarity((x + shift) * 2.0**exponent, y), want, depth=n, scale=1.0)
    assert_equiv(similarity(x, (y + shift) * -(2.0**exponent)), -want, depth=n, scale=1.0)


@given(seeds, st.integers(2, 40), small)
def test_similarity_ignores_the_order_of_rows(seed, n, D):
    x, y = integers(seed, (2, n, D))
    order = np.random.default_rng(seed).permutation(n)
    want = similarity(x, y, max_rows=None)
    assert_equiv(similarity(x[order], y[order], max_rows=None), want, depth=n, scale=1.0)
    assert_equiv(similarity(x, y, rows=order), want, depth=n, scale=1.0)


@given(seeds, st.integers(0, 40), st.integers(0, 6), dtypes, kinds)
def test_similarity_is_bounded_and_transposes(seed, n, D, dtype, kind):
    rng = np.random.default_rng(seed)
    x, y = make(rng, (n, D), dtype, kind), make(rng, (n, D), dtype, kind)
    C = similarity(x, y)
    assert C.shape == (D, D)
    assert C.dtype == dtype
    assert np.all(np.abs(C) <= TOP + tolerance(dtype, 32))
    assert_equiv(similarity(y, x), C.T, depth=32, scale=1.0)
    # The same columns on both sides: the diagonal is tanh 1, or 0 for a column without a norm.
    diagonal = np.diag(similarity(x, x))
    assert_equiv(diagonal, np.where(diagonal != 0, TOP, 0).astype(dtype), depth=32, scale=1.0)


@given(seeds, st.integers(1, 200), st.integers(1, 40), dtypes)
def test_max_rows_is_short_for_rows(seed, n, max_rows, dtype):
    x, y = make(np.random.default_rng(seed), (2, n, 3), dtype)
    rows = sample_rows(n, max_rows)
    want = similarity(x, y, max_rows=max_rows)
    assert np.array_equal(similarity(x, y, rows=rows), want)
    assert np.array_equal(similarity(x[rows], y[rows], max_rows=None), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("norms", "empty"), [((1e-7, 2e-6), True), ((1e-5, 1e-6), False), ((1e-13, 100), False)]
)
def test_the_floor_is_on_the_product_of_norms(norms, empty, dtype):
    x, y = (np.array([[-n], [n]], dtype) / 2**0.5 for n in norms)
    assert (similarity(x, y) == 0).all() == empty


# Values of the guards that are worked out by hand or in fractions. The fast path shares `_centred`,
# so a comparison with it says nothing about them.


def exactly_centred(column):
    """Finite entries less their mean, in fractions."""
    values = [Fraction(float(v)) if math.isfinite(v) else Fraction(0) for v in column]
    mean = sum(values, Fraction(0)) / max(len(values), 1)
    return [v - mean for v in values]


@given(
    seeds,
    st.integers(0, 7),
    st.sampled_from(["below 0", "above 0", "mixed", "hostile"]),
    st.integers(-300, 300),
    dtypes,
)
def test_centred_columns_are_exact_up_to_one_rounding(seed, n, kind, exponent, dtype):
    rng = np.random.default_rng(seed)
    a = {
        "below 0": lambda: -rng.uniform(1, 2, (n, 3)),
        "above 0": lambda: rng.uniform(1, 2, (n, 3)),
        "mixed": lambda: rng.standard_normal((n, 3)),
        "hostile": lambda: make(rng, (n, 3), np.float64, "hostile"),
    }[kind]()
    with np.errstate(all="ignore"):
        a = (a * 2.0 ** (exponent if dtype is np.float64 else exponent // 10)).astype(dtype)
    A, e = _centred(a)
    assert A.dtype == np.float64
    assert A.shape == a.shape
    assert e.shape == (3,)
    for j in range(3):
        column = a[:, j]
        largest = max((abs(float(v)) for v in column if math.isfinite(v)), default=0.0)
        scale = Fraction(2) ** int(e[j])
        if largest:
            assert Fraction(1, 2) <= Fraction(largest) / scale < 1  # the power that frexp takes out
        else:
            assert e[j] == 0
        for got, want in zip(A[:, j], exactly_centred(column), strict=True):
            assert abs(Fraction(float(got)) - want / scale) <= Fraction(len(column) * 2, 2**52)


@pytest.mark.parametrize(
    ("column", "centred", "exponent"),
    [
        ([-3.0, -5.0], [0.125, -0.125], 3),  # all below 0: the largest size is 5, not 0
        ([-1.0, -1.0], [0.0, 0.0], 1),
        ([3.0, 5.0], [-0.125, 0.125], 3),
        ([-8.0, 8.0], [-0.5, 0.5], 4),
        ([0.25, np.nan], [0.25, -0.25], -1),
        ([np.inf, 2.0], [-0.25, 0.25], 2),
        ([7.0], [0.0], 3),
        ([0.0, 0.0], [0.0, 0.0], 0),
        ([], [], 0),
    ],
)
def test_centred_columns_by_hand(column, centred, exponent):
    A, e = _centred(np.array(column, np.float64)[:, None])
    assert A[:, 0].tolist() == centred
    assert e.tolist() == [exponent]


def test_constants_are_centred_to_exact_zeros():
    for value in (0.1, -0.1, 1e300, -1e300, 1e-300, 7e-3):
        assert not _centred(np.full((7, 2), value))[0].any()


@pytest.mark.parametrize("shift", [-1e3, -2.0, 0.0, 2.0, 1e3])
def test_a_column_below_zero_correlates_as_any_other(shift):
    x = np.array([[1.0], [2.0], [4.0]]) + shift
    y = np.array([[0.0], [1.0], [0.0]]) - abs(shift)
    # Centred (-4, -1, 5) / 3 and (-1, 2, -1) / 3: their product is -3 / 9, their norms are
    # sqrt(42) / 3 and sqrt(6) / 3.
    want = math.tanh(-3 / math.sqrt(42 * 6))
    assert_equiv(
        similarity(x, y, max_rows=None), np.array([[want]]), c=64, scale=max(1, abs(shift))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("product", "empty"),
    [
        (FLOOR * (1 - 1e-6), True),
        (FLOOR * (1 + 1e-6), False),
        (FLOOR / 2, True),
        (FLOOR * 2, False),
    ],
)
def test_the_floor_is_where_it_is_said_to_be(product, empty, dtype):
    x = np.array([[-1.0], [1.0]], dtype)
    y = (np.array([[-1.0], [1.0]]) * (product / 2)).astype(
        dtype
    )  # norms sqrt 2 and product / sqrt 2
    assert_equiv(similarity(x, y), np.array([[0 if empty else TOP]], dtype), scale=1.0)
    assert_equiv(similarity(x, -y), np.array([[0 if empty else -TOP]], dtype), scale=1.0)
    assert_equiv(similarity(y, x), np.array([[0 if empty else TOP]], dtype), scale=1.0)
    # A token centres across its entries, so the vector (-v, v) has the same norm.
    u, v = x[:, 0], y[:, 0]
    half = math.tanh(0.5)
    want = np.array([[half, -half], [-half, half]], dtype) * (not empty)
    assert_equiv(similarity_step(u, v), want, scale=1.0)


def exact_floor_pair():
    """Columns whose product of norms is FLOOR to the last digit: x of norm 1, y of FLOOR."""
    x = np.array([[0.5], [0.5], [-0.5], [-0.5]])
    return x, x * FLOOR


def test_a_product_of_norms_at_the_floor_counts_as_none():
    x, y = exact_floor_pair()
    assert math.hypot(*y[:, 0]) == FLOOR
    assert similarity(x, y).item() == 0
    assert similarity(y, x).item() == 0
    above = y * (1 + 2**-50)
    assert_equiv(similarity(x, above), np.array([[TOP]]))
    assert not similarity_step(x[:, 0], y[:, 0]).any()
    assert similarity_step(x[:, 0], above[:, 0]).all()


@pytest.mark.parametrize("exponent", [-1000, -500, -60, 0, 60, 500, 1000])
def test_the_floor_sees_the_product_at_its_true_scale(exponent):
    # Norms beyond the range of their product: 2**1000 * 2**1000 is inf, and above the floor.
    x = np.array([[-1.0, 0.0], [1.0, 0.0]]) * 2.0**exponent
    large = exponent >= 0
    assert_equiv(similarity(x, x), np.array([[TOP * large, 0.0], [0.0, 0.0]]))
    assert_equiv(similarity(x, x * 2.0 ** (-exponent)), np.diag([TOP * (exponent >= -39), 0.0]))
    token = similarity_step(x[:, 0], x[:, 0])
    assert (token != 0).all() == large


@pytest.mark.parametrize(("exponent", "empty"), [(-41, True), (-40, False)])
def test_the_floor_lies_between_two_powers_of_two(exponent, empty):
    # Norms sqrt(2) each: the product is 2 * 2**exponent, and 2**-40 < 1e-12 < 2**-39.
    x = np.array([[-1.0], [1.0]])
    assert (similarity(x, x * 2.0**exponent).item() == 0) == empty


def test_similarity_by_hand():
    x = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 6.0]])
    y = np.array([[1.0, 5.0], [0.0, 5.0], [2.0, 5.0]])
    # centred x: (-1, 0, 1), (-2, -2, 4); y: (0, -1, 1), 0. Norms sqrt 2, sqrt 24; sqrt 2, 0.
    want = [[math.tanh(1 / 2), 0.0], [math.tanh(6 / math.sqrt(48)), 0.0]]
    assert_equiv(similarity(x, y), np.array(want), scale=1.0)
    assert_equiv(similarity(y, x), np.array(want).T, scale=1.0)


def test_a_token_by_hand():
    x, y = np.array([1.0, 3.0]), np.array([0.0, 0.0, 6.0])[:2] + np.array([4.0, 0.0])
    # centred (-1, 1) and (2, -2): norms sqrt 2 and 2 sqrt 2, so c / d = -+2 / 4.
    half = math.tanh(0.5)
    assert_equiv(similarity_step(x, y), np.array([[-half, half], [half, -half]]), scale=1.0)


def step_in_loops(x, y):
    def centred(a):
        v = [float(e) if math.isfinite(e) else 0.0 for e in a]
        mean = math.fsum(v) / len(v)
        return [e - mean for e in v]

    u, v = centred(x), centred(y)
    d = math.sqrt(math.fsum(e * e for e in u)) * math.sqrt(math.fsum(e * e for e in v))
    return np.array([[math.tanh(a * b / d) if d > 1e-12 else 0.0 for b in v] for a in u])


@given(seeds, st.integers(1, 9), st.sampled_from([0.0, 0.3]))
def test_step_similarity_is_its_definition(seed, D, spoilt):
    x, y = integers(seed, (2, D))
    x[np.random.default_rng(seed).random(D) < spoilt] = np.inf
    assert_equiv(similarity_step(x, y), step_in_loops(x, y), depth=D, scale=1.0)


@given(seeds, st.integers(0, 9), dtypes, kinds)
def test_step_similarity_is_bounded_and_transposes(seed, D, dtype, kind):
    rng = np.random.default_rng(seed)
    x, y = make(rng, D, dtype, kind), make(rng, D, dtype, kind)
    C = similarity_step(x, y)
    assert C.shape == (D, D)
    assert C.dtype == dtype
    assert np.all(np.abs(C) <= TOP + tolerance(dtype))
    assert_equiv(similarity_step(y, x), C.T, depth=max(D, 1), scale=1.0)


# --- moving average ---


@given(seeds, st.lists(st.floats(-1, 2), min_size=1, max_size=8), dtypes)
def test_averages_stay_within_what_they_average(seed, rates, dtype):
    C, rng = None, np.random.default_rng(seed)
    for rate in rates:
        before = C
        C = ema(before, similarity(*make(rng, (2, 5, 3), dtype, "steps")), rate)
        assert C.dtype == dtype
        assert np.all(np.abs(C) <= TOP + tolerance(dtype, 8))
        if rate <= 0 and before is not None:
            assert np.array_equal(C, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rate", "want"), [(0, 1.0), (0.25, 1.5), (1, 3.0), (-5, 1.0), (7, 3.0), (math.inf, 3.0)]
)
def test_rates_are_clipped(rate, want, dtype):
    old, new = np.full((2, 2), 1, dtype), np.full((2, 2), 3, dtype)
    out = ema(old, new, rate)
    assert_equiv(out, np.full((2, 2), want, dtype))
    assert not np.shares_memory(out, old)
    assert not np.shares_memory(out, new)
    assert_equiv(ema(None, new, rate), ema(np.zeros_like(new), new, rate))


def test_an_average_by_hand():
    old, new = np.array([[1.0, -2.0]]), np.array([[5.0, 6.0]])
    assert ema(old, new, 0.25).tolist() == [[2.0, 0.0]]
    assert ema(None, new, 0.25).tolist() == [[1.25, 1.5]]


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.array(0.5), Fraction(1, 2)])
def test_real_numbers_of_every_type_are_taken(value):
    for number in (_real("s", value), _as_rate(value), _check_number("s", value)):
        assert type(number) is float
        assert number == 0.5
    assert _as_rate(True) == 1.0


@pytest.mark.parametrize("value", ["0.5", None, 0.5j, np.complex64(1), [0.5], np.ones(1)], ids=repr)
def test_what_is_no_real_number_is_named(value):
    with pytest.raises(TypeError, match=r"^update_rate: a real number is needed, not "):
        _as_rate(value)
    with pytest.raises(TypeError, match=r"^strength: a real number is needed, not "):
        _check_number("strength", value)


def test_numbers_beyond_float64_are_named():
    with pytest.raises(ValueError, match=r"^update_rate: the number is beyond the range"):
        _as_rate(10**400)
    with pytest.raises(ValueError, match=r"^strength: the number is beyond the range"):
        _check_number("strength", 10**400)


@pytest.mark.parametrize(
    ("value", "bounds", "fits"),
    [
        (0.0, {}, True),
        (-1e300, {}, True),
        (math.inf, {}, False),
        (math.nan, {}, False),
        (0.0, dict(least=0), True),
        (-1e-300, dict(least=0), False),
        (math.nan, dict(least=0), False),
        (math.inf, dict(least=0), False),
        (0.0, dict(above=0), False),
        (1e-300, dict(above=0), True),
        (1e-300, dict(above=0, dtype=np.float32), False),
        (1e39, dict(dtype=np.float32), False),
        (1e38, dict(dtype=np.float32), True),
    ],
)
def test_numbers_have_bounds(value, bounds, fits):
    if fits:
        assert _check_number("s", value, **bounds) == value
    else:
        with pytest.raises(ValueError, match=r"^s: .*, needed a number .*finite in float"):
            _check_number("s", value, **bounds)


@pytest.mark.parametrize(
    ("value", "bounds", "fits"),
    [
        (1, (), True),
        (0, (), False),
        (0, (0,), True),
        (-1, (0,), False),
        (np.int32(3), (1, 3), True),
        (4, (1, 3), False),
    ],
)
def test_whole_numbers_have_bounds(value, bounds, fits):
    if fits:
        number = _check_whole("n", value, *bounds)
        assert number == value
        assert type(number) is int
    else:
        with pytest.raises(ValueError, match=rf"^n: {value}, needed "):
            _check_whole("n", value, *bounds)


@pytest.mark.parametrize("value", [1.0, "1", None, np.ones(2, int)], ids=repr)
def test_what_is_no_whole_number_is_named(value):
    with pytest.raises(TypeError, match=r"^n: .* is not an integer"):
        _check_whole("n", value)


# --- apply and its gradients: the rules for values not finite, as loops ---

# Products and sums of these are exact: loops and BLAS agree to the bit but for the factor s/D.
ENTRIES = [0.0, 1.0, -1.0, 2.0, 0.5, math.nan, math.inf, -math.inf]
STRENGTHS = [0.5, -2.0, 1 / 3, 1e30, 1e-30]


def finite(value):
    return value if math.isfinite(value) else 0.0


def product_in_loops(a, b):
    return [
        [
            finite(sum(float(a[i, k]) * float(b[k, j]) for k in range(len(b))))
            for j in range(b.shape[1])
        ]
        for i in range(len(a))
    ]


@st.composite
def spoilt_operands(draw):
    S, D = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(seeds))
    few = draw(st.booleans())  # mostly finite, or everything at once
    weights = np.array([4, 9, 9, 9, 9, 1, 1, 1]) if few else np.ones(8)
    return [
        rng.choice(ENTRIES, size, p=weights / weights.sum()) for size in ((S, D), (D, D), (S, D))
    ]


@given(spoilt_operands(), st.sampled_from(STRENGTHS), dtypes)
def test_apply_follows_its_rules(operands, s, dtype):
    x, C, _ = (a.astype(dtype) for a in operands)
    P = product_in_loops(x, C)
    want = np.array(
        [
            [finite(float(x[i, j])) + s / len(C) * P[i][j] for j in range(len(C))]
            for i in range(len(x))
        ]
    )
    out = apply_context(x, C, s)
    assert_equiv(out, want.reshape(x.shape).astype(dtype))
    for row, token in zip(out, x, strict=True):
        assert_equiv(apply_context(token, C, s), row)


@given(spoilt_operands(), st.sampled_from(STRENGTHS), dtypes)
def test_gradients_follow_their_rules(operands, s, dtype):
    x, C, G = (a.astype(dtype) for a in operands)
    S, D = x.shape
    P, Q = product_in_loops(x, C), product_in_loops(G, C.T)
    want = np.array(
        [[float(G[i, j]) + s / D * Q[i][j] for j in range(D)] for i in range(S)]
    ).reshape(S, D)
    grad_x, grad_s = apply_context_vjp(x, C, s, G)
    assert_equiv(grad_x, want.astype(dtype))
    assert_equiv(
        grad_s,
        sum(finite(float(G[i, j])) * P[i][j] for i in range(S) for j in range(D)) / D,
        scale=100.0,
    )


@given(spoilt_operands(), st.sampled_from(STRENGTHS), dtypes)
def test_the_contexts_gradient_follows_its_rule(operands, s, dtype):
    x, C, G = (a.astype(dtype) for a in operands)
    want = [[s / len(C) * entry for entry in row] for row in product_in_loops(x.T, G)]
    assert_equiv(context_gradient(x, s, G), np.array(want).astype(dtype))


@given(seeds, st.integers(1, 4), st.integers(1, 4), st.floats(-2, 2))
def test_gradients_are_derivatives(seed, S, D, s):
    x, G = np.random.default_rng(seed).standard_normal((2, S, D))
    C = np.random.default_rng(seed + 1).uniform(-TOP, TOP, (D, D))
    grad_x, grad_s = apply_context_vjp(x, C, s, G)

    def loss(x, s):
        return float(np.sum(G * apply_context(x, C, s)))

    assert_equiv(grad_x, numeric_gradient(lambda v: loss(v, s), x), c=1e7, scale=10.0)
    by_s = numeric_gradient(lambda v: loss(x, v[0]), np.array([s]))
    assert_equiv(np.array([grad_s]), by_s, c=1e7, scale=10.0)
    by_c = numeric_gradient(lambda v: float(np.sum(G * apply_context(x, v, s))), C)
    assert_equiv(context_gradient(x, s, G), by_c, c=1e7, scale=10.0)


@pytest.mark.parametrize("shape", [(3, 4), (4,), (0, 4)])
@pytest.mark.parametrize(
    ("context", "strength"), [(None, 0.5), (np.ones((4, 4)), 0.0), (None, 0.0)]
)
def test_nothing_to_mix_passes_everything_through(shape, context, strength):
    x = np.full(shape, np.nan)
    out = apply_context(x, context, strength)
    assert_equiv(out, x)
    assert not np.shares_memory(out, x)
    grad_x, grad_s = apply_context_vjp(x, context, strength, x)
    assert_equiv(grad_x, x)
    assert not np.shares_memory(grad_x, x)
    assert grad_s == 0


@pytest.mark.parametrize("shape", [(3, 0), (0, 0), (0,)])
def test_no_features(shape):
    # D = 0 is a limit like S = 0: every function has an empty answer.
    x, C = np.empty(shape), np.empty((0, 0))
    assert_equiv(apply_context_vjp(x, C, 0.5, x)[0], x)
    assert_equiv(apply_context(x, C, 0.5), x)


# --- bad input ---

X, C = np.ones((3, 2)), np.ones((2, 2))
TAKE_MATRICES = {
    "similarity x": lambda a: similarity(a, X),
    "similarity y": lambda a: similarity(X, a),
    "apply x": lambda a: apply_context(a, C, 1.0),
    "apply context": lambda a: apply_context(X, a, 1.0),
    "vjp x": lambda a: apply_context_vjp(a, C, 1.0, X),
    "vjp context": lambda a: apply_context_vjp(X, a, 1.0, X),
    "vjp grad_out": lambda a: apply_context_vjp(X, C, 1.0, a),
    "context_gradient x": lambda a: context_gradient(a, 1.0, X),
    "context_gradient grad_out": lambda a: context_gradient(X, 1.0, a),
}


@pytest.mark.parametrize("call", TAKE_MATRICES)
@pytest.mark.parametrize(
    "bad",
    [
        [[1.0, 2.0]],
        3.0,
        "text",
        X.tolist(),
        X.astype(int),
        X.astype(np.float16),
        X.astype(complex),
        X.astype(">f8"),
        X.astype(object),
        np.ma.masked_array(X),
        np.array("text"),
    ],
    ids=lambda a: type(a).__name__ + str(getattr(a, "dtype", "")),
)
def test_what_is_no_float_array_is_a_type_error(call, bad):
    with pytest.raises(TypeError, match=rf"^{call.split()[1]}: "):
        TAKE_MATRICES[call](bad)


@pytest.mark.parametrize("call", TAKE_MATRICES)
@pytest.mark.parametrize("shape", [(), (2, 2, 2), (5, 7)])
def test_wrong_shapes_are_named(call, shape):
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        TAKE_MATRICES[call](np.ones(shape))


@pytest.mark.parametrize(
    "call",
    [
        lambda: similarity(X, X.astype(np.float32)),
        lambda: similarity_step(X[0], X[0].astype(np.float32)),
        lambda: apply_context(X, C.astype(np.float32), 1.0),
        lambda: apply_context_vjp(X, C, 1.0, X.astype(np.float32)),
    ],
)
def test_mixed_dtypes_are_a_type_error(call):
    with pytest.raises(TypeError, match="float32 is not supported here; use float64"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: similarity(X, X[:2]),
        lambda: similarity(X, X[:, :1]),
        lambda: similarity(X[0], X[0]),
        lambda: similarity_step(X[:0], X[:0]),
        lambda: similarity_step(X[0], X[:, 0]),
        lambda: apply_context_vjp(X, C, 1.0, X[0]),
        lambda: apply_context_vjp(X[0], C, 1.0, X),
        lambda: ema(np.ones((2, 3)), np.ones((3, 2)), 0.5),
        lambda: ema(np.ones(2), np.ones((2, 2)), 0.5),
        lambda: ema(None, np.ones((2, 2)), math.nan),
        lambda: _as_rate(math.nan),
        lambda: sample_rows(-1),
        lambda: sample_rows(5, 0),
        lambda: sample_rows(5, -2),
        lambda: similarity(X, X, max_rows=0),
    ],
)
def test_other_bad_values_are_value_errors(call):
    with pytest.raises(ValueError, match=": "):
        call()


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, np.float32(np.nan)])
def test_strengths_must_be_finite_even_without_a_context(strength):
    for call in (
        lambda: _check_number("strength", strength),
        lambda: apply_context(X, None, strength),
        lambda: apply_context_vjp(X, None, strength, X),
    ):
        with pytest.raises(ValueError, match=r"strength: .* that is finite in float64"):
            call()


@pytest.mark.parametrize("rows", [np.array([0, 3]), [5]])
def test_rows_out_of_range_are_refused(rows):
    with pytest.raises(ValueError, match=r"^rows: "):
        similarity(X, X, rows=rows)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([], TypeError),  # an empty list has no integers to tell
        ([0.0], TypeError),
        ([True], TypeError),
        ([[0]], TypeError),
        (0, TypeError),
        ([-1], ValueError),
        ([3], ValueError),
        ([0, 3], ValueError),
        ([-1, 2], ValueError),
    ],
)
def test_rows_are_numbers_of_rows(rows, error):
    with pytest.raises(error, match=r"^rows: "):
        _check_rows(rows, 3)


def test_the_message_says_which_rows_there_are():
    with pytest.raises(ValueError, match=r"^rows: -1\.\.4, needed 0\.\.2$"):
        _check_rows([4, -1], 3)


def test_32_rows_are_the_default():
    x, y = np.random.default_rng(0).standard_normal((2, 100, 3))
    assert np.array_equal(similarity(x, y), similarity(x, y, rows=np.arange(32) * 100 // 32))
    assert not np.array_equal(similarity(x, y), similarity(x, y, max_rows=33))


@pytest.mark.parametrize("floor", [-1e-300, math.inf, -math.inf, math.nan, 10**400])
def test_floors_that_cannot_be(floor):
    for call in (
        lambda: similarity(X, X, floor=floor),
        lambda: similarity_step(X[0], X[0], floor=floor),
    ):
        with pytest.raises(ValueError, match=r"^floor: "):
            call()


@pytest.mark.parametrize("floor", ["0", None, 1j])
def test_floors_are_numbers(floor):
    with pytest.raises(TypeError, match=r"^floor: a real number is needed"):
        similarity(X, X, floor=floor)


@pytest.mark.parametrize("exponent", [-1000, -300, 0, 300, 1000])
def test_without_a_floor_scale_does_not_matter(exponent):
    x = np.array([[-1.0, 3.0], [1.0, 3.0]]) * 2.0**exponent
    assert_equiv(similarity(x, x, floor=0), np.diag([TOP, 0.0]), scale=1.0)
    assert_equiv(similarity(x, -x, floor=0.0), np.diag([-TOP, 0.0]), scale=1.0)


@pytest.mark.parametrize(("floor", "empty"), [(2.0, True), (2 - 1e-15, False), (3.0, True)])
def test_a_floor_of_ones_own(floor, empty):
    x = np.array([[0.5], [0.5], [-0.5], [-0.5]]) * 2  # of norm 2; half of it has norm 1
    assert (similarity(x, x / 2, floor=floor).item() == 0) == empty
    assert (not similarity_step(x[:, 0], x[:, 0] / 2, floor=floor).any()) == empty


def test_rows_that_are_right_are_returned():
    for rows in ([2, 0, 2], np.array([1], np.uint8), np.zeros(0, int)):
        assert _check_rows(rows, 3).tolist() == list(rows)


@pytest.mark.parametrize("call", [lambda: sample_rows(5.0), lambda: sample_rows(5, 2.0)])
def test_numbers_of_rows_are_whole(call):
    with pytest.raises(TypeError, match="integer"):
        call()


def test_whole_numbers_of_rows_by_hand():
    assert sample_rows(7, 3).tolist() == [0, 2, 4]
    assert sample_rows(np.int64(4), 2).tolist() == [0, 2]
    assert sample_rows(0).tolist() == []
    assert sample_rows(5, 1).tolist() == [0]
    assert len(sample_rows(100)) == 32


def test_an_average_of_what_is_no_array():
    with pytest.raises(TypeError, match=r"^new: "):
        ema(None, [[1.0]], 0.5)
    with pytest.raises(TypeError, match=r"^previous: "):
        ema([[1.0]], np.ones((1, 1)), 0.5)


def test_any_number_of_dimensions_and_one_dtype():
    for shape in ((), (3,), (2, 3, 4)):
        a = np.ones(shape, np.float32)
        assert _check_array("x", a, None) is a
        assert _check_array("x", a, None, np.float32) is a
        with pytest.raises(TypeError, match=r"^x: float32 is not supported here; use float64$"):
            _check_array("x", a, None, np.float64)
    with pytest.raises(
        TypeError, match=r"^x: int64 is not supported here; use float32 or float64$"
    ):
        _check_array("x", np.ones(2, int), None)
    with pytest.raises(ValueError, match=r"^x: shape \(2,\) has 1 dimensions, needed 2 or 3$"):
        _check_array("x", np.ones(2), (2, 3))


def test_subclasses_become_plain_arrays_without_a_copy(tmp_path):
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(3, 2))
    plain = _check_array("x", mapped)
    assert type(plain) is np.ndarray
    assert np.shares_memory(plain, mapped)


@given(seeds, kinds, dtypes)
def test_inputs_are_left_alone(seed, kind, dtype):
    rng = np.random.default_rng(seed)
    x, y, context = (make(rng, shape, dtype, kind) for shape in ((5, 3), (5, 3), (3, 3)))
    kept = [a.copy() for a in (x, y, context)]
    with np.errstate(all="ignore"):
        similarity(x, y)
        similarity_step(x[0], y[0])
        ema(context, context, 0.5)
        apply_context(x, context, 0.5)
        apply_context_vjp(x, context, 0.5, y)
    for a, before in zip((x, y, context), kept, strict=True):
        assert np.array_equal(a, before, equal_nan=True)
