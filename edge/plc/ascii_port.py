"""The ASCII protocol on a serial device or pseudo-terminal: 8 data bits, no flow control.

RTS and DTR are on while the port is open and fall when it is closed, also by a crash. Odd about the outside world: a
device takes lines as long as its buffer has room, whether any of them leaves or not.
"""

import contextlib
import select
import time

import serial

from stpm.edge.errors import PlcError
from stpm.edge.plc.handshake import MS, Pending
from stpm.edge.plc.messages import (
    Acknowledged,
    Beat,
    Delivered,
    Garbage,
    Gate,
    Incoming,
    Outgoing,
    Part,
    State,
    Switched,
)
from stpm.edge.plc.protocol import SEQUENCE_MODULUS, LineReader, encode
from stpm.edge.plc.serial_port import (
    SERIAL_ERRORS,
    LineTime,
    adapter_notes,
    character_s,
    does_not_take,
    is_gone,
    open_serial,
)
from stpm.edge.plc.settings import PlcSettings

# how often it is looked whether the last byte is out
DRAIN_S = 0.002


class AsciiPort:
    def __init__(self, settings: PlcSettings) -> None:
        self._settings = settings
        self._port: serial.Serial | None = None
        self._reader = LineReader()
        self._pending = Pending(round(settings.acknowledge_ms * MS)) if settings.acknowledge else None
        self._sequence = 0
        self._state: State | None = None
        # the first line, and one after a write that failed, must not be glued to what is already on the wire
        self._separate = True
        self._line_time = LineTime(character_s(settings))
        self._stopped = False  # the device was found not to let anything out

    def open(self) -> list[Incoming]:
        self._port = open_serial(self._settings)
        self._reader.reopened()
        self._separate = True
        self._line_time = LineTime(character_s(self._settings))
        if self._stopped:
            self._try_out()
        return adapter_notes(self._settings.port)

    def _try_out(self) -> None:
        """It opened though nothing left it before: it counts as there when an empty line leaves it."""
        try:
            self._write(b"\r\n")
            if not self._drained(self._settings.timeout_ms / 1000):
                raise does_not_take(self._settings.port, OSError("nothing leaves the device"))
        except PlcError:
            self.close(0)
            raise
        self._stopped = False

    def send(self, message: Outgoing, now_ns: int) -> list[Incoming]:
        lines = self._line(message)
        if isinstance(message, State):
            self._state = message
        elif isinstance(message, Beat) and self._state is not None and self._state.state != "BOOT":
            # again: that line may have been lost on the way, or the PLC was switched on later
            lines += self._line(self._state)
        self._write(b"\r\n" + lines if self._separate else lines)
        at_ns = time.monotonic_ns()
        match message:
            case Gate(id, active):
                return [Switched(id, active, at_ns)]
            case Part(id):
                if self._pending is None:
                    return [Delivered(id, at_ns)]
                self._pending.sent(id, at_ns)
        return []

    def _write(self, data: bytes) -> None:
        assert self._port is not None
        self._separate = True  # until it has been taken as a whole
        try:
            self._port.write(data)
        except SERIAL_ERRORS as error:
            raise does_not_take(self._settings.port, error) from error
        self._separate = False
        self._line_time.wrote(len(data), time.monotonic())

    def _line(self, message: Outgoing) -> bytes:
        line = encode(message, self._sequence)
        self._sequence = (self._sequence + 1) % SEQUENCE_MODULUS
        return line

    def wait(self, wake: int, timeout_s: float) -> list[Incoming]:
        assert self._port is not None
        if self._pending is not None and (due_ns := self._pending.due_ns()) is not None:
            timeout_s = min(timeout_s, max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
        try:
            readable, _, _ = select.select([self._port, wake], [], [], timeout_s)
            data = self._port.read(4096) if self._port in readable else b""
        except SERIAL_ERRORS as error:
            raise is_gone(self._settings.port, error) from error
        now_ns = time.monotonic_ns()
        return [self._checked(message, now_ns) for message in self._reader.feed(data, now_ns)]

    def tick(self, now_ns: int) -> list[Incoming]:
        return self._pending.expired(now_ns) if self._pending else []

    def _checked(self, message: Incoming, now_ns: int) -> Incoming:
        if isinstance(message, Acknowledged) and not (self._pending and self._pending.acknowledged(message.id)):
            return Garbage(now_ns, f"an ACK for part {message.id}, which does not wait for one")
        return message

    def backlog_s(self) -> float:
        assert self._port is not None
        try:
            waiting = self._port.out_waiting
        except SERIAL_ERRORS as error:
            raise is_gone(self._settings.port, error) from error
        now_s = time.monotonic()
        if self._line_time.overdue_s(waiting, now_s) > self._settings.timeout_ms / 1000:
            self._stopped = True
            raise does_not_take(self._settings.port, OSError(f"{waiting} bytes do not leave the device"))
        return self._line_time.left_s(waiting, now_s)

    def close(self, timeout_s: float) -> bool:
        if self._port is None:
            return False
        drained = False
        with contextlib.suppress(*SERIAL_ERRORS):  # a device that is gone has nothing left to take
            drained = self._drained(timeout_s)
            if not drained:
                # the kernel would wait for it, for half a minute; and what is late is of no use
                self._port.reset_output_buffer()
        port, self._port = self._port, None
        with contextlib.suppress(*SERIAL_ERRORS):
            port.close()
        return drained and not self._separate

    def _drained(self, timeout_s: float) -> bool:
        """Whether all has left within that time."""
        assert self._port is not None
        deadline = time.monotonic() + timeout_s
        while self._port.out_waiting and time.monotonic() < deadline:
            time.sleep(DRAIN_S)
        return not self._port.out_waiting


class Nowhere:
    """`--plc none`: the lines are numbered and encoded, and go nowhere."""

    def __init__(self) -> None:
        self._sequence = 0

    def open(self) -> list[Incoming]:
        return []

    def send(self, message: Outgoing, now_ns: int) -> list[Incoming]:
        encode(message, self._sequence)
        self._sequence = (self._sequence + 1) % SEQUENCE_MODULUS
        match message:
            case Gate(id, active):
                return [Switched(id, active, time.monotonic_ns())]
            case Part(id):
                return [Delivered(id, time.monotonic_ns())]
        return []

    def wait(self, wake: int, timeout_s: float) -> list[Incoming]:
        select.select([wake], [], [], timeout_s)
        return []

    def tick(self, now_ns: int) -> list[Incoming]:
        return []

    def backlog_s(self) -> float:
        return 0.0

    def close(self, timeout_s: float) -> bool:
        return True
