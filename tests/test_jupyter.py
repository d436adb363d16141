"""In Jupyter: the index opens, its links lead to notebooks, each notebook runs in a new kernel."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Those of peers hold hours of measurements, and say so in their front matter.
NOTEBOOKS = sorted(
    p
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if p.parent.name != "peers" and ".ipynb_checkpoints" not in p.parts
)


def without_slow(cell):
    return cell.cell_type != "code" or not re.search(r"^#\|\s*slow\b", cell.source, re.MULTILINE)


def shown(nb):
    """What a reader sees as Markdown: cells of text, and tables that code has written."""
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            yield cell["source"]
        for output in cell.get("outputs", []):
            yield "".join(output.get("data", {}).get("text/markdown", ""))


@pytest.mark.release
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("default")  # those of Jupyter's own libraries are not ours
def test_a_notebook_runs_alone_in_a_new_kernel(path):
    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.read(path, as_version=4)
    # The last cell exports, and rewrites modules that a kernel beside this one may be importing.
    nb.cells = [c for c in nb.cells if without_slow(c) and "nbdev_export()" not in c.source]
    start = time.perf_counter()
    where = {"metadata": {"path": path.parent}}
    for attempt in ("first", "last"):
        # Raises at the first error. The limit is for a cell that hangs; time is only printed.
        client = NotebookClient(nb, timeout=300, kernel_name="python3", resources=where)
        try:
            client.execute()
            break
        except RuntimeError as e:  # Jupyter chooses ports that another kernel may take meanwhile
            if attempt == "last" or "Kernel died before replying to kernel_info" not in str(e):
                raise
    print(f"{path.stem}: {time.perf_counter() - start:.1f} s")


def answers(url):
    try:
        with urlopen(url, timeout=30) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of `jupyter lab nbs/`, with its token."""
    home = tmp_path_factory.mktemp("jupyter")
    log, deadline = home / "log", time.monotonic() + 120
    own = [f"--LabApp.{kind}_dir={home}" for kind in ("workspaces", "user_settings")]
    options = "--no-browser", "--allow-root", "--port=0", *own
    command = [sys.executable, "-m", "jupyterlab", ROOT / "nbs", *options]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd=home)
    try:
        while not (
            found := re.search(r"http://127\.0\.0\.1:(\d+)/lab\S*\?token=(\w+)", log.read_text())
        ):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(log.read_text())
            time.sleep(0.1)
        address, token = f"http://127.0.0.1:{found[1]}", f"token={found[2]}"
        while not answers(
            f"{address}/api/status?{token}"
        ):  # it tells its address before it listens
            if time.monotonic() > deadline:
                pytest.fail(log.read_text())
            time.sleep(0.1)
        yield address, token
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_every_link_of_the_index_opens_from_the_folder_of_the_notebooks(lab):
    address, token = lab

    def contents(name):
        with urlopen(f"{address}/api/contents/{name}?{token}") as answer:
            return json.load(answer)

    links = re.findall(
        r"\]\((?!https?:|#)([^)#\s]+)", "\n".join(shown(contents("index.ipynb")["content"]))
    )
    assert {path.name for path in (ROOT / "nbs").glob("*.ipynb")} - {"index.ipynb"} <= set(links)
    for link in links:  # a link out of the folder would be one that the server refuses
        assert contents(link)["type"] == "notebook", link


@pytest.mark.slow
def test_a_click_in_the_index_opens_the_notebook(lab, browser):
    address, token = lab
    tab = browser.new_page()
    tab.goto(f"{address}/lab/tree/index.ipynb?{token}")
    tab.locator(".jp-RenderedMarkdown a", has_text="07_context").first.click(timeout=60_000)
    tab.locator(".lm-TabBar-tabLabel", has_text="07_context.ipynb").first.wait_for(timeout=60_000)
    assert tab.locator(".jp-Notebook:visible").count() == 1
    tab.close()
