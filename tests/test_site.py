"""The web site: it builds without a warning, every link leads somewhere, no network."""

import html
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from conftest import serving

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
MODULES = sorted(
    p.relative_to(ROOT / "ctxlab").with_suffix("").as_posix().replace("/", ".")
    for p in (ROOT / "ctxlab").rglob("[!_]*.py")
)

NEEDED = "sphinx", "myst_nb", "furo", "sphinx_copybutton", "mathjax"
absent = ", ".join(name for name in NEEDED if importlib.util.find_spec(name) is None)
pytestmark = pytest.mark.skipif(bool(absent), reason=f"needs pip install -e '.[docs]': no {absent}")

by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def page_of(path):
    """The page of a notebook, as a path in the site."""
    return path.relative_to(ROOT / "nbs").with_suffix(".html").as_posix()


class Page(HTMLParser):
    """What a test asks of a page."""

    def __init__(self, path):
        super().__init__()
        self.path, self.lang = path, None
        self.ids, self.links, self.resources, self.images = set(), [], [], []
        self.tags, self.cells = [], 0
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if attrs.get("id"):
            self.ids.add(attrs["id"])
        if tag == "html":
            self.lang = attrs.get("lang")
        elif tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        elif tag == "link" and attrs.get("rel") not in (
            "next",
            "prev",
            "index",
            "search",
            "canonical",
        ):
            self.resources.append(attrs["href"])
        elif tag == "img":
            self.images.append(attrs)
        elif tag == "div" and "cell" in (attrs.get("class") or "").split():
            self.cells += 1
        self.resources += [
            attrs[name] for name in ("src", "srcset", "poster", "data") if attrs.get(name)
        ]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of the site, and how its build ended."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, str(ROOT / "tools/docs.py"), "build", "--out", str(folder)]
    return folder, subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)


@pytest.fixture(scope="session")
def site(built):
    folder, build = built
    assert build.returncode == 0, build.stderr
    return folder


@pytest.fixture(scope="session")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in sorted(site.rglob("*.html"))}


