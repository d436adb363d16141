"""The package as a whole: light imports, one list of requirements, the agreed names, documentation."""

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


@pytest.mark.parametrize("module", ["ctxlab", "ctxlab.context", "ctxlab.data", "ctxlab.measure"])
def test_imports_stay_light(module):
    # Only a fresh process can tell what an import drags in.
    code = f"import sys, numpy; old = {{*sys.modules}}; import {module}; print(*sys.modules.keys() - old)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
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


def requirement_names():
    entries = (FACTS["requirements"] + " " + FACTS["dev_requirements"]).split()
    return {re.match(r"[\w.-]+", entry)[0] for entry in entries}


def test_settings_ini_is_the_only_list_of_requirements():
    assert {"numpy", "threadpoolctl", "pytest", "hypothesis"} <= requirement_names()
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    texts = {
        node.value
        for node in ast.walk(setup)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not any(
        re.search(rf"\b{re.escape(name)}\b", text) for name in requirement_names() for text in texts
    )
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not re.search(
        r"^\s*(\[project|dependencies|optional-dependencies)", pyproject, re.MULTILINE
    )
    assert not [
        p.name
        for p in ROOT.glob("*")
        if re.search(r"requirements.*\.txt|setup\.cfg|environment.*\.ya?ml", p.name)
    ]


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


def test_the_version_has_one_source():
    assert ctxlab.__version__ == FACTS["version"]


# As agreed in the design; a parameter's default is part of the promise, annotations are not.
SIGNATURES = """
reference.sample_rows(n_rows, max_rows=32)
reference.similarity(x, y, *, rows=None, max_rows=32, floor=1e-12)
reference.similarity_step(x, y, *, floor=1e-12)
reference.ema(previous, new, rate)
reference.apply_context(x, context, strength)
reference.apply_context_vjp(x, context, strength, grad_out)
gemm.gemm(a, b, out, *, alpha=1.0, beta=0.0)
workspace.Workspace(*, growth='pow2', limit_bytes=None, debug=False)
workspace.Workspace.take(self, name, shape, dtype=float32)
workspace.Workspace.ensure_capacity(self, requests)
workspace.Workspace.next_generation(self)
workspace.Workspace.clear(self)
workspace.Workspace.release(self)
context.SharedAttentionContext(strength=0.0, update_rate=0.01, *, max_rows=32, dtype=float32, workspace=None, floor=1e-12)
context.SharedAttentionContext.set_incoming(self, context)
context.SharedAttentionContext.update(self, x, y, *, dim=None, rows=None)
context.SharedAttentionContext.update_step(self, x, y, *, dim=None)
context.SharedAttentionContext.apply(self, x, out=None)
context.SharedAttentionContext.backward(self, x, grad_out, out=None)
context.SharedAttentionContext.reset(self)
context.SharedAttentionContext.weight_norm(self)
context.SharedAttentionContext.state_dict(self)
context.SharedAttentionContext.load_state_dict(self, state)
""".split("\n")[1:-1]


def look_up(path):
    module, *names = path.split(".")
    found = importlib.import_module(f"ctxlab.{module}")
    for name in names:
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("promise", SIGNATURES, ids=lambda s: s.partition("(")[0])
def test_signatures_are_as_agreed(promise):
    path, _, parameters = promise.partition("(")
    shown = []
    for p in inspect.signature(look_up(path)).parameters.values():
        default = getattr(p.default, "__name__", repr(p.default))
        shown += ["*"] * (p.kind is p.KEYWORD_ONLY and "*" not in shown)
        shown.append(p.name if p.default is p.empty else f"{p.name}={default}")
    assert ", ".join(shown) + ")" == parameters


@pytest.mark.parametrize("name", ["strength", "update_rate", "incoming", "outgoing", "nbytes"])
def test_properties_are_as_agreed(name):
    assert isinstance(
        inspect.getattr_static(look_up("context.SharedAttentionContext"), name), property
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
