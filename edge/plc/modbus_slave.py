"""Modbus RTU, we are the slave: the PLC polls us, and reads and writes the map of registers.py.

pymodbus' server runs in an asyncio loop inside the link's thread, for as long as the link waits. A write of the PLC is
an event at once; a read gets the status of that moment, all of it or none. Odd about pymodbus 3.16: its server
answers (with an exception) what was meant for another slave on the bus, and a frame with a wrong CRC may take the next
one with it, so frames are found here by `_Framer`; and why a port does not open it only logs.
"""

import asyncio
import time
from functools import partial
from typing import TypeVar

from pymodbus.constants import ExcCodes
from pymodbus.framer.rtu import FramerRTU
from pymodbus.pdu import DecodePDU, ModbusPDU
from pymodbus.server import ModbusSerialServer
from pymodbus.simulator import DataType, SimData, SimDevice

from stpm.edge.plc.messages import Gate, Incoming, Outgoing, Switched, Unswitched
from stpm.edge.plc.modbus import check_slave_map, new_handshake, silence_s
from stpm.edge.plc.registers import (
    CONTROL_COILS,
    CONTROL_REGISTERS,
    ENCODER,
    STATUS_BITS,
    STATUS_REGISTERS,
    Bit,
    read_control,
    status_bits,
    status_registers,
)
from stpm.edge.plc.serial_port import SERIAL_ERRORS, adapter_notes, does_not_open, is_gone
from stpm.edge.plc.settings import PlcSettings

# function codes by what they do
READ_INPUTS, READ_INPUT_REGISTERS, READ_HOLDING_REGISTERS = 2, 4, (3, 23)
READS = (1, 2, 3, 4)
WRITE_COILS, WRITE_REGISTERS = (5, 15), (6, 16, 23)
# bytes of a request, from address to CRC, or the place of its byte count
LENGTHS = dict.fromkeys((1, 2, 3, 4, 5, 6), 8)
BYTE_COUNTS = {15: 6, 16: 6, 23: 10}

_Value = TypeVar("_Value", bool, int)


