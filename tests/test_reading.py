"""Shards, budgets, memory, interruption and resumption."""

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

import h5py
import ml_dtypes
import numpy as np
import pytest
import zarr
from conftest import DTYPES
from test_containers import FORMS, written
from test_moments import assert_exact, related, same, stats_of

from ctxlab.data import InputError
from ctxlab.streaming import reading as module
from ctxlab.streaming.moments import _SUB_ROWS, ContextStats
from ctxlab.streaming.reading import (
    _chunk_rows,
    _parse_bytes,
    load_stats,
    save_stats,
    shard_stats,
    shards,
    stream,
)
from ctxlab.witness import traced_peak

pytestmark = pytest.mark.usefixtures("one_thread")


# --- sizes ---


def test_parse_bytes():
    assert _parse_bytes("1.5GiB") == 3 * 2**29
    assert _parse_bytes("2GB") == 2 * 10**9
    assert _parse_bytes(np.int64(5)) == 5
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
            _parse_bytes(bad)
    for bad in (None, 1.0, True, [1]):
        with pytest.raises(TypeError, match="memory"):
            _parse_bytes(bad)


@pytest.mark.parametrize("nan", ["zero", "pairs"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 64, 768, 4096])
def test_chunk_rows_states_the_least(dim, dtype, nan):
    with pytest.raises(ValueError, match="needed at least") as e:
        _chunk_rows(1000, dim, dtype, nan=nan)
    assert ("with nan='pairs'" in str(e.value)) == (nan == "pairs")
    least = int(str(e.value).split("at least ")[1].split()[0])
    assert _chunk_rows(least, dim, dtype, nan=nan) == 256
    with pytest.raises(ValueError, match=str(least)):
        _chunk_rows(least - 1, dim, dtype, nan=nan)
    assert _chunk_rows("1TB", dim, dtype, nan=nan) == _SUB_ROWS


@pytest.mark.parametrize("nan", ["zero", "pairs"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 64, 768, (3, 500)])
def test_what_is_held_is_what_is_counted(dim, dtype, nan):
    stats = ContextStats(dim, dtype, nan=nan)
    held = 2 * (stats.nbytes - stats.workspace.nbytes)
    assert held <= module._sums_bytes(dim, nan) < held * 1.5 + 100
    x, y = (np.ones((2000, d), dtype) for d in stats._cross.shape)
    x[3, 0] = np.nan  # so that one panel is done in float64
    stats.update(x, y)
    counted = module._fixed_bytes(dim, dtype, nan) - module._sums_bytes(dim, nan)
    assert stats.workspace.nbytes <= counted - module._SPARE


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
    "another width": (OK, OK[:, 1:], "width"),
    "integers": (OK.astype(int), OK, "int64"),
    "long double": (OK.astype(np.longdouble), OK, "needed float16, bfloat16, float32 or float64"),
    "vector": (OK[0], OK, "shape"),
    "four dimensions": (OK[None, None], OK, "shape"),
    "no features": (OK[:, :0], OK[:, :0], "no features"),
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
        got = stream(listed, memory="5MB")
        assert_exact(got, x.astype(as_read), y.astype(as_read))
        if layer == 1:
            assert same(stream(shards(paths), memory="5MB"), got)


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
        ("f.x.npy", 2, "x and y are two arrays; a layer is one of a single array"),
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
    npy_by_hand(path, OK, version, fortran)
    assert_exact(shard_stats(shards([(path, path)])[0], MEMORY), OK, OK)


@pytest.mark.parametrize(("every", "saved"), [(1, 6), (2, 3), (4, 2), (5, 2), (9, 1)])
def test_a_checkpoint_every_few_shards(folder, tmp_path, monkeypatch, every, saved):
    counts, save = [], module.save_stats

    def noted(path, stats, done, kernels):
        counts.append(len(done))
        save(path, stats, done, kernels)

    monkeypatch.setattr(module, "save_stats", noted)
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
    with pytest.raises(InputError, match=r"needed a pair of files; known are \.npy, \.npz"):
        shards([(folder / "1.npz", folder / "2.txt")])


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

SHARD_STATS = module.shard_stats


