"""The work of `ctxlab context`: what it writes and refuses, and what an early end leaves."""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr
from test_containers import written as written_file

import ctxlab
from ctxlab.cli import main
from ctxlab.data import InputError, load_pairs
from ctxlab.reference import similarity
from ctxlab.streaming import exact, reading, summary
from ctxlab.streaming.null import noise_floor
from ctxlab.streaming.reading import load_stats

DIM, ROWS = 10, (60, 60, 250, 130)
CHECKPOINT = "context.checkpoint.npz"


def parsed(*argv):
    parser = argparse.ArgumentParser(prog="ctxlab")
    exact._add_parser(parser.add_subparsers(dest="command", required=True))
    return parser.parse_args(["context", *map(str, argv)])


def run(*argv):
    return exact._run(parsed(*argv, "--no-progress"))


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((sum(ROWS), DIM)).astype(np.float32) + 4
    y = x @ rng.standard_normal((DIM, DIM)).astype(np.float32)
    y[3, 4], x[499, 1] = np.inf, np.nan
    return x, y


@pytest.fixture
def home(tmp_path, data, monkeypatch):
    """A folder `run` of shards, and the same in other forms; the working folder beside it."""
    monkeypatch.chdir(tmp_path)
    cuts = np.cumsum((0, *ROWS))
    for name in ("run", "x", "y"):
        Path(name).mkdir()
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
        x, y = (m[a:b] for m in data)
        np.savez(f"run/{i}.npz", x=x, y=y)
        np.save(f"x/{i}.npy", x)
        np.save(f"y/{i}.npy", y)
    return tmp_path


def written():
    return sorted(p.name for p in Path().iterdir() if p.name not in ("run", "x", "y"))


def result(path="context.npz"):
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


# --- results ---


def assert_right(got, data):
    x, y = data
    assert got["context"].dtype == x.dtype
    np.testing.assert_allclose(got["context"], similarity(x, y, max_rows=None), atol=1e-5)
    X, Y = (np.where(np.isfinite(a), a, 0).astype(np.float64) for a in data)
    for name, want in dict(
        mean_x=X.mean(0), mean_y=Y.mean(0), std_x=X.std(0), std_y=Y.std(0)
    ).items():
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-6)
    assert got["count"] == len(x)
    assert got["dim"] == x.shape[1]
    assert (got["nonfinite_x"], got["nonfinite_y"]) == (1, 1)
    assert 0.9 < got["effective_rows"] / len(x) < 1.1  # these rows are independent
    assert got["noise_floor"] == pytest.approx(
        noise_floor(int(got["effective_rows"].round())), rel=0.01
    )
    assert got["noise"].shape == got["context"].shape
    assert got["beyond_expected"] == 0.05 * got["context"].size
    r = np.arctanh(got["context"].astype(np.float64))
    assert got["beyond"] == np.count_nonzero(np.abs(r) > 1.96 * got["noise"])


FORMS = {
    "a folder": ["run"],
    "files": [f"run/{i}.npz" for i in range(4)],
    "x and y": ["--x", "x", "--y", "y"],
    "x and y, file by file": [
        *("--x", *(f"x/{i}.npy" for i in range(4))),
        *("--y", *(f"y/{i}.npy" for i in range(4))),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_input(form, home, data, capsys):
    assert run(*FORMS[form]) == 0
    assert written() == ["context.npz", "context.png"]
    got = result()
    assert_right(got, data)
    out, err = capsys.readouterr()
    assert err == ""
    assert "500 in 4 shards" in out
    assert out.splitlines()[-1].startswith("context.npz and context.png")
    assert Path("context.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_workers_give_the_same_result(home, data):
    pytest.importorskip("distributed")
    assert run("run", "--out", "here.npz") == 0
    assert run("run", "--workers", 2, "--out", "there.npz") == 0
    here, there = result("here.npz"), result("there.npz")
    assert np.abs(here["context"] - there["context"]).max() < 1e-6
    assert_right(there, data)
    assert json.loads(str(there["about"]))["settings"]["workers"] == 2
    assert written() == ["here.npz", "here.png", "there.npz", "there.png"]


def test_it_says_where_it_comes_from(home):
    run("run", "--memory", "50MB")
    about = json.loads(str(result()["about"]))
    assert about["ctxlab"] == ctxlab.__version__
    assert about["numpy"] == np.__version__
    assert about["settings"] == dict(
        memory="50MB",
        workers=None,
        scheduler=None,
        resumed=False,
        layer=None,
        nan="zero",
        least_rows=2,
    )
    for i, f in enumerate(about["files"]):
        facts = os.stat(f"run/{i}.npz")
        array = dict(dtype="float32", features=DIM)
        assert f == dict(
            path=str(home / f"run/{i}.npz"),
            bytes=facts.st_size,
            modified_ns=facts.st_mtime_ns,
            rows=ROWS[i],
            arrays=[dict(role="x", key="x") | array, dict(role="y", key="y") | array],
        )
    (process,) = about["kernels"]
    assert process.endswith(f":{os.getpid()}")
    assert about["dtype"] == "float32"


@pytest.mark.slow
def test_pairs_of_files_are_both_named(home):
    run("--x", "x", "--y", "y")
    files = json.loads(str(result()["about"]))["files"]
    assert [Path(f["path"]).name for f in files][:2] == ["0.npy", "0.npy"]
    assert len(files) == 8


def test_float64_and_one_feature(home, capsys):
    x = np.arange(6.0).reshape(6, 1)
    np.savez("one.npz", x=x, y=-x)
    assert run("one.npz") == 0
    got = result()["context"]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, [[np.tanh(-1)]])
    assert "one feature only" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1e100, 1e200])
