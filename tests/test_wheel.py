"""The wheel and the source archive: what is in them, and whether they install and run alone.

Not among the quick tests: run with `pytest -m release`. Needs the package index.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from ctxlab import __version__

pytestmark = pytest.mark.release

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "ctxlab").rglob("[a-z]*.py")
    if path.stem not in ("distributed", "pytest_plugin")  # need an extra, and pytest
]
# Imports every module that is installed, but those that need an extra or pytest, and prints
# their names.
EACH_MODULE = """
import importlib, pkgutil, ctxlab
for found in pkgutil.walk_packages(ctxlab.__path__, "ctxlab."):
    name = found.name.rpartition(".")[2]
    left_out = name.startswith("_") or name in ("distributed", "pytest_plugin")
    if not found.ispkg and not left_out:
        print(importlib.import_module(found.name).__name__)
"""


def run(*command, cwd, **options):
    """The output of a command; what it printed is in the error if it fails."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=clean,
        capture_output=True,
        text=True,
        timeout=900,
        **options,
    )
    assert done.returncode == 0, (
        f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout


def interpreters(version):
    """Pythons of this version: on the path, or where pyenv keeps them."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places = [
        *os.environ["PATH"].split(os.pathsep),
        *map(str, root.glob(f"versions/{version}.*/bin")),
    ]
    found = (shutil.which(f"python{version}", path=place) for place in places)
    for python in filter(None, found):
        asked = subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True)
        if asked.returncode == 0:
            yield python


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """A source archive made from what git knows or would add, and a wheel made from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in run(
        "git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT
    ).splitlines():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--outdir", out, cwd=source)
    return out


def test_the_wheel_holds_the_package(archives):
    names = zipfile.ZipFile(archives / f"ctxlab-{__version__}-py3-none-any.whl").namelist()
    held = {name for name in names if name.startswith("ctxlab/")}
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "ctxlab").rglob("*.py*") if p.is_file()}
    wanted = {name for name in wanted if name.endswith((".py", ".pyi"))}
    wanted |= {f"ctxlab/assets/{p.name}" for p in (ROOT / "ctxlab/assets").iterdir() if p.is_file()}
    assert held == wanted | {"ctxlab/py.typed", "ctxlab/notebook.mplstyle"}
    assert not [
        name
        for name in names
        if not name.startswith(("ctxlab/", f"ctxlab-{__version__}.dist-info/"))
    ]


def test_the_source_archive_holds_the_sources(archives):
    with tarfile.open(archives / f"ctxlab-{__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert {"docs/example_ledger.py", "docs/example_project/pyproject.toml"} <= names
    notebooks = (p.relative_to(ROOT) for p in (ROOT / "nbs").rglob("*.ipynb"))
    assert {str(p) for p in notebooks if ".ipynb_checkpoints" not in p.parts} <= names
    program = (p.relative_to(ROOT) for p in (ROOT / "nbs/audit/rust").rglob("*.rs"))
    assert {"nbs/audit/rust/Cargo.toml", *map(str, program)} <= names


@pytest.mark.parametrize("version", PYTHONS)
def test_the_wheel_runs_where_nothing_else_is(archives, tmp_path, version):
    python = next(interpreters(version), None)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    run(python, "-m", "venv", "new", cwd=tmp_path)
    scripts = tmp_path / "new" / "bin"
    run(scripts / "pip", "install", "-q", next(archives.glob("*.whl")), cwd=tmp_path)
    imported = run(scripts / "python", "-c", EACH_MODULE, cwd=tmp_path).split()
    assert sorted(imported) == sorted(MODULES)
    assert run(scripts / "ctxlab", "--version", cwd=tmp_path).split() == ["ctxlab", __version__]
    assert "confirmed" in run(
        scripts / "ctxlab", "report", "--quick", "--no-progress", cwd=tmp_path
    )
    data = json.loads((tmp_path / "ctxlab-report" / "claims.json").read_text())
    assert data["ctxlab"] == __version__
    assert data["machine"]["python"].startswith(version)
