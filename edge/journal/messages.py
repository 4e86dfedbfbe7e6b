"""What the line and the journal process say to each other."""

from datetime import datetime, timedelta, timezone

import msgspec

from stpm.edge.limits import Count, Positive, Unlimited


def utc_now() -> str:
    """What `at` is: UTC, ISO 8601, microseconds, always of one length, so that text sorts as time."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def days_ago(days: float) -> str:
    """The same for so long ago; for ever is a hundred years."""
    moment = datetime.now(timezone.utc) - timedelta(days=min(days, 36525))
    return moment.isoformat(timespec="microseconds")


class JournalSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[journal] of a station."""

    folder: str = ""  # none without one
    rejects: bool = True  # a picture of every reject
    passes_every: Count = 100  # a picture of every so many passes; 0: none
    max_gb: Unlimited = 10.0  # pictures; the oldest go first
    max_days: Unlimited = 30.0  # pictures and parts
    commit_s: Positive = 0.2  # what a kill -9 can lose at most


class JournalOpened(msgspec.Struct, frozen=True, tag=True):
    """The journal can be written. `lost`: records that an earlier run handed over and that are not in it."""

    lost: int


class Run(msgspec.Struct, frozen=True, tag=True):
    """The first record of a run."""

    record: int
    at: str  # UTC, ISO 8601, microseconds
    station: str
    version: str
    recipes: dict[str, str]  # number → category and the bundle's sha256


class PartRecord(msgspec.Struct, frozen=True, tag=True):
    """One part, when it has its verdict."""

    record: int  # counts every record of the run, from 1, without a gap
    at: str
    part: int
    frame: str
    verdict: str  # PASS, FAIL or UNKNOWN
    score: float | None
    threshold: float
    latency_ms: float | None  # capture to verdict; None without a frame
    bundle: str  # sha256
    reason: str
    box: tuple[int, int, int, int] | None
    area: int
    outcome: str  # what became of it: delivered, acknowledged, undelivered; passed or rejected at the gate
    # for the picture, if one is due: the slot stays taken until the journal gives it back with Released; a shape
    # without a slot says that one is due and that there was none to lend
    slot: int | None = None
    shape: tuple[int, int, int] = (0, 0, 0)
    map_shape: tuple[int, int] | None = None
    roi: tuple[int, int, int, int] | None = None  # with height and width of the map: how the frame was cut


class Outcome(msgspec.Struct, frozen=True, tag=True):
    """What has become of a part since it was recorded: a record of its own, which completes that one."""

    record: int
    of: int  # the number of the part's record
    outcome: str


class Event(msgspec.Struct, frozen=True, tag=True):
    """A change of state, an alarm, an action of an operator or the PLC."""

    record: int
    at: str
    kind: str  # state, alarm, operator, plc, camera, engine, journal, recipe
    text: str


class Released(msgspec.Struct, frozen=True, tag=True):
    """Journal → line: this slot is no longer needed."""

    slot: int


class JournalState(msgspec.Struct, frozen=True, tag=True):
    """Journal → line, when it changes and once a second, which says that it does not hang: how many records of this
    run could not be written so far, and why the last one; no reason while all is well."""

    lost: int
    lost_pictures: int
    reason: str
    through: int = 0  # the number of the last record that this takes into account


class JournalFailed(msgspec.Struct, frozen=True, tag=True):
    """It cannot be opened; the process ends after this."""

    sentence: str


FromJournal = JournalOpened | Released | JournalState | JournalFailed
ToJournal = Run | PartRecord | Outcome | Event
