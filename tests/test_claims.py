"""The ledger: verdicts that follow from figures, and figures that follow from what the paths do."""

import copy
import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make
from hypothesis import given
from hypothesis import strategies as st

from ctxlab import claims
from ctxlab.claims import (
    CONFIRMED,
    LEDGER,
    PARTLY,
    REFUTED,
    SHIPPED,
    UNDECIDED,
    Bench,
    bench,
    comparisons,
    run_ledger,
    together,
    workload,
)
from ctxlab.data import pair
from ctxlab.gemm import dot, forms
from ctxlab.growth import POLICIES
from ctxlab.measure import AGAIN, Interval, Timings
from ctxlab.original import backward, forward, sites, update, update_step
from ctxlab.reference import apply_context, apply_context_vjp, ema, similarity, similarity_step
from ctxlab.report import as_json
from ctxlab.stack import KINDS, Memory
from ctxlab.testing import assert_equiv

GAIN, LOSS = (Interval(v, v, v) for v in (1e6, -1e6))  # percent: beyond any control
# claim -> a figure, its value before, its value after; the verdict must not stay the same
CHANGES = {
    **{f"site-{site}": ("shipped", 10**9, 0) for site in SHIPPED},
    "count-sites": ("batch", 7, 5),
    "mem-update": ("actual", 2 * 768**2 * 4, 2 * 1024**2 * 4),
    "mem-apply": ("actual", 512 * 768 * 4, 512 * 1024 * 4),
    "mem-forward": ("dot", 0, 10**9),
    "mem-batch": ("traffic", 0, 10**9),
    "speed-forward": ("shipped", LOSS, GAIN),
    "speed-backward": ("shipped", LOSS, GAIN),
    "why-faster": ("outcome", "no difference", "faster"),
    "numeric": ("difference", 0.0, 2e-5),
    "lazy": ("outgoing", 0, 4 * 768**2),
    "pow2": ("held", 0, 10**9),
    "pool-mem": ("fresh", 0, 10**9),
    "pool-speed": ("shipped", LOSS, GAIN),
    "total": ("shipped", LOSS, GAIN),
    "norm-cost": ("growth", Interval(1, 1, 1), Interval(4, 4, 4)),
    "norm-lock": ("ratio", Interval(0.1, 0.1, 0.1), Interval(9, 9, 9)),
    "norm-gain": ("bytes", 500, 10**6),
    "all-archs": ("SSM", LOSS, Interval(0, -1e6, 1e6)),
}

by_claim = pytest.mark.parametrize("claim", LEDGER, ids=lambda c: c.id)


def small_bench(name="mine", x=None, y=None):
    """Two small workloads, on which the whole ledger takes a second."""
    rng = np.random.default_rng(0)
    if x is None:
        x, y = rng.standard_normal((2, 80, 32))
    mine, other = pair(name, x, y), pair("other", *rng.standard_normal((2, 64, 48)))
    return Bench(
        [workload(name, mine, rng), workload("other", other, rng)], [mine], 1e-9, blocks=(1, 32, 64)
    )


@pytest.fixture(scope="module")
def findings():
    return {f.claim.id: f for f in run_ledger(small_bench())}


@pytest.fixture(scope="module")
def real():
    """The workloads of a real report; nothing is timed on them here."""
    return bench(budget=1e-9)


# The ledger as a whole


def test_no_claim_drops_out_and_each_can_change():
    assert [c.id for c in LEDGER] == list(dict.fromkeys(c.id for c in LEDGER))
    assert {c.id for c in LEDGER} == set(CHANGES)


def enlarged(value):
    """Every number in it times three, plus one."""
    if isinstance(value, dict):
        return {name: enlarged(v) for name, v in value.items()}
    if isinstance(value, Interval):
        return value.scaled(3, 1)
    return 3 * value + 1 if isinstance(value, int | float) else value


@by_claim
def test_what_is_told_follows_the_figures(claim, findings):
    figures = {name: enlarged(f) for name, f in findings[claim.id].figures.items()}
    assert claim.tell(figures) != findings[claim.id].told


@by_claim
def test_the_section_that_explains_it_exists(claim):
    path = Path(__file__).parent.parent / "nbs" / f"{claim.notebook}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    texts = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"]
    assert any(
        line.lstrip("#") == f" {claim.section}"
        for t in texts
        for line in t.splitlines()
        if line[:1] == "#"
    )


