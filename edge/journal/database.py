"""The journal's SQLite file, and its one writer.

Write-ahead log, so that any number of readers look on while the line runs; `synchronous = NORMAL`, so that a commit
waits for no disk: after a kill -9 every commit is there, after a power failure the last seconds may be missing, and
either way the file is consistent. Times are text, UTC.

Each run knows `last`, the highest number of a record whose fate is decided, and `written`, how many of those are in
the file or were in it until their days were over. Records are numbered without a gap, so `last - written` are lost.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from stpm.edge.errors import StorageError
from stpm.edge.journal.messages import Event, Outcome, PartRecord, Run

NAME = "journal.sqlite"
SCHEMA = 1
RUNNING, CLOSED, KILLED, UNKNOWN = "running", "closed", "killed", "unknown"

_BUSY_S = 2.0  # for somebody who writes with a tool of his own
_WAL_BYTES = 16 << 20  # what is kept of a log that a long reader let grow
_PRUNE = 1000  # rows at a time, so that no transaction is long

_TABLES = f"""
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    at TEXT NOT NULL UNIQUE,
    station TEXT NOT NULL,
    version TEXT NOT NULL,
    recipes TEXT NOT NULL,                   -- JSON: number → category and the bundle's sha256
    last INTEGER NOT NULL,
    written INTEGER NOT NULL,
    lost_pictures INTEGER NOT NULL DEFAULT 0,
    end TEXT NOT NULL DEFAULT '{RUNNING}'    -- {RUNNING}, {CLOSED}, {KILLED}, or {UNKNOWN}: its count is gone
);
CREATE TABLE parts (
    run INTEGER NOT NULL REFERENCES runs,
    record INTEGER NOT NULL,
    at TEXT NOT NULL,
    part INTEGER NOT NULL,
    frame TEXT NOT NULL,
    verdict TEXT NOT NULL,
    score REAL,
    threshold REAL,
    latency_ms REAL,
    bundle TEXT NOT NULL,
    reason TEXT NOT NULL,
    box_x INTEGER, box_y INTEGER, box_width INTEGER, box_height INTEGER,
    area INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    PRIMARY KEY (run, record)
) WITHOUT ROWID;
CREATE INDEX parts_by_time ON parts (at);
CREATE INDEX parts_by_number ON parts (part);
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    run INTEGER NOT NULL REFERENCES runs,
    record INTEGER,                          -- none: the journal itself says so
    at TEXT NOT NULL,
    kind TEXT NOT NULL,
    text TEXT NOT NULL,
    UNIQUE (run, record)
);
CREATE INDEX events_by_time ON events (at);
"""

_INSERT_EVENT = "INSERT OR IGNORE INTO events (run, record, at, kind, text) VALUES (?, ?, ?, ?, ?)"


class RunRow(msgspec.Struct, frozen=True):
    """How a run stands in the database."""

    id: int
    last: int
    written: int
    lost_pictures: int
    new: bool  # it was not there


class Note(msgspec.Struct, frozen=True):
    """An event of the journal itself, which the line has not numbered."""

    at: str
    text: str


class Database:
    """Open for writing. Every method raises sqlite3.Error for what the disk or the file says; the constructor
    StorageError when the file is of another schema."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._connection = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)
        try:
            self._prepare()
            self._inode = self._path.stat().st_ino
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        execute = self._connection.execute
        made = check_schema(self._connection, self._path)
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = NORMAL")
        execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
        if not made:
            with self.transaction():
                for statement in _TABLES.split(";\n"):
                    execute(statement)
                execute(f"PRAGMA user_version = {SCHEMA}")
        for table, key in (("runs", "id"), ("parts", "record"), ("events", "id")):  # damage at the ends shows now
            execute(f"SELECT * FROM {table} ORDER BY {key} DESC LIMIT 1").fetchone()

    @property
    def in_place(self) -> bool:
        """False when somebody has removed or replaced the file under its writer."""
        try:
            return self._path.stat().st_ino == self._inode
        except OSError:
            return False

    def begin(self, run: Run) -> RunRow:
        """The row of this run, made when it is not there yet."""
        with self.transaction():
            new = self._insert_run(run.at, run.station, run.version, msgspec.json.encode(run.recipes).decode(), 1, 1)
        return self._run(run.at, new)

    def _insert_run(self, at: str, station: str, version: str, recipes: str, last: int, written: int) -> bool:
        done = self._connection.execute(
            "INSERT OR IGNORE INTO runs (at, station, version, recipes, last, written) VALUES (?, ?, ?, ?, ?, ?)",
            (at, station, version, recipes, last, written),
        )
        return done.rowcount == 1

    def _run(self, at: str, new: bool) -> RunRow:
        columns = "id, last, written, lost_pictures"
        found = self._connection.execute(f"SELECT {columns} FROM runs WHERE at = ?", (at,)).fetchone()
        number, last, written, lost_pictures = found
        return RunRow(number, last, written, lost_pictures, new)

    def write(
        self,
        run: int,
        records: Sequence[PartRecord | Outcome | Event],
        notes: Sequence[Note],
        last: int,
        lost_pictures: int,
        end: str = RUNNING,
    ) -> int:
        """All of it in one transaction. Returns how many of the records were new."""
        parts = [_part_row(run, record) for record in records if isinstance(record, PartRecord)]
        outcomes = [(each.outcome, run, each.of) for each in records if isinstance(each, Outcome)]
        events = [(run, each.record, each.at, each.kind, each.text) for each in records if isinstance(each, Event)]
        with self.transaction():
            new = self._insert(f"INSERT OR IGNORE INTO parts VALUES ({', '.join('?' * 17)})", parts)
            new += self._insert(_INSERT_EVENT, events) + len(outcomes)
            self._connection.executemany("UPDATE parts SET outcome = ? WHERE run = ? AND record = ?", outcomes)
            for note in notes:
                self.note(run, note)
            self._connection.execute(
                "UPDATE runs SET last = max(last, ?), written = written + ?, lost_pictures = ?, end = ? WHERE id = ?",
                (last, new, lost_pictures, end, run),
            )
        return new

    def _insert(self, statement: str, rows: Sequence[tuple[object, ...]]) -> int:
        return self._connection.executemany(statement, rows).rowcount if rows else 0

    def settle(self, at: str, handed: int, end: str) -> int:
        """Inside a transaction: the run that began `at` is over, and so many records of it were handed over.

        Returns how many of them are not here; 0 when it was settled before.
        """
        self._insert_run(at, "", "", "{}", 0, 0)
        done = self._connection.execute(
            "UPDATE runs SET last = max(last, ?), end = ? WHERE at = ? AND end = ?", (handed, end, at, RUNNING)
        )
        row = self._run(at, False)
        return row.last - row.written if done.rowcount else 0

    def still_running(self) -> list[str]:
        """When each run began that nobody has settled."""
        return [at for (at,) in self._connection.execute("SELECT at FROM runs WHERE end = ? ORDER BY id", (RUNNING,))]

    def note(self, run: int, note: Note) -> None:
        """Inside a transaction."""
        self._connection.execute(_INSERT_EVENT, (run, None, note.at, "journal", note.text))

    def prune(self, before: str) -> bool:
        """Delete some of what is older. True when there may be more."""
        with self.transaction():
            parts = self._connection.execute(
                "DELETE FROM parts WHERE (run, record) IN (SELECT run, record FROM parts WHERE at < ? LIMIT ?)",
                (before, _PRUNE),
            )
            events = self._connection.execute(
                "DELETE FROM events WHERE id IN (SELECT id FROM events WHERE at < ? LIMIT ?)", (before, _PRUNE)
            )
        return _PRUNE in (parts.rowcount, events.rowcount)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                with suppress(sqlite3.Error):  # the error that brought us here is the one to report
                    self._connection.execute("ROLLBACK")

    def close(self) -> None:
        """A second call does nothing."""
        with suppress(sqlite3.Error):  # a log that does not fit into the database on a full disk stays beside it
            self._connection.close()


