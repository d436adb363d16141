"""`ContextStats` against an oracle; shards, memory, interruption and resumption; dask."""

import contextlib
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import DTYPES, LAYOUTS, dtypes, lay, make, seeds
from hypothesis import given
from hypothesis import strategies as st

from ctxlab import streaming
from ctxlab.data import InputError
from ctxlab.measure import traced_peak
from ctxlab.reference import similarity
from ctxlab.streaming import (
    SUB_ROWS,
    ContextStats,
    chunk_rows,
    joined,
    load_stats,
    moments,
    noise_floor,
    panel_rows,
    parse_bytes,
    permutation_null,
    save_stats,
    shard_stats,
    shards,
    similarity_dask,
    stream,
)
from ctxlab.testing import assert_equiv, sprinkle
from ctxlab.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")


def depth(x):
    """The longest sum in the dtype of the input."""
    n, dim = x.shape
    if x.dtype == np.float64:
        return max(n, 1)
    p = panel_rows(dim, x.dtype)
    return min(n, p) + -(-min(n, SUB_ROWS) // p) + 2


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
    "n", [0, 1, 2, 3, 63, 64, 65, 1023, 1025, SUB_ROWS, SUB_ROWS + 1, 2 * SUB_ROWS + 77]
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


def test_joined_moments_are_moments():
    x, y = related(np.random.default_rng(4), 50, 4, np.float64)
    got, want = joined(moments(x[:20], y[:20]), moments(x[20:], y[20:])), moments(x, y)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert_equiv(a, b, depth=50, scale=50.0)


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


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e200])
def test_a_checkpoint_at_any_scale(scale, tmp_path):
    x, y = related(np.random.default_rng(25), 300, 4, np.float64)
    x[:, 1] *= scale
    x[:, 2] = scale
    s = stats_of(x[:200], y[:200])
    save_stats(tmp_path / "state", s)
    again = load_stats(tmp_path / "state", 4, np.float64)
    assert same(again, s)
    again.update(x[200:], y[200:])
    s.update(x[200:], y[200:])
    assert same(again, s)
    assert_exact(again, x, y)


def test_a_permutation_null_at_any_scale():
    x, y = related(np.random.default_rng(26), 40, 6, np.float64)
    want = permutation_null(x, y, rounds=3).rms
    for scale in (1e-300, 1e-160, 1e160, 1e300):
        assert_equiv(permutation_null(x * scale, y, rounds=3).rms, want, depth=40)


# --- two widths ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(3, 5), (5, 3), (1, 300), (300, 1)])
def test_two_widths(dims, dtype, tmp_path):
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
    save_stats(tmp_path / "state", s)
    for other in (
        again,
        pickle.loads(pickle.dumps(s)),
        load_stats(tmp_path / "state", dims, dtype),
    ):
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
    assert_exact(stream([(x[:9], y[:9]), (x[9:], y[9:])]), x, y)


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
    held = s.workspace.nbytes
    for _ in range(2):
        s.update(np.concatenate([x] * 9), np.concatenate([y] * 9))
    assert s.workspace.nbytes == held
    x[5, 5] = np.nan
    s.update(x, y)
    assert traced_peak(lambda: s.update(x, y)) < 150_000
    assert s.workspace.nbytes < chunk_fixed(dim, dtype)


def chunk_fixed(dim, dtype):
    return streaming._fixed_bytes(dim, dtype)


def test_a_debug_workspace_finds_nothing():
    x, y = related(np.random.default_rng(8), 3000, 6, np.float32)
    s = ContextStats(6, workspace=Workspace(debug=True))
    s.update(x, y)
    s.update(sprinkle(x, np.random.default_rng(0), values=(np.nan,)), y)
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
    assert len(pickle.dumps(large)) < large._cross.nbytes + 9000
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
    + [(dict(dim=3, dtype=np.float16), "dtype"), (dict(dim=3, workspace=3), "workspace")],
)
def test_options_that_cannot_be(options, name):
    with pytest.raises((ValueError, TypeError), match=f"^{name}: ") as e:
        ContextStats(**options)
    assert "\n" not in str(e.value)


