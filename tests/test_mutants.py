"""Each check of a main result is seen to fail: the function under test is broken, and the notebook runs.

A mutant changes what a function returns or writes: its sign, a factor of 2 or 0, one entry, rows in
another order. The cells of the notebook then run, from the definition on, until a check fails.
"""

import json
import os
import re
from functools import cache, wraps
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from ctxlab import ladder

NBS = Path(__file__).resolve().parent.parent / "nbs"
SKIPPED = re.compile(r"^#\|\s*(slow|eval:\s*false)\b|nbdev_export\(\)", re.MULTILINE)


def one_entry(a):
    """The largest entry, as seen by its size, is off by a half of it."""
    changed = np.array(a)
    at = np.unravel_index(np.argmax(np.abs(np.nan_to_num(changed))), changed.shape)
    changed[at] = 1.5 * changed[at] + 1
    return changed


MUTANTS = {
    "sign": lambda a: -np.asarray(a),
    "twice": lambda a: 2 * np.asarray(a),
    "nothing": lambda a: 0 * np.asarray(a),
    "one entry": one_entry,
}


def changed(value, mutant):
    """`value` after the change; arrays that may be written to are changed in place."""
    with np.errstate(all="ignore"):
        new = MUTANTS[mutant](value)
    if isinstance(value, np.ndarray) and value.flags.writeable:
        value[...] = new
        return value
    return new.astype(value.dtype) if isinstance(value, np.ndarray) else type(value)(new)


def broken(function, mutant, where):
    """`function`, whose result, part of the result, or written argument is changed."""

    @wraps(function)
    def mutated(*args, **options):
        result = function(*args, **options)
        if where == "result":
            return changed(result, mutant)
        kind, index = where
        if kind == "argument":
            changed(args[index], mutant)
            return result
        parts = list(result)
        parts[index] = changed(parts[index], mutant)
        return tuple(parts)

    return mutated


@cache
def code(notebook):
    """The cells of code that run in tests."""
    stored = json.loads((NBS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in stored if c["cell_type"] == "code"]
    return [source for source in sources if not SKIPPED.search(source)]


def run(notebook, name, mutant, where):
    """Run the cells with the function `name` broken as soon as it is defined."""
    space, is_broken = {"__name__": "__main__"}, False
    for source in code(notebook):
        exec(compile(source, f"{notebook}: {name}", "exec"), space)
        if not is_broken and re.search(rf"^def {name}\b", source, re.MULTILINE):
            space[name] = broken(space[name], mutant, where)
            is_broken = True
    assert is_broken, f"{notebook} does not define {name}"


# Notebook, function, and what of it is changed.
RESULTS = [
    ("02_reference", "similarity", "result"),
    ("02_reference", "similarity_step", "result"),
    ("02_reference", "ema", "result"),
    ("02_reference", "apply_context", "result"),
    ("02_reference", "apply_context_vjp", ("part", 0)),
    ("02_reference", "apply_context_vjp", ("part", 1)),
    ("02_reference", "context_gradient", "result"),
    ("03_gemm", "gemm", "result"),
    ("03_gemm", "blend", ("argument", 1)),
    ("05_context", "backward_into", "result"),
    ("05_context", "backward_into", ("argument", 4)),
    ("05_context", "fold", "result"),
    ("06_layers", "norm_into", ("argument", 3)),
    ("06_layers", "linear_into", ("argument", 3)),
    ("06_layers", "swiglu_into", "result"),
    ("06_layers", "cross_entropy_into", "result"),
    ("06_layers", "adam_into", ("argument", 0)),
    ("06_layers", "gelu_into", ("argument", 3)),
    ("06_layers", "norm_backward_into", ("argument", 4)),
    ("06_layers", "norm_backward_into", ("argument", 5)),
    ("06_layers", "linear_backward_into", ("argument", 4)),
    ("06_layers", "embedding_into", ("argument", 2)),
    ("06a_attention", "attention_into", ("argument", 3)),
    ("06a_attention", "attention_backward_into", ("argument", 6)),
    ("06a_attention", "attention_backward_into", ("argument", 7)),
    ("06a_attention", "attention_backward_into", ("argument", 8)),
    ("03a_original", "forward", "result"),
    ("03a_original", "backward", ("part", 0)),
    ("03a_original", "backward", ("part", 1)),
    ("07_transformer", "transformer", "result"),
    ("07_transformer", "transformer_vjp", ("part", 0)),
    ("08_diffusion", "diffusion", "result"),
    ("08_diffusion", "silu_into", "result"),
    ("09_ssm", "scan_backward_into", ("argument", 3)),
    ("09_ssm", "rg_lru_into", ("argument", 5)),
    ("09_ssm", "scan_into", ("argument", 2)),
]


@pytest.fixture
def in_the_folder(monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(NBS)
    monkeypatch.setitem(os.environ, "IN_TEST", "1")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize(("notebook", "name", "where"), RESULTS, ids=lambda v: str(v))
def test_a_broken_result_is_found_by_its_notebook(notebook, name, where, mutant, in_the_folder):
    with pytest.raises(AssertionError):
        run(notebook, name, mutant, where)


# The ladder


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("path", ladder.PATHS)
@pytest.mark.parametrize("rung", ladder.RUNGS)
@pytest.mark.parametrize(("S", "D"), [(33, 7), (512, 768)])
def test_a_broken_call_is_found_by_the_ladder(S, D, rung, path, mutant):
    data, call = prepared(S, D, path, rung)
    parts = [0, 1] if path == "backward" else [None]
    for part in parts:

        def wrong(part=part):
            result = call()
            if part is None:
                return copied(result, mutant)
            parts = list(result)
            parts[part] = copied(parts[part], mutant)
            return tuple(parts)

        with pytest.raises(AssertionError):
            ladder.check_call(path, wrong, data)


def copied(value, mutant):
    """A copy of the value, changed."""
    return changed(np.array(value) if isinstance(value, np.ndarray) else value, mutant)


def prepared(S, D, path, rung):
    """The data, and a call that gives the right result each time it is new."""
    data = inputs(S, D)
    return data, lambda: ladder.rungs(data)[path][rung]()


@cache
def inputs(S, D):
    return ladder.inputs(S, D)


def test_a_context_in_transposed_order_is_found():
    data = inputs(512, 768)
    right = ladder.rungs(data)["update"]["less work"]
    with pytest.raises(AssertionError):
        ladder.check_call("update", lambda: np.ascontiguousarray(right().T), data)
