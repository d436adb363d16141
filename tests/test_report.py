"""The report: a table that fits, a page that stands alone, a file to judge again."""

import itertools
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import matplotlib
import numpy as np
import pytest
from test_claims import small_bench

from ctxlab import __version__
from ctxlab.claims import LEDGER, SHIPPED, run_ledger
from ctxlab.data import InputError
from ctxlab.measure import AGAIN, Interval, Timings
from ctxlab.report import (
    CSS,
    PLOT_OF,
    PLOTS,
    VERDICTS,
    as_html,
    as_json,
    highlighted,
    noise_line,
    png,
    scoreboard,
    staging,
    table,
    terminal,
    write_report,
)
from ctxlab.stack import KINDS

HOSTILE = "</td><script>alert('1')</script> & \"quoted\" &amp; <b onclick=x>"
FILES = sorted(["index.html", "claims.json", *(f"{name}.png" for name in PLOTS)])


@pytest.fixture(scope="module")
def made():
    b = small_bench()
    return b, run_ledger(b)


@pytest.fixture(scope="module")
def data(made):
    """claims.json as a reader gets it, from text."""
    b, findings = made
    return json.loads(json.dumps(as_json(findings, b, {"seed": 0}), allow_nan=False))


# The table


TEXTS = ["word " * 80, "x" * 300, "a-b/c" * 50, "two\nlines\tand a tab", "", "ÄÖ²·" * 30]


@pytest.mark.parametrize("text", TEXTS)
def test_the_table_keeps_its_width_and_every_character(made, text):
    f = made[1][0]
    f = replace(
        f, claim=replace(f.claim, id="i" * 40, says=text, notebook="99_" + "n" * 40), told=text
    )
    lines = table([f]).splitlines()
    assert max(map(len, lines)) <= 100
    _, rule, *rows = lines
    starts = [i for i in range(100) if rule[i : i + 1] == "-" and rule[i - 1 : i] in ("", " ")]
    columns = [
        "".join("".join(row[a:b].split()) for row in rows[:-2])
        for a, b in zip(starts, [*starts[1:], 100], strict=True)
    ]
    whole = ["i" * 40, text, text, f"{f.verdict}(99_{'n' * 40})"]
    assert columns == ["".join(part.split()) for part in whole]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("width", [20, 40, 71, 72, 80, 99])
def test_a_narrow_terminal_loses_nothing(made, text, width):
    f = made[1][0]
    f = replace(f, claim=replace(f.claim, says=text), told=text)
    lines = table([f], width).splitlines()
    assert max(map(len, lines)) <= width
    if width < 71:
        whole = "".join("\n".join(lines).split())
        assert whole.count("".join(text.split())) >= 2


@pytest.mark.parametrize("width", [40, 100])
def test_colour_changes_nothing_but_colour(made, width):
    plain, coloured = table(made[1], width), table(made[1], width, colour=True)
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
    assert terminal() == dict(width=100, colour=colour)


def test_a_noisy_machine_is_told(made):
    b = made[0]
    steady = {name: np.full(14, 1.0) for name in ("dot", "dot" + AGAIN, "reused out")}
    quiet = Timings(steady, "dot", 1, np.repeat(np.arange(7), 2))
    loud = Timings(steady | {"dot" + AGAIN: np.linspace(0.9, 1.1, 14)}, "dot", 1, quiet.block)
    assert noise_line(replace(b, timings={("mine", "cov"): quiet})) == ""
    line = noise_line(replace(b, timings={("mine", "cov"): quiet, ("mine", "corr"): loud}))
    assert "1 of 2 comparisons: corr, mine." in line
    findings = made[1]
    noisy = replace(b, timings=b.timings | {("mine", "corr"): loud})
    page = Page(as_html(findings, as_json(findings, noisy, {}), {}))
    assert "Too noisy to decide" in page.text
    assert "corr, mine" in page.text


def test_the_scoreboard_counts_every_finding(made):
    counts = [int(part.split()[0]) for part in scoreboard(made[1]).split(", ")]
    assert sum(counts) == len(LEDGER)


# For machines


