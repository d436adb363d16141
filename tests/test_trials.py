"""Claims of anyone: accounts of memory, rules for verdicts, the bench, audits, ledgers in files."""

import gc
import itertools
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import few
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.audit import trials
from ctxlab.audit.trials import (
    _SMALL,
    _STILL,
    Account,
    Bench,
    Claim,
    Trial,
    Verdict,
    _accounts,
    _audited,
    _clear,
    _gain,
    _judge_gain,
    _load_ledger,
    _power,
    _saving,
    _together,
    account,
    audit,
    gain_claim,
    saving_claim,
)
from ctxlab.data import InputError
from ctxlab.intervals import Interval
from ctxlab.measure import Comparison, Measured, _BudgetError
from ctxlab.workers import WorkerError

CONFIRMED, PARTLY, REFUTED, UNDECIDED, UNTESTABLE = Verdict

# Made-up results of trials


def as_ratio(gain, spread):
    """The ratio of times that belongs to a gain in percent, plus or minus `spread`."""
    return Interval(*(100 / (100 + g) for g in (gain, gain + spread, gain - spread)))


def measured(gain=0.0, spread=0.2, control=(0.0, 0.2), **more):
    """A form that gains so many percent."""
    ratio = as_ratio(gain, spread)
    noise = np.linspace(-spread, spread, 15) / 100
    facts = dict(seconds=1e-3, cpu_seconds=1e-3, faults=0.0, nbytes=0, peak=0, kept=0)
    blocks = tuple((ratio.median * np.exp(noise)).tolist())
    options = dict(outcome="faster", native=True, ratios=blocks) | facts | more
    return Measured(ratio=ratio, control=as_ratio(*control), **options)


def compared(**forms):
    """A comparison of forms with these gains, or as `measured` has them; the first is the base."""
    found = {n: m if isinstance(m, Measured) else measured(m) for n, m in forms.items()}
    facts = dict(resolution=0.02, error=0.05, threads=1, allocator="default", seed=0, seconds=1.0)
    base = next(iter(found))
    return Comparison(found, base=base, agreement="equal", machine={}, **facts)


# Accounts of memory

KB = 1024
sizes = st.lists(st.integers(8, 400).map(lambda n: n * KB), max_size=5)


def zeros(nbytes):
    return np.zeros(nbytes, np.uint8)


def close(found, expected):
    """Equal but for Python's own objects, of which a first call may leave some more behind."""
    return all(abs(a - b) < 2 * _SMALL for a, b in zip(found, expected, strict=True))


def fresh():
    return lambda: zeros(300 * KB)


def kept():
    out = zeros(300 * KB)
    return lambda: out.fill(1)


def kept_from_the_first_call_on():
    outs = []

    def call():
        if not outs:
            outs.append(zeros(300 * KB))
        outs[0].fill(1)

    return call


def both():
    out = zeros(200 * KB)
    return lambda: out[: 100 * KB] + np.uint8(1)


def two_at_a_time():
    return lambda: zeros(100 * KB)[zeros(200 * KB).size // 2 :]


ACCOUNTS = [
    (fresh, Account(300 * KB, 0, 300 * KB)),
    (kept, Account(0, 300 * KB, 300 * KB)),
    (kept_from_the_first_call_on, Account(0, 300 * KB, 300 * KB)),
    (both, Account(100 * KB, 200 * KB, 300 * KB)),
    (two_at_a_time, Account(300 * KB, 0, 300 * KB)),
    (lambda: lambda: bytes(1000), Account(0, 0, 0)),  # a small object of Python
    (lambda: lambda: None, Account(0, 0, 0)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "expected"), ACCOUNTS)
def test_an_account_of_memory(make, expected):
    found = account(make)
    assert close(found, expected)
    assert [n == 0 for n in found] == [n == 0 for n in expected]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "expected"), ACCOUNTS)
def test_an_account_while_memory_is_traced_already(make, expected):
    held = zeros(500 * KB)
    tracemalloc.start()
    try:
        assert close(account(make), expected)
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()
    assert held.size


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_tracing_ends_whatever_a_call_does(calls):
    left = itertools.count()

    def broken():
        if next(left) >= calls:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        account(lambda: broken)
    assert not tracemalloc.is_tracing()


@pytest.mark.slow
@few
@given(sizes, sizes, sizes)
def test_hidden_temporaries_are_counted(one_by_one, together, for_good):
    def make():
        buffers = [zeros(n) for n in for_good]

        def call():
            for part in (zeros(n) for n in one_by_one):  # each is gone before the next is made
                part.fill(1)
                del part
            parts = [zeros(n) for n in together]
            return len(parts) + len(buffers)

        return call

    allocated, stay = sum(one_by_one) + sum(together), sum(for_good)
    most = max([*one_by_one, sum(together)])
    assert close(account(make), (allocated, stay, stay + most))


