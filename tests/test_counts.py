"""The gate that counts: what is red, what is said where nothing can be compared, and the counts."""

import copy
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ONE = "gemm_plain-8x8"


@pytest.fixture(scope="module")
def counts():
    """tools/counts.py as a module."""
    spec = importlib.util.spec_from_file_location("counts_tool", ROOT / "tools/counts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(**change):
    """Counts of one path."""
    return {
        "a-8x8": {"instructions": 100_000, "allocations": 2, "bytes": 4096, "peak": 5000, **change}
    }


@pytest.mark.parametrize(
    ("change", "red"),
    [
        ({"instructions": 102_100}, True),
        ({"instructions": 102_001}, True),
        ({"instructions": 102_000}, False),
        ({"instructions": 101_900}, False),
        ({"instructions": 50_000}, False),
        ({"allocations": 3}, True),
        ({"allocations": 1}, False),
        ({"bytes": 4200}, True),
        ({"peak": 6000}, False),  # Python objects
        ({"peak": 6200}, True),
    ],
    ids=str,
)
def test_two_percent_is_the_limit(counts, change, red):
    lines, wrong = counts.compare(table(), table(**change))
    ((kind, new),) = change.items()
    assert bool(wrong) == red
    if red:
        assert wrong[0].startswith(f"a-8x8: {new:,} {kind}, stored ")
    shown = any(f"{new:,}" in line and kind in line for line in lines)
    assert shown == (red or kind != "peak")


def test_the_first_allocation_is_red(counts):
    _, wrong = counts.compare(table(allocations=0, bytes=0), table(allocations=1, bytes=1024))
    assert wrong == ["a-8x8: 1 allocations, stored 0", "a-8x8: 1,024 bytes, stored 0"]


def test_what_is_as_stored_is_one_line(counts):
    lines, wrong = counts.compare(table(), table())
    assert not wrong
    (line,) = lines
    assert line.split() == ["a-8x8", "instructions", "100,000", "100,000", "+0.00%"]


def test_a_path_that_is_not_stored_is_named(counts):
    _, wrong = counts.compare({}, {"new-8x8": {"instructions": 5}})
    assert wrong == ["new-8x8: 5 instructions, stored none"]


@pytest.fixture
def stored(counts, tmp_path, monkeypatch):
    """A copy of the stored counts that a test may change, and what they hold."""
    copy = tmp_path / "counts.json"
    shutil.copy(counts.STORED, copy)
    monkeypatch.setattr(counts, "STORED", copy)
    return json.loads(copy.read_text())


@pytest.fixture
def quick(counts, stored, monkeypatch):
    """Nothing is run: each path has the counts that were stored at first."""
    first = copy.deepcopy(stored)
    facts, paths = first["environment"], first["paths"]

    def found(names, kinds):
        chosen = {n: {k: paths[n][k] for k in kinds} for n in names}
        return {"environment": facts, "paths": chosen}

    def in_process(run, names):
        assert run == "memory"
        return found(names, ("allocations", "bytes", "peak"))

    monkeypatch.setattr(counts, "in_process", in_process)
    monkeypatch.setattr(counts, "under_valgrind", lambda names: found(names, ("instructions",)))
    monkeypatch.setattr(counts.shutil, "which", lambda name: name)
    monkeypatch.setattr(counts.sys, "version", facts["python"])
    monkeypatch.setattr(counts.np, "__version__", facts["numpy"])
    return facts


def rewrite(counts, stored):
    counts.STORED.write_text(json.dumps(stored))


def test_equal_counts_succeed(counts, quick, capsys):
    assert counts.main(["check"]) == 0
    out = capsys.readouterr().out
    assert all(f"{path} " in out for path in counts.PATHS)
    assert "not compared" not in out


def test_a_growth_is_named_and_fails(counts, stored, quick, capsys):
    stored["paths"][ONE]["instructions"] = int(stored["paths"][ONE]["instructions"] / 1.03)
    rewrite(counts, stored)
    assert counts.main(["check"]) == 1
    assert f"\n{ONE}: " in capsys.readouterr().out
    assert counts.main(["check", "gemm_scaled"]) == 0


def test_a_missing_path_is_named(counts, stored, quick, capsys):
    stored["paths"]["old-8x8"] = stored["paths"].pop(ONE)
    rewrite(counts, stored)
    assert counts.main(["check"]) == 1
    out = capsys.readouterr().out
    assert "old-8x8: stored, but no longer counted" in out
    assert f"{ONE}: " in out


@pytest.mark.parametrize("kind", ["python", "numpy", "blas", "simd", "libc"])
def test_another_environment_compares_allocations_only(counts, stored, quick, capsys, kind):
    stored["environment"][kind] = "another"
    stored["paths"][ONE]["instructions"] = 1
    rewrite(counts, stored)
    assert counts.main(["check", ONE]) == 0
    assert "instructions not compared: other " in capsys.readouterr().out

    quick["memray"] = False
    assert counts.main(["check", ONE]) == 2  # nothing is left to compare
    assert "allocations not compared: memray is not installed" in capsys.readouterr().out


def test_another_environment_still_sees_an_allocation(counts, stored, quick, monkeypatch):
    stored["environment"]["blas"] = "another"
    name = next(n for n, c in stored["paths"].items() if c["allocations"])
    stored["paths"][name]["allocations"] = 0
    rewrite(counts, stored)
    assert counts.main(["check", name]) == 1


def test_without_valgrind_one_line_says_so(counts, quick, monkeypatch, capsys):
    monkeypatch.setattr(counts.shutil, "which", lambda name: None)
    assert counts.main(["check", ONE]) == 0
    assert "instructions not compared: valgrind is not installed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^store: needs valgrind, which is not installed$"):
        counts.main(["store", ONE])


