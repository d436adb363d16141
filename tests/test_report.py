"""The report: a table that fits, a page with its files beside it, a file to judge again."""

import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import matplotlib
import numpy as np
import pytest
from conftest import serving
from test_claims import entry, small_audit, small_bench, trials_of
from test_trials import TRIAL, compared, held, measured, plain, raising, speed

from ctxlab import __version__
from ctxlab.audit.claims import LEDGER
from ctxlab.audit.report import (
    _MEANS,
    _PLOTS,
    _as_html,
    _as_json,
    _badge,
    _board_rows,
    _noise_line,
    _plot_of,
    _plot_scoreboard,
    _plot_times,
    _png,
    _staging,
    _table,
    _terminal,
    write_report,
)
from ctxlab.audit.trials import (
    Bench,
    Number,
    Trial,
    Verdict,
    _gain,
    audit,
    gain_claim,
    saving_claim,
)
from ctxlab.data import InputError
from ctxlab.intervals import Interval
from ctxlab.measure import _BudgetError

HOSTILE = "</td><script>alert('1')</script> & \"quoted\" &amp; <b onclick=x>"
STRICT = "default-src 'none'; img-src 'self'; style-src 'self'"  # as servers set it
FILES = sorted(["index.html", "report.css", "claims.json", *(f"{name}.png" for name in _PLOTS)])


@pytest.fixture(scope="module")
def made():
    return small_audit()


@pytest.fixture(scope="module")
def data(made):
    """claims.json as a reader gets it, from text."""
    b, findings = made
    return json.loads(json.dumps(_as_json(findings, b, {"seed": 0}), allow_nan=False))


# The table


TEXTS = ["word " * 80, "x" * 300, "a-b/c" * 50, "two\nlines\tand a tab", "", "ÄÖ²·" * 30]


@pytest.mark.parametrize("text", TEXTS)
def test_the_table_keeps_its_width_and_every_character(made, text):
    f = made[1][0]
    claim = replace(f.claim, id="i" * 40, says=text, notebook="99_" + "n" * 40, group="")
    f = replace(f, claim=claim, plain="So.", told=text, rust="")
    lines = _table([f]).splitlines()
    assert max(map(len, lines)) <= 100
    _, rule, *rows = lines
    starts = [i for i in range(100) if rule[i : i + 1] == "-" and rule[i - 1 : i] in ("", " ")]
    columns = [
        "".join("".join(row[a:b].split()) for row in rows[:-2])
        for a, b in zip(starts, [*starts[1:], 100], strict=True)
    ]
    whole = ["i" * 40, text, f"So.{text}", f"{f.verdict}(99_{'n' * 40})"]
    assert columns == ["".join(part.split()) for part in whole]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("width", [20, 40, 76, 77, 80, 99])
def test_a_narrow_terminal_loses_nothing(made, text, width):
    f = made[1][0]
    f = replace(f, claim=replace(f.claim, says=text), told=text)
    lines = _table([f], width).splitlines()
    assert max(map(len, lines)) <= width
    if width < 77:
        whole = "".join("\n".join(lines).split())
        assert whole.count("".join(text.split())) >= 2


@pytest.mark.parametrize("width", [40, 100])
def test_colour_changes_nothing_but_colour(made, width):
    plain, coloured = _table(made[1], width), _table(made[1], width, colour=True)
    assert "\x1b" not in plain
    assert coloured.count("\x1b[0m") == len(LEDGER)
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain


@pytest.mark.parametrize(
    ("tty", "env", "colour"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": ""}, True),  # as the convention says: only where it is not empty
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
    ],
)
def test_colour_only_where_it_is_wanted(tty, env, colour, monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: tty))
    monkeypatch.setenv("COLUMNS", "300")
    assert _terminal() == dict(width=100, colour=colour)


@pytest.mark.parametrize("width", [40, 100])
def test_the_table_tells_where_the_program_in_rust_says_otherwise(made, width):
    f = replace(made[1][0], verdict=Verdict.CONFIRMED, rust=Verdict.REFUTED)
    assert f"in Rust: {Verdict.REFUTED}" in _table([f], width)
    assert "in Rust" not in _table([replace(f, rust=Verdict.CONFIRMED)], width)


def test_the_table_has_a_line_for_each_group(made):
    lines = _table(made[1]).splitlines()
    groups = [line for line in lines if line.isupper() and line.isalpha()]
    assert groups == list(dict.fromkeys(c.group.upper() for c in LEDGER))