def check_schema(connection: sqlite3.Connection, path: Path) -> bool:
    """True when the tables are there, False when the file is empty, StorageError when they are not ours."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if version == 0 and not tables:
        return False
    if version != SCHEMA or not tables >= {"runs", "parts", "events"}:
        raise StorageError(
            f"wanted a journal of schema {SCHEMA}, found schema {version} in {path}: use the version of stpm-edge "
            "that wrote it, or another journal folder"
        )
    return True


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file itself is broken, and not the disk full, read-only or busy."""
    return type(error) is sqlite3.DatabaseError


def set_aside(folder: Path, stamp: str) -> Path:
    """Give a damaged database, with its log, another name. OSError when that is not possible."""
    target = folder / f"journal.damaged-{stamp}.sqlite"
    for suffix in ("-wal", "-shm", ""):  # a log without its database would be played into the next one
        with suppress(FileNotFoundError):
            (folder / f"{NAME}{suffix}").rename(f"{target}{suffix}")
    return target


def _part_row(run: int, part: PartRecord) -> tuple[object, ...]:
    return (
        run,
        part.record,
        part.at,
        part.part,
        part.frame,
        part.verdict,
        part.score,
        part.threshold,
        part.latency_ms,
        part.bundle,
        part.reason,
        *(part.box or (None,) * 4),
        part.area,
        part.outcome,
    )