@pytest.mark.slow
@few
@given(sizes)
def test_data_that_exists_already_is_not_counted(before):
    held = [zeros(n) for n in before]
    assert account(lambda: lambda: len(held)) == (0, 0, 0)


@pytest.mark.slow
def test_what_is_collected_as_garbage_is_not_kept():
    def make():
        def call():
            loop = [zeros(300 * KB)]
            loop.append(loop)

        return call

    gc.disable()
    try:
        assert account(make).kept == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("frozen", [False, True])
def test_what_someone_has_frozen_stays_so(frozen):
    def call():
        loop = [zeros(300 * KB)]
        loop.append(loop)

    if frozen:
        gc.freeze()
    try:
        before = gc.get_freeze_count()
        assert account(lambda: call).kept == 0
        assert gc.get_freeze_count() == before
    finally:
        gc.unfreeze()


@pytest.mark.slow
def test_small_objects_that_stay_are_no_array():
    def make():
        chain = ()
        for _ in range(1000):  # 48 KB, as a thread of the test runner may leave behind meanwhile
            chain = (chain,)
        return lambda: chain

    assert account(make).kept == 0


# Verdicts on a gain

GAINS = [  # at least, (median, low, high), verdict: at the bound and one step beyond
    (3, (3, 0.1, 9), CONFIRMED),
    (3, (3, 0, 9), UNDECIDED),  # no gain is shown
    (3, (2.9, 0.1, 3), UNDECIDED),
    (3, (2.9, 0.1, 2.99), REFUTED),  # a smaller one is
    (3, (2.9, 0, 2.99), REFUTED),
    (3, (-4, -5, -3), REFUTED),
    (3, (5, -1, 9), UNDECIDED),
    (0, (1, 0.1, 2), CONFIRMED),
    (3, (9, -100, np.inf), UNDECIDED),  # no interval yet
]


@pytest.mark.parametrize(("least", "gain", "verdict"), GAINS)
def test_the_bounds_of_a_gain(least, gain, verdict):
    assert _judge_gain(least, Interval(*gain), _STILL) == verdict
    for control in ((0, 0, 5), (0, -5, 0)):
        assert _judge_gain(least, Interval(*gain), Interval(*control)) == verdict
    for strays in ((50, 20, 90), (-50, -90, -20)):
        assert _judge_gain(least, Interval(*gain), Interval(*strays)) == UNDECIDED


STRAYS = [  # gain, control, verdict: a control that strays widens the interval of the gain
    ((4, 3, 5), (3, 2.9, 9), CONFIRMED),
    ((4, 3, 5), (4, 3, 9), UNDECIDED),
    ((4, 3, 5), (-3, -9, -2.9), CONFIRMED),
    ((4, 3, 5), (-4, -9, -3), UNDECIDED),
    ((-4, -5, -3), (6, 5.9, 9), REFUTED),
    ((-4, -5, -3), (7, 6, 9), UNDECIDED),
    ((1.5, 0.5, 2), (1, 0.99, 9), REFUTED),  # one of 3 % is not possible
    ((1.5, 0.5, 2), (1, 1, 9), UNDECIDED),
]


@pytest.mark.parametrize(("gain", "control", "verdict"), STRAYS)
def test_a_control_that_strays_widens_the_interval(gain, control, verdict):
    assert _judge_gain(3, Interval(*gain), Interval(*control)) == verdict


@given(
    st.lists(st.floats(-50, 50), min_size=3, max_size=3).map(sorted),
    st.lists(st.floats(-50, 50), min_size=3, max_size=3).map(sorted),
    st.floats(0.1, 20),
)
def test_a_control_that_strays_confirms_nothing(gain, control, least):
    low, median, high = gain
    a, b, c = control
    verdicts = [
        _judge_gain(least, Interval(median, low, high), i) for i in (_STILL, Interval(b, a, c))
    ]
    assert verdicts[0] == CONFIRMED or verdicts[1] != CONFIRMED


RANKS = (REFUTED, UNDECIDED, CONFIRMED)
percents = st.one_of(st.floats(-5, 5), st.floats(-50, 50))
rises = st.lists(st.one_of(st.floats(0, 5), st.floats(0, 60)), min_size=3, max_size=3)


