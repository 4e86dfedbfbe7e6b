"""The PLCs at the other end: one for each protocol, at the end of a cable, and what each has noted."""

import logging
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import Any, ClassVar

from stpm.edge.plc.messages import (
    PASSING,
    ClearAsked,
    Gate,
    Outgoing,
    Part,
    PeerBeat,
    RecipeAsked,
    State,
    Triggered,
)
from stpm.edge.plc.registers import Bit, Control, Status
from stpm.edge.plc.settings import PlcSettings
from stpm.tools.cable import PtyCable
from stpm.tools.faults.evidence import Wire
from stpm.tools.plc_modbus import MasterPlc, Program, SlavePlc
from stpm.tools.plc_sim import PtyPlc

BEAT_S = 0.2

# an answer that does not come is what a scenario wants to see
logging.getLogger("pymodbus").setLevel(logging.CRITICAL)


class Peer(ABC):
    """A PLC and its cable. `settings`: what the station must know of it."""

    link = "none"
    fps = 10  # parts that it can take
    asks: ClassVar[dict[str, Any]] = {}  # of the station

    def __init__(self) -> None:
        self.passed: list[tuple[float, int]] = []
        self.said: list[tuple[float, int, str]] = []
        self.states: list[str] = []
        self.heard_s = 0.0
        self.number = 0  # of its last trigger
        self.trigger_s: float | None = None  # it triggers so often
        self._triggered_s = 0.0
        self._from = (0, 0, 0)
        self._stack = ExitStack()

    def __enter__(self):  # type: ignore[no-untyped-def]
        self.cable = self._stack.enter_context(PtyCable())
        self.settings = {**self.asks, "plc.port": self.cable.ours}
        self._open()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @abstractmethod
    def _open(self) -> None: ...

    @property
    def state(self) -> str:
        """The last that it heard."""
        return self.states[-1] if self.states else ""

    @property
    def passing(self) -> bool:
        """What the present run of the line has said last; a PLC's memory keeps what an earlier one has written."""
        return len(self.states) > self._from[2] and self.state in PASSING

    def passes_since(self, at_s: float) -> list[float]:
        return [when for when, _ in self.passed if when > at_s]

    def pump(self) -> None:
        """What a PLC does by the clock; called every few milliseconds."""
        now = time.monotonic()
        if self.trigger_s is not None and now - self._triggered_s > self.trigger_s:
            self._triggered_s = now
            self.number += 1
            self.trigger(self.number)

    @abstractmethod
    def trigger(self, number: int) -> None: ...

    @abstractmethod
    def clear(self) -> None:
        """The fault has been looked at."""

    @abstractmethod
    def ask_recipe(self, recipe: int) -> None: ...

    @abstractmethod
    def restart(self) -> None:
        """It is switched off and on: its memory is empty."""

    def begin(self) -> None:
        """Another run of the line: what follows is its own."""
        self._from = len(self.passed), len(self.said), len(self.states)

    def wire(self) -> Wire:
        """Of the present run."""
        passed, said, states = self._from
        last = self.states[-1] if len(self.states) > states else ""
        return Wire(self.passed[passed:], self.said[said:], last, self.heard_s)


class AsciiPeer(Peer):
    """Reads lines and beats; `acknowledging` while it answers every PART with ACK."""

    link = "ascii"
    fps = 25
    acknowledges = False

    def _open(self) -> None:
        self.plc = self._stack.enter_context(PtyPlc(self._take, self.acknowledges, self.cable.theirs))
        self.beating = True
        self._beat_s = 0.0

    def _take(self, message: Outgoing) -> None:
        now = time.monotonic()
        self.heard_s = now
        self.passed += [(now, id) for id in self.plc.gate.passed[len(self.passed) :]]
        match message:
            case Part(id, verdict):
                self.said.append((now, id, verdict))
            case State(state) if state != self.state:
                self.states.append(state)

    def restart(self) -> None:
        self.plc.gate.states.clear()
        self.states.append("")

    def pump(self) -> None:
        super().pump()
        now = time.monotonic()
        if self.beating and now - self._beat_s > BEAT_S:
            self._beat_s = now
            self.plc.say(PeerBeat(0))

    def trigger(self, number: int) -> None:
        self.plc.say(Triggered(0, number))

    def clear(self) -> None:
        self.plc.say(ClearAsked(0))

    def ask_recipe(self, recipe: int) -> None:
        self.plc.say(RecipeAsked(0, recipe))


