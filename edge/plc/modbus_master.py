"""Modbus RTU, we are the master: the PLC is read every `poll_ms`, and what has changed is written into it.

One exchange at a time, and between two of them the link may send a gate edge, so an edge waits for one exchange at
most. Odd about the outside world: a PLC that is silent or refuses looks the same as a good one until somebody asks;
an answer may be lost to noise, so only LIMIT exchanges in a row without one mean that the PLC is gone; what the PLC
refuses (exception answer) is written again with every poll, until it is too old.
"""

import contextlib
import select
import time
from typing import Any

from pymodbus import ModbusException
from pymodbus.client import ModbusSerialClient
from pymodbus.pdu import ExceptionResponse, ModbusPDU
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
from stpm.edge.plc.modbus import check_master_map, new_handshake, silence_s
from stpm.edge.plc.registers import (
    CONTROL_COILS,
    CONTROL_REGISTERS,
    RESULT_END,
    Bit,
    read_control,
    status_bits,
    status_registers,
)
from stpm.edge.plc.serial_port import SERIAL_ERRORS, adapter_notes, is_gone, no_answer, open_serial
from stpm.edge.plc.settings import PlcSettings, RemoteIo

LIMIT = 3  # exchanges in a row without an answer
TELL_AGAIN_NS = 60_000 * MS  # the same refusal
REFRESH_NS = 2_000 * MS  # all registers, whatever has changed: a PLC may have been restarted between two polls
EXCEPTIONS = {1: "illegal function", 2: "illegal address", 3: "illegal value", 4: "device failure", 6: "busy"}


class RefusedError(Exception):
    """An exception answer, or none: this time, or every time."""


class ModbusMaster:
    def __init__(self, settings: PlcSettings) -> None:
        self._settings = settings
        self._exchange = _Exchange(settings)
        self._peer = _Map(settings, self._exchange) if settings.io is None else _RemoteIo(settings.io, self._exchange)
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
            with contextlib.suppress(PlcError, RefusedError):
                while not self._peer.written and time.monotonic() < deadline:
                    self._peer.write()
                arrived = self._peer.written
        self._exchange.close()
        return arrived

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

    def __init__(self, settings: PlcSettings, exchange: "_Exchange") -> None:
        check_master_map(settings.map)
        self._map, self._exchange = settings.map, exchange
        self._handshake = new_handshake(settings, time.monotonic_ns())
        self._coils: tuple[list[bool], int] | None = None  # read, when; their registers are not read yet
        self.reopened()

    def reopened(self) -> None:
        self._bits: list[bool] | None = None  # as the PLC has them
        self._registers: list[int] | None = None
        self._refresh_at_ns = 0
        self._coils = None
        self._handshake.forget()

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
        self._handshake.gate(active)
        try:
            self._exchange(WriteSingleCoilRequest(address=self._map.status_bits + Bit.GATE, bits=[active]))
        except (RefusedError, PlcError):
            # nobody knows where it is: it is off until the next edge, and all bits are written again
            self._handshake.gate(False)
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

    def __init__(self, io: RemoteIo, exchange: "_Exchange") -> None:
        self._io, self._exchange = io, exchange
        used = (io.gate_coil, io.ready_coil, io.heartbeat_coil)
        self._wanted = {coil: False for coil in used if coil is not None}
        self._events: list[Incoming] = []
        self._input: bool | None = None
        self.reopened()

    def reopened(self) -> None:
        self._has: dict[int, bool] = {}
        self._input = None

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
        self._wanted[coil] = active
        try:
            self._set(coil, active)
        except (RefusedError, PlcError):
            self._has.pop(coil, None)
            self._wanted[coil] = False
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


class _Exchange:
    """One request, one answer. Counts those that stay without."""

    def __init__(self, settings: PlcSettings) -> None:
        self._settings = settings
        self._client: _Client | None = None
        self._unanswered = 0

    @property
    def is_open(self) -> bool:
        return self._client is not None

    def open(self) -> None:
        settings = self._settings
        port = open_serial(settings)
        self._client = _Client(
            settings.port,
            timeout=settings.timeout_ms / 1000,
            baudrate=settings.baud,
            retries=0,
            handle_local_echo=settings.local_echo,
        )
        self._client.socket = port
        self._client.silence_s = silence_s(settings)
        # a PLC that was lost counts as there when it answers the first time
        self._unanswered = LIMIT - 1

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None and client.socket is not None:
            with contextlib.suppress(*SERIAL_ERRORS):
                client.socket.close()

    def __call__(self, request: ModbusPDU) -> ModbusPDU:
        """The answer. RefusedError when it is an exception, or does not come; PlcError when too many did not come or
        the device is gone."""
        client, port = self._client, self._settings.port
        assert client is not None
        what = f"{type(request).__name__.removesuffix('Request')} at {request.address}"
        request.dev_id = self._settings.device_id
        try:
            answer = client.execute(False, request)
        except ModbusException as error:
            if client.socket is None:
                raise is_gone(port, error.__context__ or error) from error
            self._unanswered += 1
            if self._unanswered >= LIMIT:
                raise no_answer(port, what) from error
            raise RefusedError(f"the PLC does not answer {what}") from error
        except SERIAL_ERRORS as error:
            raise is_gone(port, error) from error
        self._unanswered = 0
        if isinstance(answer, ExceptionResponse):
            code = answer.exception_code
            raise RefusedError(f"the PLC refuses {what}: exception {code} ({EXCEPTIONS.get(code, 'unknown')})")
        if answer.function_code != request.function_code:
            raise RefusedError(f"the PLC answers {what} with function {answer.function_code}")
        return answer


class _Client(ModbusSerialClient):
    """pymodbus waits for an answer by sleeping, and by the wall clock, which may be set meanwhile. This one waits
    until bytes are there, by the monotonic clock; and it leaves the wire silent before the next request."""

    silence_s = 0.0
    _deadline = _heard = 0.0

    def send(self, request: bytes, addr: tuple[Any, ...] | None = None) -> int:
        time.sleep(max(0.0, self._heard + self.silence_s - time.monotonic()))
        size = super().send(request, addr)
        self._deadline = time.monotonic() + self.comm_params.timeout_connect
        return size

    def recv(self, size: int | None) -> bytes:
        port = self.socket
        assert port is not None
        if not select.select([port], [], [], max(0.0, self._deadline - time.monotonic()))[0]:
            return b""
        data: bytes = port.read(max(1, port.in_waiting))
        self._heard = time.monotonic()
        return data
