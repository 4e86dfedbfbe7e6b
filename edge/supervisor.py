"""Keeps one child process alive: kill, wait, start again. The time is passed in."""

from collections.abc import Callable
from typing import Any

from stpm.edge.worker import Worker

FIRST_DELAY_NS = 100_000_000
LONGEST_DELAY_NS = 1_500_000_000
# a child that was well for so long begins again with the shortest delay
WELL_NS = 10_000_000_000


class Supervisor:
    def __init__(self, start: Callable[[], Worker]) -> None:
        self._start = start
        self.worker: Worker | None = None
        self.restarts = -1  # the first start is none
        self._failures = 0
        self._start_at_ns = 0
        self._well_since_ns: int | None = None

    def tick(self, now_ns: int) -> bool:
        """Start the child when it is due; True when that was done."""
        if self.worker is not None or now_ns < self._start_at_ns:
            return False
        self.worker = self._start()
        self.restarts += 1
        return True

    def well(self, now_ns: int) -> None:
        """The child has said that it is ready."""
        self._well_since_ns = now_ns

    def down(self, now_ns: int) -> list[Any]:
        """The child has gone or must go: it is killed, and another starts after a delay that doubles. What it said."""
        if self.worker is None:
            return []
        said = self.worker.kill()
        self.worker = None
        if self._well_since_ns is not None and now_ns - self._well_since_ns > WELL_NS:
            self._failures = 0
        self._well_since_ns = None
        self._start_at_ns = now_ns + min(FIRST_DELAY_NS << min(self._failures, 10), LONGEST_DELAY_NS)
        self._failures += 1
        return said

    def due_ns(self) -> int | None:
        """When the next start is due; None while the child is there."""
        return None if self.worker is not None else self._start_at_ns

    def end(self, grace_s: float) -> None:
        if self.worker is not None:
            self.worker.end(grace_s)
            self.worker = None
