"""Each number in README.md has an origin, and the check finds those that have none."""

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBERS = (ROOT / "docs/numbers.toml").read_text(encoding="utf-8")

spec = importlib.util.spec_from_file_location("manifest_tool", ROOT / "tools/manifest.py")
manifest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(manifest)


def faults(readme=README, numbers=NUMBERS):
    return manifest.make(readme, manifest.read_origins(readme, numbers))[1]


def test_every_number_has_an_origin_and_the_manifest_is_current():
    text, wrong = manifest.make(README, manifest.read_origins(README, NUMBERS))
    assert wrong == []
    assert (ROOT / "docs/manifest.md").read_text(encoding="utf-8") == text


def test_the_counts_of_the_scoreboard_are_those_of_its_rows():
    counted = Counter(re.findall(r"\| \*\*(\w+)\*\*", README))
    said = re.search(r"^(\d+ \w+(?:, \d+ \w+)*)\. ", README, re.MULTILINE)[1]
    assert {f"{n} {verdict}" for verdict, n in counted.items()} == set(said.split(", "))


def test_what_was_measured_again_differs_from_the_run():
    # Or else it needs no entry of its own.
    board = manifest.tomllib.loads(NUMBERS)["scoreboard"]
    run = manifest.text_of(board["from"])
    for id in board["again"]:
        row = next(line for line in README.splitlines() if line.startswith(f"| {id} |"))
        assert manifest.plain(row.split(" | ")[2]) not in run, id


def wrong_digit(text, where):
    """`text`, with the first digit after `where` made another one."""
    start = text.index(where) + len(where)
    at = start + re.search(r"\d", text[start:]).start()
    return text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]


def test_a_number_without_an_origin_is_named_with_its_line():
    last = len(README.splitlines()) + 1
    for text in ("77 times", "six hours"):
        found = faults(f"{README}It takes {text}.\n")
        assert found == [f"README.md:{last}: {text.removesuffix(' times')!r} has no origin"]


ENTRIES = manifest.tomllib.loads(NUMBERS)["number"]


@pytest.mark.parametrize("entry", [e for e in ENTRIES if "text" in e], ids=lambda e: e["text"])
def test_a_phrase_with_another_number_is_named(entry):
    spoilt = README.replace(entry["text"], re.sub(r"\d|two|ten|half|thirty", "9", entry["text"]))
    assert f"docs/numbers.toml: README.md does not say {entry['text']!r}" in faults(spoilt)


@pytest.mark.parametrize("lines", [e["lines"] for e in ENTRIES if "lines" in e])
def test_a_pattern_without_a_line_is_named(lines):
    without = re.sub(lines, "", README, flags=re.MULTILINE)
    said = f"a line like {lines}"
    assert f"docs/numbers.toml: README.md does not say {said!r}" in faults(without)


def test_a_figure_that_is_not_the_one_that_was_measured_is_named():
    rows = re.findall(r"^\| [\w-]+ \| .* \| \*\*.*$", README, re.MULTILINE)
    assert len(rows) > 20
    for row in rows:
        says, found = row.split(" | ")[1:3]
        for cell in (says, found):
            if re.search(r"\d", cell):
                spoilt = row.replace(cell, wrong_digit(cell, ""))
                wrong = faults(README.replace(row, spoilt))
                assert any("does not hold" in fault for fault in wrong), spoilt


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("#0de138ab", "#0de138ac", "nbs/04_data.ipynb: no cell 0de138ac"),
        ('"settings.ini"', '"settings.cfg"', "settings.cfg: no such file"),
        ("min_python = 3.11", "min_python = 3.12", "does not hold 'min_python = 3.12'"),
        ("#ddf5bb1a", "#7c2ce597", ""),  # says 512 x 768, too
        ("nbs/04_data.ipynb#0de138ab", "LICENSE", "LICENSE: does not hold '384'"),
        ('convention = "the version of a licence"', "", "needed 'from' or 'convention'"),
    ],
)
def test_a_wrong_entry_is_named(old, new, said):
    assert old in NUMBERS
    found = faults(numbers=NUMBERS.replace(old, new))
    assert any(said in fault for fault in found) if said else not found, found


def test_a_longer_number_is_another():
    assert manifest.holds("0.5 s, 3.11 and 2.36->0", "3.11")
    assert not manifest.holds("13.11 3.114 x3.11 3.11.7", "3.11")
    assert not manifest.holds("1,500 rows", "500")
    assert not manifest.holds("1e-3", "3")
    numbers = manifest.numbers("L6-v2, x86_64: [04_x](a4.ipynb) in two minutes, 1,000.5; two ways")
    assert [n.text for n in numbers] == ["two minutes", "1,000.5"]
