"""From the line's records to rows: a backlog that waits for the database, and the database, open or not."""

import fcntl
import os
import sqlite3
from collections import deque
from itertools import islice
from pathlib import Path

from stpm.edge.journal.database import CLOSED, KILLED, NAME, RUNNING, UNKNOWN, Database, Note, is_damage, set_aside
from stpm.edge.journal.handed import count_file, ended_runs, read_count, stamp
from stpm.edge.journal.messages import Event, JournalOpened, Outcome, PartRecord, Run, days_ago, utc_now

KEPT = 10_000  # records that wait for a disk, some 10 MB; the oldest go first
BATCH = 200  # so many are committed before their time
COMMIT = 1000  # at most, so that no transaction is long or asks for much space
AGAIN_S = 1.0  # between two attempts on a disk that refuses
DECLARE_S = 10.0  # between two events about losses that go on
PRUNE_S = 60.0
LOCK = "journal.lock"


class Records:
    """`now` is monotonic, seconds. Only `open` raises: StorageError, when the database is of another schema."""

    def __init__(self, folder: Path, commit_s: float, max_days: float) -> None:
        self._folder, self._commit_s, self._max_days = folder, commit_s, max_days
        self.run: Run | None = None
        self.reason = ""  # why the database cannot be written at present
        self.through = 0  # the fate of every record up to this number is decided
        self.lost_pictures = 0  # of this run, for whoever looks after pictures to count on
        self._written = 0
        self._waiting: deque[PartRecord | Outcome | Event] = deque()
        self._since = 0.0  # when the oldest of them came
        self._database: Database | None = None
        self._id = 0  # of the run, in the database
        self._opened = False
        self._lock = -1
        self._again = self._failed_at = 0.0
        self._look_again = self._prune_again = 0.0
        self._why = ""  # what the next event about losses begins with; there is one soon unless this is empty
        self._declared, self._declared_pictures, self._declare_again = 0, 0, 0.0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def lost(self) -> int:
        return self.through - self._written

    def add(self, record: PartRecord | Outcome | Event, now: float) -> None:
        if not self._waiting:
            self._since = now
            if not self._opened and not self.through:  # until the database says more, all before are in it
                self.through = self._written = record.record - 1
        self._waiting.append(record)
        if len(self._waiting) > KEPT:
            self.through = self._waiting.popleft().record

    # --- opening

    def open(self, now: float) -> JournalOpened | None:
        """Open the database when it is not open and it is time to try. JournalOpened the first time it succeeds."""
        if self._database is not None or self.run is None or now < self._again:
            return None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock_folder()
            self._database = Database(self._folder)
            lost = self._begin(self._database, self.run)
        except (OSError, sqlite3.Error) as error:
            self._fail(error, now)
            return None
        if not self._waiting:
            self._explain_recovery(now)
            self.reason = ""
        if self._opened:
            return None
        self._opened = True
        return JournalOpened(lost)

    def _lock_folder(self) -> None:
        """One journal process for each folder."""
        if self._lock < 0:
            self._lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(error.errno, "another journal process writes there") from error

    def _begin(self, database: Database, run: Run) -> int:
        """Find our place in the database, and settle the runs before this one. Returns how many of theirs are lost."""
        row = database.begin(run)
        self._id, self._written = row.id, row.written
        self.through = max(self.through, row.last)
        while self._waiting and self._waiting[0].record <= row.last:
            self._waiting.popleft()  # that commit had been done when it seemed to fail
        if row.new:
            self._declared = 0
        elif not self._opened:
            self._declared, self._why = row.last - row.written, "the journal process was started again"
            self.lost_pictures = self._declared_pictures = row.lost_pictures
        return _settle_earlier(database, self._folder, row.id, run.at)

    def _fail(self, error: OSError | sqlite3.Error, now: float) -> None:
        self._close()
        if isinstance(error, sqlite3.Error) and is_damage(error):
            try:
                aside = set_aside(self._folder, stamp(utc_now()))
            except OSError as refused:
                error = refused
            else:
                self._why = f"{NAME} was damaged ({error}), is now {aside.name}, and a new one was begun"
                self._again = now
                return
        if not self.reason:
            self._failed_at = now
        what = error.strerror if isinstance(error, OSError) else str(error)
        self.reason = f"cannot write the journal in {self._folder} ({what}): records are counted until it can be"
        self._again = now + AGAIN_S

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    # --- writing

    def commit(self, now: float, lost_pictures: int) -> None:
        """Write what waits, when it is time."""
        if len(self._waiting) >= BATCH or now - self._since >= self._commit_s:
            self.flush(now, lost_pictures)

    def flush(self, now: float, lost_pictures: int) -> bool:
        """Write what waits, whatever the time. False when it cannot be written."""
        while self._waiting:
            if not self._write(now, lost_pictures):
                return False
        return True

    def _write(self, now: float, lost_pictures: int, last: int = 0, end: str = RUNNING) -> bool:
        """The oldest that wait, in one transaction with an event about what was lost before them; the fate of numbers
        up to `last` is decided with it."""
        if self._database is None:
            return False
        batch = list(islice(self._waiting, COMMIT))
        through = max(self.through, last, batch[-1].record if batch else 0)
        lost = through - self._written - len(batch)
        self._explain_recovery(now)
        grown = lost > self._declared or lost_pictures > self._declared_pictures
        declare = bool(self._why) or (grown and (now >= self._declare_again or end != RUNNING))
        notes = [self._note(lost, lost_pictures)] if declare else []
        try:
            new = self._database.write(self._id, batch, notes, through, lost_pictures, end)
        except sqlite3.Error as error:
            self._fail(error, now)
            return False
        for _ in batch:
            self._waiting.popleft()
        self.through, self._written, self.reason = through, self._written + new, ""
        if declare:
            self._why, self._declared, self._declared_pictures = "", lost, lost_pictures
            self._declare_again = now + DECLARE_S
        return True

    def _explain_recovery(self, now: float) -> None:
        if self.reason and not self._why:
            self._why = f"not written for {now - self._failed_at:.0f} s: {self.reason}"

    def _note(self, lost: int, lost_pictures: int) -> Note:
        records, pictures = lost - self._declared, lost_pictures - self._declared_pictures
        why = self._why or "more came than could be written"
        return Note(utc_now(), f"{why}; {records} records and {pictures} pictures of this run are not in the journal")

    # --- keeping

    def look_after(self, now: float) -> None:
        """Notice a database that was removed under us; delete the rows that are too old."""
        if self._database is None:
            return
        if now >= self._look_again:
            self._look_again = now + 1
            if not self._database.in_place:
                self._close()
                self._why = f"{NAME} was removed while it was in use, and a new one was begun"
                return
        if now >= self._prune_again:
            try:
                more = self._database.prune(days_ago(self._max_days))
            except sqlite3.Error as error:
                self._fail(error, now)
            else:
                self._prune_again = now if more else now + PRUNE_S

    def finish(self, now: float, lost_pictures: int) -> None:
        """The line has closed the channel or is gone: how the run ended goes into the database, if it can; what waits
        is lost otherwise."""
        if self.run is None:
            return
        self._again = now
        self.open(now)
        path = count_file(self._folder, self.run.at)
        handed = read_count(path)
        end = UNKNOWN if handed is None else CLOSED if handed.closed else KILLED
        last = handed.records if handed else 0
        if self.flush(now, lost_pictures) and self._write(now, lost_pictures, last, end):
            path.unlink(missing_ok=True)
        self.through = max(self.through, last, *(record.record for record in self._waiting))
        self._waiting.clear()
        self._close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _settle_earlier(database: Database, folder: Path, run: int, run_at: str) -> int:
    """Compare what earlier runs handed over with what is here, and say so in events of this run."""
    lost = 0
    for at, path in ended_runs(folder):
        if at != run_at:
            lost += _settle(database, run, at, path)
            path.unlink()
    for at in database.still_running():
        path = count_file(folder, at)
        if at != run_at and read_count(path) is None:
            lost += _settle(database, run, at, path)
    return lost


def _settle(database: Database, run: int, at: str, path: Path) -> int:
    handed = read_count(path)
    with database.transaction():
        if handed is None:
            lost = database.settle(at, 0, UNKNOWN)
            database.note(
                run,
                Note(
                    utc_now(),
                    f"how many records of the run of {at} were lost is not known, at least {lost}: "
                    f"{path.name} is missing, as after a power failure, or damaged",
                ),
            )
        else:
            lost = database.settle(at, handed.records, CLOSED if handed.closed else KILLED)
            if lost:
                database.note(run, Note(utc_now(), f"{lost} records of the run of {at} were lost"))
    return lost
