"""Every kind of file, dtype and layout: the same rows; and what is refused."""

import itertools
import math
import os
import sys
import tempfile
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import zarr
from hypothesis import example, given
from hypothesis import strategies as st

from ctxlab.containers import InputError, _fingerprint, _naming, _open

FORMS = {  # how a file is written -> its name
    "npy": "a.npy",
    "npz": "a.npz",
    "compressed": "a.npz",
    "safetensors": "a.safetensors",
    "hdf5": "a.h5",
    "hdf5 in chunks": "a.hdf5",
    "hdf5 with a block before it": "a.h5",
    "zarr": "a.zarr",
    "zarr in shards": "a.zarr",
    "zarr 2": "a.zarr",
}
DTYPES = ("f2", "f4", "f8", ">f2", ">f4", ">f8", "bfloat16")


def chunks_of(shape, rng):
    return tuple(int(rng.integers(1, max(n, 1) + 1)) for n in shape)


def written(path, form=None, seed=0, **arrays):
    """A file with these arrays; `form` as in FORMS, or by its name."""
    name = Path(path).suffix
    form = (
        form or {".npz": "npz", ".safetensors": "safetensors", ".h5": "hdf5", ".zarr": "zarr"}[name]
    )
    rng = np.random.default_rng(seed)
    if form == "npy":
        np.save(path, *arrays.values())
    elif form in ("npz", "compressed"):
        (np.savez if form == "npz" else np.savez_compressed)(path, **arrays)
    elif form == "safetensors":
        safetensors.numpy.save_file(
            {key: np.ascontiguousarray(a) for key, a in arrays.items()}, path
        )
    elif form.startswith("hdf5"):
        before = dict(userblock_size=512) if "block" in form else {}
        with h5py.File(path, "w", **before) as f:
            for key, a in arrays.items():
                packed = dict(chunks=chunks_of(a.shape, rng), compression="gzip", shuffle=True)
                f.create_dataset(key, data=a, **(packed if "chunks" in form and a.size else {}))
    else:
        group = zarr.open_group(path, mode="w", zarr_format=2 if form == "zarr 2" else 3)
        for key, a in arrays.items():
            chunks = chunks_of(a.shape, rng)
            shards = {}
            if "shards" in form:
                shards = dict(shards=tuple(c * int(rng.integers(1, 4)) for c in chunks))
            # the lowest zarr that is taken knows no `data=`
            group.create_array(key, shape=a.shape, dtype=a.dtype, chunks=chunks, **shards)
            group[key][...] = np.ascontiguousarray(a)
    return path


def stored(a, dtype, form):
    """The array in a dtype, as such a file can hold it."""
    if dtype != "bfloat16":
        return a.astype(dtype.replace(">", "<") if form == "safetensors" else dtype)
    a = a.astype(ml_dtypes.bfloat16)
    return a if form in ("safetensors", "npy", "npz", "hdf5") else a.view(np.uint16)


def read(path, key, layer, cuts, out, bfloat16):
    with _open(str(path), bfloat16) as container, _naming(str(path)):
        array = container.array(key)
        reader = array.rows(layer)
        for a, b in itertools.pairwise(cuts):
            reader.fill(out[a:b])
        reader.finish()
        return array.held(layer is not None)


@pytest.mark.hypothesis
@pytest.mark.parametrize("form", FORMS)
@given(
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from("CF"),
    layers=st.sampled_from([0, 1, 3]),
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=2),
    width=st.integers(1, 5),
    wide=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(dtype=">f2", order="F", layers=3, rows=[7, 5], width=3, wide=False, seed=1)
