"""Whole commands, as a user runs them: what they print, what they write, and how they end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_report import tree

from ctxlab import __version__
from ctxlab.audit.claims import LEDGER
from ctxlab.cli import _parser, main

CTXLAB = [Path(sys.executable).parent / "ctxlab"]
# The same command on small workloads in place of the report's.
SMALL = [
    sys.executable,
    "-c",
    """
import sys
from ctxlab import cli
from ctxlab.audit import claims
claims._REPORT_SIZE, claims._STACK_SHAPE = (64, 48), (1, 32, 64)
sys.exit(cli.main(sys.argv[1:]))
""",
]
# And with trials and accounts that are made up, for tests of something else. STOP: what happens
# at the sixth trial.
FAST = [
    sys.executable,
    "-c",
    f"""
import os
import sys
from dataclasses import replace
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_claims import made_up
from ctxlab import cli
from ctxlab.audit import changes, claims, trials
claims._REPORT_SIZE, claims._STACK_SHAPE = (64, 48), (1, 32, 64)
cli._TIMES['quick'] = 100.0
ran, stop, write = [], os.environ.get('STOP'), changes._write_whole
def run(trial, seconds, seed):
    ran.append(trial.name)
    if stop == 'interrupt' and len(ran) == 6:
        raise KeyboardInterrupt
    if stop == 'fail' and len(ran) > 5:
        raise OSError('no such thing')
    return replace(made_up(trial), seconds=len(ran) + float(os.environ.get('FROM', 0)))
def keep(path, text):
    if stop == 'full' and len(ran) == 6:
        raise OSError(28, 'No space left on device')
    write(path, text)
