"""Noise floors of streams whose rows depend on each other."""

import pickle

import numpy as np
import pytest
from test_moments import same, stats_of

from ctxlab.streaming import dependence as module
from ctxlab.streaming.moments import ContextStats
from ctxlab.testing import assert_equiv

pytestmark = pytest.mark.usefixtures("one_thread")


def ar(rng, n, dim, rho):
    """Each row `rho` times the one before, plus noise."""
    a = rng.standard_normal((n + 200, dim))
    for t in range(1, len(a)):
        a[t] += rho * a[t - 1]
    return a[200:]


def pair(seed, n, dim, rho_x, rho_y=None):
    rng = np.random.default_rng(seed)
    return ar(rng, n, dim, rho_x), ar(rng, n, dim, rho_x if rho_y is None else rho_y)


def by_shifts(x, y):
    U, V = (a - a.mean(0) for a in (x, y))
    U, V = U / np.linalg.norm(U, axis=0), V / np.linalg.norm(V, axis=0)
    return np.sqrt(np.mean([(U.T @ np.roll(V, k, 0)) ** 2 for k in range(len(x))], axis=0))


def share(s):
    return np.mean(np.abs(s.correlation()) > 1.96 * s.noise())


# --- against the reference ---


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_block_is_all_circular_shifts(dtype):
    x, y = (a.astype(dtype) for a in pair(1, 256, 7, 0.9, 0.3))
    s = stats_of(x, y)
    np.testing.assert_allclose(s.noise(), by_shifts(x, y), rtol=2e-3)
    assert s.effective_rows == pytest.approx(1 + 1 / np.mean(s.noise().astype(float) ** 2))


@pytest.mark.parametrize("n", [2, 3, 4, 63, 64, 200, 255, 256])
@pytest.mark.parametrize("F", [32, 128])
def test_the_power_of_any_length_is_its_squares(n, F):
    if n > 2 * F:
        return
    a = np.random.default_rng(n).standard_normal((n, 70)) + 2
    weights = np.random.default_rng(0).random(n) + 0.5
    for scale in (None, weights):
        out = np.zeros((F, 70))
        module._add_power(a, out, scale)
        b = a if scale is None else a * scale[:, None]
        want = np.sum(np.square(b - b.mean(0)), axis=0)
        assert_equiv(out.sum(0), want, depth=n, scale=np.sum(b * b, axis=0) * 4)


def test_without_dependence_it_is_the_floor_of_independent_rows():
    for n in (50, 700, 20_000):
        x, y = np.random.default_rng(n).standard_normal((2, n, 60))
        assert stats_of(x, y).effective_rows == pytest.approx(n, rel=0.04)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (0.9, 0.9), (0.9, 0.0), (0.8, -0.6)])
def test_effective_rows_are_those_of_bartlett(a, b):
    x, y = pair(2, 20_000, 50, a, b)
    want = 20_000 * (1 - a * b) / (1 + a * b)
    assert stats_of(x, y).effective_rows == pytest.approx(want, rel=0.08)


# --- calibration ---


@pytest.mark.parametrize("n", [200, 1000, 9000])
@pytest.mark.parametrize("rho", [0, 0.5, 0.9])
def test_five_percent_of_noise_is_beyond(n, rho):
    shares = [share(stats_of(*pair(seed, n, 60, rho))) for seed in range(4)]
    assert 0.03 < np.mean(shares) < 0.07


def test_features_of_different_memory():
    rho = np.linspace(-0.5, 0.95, 80)
    for n in (200, 3000):
        s = stats_of(*pair(n, n, 80, rho, rho[::-1]))
        assert 0.03 < share(s) < 0.07
        slow = s.noise()[-1, 0]  # 0.95 beside 0.95
        fast = s.noise()[0, 0]  # -0.5 beside 0.95
        assert slow > 3 * fast


def test_shards_of_different_length():
    for level in (0, 1.0):
        total = ContextStats(60, np.float64)
        rng = np.random.default_rng(4)
        for seed in range(12):
            x, y = pair(seed, 400 if level else 100 + 90 * seed, 60, 0.7)
            shift = level * rng.standard_normal((2, 60))
            total.merge(stats_of(x + shift[0], y + shift[1]))
        assert 0.03 < share(total) < 0.07


def test_heavy_tails():
    x, y = np.random.default_rng(5).standard_t(3, (2, 2000, 80))
    assert 0.03 < share(stats_of(x, y)) < 0.07


def test_a_relation_is_far_beyond():
    x, y = pair(6, 2000, 40, 0.9)
    s = stats_of(x, y + 0.5 * x)
    z = s.correlation() / s.noise()
    assert np.diag(z).min() > 4


def test_trends_raise_the_floor():
    t = np.linspace(-9, 9, 2000)[:, None]
    x, y = np.random.default_rng(7).standard_normal((2, 2000, 5)) + t
    assert stats_of(x, y).effective_rows < 10


