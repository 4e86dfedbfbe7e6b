"""A line reduced to its journal, and what lies in a journal folder, for the tests of the journal."""

import sqlite3
import time

from stpm.edge.journal.client import JournalWriter
from stpm.edge.journal.handed import count_file
from stpm.edge.journal.messages import FromJournal, JournalSettings, PartRecord, utc_now
from stpm.edge.journal.query import Filter, Journal
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


def counts(folder):
    """The files in which lines have counted what they handed to the journal in that folder."""
    one = count_file(folder, utc_now())
    return sorted(one.parent.glob(f"{one.name.rpartition('-')[0]}-*.count"))


def rows(folder):
    """The records of the line that lie in the tables, that of each run included."""
    count = "SELECT (SELECT count(*) FROM {}) + (SELECT count(*) FROM {} WHERE record > 0) + (SELECT count(*) FROM {})"
    return query(folder, count.format("parts", "events", "runs"))[0][0]