def test_a_noisy_machine_is_told(made):
    b, findings = made
    quiet, loud = (compared(old=measured(control=(0, spread)), new=1) for spread in (1, 9))
    assert _noise_line(Bench(found={"sorting": quiet})) == ""
    noisy = replace(b, found={"sorting": quiet, "searching": loud})
    assert "in 1 of 2 trials: searching." in _noise_line(noisy)
    page = Page(_as_html(findings, _as_json(findings, noisy, {}), []))
    assert "Noisy." in page.text
    assert "In 1 of 2 trials" in page.text
    assert "searching" in page.text


def test_a_control_without_an_interval_yet_is_told_and_stored(made, tmp_path):
    b, findings = made
    few = measured(9)
    few = replace(few, ratio=Interval(0.9, 0.0, np.inf), control=Interval(1.0, 0.0, np.inf))
    b = replace(b, found={"sorting": compared(old=few, new=few)})
    data = _as_json(findings, b, {})
    write_report(tmp_path, findings, b, data)
    stored = json.loads((tmp_path / "claims.json").read_text())
    assert stored["too_noisy"] == [{"name": "sorting", "control_strays": None}]
    assert "sorting" in _noise_line(b)


def test_a_case_that_was_not_timed_is_shown_and_stored(tmp_path):
    trials = [Trial(name, {"old": len, "new": len}) for name in ("sorting", "searching")]
    claim = gain_claim("faster", "new is faster", trials, "new", percent=(3, 5))
    b = Bench(
        found={"sorting": compared(old=0, new=9)}, failed={"searching": _BudgetError("too short")}
    )
    findings = audit([claim], b)
    assert findings[0].verdict == Verdict.UNDECIDED
    data = _as_json(findings, b, {})
    write_report(tmp_path, findings, b, data)
    stored = json.loads((tmp_path / "claims.json").read_text())
    assert stored["claims"][0]["figures"]["searching"]["gain"]["median"] is None
    page = Page((tmp_path / "index.html").read_text())
    assert "searching: not timed" in page.text
    assert "not measured" in page.text
    shown = claim.number.cases(findings[0].figures)
    assert [round(gain.median) for gain in shown] == [9]  # the picture has the other one alone


def test_what_was_not_timed_is_told(made):
    b, findings = made
    b = replace(b, found={}, failed={"sorting": OSError("gone"), "searching": ValueError("")})
    assert _noise_line(b) == "Not timed: sorting; searching."
    data = _as_json(findings, b, {})
    assert data["not_timed"] == {"sorting": "gone", "searching": ""}
    assert "Not timed: sorting; searching." in Page(_as_html(findings, data, [])).text


def test_the_scoreboard_counts_every_finding(made):
    counts = [int(part.split()[0]) for part in _board_rows(made[1]).split(", ")]
    assert sum(counts) == len(LEDGER)


# For machines


def test_json_has_its_schema(data):
    types = {k: type(v) for k, v in data.items()}
    text = dict.fromkeys(("schema", "ctxlab", "created"), str)
    tables = dict.fromkeys(("settings", "machine", "not_timed"), dict)
    rows = dict.fromkeys(("claims", "trials", "too_noisy"), list)
    assert types == text | tables | rows | {"schema_version": int}
    assert (data["schema"], data["schema_version"], data["ctxlab"]) == (
        "ctxlab.audit.claims",
        3,
        __version__,
    )
    assert [c["id"] for c in data["claims"]] == [c.id for c in LEDGER]
    always = ("id", "group", "says", "where", "verdict", "plain", "measured", "rule", "units")
    text = dict.fromkeys((*always, "notebook", "section"), str)
    optional = {"in_rust", "measured_in_rust", "error"}
    for c, claim in zip(data["claims"], LEDGER, strict=True):
        assert {k: type(v) for k, v in c.items() if k not in optional} == text | {"figures": dict}
        assert optional <= c.keys()
        assert c["error"] is None
        assert (c["in_rust"] is None) == (claim.in_rust is None) == (c["measured_in_rust"] is None)


def as_interval(value):
    return Interval(**value) if isinstance(value, dict) else value


def test_verdicts_follow_from_the_figures_in_the_file(data):
    judges = {c.id: c.judge for c in LEDGER}
    for c in data["claims"]:
        figures = {w: {k: as_interval(v) for k, v in f.items()} for w, f in c["figures"].items()}
        assert judges[c["id"]](figures) == c["verdict"], c["id"]


