"""The journal against real processes, killed ones among them, and a real disk that fills up."""

import gc
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import cv2
import numpy as np
import pytest

from stpm.edge.journal.client import STUCK_NS, JournalWriter
from stpm.edge.journal.database import Database
from stpm.edge.journal.handed import Handed, HandedCount, count_file, ended_runs, read_count
from stpm.edge.journal.messages import Event, FromJournal, JournalSettings, PartRecord, Run, utc_now
from stpm.edge.journal.pictures import Pictures, copy_out, picture_path
from stpm.edge.journal.query import Filter, Journal
from stpm.edge.journal.records import KEPT, Records
from stpm.edge.ring import Ring
from stpm.edge.worker import Worker

SHAPE = (60, 80, 3)
BUNDLE = "b" * 64


class Line:
    """What the line does with its journal: hands over, polls, gives slots back to the ring."""

    def __init__(self, folder, begin=True, slots=4, **settings):
        self.folder = folder
        self.settings = JournalSettings(str(folder), **settings)
        self.ring = Ring(16)
        self.started = []
        self.later_ns = 0
        self.writer = JournalWriter(self.settings, self._start, time.monotonic_ns(), slots)
        self.parts = 0
        if begin:
            self.writer.begin("station", "1.0", {"1": f"screw {BUNDLE}"})

    def _start(self):
        worker = Worker("stpm.edge.journal.process", self.settings, FromJournal, self.ring)
        self.started.append(worker)
        return worker

    def part(self, verdict="PASS", frame=False, **more):
        """True when its slot was lent."""
        self.parts += 1
        values = {
            "record": 0,
            "at": "",
            "part": self.parts,
            "frame": f"frame {self.parts}",
            "verdict": verdict,
            "score": 0.5,
            "threshold": 0.25,
            "latency_ms": 12.5,
            "bundle": BUNDLE,
            "reason": "" if verdict == "PASS" else "score above the threshold",
            "box": (1, 2, 3, 4),
            "area": 7,
            "outcome": "",
        }
        if frame:
            values |= {"slot": self.ring.claim(), "shape": SHAPE}
        record = PartRecord(**(values | more))
        lent = self.writer.part(record)
        if record.slot is not None and not lent:
            self.ring.release(record.slot)
        return lent

    def poll(self):
        freed = self.writer.poll(time.monotonic_ns() + self.later_ns)
        for slot in freed:
            self.ring.release(slot)
        return freed

    def until(self, condition, seconds=10):
        """Poll until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.writer.status
            self.poll()
            time.sleep(0.005)

    def opened(self):
        self.until(lambda: self.writer.status.open)

    def written(self):
        """Everything handed over so far has been decided."""
        self.until(
            lambda: (
                query(self.folder, "SELECT last FROM runs ORDER BY id DESC LIMIT 1") == [(self.writer.status.handed,)]
            )
        )

    @property
    def process(self):
        return self.started[-1].process

    def close(self):
        self.writer.close()
        self.ring.close()


@pytest.fixture
def lines():
    """Makes lines that are closed in the end."""
    made = []

    def make(*arguments, **settings):
        made.append(Line(*arguments, **settings))
        return made[-1]

    yield make
    for line in made:
        line.close()


def query(folder, statement):
    try:
        connection = sqlite3.connect(f"file:{folder}/journal.sqlite?mode=ro", uri=True)
    except sqlite3.Error:
        return []
    try:
        return connection.execute(statement).fetchall()
    except sqlite3.Error:
        return []
    finally:
        connection.close()


def runs(folder):
    with Journal(folder) as journal:
        return journal.runs()


def texts(folder, kind="journal"):
    with Journal(folder) as journal:
        return [text for _, _, _, text in journal.events(Filter(kind=kind), 100)]


def rows(folder):
    """The records of the line that lie in the tables, that of each run included."""
    count = "SELECT (SELECT count(*) FROM {}) + (SELECT count(*) FROM {} WHERE record > 0) + (SELECT count(*) FROM {})"
    return query(folder, count.format("parts", "events", "runs"))[0][0]


# --- what is recorded


def test_every_column_of_a_part_and_an_event_is_kept(lines, tmp_path):
    line = lines(tmp_path)
    line.writer.event("operator", "threshold changed")
    line.part("FAIL")
    number = line.writer.newest
    line.part("UNKNOWN", score=None, latency_ms=None, box=None, reason="late")
    line.writer.outcome(number, "delivered rejected")
    line.close()
    with Journal(tmp_path) as journal:
        failed, unknown = journal.newest(Filter(), 10)
        assert failed[:2] == (1, 3)
        assert failed[3:] == (
            *(1, "frame 1", "FAIL", 0.5, 0.25, 12.5, BUNDLE, "score above the threshold"),
            *(1, 2, 3, 4, 7, "delivered rejected"),
        )
        assert unknown[3:] == (
            *(2, "frame 2", "UNKNOWN", None, 0.25, None, BUNDLE, "late"),
            *(None, None, None, None, 7, ""),
        )
        assert datetime.now(timezone.utc) - datetime.fromisoformat(failed[2]) < timedelta(minutes=1)
        (run,) = journal.runs()
        assert (run.station, run.version, run.recipes) == ("station", "1.0", {"1": f"screw {BUNDLE}"})
        assert (run.end, run.records, run.lost) == ("closed", 5, 0)
    assert texts(tmp_path, "operator") == ["threshold changed"]
    assert not list(tmp_path.glob("handed-*"))


def test_texts_that_no_database_likes_do_not_stop_the_line(lines, tmp_path):
    line = lines(tmp_path)
    line.part(frame=False, reason="r" * 100_000)
    line.writer.event("alarm", "bad \udcff name" + "e" * 100_000)
    line.part(score=float("nan"))
    line.part(score=float("inf"))
    line.close()
    assert runs(tmp_path)[0].records == 5
    assert texts(tmp_path, "alarm")[0].startswith("bad ? name")
    assert query(tmp_path, "SELECT score FROM parts ORDER BY record") == [(0.5,), (None,), (float("inf"),)]


def test_the_database_is_read_while_the_line_runs(lines, tmp_path):
    line = lines(tmp_path, commit_s=0.01)
    line.opened()
    seen = []
    for _ in range(30):
        for _ in range(20):
            line.part()
        line.poll()
        with Journal(tmp_path) as journal:
            seen.append(sum(map(len, journal.parts(Filter()))))
        time.sleep(0.005)
    line.written()
    assert seen == sorted(seen)
    assert 0 < seen[20] < 600
    assert rows(tmp_path) == 601


def test_the_process_gives_way_to_the_others(lines, tmp_path):
    line = lines(tmp_path)
    line.opened()
    assert os.getpriority(os.PRIO_PROCESS, line.process.pid) == 10


# --- pictures


def test_a_reject_with_its_heat_map_is_drawn_as_the_networks_saw_it(lines, tmp_path):
    line = lines(tmp_path)
    slot = line.ring.claim()
    frame = line.ring.image(slot, SHAPE)
    frame[:] = 90
    frame[20:40, 30:60] = 200  # the region of interest
    anomaly = line.ring.map(slot, (40, 60))
    anomaly[:] = 0
    anomaly[10:14, 20:26] = 1.0
    assert line.part("FAIL", slot=slot, shape=SHAPE, map_shape=(40, 60), roi=(30, 20, 30, 20))
    line.until(lambda: slot not in line.ring.taken)
    frame[:] = 0  # the slot is somebody else's now
    line.close()
    (path,) = (tmp_path / "pictures").glob("*/*.png")
    run = runs(tmp_path)[0]
    assert path == tmp_path / picture_path(run.at, 1, utc_now(), "FAIL")
    picture = cv2.imread(str(path))
    assert picture.shape == (40 + 22, 2 * 60, 3)
    part, heat = picture[22:, :60], picture[22:, 60:]
    assert (part[30, 50] == 200).all()
    assert (part == (0, 0, 255)).all(axis=2).any()  # the defect is outlined
    assert heat[12, 22, 2] > heat[30, 50, 2]  # and red in the map
    assert heat[12, 22, 0] < heat[30, 50, 0]


def test_a_frame_without_a_map_is_kept_as_it_is(lines, tmp_path):
    line = lines(tmp_path)
    slot = line.ring.claim()
    frame = line.ring.image(slot, SHAPE)
    frame[:] = np.random.default_rng(0).integers(0, 256, SHAPE)
    expected = frame.copy()
    del frame
    line.part("UNKNOWN", slot=slot, shape=SHAPE)
    line.close()
    (path,) = (tmp_path / "pictures").glob("*/*-00000001-UNKNOWN.png")
    assert (cv2.imread(str(path)) == expected).all()


def test_rejects_and_a_sample_of_passes_are_pictured(lines, tmp_path):
    line = lines(tmp_path, passes_every=5)
    line.opened()
    for number in range(1, 13):
        line.part("FAIL" if number in (3, 9) else "PASS", frame=True)
        line.until(lambda: not line.ring.taken)
    line.close()
    names = sorted(path.stem.split("-", 1)[1] for path in (tmp_path / "pictures").glob("*/*"))
    assert names == ["00000001-PASS", "00000003-FAIL", "00000007-PASS", "00000009-FAIL"]
    assert runs(tmp_path)[0].lost_pictures == 0


def test_no_more_slots_are_lent_than_agreed_and_pictures_left_out_are_counted(lines, tmp_path):
    line = lines(tmp_path, slots=3)
    line.opened()
    os.kill(line.process.pid, signal.SIGSTOP)
    assert [line.part("FAIL", frame=True) for _ in range(5)] == [True, True, True, False, False]
    assert len(line.ring.taken) == 3
    os.kill(line.process.pid, signal.SIGCONT)
    line.until(lambda: not line.ring.taken)
    line.until(lambda: line.writer.status.lost_pictures == 2)
    line.close()
    assert len(list((tmp_path / "pictures").glob("*/*.png"))) == 3
    assert (runs(tmp_path)[0].lost, runs(tmp_path)[0].lost_pictures) == (0, 2)
    assert any("2 pictures" in text for text in texts(tmp_path))


def test_a_record_that_does_not_fit_its_slot_costs_its_picture_only(lines, tmp_path):
    line = lines(tmp_path)
    line.part("FAIL", slot=line.ring.claim(), shape=(50_000, 50_000, 3))
    line.part("FAIL", slot=line.ring.claim(), shape=SHAPE, map_shape=(40, 60), roi=(70, 50, 30, 20))
    line.until(lambda: not line.ring.taken)
    line.close()
    assert (runs(tmp_path)[0].records, runs(tmp_path)[0].lost_pictures) == (3, 2)


@pytest.mark.parametrize("map_shape", [None, SHAPE[:2]])
def test_what_a_picture_needs_is_copied_out_of_the_ring(map_shape):
    ring = Ring(1)
    part = PartRecord(1, utc_now(), 1, "", "FAIL", 1.0, 1.0, 1.0, "", "", None, 0, "", 0, SHAPE, map_shape)
    drawing = copy_out(ring, part, 0)
    ring.image(0, SHAPE)[:] = 7
    ring.map(0, SHAPE[:2])[:] = 7
    assert not drawing.image.any()
    assert drawing.map is None or not drawing.map.any()
    ring.close()


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    pictures = Pictures(tmp_path, 1e9)
    pictures.measure(lambda: None)
    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        pictures.write(picture_path(utc_now(), 1, utc_now(), "FAIL"), b"png")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_oldest_pictures_go_when_there_are_too_many_bytes(tmp_path):
    size = 10_000
    pictures = Pictures(tmp_path, 10 * size)
    old = tmp_path / "pictures" / "20200101"
    old.mkdir(parents=True)
    (old / "old.png").write_bytes(bytes(size))
    (old / ".half.png").write_bytes(bytes(size))
    pictures.measure(lambda: None)
    assert not (old / ".half.png").exists()
    at = utc_now()
    for part in range(25):
        pictures.write(picture_path(at, part, at, "FAIL"), bytes(size))
        assert sum(path.stat().st_size for path in (tmp_path / "pictures").glob("*/*")) <= 10 * size
        assert (old / "old.png").exists() == (part < 9)
    left = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "pictures").glob("*/*.png"))
    assert left == list(range(15, 25))
    assert not old.exists()


def test_what_is_too_old_is_deleted(lines, tmp_path):
    now = datetime.now(timezone.utc)
    long_ago = (now - timedelta(days=8)).isoformat(timespec="microseconds")
    recent = (now - timedelta(days=6)).isoformat(timespec="microseconds")
    line = lines(tmp_path)
    line.opened()
    for _ in range(1500):
        line.part(at=long_ago)
        line.poll()
    for _ in range(10):
        line.part(at=recent)
    line.written()
    line.close()
    for day in (long_ago, recent):
        folder = tmp_path / "pictures" / day[:10].replace("-", "")
        folder.mkdir(parents=True)
        for number in range(120):
            (folder / f"{number}.png").write_bytes(b"png")
    assert query(tmp_path, "SELECT count(*) FROM parts") == [(1510,)]

    line = lines(tmp_path, max_days=1e12)  # for ever
    line.opened()
    line.close()
    assert query(tmp_path, "SELECT count(*) FROM parts") == [(1510,)]
    line = lines(tmp_path, max_days=7.0)
    line.until(lambda: query(tmp_path, "SELECT count(*) FROM parts") == [(10,)])
    line.until(lambda: len(list((tmp_path / "pictures").iterdir())) == 1)
    line.close()
    assert len(list((tmp_path / "pictures").glob("*/*.png"))) == 120
    assert [run.records for run in runs(tmp_path)] == [1511, 1, 1]
    assert [run.lost for run in runs(tmp_path)] == [0, 0, 0]


# --- killed processes


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
from test_edge_journal import Line
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
            (count,) = tmp_path.glob("handed-*")
            kept = tmp_path / "the same count"
            os.link(count, kept)  # a journal process that outlives its line by a moment settles the run by itself
            deadline = time.monotonic() + 20
            while read_count(kept).records < 450:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            if killed == "everything":
                os.kill(journal, signal.SIGKILL)
        finally:
            process.kill()
    handed = read_count(kept)
    assert not handed.closed
    line = lines(tmp_path)
    line.opened()
    line.close()
    theirs, ours = runs(tmp_path)
    assert theirs.end == "killed"
    assert rows(tmp_path) - 1 + theirs.lost == theirs.records + theirs.lost == handed.records
    assert (ours.end, ours.lost) == ("closed", 0)
    if killed == "everything":
        assert theirs.lost > 0
        assert theirs.records > 200  # whole batches of 200 were committed
        assert line.writer.status.lost_before == theirs.lost
        assert texts(tmp_path) == [f"{theirs.lost} records of the run of {theirs.at} were lost"]
    assert not list(tmp_path.glob("handed-*"))


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
    (count,) = tmp_path.glob("handed-*.count")
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
    assert f"{count.name} is missing or damaged" in text
    assert not list(tmp_path.glob("handed-*"))


def test_the_count_file_is_what_its_docstring_says(tmp_path):
    at = "2026-03-15T10:11:12.123456+00:00"
    count = HandedCount(tmp_path, at)
    count.write(258, closed=True)
    path = count_file(tmp_path, at)
    assert path.name == "handed-20260315T101112123456Z.count"
    assert path.read_bytes().hex() == "5354504d48414e44" + "0201000000000000" + "01000000" + "7c5bc455"
    assert read_count(path) == Handed(258, True)
    assert ended_runs(tmp_path) == []  # it is held
    count.close()
    assert ended_runs(tmp_path) == [(at, path)]


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


def test_a_process_that_does_not_start_is_tried_again_with_growing_pauses(tmp_path, monkeypatch):
    line = Line(tmp_path, begin=False)
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


# --- disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB."""
    point = tmp_path / "small"
    point.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(point)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield point
    subprocess.run(["umount", str(point)], check=True)


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
    assert "how many were lost" in line.writer.status.reason
    line.part()
    line.until(lambda: "cannot write the journal" in line.writer.status.reason)
    assert not line.writer.status.open
    filler.unlink()
    line.opened()
    line.written()
    line.close()
    assert runs(small_disk / "journal")[0].records == 2


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


