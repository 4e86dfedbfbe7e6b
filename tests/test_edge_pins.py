"""RTS and DTR as outputs. Pseudo-terminals have no such lines, so the device is a small stand-in for pyserial's."""

import select
import time

import pytest
import serial
from plc_bench import Device, FakeSerial

from stpm.edge.errors import ConfigError, PlcError
from stpm.edge.plc import open_link
from stpm.edge.plc.messages import (
    Beat,
    Connected,
    Delivered,
    Disconnected,
    Gate,
    Part,
    State,
    Switched,
    Triggered,
    Unswitched,
)
from stpm.edge.plc.pins import PinsPort
from stpm.edge.plc.settings import Pins, PlcSettings
from stpm.tools.cable import PtyCable
from stpm.tools.plc_modbus import wait_until


@pytest.fixture
def device(monkeypatch):
    FakeSerial.device = Device()
    monkeypatch.setattr(serial, "Serial", FakeSerial)
    return FakeSerial.device


@pytest.fixture
def opened():
    links = []

    def open_it(**pins):
        link = open_link(PlcSettings(port="/dev/ttyUSB0", protocol="pins", pins=Pins(**pins)))
        links.append(link)
        return link

    yield open_it
    for link in links:
        link.close(State("STOPPED"))


def heard(link, kind, timeout_s=2.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        select.select([link.fileno()], [], [], 0.05)
        for event in link.events():
            if isinstance(event, kind):
                return event
    raise AssertionError(f"no {kind.__name__}")


def test_opening_does_not_pulse_the_gate(device, opened):
    opened()
    assert device.log[0] == ("open", {"rts": False, "dtr": False})
    assert not any(level for _, level in device.log[1:])


def test_gate_and_ready_switch_their_pins(device, opened):
    link = opened(gate="dtr", ready="rts")
    link.post(State("BOOT"))
    link.post(State("RUNNING"))
    wait_until(lambda: device.rts)
    for active in (True, False, True):
        link.post(Gate(1, active))
        assert heard(link, Switched).active == active
        assert device.dtr == active
    link.post(State("FAULT"))
    wait_until(lambda: not device.rts)
    assert device.dtr  # a state is not an edge


@pytest.mark.parametrize("state", ["BOOT", "SELF_TEST", "FAULT"])
def test_only_states_that_let_parts_pass_are_ready(device, opened, state):
    link = opened()
    link.post(State("DEGRADED"))
    wait_until(lambda: device.dtr)
    link.post(State(state))
    wait_until(lambda: not device.dtr)


def test_a_result_is_delivered_by_the_gate_alone(device, opened):
    link = opened()
    link.post(Part(5, "PASS", 0.1))
    assert heard(link, Delivered).id == 5


def test_closing_switches_everything_off_before_the_device_is_let_go(device, opened):
    link = opened()
    link.post(State("READY"))
    link.post(Gate(1, True))
    heard(link, Switched)
    wait_until(lambda: device.dtr)
    assert link.close(State("STOPPED"))
    assert not device.rts
    assert not device.dtr
    last = device.log.index(("close",))
    assert ("rts", False) in device.log[last - 4 : last]
    assert ("dtr", False) in device.log[last - 4 : last]


def test_a_port_that_is_closed_in_a_hurry_switches_off_itself(device):
    port = PinsPort(PlcSettings(port="/dev/ttyUSB0", protocol="pins"))
    port.open()
    port.send(Gate(1, True), 0)
    port.close(0)
    assert device.log[-3:-1] in ([("dtr", False), ("rts", False)], [("rts", False), ("dtr", False)])


def test_a_rising_input_is_a_trigger_once(device, opened):
    device.dsr = True  # on already: nobody knows since when
    link = opened(trigger="dsr")
    time.sleep(0.02)
    device.dsr = False
    time.sleep(0.02)
    before = time.monotonic_ns()
    device.dsr = True
    at_ns = heard(link, Triggered).at_ns
    assert before < at_ns < before + 50_000_000
    time.sleep(0.02)
    assert not any(isinstance(event, Triggered) for event in link.events())


def test_an_unplugged_adapter_is_noticed_by_the_next_beat_and_comes_back_off(device, opened):
    link = opened()
    link.post(State("READY"))
    link.post(Gate(1, True))
    heard(link, Switched)
    wait_until(lambda: device.dtr)
    device.plugged = False
    link.post(Beat(1))
    assert "is gone" in heard(link, Disconnected).sentence
    device.rts = device.dtr = False
    link.post(State("FAULT"))
    link.post(Gate(1, False))
    device.log.clear()
    device.plugged = True
    heard(link, Connected)
    wait_until(lambda: ("rts", False) in device.log)
    assert not device.rts
    assert not device.dtr


def test_a_gate_that_is_not_wired_is_told(device, opened):
    link = opened(gate="none")
    link.post(Gate(1, True))
    assert "no gate" in heard(link, Unswitched).reason


def test_two_outputs_on_one_pin_are_refused():
    with pytest.raises(ConfigError, match="both rts"):
        open_link(PlcSettings(port="/dev/ttyUSB0", protocol="pins", pins=Pins(gate="rts", ready="rts")))


def test_a_device_without_such_lines_is_refused():
    with PtyCable() as cable, pytest.raises(PlcError, match="no control lines"):
        open_link(PlcSettings(port=cable.ours, protocol="pins"))
