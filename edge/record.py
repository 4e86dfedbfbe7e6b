"""What the line writes into its journal, where it has one: parts, their outcomes, events."""

import time

from stpm.edge import __version__
from stpm.edge.config import Station
from stpm.edge.engine.messages import EngineReady
from stpm.edge.gate import MS
from stpm.edge.journal.client import JournalWriter
from stpm.edge.journal.messages import FromJournal, PartRecord
from stpm.edge.parts import Part
from stpm.edge.ring import Ring
from stpm.edge.worker import Worker

MODULE = "stpm.edge.journal.process"


class Record:
    def __init__(self, station: Station, ring: Ring) -> None:
        settings = station.journal
        self._station = station.station.name
        self._numbers: dict[int, int] = {}  # of the records of parts that have no outcome yet, by key
        self._writer = None
        if settings.folder:
            self._writer = JournalWriter(
                settings, lambda: Worker(MODULE, settings, FromJournal, ring), time.monotonic_ns()
            )

    def begin(self, recipes: dict[int, EngineReady]) -> None:
        """The first record of the run."""
        if self._writer is not None:
            self._writer.begin(
                self._station,
                __version__,
                {str(number): f"{known.category} {known.sha256}" for number, known in recipes.items()},
            )

    def part(self, part: Part, lend: bool) -> bool:
        """True when the journal has borrowed the part's slot for a picture; `poll` gives it back."""
        if self._writer is None or part.verdict is None:
            return False
        frame, found = part.frame, part.found
        lent = self._writer.part(
            PartRecord(
                0,
                "",
                part.id,
                frame.name if frame else "",
                part.verdict.verdict,
                part.verdict.score,
                part.known.threshold,
                (part.judged_ns - part.captured_ns) / MS if frame else None,
                part.known.sha256,
                part.verdict.reason,
                found.box if found else None,
                found.area if found else 0,
                "",
                frame.slot if frame and lend else None,
                frame.shape if frame else (0, 0, 0),
                found.map_shape if found else None,
                part.known.roi,
            )
        )
        self._numbers[part.key] = self._writer.newest
        return lent

    def outcome(self, part: Part, last: bool) -> None:
        """What became of the verdict, and of the part at the gate; `last` when nothing more can come."""
        number = self._numbers.get(part.key)
        if self._writer is None or number is None:
            return
        self._writer.outcome(number, " ".join(word for word in (part.delivery, part.gate) if word))
        if last:
            del self._numbers[part.key]

    def event(self, kind: str, text: str) -> None:
        if self._writer is not None:
            self._writer.event(kind, text)

    # --- what the loop asks for

    def fileno(self) -> int | None:
        if self._writer is None or self._writer.fileno() < 0:
            return None
        return self._writer.fileno()

    def poll(self, now_ns: int) -> list[int]:
        """The slots that have come back."""
        return [] if self._writer is None else self._writer.poll(now_ns)

    @property
    def problem(self) -> str:
        """Why the journal is not written at present."""
        return "" if self._writer is None else self._writer.status.reason

    @property
    def open(self) -> bool:
        return self._writer is None or self._writer.status.open

    @property
    def lost(self) -> int:
        return 0 if self._writer is None else self._writer.status.lost

    @property
    def lost_pictures(self) -> int:
        return 0 if self._writer is None else self._writer.status.lost_pictures

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
