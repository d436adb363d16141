"""`ContextStats` against an oracle."""

import pickle

import numpy as np
import pytest
from conftest import DTYPES, LAYOUTS, dtypes, lay, make, seeds
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.measure import traced_peak
from ctxlab.reference import similarity
from ctxlab.streaming import moments as module
from ctxlab.streaming.moments import _SUB_ROWS, ContextStats, _panel_rows
from ctxlab.testing import _sprinkle, assert_equiv
from ctxlab.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")


def depth(x):
    """The longest sum in the dtype of the input."""
    n, dim = x.shape
    if x.dtype == np.float64:
        return max(n, 1)
    p = _panel_rows(dim, x.dtype)
    return min(n, p) + -(-min(n, _SUB_ROWS) // p) + 2


def unit(a):
    """Columns in float64, scaled by a power of two, centred, of norm 1, or 0 if constant."""
    A = np.where(np.isfinite(a), a, 0).astype(np.float64)
    A = np.ldexp(A, -np.frexp(np.abs(A).max(axis=0, initial=0))[1])
    A -= A[:1]
    A -= A.sum(axis=0) / max(len(A), 1)
    norms = np.linalg.norm(A, axis=0)
    return np.divide(A, norms, out=np.zeros_like(A), where=norms > 0)


def correlation_of(x, y):
    """The oracle, for columns of any scale."""
    return (unit(x).T @ unit(y)).clip(-1, 1).astype(x.dtype)


def stats_of(x, y, cuts=()):
    s = ContextStats((x.shape[1], y.shape[1]), x.dtype)
    for a, b in zip([0, *cuts], [*cuts, len(x)], strict=True):
        s.update(x[a:b], y[a:b])
    return s


def assert_exact(s, x, y):
    assert s.count == len(x)
    want = correlation_of(x, y)
    r = s.correlation()
    assert_equiv(r, want, depth=depth(x), scale=np.ones_like(want))
    assert np.abs(r).max(initial=0) <= 1
    assert_equiv(s.similarity(), np.tanh(r), scale=np.ones_like(want))
    for constant, a in ((s.constant_x, x), (s.constant_y, y)):
        finite = np.where(np.isfinite(a), a, 0)
        assert np.array_equal(constant, (finite == finite[:1]).all(axis=0))
    assert s.nonfinite_x == np.count_nonzero(~np.isfinite(x))
    assert s.nonfinite_y == np.count_nonzero(~np.isfinite(y))


def related(rng, n, dim, dtype):
    """Pairs with correlations of every size."""
    x = rng.standard_normal((n, dim))
    y = x @ rng.standard_normal((dim, dim)) / np.sqrt(dim) + rng.standard_normal((n, dim))
    y[:, 0] = x[:, -1]
    return x.astype(dtype), y.astype(dtype)


# --- statistics ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n", [0, 1, 2, 3, 63, 64, 65, 1023, 1025, _SUB_ROWS, _SUB_ROWS + 1, 2 * _SUB_ROWS + 77]
)
def test_any_number_of_rows(n, dtype):
    x, y = related(np.random.default_rng(n), n, 5, dtype)
    assert_exact(stats_of(x, y), x, y)
    if n > 3:
        assert_exact(stats_of(x, y, (1, n // 3, n // 3)), x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 17, 300, 800])
def test_any_width(dim, dtype):
    x, y = related(np.random.default_rng(dim), 700, dim, dtype)
    assert_exact(stats_of(x, y, (300,)), x, y)


@pytest.mark.parametrize("kind", ["steps", "tiny", "wide", "hostile", "huge"])
@given(seed=seeds, dtype=dtypes, n=st.integers(0, 80), dim=st.integers(1, 6), cut=st.floats(0, 1))
def test_any_kind_of_values(kind, seed, dtype, n, dim, cut):
    rng = np.random.default_rng(seed)
    x, y = (make(rng, (n, dim), dtype, kind) for _ in range(2))
    assert_exact(stats_of(x, y, (int(cut * n),)), x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_offsets_and_scales(offset, scale, dtype):
    x, y = related(np.random.default_rng(1), 3000, 12, np.float64)
    x, y = ((offset + a) * scale for a in (x, y))
    x, y = x.astype(dtype), (y / scale**2).astype(dtype)
    assert_exact(stats_of(x, y, (1000, 1001)), x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_many_kinds_at_once(dtype):
    rng = np.random.default_rng(2)
    x, y = related(rng, 4000, 10, dtype)
    x[:, 1], x[:, 2], x[:, 3] = 1 / 3, 0, np.where(rng.random(4000) < 0.001, 1e6, 0)
    x[:, 4] *= dtype(1e-25)
    x[:, 5] *= dtype(1e25)
    x[:, 6] = np.arange(4000)
    x[:, 7] = 1e7 + (np.arange(4000) % 2)
    y[:, 8] = 1e30
    s = stats_of(x, y, (1500,))
    assert_exact(s, x, y)
    assert not s.similarity()[1:3].any()
    assert not s.similarity()[:, 8].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_shift_from_a_sample_that_misleads(dtype):
    """Sampled rows are all outliers, or all NaN; and a column drifts."""
    x, y = related(np.random.default_rng(3), 6400, 6, dtype)
    x[:, 5] += np.linspace(0, 1e4, 6400, dtype=dtype)
    x[::100, 0] = 1e6
    y[::100] = np.nan
    y[:, 1] += dtype(1e5)
    y[:, 2] = np.where(np.isnan(y[:, 2]), np.nan, 0.1)
    for cuts in ((), (3200,)):
        s = stats_of(x, y, cuts)
        assert_exact(s, x, y)


@given(seed=seeds, dtype=dtypes, n=st.integers(1, 60), dim=st.integers(1, 5), data=st.data())
def test_merge_is_associative_and_commutative(seed, dtype, n, dim, data):
    x, y = related(np.random.default_rng(seed), n, dim, dtype)
    i, j = sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2)))
    cuts = [slice(0, i), slice(i, j), slice(j, n)]

    def of(k):
        return stats_of(x[cuts[k]], y[cuts[k]])

    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        left, right, tail = of(order[0]), of(order[1]), of(order[2])
        left.merge(of(order[1]))
        left.merge(of(order[2]))
        right.merge(tail)
        head = of(order[0])
        head.merge(right)
        for s in (left, head):
            assert_exact(s, x, y)


def test_merge_with_itself_counts_twice():
    x, y = related(np.random.default_rng(5), 40, 4, np.float32)
    s = stats_of(x, y)
    s.merge(s)
    assert_exact(s, np.concatenate([x, x]), np.concatenate([y, y]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    x, y = related(np.random.default_rng(6), 90, 7, np.float32)
    assert_exact(stats_of(lay(x, layout), lay(y, layout)), x, y)
    assert_exact(stats_of(np.repeat(x, 2, 0)[::2], y[::-1][::-1]), x, y)
    x.flags.writeable = False
    assert_exact(stats_of(x, y), x, y)


# --- any scale ---

SCALES = (1e-300, 1e-200, 1e-150, 1e-90, 1e-20, 1.0, 1e50, 1e100, 1e155, 1e250)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("n", [2, 200, 9000])
def test_a_column_has_the_same_correlations_at_any_scale(scale, n):
    x, y = related(np.random.default_rng(17), n, 3, np.float64)
    want = correlation_of(x, y)
    for a, b in ((x * scale, y), (x * scale, y * scale), (x * scale, y / scale)):
        for cuts in ((), (1,), (n // 2,)):
            s = stats_of(a, b, cuts)
            assert_equiv(s.correlation(), want, depth=n, scale=np.ones_like(want))
        assert_equiv(stats_of(a, a).correlation().diagonal(), np.ones(3), depth=n)


@pytest.mark.parametrize("scale", [1e-42, 1e-37, 1e-30, 1e-20, 1e-15, 1e15, 1e20, 1e37])
def test_the_same_in_float32(scale):
    x, y = related(np.random.default_rng(18), 3000, 3, np.float64)
    x, y = ((a * scale).astype(np.float32) for a in (x, y))
    assert_exact(stats_of(x, y, (700,)), x, y)
    assert_exact(stats_of(x, x), x, x)


@pytest.mark.parametrize("scale", [1e-15, 1e-17, 1e-19, 1e-20, 1e-21, 1e-22])
def test_squares_of_small_values_keep_their_digits(scale):
    """In float32 they would be subnormal, with a few digits left."""
    rng = np.random.default_rng(30)
    x, y = rng.standard_normal((2, 1024, 3)).astype(np.float32)
    x -= x.mean(axis=0)  # nothing is left of the mean that would show it
    x *= np.float32(scale)
    want = correlation_of(x.astype(np.float64), y.astype(np.float64))
    assert np.abs(stats_of(x, y).correlation() - want).max() < 2e-7
    ends = np.float64([stats_of(x, x).correlation()[i, i] for i in range(3)])
    assert np.abs(ends - 1).max() < 2e-7


@pytest.mark.parametrize("first", SCALES)
@pytest.mark.parametrize("then", SCALES)
def test_chunks_of_different_scales(first, then):
    """The second chunk may be anything beside the first; merged, they are the same."""
    x, y = related(np.random.default_rng(19), 60, 3, np.float64)
    x[:20] *= first
    x[20:40, 1:] *= then
    y[:30, 1] *= then
    assert_exact(stats_of(x, y, (20, 40)), x, y)
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        parts = [stats_of(x[i : i + 20], y[i : i + 20]) for i in (0, 20, 40)]
        total = ContextStats(3, np.float64)
        for k in order:
            total.merge(parts[k])
        assert_exact(total, x, y)


@pytest.mark.parametrize("scale", SCALES)
def test_columns_that_are_zero_at_first(scale):
    x, y = related(np.random.default_rng(20), 400, 3, np.float64)
    x *= scale
    x[:300, 0] = 0
    x[:, 2] = 0
    y[:100] = 0
    for cuts in ((), (50, 300), (300,)):
        assert_exact(stats_of(x, y, cuts), x, y)


def test_values_at_the_ends_of_float64():
    largest, least = np.finfo(np.float64).max, np.nextafter(0, 1)
    x = np.array([[largest, least, largest], [-largest, 0, least], [0, least, -largest]])
    s = stats_of(x, x)
    assert_exact(s, x, x)
    assert not s.constant_x.any()
    assert_exact(stats_of(x, x, (1, 2)), x, x)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1e-15, 1e-10, 1e-3])
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e120])
def test_digits_of_a_mean_that_is_large_beside_the_spread(spread, scale):
    """Many chunks, whose means are known to far less than a spread in one float64."""
    x, y = related(np.random.default_rng(21), 5000, 3, np.float64)
    x, y = (1 + spread * x) * scale, (3 - spread * y) / scale
    s = stats_of(x, y, range(10, 5000, 10))
    want = correlation_of(x, y)
    assert_equiv(s.correlation(), want, depth=5000, scale=np.ones_like(want))
    backwards = ContextStats(3, np.float64)
    for i in range(4990, -1, -10):
        backwards.merge(stats_of(x[i : i + 10], y[i : i + 10]))
    assert_equiv(backwards.correlation(), want, depth=5000, scale=np.ones_like(want))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correlation_is_never_beyond_one(dtype):
    rng = np.random.default_rng(22)
    for n in range(2, 40):
        z = (rng.random((n, 30)) * rng.choice([1e-3, 1, 1e5], 30) + 7).astype(dtype)
        s = stats_of(z, -z)
        assert s.correlation().min() >= -1
        assert s.similarity().min() >= np.tanh(dtype(-1))
        assert_equiv(s.correlation().diagonal(), -np.ones(30, dtype), depth=depth(z))


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_without_variance_are_named(dtype):
    x, y = related(np.random.default_rng(23), 300, 4, dtype)
    x[:, 1], y[:, 0], y[:, 3] = dtype(0.1), 0, np.nan
    x[:, 2] = dtype(1e8) + np.arange(300) % 2 * dtype(64)
    s = stats_of(x, y, (7, 130))
    assert s.constant_x.tolist() == [False, True, False, False]
    assert s.constant_y.tolist() == [True, False, False, True]
    assert not s.correlation()[1].any()
    s.merge(stats_of(x + dtype(1), y))
    assert s.constant_x.tolist() == 4 * [False]
    assert ContextStats(2).constant_y.all()


def test_the_floor_is_asked_for():
    x, y = related(np.random.default_rng(24), 100, 3, np.float64)
    product = np.linalg.norm(x - x.mean(0), axis=0)[0] * np.linalg.norm(y - y.mean(0), axis=0)[1]
    for scale in (1.0, 1e-100, 1e120):
        for floor in (product * scale * 0.999, product * scale * 1.001):
            s = ContextStats(3, np.float64, floor=floor)
            s.update(x * scale, y)
            assert (s.correlation()[0, 1] != 0) == (floor < product * scale)
    tiny = ContextStats(3, np.float64, floor=1e-12)
    tiny.update(x * 1e-300, y * 1e-300)
    assert not tiny.correlation().any()
    with_floor = pickle.loads(pickle.dumps(tiny))
    assert with_floor.floor == 1e-12


# --- two widths ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(3, 5), (5, 3), (1, 300), (300, 1)])
def test_two_widths(dims, dtype):
    rng = np.random.default_rng(27)
    x, y = (rng.standard_normal((9000, d)).astype(dtype) for d in dims)
    y += x[:, :1]
    y[5, 0], x[8500, -1] = np.nan, np.inf
    s = stats_of(x, y, (3000, 3001))
    assert s.dim == dims
    assert s.similarity().shape == dims
    assert_exact(s, x, y)
    one, two = stats_of(x[:100], y[:100]), stats_of(x[100:], y[100:])
    one.merge(two)
    assert_exact(one, x, y)
    again = ContextStats(dims, dtype)
    again.load_state_dict(s.state_dict())
    for other in (again, pickle.loads(pickle.dumps(s))):
        assert same(other, s)
    for wrong in (dims[::-1], dims[0]):
        with pytest.raises(ValueError, match="dim is"):
            ContextStats(wrong, dtype).load_state_dict(s.state_dict())
        with pytest.raises(ValueError, match=r"^other: "):
            ContextStats(wrong, dtype).merge(s)
    with pytest.raises(ValueError, match=r"^x: "):
        s.update(y, x)
    with pytest.raises(ValueError, match=r"^y: "):
        s.update(x, y[:-1])


def test_two_equal_widths_are_one():
    assert ContextStats((4, 4)).dim == ContextStats(4).dim == 4
    x, y = related(np.random.default_rng(28), 30, 4, np.float32)
    s = ContextStats(4)
    s.merge(stats_of(x, y))
    assert_exact(s, x, y)


def test_accuracy_at_a_large_offset():
    x, y = related(np.random.default_rng(7), 20_000, 64, np.float64)
    x, y = (x + 1e3).astype(np.float32), (y + 1e3).astype(np.float32)
    want = similarity(x.astype(np.float64), y.astype(np.float64), max_rows=None)
    assert np.max(np.abs(stats_of(x, y).similarity() - want)) < 1e-6 * np.max(np.abs(want))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_steady_update_allocates_no_matrix(dtype):
    dim = 384
    x, y = (np.random.default_rng(i).standard_normal((1024, dim)).astype(dtype) for i in range(2))
    s = ContextStats(dim, dtype)
    assert traced_peak(lambda: s.update(x, y), warmup=2) < 150_000
    s.update(x + 3, y)  # rows that are shifted take two panels more
    held = s.workspace.nbytes
    for _ in range(2):
        s.update(np.concatenate([x] * 9), np.concatenate([y + 3] * 9))
    assert s.workspace.nbytes == held
    x[5, 5] = np.nan
    s.update(x, y)
    assert traced_peak(lambda: s.update(x, y)) < 150_000


def test_a_debug_workspace_finds_nothing():
    x, y = related(np.random.default_rng(8), 3000, 6, np.float32)
    s = ContextStats(6, workspace=Workspace(debug=True))
    s.update(x, y)
    s.update(_sprinkle(x, np.random.default_rng(0), values=(np.nan,)), y)
    assert s.count == 6000


def test_state_and_pickle():
    x, y = related(np.random.default_rng(9), 300, 5, np.float32)
    s = stats_of(x, y)
    new = ContextStats(5)
    new.load_state_dict(s.state_dict())
    for other in (new, pickle.loads(pickle.dumps(s))):
        s2 = stats_of(x, y)
        s2.update(x, y)
        other.update(x, y)
        assert np.array_equal(other.similarity(), s2.similarity())
    large = stats_of(*related(np.random.default_rng(9), 300, 64, np.float32))
    assert len(pickle.dumps(large)) < large.nbytes - large.workspace.nbytes + 3000
    s.reset()
    assert s.count == 0
    assert not s.similarity().any()


BAD_STATES = {
    "count": [-1, 2.5, np.ones(3), "x"],
    "dim": [6, (5, 6), 5.5],
    "itemsize": [8],
    "nonfinite_x": [-2],
    "m2_x": [-np.ones(5), np.ones(4), np.full(5, np.inf)],
    "rest_y": [np.full(5, np.nan)],
    "exponent_x": [np.zeros(5), np.full(5, -1101, np.intc), np.full(5, 1025, np.intc)],
    "cross": [np.zeros((5, 5), np.float32), np.zeros(25), np.full((5, 5), np.nan)],
    "mean_y": [np.full(5, np.nan), None],
    "nan": [1],
    "dropped": [-1],
    "incomplete": [-1, 1],  # only with nan="pairs"
    "null_power": [np.full((176, 10), -1.0), np.zeros((3, 10))],
    "null_means": [np.full((3, 32, 10), np.nan)],
    "null_filled": [np.array([0, 32, 0, 0]), np.array([-1, 0, 0, 0]), np.zeros(4)],
}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in BAD_STATES.items() for v in values]
)
def test_a_bad_state_changes_nothing(name, value):
    x, y = related(np.random.default_rng(10), 30, 5, np.float32)
    s = stats_of(x, y)
    before = s.state_dict()
    with pytest.raises((ValueError, TypeError), match=name):
        s.load_state_dict(before | {name: value})
    with pytest.raises(ValueError, match="keys"):
        s.load_state_dict({k: v for k, v in before.items() if k != name})
    assert same(s, before)


