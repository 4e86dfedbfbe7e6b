"""Who may say what when: results one at a time until the PLC has taken them, and edges of the PLC's bits. Pure; the
clock is passed in.

A Modbus link keeps its last values for ever, so a result counts only between two edges: RESULT_VALID rises with a
result, the PLC raises RESULT_ACK, RESULT_VALID falls, RESULT_ACK falls, and only then comes the next result. A result
that is not acknowledged in time is withdrawn. `Handshake` is the same for the PLC that polls us and the one that we
write to; the port tells it what the PLC has set (`hear`) and when the PLC has got what we show (`shown`).

The ASCII link sends and may wait for ACK lines: `Pending`.
"""

from collections import deque
from dataclasses import replace
from typing import Literal

from stpm.edge.plc.messages import (
    PASSING,
    Acknowledged,
    Beat,
    ClearAsked,
    Counted,
    Enabled,
    Incoming,
    Part,
    PeerBeat,
    RecipeAsked,
    State,
    Triggered,
    Undelivered,
    gate_times,
)
from stpm.edge.plc.registers import Bit, Control, Status

MS = 1_000_000
# RESULT_VALID stays low so long after a result that was withdrawn: an ACK that was already on its way is not taken for
# the next result's
WITHDRAWN_NS = 100 * MS

# of the result that is shown: none; RESULT_VALID is on; it has fallen and RESULT_ACK has not; it was withdrawn
Phase = Literal["free", "valid", "acknowledged", "withdrawn"]