class ModbusSlave:
    def __init__(self, settings: PlcSettings) -> None:
        check_slave_map(settings.map)
        self._settings, self._map = settings, settings.map
        self._handshake = new_handshake(settings, time.monotonic_ns())
        self._coils, self._registers = [False] * CONTROL_COILS, [0] * CONTROL_REGISTERS
        # our memory begins empty, so the first thing that the PLC sets is an edge
        self._hear(time.monotonic_ns(), counted=False)
        self._gate: Gate | None = None  # shown, and not read by the PLC yet
        self._seen = False  # the PLC has read what was said last
        self._told: list[Incoming] = []
        self._silence_s = silence_s(settings)  # from a request to its answer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: ModbusSerialServer | None = None
        self._broken: BaseException | None = None
        self._waiting = False
        self._bits_asked = 0  # by the present request

    # --- the link's verbs

    def open(self) -> list[Incoming]:
        self._loop, self._broken = asyncio.new_event_loop(), None
        try:
            self._server = self._loop.run_until_complete(self._serve())
        except (*SERIAL_ERRORS, RuntimeError) as error:
            self.close(0)
            raise does_not_open(self._settings.port, self._broken or error) from error
        return adapter_notes(self._settings.port)

    def send(self, message: Outgoing, now_ns: int) -> list[Incoming]:
        self._seen = False
        if isinstance(message, Gate):
            overtaken, self._gate = self._gate, message
            self._handshake.gate(message.active)
            if overtaken is None:
                return []
            return [Unswitched(overtaken.id, overtaken.active, now_ns, "the PLC did not read it in time")]
        self._handshake.post(message, now_ns)
        return []

    def wait(self, wake: int, timeout_s: float) -> list[Incoming]:
        loop = self._loop
        assert loop is not None
        due_ns = self._handshake.due_ns()
        if due_ns is not None:
            timeout_s = min(timeout_s, max(0, due_ns - time.monotonic_ns()) / 1e9)
        loop.add_reader(wake, loop.stop)
        timer = loop.call_later(timeout_s, loop.stop)
        self._waiting = True
        loop.run_forever()
        self._waiting = False
        timer.cancel()
        loop.remove_reader(wake)
        if self._broken is not None:
            raise is_gone(self._settings.port, self._broken)
        return []

    def tick(self, now_ns: int) -> list[Incoming]:
        self._handshake.tick(now_ns)
        told, self._told = self._told, []
        return told + self._handshake.events()

    def backlog_s(self) -> float:
        return 0.0  # only answers, one at a time

    def close(self, timeout_s: float) -> bool:
        """Here what was sent has arrived when the PLC has read it."""
        loop, self._loop = self._loop, None
        if loop is None:
            return False
        if timeout_s and self._broken is None:
            self._handshake.stop()
            self._seen = False
            loop.run_until_complete(self._read_until(time.monotonic() + timeout_s))
        if self._server is not None:
            loop.run_until_complete(self._shut_down(self._server))
            self._server = None
        loop.close()
        return self._seen and self._broken is None

    # --- in the loop

    async def _serve(self) -> ModbusSerialServer:
        settings = self._settings
        server = ModbusSerialServer(
            SimDevice(settings.device_id, self._tables(), action=self._accessed),
            port=settings.port,
            baudrate=settings.baud,
            parity=settings.parity,
            stopbits=settings.stop_bits,
            timeout=settings.timeout_ms / 1000,
            handle_local_echo=settings.local_echo,
            trace_connect=self._connection,
            trace_pdu=self._requested,
        )
        server.framer = partial(_Framer, settings.device_id)  # type: ignore[assignment]
        listen = server.call_create

        async def keep_reason() -> object:
            try:
                return await listen()
            except OSError as error:
                self._broken = error
                raise

        server.call_create = keep_reason
        await server.serve_forever(background=True)
        return server

    async def _shut_down(self, server: ModbusSerialServer) -> None:
        await server.shutdown()  # type: ignore[no-untyped-call]
        # answers that were still waiting for their silence
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read_until(self, deadline: float) -> None:
        while not self._seen and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.005)  # the answer itself

    def _tables(self) -> tuple[list[SimData], list[SimData], list[SimData], list[SimData]]:
        places = self._map
        bits, words = partial(SimData, datatype=DataType.BITS), partial(SimData, datatype=DataType.REGISTERS)
        return (
            [bits(places.control_coils, values=[False] * CONTROL_COILS)],
            [bits(places.status_bits, values=[False] * STATUS_BITS)],
            [
                words(places.control_registers, values=[0] * CONTROL_REGISTERS),
                words(places.mirror_registers, values=[0] * STATUS_REGISTERS, readonly=True),
            ],
            [words(places.status_registers, values=[0] * STATUS_REGISTERS)],
        )

    async def _accessed(
        self,
        function: int,
        first: int,
        address: int,
        count: int,
        table: list[int],
        values: list[int] | list[bool] | None,
    ) -> ExcCodes | None:
        """pymodbus is about to read `count` words of `table`, which begins at word `first`, or to write `values`.
        Bits are packed into words; `address` is theirs. The answer follows when the line has been silent."""
        if values is None:
            if function in READS:
                await asyncio.sleep(self._silence_s)
            self._read(function, first, address, count, table)
            self._interrupt_if_told()
            return None
        now_ns = time.monotonic_ns()
        if function in WRITE_COILS:
            _place(self._coils, address - self._map.control_coils, [bool(value) for value in values])
            self._hear(now_ns, counted=False)
        elif function in WRITE_REGISTERS:
            start = address - self._map.control_registers
            _place(self._registers, start, [int(value) for value in values])
            self._hear(now_ns, counted=start <= ENCODER and start + len(values) >= ENCODER + 2)
        self._interrupt_if_told()
        await asyncio.sleep(self._silence_s)
        return None

    def _interrupt_if_told(self) -> None:
        self._told += self._handshake.events()
        if self._told:
            self._interrupt()

    def _read(self, function: int, first: int, address: int, count: int, table: list[int]) -> None:
        now_ns = time.monotonic_ns()
        status = self._handshake.status(now_ns)
        if function == READ_INPUTS:
            for bit, level in enumerate(status_bits(status), self._map.status_bits):
                word, mask = bit // 16 - first, 1 << bit % 16
                table[word] = table[word] | mask if level else table[word] & ~mask
            valid = self._map.status_bits + Bit.RESULT_VALID
            seen = address <= valid < address + self._bits_asked
        elif function in (READ_INPUT_REGISTERS, *READ_HOLDING_REGISTERS):
            inputs = function == READ_INPUT_REGISTERS
            begins = self._map.status_registers if inputs else self._map.mirror_registers
            table[begins - first : begins - first + STATUS_REGISTERS] = status_registers(status)
            seen = address <= begins < address + count
        else:
            return
        if seen:
            self._has_seen(now_ns)

    def _has_seen(self, now_ns: int) -> None:
        """The PLC gets the status as it is now."""
        self._seen = True
        self._handshake.shown()
        if self._gate is not None:
            self._told.append(Switched(self._gate.id, self._gate.active, now_ns))
            self._gate = None
        self._handshake.tick(now_ns)

    def _requested(self, sending: bool, pdu: ModbusPDU) -> ModbusPDU:
        """pymodbus tells `_accessed` how many words of bits, not how many bits."""
        if not sending:
            self._bits_asked = pdu.count
        return pdu

    def _hear(self, now_ns: int, counted: bool) -> None:
        self._handshake.hear(read_control(self._coils, self._registers), now_ns, counted)

    def _connection(self, connected: bool) -> None:
        if not connected and self._loop is not None:
            self._broken = self._broken or OSError("the device was unplugged, or its other end was closed")
            self._interrupt()

    def _interrupt(self) -> None:
        if self._waiting and self._loop is not None:
            self._loop.stop()


def _place(table: list[_Value], start: int, values: list[_Value]) -> None:
    for index, value in enumerate(values, start):
        if 0 <= index < len(table):
            table[index] = value


class _Framer(FramerRTU):
    """Finds requests to us among noise, and among requests to and answers of other slaves on the same pair of wires:
    at any place, and by their CRC only. What may still become one is kept."""

    def __init__(self, device_id: int, decoder: DecodePDU) -> None:
        super().__init__(decoder)
        self._device_id = device_id

    def decode(self, data: bytes) -> tuple[int, int, int, bytes]:
        """As in the base class: bytes done with, our id, 0, and the request, if there is one."""
        keep = len(data)
        for start in [start for start, byte in enumerate(data) if byte == self._device_id]:
            size = _size(data[start:])
            if size is None:
                continue
            end = start + size
            if size == 0 or end > len(data):
                keep = min(keep, start)
            elif self.check_CRC(data[start : end - 2], int.from_bytes(data[end - 2 : end], "big")):
                return end, self._device_id, 0, data[start + 1 : end - 2]
        return keep, 0, 0, self.EMPTY


def _size(request: bytes) -> int | None:
    """Length of the request that these bytes begin; 0 when that cannot be said yet, None when they begin none."""
    if len(request) < 2:
        return 0
    if request[1] in LENGTHS:
        return LENGTHS[request[1]]
    place = BYTE_COUNTS.get(request[1])
    if place is None:
        return None
    return request[place] + place + 3 if len(request) > place else 0
