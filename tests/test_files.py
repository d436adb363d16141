"""Files that are whole or not there: errors, permissions, links, and several writers at once."""

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ctxlab import files
from ctxlab.files import _whole_files, _write_whole


@pytest.fixture
def home(tmp_path):
    (tmp_path / "a.txt").write_text("old a")
    (tmp_path / "b.txt").write_text("old b")
    return tmp_path


def tree(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def refusing(monkeypatch, name, at=0, error=None):
    """`os.NAME` fails at the call with this number."""
    true, calls = getattr(os, name), iter(range(100))

    def once(*args, **options):
        if next(calls) == at:
            raise error or OSError(28, "No space left on device")
        return true(*args, **options)

    monkeypatch.setattr(os, name, once)


# --- whole or not at all ---


@pytest.mark.parametrize("content", ["äö", b"\x00\xff", "", "x" * 10**6])
def test_content_arrives(home, content):
    for name in ("a.txt", "new.txt"):
        _write_whole(home / name, content)
        wanted = content if isinstance(content, bytes) else content.encode()
        assert (home / name).read_bytes() == wanted
    assert sorted(os.listdir(home)) == ["a.txt", "b.txt", "new.txt"]


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), KeyboardInterrupt(), ValueError()]
)
@pytest.mark.parametrize("names", [["a.txt"], ["new.txt"], ["a.txt", "new.txt", "b.txt"]])
def test_a_block_that_fails_leaves_everything(home, error, names):
    before = tree(home)
    with pytest.raises(type(error)), _whole_files(*(home / n for n in names)) as parts:  # noqa: PT012
        for part in parts:
            part.write_text("new")
        raise error
    assert tree(home) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("step", "at"),
    [("fsync", 0), ("fsync", 2), ("replace", 0), ("replace", 1), ("replace", 2), ("chmod", 1)],
)
def test_a_failure_at_any_step_leaves_everything(home, monkeypatch, step, at, error):
    before = tree(home)
    names = ["a.txt", "new.txt", "b.txt"]
    refusing(monkeypatch, step, at, error)
    with pytest.raises(type(error)) as e, _whole_files(*(home / n for n in names)) as parts:  # noqa: PT012
        for part in parts:
            part.write_text("new")
    assert tree(home) == before
    if isinstance(error, OSError):
        which = names[at] if step != "chmod" else "b.txt"
        assert str(e.value) == f"{home / which}: cannot be written: No space left on device"
        assert e.value.errno == 28


def test_an_interrupt_after_a_rename_takes_it_back(home, monkeypatch):
    before, true = tree(home), os.replace

    def late(*args):
        true(*args)
        monkeypatch.setattr(os, "replace", true)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", late)
    with pytest.raises(KeyboardInterrupt), _whole_files(home / "new.txt", home / "a.txt") as parts:  # noqa: PT012
        for part in parts:
            part.write_text("new")
    assert tree(home) == before


def test_old_files_come_back_where_there_are_no_hard_links(home, monkeypatch):
    before = tree(home)
    for i in range(2):
        refusing(monkeypatch, "link", i)
    refusing(monkeypatch, "replace", 1)
    with (  # noqa: PT012
        pytest.raises(OSError, match=r"b\.txt"),
        _whole_files(home / "a.txt", home / "b.txt") as parts,
    ):
        for part in parts:
            part.write_text("new")
    assert tree(home) == before


def test_the_content_is_on_the_disk_before_the_name(home, monkeypatch):
    steps, sync, rename = [], os.fsync, os.replace

    def noted_sync(handle):
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
        steps.append(f"sync {kind}")
        sync(handle)

    def noted_rename(*args):
        steps.append("rename")
        rename(*args)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_rename)
    _write_whole(home / "a.txt", "new")
    assert steps == ["sync file", "rename", "sync folder"]


