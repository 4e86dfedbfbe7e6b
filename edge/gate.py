"""When the gate switches for which part. Pure: the time is passed in, levels come out.

A part is in front of the gate from its due time on, for one pulse. The due time is counted from the capture, never
from the result: by the clock (constant speed) or by the encoder. A part whose verdict is not there when it is due, or
is not PASS, is rejected.

    polarity accept   the output is on while a passed part is in front of the gate and no rejected one is: a dead
                      computer rejects
    polarity reject   the output is on while a rejected part is in front of the gate, while the line is in FAULT, and
                      after that until the last part that it may not have seen is past the gate

Where two parts are so close that their pulses overlap, the reject wins.
"""

from collections.abc import Callable
from dataclasses import dataclass

from stpm.edge.config import GateSettings
from stpm.edge.encoder import Encoder

MS = 1_000_000
AGAIN_NS = 100 * MS  # between two attempts at an edge
NEVER_NS = -(1 << 62)


@dataclass(frozen=True)
class Edge:
    """Switch the output to `active`; wanted at `due_ns`."""

    part: int
    active: bool
    due_ns: int


@dataclass
class Window:
    """The time of one part in front of the gate."""

    part: int
    captured_ns: int
    delay: float  # ms, or encoder counts
    id: int
    position: float | None = None  # encoder count at which it is due
    placed: bool = False  # the encoder has been read since the capture: the position is final
    due_ns: int | None = None  # None: the encoder cannot say yet
    ends_ns: int | None = None  # set when it has begun
    least_ns: int = 0  # when a reject ends that the belt does not hold up
    arrived: bool = False  # by the encoder, not by its speed
    passes: bool = False