def test_every_trial_is_in_the_file_with_its_blocks(made, data):
    b = made[0]
    rows = {t["name"]: t for t in data["trials"]}
    assert list(rows) == list(b.found) == list(trials_of(b))
    for name, row in rows.items():
        assert row["base"] in row["forms"]
        for form, m in b.found[name].items():
            found = row["forms"][form]
            assert tuple(found["ratios"]) == m.ratios  # not rounded on the way
            assert Interval(*found["ratio"]) == m.ratio
            assert Interval(*found["control"]) == m.control


def test_figures_follow_from_the_trials_in_the_file(data):
    rows = {t["name"]: t["forms"] for t in data["trials"]}
    for c in data["claims"]:
        if c["id"] in ("speed-forward", "speed-backward", "pool-speed"):
            form = "pooled" if c["id"] == "pool-speed" else "zeros + gemm"
            for name, f in c["figures"].items():
                gain = _gain(Interval(*rows[name][form]["ratio"]))
                assert gain == as_interval(f["gain"])


def test_a_claim_that_failed_is_in_the_file(data):
    found = audit([plain(measure=raising(OSError("gone"))), plain(id="other")])
    failed, other = _as_json(found, Bench(), {})["claims"]
    assert (failed["error"], failed["figures"]) == ("OSError: gone", {})
    assert (failed["verdict"], failed["measured"]) == (Verdict.UNTESTABLE, "OSError: gone")
    assert (failed["notebook"], failed["in_rust"], other["error"]) == (None, None, None)


# For people


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, text, and what was left open."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open, self.faults = [], "", [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, text):
        self.text += text

    def all(self, attribute):
        return [attrs[attribute] for _, attrs in self.tags if attribute in attrs]


@pytest.fixture(scope="module")
def report(made, data, tmp_path_factory):
    """The folder of a report."""
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, made[1], made[0], data)
    return folder


@pytest.fixture(scope="module")
def page(report):
    return Page((report / "index.html").read_text(encoding="utf-8"))


def test_the_page_is_well_formed(page):
    assert not page.faults
    assert not page.open
    assert len(page.all("id")) == len(set(page.all("id")))


def test_the_page_loads_only_the_files_beside_it(page, report):
    assert sorted(os.listdir(report)) == FILES
    loaded = [attrs["href"] for tag, attrs in page.tags if tag == "link"] + page.all("src")
    assert sorted(loaded) == sorted({*FILES} - {"index.html", "claims.json"})
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "base"}
    for tag, attrs in page.tags:
        href = urlparse(attrs.get("href", ""))
        if href.scheme:  # a notebook of the checkout that made the page
            assert (tag, href.scheme) == ("a", "file")
            assert Path(unquote(href.path)).is_file()
        elif href.path:
            assert href.path in FILES
        elif tag == "a":
            assert href.fragment in page.all("id")
    assert not any(word in page.text for word in ("http://", "https://"))


def test_nothing_is_written_into_the_page_that_a_strict_policy_forbids(page, report):
    assert "style" not in {tag for tag, _ in page.tags}
    names = {name for _, attrs in page.tags for name in attrs}
    assert not [name for name in names if name == "style" or name.startswith("on")]
    assert "data:" not in (report / "index.html").read_text(encoding="utf-8")
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy.replace(" file:", "") == STRICT


def test_the_style_loads_nothing(report):
    css = (report / "report.css").read_text(encoding="utf-8")
    assert css == (files("ctxlab") / "assets" / "report.css").read_text(encoding="utf-8")
    assert not any(word in css for word in ("url(", "@import"))


def test_every_picture_is_described(page):
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert sorted(attrs["alt"] for attrs in pictures) == sorted(
        caption for caption, _ in _PLOTS.values()
    )
    assert {_plot_of(c) for c in LEDGER} - {""} == set(_PLOTS) - {"scoreboard"}


def test_the_page_can_be_heard_and_walked_through(page):
    tags = [tag for tag, _ in page.tags]
    assert all(tags.count(tag) == 1 for tag in ("main", "header", "footer", "nav", "h1"))
    first = next(attrs for tag, attrs in page.tags if tag == "a")
    assert (first["class"], first["href"]) == ("skip", "#main")
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
    assert tags.count("caption") == tags.count("table")
    named = [attrs for tag, attrs in page.tags if tag in ("section", "article")]
    assert {attrs["aria-labelledby"] for attrs in named} <= set(page.all("id"))
    scrolled = [
        attrs for _, attrs in page.tags if "tabindex" in attrs and attrs.get("id") != "main"
    ]
    assert all(attrs["aria-label"] and attrs["role"] == "region" for attrs in scrolled)
    assert "lang" in dict(page.tags)["html"]