def test_any_scale(scale, home, capsys):
    x = np.random.default_rng(2).standard_normal((50, 3)) * scale
    np.savez("one.npz", x=x, y=-x)
    assert run("one.npz") == 0
    got = result()
    np.testing.assert_allclose(got["context"].diagonal(), np.tanh(-1), rtol=1e-12)
    np.testing.assert_allclose(got["std_x"] / scale, (x / scale).std(0), rtol=1e-12)
    np.testing.assert_allclose(got["mean_y"] / scale, -(x / scale).mean(0), rtol=1e-9)


@pytest.mark.slow
def test_features_without_variance_are_named(home, capsys):
    x, y = a(50, 6), a(50, 6)
    x[:, 2], x[:, 4], y[:, 0] = 0.1, 0, np.nan
    np.savez("some.npz", x=x, y=y)
    run("some.npz")
    said = "2 in x (2, 4), 1 in y (0)"
    assert f"without variance        {said}\n" in capsys.readouterr().out
    got = result()
    assert got["constant_x"].nonzero()[0].tolist() == [2, 4]
    assert got["constant_y"].nonzero()[0].tolist() == [0]
    run("run", "--force")
    assert "without variance        0 in x, 0 in y\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("layer", [None, 1, 4])
def test_the_packaged_activations(layer, home, capsys):
    path = files("ctxlab") / "assets" / "minilm_alice.npz"
    assert run(path, *(["--layer", layer] if layer else [])) == 0
    pair = load_pairs()[(layer or 1) - 1]
    got = result()
    assert np.abs(got["context"] - similarity(pair.x, pair.y, max_rows=None)).max() < 1e-6
    assert json.loads(str(got["about"]))["settings"]["layer"] == (layer or 1)
    at = layer or 1
    assert f"{at}, from hidden[{at - 1}] to hidden[{at}]" in capsys.readouterr().out


def test_a_run_of_another_layer_does_not_go_on(home):
    hidden = np.random.default_rng(3).standard_normal((4, 900, 5)).astype(np.float16)
    Path("h").mkdir()
    for i in range(3):
        np.savez(f"h/{i}.npz", hidden=hidden)
    good = Path("h/2.npz").read_bytes()
    Path("h/2.npz").write_bytes(good[:1000] + b"?" + good[1001:])
    with pytest.raises(InputError, match="--resume goes on"):
        run("h", "--layer", 2)
    Path("h/2.npz").write_bytes(good)
    with pytest.raises(InputError, match="of another run: of layer 2, here it is 3"):
        run("h", "--layer", 3, "--resume")


def test_a_file_with_itself(home):
    run("--x", "x/0.npy", "--y", "x/0.npy")
    np.testing.assert_allclose(result()["context"].diagonal(), np.tanh(1), rtol=1e-6)


def test_two_folders_pair_by_name(home, data):
    """Whatever the order in which the names sort."""
    for i, name in enumerate(("9", "10", "b", "a")):
        for folder in "xy":
            Path(folder, f"{i}.npy").rename(f"{folder}/{name}.npy")
    run("--x", "x", "--y", "y")
    assert_right(result(), data)


@pytest.mark.slow
def test_files_one_by_one_pair_in_order(home, data):
    for i, name in enumerate(("layer4-0", "layer4-1", "layer4-2", "layer4-3")):
        Path(f"y/{i}.npy").rename(f"y/{name}.npy")
    files = {folder: sorted(map(str, Path(folder).iterdir())) for folder in "xy"}
    run("--x", *files["x"], "--y", *files["y"])
    assert_right(result(), data)
    turned = {folder: names[::-1] for folder, names in files.items()}
    run("--x", *turned["x"], "--y", *turned["y"], "--force")
    assert_right(result(), data)


@pytest.mark.parametrize("name", ["context.npz", "context.png"])
def test_an_earlier_result_stays(name, home):
    Path(name).write_bytes(b"old")
    with pytest.raises(InputError, match=rf"--out: {name} exists; .* --force"):
        run("run")
    assert written() == [name]
    assert Path(name).read_bytes() == b"old"


def test_a_result_that_appears_meanwhile_stays(home, monkeypatch):
    kept = reading._stream

    def slow(*args, **options):
        Path("context.npz").write_bytes(b"of another run")
        return kept(*args, **options)

    monkeypatch.setattr(reading, "_stream", slow)
    with pytest.raises(InputError, match=r"exists; .*; what was done is in .* --resume"):
        run("run")
    assert Path("context.npz").read_bytes() == b"of another run"
    monkeypatch.undo()
    monkeypatch.chdir(home)
    assert run("run", "--resume", "--out", "context.npz", "--force") == 0


def test_an_earlier_result_is_replaced_by_force(home):
    Path("context.npz").write_bytes(b"old")
    Path("context.png").write_bytes(b"old")
    run("run", "--force")
    assert result()["count"] == 500
    assert Path("context.png").read_bytes() != b"old"