class Gate:
    """`decided` is told of each part in front of the gate: "passed", "rejected", or "missed", known too late to be
    pushed off."""

    def __init__(
        self, settings: GateSettings, decided: Callable[[int, str], None] = lambda part, outcome: None
    ) -> None:
        self._settings, self._decided = settings, decided
        self.encoder: Encoder | None = None
        if settings.mode == "encoder":
            self.encoder = Encoder(round(settings.encoder_timeout_ms * MS), settings.counts)
        self.set_times(0, 0)
        self._windows: list[Window] = []
        self._active: bool | None = False  # every link opens with its output off; None: not known
        self._refused: bool | None = None  # this level did not get through, and waits until then
        self._again_ns = 0
        self._held, self._idle = True, False
        self._held_ns = self._now_ns = NEVER_NS  # held since; as of
        self._unseen: Window | None = None  # of the last part that may have gone past the camera unseen
        self._abandoned = False

    @property
    def used(self) -> bool:
        return self._settings.mode != "plc"

    def set_times(self, delay: float, pulse_ms: float) -> None:
        """From now on; 0 for what the station says."""
        settings = self._settings
        self._delay = delay or (settings.counts if settings.mode == "encoder" else settings.delay_ms)
        self.pulse_ns = round((pulse_ms or settings.pulse_ms) * MS)
        if self.encoder is not None:
            self.encoder.way = round(self._delay)

    def plan(self, part: int, captured_ns: int, id: int = 0) -> None:
        """A part was in front of the camera at that time; said again when the time is known better. `part` is its
        key, never used twice; `id` what its edges are called."""
        window = next((window for window in self._windows if window.part == part), None)
        if window is None:
            window = Window(part, captured_ns, self._delay, id or part)
            self._windows.append(window)
        if window.ends_ns is None:
            window.captured_ns, window.placed = captured_ns, False
            self._estimate(window)

    def decide(self, part: int, passes: bool) -> None:
        """The verdict; without effect on a part that has already been in front of the gate."""
        for window in self._windows:
            if window.part == part and window.ends_ns is None:
                window.passes = passes

    def not_switched(self, now_ns: int) -> None:
        """The newest edge did not get through: it is given again after a moment."""
        self._refused, self._active, self._again_ns = self._active, None, now_ns + AGAIN_NS

    def hold(self, held: bool, now_ns: int, idle: bool = False) -> None:
        """Reject whatever comes (FAULT, not ready yet), or work. `idle`: nothing is inspected any more, so reject once
        those on the way are gone.

        With polarity reject, parts that went past the camera meanwhile would pass after that for want of a window, and
        with any polarity after `abandon`: everything is rejected until they are gone.
        """
        if held and not self._held:
            self._held_ns = now_ns
        works_again = (self._held and not held) or (self._idle and not idle)
        self._held, self._idle, self._now_ns = held, idle, now_ns
        if works_again and (self._abandoned or self._settings.polarity == "reject"):
            self._unseen = Window(0, now_ns, self._delay, 0)
        elif self._rests:
            self._unseen = None

    def abandon(self) -> None:
        """Nobody knows any more where the parts on the way are: it is held, all of them are rejected, and so is what
        comes while they may still be there."""
        self.hold(True, self._now_ns)
        gone, self._windows = self._windows, []
        for window in gone:
            if window.ends_ns is None:
                self._decided(window.part, "rejected")
        self._abandoned = self._abandoned or bool(gone)

    @property
    def _rests(self) -> bool:
        """Nothing passes, whatever comes."""
        return self._held or (self._idle and not self._windows)

    @property
    def waiting(self) -> int:
        """Parts on their way to the gate, or in front of it."""
        return len(self._windows)

    def due_ns(self) -> int | None:
        """When `edges` has something to do next."""
        times = [window.ends_ns or window.due_ns for window in self._windows]
        # while it waits for a count, that is what wakes us
        if self._unseen is not None and self._unseen.due_ns is not None and self._brought(self._unseen):
            times.append(self._unseen.due_ns + self.pulse_ns)
        return min((time for time in times if time is not None), default=None)

    def edges(self, now_ns: int) -> list[Edge]:
        """What must be switched by now: none or one."""
        self._look_for_unseen(now_ns)
        if self.encoder is not None:
            for window in self._windows:
                if window.ends_ns is None:
                    self._estimate(window)
        last: tuple[int, int] | None = None  # (when, part) of the newest change
        for window in self._windows:
            if window.ends_ns is None and window.due_ns is not None and window.due_ns <= now_ns:
                window.passes = window.passes and not self._held  # for good: what is told of it must stay true
                window.ends_ns = window.least_ns = self._end_of(window, window.due_ns, now_ns)
                last = max(last or (0, 0), (window.due_ns, window.id))
                self._decided(window.part, self._outcome(window, now_ns))
        for window in self._windows:
            self._hold_up(window, now_ns)
        for window in [window for window in self._windows if window.ends_ns is not None and window.ends_ns <= now_ns]:
            last = max(last or (0, 0), (window.ends_ns or 0, window.id))
            self._windows.remove(window)
        wanted = self._level(now_ns)
        refused = self._active is None and wanted == self._refused and now_ns < self._again_ns
        if wanted == self._active or refused:
            return []
        self._active = wanted
        when, part = last or (now_ns, 0)
        return [Edge(part, wanted, when)]

    def rejects(self, now_ns: int) -> bool:
        """Whether something in front of the gate is to be rejected now; otherwise that is passed, or nothing."""
        return self._held or self._rejects(now_ns)

    def _end_of(self, window: Window, due_ns: int, now_ns: int) -> int:
        """A reject that begins late is not the shorter for it; a pass is."""
        late = not window.passes and now_ns < due_ns + self.pulse_ns
        return (now_ns if late else due_ns) + self.pulse_ns

    def _hold_up(self, window: Window, now_ns: int) -> None:
        """A reject that has begun by the speed of the belt is not over before the belt has brought the part: it may
        have stopped just before the gate."""
        if (
            self.encoder is None
            or window.ends_ns is None
            or window.passes
            or window.arrived
            or window.position is None
        ):
            return
        window.arrived = self._brought(window)
        came_ns = (self.encoder.time_of(window.position) or now_ns) if window.arrived else now_ns
        window.ends_ns = max(window.least_ns, came_ns + self.pulse_ns)

    def _brought(self, window: Window) -> bool:
        """Whether a count says that the belt has moved so far, and not only its speed."""
        return self.encoder is None or (window.position is not None and self.encoder.reached(window.position))

    def _outcome(self, window: Window, now_ns: int) -> str:
        past = window.ends_ns is not None and window.ends_ns <= now_ns
        if window.passes and not (self._held or past or self._rejects(now_ns)):
            return "passed"
        on_since_ns = self._held_ns if self._held else now_ns
        missed = past and on_since_ns > (window.due_ns or 0) + self.pulse_ns / 2
        return "missed" if missed and self._settings.polarity == "reject" else "rejected"

    def _level(self, now_ns: int) -> bool:
        if self._rests:
            return self._settings.safe
        rejecting = self._rejects(now_ns)
        if self._settings.polarity == "reject":
            return rejecting
        return not rejecting and any(window.ends_ns and window.passes for window in self._windows)

    def _rejects(self, now_ns: int) -> bool:
        return self._unseen is not None or any(
            window.ends_ns and window.ends_ns > now_ns and not window.passes for window in self._windows
        )

    def _look_for_unseen(self, now_ns: int) -> None:
        if self._unseen is not None:
            self._estimate(self._unseen)
            due_ns = self._unseen.due_ns
            if due_ns is not None and now_ns >= due_ns + self.pulse_ns and self._brought(self._unseen):
                self._unseen, self._abandoned = None, False

    def _estimate(self, window: Window) -> None:
        """When the part is due: with an encoder that moves with the speed, and where the part was captured is known
        better with the first count after that."""
        if self.encoder is None:
            window.due_ns = window.captured_ns + round(window.delay * MS)
            return
        if window.position is None or not window.placed:
            at = self.encoder.count_at(window.captured_ns)
            window.position = None if at is None else at + window.delay
            window.placed = self.encoder.newest_ns >= window.captured_ns
        window.due_ns = None if window.position is None else self.encoder.time_of(window.position)
