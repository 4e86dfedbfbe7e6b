"""The line's side of the journal: numbers the records, counts them, lends slots, and keeps a journal process alive.

Nothing here waits or fails, whatever becomes of the journal: a record that cannot be sent waits in a bounded queue,
and one that falls out of it is lost and counted. The only file is the count of records handed over, which lies in
shared memory (handed.py).
"""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import msgspec

from stpm.edge.channel import ChannelClosedError
from stpm.edge.journal.handed import HandedCount, count_file
from stpm.edge.journal.messages import (
    Event,
    FromJournal,
    JournalFailed,
    JournalOpened,
    JournalSettings,
    JournalState,
    Outcome,
    PartRecord,
    Released,
    Run,
    utc_now,
)
from stpm.edge.worker import Worker

SLOTS_LENT = 4  # at a time
QUEUE = 2000  # records that wait for the channel, or for a journal process
TEXT = 2000  # characters of a reason or event
STUCK_NS = 20_000_000_000  # nothing heard from the journal process for so long: it hangs
REAP_S = 0.5  # for the end of a process that was killed; one that hangs in a disk is left to the system
BACK_OFF_NS = (500_000_000, 30_000_000_000)  # first and longest
STEADY_NS = 10_000_000_000  # a process that lived for so long begins with the first back-off again


class JournalStatus(msgspec.Struct, frozen=True):
    """What the line may show or report about its journal."""

    open: bool  # the database is being written
    handed: int  # records of this run
    lost: int  # of them, as far as is known; exact when the journal has caught up
    lost_pictures: int
    lost_before: int  # records of earlier runs, found when the journal was opened
    reason: str  # why it cannot be written at present; empty while all is well


