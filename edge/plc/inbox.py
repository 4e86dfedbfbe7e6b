"""What waits for the line: one answer for each part and each gate edge that it has posted, and noise told once a
second, unless a trigger may be lost in it. Filled by the link's thread, emptied by the line's."""

import contextlib
import os
import threading
from collections import Counter
from dataclasses import replace

from stpm.edge.plc.messages import (
    Acknowledged,
    Delivered,
    Enabled,
    Garbage,
    Gate,
    Incoming,
    Part,
    Switched,
    Undelivered,
    Unswitched,
)

ONCE_NS = 1_000_000_000


class Inbox:
    def __init__(self, enable: bool) -> None:
        """`enable`: the PLC says when parts are inspected; without, its ENABLE is not told."""
        self._enable = enable
        self._lock = threading.Lock()  # of the list and the descriptor; never held while anything waits
        self._events: list[Incoming] = []
        self._news: int | None = os.eventfd(0, os.EFD_NONBLOCK)
        self._unanswered: Counter[int | tuple[int, bool]] = Counter()  # parts by id, edges by id and level
        self._noise = Noise()

    # --- from the link's thread

    def awaits(self, message: Part | Gate) -> None:
        self._unanswered[message.id if isinstance(message, Part) else (message.id, message.active)] += 1

    def give_up(self, now_ns: int, reason: str) -> None:
        """What has no answer yet gets it now; no further second is waited for."""
        for key in list(self._unanswered.elements()):
            answer = Undelivered(key, now_ns, reason) if isinstance(key, int) else Unswitched(*key, now_ns, reason)
            self.tell([answer], now_ns)
        self.put(self._noise.due(self._noise.until_ns))

    def tell(self, events: list[Incoming], now_ns: int) -> None:
        """What is news of it, and noise that is due."""
        told = [noise for event in events for noise in self._news_of(event)]
        self.put(told + self._noise.due(now_ns))

    def due_ns(self) -> int | None:
        """When `tell` has something to say by itself."""
        return None if self._noise.waiting is None else self._noise.until_ns

    def _news_of(self, event: Incoming) -> list[Incoming]:
        match event:
            case Delivered(id) | Acknowledged(id) | Undelivered(id):
                return [event] if self._answers(id) else []
            case Switched(id, active) | Unswitched(id, active):
                return [event] if self._answers((id, active)) else []
            case Enabled():
                return [event] if self._enable else []
            case Garbage() if not event.lost:  # what may have been a trigger is told at once
                return self._noise.add(event)
        return [event]

    def _answers(self, key: int | tuple[int, bool]) -> bool:
        """Whether the line waits for it: the first answer counts, and an edge of the link itself is not awaited."""
        if self._unanswered[key] == 0:
            return False
        self._unanswered[key] -= 1
        self._unanswered += Counter()  # without those at 0
        return True

    # --- from any thread

    def put(self, events: list[Incoming]) -> None:
        """As they are."""
        with self._lock:
            self._events += events
            if events and self._news is not None:
                os.eventfd_write(self._news, 1)

    def wake(self) -> None:
        """Make the descriptor readable."""
        with self._lock:
            if self._news is not None:
                os.eventfd_write(self._news, 1)

    def take(self) -> list[Incoming]:
        with self._lock:
            events, self._events = self._events, []
            if self._news is not None:
                with contextlib.suppress(BlockingIOError):  # nothing is there
                    os.eventfd_read(self._news)
        return events

    def fileno(self) -> int:
        return -1 if self._news is None else self._news

    def close(self) -> None:
        """The descriptor; what is there can still be taken."""
        with self._lock:
            news, self._news = self._news, None
            if news is not None:
                os.close(news)


class Noise:
    """Garbage: the first is told at once, what follows within a second is told together. Pure."""

    def __init__(self) -> None:
        self.until_ns = 0
        self.waiting: Garbage | None = None  # the newest, with the count of all

    def add(self, garbage: Garbage) -> list[Incoming]:
        if self.waiting is None and garbage.at_ns >= self.until_ns:
            self.until_ns = garbage.at_ns + ONCE_NS
            return [garbage]
        before = self.waiting.count if self.waiting is not None else 0
        self.waiting = replace(garbage, count=before + garbage.count)
        return []

    def due(self, now_ns: int) -> list[Incoming]:
        waiting = self.waiting
        if waiting is None or now_ns < self.until_ns:
            return []
        self.waiting, self.until_ns = None, now_ns + ONCE_NS
        if waiting.count == 1:
            return [waiting]
        return [replace(waiting, what=f"{waiting.count} times within a second, the last: {waiting.what}")]