trials._run, changes._write_whole = run, keep
claims.account = lambda make: (make()(), trials.Account(8192, 0, 8192))[1]
sys.exit(cli.main(sys.argv[1:]))
""",
]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
PLOTS = {"scoreboard.png", "bytes.png", "times.png"}
FILES = {"index.html", "report.css", "claims.json", *PLOTS}


def options(folder, **more):
    """A terminal's environment, without what a developer may have set."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MPL", "COLUMNS"))}
    env["OPENBLAS_NUM_THREADS"] = "1"  # on a busy machine two threads wait for each other
    return dict(
        cwd=folder, env=env | more, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def run(folder, words, *more, command=CTXLAB, stdout=subprocess.PIPE, **env):
    """Run the command with `words`, and with further arguments that hold spaces or worse."""
    argv = [*command, *words.split(), *more]
    return subprocess.run(argv, stdout=stdout, timeout=300, **options(folder, **env))


def matrix(*shape, dtype=np.float64):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


# Words about itself


def test_version(tmp_path):
    done = run(tmp_path, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ctxlab {__version__}\n", "")


MODULE = [sys.executable, "-m", "ctxlab"]


@pytest.mark.parametrize("command", [CTXLAB, MODULE], ids=["ctxlab", "python -m ctxlab"])
def test_alone_it_tells_its_commands_and_what_to_try(command, tmp_path):
    done = run(tmp_path, "", command=command)
    # No job was named, so none is done: an error to a script, and help to a reader.
    assert (done.returncode, done.stdout) == (2, "")
    listed, first = done.stderr.split("first to try:")
    told = dict(re.findall(r"^    (\w+) +(\w.*)$", listed.split("COMMAND\n")[1], re.MULTILINE))
    assert list(told) == ["report", "claims", "audit", "bench", "context", "compare"]
    assert first.split()[:2] == ["ctxlab", "report"]
    assert done.stderr == run(tmp_path, "--help").stdout
    assert max(map(len, done.stderr.splitlines())) <= 80
    assert not tree(tmp_path)


@pytest.mark.slow
def test_the_module_is_the_command(tmp_path):
    for words in ("--version", "claims lazy", "claims xyzzy"):
        done, same = run(tmp_path, words), run(tmp_path, words, command=MODULE)
        assert (done.returncode, done.stdout) == (same.returncode, same.stdout)
        assert done.stderr == same.stderr


@pytest.mark.parametrize("command", ["report", "audit", "claims"])
def test_help_explains_every_option(command, tmp_path):
    done, short = run(tmp_path, f"{command} --help"), run(tmp_path, "--help")
    assert (done.returncode, short.returncode) == (0, 0)
    parser = next(a for a in _parser()._actions if a.dest == "command").choices[command]
    for action in parser._actions:
        assert action.help
        assert all(option in done.stdout for option in action.option_strings)
    if command == "report":
        assert all(code in done.stdout.split("exit codes:")[1] for code in ("0", "2", "130"))
    for each in ("report", "claims", "audit", "bench"):
        assert each in short.stdout


def test_help_needs_no_numpy(tmp_path):
    (tmp_path / "numpy.py").write_text("raise ImportError('loaded')")
    done = run(tmp_path, "report --help", PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_options_and_claims(shell, tmp_path):
    done = run(tmp_path, f"--print-completion {shell}")
    assert (done.returncode, done.stderr) == (0, "")
    for word in (
        "report",
        "bench",
        "claims",
        "audit",
        "compare",
        "resume",
        "thorough",
        "threads",
        *(c.id for c in LEDGER),
    ):
        assert word in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("re", "report"),
        ("report --qu", "--quick"),
        ("claims speed-f", "speed-forward"),
        ("report --out f", "folder"),
    ],
)
def test_bash_completes(typed, offered, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "c").write_text(run(tmp_path, "--print-completion bash").stdout)
    words = ["ctxlab", *typed.split()]
    ask = f"""
    source ./c
    COMP_WORDS=({" ".join(words)})
    COMP_CWORD={len(words) - 1}
    COMP_LINE="${{COMP_WORDS[*]}}"
    COMP_POINT=${{#COMP_LINE}}
    function=$(complete -p ctxlab | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
    $function ctxlab "{words[-1]}" ""
    printf '%s\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", ask], stdout=subprocess.PIPE, **options(tmp_path))
    assert offered in done.stdout.split()


def test_the_list_of_claims(tmp_path):
    done = run(tmp_path, "claims")
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    for claim in LEDGER:
        assert f"{claim.id} {claim.notebook} {claim.says}" in text


@pytest.mark.parametrize("columns", ["40", "100"])
def test_one_claim_explained(columns, tmp_path):
    claim = LEDGER[10]
    done = run(tmp_path, f"claims {claim.id}", COLUMNS=columns)
    text = " ".join(done.stdout.split())
    assert all(
        part in text
        for part in (claim.says, claim.rule, claim.notebook, claim.section, claim.where)
    )
    assert max(map(len, done.stdout.splitlines())) <= int(columns)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("claims speed-foreward", "did you mean speed-forward"),
        ("claims POW2", "did you mean pow2"),
        ("claims xyzzy", "`ctxlab claims` lists them"),
        ("claims pow2 --from nowhere", "nowhere: no such file"),
        ("claims pow2 --from .", "claims.json: no such file"),
    ],
)
def test_unknown_claims(words, said, tmp_path):
    assert_refused(run(tmp_path, words), tmp_path, {}, said)


WRONG = [
    "audit",
    "report --fast",
    "report extra",
    "report --out",
    "report --seed -1",
    "report --seed 1.5",
    "report --threads 0",
    "report --threads -1",
    "report --threads two",
    "report --quick --thorough",
    "audit one.py two.py",
    "audit mine.py --seconds 0",
    "audit mine.py --seconds soon",
    "audit mine.py --threads 0",
    "audit mine.py --quick",
    "bench --threads 0",
    "bench --rows 0",
    "bench --rows 1",
    "bench --dim -1",
    "bench --dim x",
    "bench --seconds nan",
    "bench --seconds -1",
    "bench --seed 1.5",
    "--print-completion fish",
]


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_command_line_is_explained(words, tmp_path):
    done = run(tmp_path, words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ctxlab")
    said = done.stderr.splitlines()[-1]
    options = [word for word in words.split() if word.startswith("--")]
    assert "error:" in said
    assert not options or any(option in said for option in options)
    assert not tree(tmp_path)


# Bad input: one line, exit code 2, nothing written


def save(**arrays):
    return lambda path: np.savez(path, **arrays)


def spoil(method=zipfile.ZIP_STORED, cut=None, flag=b""):
    """Save good arrays, then damage the archive: cut it, zero its middle, or change its flags."""

    def make(path):
        np.savez(path, x=matrix(64, 16), y=matrix(64, 16))
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        content = bytearray(path.read_bytes())
        if method == zipfile.ZIP_LZMA:
            content[60:1500] = bytes(1440)
        for header, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            start = content.find(header)
            while flag and start >= 0:
                content[start + at : start + at + len(flag)] = flag
                start = content.find(header, start + 1)
        path.write_bytes(content[:cut])

    return make


x, y = matrix(64, 16), matrix(64, 16)
ACTIVATIONS = {  # what is wrong -> (how to make the file, or None; what the message must hold)
    "missing": (None, "bad.npz: no such file"),
    "a folder": (Path.mkdir, "is a folder"),
    "empty file": (lambda p: p.write_bytes(b""), "not an .npz"),
    "text": (lambda p: p.write_text("hello"), "not an .npz"),
    "a single array": (lambda p: p.write_bytes(b"\x93NUMPY\1\0" + bytes(100)), "not an .npz"),
    "cut off": (spoil(cut=-200), "bad.npz"),
    "encrypted": (spoil(flag=b"\1"), "cannot be read"),
    "corrupt": (spoil(zipfile.ZIP_LZMA), "cannot be read"),
    "unknown compression": (spoil(flag=b"\0\0\x61"), "cannot be read"),
    "only x": (save(x=x), "'hidden'"),
    "other names": (save(a=x, b=y), "found a, b"),
    "a name of two lines": (save(**{"a\nb": x}), "found"),
    "nothing": (save(), "found none"),
    "pickled": (save(x=np.array([{}, None]), y=y), "pickled"),
    "shapes differ": (save(x=x, y=y[:, :8]), "(64, 16) and y has (64, 8)"),
    "no rows": (save(x=x[:0], y=y[:0]), "empty"),
    "no features": (save(x=x[:, :0], y=y[:, :0]), "has no features"),
    "one row": (save(x=x[:1], y=y[:1]), "one row"),
    "a vector": (save(x=x[0], y=y[0]), "(rows, features)"),
    "NaN": (save(x=x, y=np.full_like(y, np.nan)), "no finite value"),
    "integers": (save(x=np.ones((64, 16), int), y=np.ones((64, 16), int)), "int64"),
    "complex": (save(x=x + 0j, y=y + 0j), "complex128"),
    "too large": (save(x=x, y=np.full_like(y, 1e300)), "float32"),
    "one layer": (save(hidden=matrix(1, 64, 16)), "layers >= 2"),
    "no layers": (save(hidden=x), "layers >= 2"),
}


def assert_refused(done, folder, before, *said):
    """What every mistake gets: exit code 2, one line that says what is wrong, and nothing else."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ctxlab: error: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    for part in said:
        assert part in done.stderr
    assert tree(folder) == before


@pytest.mark.parametrize("what", ACTIVATIONS)
def test_bad_activations(what, tmp_path):
    make, said = ACTIVATIONS[what]
    if make:
        make(tmp_path / "bad.npz")
    before = tree(tmp_path)
    done = run(tmp_path, "report --quick --activations bad.npz")
    assert_refused(done, tmp_path, before, said)


def test_a_name_of_two_lines_gets_a_message_of_one(tmp_path):
    done = run(tmp_path, "report --activations", "no\nsuch.npz")
    assert_refused(done, tmp_path, {}, "no such file")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_file_without_permission(tmp_path):
    (tmp_path / "bad.npz").touch(0o000)
    done = run(tmp_path, "report --activations bad.npz")
    (tmp_path / "bad.npz").chmod(0o600)
    assert_refused(done, tmp_path, {"bad.npz": b""}, "bad.npz")


PLACES = [  # options, and what the message names
    ("--out notes.txt", "notes.txt"),
    ("--out notes.txt/report", "notes.txt"),
    ("--out notes.txt/a/b", "notes.txt"),
    pytest.param("--out /proc/nope", "/proc/nope", marks=on_linux),
]


@pytest.mark.parametrize(("words", "said"), PLACES)
def test_places_that_cannot_be_written(words, said, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    before = tree(tmp_path)
    done = run(tmp_path, "report --quick " + words)
    assert_refused(done, tmp_path, before, said)


@pytest.mark.parametrize("out", [".", "new"])
def test_nothing_to_resume(out, tmp_path):
    done = run(tmp_path, f"report --resume --out {out}")
    assert_refused(done, tmp_path, {}, "unfinished.json: no such file", "leave --resume out")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "not JSON"),
        (b"\xff\xfe", "no text"),
        (
            b'{"schema": "ctxlab.audit.claims", "schema_version": 2, "claims": []}',
            "version 2 of the schema",
        ),
        (b'{"schema": "ctxlab.audit.claims", "schema_version": 99}', "version 99 of the schema"),
        (b'{"schema": "other"}', "not a report of ctxlab"),
        (b'{"schema": "ctxlab.audit.claims", "schema_version": 3}', "there is no 'claims'"),
        (b"[" * 100_000, "not a report of ctxlab"),
    ],
    ids=["missing", "empty", "binary", "older", "newer", "other", "cut", "deep"],
)
def test_a_strange_report_is_refused_before_anything_is_measured(content, said, tmp_path):
    if content is not None:
        (tmp_path / "claims.json").write_bytes(content)
    for old in ("claims.json", "."):
        before = tree(tmp_path)
        done = run(tmp_path, f"report --out new --activations none.npz --compare {old}")
        assert_refused(done, tmp_path, before, "claims.json", said)


