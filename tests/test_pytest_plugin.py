"""The plugin as a user has it: the example project, in runs of pytest of their own."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

from ctxlab import pytest_plugin, testing
from ctxlab.witness import _has_memray, _has_native_peak

EXAMPLE = Path(__file__).resolve().parent.parent / "docs/example_project"
WITHOUT_MEMRAY = 'import sys\n\nsys.modules["memray"] = None\n'
# Before NumPy 2.3 the product of a strided operand is slow, and makes no copy.
COPIES = np.lib.NumpyVersion(np.__version__) >= "2.3.0"
needs_memray = pytest.mark.skipif(not _has_memray(), reason="memray is not installed")


@pytest.fixture
def project(tmp_path):
    """A copy of the example project."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "example"))


def run(folder, *options, **environment):
    """What pytest prints, run there: an installed plugin is all that it has of this repository."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-p", "no:cacheprovider", *options],
        cwd=folder,
        env=clean | {"OPENBLAS_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout + done.stderr


def failed(told):
    """Names of the tests that failed, out of the summary."""
    return re.findall(r"^FAILED \S+::(\w+)", told, re.MULTILINE)


def line_of(folder, text):
    """'smoothing.py:line' of the line that holds the text."""
    lines = (folder / "smoothing.py").read_text(encoding="utf-8").splitlines()
    (at,) = [i for i, line in enumerate(lines, 1) if text in line]
    return f"smoothing.py:{at}"


def test_the_package_offers_the_plugin():
    (offered,) = entry_points(group="pytest11", name="ctxlab")
    assert offered.load() is pytest_plugin


@pytest.mark.slow
@needs_memray
@pytest.mark.skipif(not COPIES, reason="no copy: it multiplies without BLAS")
@pytest.mark.parametrize("options", [(), ("-p", "ctxlab"), ("-n", "2")], ids=" ".join)
def test_the_example_with_memray(project, options):
    told = run(project, *options)
    assert "3 failed, 3 passed" in told
    assert sorted(failed(told)) == [
        "test_another_rate_gives_the_same",
        "test_project_even_works_in_place",
        "test_smooth_works_in_place",
    ]
    assert "ctxlab: no_allocation sees native copies, too (memray)" in told
    assert "a steady-state call makes 2 allocations, 65536 bytes" in told
    assert f"E         {line_of(project, 'state += rate')}: 65536 bytes" in told
    assert f"E         {line_of(project, 'x[:, ::2]')}: 16384 bytes" in told
    assert "E       AssertionError: values: 4096 of 4096 differ" in told
    assert "lower bounds" not in told


@pytest.mark.slow
def test_the_example_without_memray(project):
    (project / "conftest.py").write_text(WITHOUT_MEMRAY, encoding="utf-8")
    told = run(project)
    # The copy of 16 KB below NumPy is not seen before NumPy 2.5, and the run says so.
    assert failed(told)[0] == "test_smooth_works_in_place"
    assert failed(told)[-1] == "test_another_rate_gives_the_same"
    assert "ctxlab: no_allocation misses small native copies" in told
    assert "a steady-state call makes at least 1 allocation, 6" in told
    assert re.search(rf"^E +{line_of(project, 'state += rate')}: 6\d+ bytes", told, re.MULTILINE)
    assert "seen by tracemalloc alone, as memray is not installed" in told
    assert "pip install 'ctxlab[memory]'" in told


@pytest.mark.slow
@pytest.mark.skipif(not COPIES, reason="no copy: it multiplies without BLAS")
@pytest.mark.skipif(not _has_native_peak(), reason="no record of native blocks here")
def test_a_large_native_copy_is_found_without_memray_where_the_c_library_tells(project):
    (project / "conftest.py").write_text(WITHOUT_MEMRAY, encoding="utf-8")
    test = project / "test_smoothing.py"
    text = test.read_text(encoding="utf-8")
    test.write_text(text.replace("(3, 64, 64)", "(3, 512, 512)").replace("[:32]", "[:256]"))
    told = run(project, "-k", "project")
    assert failed(told) == ["test_project_even_works_in_place"]


@pytest.mark.slow
def test_failures_point_to_the_line_of_the_test(project):
    told = run(project, "--tb=short", "-k", "smooth_works or another_rate")
    places = re.findall(r"^(\S+\.py):\d+: (?:in|AssertionError)", told, re.MULTILINE)
    assert places
    assert set(places) == {"test_smoothing.py"}


@pytest.mark.slow
def test_the_plugin_can_be_left_out(project):
    told = run(project, "-p", "no:ctxlab")
    assert "fixture 'no_allocation' not found" in told
    assert "fixture 'same' not found" in told


@pytest.mark.slow
def test_a_fixture_of_the_user_goes_before(project):
    (project / "conftest.py").write_text(
        "import pytest\n\n\n@pytest.fixture\ndef same():\n    return lambda a, b: True\n",
        encoding="utf-8",
    )
    assert "3 passed, 3 deselected" in run(project, "-k", "same or project_works")


def test_loading_it_imports_nothing_but_itself():
    code = (
        "import sys, pytest, importlib.util; old = {*sys.modules}; import ctxlab.pytest_plugin; "
        "print(*sys.modules.keys() - old)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"ctxlab", "ctxlab.pytest_plugin"}


def test_a_run_that_asks_for_no_fixture_loads_nothing(tmp_path):
    (tmp_path / "test_light.py").write_text(
        "import sys\n\n\ndef test_light():\n"
        "    assert 'ctxlab.pytest_plugin' in sys.modules\n"
        "    assert not {'numpy', 'memray', 'ctxlab.testing', 'ctxlab.witness'} & {*sys.modules}\n",
        encoding="utf-8",
    )
    # Alone, since other plugins load NumPy.
    assert "1 passed" in run(tmp_path, "-p", "ctxlab", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")


def test_the_fixtures_are_the_functions(no_allocation, same):
    assert no_allocation is testing.no_allocation
    assert same is testing.same


@pytest.mark.parametrize(("there", "says"), [(True, "sees native copies"), (False, "misses small")])
def test_the_head_of_the_run(monkeypatch, there, says):
    monkeypatch.setattr(pytest_plugin, "find_spec", lambda name: there and name == "memray")
    assert says in pytest_plugin.pytest_report_header()
