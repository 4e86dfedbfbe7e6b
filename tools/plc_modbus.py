"""Simulated PLCs on Modbus RTU, built on pymodbus: one that polls us and one that we write into; one program for both.

`Program` is what a PLC program must do with the map of docs/plc.md, in the order in which a PLC scans.
"""

import asyncio
import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from dataclasses import replace
from types import TracebackType

from pymodbus import ModbusException
from pymodbus.client import ModbusSerialClient
from pymodbus.constants import ExcCodes
from pymodbus.pdu import ModbusPDU
from pymodbus.server import ModbusSerialServer
from pymodbus.simulator import DataType, SimData, SimDevice

import stpm.edge.plc.modbus  # noqa: F401 (keeps pymodbus from writing to stderr)
from stpm.edge.plc.registers import (
    CONTROL_COILS,
    CONTROL_REGISTERS,
    STATUS_BITS,
    STATUS_REGISTERS,
    Bit,
    Control,
    Status,
    control_tables,
    read_status,
)
from stpm.edge.plc.settings import PlcSettings

SIZE = 200  # of each table of the slave PLC


class Program:
    """Fed with the status as the PLC sees it and the time, once per scan; says what the PLC sets."""

    def __init__(self, acknowledge: bool = True, beat_s: float = 0.1) -> None:
        self.acknowledge = acknowledge
        self.control = Control(enable=True)
        self.results: list[Status] = []  # as they were taken
        self.passed: list[int] = []
        self.rejected: list[int] = []
        self.states: list[str] = []
        self.gate: list[bool] = []  # levels of the bit GATE
        self.beats = 0
        self.triggers: deque[int] = deque()  # numbers that wait for their turn
        self.recipes: deque[int] = deque()
        self.clears = 0
        self._beat_s, self._beat_at = beat_s, 0.0
        self._bits: frozenset[Bit] = frozenset()
        self._newest = 0

    def scan(self, status: Status, now: float) -> Control:
        bits = status.bits
        if status.state and status.state != (self.states[-1] if self.states else ""):
            self.states.append(status.state)
        if (Bit.GATE in bits) != (self.gate[-1] if self.gate else False):
            self.gate.append(Bit.GATE in bits)
        self.beats += Bit.HEARTBEAT in bits ^ self._bits
        # inspection 0: the memory was emptied, and the registers of this result are not there again
        if Bit.RESULT_VALID in bits and status.inspection and not self.control.result_ack:
            if Bit.RESULT_VALID not in self._bits or status.inspection != self._newest:
                self._take(status)
            self._set(result_ack=self.acknowledge)
        elif Bit.RESULT_VALID not in bits:
            self._set(result_ack=False)
        self._ask(bits)
        if now - self._beat_at >= self._beat_s:
            self._beat_at = now
            self._set(heartbeat=not self.control.heartbeat)
        self._bits = bits
        return self.control

    def _take(self, status: Status) -> None:
        """Only PASS, alone, while READY lets through."""
        self._newest = status.inspection
        self.results.append(status)
        good = Bit.READY in status.bits and Bit.PASS in status.bits and not status.bits & {Bit.FAIL, Bit.UNKNOWN}
        (self.passed if good else self.rejected).append(status.part_id)

    def _ask(self, bits: frozenset[Bit]) -> None:
        """Raise a bit, hold it until its mirror is on, drop it, and wait until the mirror has fallen."""
        if self.control.trigger:
            self._set(trigger=Bit.TRIGGER_ACK not in bits)
        elif self.triggers and Bit.TRIGGER_ACK not in bits:
            self._set(trigger=True, part_id=self.triggers.popleft())
        if self.control.recipe_change:
            self._set(recipe_change=Bit.RECIPE_ACK not in bits)
        elif self.recipes and Bit.RECIPE_ACK not in bits:
            self._set(recipe_change=True, recipe=self.recipes.popleft())
        if self.control.clear_fault:
            self._set(clear_fault=Bit.CLEAR_ACK not in bits)
        elif self.clears and Bit.CLEAR_ACK not in bits:
            self.clears -= 1
            self._set(clear_fault=True)

    def set(self, **changes: bool | int) -> None:
        """What the rest of the PLC program sets: enable, delay, pulse_ms, count."""
        self._set(**changes)

    def _set(self, **changes: bool | int) -> None:
        self.control = replace(self.control, **changes)  # type: ignore[arg-type]

    def summary(self) -> str:
        verdicts = Counter(result.verdict for result in self.results)
        return (
            f"PLC: {len(self.passed)} parts let through, {len(self.rejected)} rejected; verdicts {dict(verdicts)}; "
            f"{self.beats} heartbeats; states {' '.join(self.states) or 'none'}"
        )


class _Thread(ABC):
    """Runs `_live` until left."""

    def __init__(self, settings: PlcSettings, program: Program | None = None) -> None:
        self.settings, self.program = settings, program or Program()
        self.failures = 0  # exchanges without a good answer
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._live, name="simulated Modbus PLC", daemon=True)
        self._thread.start()

    def __enter__(self):  # type: ignore[no-untyped-def]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._thread.join()

    @abstractmethod
    def _live(self) -> None: ...


