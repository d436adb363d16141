"""Every function that writes to memory of its caller, called with arrays of every kind between
canaries: it refuses with one line and writes nothing, or it gives the right result and writes
nothing but that."""

import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from conftest import seeds
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import ctxlab
from ctxlab import context, gemm
from ctxlab.audit import original
from ctxlab.models import attention, diffusion, layers, ssm
from ctxlab.models.transformer import TransformerBlock
from ctxlab.workspace import Workspace

# --- the table ---


class Entry(NamedTuple):
    """How to call a function. `call(arrays, workspace)` gets its arrays in the order of `shapes`.

    A shape is written in letters, as "BSD"; a digit stands for itself, T for S + 1. What follows a
    colon is the kind: "i5" for integers below 5, "b" for truth values. "!" marks an array that is
    written to.
    """

    call: Callable
    shapes: dict[str, str]


WIDTH = 4  # D of the blocks


def mixing(C):
    c = context.SharedAttentionContext(0.5, dtype=C.dtype)
    c.set_incoming(C)
    return c


def block(cls, dtype, *sizes):
    return cls(WIDTH, *sizes, rng=np.random.default_rng(0), dtype=dtype)


def block_backward(b, x, grad_out, out, *levels):
    b.forward(np.array(x), *levels)
    return b.backward(grad_out, out)


def transformer_block(dtype):
    return block(TransformerBlock, dtype, 2, 8)


def diffusion_block(dtype):
    return block(diffusion.DiffusionBlock, dtype, 2, 8)


def ssm_block(dtype):
    return block(ssm.SSMBlock, dtype)


def decoding(kind, x):
    """A block that has begun to decode what `x` may be the tokens of."""
    found = kind(x.dtype)
    found.start(max(len(x), 1), 50)
    return found


def walk(x, alpha_bar, ws):
    few = alpha_bar[:3] if alpha_bar.ndim else alpha_bar
    return diffusion.sample(lambda x, t: np.zeros_like(x), x, few**2 / 99 + 0.1, 2, ws)


BSD, BSD4 = "BSD", "BS4"  # a block has a width of its own

