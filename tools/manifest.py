"""Where the numbers in README.md come from: a cell, a file, or a convention that says why.

docs/numbers.toml is written by hand: a phrase of README.md, and what holds its numbers. This makes
docs/manifest.md of it, and finds numbers without an origin and origins without the number.
"""

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
README, NUMBERS, MANIFEST = (
    ROOT / name for name in ("README.md", "docs/numbers.toml", "docs/manifest.md")
)
INDEX = ROOT / "nbs/index.ipynb"
WORDS = "(?:half an?|two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty)"
UNITS = "(?:seconds?|minutes?|hours?|days?|lines?|percent|times)"
# Digits that are not part of a name such as v2, and words before a unit: "in two minutes".
NUMBER = re.compile(rf"(?<![A-Za-z_\d])\d+(?:[.,]\d+)*|\b{WORDS} {UNITS}\b", re.IGNORECASE)
LINK = re.compile(r"\[[^\]\n]*\]\([^)\s]+\)")  # a name of a file is no figure, wherever it leads
LEDGER = "ctxlab.audit.claims.LEDGER"  # what the claims say
HEAD = """\
# Where the numbers come from

Made by `tools/manifest.py write` from `README.md` and `docs/numbers.toml`; not edited by hand.

| line | in README.md | comes from |
|---|---|---|
"""


class Number(NamedTuple):
    """A number as README.md has it."""

    text: str
    line: int  # from 1
    start: int  # of the text within all of README.md


class Origin(NamedTuple):
    """An entry of docs/numbers.toml, or a row of the scoreboard."""

    phrase: str  # of README.md, with the numbers
    source: str  # FILE or NOTEBOOK#CELL; '' for a convention
    holds: list[str]  # what must stand there
    why: str  # of a convention


def holds(text: str, number: str) -> bool:
    """Does a text hold this number, and not a longer one that contains it?"""
    alone = rf"(?<![\w.])(?<!\d,)(?<!e[-+]){re.escape(number)}(?!\w|[.,]\d)"
    return re.search(alone, text) is not None


@cache
def text_of(source: str, root: Path = ROOT) -> str:
    """All text of a file, or the source and the stored output of a cell; KeyError if it is not."""
    if source == LEDGER:
        from ctxlab.audit.claims import LEDGER as claims

        return "\n".join(f"{claim.id} | {claim.says}" for claim in claims)
    name, _, cell = source.partition("#")
    path = root / name
    if not path.is_file():
        raise KeyError(f"{name}: no such file")
    if not cell:
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = next((c for c in cells if c["id"] == cell), None)
    if found is None:
        raise KeyError(f"{name}: no cell {cell}")
    parts = ["".join(found["source"])]
    for output in found.get("outputs", []):
        data = output.get("data", {})
        for text in (output.get("text", ""), data.get("text/plain", ""), data.get("text/markdown")):
            parts.append("".join(text or ""))
    return "\n".join(parts)


def plain(cell: str) -> str:
    """A cell of a Markdown table as the terminal prints it."""
    return cell.replace(r"\|", "|").replace("ᵀ", "^T").strip()


def scoreboard(readme: str, entry: dict[str, Any]) -> Iterator[Origin]:
    """The rows of the scoreboard: a cell prints what was found, word for word.

    A claim in `again` was measured once more, by the cell that made the table.
    """
    for row in re.findall(r"^\| [\w-]+ \| .* \| \*\*.*$", readme, re.MULTILINE):
        id, says, found = (part.strip() for part in re.split(r"(?<!\\)\|", row)[1:4])
        yield Origin(says, LEDGER, [f"{id} | {plain(says)}"], "")
        if id in entry["again"]:
            yield Origin(found, entry["table"], [found], "")
        else:
            yield Origin(found, entry["from"], [plain(found)], "")


def phrases_of(entry: dict[str, Any], readme: str) -> list[str]:
    """The phrase of an entry, or all lines of README.md that its `lines` matches."""
    if "lines" not in entry:
        return [entry["text"]]
    found = [m[0] for m in re.finditer(entry["lines"], readme, re.MULTILINE)]
    return found or [f"a line like {entry['lines']}"]  # which README.md does not say: a fault


