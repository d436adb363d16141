"""Every way in which a user's file can be unusable ends in one clear error, and every usable one is
read.
"""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_containers import written

import ctxlab
from ctxlab.data import InputError, _pair, load_pairs
from ctxlab.testing import assert_equiv

ok = np.random.default_rng(0).standard_normal((4, 3))


def archive(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.fixture
def save(tmp_path):
    def write(content=None, **arrays) -> Path:
        path = tmp_path / "mine.npz"
        path.write_bytes(archive(**arrays) if content is None else content)
        return path

    return write


def spoilt(**entries):
    """A copy of `ok` with some entries replaced, by their flat number."""
    a = ok.copy()
    for place, value in entries.items():
        a.flat[int(place[1:])] = value
    return a


BAD_ARRAYS = {
    "no array": ({}, "found none"),
    "wrong names": (dict(a=ok, b=ok), "found a, b"),
    "x alone": (dict(x=ok), "needed arrays 'x' and 'y', or 'hidden'"),
    "capital letters": (dict(X=ok, Y=ok), "found X, Y"),
    "one row": (dict(x=ok[:1], y=ok[:1]), "at least 2 rows"),
    "no rows": (dict(x=ok[:0], y=ok[:0]), r"\(0, 3\) is empty"),
    "no columns": (dict(x=ok[:, :0], y=ok[:, :0]), "no features"),
    "one vector": (dict(x=ok[0], y=ok[0]), r"\(3,\) is not \(rows, features\)"),
    "one number": (dict(x=1.0, y=1.0), r"\(\) is not"),
    "four dimensions": (dict(x=ok[None, None], y=ok[None, None]), r"\(1, 1, 4, 3\) is not"),
    "rows differ": (dict(x=ok, y=ok[:3]), r"\(4, 3\) and y has \(3, 3\)"),
    "columns differ": (dict(x=ok, y=ok[:, :2]), "must agree"),
    "all NaN in x": (dict(x=ok * np.nan, y=ok), "^x: no finite value"),
    "all infinite in y": (dict(x=ok, y=np.full_like(ok, np.inf)), "^y: no finite value"),
    "beyond float32": (dict(x=ok, y=spoilt(_5=1e39)), "^y: values beyond the range of float32"),
    "beyond float32, below": (dict(x=spoilt(_0=-1e300), y=ok), "beyond"),
    "beyond float32 beside NaN": (dict(x=spoilt(_0=np.nan, _1=4e38), y=ok), "beyond"),
    "hidden of one layer": (dict(hidden=ok[None]), "layers >= 2"),
    "hidden of no layer": (dict(hidden=np.empty((0, 4, 3))), "layers >= 2"),
    "hidden in two dimensions": (dict(hidden=ok), "layers >= 2"),
    "hidden in five dimensions": (dict(hidden=np.stack([[[ok]]] * 2)), "layers >= 2"),
    "hidden of one row": (dict(hidden=ok[None, :1].repeat(2, 0)), "at least 2 rows"),
    "hidden with a layer of NaN": (dict(hidden=np.stack([ok, ok * np.nan])), "no finite value"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(case, save):
    arrays, why = BAD_ARRAYS[case]
    with pytest.raises(InputError, match=why):
        load_pairs(save(**arrays))


@pytest.mark.parametrize(
    "dtype", ["i8", "u1", "?", "c8", "c16", "U5", "S3", "M8[s]", "m8[s]", "f8,f8", "g"]
)
@pytest.mark.parametrize("name", ["x", "hidden"])
def test_bad_dtypes(dtype, name, save):
    if np.dtype(dtype) == np.float64:
        pytest.skip("long double is double here")
    bad = np.zeros((2, 4, 3), dtype)
    with pytest.raises(InputError, match="dtype"):
        load_pairs(save(**(dict(hidden=bad) if name == "hidden" else dict(x=bad[0], y=bad[0]))))


def npy(header: str, content: bytes = b"") -> bytes:
    """A .npy file with a header as given."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


def zipped(x: bytes, y: bytes | None = None, suffix: str = ".npy", **options) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as z:
        z.writestr("x" + suffix, x)
        z.writestr("y" + suffix, x if y is None else y)
    return file.getvalue()


GOOD = archive(x=ok, y=2 * ok)
PLAIN = io.BytesIO()
np.save(PLAIN, ok)
FLAGS = (
    GOOD.index(b"PK\x01\x02") + 8
)  # of the first entry of the zip directory; its method follows 2 bytes later
BAD_FILES = {
    "nothing": b"",
    "text": b"x,y\n1,2\n",
    "the start of a zip": GOOD[:40],
    "a zip cut in half": GOOD[: len(GOOD) // 2],
    "a zip without its last byte": GOOD[:-1],
    "a zip without files": b"PK\x05\x06" + bytes(18),
    ".npy instead of .npz": PLAIN.getvalue(),
    "a pickle": b"\x80\x04]\x94.",
    "pickled objects": archive(x=np.array([{}, []], object), y=ok),
    "pickled objects in hidden": archive(hidden=np.array([{}, []], object)),
    "members that are not arrays": zipped(b"1 2 3", suffix=""),
    "members that are text": zipped(b"1 2 3"),
    "one member that is not an array": zipped(PLAIN.getvalue(), b"1 2 3"),
    "an array cut short": zipped(PLAIN.getvalue()[:-8]),
    "a header cut short": zipped(PLAIN.getvalue()[:30]),
    "a header without sense": zipped(npy("hello")),
    "a header never closed": zipped(npy("(((")),
    "a negative shape": zipped(npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 3), }")),
    "a shape beyond memory": zipped(
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 9), }")
    ),
    "a shape beyond 64 bits": zipped(
        npy(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({10**30},), }}")
    ),
    "an encrypted member": GOOD[:FLAGS] + b"\x01" + GOOD[FLAGS + 1 :],
    "an unknown compression": GOOD[: FLAGS + 2] + b"\x63" + GOOD[FLAGS + 3 :],
    "a wrong checksum": GOOD.replace(ok.tobytes()[:8], bytes(8), 1),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case, save):
    path = save(BAD_FILES[case])
    with pytest.raises(InputError) as raised:
        load_pairs(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_pickles_are_never_run(save):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(path) + ".sprung",)

    path = save()
    path.write_bytes(archive(x=np.array([Trap()], object), y=ok))
    with pytest.raises(InputError, match="pickled objects, which are not read"):
        load_pairs(path)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere.npz", "no such file"),
        (".", "is a folder"),
        ("nowhere/deep/down.npz", "no such file"),
        ("mine.npz/inside.npz", "no such file"),
        ("a" * 300, "."),
    ],
    ids=lambda s: s[:30],
)
@pytest.mark.parametrize("as_text", [True, False])
def test_bad_paths(name, why, as_text, tmp_path):
    (tmp_path / "mine.npz").write_bytes(GOOD)
    path = tmp_path / name
    with pytest.raises(InputError, match=why):
        load_pairs(str(path) if as_text else path)


def test_a_damaged_byte_is_an_input_error_or_harmless(tmp_path):
    path, escaped = tmp_path / "damaged.npz", {}
    for place, byte in enumerate(GOOD):
        for value in (255, byte ^ 1):
            path.write_bytes(GOOD[:place] + bytes([value]) + GOOD[place + 1 :])
            try:
                (only,) = load_pairs(path)
                assert only.x.shape == only.y.shape
            except InputError:
                pass
            except Exception as e:
                escaped[f"{type(e).__name__}: {e}"] = place, value
    assert not escaped


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f2", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_floats_of_every_width_and_order_are_read(dtype, order, writer, tmp_path):
    x, y = np.array(ok, dtype, order=order), np.array(-ok, dtype, order=order)
    writer(tmp_path / "mine.npz", x=x, y=y)
    (only,) = load_pairs(tmp_path / "mine.npz")
    for got, given_ in ((only.x, x), (only.y, y)):
        assert got.flags.c_contiguous
        assert got.dtype.isnative
        assert_equiv(got, given_.astype(np.float32))


def test_x_and_y_win_over_hidden_and_strangers_are_ignored(save):
    objects = np.array([{}], object)
    (only,) = load_pairs(save(x=ok, y=2 * ok, hidden=np.stack([ok] * 5), notes=objects))
    assert_equiv(only.y, (2 * ok).astype(np.float32))
    assert len(load_pairs(save(x=ok, hidden=np.stack([ok] * 5)))) == 4  # x without y says nothing


@pytest.mark.parametrize("layers", [2, 3, 9])
def test_hidden_states_become_consecutive_pairs(layers, save):
    hidden = np.random.default_rng(1).standard_normal((layers, 5, 2)).astype(np.float32)
    pairs = load_pairs(save(hidden=hidden))
    assert [p.name for p in pairs] == [f"layer {i}" for i in range(1, layers)]
    for p, x, y in zip(pairs, hidden[:-1], hidden[1:], strict=True):
        assert_equiv(p.x, x)
        assert_equiv(p.y, y)


def test_values_not_finite_are_kept(save):
    # The mathematics has a rule for them, so the loader must not decide.
    x = spoilt(_0=np.nan, _4=np.inf, _7=-np.inf)
    (only,) = load_pairs(save(x=x, y=ok))
    assert_equiv(only.x, x.astype(np.float32))


@pytest.mark.parametrize(
    "value", [np.finfo(np.float32).max, -np.finfo(np.float32).max, 1e-300, 5e-324]
)
def test_the_ends_of_float32_are_in_range(value, save):
    (only,) = load_pairs(save(x=spoilt(_3=float(value)), y=ok))
    assert np.isfinite(only.x).all()


def test_the_suffix_does_not_matter(save):
    path = save(x=ok, y=ok)
    other = path.rename(path.with_name("activations with a space.zip"))
    assert len(load_pairs(other)) == len(load_pairs(str(other))) == 1


def test_input_errors_are_value_errors():
    assert issubclass(InputError, ValueError)
    with pytest.raises(ValueError, match="mine: x has shape"):
        _pair("mine", ok, ok[:2])


def test_the_packaged_data_is_what_its_provenance_says():
    path = Path(ctxlab.__file__).parent / "assets" / "minilm_alice.npz"
    with np.load(path, allow_pickle=False) as data:
        hidden, ids, text = data["hidden"], data["token_ids"], str(data["text"])
    assert (hidden.shape, hidden.dtype) == ((7, 256, 384), np.float16)
    assert (ids.shape, ids.dtype) == ((256,), np.int32)
    assert 0 < ids.min() <= ids.max() < 30522  # the size of BERT's uncased vocabulary
    assert text.startswith(
        "Alice was beginning to get very tired of sitting by her sister on the bank"
    )
    assert np.isfinite(hidden).all()
    for p, x, y in zip(load_pairs(), hidden[:-1], hidden[1:], strict=True):
        assert_equiv(p.x, x.astype(np.float32))
        assert_equiv(p.y, y.astype(np.float32))
    # A layer of a trained model adds to its input, so each state resembles the next more than one
    # far away.
    flat = hidden.reshape(7, -1).astype(np.float64)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    assert all(flat[i] @ flat[i + 1] > flat[0] @ flat[6] for i in range(6))


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.h5", "a.zarr"])
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 3)])
def test_other_kinds_of_file_and_batches_are_read(name, shape, tmp_path):
    hidden = np.random.default_rng(3).standard_normal((4, *shape)).astype(np.float16)
    written(tmp_path / name, hidden=hidden)
    pairs = load_pairs(tmp_path / name)
    assert len(pairs) == 3
    for p, x, y in zip(pairs, hidden[:-1], hidden[1:], strict=True):
        assert_equiv(p.x, x.reshape(6, 3).astype(np.float32))
        assert_equiv(p.y, y.reshape(6, 3).astype(np.float32))