def test_json_has_its_schema(data):
    types = {k: type(v) for k, v in data.items()}
    text = dict.fromkeys(("schema", "ctxlab", "created"), str)
    tables = dict.fromkeys(("settings", "machine"), dict)
    rows = dict.fromkeys(("workloads", "claims", "timings", "too_noisy"), list)
    assert types == text | tables | rows | {"schema_version": int}
    assert (data["schema"], data["schema_version"], data["ctxlab"]) == (
        "ctxlab.claims",
        2,
        __version__,
    )
    assert data["workloads"] == [
        dict(name="mine", rows=80, features=32),
        dict(name="other", rows=64, features=48),
    ]
    assert [c["id"] for c in data["claims"]] == [c.id for c in LEDGER]
    text = dict.fromkeys(
        ("id", "says", "verdict", "measured", "rule", "notebook", "section", "units"), str
    )
    for c in data["claims"]:
        assert {k: type(v) for k, v in c.items() if k != "original"} == text | {"figures": dict}
        assert c["original"] is None or isinstance(c["original"], str)


def as_interval(value):
    return Interval(**value) if isinstance(value, dict) else value


def test_verdicts_follow_from_the_figures_in_the_file(data):
    judges = {c.id: c.judge for c in LEDGER}
    for c in data["claims"]:
        figures = {w: {k: as_interval(v) for k, v in f.items()} for w, f in c["figures"].items()}
        assert judges[c["id"]](figures) == c["verdict"], c["id"]


def test_figures_follow_from_the_raw_timings_in_the_file(made, data):
    raw = {(t["workload"], t["what"]): t for t in data["timings"]}
    stacks = {
        ("16 x 32", what) for what in ("Transformer forward", *(f"{kind} step" for kind in KINDS))
    }
    norms = {"|s|", "|s| at a quarter", "vector of 768", "locked hit", "|s|" + AGAIN}
    assert set(raw.pop(("norms", ""))["seconds"]) == norms
    assert set(raw) == stacks | set(
        itertools.product(("mine", "other"), (*SHIPPED, "forward", "backward"))
    )
    for key, t in raw.items():
        seconds = {name: np.array(s) for name, s in t["seconds"].items()}
        names = {"not pooled", "pooled"} if key in stacks else {"dot", "zeros + gemm", "reused out"}
        assert set(seconds) == names | {("not pooled" if key in stacks else "dot") + AGAIN}
        assert {len(s) for s in seconds.values()} == {
            len(next(iter(seconds.values())))
        }  # paired by round
        assert all((s > 0).all() for s in seconds.values())
        for name, s in made[0].timings[key].seconds.items():
            np.testing.assert_array_equal(seconds[name], s)  # not rounded on the way
        assert isinstance(t["calls_per_sample"], dict)
    for c in data["claims"]:
        if c["id"].startswith("speed-"):
            for w, f in c["figures"].items():
                t = raw[w, c["id"].removeprefix("speed-")]
                seconds = {name: np.array(s) for name, s in t["seconds"].items()}
                again = Timings(
                    seconds, t["control"], t["calls_per_sample"], np.array(t["placement"])
                )
                assert again.ratio("dot", "zeros + gemm").scaled(100, -100) == as_interval(
                    f["shipped"]
                )


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
def page(made, data):
    b, findings = made
    return Page(
        as_html(findings, data, {name: png(draw(b, findings)) for name, (_, draw) in PLOTS.items()})
    )


def test_the_page_is_well_formed(page):
    assert not page.faults
    assert not page.open
    assert len(page.all("id")) == len(set(page.all("id")))


def test_the_page_stands_alone(page):
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
    }
    assert all(src.startswith("data:image/png;base64,") for src in page.all("src"))
    for href in page.all("href"):
        kind = urlparse(href)
        if kind.scheme:  # a notebook of the checkout that made the page
            assert kind.scheme == "file"
            assert Path(unquote(kind.path)).is_file()
        else:
            assert href.startswith("#")
            assert href[1:] in page.all("id")
    assert not any(word in page.text for word in ("http://", "https://", "url(", "@import"))


def test_every_picture_is_described(page):
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert sorted(attrs["alt"] for attrs in pictures) == sorted(
        caption for caption, _ in PLOTS.values()
    )
    assert set(PLOT_OF) <= {c.id for c in LEDGER}
    assert set(PLOT_OF.values()) == set(PLOTS)


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