@given(st.lists(percents, min_size=3, max_size=3).map(sorted), rises, st.floats(0.1, 20))
def test_a_better_gain_never_gives_a_worse_verdict(gain, rise, least):
    low, median, high = gain
    better = sorted(g + r for g, r in zip(gain, rise, strict=True))
    ranks = [
        RANKS.index(_judge_gain(least, Interval(m, a, z), _STILL))
        for a, m, z in ((low, median, high), better)
    ]
    assert ranks == sorted(ranks)


@given(st.lists(percents, min_size=3, max_size=3).map(sorted), st.floats(0.1, 20), st.floats(0, 20))
def test_a_larger_claim_never_gets_a_better_verdict(gain, least, more):
    low, median, high = gain
    verdicts = [_judge_gain(n, Interval(median, low, high), _STILL) for n in (least, least + more)]
    ranks = list(map(RANKS.index, verdicts))
    assert ranks == sorted(ranks, reverse=True)


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_a_gain_is_the_share_of_work_that_is_done_more(before, after):
    ratio = after / before
    found = _gain(Interval(ratio, ratio / 2, ratio * 2))
    assert found.low <= found.median <= found.high
    assert found.median == pytest.approx(100 * (before - after) / after)


@pytest.mark.parametrize(("gain", "clear"), [(9, True), (1, True), (-9, True), (2.9, False)])
def test_measuring_ends_when_there_is_a_verdict(gain, clear):
    assert _clear(3)(as_ratio(gain, 0.5)) == clear
    assert not _clear(3)(Interval(1.0, 0.0, np.inf))


# Power

noises = st.lists(st.floats(-1, 1), min_size=8, max_size=30)


@few
@given(noises, st.floats(0, 0.5), st.floats(0, 0.5))
def test_noise_never_adds_power(shape, a, b):
    quiet, loud = (_power(3, 5, np.exp(scale * np.array(shape)), 60) for scale in sorted((a, b)))
    assert 0 <= loud <= quiet <= 1


@few
@given(noises, st.floats(-20, 20))
def test_power_is_a_matter_of_noise_and_not_of_what_was_found(shape, gain):
    ratios = np.exp(0.05 * np.array(shape))
    powers = [_power(3, 5, r, 60) for r in (ratios, ratios / (1 + gain / 100))]
    assert powers[0] == pytest.approx(powers[1], abs=0.02)


@pytest.mark.parametrize("scale", [0, 0.001, 0.01])
def test_no_effect_would_not_be_confirmed(scale):
    ratios = np.exp(scale * np.random.default_rng(0).standard_normal(20))
    assert _power(3, 0, ratios) == 0
    assert _power(3, 20, ratios) == 1


def test_a_run_that_might_have_gone_either_way_has_a_power_in_between():
    noise = 0.03 * np.random.default_rng(0).standard_normal(20)
    assert 0.1 < _power(3, 3.2, np.exp(noise)) < 0.9


def test_too_few_blocks_have_no_power():
    assert _power(3, 50, np.ones(4)) == 0


# Several cases


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_together(n):
    for verdicts in itertools.product(Verdict, repeat=n):
        known = set(verdicts) - {UNTESTABLE}
        if len(known) < 2:
            expected = next(iter(known), UNTESTABLE)
        else:
            expected = UNDECIDED if UNDECIDED in known else PARTLY
        assert _together(verdicts) == _together(iter(reversed(verdicts))) == expected


# Claims on speed

FORMS = dict.fromkeys(("old", "new", "newer"), lambda seed: int)
TRIAL = Trial("sorting", FORMS)
ORACLE = [  # gain of the new form, spread, control -> verdict and a word of the sentence
    (9, 1, (0, 1), CONFIRMED, "as much as is claimed"),
    (1.5, 1, (0, 1), REFUTED, "by less than is claimed"),
    (1, 1, (1.7, 1), REFUTED, "No gain"),  # the base differs from itself by as much
    (0, 1, (0, 1), REFUTED, "No gain"),
    (-9, 1, (0, 1), REFUTED, "No gain"),
    (4, 5, (0, 1), UNDECIDED, "Too close"),
    (9, 1, (5, 1), CONFIRMED, "as much as is claimed"),  # the base differs from itself, by less
    (9, 1, (12, 1), UNDECIDED, "The base differs from itself"),
]


def speed(*cases, form="new", percent=(3, 5), id="faster", **options):
    return gain_claim(id, "new is faster", cases or [TRIAL], form, percent=percent, **options)


@pytest.mark.parametrize(("gain", "spread", "control", "verdict", "word"), ORACLE)
def test_a_claim_on_speed_gets_its_verdict(gain, spread, control, verdict, word):
    new = measured(gain, spread, control)
    (found,) = audit([speed()], Bench(found={"sorting": compared(old=0, new=new, newer=50)}))
    assert (found.verdict, found.error) == (verdict, "")
    assert word in found.plain
    assert f"{gain:+.1f}% [" in found.told
    assert (f"control {control[0]:+.1f}% [" in found.told) == (control[0] > 0)
    assert "of 10 such runs" in found.told
    assert found.claim.number.found(found.figures).median == pytest.approx(gain)