@by_claim
def test_measurement_and_rule_can_be_read(claim):
    for part in (claim.measure, claim.judge):
        function, given = claims.core(part)
        assert function.__name__.isidentifier()
        assert all(isinstance(value, str | int | float) for value in given)


@by_claim
def test_one_figure_changes_the_verdict(claim, findings):
    name, before, after = CHANGES[claim.id]  # a claim without an entry fails here
    figures = copy.deepcopy(findings[claim.id].figures)
    assert all(
        name in f for f in figures.values()
    )  # a figure that is measured, not an invented one
    for f in figures.values():
        f[name] = before
    for f in figures.values():  # of one workload is enough, whatever the others say
        f[name] = after
        changed = claim.judge(figures)
        f[name] = before
        assert changed != claim.judge(figures)


@by_claim
def test_judge_and_tell_are_pure(claim, findings):
    figures = copy.deepcopy(findings[claim.id].figures)
    turned = dict(reversed(figures.items()))  # the order of the workloads carries no meaning
    assert (
        claim.judge(figures)
        == claim.judge(figures)
        == claim.judge(turned)
        == findings[claim.id].verdict
    )
    assert claim.tell(figures) == claim.tell(figures) == findings[claim.id].told
    assert figures == findings[claim.id].figures


quiet = Interval(0, -0.5, 0.5)
GROWN = {name: 9 for name in POLICIES} | dict(reallocations=3, needed=100)


def kinds(*spans):
    """Gains of the three kinds of block, each with a quiet control."""
    gains = {kind: Interval(sum(span) / 2, *span) for kind, span in zip(KINDS, spans, strict=True)}
    return gains | {f"{kind} control": quiet for kind in KINDS}


OWN_OUTPUT = dict(result=10**6, intermediate=0)  # a product allocates what it returns

EDGES = [  # claim, figures, verdict: at the bound, and one step beyond
    ("site-cov", dict(dot=100, shipped=50, result=100), CONFIRMED),
    ("site-cov", dict(dot=100, shipped=51, result=100), REFUTED),
    ("numeric", dict(difference=1e-5), CONFIRMED),
    ("numeric", dict(difference=np.nextafter(1e-5, 1)), REFUTED),
    ("numeric", dict(difference=np.nan), REFUTED),  # unknown is not equal
    ("lazy", dict(before=1_000_000, outgoing=3_360_000), CONFIRMED),
    ("lazy", dict(before=1_000_000, outgoing=3_320_000), REFUTED),
    ("pow2", dict(GROWN, exact=3, held=199), CONFIRMED),
    ("pow2", dict(GROWN, exact=3, held=200), PARTLY),
    ("pow2", dict(GROWN, exact=2, held=199), PARTLY),
    ("pow2", dict(GROWN, exact=2, held=200), REFUTED),
    ("pool-mem", dict(fresh=3e6 + 5, planned=5, traffic=0), CONFIRMED),
    ("pool-mem", dict(fresh=3e6 + 4, planned=5, traffic=3e6), PARTLY),
    ("pool-mem", dict(fresh=3e6 + 4, planned=5, traffic=3e6 - 1), REFUTED),
    ("pool-speed", dict(shipped=Interval(4, 3, 5), control=quiet), CONFIRMED),
    ("pool-speed", dict(shipped=Interval(2, 1, 2.9), control=quiet), REFUTED),
    ("total", dict(shipped=Interval(12, 10, 13), control=quiet, fresh=15e6, planned=0), CONFIRMED),
    ("total", dict(shipped=Interval(12, 10, 13), control=quiet, fresh=15e6 - 1, planned=0), PARTLY),
    ("total", dict(shipped=Interval(9, 8, 9.9), control=quiet, fresh=15e6 - 1, planned=0), REFUTED),
    ("total", dict(shipped=Interval(9, 8, 10.1), control=quiet, fresh=15e6, planned=0), UNDECIDED),
    ("all-archs", kinds((4, 5), (4.5, 6), (5, 7)), CONFIRMED),
    ("all-archs", kinds((-1, 5), (4.5, 6), (5, 7)), PARTLY),
    ("all-archs", kinds((4, 4.9), (4.5, 6), (5, 7)), REFUTED),
    ("all-archs", kinds((-6, 5), (4.5, 6), (5, 7)), UNDECIDED),
    ("mem-forward", dict(dot=2e7 + 5, shipped=5, traffic=0), CONFIRMED),
    ("mem-forward", dict(dot=2e7 + 4, shipped=5, traffic=2e7), PARTLY),
    ("mem-forward", dict(dot=2e7 + 4, shipped=5, traffic=2e7 - 1), REFUTED),
    ("why-faster", dict(OWN_OUTPUT, outcome="faster", ratio=Interval(0.9, 0.8, 0.95)), PARTLY),
    ("why-faster", dict(OWN_OUTPUT, outcome="slower", ratio=Interval(1.1, 1.05, 1.2)), REFUTED),
    (
        "why-faster",
        dict(OWN_OUTPUT, outcome="no difference", ratio=Interval(1, 0.971, 1.1)),
        REFUTED,
    ),
    (
        "why-faster",
        dict(OWN_OUTPUT, outcome="no difference", ratio=Interval(1, 0.970, 1.1)),
        UNDECIDED,
    ),
    ("speed-forward", dict(shipped=Interval(4, 3, 5), control=quiet), CONFIRMED),
    ("speed-forward", dict(shipped=Interval(4, 3, 5), control=Interval(0, -3, 3)), UNDECIDED),
    ("speed-forward", dict(shipped=Interval(2, 1, 3), control=quiet), UNDECIDED),
    ("speed-forward", dict(shipped=Interval(2, 1, 2.99), control=quiet), REFUTED),
    (
        "speed-backward",
        dict(shipped=Interval(4, 3, 4.99), control=quiet),
        REFUTED,
    ),  # its range begins at 5 %
]


