"""Build the web site: the notebooks with their stored outputs, a page of reference for each module.

Nothing is executed: a page shows what the notebook stores. The reference is read from the sources
of the modules, where a comment behind a parameter says what it means.
"""

import argparse
import ast
import importlib
import inspect
import io
import os
import re
import shutil
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import nbformat
from nbformat import NotebookNode
from sphinx.cmd.build import build_main

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS, PACKAGE, CONFIG = ROOT / "nbs", ROOT / "ctxlab", ROOT / "docs"
INDEX = NOTEBOOKS / "index.ipynb"

ROOMS = ("models", "streaming", "audit")  # packages in the package
# The sidebar: a group for each folder of notebooks, the lowest room first.
GROUPS = {
    "Foundations": ".",
    "Models": "models",
    "Streaming": "streaming",
    "Audit": "audit",
    "Peers": "peers",
}
PROJECT = [
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/manifest.md",
    "LICENSE",
]  # with a page each; so has what a notebook links to

HIDDEN = {"hide", "default_exp"}  # cells with one of these have no place on a page
DIRECTIVES = re.compile(r"\A(?:[ \t]*#[ \t]*\|.*\n?|\s*\n)+")
DIRECTIVE = re.compile(r"#[ \t]*\|[ \t]*([\w-]+):?[ \t]*(.*)")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
NAME = re.compile(
    r"(?<![`\[{}\\])`([A-Za-z_][\w.]*)(\(\))?`(?![`\]])"
)  # in inline code, and not in a link
LABEL = re.compile(r"""\b(?:set_)?(title|xlabel|ylabel)(?:=|\()\s*f?(["'])(.+?)\2""")
IMAGES = {".png", ".svg", ".jpg"}


class Fault(Exception):
    """What is wrong in the sources, for a person to mend."""


# ---- What the sources say


class Param(NamedTuple):
    """A row in a table of parameters or fields."""

    name: str
    type: str
    default: str
    says: str


class Source:
    """A module: its syntax tree, its public names, and its comments by line."""

    def __init__(self, path: Path):
        self.path = path.relative_to(ROOT).as_posix()
        self.name = self.path.removesuffix(".py").replace("/", ".")
        self.page = "api/" + self.name.removeprefix("ctxlab.")
        self.module = importlib.import_module(self.name)
        self.public: list[str] = self.module.__all__
        text = inspect.getsource(self.module)
        self.tree = ast.parse(text)
        self.says = ast.get_docstring(self.tree) or ""
        self.notebook = re.search(r"File to edit: [./]*/nbs/(\S+)\.ipynb", text)[1]
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        self.comments = {
            t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT
        }

    def has_code(self) -> bool:
        """Is one of the public names a class or a function?"""
        kinds = ast.ClassDef | ast.FunctionDef
        return any(isinstance(self.definition(name), kinds) for name in self.public)

    def definition(self, name: str) -> ast.stmt:
        found = [node for node in self.tree.body if name in defined(node)]
        if not found:
            raise Fault(f"{self.name}: {name} is public, but nothing defines it")
        return found[0]

    def comment(self, node: ast.AST) -> str:
        """The comment behind the last line of a piece of code, or else behind its first."""
        return self.comments.get(node.end_lineno) or self.comments.get(node.lineno) or ""


def defined(node: ast.stmt) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else [])
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def is_member(name: str, node: ast.stmt) -> bool:
    """Is this a member to show? A special method is, where it has something to say."""
    if isinstance(node, ast.AnnAssign):
        return False  # a field: it stands in the table
    if name.startswith("__") and isinstance(node, ast.FunctionDef):
        return name != "__init__" and ast.get_docstring(node) is not None
    return not name.startswith("_")