# --- properties ---


def test_any_scale_and_offset():
    x, y = pair(8, 900, 6, 0.8)
    want = stats_of(x, y).noise()
    for scale in (1e-200, 1e-100, 1e-9, 1e8, 1e160):
        s = stats_of(x * scale, y / scale)
        np.testing.assert_allclose(s.noise(), want, rtol=1e-6)
        assert np.isfinite(s._dependence.power).all()
    np.testing.assert_allclose(stats_of(x + 1e6, y - 1e9).noise(), want, rtol=1e-4)
    mixed = stats_of(np.concatenate([x, x * 1e200]), np.concatenate([y, y]))
    alone = stats_of(np.concatenate([x * 0, x]), np.concatenate([y, y]))
    np.testing.assert_allclose(mixed.noise(), alone.noise(), rtol=1e-6)


def test_features_in_any_order():
    x, y = pair(9, 900, 40, np.linspace(0, 0.9, 40))
    order = np.random.default_rng(0).permutation(40)
    got = stats_of(x[:, order], y).noise()
    np.testing.assert_allclose(got, stats_of(x, y).noise()[order], rtol=1e-9)
    got = stats_of(y, x).noise()
    np.testing.assert_allclose(got, stats_of(x, y).noise().T, rtol=1e-9)


@pytest.mark.parametrize("dims", [(3, 7), (70, 2)])
def test_two_widths(dims):
    rng = np.random.default_rng(10)
    s = stats_of(ar(rng, 700, dims[0], 0.5), ar(rng, 700, dims[1], 0.5))
    assert s.noise().shape == dims


def test_merged_is_nearly_the_whole():
    x, y = pair(11, 6000, 50, 0.9)
    whole = stats_of(x, y)
    parts = ContextStats(50, np.float64)
    for i in range(0, 6000, 1500):
        parts.merge(stats_of(x[i : i + 1500], y[i : i + 1500]))
    assert parts.effective_rows == pytest.approx(whole.effective_rows, rel=0.1)
    again = ContextStats(50, np.float64)
    again.merge(whole)
    np.testing.assert_allclose(again.noise(), whole.noise(), rtol=1e-9)


def test_many_streams():
    total = ContextStats(4, np.float64)
    rng = np.random.default_rng(12)
    for _ in range(200):  # more than a window of the last level
        total.merge(stats_of(*rng.standard_normal((2, 5, 4))))
    assert total.effective_rows == pytest.approx(1000, rel=0.15)


def test_rows_one_by_one():
    x, y = pair(13, 3000, 20, 0.5)
    s = ContextStats(20, np.float64)
    for i in range(3000):
        s.update(x[i : i + 1], y[i : i + 1])
    assert s.effective_rows == pytest.approx(3000 * 0.75 / 1.25, rel=0.15)


def test_asking_changes_nothing_and_going_on_is_the_same():
    x, y = pair(14, 20_000, 5, 0.5)
    one, two = stats_of(x, y, (700, 9000)), ContextStats(5, np.float64)
    for a, b in ((0, 700), (700, 9000), (9000, 20_000)):
        two.update(x[a:b], y[a:b])
        two.noise(), two.effective_rows
        two = pickle.loads(pickle.dumps(two))
        new = ContextStats(5, np.float64)
        new.load_state_dict(two.state_dict())
        two = new
    assert same(one, two)
    before = two.state_dict()
    other = stats_of(x[:50], y[:50])
    held = other.state_dict()
    two.merge(other)
    assert same(other, held)
    assert not same(two, before)


def test_constant_features_have_no_noise():
    x, y = pair(15, 400, 5, 0.5)
    x[:, 2], y[:, 4] = 1e5 / 3, np.nan
    s = stats_of(x, y)
    noise = s.noise()
    assert not noise[2].any()
    assert not noise[:, 4].any()
    assert np.all(noise[[0, 1, 3, 4]][:, :4] > 0.03)
    assert 100 < s.effective_rows < 400
    assert np.isnan(stats_of(x[:, 2:3], y[:, :1]).effective_rows)
    assert np.isnan(ContextStats(3).effective_rows)
    assert not ContextStats(3).noise().any()


def test_a_feature_that_is_seen_in_no_transform():
    x, y = pair(16, 6000, 3, 0)
    x[:, 0] = 0
    x[3000, 0] = 1  # in a block that is not transformed
    s = stats_of(x, y)
    np.testing.assert_allclose(s.noise()[0], 1 / np.sqrt(6000), rtol=0.1)


def test_two_rows():
    s = stats_of(np.array([[0.0], [1]]), np.array([[2.0], [5]]))
    assert s.noise()[0, 0] == pytest.approx(1, rel=0.1)


def test_what_is_held_is_what_is_counted():
    d = module._Dependence(17)
    assert sum(a.nbytes for a in d.arrays().values()) == module._dependence_bytes(17)