@pytest.mark.parametrize(("id", "figures", "verdict"), EDGES)
def test_the_bound_is_where_the_rule_says(id, figures, verdict):
    judge = next(c.judge for c in LEDGER if c.id == id)
    assert judge({"w": figures}) == verdict


three = st.lists(st.floats(-50, 50), min_size=3, max_size=3)


@given(three, three, st.floats(0, 50))
def test_a_larger_gain_is_never_judged_worse(shipped, control, rise):
    low, median, high = sorted(shipped)
    a, b, c = sorted(control)
    judge = next(c.judge for c in LEDGER if c.id == "speed-forward")

    def rank(up):
        figures = dict(
            shipped=Interval(median + up, low + up, high + up), control=Interval(b, a, c)
        )
        return (REFUTED, UNDECIDED, CONFIRMED).index(judge({"w": figures}))

    assert rank(0) <= rank(rise)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_together(n):
    for verdicts in itertools.product((CONFIRMED, REFUTED, PARTLY, UNDECIDED), repeat=n):
        expected = (
            verdicts[0]
            if len(set(verdicts)) == 1
            else UNDECIDED
            if UNDECIDED in verdicts
            else PARTLY
        )
        assert together(verdicts) == together(iter(reversed(verdicts))) == expected


# The paths and their sites


@pytest.mark.parametrize("form", forms())
def test_the_paths_compute_what_the_reference_says(form, real):
    for w in real.workloads:
        D, twice = len(w.C), range(2)  # a buffer that is used again must not bring anything along
        X, C, G = (a.astype(np.float64) for a in (w.X, w.C, w.G))
        out_size = np.sqrt(X**2 + (w.s / D) ** 2 * (X**2 @ C**2))
        grad_size = np.sqrt(G**2 + (w.s / D) ** 2 * (G**2 @ C.T**2))
        run = real.paths(w, "forward")[form]
        for _ in twice:
            assert_equiv(run(), apply_context(w.X, w.C, w.s), depth=D, scale=out_size)
        run, (grad_x, _) = (
            real.paths(w, "backward")[form],
            apply_context_vjp(w.X, w.C, w.s, w.G),
        )
        grad_s, terms = (
            apply_context_vjp(X, C, w.s, G)[1],
            np.sqrt(np.sum(G**2 * (X**2 @ C**2))) / D,
        )
        length = D + int(np.sqrt(X.size))  # sums of D products, and a sum of all made in blocks
        for _ in twice:
            got_x, got_s = run()
            assert_equiv(got_x, grad_x, depth=D, scale=grad_size)
            assert_equiv(np.float32(got_s), np.float32(grad_s), depth=length, scale=terms)
        product, batch, step = forms()[form], w.C.copy(), w.C.copy()
        update(product, w.X, w.Y, batch, 0.1)
        assert_equiv(batch, ema(w.C, similarity(w.X, w.Y), 0.1), depth=32, scale=1.0)
        update_step(product, w.X[0], w.Y[0], step, 0.1)
        assert_equiv(step, ema(w.C, similarity_step(w.X[0], w.Y[0]), 0.1), depth=32, scale=1.0)


