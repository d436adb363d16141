"""The Rust program's figures are read strictly, and a run that cannot be says why in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ctxlab.audit import rust
from ctxlab.audit.rust import _RustError, run, stored
from ctxlab.data import InputError

SOURCE = Path(__file__).resolve().parent.parent / "nbs" / "audit" / "rust"
PACKAGED = stored().raw
SIZE = "512 x 768"


# ---- Stored figures


def test_the_packaged_figures_say_where_they_come_from():
    found = stored()
    assert set(found.facts) == {"date", "processor", "cores", "system"}
    assert found.versions["ndarray"].startswith("0.17.")
    assert all(found.facts.values())
    assert all(found.versions.values())


def test_the_packaged_figures_are_of_a_full_run():
    found = stored()
    assert set(found.times) == set(found.paths) == set(found.products) == {SIZE, "256 x 384"}
    assert found.effort["blocks"] >= 20
    assert set(found.threads) == {1, 2, 4}


def test_what_is_saved_is_read_back(tmp_path):
    found = stored()
    found.save(tmp_path / "figures.json")
    assert stored(tmp_path / "figures.json") == found
    assert stored(str(tmp_path / "figures.json")).raw == PACKAGED


def test_the_packaged_file_is_as_it_is_saved(tmp_path):
    stored().save(tmp_path / "figures.json")
    packaged = Path(rust.__file__).parent.parent / "assets" / "rust.json"
    assert (tmp_path / "figures.json").read_bytes() == packaged.read_bytes()


def counted(data):
    return data["products"][SIZE]["cov"]["dot"]["arrays"]


def forward(data):
    return data["times"][SIZE]["forward"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        *((lambda d, key=key: d.pop(key), f"there is no '{key}'") for key in PACKAGED),
        (lambda d: counted(d).pop("peak"), "peak"),
        (lambda d: counted(d).update(more=1), "more"),
        (lambda d: counted(d).update(count=-1), "-1 is no count"),
        (lambda d: counted(d).update(count=True), "True is no count"),
        (lambda d: counted(d).update(nbytes=1.5), "1.5 is no count"),
        (lambda d: d["effort"].update(blocks="20"), "'20' is no count"),
        (lambda d: d.update(traffic=[]), "no object"),
        (lambda d: d["products"].update(cov=3), "3 is no object"),
        (lambda d: forward(d)["ratios"].pop("before again"), "no ratios of before again"),
        (lambda d: forward(d)["ratios"].update(kept=[1.0] * 5), "too few"),
        (lambda d: forward(d)["ratios"].update(kept=[float("nan")] * 9), "nan is no measured"),
        (lambda d: forward(d)["faults"].update(kept=-1.0), "-1.0 is no measured"),
        (lambda d: forward(d).update(milliseconds=[True] * 9), "True is no measured"),
        (lambda d: d["norms"]["alone"].update(Mutex=None), "not iterable"),
        (lambda d: d["norms"]["threads"].update(many={}), "'many'"),
        (lambda d: d["reuse"]["random lengths"].pop("largest"), "there is no 'largest'"),
    ],
)
def test_a_file_of_other_figures_is_refused(tmp_path, spoil, says):
    data, path = json.loads(json.dumps(PACKAGED)), tmp_path / "figures.json"
    spoil(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="not figures of the Rust program") as refusal:
        stored(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b"[" * 10**5])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "figures.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"figures\.json: not figures of the Rust program"):
        stored(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"missing\.json: cannot be read: No such file"):
        stored(tmp_path / "missing.json")
    with pytest.raises(InputError, match=r"cannot be read: Is a directory"):
        stored(tmp_path)


# ---- Runs, with a cargo that only pretends


def script(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture
def cargo(tmp_path, monkeypatch):
    """Put a cargo on the path that runs these lines; they find the target folder in $target."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), "/usr/bin", "/bin"]))

    def pretend(*lines):
        script(folder / "cargo", 'for last; do target="$last"; done', *lines)

    return pretend


def building(tmp_path, *program):
    """Lines of a cargo that makes a program of these lines."""
    script(tmp_path / "program", *program)
    return 'mkdir -p "$target/release"', f'cp "{tmp_path}/program" "$target/release/context-forms"'


def printed(tmp_path):
    """A file with what the program prints: figures without facts."""
    figures = {key: value for key, value in PACKAGED.items() if key != "facts"}
    (tmp_path / "printed").write_text(json.dumps(figures))
    return tmp_path / "printed"


