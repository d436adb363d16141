"""What no module can check: that the repository agrees with itself."""

import ast
import json
import re
import subprocess
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

from ctxlab.audit.claims import LEDGER
from ctxlab.audit.trials import Verdict

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(
    p for p in NBS.rglob("*.ipynb") if p.stem != "index" and ".ipynb_checkpoints" not in p.parts
)
ROOMS = {  # room -> the rooms it may use, besides itself; "" is the root
    "": set(),
    "models": {""},
    "streaming": {""},
    "audit": {"", "models", "streaming"},
    "cli": {"", "models", "streaming", "audit"},
}

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


def modules():
    """The exported modules, by their names within the package."""
    package = ROOT / "ctxlab"
    for path in sorted(package.rglob("[a-z]*.py")):
        yield ".".join(path.relative_to(package).with_suffix("").parts), path


def imported(name, path):
    """Modules and rooms of this package that a module imports, at its top or inside a function."""
    package = f"ctxlab.{name}".rpartition(".")[0]
    known = {module for module, _ in modules()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = resolve_name("." * node.level + (node.module or ""), package)
            found = [f"{home}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in found:
            inner = target.removeprefix("ctxlab.")
            while inner and inner not in known and target.startswith("ctxlab."):
                inner = inner.rpartition(".")[0]
            if inner in known:
                yield inner


def room(name):
    """The room of a module: the command stands above all others."""
    return "cli" if name == "cli" else name.rpartition(".")[0]


USES = sorted((name, used) for name, path in modules() for used in imported(name, path))


def test_the_imports_are_found():
    assert ("context", "gemm") in USES
    assert ("audit.claims", "models.stack") in USES
    assert ("cli", "audit.report") in USES


@pytest.mark.parametrize(("name", "used"), USES, ids=lambda name: name)
def test_a_room_imports_only_from_rooms_below_it(name, used):
    assert room(used) == room(name) or room(used) in ROOMS[room(name)]


def test_each_folder_is_a_room():
    assert {room(name) for name, _ in modules()} == set(ROOMS)
    assert {module(path).rpartition(".")[0] for path in NOTEBOOKS if module(path)} == {
        "",
        "models",
        "streaming",
        "audit",
    }


def test_no_modules_import_each_other():
    order = TopologicalSorter()
    for name, used in USES:
        order.add(name, used)
    order.prepare()  # raises CycleError


@by_notebook
def test_a_notebook_builds_on_the_ones_before_it(path):
    # The names in a folder sort as they are numbered; what other rooms offer, the rooms decide.
    exports = module(path)
    before = [module(p) for p in NOTEBOOKS if p.parent == path.parent and p < path]
    for name, used in USES:
        if name == exports and room(used) == room(name):
            assert used in before


@by_notebook
def test_a_notebook_stands_where_its_module_does(path):
    folder, exports = path.parent.relative_to(NBS).as_posix(), module(path)
    if exports:
        assert folder == (exports.rpartition(".")[0] or ".")


def test_each_notebook_has_a_module_of_its_own():
    # Two notebooks with one module would overwrite each other without a word.
    exported = [m for p in NOTEBOOKS if (m := module(p))]
    assert len(exported) == len(set(exported))
    assert set(exported) == {name for name, _ in modules()}


@by_notebook
def test_the_index_leads_to_every_notebook(path):
    index = "\n".join(cells(ROOT / "nbs/index.ipynb", "markdown"))
    assert f"]({path.relative_to(NBS).as_posix()})" in index


@by_notebook
def test_a_notebook_shows_a_picture_before_it_builds(path):
    before = 0
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            break
        before += not re.match(r"#\| (hide|default_exp|export)", "".join(cell["source"]))
    assert before <= 8


def reading_minutes(path):
    "200 words of prose and 40 lines of code a minute, as the index says."
    words = sum(len(cell.split()) for cell in cells(path, "markdown"))
    shown = [cell for cell in cells(path, "code") if "#| hide" not in cell]
    lines = [line for cell in shown for line in cell.splitlines()]
    return words / 200 + sum(bool(s.strip()) and not s.startswith("#|") for s in lines) / 40


@by_notebook
def test_the_map_of_the_index_tells_how_long_a_notebook_takes(path):
    link = re.escape(f"]({path.relative_to(NBS).as_posix()})")
    index = "\n".join(cells(ROOT / "nbs/index.ipynb", "markdown"))
    minutes = re.search(link + r" (\d+)\b", index)
    assert minutes, "no minutes behind the link in the map"
    assert abs(int(minutes[1]) - reading_minutes(path)) <= max(2, 0.1 * reading_minutes(path))


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
    assert verdict.split("**")[1] in set(Verdict) - {Verdict.UNTESTABLE}
    assert f"nbs/{claim.notebook}.ipynb" in notebook
    assert (ROOT / "nbs" / f"{claim.notebook}.ipynb").is_file()


def test_exported_lines_are_as_short_as_the_notebooks():
    # The linter sees the notebooks; nbdev adds the head of a module, and its list of public names.
    for _, path in modules():
        text = re.sub(r"(?ms)^__all__ = \[.*?\]", "", path.read_text(encoding="utf-8"), count=1)
        assert not [line for line in text.splitlines() if len(line) > 100], path


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
