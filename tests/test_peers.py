"""Other libraries beside ours: their results, who is here, and what becomes of one that fails."""

import argparse
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ctxlab import cli
from ctxlab.audit import peers
from ctxlab.audit.ladder import _PATHS, _inputs, _reference_calls
from ctxlab.intervals import Interval
from ctxlab.measure import DisagreementError
from ctxlab.models.transformer import transformer_vjp
from ctxlab.workers import WorkerError


def close(got, want):
    peers._agree_with_ours(got, want)
    return True


# --- ours


@pytest.mark.parametrize("path", _PATHS)
def test_our_form_of_a_path_is_the_reference(path):
    assert close(peers._ours(path, 33, 20, 1, 3)(), _reference_calls(_inputs(33, 20, 3))[path]())
    assert peers._bare(path, 33, 20, 1, 3)() is None


def test_our_block_is_the_reference():
    block, x, G = peers._block_of(12, 64, 5)
    want = transformer_vjp(block.parameters(), x, G, block.n_heads)
    assert close(peers._our_block("block and gradients", 12, 64, 1, 5)(), want)
    assert close(peers._our_block("block", 12, 64, 1, 5)(), want[0])
    assert peers._block_products("block", 12, 64, 1, 5)() is None


@pytest.mark.parametrize(
    "wrong", [1.001, np.nan, np.float32(-1)], ids=["a little", "not a number", "sign"]
)
def test_what_differs_does_not_agree(wrong):
    a = np.arange(1, 5, dtype=np.float32)
    for got, want in ((a * wrong, a), ((a, a * wrong), (a, a)), ({"x": a * wrong}, {"x": a})):
        with pytest.raises(AssertionError):
            peers._agree_with_ours(got, want)
        assert close(want, want)
    with pytest.raises(AssertionError, match=r"\(4,\), not \(1, 4\)"):
        peers._agree_with_ours(a, a[None])


# --- who is here


def write(folder, name, text):
    (folder / f"{name}.py").write_text(text)