def refusal(**options):
    with pytest.raises(_RustError) as raised:
        run(**options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_run_gives_what_the_program_prints(cargo, tmp_path):
    cargo(*building(tmp_path, f'echo "$#" > "{tmp_path}/given"; cat "{printed(tmp_path)}"'))
    found = run()
    assert {k: v for k, v in found.raw.items() if k != "facts"} == {
        k: v for k, v in PACKAGED.items() if k != "facts"
    }
    assert set(found.facts) == set(stored().facts)
    assert (tmp_path / "given").read_text() == "0\n"
    assert run(quick=True).raw == found.raw
    assert (tmp_path / "given").read_text() == "1\n"


def test_a_run_leaves_the_source_as_it_was(cargo, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    before = sorted(source.rglob("*"))
    cargo('touch "${target%/*}/rust/Cargo.lock"', *building(tmp_path, f'cat "{printed(tmp_path)}"'))
    run(source=source)
    assert sorted(source.rglob("*")) == before


def test_without_cargo_a_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal() == "cargo is not installed; the Rust program needs it"


def test_without_the_source_a_run_says_where_it_is(tmp_path):
    assert refusal(source=tmp_path).startswith(f"{tmp_path}: no Rust program; it is in nbs/audit/")


def test_a_crate_that_cannot_be_fetched_is_named(cargo):
    cargo(
        'echo "    Updating the index" >&2',
        'echo "error: failed to get \\`ndarray\\` as a dependency of package \\`x\\`" >&2',
        'printf "\\nCaused by:\\n  one thing\\n\\nCaused by:\\n  no network\\n" >&2',
        "exit 101",
    )
    assert refusal() == "the crate ndarray is not to be had: no network"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "warning: w\\nerror[E0308]: mismatched types\\nerror: could not compile",
            "mismatched types",
        ),
        ("error: linker \\`cc\\` not found", "linker `cc` not found"),
        ("killed", "killed"),
        ("", "it said nothing"),
    ],
)
def test_a_build_that_fails_says_why(cargo, said, reason):
    cargo(f'printf "{said}" >&2', "exit 101")
    assert refusal() == f"the Rust program cannot be built: {reason}"


PANIC = r"thread 'main' panicked at src/x.rs:1:2:\noff by 1\nnote: run with more\n"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([f'printf "{PANIC}" >&2', "exit 101"], "the Rust program failed: off by 1"),
        (["exit 3"], "the Rust program failed: it said nothing"),
        (["echo hello"], "the Rust program printed no figures of its own: Expecting value"),
        (["echo '{}'"], "the Rust program printed no figures of its own: 'norms'"),
        (["echo '[]'"], "the Rust program printed no figures of its own: "),
    ],
)
def test_a_program_that_fails_says_why(cargo, tmp_path, lines, says):
    cargo(*building(tmp_path, *lines))
    assert refusal().startswith(says)


def test_a_cargo_that_makes_nothing_is_an_error(cargo):
    cargo("exit 0")
    assert refusal().endswith("context-forms cannot be run: No such file or directory")


def test_a_program_without_an_end_is_stopped(cargo, tmp_path):
    cargo(*building(tmp_path, "exec sleep 60"))
    assert refusal(seconds=1.0) == "context-forms did not end within 1 s"


# ---- The real tools, where they are


def works(*command):
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not works("cargo", "--version"), reason="cargo is not installed")
def test_cargo_without_network_and_without_the_crate(tmp_path, monkeypatch):
    monkeypatch.setenv("CARGO_HOME", str(tmp_path))
    monkeypatch.setenv("CARGO_NET_OFFLINE", "true")
    assert refusal().startswith("the crate ndarray is not to be had: no matching package")


@pytest.mark.skipif(not works("rustfmt", "--version"), reason="rustfmt is not installed")
def test_the_program_is_formatted():
    files = [str(SOURCE / "build.rs"), str(SOURCE / "src" / "main.rs")]
    done = subprocess.run(
        ["rustfmt", "--check", "--edition", "2021", *files], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.release
@pytest.mark.skipif(not works("cargo", "--version"), reason="cargo is not installed")
def test_the_program_allocates_what_is_stored():
    try:
        found = run(quick=True)
    except _RustError as error:
        if "not to be had" in str(error):
            pytest.skip(str(error))
        raise
    for one, other in ((found.products, stored().products), (found.paths, stored().paths)):
        for size, of_size in one.items():
            for name, forms in of_size.items():
                for form, allocated in forms.items():
                    assert allocated.arrays == other[size][name][form].arrays


def test_importing_the_module_starts_nothing():
    code = "import sys, ctxlab.audit.rust; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