def test_each_claim_has_its_section_with_figures_and_code(page):
    articles = [attrs["id"] for tag, attrs in page.tags if tag == "article"]
    assert articles == [c.id for c in LEDGER]
    assert [tag for tag, _ in page.tags].count("details") == len(LEDGER)
    assert page.text.count("def _speed_figures(") == 2
    for claim in LEDGER:
        assert claim.section in page.text
        assert claim.units in page.text
        assert claim.original in page.text


@pytest.mark.parametrize(
    "code",
    [
        HOSTILE,
        "",
        "x = '# no comment'",
        "f\"{d['a']}\" # if",
        "'open",
        '"""doc <b>"""\nreturn 1',
        "a\\'b'",
    ],
)
def test_highlighting_loses_nothing(code):
    page = Page(highlighted(code))
    assert page.text == code
    assert not page.faults
    assert {tag for tag, _ in page.tags} <= {"span"}


@pytest.mark.parametrize("verdict", VERDICTS)
def test_each_verdict_has_a_sign_besides_its_colour(verdict):
    assert f".{verdict}::before {{ content:" in CSS


def test_the_page_says_what_changed(made, data):
    page = Page(as_html(made[1], data, {}, "<p>all of it</p>"))
    assert "changes" in page.all("id")
    assert "all of it" in page.text
    assert "changes" not in Page(as_html(made[1], data, {})).all("id")


def test_the_page_names_every_claim(page):
    for claim in LEDGER:
        assert claim.says in page.text
        assert claim.rule in page.text


def test_hostile_texts_are_only_text(made, data):
    f = made[1][0]
    figures = {HOSTILE: next(iter(f.figures.values()))}
    f = replace(
        f,
        claim=replace(f.claim, says=HOSTILE, rule=HOSTILE, original=HOSTILE),
        told=HOSTILE,
        figures=figures,
    )
    data = data | {
        "workloads": [dict(name=HOSTILE, rows=2, features=2)],
        "machine": data["machine"] | {"processor": HOSTILE},
    }
    page = Page(as_html([f], data, {}))
    assert not page.faults
    assert "script" not in dict(page.tags)
    assert not page.all("onclick")
    assert page.text.count(HOSTILE) >= 7


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


@pytest.mark.parametrize("name", PLOTS)
def test_equal_findings_give_equal_files(name, made, monkeypatch):
    # pyplot would change a reader's plotting state; here it cannot even be imported.
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.delattr(matplotlib, "pyplot", raising=False)
    draw, before = PLOTS[name][1], settings()
    image = png(draw(*made))
    assert image == png(draw(*made))
    assert set(chunks(image)) <= {"IHDR", "pHYs", "IDAT", "IEND"}  # no date, no version
    assert settings() == before


def test_importing_the_report_loads_no_matplotlib():
    code = "import sys, ctxlab.report, ctxlab.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# A workload is called like the user's file, and a file can be called anything.
@pytest.mark.parametrize("name", [r"$\bad$.npz", "活.npz", "\udcff.npz", HOSTILE], ids=ascii)
def test_any_file_name_gets_a_report(name, tmp_path):
    b = small_bench(name)
    findings = run_ledger(b)
    write_report(tmp_path, findings, b, as_json(findings, b, {"seed": 0, "activations": name}))
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
    with pytest.raises(error), staging(old.parent / target) as place:  # noqa: PT012
        for name in FILES[:written]:
            (place / name).write_text("new")
        raise error
    assert tree(old.parent) == before


@pytest.mark.parametrize("target", ["report", "new", "new/nested/report"])
def test_success_replaces_the_report_and_nothing_else(target, old):
    before = tree(old)
    with staging(old.parent / target) as place:
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
    with pytest.raises((InputError, OSError)), staging(old) as place:  # noqa: PT012
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
    with pytest.raises(KeyboardInterrupt), staging(old) as place:  # noqa: PT012
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
        staging(old / ".." / target),
    ):
        pytest.fail("a minute of measuring would have been lost")
    assert tree(old) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission_is_refused_at_once(old):
    old.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"), staging(old):
        pytest.fail("a minute of measuring would have been lost")
    old.chmod(0o700)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(umask, tmp_path):
    previous = os.umask(umask)
    try:
        with staging(tmp_path / "report") as place:
            (place / "index.html").write_text("new")
    finally:
        os.umask(previous)
    assert (tmp_path / "report").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "report/index.html").stat().st_mode & 0o777 == 0o666 & ~umask
