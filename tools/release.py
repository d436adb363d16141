"""Check that what would be released is what its version says: files, archives, and a wheel alone.

Nothing is published. `check` wants a tagged and clean tree; `check --draft` is for every other day.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
# Files of the repository that no archive needs: they serve a clone.
CLONE_ONLY = (".ci/", ".github/", ".gitattributes", ".gitignore")
# Imports every module that is installed but those that need an extra or pytest; prints the number.
EACH_MODULE = """
import importlib, pkgutil, ctxlab
count = 0
for found in pkgutil.walk_packages(ctxlab.__path__, "ctxlab."):
    name = found.name.rpartition(".")[2]
    if name not in ("distributed", "pytest_plugin", "__main__"):
        importlib.import_module(found.name)
        count += 1
print(count)
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """The output of a command; exits with what it printed if it fails."""
    words = [str(word) for word in command]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        printed = f"{done.stdout}{done.stderr}"[-3000:]
        sys.exit(f"{' '.join(words)}: exit code {done.returncode}\n{printed}")
    return done.stdout


def facts(root: Path) -> dict[str, str]:
    """What settings.ini says."""
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def version_faults(root: Path) -> Iterator[str]:
    """The package must have the version of settings.ini."""
    version = facts(root)["version"]
    text = (root / "ctxlab/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.*)"$', text, re.MULTILINE)
    if found is None or found[1] != version:
        is_now = found[1] if found else "none"
        yield f"ctxlab/__init__.py: version {is_now}, needed {version}; run nbdev_export"


def changelog_faults(root: Path) -> Iterator[str]:
    """The top entry must be the one of this version, with a date."""
    version = facts(root)["version"]
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    top = re.search(r"^## (.*)$", text, re.MULTILINE)
    if top is None or not re.match(rf"{re.escape(version)} .*\d{{4}}-\d\d-\d\d", top[1]):
        is_now = top[1] if top else "none"
        yield f"CHANGELOG.md: the top entry is {is_now!r}, needed {version!r} with its date"


def tag_faults(root: Path) -> Iterator[str]:
    """The commit must have the tag of this version."""
    tags = run("git", "tag", "--points-at", "HEAD", cwd=root).split()
    if f"v{facts(root)['version']}" not in tags:
        needed = f"v{facts(root)['version']}"
        yield f"git: the tags of this commit are {', '.join(tags) or 'none'}, needed {needed}"


def tree_faults(root: Path) -> Iterator[str]:
    """Nothing may be there that is not committed."""
    for line in run("git", "status", "--porcelain", cwd=root).splitlines():
        yield f"git: not committed: {line[3:]}"


def known_files(root: Path) -> list[str]:
    """What git knows or would add, as far as it is there."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=root)
    return sorted({name for name in listed.split("\0") if name and (root / name).is_file()})


def archive_faults(names: set[str], known: list[str]) -> Iterator[str]:
    """The source archive must hold every file of the repository that it is to hold."""
    for name in known:
        if name not in names and not name.startswith(CLONE_ONLY):
            yield f"MANIFEST.in: {name} is not in the source archive"


def build(root: Path, known: list[str], folder: Path) -> Path:
    """The source archive and the wheel, made from a copy of the known files; their folder."""
    source, out = folder / "source", folder / "dist"
    for name in known:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, source / name)
    run(sys.executable, "-m", "build", "--outdir", out, cwd=source)
    return out


def environment(folder: Path) -> Path:
    """A new environment with nothing in it; its folder of programs."""
    if shutil.which("uv"):
        run("uv", "venv", "-q", "--python", sys.executable, folder)
    else:
        run(sys.executable, "-m", "venv", folder)
    return folder / "bin"


def install(bin: Path, wheel: Path) -> None:
    """Install the wheel with what it requires."""
    if shutil.which("uv"):
        run("uv", "pip", "install", "-q", "--python", bin / "python", wheel)
    else:
        run(bin / "python", "-m", "pip", "install", "-q", wheel)


def wheel_faults(wheel: Path, version: str, modules: int, folder: Path) -> Iterator[str]:
    """The wheel must run where nothing else is, from a folder that is not the repository."""
    bin = environment(folder / "env")
    install(bin, wheel)
    for command in ([bin / "ctxlab"], [bin / "python", "-m", "ctxlab"]):
        said = run(*command, "--version", cwd=folder).strip()
        if said != f"ctxlab {version}":
            yield f"{wheel.name}: --version says {said!r}, needed 'ctxlab {version}'"
    if "speed-forward" not in run(bin / "ctxlab", "claims", cwd=folder):
        yield f"{wheel.name}: `ctxlab claims` does not list the claims"
    count = int(run(bin / "python", "-c", EACH_MODULE, cwd=folder))
    if count != modules:
        yield f"{wheel.name}: {count} modules can be imported, needed {modules}"


def module_count(known: list[str]) -> int:
    """How many modules and rooms a wheel offers without an extra."""
    names = [Path(n) for n in known if n.startswith("ctxlab/") and n.endswith(".py")]
    left_out = ("__init__", "__main__", "distributed", "pytest_plugin")
    rooms = {n.parent for n in names if n.stem == "__init__"} - {Path("ctxlab")}
    return sum(n.stem not in left_out for n in names) + len(rooms)


def faults(root: Path, draft: bool, folder: Path) -> Iterator[str]:
    """What is wrong, a line each; the cheap questions first."""
    yield from version_faults(root)
    if not draft:
        yield from changelog_faults(root)
        yield from tag_faults(root)
        yield from tree_faults(root)
    known = known_files(root)
    out = build(root, known, folder)
    version = facts(root)["version"]
    with tarfile.open(out / f"ctxlab-{version}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    yield from archive_faults(names, known)
    wheel = next(out.glob("*.whl"))
    yield from wheel_faults(wheel, version, module_count(known), folder)


def check(draft: bool, out: Path | None) -> None:
    """Print every fault and exit with 1, or keep the archives that passed."""
    with TemporaryDirectory() as scratch:
        found = list(faults(ROOT, draft, Path(scratch)))
        if found:
            sys.exit("\n".join(found))
        if out:
            shutil.copytree(Path(scratch) / "dist", out, dirs_exist_ok=True)
    print(f"ctxlab {facts(ROOT)['version']}: archives complete, and the wheel runs alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("check", help="build, install and run what would be released")
    command.add_argument(
        "--draft", action="store_true", help="without changelog, tag and clean tree"
    )
    command.add_argument("--out", type=Path, help="keep the archives that were checked here")
    args = parser.parse_args()
    check(args.draft, args.out.resolve() if args.out else None)


if __name__ == "__main__":
    main()
