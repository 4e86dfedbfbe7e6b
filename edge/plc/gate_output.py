"""What the link knows of the gate output, and the dead man's switch on it. Pure; the clock is passed in.

A loop that hangs posts no edge any more, so an accepting gate would stay open, and a rejecting one off. Therefore the
line says with every turn that it is at work, and when it has not for DEAD_MAN_NS the link puts the output to its safe
level. From then on nothing lets parts through before the line has been heard again, and asks for it anew.
"""

from stpm.edge.plc.messages import Gate, Incoming, Switched, Unswitched

MS = 1_000_000
DEAD_MAN_NS = 200 * MS
AGAIN_NS = 50 * MS  # between two attempts at a safe level that the PLC has refused


class GateOutput:
    def __init__(self, safe: bool) -> None:
        self.safe = safe
        self.alive_ns: int | None = None  # when the line was last heard; its thread writes this. None: never
        self._wanted: Gate | None = None  # None: no edge was ever posted, so there is no gate
        self._level: bool | None = None  # of the output, as far as it is known
        self._released = False  # the link wants the safe level, and no edge of the line has gone out since
        self._again_ns = 0

    # --- edges of the line

    def posted(self, edge: Gate) -> None:
        self._wanted = edge

    def refuses(self, edge: Gate, posted_ns: int, now_ns: int) -> str:
        """Why this edge must not go out any more; empty: it may. Towards the safe level every edge may."""
        if edge.active == self.safe:
            return ""
        why = ""
        if self._overdue(now_ns):
            why = "the line has not been heard from"
        elif now_ns - posted_ns > DEAD_MAN_NS:
            why = "too old before it could be sent"
        if why:
            self._wanted, self._released, self._again_ns = Gate(edge.id, self.safe), True, now_ns
        return why

    def sends(self, edge: Gate) -> None:
        """An edge of the line is about to go out. Where the output is, is not known until that is answered."""
        self._level, self._released = None, False

    def hear(self, events: list[Incoming]) -> None:
        """What the port says of edges that went out."""
        for event in events:
            match event:
                case Switched(_, active):
                    self._level = active
                case Unswitched():
                    self._level = None

    def lost(self) -> None:
        """The port is closed."""
        self._level = None

    # --- edges of the link itself

    def release(self, now_ns: int) -> bool:
        """True at the moment from which on the line counts as dead, where its gate may let something through."""
        newly = self._overdue(now_ns) and not self._released and self._may_be_unsafe
        if newly and self._wanted is not None:
            self._wanted, self._released, self._again_ns = Gate(self._wanted.id, self.safe), True, now_ns
        return newly

    def owed(self, now_ns: int) -> Gate | None:
        """The safe level, where it has not got out since the link wants it."""
        if not (self._released and self._may_be_unsafe) or now_ns < self._again_ns:
            return None
        self._level, self._again_ns = None, now_ns + AGAIN_NS
        return self._wanted

    def restored(self) -> Gate | None:
        """What the output should be, after the port was opened again."""
        if self._wanted is None or self._level == self._wanted.active:
            return None
        self._level = None
        return self._wanted

    def last(self) -> Gate | None:
        """The safe level, as the last word."""
        return Gate(self._wanted.id, self.safe) if self._wanted is not None and self._may_be_unsafe else None

    def due_ns(self) -> int | None:
        """When `release` or `owed` has something to do next."""
        if not self._may_be_unsafe or self.alive_ns is None:
            return None
        return self._again_ns if self._released else self.alive_ns + DEAD_MAN_NS + 1

    @property
    def _may_be_unsafe(self) -> bool:
        return self._wanted is not None and self._level != self.safe

    def _overdue(self, now_ns: int) -> bool:
        alive_ns = self.alive_ns  # once: the other thread may write it meanwhile
        return alive_ns is not None and now_ns - alive_ns > DEAD_MAN_NS
