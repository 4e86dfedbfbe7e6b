"""Opening a serial device, the same for every protocol.

Odd about the outside world: the kernel switches RTS and DTR on when a device is opened, before any program can say
otherwise (pyserial takes them back within a millisecond); closing switches both off. pyserial raises termios.error,
which is no OSError. A write to a port whose other side does not read blocks for ever without a limit, and changing a
timeout after a write loses bytes on some adapters, so limits are set once, here. An FTDI adapter keeps what it has
received for 16 ms unless it is told not to, and forgets that when it is unplugged.
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