# --- arrays of every kind ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.h5", "a.zarr"])
def test_arrays_by_their_names(name, home, data):
    x, y = data
    path = written_file(home / name, **{"in/0": x, "in/1": x[:9], "out/0": y, "out/1": y[:9]})
    run(path, "--x", "in/0", "--y", "out/0")
    assert_right(result(), data)
    run(path, "--x", "in/*", "--y", "out/*", "--out", "both.npz")
    assert result("both.npz")["count"] == 509
    files = json.loads(str(result()["about"]))["files"]
    assert [f["path"] for f in files] == [str(home / name)]
    assert [(a["role"], a["key"], a["dtype"]) for a in files[0]["arrays"]] == [
        ("x", "in/0", "float32"),
        ("y", "out/0", "float32"),
    ]
    run(path, "--x", "in/0", "--y", "in/0", "--out", "self.npz")
    np.testing.assert_allclose(result("self.npz")["context"].diagonal(), np.tanh(1), rtol=1e-6)


@pytest.mark.slow
def test_two_widths_in_batches_of_bfloat16(home):
    rng = np.random.default_rng(5)
    x, y = (rng.standard_normal((4, 50, d)).astype(ml_dtypes.bfloat16) for d in (6, 3))
    written_file(home / "a.safetensors", x=x, y=y)
    np.save("x.npy", x)
    np.save("y.npy", y)
    run("a.safetensors")
    want = np.corrcoef(*(a.reshape(200, -1).astype(float).T for a in (x, y)))[:6, 6:]
    np.testing.assert_allclose(result()["context"], np.tanh(want), atol=1e-6)
    about = json.loads(str(result()["about"]))
    assert [a["features"] for a in about["files"][0]["arrays"]] == [6, 3]
    assert [a["dtype"] for a in about["files"][0]["arrays"]] == ["bfloat16"] * 2
    run("--x", "x.npy", "--y", "y.npy", "--bfloat16", "--out", "npy.npz")
    np.testing.assert_array_equal(result("npy.npz")["context"], result()["context"])


TWO_WORKERS = pytest.param(["--workers", 2], marks=pytest.mark.thorough)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], TWO_WORKERS])
def test_several_layers_in_one_run(workers, home, capsys):
    if workers:
        pytest.importorskip("distributed")
    hidden = np.random.default_rng(6).standard_normal((4, 300, DIM)).astype(np.float16)
    Path("h").mkdir()
    for i in range(3):
        np.savez(f"h/{i}.npz", hidden=hidden[:, 100 * i : 100 * i + 100])
    assert run("h", "--layers", "3,1", *workers, "--out", "c.npz") == 0
    assert written() == ["c-layer1.npz", "c-layer1.png", "c-layer3.npz", "c-layer3.png", "h"]
    for layer in (1, 3):
        x, y = hidden[layer - 1 : layer + 1].astype(np.float32)
        got = result(f"c-layer{layer}.npz")
        np.testing.assert_allclose(got["context"], similarity(x, y, max_rows=None), atol=1e-6)
        about = json.loads(str(got["about"]))
        assert about["settings"]["layer"] == layer
        assert len(about["files"]) == 3
        assert about["kernels"]
    assert "from hidden[2] to hidden[3]" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"c-layer1\.npz exists"):
        run("h", "--layers", "all", "--out", "c.npz")
    Path("c-layer3.checkpoint.npz").touch()
    with pytest.raises(InputError, match=r"c-layer3\.checkpoint\.npz exists; remove it first"):
        run("h", "--layers", "all", "--force", "--out", "c.npz")
    Path("c-layer3.checkpoint.npz").unlink()
    assert run("h", "--layers", "all", "--force", "--out", "c.npz") == 0
    assert Path("c-layer2.npz").exists()


@pytest.mark.slow
def test_layers_that_are_interrupted_go_on(home):
    hidden = np.random.default_rng(7).standard_normal((3, 900, 5)).astype(np.float16)
    Path("h").mkdir()
    for i in range(3):
        np.savez(f"h/{i}.npz", hidden=hidden)
    good = Path("h/2.npz").read_bytes()
    Path("h/2.npz").write_bytes(good[:1000] + b"?" + good[1001:])
    with pytest.raises(InputError, match=r"h/2\.npz.*--resume goes on"):
        run("h", "--layers", "all")
    assert written() == [CHECKPOINT, "h"]
    Path("h/2.npz").write_bytes(good)
    assert run("h", "--layers", "all", "--resume") == 0
    assert result("context-layer2.npz")["count"] == 2700
    assert CHECKPOINT not in written()


@pytest.mark.slow
def test_patterns_in_quotes(home, data):
    run("run/[0-9].npz")
    assert_right(result(), data)
    run("--x", "x/*.npy", "--y", "y/*.npy", "--force")
    assert_right(result(), data)


# --- the table and the picture ---


def made(r, floor=0.1):
    """A result with these correlations."""
    context = np.tanh(np.asarray(r))
    noise = np.full(context.shape, floor)
    f = summary._figures_of(context, noise)
    numbers = dict(count=5, effective_rows=5.0, noise_floor=floor, beyond=f["beyond"])
    return dict(context=context, noise=noise, beyond_expected=0.05 * f["pairs"]) | numbers


def test_figures_by_hand():
    arrays = made([[0.3, 0.0], [-0.4, 0.1]])
    f = summary._figures_of(arrays["context"], arrays["noise"])
    assert f == pytest.approx(dict(pairs=4, beyond=2, on=0.05**0.5, off=0.08**0.5))
    arrays["noise"][1] = 0
    arrays["context"][1] = 0
    f = summary._figures_of(arrays["context"], arrays["noise"])
    assert f == pytest.approx(dict(pairs=2, beyond=1, on=0.3, off=0.0))
    arrays = made([[0.3, 0.0, 0.4]])
    f = summary._figures_of(arrays["context"], arrays["noise"])
    assert f == pytest.approx(
        dict(pairs=3, beyond=2, on=np.nan, off=(0.25 / 3) ** 0.5), nan_ok=True
    )


