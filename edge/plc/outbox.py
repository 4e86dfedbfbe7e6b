"""What waits to be sent, and in which order it goes. Pure; the clock is passed in.

A gate edge goes first, then a state in which nothing may pass, then results, then other states and heartbeats. Of the
gate only the newest level counts: an edge that was overtaken by another before it got out would hit a later part.
"""

from collections import deque
from dataclasses import replace

from stpm.edge.plc.messages import PASSING, Beat, Gate, Incoming, Outgoing, Part, State, Undelivered, Unswitched


class Outbox:
    def __init__(self, queue: int, expire_ns: int) -> None:
        """`expire_ns`: age at which a Part without `expires_ns` is of no use."""
        self._longest, self._expire_ns = queue, expire_ns
        self.gate: Gate | None = None  # that waits
        self.gate_ns = 0  # when it was posted
        self._parts: deque[Part] = deque()
        self._rest: deque[State | Beat] = deque()
        self._stop: State | None = None  # the newest, where nothing may pass in it
        self.newest: State | None = None  # sent or not

    def put(self, message: Outgoing, now_ns: int) -> list[Incoming]:
        """What is lost by it."""
        match message:
            case Gate():
                overtaken, self.gate, self.gate_ns = self.gate, message, now_ns
                if overtaken is not None:
                    return [Unswitched(overtaken.id, overtaken.active, now_ns, "overtaken by a later edge")]
            case Part():
                if message.expires_ns is None:
                    message = replace(message, expires_ns=now_ns + self._expire_ns)
                self._parts.append(message)
                if len(self._parts) > self._longest:
                    return [Undelivered(self._parts.popleft().id, now_ns, "overrun: too many results wait")]
            case State(state):
                self.newest = message
                if state in PASSING:
                    self._rest.append(message)
                else:  # no PASS may overtake it, and no earlier state may follow it
                    self._rest = deque(each for each in self._rest if isinstance(each, Beat))
                    self._stop = message
            case Beat():
                self._rest.append(message)
        return []

    def next(self) -> Outgoing | None:
        """The next to be sent, taken out."""
        if self.gate is not None:
            gate, self.gate = self.gate, None
            return gate
        if self._stop is not None:
            stop, self._stop = self._stop, None
            return stop
        if self._parts:
            return self._parts.popleft()
        return self._rest.popleft() if self._rest else None

    def only_the_newest(self) -> None:
        """The link is down: of states and heartbeats the last state is all that will matter."""
        self._rest.clear()
        self._stop = None

    def condense(self) -> None:
        """The device is busy with what it has: of the states that wait the newest counts, and so of the heartbeats."""
        self._rest = deque({type(message): message for message in self._rest}.values())

    def expired(self, now_ns: int) -> list[Incoming]:
        """Parts that are too old by now, taken out."""
        old = [part for part in self._parts if part.expires_ns is not None and now_ns >= part.expires_ns]
        for part in old:
            self._parts.remove(part)
        return [Undelivered(part.id, now_ns, "too old before it could be sent") for part in old]

    def due_ns(self) -> int | None:
        """When a part is too old."""
        return min((part.expires_ns for part in self._parts if part.expires_ns is not None), default=None)