def test_each_case_of_a_claim_on_speed_is_judged_and_told():
    cases = [TRIAL, replace(TRIAL, name="searching")]
    found = {"sorting": compared(old=0, new=9), "searching": compared(old=0, new=-9)}
    (f,) = audit([speed(*cases)], Bench(found=found))
    assert f.verdict == PARTLY
    assert "and not in another" in f.plain
    assert "sorting: +9.0%" in f.told
    assert "searching: -9.0%" in f.told


@pytest.mark.parametrize("form", ["old", "none", ""])
def test_a_claim_on_speed_is_about_a_form_beside_the_base(form):
    needed = "^form: .* in the trial 'sorting'; needed 'new' or 'newer'$"
    with pytest.raises(InputError, match=needed):
        gain_claim("faster", "faster", TRIAL, form, percent=(3, 5))
    later = gain_claim("faster", "faster", lambda b: [TRIAL], form, percent=(3, 5))
    (f,) = audit([later], Bench(found={"sorting": compared(old=0, new=9)}))
    assert f.verdict == UNTESTABLE
    assert "needed 'new' or 'newer'" in f.error


def test_one_trial_is_a_claim_of_one_case():
    claim = gain_claim("faster", "faster", TRIAL, "new", percent=(3, 5))
    (f,) = audit([claim], Bench(found={"sorting": compared(old=0, new=9)}))
    assert (f.verdict, list(f.figures)) == (CONFIRMED, ["sorting"])


def test_cases_may_depend_on_the_bench():
    claim = gain_claim(
        "faster", "new is faster", lambda b: [replace(TRIAL, name=b.name)], "new", percent=(3, 5)
    )
    (f,) = audit([claim], Bench(name="mine", found={"mine": compared(old=0, new=9)}))
    assert (f.verdict, list(f.figures)) == (CONFIRMED, ["mine"])


@pytest.mark.parametrize("gain", [9, -9])
def test_a_case_without_time_leaves_the_claim_undecided(gain):
    """A gain at a size that was chosen first must not stand for the sizes that were not timed."""
    cases = [TRIAL, replace(TRIAL, name="searching")]
    short = {"searching": _BudgetError("budget: too short")}
    b = Bench(found={"sorting": compared(old=0, new=gain)}, failed=short)
    (f,) = audit([speed(*cases)], b)
    assert (f.verdict, f.error) == (UNDECIDED, "")
    assert "every case" in f.plain
    assert f"sorting: {gain:+.1f}%" in f.told
    assert "searching: not timed" in f.told


def test_without_time_a_claim_on_speed_is_undecided():
    (f,) = audit([speed()], Bench(seconds=1e-6))
    assert (f.verdict, f.figures, f.error) == (UNDECIDED, {}, "")
    assert "no time" in f.plain
    assert np.isnan(f.claim.number.found(f.figures).median)


def test_a_claim_keeps_what_it_is_given():
    claim = speed(where="page 3", group="mine", units="percent", notebook="", rule="mine")
    assert (claim.where, claim.group, claim.units, claim.rule) == (
        "page 3",
        "mine",
        "percent",
        "mine",
    )
    assert "3%" in speed().rule


# Claims on memory


def kept_and_held(kept, held):
    """A form that keeps so many bytes, and allocates so many in a call."""

    def make():
        out = zeros(kept)
        return lambda: len(zeros(held)) * len(out) * 0

    return make


def held(nbytes):
    return kept_and_held(0, nbytes)


MEMORY = [  # before, after (bytes that are kept, and that a call allocates), verdict, sentence
    ((0, 300), (0, 100), CONFIRMED, "Saved"),
    ((300, 100), (0, 100), CONFIRMED, "Saved"),  # a buffer that is no longer kept
    ((0, 300), (300, 0), PARTLY, "no less is held"),
    ((0, 300), (0, 300), REFUTED, "it allocates as much as before"),
    ((0, 100), (0, 300), REFUTED, "it allocates more than before"),
    ((300, 0), (0, 300), REFUTED, "it allocates more than before"),
    ((0, 300), (0, 200), REFUTED, "Less is saved than is claimed"),
]