@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (300, 300), (1, 40), (700, 3)])
@pytest.mark.parametrize("top", [1, 7])
def test_the_strongest_pairs(shape, top):
    r = np.random.default_rng(5).uniform(-0.9, 0.9, shape)
    arrays = made(r)
    tables = summary._strongest(arrays["context"], arrays["noise"], top)
    square = shape[0] == shape[1] > 1
    assert list(tables) == (["off the diagonal", "on the diagonal"] if square else ["all"])
    for name, rows in tables.items():
        size = np.abs(r)
        if square:
            eye = np.eye(len(r), dtype=bool)
            size = np.where(eye == name.startswith("on"), size, -1)
        want = np.sort(size[size >= 0])[::-1][:top]
        np.testing.assert_allclose([abs(v) for *_, v, _ in rows], want)
        for i, j, value, floors in rows:
            assert value == pytest.approx(r[i, j])
            assert floors == pytest.approx(10 * r[i, j])
    assert str(rows[0][0]) in summary._table(tables)


def test_what_has_no_variance_is_not_listed():
    arrays = made(np.zeros((4, 4)))
    arrays["noise"][:, 1:] = 0
    tables = summary._strongest(arrays["context"], arrays["noise"], 9)
    assert [len(rows) for rows in tables.values()] == [3, 1]