def same(s, state):
    state = state.state_dict() if isinstance(state, ContextStats) else state
    return all(np.array_equal(v, state[k]) for k, v in s.state_dict().items())


def test_bad_input_changes_nothing():
    x, y = related(np.random.default_rng(11), 30, 5, np.float64)
    s = stats_of(x, y)
    before = s.state_dict()
    for a, b, error in [
        (x, y[:9], ValueError),
        (x[:, :4], y[:, :4], ValueError),
        (x[0], y[0], ValueError),
        (x.astype("f"), y, TypeError),
        (x.tolist(), y, TypeError),
    ]:
        with pytest.raises(error, match=r"^[xy]: "):
            s.update(a, b)
    for other in (ContextStats(4, np.float64), ContextStats(5), "stats"):
        with pytest.raises((ValueError, TypeError), match=r"^other: "):
            s.merge(other)
    assert same(s, before)


@pytest.mark.parametrize(
    ("options", "name"),
    [(dict(dim=d), "dim") for d in (0, -1, 2.0, "3", (3,), (3, 0), (1, 2, 3), [3, 4], None)]
    + [(dict(dim=3, floor=f), "floor") for f in (-1e-300, np.nan, np.inf)]
    + [(dict(dim=3, nan=n), "nan") for n in ("pair", "", None, 0)]
    + [(dict(dim=3, least_rows=n), "least_rows") for n in (1, 2.0, None)]
    + [(dict(dim=3, dtype=np.float16), "dtype"), (dict(dim=3, workspace=3), "workspace")],
)
def test_options_that_cannot_be(options, name):
    with pytest.raises((ValueError, TypeError), match=f"^{name}: ") as e:
        ContextStats(**options)
    assert "\n" not in str(e.value)