TABLE = {
    "gemm.gemm": Entry(
        lambda a, ws: gemm.gemm(*a, alpha=0.5, beta=2.0), dict(a="MK", b="KN", out="MN!")
    ),
    "gemm.gemm, plain": Entry(lambda a, ws: gemm.gemm(*a), dict(a="MK", b="KN", out="MN!")),
    "gemm.check_out": Entry(
        lambda a, ws: gemm.check_out(a[1], a[0].shape, a[0].dtype, {"x": a[0]}).fill(1),
        dict(x="MN", out="MN!"),
    ),
    "gemm.blend": Entry(lambda a, ws: gemm.blend(*a, 0.5, 2.0), dict(x="BSD", y="BSD!")),
    "original._update": Entry(
        lambda a, ws: original._update(gemm._dot, *a, 0.5), dict(X="SD", Y="SD", C="DD!")
    ),
    "original._update_step": Entry(
        lambda a, ws: original._update_step(gemm._dot, *a, 0.5), dict(x="D", y="D", C="DD!")
    ),
    "context.fold": Entry(
        lambda a, ws: context._fold(a[0], 0.5, a[1]), dict(context="DD", out="DD!")
    ),
    "context.backward_into": Entry(
        lambda a, ws: context.backward_into(a[0], a[1], 0.5, a[2], a[3]),
        dict(x="SD", context="DD", grad_out="SD", out="SD!"),
    ),
    "context.update_into": Entry(
        lambda a, ws: context.update_into(a[0], a[1], slice(0, None), 0.5, a[2], ws.take),
        dict(x="SD", y="SD", C="DD!"),
    ),
    "context.update_step_into": Entry(
        lambda a, ws: context.update_step_into(a[0], a[1], 0.5, a[2], ws.take),
        dict(x="D", y="D", C="DD!"),
    ),
    "context.SharedAttentionContext.apply": Entry(
        lambda a, ws: mixing(a[0]).apply(*a[1:]), dict(incoming="DD", x="BSD", out="BSD!")
    ),
    "context.SharedAttentionContext.backward": Entry(
        lambda a, ws: mixing(a[0]).backward(*a[1:]),
        dict(incoming="DD", x="BSD", grad_out="BSD", out="BSD!"),
    ),
    "context.SharedAttentionContext.context_gradient": Entry(
        lambda a, ws: mixing(a[0]).context_gradient(*a[1:]),
        dict(incoming="DD", x="BSD", grad_out="BSD", out="DD!"),
    ),
    "block.Block.forward": Entry(
        lambda a, ws: transformer_block(a[0].dtype).forward(*a), dict(x=BSD4, out=BSD4 + "!")
    ),
    "block.Block.backward": Entry(
        lambda a, ws: block_backward(transformer_block(a[0].dtype), *a),
        dict(x=BSD4, grad_out=BSD4, out=BSD4 + "!"),
    ),
    "diffusion.DiffusionBlock.forward": Entry(
        lambda a, ws: diffusion_block(a[0].dtype).forward(*a),
        dict(x=BSD4, t="B:i5", out=BSD4 + "!"),
    ),
    "ssm.SSMBlock.forward": Entry(
        lambda a, ws: ssm_block(a[0].dtype).forward(a[0], a[1], state=a[2]),
        dict(x=BSD4, out=BSD4 + "!", state="B4!"),
    ),
    "block.Block.prompt": Entry(
        lambda a, ws: decoding(transformer_block, a[0]).prompt(*a), dict(x=BSD4, out=BSD4 + "!")
    ),
    "block.Block.step": Entry(
        lambda a, ws: decoding(ssm_block, a[0]).step(*a), dict(x="B4", out="B4!")
    ),
    "attention.attention_into": Entry(
        lambda a, ws: attention.attention_into(*a[:5], ws, causal=True, keep=a[5]),
        dict(q="BHSD", k="BHSD", v="BHSD", out="BHSD!", lse="BHS!", keep="BS:b"),
    ),
    "attention.attention_into, with weights": Entry(
        lambda a, ws: attention.attention_into(*a[:5], ws, weights=a[5]),
        dict(q="BHSD", k="BHSD", v="BHSD", out="BHSD!", lse="BHS!", weights="BHSS!"),
    ),
    "attention.attention_backward_into": Entry(
        lambda a, ws: attention.attention_backward_into(*a, ws),
        dict(
            q="BHSD",
            k="BHSD",
            v="BHSD",
            o="BHSD",
            lse="BHS",
            grad_out="BHSD",
            grad_q="BHSD!",
            grad_k="BHSD!",
            grad_v="BHSD!",
        ),
    ),
    "layers.norm_into": Entry(
        lambda a, ws: layers.norm_into(*a),
        dict(x="ND", weight="D", bias="D", out="ND!", stats="2N!"),
    ),
    "layers.norm_backward_into": Entry(
        lambda a, ws: layers.norm_backward_into(*a, ws),
        dict(
            x="ND",
            stats="2N",
            weight="D",
            grad_out="ND",
            out="ND!",
            grad_weight="D!",
            grad_bias="D!",
        ),
    ),
    "layers.linear_into": Entry(
        lambda a, ws: layers.linear_into(*a), dict(x="ND", weight="FD", bias="F", out="NF!")
    ),
    "layers.linear_backward_into": Entry(
        lambda a, ws: layers.linear_backward_into(*a),
        dict(x="ND", weight="FD", grad_out="NF", out="ND!", grad_weight="FD!", grad_bias="F!"),
    ),
    "layers.gelu_into": Entry(
        lambda a, ws: layers.gelu_into(*a, ws), dict(x="ND!", bias="D", cdf="ND!", out="ND!")
    ),
    "layers.gelu_backward_into": Entry(
        lambda a, ws: layers.gelu_backward_into(*a[:4], ws, activated=a[4]),
        dict(x="ND", cdf="ND", grad_out="ND", out="ND!", activated="ND!"),
    ),
    "layers.swiglu_into": Entry(
        lambda a, ws: layers.swiglu_into(*a), dict(a="ND", b="ND", out="ND!")
    ),
    "layers.swiglu_backward_into": Entry(
        lambda a, ws: layers.swiglu_backward_into(*a, ws),
        dict(a="ND", b="ND", grad_out="ND", grad_a="ND!", grad_b="ND!"),
    ),
    "layers.embedding_into": Entry(
        lambda a, ws: layers.embedding_into(*a), dict(table="5D", ids="N:i5", out="ND!")
    ),
    "layers.embedding_backward_into": Entry(
        lambda a, ws: layers.embedding_backward_into(*a),
        dict(ids="N:i5", grad_out="ND", grad_table="5D!"),
    ),
    "layers.cross_entropy_into": Entry(
        lambda a, ws: layers.cross_entropy_into(*a, ws), dict(logits="N5!", targets="N:i5")
    ),
    "layers.adam_into": Entry(
        lambda a, ws: layers.adam_into(*a, 1, ws), dict(param="ND!", grad="ND", m="ND!", v="ND!")
    ),
    "diffusion.combine_into": Entry(
        lambda a, ws: diffusion._combine_into(a[0], a[1], 0.5, 2.0, a[2], ws),
        dict(x="ND", y="ND", out="ND!"),
    ),
    "diffusion.add_noise_into": Entry(
        lambda a, ws: diffusion._add_noise_into(*a[:3], np.linspace(0.9, 0.1, 5), a[3], ws),
        dict(x0="BSD", noise="BSD", t="B:i5", out="BSD!"),
    ),
    "diffusion.silu_into": Entry(lambda a, ws: diffusion.silu_into(*a), dict(a="ND", out="ND!")),
    "diffusion.silu_backward_into": Entry(
        lambda a, ws: diffusion.silu_backward_into(*a, ws), dict(a="ND", grad_out="ND", out="ND!")
    ),
    "diffusion.part_way_into": Entry(
        lambda a, ws: diffusion._part_way_into(*a, 0.5), dict(start="SD", out="SD!")
    ),
    "diffusion.ddim_step_into": Entry(
        lambda a, ws: diffusion._ddim_step_into(a[0], a[1], 0.5, 0.75, a[2], ws),
        dict(x="ND", noise="ND", out="ND!"),
    ),
    "diffusion.sample": Entry(lambda a, ws: walk(*a, ws), dict(x="BSD!", alpha_bar="5")),
    "ssm.scan_into": Entry(
        lambda a, ws: ssm.scan_into(a[0], a[1], a[2], ws, a[3]),
        dict(a="BSD", b="BSD", out="BSD!", state="BD"),
    ),
    "ssm.scan_backward_into": Entry(
        lambda a, ws: ssm.scan_backward_into(*a, ws),
        dict(a="BSD", before="BSD", grad_out="BSD", out="BSD!", grad_a="BSD!"),
    ),
    "ssm.scan_rungs": Entry(
        lambda a, ws: ssm._scan_rungs(*a, ws)["chunked"](), dict(a="BSD", b="BSD", out="BSD!")
    ),
    "ssm.rg_lru_into": Entry(
        lambda a, ws: ssm.rg_lru_into(*a, ws),
        dict(u="BSD", r="BSD", i="BSD", decay="D", a="BSD!", states="BTD!"),
    ),
    "ssm.rg_lru_backward_into": Entry(
        lambda a, ws: ssm.rg_lru_backward_into(*a, ws),
        dict(
            u="BSD",
            r="BSD",
            i="BSD",
            decay="D",
            a="BSD",
            states="BTD",
            dh="BSD!",
            du="BSD!",
            dr="BSD!",
            di="BSD!",
            grad_decay="D!",
        ),
    ),
}