@pytest.mark.parametrize(("before", "after", "verdict", "word"), MEMORY)
def test_a_claim_on_memory_gets_its_verdict(before, after, verdict, word):
    forms = [kept_and_held(*(n * KB for n in pair)) for pair in (before, after)]
    least = 150 * KB
    claim = saving_claim(
        "lean", "it is lean", lambda b: forms, nbytes=(least, 2 * least), case="one"
    )
    (f,) = audit([claim], Bench())
    assert (f.verdict, f.error) == (verdict, "")
    assert word in f.plain
    figures = f.figures["one"]
    saved = (figures["peak before"] - figures["peak after"]) / 1e6
    assert f.claim.number.found(f.figures) == (saved, saved, saved)
    assert (f.claim.number.low, f.claim.number.high) == (least / 1e6, 2 * least / 1e6)


@pytest.mark.slow
@pytest.mark.parametrize("as_it_is", [True, False], ids=["forms", "a function of the bench"])
def test_a_claim_on_memory_compares_results(as_it_is):
    forms = (lambda: lambda: np.ones(10), lambda: lambda: np.zeros(10))
    given = forms if as_it_is else lambda b: forms
    (f,) = audit([saving_claim("lean", "it is lean", given, nbytes=(1e6, 2e6))])
    assert (f.verdict, f.figures) == (UNTESTABLE, {})
    assert "the second gives another result" in f.error
    unchecked = saving_claim("lean", "it is lean", given, nbytes=(1e6, 2e6), agree=None)
    assert audit([unchecked])[0].verdict == REFUTED


@pytest.mark.slow
def test_forms_that_return_nothing_are_not_compared():
    forms = (lambda: lambda: None, lambda: lambda: np.zeros(10))
    assert audit([saving_claim("lean", "it is lean", forms, nbytes=(1e6, 2e6))])[0].error == ""


def test_the_bounds_of_a_saving():
    def judged(allocated, peak):
        before = Account(allocated, 0, peak)
        return _saving(_accounts(before, Account(0, 0, 0)), 100)

    assert judged(100, 100) == judged(99, 100) == CONFIRMED
    assert judged(100, 99) == PARTLY
    assert judged(99, 99) == REFUTED


@given(st.lists(st.integers(0, 10**7), min_size=6, max_size=6), st.integers(0, 10**7))
def test_a_larger_saving_is_never_judged_worse(figures, more):
    before, after = Account(*figures[:3]), Account(*figures[3:])

    def rank(*accounts):
        return (REFUTED, PARTLY, CONFIRMED).index(_saving(_accounts(*accounts), 10**6))

    for name in Account._fields:
        leaner = after._replace(**{name: max(0, getattr(after, name) - more)})
        assert rank(before, after) <= rank(before, leaner)


# The bench


@pytest.fixture
def clock(monkeypatch):
    """Trials that take as long as is written in `uses`, on a clock that does not run by itself."""
    state = SimpleNamespace(now=1000.0, given={}, uses={}, ran=[])

    def run(trial, seconds, seed):
        state.ran.append(trial)
        state.given[trial.name] = seconds
        state.now += state.uses.get(trial.name, seconds)
        error = state.uses.get(f"{trial.name} error")
        if error:
            raise error
        return compared(old=0, new=9)

    monkeypatch.setattr(trials, "_run", run)
    monkeypatch.setattr(trials, "time", SimpleNamespace(monotonic=lambda: state.now))
    return state


def named(*names, **shares):
    return [Trial(n, FORMS) for n in names] + [
        Trial(n, FORMS, share=share) for n, share in shares.items()
    ]


def test_three_quarters_of_its_share_are_kept_for_each_trial(clock):
    Bench(seconds=80).run(named("a", "b", c=2.0))  # a takes all that is not kept for the others
    assert clock.given == pytest.approx({"a": 35, "b": 15, "c": 30})


def test_no_trial_takes_more_than_three_times_what_is_kept_for_it(clock):
    Bench(seconds=800).run(named("a", *"bcdefghi", j=1.0))
    assert clock.given["a"] == pytest.approx(3 * 60)


def test_time_that_is_left_over_goes_to_those_that_follow(clock):
    clock.uses = {"a": 5}
    Bench(seconds=90).run(named("a", "b", "c"))
    assert clock.given == pytest.approx({"a": 45, "b": 62.5, "c": 22.5})


def test_the_time_runs_from_the_first_trial_on(clock):
    b = Bench(seconds=80)
    clock.now += 100  # between the making of the bench and its use
    b.run(named("a", "b"))
    b.run(named("c"))
    assert clock.given == pytest.approx({"a": 50, "b": 30})
    assert isinstance(b.failed["c"], _BudgetError)


def test_a_trial_is_long_enough_to_be_of_use_while_there_is_time(clock):
    b = Bench(seconds=20)
    b.run(named(*"abcdefgh"))
    assert clock.given == pytest.approx({"a": 8, "b": 8, "c": 4})
    assert list(b.failed) == list("defgh")


