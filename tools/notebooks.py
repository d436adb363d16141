"""Execute the notebooks, build README.md from the index, and check that what is stored is current.

nbdev_test runs every notebook but stores no output, and nbdev_readme needs Quarto: this does both.
"""

import argparse
import os
import re
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import nbformat
from execnb.nbio import nb2str, read_nb, write_nb
from execnb.shell import CaptureShell
from nbconvert import MarkdownExporter
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor, extract_directives, nb_lang
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
README, IMAGES = ROOT / "README.md", ROOT / "docs/readme"
HIDDEN = {
    "hide",
    "default_exp",
    "export",
    "exporti",
}  # cells with one of these are not for the README
DIRECTIVES = re.compile(r"\A(\s*#\s*\|.*\n?)+")
LINK = re.compile(
    r"(?<=\]\()(?!/)[^)\s#:]+"
)  # the target without its anchor; no URL, no absolute path
EXPORT = Config(
    {
        # An HTML table would not survive in the README, and a second format a second file.
        "NbConvertBase": {"display_data_priority": ["text/markdown", "image/png", "text/plain"]},
        "ExtractOutputPreprocessor": {"extract_output_types": {"image/png"}},
    }
)


def notebooks():
    return sorted(path.resolve() for path in nbglob(as_path=True))


def clean(nb):
    """What nbdev_clean does to a notebook, in memory and with the project's settings."""
    cfg = get_config()
    keep = [cfg.get(f"allowed_{kind}metadata_keys").split() for kind in ("", "cell_")]
    clean_nb(nb, cfg.clear_all, *keep, clean_ids=cfg.clean_ids)
    return nb


def says(directives, name, value):
    """Is there a directive `#| name: value`?"""
    return directives.get(f"{name}:", [""])[0].lower() == value


def is_skipped(cell, flags):
    """Does nbdev_test pass this cell over?"""
    directives = extract_directives(cell, remove=False)
    return (
        cell.cell_type != "code"
        or "nbdev_export" + "(" in cell.source
        or says(directives, "eval", "false")
        or bool(flags & directives.keys())
    )


def is_excluded(path):
    """Does nbdev_test pass the whole notebook over?"""
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    return nb_lang(nb) != "python" or str(nb.frontmatter_.get("skip_exec", "")).lower() == "true"


def run_notebook(path, flags):
    """Execute `path` and store its outputs; on an error leave the file alone and exit."""
    start, nb = time.time(), read_nb(path)
    os.chdir(path.parent)
    sys.path.insert(0, str(ROOT))
    shell = CaptureShell(
        path, mpl_format="png"
    )  # Jupyter's default; execnb's would be twice as wide
    for cell in nb.cells:
        if is_skipped(cell, flags):
            continue  # with the outputs of the last time it ran
        shell._cell_idx = cell.idx_ + 1  # names the cell in the traceback
        # Warnings and progress bars are not for the page: stderr goes to the terminal.
        outputs = shell.run(cell.source, stderr=False)
        if shell.exc:
            sys.exit(shell.prettytb(path))
        cell.outputs = list(outputs)
    write_nb(clean(nb), path)
    print(f"{path.name}: executed in {time.time() - start:.1f} s", flush=True)


def execute(names, slow):
    """Execute the named notebooks, or all of them, and stop at the first error."""
    flags = set() if slow else set(get_config().tst_flags.split())
    for path in names or notebooks():
        # A notebook of long measurements is started on purpose: by its name, and with --slow.
        if is_excluded(path) and not (names and slow):
            print(f"{path.name}: skipped, as its front matter says", flush=True)
            continue
        # A process of its own, so that no notebook leans on what another one imported or changed.
        job = get_context("spawn").Process(target=run_notebook, args=(path, flags))
        job.start()
        job.join()
        if job.exitcode:
            sys.exit(f"{path.name}: stopped with exit code {job.exitcode}; the file is as it was")


def shown(cells):
    """The cells that the README shows, without their directives."""
    for cell in cells:
        directives = extract_directives(cell, remove=False) if cell.cell_type == "code" else {}
        if (
            cell.cell_type == "raw"
            or HIDDEN & directives.keys()
            or "nbdev_export" + "(" in cell.source
        ):
            continue
        if cell.cell_type == "code":
            cell.source = DIRECTIVES.sub("", cell.source).strip()
            cell.metadata["transient"] = {"remove_source": says(directives, "echo", "false")}
            cell.metadata["alt"] = " ".join(directives.get("fig-alt:", ["plot"])).strip("'\"")
        yield cell