def test_a_database_of_a_newer_schema_is_left_alone(lines, tmp_path):
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    connection.execute("CREATE TABLE parts (future)")
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    before = (tmp_path / "journal.sqlite").read_bytes()
    line = lines(tmp_path)
    line.until(lambda: "found schema 7" in line.writer.status.reason)
    line.part()
    line.until(lambda: line.writer.fileno() == -1)
    line.close()
    assert (tmp_path / "journal.sqlite").read_bytes() == before


def test_two_lines_do_not_write_one_journal(lines, tmp_path):
    first = lines(tmp_path)
    first.opened()
    second = lines(tmp_path)
    second.part()
    second.until(lambda: "another journal process writes there" in second.writer.status.reason)
    first.part()
    first.written()
    first.close()
    second.opened()
    second.close()
    assert [(run.records, run.lost, run.end) for run in runs(tmp_path)] == [(2, 0, "closed")] * 2


def test_a_process_that_is_started_again_begins_where_the_database_stands(tmp_path):
    run = Run(1, utc_now(), "", "", {})
    database = Database(tmp_path)
    database.write(database.begin(run).id, [Event(2, utc_now(), "state", "x")], [], 5, 3)
    database.close()
    records = Records(tmp_path, 0.2, 30)
    records.run = run
    assert records.open(0.0) is not None
    assert (records.through, records.lost, records.lost_pictures) == (5, 3, 3)
    records.finish(1.0, 3)


def test_a_commit_that_is_written_twice_is_counted_once(tmp_path):
    database = Database(tmp_path)
    row = database.begin(Run(1, utc_now(), "", "", {}))
    events = [Event(number, utc_now(), "state", "x") for number in (2, 3)]
    assert database.write(row.id, events, [], 3, 0) == 2
    assert database.write(row.id, events, [], 3, 0) == 0
    database.close()
    assert (runs(tmp_path)[0].records, runs(tmp_path)[0].lost) == (3, 0)
