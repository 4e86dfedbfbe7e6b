"""The parts on their way to the gate: their places, the edges that the link is asked for, and what must not stay
unknown when one of these goes wrong. No I/O; the time is passed in."""

from dataclasses import dataclass
from typing import Protocol

from stpm.edge.config import GateSettings
from stpm.edge.errors import PlcError
from stpm.edge.gate import MS, Gate
from stpm.edge.health import Health
from stpm.edge.latency import Latency
from stpm.edge.parts import Counts, Part
from stpm.edge.plc import messages as plc

# between camera and gate; no line has so many, so the encoder stands, or frames come that are no parts
MOST_ON_THE_WAY = 1000
# so many triggers while the encoder stands: parts do not come to a camera on a belt that does not move
MOST_AT_ONE_PLACE = 3


class Told(Protocol):
    """The line, as far as the gate needs it."""

    def post(self, message: plc.Gate) -> None: ...

    def event(self, kind: str, text: str) -> None: ...

    def alarm(self, sentence: str) -> None: ...

    def past_gate(self, part: Part) -> None:
        """`part.gate` says what became of it."""


@dataclass
class Asked:
    """An edge that the link has not answered."""

    due_ns: int
    rejects: bool = False  # something had to be rejected while no newer one was wanted


class AtGate:
    def __init__(self, settings: GateSettings, health: Health, counts: Counts, latency: Latency, told: Told) -> None:
        self._settings, self._health, self._counts, self._latency = settings, health, counts, latency
        self._told = told
        self._gate = Gate(settings, self._decided)
        self._parts: dict[int, Part] = {}  # by key
        self._asked: dict[tuple[int, bool], Asked] = {}  # on the link, the newest last
        self._triggered_ns = -1
        self._at_one_place = 0

    def __contains__(self, part: Part) -> bool:
        """Whether it has not been in front of the gate yet."""
        return part.key in self._parts

    @property
    def waiting(self) -> bool:
        return bool(self._gate.waiting)

    @property
    def used(self) -> bool:
        return self._gate.used

    # --- what happens

    def expect(self, part: Part) -> None:
        """A part was in front of the camera when it began."""
        if not self.used:
            return
        self._parts[part.key] = part
        self._gate.plan(part.key, part.began_ns, part.id)
        if self._gate.waiting > MOST_ON_THE_WAY:
            where = "the encoder stands, or " if self._gate.encoder else ""
            self._lose_track(f"more than {MOST_ON_THE_WAY} parts are between camera and gate: {where}look at [gate]")

    def triggered(self, at_ns: int) -> None:
        """The PLC says that a part is in front of the camera; so the belt must have moved since the one before."""
        encoder = self._gate.encoder
        if encoder is None:
            return
        read = encoder.newest_ns > self._triggered_ns  # between this trigger and the one before
        moved = encoder.moved_ns >= self._triggered_ns
        self._triggered_ns = at_ns
        if moved:
            self._at_one_place = 0
        elif read:
            self._at_one_place += 1
        if self._at_one_place >= MOST_AT_ONE_PLACE:
            self._lose_track(f"{self._at_one_place} triggers came while the encoder stood still")

    def captured(self, part: Part, at_ns: int) -> None:
        """Its frame says when it was in front of the camera."""
        if part in self:
            self._gate.plan(part.key, at_ns)

    def judged(self, part: Part) -> None:
        self._gate.decide(part.key, part.verdict is not None and part.verdict.verdict == "PASS")

    def counted(self, at_ns: int, count: int) -> None:
        if self._gate.encoder is not None:
            problem = self._gate.encoder.add(at_ns, count)
            if problem and self._at_work:
                self._lose_track(problem)

    def set_times(self, delay: int, pulse_ms: int) -> None:
        self._gate.set_times(delay, pulse_ms)
        self._told.event("plc", f"gate times set: delay {delay}, pulse {pulse_ms} ms; 0 is what the station says")

    def switched(self, id: int, active: bool, at_ns: int) -> None:
        edge = self._asked.pop((id, active), None)
        if edge is None:
            return
        late_ns = at_ns - edge.due_ns
        self._latency.add("gate jitter", abs(late_ns))
        limit_ns = self._gate.pulse_ns / 2 if self._rejects(active) else self._gate.pulse_ns
        # too late, an output that accepts opens for another part; one that ends a reject only costs a good part
        if late_ns > limit_ns and (self._rejects(active) or self._settings.polarity == "accept"):
            self._may_have_passed(f"the gate was switched {'on' if active else 'off'} {late_ns / MS:.0f} ms late")

    def not_switched(self, id: int, active: bool, reason: str, now_ns: int) -> None:
        newest = (id, active) not in self._asked or (id, active) == next(reversed(self._asked))
        edge = self._asked.pop((id, active), Asked(now_ns, rejects=True))
        self._counts.gates["not switched"] += 1
        sentence = f"the gate was not switched {'on' if active else 'off'}: {reason}"
        if self._rejects(active) and (newest or edge.rejects):
            self._may_have_passed(sentence)
        else:  # it only costs a good part, or nothing was in front of the gate before the next edge
            self._told.alarm(sentence)
        if newest:
            self._gate.not_switched(now_ns)

    def released(self, sentence: str) -> None:
        """The link has put the output to its safe level without being asked; the FAULT leaves it there."""
        self._may_have_passed(sentence)

    @property
    def _lost(self) -> str:
        if self._settings.polarity == "accept":
            return "all parts on the way are rejected"
        return "a part may have passed, what is still on the way is rejected"

    def tick(self, now_ns: int, inspects: bool) -> None:
        """`inspects`: parts that come now get a verdict. Where not, nothing passes once those on the way are gone."""
        if not self.used:
            return
        encoder = self._gate.encoder
        if encoder is not None and encoder.lost(now_ns):
            # where the output was off while nobody knew what comes, somebody must look
            latched = self._settings.polarity == "reject" and self.waiting
            if self._at_work and self._health.fault(
                "encoder", "the encoder is not heard", PlcError.exit_code, latched
            ):
                self._told.alarm(f"the encoder is not heard: {self._lost}")
            self._gate.abandon()
        elif encoder is not None and self._health.settle("encoder"):
            self._told.event("state", "the encoder is heard again")
        self._gate.hold(self._health.state not in plc.PASSING, now_ns, idle=not inspects)
        for edge in self._gate.edges(now_ns):
            self._asked.pop((edge.part, edge.active), None)
            self._asked[edge.part, edge.active] = Asked(edge.due_ns)
            self._told.post(plc.Gate(edge.part, edge.active))
        if self._asked and self._gate.rejects(now_ns):
            self._asked[next(reversed(self._asked))].rejects = True

    def due_ns(self) -> int | None:
        return self._gate.due_ns() if self.used else None

    # --- what goes wrong

    @property
    def _at_work(self) -> bool:
        """Before, an encoder need not have said anything yet, and may begin anew."""
        return self._health.phase in ("READY", "RUNNING")

    def _rejects(self, active: bool) -> bool:
        """Whether that edge begins to reject: a part passes where it does not come."""
        return active == (self._settings.polarity == "reject")

    def _may_have_passed(self, sentence: str) -> None:
        self._told.alarm(sentence)
        self._health.fault("gate", f"{sentence}; a part may have passed", PlcError.exit_code, latched=True)

    def _lose_track(self, sentence: str) -> None:
        """Nobody knows where the parts on the way are."""
        if self._health.fault("tracking", f"{sentence}; {self._lost}", PlcError.exit_code, True):
            self._told.alarm(sentence)
        self._gate.abandon()

    def _decided(self, key: int, outcome: str) -> None:
        part = self._parts.pop(key)
        part.gate = outcome
        self._counts.gates[outcome] += 1
        self._told.past_gate(part)
        if outcome == "missed":
            sentence = f"part {part.id} was past the gate before it could be rejected: gate.delay_ms is too short"
            if self._health.fault("gate", sentence, PlcError.exit_code, latched=True):
                self._told.alarm(sentence)