def test_a_trial_with_too_little_time_is_not_begun_and_the_others_are(clock):
    b = Bench(seconds=9)
    first, second, third = named("a", "b", "c")
    clock.uses = {"a": 7.5}
    b.run([first, second])
    assert (list(b.found), list(b.failed)) == (["a"], ["b"])
    assert b.has_time(first)
    assert not b.has_time(second)
    b.ends = clock.now + 2  # there is more time later on
    assert b.has_time(third)
    assert clock.given["c"] == pytest.approx(2)


def test_the_first_trial_of_every_claim_comes_first(clock):
    a, b, c = named("a", "b", "c")
    audit([speed(a, c, id="one"), speed(b, id="two")], Bench(90))
    assert [t.name for t in clock.ran] == ["a", "b", "c"]


def test_trials_of_one_name_with_other_forms_fail_and_the_others_go_on(clock):
    other = replace(TRIAL, forms={"old": len, "newest": len})
    claims = [
        speed(id="one"),
        speed(other, form="newest", id="two"),
        speed(*named("a"), id="three"),
    ]
    one, two, three = audit(claims, Bench(90))
    for f in (one, two):
        assert f.verdict == UNTESTABLE
        assert f.error == "trials: two with other forms are called 'sorting'"
    assert (three.verdict, three.error) == (CONFIRMED, "")
    assert [t.name for t in clock.ran] == ["a"]


def test_every_trial_ticks_once_whatever_becomes_of_it(clock):
    clock.uses = {"b error": WorkerError("it died")}
    ticks = []
    b = Bench(seconds=12, tick=ticks.append)
    for _ in range(2):
        b.run(named("a", "b", "c"))
    assert ticks == ["a", "b", "c"]


def test_trials_with_one_name_run_once(clock):
    b = Bench(seconds=12)
    found = audit([speed(id="one"), speed(id="two"), speed(id="three")], b)
    assert [t.name for t in clock.ran] == ["sorting"]
    assert [f.verdict for f in found] == [CONFIRMED] * 3
    b.run([TRIAL])
    assert len(clock.ran) == 1


def test_what_was_found_before_is_not_measured_again(clock):
    b = Bench(seconds=12, found={"a": compared(old=0, new=1)})
    b.run(named("a", "b"))
    assert clock.given == pytest.approx({"b": 12})


def test_a_shared_trial_goes_on_until_every_claim_on_it_is_decided(clock):
    audit([speed(form="new"), speed(form="newer"), speed(form="new", percent=(20, 30))], Bench(9))
    (trial,) = clock.ran
    assert set(trial.enough) == {"new", "newer"}
    narrow = {gain: as_ratio(gain, 0.5) for gain in (2.9, 10, 19.9, 50)}
    assert trial.enough["newer"](narrow[10])
    assert not trial.enough["newer"](narrow[2.9])
    assert trial.enough["new"](narrow[50])
    for gain in (2.9, 19.9):  # at the bound of either claim
        assert not trial.enough["new"](narrow[gain])


@pytest.mark.parametrize(
    "error", [WorkerError("old: it died"), ValueError("threads: 99"), MemoryError()], ids=repr
)
def test_a_trial_that_fails_is_the_finding_of_its_claims_alone(error, clock):
    clock.uses = {"a error": error}
    a, b = named("a", "b")
    claims = [speed(a, id="one"), speed(b, id="two"), speed(a, b, id="three")]
    bench = Bench(seconds=12)
    one, two, three = audit(claims, bench)
    assert (two.verdict, two.error) == (CONFIRMED, "")
    for f in (one, three):
        assert f.verdict == UNTESTABLE
        assert str(error) in f.error
        assert f.told == f.error
        assert "\n" not in f.error
    assert bench.failed == {"a": error}


def broken(seed):
    raise OSError("no data\nto be had")


def of_another_result(seed):
    return lambda: np.zeros(3)


def slow(seed):
    return lambda: np.arange(40_000).sum(keepdims=True) * 0 + 1


def fast(seed):
    return lambda: np.arange(100).sum(keepdims=True) * 0 + 1


@pytest.mark.slow
def test_trials_in_processes_fail_by_themselves():
    def claim(form, id):
        return speed(
            Trial(id, {"old": slow, "new": form}, share=2.0 if form is fast else 1.0), id=id
        )

    b = Bench(seconds=12)
    raises, differs, good = audit(
        [claim(broken, "raises"), claim(of_another_result, "differs"), claim(fast, "good")], b
    )
    assert good.error == ""
    assert good.verdict in (CONFIRMED, UNDECIDED)  # the latter where a busy machine had no time
    assert raises.verdict == differs.verdict == UNTESTABLE
    assert "no data to be had" in raises.error
    assert "new" in differs.error
    assert {"raises", "differs"} <= set(b.failed)