def test_each_claim_has_its_section_with_figures(page):
    articles = [attrs["id"] for tag, attrs in page.tags if tag == "article"]
    assert articles == [c.id for c in LEDGER]
    for claim in LEDGER:
        assert claim.section in page.text
        assert claim.units in page.text
        assert claim.where in page.text


@pytest.mark.parametrize("verdict", Verdict)
def test_each_verdict_has_a_sign_besides_its_colour_and_its_words(verdict):
    css = (files("ctxlab") / "assets" / "report.css").read_text(encoding="utf-8")
    ((_, attrs),) = Page(_badge(verdict)).tags
    classes = attrs["class"].split()
    assert classes[0] == "verdict"
    assert sum(f".{name}::before {{\n  content: " in css for name in classes) == 1
    assert sum(f".{name} {{\n  color: " in css for name in classes) == 1
    assert _MEANS[verdict]


def test_the_page_explains_every_verdict(page):
    assert list(_MEANS) == list(Verdict)
    for verdict, means in _MEANS.items():
        assert verdict in page.text
        assert means in page.text


def test_the_page_says_what_changed(made, data):
    page = Page(_as_html(made[1], data, [], "<p>all of it</p>"))
    assert "changes" in page.all("id")
    assert "all of it" in page.text
    assert "changes" not in Page(_as_html(made[1], data, [])).all("id")


def test_the_page_names_every_claim(page):
    for claim in LEDGER:
        assert claim.says in page.text
        assert claim.rule in page.text


def test_hostile_texts_are_only_text(made, data):
    f = made[1][0]
    figures = {HOSTILE: {HOSTILE: HOSTILE}}
    hostile = dict.fromkeys(("id", "says", "rule", "where", "group", "units", "section"), HOSTILE)
    texts = dict.fromkeys(("plain", "told", "rust_told"), HOSTILE)
    f = replace(
        f, claim=replace(f.claim, **hostile), figures=figures, rust=Verdict.REFUTED, **texts
    )
    data = data | {
        "trials": [dict(name=HOSTILE)],
        "too_noisy": [dict(name=HOSTILE)],
        "not_timed": {HOSTILE: HOSTILE},
        "settings": dict(title=HOSTILE, about=HOSTILE, command=HOSTILE),
        "machine": data["machine"] | {"processor": HOSTILE},
    }
    page = Page(_as_html([f], data, []))
    assert not page.faults
    assert "script" not in dict(page.tags)
    assert not page.all("onclick")
    assert page.text.count(HOSTILE) >= 20
    ids = [attrs["id"] for tag, attrs in page.tags if tag == "article"]
    assert ids == [HOSTILE]


# Claims of anyone


def own(**more):
    """A small ledger with a claim of every kind; one of them fails."""
    return [
        speed(id="faster"),
        saving_claim("lean", "it is lean", lambda b: (held(10**6), held(0)), nbytes=(5e5, 1e6)),
        plain(id="plain", **more),
        plain(id="broken", measure=raising(OSError("no data"))),
    ]


@pytest.fixture(scope="module")
def own_made():
    b = Bench(found={TRIAL.name: compared(old=0, new=4, newer=9)})
    return b, audit(own(), b)


def test_claims_of_anyone_get_a_page(own_made, tmp_path):
    b, found = own_made
    settings = dict(title="Do mine hold?", about="All about mine.", command="ctxlab audit x.py")
    write_report(tmp_path, found, b, _as_json(found, b, settings))
    plots = {"scoreboard.png", "times.png"}  # and none of the report's products
    assert set(os.listdir(tmp_path)) == {"index.html", "report.css", "claims.json"} | plots
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert not page.faults
    assert len(page.all("id")) == len(set(page.all("id")))
    assert set(page.all("src")) == plots
    for text in (*settings.values(), "OSError: no data", "it is lean"):
        assert text in page.text
    assert "Explained in" not in page.text
    assert "Rust" not in page.text


