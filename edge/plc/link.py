"""The link: numbers the lines and writes them, with a limit on how long a write may take."""

import time
from collections.abc import Callable
from typing import Protocol

import serial

from stpm.edge.errors import PlcError
from stpm.edge.plc.protocol import SEQUENCE_MODULUS, Message, encode

WRITE_TIMEOUT_S = 0.2


class Link(Protocol):
    def send(self, message: Message) -> None:
        """Hand one line to the port. PlcError when the port is gone or does not take it in time."""

    def close(self) -> None:
        """Release the port; a second call does nothing."""


class SerialLink:
    """A serial device or pseudo-terminal, 8N1, no flow control; RTS and DTR fall when it is closed."""

    def __init__(self, port: str, baud: int = 115200, trace: Callable[[bytes], None] | None = None) -> None:
        self._name, self._trace, self._sequence = port, trace, 0
        # the first line, and one after a write that failed, must not be glued to what is already on the wire
        self._separate = True
        try:
            self._port = serial.Serial(port, baud, timeout=0, write_timeout=WRITE_TIMEOUT_S, exclusive=True)
        except (serial.SerialException, OSError, ValueError, OverflowError) as error:
            raise PlcError(
                f"the PLC port {port} does not open ({_reason(error)}): check the cable, the name "
                "(`ls /dev/tty*`) and that this user is in the group dialout; `--plc none` runs without a PLC"
            ) from error

    def send(self, message: Message) -> None:
        line = encode(message, self._sequence)
        self._sequence = (self._sequence + 1) % SEQUENCE_MODULUS
        try:
            self._port.write(b"\r\n" + line if self._separate else line)
            self._separate = False
        except (serial.SerialException, OSError) as error:
            self._separate = True
            raise PlcError(
                f"the PLC port {self._name} did not take a line ({_reason(error)}): check that the cable is plugged "
                "in and that the other side reads, then start again"
            ) from error
        if self._trace:
            self._trace(line)

    def close(self) -> None:
        if self._port.is_open:
            self._port.close()


class NoLink:
    """`--plc none`: the lines are numbered and encoded, and go nowhere."""

    def __init__(self, trace: Callable[[bytes], None] | None = None) -> None:
        self._trace, self._sequence = trace, 0

    def send(self, message: Message) -> None:
        line = encode(message, self._sequence)
        self._sequence = (self._sequence + 1) % SEQUENCE_MODULUS
        if self._trace:
            self._trace(line)

    def close(self) -> None:
        """Nothing is held open."""


class Heartbeat:
    """Says when a beat is due: `interval` seconds after the last line."""

    def __init__(self, interval: float) -> None:
        self._interval, self._last = interval, time.monotonic()

    def sent(self) -> None:
        self._last = time.monotonic()

    def due_in(self) -> float:
        return max(0.0, self._last + self._interval - time.monotonic())


def open_plc(port: str, baud: int = 115200, trace: Callable[[bytes], None] | None = None) -> Link:
    """A serial device or pty by its path, or "none"."""
    return NoLink(trace) if port == "none" else SerialLink(port, baud, trace)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
