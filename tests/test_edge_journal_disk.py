"""The journal on a real disk that fills up, cannot be written, or loses what was on it."""

import os
import subprocess
import time

import cv2
import pytest
from journal_line import SHAPE, rows, runs, texts

from stpm.edge.journal.records import KEPT


def fill(disk):
    """Returns what to delete for space."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


def test_a_full_disk_degrades_to_counting_and_the_journal_goes_on_when_there_is_space(small_disk, lines):
    folder = small_disk / "journal"
    line = lines(folder, commit_s=0.02)
    line.opened()
    line.part("FAIL", frame=True)
    line.written()
    filler = fill(small_disk)
    while not line.writer.status.reason:
        line.part("FAIL", frame=True)
        line.poll()
        time.sleep(0.001)
    status = line.writer.status
    assert "full" in status.reason or "No space" in status.reason
    pid = line.process.pid
    for number in range(KEPT + 3000):
        line.part("FAIL", frame=number < 100)
        line.poll()
    line.until(lambda: line.writer.status.lost > 100)
    assert line.process.poll() is None
    filler.unlink()
    line.until(lambda: not line.writer.status.reason)
    line.part()
    line.written()
    line.until(lambda: not line.writer.status.reason)
    lost = line.writer.status.lost
    line.close()
    assert line.process.pid == pid
    (run,) = runs(folder)
    assert run.lost == lost > 0
    assert rows(folder) + lost == line.writer.status.handed
    assert any("not written for" in text and "records and" in text for text in texts(folder))
    for path in (folder / "pictures").glob("*/*"):
        assert cv2.imread(str(path)).shape == SHAPE


def test_a_disk_that_is_full_from_the_start(small_disk, lines):
    filler = fill(small_disk)
    line = lines(small_disk / "journal")
    line.part()
    line.until(lambda: "cannot write the journal" in line.writer.status.reason)
    assert not line.writer.status.open
    filler.unlink()
    line.opened()
    line.written()
    line.close()
    assert runs(small_disk / "journal")[0].records == 2


def test_what_could_not_be_written_to_the_end_is_said_at_the_end_and_told_by_the_next_journal(small_disk, lines):
    """The line says at its end what is missing, though nobody has been able to write it down."""
    filler = fill(small_disk)
    line = lines(small_disk / "journal")
    for _ in range(5):
        line.part("FAIL", frame=True)
    line.until(lambda: line.writer.status.reason)
    line.close()
    status = line.writer.status
    assert (status.handed, status.lost, status.lost_pictures) == (6, 5, 5)  # the first is the run's own
    filler.unlink()
    after = lines(small_disk / "journal")
    after.opened()
    assert after.writer.status.lost_before == 6
    after.close()


def test_a_read_only_disk_is_tried_again(small_disk, lines):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    line = lines(small_disk / "journal")
    line.part("FAIL", frame=True)
    line.until(lambda: "Read-only file system" in line.writer.status.reason)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    line.opened()
    line.written()
    line.close()
    assert len(list((small_disk / "journal" / "pictures").glob("*/*.png"))) == 1


@pytest.fixture
def stalling_disk(tmp_path):
    """A file system, and what makes everybody who writes to it wait for so many seconds."""
    image, point = tmp_path / "image", tmp_path / "disk"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system of our own needs root, mkfs.ext4 and a loop device")
    thaws = []

    def stall(seconds):
        # by a process of its own, which goes on if this one should have to wait
        words = f"fsfreeze -f {point} && echo frozen && sleep {seconds} && fsfreeze -u {point}"
        thaws.append(subprocess.Popen(["sh", "-c", words], stdout=subprocess.PIPE))
        assert thaws[-1].stdout.readline() == b"frozen\n"
        return thaws[-1]

    yield point, stall
    for thaw in thaws:
        with thaw:
            assert thaw.wait(30) == 0
    subprocess.run(["umount", str(point)], check=True)


def test_a_disk_that_stalls_stalls_the_journal_process_alone(stalling_disk, lines):
    point, stall = stalling_disk
    line = lines(point / "journal", commit_s=0.02)
    line.opened()
    line.part()
    line.written()
    thaw, longest = stall(2), 0.0
    while thaw.poll() is None:
        before = time.perf_counter()
        line.part("FAIL", frame=line.parts % 10 == 0)
        line.poll()
        longest = max(longest, time.perf_counter() - before)
        time.sleep(0.002)
    assert longest < 0.2
    assert line.parts > 200
    line.written()
    line.close()
    (run,) = runs(point / "journal")
    assert (run.lost, run.end) == (0, "closed")
    assert rows(point / "journal") == line.writer.status.handed


def damage(path, start):
    with path.open("r+b") as file:
        file.seek(start)
        file.write(os.urandom(8 * 4096))


@pytest.mark.parametrize("start", [0, 4096])
def test_a_damaged_database_is_moved_aside_and_a_new_one_begun(lines, tmp_path, start):
    line = lines(tmp_path)
    for _ in range(300):
        line.part()
    line.close()
    content = (tmp_path / "journal.sqlite").read_bytes()
    damage(tmp_path / "journal.sqlite", start)
    damaged = (tmp_path / "journal.sqlite").read_bytes()
    assert damaged != content
    line = lines(tmp_path)
    line.part()
    line.written()
    line.close()
    (aside,) = tmp_path.glob("journal.damaged-*.sqlite")
    assert aside.read_bytes()[4096:] == damaged[4096:]
    (run,) = runs(tmp_path)
    assert (run.records, run.lost) == (2, 0)
    (text,) = texts(tmp_path)
    assert "was damaged (" in text
    assert aside.name in text


def test_a_database_that_is_removed_under_the_line_is_noticed(lines, tmp_path):
    line = lines(tmp_path)
    for _ in range(10):
        line.part()
    line.written()
    for path in tmp_path.glob("journal.sqlite*"):
        path.unlink()
    line.part()
    line.until(lambda: (tmp_path / "journal.sqlite").exists())
    line.part()
    line.written()
    line.close()
    (run,) = runs(tmp_path)
    assert run.records + run.lost == 13
    assert run.lost >= 10
    assert any("was removed while it was in use" in text for text in texts(tmp_path))
