"""Modbus RTU, we are the master: the PLC is read every `poll_ms`, and what has changed is written into it.

One exchange at a time, and between two of them the link may send a gate edge, so an edge waits for one exchange at
most. Odd about the outside world: a PLC that is silent or refuses looks the same as a good one until somebody asks;
what the PLC refuses (exception answer) is written again with every poll, until it is too old; and after every write of
the gate that got no good answer nobody knows where the gate is, so all that is written next has it at its safe level.
"""

import contextlib
import select
import time

from pymodbus.pdu.bit_message import (
    ReadCoilsRequest,
    ReadDiscreteInputsRequest,
    WriteMultipleCoilsRequest,
    WriteSingleCoilRequest,
)
from pymodbus.pdu.register_message import ReadHoldingRegistersRequest, WriteMultipleRegistersRequest

from stpm.edge.errors import PlcError
from stpm.edge.plc.handshake import MS
from stpm.edge.plc.messages import (
    PASSING,
    Beat,
    Delivered,
    Garbage,
    Gate,
    Incoming,
    Outgoing,
    Part,
    State,
    Switched,
    Triggered,
    Unswitched,
)
from stpm.edge.plc.modbus import check_master_map, new_handshake
from stpm.edge.plc.modbus_exchange import Exchange, RefusedError
from stpm.edge.plc.registers import (
    CONTROL_COILS,
    CONTROL_REGISTERS,
    RESULT_END,
    Bit,
    read_control,
    status_bits,
    status_registers,
)
from stpm.edge.plc.serial_port import adapter_notes
from stpm.edge.plc.settings import PlcSettings, RemoteIo

TELL_AGAIN_NS = 60_000 * MS  # the same refusal
REFRESH_NS = 2_000 * MS  # all registers, whatever has changed: a PLC may have been restarted between two polls