@example(dtype="bfloat16", order="F", layers=3, rows=[9, 9], width=3, wide=False, seed=2)
def test_the_same_rows_from_every_file(form, dtype, order, layers, rows, width, wide, seed):
    rng = np.random.default_rng(seed)
    shape = ((layers,) if layers else ()) + (*rows, width)
    if "zarr" in form and 0 in shape:
        return  # it has no chunk of no rows
    a = stored(rng.standard_normal(shape), dtype, form)
    want = a.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else a
    a = np.array(a, order=order)
    layer = int(rng.integers(layers)) if layers else None
    out = np.full(
        (math.prod(rows), width), np.nan, np.float64 if wide and dtype != "bfloat16" else np.float32
    )
    cuts = [0, *sorted(rng.integers(0, len(out) + 1, 3)), len(out)]
    with tempfile.TemporaryDirectory() as place:
        path = written(Path(place, FORMS[form]), form, seed, x=a)
        held = read(path, "" if form == "npy" else "x", layer, cuts, out, dtype == "bfloat16")
    want = (want if layer is None else want[layer]).reshape(out.shape)
    np.testing.assert_array_equal(
        out, want.astype(np.float32 if dtype == "bfloat16" else out.dtype)
    )
    if "chunks" in form or "zarr" in form:
        assert held > 0 or not a.size
    elif a.size and not (form == "compressed" and order == "F"):
        assert held == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_number_beyond_float32_is_refused(form, tmp_path):
    a = np.ones((50, 3))
    a[33, 1] = 1e39
    path = written(tmp_path / FORMS[form], form, x=a)
    key, out = "" if form == "npy" else "x", np.empty((50, 3), np.float32)
    with pytest.raises(InputError, match=r"a\.\w+.*: values beyond the range of float32"):
        read(path, key, None, (0, 50), out, False)
    a[33, 1] = np.inf
    a[34, 1] = 1e-300
    written(path, form, x=a)
    read(path, key, None, (0, 50), out, False)
    np.testing.assert_array_equal(out, a.astype(np.float32))


def test_one_array_without_a_name_in_zarr(tmp_path):
    a = np.arange(12.0).reshape(4, 3)
    one = zarr.create_array(str(tmp_path / "one.zarr"), shape=a.shape, dtype=a.dtype)
    one[...] = a
    out = np.empty((4, 3))
    read(tmp_path / "one.zarr", "", None, (0, 4), out, False)
    np.testing.assert_array_equal(out, a)


def test_arrays_in_groups_and_of_no_plain_kind(tmp_path):
    path, a = tmp_path / "a.h5", np.arange(12.0).reshape(4, 3)
    with h5py.File(path, "w") as f:
        f["deep/er/x"] = a
        f.create_dataset("unwritten", shape=(4, 3), dtype="f4", fillvalue=2)
        layout = h5py.VirtualLayout(shape=(4, 3), dtype="f8")
        layout[:] = h5py.VirtualSource(".", "deep/er/x", shape=(4, 3))
        f.create_virtual_dataset("virtual", layout)
        f.create_dataset("checked", data=a, chunks=(2, 3), fletcher32=True)
    with _open(str(path)) as container:
        assert container.names() == ["checked", "deep/er/x", "unwritten", "virtual"]
    for key, want in {
        "deep/er/x": a,
        "virtual": a,
        "unwritten": np.full((4, 3), 2),
        "checked": a,
    }.items():
        out = np.empty((4, 3))
        read(path, key, None, (0, 1, 4), out, False)
        np.testing.assert_array_equal(out, want)


def changed(path, old, new, count=1):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, count))


OK = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
LIES = {  # what a header says of 6 x 8 numbers in float32 -> what it says instead
    "more rows": (b"[6,8]", b"[7,8]"),
    "fewer rows": (b"[6,8]", b"[5,8]"),
    "another dtype": (b'"F32"', b'"F64"'),
    "no dtype": (b'"F32"', b'"F99"'),
    "another place": (b"[0,192]", b"[8,200]"),
    "a place beyond the end": (b"[0,192]", b"[0,999]"),
    "a negative place": (b"[0,192]", b"[-8,99]"),
    "no JSON": (b'{"x"', b'{?x"'),
}