def outcome(product, w):
    """All that the four paths compute, in one vector."""
    C, c = w.C.copy(), w.C.copy()
    update(product, w.X, w.Y, C, 0.1)
    update_step(product, w.X[0], w.Y[0], c, 0.1)
    grad_x, grad_s = backward(product, w.X, w.C, w.s, w.G)
    return np.concatenate(
        [a.ravel() for a in (forward(product, w.X, w.C, w.s), grad_x, C, c)] + [[grad_s]]
    )


def test_the_sites_are_the_products_that_the_paths_run():
    w, calls = small_bench().workloads[0], []

    def note(site, a, b):
        calls.append((site, a, b))
        return a @ b

    right, found = outcome(note, w), sites(w.X, w.Y, w.G, w.C, w.s)
    assert Counter(site for site, *_ in calls) == dict.fromkeys(
        found, 1
    )  # none twice, none forgotten
    for site, *operands in calls:
        for got, expected in zip(found[site], operands, strict=True):
            np.testing.assert_array_equal(got, expected)
    for wrong in found:  # and none whose result goes nowhere
        assert (outcome(lambda s, a, b, wrong=wrong: dot(s, a, b) + (s == wrong), w) != right).any()


def test_the_sites_have_the_sizes_that_the_report_speaks_of(real):
    w = real.workloads[-1]
    found = {site: (a.shape, b.shape) for site, (a, b) in sites(w.X, w.Y, w.G, w.C, w.s).items()}
    S, D = 512, 768
    assert found == {
        **dict.fromkeys(("apply", "mixed", "corr"), ((S, D), (D, D))),
        "cov": ((D, 32), (32, D)),
        "denom": ((D, 1), (1, D)),
        "step": ((D, 1), (1, D)),
    }
    assert set(SHIPPED) == set(found) - {"step"}


@pytest.mark.parametrize("wrong", [1e-4, np.nan])
@pytest.mark.parametrize("form", ["zeros + gemm", "reused out"])
def test_a_form_that_computes_something_else_is_found_out(form, wrong, monkeypatch):
    def product(site, a, b):
        return a @ b + a.dtype.type(wrong)

    monkeypatch.setattr(claims, "forms", lambda: forms() | {form: product})
    assert claims.audit(claims.NUMERIC, small_bench()).verdict == REFUTED


# Workloads and measurements


@pytest.mark.parametrize(
    ("rows", "features", "kept"), [(80, 32, 80), (3000, 8, 2048), (700, 2000, 625)]
)
def test_rows_are_cut_so_that_a_report_on_wide_layers_ends(rows, features, kept):
    x = np.ones((rows, features), np.float32)
    w = workload("w", pair("p", x, x), np.random.default_rng(0))
    assert w.X.shape == w.Y.shape == w.G.shape == (kept, features)
    assert 2 * kept * features**2 <= claims.PRODUCT_FLOP


def test_however_wide_a_layer_its_sample_rows_stay(monkeypatch):
    monkeypatch.setattr(claims, "PRODUCT_FLOP", 1)
    x = np.ones((40, 8), np.float32)
    assert len(workload("w", pair("p", x, x), np.random.default_rng(0)).X) == 32


def test_a_bench_repeats_from_its_seed(real):
    def arrays(b):
        return [a.tobytes() for w in b.workloads for a in (w.X, w.Y, w.G, w.C)]

    assert arrays(bench(budget=1e-9)) == arrays(real)
    assert arrays(bench(budget=1e-9, seed=1)) != arrays(real)


def test_workloads_keep_apart_whatever_the_file_is_called():
    x = np.eye(4, dtype=np.float32)
    b = bench([pair("p", x, x)], "512 x 768")  # the name of the other workload
    assert len({w.name for w in b.workloads}) == 2


def test_each_comparison_is_made_once():
    b, ticks = small_bench(), []
    b.tick = ticks.append
    first, second = run_ledger(b), run_ledger(b)
    assert len(ticks) == len(set(ticks)) == len(b.timings) == comparisons(b)
    for f, g in zip(first, second, strict=True):
        if f.claim.id.startswith("speed"):
            assert f.figures == g.figures  # two claims never disagree about one measurement


ACCEPTED = [("hostile", (40, 12)), ("huge", (40, 12)), ("steps", (40, 12)), ("normal", (2, 1))]


