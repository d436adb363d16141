"""The command `ctxlab context`: its result, its picture, what it refuses, and what an interruption leaves."""

import json

import numpy as np
import pytest

from ctxlab import __version__, streaming
from ctxlab.cli import main
from ctxlab.exact import figures_of, thinned
from ctxlab.reference import similarity
from ctxlab.testing import assert_equiv

D, ROWS = 12, 2000  # more than is read with the headers


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with five shards of related x and y, made the working folder."""
    rng = np.random.default_rng(0)
    (tmp_path / "run").mkdir()
    mix = rng.standard_normal((D, D))
    for i in range(5):
        x = rng.standard_normal((ROWS + i, D))
        y = x @ mix + rng.standard_normal(x.shape) + 100
        np.savez(tmp_path / f"run/{i}.npz", x=x.astype(np.float32), y=y.astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(place):
    loaded = [np.load(path) for path in sorted((place / "run").glob("*.npz"))]
    return (np.concatenate([a[name] for a in loaded]) for name in "xy")


def context(*argv):
    return main(["context", *map(str, argv)])


def refused(capsys, *argv):
    """The one line that a mistake ends with."""
    code = context(*argv)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("ctxlab: error: ")
    assert err.count("\n") == 1
    return err


def test_the_result_is_the_reference_on_all_rows(place, capsys):
    assert context("run", "--out", "mine.npz") == 0
    x, y = rows_of(place)
    with np.load("mine.npz", allow_pickle=False) as a:
        assert_equiv(a["context"], similarity(x, y, max_rows=None), depth=len(x), scale=1.0)
        np.testing.assert_allclose(a["mean_y"], y.mean(axis=0, dtype=np.float64), rtol=1e-6)
        np.testing.assert_allclose(a["std_x"], x.std(axis=0, dtype=np.float64), rtol=1e-5)
        assert (a["count"], a["dim"], a["nonfinite_x"], a["nonfinite_y"]) == (len(x), D, 0, 0)
        assert a["noise_floor"] == 1 / np.sqrt(len(x) - 1)
        about = json.loads(str(a["about"]))
    assert about["ctxlab"] == __version__
    assert [f["bytes"] for f in about["files"]] == [
        p.stat().st_size for p in sorted((place / "run").iterdir())
    ]
    assert (place / "mine.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in place.iterdir()) == ["mine.npz", "mine.png", "run"]
    out = capsys.readouterr().out
    assert f"{len(x):,} in 5 shards" in out
    assert "mine.npz" in out


def test_files_of_x_and_y_are_paired(place):
    for name in "xy":
        (place / name).mkdir()
    for i, path in enumerate(sorted((place / "run").iterdir())):
        with np.load(path) as a:
            np.save(place / f"x/{i}.npy", a["x"])
            np.save(place / f"y/{i}.npy", a["y"])
    assert context("run", "--out", "shards.npz") == 0
    assert context("--x", "x", "--y", "y", "--out", "pairs.npz") == 0
    with np.load("shards.npz") as a, np.load("pairs.npz") as b:
        np.testing.assert_array_equal(a["context"], b["context"])


def test_workers_give_the_same(place):
    assert context("run", "--out", "here.npz") == 0
    assert context("run", "--out", "there.npz", "--workers", "2") == 0
    with np.load("here.npz") as a, np.load("there.npz") as b:
        assert_equiv(b["context"], a["context"], depth=5, scale=1.0)
        assert a["count"] == b["count"]


def test_what_is_not_finite_is_counted(place, capsys):
    with np.load(place / "run/1.npz") as a:
        x, y = a["x"], a["y"]
    x[3, 4], y[5, :2] = np.nan, np.inf
    np.savez(place / "run/1.npz", x=x, y=y)
    assert context("run") == 0
    assert "1 in x, 2 in y" in capsys.readouterr().out
    x, y = rows_of(place)
    with np.load("context.npz") as a:
        assert_equiv(a["context"], similarity(x, y, max_rows=None), depth=len(x), scale=1.0)


def test_a_failing_shard_keeps_what_was_done(place, capsys):
    assert context("run", "--out", "whole.npz") == 0
    sound = (place / "run/3.npz").read_bytes()
    middle = len(sound) * 3 // 4  # among the values of y
    (place / "run/3.npz").write_bytes(sound[:middle] + bytes([sound[middle] ^ 1]) + sound[middle + 1 :])
    capsys.readouterr()
    line = refused(capsys, "run", "--out", "mine.npz")
    assert "3.npz" in line
    assert "--resume" in line
    assert not (place / "mine.npz").exists()
    (place / "run/3.npz").write_bytes(sound)
    assert "exists; resume it" in refused(capsys, "run", "--out", "mine.npz")
    assert context("run", "--out", "mine.npz", "--resume") == 0
    assert not (place / "mine.checkpoint.npz").exists()
    with np.load("whole.npz") as a, np.load("mine.npz") as b:
        np.testing.assert_array_equal(a["context"], b["context"])


def test_an_interruption_keeps_what_was_done_and_an_earlier_result(place, capsys, monkeypatch):
    assert context("run") == 0
    before, plain, calls = (place / "context.npz").read_bytes(), streaming.shard_stats, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(streaming, "shard_stats", interrupted)
    capsys.readouterr()
    assert context("run") == 130
    err = capsys.readouterr().err
    assert err.startswith(
        "ctxlab: interrupted; no result was written; what was done is in context.checkpoint.npz"
    )
    assert err.count("\n") == 1
    assert (place / "context.npz").read_bytes() == before
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert context("run", "--resume") == 0
    with np.load("context.npz") as a:
        assert a["count"] == sum(ROWS + i for i in range(5))


def save(place, **arrays):
    np.savez(place / "bad.npz", **arrays)


def grid(rows=4, width=D, dtype=np.float32):
    return np.zeros((rows, width), dtype)


BAD = {
    "widths": (
        lambda p: save(p, x=grid(width=D + 1), y=grid(width=D + 1)),
        ["run", "bad.npz"],
        "bad.npz: width",
    ),
    "dtypes": (
        lambda p: save(p, x=grid(dtype=float), y=grid(dtype=float)),
        ["run", "bad.npz"],
        "bad.npz: dtype",
    ),
    "rows": (lambda p: save(p, x=grid(), y=grid(5)), ["bad.npz"], "bad.npz: x and y differ in rows: 4 and 5"),
    "no rows": (lambda p: save(p, x=grid(0), y=grid(0)), ["bad.npz"], "bad.npz: 0 rows in all"),
    "missing": (lambda p: None, ["run", "none.npz"], "none.npz: no such file"),
    "cut short": (
        lambda p: (p / "bad.npz").write_bytes((p / "run/0.npz").read_bytes()[:900]),
        ["bad.npz"],
        "bad.npz",
    ),
    "twice": (lambda p: None, ["run", "run/2.npz"], "is named twice"),
    "nothing": (lambda p: None, [], "SHARDS: no files are named"),
    "both ways": (lambda p: None, ["run", "--x", "a.npy", "--y", "b.npy"], "SHARDS: either name shards"),
    "x alone": (lambda p: None, ["--x", "run"], "--y is missing"),
    "memory": (lambda p: None, ["run", "--memory", "1KB"], "needed at least"),
    "no size": (lambda p: None, ["run", "--memory", "lots"], "memory: 'lots'"),
    "out is a folder": (lambda p: None, ["run", "--out", "run"], "--out: run is a folder"),
    "out has no folder": (lambda p: None, ["run", "--out", "no/where.npz"], "--out: no is no folder"),
    "out among the shards": (
        lambda p: None,
        ["run", "--out", "run/context.npz"],
        "would lie among the shards",
    ),
    "out of another kind": (lambda p: None, ["run", "--out", "mine.csv"], "must end in .npz"),
    "nobody there": (lambda p: None, ["run", "--scheduler", "tcp://127.0.0.1:9"], "cannot be reached"),
    "checkpoint of another run": (
        lambda p: np.savez(p / "context.checkpoint.npz", a=grid()),
        ["run", "--resume"],
        "context.checkpoint.npz is damaged, or none of a stream",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_and_writes_nothing(name, place, capsys):
    prepare, argv, says = BAD[name]
    prepare(place)
    before = {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()}
    assert says in refused(capsys, *argv)
    assert {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("argv", [["--workers", "0"], ["--workers", "2", "--scheduler", "tcp://a:1"]])
def test_options_that_cannot_be(argv, place, capsys):
    with pytest.raises(SystemExit) as e:
        context("run", *argv)
    assert e.value.code == 2
    assert "workers" in capsys.readouterr().err


def test_a_picture_shows_the_strongest_of_each_block():
    a = np.zeros((1000, 1000), np.float32)
    a[3, 999], a[999, 0], a[500, 501] = -0.9, 0.8, 0.1
    small = thinned(a, 100)
    assert small.shape == (100, 100)
    assert (small[0, 99], small[99, 0], small[50, 50]) == tuple(np.float32([-0.9, 0.8, 0.1]))
    assert np.count_nonzero(small) == 3
    assert thinned(a[:50, :50], 100).shape == (50, 50)


def test_figures_of_a_matrix():
    f = figures_of(np.array([[0.5, 0.1], [-0.1, 0.5]]), 0.1)
    assert f == {"on": pytest.approx(0.5), "off": pytest.approx(0.1), "beyond": 0.5}
    assert np.isnan(figures_of(np.array([[0.5]]), 0.1)["off"])