def test_where_nothing_was_timed_there_is_no_picture_of_times(tmp_path):
    b = Bench(seconds=1e-6)
    found = audit(own(), b)
    assert found[0].verdict == Verdict.UNDECIDED
    write_report(tmp_path, found, b, _as_json(found, b, {}))
    assert not (tmp_path / "times.png").exists()
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert page.all("src") == ["scoreboard.png"]
    assert {href for href in page.all("href") if href[:1] == "#"} <= {
        f"#{id}" for id in page.all("id")
    }


def test_where_there_is_no_number_there_is_no_picture(tmp_path):
    found = audit([plain()])
    write_report(tmp_path, found, Bench(), _as_json(found, Bench(), {}))
    assert set(os.listdir(tmp_path)) == {"index.html", "report.css", "claims.json"}


def test_an_id_like_those_of_the_report_is_no_claim_of_the_report(tmp_path):
    found = audit([plain(id="site-map")])
    write_report(tmp_path, found, Bench(), _as_json(found, Bench(), {}))
    assert "site-map" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [r"$\bad$", "$", "a_b^c", "活", "é µs", "two\nlines", "\\$"])
def test_any_name_can_stand_in_a_picture(name):
    b = Bench(found={name: compared(**{name: 0, f"{name} 2": 4})})
    assert _png(_plot_times(b))
    found = Interval(1, 0, 2)
    claim = plain(id=name, number=Number("%", 1, 2, lambda figures: found))
    assert _png(_plot_scoreboard(audit([claim])))


def test_the_picture_of_the_scoreboard_shows_every_case():
    cases = [Interval(36, 33, 38), Interval(0.2, -0.3, 1.2)]
    number = Number("%", 3, 5, lambda figures: cases[0], lambda figures: cases)
    (ax,) = _plot_scoreboard(audit([plain(number=number)])).axes
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [float(line.get_xdata()[0]) for line in dots] == [36, 0.2]
    assert len({float(line.get_ydata()[0]) for line in dots}) == 2


def test_a_form_without_an_interval_or_far_away_is_left_out_of_the_picture():
    open_ended = replace(measured(), ratio=Interval(1.0, 0.0, np.inf))
    far = measured(900, 1)
    assert _plot_times(Bench(found={"t": compared(old=0, new=open_ended, newer=far)})) is None
    figure = _plot_times(Bench(found={"t": compared(old=0, new=2, newer=far)}))
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert [text.strip() for text in labels] == ["old (again)", "new"]


# In a browser

# What a reader sees: style, pictures, and how far the text and the scoreboard reach.
LOOK = """() => ({
    styled: getComputedStyle(document.querySelector('.tiles')).display === 'flex',
    pictures: [...document.images].filter(image => image.complete && image.naturalWidth).length,
    overflow: Math.max(0, document.documentElement.scrollWidth - innerWidth),
    folded: Math.max(0, document.querySelector('.tiles').getBoundingClientRect().bottom
        - innerHeight),
})"""


@pytest.fixture(params=["from disk", STRICT, f"sandbox; {STRICT}"])
def address(request, report):
    """Where the page can be opened: on disk, and on a server with a strict policy."""
    if request.param == "from disk":
        yield (report / "index.html").as_uri()
        return
    with serving(report, request.param) as served:
        yield f"{served}index.html"


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_style_and_pictures(width, browser, address):
    context = browser.new_context(viewport={"width": width, "height": 800})
    tab, faults = context.new_page(), []
    tab.on("console", lambda m: faults.append(m.text) if "favicon" not in str(m.location) else None)
    tab.goto(address)
    seen = tab.evaluate(LOOK)
    context.close()
    assert not faults
    assert seen == dict(styled=True, pictures=len(_PLOTS), overflow=0, folded=0)


# Plots


def chunks(image):
    """What a PNG consists of."""
    at = 8
    while at < len(image):
        size, kind = struct.unpack_from(">I4s", image, at)
        yield kind.decode()
        at += size + 12


def settings():
    """All of matplotlib's settings but the backend: to ask for that one loads pyplot."""
    return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}


@pytest.mark.parametrize("name", _PLOTS)
def test_equal_findings_give_equal_files(name, made, monkeypatch):
    # pyplot would change a reader's plotting state; here it cannot even be imported.
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.delattr(matplotlib, "pyplot", raising=False)
    draw, before = _PLOTS[name][1], settings()
    image = _png(draw(*made))
    assert image == _png(draw(*made))
    assert set(chunks(image)) <= {"IHDR", "pHYs", "IDAT", "IEND"}  # no date, no version
    assert settings() == before


