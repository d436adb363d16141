"""Checks that can fail: every check of the ladder and of the notebooks' main results, on mutants.

A mutant is a right result that is spoilt on purpose: its sign, its size, its axes or one entry.
Each check must pass on the right result and fail on every mutant of it.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ctxlab.audit.ladder import _PATHS, _RUNGS, _check_call, _inputs, _rungs

NOTEBOOKS = Path(__file__).parents[1] / "nbs"


def one_entry(a):
    "One entry of middling size has the wrong sign, or the largest one where most are zero."
    a = np.array(a)
    order = np.argsort(np.abs(a), axis=None)
    middle, largest = order[a.size // 2], order[-1]
    at = middle if a.flat[middle] else largest
    a.flat[at] = -a.flat[at]
    return a


def transposed(a):
    "The last two axes are swapped where they are equally long."
    square = a.ndim > 1 and a.shape[-1] == a.shape[-2]
    return a.swapaxes(-1, -2).copy() if square else a.copy()


NUMBER_MUTANTS = {
    "sign": lambda a: -a,
    "factor 2": lambda a: 2 * a,
    "factor 0": lambda a: 0 * a,
}
ARRAY_MUTANTS = NUMBER_MUTANTS | {"transpose": transposed, "one entry": one_entry}
SIZES = {"small": (40, 40), "large": (512, 768)}
rest = partial(pytest.param, marks=pytest.mark.mutants)  # what the quick tests leave out


def mutants_of(a):
    "Every mutant that differs from `a`, by name."
    a = np.asarray(a)
    of = ARRAY_MUTANTS if a.ndim else NUMBER_MUTANTS
    spoilt = {name: mutate(a) for name, mutate in of.items()}
    return {name: b for name, b in spoilt.items() if not np.array_equal(a, b, equal_nan=True)}


@pytest.fixture(scope="module", params=["small", rest("large")])
def ladder(request):
    "Inputs of one size, and every rung of every path on them."
    data = _inputs(*SIZES[request.param])
    return data, _rungs(data)


@pytest.mark.parametrize("rung", _RUNGS)
@pytest.mark.parametrize("path", _PATHS)
def test_the_ladder_finds_every_mutant(path, rung, ladder):
    data, calls = ladder
    right = calls[path][rung]()
    parts = right if isinstance(right, tuple) else (right,)
    parts = [np.array(part) for part in parts]  # later calls write to what the first one gave

    def passes(parts):
        got = tuple(parts) if len(parts) > 1 else parts[0]
        try:
            _check_call(path, lambda: got, data)
        except AssertionError:
            return False
        return True

    assert passes(parts)
    survivors = []
    for i, part in enumerate(parts):
        found = mutants_of(part)
        assert set(found) >= set(NUMBER_MUTANTS)
        assert ("transpose" in found) == (part.ndim == 2 and part.shape[0] == part.shape[1])
        for name, wrong in found.items():
            if passes([*parts[:i], wrong, *parts[i + 1 :]]):
                survivors.append((i, name))
    assert not survivors


# Notebook, function under test, text that only its check cell holds, and what is spoilt: an
# argument that the function writes to, counted from 0, or a result, counted from -1 backwards.
CHECKS = [
    ("03_reference", "similarity", "pearson = np.corrcoef", -1),
    ("03_reference", "similarity_step", "step = similarity_step(X[0], Y[0])", -1),
    ("03_reference", "ema", "0.9 * previous + 0.1 * new", -1),
    ("03_reference", "apply_context", "assert_equiv(apply_context(x, C, 0.5), x @ M", -1),
    ("03_reference", "apply_context_vjp", "grad_x, grad_s = apply_context_vjp(x", -2),
    ("03_reference", "apply_context_vjp", "grad_x, grad_s = apply_context_vjp(x", -1),
    ("03_reference", "context_gradient", "of_context = numeric_gradient", -1),
    ("05_gemm", "gemm", "def held_equal", -1),
    ("05_gemm", "_accumulate", "_accumulate(a, b, one, alpha, beta)", 2),
    ("05_gemm", "blend", "blend(x[:, part], got", 1),
    ("audit/01_original", "_forward", "def check_forward", -1),
    ("audit/01_original", "_backward", "def check_backward", -2),
    ("audit/01_original", "_backward", "def check_backward", -1),
    ("audit/01_original", "_update", "def check_update", 3),
    ("audit/01_original", "_update_step", "def check_update", 3),
    ("07_context", "_fold", "M = _fold(C, s, np.empty_like(C))", 2),
    ("07_context", "backward_into", "got = out, backward_into(X", 4),
    ("07_context", "backward_into", "got = out, backward_into(X", -1),
    ("07_context", "update_into", "update_into(x, y, slice(None)", 4),
    ("07_context", "update_step_into", "update_step_into(x, y, 0.25", 3),
    ("07_context", "SharedAttentionContext.apply", "assert_equiv(ctx.apply(X), apply", -1),
    ("07_context", "SharedAttentionContext.backward", "grad_x, grad_s = exact.backward", -2),
    ("07_context", "SharedAttentionContext.backward", "grad_x, grad_s = exact.backward", -1),
    ("models/01_layers", "norm_into", "norm_into(x + 100, w, b", -1),
    ("models/01_layers", "norm_backward_into", "assert_gradients(layer_norm", 4),
    ("models/01_layers", "norm_backward_into", "assert_gradients(layer_norm", 5),
    ("models/01_layers", "linear_into", "assert_gradients(linear, G", -1),
    ("models/01_layers", "linear_backward_into", "assert_gradients(linear, G", 3),
    ("models/01_layers", "linear_backward_into", "assert_gradients(linear, G", 4),
    ("models/01_layers", "gelu_into", "gelu_into(z.copy(), beta", -1),
    ("models/01_layers", "gelu_backward_into", "gelu_into(z.copy(), beta", 3),
    ("models/01_layers", "swiglu_into", "assert_gradients(swiglu", -1),
    ("models/01_layers", "swiglu_backward_into", "assert_gradients(swiglu", 3),
    ("models/01_layers", "swiglu_backward_into", "assert_gradients(swiglu", 4),
    ("models/01_layers", "cross_entropy_into", "want = cross_entropy(dz, targets)", -1),
    ("models/01_layers", "cross_entropy_into", "want = cross_entropy(dz, targets)", 0),
    ("models/01_layers", "adam_into", "def adam_plain", 0),
    ("models/01_layers", "adam_into", "def adam_plain", 2),
    ("models/01_layers", "adam_into", "def adam_plain", 3),
    ("models/02_attention", "attention_into", "def cases", 3),
    ("models/02_attention", "attention_backward_into", "def gradients", 6),
    ("models/02_attention", "attention_backward_into", "def gradients", 7),
    ("models/02_attention", "attention_backward_into", "def gradients", 8),
    ("models/04_transformer", "transformer", "want = transformer(block.parameters(), x, H", -1),
    (
        "models/04_transformer",
        "TransformerBlock.forward",
        "want = transformer(block.parameters()",
        -1,
    ),
    ("models/05_diffusion", "silu_into", "a, G = 3 * normal(5, 7)", -1),
    ("models/05_diffusion", "silu_backward_into", "a, G = 3 * normal(5, 7)", -1),
    ("models/06_ssm", "scan_into", "decays = {", -1),
    ("models/06_ssm", "scan_backward_into", "before = np.concatenate([state[:, None]", 3),
    ("models/06_ssm", "scan_backward_into", "before = np.concatenate([state[:, None]", 4),
    ("models/06_ssm", "rg_lru_into", "(3, 2, 40000)", 5),
    ("models/06_ssm", "rg_lru_backward_into", "rg_lru_backward_into(u, _sigmoid", 7),
    ("streaming/01_moments", "ContextStats.similarity", "def assert_exact", -1),
    ("streaming/01_moments", "ContextStats.correlation", "mixed = ContextStats(4", -1),
]


def sampled(checks):
    "The checks as parameters: the first of each notebook is quick, all others are the rest."
    seen = set()
    for check in checks:
        yield rest(*check) if check[0] in seen else pytest.param(*check)
        seen.add(check[0])


def cells(notebook):
    "Sources of the code cells that compute, without those that plot, export or take long."
    stored = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    for source in ("".join(c["source"]) for c in stored if c["cell_type"] == "code"):
        if not any(word in source for word in ("#| slow", "nbdev_export", "plt.subplots")):
            yield "\n".join(line for line in source.splitlines() if "plt" not in line)


def before_check(notebook, text):
    "The names that the notebook has defined before its check cell, and the source of that cell."
    sources = list(cells(notebook))
    holding = [i for i, source in enumerate(sources) if text in source]
    assert len(holding) == 1, f"{text!r} is in {len(holding)} cells"
    names = {"__name__": notebook}
    for source in sources[: holding[0]]:
        exec(source, names)  # a notebook of this repository
    return names, sources[holding[0]]


def spoiling(function, place, mutate):
    "`function`, with what is at `place` replaced by its mutant."

    def wrong(*args, **options):
        result = function(*args, **options)
        results = list(result) if isinstance(result, tuple) else [result]
        right = results[place] if place < 0 else args[place]
        mutant = mutate(np.array(right))
        if isinstance(right, np.ndarray) and right.ndim:
            right[...] = mutant  # in place, as callers may look into the array that they passed
            return result
        results[place] = type(right)(mutant)
        return tuple(results) if isinstance(result, tuple) else results[0]

    return wrong


def owner_of(names, function):
    "Where the notebook holds a function: how to look it up, how to replace it."
    if "." not in function:
        return names[function], partial(names.__setitem__, function)
    kind, method = function.split(".")
    return getattr(names[kind], method), partial(setattr, names[kind], method)


@pytest.mark.parametrize(("notebook", "function", "text", "place"), [*sampled(CHECKS)])
def test_a_notebook_finds_every_mutant(notebook, function, text, place):
    names, source = before_check(notebook, text)
    right, replace = owner_of(names, function)
    possible, survivors = set(), []

    def watched(a):
        possible.update(mutants_of(a))
        return a

    replace(spoiling(right, place, watched))
    exec(source, names)  # what is right passes
    assert possible >= set(NUMBER_MUTANTS)
    for name in sorted(possible):
        replace(spoiling(right, place, ARRAY_MUTANTS[name]))
        try:
            with np.errstate(all="ignore"):
                exec(source, names)
        except AssertionError:
            continue
        survivors.append(name)
    assert not survivors