def build_readme():
    """README.md as text, and its images as {path: bytes}."""
    source = ROOT / get_config().nbs_path / get_config().readme_nb
    nb = nbformat.read(source, as_version=4)
    nb.cells = list(shown(nb.cells))
    nb.metadata["language_info"] = {"name": "python"}  # nbdev_clean removes it; the fences need it
    alts = {}
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                # Numbered in their order, not by their cell, so that no edit renames them.
                output.metadata["filename"] = name = f"{source.stem}-{len(alts) + 1}.png"
                alts[name] = cell.metadata["alt"]
    folder = IMAGES.relative_to(ROOT).as_posix()
    text, resources = MarkdownExporter(config=EXPORT).from_notebook_node(
        nb, {"output_files_dir": folder}
    )
    for name, alt in alts.items():
        text = text.replace(f"![png]({folder}/{name})", f"![{alt}]({folder}/{name})")

    def from_root(link):
        """A link that holds in the notebook's folder, as it must be written in the root."""
        target = source.parent / link[0]
        return Path(os.path.relpath(target, ROOT)).as_posix() if target.exists() else link[0]

    text = re.sub(r"\n([ \t]*\n){2,}", "\n\n", LINK.sub(from_root, text)).strip() + "\n"
    return text, {ROOT / name: data for name, data in resources["outputs"].items()}


def stored_images():
    """The images in the README's folder as they are now, as {path: bytes}."""
    return {path: path.read_bytes() for path in IMAGES.glob("*.png")}


def readme():
    """Write README.md and its images, and remove the images that it no longer shows."""
    text, images = build_readme()
    README.write_text(text, encoding="utf-8")
    for path in stored_images().keys() - images.keys():
        path.unlink()
    for path, data in images.items():
        IMAGES.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    print(f"README.md: {len(text.splitlines())} lines, {len(images)} images")


def notebook_faults(path):
    nb = read_nb(path)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    if code and not any(cell.outputs for cell in code):
        yield "no outputs stored: run tools/notebooks.py execute"
    for cell in code:
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {cell.id} stores an error, {output.ename}: {output.evalue}"
            elif output.get("name") == "stderr":
                yield f"cell {cell.id} stores stderr: run tools/notebooks.py execute"
    if nb2str(clean(nb)) != path.read_text(encoding="utf-8"):
        yield "not clean: run nbdev_clean"


def readme_faults():
    text, images = build_readme()
    if not README.exists() or README.read_text(encoding="utf-8") != text:
        yield README, "not what the index gives: run tools/notebooks.py readme"
    stored = stored_images()
    for path in sorted(images.keys() | stored.keys()):
        if images.get(path) != stored.get(path):
            yield path, "not the image of the index: run tools/notebooks.py readme"


def check():
    """Print every fault, one a line, and exit with 1 when there is one."""
    paths = notebooks()
    faults = [(path, fault) for path in paths for fault in notebook_faults(path)] + list(
        readme_faults()
    )
    for path, fault in faults:
        print(f"{path.relative_to(ROOT)}: {fault}")
    if faults:
        sys.exit(1)
    print(f"{len(paths)} notebooks and README.md: clean, executed and current")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("execute", help="run notebooks and store their outputs")
    run.add_argument(
        "names", nargs="*", metavar="NOTEBOOK", help="default: all, in the order of their names"
    )
    run.add_argument("--slow", action="store_true", help="run the cells marked slow as well")
    commands.add_parser("readme", help="write README.md from the index notebook")
    commands.add_parser(
        "check", help="fail if a notebook or README.md is not clean, executed and current"
    )
    args = parser.parse_args()
    names = [Path(name).resolve() for name in getattr(args, "names", [])]
    for name in names:
        if not name.is_file():
            parser.error(f"no such notebook: {name}")
    os.chdir(ROOT)  # where nbdev looks for settings.ini
    if args.command == "execute":
        execute(names, args.slow)
    else:
        {"readme": readme, "check": check}[args.command]()


if __name__ == "__main__":
    main()
