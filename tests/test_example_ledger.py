"""The example of a ledger, as a newcomer has it: from the file, by the command."""

import json
import os
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest

from ctxlab.audit import Bench
from ctxlab.audit.trials import Verdict, _load_ledger
from ctxlab.data import InputError
from ctxlab.measure import _agree

ROOT = Path(__file__).resolve().parent.parent
CTXLAB = Path(sys.executable).parent / "ctxlab"
EXAMPLE = ROOT / "docs/example_ledger.py"
TEXT = EXAMPLE.read_text(encoding="utf-8")
NOTEBOOK = ROOT / "nbs/audit/07_your_claims.ipynb"
SPEED, MEMORY = ["thin", "square", "manual", "turned"], ["out-80kB", "out-800kB"]


@pytest.fixture(scope="module")
def ledger():
    return {claim.id: claim for claim in _load_ledger(EXAMPLE)}


def run(folder, words, ledger):
    """The command on a ledger, started in that folder."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MPL", "COLUMNS"))}
    return subprocess.run(
        [CTXLAB, "audit", ledger, *words.split()],
        cwd=folder,
        env=env | {"OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def findings(done):
    """What the command with `--json -` found, by claim."""
    return {found["id"]: found for found in json.loads(done.stdout)["claims"]}


def changed(folder, *changes):
    """A copy of the ledger in which words are replaced."""
    text, path = TEXT, folder / "mine.py"
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_ledger_loads_and_names_its_source(ledger):
    assert [*ledger] == SPEED + MEMORY
    for claim in ledger.values():
        assert claim.where.startswith("https://numpy.org/doc/stable/reference/")


@pytest.mark.parametrize("id", SPEED)
@pytest.mark.parametrize("seed", range(3))
def test_the_forms_of_a_chain_agree(ledger, id, seed):
    (trial,) = ledger[id].trials(Bench())
    base, other = (make(seed)() for make in trial.forms.values())
    _agree(other, base)


def test_the_chains_have_the_shapes_that_are_said(ledger):
    for id in SPEED:
        (trial,) = ledger[id].trials(Bench())
        sizes = literal_eval(ledger[id].says.rpartition(" at ")[2])
        result = trial.forms["multi_dot"](0)()
        assert len(sizes) == 4
        assert result.shape == (sizes[0], sizes[-1])


@pytest.mark.slow
def test_memory_is_judged_by_its_figures(ledger):
    small, large = (ledger[id].measure(Bench())["a call"] for id in MEMORY)
    assert ledger["out-80kB"].judge({"a call": small}) == "confirmed"
    assert abs(small["allocated before"] - 2 * 80_000) < 4096
    assert abs(small["allocated after"] - 80_000) < 4096
    assert abs(large["allocated after"] - 800_000) < 4096
    # Whether NumPy adds in place by itself is a matter of the platform.
    saved = round((large["peak before"] - large["peak after"]) / 800_000)
    expected = {0: "refuted", 1: "confirmed"}[saved]
    assert ledger["out-800kB"].judge({"a call": large}) == expected


@pytest.mark.slow
def test_the_command_gives_a_table(tmp_path):
    done = run(tmp_path, "--seconds 0.5", EXAMPLE)
    assert done.returncode == 0, done.stderr
    for id in SPEED + MEMORY:
        assert f"\n{id} " in done.stdout
    assert "\n6 claims: " in done.stdout
    assert "Not timed: thin chain; square chain; manual chain; turned chain." in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_little_time_gives_any_verdict_but_no_error(tmp_path):
    done = run(tmp_path, "--seconds 8 --json -", EXAMPLE)
    assert done.returncode == 0, done.stderr
    found = findings(done)
    assert all(f["verdict"] in list(Verdict) for f in found.values())
    assert found["out-80kB"]["verdict"] == "confirmed"


@pytest.mark.slow
def test_forms_that_disagree_are_told_in_one_line_each(tmp_path):
    backwards = "np.linalg.multi_dot(ABC)", "np.linalg.multi_dot([M.T for M in ABC[::-1]]).T + 1"
    path = changed(tmp_path, backwards, ("add(G, C", "add(G, B"))
    done = run(tmp_path, "--seconds 60", path)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 6
    for id, line in zip(SPEED + MEMORY, lines, strict=True):
        assert line.startswith(f"ctxlab: {id}: forms: ")
        assert "gives another result" in line


@pytest.mark.slow
def test_one_wrong_claim_leaves_the_others(tmp_path):
    path = changed(tmp_path, ("add(G, C", "add(G, C if size < 50_000 else B"))
    found = findings(run(tmp_path, "--seconds 0.5 --json -", path))
    assert found["out-80kB"]["verdict"] == "confirmed"
    assert found["out-800kB"]["verdict"] == "not testable here"
    assert {found[id]["verdict"] for id in SPEED} == {Verdict.UNDECIDED}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('trial, "multi_dot"', 'trial, "multidot"', "form: 'multidot' in the trial 'thin chain'; "),
        ('trial, "multi_dot"', 'trial, "A @ B @ C"', "needed 'multi_dot'"),
        ("standard_normal((3, size))", "standard_norma((3, size))", "standard_norma"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path, old, new, said):
    path = changed(tmp_path, (old, new))
    at = 1 + next(i for i, line in enumerate(path.read_text().splitlines()) if new in line)
    with pytest.raises(InputError, match=f"mine.py: line {at}: ") as caught:
        _load_ledger(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_notebook_shows_the_file_as_it_is():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    shown = [
        "".join(output["data"]["text/markdown"])
        for cell in cells
        for output in cell.get("outputs", [])
        if "text/markdown" in output.get("data", {})
    ]
    assert shown == [f"```python\n{TEXT}```"]
