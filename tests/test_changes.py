"""Reports that are read back: strange files, what changed beyond noise, and runs that go on."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_claims import small_audit
from test_report import HOSTILE, Page
from test_trials import compared, measured

from ctxlab.audit import changes
from ctxlab.audit.changes import (
    _PARTIAL,
    _READABLE,
    _changes_html,
    _changes_table,
    _claims_list,
    _differences,
    _explained,
    _find_claim,
    _read_partial,
    _read_report,
    _run_facts,
    _save_partial,
)
from ctxlab.audit.claims import LEDGER
from ctxlab.audit.report import _SCHEMA_VERSION, _as_json, _plain_trials, _words
from ctxlab.data import InputError, _pair
from ctxlab.intervals import Interval, _sequential_interval, _sequential_ranks
from ctxlab.measure import _Comparison


@pytest.fixture(scope="module")
def made():
    return small_audit()


@pytest.fixture
def data(made):
    """claims.json as it is read, to be changed."""
    b, findings = made
    return json.loads(json.dumps(_as_json(findings, b, {"seed": 0})))


def stored(folder, data):
    (folder / "claims.json").write_text(json.dumps(data))
    return _read_report(folder)


def test_what_is_written_can_be_read(data, made, tmp_path):
    assert _SCHEMA_VERSION in _READABLE
    report = stored(tmp_path, data)
    assert {id: v.figures for id, v in report.claims.items()} == {
        f.claim.id: f.figures for f in made[1]
    }
    assert report.trials == made[0].found


def test_an_interval_without_limits_can_be_read(made, tmp_path):
    open_ended = replace(measured(), ratio=Interval(1.0, 0.0, np.inf))
    b = replace(made[0], found={"t": compared(old=0, new=open_ended)})
    data = json.loads(json.dumps(_as_json([], b, {}), allow_nan=False))
    assert stored(tmp_path, data).trials == b.found
    before = stored(tmp_path, data)
    assert changes._compare_reports(before, data)["timings"] == []  # nothing to compare yet


def first(data):
    return data["trials"][0]


def form(data):
    return first(data)["forms"]["zeros + gemm"]


SPOILT = {
    "no claims": lambda d: d.pop("claims"),
    "claims of another kind": lambda d: d.update(claims=5),
    "a claim without a verdict": lambda d: d["claims"][0].pop("verdict"),
    "figures that are none": lambda d: d["claims"][0].update(figures=[1]),
    "an interval without an end": lambda d: d["claims"][0].update(figures={"w": {"k": {"low": 1}}}),
    "an interval of words": lambda d: d["claims"][0].update(figures={"w": {"k": ["a", "b", "c"]}}),
    "no settings": lambda d: d.update(settings=None),
    "no trials": lambda d: d.pop("trials"),
    "trials that are none": lambda d: d.update(trials=None),
    "trials without a list": lambda d: d.update(trials={"a": 1}),
    "a trial without a name": lambda d: first(d).pop("name"),
    "a trial without forms": lambda d: first(d).update(forms={}),
    "forms that are none": lambda d: first(d).update(forms=None),
    "a base that is no form": lambda d: first(d).update(base="nobody"),
    "a base that is no name": lambda d: first(d).update(base=[]),
    "a trial with more than it has": lambda d: first(d).update(colour="red"),
    "a trial with less than it has": lambda d: first(d).pop("agreement"),
    "a form without a ratio": lambda d: form(d).pop("ratio"),
    "a form without a control": lambda d: form(d).pop("control"),
    "a form with more than it has": lambda d: form(d).update(colour="red"),
    "a ratio that is a number": lambda d: form(d).update(ratio=1.0),
    "a ratio of two numbers": lambda d: form(d).update(ratio=[1, 2]),
    "a ratio upside down": lambda d: form(d).update(ratio=[1.0, 2.0, 0.5]),
    "a median beside its interval": lambda d: form(d).update(ratio=[3.0, 1.0, 2.0]),
    "a negative ratio": lambda d: form(d).update(ratio=[1.0, -1.0, 2.0]),
    "a ratio without a median": lambda d: form(d).update(control=[None, None, None]),
    "no blocks": lambda d: form(d).update(ratios=None),
    "a block of words": lambda d: form(d).update(ratios=["soon"]),
    "a block that is null": lambda d: form(d)["ratios"].__setitem__(0, None),
    "a negative block": lambda d: form(d)["ratios"].__setitem__(0, -1.0),
    "a block of no time": lambda d: form(d)["ratios"].__setitem__(0, 0.0),
    "a block beyond measure": lambda d: form(d)["ratios"].__setitem__(0, 10**400),
    "not a number": lambda d: form(d)["ratios"].__setitem__(0, float("nan")),
    "a version that is none": lambda d: d.update(schema_version=[3]),
    "no version": lambda d: d.pop("schema_version"),
    "an older version": lambda d: d.update(schema_version=2),
    "a newer version": lambda d: d.update(schema_version=4),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_report_is_one_clear_error(what, data, tmp_path):
    SPOILT[what](data)
    with pytest.raises(InputError, match=r"claims\.json: ") as error:
        stored(tmp_path, data)
    assert len(str(error.value)) < 400


def altered(data, factor=1.0, control=0.0):
    """The first trial with a known ratio and a known noise of the control."""
    form(data).update(
        ratio=[factor, 0.99 * factor, 1.01 * factor], control=[1.0, 1 - control, 1 + control]
    )
    return data


@pytest.mark.parametrize(
    ("factor", "control", "change"),
    [
        (1.0, 0.0, "same within noise"),
        (1.1, 0.0, "slower"),
        (0.9, 0.0, "faster"),
        (1.1, 0.5, "same within noise"),  # the control strays further than the effect
        (9.0, 0.5, "slower"),
    ],
)
def test_a_change_must_exceed_the_noise_of_both(factor, control, change, data, tmp_path):
    before = stored(tmp_path, altered(data))
    rows = changes._compare_reports(before, altered(data, factor, control))["timings"]
    found = {(r["what"], r["name"]): r["change"] for r in rows}
    assert found.pop((first(data)["name"], "zeros + gemm")) == change
    assert set(found.values()) == {"same within noise"}
    after = stored(tmp_path, data)  # and the other way round
    rows = changes._compare_reports(after, altered(data))["timings"]
    turned = {"slower": "faster", "faster": "slower"}.get(change, change)
    assert {r["change"] for r in rows} == {turned, "same within noise"}


def test_forms_are_compared_where_both_reports_have_them_on_the_same_base(data, tmp_path):
    before, names = stored(tmp_path, data), [t["name"] for t in data["trials"]]
    forms = {(t["name"], f) for t in data["trials"] for f in t["forms"] if f != t["base"]}
    rows = changes._compare_reports(before, data)["timings"]
    assert {(r["what"], r["name"]) for r in rows} == forms
    first(data)["base"] = "reused out"
    data["trials"][1]["name"] = "another one"
    del data["trials"][2]["forms"]["zeros + gemm"]
    left = {(r["what"], r["name"]) for r in changes._compare_reports(before, data)["timings"]}
    gone = {(n, f) for n, f in forms if n in names[:2]} | {(names[2], "zeros + gemm")}
    assert left == forms - gone


def claim(data, id):
    return next(c for c in data["claims"] if c["id"] == id)


def change_of(before, data, id):
    return next(
        c["change"] for c in changes._compare_reports(before, data)["claims"] if c["id"] == id
    )


def test_what_happened_to_a_claim(data, tmp_path):
    before = stored(tmp_path, data)
    assert {c["change"] for c in changes._compare_reports(before, data)["claims"]} == {""}
    claim(data, "lazy")["measured"] = "something else"
    assert change_of(before, data, "lazy") == "other figures"
    claim(data, "lazy")["verdict"] = "undecided"
    assert change_of(before, data, "lazy") == "verdict, other figures"
    claim(data, "speed-forward").update(verdict="partly", measured="jitter")
    assert change_of(before, data, "speed-forward") == "verdict, within noise"
    for f in claim(data, "speed-forward")["figures"].values():
        f["gain"] = Interval(1e6, 1e6, 1e6)._asdict()
    assert change_of(before, data, "speed-forward") == "verdict, beyond noise"
    gone = data["claims"].pop()
    assert change_of(before, data, gone["id"]) == "no longer there"
    data["claims"].append(gone | {"id": "novel"})
    assert change_of(before, data, "novel") == "new"


@pytest.mark.parametrize(("id", "name"), [("total", "peak after"), ("why-faster", "intermediate")])
def test_counted_bytes_beside_a_timed_figure_may_change_too(id, name, data, tmp_path):
    before = stored(tmp_path, data)
    for f in claim(data, id)["figures"].values():
        f[name] += 500  # objects of Python
    assert change_of(before, data, id) == ""
    for f in claim(data, id)["figures"].values():
        f[name] += 10**6
    assert change_of(before, data, id) == "other figures"
    claim(data, id)["verdict"] = "none"
    assert change_of(before, data, id) == "verdict, other figures"


@pytest.mark.parametrize("id", ["speed-forward", "all-archs", "total"])
def test_a_control_that_moves_is_no_change_of_the_claim(id, data, tmp_path):
    before = stored(tmp_path, data)
    for f in claim(data, id)["figures"].values():
        f["control"] = Interval(50, 49.9, 50.1)._asdict()
    assert change_of(before, data, id) == ""


@pytest.mark.parametrize("id", ["pool-speed", "speed-forward", "pool-mem"])
def test_another_workload_is_no_change_within_noise(id, data, tmp_path):
    before = stored(tmp_path, data)
    figures = claim(data, id)["figures"]
    figures["renamed"] = figures.pop(next(iter(figures)))
    claim(data, id)["measured"] += " (renamed)"
    assert change_of(before, data, id) == "other workload"
    claim(data, id)["verdict"] = "none"
    assert change_of(before, data, id) == "verdict, other workload"


def test_what_differs_is_listed(data, tmp_path):
    before = stored(tmp_path, data)
    data["settings"] |= {"seed": 4, "threads": 2}
    data["machine"]["cores"] = 1234
    found = changes._compare_reports(before, data)["differs"]
    cores = before.facts["machine"]["cores"]
    expected = [
        "settings.seed: 0, now 4",
        "settings.threads: none, now 2",
        f"machine.cores: {cores}, now 1234",
    ]
    assert sorted(found) == sorted(expected)
    assert _differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []


@pytest.mark.parametrize("width", [20, 40, 80, 100])
def test_hostile_names_stay_text_and_in_width(width, data, tmp_path):
    data["created"] = data["settings"]["seed"] = HOSTILE + "\x1b[31m\nsecond line " + "y" * 200
    first(data)["name"] = claim(data, "pow2")["verdict"] = HOSTILE
    first(data)["forms"][HOSTILE] = form(data)
    before = stored(tmp_path, data)
    found = changes._compare_reports(before, data)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    text = _changes_table(found, width)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width
    page = Page(_changes_html(found))
    assert not page.faults
    assert "script" not in dict(page.tags)
    assert not page.all("onclick")


BLOCKS = 20
RANKS = _sequential_ranks(BLOCKS, 0.05)


def synthetic(rng, noise, effect):
    """What a run finds, whose blocks have that noise."""
    ratio, control = (
        Interval(*np.exp(_sequential_interval(noise * rng.standard_normal(BLOCKS), RANKS)))
        for _ in range(2)
    )
    return _Comparison(ratio.scaled(effect), control)


@pytest.mark.parametrize("noise", [0.001, 0.02, 0.2])
@pytest.mark.parametrize("effect", [1.0, 1.3])
def test_two_runs_of_the_same_seldom_differ(noise, effect):
    rng = np.random.default_rng(1)
    pairs = [[synthetic(rng, noise, effect) for _ in range(2)] for _ in range(400)]
    assert np.mean([changes._apart(*pair) for pair in pairs]) <= 0.05


def test_a_true_change_is_found():
    rng = np.random.default_rng(1)
    pairs = [[synthetic(rng, 0.01, effect) for effect in (1.0, 1.3)] for _ in range(200)]
    assert np.mean([changes._apart(*pair) for pair in pairs]) >= 0.95


# Going on


@pytest.fixture
def partial(made, tmp_path):
    b = half(made[0])
    facts = _run_facts(b, {"seed": 0})
    _save_partial(tmp_path, b, facts)
    return tmp_path, facts


def half(b):
    """The bench after a few of its trials."""
    return replace(b, found=dict(list(b.found.items())[:4]))


def test_what_was_kept_comes_back(made, partial):
    folder, facts = partial
    assert _read_partial(folder, facts) == half(made[0]).found
    text = json.loads((folder / _PARTIAL).read_text())
    assert text["trials"] == json.loads(json.dumps(_plain_trials(half(made[0]))))


def test_other_data_or_settings_or_machine_is_another_run(made, partial):
    b, _ = made
    folder, facts = partial
    (p,) = b.pairs
    machine = facts["machine"] | {"numpy": "1.0"}
    for changed in (
        _run_facts(replace(b, pairs=[_pair("p", p.x + 1, p.y)]), {"seed": 0}),
        _run_facts(replace(b, pairs=[p, p]), {"seed": 0}),
        _run_facts(replace(b, pairs=None), {"seed": 0}),
        _run_facts(b, {"seed": 1}),
        facts | {"machine": machine},
        facts | {"ctxlab": "0"},
    ):
        with pytest.raises(InputError, match="of another run"):
            _read_partial(folder, changed)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_partial_file_that_is_cut_is_refused(cut, partial):
    folder, facts = partial
    text = (folder / _PARTIAL).read_text()
    (folder / _PARTIAL).write_text(text[:cut])
    with pytest.raises(InputError, match="leave --resume out"):
        _read_partial(folder, facts)


@pytest.mark.parametrize("what", [what for what in SPOILT if "trial" in what or "block" in what])
def test_trials_that_are_spoilt_are_not_gone_on_with(what, partial):
    folder, facts = partial
    kept = json.loads((folder / _PARTIAL).read_text())
    SPOILT[what](kept)
    (folder / _PARTIAL).write_text(json.dumps(kept))
    with pytest.raises(InputError, match="leave --resume out"):
        _read_partial(folder, facts)


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_full_disk_keeps_what_was_kept(step, made, partial, monkeypatch):
    folder, facts = partial
    before = (folder / _PARTIAL).read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*(((Path, "write_bytes")) if step == "write" else (os, "replace")), full)
    with pytest.raises(OSError, match="No space"):
        _save_partial(folder, made[0], facts)
    assert (folder / _PARTIAL).read_bytes() == before
    assert os.listdir(folder) == [_PARTIAL]


# Claims, explained


@pytest.mark.parametrize("entry", LEDGER, ids=lambda c: c.id)
def test_each_claim_can_be_explained(entry, data, tmp_path):
    text = _explained(_find_claim(entry.id), 40, stored(tmp_path, data))
    assert max(map(len, text.splitlines())) <= 40
    whole = "".join(text.split())
    verdict = claim(data, entry.id)["verdict"]
    told = (entry.says, entry.rule, entry.section, entry.where, f"verdict: {verdict}")
    for part in (*told, *_words(entry).values()):
        assert "".join(part.split()) in whole


@pytest.mark.parametrize("width", [30, 100])
def test_the_list_of_claims_has_the_verdicts_that_are_stored(width, data, tmp_path):
    plain, told = _claims_list(width), _claims_list(width, stored(tmp_path, data))
    for c in LEDGER:
        says = "".join(c.says.split())
        verdict = claim(data, c.id)["verdict"]
        for text, middle in ((plain, ""), (told, verdict)):
            colon = ":" if width < 72 else ""
            line = "".join(f"{c.id}{c.notebook}{middle}{colon}".split()) + says
            assert line in "".join(text.split())
    assert max(map(len, told.splitlines())) <= width


def test_a_claim_that_a_report_does_not_have_is_listed_without_a_verdict(data, tmp_path):
    data["claims"] = data["claims"][1:]
    report = stored(tmp_path, data)
    assert LEDGER[0].says[:20] in " ".join(_claims_list(100, report).split())
    assert "verdict: none yet" in _explained(LEDGER[0], 100, report)