class Handshake:
    def __init__(self, queue: int, acknowledge_ns: int, expire_ns: int, beat_ns: int, now_ns: int) -> None:
        """`expire_ns`: age of a trigger from which on no result of it can come. `beat_ns`: HEARTBEAT toggles with
        every Beat, and with other messages when it has not for half of this."""
        self._queue: deque[Part] = deque()
        self._longest, self._acknowledge_ns, self._expire_ns = queue, acknowledge_ns, expire_ns
        self._beat_ns = beat_ns
        self._began_ns = self._beat_at_ns = now_ns
        self._status = Status()
        self._control: Control | None = None
        self._events: list[Incoming] = []
        self._phase: Phase = "free"
        self._presented: Part | None = None
        self._until_ns = 0  # end of the phase "valid" or "withdrawn"
        self._shown = False  # the PLC has got the present phase
        self._inspecting = False  # a trigger becomes a part
        self._open: deque[tuple[int, int]] = deque()  # triggers without a result: number or 0, and until when
        self._times = 0, 0  # of the gate, as the PLC had them last; kept when it is lost
        # OVERRUN, HEARTBEAT, GATE, SIMULATED, ENABLED and the mirrors of edges
        self._latched: set[Bit] = set()
        self.refusal = ""  # why the PLC does not take what we show, where it says so

    # --- what we say

    def post(self, message: State | Part | Beat, now_ns: int) -> None:
        match message:
            case State(state, reason, recipe, code, bundle, enabled):
                number = int(bundle[:8] or "0", 16)
                self._status = replace(self._status, state=state, recipe=recipe, error=code, bundle=number)
                self._set(Bit.SIMULATED, "SIMULATED" in reason.split())
                self._set(Bit.ENABLED, enabled)
                self._inspecting = enabled and state in PASSING
                if not self._inspecting:
                    self._open.clear()
            case Part(id):
                answered = next((trigger for trigger in self._open if trigger[0] in (id, 0)), None)
                if answered is not None:
                    self._open.remove(answered)
                self._queue.append(message)
                if len(self._queue) > self._longest:
                    self._undelivered(self._queue.popleft(), now_ns, "overrun: the PLC takes no results")
                    self._latched.add(Bit.OVERRUN)
            case Beat(judged, rejected, late, dropped):
                self._status = replace(self._status, judged=judged, rejected=rejected, late=late, dropped=dropped)
        if isinstance(message, Beat) or now_ns - self._beat_at_ns >= self._beat_ns // 2:
            self._latched ^= {Bit.HEARTBEAT}
            self._beat_at_ns = now_ns
        self.tick(now_ns)

    def gate(self, active: bool) -> None:
        """The level that the bit GATE shows."""
        self._set(Bit.GATE, active)

    # --- what the PLC says

    def hear(self, control: Control, now_ns: int, counted: bool) -> None:
        """What the PLC has set by now; `counted`: its encoder registers are fresh.

        The first time, and after `forget`, a bit that is on already is no edge: nobody knows since when it is.
        """
        before, self._control = self._control, control
        first = before is None
        before = before or control
        if first or control.enable != before.enable:
            self._events.append(Enabled(now_ns, control.enable))
        if control.heartbeat != before.heartbeat:
            self._events.append(PeerBeat(now_ns))
        times = control.delay, control.pulse_ms
        if times != self._times:
            self._times = times
            self._events.append(gate_times(now_ns, *times))
        if counted:
            self._events.append(Counted(now_ns, control.count))
        if self._rises(before.trigger, control.trigger, Bit.TRIGGER_ACK):
            if self._inspecting:
                self._open.append((control.part_id, now_ns + self._expire_ns))
            self._events.append(Triggered(now_ns, control.part_id or None))
        if self._rises(before.recipe_change, control.recipe_change, Bit.RECIPE_ACK):
            self._events.append(RecipeAsked(now_ns, control.recipe))
        if self._rises(before.clear_fault, control.clear_fault, Bit.CLEAR_ACK):
            self._latched.discard(Bit.OVERRUN)
            self._events.append(ClearAsked(now_ns))
        # it was off when the result was presented, so when it is on at the first look it has risen since then; but
        # an acknowledgement of what the PLC cannot have seen yet is not one
        rises = control.result_ack and (first or not before.result_ack)
        if rises and self._phase == "valid" and self._shown:
            assert self._presented is not None
            self._events.append(Acknowledged(self._presented.id, now_ns))
            self._enter("acknowledged")
        self.tick(now_ns)

    def forget(self) -> None:
        """The link was down: nobody knows since when the PLC's bits are as they will be found."""
        self._control = None

    def stop(self) -> None:
        """No result is valid any more."""
        self._queue.clear()
        self._enter("free")

    def shown(self) -> None:
        """The PLC has got the status as it is."""
        self._shown = True

    # --- the clock

    def tick(self, now_ns: int) -> None:
        if self._phase == "valid" and now_ns >= self._until_ns:
            assert self._presented is not None
            self._undelivered(self._presented, now_ns, self.refusal or "not acknowledged in time")
            self._enter("withdrawn", now_ns + WITHDRAWN_NS)
        while self._open and now_ns >= self._open[0][1]:
            self._open.popleft()
        # not known: perhaps
        acknowledging = self._control is None or self._control.result_ack
        low = self._phase in ("acknowledged", "withdrawn") and self._shown and now_ns >= self._until_ns
        if low and not acknowledging:
            self._enter("free")
        for part in [part for part in self._queue if _expired(part, now_ns)]:
            self._queue.remove(part)
            why = "RESULT_ACK did not fall" if acknowledging else "too old before its turn came"
            self._undelivered(part, now_ns, self.refusal or why)
        if self._phase == "free" and not acknowledging and self._queue:
            self._present(self._queue.popleft(), now_ns)

    def due_ns(self) -> int | None:
        """When `tick` has something to do next by itself."""
        times = [part.expires_ns for part in self._queue if part.expires_ns is not None]
        if self._phase == "valid" or (self._phase == "withdrawn" and self._shown and self._queue):
            times.append(self._until_ns)
        times += [until_ns for _, until_ns in self._open]
        return min(times, default=None)

    # --- what comes of it

    def events(self) -> list[Incoming]:
        """Everything since the last call."""
        events, self._events = self._events, []
        return events

    def status(self, now_ns: int) -> Status:
        bits = set(self._latched)
        state = self._status.state
        on = {
            Bit.READY: state in PASSING,
            Bit.FAULT: state == "FAULT",
            Bit.DEGRADED: state == "DEGRADED",
            Bit.BUSY: bool(self._open),
        }
        bits |= {bit for bit, is_on in on.items() if is_on}
        if self._phase == "valid":
            bits |= {Bit.RESULT_VALID, Bit[self._status.verdict]}
        uptime_s = (now_ns - self._began_ns) // 1_000_000_000
        return replace(self._status, bits=frozenset(bits), waiting=len(self._queue), uptime_s=uptime_s)

    def _present(self, part: Part, now_ns: int) -> None:
        self._presented = part
        self._status = replace(
            self._status,
            verdict=part.verdict,
            inspection=self._status.inspection + 1,
            part_id=part.id,
            score=part.score,
            threshold=part.threshold,
            latency_ms=part.latency_ms,
            box=part.box or (0, 0, 0, 0),
            area=part.area,
        )
        until_ns = now_ns + self._acknowledge_ns
        self._enter("valid", until_ns if part.expires_ns is None else min(until_ns, part.expires_ns))

    def _enter(self, phase: Phase, until_ns: int = 0) -> None:
        self._phase, self._until_ns, self._shown = phase, until_ns, False

    def _undelivered(self, part: Part, now_ns: int, reason: str) -> None:
        self._events.append(Undelivered(part.id, now_ns, reason))

    def _rises(self, before: bool, now: bool, mirror: Bit) -> bool:
        """True with a rising edge; the mirror bit is on from then until the PLC's bit falls."""
        rises = now and not before
        if rises or not now:
            self._set(mirror, now)
        return rises

    def _set(self, bit: Bit, on: bool) -> None:
        (self._latched.add if on else self._latched.discard)(bit)


class Pending:
    """ASCII: parts whose ACK is awaited, oldest first."""

    def __init__(self, acknowledge_ns: int) -> None:
        self._acknowledge_ns = acknowledge_ns
        self._sent: deque[tuple[int, int]] = deque()  # (part, until)

    def sent(self, id: int, now_ns: int) -> None:
        self._sent.append((id, now_ns + self._acknowledge_ns))

    def acknowledged(self, id: int) -> bool:
        """False when no part with that id waits for an ACK."""
        found = next((each for each in self._sent if each[0] == id), None)
        if found is not None:
            self._sent.remove(found)
        return found is not None

    def expired(self, now_ns: int) -> list[Incoming]:
        gone: list[Incoming] = []
        while self._sent and now_ns >= self._sent[0][1]:
            gone.append(Undelivered(self._sent.popleft()[0], now_ns, "not acknowledged in time"))
        return gone

    def due_ns(self) -> int | None:
        return self._sent[0][1] if self._sent else None


def _expired(part: Part, now_ns: int) -> bool:
    return part.expires_ns is not None and now_ns >= part.expires_ns
