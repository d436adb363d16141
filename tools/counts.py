"""Count the instructions and allocations of the hot paths, and compare with the stored counts.

`check` exits with 1 where a path takes over 2 % more than stored; `store` stores what it finds.
Counts are not disturbed by what else the machine does, so they show what a timing cannot.

Instructions are counted by valgrind's callgrind, in one process for all paths. `ascii(x)` asks `x`
for its text through the C function PyObject_ASCII, which hardly anything else uses; callgrind
collects inside of it only, and writes a file at its end. Valgrind offers programs no AVX-512, so
OpenBLAS and NumPy take the kernels of a processor without it, and the counts are of those.
"""

import argparse
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

STORED = Path(__file__).resolve().with_name("counts.json")
LIMIT = 0.02  # of the stored count, that one may exceed it by
WARMUP, CALLS = 10, 3  # calls before those that count; calls that count
COUNTED = "PyObject_ASCII"
# The peak holds Python objects, which come from a cache or not.
SLACK = {"peak": 1024}  # bytes that a count may exceed the stored one by, besides
ENVIRONMENT = ("python", "numpy", "blas", "simd", "libc")  # what instructions depend on

# --- what is counted: functions of (S, D) that make a call ---


def arrays(S: int, D: int, n: int = 3) -> list[np.ndarray]:
    """`n` random float32 arrays (S, D), aligned."""
    from ctxlab.gemm import aligned_empty

    rng = np.random.default_rng(0)
    return [rng.standard_normal(dtype=np.float32, out=aligned_empty((S, D))) for _ in range(n)]


def context(D: int):
    """A context that mixes something in."""
    from ctxlab.context import SharedAttentionContext

    found = SharedAttentionContext(0.5, 0.1)
    found.set_incoming(np.tanh(arrays(D, D, 1)[0]))
    return found


def context_apply(S, D):
    X, _, out = arrays(S, D)
    return partial(context(D).apply, X, out)


def context_backward(S, D):
    X, G, out = arrays(S, D)
    return partial(context(D).backward, X, G, out)


def context_update(S, D):
    X, Y, _ = arrays(S, D)
    return partial(context(D).update, X, Y)


def context_step_update(S, D):
    X, Y, _ = arrays(S, D)
    return partial(context(D).update_step, X[0], Y[0])


def gemm_plain(S, D):
    from ctxlab.gemm import gemm

    (X, out), (C,) = arrays(S, D, 2), arrays(D, D, 1)
    return partial(gemm, X, C, out)


def gemm_scaled(S, D):
    from ctxlab.gemm import gemm

    (X, out), (C,) = arrays(S, D, 2), arrays(D, D, 1)
    return partial(gemm, X, C, out, alpha=0.5, beta=0.5)


def gemm_blend(S, D):
    from ctxlab.gemm import blend

    X, Y = arrays(S, D, 2)
    return partial(blend, X, Y, 0.5, 0.5)


def hundred_times(call: Callable[[], object]) -> Callable[[], None]:
    """A call that is long enough to be counted to 0.2 %."""

    def calls() -> None:
        for _ in range(100):
            call()

    return calls


def workspace_take(S, D):
    from ctxlab.workspace import Workspace

    return hundred_times(partial(Workspace().take, "x", (S, D)))


def workspace_pass(S, D):
    from ctxlab.workspace import Workspace

    ws = Workspace()

    def call():
        ws.next_generation()
        ws.take("x", (S, D))
        with ws.scope():
            ws.take("y", (S, S))

    return call


def derived_value(S, D):
    from ctxlab.norm_cache import DerivedValue

    (X,) = arrays(S, D, 1)
    return hundred_times(DerivedValue(partial(np.linalg.norm, X)).get)


def stream_update(S, D):
    """Moments alone: one block in 64 goes into the spectra, and none of those that are counted."""
    from ctxlab.streaming.moments import ContextStats

    X, Y, _ = arrays(S, D)
    return partial(ContextStats(D).update, X, Y)