STOPPED = ("trials", "measure", "judge", "tell", "run")


@pytest.mark.parametrize("where", STOPPED)
def test_ctrl_c_passes_through(where, clock, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    b, claim = Bench(seconds=12), speed()
    if where == "run":
        clock.uses = {"sorting error": KeyboardInterrupt()}
    else:
        claim = replace(claim, **{where: stop})
    with pytest.raises(KeyboardInterrupt):
        audit([speed(Trial("before", FORMS)), claim], b)
    if where != "trials":
        assert "before" in b.found
    assert not b.failed


def test_what_several_claims_look_at_is_made_once():
    b, made = Bench(), []
    for _ in range(3):
        assert b.once("it", lambda: made.append(1) or "value") == "value"
    assert made == [1]


# Audits


def plain(**options):
    """A claim that needs no trial; confirmed."""
    kinds = dict(
        id="plain",
        says="it is so",
        rule="confirmed",
        measure=lambda b: {"case": {"n": 1}},
        judge=lambda figures: CONFIRMED,
        tell=lambda figures: ("It is.", "1"),
    )
    return Claim(**(kinds | options))


def raising(error):
    def fail(*args):
        raise error

    return fail


WRONG = {  # what is wrong with a claim -> the claim, and what its error holds
    "an unknown verdict": (plain(judge=lambda f: "true"), "'true'"),
    "no verdict": (plain(judge=lambda f: None), "None, needed one of confirmed"),
    "measure raises": (plain(measure=raising(KeyError("x"))), "KeyError: 'x'"),
    "measure refuses": (plain(measure=raising(InputError("mine.npz:\n no"))), "mine.npz: no"),
    "judge raises": (plain(judge=raising(ZeroDivisionError("by 0"))), "ZeroDivisionError: by 0"),
    "tell raises": (plain(tell=raising(TypeError("two\nlines"))), "TypeError: two lines"),
    "tell is no pair": (plain(tell=lambda f: "It is."), "ValueError"),
    "Rust raises": (plain(in_rust=raising(OSError("no program"))), "OSError: no program"),
    "figures that are none": (plain(measure=lambda b: None), "figures"),
    "figures without a case": (plain(measure=lambda b: {"n": 1}), "figures"),
    "figures that JSON has not": (plain(measure=lambda b: {"case": {"n": object()}}), "figures"),
    "a number that is not found": (
        plain(number=trials.Number("MB", 1, 2, raising(KeyError("saved")))),
        "KeyError: 'saved'",
    ),
    "trials that are none": (
        plain(trials=lambda b: ["sorting"], measure=raising(KeyError("x"))),
        "KeyError",
    ),
    "trials that raise": (
        plain(trials=raising(KeyError("x")), measure=raising(KeyError("x"))),
        "KeyError",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_claim_that_is_wrong_is_told_and_the_others_are_judged(what):
    claim, said = WRONG[what]
    first, wrong, last = audit([plain(id="first"), claim, plain(id="last")], Bench())
    for f in (first, last):
        assert (f.verdict, f.plain, f.told, f.error) == (CONFIRMED, "It is.", "1", "")
    assert (wrong.verdict, wrong.figures) == (UNTESTABLE, {})
    assert said in wrong.error
    assert wrong.told == wrong.error
    assert "\n" not in wrong.error


@pytest.mark.parametrize("value", [np.float32(1), np.int64(1), np.bool_(True), 1.0, np.nan])
def test_figures_may_be_numbers_of_numpy(value):
    (f,) = audit([plain(measure=lambda b: {"case": {"n": value}})])
    assert (f.verdict, f.error) == (CONFIRMED, "")


def test_findings_come_in_the_order_of_the_claims():
    ids = [f"claim {i}" for i in (3, 1, 2)]
    assert [f.claim.id for f in audit([plain(id=id) for id in ids])] == ids


@pytest.mark.parametrize("verdict", Verdict)
def test_a_finding_has_the_verdict_of_the_rule_and_beside_it_that_of_rust(verdict):
    claim = plain(
        judge=lambda f: f["case"]["v"],
        tell=lambda f: ("So.", f"told {f['case']['v']}"),
        measure=lambda b: {"case": {"v": verdict}},
        in_rust=lambda: {"case": {"v": REFUTED}},
    )
    f = _audited(claim, Bench())
    assert (f.verdict, f.rust) == (verdict, REFUTED)
    assert (f.told, f.rust_told) == (f"told {verdict}", f"told {REFUTED}")


def test_data_that_overflows_brings_no_warning():
    big = np.full(4, 1e308)
    (f,) = audit([plain(measure=lambda b: {"case": {"n": float((big * big).sum())}})])
    assert (f.verdict, f.error) == (CONFIRMED, "")


# Ledgers in files

CLAIM = """
from ctxlab.audit import Claim
def claim(id):
    return Claim(id=id, says="", rule="", measure=lambda b: {}, judge=str, tell=str)
"""
LEDGERS = {  # what is wrong -> the file, or None; what the message holds
    "syntax": ("LEDGER = [\n(]", "mine.py: line 2: "),
    "no file": (None, "mine.py: no such file"),
    "raises": ("import math\nmath.sqrt(-1)", "line 2: ValueError: math domain error"),
    "leaves": ("raise SystemExit(0)", "it ends Python, with 0"),
    "imports what is not there": ("import no_such_thing", "no_such_thing"),
    "not a list": (CLAIM + "LEDGER = claim('a')", "LEDGER must be a list"),
    "a list of something else": (CLAIM + "LEDGER = [claim('a'), 'b']", "LEDGER[1] is str"),
    "an empty list": ("LEDGER = []", "hold one at least"),
    "a number without a unit": (
        CLAIM
        + "from ctxlab.audit import Number\n"
        + "from dataclasses import replace\n"
        + "LEDGER = [replace(claim('a'), number=Number('ms', 1, 2, len))]",
        "a: its number has the unit 'ms', not MB or %",
    ),
    "no list": ("CLAIMS = []", "it has no LEDGER"),
    "an empty file": ("", "it has no LEDGER"),
    "no text": (b"\xff\xfe\x00", "mine.py: "),
    "a zero byte": (b"LEDGER = []\0", "mine.py: "),
}


@pytest.mark.parametrize("what", LEDGERS)
def test_what_is_wrong_with_a_ledger_is_told(what, tmp_path):
    text, said = LEDGERS[what]
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        _load_ledger(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert "\n" not in message
    assert "None" not in message


def test_a_second_claim_of_one_id_is_refused_and_the_others_are_judged(tmp_path):
    text = CLAIM.replace("judge=str, tell=str", "judge=lambda f: 'partly', tell=lambda f: ('', '')")
    (tmp_path / "mine.py").write_text(text + "LEDGER = [*map(claim, 'abaa')]")
    found = {f.claim.id: f for f in audit(_load_ledger(tmp_path / "mine.py"))}
    assert list(found) == ["a", "b", "a (again)", "a (again) (again)"]
    assert [f.verdict for f in found.values()] == [PARTLY, PARTLY, UNTESTABLE, UNTESTABLE]
    for id in ("a (again)", "a (again) (again)"):
        assert found[id].error == "two claims are called 'a'; an id must be the only one"


@pytest.mark.parametrize("name", ["mine", "mine.txt", "mine.ipynb", "."])
def test_a_ledger_is_a_python_file(name, tmp_path):
    (tmp_path / "mine.txt").write_text("LEDGER = []")
    with pytest.raises(InputError, match="needed a Python file"):
        _load_ledger(tmp_path / name)


def test_a_folder_is_no_ledger(tmp_path):
    (tmp_path / "mine.py").mkdir()
    with pytest.raises(InputError, match=r"mine\.py: "):
        _load_ledger(tmp_path / "mine.py")


def test_an_error_in_a_module_beside_it_names_that_module(tmp_path):
    (tmp_path / "spoilt_helper.py").write_text("\n\n(]")
    (tmp_path / "mine.py").write_text("import spoilt_helper")
    with pytest.raises(InputError, match=r"mine\.py: .*spoilt_helper\.py"):
        _load_ledger(tmp_path / "mine.py")


def test_a_ledger_may_import_a_module_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "beside_the_ledger.py").write_text("NAME = 'from beside'")
    (tmp_path / "mine.py").write_text(
        CLAIM + "from beside_the_ledger import NAME\nLEDGER = (claim(NAME),)"
    )
    (found,) = _load_ledger(str(tmp_path / "mine.py"))
    assert found.id == "from beside"


def test_functions_of_a_ledger_still_see_its_names(tmp_path):
    (tmp_path / "mine.py").write_text(
        CLAIM.replace("lambda b: {}", "lambda b: SEEN") + "SEEN = {}\nLEDGER = [claim('a')]"
    )
    (found,) = _load_ledger(tmp_path / "mine.py")
    gc.collect()
    assert found.measure(Bench()) == {}