@pytest.mark.parametrize("words", ["report --quick", "bench --rows 8 --dim 8"])
def test_more_threads_than_there_can_be(words, tmp_path):
    done = run(tmp_path, f"{words} --threads 99999")
    assert_refused(done, tmp_path, {}, "--threads: 99999")


def test_debug_shows_the_traceback(tmp_path):
    plain = run(tmp_path, "report --activations none.npz")
    debug = run(tmp_path, "report --activations none.npz --debug")
    assert debug.returncode == 2
    assert debug.stderr.startswith("Traceback")
    assert debug.stderr.endswith(plain.stderr)


# Runs


@pytest.mark.slow
def test_a_report_on_activations_of_ones_own(tmp_path):
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "out/index.html").write_text("an earlier report")
    done = run(tmp_path, "report --quick --activations mine.npz --out out --seed 3", command=SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n{claim.id} " in done.stdout for claim in LEDGER)
    assert "out/index.html" in done.stdout.splitlines()[-1]
    assert set(os.listdir(tmp_path)) == {"mine.npz", "out"}
    in_time = {"times.png"}  # where a busy machine had the time for a trial
    assert set(os.listdir(tmp_path / "out")) | in_time == FILES | {"notes.txt"}
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    assert "an earlier report" not in (tmp_path / "out/index.html").read_text(encoding="utf-8")
    data = json.loads((tmp_path / "out/claims.json").read_text())
    assert data["settings"]["seed"] == 3
    assert data["settings"]["time"] == "quick"
    assert data["settings"]["activations"] == "mine.npz"
    assert not [c["error"] for c in data["claims"] if c["error"]]
    sizes = data["claims"][0]["figures"]
    assert set(sizes) == {"mine.npz, 64 x 16", "64 x 48"}
    assert len(data["trials"]) + len(data["not_timed"]) == 13


@pytest.mark.slow
def test_hidden_states_and_json_on_standard_output(tmp_path):
    np.savez(tmp_path / "mine.npz", hidden=matrix(4, 40, 8, dtype=np.float16))
    done = run(tmp_path, "report --quick --activations mine.npz --json -", command=FAST)
    assert (done.returncode, done.stderr) == (0, "")
    data = json.loads(done.stdout)  # nothing before it, nothing after
    assert data == json.loads((tmp_path / "ctxlab-report/claims.json").read_text())
    numeric = next(c for c in data["claims"] if c["id"] == "numeric")
    assert set(numeric["figures"]) == {"mine.npz, 40 x 8", "64 x 48"}
    assert set(os.listdir(tmp_path / "ctxlab-report")) == FILES
    verdicts = {c["id"]: c["verdict"] for c in data["claims"]}
    listed = run(tmp_path, "claims")  # from that folder, since it is there
    assert (listed.returncode, listed.stderr) == (0, "")
    text = " ".join(listed.stdout.split())
    for claim in LEDGER:
        assert f"{claim.id} {claim.notebook} {verdicts[claim.id]} {claim.says}" in text
    told = run(tmp_path, "claims lazy").stdout
    assert f"verdict: {verdicts['lazy']}: holds" in " ".join(told.split())


@pytest.mark.parametrize("words", ["claims", "claims lazy"])
def test_a_report_that_cannot_be_read_does_not_hide_the_claims(words, tmp_path):
    (tmp_path / "ctxlab-report").mkdir()
    (tmp_path / "ctxlab-report/claims.json").write_text(
        '{"schema": "ctxlab.audit.claims", "schema_version": 2}'
    )
    done = run(tmp_path, words)
    assert done.returncode == 0
    assert "lazy" in done.stdout
    assert done.stderr.startswith("ctxlab: ctxlab-report/claims.json: version 2 of the schema")
    assert done.stderr.count("\n") == 1
    before = tree(tmp_path)
    asked = run(tmp_path, f"{words} --from ctxlab-report")
    assert_refused(asked, tmp_path, before, "version 2 of the schema")


@pytest.mark.slow
def test_trials_that_fail_are_told_and_the_report_is_written(tmp_path):
    done = run(tmp_path, "report --quick --out out", command=FAST, STOP="fail")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Not timed: " in done.stdout
    assert "OSError: no such thing" in " ".join(done.stdout.split())
    data = json.loads((tmp_path / "out/claims.json").read_text())
    assert len(data["trials"]) == 5
    assert set(data["not_timed"].values()) == {"no such thing"}
    failed = {c["id"] for c in data["claims"] if c["error"]}
    assert "speed-backward" in failed
    assert failed.isdisjoint({"norm-lock", "lazy"})
    assert not (tmp_path / "out/unfinished.json").exists()


@pytest.mark.slow
@on_linux  # other systems refuse such a name
def test_a_file_name_that_is_not_text(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.npz", "wb") as f:
        np.savez(f, x=x, y=y)
    done = run(tmp_path, "report --quick --activations \udcff.npz", command=FAST)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2)


@pytest.mark.slow
def test_a_run_that_stops_goes_on_where_it_was(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (*FILES, "notes.txt"):
        (out / name).write_text(f"old {name}")
    earlier = tree(out)
    for stop, code, said in (
        ("interrupt", 130, "interrupted"),
        ("full", 2, "error: [Errno 28] No space left"),
    ):
        done = run(tmp_path, "report --quick --out out --threads 1", command=FAST, STOP=stop)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr.startswith(f"ctxlab: {said}")
        assert done.stderr.endswith("5 trials are kept: --resume goes on with them\n")
        assert done.stderr.count("\n") == 1
        now = tree(out)
        kept = json.loads(now.pop("unfinished.json"))
        assert len(kept["trials"]) == 5
        assert now == earlier  # byte for byte
    before = tree(tmp_path)
    for other, what in (
        ("--seed 1 --threads 1", "settings.seed: 0, now 1"),
        ("", "settings.threads: 1, now null"),
    ):
        done = run(tmp_path, f"report --quick --out out --resume {other}", command=FAST)
        assert_refused(done, tmp_path, before, "of another run", what)
    words = "report --quick --out out --threads 1 --resume"
    done = run(tmp_path, words, command=FAST, FROM="100")
    assert (done.returncode, done.stderr) == (0, "")
    assert set(os.listdir(out)) == FILES | {"notes.txt"}
    data = json.loads((out / "claims.json").read_text())
    assert data["trials"][:5] == kept["trials"]  # not measured again
    assert [t["seconds"] for t in data["trials"]] == [*range(1, 6), *range(101, 107)]
    assert len(data["trials"]) == 11  # those of several threads are left out
    assert data["settings"]["threads"] == 1

    stored = run(tmp_path, "claims pow2 --from out")
    assert (
        f"verdict: {next(c['verdict'] for c in data['claims'] if c['id'] == 'pow2')}"
        in stored.stdout
    )
    done = run(
        tmp_path, "report --quick --out new --compare out --seed 5", command=FAST, COLUMNS="40"
    )
    assert (done.returncode, done.stderr) == (0, "")
    *lines, _ = done.stdout.splitlines()
    assert max(map(len, lines)) <= 40
    assert "differs in settings.seed: 0, now 5" in " ".join(done.stdout.split())
    compared = json.loads((tmp_path / "new/claims.json").read_text())["compared"]
    assert [c["id"] for c in compared["claims"]] == [c.id for c in LEDGER]
    assert len(compared["timings"]) > 15
    assert {t["change"] for t in compared["timings"]} == {"same within noise"}
    assert "What changed" in (tmp_path / "new/index.html").read_text()


# Ledgers of anyone

LEDGER_HEAD = """
import numpy as np
from dataclasses import replace
from ctxlab.audit import Claim, Trial, gain_claim, saving_claim

def fresh():
    return lambda: np.ones(100_000).sum()

def kept():
    out = np.ones(100_000)
    return lambda: out.sum()

def lean():
    return lambda: 100_000.0

def fail(bench):
    raise OSError("no data\\nto be \\x1b[31mhad")

def saves(id, after, **more):
    return saving_claim(id, f"{id} saves", (fresh, after), nbytes=(4e5, 8e5), **more)

good = saves("good", lean)
moved = saves("moved", kept)
none = saves("none", fresh)
broken = replace(good, id="broken", measure=fail)
worse = replace(good, id="worse", judge=lambda figures: "true")
"""


def ledger(folder, claims, name="mine.py", head=LEDGER_HEAD):
    """A ledger in that folder, and what is there before the command."""
    (folder / name).write_text(f"{head}\nLEDGER = [{claims}]\n")
    return tree(folder)


def test_an_audit_tells_every_verdict_and_writes_nothing(tmp_path):
    before = ledger(tmp_path, "good, moved, none")
    done = run(tmp_path, "audit mine.py")
    assert (done.returncode, done.stderr) == (0, "")
    for id, verdict in (("good", "confirmed"), ("moved", "partly"), ("none", "refuted")):
        line = next(text for text in done.stdout.splitlines() if text.startswith(f"{id} "))
        assert line.rstrip().endswith(verdict)
    assert "3 claims: 1 confirmed, 1 partly, 1 refuted" in done.stdout
    assert "index.html" not in done.stdout
    assert tree(tmp_path) == before


def test_what_fails_is_a_line_each_and_the_others_are_judged(tmp_path):
    before = ledger(tmp_path, "broken, good, worse")
    done = run(tmp_path, "audit mine.py --json -")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "ctxlab: broken: OSError: no data to be ?[31mhad",
        "ctxlab: worse: ValueError: the rule gives 'true', needed one of confirmed, partly, "
        "refuted, undecided, not testable here",
    ]
    verdicts = {c["id"]: c["verdict"] for c in json.loads(done.stdout)["claims"]}
    assert verdicts == {
        "broken": "not testable here",
        "good": "confirmed",
        "worse": "not testable here",
    }
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_the_page_of_an_audit_has_what_belongs_to_it(tmp_path):
    ledger(tmp_path, "good, broken")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    done = run(tmp_path, "audit mine.py --seed 3 --out out --json -")
    assert done.returncode == 2
    written = {"index.html", "report.css", "claims.json", "scoreboard.png"}
    assert set(os.listdir(tmp_path / "out")) == written | {"notes.txt"}
    data = json.loads(done.stdout)  # nothing before it, nothing after
    assert data == json.loads((tmp_path / "out/claims.json").read_text())
    assert data["settings"]["command"] == "ctxlab audit mine.py --seconds 60 --seed 3"
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    for text in ("Do these claims hold?", "The claims of mine.py", "good saves", "no data to be"):
        assert text in page
    assert "Rust" not in page
    assert set(os.listdir(tmp_path)) == {"mine.py", "out"}


BROKEN = {  # what is wrong -> the file; what the line says
    "syntax": ("LEDGER = [", "mine.py: line 1: "),
    "raises": ("1 / 0", "mine.py: line 1: ZeroDivisionError"),
    "leaves": ("raise SystemExit(0)", "mine.py: it ends Python"),
    "empty": ("LEDGER = []", "hold one at least"),
    "no list": ("", "it has no LEDGER"),
    "no claims": ("LEDGER = [1]", "LEDGER[0] is int"),
    "another form": (
        f"{LEDGER_HEAD}\nt = Trial('t', dict(a=fresh, b=lean))\n"
        "LEDGER = [gain_claim('x', 'x', t, 'c', percent=(1, 2))]",
        "form: 'c' in the trial 't'; needed 'b'",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_ledger_is_one_line_and_nothing_is_written(what, tmp_path):
    text, said = BROKEN[what]
    (tmp_path / "mine.py").write_text(text)
    before = tree(tmp_path)
    assert_refused(run(tmp_path, "audit mine.py --out new"), tmp_path, before, said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("audit none.py --out new", "none.py: no such file"),
        ("audit notes.txt --out new", "needed a Python file"),
        ("audit folder --out new", "needed a Python file"),
        ("audit mine.py --out notes.txt", "notes.txt: is a file"),
        ("audit mine.py --out new --threads 99999", "--threads: 99999, needed 1 to"),
    ],
)
def test_an_audit_that_cannot_begin(words, said, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    before = ledger(tmp_path, "good")
    assert_refused(run(tmp_path, words), tmp_path, before, said)


def test_a_second_claim_of_one_id_is_one_line_and_the_others_are_judged(tmp_path):
    (tmp_path / "mine.py").write_text(f"{LEDGER_HEAD}\nLEDGER = [good, moved, good]")
    done = run(tmp_path, "audit mine.py --json - --no-progress")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "good (again): two claims are called 'good'" in done.stderr
    verdicts = {c["id"]: c["verdict"] for c in json.loads(done.stdout)["claims"]}
    assert verdicts["good"] == "confirmed"
    assert verdicts["moved"] == "partly"
    assert verdicts["good (again)"] == "not testable here"


def test_an_audit_that_is_interrupted_writes_nothing(tmp_path):
    head = LEDGER_HEAD.replace("raise OSError", "raise KeyboardInterrupt  #")
    before = ledger(tmp_path, "good, broken", head=head)
    done = run(tmp_path, "audit mine.py --out new")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "ctxlab: interrupted\n"
    assert tree(tmp_path) == before


def test_an_audit_without_time_is_undecided(tmp_path):
    trial = "Trial('sums', dict(old=lambda seed: fresh(), new=lambda seed: lean()))"
    ledger(tmp_path, f"gain_claim('fast', 'new is faster', {trial}, 'new', percent=(3, 5)), good")
    done = run(tmp_path, "audit mine.py --seconds 0.5")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 claims: 1 confirmed, 1 undecided" in done.stdout
    assert "Not timed: sums." in done.stdout


@pytest.mark.slow
def test_an_audit_times_forms_of_a_module_beside_the_ledger(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/beside.py").write_text(
        "import numpy as np\n"
        "def old(seed):\n    return lambda: np.ones(100_000).sum()\n"
        "def new(seed):\n    return lambda: 100_000.0\n"
    )
    trial = "Trial('sums', dict(old=beside.old, new=beside.new))"
    claim = f"gain_claim('fast', 'new is faster', {trial}, 'new', percent=(3, 5))"
    ledger(tmp_path / "folder", claim, head=f"import beside\n{LEDGER_HEAD}")
    done = run(tmp_path, "audit folder/mine.py --seconds 8 --json -", PYTHONDONTWRITEBYTECODE="1")
    assert (done.returncode, done.stderr) == (0, "")
    data = json.loads(done.stdout)
    (claim,) = data["claims"]
    assert claim["verdict"] in ("confirmed", "undecided")  # the latter on a busy machine
    assert len(data["trials"]) + len(data["not_timed"]) == 1


# Ends


@pytest.fixture
def closed_pipe():
    """The write end of a pipe whose reader has left, as `| head` leaves one."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--help", "report --quick"])
def test_a_reader_who_leaves_causes_no_noise(words, tmp_path, closed_pipe):
    assert run(tmp_path, words, command=FAST, stdout=closed_pipe).stderr == ""


@pytest.mark.slow
@on_linux  # it has /dev/full
def test_standard_output_on_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        done = run(tmp_path, "report --quick", command=FAST, stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith("ctxlab: error: ")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def can_be_interrupted():
    """A background job ignores Ctrl-C, and so do its children, unless the signal is handled."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("can_be_interrupted")
def test_ctrl_c_leaves_the_earlier_report(tmp_path):
    (tmp_path / "out").mkdir()
    for name in (*FILES, "notes.txt"):
        (tmp_path / "out" / name).write_text(f"old {name}")
    before = tree(tmp_path)
    argv = [*CTXLAB, "report", "--out", "out"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, **options(tmp_path)) as process:
        deadline = time.monotonic() + 60
        while tree(tmp_path) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)  # until the places are open: from then on it measures, for a minute
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.startswith("ctxlab: interrupted")
    assert err.count("\n") == 1
    assert tree(tmp_path) == before


def test_ctrl_c_while_numpy_loads(tmp_path):
    # The first second of a cold start; a numpy that raises what Ctrl-C raises makes it last.
    (tmp_path / "fake/numpy").mkdir(parents=True)
    (tmp_path / "fake/numpy/__init__.py").write_text("raise KeyboardInterrupt")
    done = run(tmp_path, "report", PYTHONPATH=str(tmp_path / "fake"), PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode in (130, -signal.SIGINT)  # the same to a shell
    assert "Traceback" not in done.stderr


def test_completion_without_its_library_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)  # as where it is not installed
    with pytest.raises(SystemExit) as left:
        main(["--print-completion", "bash"])
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    last = said.err.splitlines()[-1]
    assert "--print-completion: needs shtab; run pip install 'ctxlab[completion]'" in last