def adam(S, D):
    from ctxlab.models.layers import adam_into
    from ctxlab.workspace import Workspace

    param, grad, m, v = arrays(S, D, 4)
    v *= v
    return partial(adam_into, param, grad, m, v, 1, Workspace())


def there_and_back(block, S, D, *more):
    """A pass of a block over one sequence, forward and backward, in one generation."""
    X, G = (a[None] for a in arrays(S, D, 2))

    def call():
        block.workspace.next_generation()
        block.forward(X, *more)
        block.backward(G)

    return call


def transformer_pass(S, D):
    from ctxlab.models import TransformerBlock

    rng = np.random.default_rng(0)
    return there_and_back(TransformerBlock(D, 2, 2 * D, rng=rng, context=context(D)), S, D)


def diffusion_pass(S, D):
    from ctxlab.models import DiffusionBlock

    rng = np.random.default_rng(0)
    block = DiffusionBlock(D, 2, 2 * D, rng=rng, context=context(D))
    return there_and_back(block, S, D, np.array([500]))


def ssm_pass(S, D):
    from ctxlab.models import SSMBlock

    rng = np.random.default_rng(0)
    return there_and_back(SSMBlock(D, rng=rng, context=context(D)), S, D)


def language_step(S, D):
    from ctxlab.models import LanguageModel

    model = LanguageModel(D, 2, 2 * D, 1, vocab=64, rng=np.random.default_rng(0))
    model.start(1)
    model.prompt(np.arange(S)[None] % 64)
    return partial(model.step, np.array([1]))


SIZES = ((8, 8), (32, 16), (64, 64), (128, 128))  # S, D; Python and NumPy are most of the small
MAKERS = {  # function of (S, D) that makes a call -> sizes
    context_apply: SIZES,
    context_backward: SIZES,
    context_update: SIZES,
    context_step_update: SIZES,
    gemm_plain: SIZES,
    gemm_scaled: SIZES,
    gemm_blend: SIZES,
    workspace_take: SIZES[:1],
    workspace_pass: SIZES[:1],
    derived_value: SIZES[:1],
    adam: SIZES[::2],
    stream_update: SIZES[:1],
    transformer_pass: SIZES[:2],
    diffusion_pass: SIZES[:1],
    ssm_pass: SIZES[:1],
    language_step: SIZES[::2],
}
PATHS = {
    f"{make.__name__}-{S}x{D}": partial(make, S, D) for make in MAKERS for S, D in MAKERS[make]
}


def chosen(names: list[str]) -> list[str]:
    """All paths, or those named, by their whole names or without the sizes."""
    found = [p for p in PATHS if not names or p in names or p.rpartition("-")[0] in names]
    for name in names:
        if name not in found and name not in [p.rpartition("-")[0] for p in found]:
            kinds = ", ".join(dict.fromkeys(p.rpartition("-")[0] for p in PATHS))
            sys.exit(f"PATH: {name!r} is not counted, needed one of {kinds}, or one with its size")
    return found


# --- counting, in a process of its own ---


class Called:
    """An object whose text is empty, and whose `ascii` makes the calls that count."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def __repr__(self) -> str:
        for _ in range(CALLS):
            self.call()
        return ""


def environment() -> dict[str, object]:
    """What the number of instructions depends on, as this process sees it."""
    from threadpoolctl import threadpool_info

    blas = [p for p in threadpool_info() if p["user_api"] == "blas"]
    return {
        "python": sys.version,
        "numpy": np.__version__,
        "blas": [f"{p['internal_api']} {p['version']} {p.get('architecture')}" for p in blas],
        "simd": np.show_config(mode="dicts")["SIMD Extensions"],
        "libc": " ".join(platform.libc_ver()),
    }


def run_instructions(names: list[str]) -> dict[str, object]:
    """Make the calls under callgrind, whose files tell; one of nothing first."""
    here = environment()  # before SciPy brings a BLAS of its own
    for call in (lambda: None, *(PATHS[name]() for name in names)):
        gc.collect()  # before the warm-up, since it empties Python's free lists
        gc.disable()
        for _ in range(WARMUP):
            call()
        ascii(Called(call))
        gc.enable()
    return here


def run_memory(names: list[str]) -> dict[str, object]:
    """Allocations of one call of each, and the tracer's peak."""
    from ctxlab.witness import allocations, traced_peak

    here, paths = environment(), {}
    for name in names:
        call = PATHS[name]()
        a = allocations(call, warmup=WARMUP)
        paths[name] = {"allocations": a.count, "bytes": a.nbytes, "peak": traced_peak(call)}
        here["memray"] = a.native
    return {"environment": here, "paths": paths}