def test_means_and_spreads():
    x, y = related(np.random.default_rng(31), 50, 3, np.float64)
    x *= 1e200
    got = module._means_and_spreads(stats_of(x, y, (20,)))
    for name, a in (("x", x / 1e200), ("y", y)):
        unit = 1e200 if name == "x" else 1
        assert_equiv(got[f"mean_{name}"] / unit, a.mean(0), depth=50, scale=np.abs(a).max(0))
        assert_equiv(got[f"std_{name}"] / unit, a.std(0), depth=50, scale=a.std(0))
    assert not any(a.any() for a in module._means_and_spreads(ContextStats(3)).values())


def test_covariances_are_in_units():
    x, y = related(np.random.default_rng(32), 70, 3, np.float64)
    for scale in (1.0, 1e-120, 1e140):
        s = stats_of(x * scale, y, (20,))
        want = np.cov(x.T, y.T, ddof=0)[:3, 3:]
        assert_equiv(
            s.covariance() / scale, want, depth=70, scale=np.outer(s.std_x, s.std_y) / scale
        )
        for name in ("mean_x", "mean_y", "std_x", "std_y"):
            assert np.array_equal(getattr(s, name), module._means_and_spreads(s)[name])
    assert not ContextStats(2).covariance().any()


# --- missing values ---


