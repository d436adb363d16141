"""Correlations over complete pairs, against a loop over the pairs."""

import pickle

import numpy as np
import pytest
from conftest import DTYPES, dtypes, few, seeds
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.measure import traced_peak
from ctxlab.streaming.moments import ContextStats, _panel_rows, linear_cka
from ctxlab.streaming.pairs import _pair_bytes, _pair_scratch
from ctxlab.testing import assert_equiv

pytestmark = pytest.mark.usefixtures("one_thread")


def of_pairs(x, y, least_rows=2):
    """Correlations and rows, one pair after the other, in float64 and scaled for its range."""
    r = np.zeros((x.shape[1], y.shape[1]))
    n = np.zeros(r.shape, np.int64)
    for i, j in np.ndindex(r.shape):
        both = np.isfinite(x[:, i]) & np.isfinite(y[:, j])
        n[i, j] = both.sum()
        if n[i, j] < least_rows:
            continue
        a, b = (unit(c[both].astype(np.float64)) for c in (x[:, i], y[:, j]))
        r[i, j] = np.clip(a @ b, -1, 1)
    return r, n


def unit(a):
    """A column, centred, of norm 1, or 0 if it is constant."""
    a = np.ldexp(a, -np.frexp(np.abs(a).max())[1])
    a = a - a[0]
    a = a - a.mean()
    norm = np.linalg.norm(a)
    return a / norm if norm > 0 else a


def with_gaps(rng, n, dims, share, dtype=np.float64, offset=0.0):
    """Related pairs of rows, of which a share of the entries is missing."""
    x, y = (rng.standard_normal((n, d)) for d in dims)
    for j in range(min(dims)):
        y[:, j] += rng.uniform(-2, 2) * x[:, j]
    x, y = ((a + offset).astype(dtype) for a in (x, y))
    for a in (x, y):
        gaps = rng.random(a.shape) < share
        a[gaps] = rng.choice([np.nan, np.inf, -np.inf], gaps.sum()).astype(dtype)
    return x, y


def stats_of(x, y, cuts=(), **options):
    s = ContextStats((x.shape[1], y.shape[1]), x.dtype, nan="pairs", **options)
    for a, b in zip([0, *cuts], [*cuts, len(x)], strict=True):
        s.update(x[a:b], y[a:b])
    return s


def assert_pairs(s, x, y, least_rows=2, digits=1.0):
    want, n = of_pairs(x, y, least_rows)
    assert np.array_equal(s.pair_rows(), n)
    assert s.count == len(x)
    assert s.nonfinite_x == np.count_nonzero(~np.isfinite(x))
    got = s.correlation()
    assert got.dtype == x.dtype
    scale = np.full(want.shape, digits)
    depth = 200 + len(x)  # small sets, whose spread may be far below that of the column
    assert_equiv(got, want.astype(x.dtype), depth=depth, scale=scale)
    for constant, a in ((s.constant_x, x), (s.constant_y, y)):
        finite = [c[np.isfinite(c)] for c in a.T]
        assert constant.tolist() == [len(c) == 0 or bool((c == c[0]).all()) for c in finite]


def same(a, b):
    return all(np.array_equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@given(
    seed=seeds,
    dtype=dtypes,
    n=st.integers(0, 90),
    dims=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    share=st.sampled_from([0.0, 0.01, 0.3, 0.7, 1.0]),
    least=st.integers(2, 12),
    cut=st.floats(0, 1),
)
def test_any_pattern_of_gaps(seed, dtype, n, dims, share, least, cut):
    x, y = with_gaps(np.random.default_rng(seed), n, dims, share, dtype)
    assert_pairs(stats_of(x, y, (int(cut * n),), least_rows=least), x, y, least)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6])
def test_offsets(offset, dtype):
    x, y = with_gaps(np.random.default_rng(1), 3000, (7, 5), 0.2, dtype, offset)
    assert_pairs(stats_of(x, y, (700, 701)), x, y)


def test_digits_beside_a_very_large_offset():
    rng = np.random.default_rng(2)
    x, y = with_gaps(rng, 2500, (4, 4), 0.3)
    x, y = 1e10 + np.round(x, 4), np.round(y, 4) - 1e10
    want, _ = of_pairs(x, y)
    for cuts in ((), (50, 1300)):
        assert np.abs(stats_of(x, y, cuts).correlation() - want).max() < 1e-12