IN_PLACE = {"gemm.blend", "original._update", "original._update_step", "diffusion.sample"}
"""Functions that write to an argument and have neither a name nor a parameter that says so."""


def public(module):
    """Functions, and methods of classes, that a module exports: name -> function."""
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing) and thing.__module__ == module.__name__:
            for method, function in vars(thing).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{name}.{method}", function


def writers():
    """What says by its name or by a parameter that it writes to an array of its caller."""
    for info in pkgutil.walk_packages(ctxlab.__path__, "ctxlab."):
        for name, function in public(importlib.import_module(info.name)):
            if name.endswith("_into") or "out" in inspect.signature(function).parameters:
                yield f"{info.name.rpartition('.')[2]}.{name}"


def test_the_table_is_complete():
    told = {name.split(",")[0] for name in TABLE}
    assert told >= set(writers()) | IN_PLACE  # and some that only this package uses


# --- arrays of every kind, between canaries ---

MARGIN = 4096  # bytes of canary on each side
PATTERN = np.arange(251, dtype=np.uint8)  # a prime period: shifted, it does not fit itself


class Subclass(np.ndarray):
    pass


LAYOUTS = [
    "fortran",
    "gaps",
    "wide rows",
    "first backwards",
    "last backwards",
    "first step 0",
    "last step 0",
    "overlapping rows",
    "unaligned",
    "read-only",
    "subclass",
]
DTYPES = ["float32", "float64", ">f4", ">f8", "float16", "complex64", "int64", "uint8", "bool"]
SHAPES = ["first + 1", "first - 1", "last + 1", "last - 1", "one axis more", "one less", "none"]
KINDS = [
    *(("layout", v) for v in LAYOUTS),
    *(("dtype", v) for v in DTYPES),
    *(("shape", v) for v in SHAPES),
    *(("shares", v) for v in (0, 1, -1, 2)),
]