def test_rows_that_are_not_complete_are_left_out():
    rng = np.random.default_rng(33)
    x, y = related(rng, 9000, 6, np.float32)
    x[rng.integers(9000, size=700), 2] = np.nan
    y[rng.integers(9000, size=40), 5] = -np.inf
    keep = np.isfinite(x).all(1) & np.isfinite(y).all(1)
    s = ContextStats(6, nan="rows")
    for rows in (slice(0, 5), slice(5, 8700), slice(8700, None)):
        s.update(x[rows], y[rows])
    assert (s.count, s.dropped) == (keep.sum(), 9000 - keep.sum())
    assert s.nonfinite_x == np.count_nonzero(~np.isfinite(x))
    assert s.nonfinite_y == np.count_nonzero(~np.isfinite(y))
    np.testing.assert_allclose(
        s.similarity(), similarity(x[keep], y[keep], max_rows=None, floor=0.0), atol=1e-5
    )
    assert s.effective_rows == pytest.approx(keep.sum(), rel=0.1)
    again = ContextStats(6, nan="rows")
    again.load_state_dict(s.state_dict())
    assert same(again, s)
    again.merge(s)
    assert again.dropped == 2 * s.dropped
    for other in (ContextStats(6), ContextStats(6, nan="refuse")):
        with pytest.raises(ValueError, match=r"^other: has nan="):
            s.merge(other)
        with pytest.raises(ValueError, match="nan is"):
            other.load_state_dict(s.state_dict())