def read_origins(readme: str, text: str) -> list[Origin]:
    """What docs/numbers.toml says, and what the scoreboard is read from."""
    data = tomllib.loads(text)
    entries: list[dict[str, Any]] = data["number"]
    origins = [
        Origin(phrase, e.get("from", ""), e.get("holds", []), e.get("convention", ""))
        for e in entries
        for phrase in phrases_of(e, readme)
    ]
    return [*origins, *scoreboard(readme, data["scoreboard"])]


def numbers(readme: str) -> Iterator[Number]:
    """The numbers of README.md, in digits or words; those in names of files are none."""
    names = [m.span() for m in LINK.finditer(readme)]
    for m in NUMBER.finditer(readme):
        if not any(start <= m.start() < end for start, end in names):
            yield Number(m[0], readme.count("\n", 0, m.start()) + 1, m.start())


def images(readme: str) -> Iterator[tuple[int, str, str]]:
    """The pictures of README.md: their line and file, and the cell of the index that drew them."""
    cells = json.loads(INDEX.read_text(encoding="utf-8"))["cells"]
    drawn = [
        f"nbs/index.ipynb#{cell['id']}"
        for cell in cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    for m in re.finditer(r"!\[[^\]]*\]\((docs/readme/index-(\d+)\.png)\)", readme):
        yield readme.count("\n", 0, m.start()) + 1, m[1], drawn[int(m[2]) - 1]


def places(phrase: str, readme: str) -> list[tuple[int, int]]:
    """Where a phrase stands in README.md: start and end."""
    return [m.span() for m in re.finditer(re.escape(phrase), readme)]


def origin_faults(origin: Origin, readme: str, root: Path = ROOT) -> Iterator[str]:
    """What is wrong with an entry by itself."""
    if origin.phrase not in readme:
        yield f"docs/numbers.toml: README.md does not say {origin.phrase!r}"
    if bool(origin.why) == bool(origin.source):
        yield f"docs/numbers.toml: {origin.phrase!r}: needed 'from' or 'convention', one of them"
    if not origin.source:
        return
    try:
        text = text_of(origin.source, root)
    except KeyError as e:
        yield f"docs/numbers.toml: {origin.phrase!r}: {e.args[0]}"
        return
    for part in origin.holds:
        if part not in text:
            yield f"{origin.source}: does not hold {part!r}, which README.md has from there"
    for number in [] if origin.holds else NUMBER.findall(origin.phrase):
        if not holds(text, number):
            yield f"{origin.source}: does not hold {number!r} of {origin.phrase!r}"


def make(readme: str, origins: list[Origin], root: Path = ROOT) -> tuple[str, list[str]]:
    """The manifest, and what is wrong: a line each."""
    faults = [fault for origin in origins for fault in origin_faults(origin, readme, root)]
    rows: dict[tuple[int, str], list[str]] = {}
    phrases = [(*span, o) for o in origins for span in places(o.phrase, readme)]
    for number in numbers(readme):
        origin = next((o for start, end, o in phrases if start <= number.start < end), None)
        if origin is None:
            faults.append(f"README.md:{number.line}: {number.text!r} has no origin")
        else:
            comes = f"`{origin.source}`" if origin.source else f"convention: {origin.why}"
            rows.setdefault((number.line, comes), []).append(number.text)
    for line, image, cell in images(readme):
        rows[line, f"`{cell}`"] = [f"the picture `{image}`"]
    lines = [
        f"| {at} | {', '.join(said)} | {comes} |" for (at, comes), said in sorted(rows.items())
    ]
    return HEAD + "\n".join(lines) + "\n", faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write", help="write docs/manifest.md")
    commands.add_parser("check", help="fail if a number has no origin, or the manifest is old")
    args = parser.parse_args()
    readme = README.read_text(encoding="utf-8")
    text, faults = make(readme, read_origins(readme, NUMBERS.read_text(encoding="utf-8")))
    stored = MANIFEST.read_text(encoding="utf-8") if MANIFEST.exists() else ""
    if args.command == "check" and stored != text:
        faults.append("docs/manifest.md: not current; run tools/manifest.py write")
    if faults:
        sys.exit("\n".join(faults))
    if args.command == "write":
        MANIFEST.write_text(text, encoding="utf-8")
    print(f"README.md: {len(list(numbers(readme)))} numbers, each with an origin")


if __name__ == "__main__":
    main()