RUNS = {"instructions": run_instructions, "memory": run_memory}


def in_process(run: str, names: list[str], *before: str) -> dict:
    """The result of a run in a process with one BLAS thread, a fixed hash, and its own kernel."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OPENBLAS_", "PYTHON"))}
    fixed = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
    command = [*before, sys.executable, __file__, "run", run, *names]
    done = subprocess.run(command, env=kept | fixed, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ChildProcessError(said[-1])
    return json.loads(done.stdout)


def under_valgrind(names: list[str]) -> dict:  # as of `run_memory`
    """Instructions of one call of each, without those of counting."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        options = (f"--toggle-collect={COUNTED}", f"--dump-after={COUNTED}")
        tool = ("valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", *options)
        here = in_process("instructions", names, *tool)
        files = [Path(f"{out}.{i + 1}") for i in range(len(names) + 1)]
        if set(files) != set(Path(folder).glob("out.*")):
            raise ChildProcessError(f"this Python does not call {COUNTED} once for each path")
        totals = [int(re.search(r"^totals: (\d+)", f.read_text(), re.M)[1]) for f in files]
    per_call = [(total - totals[0]) // CALLS for total in totals[1:]]
    paths = {name: {"instructions": n} for name, n in zip(names, per_call, strict=True)}
    return {"environment": here, "paths": paths}


# --- comparing ---

Table = dict[str, dict[str, int]]  # path -> kind -> count


def load(path: Path) -> dict:
    """The stored counts; a file that is none ends the program with one line."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored["environment"].keys()
        counts = [n for of_path in stored["paths"].values() for n in of_path.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        sys.exit(
            f"{path.name}: cannot be read, {type(e).__name__}; run python tools/counts.py store"
        )
    wrong = [n for n in counts if type(n) is not int or n < 0]
    if wrong:
        sys.exit(f"{path.name}: {wrong[0]!r} is no count; run python tools/counts.py store")
    return stored


def has_grown(kind: str, old: int | None, new: int) -> bool:
    """Whether a count is beyond its limit; so is one that was not stored."""
    return old is None or new > old * (1 + LIMIT) + SLACK.get(kind, 0)


def compare(stored: Table, now: Table) -> tuple[list[str], list[str]]:  # table, what is wrong
    """All instructions, and of the others those that have changed; peaks if they have grown."""
    lines, wrong = [], []
    for path, counts in now.items():
        for kind, new in counts.items():
            old = stored.get(path, {}).get(kind)
            if has_grown(kind, old, new):
                wrong.append(
                    f"{path}: {new:,} {kind}, stored {'none' if old is None else f'{old:,}'}"
                )
            elif kind == "peak" or (kind != "instructions" and new == old):
                continue
            change = f"{new / old - 1:+.2%}" if old else ""
            before = "none" if old is None else f"{old:,}"
            lines.append(f"{path:30}{kind:13}{before:>14}{new:>14,}{change:>10}")
    return lines, wrong


def others(stored: dict, here: dict, kinds: tuple[str, ...]) -> str:
    """The kinds of facts that differ from the stored ones, in words; '' where none does."""
    return " and ".join(k for k in kinds if stored.get(k) != here.get(k))


def counted_memory(names: list[str], stored: dict) -> tuple[Table, list[str]]:  # table, remarks
    """Allocations, and peaks where Python and NumPy are those of the stored ones."""
    found = in_process("memory", names)
    here, paths = found["environment"], found["paths"]
    if not here["memray"]:
        return {}, ["allocations not compared: memray is not installed"]
    other = others(stored, here, ("python", "numpy"))
    if other:
        kept = {name: {k: n for k, n in c.items() if k != "peak"} for name, c in paths.items()}
        return kept, [f"peaks not compared: other {other} than stored"]
    return paths, []


def counted_instructions(names: list[str], stored: dict) -> tuple[Table, list[str]]:
    """Instructions, where they can be counted and compared; else one line that says why not."""
    if shutil.which("valgrind") is None:
        return {}, ["instructions not compared: valgrind is not installed"]
    if others(stored, {"python": sys.version, "numpy": np.__version__}, ("python", "numpy")):
        return {}, ["instructions not compared: other python or numpy than stored"]
    try:
        found = under_valgrind(names)
    except ChildProcessError as e:
        return {}, [f"instructions not compared: {e}"]
    other = others(stored, found["environment"], ENVIRONMENT)
    if other:
        return {}, [f"instructions not compared: other {other} than stored"]
    return found["paths"], []


def check(names: list[str]) -> int:  # exit code
    """Print the counts beside those stored; 1 if one has grown, 2 if none could be compared."""
    stored = load(STORED)
    memory, remarks = counted_memory(names, stored["environment"])
    counted, more = counted_instructions(names, stored["environment"])
    now = {name: counted.get(name, {}) | memory.get(name, {}) for name in names}
    lines, wrong = compare(stored["paths"], now)
    gone = [
        f"{path}: stored, but no longer counted" for path in stored["paths"] if path not in PATHS
    ]
    head = f"{'path':30}{'':13}{'stored':>14}{'now':>14}{'change':>10}"
    compared = sum(map(len, now.values()))
    tail = f"{compared} counts of {len(names)} paths compared; of these, what is not shown is as"
    for line in (head, *lines, *remarks, *more, f"{tail} stored", *wrong, *gone):
        print(line)
    if wrong or gone:
        return 1
    return 0 if compared else 2


def store(names: list[str]) -> int:  # exit code
    """Store the counts of all paths, or put those of some in the place of older ones."""
    from ctxlab.measure import _processor

    if shutil.which("valgrind") is None:
        sys.exit("store: needs valgrind, which is not installed")
    memory, counted = in_process("memory", names), under_valgrind(names)
    here = {**counted["environment"], "memray": memory["environment"]["memray"]}
    if not here["memray"]:
        sys.exit("store: needs memray, which is not installed")
    old: Table = {}
    if len(names) < len(PATHS):
        stored = load(STORED)
        other = others(stored["environment"], here, ENVIRONMENT)
        if other:
            sys.exit(f"store: other {other} than stored; store all paths together")
        old = {path: counts for path, counts in stored["paths"].items() if path in PATHS}
    new = {name: counted["paths"][name] | memory["paths"][name] for name in names}
    paths = {path: (old | new)[path] for path in PATHS if path in old | new}
    write(STORED, {**here, "processor": _processor()}, paths)
    print(f"{STORED.name}: {len(names)} paths stored")
    return 0


def write(path: Path, here: dict, paths: Table) -> None:
    """A path is a line, so that a change reads as one."""
    from ctxlab.files import _write_whole

    lines = [f"  {json.dumps(name)}: {json.dumps(counts)}" for name, counts in paths.items()]
    text = f'{{"environment": {json.dumps(here, indent=1)},\n"paths": {{\n'
    _write_whole(path, text + ",\n".join(lines) + "\n}}\n")


def main(arguments: list[str] | None = None) -> int:  # exit code
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=("check", "store", "run"), help="run: for this tool itself")
    parser.add_argument("path", nargs="*", help="what to count, as context_apply; default: all")
    args = parser.parse_args(arguments)
    if args.job == "run":
        print(json.dumps(RUNS[args.path[0]](args.path[1:])))
        return 0
    job = {"check": check, "store": store}[args.job]
    return job(chosen(args.path))


if __name__ == "__main__":
    sys.exit(main())
