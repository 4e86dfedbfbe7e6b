"""What the tests of the PLC links share: events as they come, every protocol with a PLC at its other end, and devices
that there is no pseudo-terminal for."""

import select
import time
from collections import Counter
from contextlib import ExitStack

import serial

from stpm.edge.plc import open_link
from stpm.edge.plc.messages import Acknowledged, Counted, Delivered, State, Undelivered
from stpm.edge.plc.settings import PlcSettings
from stpm.tools.cable import PtyCable
from stpm.tools.plc_modbus import MasterPlc, SlavePlc
from stpm.tools.plc_sim import PtyPlc

ANSWERS = Delivered, Acknowledged, Undelivered


def answers(events):
    return Counter(event.id for event in events if isinstance(event, ANSWERS))


class Heard:
    """Events of a link as they come, by its descriptor; the encoder's, which come with every poll, by themselves.
    `alive`: the line is at work meanwhile."""

    def __init__(self, link, alive=False):
        self.link, self.events, self.counts, self.alive = link, [], [], alive

    def take(self, timeout_s=0.05):
        if self.alive:
            self.link.alive(time.monotonic_ns())
            timeout_s = min(timeout_s, 0.02)
        if select.select([self.link.fileno()], [], [], timeout_s)[0]:
            for event in self.link.events():
                (self.counts if isinstance(event, Counted) else self.events).append(event)

    def until(self, true, timeout_s=3.0):
        deadline = time.monotonic() + timeout_s
        while not true(self.events):
            assert time.monotonic() < deadline, self.events
            self.take()
        return self.events

    def one(self, kind, timeout_s=3.0):
        """The first event of that kind, and forget it."""
        self.until(lambda events: any(isinstance(event, kind) for event in events), timeout_s)
        event = next(event for event in self.events if isinstance(event, kind))
        self.events.remove(event)
        return event

    def during(self, seconds):
        """Everything from now on for so long."""
        ends = time.monotonic() + seconds
        self.until(lambda events: time.monotonic() > ends, seconds + 1)
        return self.events


class Device:
    """What is behind /dev/ttyUSB0: its lines, everything that was done to it, and whether it is plugged in."""

    def __init__(self):
        self.rts = self.dtr = self.cts = self.dsr = False
        self.plugged = True
        self.log = []


class FakeSerial:
    """The part of pyserial that a relay needs. Like the kernel, opening switches on what nobody has switched off."""

    device: Device

    def __init__(self):
        self.is_open = False
        self._wanted = {"rts": True, "dtr": True}

    def open(self):
        if not self.device.plugged:
            raise serial.SerialException(2, "no such device")
        self.is_open = True
        self.device.log.append(("open", dict(self._wanted)))
        self.device.rts, self.device.dtr = self._wanted["rts"], self._wanted["dtr"]

    def close(self):
        self.is_open = False
        self.device.log.append(("close",))
        self.device.rts = self.device.dtr = False

    def _set(self, pin, level):
        self._wanted[pin] = level
        if self.is_open:
            if not self.device.plugged:
                raise OSError(5, "Input/output error")
            setattr(self.device, pin, level)
            self.device.log.append((pin, level))

    def _get(self, pin):
        if not self.device.plugged:
            raise OSError(5, "Input/output error")
        return getattr(self.device, pin)

    rts = property(lambda self: self._wanted["rts"], lambda self, level: self._set("rts", level))
    dtr = property(lambda self: self._wanted["dtr"], lambda self, level: self._set("dtr", level))
    cts = property(lambda self: self._get("cts"))
    dsr = property(lambda self: self._get("dsr"))


class Station:
    """A link of that protocol, with a PLC at the other end; `output()` is the level of its gate there, `states()` what
    it has been told."""

    PROTOCOLS = ("ascii", "modbus-master", "modbus-slave", "pins")

    def __init__(self, protocol, monkeypatch, safe=False, scan_s=0.005, **settings):
        """`scan_s`: how often a PLC that polls does so."""
        self._stack = ExitStack()
        self.cable = self.plc = None
        if protocol == "pins":
            device = FakeSerial.device = Device()
            monkeypatch.setattr(serial, "Serial", FakeSerial)
            self.output = lambda: device.rts
            port = "/dev/ttyUSB0"
        else:
            self.cable = self._stack.enter_context(PtyCable())
            port = self.cable.ours
            if protocol == "ascii":
                self.plc = self._stack.enter_context(PtyPlc(device=self.cable.theirs))
                self.output = lambda: bool(self.plc.gate.levels) and self.plc.gate.levels[-1][1]
                self.states = lambda: self.plc.gate.states
            else:
                theirs = PlcSettings(port=self.cable.theirs)
                plc = SlavePlc(theirs) if protocol == "modbus-master" else MasterPlc(theirs, scan_s=scan_s)
                self.plc = self._stack.enter_context(plc)
                self.output = lambda: bool(self.plc.program.gate) and self.plc.program.gate[-1]
                self.states = lambda: self.plc.program.states
        wanted = {"poll_ms": 5, "timeout_ms": 100} | settings
        self.link = open_link(PlcSettings(port=port, protocol=protocol, **wanted), safe)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.link.close(State("STOPPED"))
        self._stack.close()