def failing(monkeypatch, at, error):
    """`shard_stats` that raises at the shard with this number, after it has read some rows."""
    seen = []

    def stats(shard, *args, stats, tick=None):
        seen.append(shard)
        if len(seen) == at:
            SHARD_STATS(shard, *args, stats=stats)
            raise error
        return SHARD_STATS(shard, *args, stats=stats, tick=tick)

    monkeypatch.setattr(module, "shard_stats", stats)


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
    "format": (lambda about: about | {"format": "ctxlab.streaming.moments 1"}, "its format is"),
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
        lambda about: about | {"done": [["a", "b", [[1, 2], [3, 4]], ["x", "y"], 0]]},
        "is damaged, or none of a stream",
    ),
    "another layer": (
        lambda about: about | {"done": [[*d[:4], 2] for d in about["done"]]},
        "of another run: of layer 2, here it is 0",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_checkpoint_that_contradicts_itself_is_refused(what, folder, tmp_path):
    todo, path = shards(folder), tmp_path / "state"
    stream(todo[:3], memory=MEMORY, checkpoint=path)
    change, said = CHANGES[what]
    more = [module._identity(s) for s in todo[3:5]]
    changed_checkpoint(path, lambda about: change(about | {"more": more}))
    kept = path.read_bytes()
    with pytest.raises(InputError, match=said) as e:
        stream(todo, memory=MEMORY, checkpoint=path, resume=True)
    assert "\n" not in str(e.value)
    assert path.read_bytes() == kept


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


def test_two_widths(tmp_path):
    rng = np.random.default_rng(27)
    x, y = (rng.standard_normal((90, d)) for d in (3, 5))
    s = stats_of(x, y)
    save_stats(tmp_path / "state", s)
    assert same(load_stats(tmp_path / "state", (3, 5), np.float64), s)
    assert_exact(stream([(x[:9], y[:9]), (x[9:], y[9:])]), x, y)


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


@pytest.mark.slow
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
        m.setattr(module, "shard_stats", touched)
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
        with module._uninterrupted():
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
    thread = threading.Thread(target=lambda: module._uninterrupted().__enter__())
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
stream(found[:1], memory='16MB')
before, seen = resident_bytes(), []
if sys.argv[2] == 'traced': tracemalloc.start()
import ctxlab.streaming.moments as s
update = s.ContextStats.update
def watched(self, x, y):
    update(self, x, y)
    seen.append(resident_bytes())
s.ContextStats.update = watched
total = stream(found, memory='16MB', checkpoint=sys.argv[3])
quarter = -(-len(seen) // 4)
traced = tracemalloc.get_traced_memory()[1] if sys.argv[2] == 'traced' else 0
print(total.count, max(seen) - before, max(seen) - max(seen[:quarter]), traced)
"""


@pytest.mark.slow
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
    assert grown < 16e6
    assert grown_late < 1e6  # after the first quarter of 64 MB
    assert figures[16, "traced"][2] < 16e6
    assert figures[16, "traced"][2] < 1.05 * figures[1, "traced"][2] + 100_000


# --- any layout, any kind of file ---


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.h5", "a.zarr"])
@pytest.mark.parametrize("pair", [("f2", "f4"), ("f4", "f8"), ("f8", "f8"), ("bfloat16", "f2")])
def test_every_kind_of_file(name, pair, tmp_path):
    """Batches of sequences, two widths, two dtypes, in chunks that do not fit the shape."""
    rng = np.random.default_rng(41)
    x, y = rng.standard_normal((60, 50, 7)), rng.standard_normal((60, 50, 3))
    y[..., 0] += x[..., 2]
    x, y = (stored(a, d, name) for a, d in zip((x, y), pair, strict=True))
    written(tmp_path / name, x=x, y=y)
    # In HDF5 and zarr bfloat16 has no type of its own.
    (s,) = shards(tmp_path / name, bfloat16=True)
    wide = pair == ("f8", "f8")
    assert (s.rows, s.width, s.dtype) == (3000, (7, 3), "float64" if wide else "float32")
    assert s.stored == tuple(
        {"f2": "float16", "f4": "float32", "f8": "float64"}.get(d, d) for d in pair
    )
    values = [values_of(a, d) for a, d in zip((x, y), pair, strict=True)]
    want = [a.reshape(3000, -1).astype(s.dtype) for a in values]
    assert_exact(stream([s], memory="3MB"), *want)
    assert pickle.loads(pickle.dumps(s)) == s


def stored(a, dtype, name):
    if dtype != "bfloat16":
        return a.astype(dtype)
    a = a.astype(ml_dtypes.bfloat16)
    return a.view(np.uint16) if name.endswith("zarr") else a


def values_of(a, dtype):
    return (a.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else a).astype(np.float64)


@pytest.mark.parametrize("form", FORMS)
def test_several_layers_of_one_array(form, tmp_path):
    hidden = np.random.default_rng(42).standard_normal((5, 6, 100, 8)).astype(np.float32)
    for i in range(2):
        written(tmp_path / f"{i}{FORMS[form]}", form, hidden=hidden[:, 3 * i : 3 * i + 3])
    paths = sorted(tmp_path.iterdir())
    listed = shards(paths, [1, 3], keys=("", "") if form == "npy" else None)
    assert [(s.layer, s.verify) for s in listed] == 2 * [(1, True), (3, False)]
    got = stream(listed, memory="3MB", checkpoint=tmp_path / "state", every=1)
    for layer in (1, 3):
        want = (a.reshape(600, 8) for a in hidden[layer - 1 : layer + 1])
        assert_exact(got[layer], *want)
    assert [s.layer for s in shards(paths[0], "all")] == [1, 2, 3, 4]
    again = stream(listed, memory="3MB", checkpoint=tmp_path / "state", resume=True)
    assert all(same(again[layer], got[layer]) for layer in got)
    with pytest.raises(InputError, match="of another run"):
        stream(shards(paths, [1, 2]), memory="3MB", checkpoint=tmp_path / "state", resume=True)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_layers_are_resumed_to_the_bit(at, tmp_path, monkeypatch):
    hidden = np.random.default_rng(43).standard_normal((3, 700, 8)).astype(np.float16)
    for i in range(2):
        np.savez(tmp_path / f"{i}.npz", hidden=hidden[:, 300 * i : 300 * i + 300])
    listed, path = shards(tmp_path, "all"), tmp_path / "state"
    want = stream(listed, memory=MEMORY)
    with monkeypatch.context() as m:
        failing(m, at + 1, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            stream(listed, memory=MEMORY, checkpoint=path)
    got = stream(listed, memory=MEMORY, checkpoint=path, resume=True)
    assert all(same(got[layer], want[layer]) for layer in (1, 2))


def test_arrays_of_an_archive_are_shards(tmp_path):
    rng = np.random.default_rng(44)
    named = {f"{c}{i}": rng.standard_normal((30, 4)) for c in "xy" for i in (0, 2, 10)}
    np.savez(tmp_path / "a.npz", **named, other=1)
    listed = shards(tmp_path / "a.npz")
    assert [s.keys for s in listed] == [("x0", "y0"), ("x2", "y2"), ("x10", "y10")]
    assert [s.name for s in listed] == ["a.npz: x0", "a.npz: x2", "a.npz: x10"]
    both = [np.concatenate([named[f"{c}{i}"] for i in (0, 2, 10)]) for c in "xy"]
    assert_exact(stream(listed), *both)
    turned = shards(tmp_path / "a.npz", keys=("y*", "x*"))
    assert_exact(stream(turned), *both[::-1])
    (alone,) = shards(tmp_path / "a.npz", keys=("x2", "x2"))
    assert_exact(stream([alone]), named["x2"], named["x2"])
    for keys, said in {
        ("x*", "z*"): r"no array fits 'z\*'; found x0, x2",
        ("x*", "y1*"): "a.npz: x10 has no partner",
        ("x0", "q"): "there is no array 'q'",
    }.items():
        with pytest.raises(InputError, match=said):
            shards(tmp_path / "a.npz", keys=keys)


def test_a_key_that_is_missing_in_the_third_file(tmp_path):
    for i in range(4):
        written(tmp_path / f"{i}.h5", **{"resid" if i != 2 else "residual": OK, "mlp": OK})
    with pytest.raises(InputError, match=r"2\.h5: there is no array 'resid'; found mlp, residual"):
        shards(tmp_path, keys=("resid", "mlp"))


def test_layers_that_do_not_fit(tmp_path):
    written(tmp_path / "0.npz", hidden=np.ones((3, 5, 4), np.float32))
    written(tmp_path / "1.npz", hidden=np.ones((4, 5, 4), np.float32))
    with pytest.raises(InputError, match=r"1\.npz: its last layer is 3, that of .*0\.npz is 2"):
        shards(tmp_path, "all")
    assert len(shards(tmp_path, [1, 2])) == 4
    written(tmp_path / "1.npz", hidden=np.ones((3, 5, 6), np.float32))
    with pytest.raises(InputError, match=r"1\.npz, hidden: width 6, that of .*0\.npz, hidden is 4"):
        shards(tmp_path, 2)
    written(tmp_path / "1.npz", hidden=np.ones((1, 5, 4), np.float32))
    with pytest.raises(InputError, match=r"1\.npz, hidden: there is no layer 1; it has 1 to 0"):
        shards(tmp_path / "1.npz", "all")
    for nothing in ([], "", "some"):
        with pytest.raises(ValueError, match="layer: "):
            shards(tmp_path, nothing)


def test_patterns_name_files(folder):
    assert [s.name for s in shards(str(folder / "?.npz"))] == ["1.npz", "2.npz", "4.npz", "5.npz"]
    with pytest.raises(InputError, match=r"q\*: no file fits this pattern"):
        shards(str(folder / "q*"))
    (folder / "odd[1].npz").write_bytes((folder / "1.npz").read_bytes())
    assert len(shards(folder / "odd[1].npz")) == 1


def test_two_files_of_any_kind(tmp_path):
    written(tmp_path / "a.safetensors", x=OK, y=OK + 1)
    written(tmp_path / "b.h5", only=OK[:, :3])
    (s,) = shards([(tmp_path / "a.safetensors", tmp_path / "b.h5")])
    assert (s.keys, s.width) == (("x", "only"), (8, 3))
    written(tmp_path / "b.h5", p=OK, q=OK)
    with pytest.raises(InputError, match=r"b\.h5: needed one array, or one called 'y'; found p, q"):
        shards([(tmp_path / "a.safetensors", tmp_path / "b.h5")])


def test_numbers_beyond_float32_in_a_mixed_pair(tmp_path):
    np.savez(tmp_path / "a.npz", x=OK, y=OK.astype(float) * 1e300)
    with pytest.raises(InputError, match=r"a\.npz, y: values beyond the range of float32"):
        stream(shards(tmp_path / "a.npz"))


@pytest.mark.parametrize("name", ["a.h5", "a.zarr"])
def test_chunks_larger_than_the_budget(name, tmp_path):
    a = np.ones((40_000, 16), np.float32)
    if name == "a.h5":
        with h5py.File(tmp_path / name, "w") as f:
            for key in "xy":
                f.create_dataset(key, data=a, chunks=a.shape, compression="gzip")
    else:
        group = zarr.open_group(tmp_path / name, mode="w")
        for key in "xy":
            group.create_array(key, shape=a.shape, dtype=a.dtype, chunks=a.shape)
            group[key][...] = a
    (s,) = shards(tmp_path / name)
    assert s.held == 2 * 4 * a.nbytes
    with pytest.raises(ValueError, match=rf"{s.held} bytes for chunks of .*{name}, x; needed") as e:
        stream([s], memory="20MB")
    least = int(str(e.value).split("at least ")[1].split()[0])
    assert stream([s], memory=least).count == 40_000


def test_a_compressed_array_in_fortran_order_is_counted(tmp_path):
    a = np.asfortranarray(np.random.default_rng(45).standard_normal((30_000, 16)))
    np.savez_compressed(tmp_path / "a.npz", x=a, y=a)
    (s,) = shards(tmp_path / "a.npz")
    assert 2 * a.nbytes < s.held < 2 * a.nbytes + 1000
    with pytest.raises(ValueError, match="bytes for chunks of"):
        stream([s], memory="4MB")
    assert_exact(stream([s], memory="20MB"), a, a)


# --- complete pairs ---


def test_complete_pairs_stay_within_the_budget_and_are_resumed(tmp_path):
    rng = np.random.default_rng(48)
    x, y = rng.standard_normal((2, 6000, 120), dtype=np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    for i in range(4):
        np.savez(tmp_path / f"{i}.npz", x=x[1500 * i :][:1500], y=y[1500 * i :][:1500])
    listed = [s._replace(nan="pairs") for s in shards(tmp_path)]
    with pytest.raises(ValueError, match="with nan='pairs'; needed at least") as e:
        stream(listed, memory="1MB")
    least = int(str(e.value).split("at least ")[1].split()[0])
    assert least > module._least_bytes(120) + 2 * 8 * 6 * 120**2
    assert traced_peak(lambda: stream(listed, memory=least), threads=True) < least
    want, path = stream(listed, memory=least), tmp_path / "state"
    stream(listed[:2], memory=least, checkpoint=path)
    got = stream(listed, memory=least, checkpoint=path, resume=True)
    assert same(got, want)
    assert want.incomplete == 6000
    assert same(load_stats(path, 120, nan="pairs"), want)
    with pytest.raises(InputError, match="of another run"):
        load_stats(path, 120)
    with pytest.raises(ValueError, match=r"^stats: has nan='zero', the shard 'pairs'"):
        shard_stats(listed[0], stats=ContextStats(120))


# --- a writer at work ---

WRITER = """if True:
    import os, sys, time
    path, how = sys.argv[1:]
    size = os.path.getsize(path)
    for i in range(3000):
        if os.path.exists(sys.argv[1] + '.stop'): break
        if how == 'grow':
            with open(path, 'ab') as f: f.write(b'more')
        elif how == 'shrink':
            os.truncate(path, max(size - 4096 * (i + 1), 100))
        else:
            with open(path, 'r+b') as f:
                f.seek(size // 2)
                f.write(bytes([i % 256]))
        time.sleep(0.002)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["grow", "shrink", "write"])
@pytest.mark.parametrize(
    "form", ["npy", "npz", "compressed", "safetensors", "hdf5", "hdf5 in chunks"]
)
def test_a_shard_that_is_written_to_is_named(form, how, tmp_path):
    """A process writes to the second file while it is read."""
    a = np.random.default_rng(46).standard_normal((20_000, 32)).astype(np.float32)
    for i in range(3):
        written(tmp_path / f"{i}{FORMS[form]}", form, hidden=a[None].repeat(2, 0))
    listed = shards(sorted(tmp_path.iterdir()), 1)
    path, writers = listed[1].x, []

    def start_writer(n):
        """The writer has written before the reading goes on."""
        if not writers:
            before = os.stat(path).st_mtime_ns
            writers.append(subprocess.Popen([sys.executable, "-c", WRITER, path, how]))
            while os.stat(path).st_mtime_ns == before:
                time.sleep(0.001)

    assert shard_stats(listed[0], "20MB").count == 20_000
    try:
        with pytest.raises(InputError, match=rf"1{FORMS[form]}: has changed since it was listed"):
            shard_stats(listed[1], "20MB", tick=start_writer)
    finally:
        Path(f"{path}.stop").touch()
        for w in writers:
            w.wait()
    assert writers


# --- memory of every kind of file ---


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_memory_stays_within_the_budget_in_every_kind_of_file(form, tmp_path):
    """By the native witness: what libraries take for chunks is counted, too."""
    a = np.random.default_rng(47).standard_normal((2, 60_000, 48)).astype(np.float16)
    path, chunks = tmp_path / FORMS[form], (1, 5000, 48)
    if form == "hdf5 in chunks":
        with h5py.File(path, "w") as f:
            f.create_dataset("hidden", data=a, chunks=chunks, compression="gzip", shuffle=True)
    elif "zarr" in form:
        group = zarr.open_group(path, mode="w", zarr_format=2 if form == "zarr 2" else 3)
        shards_of = dict(shards=(1, 10_000, 48)) if "shards" in form else {}
        group.create_array("hidden", shape=a.shape, dtype=a.dtype, chunks=chunks, **shards_of)
        group["hidden"][...] = a
    else:
        written(path, form, hidden=a)
    listed = shards(path, 1)
    budget = 6_000_000 + listed[0].held
    assert a.nbytes > 1.5 * 6_000_000
    peak = traced_peak(lambda: stream(listed, memory=budget), threads=True)
    assert peak < budget