class AcknowledgingPeer(AsciiPeer):
    link = "ascii+ack"
    acknowledges = True
    asks: ClassVar[dict[str, Any]] = {"plc.acknowledge": True}


class GatePeer(AsciiPeer):
    """The line works an accepting gate by the clock; the GATE lines are its output. The PLC closes it by itself a
    little after the pulse: the line that closes it may be lost on the way."""

    link = "gate"
    fps = 8  # far enough apart for the gate's pulse, whatever the machine does
    delay_s = 0.25
    longest_s = 0.06
    asks: ClassVar[dict[str, Any]] = {
        "gate.mode": "delay",
        "gate.polarity": "accept",
        "gate.delay_ms": 1000 * delay_s,
        "gate.pulse_ms": 30.0,
        "camera.policy": "every",
    }

    def _open(self) -> None:
        super()._open()
        self._levels: list[tuple[float, float, bool]] = []  # monotonic, wall clock, level

    def begin(self) -> None:
        super().begin()
        self._levels.clear()

    def _take(self, message: Outgoing) -> None:
        super()._take(message)
        if isinstance(message, Gate):
            self._levels.append((time.monotonic(), time.time(), message.active))

    def wire(self) -> Wire:
        wire = super().wire()
        wire.openings = []
        ends = [*self._levels[1:], (time.monotonic(), time.time(), False)]
        for (_, opens, active), (_, closes, _) in zip(self._levels, ends, strict=True):
            if active:
                wire.openings.append((opens, min(closes, opens + self.longest_s)))
        return wire


class _Witness(Program):
    """A PLC program that notes when it took what."""

    def __init__(self, peer: Peer) -> None:
        super().__init__()
        self._peer = peer

    def scan(self, status: Status, now: float) -> Control:
        beats, states = self.beats, len(self.states)
        control = super().scan(status, now)
        if self.beats != beats:
            self._peer.heard_s = now
        self._peer.states += self.states[states:]  # a restart may have emptied them
        return control

    def _take(self, status: Status) -> None:
        if self._peer.said and self._peer.said[-1][1] == status.part_id:
            return  # shown again after its memory was emptied: it is the same part
        passed = len(self.passed)
        super()._take(status)
        now = time.monotonic()
        verdict = next((bit.name for bit in (Bit.PASS, Bit.FAIL, Bit.UNKNOWN) if bit in status.bits), "")
        self._peer.said.append((now, status.part_id, verdict))
        self._peer.passed += [(now, id) for id in self.passed[passed:]]


class ModbusPeer(Peer):
    def _open(self) -> None:
        self.program = _Witness(self)
        settings = PlcSettings(port=self.cable.theirs)
        self.plc = self._stack.enter_context(self._plc(settings))

    @abstractmethod
    def _plc(self, settings: PlcSettings) -> Any: ...

    def trigger(self, number: int) -> None:
        self.program.triggers.append(number)

    def clear(self) -> None:
        self.program.clears += 1

    def ask_recipe(self, recipe: int) -> None:
        self.program.recipes.append(recipe)

    def restart(self) -> None:
        self.program.states.clear()
        self.states.append("")


class PollingPeer(ModbusPeer):
    """It polls us: `protocol = "modbus-slave"`."""

    link = "modbus slave"
    asks: ClassVar[dict[str, Any]] = {"plc.protocol": "modbus-slave"}

    def _plc(self, settings: PlcSettings) -> MasterPlc:
        return MasterPlc(settings, self.program)


class WrittenPeer(ModbusPeer):
    """We write into it: `protocol = "modbus-master"`."""

    link = "modbus master"
    asks: ClassVar[dict[str, Any]] = {"plc.protocol": "modbus-master", "plc.poll_ms": 10.0}

    def _plc(self, settings: PlcSettings) -> SlavePlc:
        return SlavePlc(settings, self.program)

    def restart(self) -> None:
        self.plc.forget()
        super().restart()


PEERS = {each.link: each for each in (AsciiPeer, AcknowledgingPeer, GatePeer, PollingPeer, WrittenPeer)}
