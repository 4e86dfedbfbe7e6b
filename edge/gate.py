"""When the gate switches for which part. Pure: the time is passed in, levels come out.

A part is in front of the gate from its due time on, for one pulse. The due time is counted from the capture, never
from the result: by the clock (constant speed) or by the encoder. A part whose verdict is not there when it is due, or
is not PASS, is rejected.

    polarity accept   the output is on while a passed part is in front of the gate and no rejected one is: a dead
                      computer rejects
    polarity reject   the output is on while a rejected part is in front of the gate, and while the line is in FAULT

Where two parts are so close that their pulses overlap, the reject wins.
"""

import bisect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from stpm.edge.config import GateSettings

MS = 1_000_000
WRAP = 1 << 32
AGAIN_NS = 100 * MS  # between two attempts at an edge


@dataclass(frozen=True)
class Edge:
    """Switch the output to `active`; wanted at `due_ns`."""

    part: int
    active: bool
    due_ns: int


@dataclass
class Window:
    part: int
    captured_ns: int
    delay: float  # ms, or encoder counts
    id: int
    position: float | None = None  # encoder count at which it is due
    placed: bool = False  # the encoder has been read since the capture: the position is final
    abandoned: bool = False  # rejected for good, whatever its verdict
    due_ns: int | None = None  # None: the encoder cannot say yet
    ends_ns: int | None = None  # set when it has begun
    passes: bool = False


class Encoder:
    """Counts of an encoder, read from time to time: where it was, is, and will be. 32 bits that wrap."""

    def __init__(self, timeout_ns: int) -> None:
        self._timeout_ns = timeout_ns
        self._samples: deque[tuple[int, int]] = deque(maxlen=64)  # (at_ns, count without wraps)

    def add(self, at_ns: int, count: int) -> None:
        if self._samples:
            last_ns, last = self._samples[-1]
            if at_ns <= last_ns:
                return
            # the shorter way round: an encoder may also run back a little
            step = (count - last) % WRAP
            count = last + (step if step < WRAP // 2 else step - WRAP)
        self._samples.append((at_ns, count))

    @property
    def newest_ns(self) -> int:
        return self._samples[-1][0] if self._samples else -1

    def lost(self, now_ns: int) -> bool:
        return not self._samples or now_ns - self._samples[-1][0] > self._timeout_ns

    def count_at(self, ns: int) -> float | None:
        """Between two samples on the line through them, outside on the line through the nearest two."""
        if len(self._samples) < 2:
            return float(self._samples[0][1]) if self._samples else None
        after = bisect.bisect_left(self._samples, (ns, -WRAP))
        after = min(max(after, 1), len(self._samples) - 1)
        (a_ns, a), (b_ns, b) = self._samples[after - 1], self._samples[after]
        return a + (b - a) * (ns - a_ns) / (b_ns - a_ns)

    def time_of(self, count: float) -> int | None:
        """When the encoder passes `count`, at the speed of the newest samples; None while it stands or runs back."""
        if len(self._samples) < 2:
            return None
        back = max(-len(self._samples), -4)
        (a_ns, a), (b_ns, b) = self._samples[back], self._samples[-1]
        if b <= a:
            return b_ns if count <= b else None
        return b_ns + round((count - b) * (b_ns - a_ns) / (b - a))


class Gate:
    """`decided` is told of each part in front of the gate: "passed", "rejected", or "missed", known too late to be
    pushed off."""

    def __init__(
        self, settings: GateSettings, decided: Callable[[int, str], None] = lambda part, outcome: None
    ) -> None:
        self._settings, self._decided = settings, decided
        self.delay = settings.counts if settings.mode == "encoder" else settings.delay_ms
        self.pulse_ns = round(settings.pulse_ms * MS)
        self.encoder = Encoder(round(settings.encoder_timeout_ms * MS)) if settings.mode == "encoder" else None
        self._windows: list[Window] = []
        self._active: bool | None = False  # every link opens with its output off; None: not known
        self._again_ns = 0
        self._held = True

    @property
    def used(self) -> bool:
        return self._settings.mode != "plc"

    def plan(self, part: int, captured_ns: int, id: int = 0) -> None:
        """A part was in front of the camera at that time; said again when the time is known better. `part` is its
        key, never used twice; `id` what its edges are called."""
        window = next((window for window in self._windows if window.part == part), None)
        if window is None:
            window = Window(part, captured_ns, self.delay, id or part)
            self._windows.append(window)
        if window.ends_ns is None:
            window.captured_ns, window.placed = captured_ns, False
            self._estimate(window)

    def decide(self, part: int, passes: bool) -> None:
        """The verdict; without effect on a part that has already been in front of the gate."""
        for window in self._windows:
            if window.part == part and window.ends_ns is None and not window.abandoned:
                window.passes = passes

    def not_switched(self, now_ns: int) -> None:
        """The newest edge did not get through: it is given again after a moment."""
        self._active, self._again_ns = None, now_ns + AGAIN_NS

    def hold(self, held: bool) -> None:
        """Reject whatever comes (FAULT, not ready yet), or work."""
        self._held = held

    def abandon(self) -> None:
        """Nobody knows any more where the parts on the way are: all are rejected. Those of which it was known keep
        their place, for when the encoder is heard again."""
        for window in [window for window in self._windows if window.ends_ns is None]:
            window.passes, window.abandoned = False, True
            if window.position is None:
                self._decided(window.part, "rejected")
                self._windows.remove(window)

    @property
    def waiting(self) -> bool:
        """Parts are on their way to the gate, or in front of it."""
        return bool(self._windows)

    def due_ns(self) -> int | None:
        """When `edges` has something to do next."""
        times = [window.ends_ns or window.due_ns for window in self._windows]
        return min((time for time in times if time is not None), default=None)

    def edges(self, now_ns: int) -> list[Edge]:
        """What must be switched by now: none or one."""
        if self.encoder is not None:
            for window in self._windows:
                if window.ends_ns is None:
                    self._estimate(window)
        last: tuple[int, int] | None = None  # (when, part) of the newest change
        for window in self._windows:
            if window.ends_ns is None and window.due_ns is not None and window.due_ns <= now_ns:
                window.ends_ns = window.due_ns + self.pulse_ns
                last = max(last or (0, 0), (window.due_ns, window.id))
                self._decided(window.part, self._outcome(window, now_ns))
        for window in [window for window in self._windows if window.ends_ns is not None and window.ends_ns <= now_ns]:
            last = max(last or (0, 0), (window.ends_ns or 0, window.id))
            self._windows.remove(window)
        wanted = self._level(now_ns)
        if wanted == self._active or (self._active is None and now_ns < self._again_ns):
            return []
        self._active = wanted
        when, part = last or (now_ns, 0)
        return [Edge(part, wanted, when)]

    def _outcome(self, window: Window, now_ns: int) -> str:
        past = window.ends_ns is not None and window.ends_ns <= now_ns
        if window.passes and not (self._held or past or self._rejects(now_ns)):
            return "passed"
        return "missed" if past and self._settings.polarity == "reject" and not self._held else "rejected"

    def _level(self, now_ns: int) -> bool:
        if self._held:
            return self._settings.safe
        rejecting = self._rejects(now_ns)
        if self._settings.polarity == "reject":
            return rejecting
        return not rejecting and any(window.ends_ns and window.passes for window in self._windows)

    def _rejects(self, now_ns: int) -> bool:
        return any(window.ends_ns and window.ends_ns > now_ns and not window.passes for window in self._windows)

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
