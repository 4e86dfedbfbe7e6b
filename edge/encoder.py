"""Counts of an encoder, read from time to time: where the belt was, is, and will be. Pure; 32 bits that wrap.

An encoder is believed only as far as it is plausible: a counter that is set back, replaced or read wrongly would send
every pass and reject to another part.
"""

import bisect
from collections import deque

WRAP = 1 << 32
# so much faster than ever before a belt may become, and a count may be late by the timeout; until the belt has gone
# the way once, and so has shown its speed, the whole way is the limit
FASTER = 2
# speeds are taken over so many counts, because each may have waited on its way here
SPAN = 16
# what does not matter: this share of the way, and the few counts by which an encoder swings at a standstill
SHARE, LEAST = 0.02, 4


class Encoder:
    """`way`: counts from the camera to the gate."""

    def __init__(self, timeout_ns: int, way: int) -> None:
        self._timeout_ns, self.way = timeout_ns, way
        self._fastest = 0.0  # counts per ns
        self._began = 0
        self._samples: deque[tuple[int, int]] = deque(maxlen=64)  # (at_ns, count without wraps)
        self._furthest = 0
        self.moved_ns = -1  # when the count last changed

    def add(self, at_ns: int, count: int) -> str:
        """What is implausible about this count; then everything before it is forgotten."""
        if not self._samples:
            self._begin(at_ns, count)
            return ""
        last_ns, last = self._samples[-1]
        if at_ns < last_ns:
            return ""
        step = (count - last) % WRAP  # the shorter way round
        step = step if step < WRAP // 2 else step - WRAP
        problem = self._implausible(step, at_ns - last_ns, last)
        if problem:
            self._samples.clear()
            self._begin(at_ns, count)
            return problem
        if step:
            self.moved_ns = at_ns
        if at_ns == last_ns:  # several came together, and the newest is where the belt is
            self._samples.pop()
        self._samples.append((at_ns, last + step))
        self._furthest = max(self._furthest, last + step)
        since_ns, since = self._samples[max(-len(self._samples), -SPAN)]
        if at_ns > since_ns:
            speed = (last + step - since) / (at_ns - since_ns)
            self._fastest = max(self._fastest, speed) if len(self._samples) > SPAN else speed
        return ""

    def _begin(self, at_ns: int, count: int) -> None:
        self._samples.append((at_ns, count))
        self._began = self._furthest = count
        self.moved_ns, self._fastest = at_ns, 0.0

    def _implausible(self, step: int, in_ns: int, last: int) -> str:
        unimportant = max(SHARE * self.way, LEAST)
        known = self._furthest - self._began >= self.way
        expected = FASTER * self._fastest * (in_ns + self._timeout_ns)
        if step > max(unimportant if known else self.way, expected):
            return f"the encoder jumped by {step} counts between two reads"
        back = self._furthest - (last + step)
        if back > unimportant:
            return f"the encoder ran back by {back} counts, or was set to another count"
        return ""

    @property
    def newest_ns(self) -> int:
        return self._samples[-1][0] if self._samples else -1

    def reached(self, count: float) -> bool:
        """Whether it has been read there, or beyond."""
        return bool(self._samples) and self._samples[-1][1] >= count

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
        """When the encoder passes `count`, at the speed of the newest samples; when it has passed it, between the two
        samples around it. None while it stands or runs back."""
        if len(self._samples) < 2:
            return None
        if count <= self._samples[-1][1]:
            return self._passed(count)
        back = max(-len(self._samples), -4)
        (a_ns, a), (b_ns, b) = self._samples[back], self._samples[-1]
        return b_ns + round((count - b) * (b_ns - a_ns) / (b - a)) if b > a else None

    def _passed(self, count: float) -> int:
        after_ns, after = self._samples[-1]
        for before_ns, before in reversed(list(self._samples)[:-1]):
            if before < count <= after:
                return before_ns + round((count - before) * (after_ns - before_ns) / (after - before))
            after_ns, after = before_ns, before
        return after_ns  # before everything that is kept