def test_no_complete_row():
    s = ContextStats(3, nan="rows")
    s.update(np.full((700, 3), np.nan, np.float32), np.ones((700, 3), np.float32))
    assert (s.count, s.dropped) == (0, 700)
    assert not s.correlation().any()
    total = ContextStats(3, nan="rows")
    total.merge(s)
    assert total.dropped == 700


@pytest.mark.parametrize("name", ["x", "y"])
def test_what_is_not_finite_is_refused(name):
    x, y = related(np.random.default_rng(34), 900, 3, np.float64)
    s = ContextStats(3, np.float64, nan="refuse")
    s.update(x, y)
    before = s.state_dict()
    (x if name == "x" else y)[701, 1] = np.inf
    with pytest.raises(ValueError, match=f"^{name}: row 701 of this chunk"):
        s.update(x, y)
    assert same(s, before)


# --- CKA ---


def three(x, y):
    return [stats_of(a, b) for a, b in ((x, y), (x, x), (y, y))]


def by_grams(x, y):
    """Kornblith, Norouzi, Lee and Hinton (2019), by centred Gram matrices."""
    H = np.eye(len(x)) - 1 / len(x)
    K, L = H @ x @ x.T @ H, H @ y @ y.T @ H
    return np.sum(K * L) / np.sqrt(np.sum(K * K) * np.sum(L * L))


