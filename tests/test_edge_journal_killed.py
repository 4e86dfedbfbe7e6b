"""Whoever is killed or hangs, line or journal process: the line does not wait, and what is lost is counted."""

import fcntl
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from journal_line import SHAPE, counts, rows, runs, texts

from stpm.edge.channel import Channel, pair
from stpm.edge.journal import handed
from stpm.edge.journal.client import STUCK_NS, JournalWriter
from stpm.edge.journal.handed import Handed, HandedCount, count_file, ended_runs, read_count
from stpm.edge.journal.messages import FromJournal, JournalSettings, PartRecord, Released, Run, ToJournal, utc_now
from stpm.edge.journal.records import Records


def test_a_killed_journal_process_costs_only_what_it_had_not_committed(lines, tmp_path):
    line = lines(tmp_path, slots=3, commit_s=0.05)
    line.opened()
    for _ in range(50):
        line.part()
    line.written()
    os.kill(line.process.pid, signal.SIGSTOP)
    lent = [line.part("FAIL", frame=True) for _ in range(3)]
    line.part()
    assert lent == [True] * 3
    os.kill(line.process.pid, signal.SIGKILL)
    line.until(lambda: not line.ring.taken)  # the slots come back without it
    for _ in range(20):
        line.part()  # nobody there
    line.until(lambda: len(line.started) == 2)
    line.written()
    assert line.part("FAIL", frame=True)  # and are lent again
    line.written()
    assert line.writer.status.lost == 4
    assert line.writer.status.lost_pictures == 3
    line.close()
    (run,) = runs(tmp_path)
    assert (run.records, run.lost, run.end) == (line.writer.status.handed - 4, 4, "closed")
    assert rows(tmp_path) + run.lost == line.writer.status.handed
    assert "ended, with 3 pictures in hand" in texts(tmp_path)[1] + texts(tmp_path)[0]
    assert any("started again; 4 records" in text for text in texts(tmp_path))


def test_kills_at_random_moments_never_break_the_sum(lines, tmp_path):
    random = np.random.default_rng(1)
    line = lines(tmp_path, commit_s=0.01)
    for _ in range(4):
        line.opened()
        deadline = time.monotonic() + float(random.uniform(0.05, 0.3))
        while time.monotonic() < deadline:
            line.part("FAIL" if random.random() < 0.2 else "PASS", frame=True)
            line.poll()
            time.sleep(0.001)
        os.kill(line.process.pid, signal.SIGKILL)
        line.until(lambda: not line.writer.status.open)
        line.later_ns += 30_000_000_000  # past any back-off
    line.opened()
    line.close()
    (run,) = runs(tmp_path)
    assert line.parts > 100
    assert rows(tmp_path) + run.lost == run.records + run.lost == line.writer.status.handed
    pictures = list((tmp_path / "pictures").glob("*/*"))
    assert pictures
    for path in pictures:
        assert path.name.startswith(".") or cv2.imread(str(path)).shape == SHAPE


WRITE_UNTIL_KILLED = """
import sys, time
from journal_line import Line
line = Line(sys.argv[1], commit_s=100.0)
line.opened()
print(line.process.pid, flush=True)
while True:
    line.part()
    line.poll()
    time.sleep(0.0005)
"""


@pytest.mark.parametrize("killed", ["the line", "everything"])
def test_after_kill_9_the_next_start_knows_how_many_records_are_missing(lines, tmp_path, killed):
    command = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) as process:
        try:
            journal = int(process.stdout.readline())
            (count,) = counts(tmp_path)
            # a journal process that outlives its line by a moment settles the run by itself, and deletes the file
            held = os.open(count, os.O_RDONLY)
            kept = Path(f"/proc/self/fd/{held}")
            deadline = time.monotonic() + 20
            while read_count(kept).records < 450:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            if killed == "everything":
                os.kill(journal, signal.SIGKILL)
        finally:
            process.kill()
    known = read_count(kept)
    os.close(held)
    assert not known.closed
    line = lines(tmp_path)
    line.opened()
    line.close()
    theirs, ours = runs(tmp_path)
    assert theirs.end == "killed"
    assert rows(tmp_path) - 1 + theirs.lost == theirs.records + theirs.lost == known.records
    assert (ours.end, ours.lost) == ("closed", 0)
    if killed == "everything":
        assert theirs.lost > 0
        assert theirs.records > 200  # whole batches of 200 were committed
        assert line.writer.status.lost_before == theirs.lost
        assert texts(tmp_path) == [f"{theirs.lost} records of the run of {theirs.at} were lost"]
    assert not counts(tmp_path)