class ModbusMaster:
    def __init__(self, settings: PlcSettings, safe_gate: bool = False) -> None:
        """`safe_gate`: what the gate output is put to whenever nobody knows where it is."""
        self._settings = settings
        exchange = self._exchange = Exchange(settings)
        self._peer = (
            _Map(settings, exchange, safe_gate) if settings.io is None else _RemoteIo(settings.io, exchange, safe_gate)
        )
        self._poll_ns = round(settings.poll_ms * MS)
        self._poll_at_ns = self._write_at_ns = 0
        self._told_ns: dict[str, int] = {}  # refusals, and when each was told

    def open(self) -> list[Incoming]:
        self._exchange.open()
        self._peer.reopened()
        self._poll_at_ns = self._write_at_ns = time.monotonic_ns()
        return adapter_notes(self._settings.port)

    def send(self, message: Outgoing, now_ns: int) -> list[Incoming]:
        if isinstance(message, Gate):
            try:
                self._peer.switch(message.active)
            except RefusedError as error:
                return [Unswitched(message.id, message.active, time.monotonic_ns(), str(error))]
            return [Switched(message.id, message.active, time.monotonic_ns())]
        self._peer.post(message, now_ns)
        # the first word after a reconnect is a state: it shows whether the PLC is there
        return self._write() if isinstance(message, State) else []

    def wait(self, wake: int, timeout_s: float) -> list[Incoming]:
        """At most one exchange."""
        now_ns = time.monotonic_ns()
        if not self._peer.written and now_ns >= self._write_at_ns:
            return self._write()
        if now_ns >= self._poll_at_ns:
            return self._read()
        due_ns = min(self._poll_at_ns, self._peer.due_ns() or self._poll_at_ns)
        select.select([wake], [], [], min(timeout_s, max(0, due_ns - now_ns) / 1e9))
        return []

    def tick(self, now_ns: int) -> list[Incoming]:
        return self._peer.tick(now_ns)

    def close(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        arrived = False
        if timeout_s and self._exchange.is_open:
            self._peer.stop()
            self._exchange.patient = True
            with contextlib.suppress(PlcError):  # the device is gone
                while not (arrived := self._peer.written) and time.monotonic() < deadline:
                    with contextlib.suppress(RefusedError):
                        self._peer.write()
        self._exchange.close()
        return arrived

    def backlog_s(self) -> float:
        return 0.0  # one exchange at a time

    def _write(self) -> list[Incoming]:
        try:
            self._peer.write()
        except RefusedError as error:
            self._write_at_ns = time.monotonic_ns() + self._poll_ns
            self._peer.refused(str(error))
            return self._told(error)
        return []

    def _read(self) -> list[Incoming]:
        now_ns = time.monotonic_ns()
        try:
            if self._peer.read():
                self._poll_at_ns = now_ns + self._poll_ns
        except RefusedError as error:
            self._poll_at_ns = now_ns + self._poll_ns
            self._peer.refused(str(error))
            return self._told(error)
        return []

    def _told(self, error: RefusedError) -> list[Incoming]:
        """Now and then, not with every poll."""
        sentence, now_ns = str(error), time.monotonic_ns()
        told_ns = self._told_ns.get(sentence)
        if told_ns is not None and now_ns - told_ns < TELL_AGAIN_NS:
            return []
        self._told_ns[sentence] = now_ns
        return [Garbage(now_ns, sentence)]


class _Map:
    """A PLC with the map of registers.py: it is read in two steps and written bit by bit, registers by registers."""

    def __init__(self, settings: PlcSettings, exchange: Exchange, safe_gate: bool) -> None:
        check_master_map(settings.map)
        self._map, self._exchange, self._safe_gate = settings.map, exchange, safe_gate
        self._handshake = new_handshake(settings, time.monotonic_ns())
        self._gate_used = False
        self._coils: tuple[list[bool], int] | None = None  # read, when; their registers are not read yet
        self.reopened()

    def reopened(self) -> None:
        self._bits: list[bool] | None = None  # as the PLC has them
        self._registers: list[int] | None = None
        self._refresh_at_ns = 0
        self._coils = None
        self._handshake.forget()
        if self._gate_used:
            self._handshake.gate(self._safe_gate)  # all bits are written before the next edge

    def post(self, message: State | Part | Beat, now_ns: int) -> None:
        self._handshake.post(message, now_ns)

    def tick(self, now_ns: int) -> list[Incoming]:
        self._handshake.tick(now_ns)
        return self._handshake.events()

    def due_ns(self) -> int | None:
        return self._handshake.due_ns()

    def stop(self) -> None:
        self._handshake.stop()

    def refused(self, sentence: str) -> None:
        self._handshake.refusal = sentence

    def switch(self, active: bool) -> None:
        self._gate_used = True
        self._handshake.gate(active)
        try:
            self._exchange(WriteSingleCoilRequest(address=self._map.status_bits + Bit.GATE, bits=[active]))
        except (RefusedError, PlcError):
            # nobody knows where it is: it is safe until the next edge, and all bits are written again
            self._handshake.gate(self._safe_gate)
            self._bits = None
            raise
        if self._bits is not None:
            self._bits[Bit.GATE] = active

    @property
    def written(self) -> bool:
        status = self._handshake.status(time.monotonic_ns())
        return self._bits == status_bits(status) and self._registers == status_registers(status)

    def write(self) -> None:
        """One exchange of what the PLC does not have yet. A result's registers come before RESULT_VALID, everything
        else after the bits."""
        now_ns = time.monotonic_ns()
        status = self._handshake.status(now_ns)
        bits, registers = status_bits(status), status_registers(status)
        if now_ns >= self._refresh_at_ns:
            self._registers, self._refresh_at_ns = None, now_ns + REFRESH_NS
        rises = bits[Bit.RESULT_VALID] and not (self._bits and self._bits[Bit.RESULT_VALID])
        if self._bits != bits and not (rises and self._registers != registers):
            self._exchange(WriteMultipleCoilsRequest(address=self._map.status_bits, bits=bits))
            self._bits = bits
        elif self._registers != registers:
            before = self._registers or [-1] * len(registers)
            changed = [index for index, value in enumerate(registers) if value != before[index]]
            first, last = changed[0], changed[-1]
            if rises:  # all of a result, as much of it as may look the same as the one before
                first, last = 0, max(last, RESULT_END - 1)
            self._exchange(
                WriteMultipleRegistersRequest(
                    address=self._map.status_registers + first, registers=registers[first : last + 1]
                )
            )
            self._registers = registers
        self._handshake.refusal = ""
        if self._bits == bits:
            self._handshake.shown()

    def read(self) -> bool:
        """One exchange; True when all has been read. Coils first: the number of a trigger is there before it rises."""
        if self._coils is None:
            coils = self._exchange(ReadCoilsRequest(address=self._map.control_coils, count=CONTROL_COILS)).bits
            self._coils = list(coils[:CONTROL_COILS]), time.monotonic_ns()
            return False
        (coils, at_ns), self._coils = self._coils, None
        answer = self._exchange(
            ReadHoldingRegistersRequest(address=self._map.control_registers, count=CONTROL_REGISTERS)
        )
        self._handshake.hear(read_control(coils, answer.registers), at_ns, counted=True)
        return True


class _RemoteIo:
    """Single coils of an I/O block that knows nothing of parts: the gate, READY and a heartbeat for its watchdog."""

    def __init__(self, io: RemoteIo, exchange: Exchange, safe_gate: bool) -> None:
        self._io, self._exchange, self._safe_gate = io, exchange, safe_gate
        used = (io.gate_coil, io.ready_coil, io.heartbeat_coil)
        self._wanted = {coil: False for coil in used if coil is not None}
        self._events: list[Incoming] = []
        self._input: bool | None = None
        self._gate_used = False
        self.reopened()

    def reopened(self) -> None:
        self._has: dict[int, bool] = {}
        self._input = None
        if self._gate_used and self._io.gate_coil is not None:
            self._wanted[self._io.gate_coil] = self._safe_gate

    def post(self, message: State | Part | Beat, now_ns: int) -> None:
        match message:
            case State(state) if self._io.ready_coil is not None:
                self._wanted[self._io.ready_coil] = state in PASSING
            case Beat() if self._io.heartbeat_coil is not None:
                self._wanted[self._io.heartbeat_coil] ^= True
            case Part(id):
                self._events.append(Delivered(id, now_ns))  # the gate alone carries it

    def tick(self, now_ns: int) -> list[Incoming]:
        events, self._events = self._events, []
        return events

    def due_ns(self) -> int | None:
        return None

    def stop(self) -> None:
        """The last levels are those of the last state."""

    def refused(self, sentence: str) -> None:
        """Nothing waits for it."""

    def switch(self, active: bool) -> None:
        coil = self._io.gate_coil
        if coil is None:
            raise RefusedError("[plc.io] has no gate_coil")
        self._gate_used = True
        self._wanted[coil] = active
        try:
            self._set(coil, active)
        except (RefusedError, PlcError):
            self._has.pop(coil, None)
            self._wanted[coil] = self._safe_gate
            raise

    @property
    def written(self) -> bool:
        return self._has == self._wanted

    def write(self) -> None:
        """One exchange of what the block does not have yet."""
        coil = next((coil for coil, level in self._wanted.items() if self._has.get(coil) != level), None)
        if coil is not None:
            self._set(coil, self._wanted[coil])

    def read(self) -> bool:
        """One exchange, which also shows that the block is there."""
        if self._io.trigger_input is None:
            self._exchange(ReadCoilsRequest(address=next(iter(self._wanted), 0), count=1))
            return True
        answer = self._exchange(ReadDiscreteInputsRequest(address=self._io.trigger_input, count=1))
        before, self._input = self._input, answer.bits[0]
        if self._input and before is False:
            self._events.append(Triggered(time.monotonic_ns()))
        return True

    def _set(self, coil: int, level: bool) -> None:
        self._exchange(WriteSingleCoilRequest(address=coil, bits=[level]))
        self._has[coil] = level
