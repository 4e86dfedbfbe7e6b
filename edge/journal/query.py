"""Reading a journal: beside a running line, after it, or in a copy of the folder.

Rows come in pages, each with a short transaction of its own: a long one would keep the write-ahead log of the running
line from being emptied. Rows never change once written, so pages fit together.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from stpm.edge.errors import StorageError
from stpm.edge.journal.database import NAME, check_schema, is_damage
from stpm.edge.journal.handed import count_file, read_count
from stpm.edge.journal.pictures import picture_path

PAGE = 5000
PART_COLUMNS = (
    *("run", "record", "at", "part", "frame", "verdict", "score", "threshold", "latency_ms", "bundle", "reason"),
    *("box_x", "box_y", "box_width", "box_height", "area", "outcome"),
)

Row = tuple[Any, ...]


class Filter(msgspec.Struct, frozen=True):
    """What to look at; None is no condition."""

    since: str | None = None  # UTC text as in the database
    until: str | None = None
    run: int | None = None
    verdict: str | None = None
    parts: tuple[int, int] | None = None  # first and last
    reason: str | None = None  # a piece of it, upper or lower case
    min_score: float | None = None
    kind: str | None = None  # of events

    def conditions(self) -> tuple[str, list[object]]:
        """An SQL expression, true for what is wanted, and its values."""
        wanted: list[tuple[str, object]] = [
            ("at >= ?", self.since),
            ("at < ?", self.until),
            ("run = ?", self.run),
            ("verdict = ?", self.verdict),
            ("part >= ?", self.parts and self.parts[0]),
            ("part <= ?", self.parts and self.parts[1]),
            ("instr(lower(reason), lower(?)) > 0", self.reason),
            ("score >= ?", self.min_score),
            ("kind = ?", self.kind),
        ]
        given = [(condition, value) for condition, value in wanted if value is not None]
        return " AND ".join(["1", *(condition for condition, _ in given)]), [value for _, value in given]


class RunSummary(msgspec.Struct, frozen=True):
    id: int
    at: str
    station: str
    version: str
    recipes: dict[str, str]
    end: str
    records: int  # in the database, or were until they got too old
    lost: int
    lost_pictures: int
    pending: int | None  # handed over and not in the database: on their way while the run goes on, else lost


class Journal:
    """A journal folder, open for reading. StorageError when there is none, or when it is damaged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / NAME
        if not self._path.is_file():
            found = "no such folder" if not folder.is_dir() else f"no {NAME} in it"
            raise StorageError(
                f"wanted a journal folder, found {found}: {folder}; give the [journal] folder of a station"
            )
        with _sentences(self._path):
            self._connection = _connect(self._path)
            try:
                made = check_schema(self._connection, self._path)
            except BaseException:
                self._connection.close()
                raise
        if not made:
            self._connection.close()
            raise StorageError(f"wanted a journal, found an empty database {self._path}: start the line once")

    def runs(self) -> list[RunSummary]:
        """Oldest first."""
        columns = "id, at, station, version, recipes, end, last, written, lost_pictures"
        runs = []
        for number, at, station, version, recipes, end, last, written, pictures in self._all(
            f"SELECT {columns} FROM runs ORDER BY id", []
        ):
            handed = read_count(count_file(self._folder, at))
            pending = max(0, handed.records - last) if handed else None
            try:
                known = msgspec.json.decode(recipes, type=dict[str, str])
            except msgspec.DecodeError:
                known = {}  # somebody has written there; the rest of the run is not the worse for it
            runs.append(
                RunSummary(number, at, station, version, known, end, written, last - written, pictures, pending)
            )
        return runs

    def count(self, wanted: Filter) -> int:
        conditions, values = wanted.conditions()
        return int(self._all(f"SELECT count(*) FROM parts WHERE {conditions}", values)[0][0])

    def newest(self, wanted: Filter, limit: int) -> list[Row]:
        """Rows of PART_COLUMNS, oldest first."""
        conditions, values = wanted.conditions()
        statement = (
            f"SELECT {', '.join(PART_COLUMNS)} FROM parts WHERE {conditions} ORDER BY run DESC, record DESC LIMIT ?"
        )
        return self._all(statement, [*values, limit])[::-1]

    def parts(self, wanted: Filter) -> Iterator[list[Row]]:
        """All that are there now, oldest first, in pages of rows of PART_COLUMNS."""
        conditions, values = wanted.conditions()
        # a page that was looked up by time would sort all of that time once for each page
        by_key = conditions.replace("at >=", "+at >=").replace("at <", "+at <").replace("part ", "+part ")
        statement = (
            f"SELECT {', '.join(PART_COLUMNS)} FROM parts WHERE {by_key} AND run = ? AND record BETWEEN ? AND ? "
            f"ORDER BY record LIMIT {PAGE}"
        )
        extents = f"SELECT run, min(record), max(record) FROM parts WHERE {conditions} GROUP BY run ORDER BY run"
        for run, first, last in self._all(extents, values):
            while page := self._all(statement, [*values, run, first, last]):
                yield page
                first = page[-1][1] + 1

    def groups(self, wanted: Filter) -> list[Row]:
        """run, bundle, verdict and how many."""
        conditions, values = wanted.conditions()
        statement = (
            f"SELECT run, bundle, verdict, count(*) FROM parts WHERE {conditions} GROUP BY run, bundle, verdict"
        )
        return self._all(statement, values)

    def events(self, wanted: Filter, limit: int) -> list[Row]:
        """run, at, kind, text; oldest first."""
        conditions, values = wanted.conditions()
        statement = f"SELECT run, at, kind, text FROM events WHERE {conditions} ORDER BY at DESC, id DESC LIMIT ?"
        return self._all(statement, [*values, limit])[::-1]

    def pictures(self, wanted: Filter) -> list[Path]:
        """Where the pictures of these parts would be, whether or not they are there."""
        starts = {run.id: run.at for run in self.runs()}
        where = []
        for page in self.parts(wanted):
            for row in page:
                part = dict(zip(PART_COLUMNS, row, strict=True))
                path = picture_path(starts[part["run"]], part["part"], part["at"], part["verdict"])
                where.append(self._folder / path)
        return where

    def _all(self, statement: str, values: list[object]) -> list[Row]:
        with _sentences(self._path):
            return self._connection.execute(statement, values).fetchall()

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _connect(path: Path) -> sqlite3.Connection:
    """Read-only. Where nothing can be written, SQLite cannot share a log; without one it need not."""
    uri = path.resolve().as_uri()
    connection = sqlite3.connect(f"{uri}?mode=ro", uri=True, timeout=5, isolation_level=None)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        log = path.with_name(f"{path.name}-wal")
        if log.exists() and log.stat().st_size:
            raise
        return sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, isolation_level=None)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """What SQLite says, as StorageError."""
    try:
        yield
    except sqlite3.Error as error:
        if is_damage(error):
            raise StorageError(
                f"{path} is damaged ({error}): the next start of the line moves it aside and begins a new one; "
                "`sqlite3 FILE .recover` may read what is left of the old one"
            ) from error
        raise StorageError(
            f"cannot read {path} ({error}): check its permissions, or copy the folder to a disk that can be written"
        ) from error