def escape(text: str) -> str:
    """Plain text with its inline code, as Markdown."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([\\*_<>$|\[\]])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def code(text: str) -> str:
    """Inline code that may stand in a table."""
    return "`" + text.replace("|", r"\|") + "`" if text else ""


class Reference:
    """The public names of the package, and the pages made of them."""

    def __init__(self):
        paths = sorted(PACKAGE.rglob("[!_]*.py"))
        self.sources = {source.name: source for source in map(Source, paths)}
        self.targets = set(self.sources)  # everything that can be linked to
        for source in self.sources.values():
            for name in source.public:
                self.targets.add(f"{source.name}.{name}")
                if isinstance(source.definition(name), ast.ClassDef):
                    self.targets |= {
                        f"{source.name}.{name}.{m}" for m, _, _ in self.members(name, source)
                    }

    def explains(self, notebook: str) -> Source | None:
        """The module that a notebook exports to."""
        return next((s for s in self.sources.values() if s.notebook == notebook), None)

    def drawn(self, code: str) -> str | None:
        """What the package says about a plot that it draws itself."""
        called = set(re.findall(r"\b_plot_\w+(?=\()", code))
        for source in self.sources.values():
            for node in source.tree.body:
                if isinstance(node, ast.FunctionDef) and node.name in called:
                    return ast.get_docstring(node).rstrip(".")
        return None

    def link(self, text: str, source: Source | None) -> str:
        """Markdown whose inline code leads to the names of this package, those of `source` first.

        Plain lower-case words stay as they are: in a text about norms, `scale` is no function.
        """

        def role(match: re.Match) -> str:
            name, call = match[1], match[2] or ""
            found = [t for t in self.targets if t == name or t.endswith("." + name)]
            own = [t for t in found if source and t.startswith(source.name + ".")]
            best = own or found
            is_clear = len(best) == 1 and re.search(r"[A-Z_.]", name)
            return f"{{py:obj}}`{name}{call} <{best[0]}>`" if is_clear else match[0]

        return NAME.sub(role, text)

    def prose(self, text: str, source: Source) -> str:
        """A docstring or comment as Markdown."""
        return self.link(escape(text), source)

    def cell(self, text: str, source: Source) -> str:
        """A docstring or comment as Markdown that may stand in a table."""
        return re.sub(r"(?<!\\)\|", r"\\|", self.prose(text.replace("\n", " "), source))

    # Types and signatures stand as the source has them: `np.ndarray`, not `numpy.ndarray`.

    def full_name(self, name: str, source: Source) -> str:
        """The full name of a public name that `source` defines or imports; others as they are."""
        value = getattr(source.module, name, None)
        for home in (source, *self.sources.values()):
            if value is not None and name in home.public and getattr(home.module, name) is value:
                return f"{home.name}.{name}"
        return name

    def type(self, node: ast.expr | None, source: Source, full: bool = False) -> str:
        """A type as text; `full` for a signature, where Sphinx needs full names to link them."""
        if node is None:
            return ""
        text = re.sub(
            r"'([A-Z]\w*)'", r"\1", ast.unparse(node)
        )  # in quotes: a name that is defined later
        if not full:
            return text
        return re.sub(r"(?<![\w.'])[A-Z]\w*(?![\w'])", lambda m: self.full_name(m[0], source), text)

    def params(self, node: ast.FunctionDef, source: Source) -> list[Param]:
        """The parameters of a function, each with the comment behind it."""
        args = node.args
        plain = args.posonlyargs + args.args
        rows = list(
            zip(plain, [None] * (len(plain) - len(args.defaults)) + args.defaults, strict=True)
        )
        rows += [(args.vararg, None)] * bool(args.vararg)
        rows += zip(args.kwonlyargs, args.kw_defaults, strict=True)
        rows += [(args.kwarg, None)] * bool(args.kwarg)
        # A comment speaks of what ends last on its line: a parameter, or the result.
        last = {(default or arg).end_lineno: arg for arg, default in rows}
        if node.returns is not None:
            last[node.returns.end_lineno] = node.returns
        stars = {args.vararg: "*", args.kwarg: "**"}
        return [
            Param(
                stars.get(arg, "") + arg.arg,
                self.type(arg.annotation, source),
                "" if default is None else ast.unparse(default),
                source.comment(default or arg) if arg in last.values() else "",
            )
            for arg, default in rows
            if arg.arg not in ("self", "cls")
        ]

    def signature(self, node: ast.FunctionDef, source: Source) -> str:
        args = ast.parse(ast.unparse(node)).body[0].args  # a copy, to write the full names into
        for arg in ast.walk(args):
            if isinstance(arg, ast.arg) and arg.annotation:
                arg.annotation = ast.Name(self.type(arg.annotation, source, full=True))
        args.args = [arg for arg in args.args if arg.arg not in ("self", "cls")]
        returns = self.type(node.returns, source, full=True)
        return f"({ast.unparse(args)})" + (
            f" -> {returns}" if returns and node.name != "__init__" else ""
        )

    def bases(self, name: str, source: Source) -> Iterator[tuple[str, Source]]:
        """A class of this package and those that it inherits from."""
        for base in getattr(source.module, name).__mro__:
            if base.__module__ in self.sources:
                yield base.__name__, self.sources[base.__module__]

    def members(self, name: str, source: Source) -> Iterator[tuple[str, ast.stmt, Source]]:
        """The public members of a class; those of its private bases count as its own."""
        seen: set[str] = set()
        for base, home in self.bases(name, source):
            if base == name or base.startswith("_"):
                for node in home.definition(base).body:
                    for member in sorted(defined(node) - seen):
                        if is_member(member, node):
                            seen.add(member)
                            yield member, node, home

    def constructor(self, name: str, source: Source) -> tuple[list[Param], str]:
        """What a class is made of: its fields, or its parameters, and the signature."""
        for base, home in self.bases(name, source):
            body = home.definition(base).body
            for node in body:
                if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                    return self.params(node, home), self.signature(node, home)
            nodes = [node for node in body if isinstance(node, ast.AnnAssign)]
            if nodes:
                fields = [
                    Param(
                        node.target.id,
                        self.type(node.annotation, home),
                        "" if node.value is None else ast.unparse(node.value),
                        home.comment(node),
                    )
                    for node in nodes
                ]
                args = (f"{p.name}: {p.type}" + f" = {p.default}" * bool(p.default) for p in fields)
                return fields, f"({', '.join(args)})"
        return [], "()"

    # ---- The pages, as Markdown with Sphinx's directives for Python

    def table(self, params: list[Param], source: Source) -> Iterator[str]:
        if any(p.says for p in params):
            default = any(p.default for p in params)
            yield f"| name | type |{' default |' * default} meaning |"
            yield f"|---|---|---|{'---|' * default}"
            for p in params:
                name = p.name if p.name == "returns" else code(p.name)
                yield (
                    f"| {name} | {code(p.type)} |{f' {code(p.default)} |' * default} "
                    f"{self.cell(p.says, source)} |"
                )

    def function(
        self, kind: str, name: str, node: ast.FunctionDef, source: Source, fence: str
    ) -> Iterator[str]:
        marks = {ast.unparse(decorator) for decorator in node.decorator_list}
        if "property" in marks:
            yield f"{fence}{{py:property}} {name}"
            if node.returns is not None:
                yield f":type: {self.type(node.returns, source, full=True)}"
        else:
            yield f"{fence}{{py:{kind}}} {name}{self.signature(node, source)}"
            marks &= {"staticmethod", "classmethod", "abstractmethod"}
            yield from (f":{mark}:" for mark in sorted(marks))
        yield f"\n{self.prose(ast.get_docstring(node) or '', source)}\n"
        params = self.params(node, source)
        says = source.comments.get(node.returns.end_lineno, "") if node.returns is not None else ""
        if says and any(p.says for p in params):
            params.append(Param("returns", self.type(node.returns, source), "", says))
        elif says:  # behind a definition of one line: it may speak of anything there
            yield f"*{self.prose(says, source).rstrip()}*"
        yield from self.table(params, source)
        yield fence

    def value(
        self, kind: str, name: str, node: ast.Assign | ast.AnnAssign, source: Source, fence: str
    ) -> Iterator[str]:
        """A constant, a type alias, or an attribute of a class."""
        yield f"{fence}{{py:{kind}}} {name}"
        if isinstance(node, ast.AnnAssign):
            yield f":type: {self.type(node.annotation, source, full=True)}"
        one_of_several = isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name)
        text = ast.unparse(node.value)
        if len(text) <= 90 and not one_of_several:
            yield f":{'canonical' if kind == 'type' else 'value'}: {text}"
        yield f"\n{self.prose(source.comment(node), source)}\n{fence}"

    def cls(self, name: str, node: ast.ClassDef, source: Source) -> Iterator[str]:
        params, signature = self.constructor(name, source)
        if issubclass(getattr(source.module, name), Exception):
            yield f"`````{{py:exception}} {name}\n"
        else:
            yield f"`````{{py:class}} {name}{signature}\n"
        yield self.prose(ast.get_docstring(node) or "", source) + "\n"
        bases = [
            f"{{py:obj}}`{base} <{home.name}.{base}>`"
            for base, home in self.bases(name, source)
            if base != name and base in home.public
        ]
        if bases:
            yield f"Inherits from {', '.join(bases)}.\n"
        yield from self.table(params, source)
        for member, inner, home in self.members(name, source):
            if isinstance(inner, ast.FunctionDef):
                yield from self.function("method", member, inner, home, "````")
            else:
                yield from self.value("attribute", member, inner, home, "````")
        yield "`````"

    def page(self, source: Source) -> str:
        """All public names of a module, in the order of the notebook."""
        # Sphinx writes a page with the source of a module if that has a function or a class.
        at = f"../_modules/{source.path.removesuffix('.py')}.html"
        link = f' Source: <a href="{at}">{source.path}</a>.' if source.has_code() else ""
        lines = [
            f"# {source.name}\n",
            f"> {self.prose(source.says, source)}\n",
            f"```{{py:module}} {source.name}\n```\n",
            f"Explained in [{source.notebook}](../{source.notebook}.ipynb).{link}\n",
            *["It offers no names to import.\n"] * (not source.public),
        ]
        for name in source.public:
            node = source.definition(name)
            if isinstance(node, ast.ClassDef):
                lines += self.cls(name, node, source)
            elif isinstance(node, ast.FunctionDef):
                lines += self.function("function", name, node, source, "`````")
            else:
                is_alias = name[0].isupper() and not name.isupper()
                lines += self.value("type" if is_alias else "data", name, node, source, "`````")
        return "\n".join(lines) + "\n"

    def summary(self, name: str, source: Source) -> str:
        """What a public name is, in one line."""
        node = source.definition(name)
        is_documented = isinstance(node, ast.ClassDef | ast.FunctionDef)
        says = ast.get_docstring(node) or "" if is_documented else source.comment(node)
        return self.cell(says.partition("\n\n")[0], source)

    def contents(self) -> str:
        """All public names on one page: by room and module, a line each."""
        sources = sorted(self.sources.values(), key=lambda source: place(Path(source.notebook)))
        lines = [
            "# Reference\n",
            "> Every public name in a line\n",
            "All names in the order of the alphabet are in the {ref}`index <genindex>`; "
            'all sources are <a href="../_modules/index.html">here</a>.\n',
        ]
        room = ""
        for source in sources:
            title = list(GROUPS)[place(Path(source.notebook))[0]]
            if title != room:
                room = title
                lines.append(f"## {room}\n")
            explained = f"explained in [{source.notebook}](../{source.notebook}.ipynb)"
            lines.append(f"### [`{source.name}`](../{source.page}.md)\n")
            lines.append(f"{self.prose(source.says, source)} ({explained}).\n")
            lines += ["| name | says |\n|---|---|"] * bool(source.public)
            for name in source.public:
                link = f"{{py:obj}}`{name} <{source.name}.{name}>`"
                lines.append(f"| {link} | {self.summary(name, source)} |")
            lines.append("")
        pages = [f"/{source.page}" for source in sources]
        return "\n".join([*lines, toctree("", pages)]) + "\n"

    def face(self) -> str:
        """The names to find first: those of the package and of its rooms, with their signatures."""
        lines = [
            "# The face\n",
            "> What the package and its rooms offer by name, with signatures\n",
            "These few names are enough to begin with. Each is loaded when it is first used. "
            "[Every public name](index.md) has a page of its own.\n",
        ]
        for package in ("ctxlab", *(f"ctxlab.{room}" for room in ROOMS)):
            module = importlib.import_module(package)
            says = self.link(escape(inspect.getdoc(module).partition("\n")[0]), None)
            lines += [f"## `{package}`\n", f"{says}\n"]
            for name, home in sorted(module._HOMES.items()):
                lines += self.offer(f"{package}.{name}", self.sources[f"{package}.{home}"])
        return "\n".join(lines) + "\n"

    def offer(self, full: str, source: Source) -> Iterator[str]:
        """A name of the face: its signature, what it is, and where all about it stands."""
        name = full.rpartition(".")[2]
        node, kind, signature = source.definition(name), "data", ""
        if isinstance(node, ast.ClassDef):
            kind, signature = "class", self.constructor(name, source)[1]
        elif isinstance(node, ast.FunctionDef):
            kind, signature = "function", self.signature(node, source)
        yield f"`````{{py:{kind}}} {full}{signature}\n:no-index:\n"
        yield f"{self.summary(name, source)} More: {{py:obj}}`{source.name}.{name}`\n`````"


# ---- Notebooks and other files as pages


def toctree(caption: str, pages: list[str]) -> str:
    options = [":hidden:"] + [f":caption: {caption}"] * bool(caption)
    return "\n".join(["```{toctree}", *options, "", *pages, "```"])


def place(notebook: Path) -> tuple[int, str]:
    """Where a notebook stands in the series; its path is relative to the folder of notebooks."""
    rooms = list(GROUPS.values())
    room = notebook.parent.as_posix()
    if room not in rooms:
        raise Fault(f"nbs/{notebook}: this folder is none of the rooms {', '.join(rooms[1:])}")
    if not re.match(r"\d+", notebook.stem):
        raise Fault(f"nbs/{notebook}: its name must begin with the number of its place")
    return rooms.index(room), notebook.stem


def sidebar(notebooks: list[Path], project: list[str]) -> str:
    """The table of contents; the paths of notebooks are relative to their folder."""
    groups: dict[str, list[str]] = {name: [] for name in GROUPS}
    for path in sorted(notebooks, key=place):
        groups[list(GROUPS)[place(path)[0]]].append(path.with_suffix("").as_posix())
    groups |= {"Reference": ["api/face", "api/index", "claims"], "Project": project}
    return "\n\n".join(toctree(name, pages) for name, pages in groups.items() if pages)


def claims() -> str:
    """A page with every claim under its id, so that the search finds an id."""
    from ctxlab.audit.claims import LEDGER

    lines = [
        "# Claims\n",
        "> Every claim that `ctxlab report` audits, under the id that the report gives it\n",
    ]
    for claim in LEDGER:
        notebook = f"[{claim.notebook}]({claim.notebook}.ipynb)"
        lines += [
            f"## {claim.id}\n",
            f"{escape(claim.says)}\n",
            f"- The rule: {escape(claim.rule)}.",
            f"- It stands in: {escape(claim.where)}.",
            f"- Explained in {notebook}, under {escape(claim.section)}.\n",
        ]
    return "\n".join(lines)


def split_directives(source: str) -> tuple[dict[str, str], str]:
    """The `#|` lines at the head of a cell as {name: value}, and the rest of it."""
    head = DIRECTIVES.match(source)
    return (
        (dict(DIRECTIVE.findall(head[0])), source[head.end() :].strip())
        if head
        else ({}, source.strip())
    )


def alt_text(source: str, heading: str) -> str:
    """What a plot shows, in the words of its title and axes; `heading` is for one without."""
    words: dict[str, list[str]] = {"title": [], "xlabel": [], "ylabel": []}
    for kind, _, text in LABEL.findall(source):
        # Of an f-string, the parts between commas and colons that hold no value.
        text = ", ".join(
            part for part in re.split(r"[,:] *", text.replace("\\n", " ")) if "{" not in part
        )
        if text and text not in words[kind]:
            words[kind].append(text)
    parts = ["Plot: " + "; ".join(words["title"] or [heading])]
    parts += [
        f"{axis}: {'; '.join(words[kind])}"
        for kind, axis in (("xlabel", "across"), ("ylabel", "up"))
        if words[kind]
    ]
    return ". ".join(parts)


def page_name(path: Path) -> str:
    return re.sub(r"\W+", "-", path.relative_to(ROOT).with_suffix("").as_posix()).lower()


def from_page(target: str, origin: Path) -> str:
    """A page as a link from the page of the file `origin`: only notebooks stand in folders."""
    folder = origin.parent.relative_to(NOTEBOOKS) if origin.is_relative_to(NOTEBOOKS) else "."
    return Path(os.path.relpath(target, folder)).as_posix()


class Site:
    """The sources of all pages, for Sphinx, in one folder."""

    def __init__(self, folder: Path):
        self.folder, self.reference = folder, Reference()
        self.notebooks = sorted(
            path
            for path in NOTEBOOKS.rglob("*.ipynb")
            if path != INDEX and ".ipynb_checkpoints" not in path.parts
        )
        self.project = {ROOT / name: page_name(ROOT / name) for name in PROJECT}
        self.faults: list[str] = []

    def retarget(self, match: re.Match, origin: Path) -> str:
        """Where a link in the file `origin` leads to on the site."""
        target, anchor = (origin.parent / match[1]).resolve(), match[2] or ""
        if target == INDEX or target in self.notebooks:
            return from_page(target.relative_to(NOTEBOOKS).as_posix(), origin) + anchor
        for source in self.reference.sources.values():
            if target == ROOT / source.path:
                return from_page(f"{source.page}.md", origin)
        if target.is_file() and target.is_relative_to(ROOT):
            if target.suffix in IMAGES:
                return from_page(Path(shutil.copy(target, self.folder)).name, origin)
            page = self.project.setdefault(target, page_name(target))
            return from_page(f"{page}.md", origin) + anchor
        self.faults.append(f"{origin.relative_to(ROOT)}: the link to {match[1]} leads nowhere")
        return match[0]

    def markdown(self, text: str, origin: Path, source: Source | None) -> str:
        """Markdown with links that hold on the site; code blocks and headings stay as they are."""
        blocks = re.split(r"(^```.*?^```|^#.*?$)", text, flags=re.MULTILINE | re.DOTALL)
        for i in range(0, len(blocks), 2):
            spans = re.split(r"(`[^`]*`)", blocks[i])
            spans[::2] = [
                LINK.sub(lambda match: self.retarget(match, origin), span) for span in spans[::2]
            ]
            blocks[i] = self.reference.link("".join(spans), source)
        return "".join(blocks)

    def prepare(self, cell: NotebookNode, heading: str) -> bool:
        """Make a cell of code ready for its page; False for a cell that is not shown."""
        directives, cell.source = split_directives(cell.source)
        if not cell.source or HIDDEN & directives.keys():
            return False
        tags = ["export"] * ("export" in directives) + ["remove-input"] * (
            directives.get("echo") == "false"
        )
        cell.metadata = nbformat.from_dict({"tags": tags})
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                alt = directives.get("fig-alt", "").strip("'\"") or alt_text(
                    cell.source, self.reference.drawn(cell.source) or heading
                )
                width = output.metadata.get("image/png", {}).get("width")
                cell.metadata.mystnb = {
                    "image": {"alt": alt} | ({"width": f"{width}px"} if width else {})
                }
        return True

    def notebook(self, path: Path) -> NotebookNode:
        """A notebook as its page shows it."""
        nb = nbformat.read(path, as_version=4)
        source = self.reference.explains(path.relative_to(NOTEBOOKS).with_suffix("").as_posix())
        heading, cells = path.stem, []
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                heading = [heading, *re.findall(r"^#+ (.*)$", cell.source, re.MULTILINE)][-1]
                cell.source = self.markdown(cell.source, path, source)
            elif cell.cell_type != "code" or not self.prepare(cell, heading):
                continue
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "text/markdown" in data:
                    data["text/markdown"] = self.markdown(data["text/markdown"], path, source)
            cells.append(cell)
        if source and cells:
            cells[0].source += f"\n\nModule: [`{source.name}`]({from_page(source.page, path)}.md)."
        nb.cells = cells
        nb.metadata.language_info = {"name": "python", "pygments_lexer": "python"}
        return nb

    def file(self, path: Path) -> str:
        """The page of a file of the repository that is no notebook."""
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            return self.markdown(text, path, None)
        language = "python" if path.suffix == ".py" else "none"
        return f"# {path.name.capitalize()}\n\n````{{code-block}} {language}\n{text}\n````\n"

    def write(self) -> None:
        notebooks = {path: self.notebook(path) for path in (INDEX, *self.notebooks)}
        files: dict[str, str] = {}
        while todo := [path for path, page in self.project.items() if page not in files]:
            files |= {
                self.project[path]: self.file(path) for path in todo
            }  # which may link to more files
        for source in self.reference.sources.values():
            files[source.page] = self.reference.page(source)
        files["api/index"] = self.reference.contents()
        files["api/face"] = self.reference.face()
        files["claims"] = claims()
        if self.faults:
            raise Fault("\n".join(self.faults))
        paths = [path.relative_to(NOTEBOOKS) for path in self.notebooks]
        contents = sidebar(paths, list(self.project.values()))
        notebooks[INDEX].cells.append(nbformat.v4.new_markdown_cell(contents))
        for path, nb in notebooks.items():
            page = self.folder / path.relative_to(NOTEBOOKS)
            page.parent.mkdir(exist_ok=True)
            nbformat.write(nb, page)
        (self.folder / "api").mkdir()
        for page, text in files.items():
            (self.folder / f"{page}.md").write_text(text, encoding="utf-8")


def build(out: Path) -> None:
    """Write the site to `out`; after a fault the site of before is still there."""
    if out.exists() and any(out.iterdir()) and not (out / ".buildinfo").is_file():
        raise Fault(f"{out}: not empty, and no site that was built before; name another folder")
    with TemporaryDirectory() as scratch:
        pages, made = Path(scratch) / "pages", Path(scratch) / "site"
        pages.mkdir()
        Site(pages).write()
        options = [
            "-q",
            "-W",
            "--keep-going",
            "-c",
            str(CONFIG),
            "-d",
            str(Path(scratch) / "doctrees"),
        ]
        if build_main([*options, str(pages), str(made)]):
            raise Fault("Sphinx found what is listed above")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)
    print(f"{out / 'index.html'}: {len(list(out.rglob('*.html')))} pages")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="write the site from what the notebooks store")
    command.add_argument(
        "--out", type=Path, default=ROOT / "_site", help="the folder (default: _site)"
    )
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    out = args.out.resolve()
    os.chdir(ROOT)
    try:
        build(out)
    except Fault as fault:
        sys.exit(str(fault))


if __name__ == "__main__":
    main()
