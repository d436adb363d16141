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
ROOT_MODULES = sorted(
    m.name for m in pkgutil.iter_modules(ctxlab.__path__) if not m.name.startswith("_")
)
MODULES = sorted(
    m.name.removeprefix("ctxlab.")
    for m in pkgutil.walk_packages(ctxlab.__path__, "ctxlab.")
    if not m.name.rpartition(".")[2].startswith("_")
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


KINDS = ["", "completion_", "distributed_", "formats_", "memory_", "planning_"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_requirement_names_its_lowest_version(kind):
    # The gate of lowest versions installs these entries with == in place of >=.
    for entry in FACTS[f"{kind}requirements"].split():
        assert re.fullmatch(r"[\w.-]+(\[[\w,]+\])?>=\d+(\.\d+)+", entry), entry


OPTIONAL = {
    "torch",
    "jax",
    "numexpr",
    "numba",
    "omnimalloc",
    "shtab",
    "memray",
}  # of the extras: imported where they are used


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def test_every_import_is_a_declared_requirement():
    declared = {re.match(r"[\w.-]+", e)[0] for e in FACTS["requirements"].split()} | {"ctxlab"}
    for path in (ROOT / "ctxlab").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.stem == "pytest_plugin":  # pytest alone loads it
            assert set(imported(tree)) - {"pytest", "ctxlab"} <= sys.stdlib_module_names
            continue
        assert set(imported(tree)) - declared - OPTIONAL - sys.stdlib_module_names == set(), (
            path.name
        )
        top = ast.Module(
            [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []
        )
        assert OPTIONAL.isdisjoint(imported(top)), path.name


# The face: names and submodules that are loaded when they are first used


def test_importing_the_package_loads_nothing():
    code = "import sys; old = {*sys.modules}; import ctxlab; print(*sys.modules.keys() - old)"
    assert fresh(code) == ["ctxlab"]


PACKAGES = [ctxlab, ctxlab.models, ctxlab.streaming, ctxlab.audit]
FACES = [(package, name) for package in PACKAGES for name in package._HOMES]


@pytest.mark.parametrize(("package", "name"), FACES, ids=lambda p: getattr(p, "__name__", p))
def test_a_name_is_that_of_its_module(package, name):
    home = importlib.import_module(f"{package.__name__}.{package._HOMES[name]}")
    found = getattr(package, name)
    assert found is getattr(home, name)
    assert name in home.__all__
    assert getattr(found, "__module__", home.__name__) == home.__name__


def test_a_name_is_there_in_a_new_process_and_loads_only_what_it_needs():
    code = "import sys, ctxlab; ctxlab.Workspace(); print(*sys.modules)"
    loaded = {name for name in fresh(code) if name.startswith("ctxlab.")}
    assert "ctxlab.workspace" in loaded
    assert loaded.isdisjoint({"ctxlab.context", "ctxlab.models", "ctxlab.audit"})


@pytest.mark.parametrize("module", ROOT_MODULES)
def test_a_submodule_is_there_without_an_import_of_its_own(module):
    code = f"import ctxlab; print(ctxlab.{module}.__name__)"
    assert fresh(code) == [f"ctxlab.{module}"]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_no_name_hides_a_submodule(package):
    assert set(package._HOMES).isdisjoint(m.name for m in pkgutil.iter_modules(package.__path__))


@pytest.mark.parametrize("room", ["models", "streaming", "audit"])
def test_a_room_loads_nothing_before_it_is_used(room):
    code = f"import sys, ctxlab.{room}; print(*(m for m in sys.modules if m.startswith('ctxlab')))"
    assert fresh(code) == ["ctxlab", f"ctxlab.{room}"]
    names = importlib.import_module(f"ctxlab.{room}")
    assert set(names.__all__) <= set(dir(names))
    with pytest.raises(AttributeError, match=f"^module 'ctxlab.{room}' has no attribute 'nothing'"):
        names.nothing  # noqa: B018


def test_dir_and_star_offer_the_face():
    assert {*ctxlab.__all__, *ROOT_MODULES} <= set(dir(ctxlab))
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


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_type_checkers_are_told_the_same_names(package):
    stub = ast.parse(Path(package.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    told = [
        (node.module.removeprefix(package.__name__).lstrip("."), alias.name)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    modules = (m.name for m in pkgutil.iter_modules(package.__path__))
    wanted = [("", name) for name in modules if not name.startswith("_")]
    wanted += [(home, name) for name, home in package._HOMES.items()]
    assert sorted(told) == sorted(wanted)


# Names that have moved since version 0.1.0


@pytest.mark.parametrize(("old", "new"), ctxlab._MOVED.items())
def test_an_old_module_says_where_it_is_now(old, new):
    says = f"^ctxlab.{old} is now ctxlab.{new}$"
    assert new in MODULES
    assert not hasattr(ctxlab, old)
    with pytest.raises(AttributeError, match=says):
        getattr(ctxlab, old)
    for statement in (
        f"import ctxlab.{old}",
        f"import ctxlab.{old} as module",
        f"from ctxlab import {old}",
        f"from ctxlab.{old} import x",
        f"import ctxlab.{old}.deeper",
    ):
        with pytest.raises(ImportError, match=says):
            exec(statement)


@pytest.mark.parametrize("name", ["plan", "record"])
def test_an_old_name_says_where_it_is_now(name):
    says = rf"^ctxlab\.workspace\.{name} is now ctxlab\.planning\.{name}$"
    assert callable(getattr(ctxlab.planning, name))
    for statement in (
        f"from ctxlab.workspace import {name}",
        f"from ctxlab.workspace import {name} as other",
        f"import ctxlab.workspace; ctxlab.workspace.{name}",
    ):
        with pytest.raises(ImportError, match=says):
            exec(statement)
    with pytest.raises(AttributeError, match=r"^module 'ctxlab.workspace' has no attribute 'nam'$"):
        ctxlab.workspace.nam  # noqa: B018


def test_other_names_that_are_not_there_fail_as_ever():
    for name in ("transformer", "ctxlab.models.nothing", "ctxlab.nothing"):
        with pytest.raises(ModuleNotFoundError, match=r"^No module named"):
            importlib.import_module(name)


def test_the_public_names_are_few():
    found = [importlib.import_module(f"ctxlab.{module}") for module in MODULES]
    names = [f"{m.__name__}.{name}" for m in found if m not in PACKAGES for name in m.__all__]
    assert len(names) < 150, names  # what a reader of the reference can look through


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
