"""Opening a serial device, the same for every protocol.

Odd about the outside world: the kernel switches RTS and DTR on when a device is opened, before any program can say
otherwise (pyserial takes them back within a millisecond); closing switches both off. pyserial raises termios.error,
which is no OSError. A write to a port whose other side does not read blocks for ever without a limit, and changing a
timeout after a write loses bytes on some adapters, so limits are set once, here. An FTDI adapter keeps what it has
received for 16 ms unless it is told not to, and forgets that when it is unplugged. How much has not left yet a device
says, if at all, only of its own queue: nothing of the adapter's, and a pseudo-terminal says 0 whatever its other side
has not read.
"""

import os
import termios
import time
from pathlib import Path

import serial

from stpm.edge.errors import PlcError
from stpm.edge.plc.messages import Garbage, Incoming
from stpm.edge.plc.settings import PlcSettings

ADAPTERS = Path("/sys/bus/usb-serial/devices")
# what a serial device or pyserial may raise; ValueError and OverflowError for an impossible speed
SERIAL_ERRORS = (serial.SerialException, OSError, termios.error, ValueError, OverflowError)


def open_serial(settings: PlcSettings, outputs_off: bool = False, timeout_s: float = 0) -> serial.Serial:
    """The device, ours alone, with a limit on every write; reads wait for `timeout_s`. `outputs_off`: with RTS and DTR
    off, where they switch something. PlcError when it does not open."""
    port = serial.Serial()
    port.port = settings.port
    try:
        port.baudrate, port.parity, port.stopbits = settings.baud, settings.parity, settings.stop_bits
        port.exclusive = True
        port.timeout, port.write_timeout = timeout_s, settings.timeout_ms / 1000
        if outputs_off:
            port.rts = port.dtr = False
        port.open()
    except SERIAL_ERRORS as error:
        raise does_not_open(settings.port, error) from error
    return port


def character_s(settings: PlcSettings) -> float:
    """How long one character takes on the wire: start bit, 8 data bits, parity and stop bits."""
    return (1 + 8 + (settings.parity != "N") + settings.stop_bits) / settings.baud


class LineTime:
    """How long what was written to a device still takes to leave it: at least as long as the speed of the wire wants,
    and longer where the device says that more waits. Pure; the clock is passed in, in seconds."""

    def __init__(self, character_s: float) -> None:
        self._character_s = character_s
        self._free_s = 0.0  # when it has all left, at the speed of the wire

    def wrote(self, characters: int, now_s: float) -> None:
        self._free_s = max(self._free_s, now_s) + characters * self._character_s

    def left_s(self, waiting: int, now_s: float) -> float:
        """`waiting`: characters, as the device says."""
        return max(0.0, self._free_s - now_s, waiting * self._character_s)

    def overdue_s(self, waiting: int, now_s: float) -> float:
        """For how long the device should have been empty."""
        return max(0.0, now_s - self._free_s) if waiting else 0.0


def adapter_notes(port: str, folder: Path = ADAPTERS) -> list[Incoming]:
    """Have a USB adapter pass on what it receives at once. What is worth telling, when that is not allowed."""
    timer = folder / os.path.basename(os.path.realpath(port)) / "latency_timer"
    try:
        waits = timer.read_text().strip()
        if waits != "1":
            timer.write_text("1")
    except FileNotFoundError:
        return []  # not an adapter of that kind
    except OSError as error:
        sentence = (
            f"the adapter {port} keeps answers for up to 16 ms, and {timer} cannot be set to 1 "
            f"({reason_of(error)}): let a udev rule do it"
        )
        return [Garbage(time.monotonic_ns(), sentence)]
    return []


def does_not_open(port: str, error: BaseException) -> PlcError:
    return PlcError(
        f"the PLC port {port} does not open ({reason_of(error)}): check the cable, the name "
        "(`ls /dev/tty*`) and that this user is in the group dialout; `--plc none` runs without a PLC"
    )


def does_not_take(port: str, error: BaseException) -> PlcError:
    return PlcError(
        f"the PLC port {port} did not take a line ({reason_of(error)}): check that the cable is plugged "
        "in and that the other side reads"
    )


def is_gone(port: str, error: BaseException) -> PlcError:
    return PlcError(f"the PLC port {port} is gone ({reason_of(error)}): check that the cable is plugged in")


def no_answer(port: str, why: str) -> PlcError:
    return PlcError(
        f"the PLC at {port} does not answer ({why}): check its power, the cable, speed, parity and device_id"
    )


def reason_of(error: BaseException) -> str:
    # pyserial wraps the system's sentence in one with the name of the port
    cause = error.__context__ if isinstance(error, serial.SerialException) and error.errno else None
    named = cause if isinstance(cause, OSError) else error
    return getattr(named, "strerror", None) or str(error) or type(error).__name__
