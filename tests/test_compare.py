"""Reports that are read back: strange files, what changed beyond noise, and runs that go on."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_claims import small_bench
from test_report import HOSTILE, Page

from ctxlab import compare
from ctxlab.claims import LEDGER, run_ledger, words
from ctxlab.compare import (
    PARTIAL,
    READABLE,
    changes_html,
    changes_table,
    differences,
    explained,
    find_claim,
    read_partial,
    read_report,
    revived,
    run_facts,
    save_partial,
)
from ctxlab.data import InputError
from ctxlab.measure import AGAIN, Interval
from ctxlab.report import SCHEMA_VERSION, as_json


@pytest.fixture(scope="module")
def made():
    b = small_bench()
    return b, run_ledger(b)


@pytest.fixture
def data(made):
    """claims.json as it is read, to be changed."""
    b, findings = made
    return json.loads(json.dumps(as_json(findings, b, {"seed": 0})))


def stored(folder, data):
    (folder / "claims.json").write_text(json.dumps(data))
    return read_report(folder)


def test_what_is_written_can_be_read(data, made, tmp_path):
    assert SCHEMA_VERSION in READABLE
    report = stored(tmp_path, data)
    assert {id: v.figures for id, v in report.claims.items()} == {
        f.claim.id: f.figures for f in made[1]
    }
    assert report.timings.keys() == made[0].timings.keys()
    for key, t in report.timings.items():
        for name in t.seconds:
            assert t.compare(name) == made[0].timings[key].compare(name)


def first(data):
    return data["timings"][0]


SPOILT = {
    "no claims": lambda d: d.pop("claims"),
    "claims of another kind": lambda d: d.update(claims=5),
    "a claim without a verdict": lambda d: d["claims"][0].pop("verdict"),
    "figures that are none": lambda d: d["claims"][0].update(figures=[1]),
    "an interval without an end": lambda d: d["claims"][0].update(figures={"w": {"k": {"low": 1}}}),
    "no settings": lambda d: d.update(settings=None),
    "no timings": lambda d: d.update(timings=None),
    "no seconds": lambda d: first(d).update(seconds={}),
    "too few samples": lambda d: first(d).update(
        placement=None, seconds={k: v[:5] for k, v in first(d)["seconds"].items()}
    ),
    "no control": lambda d: first(d).update(control="nobody"),
    "a control that is no name": lambda d: first(d).update(control=[]),
    "samples that are not paired": lambda d: first(d)["seconds"]["dot"].append(1.0),
    "a placement too short": lambda d: first(d).update(placement=[0]),
    "a time of words": lambda d: first(d)["seconds"].update(dot=["soon"] * 21),
    "a time that is null": lambda d: first(d)["seconds"]["dot"].__setitem__(0, None),
    "a negative time": lambda d: first(d)["seconds"]["dot"].__setitem__(0, -1.0),
    "a time beyond measure": lambda d: first(d)["seconds"]["dot"].__setitem__(0, 10**400),
    "not a number": lambda d: first(d)["seconds"]["dot"].__setitem__(0, float("nan")),
    "a version that is none": lambda d: d.update(schema_version=[2]),
    "an older version": lambda d: d.update(schema_version=1),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_report_is_one_clear_error(what, data, tmp_path):
    SPOILT[what](data)
    with pytest.raises(InputError, match=r"claims\.json: ") as error:
        stored(tmp_path, data)
    assert len(str(error.value)) < 400


def altered(data, factor=1.0, control=0.0):
    """The first timing with samples of known ratio and known noise of the control."""
    t = first(data)
    ones = np.ones(14)
    seconds = dict.fromkeys(t["seconds"], ones) | {"reused out": factor * ones}
    seconds["dot" + AGAIN] = 1 + control * np.linspace(-1, 1, 14)
    t.update(seconds={k: v.tolist() for k, v in seconds.items()}, placement=list(range(7)) * 2)
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
    rows = compare.compare(before, altered(data, factor, control))["timings"]
    found = {(r["workload"], r["what"], r["name"]): r["change"] for r in rows}
    assert found.pop(("mine", "cov", "reused out")) == change
    assert set(found.values()) == {"same within noise"}
    after = stored(tmp_path, data)  # and the other way round
    rows = compare.compare(after, altered(data))["timings"]
    turned = {"slower": "faster", "faster": "slower"}.get(change, change)
    assert {r["change"] for r in rows} == {turned, "same within noise"}


def claim(data, id):
    return next(c for c in data["claims"] if c["id"] == id)


def change_of(before, data, id):
    return next(c["change"] for c in compare.compare(before, data)["claims"] if c["id"] == id)


def test_what_happened_to_a_claim(data, tmp_path):
    before = stored(tmp_path, data)
    assert {c["change"] for c in compare.compare(before, data)["claims"]} == {""}
    claim(data, "lazy")["measured"] = "something else"
    assert change_of(before, data, "lazy") == "other figures"
    claim(data, "lazy")["verdict"] = "undecided"
    assert change_of(before, data, "lazy") == "verdict, other figures"
    claim(data, "speed-forward").update(verdict="partly", measured="jitter")
    assert change_of(before, data, "speed-forward") == "verdict, within noise"
    for f in claim(data, "speed-forward")["figures"].values():
        f["shipped"] = Interval(1e6, 1e6, 1e6)._asdict()
    assert change_of(before, data, "speed-forward") == "verdict, beyond noise"
    gone = data["claims"].pop()
    assert change_of(before, data, gone["id"]) == "no longer there"
    data["claims"].append(gone | {"id": "novel"})
    assert change_of(before, data, "novel") == "new"


@pytest.mark.parametrize(("id", "name"), [("total", "planned"), ("why-faster", "intermediate")])
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
    found = compare.compare(before, data)["differs"]
    cores = before.facts["machine"]["cores"]
    expected = [
        "settings.seed: 0, now 4",
        "settings.threads: none, now 2",
        f"machine.cores: {cores}, now 1234",
    ]
    assert sorted(found) == sorted(expected)
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []


@pytest.mark.parametrize("width", [20, 40, 80, 100])
def test_hostile_names_stay_text_and_in_width(width, data, tmp_path):
    data["created"] = data["settings"]["seed"] = HOSTILE + "\x1b[31m\nsecond line " + "y" * 200
    for row in (first(data), claim(data, "pow2")):
        row.update({k: HOSTILE for k in ("workload", "what", "verdict") if k in row})
    before = stored(tmp_path, data)
    changes = compare.compare(before, data)
    assert json.loads(json.dumps(changes, allow_nan=False)) == changes
    text = changes_table(changes, width)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width
    page = Page(changes_html(changes))
    assert not page.faults
    assert "script" not in dict(page.tags)
    assert not page.all("onclick")


def synthetic(rng, noise, effect):
    """Raw timings of a run on seven placements, as claims.json has them."""
    block = np.repeat(np.arange(7), 4)
    drift = np.exp(np.cumsum(0.05 * rng.standard_normal(28)))
    place = {name: np.exp(0.02 * rng.standard_normal(7))[block] for name in ("a", "a" + AGAIN, "b")}
    seconds = {
        name: drift * p * np.exp(noise * rng.standard_normal(28)) for name, p in place.items()
    }
    seconds["b"] *= effect
    return revived(dict(seconds=seconds, control="a", placement=block, calls_per_sample=1))


@pytest.mark.parametrize("noise", [0.001, 0.02, 0.2])
@pytest.mark.parametrize("effect", [1.0, 1.3])
def test_two_runs_of_the_same_seldom_differ(noise, effect):
    rng = np.random.default_rng(1)
    pairs = [[synthetic(rng, noise, effect).compare("b") for _ in range(2)] for _ in range(400)]
    assert np.mean([compare.apart(*pair) for pair in pairs]) <= 0.05


def test_a_true_change_is_found():
    rng = np.random.default_rng(1)
    pairs = [
        [synthetic(rng, 0.01, effect).compare("b") for effect in (1.0, 1.3)] for _ in range(200)
    ]
    assert np.mean([compare.apart(*pair) for pair in pairs]) >= 0.95


# Going on


@pytest.fixture
def partial(made, tmp_path):
    b, findings = made
    facts = run_facts(b, {"seed": 0})
    save_partial(tmp_path, b, facts, findings[:9])
    return tmp_path, facts


def empty(b):
    return replace(b, timings={})


def test_what_was_kept_comes_back(made, partial):
    b, findings = made
    folder, facts = partial
    again = empty(b)
    assert read_partial(folder, again, facts) == {f.claim.id: f.figures for f in findings[:9]}
    for key, t in b.timings.items():
        for name, s in t.seconds.items():
            np.testing.assert_array_equal(again.timings[key].seconds[name], s)
        assert (again.timings[key].control, again.timings[key].calls) == (t.control, t.calls)


def test_other_data_or_settings_or_machine_is_another_run(made, partial):
    b, _ = made
    folder, facts = partial
    w = b.workloads[0]
    other = replace(b, workloads=[replace(w, X=w.X + 1), b.workloads[1]])
    machine = facts["machine"] | {"numpy": "1.0"}
    for changed in (
        run_facts(other, {"seed": 0}),
        run_facts(b, {"seed": 1}),
        facts | {"machine": machine},
    ):
        again = empty(b)
        with pytest.raises(InputError, match="of another run"):
            read_partial(folder, again, changed)
        assert not again.timings


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_partial_file_that_is_cut_is_refused(cut, made, partial):
    folder, facts = partial
    text = (folder / PARTIAL).read_text()
    (folder / PARTIAL).write_text(text[:cut])
    again = empty(made[0])
    with pytest.raises(InputError, match="leave --resume out"):
        read_partial(folder, again, facts)
    assert not again.timings


def test_figures_that_cannot_be_judged_are_refused(made, partial):
    folder, facts = partial
    kept = json.loads((folder / PARTIAL).read_text())
    kept["figures"]["speed-forward"] = {"mine": {"shipped": 3}}
    (folder / PARTIAL).write_text(json.dumps(kept))
    with pytest.raises(InputError, match="leave --resume out"):
        read_partial(folder, empty(made[0]), facts)


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_full_disk_keeps_what_was_kept(step, made, partial, monkeypatch):
    b, findings = made
    folder, facts = partial
    before = (folder / PARTIAL).read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*(((Path, "write_bytes")) if step == "write" else (os, "replace")), full)
    with pytest.raises(OSError, match="No space"):
        save_partial(folder, b, facts, findings)
    assert (folder / PARTIAL).read_bytes() == before
    assert os.listdir(folder) == [PARTIAL]


# Claims, explained


@pytest.mark.parametrize("entry", LEDGER, ids=lambda c: c.id)
def test_each_claim_can_be_explained(entry, data, tmp_path):
    text = explained(find_claim(entry.id), 40, stored(tmp_path, data))
    assert max(map(len, text.splitlines())) <= 40
    whole = "".join(text.split())
    verdict = claim(data, entry.id)["verdict"]
    told = (entry.says, entry.rule, entry.section, entry.original, f"verdict: {verdict}")
    for part in (*told, *words(entry).values()):
        assert "".join(part.split()) in whole