class JournalWriter:
    """Made at the start of a run. `start` starts a journal process with these settings.

    `begin` comes once, with the recipes; records may come before it. `poll` is due whenever the descriptor is
    readable, and a few times a second. `now_ns` is monotonic.
    """

    def __init__(
        self, settings: JournalSettings, start: Callable[[], Worker], now_ns: int, slots: int = SLOTS_LENT
    ) -> None:
        self._settings, self._start, self._now, self._slots = settings, start, now_ns, slots
        self._at = utc_now()
        self._run: Run | None = None
        self._number = 1  # of the last record; the first is the Run
        self._passes = 0
        self._queue: deque[PartRecord | Outcome | Event] = deque()
        self._dropped = self._dropped_last = 0  # lost before they were sent; how many, and the number of the last one
        self._lent: set[int] = set()
        self._lost_pictures = 0  # their slots were with a journal process that ended
        self._state = JournalState(0, 0, "")
        self._open, self._lost_before = False, 0
        self._problem = self._count_problem = ""
        self._worker: Worker | None = None
        self._ended: list[Popen[bytes]] = []
        self._heard = self._started = self._again = now_ns
        self._back_off = BACK_OFF_NS[0]
        self._count = self._open_count()
        self._keep_count()

    def _open_count(self) -> HandedCount | None:
        try:
            return HandedCount(Path(self._settings.folder), self._at)
        except OSError as error:
            self._count_failed(error)
            return None

    def _count_failed(self, error: OSError) -> None:
        self._count_problem = (
            f"cannot keep count of records of {self._settings.folder} ({error.strerror}): after a kill it will not be "
            "known how many were lost"
        )

    def _keep_count(self) -> None:
        if self._count is not None:
            try:
                self._count.write(self._number)
            except OSError as error:
                self._count_failed(error)

    # --- what the line records

    def begin(self, station: str, version: str, recipes: dict[str, str]) -> None:
        """The first record of the run, and the first journal process."""
        self._run = Run(1, self._at, station, version, recipes)
        self._launch()

    def part(self, record: PartRecord) -> bool:
        """Record a part; its number is set here, and its `at` when it has none. Its slot and shapes are those of its
        frame, if there is one.

        True when the slot is lent for a picture: it comes back from `poll`. Otherwise it is free at once.
        """
        due = record.slot is not None and self._picture_due(record.verdict)
        lend = due and self._worker is not None and not self._queue and len(self._lent) < self._slots
        message = msgspec.structs.replace(
            record,
            record=self._next(),
            at=record.at or utc_now(),
            frame=_clean(record.frame),
            reason=_clean(record.reason),
            slot=record.slot if lend else None,
            shape=record.shape if due else (0, 0, 0),
        )
        if not self._send(message):
            self._enqueue(msgspec.structs.replace(message, slot=None))
            return False
        if message.slot is not None:
            self._lent.add(message.slot)
        return lend

    def _picture_due(self, verdict: str) -> bool:
        if verdict != "PASS":
            return self._settings.rejects
        every = self._settings.passes_every
        self._passes += 1
        return every > 0 and (self._passes - 1) % every == 0

    @property
    def newest(self) -> int:
        """The number of the last record."""
        return self._number

    def outcome(self, of: int, outcome: str) -> None:
        """Record what has become of the part whose record has that number."""
        self._hand_over(Outcome(self._next(), of, outcome))

    def event(self, kind: str, text: str) -> None:
        """Record a change of state, an alarm, an action."""
        self._hand_over(Event(self._next(), utc_now(), kind, _clean(text)))

    def _hand_over(self, message: Outcome | Event) -> None:
        if not self._send(message):
            self._enqueue(message)

    def _next(self) -> int:
        """Counted before it is sent, so that whatever is in the journal has been counted."""
        self._number += 1
        self._keep_count()
        return self._number

    def _send(self, message: PartRecord | Outcome | Event) -> bool:
        return self._worker is not None and not self._queue and self._worker.channel.send(message)

    def _enqueue(self, message: PartRecord | Outcome | Event) -> None:
        self._queue.append(message)
        if len(self._queue) > QUEUE:
            self._dropped_last = self._queue.popleft().record
            self._dropped += 1

    # --- the journal process

    def fileno(self) -> int:
        """Readable when there is something to poll for; -1 without a process. It may change with every `poll`."""
        return -1 if self._worker is None else self._worker.channel.fileno()

    def poll(self, now_ns: int) -> list[int]:
        """Hear the journal process, start it again when it has ended or hangs. Returns the slots that came back."""
        self._now = now_ns
        freed = self._listen()
        self._ended = [process for process in self._ended if process.poll() is None]
        if self._worker is None and self._run is not None and now_ns >= self._again:
            self._launch()
        self._flush()
        return freed

    def _listen(self) -> list[int]:
        freed: list[int] = []
        if self._worker is None:
            return freed
        try:
            for message in self._worker.channel.receive():
                self._heard = self._now
                self._hear(message, freed)
        except ChannelClosedError:
            return freed + self._give_up("ended")
        if self._now - self._heard > STUCK_NS:
            return freed + self._give_up(f"was silent for {STUCK_NS // 1_000_000_000} s and was killed")
        return freed

    def _hear(self, message: FromJournal, freed: list[int]) -> None:
        if isinstance(message, Released):
            if message.slot in self._lent:  # else it is somebody else's by now
                self._lent.remove(message.slot)
                freed.append(message.slot)
        elif isinstance(message, JournalState):
            if message.through >= self._dropped_last:  # the journal has seen the gap
                self._dropped = 0
            lost, lost_pictures = self._state.lost, self._state.lost_pictures
            self._state = msgspec.structs.replace(
                message, lost=max(lost, message.lost), lost_pictures=max(lost_pictures, message.lost_pictures)
            )
        elif isinstance(message, JournalOpened):
            self._open, self._problem = True, ""
            self._lost_before = max(self._lost_before, message.lost)
        elif isinstance(message, JournalFailed):
            self._problem = message.sentence

    def _give_up(self, what: str) -> list[int]:
        """Kill the process, without waiting for its end, and take back its slots."""
        assert self._worker is not None
        self._worker.channel.close()
        self._worker.process.kill()
        self._ended.append(self._worker.process)
        self._worker, self._open = None, False
        self._state = msgspec.structs.replace(self._state, reason="")
        self._problem = self._problem or f"the journal process {what}"
        if self._now - self._started > STEADY_NS:
            self._back_off = BACK_OFF_NS[0]
        self._again = self._now + self._back_off
        self._back_off = min(2 * self._back_off, BACK_OFF_NS[1])
        slots = sorted(self._lent)
        self._lent.clear()
        self._lost_pictures += len(slots)
        self.event("journal", f"the journal process {what}, with {len(slots)} pictures in hand")
        return slots

    def _launch(self) -> None:
        """A new process hears of the run first."""
        assert self._run is not None
        self._heard = self._started = self._now
        try:
            self._worker = self._start()
        except OSError as error:
            self._problem = f"cannot start a journal process ({error.strerror})"
            self._again, self._back_off = self._now + self._back_off, min(2 * self._back_off, BACK_OFF_NS[1])
            return
        self._worker.channel.send(self._run)
        self._flush()

    def _flush(self) -> None:
        while self._queue and self._worker is not None and self._worker.channel.send(self._queue[0]):
            self._queue.popleft()

    # --- what became of it

    @property
    def status(self) -> JournalStatus:
        return JournalStatus(
            open=self._open,
            handed=self._number,
            lost=self._state.lost + self._dropped,
            lost_pictures=self._state.lost_pictures + self._lost_pictures,
            lost_before=self._lost_before,
            reason=self._state.reason or self._problem or self._count_problem,
        )

    def close(self, grace_s: float = 3.0) -> None:
        """The end of the run: what waits is handed over and written, within `grace_s` seconds; a journal process that
        has not ended by then is killed. Slots are of no more use. A second call does nothing."""
        deadline = time.monotonic() + grace_s
        begun, self._run = self._run is not None, None  # no more processes
        while self._queue and self._worker is not None and time.monotonic() < deadline - grace_s / 2:
            self._flush()
            time.sleep(0.002)
        if self._count is not None:
            try:
                self._count.write(self._number, closed=True)
            except OSError as error:
                self._count_failed(error)
        if self._worker is not None:
            worker, self._worker = self._worker, None
            for message in worker.end(max(0.0, deadline - time.monotonic())):  # what it could not write
                self._hear(message, [])
            self._ended.append(worker.process)
        while time.monotonic() < deadline + REAP_S and any(process.poll() is None for process in self._ended):
            time.sleep(0.002)
        if self._count is not None:
            self._count.close()
            self._count = None
            if not begun:  # there is nothing to count, and nobody who would take it away
                count_file(Path(self._settings.folder), self._at).unlink(missing_ok=True)


def _clean(text: str) -> str:
    """Short enough for a message, and without the bytes of a file name that are no text."""
    return text[:TEXT].encode(errors="replace").decode()