# --- what may be replaced ---


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_an_ordinary_file(home, umask):
    previous = os.umask(umask)
    try:
        _write_whole(home / "new.txt", "new")
        (home / "a.txt").chmod(0o640)
        _write_whole(home / "a.txt", "new")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((home / "new.txt").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((home / "a.txt").stat().st_mode) == 0o640


@pytest.mark.parametrize("target", ["a.txt", "new.txt"])
def test_a_link_stays_a_link(home, target):
    (home / "sub").mkdir()
    (home / "sub" / "link").symlink_to(home / target)
    _write_whole(home / "sub" / "link", "new")
    assert (home / "sub" / "link").is_symlink()
    assert (home / target).read_text() == "new"
    assert os.listdir(home / "sub") == ["link"]


def test_what_cannot_be_replaced_is_refused(home, monkeypatch):
    (home / "folder").mkdir()
    os.mkfifo(home / "pipe")
    for path, error, said in [
        (home / "folder", IsADirectoryError, "is a folder"),
        (home / "pipe", OSError, "is no ordinary file"),
        (home / "none" / "a.txt", FileNotFoundError, "there is no folder"),
        (home / "a.txt" / "b.txt", FileNotFoundError, "there is no folder"),
        (home / ("long" * 70), OSError, "cannot be written: File name too long"),
    ]:
        with pytest.raises(error, match=said) as e:
            _write_whole(path, "new")
        assert str(e.value).startswith(f"{path}: ")
        assert "\n" not in str(e.value)
    monkeypatch.setattr(os, "access", lambda *args: False)  # permissions do not bind root
    with pytest.raises(PermissionError, match=r"a\.txt: is read-only"):
        _write_whole(home / "a.txt", "new")
    assert sorted(os.listdir(home)) == ["a.txt", "b.txt", "folder", "pipe"]
    assert (home / "a.txt").read_text() == "old a"


def test_a_folder_that_refuses_is_named(home, monkeypatch):
    def refused(self, *args):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", refused)
    with pytest.raises(PermissionError) as e:
        _write_whole(home / "a.txt", "new")
    assert str(e.value) == f"{home / 'a.txt'}: cannot be written: Permission denied"


def test_an_error_of_another_file_keeps_its_name(home):
    with pytest.raises(FileNotFoundError) as e, _whole_files(home / "a.txt"):
        (home / "none").read_bytes()
    assert e.value.filename == str(home / "none")


def test_a_disk_that_is_full(home):
    """A limit on the size of files stands for it."""
    before = tree(home)

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    script = (
        "import sys; from ctxlab.files import _write_whole; _write_whole(sys.argv[1], b'x' * 5000)"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script, home / "a.txt"],
        capture_output=True,
        text=True,
        preexec_fn=limited,
    )
    assert done.stderr.splitlines()[-1].endswith(
        f"{home / 'a.txt'}: cannot be written: File too large"
    )
    assert tree(home) == before


# --- several writers ---

WRITER = """if True:
    import sys
    from ctxlab.files import _whole_files
    for i in range(150):
        with _whole_files(sys.argv[1]) as (part,), open(part, 'w') as f:
            for _ in range(100): f.write(sys.argv[2] * 999 + '\\n')
"""


@pytest.mark.slow
def test_a_reader_beside_two_writers_sees_whole_files(home):
    path = home / "a.txt"
    whole = {letter: (letter * 999 + "\n") * 100 for letter in "xy"}
    path.write_text(whole["x"])
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), letter]) for letter in "xy"
    ]
    seen = set()
    while any(w.poll() is None for w in writers):
        seen.add(path.read_text())
    assert [w.returncode for w in writers] == [0, 0]
    assert seen <= set(whole.values())
    assert len(seen) == 2
    assert sorted(os.listdir(home)) == ["a.txt", "b.txt"]


def test_temporary_names_are_unique(home):
    names = {files._beside(home / ("a" * 250)).name for _ in range(100)}
    assert len(names) == 100
    assert max(map(len, names)) < 60
