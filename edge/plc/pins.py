"""No protocol at all: RTS and DTR switch a relay each, and one of the inputs may be a trigger.

Both outputs are off while the port is closed and when the process is dead, so wire them such that off rejects. A
result is carried by the gate alone: a Part is delivered when it is here. Inputs cannot be waited for together with
anything else, so they are looked at every POLL_S: a trigger must be longer than that. A pseudo-terminal has no such
lines.
"""

import contextlib
import select
import time

import serial

from stpm.edge.errors import ConfigError, PlcError
from stpm.edge.plc.messages import (
    PASSING,
    Beat,
    Delivered,
    Gate,
    Incoming,
    Outgoing,
    Part,
    State,
    Switched,
    Triggered,
    Unswitched,
)
from stpm.edge.plc.serial_port import SERIAL_ERRORS, adapter_notes, is_gone, open_serial, reason_of
from stpm.edge.plc.settings import PlcSettings

POLL_S = 0.002


class PinsPort:
    def __init__(self, settings: PlcSettings) -> None:
        self._settings, self._pins = settings, settings.pins
        if self._pins.gate == self._pins.ready != "none":
            raise ConfigError(f"gate and ready are both {self._pins.gate} in [plc.pins]: give each its own, or none")
        self._port: serial.Serial | None = None
        self._input = False

    def open(self) -> list[Incoming]:
        self._port = open_serial(self._settings, outputs_off=True)
        try:
            # once more, because opening alone does not say whether the device has such lines at all
            self._port.rts = self._port.dtr = False
            self._input = self._look()
        except (PlcError, *SERIAL_ERRORS) as error:
            self.close(0)
            raise PlcError(
                f"{self._settings.port} has no control lines ({reason_of(error)}): the protocol pins needs a serial "
                "device with RTS and DTR, not a pseudo-terminal"
            ) from error
        return adapter_notes(self._settings.port)

    def send(self, message: Outgoing, now_ns: int) -> list[Incoming]:
        match message:
            case Gate(id, active) if self._pins.gate == "none":
                return [Unswitched(id, active, now_ns, "[plc.pins] has no gate")]
            case Gate(id, active):
                self._switch(self._pins.gate, active)
                return [Switched(id, active, time.monotonic_ns())]
            case State(state):
                self._switch(self._pins.ready, state in PASSING)
            case Part(id):
                return [Delivered(id, now_ns)]
            case Beat():
                self._look()  # without an input nothing else would notice that the device is gone
        return []

    def wait(self, wake: int, timeout_s: float) -> list[Incoming]:
        if self._pins.trigger == "none":
            select.select([wake], [], [], timeout_s)
            return []
        deadline = time.monotonic() + timeout_s
        while True:
            before, self._input = self._input, self._look()
            if self._input and not before:
                return [Triggered(time.monotonic_ns())]
            left_s = deadline - time.monotonic()
            if left_s <= 0 or select.select([wake], [], [], min(POLL_S, left_s))[0]:
                return []

    def tick(self, now_ns: int) -> list[Incoming]:
        return []

    def backlog_s(self) -> float:
        return 0.0

    def close(self, timeout_s: float) -> bool:
        port, self._port = self._port, None
        if port is None:
            return False
        switched = False
        with contextlib.suppress(*SERIAL_ERRORS):  # a device that is gone has its outputs off
            port.rts = port.dtr = False
            switched = True
        with contextlib.suppress(*SERIAL_ERRORS):
            port.close()
        return switched

    def _look(self) -> bool:
        """Level of the trigger input."""
        try:
            level = bool(getattr(self._port, "cts" if self._pins.trigger == "none" else self._pins.trigger))
        except SERIAL_ERRORS as error:
            raise is_gone(self._settings.port, error) from error
        return level and self._pins.trigger != "none"

    def _switch(self, pin: str, on: bool) -> None:
        if pin == "none":
            return
        try:
            setattr(self._port, pin, on)
        except SERIAL_ERRORS as error:
            raise is_gone(self._settings.port, error) from error
