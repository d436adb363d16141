"""The package as a whole: light imports, requirements, its face, documentation."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import ctxlab

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    m.name for m in pkgutil.iter_modules(ctxlab.__path__) if not m.name.startswith("_")
)
settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
FACTS = settings["DEFAULT"]


def fresh(code):
    """What the code prints in a new process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("module", ["ctxlab", "ctxlab.context", "ctxlab.data", "ctxlab.measure"])
def test_imports_stay_light(module):
    # Only a fresh process can tell what an import drags in.
    before = "import sys, numpy; old = {*sys.modules}"
    loaded = fresh(f"{before}; import {module}; print(*sys.modules.keys() - old)")
    heavy = {
        "matplotlib",
        "tqdm",
        "scipy",
        "hypothesis",
        "pytest",
        "nbdev",
        "fastcore",
        "IPython",
        "pandas",
    }
    assert module in loaded
    assert heavy.isdisjoint(name.partition(".")[0] for name in loaded)
    assert "numpy.random" not in loaded  # NumPy itself loads it when it is used


@pytest.mark.parametrize("kind", ["", "distributed_"])
def test_each_requirement_names_its_lowest_version(kind):
    # The gate of lowest versions installs these entries with == in place of >=.
    for entry in FACTS[f"{kind}requirements"].split():
        assert re.fullmatch(r"[\w.-]+(\[[\w,]+\])?>=\d+(\.\d+)+", entry), entry


PEERS = {"torch"}  # what timings may be compared with, where it happens to be installed


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def test_every_import_is_a_declared_requirement():
    declared = {re.match(r"[\w.-]+", e)[0] for e in FACTS["requirements"].split()} | {"ctxlab"}
    for path in (ROOT / "ctxlab").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert set(imported(tree)) - declared - PEERS - sys.stdlib_module_names == set(), path.name
        top = ast.Module(
            [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []
        )
        assert PEERS.isdisjoint(imported(top)), path.name


# The face: names and submodules that are loaded when they are first used


def test_importing_the_package_loads_nothing():
    code = "import sys; old = {*sys.modules}; import ctxlab; print(*sys.modules.keys() - old)"
    assert fresh(code) == ["ctxlab"]


@pytest.mark.parametrize("name", ctxlab._HOMES)
def test_a_name_is_that_of_its_module(name):
    home = importlib.import_module(f"ctxlab.{ctxlab._HOMES[name]}")
    assert getattr(ctxlab, name) is getattr(home, name)
    assert getattr(ctxlab, name).__module__ == home.__name__


def test_a_name_is_there_in_a_new_process_and_loads_only_what_it_needs():
    code = "import sys, ctxlab; ctxlab.Workspace(); print(*sys.modules)"
    loaded = {name for name in fresh(code) if name.startswith("ctxlab.")}
    assert "ctxlab.workspace" in loaded
    assert loaded.isdisjoint({"ctxlab.context", "ctxlab.transformer", "ctxlab.claims"})


@pytest.mark.parametrize("module", MODULES)
def test_a_submodule_is_there_without_an_import_of_its_own(module):
    code = f"import ctxlab; print(ctxlab.{module}.__name__)"
    assert fresh(code) == [f"ctxlab.{module}"]


def test_no_name_hides_a_submodule():
    assert set(ctxlab._HOMES).isdisjoint(MODULES)


def test_dir_and_star_offer_the_face():
    assert {*ctxlab.__all__, *MODULES} <= set(dir(ctxlab))
    assert set(fresh("from ctxlab import *; print(*dir())")) >= set(ctxlab._HOMES)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("Worksapce", "Workspace"), ("gem", "gemm"), ("DerivedValues", "DerivedValue")],
)
def test_a_wrong_name_gets_the_near_ones(wrong, near):
    with pytest.raises(AttributeError, match=rf"'ctxlab' .*'{wrong}'; did you mean .*\b{near}\b"):
        getattr(ctxlab, wrong)
    with pytest.raises(ImportError, match=wrong):
        exec(f"from ctxlab import {wrong}")


@pytest.mark.parametrize("wrong", ["xyzzy", "_workspace", "__wrapped__"])
def test_a_name_like_no_other_gets_none(wrong):
    assert not hasattr(ctxlab, wrong)
    with pytest.raises(AttributeError, match=f"^module 'ctxlab' has no attribute '{wrong}'$"):
        getattr(ctxlab, wrong)


def test_an_error_inside_a_submodule_is_not_taken_for_a_missing_name(monkeypatch):
    def broken(name):
        raise ImportError("numpy is broken", name="numpy")

    monkeypatch.delattr(ctxlab, "load_pairs", raising=False)
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ImportError, match="numpy is broken"):
        ctxlab.load_pairs  # noqa: B018


def test_type_checkers_are_told_the_same_names():
    tree = ast.parse((ROOT / "ctxlab/__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = [
        (node.module.removeprefix("ctxlab").lstrip("."), alias.name)
        for node in block.body
        for alias in node.names
    ]
    assert sorted(told) == sorted(
        [("", m) for m in MODULES] + [(home, name) for name, home in ctxlab._HOMES.items()]
    )


@pytest.mark.parametrize("module", MODULES)
def test_public_things_are_documented(module):
    found = importlib.import_module(f"ctxlab.{module}")
    assert found.__doc__
    missing = []
    for name in found.__all__:
        thing = getattr(found, name)
        if not callable(thing) or getattr(thing, "__module__", None) != found.__name__:
            continue  # a constant, or an alias of a type
        missing += [name] * (not inspect.getdoc(thing) or thing.__doc__ is None)
        if inspect.isclass(thing):
            missing += [
                f"{name}.{n}"
                for n, member in vars(thing).items()
                if inspect.isfunction(member)
                and not n.startswith("_")
                and not inspect.getdoc(member)
            ]
    assert not missing


@pytest.mark.parametrize("module", MODULES)
def test_all_names_what_exists(module):
    found = importlib.import_module(f"ctxlab.{module}")
    assert len(set(found.__all__)) == len(found.__all__)
    assert all(hasattr(found, name) and not name.startswith("_") for name in found.__all__)