def test_importing_the_report_loads_no_matplotlib():
    code = "import sys, ctxlab.audit.report, ctxlab.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# A workload is called like the user's file, and a file can be called anything.
@pytest.mark.slow
@pytest.mark.parametrize("name", [r"$\bad$.npz", "活.npz", "\udcff.npz", HOSTILE], ids=ascii)
def test_any_file_name_gets_a_report(name, tmp_path, made):
    b = small_bench(name, like=made[0])
    found = audit([entry(id) for id in ("site-cov", "numeric", "speed-forward", "lazy")], b)
    assert not [f.error for f in found if f.error]
    write_report(tmp_path, found, b, _as_json(found, b, {"seed": 0, "activations": name}))
    assert sorted(os.listdir(tmp_path)) == FILES
    assert not Page((tmp_path / "index.html").read_text(encoding="utf-8")).faults


# All or nothing


def tree(folder):
    """Every path in a folder, with the content of files."""
    paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*")}
    return {name: p.read_bytes() if p.is_file() else None for name, p in paths.items()}


@pytest.fixture
def old(tmp_path):
    """A folder with an earlier report and with something of the user's."""
    target = tmp_path / "report"
    (target / "mine").mkdir(parents=True)
    for name in (*FILES, "mine/notes.txt"):
        (target / name).write_text(f"old {name}")
    return target


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("target", ["report", "new", "new/nested/report"])
@pytest.mark.parametrize("written", [0, len(FILES)])
def test_a_failure_leaves_everything_as_it_was(error, target, written, old):
    before = tree(old.parent)
    with pytest.raises(error), _staging(old.parent / target) as place:  # noqa: PT012
        for name in FILES[:written]:
            (place / name).write_text("new")
        raise error
    assert tree(old.parent) == before


@pytest.mark.parametrize("target", ["report", "new", "new/nested/report"])
def test_success_replaces_the_report_and_nothing_else(target, old):
    before = tree(old)
    with _staging(old.parent / target) as place:
        assert not any(place.iterdir())
        for name in FILES:
            (place / name).write_text("new")
    new = dict.fromkeys(FILES, b"new")
    assert tree(old.parent / target) == (before | new if target == "report" else new)
    assert sorted(os.listdir(old.parent)) == sorted(
        {"report", target.split("/")[0]}
    )  # no scratch left behind


@pytest.mark.parametrize(
    "name", ["bytes.png", "index.html", "times.png"]
)  # moved first, midway, last
def test_a_file_that_cannot_be_moved_leaves_the_earlier_report_whole(name, old):
    (old / name).unlink()
    (old / name).mkdir()  # of the user's, under a name that the report needs
    before = tree(old)
    with pytest.raises((InputError, OSError)), _staging(old) as place:  # noqa: PT012
        for new in FILES:
            (place / new).write_text("new")
    assert tree(old) == before


@pytest.mark.parametrize("moved", [0, 3, len(FILES) - 1])
def test_an_interruption_while_moving_leaves_the_earlier_report_whole(moved, old, monkeypatch):
    before, calls = tree(old), iter(range(100))

    def interrupted(move):
        def once(*args, **kwargs):
            if next(calls) == moved:
                raise KeyboardInterrupt
            return move(*args, **kwargs)

        return once

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, interrupted(getattr(os, name)))
    with pytest.raises(KeyboardInterrupt), _staging(old) as place:  # noqa: PT012
        for new in FILES:
            (place / new).write_text("new")
    assert tree(old) == before


@pytest.mark.parametrize(
    "target", ["report/index.html", "report/index.html/sub", "report/index.html/a/b"]
)
def test_a_file_is_not_a_folder(target, old):
    before = tree(old)
    with (
        pytest.raises(InputError, match=r"is a file|is not a folder"),
        _staging(old / ".." / target),
    ):
        pytest.fail("a minute of measuring would have been lost")
    assert tree(old) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission_is_refused_at_once(old):
    old.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"), _staging(old):
        pytest.fail("a minute of measuring would have been lost")
    old.chmod(0o700)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(umask, tmp_path):
    previous = os.umask(umask)
    try:
        with _staging(tmp_path / "report") as place:
            (place / "index.html").write_text("new")
    finally:
        os.umask(previous)
    assert (tmp_path / "report").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "report/index.html").stat().st_mode & 0o777 == 0o666 & ~umask
