"""What no module can check: that the repository agrees with itself."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

from ctxlab.claims import CONFIRMED, LEDGER, PARTLY, REFUTED, UNDECIDED

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if p.stem != "index")

# In two parts each, since this file is searched, too.
FORBIDDEN = """TO|DO FIX|ME NotImplemented|Error /wo|rk/ /ro|ot/ pypi|.org
python|hosted.org anaconda|.org
conda-|forge npmjs|.org""".replace("|", "").split()

by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def cells(path, kind):
    """Sources of the cells of one kind."""
    stored = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in stored if c["cell_type"] == kind]


def module(path):
    """The module that a notebook exports to; None where it exports nothing."""
    exports = (re.match(r"#\|\s*default_exp\s+(\S+)", cell) for cell in cells(path, "code"))
    return next((m[1] for m in exports if m), None)


def imported(path):
    """Modules of this package that the exported cells import."""
    for cell in cells(path, "code"):
        if re.match(r"#\|\s*exporti?\b", cell):
            for node in ast.walk(ast.parse(cell)):
                if (
                    isinstance(node, ast.ImportFrom)
                    and node.module
                    and node.module.startswith("ctxlab.")
                ):
                    yield node.module.split(".")[1]
                elif isinstance(node, ast.ImportFrom) and node.module == "ctxlab":
                    yield from (a.name for a in node.names if not a.name.startswith("__"))
                elif isinstance(node, ast.Import):
                    yield from (
                        a.name.split(".")[1] for a in node.names if a.name.startswith("ctxlab.")
                    )


@by_notebook
def test_a_notebook_builds_on_the_ones_before_it(path):
    before = [module(p) for p in NOTEBOOKS if p < path]  # their names sort as they are numbered
    for name in imported(path):
        assert name in before


def test_each_notebook_has_a_module_of_its_own():
    # Two notebooks with one module would overwrite each other without a word.
    modules = [m for p in NOTEBOOKS if (m := module(p))]
    assert len(modules) == len(set(modules))
    assert {f"{m}.py" for m in modules} == {p.name for p in (ROOT / "ctxlab").glob("[a-z]*.py")}


@by_notebook
def test_the_index_leads_to_every_notebook(path):
    index = "\n".join(cells(ROOT / "nbs/index.ipynb", "markdown"))
    assert f"]({path.name})" in index


def test_two_commands_make_everything_from_nothing():
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert [block.count("\n") for block in blocks] == [1, 1]
    for block in blocks:
        assert block.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    job, tests = blocks
    assert job.endswith("&& .venv/bin/ctxlab report\n")
    assert "nbdev_test" in tests
    assert "pytest" in tests


@pytest.mark.parametrize("claim", LEDGER, ids=lambda c: c.id)
def test_the_scoreboard_has_every_claim(claim):
    rows = [line.split(" | ") for line in README.splitlines() if line.startswith(f"| {claim.id} |")]
    assert len(rows) == 1
    _, _, _, verdict, notebook = rows[0]
    assert verdict.strip("*") in (CONFIRMED, REFUTED, PARTLY, UNDECIDED)
    assert f"nbs/{claim.notebook}.ipynb" in notebook
    assert (ROOT / "nbs" / f"{claim.notebook}.ipynb").is_file()


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", README):
        assert (ROOT / target).exists(), target


def tracked():
    """The files that git knows, as they are now."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [
        p for name in listed.stdout.decode().split("\0") if name and (p := ROOT / name).is_file()
    ]


def words(path):
    """The text of a file; None where it is none. Pictures in a notebook are no words."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        return None
    return re.sub(r'"image/png": "[^"]*"', "", text) if path.suffix == ".ipynb" else text


def test_nothing_is_left_undone_and_no_file_speaks_of_one_machine():
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in tracked()
        if (text := words(path))
        for word in FORBIDDEN
        if re.search(rf"(?<!\w){re.escape(word)}", text)
    ]
    assert not found