@pytest.mark.parametrize(
    ("text", "version", "problem"),
    [
        ("__version__ = '1.2'", "1.2", ""),
        ("raise OSError('libomp is missing')", "", "OSError: libomp is missing"),
        ("import none_such", "", "ModuleNotFoundError: No module named 'none_such'"),
        ("", "", "AttributeError: module 'ctxlab_peer' has no attribute '__version__'"),
        ("import os; os._exit(3)", "", "code 3"),
    ],
)
def test_a_peer_is_asked_in_a_process_of_its_own(monkeypatch, tmp_path, text, version, problem):
    write(tmp_path, "ctxlab_peer", text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(peers._MODULES, "peer", "ctxlab_peer")
    assert peers._peers(["peer"]) == [peers._Peer("peer", version, problem)]
    assert "ctxlab_peer" not in sys.modules


def test_a_peer_that_is_missing_is_none(monkeypatch):
    monkeypatch.setitem(peers._MODULES, "peer", "ctxlab_none_such")
    assert peers._peers(["peer"]) == []


def test_an_import_that_never_ends_is_a_problem(monkeypatch):
    def run(*args, **options):
        raise subprocess.TimeoutExpired("python", options["timeout"])

    monkeypatch.setitem(peers._MODULES, "peer", "json")
    monkeypatch.setattr(subprocess, "run", run)
    (peer,) = peers._peers(["peer"])
    assert (peer.version, peer.problem) == ("", "its import did not end within two minutes")


# --- beside them


def wrong(path, S, D, threads, seed):
    return lambda: np.ones((S, D), np.float32)


def broken(path, S, D, threads, seed):
    raise OSError("no such kernel")


def same(path, S, D, threads, seed):
    return peers._ours(path, S, D, threads, seed)


def in_this_process(forms, agree, **how):
    "As `compare`, but for the clock."
    calls, base = {}, None
    for name, form in forms.items():
        try:
            calls[name] = form(0)
        except OSError as e:
            raise WorkerError(f"form {name!r}: {e}") from None
        try:
            result = calls[name]()
            base = result if base is None else base
            agree(result, base)
        except AssertionError as e:
            raise DisagreementError(
                f"forms: {name!r} gives another result than 'ctxlab': {e}"
            ) from None
    return {name: SimpleNamespace(ratio=Interval(2, 1, 4), seconds=0.003) for name in calls}


def test_a_peer_that_fails_is_named_and_the_others_are_timed(monkeypatch):
    monkeypatch.setattr(peers, "compare", in_this_process)
    for name, form in (("PyTorch", wrong), ("JAX", broken), ("numba", same)):
        monkeypatch.setitem(peers._FORMS, name, form)
    row = peers._beside("step update", ["PyTorch", "JAX", "numba"], 16, 8)
    assert set(row.found) == {"ctxlab", peers._UNIT, "numba"}
    assert set(row.problems) == {"PyTorch", "JAX"}
    assert "no such kernel" in row.problems["JAX"]
    assert row.ratio("numba") == Interval(0.5, 0.25, 1)
    assert peers._peers_table([row]).splitlines()[:2] == [
        "             threads  ms      bare products              numba",
        "step update        1   3  0.50 [0.25, 1.00]  0.50 [0.25, 1.00]",
    ]
    assert len(peers._peers_table([row]).splitlines()) == 4


@pytest.mark.parametrize("name", ["_ours", "_bare"])
def test_what_is_ours_is_never_left_out(monkeypatch, name):
    monkeypatch.setattr(peers, "compare", in_this_process)
    monkeypatch.setattr(peers, name, broken)
    with pytest.raises(WorkerError, match="no such kernel"):
        peers._beside("apply", [], 16, 8)


def test_a_ratio_without_a_limit_yet():
    row = peers._Beside("apply", 1, {"JAX": SimpleNamespace(ratio=Interval(2, 0, np.inf))}, {})
    assert row.ratio("JAX") == Interval(0.5, 0, np.inf)


def test_numexpr_and_numba_stand_beside_the_token_update_alone():
    for path in (*_PATHS, *peers._BLOCK_PATHS):
        forms = set(peers._forms_of(path, peers._MODULES)) - {"ctxlab", peers._UNIT}
        assert forms == {"PyTorch", "JAX"} | (
            {"numexpr", "numba"} if path == "step update" else set()
        )


def options(**changed):
    usual = dict(rows=16, dim=8, threads=None, seconds=1.0, seed=0)
    return argparse.Namespace(**usual | changed)


def test_the_command_tells_who_is_here_and_times_what_works(monkeypatch, capsys):
    here = [peers._Peer("JAX", "1.0"), peers._Peer("PyTorch", problem="OSError: gone")]
    asked = []

    def beside(path, names, *sizes, **how):
        asked.append((path, *names, *sizes, how["threads"]))
        return path

    monkeypatch.setattr(peers, "_peers", lambda: here)
    monkeypatch.setattr(peers, "_beside", beside)
    monkeypatch.setattr(peers, "_peers_table", lambda rows: f"{len(rows)} rows")
    cli._beside_peers(options(threads=1))
    said = capsys.readouterr().out
    assert "JAX 1.0" in said
    assert "PyTorch cannot be used: OSError: gone" in said
    assert said.endswith("4 rows\n")
    assert asked == [(path, "JAX", 16, 8, 1) for path in _PATHS]


def test_the_command_says_that_nobody_is_here(monkeypatch, capsys):
    monkeypatch.setattr(peers, "_peers", list)
    cli._beside_peers(options())
    assert "No other library" in capsys.readouterr().out


# --- where they are installed


ASK = """
import sys
from ctxlab.audit import peers

name, threads = sys.argv[1], int(sys.argv[2])
for path in (*peers._PATHS, *peers._BLOCK_PATHS):
    forms = peers._forms_of(path, [name])
    if name in forms:
        theirs = forms[name](path, 32, 64, threads, 0)
        peers._agree_with_ours(theirs(), forms["ctxlab"](path, 32, 64, threads, 0)())
        print(path)
"""


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("name", peers._MODULES)
def test_a_peer_does_the_same_mathematics(torch, name, threads):
    pytest.importorskip(peers._MODULES[name])  # whoever has PyTorch for tests has all of them
    done = subprocess.run(
        [sys.executable, "-c", ASK, name, threads], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    every = [*_PATHS, *peers._BLOCK_PATHS]
    alone = name in ("numexpr", "numba")
    assert done.stdout.splitlines() == (["step update"] if alone else every)