def test_the_site_builds_without_a_warning(built):
    _, build = built
    assert (build.returncode, build.stderr) == (0, "")


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear reader", encoding="utf-8")
    build = subprocess.run(
        [sys.executable, str(ROOT / "tools/docs.py"), "build", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert build.returncode == 1
    assert "not empty" in build.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.fixture
def sources(tmp_path):
    """What tools/docs.py would give to Sphinx."""
    spec = importlib.util.spec_from_file_location("docs_tool", ROOT / "tools/docs.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool.Site(tmp_path)


def test_links_are_turned_to_the_pages_of_the_site(sources):
    text = (
        "[a](07_context.ipynb#threads) [b](../ctxlab/gemm.py) "
        "[c](../LICENSE) [d](../tests/conftest.py)"
    )
    want = "[a](07_context.ipynb#threads) [b](api/gemm.md) [c](license.md) [d](tests-conftest.md)"
    assert sources.markdown(text, ROOT / "nbs/index.ipynb", None) == want
    for same in ("[a](#threads)", "[b](https://example.org/x)", "`f[0](x)`", "```\n[a](b)\n```"):
        assert sources.markdown(same, ROOT / "nbs/index.ipynb", None) == same
    assert not sources.faults


def test_a_link_that_leads_nowhere_is_a_fault(sources):
    sources.markdown("[a](99_absent.ipynb)", ROOT / "nbs/index.ipynb", None)
    assert sources.faults == ["nbs/index.ipynb: the link to 99_absent.ipynb leads nowhere"]


def test_names_in_code_lead_to_the_reference(sources):
    gemm = sources.reference.sources["ctxlab.gemm"]
    link = sources.reference.link
    assert (
        link("`Workspace.take`", None)
        == "{py:obj}`Workspace.take <ctxlab.workspace.Workspace.take>`"
    )
    assert link("`check_out`", gemm) == "{py:obj}`check_out <ctxlab.gemm.check_out>`"
    for plain in ("`scale`", "`np.float32`", "[`Workspace`](06_workspace.ipynb)", "``Workspace``"):
        assert link(plain, gemm) == plain


@by_notebook
def test_a_notebook_shows_what_it_does_not_hide(path, pages):
    page = pages[page_of(path)]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    shown = [
        source
        for source in sources
        if source and not re.match(r"#\| *(hide|default_exp)\b", source)
    ]
    assert page.cells == len(shown)
    text = re.sub(r"<[^>]*>", "", re.sub("<code.*?</code>", "", page.text))
    assert not re.search(r"^#\| *\w+", text, re.MULTILINE)


@by_notebook
def test_a_notebook_shows_its_plots_and_their_description(path, pages):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    images = pages[page_of(path)].images
    assert len(images) == sum("image/png" in output.get("data", {}) for output in outputs)
    assert all(re.search(r"\w \w", image["alt"]) for image in images)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_an_entry(name, pages):
    module = importlib.import_module(f"ctxlab.{name}")
    page = pages[f"api/{name}.html"]
    assert {f"ctxlab.{name}.{public}" for public in module.__all__} <= page.ids
    explained = re.search(r"Explained in <a [^>]*href=\"\.\./([^\"]+\.html)", page.text)
    assert explained[1] in {page_of(path) for path in NOTEBOOKS}
    has_code = any(map(callable, (getattr(module, public) for public in module.__all__)))
    assert (f"../_modules/ctxlab/{name.replace('.', '/')}.html" in page.links) == has_code


def test_one_page_tells_every_public_name_in_a_line(pages):
    page = pages["api/index.html"]
    shown = {unquote(link.partition("#")[2]) for link in page.links}
    for name in MODULES:
        module = importlib.import_module(f"ctxlab.{name}")
        assert {f"ctxlab.{name}.{public}" for public in module.__all__} <= shown
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page.text, re.DOTALL)
    texts = [[re.sub("<[^>]*>", "", c).strip() for c in re.split("</t[dh]>", row)] for row in rows]
    assert all(len(cells) == 3 and len(cells[1]) > 5 for cells in texts if cells[0] != "name")


@pytest.mark.parametrize("package", ["ctxlab", "ctxlab.models", "ctxlab.streaming", "ctxlab.audit"])
def test_the_face_shows_what_a_package_offers(package, pages):
    module, page = importlib.import_module(package), pages["api/face.html"]
    shown = re.sub(r"<[^>]*>", "", page.text)
    for name, home in module._HOMES.items():
        value = getattr(module, name)
        signature = r"\(" if inspect.isfunction(value) else ""
        assert re.search(rf"(?<![\w.]){package}\.{name}{signature}", shown), name
        # On a page of its own it has a table of its parameters.
        where = f"{package.removeprefix('ctxlab').lstrip('.')}.{home}".lstrip(".")
        full = f"ctxlab.{where}.{name}"
        assert f"{where.removeprefix('api/')}.html#{full}" in page.links


def test_every_claim_has_a_heading_with_its_rule(pages):
    from ctxlab.audit.claims import LEDGER

    page = pages["claims.html"]
    assert [claim.id for claim in LEDGER if claim.id not in page.ids] == []
    words = " ".join(html.unescape(re.sub(r"<[^>]*>", "", page.text)).split())
    for claim in LEDGER:
        assert f"{claim.notebook}.html" in page.links
        assert claim.rule.split(";")[0].split("'")[0].split("|")[0] in words, claim.id


def test_the_sidebar_leads_to_every_notebook_and_to_the_reference(pages):
    leads = {link.removeprefix("./") for link in pages["index.html"].links}
    assert {page_of(path) for path in NOTEBOOKS if path.stem != "index"} <= leads
    assert "api/index.html" in leads


def test_every_link_and_anchor_leads_somewhere(pages, site):
    dead = []
    for name, page in pages.items():
        for link in page.links + page.resources:
            if re.match(r"[a-z]+:", link):
                continue
            target, anchor = urldefrag(urljoin(name, link.partition("?")[0] or Path(name).name))
            if link.startswith("#"):
                target, anchor = name, link[1:]
            if not (site / unquote(target)).is_file():
                dead.append(f"{name}: {link}")
            elif anchor and target in pages and unquote(anchor) not in pages[target].ids:
                dead.append(f"{name}: {link} has no such anchor")
    assert not dead


def test_nothing_comes_from_the_network(pages, site):
    outside = re.compile(r"(?:[a-z]+:)?//", re.IGNORECASE)
    used = [(name, link) for name, page in pages.items() for link in page.resources]
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        used += [
            (sheet.name, link)
            for link in re.findall(r"(?:@import|url\()\s*['\"]?([^'\")\s]+)", text)
        ]
    assert not [(name, link) for name, link in used if outside.match(link)]


def test_a_reader_without_eyes_is_served_too(pages):
    for name, page in pages.items():
        assert page.lang == "en", name
        assert page.tags.count("h1") == (name != "search.html"), name  # there a script writes it
        assert re.search(r"<title>[^<]+</title>", page.text), name
        assert "#furo-main-content" in page.links, name  # the way past the sidebar
        assert all(image.get("alt") for image in page.images), name


# ---- In a browser

LEFT = "net::ERR_ABORTED"  # an icon that was still on its way when the test went to the next page

# What a page is once its formulas are set: counts of what is there, and of what is wrong.
LOOK = """async () => {
    if (window.MathJax) await MathJax.startup.promise;
    const all = (selector, wrong = () => true) =>
        [...document.querySelectorAll(selector)].filter(wrong);
    for (const image of all('img')) image.loading = 'eager';
    await Promise.all(all('img').map(image => image.decode()));
    return {
        formulas: all('.math').length,
        unset: all('.math', e => !e.querySelector('mjx-container svg path')).length,
        errors: all('[data-mjx-error], mjx-container [fill="red"]').length,
        empty: all('img', e => !e.naturalWidth).length,
        wide: all('article img', e => e.getBoundingClientRect().right > innerWidth + 1).length,
        overflow: Math.max(0, document.documentElement.scrollWidth - innerWidth),
        links: all('a[href]').map(a => a.href),
    };
}"""


@pytest.fixture(scope="module")
def served(site):
    """The address of the site on a server of its own."""
    with serving(site) as address:
        yield address


@pytest.fixture
def tab(browser):
    """A tab as narrow as a telephone, which notes what went wrong."""
    context = browser.new_context(viewport={"width": 400, "height": 800})
    page = context.new_page()
    page.faults = []
    note = page.faults.append
    page.on("requestfailed", lambda r: note(f"{r.failure}: {r.url}") if r.failure != LEFT else None)
    page.on("response", lambda r: note(f"{r.status}: {r.url}") if r.status >= 400 else None)
    page.on("pageerror", lambda error: note(f"{page.url}: {error}"))
    yield page
    context.close()


def test_a_browser_reaches_every_page_and_draws_it(tab, served, pages):
    todo, seen, formulas = [served + "index.html"], set(), 0
    while todo:
        url = todo.pop()
        if url in seen:
            continue
        seen.add(url)
        tab.goto(url)
        look = tab.evaluate(LOOK)
        links = {urldefrag(link).url for link in look.pop("links")}
        todo += [link for link in links if link.startswith(served)]
        formulas += look.pop("formulas")
        assert not any(look.values()), (url, look)
    assert {served + name for name in pages} - {served + "search.html"} <= seen
    assert formulas > 100
    assert all(url.startswith(served) for url in seen)
    assert not tab.faults


@pytest.mark.parametrize("start", ["http", "file"])
def test_the_search_finds(start, tab, served, site):
    base = served if start == "http" else site.as_uri() + "/"
    tab.goto(base + "index.html")
    tab.goto(base + "search.html?q=workspace")
    tab.wait_for_selector("ul.search li a")
    found = tab.eval_on_selector_all("ul.search li a", "all => all.map(a => a.href)")
    assert any("06_workspace.html" in url for url in found)
    assert any("api/workspace.html#ctxlab.workspace.Workspace" in url for url in found)
    if (
        start == "http"
    ):  # a page opened as a file may not read others: there it finds without excerpts
        tab.wait_for_selector("ul.search li p")
        assert not tab.faults


@pytest.mark.parametrize("id", ["site-cov", "pow2", "all-archs"])
def test_the_search_finds_a_claim_by_its_id(id, tab, served):
    tab.goto(f"{served}search.html?q={id}")
    tab.wait_for_selector("ul.search li a")
    found = tab.eval_on_selector_all("ul.search li a", "all => all.map(a => a.href)")
    assert any(f"claims.html#{id}" in url for url in found), found


@pytest.mark.parametrize("width", [820, 1440])
def test_the_longest_lines_of_code_fit(width, tab, served, pages):
    longest = {}
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        lengths = [len(line) for source in sources for line in source.splitlines()]
        longest[page_of(path)] = max(n for n in lengths if n <= 100)  # that of the formatter
    tab.set_viewport_size({"width": width, "height": 900})
    wide = """all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)
        .filter(text => Math.max(...text.split('\\n').map(line => line.length)) <= 100)"""
    for name in sorted(longest, key=longest.get)[-5:]:
        tab.goto(served + name)
        assert tab.eval_on_selector_all("div.cell_input pre", wide) == [], name


def test_what_nobody_wrote_is_not_found(tab, served):
    tab.goto(served + "search.html?q=xylophone")
    tab.wait_for_function(
        "document.querySelector('.search-summary')?.textContent.includes('did not match')"
    )
    assert tab.query_selector("ul.search li a") is None