def test_a_run_that_never_reached_the_database_is_known_by_its_count(lines, tmp_path):
    count = HandedCount(tmp_path, "2026-03-15T10:11:12.123456+00:00")
    count.write(17)
    count.close()
    line = lines(tmp_path)
    line.opened()
    assert line.writer.status.lost_before == 17
    line.close()
    assert [(run.end, run.records, run.lost) for run in runs(tmp_path)][1:] == [("killed", 0, 17)]


@pytest.mark.parametrize("damage", ["missing", "short", "empty", "flipped"])
def test_a_count_that_is_gone_is_said_to_be_gone(lines, tmp_path, damage):
    line = lines(tmp_path)
    for _ in range(5):
        line.part()
    line.written()
    (count,) = counts(tmp_path)
    content = count.read_bytes()
    line.process.kill()
    line.process.wait()
    line.close()
    changed = {"short": content[:13], "empty": b"", "flipped": content[:9] + b"\x07" + content[10:]}
    count.unlink()
    if damage != "missing":
        count.write_bytes(changed[damage])
    line = lines(tmp_path)
    line.opened()
    line.close()
    assert [run.end for run in runs(tmp_path)] == ["unknown", "closed"]
    (text,) = texts(tmp_path)
    assert "is not known, at least 0" in text
    assert f"{count.name} is missing, as after a power failure, or damaged" in text
    assert not counts(tmp_path)


AT = "2026-03-15T10:11:12.123456+00:00"


@pytest.fixture
def count(tmp_path):
    count = HandedCount(tmp_path, AT)
    yield count
    count.close()
    count_file(tmp_path, AT).unlink(missing_ok=True)