def test_means_and_spreads():
    x, y = related(np.random.default_rng(31), 50, 3, np.float64)
    x *= 1e200
    got = streaming._means_and_spreads(stats_of(x, y, (20,)))
    for name, a in (("x", x / 1e200), ("y", y)):
        unit = 1e200 if name == "x" else 1
        assert_equiv(got[f"mean_{name}"] / unit, a.mean(0), depth=50, scale=np.abs(a).max(0))
        assert_equiv(got[f"std_{name}"] / unit, a.std(0), depth=50, scale=a.std(0))
    assert not any(a.any() for a in streaming._means_and_spreads(ContextStats(3)).values())


def test_the_naive_form_is_right_where_means_are_small():
    x, y = related(np.random.default_rng(32), 50, 3, np.float64)
    got, want = streaming.naive_correlation(x, y), correlation_of(x, y)
    assert_equiv(got, want, depth=500, scale=np.ones((3, 3)))


# --- sizes ---


def test_parse_bytes():
    assert parse_bytes("1.5GiB") == 3 * 2**29
    assert parse_bytes("2GB") == 2 * 10**9
    assert parse_bytes(np.int64(5)) == 5
    for bad in (
        "",
        "GB",
        "1 GBB",
        "1e400",
        "-3MB",
        "0",
        "inf",
        "1_000",
        "\u0661",
        "1 2",
        "9" * 400,
        0,
        -1,
    ):
        with pytest.raises(ValueError, match="memory"):
            parse_bytes(bad)
    for bad in (None, 1.0, True, [1]):
        with pytest.raises(TypeError, match="memory"):
            parse_bytes(bad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 64, 768, 4096])
def test_chunk_rows_states_the_least(dim, dtype):
    with pytest.raises(ValueError, match="needed at least") as e:
        chunk_rows(1000, dim, dtype)
    least = int(str(e.value).split("at least ")[1].split()[0])
    assert chunk_rows(least, dim, dtype) == 256
    with pytest.raises(ValueError, match=str(least)):
        chunk_rows(least - 1, dim, dtype)
    assert chunk_rows("1TB", dim, dtype) == SUB_ROWS


@pytest.mark.parametrize("dim", [1, 64, 768, (3, 500)])
def test_what_is_held_is_what_is_counted(dim):
    stats = ContextStats(dim)
    held = 2 * (stats.nbytes - stats.workspace.nbytes)
    assert held <= streaming.sums_bytes(dim) < held * 1.5 + 100
    x, y = (np.ones((2000, d), np.float32) for d in stats._cross.shape)
    x[3, 0] = np.nan  # so that one panel is done in float64
    stats.update(x, y)
    counted = streaming._fixed_bytes(dim, np.float32) - streaming.sums_bytes(dim)
    assert stats.workspace.nbytes <= counted - streaming.SPARE


# --- shards ---

DIM = 8
MEMORY = "2MB"


@pytest.fixture
def data():
    x, y = related(np.random.default_rng(12), 5000, DIM, np.float32)
    x += 9
    x[4321, 2] = np.inf
    return x, y


CUTS = (0, 900, 900, 901, 2500, 4000, 5000)


@pytest.fixture
def folder(tmp_path, data):
    (tmp_path / "run").mkdir()
    for i, (a, b) in enumerate(itertools.pairwise(CUTS)):
        x, y = (c[a:b] for c in data)
        if i % 3 == 0:
            np.save(tmp_path / "run" / f"{i}.x.npy", x)
            np.save(tmp_path / "run" / f"{i}.y.npy", y)
        else:
            save = np.savez if i % 3 == 1 else np.savez_compressed
            save(tmp_path / "run" / f"{i}.npz", x=x, y=y, other=1)
    return tmp_path / "run"


def test_a_folder_of_shards(folder, data):
    found = shards(folder)
    assert [s.rows for s in found] == list(np.diff(CUTS))
    assert [s.name for s in found] == ["0.x.npy", "1.npz", "2.npz", "3.x.npy", "4.npz", "5.npz"]
    total = stream(found, memory=MEMORY)
    assert_exact(total, *data)
    by_hand = ContextStats(DIM)
    for s in found:
        by_hand.merge(shard_stats(s, MEMORY))
    assert same(by_hand, total)
    assert [s.x for s in shards([folder / "1.npz", (folder / "3.x.npy", folder / "3.y.npy")])] == [
        str(folder / "1.npz"),
        str(folder / "3.x.npy"),
    ]
    assert shards(str(folder / "0.x.npy"))[0].rows == 900