class MasterPlc(_Thread):
    """A PLC that polls stpm-run (`protocol = "modbus-slave"`): per scan one read, and writes of what has changed."""

    def __init__(self, settings: PlcSettings, program: Program | None = None, scan_s: float = 0.005) -> None:
        self._scan_s = scan_s
        self.answer_s: list[float] = []  # of every good exchange
        super().__init__(settings, program)

    def _live(self) -> None:
        settings = self.settings
        client = ModbusSerialClient(
            settings.port,
            baudrate=settings.baud,
            parity=settings.parity,
            stopbits=settings.stop_bits,
            timeout=0.2,
            retries=0,
        )
        coils, registers = [False] * CONTROL_COILS, [0] * CONTROL_REGISTERS
        while not self._leaving.is_set():
            try:
                status = self._read(client)
                new_coils, new_registers = control_tables(self.program.scan(status, time.monotonic()))
                if new_registers != registers:
                    self._good(client.write_registers, settings.map.control_registers, new_registers)
                    registers = new_registers
                if new_coils != coils:
                    self._good(client.write_coils, settings.map.control_coils, new_coils)
                    coils = new_coils
            except (ModbusException, OSError):
                self.failures += 1
            self._leaving.wait(self._scan_s)
        client.close()

    def _read(self, client: ModbusSerialClient) -> Status:
        began = time.monotonic()
        answer = client.read_input_registers(
            self.settings.map.status_registers, count=STATUS_REGISTERS, device_id=self.settings.device_id
        )
        if answer.isError():
            raise ModbusException(str(answer))
        self.answer_s.append(time.monotonic() - began)
        return read_status(answer.registers)

    def _good(self, write, address: int, values: list) -> None:  # type: ignore[no-untyped-def,type-arg]
        answer = write(address, values, device_id=self.settings.device_id)
        if answer.isError():
            raise ModbusException(str(answer))


class SlavePlc(_Thread):
    """A PLC that stpm-run writes into (`protocol = "modbus-master"`), or a block of remote I/O."""

    def __init__(self, settings: PlcSettings, program: Program | None = None) -> None:
        self.coils, self.inputs = [False] * SIZE, [False] * SIZE
        self.registers = [0] * SIZE
        self.refuse: ExcCodes | None = None  # answer every write with this
        self.silent = False  # answer nothing
        self.unheard = 0  # requests that it does not hear from now on
        self.reads = 0  # requests
        self.writes: list[tuple[int, int, list[int] | list[bool], float]] = []  # function, address, values, when
        self._started = threading.Event()
        super().__init__(settings, program)
        self._started.wait()

    def forget(self) -> None:
        """Its memory as after it was switched on."""
        self.coils[:], self.registers[:] = [False] * SIZE, [0] * SIZE

    def _live(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        settings = self.settings
        bits = SimData(0, values=[False] * SIZE, datatype=DataType.BITS)
        words = SimData(0, values=[0] * SIZE, datatype=DataType.REGISTERS)
        server = ModbusSerialServer(
            SimDevice(settings.device_id, ([bits], [bits], [words], [words]), action=self._accessed),
            port=settings.port,
            baudrate=settings.baud,
            parity=settings.parity,
            stopbits=settings.stop_bits,
            trace_pdu=self._silenced,
        )
        await server.serve_forever(background=True)
        self._started.set()
        while not self._leaving.is_set():
            before = [each.recv_buffer for each in server.active_connections.values()]
            await asyncio.sleep(0.02)
            # silence ends a frame; pymodbus would wait for the rest of it for ever
            for connection, buffer in zip(list(server.active_connections.values()), before, strict=False):
                if connection.recv_buffer == buffer:
                    connection.recv_buffer = b""
        await server.shutdown()  # type: ignore[no-untyped-call]
        await asyncio.sleep(0)

    def _silenced(self, sending: bool, pdu: ModbusPDU) -> ModbusPDU:
        heard = sending or not (self.silent or self.unheard)
        if not sending:
            self.unheard = max(0, self.unheard - 1)
        return pdu if heard else None  # type: ignore[return-value]

    async def _accessed(
        self,
        function: int,
        first: int,
        address: int,
        count: int,
        table: list[int],
        values: list[int] | list[bool] | None,
    ) -> ExcCodes | None:
        if values is not None:
            if self.refuse is not None:
                return self.refuse
            self.writes.append((function, address, list(values), time.monotonic()))
            target = self.coils if function in (5, 15) else self.registers
            target[address : address + len(values)] = values  # type: ignore[assignment]
            self._scan()
        elif function in (1, 2, 3):
            self.reads += 1
            self._scan()
            if function == 3:
                table[:SIZE] = self.registers
            else:
                levels = self.coils if function == 1 else self.inputs
                for word in range(SIZE // 16):
                    table[word] = sum(levels[16 * word + bit] << bit for bit in range(16))
        return None

    def _scan(self) -> None:
        places = self.settings.map
        levels = self.coils[places.status_bits : places.status_bits + STATUS_BITS]
        status = read_status(self.registers[places.status_registers : places.status_registers + STATUS_REGISTERS])
        status = replace(status, bits=frozenset(bit for bit in Bit if levels[bit]))
        if self.settings.io is None:
            coils, registers = control_tables(self.program.scan(status, time.monotonic()))
            self.coils[places.control_coils : places.control_coils + CONTROL_COILS] = coils
            self.registers[places.control_registers : places.control_registers + CONTROL_REGISTERS] = registers


def wait_until(true, timeout_s: float = 3.0) -> None:  # type: ignore[no-untyped-def]
    """Until `true()`. TimeoutError when that does not come."""
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen in time")
        with contextlib.suppress(InterruptedError):
            time.sleep(0.001)