@pytest.mark.parametrize(
    ("shape", "dots"), [((1, 1), 512), ((7, 7), 3), ((9, 5), 3), ((100, 41), 7), ((3, 600), 50)]
)
def test_a_dot_is_what_the_strongest_of_its_block_is_worth(shape, dots):
    r = np.random.default_rng(shape[0]).standard_normal(shape) * 0.1
    got = summary._thinned(np.tanh(r), np.full(shape, 0.1), dots)
    steps = [-(-n // dots) for n in shape]
    assert max(got.shape) <= dots
    for (i, j), value in np.ndenumerate(got):
        block = r[i * steps[0] : (i + 1) * steps[0], j * steps[1] : (j + 1) * steps[1]] / 0.1
        z = block.flat[np.argmax(np.abs(block))]
        assert value == pytest.approx(summary._worth(z, np.array(block.size)).item())


def test_noise_looks_like_noise_at_every_size():
    rng = np.random.default_rng(6)
    for m in (1, 4, 36, 1000):
        z = np.abs(rng.standard_normal((4000, m))).max(axis=1)
        worth = summary._worth(z, np.array(m))
        assert abs(np.mean(worth > 1.96) - 0.05) < 0.012
        assert abs(np.mean(worth > 1) - 0.317) < 0.03
        assert np.median(z) == pytest.approx(summary._largest_of(m), rel=0.03)
        assert np.all(worth <= z + 1e-9)
    many = 2.0 * np.log(1e12)
    assert summary._largest_of(1e12) == pytest.approx(many**0.5, rel=0.05)


def test_a_strong_entry_stays_strong():
    z = np.array([-5.0, 10, 38, 500, 1e6])
    worth = summary._worth(z, np.array(100))
    assert np.array_equal(np.sign(worth), np.sign(z))
    assert np.all(np.diff(np.abs(worth)) > 0)
    np.testing.assert_allclose(worth[1:], np.sqrt(z[1:] ** 2 - 2 * np.log(100)), rtol=0.01)
    assert summary._worth(np.zeros(1), np.zeros(1))[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "r",
    [np.zeros((3, 3)), np.ones((1, 1)), np.eye(1200), np.zeros((2, 90)), np.ones((1500, 3)) * 0.9],
)
def test_pictures_of_extremes(r):
    arrays = made(r)
    assert summary._picture(arrays).startswith(b"\x89PNG")
    arrays["noise"][:] = 0
    assert summary._picture(arrays, top=0).startswith(b"\x89PNG")


def test_a_picture_leaves_the_plotting_state_alone():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    summary._picture(made(np.eye(4)))
    assert dict(mpl.rcParams) == before


@pytest.mark.slow
def test_a_picture_in_a_new_process():
    code = (
        "import numpy as np; from ctxlab.streaming import ContextStats, summary; "
        "s = ContextStats(3); s.update(*np.random.default_rng(0).random((2, 9, 3), np.float32)); "
        "print(len(summary._picture(summary._result_arrays(s, {}))) > 1000)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "True\n"


# --- what counts, and what is shown ---


def test_noise_that_remembers_is_told_to_be_noise(home, capsys):
    rng = np.random.default_rng(7)
    for i in range(3):
        x, y = rng.standard_normal((2, 900, 60), dtype=np.float32)
        for t in range(1, 900):
            x[t] += np.float32(0.9) * x[t - 1]
            y[t] += np.float32(0.9) * y[t - 1]
        np.savez(f"slow{i}.npz", x=x, y=y)
    assert run(*(f"slow{i}.npz" for i in range(3))) == 0
    got = result()
    assert 200 < got["effective_rows"] < 400  # of 2,700
    assert 0.6 < got["beyond"] / got["beyond_expected"] < 1.4
    assert "by chance 180" in capsys.readouterr().out


@pytest.mark.parametrize("top", [0, 3])
def test_the_strongest_are_listed(top, home, capsys):
    run("run", "--top", top)
    out = capsys.readouterr().out
    assert ("strongest pairs" in out) == bool(top)
    assert out.count("+0.") + out.count("-0.") == 2 * top


@pytest.mark.slow
@pytest.mark.parametrize("workers", [None, pytest.param(2, marks=pytest.mark.thorough)])
def test_rows_left_out(workers, home, data, capsys):
    if workers:
        pytest.importorskip("distributed")
    run("run", "--nan", "rows", *(["--workers", workers] if workers else []))
    got = result()
    keep = np.isfinite(data[0]).all(1) & np.isfinite(data[1]).all(1)
    want = similarity(data[0][keep], data[1][keep], max_rows=None)
    np.testing.assert_allclose(got["context"], want, atol=1e-5)
    assert (got["count"], got["dropped"]) == (498, 2)
    assert "rows left out           2\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("workers", [None, pytest.param(2, marks=pytest.mark.thorough)])
def test_complete_pairs(workers, home, data, capsys):
    if workers:
        pytest.importorskip("distributed")
    run("run", "--nan", "pairs", *(["--workers", workers] if workers else []))
    got = result()
    x, y = data
    n = np.isfinite(x).astype(int).T @ np.isfinite(y)
    assert np.array_equal(got["pair_rows"], n)
    for i, j in ((0, 0), (1, 4), (1, 0), (9, 4)):
        both = np.isfinite(x[:, i]) & np.isfinite(y[:, j])
        want = np.tanh(np.corrcoef(x[both, i], y[both, j])[0, 1])
        assert abs(got["context"][i, j] - want) < 1e-5
    assert (got["count"], got["dropped"]) == (500, 0)
    out = capsys.readouterr().out
    assert "rows of a pair          498 to 500\n" in out
    assert "0 of fewer than 2, which are 0" in out


@pytest.mark.slow
def test_pairs_of_few_rows_are_0(home, data, capsys):
    run("run", "--nan", "pairs", "--least-rows", 499)
    got = result()
    assert (
        np.argwhere(got["context"] == 0).tolist()
        == [[1, 4]]
        == np.argwhere(got["noise"] == 0).tolist()
    )
    assert "1 of fewer than 499" in capsys.readouterr().out
    assert json.loads(str(got["about"]))["settings"]["least_rows"] == 499
    with pytest.raises(InputError, match=r"^--least-rows: 500 of 500 rows are complete; .* 501"):
        run("run", "--force", "--least-rows", 501)
    Path(CHECKPOINT).unlink()
    x = a(40)
    x[::2, ::2], x[1::2, 1::2] = np.nan, np.nan
    np.savez("apart.npz", x=x, y=np.roll(x, 1, axis=1)[:, ::2])
    with pytest.raises(InputError, match=r"^--nan: no pair of features has 21 rows"):
        run("apart.npz", "--out", "b.npz", "--nan", "pairs", "--least-rows", 21)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [None, pytest.param(2, marks=pytest.mark.thorough)])
def test_what_is_not_finite_is_refused_with_its_file(workers, home):
    if workers:
        pytest.importorskip("distributed")
    with pytest.raises(InputError, match=r"^run/0.npz: y: row 3 of this chunk holds|0.npz: y: row"):
        run("run", "--nan", "refuse", *(["--workers", workers] if workers else []))


def test_nothing_but_nan(home):
    np.savez("none.npz", x=np.full((9, 3), np.nan, np.float32), y=a(9, 3))
    with pytest.raises(InputError, match=r"^x: no feature has any variance"):
        run("none.npz", "--out", "a.npz")
    with pytest.raises(InputError, match=r"^--nan: 0 of 9 rows are complete"):
        run("none.npz", "--out", "b.npz", "--nan", "rows")
    for nan in ("zero", "pairs"):
        np.savez("none.npz", x=a(9), y=np.full((9, 3), np.nan, np.float32))
        with pytest.raises(InputError, match=r"^y: no feature has any variance") as e:
            run("none.npz", "--out", f"{nan}.npz", "--nan", nan)
        assert "\n" not in str(e.value)
        assert not Path(f"{nan}.npz").exists()


def test_another_rule_does_not_go_on(home):
    good = Path("run/3.npz").read_bytes()
    Path("run/3.npz").write_bytes(good[:200] + b"?" + good[201:])
    with pytest.raises(InputError):
        run("run")
    Path("run/3.npz").write_bytes(good)
    with pytest.raises(InputError, match=r"checkpoint: .* is of another run .*nan"):
        run("run", "--resume", "--nan", "rows")


# --- mistakes ---


def spoil(**arrays):
    np.savez("bad.npz", **arrays)


def spoil_folders(name):
    for folder in ("x", "y"):
        Path(folder, name).write_bytes(b"Mac OS X")


def a(n, dim=DIM, dtype=np.float32):
    return np.random.default_rng(1).standard_normal((n, dim)).astype(dtype)


def keyed(keys):
    """Three files, whose arrays have these names."""
    for i, key in enumerate(keys):
        np.savez(f"part{i}.npz", **{key: a(9), "mlp": a(9)})


def chunked():
    group = zarr.open_group("big.zarr", mode="w")
    for key in "xy":
        group.create_array(key, shape=(40_000, 16), dtype="f4", chunks=(40_000, 16))


MISTAKES = {  # arguments, how to prepare, what the message holds
    "nothing": ([], None, "no files are named"),
    "both forms": (["run", "--x", "x", "--y", "y"], None, "not both"),
    "both forms, halved": (["run", "--x", "x"], None, "not both"),
    "x alone": (["--x", "x"], None, "--y is missing"),
    "y alone": (["--y", "x"], None, "--x is missing"),
    "a folder and a file": (["--x", "x", "--y", "y/0.npy"], None, "is a folder and"),
    "fewer y": (
        ["--x", "x/0.npy", "x/1.npy", "--y", "y/0.npy"],
        None,
        "--y: 1 names, --x has 2",
    ),
    "a file alone": (
        ["--x", "x", "--y", "y"],
        lambda: Path("y/2.npy").unlink(),
        "x has 2.npy without a partner",
    ),
    "other names": (
        ["--x", "x", "--y", "y"],
        lambda: Path("y/2.npy").rename("y/02.npy"),
        "x has 2.npy and y has 02.npy without a partner",
    ),
    "names that sort otherwise": (
        ["--x", "x/10.npy", "x/2.npy", "--y", "y/002.npy", "y/010.npy"],
        lambda: [
            Path("x/1.npy").rename("x/10.npy"),
            *(Path(f"y/{i}.npy").rename(f"y/{j}.npy") for i, j in ((1, "010"), (2, "002"))),
        ],
        "x/2.npy would be paired with y/010.npy",
    ),
    "a folder in a folder": (
        ["--x", "x", "--y", "y"],
        lambda: (Path("x/more").mkdir(), np.save("x/more/0.npy", a(5))),
        "x/more: is a folder of data inside x",
    ),
    "of macOS": (["--x", "x", "--y", "y"], lambda: spoil_folders("._0.npy"), "is what macOS"),
    "a layer of x and y": (["run", "--layer", "1"], None, "has arrays 'x' and 'y'"),
    "no such layer": (
        ["bad.npz", "--layer", "2"],
        lambda: np.savez("bad.npz", hidden=np.ones((2, 5, 3), "f")),
        "there is no layer 2; it has 1 to 1",
    ),
    "no data": (
        ["--x", "empty", "--y", "y"],
        lambda: Path("empty").mkdir(),
        "the folder empty holds no data file",
    ),
    "names that do not pair": (["--x", "run", "--y", "y"], None, "run has 0.npz and y has 0.npy"),
    "text as x": (
        ["--x", "a.txt", "--y", "y/0.npy"],
        lambda: Path("a.txt").touch(),
        "a.txt is none of .npy, .npz",
    ),
    "names of nothing": (["run", "--x", "q", "--y", "x"], None, "--y: x is a path"),
    "names that are not there": (
        ["run", "--x", "q", "--y", "z"],
        None,
        "run/0.npz: there is no array 'q'; found x, y",
    ),
    "two names": (["run", "--x", "q", "r", "--y", "z"], None, "each name one array"),
    "no file fits": (["run/q*"], None, "run/q*: no file fits this pattern"),
    "layers of x and y": (["run", "--layers", "1,2"], None, "has arrays 'x' and 'y'"),
    "a header that lies": (
        ["bad.safetensors"],
        lambda: Path("bad.safetensors").write_bytes(b"\x02" + bytes(7) + b"{]"),
        "bad.safetensors: cannot be read",
    ),
    "a header with more rows than numbers": (
        ["bad.safetensors"],
        lambda: Path("bad.safetensors").write_bytes(
            (b'{"x":{"dtype":"F32","shape":[9,9],"data_offsets":[0,8]}}').join(
                ((55).to_bytes(8, "little"), bytes(8))
            )
        ),
        "bad.safetensors: cannot be read",
    ),
    "a key that the third file has not": (
        ["part0.npz", "part1.npz", "part2.npz", "--x", "resid", "--y", "mlp"],
        lambda: keyed(["resid", "resid", "residual"]),
        "part2.npz: there is no array 'resid'; found residual, mlp",
    ),
    "a pattern that fits nothing in the third file": (
        ["part0.npz", "part1.npz", "part2.npz", "--x", "resid*", "--y", "mlp*"],
        lambda: keyed(["resid", "resid", "other"]),
        "part2.npz: no array fits 'resid*'; found other, mlp",
    ),
    "layers of other widths": (
        ["bad0.npz", "bad1.npz", "--layers", "all"],
        lambda: [np.savez(f"bad{i}.npz", hidden=np.ones((3, 5, 4 + i), "f")) for i in range(2)],
        "bad1.npz, hidden: width 5, that of bad0.npz, hidden is 4",
    ),
    "two dtypes in one run": (
        ["run", "bad.npz"],
        lambda: spoil(x=a(5).astype(">f8"), y=a(5, dtype=np.float64)),
        "bad.npz, x: dtype float64, that of run/0.npz, x is float32",
    ),
    "chunks larger than the budget": (
        ["big.zarr", "--memory", "20MB"],
        chunked,
        "bytes for chunks of big.zarr, x; needed at least",
    ),
    "one row in batches": (["bad.npz"], lambda: spoil(x=a(1)[None], y=a(1)[None]), "1 rows in all"),
    "bfloat16 unsaid": (
        ["bad.npz"],
        lambda: spoil(x=a(5).astype(ml_dtypes.bfloat16), y=a(5)),
        "if it holds bfloat16, say so (--bfloat16)",
    ),
    "read-only": (
        ["run", "--force"],
        lambda: (Path("context.npz").touch(), Path("context.npz").chmod(0o400)),
        "read-only",
    ),
    "missing": (["none.npz"], None, "none.npz: no such file"),
    "missing x": (["--x", "none.npy", "--y", "y/0.npy"], None, "none.npy: no such file"),
    "empty folder": (["empty"], lambda: Path("empty").mkdir(), "the folder holds no"),
    "twice": (["run", "run/2.npz"], None, "run/2.npz: is named twice"),
    "rows differ": (
        ["bad.npz"],
        lambda: spoil(x=a(5), y=a(6)),
        "bad.npz, x: x and y differ in rows",
    ),
    "widths of shards": (
        ["run", "bad.npz"],
        lambda: spoil(x=a(5, 9), y=a(5, 9)),
        "bad.npz, x: width 9, that of run/0.npz, x is 10",
    ),
    "dtypes of shards": (
        ["run", "bad.npz"],
        lambda: spoil(x=a(5, dtype=np.float64), y=a(5, dtype=np.float64)),
        "bad.npz, x: dtype float64, that of run/0.npz, x is float32",
    ),
    "no rows": (["bad.npz"], lambda: spoil(x=a(0), y=a(0)), "0 rows in all"),
    "one row": (["bad.npz"], lambda: spoil(x=a(1), y=a(1)), "1 rows in all"),
    "text": (["bad.npz"], lambda: Path("bad.npz").write_text("hello"), "bad.npz: cannot be read"),
    "little memory": (["run", "--memory", "1MB"], None, "needed at least"),
    "little for workers": (
        ["run", "--memory", "3MB", "--workers", "4"],
        None,
        "on 4 workers; needed",
    ),
    "no size": (["run", "--memory", "lots"], None, "memory: 'lots' is no size"),
    "out is a folder": (["run", "--out", "x"], None, "--out: x is a folder"),
    "out is no npz": (["run", "--out", "context.png"], None, "must end in .npz"),
    "out in no folder": (["run", "--out", "no/context.npz"], None, "--out: no is no folder"),
    "out in a file": (["run", "--out", "run/0.npz/context.npz"], None, "is no folder"),
    "out among shards": (["run", "--out", "run/context.npz"], None, "would lie among the shards"),
    "out is a shard": (
        ["run/0.npz", "run/1.npz", "--out", "run/1.npz", "--force"],
        None,
        "1.npz is one of the shards",
    ),
    "a shard as checkpoint": (
        ["c.checkpoint.npz", "--out", "c.npz", "--resume"],
        lambda: Path("run/0.npz").rename("c.checkpoint.npz"),
        "is one of the shards",
    ),
    "a folder for a picture": (
        ["run"],
        lambda: Path("context.png").mkdir(),
        "context.png is a folder",
    ),
    "a folder for a checkpoint": (
        ["run"],
        lambda: Path(CHECKPOINT).mkdir(),
        f"{CHECKPOINT} is a folder",
    ),
    "an unreadable place": (["run", "--out", "/proc/context.npz"], None, "cannot be written"),
    "damaged checkpoint": (
        ["run", "--resume"],
        lambda: Path(CHECKPOINT).write_text("?"),
        "is damaged",
    ),
    "unexpected checkpoint": (
        ["run"],
        lambda: Path(CHECKPOINT).write_text("?"),
        "exists; resume it",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes(what, home, capsys):
    if what == "read-only" and os.geteuid() == 0:
        pytest.skip("the superuser writes everywhere")
    if what == "an unreadable place" and sys.platform != "linux":
        pytest.skip("needs /proc")
    argv, prepare, said = MISTAKES[what]
    if prepare:
        prepare()
    shards = {p: p.read_bytes() for p in Path("run").iterdir()}
    before = written()
    with pytest.raises((InputError, OSError)) as e:
        run(*argv)
    assert said in str(e.value)
    assert "\n" not in str(e.value)
    assert written() == before
    assert {p: p.read_bytes() for p in Path("run").iterdir()} == shards
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer(home):
    pytest.importorskip("distributed")
    with pytest.raises(
        InputError, match=r"scheduler: tcp://127\.0\.0\.1:9 cannot be reached within 5 s"
    ):
        run("run", "--scheduler", "tcp://127.0.0.1:9")
    assert written() == []


def test_without_dask(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install 'ctxlab\[distributed\]'"):
        run("run", "--workers", 2)


@pytest.mark.parametrize(
    "words",
    ["--workers 0", "--workers two", "--workers 2 --scheduler tcp://a:1", "--memory", "--null 3"],
)
def test_a_wrong_command_line(words, capsys):
    with pytest.raises(SystemExit) as e:
        parsed("run", *words.split())
    assert e.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    parser = exact._add_parser(argparse.ArgumentParser().add_subparsers())
    for action in parser._actions:
        assert action.help
        assert all(option in text for option in action.option_strings)
    assert "examples:" in text


# --- runs that end early ---


def break_shard(i):
    """Change a byte of the data, but neither size nor header; returns the way back."""
    # In a small shard that would show when it is listed: reading the header reads it whole.
    path = Path(f"run/{i}.npz")
    good = path.read_bytes()
    bad = bytearray(good)
    bad[len(good) // 4] ^= 1
    path.write_bytes(bad)
    return lambda: path.write_bytes(good)


def straight(home):
    run("run", "--out", "straight.npz")
    got = result("straight.npz")
    Path("straight.npz").unlink()
    Path("straight.png").unlink()
    return got


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["--workers", 1]])
def test_work_done_is_kept_and_resumed(workers, home):
    if workers:
        pytest.importorskip("distributed")
    want = straight(home)
    Path("context.npz").write_bytes(b"old")
    mend = break_shard(2)
    with pytest.raises(
        InputError, match=r"run/2\.npz: .*; what was done is in .*, and --resume"
    ) as e:
        run("run", "--force", *workers)
    assert "\n" not in str(e.value)
    assert written() == [CHECKPOINT, "context.npz"]
    assert Path("context.npz").read_bytes() == b"old"
    assert load_stats(CHECKPOINT, DIM).count == sum(ROWS[:2])
    mend()
    with pytest.raises(InputError, match=r"exists; resume it, or remove it first$"):
        run("run", "--force", *workers)
    assert run("run", "--force", "--resume", *workers) == 0
    assert written() == ["context.npz", "context.png"]
    got = result()
    if workers:  # they have one thread of BLAS, and may round otherwise
        assert np.abs(got["context"] - want["context"]).max() < 1e-6
    else:
        np.testing.assert_array_equal(got["context"], want["context"])
    assert json.loads(str(got["about"]))["settings"]["resumed"] is True


def test_an_error_in_the_first_shard_leaves_nothing(home):
    break_shard(0)
    with pytest.raises(InputError, match=r"run/0\.npz") as e:
        run("run")
    assert "--resume" not in str(e.value)
    assert written() == []


def test_checkpoints_of_other_runs(home):
    break_shard(2)
    with pytest.raises(InputError):
        run("run")
    kept = Path(CHECKPOINT).read_bytes()
    with pytest.raises(InputError, match="of another run"):
        run("run/1.npz", "run/3.npz", "--resume")
    facts = os.stat("run/0.npz")
    os.utime("run/0.npz", ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))
    with pytest.raises(InputError, match="has changed since it went into the checkpoint"):
        run("run", "--resume")
    assert Path(CHECKPOINT).read_bytes() == kept


def test_a_failure_while_writing_keeps_everything(home, monkeypatch):
    Path("context.npz").write_bytes(b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(summary, "_picture", full)
    with pytest.raises(
        (InputError, OSError), match=r"No space left on device; .* --resume goes on"
    ):
        run("run", "--force")
    assert Path("context.npz").read_bytes() == b"old"
    assert written() == [CHECKPOINT, "context.npz"]
    monkeypatch.undo()
    monkeypatch.chdir(home)
    assert run("run", "--resume", "--force") == 0


SCRIPT = """if True:
    import argparse, sys
    from ctxlab.streaming import exact, reading
    kept = reading.shard_stats
    def held(shard, *args, **options):
        if shard.name == '2.npz':
            import pathlib, time
            pathlib.Path('reached').touch()
            while True: time.sleep(0.05)
        return kept(shard, *args, **options)
    def main():
        p = argparse.ArgumentParser()
        exact._add_parser(p.add_subparsers(dest='command'))
        try: return exact._run(p.parse_args(['context', *sys.argv[1:]]))
        except KeyboardInterrupt as e: print('interrupted;', e, file=sys.stderr); return 130
    if __name__ == '__main__': # in the processes of workers the file is loaded under another name
        reading.shard_stats = held
        merge, merged = reading.ContextStats.merge, []
        def counted(self, other):
            merge(self, other)
            merged.append(open(f'merged{len(merged)}', 'w').close())
        reading.ContextStats.merge = counted
        sys.exit(main())
    import ctxlab.streaming.distributed
    ctxlab.streaming.distributed.shard_stats = held
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize("workers", [[], ["--workers", "2"]])
def test_ctrl_c_keeps_what_was_done(workers, home):
    if workers:
        pytest.importorskip("distributed")
    Path("script.py").write_text(SCRIPT)
    argv = [sys.executable, "script.py", "run", *workers]
    previous = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # children inherit what is ignored
    try:
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, previous)
    with process:
        deadline = time.monotonic() + 60
        while not (Path("reached").exists() and Path("merged1").exists()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert err == (
        f"interrupted; no result was written; what was done is in {CHECKPOINT}, "
        "and --resume goes on from there\n"
    )
    assert load_stats(CHECKPOINT, DIM).count == sum(ROWS[:2])
    assert run("run", "--resume") == 0
    assert CHECKPOINT not in written()


# --- as a command ---


@pytest.mark.slow
def test_the_command_writes_a_result(home, data, capsys):
    assert main(["context", "run", "--out", "mine.npz"]) == 0
    assert_right(result("mine.npz"), data)
    out, err = capsys.readouterr()
    assert "mine.npz and mine.png" in out
    assert err == ""


@pytest.mark.parametrize(
    "argv", [["no.npz"], ["run", "--memory", "1KB"], ["run", "--scheduler", "nowhere"]]
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, home, capsys):
    assert main(["context", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ctxlab: error: ")
    assert err.count("\n") == 1
    assert written() == []


def test_an_interruption_is_one_line_and_exit_code_130(home, capsys, monkeypatch):
    kept = reading.shard_stats

    def interrupted(shard, *args, **options):
        if shard.name == "2.npz":
            raise KeyboardInterrupt
        return kept(shard, *args, **options)

    Path("context.npz").write_bytes(b"old")
    monkeypatch.setattr(reading, "shard_stats", interrupted)
    assert main(["context", "run", "--force"]) == 130
    out, err = capsys.readouterr()
    assert (out, Path("context.npz").read_bytes()) == ("", b"old")
    assert err == (
        f"ctxlab: interrupted; no result was written; what was done is in {CHECKPOINT}, "
        "and --resume goes on from there\n"
    )


# --- as a library ---


def test_the_parser_is_light():
    script = (
        "import argparse, sys; from ctxlab.streaming import exact; "
        "exact._add_parser(argparse.ArgumentParser().add_subparsers()); "
        "print({'numpy', 'dask', 'matplotlib', 'tqdm', 'threadpoolctl'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