def test_the_count_file_is_what_its_docstring_says(count, tmp_path):
    count.write(258, closed=True)
    path = count_file(tmp_path, AT)
    assert re.fullmatch("/dev/shm/stpm-[0-9a-f]{16}-20260315T101112123456Z.count", str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes().hex() == "5354504d48414e44" + "0201000000000000" + "01000000" + "7c5bc455"
    assert read_count(path) == Handed(258, True)
    assert ended_runs(tmp_path) == []  # it is held
    fcntl.flock(count._descriptor, fcntl.LOCK_UN)
    assert ended_runs(tmp_path) == [(AT, path)]
    assert ended_runs(tmp_path / "another") == []


def test_a_journal_has_one_place_for_its_counts_by_whatever_name_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert {count_file(Path(name), AT) for name in (tmp_path, ".", "link", "./link")} == {count_file(tmp_path, AT)}


def test_the_line_itself_has_nothing_to_do_with_the_disk_of_its_journal(lines, tmp_path):
    """So that a disk which stalls can stall the journal process alone."""
    line = lines(tmp_path / "journal")
    for _ in range(10):
        line.part("FAIL", frame=True)
        line.poll()
    opened = [os.readlink(handle) for handle in Path("/proc/self/fd").iterdir() if handle.exists()]
    assert not [path for path in opened if path.startswith(str(tmp_path))]
    (count,) = counts(tmp_path / "journal")
    assert str(count) in opened
    assert read_count(count) == Handed(11, False)
    line.close()
    assert not counts(tmp_path / "journal")


def test_where_there_is_no_shared_memory_the_count_lies_beside_the_database(tmp_path, monkeypatch):
    folder = tmp_path / "journal"
    monkeypatch.setattr(handed, "SHARED_MEMORY", tmp_path / "nowhere")
    count = HandedCount(folder, AT)
    count.write(17)
    assert [path.name for path in folder.iterdir()] == ["handed-20260315T101112123456Z.count"]
    assert ended_runs(folder) == []
    count.close()
    records = Records(folder, 0.2, 30)
    records.run = Run(1, utc_now(), "", "", {})
    assert records.open(0.0).lost == 17
    assert not counts(folder)
    records.finish(1.0, 0)


def test_the_count_of_another_user_is_unknown_and_in_nobodys_way(count, tmp_path):
    if os.geteuid():
        pytest.skip("being another user for a moment needs root")
    fcntl.flock(count._descriptor, fcntl.LOCK_UN)
    assert len(ended_runs(tmp_path)) == 1
    os.seteuid(65534)
    try:
        assert read_count(count_file(tmp_path, AT)) is None
        assert ended_runs(tmp_path) == []
    finally:
        os.seteuid(0)


def test_a_count_that_somebody_has_put_there_before_is_not_written_into(count, tmp_path):
    with pytest.raises(FileExistsError):
        HandedCount(tmp_path, AT)


class Puppet:
    """In place of a journal process: says what the test says."""

    def __init__(self):
        ours, theirs = pair()
        self.channel, self.theirs = Channel(ours, FromJournal), Channel(theirs, ToJournal)
        self.process = SimpleNamespace(poll=lambda: 0)

    def end(self, grace_s):
        self.channel.close()
        return []


def test_a_slot_that_the_journal_was_not_lent_is_not_given_back(tmp_path):
    puppet = Puppet()
    writer = JournalWriter(JournalSettings(str(tmp_path)), lambda: puppet, 0)
    writer.begin("station", "1.0", {})
    part = PartRecord(0, "", 1, "", "FAIL", 1.0, 1.0, 1.0, "", "", None, 0, "", 3, SHAPE)
    assert writer.part(part)
    for slot in (2, 3, 3):
        puppet.theirs.send(Released(slot))
    assert writer.poll(1) == [3]
    writer.close()
    puppet.theirs.close()
    (count,) = counts(tmp_path)
    count.unlink()


def test_a_journal_process_that_hangs_is_replaced(lines, tmp_path):
    line = lines(tmp_path)
    line.opened()
    os.kill(line.process.pid, signal.SIGSTOP)
    line.part("FAIL", frame=True)
    line.poll()
    assert line.ring.taken
    line.later_ns = STUCK_NS + 1_000_000_000
    assert line.poll() == [0]
    assert not line.writer.status.open
    assert "was silent" in line.writer.status.reason
    assert line.writer.fileno() == -1
    line.later_ns *= 2
    line.opened()
    assert len(line.started) == 2
    line.written()
    assert line.writer.status.lost == 1
    line.close()
    assert any("was silent for 20 s and was killed" in text for text in texts(tmp_path))


def test_a_process_that_does_not_start_is_tried_again_with_growing_pauses(lines, tmp_path):
    line = lines(tmp_path, begin=False)
    tries = []

    def refuse():
        tries.append(line.later_ns)
        raise OSError(11, "Resource temporarily unavailable")

    line.writer.close()
    line.writer = JournalWriter(line.settings, refuse, 0)
    line.writer.begin("station", "1.0", {})
    for second in range(200):
        line.later_ns = second * 1_000_000_000
        assert line.writer.poll(line.later_ns) == []
        line.part()
    assert [later // 1_000_000_000 for later in tries] == [0, 1, 2, 4, 8, 16, 32, 62, 92, 122, 152, 182]
    assert "Resource temporarily unavailable" in line.writer.status.reason
    line.close()


def test_the_line_never_waits_for_a_journal_that_does_not_read(lines, tmp_path):
    line = lines(tmp_path)
    line.opened()
    os.kill(line.process.pid, signal.SIGSTOP)
    longest = 0
    gc.disable()  # of all that the tests have imported
    for _ in range(5000):
        before = time.perf_counter()
        line.part()
        longest = max(longest, time.perf_counter() - before)
    gc.enable()
    assert longest < 0.1
    assert line.writer.status.lost > 2000
    os.kill(line.process.pid, signal.SIGCONT)
    line.written()
    line.part()
    line.written()
    lost = line.writer.status.lost
    line.close()
    (run,) = runs(tmp_path)
    assert (run.records, run.lost) == (5002 - lost, lost)
    assert rows(tmp_path) + lost == 5002
    assert any(f"{lost} records" in text for text in texts(tmp_path))


def test_closing_is_bounded_when_the_journal_hangs(lines, tmp_path):
    line = lines(tmp_path)
    line.opened()
    line.part()
    os.kill(line.process.pid, signal.SIGSTOP)
    before = time.monotonic()
    line.writer.close(0.3)
    assert time.monotonic() - before < 1
    assert line.process.poll() == -signal.SIGKILL
    line = lines(tmp_path)
    line.opened()
    assert line.writer.status.lost_before == 1
    assert runs(tmp_path)[0].end == "closed"


def test_what_could_not_be_handed_over_by_the_end_is_counted(lines, tmp_path):
    line = lines(tmp_path)
    line.opened()
    os.kill(line.process.pid, signal.SIGSTOP)
    for _ in range(1500):
        line.part()
    later = threading.Timer(1.0, os.kill, (line.process.pid, signal.SIGCONT))
    later.start()
    line.writer.close(1.6)  # half of it for handing over
    later.join()
    (run,) = runs(tmp_path)
    assert run.lost > 500
    assert rows(tmp_path) + run.lost == line.writer.status.handed == 1501
    assert run.end == "closed"
    assert any(f"{run.lost} records" in text for text in texts(tmp_path))


def test_the_journal_process_ends_with_its_line(lines, tmp_path):
    line = lines(tmp_path)
    line.opened()
    line.part("FAIL", frame=True)
    before = time.monotonic()
    line.writer.close(10)
    assert time.monotonic() - before < 5
    assert line.process.returncode == 0
    line.part("FAIL", frame=True)
    assert line.poll() == []
    assert len(line.started) == 1
    assert len(list((tmp_path / "pictures").glob("*/*.png"))) == 1