@pytest.mark.parametrize("what", LIES)
def test_a_safetensors_header_that_lies(what, tmp_path):
    path = written(tmp_path / "a.safetensors", x=OK)
    changed(path, *LIES[what])
    with pytest.raises(InputError, match=r"a\.safetensors: cannot be read") as e:
        read(path, "x", None, (0, 6), np.empty((6, 8), np.float32), False)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("size", [0, 5, 8, 20, -1])
def test_a_safetensors_file_cut_short(size, tmp_path):
    path = written(tmp_path / "a.safetensors", x=OK)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"a\.safetensors: cannot be read"):
        read(path, "x", None, (0, 6), np.empty((6, 8), np.float32), False)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, np.complex64, np.uint16])
@pytest.mark.parametrize("form", FORMS)
def test_other_dtypes_are_refused(form, dtype, tmp_path):
    try:
        path = written(tmp_path / FORMS[form], form, x=OK.astype(dtype))
    except safetensors.SafetensorError:
        pytest.skip("this version of safetensors writes no such numbers")
    with pytest.raises(InputError, match=r"a\.\w+.*: dtype .* cannot be read; needed") as e:
        read(path, "" if form == "npy" else "x", None, (0, 6), np.empty((6, 8)), False)
    assert ("--bfloat16" in str(e.value)) == (dtype is np.uint16 and form != "safetensors")


@pytest.mark.parametrize("form", ["npy", "hdf5"])
def test_bfloat16_of_no_known_meaning_is_read_when_it_is_said(form, tmp_path):
    path = written(tmp_path / FORMS[form], form, x=OK.astype(ml_dtypes.bfloat16))
    key, out = "" if form == "npy" else "x", np.empty((6, 8), np.float32)
    with pytest.raises(InputError, match="if it holds bfloat16, say so"):
        read(path, key, None, (0, 6), out, False)
    read(path, key, None, (0, 6), out, True)
    np.testing.assert_array_equal(out, OK.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("library", ["safetensors", "h5py", "zarr"])
def test_without_its_library_a_file_says_how_to_get_it(library, tmp_path, monkeypatch):
    name = {"safetensors": "a.safetensors", "h5py": "a.h5", "zarr": "a.zarr"}[library]
    path = written(tmp_path / name, x=OK)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"needs {library}; pip install 'ctxlab\[formats\]'$"):
        read(path, "x", None, (0, 6), np.empty((6, 8)), False)


@pytest.mark.parametrize("form", FORMS)
def test_names_that_are_not_there(form, tmp_path):
    path = written(tmp_path / FORMS[form], form, x=OK)
    if form != "npy":
        written(path, form, **{f"a{i}": OK for i in range(12)})
    with _open(str(path)) as container, pytest.raises(InputError) as e:
        container.array("x1")
    said = "is a single array" if form == "npy" else "no array 'x1'; found a0, a1"
    assert said in str(e.value)
    assert form == "npy" or str(e.value).endswith(" and 4 more")


def test_a_header_of_python_2(tmp_path):
    np.save(tmp_path / "a.npy", OK)
    changed(tmp_path / "a.npy", b"(6, 8), ", b"(6L, 8),")
    with pytest.raises(InputError, match=r"a\.npy: cannot be read \(.*Python 2.*\)"):
        read(tmp_path / "a.npy", "", None, (0, 6), np.empty((6, 8)), False)


def test_the_fingerprint_of_a_folder_is_that_of_all_its_files(tmp_path):
    path = written(tmp_path / "a.zarr", x=OK)
    before = _fingerprint(str(path))
    chunk = next(p for p in path.rglob("c/*/*"))
    facts = os.stat(chunk)
    os.utime(chunk, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))
    assert _fingerprint(str(path)) != before


def test_the_module_loads_no_library():
    import subprocess

    script = (
        "import sys, ctxlab.containers; print({'h5py', 'zarr', 'safetensors'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
