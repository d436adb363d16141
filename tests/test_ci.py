"""The gates of .ci/run, the jobs that run them, and what is asked of a release."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / ".github/workflows/ci.yml"

spec = importlib.util.spec_from_file_location("release_tool", ROOT / "tools/release.py")
release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release)

needs_git = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("bash") is None, reason="needs a clone, and bash"
)


def ci(*words):
    """What .ci/run says."""
    command = ["bash", str(ROOT / ".ci/run"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def listed():
    """The names of the quick gates, and of the others."""
    quick, more = ci("--list").stdout.splitlines()
    return quick.split(":")[1].split(), more.split(":")[1].split()


@needs_git
def test_every_gate_is_written_once_and_named():
    quick, more = listed()
    assert quick[0] == "tests"
    assert len({*quick, *more}) == len(quick + more) > 10
    text = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for name in quick + more:
        assert len(re.findall(rf"^{name}\(\) \{{", text, re.MULTILINE)) == 1, name


@needs_git
def test_a_gate_that_there_is_not_is_refused():
    done = ci("lint", "nope")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no such gate: nope" in done.stderr


@needs_git
def test_every_gate_stands_in_a_job():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    named = " ".join(step.partition(".ci/run")[2] for step in steps).split()
    named += " ".join(jobs["gates"]["strategy"]["matrix"]["gates"]).split()
    quick, more = listed()
    assert {*quick, *more} <= {*named}


def test_the_jobs_cover_what_the_package_promises():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    matrix = jobs["quick"]["strategy"]["matrix"]
    assert matrix["python"][0] == release.facts(ROOT)["min_python"]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos"}
    assert set(jobs["release"]["needs"]) == set(jobs) - {"release"}


def test_what_is_left_out_of_the_quick_tests_has_a_gate():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    left_out = re.findall(r"not (\w+)", re.search(r'addopts = "(.*)"', settings)[1])
    text = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert left_out
    for marker in left_out:
        assert re.search(rf"-m '?{marker}\b", text), marker


# What would be released


@pytest.fixture
def repository(tmp_path):
    """A repository with what the cheap questions look at."""
    (tmp_path / "ctxlab").mkdir()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nversion = 1.2.0\n")
    (tmp_path / "ctxlab/__init__.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0 (2026-01-31)\n\nNew.\n")
    who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "all"], ["tag", "v1.2.0"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def cheap(root):
    questions = (
        release.version_faults,
        release.changelog_faults,
        release.tag_faults,
        release.tree_faults,
    )
    return [fault for question in questions for fault in question(root)]


def test_a_release_in_order_has_no_fault(repository):
    assert cheap(repository) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("ctxlab/__init__.py", "1.2.0", "1.1.0", "version 1.1.0, needed 1.2.0"),
        ("CHANGELOG.md", "1.2.0 (2026-01-31)", "Unreleased", "top entry is 'Unreleased', needed"),
        ("CHANGELOG.md", " (2026-01-31)", "", "top entry is '1.2.0', needed '1.2.0' with its date"),
        ("CHANGELOG.md", "1.2.0 (", "1.2.01 (", "top entry is '1.2.01 (2026-01-31)'"),
        ("CHANGELOG.md", "## ", "", "top entry is 'none'"),
        ("settings.ini", "1.2.0", "1.3.0", "the tags of this commit are v1.2.0, needed v1.3.0"),
        ("CHANGELOG.md", "New.", "Newer.", "not committed: CHANGELOG.md"),
    ],
)
def test_what_is_wrong_with_a_release_is_named(repository, file, old, new, said):
    path = repository / file
    path.write_text(path.read_text().replace(old, new))
    found = cheap(repository)
    assert any(said in fault for fault in found), found


def test_a_new_file_is_named(repository):
    (repository / "notes.txt").write_text("mine")
    assert cheap(repository) == ["git: not committed: notes.txt"]


def test_an_archive_without_a_file_is_named():
    known = ["README.md", ".ci/run", ".gitignore", "docs/numbers.toml"]
    found = list(release.archive_faults({"README.md"}, known))
    assert found == ["MANIFEST.in: docs/numbers.toml is not in the source archive"]


@needs_git
def test_every_module_of_the_wheel_is_counted():
    known = release.known_files(ROOT)
    assert "ctxlab/streaming/distributed.py" in known  # which needs an extra
    without = [name for name in known if name != "ctxlab/gemm.py"]
    assert release.module_count(known) == release.module_count(without) + 1