def spoil_shape(shape, how):
    if how == "none" or not shape:
        return ()
    if how == "one axis more":
        return (*shape, 1)
    if how == "one less":
        return shape[1:]
    i = 0 if how.startswith("first") else len(shape) - 1
    change = 1 if how.endswith("+ 1") else -1
    return (*shape[:i], max(shape[i] + change, 0), *shape[i + 1 :])


def steps(shape, size, layout):
    """Strides in bytes."""
    lengths = list(shape)
    if layout == "wide rows" and lengths:
        lengths[-1] += 3
    strides, reach = [], size * (2 if layout == "gaps" else 1)
    for n in lengths if layout == "fortran" else lengths[::-1]:
        strides.append(reach)
        reach *= max(n, 1)
    if layout != "fortran":
        strides.reverse()
    if strides:
        i = 0 if "first" in layout or layout == "overlapping rows" else -1
        factor = {"backwards": -1, "0": 0}.get(layout.rsplit(" ", 1)[-1], 1)
        strides[i] *= factor
        if layout == "overlapping rows":
            strides[0] = max(strides[0] // size // 2, 1) * size
    return tuple(strides)


class Placed:
    """An array within a buffer of canaries; several may lie in one buffer."""

    def __init__(self, shape, dtype, layout="", host=None, shift=0):
        dtype = np.dtype(dtype)
        strides = steps(shape, dtype.itemsize, layout)
        ends = [s * max(n - 1, 0) for s, n in zip(strides, shape, strict=True)]
        low = sum(min(e, 0) for e in ends)
        size = sum(max(e, 0) for e in ends) - low + dtype.itemsize
        if host is None:
            self.buffer = np.resize(PATTERN, 2 * MARGIN + size)
            at = MARGIN - low + (layout == "unaligned")
        else:
            self.buffer = host.buffer
            at = min(max(host.at + shift * dtype.itemsize, -low), self.buffer.size - size - low)
        self.at, self.layout = at, layout
        self.view = np.ndarray(shape, dtype, self.buffer, at, strides)
        mask = np.zeros(self.buffer.size, bool)
        np.ndarray((*shape, dtype.itemsize), bool, mask, at, (*strides, 1))[...] = True
        self.mask = mask

    def fill(self, rng, kind):
        if kind.startswith("i"):
            self.view[...] = rng.integers(0, int(kind[1:]), self.view.shape)
        elif kind == "b":
            self.view[...] = rng.random(self.view.shape) < 0.8
        else:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.view[...] = (rng.random(self.view.shape) + 0.1).astype(self.view.dtype)

    def handed_over(self):
        view = self.view.view(Subclass) if self.layout == "subclass" else self.view.view()
        if self.layout == "read-only":
            view.flags.writeable = False
        return view


def dimensions(letters, sizes):
    return tuple(int(c) if c.isdigit() else sizes[c] for c in letters)


@st.composite
def situations(draw, entry):
    """Arrays for one call: most as they should be, one or two not."""
    sizes = {c: draw(st.integers(0, 4), label=c) for c in "BHSDNMKF"}
    sizes["T"] = sizes["S"] + 1
    names = list(entry.shapes)
    rarely = st.integers(0, 9).map(lambda i: i == 0)
    faults = {} if draw(rarely) else {draw(st.sampled_from(names)): draw(st.sampled_from(KINDS))}
    if draw(st.booleans()):
        faults[draw(st.sampled_from(names))] = draw(st.sampled_from(KINDS))
    base = draw(st.sampled_from(["float32", "float64"]))
    rng = np.random.default_rng(draw(seeds))
    placed = {}
    for name, text in entry.shapes.items():
        letters, _, kind = text.rstrip("!").partition(":")
        what, how = faults.get(name, ("", ""))
        shape = dimensions(letters, sizes)
        dtype = {"i": "int64", "b": "bool"}.get(kind[:1], base)
        host = None
        if what == "shape":
            shape = spoil_shape(shape, how)
        elif what == "dtype":
            dtype = how
        elif what == "shares" and placed:
            host = placed[draw(st.sampled_from(list(placed)))]
        shift = how if what == "shares" else 0
        placed[name] = Placed(shape, dtype, how if what == "layout" else "", host, shift)
        placed[name].fill(rng, kind)
    return placed


def changed(placed, before, written):
    """Whether bytes differ outside the views of `written`."""
    for p in placed.values():
        allowed = np.zeros(p.buffer.size, bool)
        for name in written:
            if placed[name].buffer is p.buffer:
                allowed |= placed[name].mask
        differ = p.buffer != before[id(p.buffer)]
        if np.any(differ & ~allowed):
            return True
    return False


def close(a, b):
    """Equal but for rounding, which a layout may change; what goes wrong here is wrong by far."""
    a, b = (np.asarray(v).astype(np.complex128) for v in (a, b))
    finite = np.isfinite(b)
    size = np.max(np.abs(b), where=finite, initial=1.0)
    same = np.isfinite(a) == finite
    return bool(np.all(same) and np.all(np.abs(a[finite] - b[finite]) <= 1e-3 * size))


def run(entry, arrays):
    """The error of a call, or None."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            entry.call(arrays, Workspace())
        except Exception as error:
            return error
    return None


def verdict(entry, placed):
    """What is wrong with a call, or None."""
    written = [name for name, text in entry.shapes.items() if text.endswith("!")]
    before = {id(p.buffer): p.buffer.copy() for p in placed.values()}
    clean = {name: np.array(p.view, order="C") for name, p in placed.items()}
    error = run(entry, [p.handed_over() for p in placed.values()])
    if error is not None:
        if changed(placed, before, []):
            return f"{type(error).__name__} after something was written: {error}"
        if not isinstance(error, (ValueError, TypeError)) or "\n" in str(error):
            return f"no clear error: {type(error).__name__}: {error}"
        return None
    if changed(placed, before, written):
        return "something was written beside what is written to"
    failed = run(entry, list(clean.values()))
    if failed is not None:
        return f"accepted, though arrays of one's own in C order give {failed!r}"
    for name in written:
        if not close(placed[name].view, clean[name]):
            return f"{name} is wrong: {placed[name].view.tolist()}, not {clean[name].tolist()}"
    return None


def describe(placed):
    return ", ".join(
        f"{name}: {p.view.dtype.str}{p.view.shape} strides {p.view.strides}"
        f"{' ' + p.layout if p.layout else ''}"
        for name, p in placed.items()
    )


OPEN = {}
"""What does not hold yet; a test that passes says that its line here can go."""


def marked(name):
    marks = [pytest.mark.xfail(reason=OPEN[name], strict=True)] if name in OPEN else []
    return pytest.param(name, marks=marks)


each = pytest.mark.parametrize("name", [marked(name) for name in TABLE])
drawn = settings(
    phases=[Phase.explicit, Phase.generate],  # what is drawn is small as it is
    suppress_health_check=list(HealthCheck),
)


def fits_or_is_refused(name, data):
    placed = data.draw(situations(TABLE[name]))
    fault = verdict(TABLE[name], placed)
    assert fault is None, f"{fault}; {describe(placed)}"


@each
@settings(drawn, max_examples=40)
@given(data=st.data())
def test_what_does_not_fit_is_refused_and_nothing_else_is_written(name, data):
    fits_or_is_refused(name, data)


@pytest.mark.thorough
@each
@settings(drawn, max_examples=300)
@given(data=st.data())
def test_more_of_what_does_not_fit_is_refused(name, data):
    fits_or_is_refused(name, data)


GUESTS = [  # an array of numbers of tokens or of a mask, and one that is written to
    (entry, guest, host)
    for entry, e in TABLE.items()
    for guest in e.shapes
    if ":" in e.shapes[guest] and not e.shapes[guest].endswith("!")
    for host in e.shapes
    if e.shapes[host].endswith("!")
]


@pytest.mark.parametrize(("name", "guest", "host"), GUESTS)
def test_what_is_read_may_not_lie_within_what_is_written(name, guest, host):
    entry, rng = TABLE[name], np.random.default_rng(0)
    sizes = dict.fromkeys("BHSDNMKF", 3) | {"T": 4}
    placed = {}
    for each in sorted(entry.shapes, key=lambda each: each == guest):
        letters, _, kind = entry.shapes[each].rstrip("!").partition(":")
        dtype = {"i": "int64", "b": "bool"}.get(kind[:1], "float32")
        inside = placed[host] if each == guest else None
        placed[each] = Placed(dimensions(letters, sizes), dtype, host=inside)
        placed[each].fill(rng, kind)
    arguments = [placed[each].handed_over() for each in entry.shapes]
    error = run(entry, arguments)
    assert isinstance(error, ValueError), describe(placed)
    assert re.match(rf"{host}: .*overlaps {guest} in memory", str(error))


def padded(x):
    """A mask within the memory of `x`."""
    keep = x.view(bool).reshape(-1)[: x.shape[0] * x.shape[1]].reshape(x.shape[:2])
    keep[...] = True
    return keep


def test_padding_may_not_lie_within_a_result():
    block = TransformerBlock(4, 2, 4, rng=np.random.default_rng(0))
    x, out = np.ones((2, 3, 4), np.float32), np.zeros((2, 3, 4), np.float32)
    with pytest.raises(ValueError, match=r"^out: overlaps keep in memory"):
        block.forward(x, out, keep=padded(out))
    keep = padded(out)
    block.forward(x, keep=keep)
    with pytest.raises(ValueError, match=r"^out: overlaps keep in memory"):
        block.backward(x, out)