@given(
    seed=seeds,
    dtype=dtypes,
    n=st.integers(3, 60),
    share=st.floats(0, 1),
    order=st.permutations("abc"),
)
def test_merges_in_any_order(seed, dtype, n, share, order):
    rng = np.random.default_rng(seed)
    x, y = with_gaps(rng, n, (4, 3), share, dtype, 10.0)
    gone = rng.random(7) < 0.2
    x[: n // 3, gone[:4]] = np.nan  # features that come later
    y[: n // 3, gone[4:]] = np.nan
    cuts = dict(a=slice(0, n // 3), b=slice(n // 3, n // 2), c=slice(n // 2, n))
    total = ContextStats((4, 3), dtype, nan="pairs")
    right = ContextStats((4, 3), dtype, nan="pairs")
    parts = [stats_of(x[cuts[k]], y[cuts[k]]) for k in order]
    for part in parts:
        total.merge(part)
    right.merge(parts[2])
    parts[0].merge(parts[1])
    parts[0].merge(right)
    assert_pairs(total, x, y)
    assert_pairs(parts[0], x, y)
    total.merge(total)
    assert_pairs(total, np.concatenate([x, x]), np.concatenate([y, y]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_gaps_it_is_the_other_rules_to_the_bit(dtype):
    x, y = with_gaps(np.random.default_rng(3), 9000, (6, 5), 0, dtype, 3.0)
    x[:, 2], y[:, 1] = 0.1, x[:, 3] * dtype(1e-25)
    ours = stats_of(x, y, (20, 8500))
    for nan in ("zero", "rows", "refuse"):
        other = ContextStats((6, 5), dtype, nan=nan)
        for rows in (slice(0, 20), slice(20, 8500), slice(8500, None)):
            other.update(x[rows], y[rows])
        for name in ("correlation", "similarity", "noise", "covariance", "pair_rows"):
            assert np.array_equal(getattr(ours, name)(), getattr(other, name)())
        for name in ("effective_rows", "mean_x", "std_y", "constant_x", "count"):
            assert np.array_equal(getattr(ours, name), getattr(other, name))
        mine, its = ours.state_dict(), other.state_dict()
        assert all(np.array_equal(mine[k], v) for k, v in its.items() if k != "nan")


def test_gaps_beside_complete_panels():
    """Panels of both kinds in one stream, whichever comes first."""
    p = _panel_rows((5, 4))
    x, y = with_gaps(np.random.default_rng(4), 9 * p, (5, 4), 0, np.float32, 5.0)
    for gap in (slice(0, 10), slice(4 * p, 5 * p), slice(-3, None)):
        a, b = x.copy(), y.copy()
        a[gap, 2], b[gap, 1:3] = np.nan, np.inf
        s = stats_of(a, b)
        assert 0 < s.incomplete <= p
        assert_pairs(s, a, b)
        assert_pairs(stats_of(a, b, (1, 5 * p)), a, b)


@pytest.mark.parametrize("scale", [1e-200, 1e-120, 1.0, 1e155])
def test_any_scale(scale):
    x, y = with_gaps(np.random.default_rng(5), 400, (4, 4), 0.3)
    x *= scale
    y[:, 1] /= scale
    assert_pairs(stats_of(x, y, (100,)), x, y)
    x[200:] *= 7e60  # a chunk of another scale, and the exponents move
    a, b = stats_of(x[:200], y[:200]), stats_of(x[200:], y[200:])
    both = stats_of(x, y, (200,))
    a.merge(b)
    for s in (a, both):
        want, _ = of_pairs(x, y)
        assert_equiv(s.correlation(), want, depth=800, scale=np.ones(want.shape))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 / 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_in_the_rows_of_one_pair(value, dtype):
    rng = np.random.default_rng(6)
    x, y = with_gaps(rng, 3000, (3, 3), 0.1, dtype, 2.0)
    here = rng.random(3000) < 0.3
    x[here, 1] = value
    y[~here, 2] = np.nan
    for cuts in ((), (100, 110, 2000)):
        s = stats_of(x, y, cuts)
        assert_pairs(s, x, y)
        assert s.correlation()[1, 2] == 0 == s.noise()[1, 2]
        assert s.correlation()[1, 1] != 0
        parts = [stats_of(x[:900], y[:900]), stats_of(x[900:], y[900:])]
        parts[1].merge(parts[0])
        assert parts[1].correlation()[1, 2] == 0


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e3 / 7])
def test_constant_at_the_base_while_the_shift_moves(value):
    """Most of the first panel is that constant, so it is the base; later panels lie elsewhere."""
    rng = np.random.default_rng(17)
    x, y = rng.standard_normal((2, 4000, 2)) + 1e3
    here = rng.random(4000) < np.where(np.arange(4000) < 1000, 0.9, 0.3)
    x[here, 0] = value
    y[~here, 1] = np.nan
    s = stats_of(x, y)
    assert s.correlation()[0, 1] == 0 == s.noise()[0, 1]
    assert s.correlation()[0, 0] != 0


@pytest.mark.parametrize("outlier", [1e6, 1e12, 1e30])
def test_an_outlier_costs_nothing_where_it_has_no_partner(outlier):
    x, y = with_gaps(np.random.default_rng(7), 500, (3, 3), 0.1, np.float32)
    x[100, 0], y[100] = outlier, (np.nan, np.nan, 1)
    s = stats_of(x, y)
    want, _ = of_pairs(x, y)
    assert_equiv(s.correlation(), want.astype("f"), depth=500, scale=np.ones((3, 3)))
    assert abs(s.correlation()[0, 0]) > 0.1


@pytest.mark.parametrize("far", [30.0, 1e3, 1e5, -1e7, 1e10])
@pytest.mark.parametrize("near", [True, False])
def test_rows_of_a_pair_far_from_the_median(far, near):
    """Most of a column lies elsewhere than the rows that have a partner."""
    rng = np.random.default_rng(18)
    z = rng.standard_normal((400, 3))
    most, few = (0.0, far + z) if near else (far, z)
    x = np.concatenate([np.full((600, 3), most), few])
    y = np.concatenate([np.full((600, 2), np.nan), z[:, :2] + rng.standard_normal((400, 2))])
    y[::3, 1] = rng.standard_normal(334)  # this one is there for all kinds of rows
    for a, b in ((x, y), (y, x)):
        assert_pairs(stats_of(a, b), a, b, digits=4e4)  # ten digits are left


@few
@given(seed=seeds, dims=st.tuples(st.integers(1, 5), st.integers(1, 5)), share=st.floats(0, 0.6))
def test_levels_that_some_pairs_never_see(seed, dims, share):
    """Columns at up to three levels, and gaps that hide some levels from some pairs."""
    rng = np.random.default_rng(seed)
    x, y = with_gaps(rng, 200, dims, share)
    level = rng.integers(0, 3, 200)
    for a in (x, y):
        a += rng.choice([0, 1e2, 1e6, -1e9], (3, a.shape[1]))[level]
        a[np.equal.outer(level, rng.integers(0, 6, a.shape[1]))] = np.nan
        constant = rng.random(a.shape[1]) < 0.3
        a[:, constant] = np.where(np.isfinite(a), np.round(a, -2), np.nan)[:, constant]
    assert_pairs(stats_of(x, y), x, y, digits=4e4)


def test_a_constant_far_from_the_median_is_one():
    x, y = np.random.default_rng(19).standard_normal((2, 900, 2))
    x[:, 0] = np.where(np.arange(900) < 600, 0.1, 1e6 / 3)
    y[:600, 0] = np.nan
    for cuts in ((), (650, 700)):
        s = stats_of(x, y, cuts)
        assert s.correlation()[0, 0] == 0 != s.correlation()[0, 1]
        assert s.covariance()[0, 0] == 0


def test_a_constant_of_which_each_panel_has_one_row():
    rng = np.random.default_rng(21)
    x, y = rng.standard_normal((2, 2000, 2))
    x[100:, 0] += np.repeat(1e6 * rng.standard_normal(19), 100)  # the shift moves
    x[50::100, 0] = 0.1
    y[np.arange(2000) % 100 != 50, 1] = np.nan
    s = stats_of(x, y, range(100, 2000, 100))
    assert s.pair_rows()[0, 1] == 20
    assert s.correlation()[0, 1] == 0 != s.correlation()[0, 0]


UNSEEN = {
    "a": lambda rng: rng.standard_normal((2, 1000, 1)),
    "b": lambda rng: np.stack([np.full((1000, 1), 1e15), np.full((1000, 1), np.nan)]),
    "c": lambda rng: rng.standard_normal((2, 1000, 1)) + 3,
}


@pytest.mark.parametrize("order", ["ac", "abc", "bac", "acb", "bca", "cab", "babc"])
def test_rows_without_a_partner_do_not_hide_that_means_move(order):
    rng = np.random.default_rng(20)
    s, total = (ContextStats(1, np.float64, nan="pairs") for _ in range(2))
    rows = []
    for k in order:
        x, y = UNSEEN[k](rng)
        y[0] = np.nan
        rows.append((x, y))
        s.update(x, y)
        total.merge(stats_of(x, y))
    x, y = map(np.concatenate, zip(*rows, strict=True))
    for one in (s, total):
        assert_pairs(one, x, y)
        assert one.correlation()[0, 0] > 0.6
        np.testing.assert_allclose(one.mean_x, x.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(one.std_x, x.std(axis=0), rtol=1e-14)


def test_fewer_rows_than_asked_for_are_0():
    x, y = with_gaps(np.random.default_rng(8), 60, (3, 3), 0)
    x[7:, 0], x[30:, 1] = np.nan, np.nan
    assert np.array_equal(stats_of(x, y).pair_rows(), np.repeat([[7], [30], [60]], 3, axis=1))
    for least, rows in ((7, 3), (8, 2), (30, 2), (31, 1), (61, 0)):
        s = stats_of(x, y, least_rows=least)
        assert_pairs(s, x, y, least)
        assert np.count_nonzero(s.similarity().any(axis=1)) == rows
        assert np.count_nonzero(s.noise().any(axis=1)) == rows
    assert np.isnan(s.effective_rows)
    few = ContextStats(3, np.float64, least_rows=61)  # whatever the rule
    few.update(y, y)
    assert not few.correlation().any()


def test_nothing_is_there():
    s = stats_of(np.full((700, 3), np.nan), np.ones((700, 2)))
    assert (s.count, s.nonfinite_x, s.incomplete) == (700, 2100, 700)
    assert not s.pair_rows().any()
    assert not s.correlation().any()
    assert not s.covariance().any()
    assert s.constant_x.all()
    assert np.isnan(s.effective_rows)
    x, y = with_gaps(np.random.default_rng(9), 300, (3, 2), 0.1, offset=50.0)
    s.update(x, y)
    rows = np.concatenate([np.full((700, 3), np.nan), x]), np.concatenate([np.ones((700, 2)), y])
    assert_pairs(s, *rows)


def test_means_and_covariances():
    x, y = with_gaps(np.random.default_rng(10), 2000, (4, 3), 0.4, offset=9.0)
    s = stats_of(x, y, (300,))
    X, Y = (np.where(np.isfinite(a), a, np.nan) for a in (x, y))
    np.testing.assert_allclose(s.mean_x, np.nanmean(X, axis=0), rtol=1e-13)
    np.testing.assert_allclose(s.std_y, np.nanstd(Y, axis=0), rtol=1e-13)
    for i, j in np.ndindex(4, 3):
        both = np.isfinite(X[:, i]) & np.isfinite(Y[:, j])
        want = np.cov(X[both, i], Y[both, j], ddof=0)[0, 1]
        assert s.covariance()[i, j] == pytest.approx(want, abs=1e-13)
    with pytest.raises(ValueError, match=r"^xy: has gaps"):
        linear_cka(s, stats_of(x, x), stats_of(y, y))


# --- state ---


def test_state_and_pickle():
    x, y = with_gaps(np.random.default_rng(11), 900, (5, 4), 0.1, np.float32)
    s = stats_of(x, y, (500,))
    again = ContextStats((5, 4), nan="pairs")
    again.load_state_dict(s.state_dict())
    for other in (again, pickle.loads(pickle.dumps(s))):
        assert same(other, s)
        assert np.array_equal(other.noise(), s.noise())
        other.update(x, y)
    s.update(x, y)
    assert same(again, s)
    for nan in ("zero", "rows"):
        with pytest.raises(ValueError, match="state: nan is"):
            ContextStats((5, 4), nan=nan).load_state_dict(s.state_dict())
        with pytest.raises(ValueError, match=r"^other: has nan="):
            s.merge(ContextStats((5, 4), nan=nan))
    s.reset()
    assert same(s, ContextStats((5, 4), nan="pairs"))


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("pairs_sums", (0, 1, 1), -1),
        ("pairs_sums", (4, 0, 0), -1e-9),
        ("pairs_sums", (5, 0, 0), np.nan),
        ("pairs_own", (0, 2), -2),
        ("pairs_reach", (1,), -2),
        ("pairs_base", (3,), np.inf),
    ],
)
def test_a_bad_state_changes_nothing(name, at, value):
    x, y = with_gaps(np.random.default_rng(12), 90, (3, 3), 0.2)
    s = stats_of(x, y)
    before = s.state_dict()
    bad = before[name].copy()
    bad[at] = value
    with pytest.raises(ValueError, match=name):
        s.load_state_dict(before | {name: bad})
    with pytest.raises(ValueError, match=r"^state: incomplete is 91, needed at most 90 rows$"):
        s.load_state_dict(before | {"incomplete": 91})
    with pytest.raises(ValueError, match="keys"):
        s.load_state_dict({k: v for k, v in before.items() if k != name})
    after = s.state_dict()
    assert all(np.array_equal(v, after[k]) for k, v in before.items())


# --- noise ---


def steps(rng, n, D, rho):
    """Noise that remembers."""
    a = rng.standard_normal((n, D))
    for i in range(1, n):
        a[i] += rho * a[i - 1]
    return a


def scatter(x, y):
    """What correlations are in units of their noise, as a root mean square; and the noise."""
    s = stats_of(x + 100, y + 100)
    r, noise = s.correlation(), s.noise()
    return float(np.sqrt(np.mean(np.square(r / noise)))), s


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_noise_when_gaps_are_independent(rho, share):
    rng = np.random.default_rng(13)
    x, y = (steps(rng, 6000, 60, rho) for _ in range(2))
    x[rng.random(x.shape) < share] = np.nan
    y[rng.random(y.shape) < share] = np.nan
    z, s = scatter(x, y)
    assert z == pytest.approx(1, abs=0.08)
    assert s.effective_rows == pytest.approx(1 + 1 / np.mean(s.noise() ** 2))
    if rho == 0:
        assert s.effective_rows == pytest.approx(s.pair_rows().mean(), rel=0.1)


def test_noise_when_whole_rows_are_gone():
    rng = np.random.default_rng(14)
    gone = rng.random(6000) < 0.7
    for rho, low, high in ((0.0, 0.95, 1.05), (0.9, 1.0, 1 / np.sqrt(0.3))):
        x, y = (steps(rng, 6000, 60, rho) for _ in range(2))
        x[gone], y[gone] = np.nan, np.nan
        z, _ = scatter(x, y)
        assert low < z < high  # of rows that depend on one another it is too low, at most so


def test_noise_of_a_feature_that_comes_late():
    rng = np.random.default_rng(15)
    x, y = rng.standard_normal((2, 8000, 30))
    x[:5000, :10], y[:6000, 5:9] = np.nan, np.nan
    z, _ = scatter(x, y)
    assert z == pytest.approx(1, abs=0.08)
    in_turn = stats_of(x + 100, y + 100, range(1000, 8000, 1000))  # gaps before the first values
    assert np.sqrt(np.mean((in_turn.correlation() / in_turn.noise()) ** 2)) > 0.92
    parts = [stats_of(x[i : i + 2000] + 100, y[i : i + 2000] + 100) for i in range(0, 8000, 2000)]
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        total = ContextStats(30, np.float64, nan="pairs")
        for k in order:
            total.merge(parts[k])
        r = total.correlation() / total.noise()
        assert np.sqrt(np.mean(r**2)) == pytest.approx(1, abs=0.1)


# --- memory ---


@pytest.mark.parametrize(
    "dims", [(64, 64), pytest.param((700, 300), marks=pytest.mark.thorough), (40, 1500)]
)
def test_what_it_takes_is_known(dims):
    x, y = with_gaps(np.random.default_rng(16), 1100, dims, 0.1, np.float32)
    s, plain = ContextStats(dims, nan="pairs"), ContextStats(dims)
    assert s.nbytes - plain.nbytes == _pair_bytes(*dims)
    scratch = _pair_scratch(*dims, _panel_rows(dims))
    peak = traced_peak(lambda: s.update(x, y))
    plain_peak = traced_peak(lambda: plain.update(x, y))
    assert peak - plain_peak < scratch
    x[:600], x[600:] = 0, x[600:] + 1e6  # every pair is far from its medians
    y[:600] = np.nan
    far = ContextStats(dims, nan="pairs")
    assert traced_peak(lambda: far.update(x, y)) - plain_peak < scratch
    other = stats_of(x, y)
    peak = traced_peak(lambda: s.merge(other), warmup=1)
    assert peak < scratch + 8 * 110 * sum(dims)