@pytest.mark.parametrize(("kind", "shape"), ACCEPTED)
def test_any_accepted_activations_get_a_full_ledger(kind, shape):
    # Warnings are errors here: NaN, infinities and overflow must not litter the terminal either.
    rng = np.random.default_rng(1)
    b = small_bench("mine", *(make(rng, shape, kind=kind) for _ in range(2)))
    found = run_ledger(b)
    assert [f.claim for f in found] == LEDGER
    json.dumps(as_json(found, b, {}), allow_nan=False)  # no figure is lost to the report


# Verdicts on speed, from timings whose truth is known

ROUNDS = np.repeat(np.arange(7), 5)  # as `time_placed` makes them: seven placements of a few rounds
NOISES = {  # what a sample costs beside its truth
    "gaussian": lambda rng: 1 + 0.02 * rng.standard_normal(35),
    "heavy-tailed": lambda rng: 1 + 0.02 * rng.pareto(0.9, 35),
    "drift": lambda rng: 1 + 0.002 * rng.standard_normal(35),
    "placement": lambda rng: (
        np.exp(0.05 * rng.standard_normal(7))[ROUNDS] * (1 + 0.002 * rng.standard_normal(35))
    ),
}


def made_up(rng, noise, costs):
    """Timings of functions with known costs; the first is the control."""
    control = next(iter(costs))
    drift = np.exp(np.cumsum(0.1 * rng.standard_normal(35))) if noise == "drift" else 1.0
    costs = costs | {control + AGAIN: costs[control]}
    return Timings(
        {n: c * drift * NOISES[noise](rng) for n, c in costs.items()}, control, 1, ROUNDS
    )


class MadeUp:
    """A bench whose timings are made up: every gain is `gain` percent."""

    timed_blocks = "blocks"

    def __init__(self, rng, noise, gain):
        self.workloads = [
            SimpleNamespace(name=name, X=np.empty((10, 1000))) for name in ("mine", "other")
        ]
        self.draw = lambda *names: made_up(
            rng, noise, {n: 1 + (i == 0) * gain / 100 for i, n in enumerate(names)}
        )

    def timed(self, w, what):
        return self.draw("dot", "zeros + gemm", "reused out")

    def peaks(self, w, what):
        return {"dot": w.X.nbytes}

    def stacked(self, kind, backward):
        return self.draw("not pooled", "pooled")

    def norms(self):
        return self.draw("|s|", "|s| at a quarter", "vector of 768", "locked hit")

    def memory(self, backward):
        return Memory(traffic=0, fresh=0, pooled=0, planned=0)


TRUTHS = [  # claim, true gain, verdicts that contradict it
    ("speed-forward", 0, (CONFIRMED, PARTLY)),
    ("speed-backward", 0, (CONFIRMED, PARTLY)),
    ("speed-forward", 3, (CONFIRMED, REFUTED, PARTLY)),  # at the bound neither is right
    ("speed-forward", 12, (REFUTED, PARTLY)),
    ("pool-speed", 0, (CONFIRMED,)),
    ("pool-speed", 12, (REFUTED,)),
    ("why-faster", 0, (CONFIRMED, PARTLY)),
    ("total", 0, (CONFIRMED, PARTLY)),
    ("all-archs", 0, (CONFIRMED, REFUTED)),
    ("all-archs", 5, (REFUTED,)),
    ("norm-lock", 0, (CONFIRMED, REFUTED, PARTLY)),
    ("norm-cost", 0, (CONFIRMED,)),
]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("id", "gain", "wrong"), TRUTHS)
def test_wrong_verdicts_on_speed_are_rare(id, gain, wrong, noise):
    claim, rng = (
        next(c for c in LEDGER if c.id == id),
        np.random.default_rng([gain, len(id), len(noise)]),
    )
    runs = [claims.audit(claim, MadeUp(rng, noise, gain)).verdict for _ in range(200)]
    assert np.mean([verdict in wrong for verdict in runs]) <= 0.05


@pytest.mark.parametrize(
    ("id", "gain", "right"),
    [
        ("speed-forward", 20, CONFIRMED),
        ("speed-forward", -5, REFUTED),
        ("pool-speed", 20, CONFIRMED),
    ],
)
@pytest.mark.parametrize("noise", ["gaussian", "drift"])
def test_a_clear_gain_or_loss_is_recognised(id, gain, right, noise):
    claim, rng = next(c for c in LEDGER if c.id == id), np.random.default_rng(0)
    runs = [claims.audit(claim, MadeUp(rng, noise, gain)).verdict for _ in range(100)]
    assert np.mean([verdict == right for verdict in runs]) >= 0.9