def test_arrays_and_memory_maps(folder, data):
    x, y = data
    assert_exact(stream((x[i : i + 600], y[i : i + 600]) for i in range(0, 5000, 600)), x, y)
    mapped = [tuple(np.load(folder / f"{i}.{c}.npy", mmap_mode="r") for c in "xy") for i in (0, 3)]
    assert stream(mapped, memory=MEMORY).count == 900 + 1599
    with pytest.raises(InputError, match="no rows"):
        stream([])
    with pytest.raises(InputError, match="no rows"):
        stream(iter([(x[:0], y[:0])]))
    with pytest.raises(InputError, match="no rows"):
        stream(shards(folder / "1.npz"), memory=MEMORY)
    with pytest.raises(TypeError, match="item 1"):
        stream([(x, y), x])
    with pytest.raises(ValueError, match=r"^y: "):
        stream([(x, y), (x, y[:3])])
    with pytest.raises(ValueError, match="checkpoint"):
        stream([(x, y)], checkpoint=folder / "c")
    with pytest.raises(ValueError, match="needed at least"):
        stream([(x, y)], memory=1000)


def npy(path, a, **options):
    np.save(path, a, **options)
    return path


OK = np.random.default_rng(0).standard_normal((6, DIM)).astype(np.float32)
BAD = {  # x, y, a word of the message
    "fewer rows": (OK, OK[:5], "rows"),
    "another width": (OK, OK[:, 1:], "features"),
    "another dtype": (OK, OK.astype(float), "dtype"),
    "integers": (OK.astype(int), OK, "int64"),
    "half of them": (OK.astype(np.float16), OK, "float16"),
    "long double": (OK.astype(np.longdouble), OK, "needed float16, float32, float64"),
    "big endian": (OK.astype(">f4"), OK, ">f4"),
    "vector": (OK[0], OK, "shape"),
    "three dimensions": (OK[None], OK, "shape"),
    "no features": (OK[:, :0], OK[:, :0], "no features"),
    "Fortran": (OK, np.asfortranarray(OK), "Fortran"),
    "objects": (np.array([[{}]], object), OK, "pickle"),
    "record": (np.zeros((3, 3), [("a", "f4")]), OK, "dtype"),
    "others in float64": (OK.astype(float), OK.astype(float), "dtype"),
    "others are wide": (np.tile(OK, 2), np.tile(OK, 2), "width"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("form", ["npz", "npy"])
def test_bad_shards_are_named(folder, kind, form):
    x, y, word = BAD[kind]
    if form == "npz":
        np.savez(folder / "zz.npz", x=x, y=y)
    else:
        for name, a in (("x", x), ("y", y)):
            np.save(folder / f"zz.{name}.npy", a)
    with pytest.raises(InputError, match=word) as e:
        shards(folder)
    assert "zz." in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("form", ["x and y", "npy", "hidden", "compressed"])
@pytest.mark.parametrize("stored", [np.float16, np.float32, np.float64])
def test_numbers_of_any_precision_and_layers(form, stored, tmp_path):
    hidden = np.random.default_rng(29).standard_normal((4, 3000, 40)).astype(stored)
    hidden[3, 7, 7] = np.inf
    for layer in (1, 2, 3) if form in ("hidden", "compressed") else (None,):
        x, y = hidden[(layer or 1) - 1 : (layer or 1) + 1]
        paths = tmp_path / "a.npz"
        if form == "x and y":
            np.savez(paths, x=x, y=y)
        elif form == "npy":
            paths = [(npy(tmp_path / "x.npy", x), npy(tmp_path / "y.npy", y))]
        else:
            save = np.savez if form == "hidden" else np.savez_compressed
            save(paths, hidden=hidden, text="words", ids=np.arange(9))
        listed = shards(paths, layer)
        as_read = np.float64 if stored == np.float64 else np.float32
        assert (listed[0].dtype, listed[0].layer) == (np.dtype(as_read).name, layer or 0)
        got = stream(listed, memory="3MB")
        assert_exact(got, x.astype(as_read), y.astype(as_read))
        if layer == 1:
            assert same(stream(shards(paths), memory="3MB"), got)


def test_layers_that_are_not_there(tmp_path):
    np.savez(tmp_path / "a.npz", hidden=np.ones((4, 5, 3), np.float16))
    np.savez(tmp_path / "xy.npz", x=OK, y=OK)
    np.savez(tmp_path / "flat.npz", hidden=OK)
    np.savez(tmp_path / "one.npz", hidden=OK[None])
    np.save(tmp_path / "f.x.npy", OK)
    np.save(tmp_path / "f.y.npy", OK)
    for name, layer, said in [
        ("a.npz", 4, "there is no layer 4; it has 1 to 3"),
        ("a.npz", 9, "there is no layer 9; it has 1 to 3"),
        ("one.npz", None, "there is no layer 1; it has 1 to 0"),
        ("xy.npz", 1, "has arrays 'x' and 'y'"),
        ("f.x.npy", 2, "is no .npz"),
        ("flat.npz", None, r"is not \(layers, rows, features\)"),
    ]:
        with pytest.raises(InputError, match=said) as e:
            shards(tmp_path / name, layer)
        assert name in str(e.value)
    for layer in (0, -1):
        with pytest.raises(ValueError, match="layer: "):
            shards(tmp_path / "a.npz", layer)


def npy_by_hand(path, a, version, fortran):
    """An .npy file with another header than `np.save` would give it."""
    write = {
        1: np.lib.format.write_array_header_1_0,
        2: np.lib.format.write_array_header_2_0,
    }[version]
    with open(path, "wb") as f:
        write(f, dict(descr="<f4", fortran_order=fortran, shape=a.shape))
        f.write(a.tobytes("F" if fortran else "C"))
    return path


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("fortran", [False, True])
def test_headers_of_each_version(version, fortran, tmp_path):
    """In a single column the two orders are the same."""
    column = OK[:, :1]
    path = npy_by_hand(tmp_path / "a.npy", column, version, fortran)
    assert_exact(shard_stats(shards([(path, path)])[0], MEMORY), column, column)
    if fortran:
        npy_by_hand(path, OK, version, fortran)
        with pytest.raises(InputError, match="Fortran"):
            shards([(path, path)])


@pytest.mark.parametrize(("every", "saved"), [(1, 6), (2, 3), (4, 2), (5, 2), (9, 1)])
def test_a_checkpoint_every_few_shards(folder, tmp_path, monkeypatch, every, saved):
    counts, save = [], streaming.save_stats

    def noted(path, stats, done):
        counts.append(len(done))
        save(path, stats, done)

    monkeypatch.setattr(streaming, "save_stats", noted)
    stream(shards(folder), memory=MEMORY, checkpoint=tmp_path / "state", every=every)
    assert counts == sorted({*range(every, 7, every), 6})
    assert len(counts) == saved


def test_a_file_may_be_paired_with_itself(tmp_path):
    path = npy(tmp_path / "a.npy", OK)
    s = shard_stats(shards([(path, path)])[0], MEMORY)
    assert_exact(s, OK, OK)


def test_what_lies_beside_the_data_gets_a_word(folder, tmp_path):
    for name in ("._1.npz", "._0.x.npy"):
        (folder / name).write_bytes(b"Mac OS X")
        with pytest.raises(InputError, match=r"\._.*: is what macOS keeps beside a file"):
            shards(folder)
        (folder / name).unlink()
    (folder / "plots").mkdir()
    (folder / "plots" / "a.png").write_bytes(b"")
    assert len(shards(folder)) == 6
    np.savez(folder / "plots" / "more.npz", x=OK, y=OK)
    with pytest.raises(InputError, match=r"plots: is a folder of data inside"):
        shards(folder)
    with pytest.raises(InputError, match=r"needed a pair of \.npy files"):
        shards([(folder / "1.npz", folder / "2.npz")])


@pytest.mark.parametrize("layer", [1, 3])
def test_any_bit_that_tips_in_hidden_is_found(layer, tmp_path):
    """In other layers, too: the checksum is that of the whole array."""
    path, hidden = tmp_path / "s.npz", np.tile(OK, (4, 200, 1)).astype(np.float16)
    np.savez(path, hidden=hidden)
    good = path.read_bytes()
    start = good.index(hidden.tobytes())
    for at in range(start, start + hidden.nbytes, 4999):
        bad = bytearray(good)
        bad[at] ^= 4
        path.write_bytes(bad)
        with pytest.raises(InputError, match="Bad CRC"):
            shard_stats(shards(path, layer)[0], MEMORY)


def test_missing_and_damaged_files_are_named(folder, tmp_path):
    cases = {
        "nothing.npz": None,
        "text.npz": b"not an archive",
        "empty.x.npy": b"",
        "text.x.npy": b"not an array",
        "header.x.npy": b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4'}\n",
        "version.x.npy": b"\x93NUMPY\x09\x00",
        "lone.x.npy": (folder / "0.x.npy").read_bytes(),
        "other.npy": (folder / "0.x.npy").read_bytes(),
    }
    for name, content in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError) as e:
            shards([path])
        assert name.removesuffix(".x.npy") in str(e.value)
        assert "\n" not in str(e.value)
    (tmp_path / "short.x.npy").write_bytes(cases["lone.x.npy"][:-1])
    (tmp_path / "short.y.npy").write_bytes(cases["lone.x.npy"])
    with pytest.raises(InputError, match=r"short.x.npy: is cut short"):
        shards(tmp_path / "short.x.npy")
    (folder / "0.y.npy").unlink()
    with pytest.raises(InputError, match=r"0.y.npy"):
        shards(folder)
    (tmp_path / "none").mkdir()
    for nothing in (tmp_path / "none", [], [("a", "b", "c")]):
        with pytest.raises(InputError):
            shards(nothing)
    np.save(tmp_path / "none" / "a.y.npy", OK)
    with pytest.raises(InputError, match=r"a.y.npy"):
        shards(tmp_path / "none")


@pytest.mark.parametrize("compressed", [False, True])
def test_any_bit_that_tips_in_an_archive_is_found(tmp_path, compressed):
    path, rng = tmp_path / "s.npz", np.random.default_rng(13)
    (np.savez_compressed if compressed else np.savez)(path, x=OK, y=OK)
    good, want = path.read_bytes(), shard_stats(shards(path)[0], MEMORY)
    found = 0
    for at in rng.integers(0, len(good), 60):
        bad = bytearray(good)
        bad[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        message = ""
        try:
            assert same(
                shard_stats(shards(path)[0], MEMORY), want
            )  # a byte that says nothing about the data
        except InputError as e:
            message = str(e)
        assert not message or "s.npz" in message
        found += bool(message)
    assert found > 20


# --- interruption ---

SHARD_STATS = streaming.shard_stats


def failing(monkeypatch, at, error):
    """`shard_stats` that raises at the shard with this number, after it has read some rows."""
    seen = []

    def stats(shard, *args, stats, tick=None):
        seen.append(shard)
        if len(seen) == at:
            SHARD_STATS(shard, *args, stats=stats)
            raise error
        return SHARD_STATS(shard, *args, stats=stats, tick=tick)

    monkeypatch.setattr(streaming, "shard_stats", stats)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no disk"), MemoryError])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("at", [1, 2, 4, 6])
def test_resumed_to_the_bit(folder, tmp_path, monkeypatch, at, every, error):
    todo, path = shards(folder), tmp_path / "state"
    want = stream(todo, memory=MEMORY)
    with monkeypatch.context() as m:
        failing(m, at, error)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            stream(todo, memory=MEMORY, checkpoint=path, every=every, resume=True)
    assert path.exists() == (at > 1)
    if at > 1:
        assert load_stats(path, DIM).count == CUTS[at - 1]
    assert same(stream(todo, memory=MEMORY, checkpoint=path, every=every, resume=True), want)
    assert same(stream(todo, memory=MEMORY, checkpoint=path, resume=True), want)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "state"]


def test_a_run_goes_on_with_more_shards(folder, tmp_path):
    todo, path = shards(folder), tmp_path / "state"
    stream(todo[:3], memory=MEMORY, checkpoint=path)
    assert same(
        stream(todo, memory=MEMORY, checkpoint=path, resume=True), stream(todo, memory=MEMORY)
    )


def test_checkpoints_of_another_run_are_refused(folder, tmp_path):
    todo, path = shards(folder), tmp_path / "state"
    stream(todo[:4], memory=MEMORY, checkpoint=path)
    whole = path.read_bytes()
    for other in (todo[1:], todo[:3], [*todo[1:4], todo[0]]):
        with pytest.raises(InputError, match="another run"):
            stream(other, memory=MEMORY, checkpoint=path, resume=True)
    with pytest.raises(InputError, match="exists"):
        stream(todo, memory=MEMORY, checkpoint=path)
    for dtype, dim in ((np.float64, DIM), (np.float32, DIM + 1)):
        with pytest.raises(InputError, match="another run"):
            load_stats(path, dim, dtype)
    np.savez(tmp_path / "foreign.npz", x=OK)
    for bad in (whole[:-1], whole[: len(whole) // 2], b"", (tmp_path / "foreign.npz").read_bytes()):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=r"checkpoint: .* is damaged"):
            stream(todo, memory=MEMORY, checkpoint=path, resume=True)
        assert path.read_bytes() == bad
    for options in (dict(every=0), dict(resume=True)):
        with pytest.raises(ValueError, match=next(iter(options))):
            stream(todo, memory=MEMORY, **options)


def changed_checkpoint(path, change):
    """Write the checkpoint anew, with what `change` makes of its description."""
    with np.load(path) as f:
        arrays = dict(f)
    about = change(json.loads(arrays["about"].tobytes()))
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with open(path, "wb") as f:
        np.savez(f, **arrays)


CHANGES = {
    "format": (lambda about: about | {"format": "ctxlab.streaming 1"}, "its format is"),
    "no format": (lambda about: {"done": about["done"]}, "is damaged"),
    "fewer shards": (
        lambda about: about | {"done": about["done"][:1]},
        r"is damaged \(901 rows of 900\)",
    ),
    "more shards": (
        lambda about: about | {"done": about["done"] + about["more"]},
        r"is damaged \(901 rows of 4000\)",
    ),
    "no numbers": (
        lambda about: about | {"done": [["a", "b", [[1, 2], [3, 4]], 0]]},
        "is damaged, or none of a stream",
    ),
    "another layer": (
        lambda about: about | {"done": [[*d[:3], 2] for d in about["done"]]},
        "of another run: of layer 2, here it is 0",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_checkpoint_that_contradicts_itself_is_refused(what, folder, tmp_path):
    todo, path = shards(folder), tmp_path / "state"
    stream(todo[:3], memory=MEMORY, checkpoint=path)
    change, said = CHANGES[what]
    more = [streaming._identity(s) for s in todo[3:5]]
    changed_checkpoint(path, lambda about: change(about | {"more": more}))
    kept = path.read_bytes()
    with pytest.raises(InputError, match=said) as e:
        stream(todo, memory=MEMORY, checkpoint=path, resume=True)
    assert "\n" not in str(e.value)
    assert path.read_bytes() == kept


SAVER = """if True:
    import sys
    import numpy as np
    from ctxlab.streaming import ContextStats, load_stats, save_stats
    s, size = ContextStats(64), int(sys.argv[2])
    s.update(np.eye(size, 64, dtype='f'), np.eye(size, 64, dtype='f'))
    for i in range(100):
        save_stats(sys.argv[1], s)
        assert load_stats(sys.argv[1], 64).count in (30, 60)
"""


def test_two_runs_on_one_checkpoint_never_see_half_of_it(tmp_path):
    path, s = tmp_path / "state", ContextStats(64)
    s.update(np.eye(30, 64, dtype="f"), np.eye(30, 64, dtype="f"))
    save_stats(path, s)
    runs = [subprocess.Popen([sys.executable, "-c", SAVER, path, n]) for n in ("30", "60")]
    seen = set()
    while any(r.poll() is None for r in runs):
        seen.add(load_stats(path, 64).count)
    assert [r.returncode for r in runs] == [0, 0]
    assert seen == {30, 60}
    assert os.listdir(tmp_path) == ["state"]


def test_any_bit_that_tips_in_a_checkpoint_is_found(tmp_path):
    path, rng, s = tmp_path / "state", np.random.default_rng(14), stats_of(OK, OK)
    save_stats(path, s)
    good = path.read_bytes()
    for at in rng.integers(0, len(good), 80):
        bad = bytearray(good)
        bad[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        with contextlib.suppress(InputError):
            assert same(load_stats(path, DIM), s)


def test_a_shard_that_changes_is_named(folder, tmp_path, monkeypatch):
    todo, path = shards(folder), tmp_path / "state"

    def touched(shard, *args, stats, tick=None):
        """The fourth file changes while it is read."""

        def touch(n):
            if shard is todo[3]:
                os.utime(shard.y, ns=(1, 1))

        return SHARD_STATS(shard, *args, stats=stats, tick=touch)

    with monkeypatch.context() as m:
        m.setattr(streaming, "shard_stats", touched)
        with pytest.raises(InputError, match=r"3.y.npy: has changed"):
            stream(todo, memory=MEMORY, checkpoint=path)
    assert load_stats(path, DIM).count == CUTS[3]
    with pytest.raises(InputError, match=r"3.y.npy: has changed"):
        stream(todo, memory=MEMORY, checkpoint=path, resume=True)
    (folder / "3.x.npy").unlink()
    with pytest.raises(InputError, match=r"3.x.npy: no such file"):
        stream(todo, memory=MEMORY, checkpoint=path, resume=True)
    os.utime(folder / "1.npz", ns=(1, 1))
    with pytest.raises(InputError, match=r"1.npz: has changed since it went into the checkpoint"):
        stream(
            shards([folder / s.name for s in todo[:3]]), memory=MEMORY, checkpoint=path, resume=True
        )


def test_the_disk_is_full(folder, tmp_path, monkeypatch):
    todo, path = shards(folder), tmp_path / "state"
    stream(todo[:2], memory=MEMORY, checkpoint=path)
    before = path.read_bytes()

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        stream(todo, memory=MEMORY, checkpoint=path, resume=True)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "state"]


def test_ctrl_c_waits_for_a_join():
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals go to the main thread")
    steps = []

    def block():
        with streaming._uninterrupted():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.001)
            steps.append(1)
        steps.append(2)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            block()
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps == [1]
    thread = threading.Thread(target=lambda: streaming._uninterrupted().__enter__())
    thread.start()
    thread.join()


def test_progress_tells_the_rows(folder, capsys):
    stream(shards(folder), memory=MEMORY, progress=True)
    assert "5.00k" in capsys.readouterr().err
    stream(shards(folder), memory=MEMORY)
    assert not capsys.readouterr().err


# --- memory ---

MEASURE = """
import sys, tracemalloc
import numpy as np
from ctxlab.measure import resident_bytes
from ctxlab.streaming import shards, stream
found = shards(sys.argv[1])
np.matmul(*np.ones((2, 300, 300), np.float32)); np.matmul(*np.ones((2, 300, 300)))
stream(found[:1], memory='12MB')
before, seen = resident_bytes(), []
if sys.argv[2] == 'traced': tracemalloc.start()
import ctxlab.streaming as s
update = s.ContextStats.update
def watched(self, x, y):
    update(self, x, y)
    seen.append(resident_bytes())
s.ContextStats.update = watched
total = stream(found, memory='12MB', checkpoint=sys.argv[3])
quarter = -(-len(seen) // 4)
traced = tracemalloc.get_traced_memory()[1] if sys.argv[2] == 'traced' else 0
print(total.count, max(seen) - before, max(seen) - max(seen[:quarter]), traced)
"""


def test_memory_is_the_budget_whatever_the_rows(tmp_path):
    """In fresh processes, for files of 4 MB and of 64 MB."""
    dim, rng = 256, np.random.default_rng(15)
    x, y = rng.standard_normal((2, 2000, dim), dtype=np.float32)
    figures = {}
    for files in (1, 16):
        run = tmp_path / str(files)
        run.mkdir()
        for i in range(files):
            save = np.savez if i % 4 else np.savez_compressed
            save(run / f"{i:02}.npz", x=x, y=y)
        for how in ("resident", "traced"):
            out = subprocess.run(
                [sys.executable, "-c", MEASURE, str(run), how, str(run / f"state.{how}")],
                capture_output=True,
                text=True,
                check=True,
                cwd=Path(__file__).parents[1],
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
            count, *figures[files, how] = map(int, out.stdout.split())
            assert count == 2000 * files
    grown, grown_late, _ = figures[16, "resident"]
    assert grown < 12e6
    assert grown_late < 1e6  # after the first quarter of 64 MB
    assert figures[16, "traced"][2] < 12e6
    assert figures[16, "traced"][2] < 1.05 * figures[1, "traced"][2] + 100_000


# --- noise ---


def test_noise_floor():
    assert noise_floor(101) == pytest.approx(0.1)
    for bad in (1, 0, -3):
        with pytest.raises(ValueError, match="n: "):
            noise_floor(bad)


@pytest.mark.parametrize(
    "shape", [(40, 90), (300, 12)]
)  # fewer rows than features: by Gram matrices
def test_permutation_null_is_a_shuffle(shape):
    x, y = related(np.random.default_rng(16), *shape, np.float32)
    null = permutation_null(x, y, rounds=6, seed=3)
    rng = np.random.default_rng(3)
    for got, off in zip(null.rms, null.rms_off, strict=True):
        r = stats_of(x.astype(float), y.astype(float)[rng.permutation(len(y))]).correlation()
        assert got == pytest.approx(np.sqrt(np.mean(r * r)), rel=1e-9)
        assert off == pytest.approx(np.sqrt(np.mean(r[~np.eye(len(r), dtype=bool)] ** 2)), rel=1e-9)
    for bad in (dict(rounds=0), dict(x=x[:1], y=y[:1]), dict(y=y[:-1])):
        with pytest.raises(ValueError, match=r"^(rounds|x|y): "):
            permutation_null(**dict(x=x, y=y) | bad)


# --- dask ---


@pytest.fixture(scope="module")
def da():
    dask = pytest.importorskip("dask")
    with dask.config.set(scheduler="synchronous"):
        yield pytest.importorskip("dask.array")


def test_similarity_dask(da, data):
    x, y = data
    want = similarity(x, y, max_rows=None)
    for chunks, other in (((700, DIM), (700, DIM)), ((5000, 3), (1234, DIM)), ((1, 8), (1, 8))):
        rows = 40 if chunks[0] == 1 else 5000
        lazy = similarity_dask(da.from_array(x[:rows], chunks), da.from_array(y[:rows], other))
        assert isinstance(lazy, da.Array)
        assert (lazy.shape, lazy.dtype) == ((DIM, DIM), np.float32)
        exact = want if rows == 5000 else similarity(x[:rows], y[:rows], max_rows=None)
        assert_equiv(lazy.compute(), exact, depth=depth(x), scale=1.0)
    kept = da.from_array(x, (700, DIM))
    first, second = (similarity_dask(kept, da.from_array(y, (700, DIM))) for _ in range(2))
    assert first.name == second.name


def test_similarity_dask_with_unknown_rows(da, data):
    x, y = (da.from_array(a, (700, DIM)) for a in data)
    keep = data[0][:, 0] > 9
    mask = da.from_array(keep, 700)
    lazy = similarity_dask(x[mask], y[mask])
    want = similarity(*(a[keep] for a in data), max_rows=None)
    assert_equiv(lazy.compute(), want, depth=depth(data[0]), scale=1.0)
    with pytest.raises(ValueError, match="y: shape"):
        similarity_dask(x[mask], y[~mask]).compute()
    with pytest.raises(ValueError, match="blocks"):
        similarity_dask(x[mask], y[:700])


def test_similarity_dask_refuses(da, data):
    x, y = (da.from_array(a, (700, DIM)) for a in data)
    for a, b, error in [
        (x, y[:-1], ValueError),
        (x[:, :3], y, ValueError),
        (x[0], y[0], ValueError),
        (x, y.astype(float), TypeError),
        (x.astype(int), y.astype(int), TypeError),
        (data[0], y, TypeError),
    ]:
        with pytest.raises(error, match=r"^[xy]: "):
            similarity_dask(a, b)


def test_dask_is_asked_for_by_name(monkeypatch, data):
    monkeypatch.setitem(sys.modules, "dask.array", None)
    with pytest.raises(ImportError, match=r"ctxlab\[distributed\]"):
        similarity_dask(*data)
