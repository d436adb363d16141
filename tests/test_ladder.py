"""The ladder: every rung gives the reference's result, and the table says what was measured."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ctxlab.audit import ladder
from ctxlab.audit.ladder import (
    _BARE,
    _PATHS,
    _RUNGS,
    _benchmark_table,
    _check_call,
    _checked,
    _climb,
    _inputs,
    _rungs,
    _work,
)
from ctxlab.measure import Interval, traced_peak

CTXLAB = Path(sys.executable).parent / "ctxlab"


@pytest.mark.slow
@pytest.mark.parametrize(("S", "D"), [(2, 1), (2, 3), (31, 16), (33, 16), (64, 100), (300, 65)])
def test_every_rung_is_the_reference(S, D):
    data = _inputs(S, D, seed=S)
    calls = _checked(_rungs(data), data)
    assert {path: tuple(by_rung) for path, by_rung in calls.items()} == dict.fromkeys(
        _PATHS, _RUNGS
    )


@pytest.mark.parametrize("path", _PATHS)
def test_a_wrong_result_is_found(path):
    data = _inputs(64, 48)
    right = ladder._reference_calls(data)[path]()
    wrong = (right[0], right[1] * 1.2) if path == "backward" else right * np.float32(1.01)
    _check_call(path, lambda: right, data)
    with pytest.raises(AssertionError):
        _check_call(path, lambda: wrong, data)


@pytest.mark.parametrize(("S", "D"), [(64, 64), (512, 256), (100, 300)])
def test_the_last_rung_allocates_no_matrix(S, D):
    data = _inputs(S, D)
    for path, call in ladder._context_calls(data).items():
        vectors = 6 * 2 * D * 8  # of 2 D doubles, beside some Python objects
        assert traced_peak(call, warmup=2) < max(vectors + 2_000, 4_000), path


def test_a_wrong_rung_is_never_timed(monkeypatch):
    data = _inputs(16, 8)
    calls = _rungs(data)
    calls["apply"]["dot"] = lambda: data.X
    monkeypatch.setattr(ladder, "time_paired", lambda *a, **k: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="values"):
        _climb(data, calls)


def test_the_table_says_the_ratios():
    ratios = {(path, rung): Interval(1.25, 1.0, 1.5) for path in _PATHS for rung in _RUNGS}
    ratios |= {(_BARE, "control"): Interval(1.0, 0.99, 1.01), (_BARE, "seconds"): 0.003}
    lines = _benchmark_table(ratios).splitlines()
    assert len(lines) == 1 + len(_PATHS) + 1
    assert len({len(line) for line in lines[:-1]}) == 1
    assert all("1.25 [1.00, 1.50]" in line for line in lines[1:-1])
    assert "3 ms" in lines[-1]


@pytest.mark.parametrize("path", _PATHS)
def test_work_grows_with_the_sizes(path):
    assert all(np.less_equal(_work(path, 64, 32), _work(path, 128, 64)))


@pytest.mark.slow
def test_the_command_prints_the_table(tmp_path):
    words = ["bench", "--rows", "16", "--dim", "8", "--seconds", "0.001"]
    done = subprocess.run(
        [CTXLAB, *words], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n{path} " in done.stdout for path in _PATHS)
    assert "S = 16, D = 8" in done.stdout