def test_nothing_to_compare_is_no_success(counts, quick, monkeypatch, capsys):
    monkeypatch.setattr(counts, "counted_memory", lambda names, stored: ({}, ["no memray"]))
    monkeypatch.setattr(counts, "counted_instructions", lambda names, stored: ({}, []))
    assert counts.main(["check", ONE]) == 2
    assert "0 counts of 1 paths compared" in capsys.readouterr().out


def test_what_valgrind_cannot_run_is_said(counts, quick, monkeypatch, capsys):
    def broken(names):
        raise ChildProcessError("no such tool")

    monkeypatch.setattr(counts, "under_valgrind", broken)
    assert counts.main(["check", ONE]) == 0
    assert "instructions not compared: no such tool" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"environment": {}, "paths": []}',
        '{"environment": {}, "paths": {"a": 3}}',
        '{"environment": {}, "paths": {"a": {"instructions": "many"}}}',
        '{"environment": {}, "paths": {"a": {"instructions": -1}}}',
        '{"environment": 3, "paths": {}}',
        "\udcff",
        None,
    ],
    ids=repr,
)
def test_a_broken_file_gets_one_line(counts, tmp_path, monkeypatch, text):
    monkeypatch.setattr(counts, "STORED", tmp_path / "counts.json")
    if text is not None:
        counts.STORED.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SystemExit, match=r"^counts\.json: .*; run python tools/counts\.py store$"):
        counts.main(["check", ONE])


@pytest.mark.parametrize("name", ["gemm_plain-9x9", "gemm", ""])
def test_an_unknown_path_is_named(counts, name):
    with pytest.raises(SystemExit, match=f"^PATH: {name!r} is not counted, needed one of "):
        counts.main(["check", name])


def test_storing_one_path_leaves_the_others(counts, stored, quick):
    before = counts.STORED.read_text()
    stored["paths"][ONE] = dict.fromkeys(stored["paths"][ONE], 1)
    stored["paths"]["old-8x8"] = stored["paths"][ONE]
    rewrite(counts, stored)
    counts.main(["store", ONE])
    assert json.loads(counts.STORED.read_text())["paths"] == json.loads(before)["paths"]
    assert counts.STORED.read_text().splitlines()[-1] == "}}"
    quick["blas"] = "another"
    with pytest.raises(SystemExit, match=r"^store: other blas than stored; store all paths"):
        counts.main(["store", ONE])


def test_every_path_is_stored(counts):
    paths = counts.load(counts.STORED)["paths"]
    assert list(paths) == list(counts.PATHS)
    kinds = {"instructions", "allocations", "bytes", "peak"}
    assert all(c.keys() == kinds for c in paths.values())


@pytest.mark.slow
def test_the_allocations_of_all_paths(counts):
    stored = counts.load(counts.STORED)
    now, remarks = counts.counted_memory(list(counts.PATHS), stored["environment"])
    assert bool(now) or remarks
    _, wrong = counts.compare(stored["paths"], now)
    assert not wrong


@pytest.mark.slow
def test_the_instructions_of_a_path(counts, capsys):
    """Compared where they can be; else one line says why not."""
    assert counts.main(["check", ONE]) == 0
    out = capsys.readouterr().out
    compared = [line for line in out.splitlines() if line.startswith(f"{ONE} ")]
    assert any("instructions" in line for line in compared) or (
        "instructions not compared: " in out
    )
