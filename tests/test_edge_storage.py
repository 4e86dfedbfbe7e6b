"""A folder or file is there whole or not at all."""

import os
import signal
import subprocess
import sys

import pytest

from stpm.edge.errors import StorageError
from stpm.edge.storage import new_folder, write_file

DEAD = 2**22 + 1  # above the largest process number of Linux


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(target, text):
    with new_folder(target) as folder:
        (folder / "content").write_text(text)


def test_the_name_appears_with_the_content(tmp_path):
    with new_folder(tmp_path / "a") as folder:
        (folder / "content").write_text("new")
        assert not (tmp_path / "a").exists()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "content").read_text() == "new"


def test_an_error_keeps_the_old_folder_and_nothing_else(tmp_path):
    fill(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a") as folder:  # noqa: PT012
        (folder / "content").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "content").read_text() == "old"


def test_replacing_leaves_no_file_of_the_old_one(tmp_path):
    fill(tmp_path / "a", "old")
    (tmp_path / "a" / "extra").write_text("old")
    fill(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["content"]


@pytest.mark.parametrize("there", [True, False])
def test_what_a_killed_process_left_is_put_right(tmp_path, there):
    fill(tmp_path / "a", "old")
    os.rename(tmp_path / "a", tmp_path / f".a.previous-{DEAD}")
    (tmp_path / f".a.partial-{DEAD}").mkdir()
    (tmp_path / f".a.partial-{os.getppid()}").mkdir()  # somebody is still at work there
    (tmp_path / ".a.private-notes").mkdir()
    if there:
        fill_directly(tmp_path / "a", "newer")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a"):
        raise ZeroDivisionError
    assert (tmp_path / "a" / "content").read_text() == ("newer" if there else "old")
    assert names(tmp_path) == [f".a.partial-{os.getppid()}", ".a.private-notes", "a"]


def fill_directly(folder, text):
    folder.mkdir()
    (folder / "content").write_text(text)


def test_a_process_killed_while_writing_leaves_no_name(tmp_path):
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from stpm.edge.storage import new_folder\n"
        f"with new_folder(Path({str(tmp_path / 'a')!r})) as folder:\n"
        "    (folder / 'content').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code])
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "a").exists()
    fill(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"]


def test_write_file_replaces_at_once_and_names_what_it_could_not_write(tmp_path):
    write_file(tmp_path / "f", b"one")
    write_file(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two"
    assert names(tmp_path) == ["f"]
    with pytest.raises(StorageError, match=r"missing/f.*No such file"):
        write_file(tmp_path / "missing" / "f", b"")