@pytest.mark.parametrize("dims", [(3, 3), (2, 9), (9, 2)])
@pytest.mark.parametrize("scale", [1, 1e-60, 1e70])
def test_linear_cka_is_that_of_gram_matrices(dims, scale):
    rng = np.random.default_rng(35)
    x = rng.standard_normal((200, dims[0])) + 2
    y = rng.standard_normal((200, dims[1])) + x[:, :1]
    got = module.linear_cka(*three(x * scale, y))
    assert got == pytest.approx(by_grams(x, y), rel=1e-10)
    rotation = np.linalg.qr(rng.standard_normal((dims[1], dims[1])))[0]
    assert module.linear_cka(*three(x, 3 * y @ rotation + 5)) == pytest.approx(got, rel=1e-10)
    assert module.linear_cka(*three(y, y @ rotation)) == pytest.approx(1)


def test_linear_cka_needs_the_same_rows():
    x, y = related(np.random.default_rng(36), 50, 4, np.float64)
    xy, xx, yy = three(x, y)
    assert np.isnan(module.linear_cka(*three(x, np.ones((50, 2)))))
    with pytest.raises(ValueError, match=r"^xx: is of 49 rows"):
        module.linear_cka(xy, stats_of(x[1:], x[1:]), yy)
    with pytest.raises(ValueError, match=r"^yy: .* needed 50 rows and 4 features"):
        module.linear_cka(xy, xx, stats_of(y[:, :3], y[:, :3]))
