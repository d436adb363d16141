"""`ctxlab compare`: two versions of a function, and what may be required of the new one."""

import json
import os
import subprocess
import textwrap
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from ctxlab import measure
from ctxlab.cli import main
from ctxlab.data import InputError
from ctxlab.intervals import Interval
from ctxlab.versions import _checked_out, _Requirement, compare_versions

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes of POSIX")

SUMS = """
import numpy as np

def arguments(seed):
    return np.random.default_rng(seed).standard_normal((300, 300)),

def slow(x):
    return np.stack([row * sum(row) for row in x])

def fast(x):
    return x * x.sum(axis=1, keepdims=True)

def wrong(x):
    return x * x.sum(axis=0)
"""
SETUP = ("--setup", "sums.py:arguments", "--no-progress")


@pytest.fixture
def sums(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sums.py").write_text(SUMS)
    return tmp_path


@pytest.fixture
def quickly(monkeypatch):
    """A run of a few blocks: what is tested here is what surrounds it."""
    measured = measure._compare

    def few(setting, question):
        monkeypatch.setattr(measure, "_MOST_BLOCKS", 6)
        return measured(setting, question)

    monkeypatch.setattr("ctxlab.versions._compare", few)


def run(capsys, *words):
    code = main(["compare", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


# --- what is required ---


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("faster", 1.0),
        ("faster=3%", 0.97),
        ("faster=12.5%", 0.875),
        ("no-slower", 1.04),
        ("no-slower=5%", 1.05),
        ("no-slower=0%", 1.0),
        ("leaner", np.inf),
    ],
)
def test_limits(text, limit):
    assert _Requirement(text).limit(0.04) == pytest.approx(limit)


@pytest.mark.parametrize(
    "text", ["", "fast", "faster=3", "faster=x%", "faster=-3%", "no-slower=", "leaner=3%", "slower"]
)
def test_requirements_that_are_none(text):
    with pytest.raises(InputError, match=r"^require: .*; needed faster, faster=3%"):
        _Requirement(text)


class Made:
    """A comparison with made-up figures."""

    resolution = 0.02

    def __init__(self, ratio, before, after):
        self.ratio, self.before, self.after = ratio, before, after

    def __getitem__(self, name):
        class _Form:
            ratio = self.ratio
            nbytes = self.before if name == "old" else self.after

        return _Form


@pytest.mark.parametrize(
    ("text", "interval", "met", "settled"),
    [
        ("faster=3%", (0.9, 0.97), True, True),
        ("faster=3%", (0.9, 0.98), False, False),
        ("faster=3%", (0.98, 1.1), False, True),
        ("faster", (0.9, 0.999), True, True),
        ("faster", (0.99, 1.01), False, False),
        ("no-slower", (0.99, 1.02), True, True),
        ("no-slower", (0.99, 1.03), False, False),
        ("no-slower", (1.03, 1.05), False, True),
    ],
)
def test_a_whole_interval_meets_it_or_it_is_not_met(text, interval, met, settled):
    ratio, required = Interval(1.0, *interval), _Requirement(text)
    assert required.met(Made(ratio, 1, 1), "old", "new") is met
    assert required.settled(ratio, 0.02) is settled


@pytest.mark.parametrize(
    ("before", "after", "met"),
    [(10, 9, True), (10, 10, False), (9, 10, False), (None, 1, False), (1, None, False)],
)
def test_leaner_is_about_bytes(before, after, met):
    required = _Requirement("leaner")
    assert required.met(Made(Interval(9, 8, 10), before, after), "old", "new") is met
    assert required.settled(Interval(9, 8, 10), 0.02)


# --- the command ---


@pytest.mark.slow
def test_faster_and_leaner(sums, capsys, quickly):
    code, out, err = run(
        capsys, "sums.py:slow", "sums.py:fast", *SETUP, "--require", "faster=30%",
        "--require", "leaner", "--plot", "p.png", "--seconds", "60",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert all(word in out for word in ("sums.py:slow", "sums.py:fast", "faster", "results agree"))
    assert matplotlib.image.imread("p.png").shape[2] == 4
    assert sorted(p.name for p in sums.iterdir() if p.name != "__pycache__") == ["p.png", "sums.py"]


@pytest.mark.slow
def test_what_is_not_met_is_said_and_gives_3(sums, capsys, quickly):
    code, out, err = run(
        capsys, "sums.py:fast", "sums.py:slow", *SETUP, "--require", "faster",
        "--require", "no-slower", "--json", "-", "--seconds", "60",
    )  # fmt: skip
    assert code == 3
    assert err == "ctxlab: --require faster: not met\nctxlab: --require no-slower: not met\n"
    found = json.loads(out)
    assert found["missed"] == ["faster", "no-slower"]
    assert set(found["forms"]) == {"sums.py:fast", "sums.py:slow"}


def test_results_that_differ_give_3(sums, capsys):
    code, out, err = run(capsys, "sums.py:fast", "sums.py:wrong", *SETUP)
    assert (code, out) == (3, "")
    assert err.startswith("ctxlab: forms: 'sums.py:wrong' gives another result than 'sums.py:fast'")
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sums.py:fast", "sums.py:none", *SETUP), "has no function none"),
        (("sums.py:fast", "none.py:fast", *SETUP), "there is no file"),
        (("sums.py:fast", "sums.py:slow"), "missing 1 required positional argument: 'x'"),
        (("sums.py:fast", "sums.py:slow", "--setup", "sums.py:x"), "has no function x"),
        (("sums.py:fast", "sums.py:fast"), "OLD and NEW are both 'sums.py:fast'; needed two"),
        (("fast", "sums.py:slow"), "needed 'module:function' or 'path/file.py:function'"),
        (("sums.py:fast", "sums.py:slow", *SETUP, "--seconds", "0.01"), "budget: 0.01 s is too"),
        (("sums.py:fast", "sums.py:slow", *SETUP, "--threads", "999"), "threads: 999, needed 1 to"),
        (("sums.py:fast", "sums.py:slow", *SETUP, "--require", "x"), "require: 'x'; needed"),
        (("a", "b", "--function", "sums:fast"), "ot a git repository"),
        (("a", "b", "--function", "sums:fast", "--repo", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_2(words, said, sums, capsys, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(sums.parent))
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("ctxlab: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("value", ["0%", "100%", "x", "-1%", "nan"])
def test_a_resolution_that_is_none(value, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "a:b", "c:d", f"--resolution={value}"])
    assert "is not a share between 0% and 100%" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_module_beside_the_reader(sums, capsys, quickly):
    code, out, _ = run(
        capsys, "sums:slow", "sums:fast", "--setup", "sums:arguments", "--seconds", "60"
    )
    assert code == 0
    assert "sums:fast" in out


# --- revisions ---


def git(*words):
    who = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    subprocess.run(["git", *who, *words], check=True, capture_output=True)


@pytest.fixture(params=["", pytest.param("src", marks=pytest.mark.thorough)])
def repository(tmp_path, request, monkeypatch):
    """A package with a helper of its own, at two revisions, and another state on disk."""
    monkeypatch.chdir(tmp_path)
    package = tmp_path / request.param / "mine"
    package.mkdir(parents=True)
    git("init", "-q")
    for n in (1, 2, 3):
        (package / "__init__.py").write_text("")
        (package / "helper.py").write_text(f"N = {n}\n")
        (package / "core.py").write_text(
            textwrap.dedent(f"""
                from mine.helper import N

                def version():
                    assert N == {n}
                    return "the same"

                def told():
                    return N
            """)
        )
        if n < 3:
            git("add", ".")
            git("commit", "-q", "-m", f"version {n}")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"), [("HEAD~1", "HEAD"), pytest.param("HEAD", ".", marks=pytest.mark.thorough)]
)
def test_two_revisions(old, new, repository, quickly):
    before = subprocess.run(["git", "status", "--short"], capture_output=True, text=True).stdout
    result, missed = compare_versions(
        old, new, function="mine.core:version", budget=60, progress=False
    )
    assert (set(result), missed) == ({old, new}, [])
    after = subprocess.run(["git", "status", "--short"], capture_output=True, text=True).stdout
    assert [line for line in after.splitlines() if "pycache" not in line] == before.splitlines()


def test_each_revision_has_its_own_files(repository, capsys):
    for old, new, a, b in (("HEAD~1", "HEAD", 1, 2), ("HEAD", ".", 2, 3)):
        code, _, err = run(capsys, old, new, "--function", "mine.core:told", "--no-progress")
        assert code == 3
        assert f"forms: {new!r} gives another result than {old!r}: values: 1 of 1 differ" in err
        assert f"int64({b}), expected np.int64({a})" in err or str(b) in err


def test_revisions_that_are_none(repository, capsys):
    for revision in ("HEAD~9", "nothing", "--help", "HEAD:mine"):
        with pytest.raises(InputError, match=rf"there is no revision '{revision}'$"):
            compare_versions("HEAD", revision, function="mine.core:version")


def test_a_revision_is_taken_out_and_put_away(repository):
    with _checked_out(repository, "HEAD~1") as folder:
        assert folder != repository
        assert next(folder.rglob("helper.py")).read_text() == "N = 1\n"
    assert not folder.exists()
    with _checked_out(repository, ".") as folder:
        assert folder == repository.resolve()
    assert repository.exists()
