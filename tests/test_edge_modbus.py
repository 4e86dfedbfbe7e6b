"""Modbus RTU as master and as slave, against pymodbus' own server and client on pseudo-terminals."""

import contextlib
import gc
import random
import time

import pytest
from plc_bench import Heard, answers
from pymodbus import ModbusException
from pymodbus.client import ModbusSerialClient
from pymodbus.constants import ExcCodes
from pymodbus.framer.rtu import FramerRTU

from stpm.edge.errors import ConfigError, PlcError
from stpm.edge.plc import open_link
from stpm.edge.plc.messages import (
    Acknowledged,
    Beat,
    ClearAsked,
    Connected,
    Delivered,
    Disconnected,
    Enabled,
    Garbage,
    Gate,
    GateTimes,
    Part,
    PeerBeat,
    RecipeAsked,
    State,
    Switched,
    Triggered,
    Undelivered,
    Unswitched,
)
from stpm.edge.plc.registers import Bit, read_status
from stpm.edge.plc.settings import PlcSettings, RegisterMap, RemoteIo
from stpm.tools.plc_modbus import MasterPlc, Program, SlavePlc, wait_until

KINDS = {"modbus-master": SlavePlc, "modbus-slave": MasterPlc}


@pytest.fixture
def opened(cable):
    """Opens links at our end of the cable and closes them."""
    links = []

    def open_it(protocol, **settings):
        link = open_link(PlcSettings(port=cable.ours, protocol=protocol, **settings))
        links.append(link)
        return link

    yield open_it
    for link in links:
        link.close(State("STOPPED"))


@pytest.fixture(params=list(KINDS))
def ends(request, cable, opened):
    """A link and the simulated PLC at the other end of it, both ways round."""
    with KINDS[request.param](PlcSettings(port=cable.theirs)) as plc:
        link = opened(request.param, enable=True, poll_ms=5, timeout_ms=100, heartbeat_s=0.1)
        link.post(State("RUNNING", recipe=2, bundle="c0ffee00"))
        yield link, plc
        link.close(State("STOPPED"))


@pytest.fixture
def slave_plc(cable):
    with SlavePlc(PlcSettings(port=cable.theirs)) as plc:
        yield plc


# --- both ways round


def test_every_result_is_taken_once_and_acknowledged(ends):
    link, plc = ends
    heard = Heard(link)
    for id in range(1, 21):
        verdict = ("PASS", "FAIL", "UNKNOWN")[id % 3]
        score = None if verdict == "UNKNOWN" else id / 1000
        link.post(Part(id + 70_000, verdict, score, 0.01, 12.0, (1, 2, 3, id), 99))
        assert heard.one(Acknowledged).id == id + 70_000
    assert not any(isinstance(event, Undelivered | Delivered) for event in heard.events)
    assert [result.part_id for result in plc.program.results] == [*range(70_001, 70_021)]
    assert [result.inspection for result in plc.program.results] == [*range(1, 21)]
    for id, result in enumerate(plc.program.results, 1):
        assert result.verdict == ("PASS", "FAIL", "UNKNOWN")[id % 3]
        assert result.score == (None if id % 3 == 2 else pytest.approx(id / 1000))
        assert (result.box, result.area, result.recipe, result.bundle) == ((1, 2, 3, id), 99, 2, 0xC0FFEE00)
    assert plc.program.passed == [id + 70_000 for id in range(1, 21) if id % 3 == 0]


def test_a_pass_counts_only_while_ready(ends):
    link, plc = ends
    link.post(State("FAULT", code=5))
    wait_until(lambda: plc.program.states[-1:] == ["FAULT"])
    link.post(Part(1, "PASS", 0.1, 1.0))
    Heard(link).one(Acknowledged)
    assert plc.program.passed == []
    assert plc.program.rejected == [1]


def test_what_the_plc_wants_is_told(ends):
    link, plc = ends
    heard = Heard(link)
    heard.until(lambda events: any(isinstance(event, Enabled) and event.on for event in events))
    plc.program.triggers.extend([41, 42])
    assert [heard.one(Triggered).number for _ in range(2)] == [41, 42]
    plc.program.recipes.append(3)
    assert heard.one(RecipeAsked).recipe == 3
    plc.program.clears += 1
    heard.one(ClearAsked)
    plc.program.set(delay=150, pulse_ms=40)
    assert heard.one(GateTimes).delay == 150
    plc.program.set(count=4_000_000_000)
    wait_until(lambda: (heard.take() or heard.counts) and heard.counts[-1].count == 4_000_000_000)
    plc.program.set(enable=False)
    heard.until(lambda events: any(isinstance(event, Enabled) and not event.on for event in events))
    heard.one(PeerBeat)
    # held until it was seen, and seen once
    assert not any(isinstance(event, Triggered | RecipeAsked | ClearAsked | Garbage) for event in heard.events)


def test_our_heartbeat_moves_with_beats_only(ends):
    link, plc = ends
    wait_until(lambda: plc.program.states == ["RUNNING"])
    time.sleep(0.15)
    before = plc.program.beats
    time.sleep(0.25)
    assert plc.program.beats == before  # the thread alone does not keep it alive
    for count in range(4):
        link.post(Beat(count))
        wait_until(lambda expected=before + count + 1: plc.program.beats == expected)


def test_a_result_without_ack_is_undelivered_and_the_next_one_still_comes(ends):
    link, plc = ends
    wait_until(lambda: plc.program.states == ["RUNNING"])
    plc.program.acknowledge = False
    heard = Heard(link)
    link.post(Part(1, "PASS", 0.1, 1.0, expires_ns=time.monotonic_ns() + 150_000_000))
    event = heard.one(Undelivered)
    assert (event.id, event.reason) == (1, "not acknowledged in time")
    plc.program.acknowledge = True
    link.post(Part(2, "PASS", 0.1, 1.0))
    assert heard.one(Acknowledged).id == 2


def test_more_results_than_the_queue_holds_are_an_overrun_until_cleared(ends):
    link, plc = ends
    wait_until(lambda: plc.program.states == ["RUNNING"])
    plc.program.acknowledge = False
    heard = Heard(link)
    for id in range(1, 31):
        link.post(Part(id, "PASS", 0.1, 1.0))
        time.sleep(0.001)
    heard.until(lambda events: sum(isinstance(event, Undelivered) for event in events) >= 20)
    assert all("overrun" in event.reason for event in heard.events if isinstance(event, Undelivered))
    wait_until(lambda: Bit.OVERRUN in plc.program._bits)
    plc.program.clears += 1
    heard.one(ClearAsked)
    wait_until(lambda: Bit.OVERRUN not in plc.program._bits)
    plc.program.acknowledge = True
    events = heard.until(lambda events: len(answers(events)) == 30)
    assert set(answers(events).values()) == {1}


def test_closing_leaves_nothing_valid_the_gate_off_and_the_last_state(ends):
    link, plc = ends
    wait_until(lambda: plc.program.states == ["RUNNING"])
    plc.program.acknowledge = False
    link.post(Gate(1, True))
    link.post(Part(1, "PASS", 0.1, 1.0))
    Heard(link).one(Switched)
    wait_until(lambda: plc.program.results and plc.program.gate)
    began = time.monotonic()
    assert link.close(State("STOPPED"))
    assert time.monotonic() - began < 1.2
    wait_until(lambda: plc.program.states[-1] == "STOPPED")
    assert not plc.program._bits & {Bit.READY, Bit.RESULT_VALID, Bit.PASS, Bit.GATE}
    assert answers(link.events()) == {1: 1}


def test_an_unplugged_adapter_comes_back_within_a_second(ends, cable):
    link, plc = ends
    heard = Heard(link)
    heard.one(Connected)
    wait_until(lambda: plc.program.states == ["RUNNING"])
    cable.unplug()
    assert "is gone" in heard.one(Disconnected).sentence
    link.post(State("DEGRADED"))
    time.sleep(0.3)
    cable.plug()
    back = time.monotonic()
    heard.one(Connected)
    wait_until(lambda: plc.program.states[-1] == "DEGRADED")
    assert time.monotonic() - back < 1.0
    link.post(Part(9, "PASS", 0.1, 1.0))
    assert heard.one(Acknowledged).id == 9


def test_a_port_that_is_not_there_is_a_sentence(tmp_path):
    for protocol in KINDS:
        with pytest.raises(PlcError, match=r"does not open \(No such file"):
            open_link(PlcSettings(port=str(tmp_path / "ttyUSB77"), protocol=protocol))


def test_a_map_that_overlaps_itself_is_refused():
    with pytest.raises(ConfigError, match=r"control_coils \(0 to 5\) and status_bits \(0 to 15\) overlap"):
        open_link(PlcSettings(port="/dev/null", protocol="modbus-master", map=RegisterMap(status_bits=0)))
    with pytest.raises(ConfigError, match="mirror_registers"):
        open_link(PlcSettings(port="/dev/null", protocol="modbus-slave", map=RegisterMap(mirror_registers=3)))


def test_noise_and_random_cuts_lose_no_part_and_pass_none_twice(ends, cable):
    link, plc = ends
    dice, heard = random.Random(4), Heard(link)
    wait_until(lambda: plc.program.states == ["RUNNING"])
    for id in range(1, 41):
        match dice.randrange(20):
            case 0:
                cable.noise(dice.randbytes(dice.randrange(1, 40)), to="ours")
            case 1:
                cable.noise(dice.randbytes(dice.randrange(1, 40)), to="theirs")
            case 2:
                cable.half_line("ours")
            case 3:
                cable.half_line("theirs")
            case 4:
                cable.cut()
                time.sleep(0.02)
                cable.splice()
        link.post(Part(id, "PASS" if id % 2 else "FAIL", 0.1, 1.0))
        time.sleep(0.03)
    events = heard.until(lambda events: len(answers(events)) == 40, timeout_s=10)
    assert answers(events) == dict.fromkeys(range(1, 41), 1)
    acknowledged = {event.id for event in events if isinstance(event, Acknowledged)}
    assert len(acknowledged) > 10
    taken = [result.part_id for result in plc.program.results]
    assert acknowledged <= set(taken)
    assert len(taken) == len(set(taken))
    assert all(id % 2 for id in plc.program.passed)


# --- master


def test_a_gate_edge_is_one_write_of_one_coil_at_once(slave_plc, opened):
    link = opened("modbus-master")
    link.post(State("READY"))
    heard = Heard(link)
    wait_until(lambda: slave_plc.program.states == ["READY"])
    slave_plc.writes.clear()
    for active in (True, False):
        link.post(Gate(7, active))
        event = heard.one(Switched)
        assert (event.id, event.active) == (7, active)
        edge = next(write for write in slave_plc.writes if write[0] == 5)
        assert edge[:3] == (5, 100 + Bit.GATE, [active])
        assert edge[3] * 1e9 <= event.at_ns
        slave_plc.writes.clear()


def test_only_what_has_changed_is_written(slave_plc, opened):
    link = opened("modbus-master")
    link.post(State("READY"))
    link.post(Beat(0))
    wait_until(lambda: slave_plc.program.beats >= 1)
    time.sleep(0.1)
    slave_plc.writes.clear()
    link.post(Beat(5))
    wait_until(lambda: slave_plc.program.beats >= 2 and len(slave_plc.writes) >= 2)
    sizes = {function: len(values) for function, _, values, _ in slave_plc.writes}
    assert sizes[15] == 16
    assert sizes[16] < 35  # from the status word to the count of parts


def test_a_silent_plc_is_noticed_and_heard_again_within_a_second(slave_plc, opened):
    link = opened("modbus-master", timeout_ms=100)
    link.post(State("READY"))
    heard = Heard(link)
    heard.one(Connected)
    wait_until(lambda: slave_plc.program.states == ["READY"])
    slave_plc.silent = True
    assert "does not answer" in heard.one(Disconnected, timeout_s=1.0).sentence
    link.post(Part(1, "PASS", 0.1, 1.0, expires_ns=time.monotonic_ns() + 200_000_000))
    assert heard.one(Undelivered).id == 1
    slave_plc.silent = False
    back = time.monotonic()
    heard.one(Connected)
    assert time.monotonic() - back < 1.0
    link.post(Part(2, "PASS", 0.1, 1.0))
    assert heard.one(Acknowledged).id == 2


def test_results_are_answered_for_while_the_plc_is_gone(slave_plc, opened):
    link = opened("modbus-master", timeout_ms=50, acknowledge_ms=300, expire_ms=300)
    link.post(State("READY"))
    wait_until(lambda: slave_plc.program.states == ["READY"])
    slave_plc.program.acknowledge = False
    for id in (1, 2, 3):
        link.post(Part(id, "PASS", 0.1, 1.0))
    wait_until(lambda: slave_plc.program.results)
    slave_plc.silent = True
    heard = Heard(link)
    heard.one(Disconnected)
    events = heard.until(lambda events: len(answers(events)) == 3, timeout_s=1.0)
    assert not any(isinstance(event, Acknowledged) for event in events)


def test_a_plc_that_is_switched_on_later_is_waited_for(opened, cable):
    link = opened("modbus-master", timeout_ms=50)
    link.post(State("READY"))
    heard = Heard(link)
    heard.one(Disconnected)
    with SlavePlc(PlcSettings(port=cable.theirs)) as plc:
        heard.one(Connected)
        wait_until(lambda: plc.program.states == ["READY"])
        link.close(State("STOPPED"))


def test_a_refused_write_is_tried_again_until_its_part_is_too_old(slave_plc, opened):
    link = opened("modbus-master")
    link.post(State("READY"))
    wait_until(lambda: slave_plc.program.states == ["READY"])
    heard = Heard(link)
    slave_plc.refuse = ExcCodes.DEVICE_BUSY
    link.post(Part(1, "PASS", 0.1, 1.0, expires_ns=time.monotonic_ns() + 200_000_000))
    link.post(Part(2, "PASS", 0.1, 1.0))
    assert "exception 6 (busy)" in heard.one(Garbage).what
    event = heard.one(Undelivered)
    assert event.id == 1
    assert "exception 6" in event.reason
    slave_plc.refuse = None
    assert heard.one(Acknowledged).id == 2
    assert not any(isinstance(event, Disconnected) for event in heard.events)
    assert sum(isinstance(event, Garbage) for event in heard.events) <= 1  # not with every poll
    assert [result.part_id for result in slave_plc.program.results] == [2]


def test_a_refused_gate_edge_is_told_and_left_off(slave_plc, opened):
    link = opened("modbus-master")
    link.post(State("READY"))
    wait_until(lambda: slave_plc.program.states == ["READY"])
    slave_plc.refuse = ExcCodes.DEVICE_FAILURE
    link.post(Gate(3, True))
    heard = Heard(link)
    event = heard.one(Unswitched)
    assert (event.id, event.active) == (3, True)
    assert "exception 4" in event.reason
    slave_plc.refuse = None
    time.sleep(0.1)
    assert slave_plc.program.gate == []


def test_the_clock_may_be_set_while_a_plc_is_silent(slave_plc, opened, monkeypatch):
    link = opened("modbus-master", timeout_ms=50)
    heard = Heard(link)
    heard.one(Connected)
    slave_plc.silent = True
    wall = time.time
    steps = iter(range(10_000))
    monkeypatch.setattr(time, "time", lambda: wall() - 3600 * next(steps))
    heard.one(Disconnected, timeout_s=1.0)


def test_remote_io_gets_single_coils_and_gives_a_trigger(opened, cable):
    io = RemoteIo(gate_coil=0, ready_coil=1, heartbeat_coil=2, trigger_input=4)
    with SlavePlc(PlcSettings(port=cable.theirs, io=io)) as block:
        link = opened("modbus-master", io=io, poll_ms=5)
        link.post(State("READY"))
        wait_until(lambda: block.coils[1])
        heard = Heard(link)
        link.post(Part(1, "PASS", 0.1))
        assert heard.one(Delivered).id == 1
        link.post(Gate(1, True))
        heard.one(Switched)
        assert block.coils[:2] == [True, True]
        link.post(Beat(1))
        wait_until(lambda: block.coils[2])
        wait_until(lambda: block.reads >= 2)  # on at the first look would be no edge
        block.inputs[4] = True
        heard.one(Triggered)
        block.inputs[4] = False
        seen = block.reads + 2
        wait_until(lambda: block.reads >= seen)
        assert not any(isinstance(event, Triggered) for event in heard.events)
        block.inputs[4] = True
        heard.one(Triggered)
        link.post(State("FAULT"))
        wait_until(lambda: not block.coils[1])
        assert link.close(State("STOPPED"))
        assert block.coils[:2] == [False, False]
        assert {function for function, *_ in block.writes} == {5}


# --- slave


@pytest.fixture
def master(cable, opened):
    """A link as slave with id 5, and a plain client."""
    link = opened("modbus-slave", device_id=5)
    with contextlib.closing(ModbusSerialClient(cable.theirs, timeout=0.3, retries=0, baudrate=115200)) as client:
        yield link, client


def test_the_status_can_be_read_three_ways(master):
    link, client = master
    link.post(State("READY"))
    link.post(Part(300, "FAIL", 2.0, 1.0))
    wait_until(lambda: client.read_discrete_inputs(100, count=16, device_id=5).bits[Bit.RESULT_VALID])
    bits = client.read_discrete_inputs(100, count=16, device_id=5).bits
    inputs = client.read_input_registers(100, count=35, device_id=5).registers
    mirror = client.read_holding_registers(1000, count=35, device_id=5).registers
    assert inputs[:29] == mirror[:29]
    status = read_status(inputs)
    assert (status.verdict, status.part_id, status.score) == ("FAIL", 300, 2.0)
    assert [bit in status.bits for bit in range(16)] == bits
    assert client.read_input_registers(113, count=1, device_id=5).registers == [2000]


def test_an_ack_that_was_only_partly_read_is_none(master):
    """The PLC must have read RESULT_VALID itself before its RESULT_ACK means anything."""
    link, client = master
    link.post(State("READY"))
    link.post(Part(1, "PASS", 0.1, 1.0))
    time.sleep(0.05)
    client.read_discrete_inputs(100, count=3, device_id=5)  # as far as TRIGGER_ACK
    client.read_input_registers(107, count=2, device_id=5)
    client.read_holding_registers(0, count=7, device_id=5)
    client.write_coil(2, True, device_id=5)
    heard = Heard(link)
    heard.take(0.1)
    assert not answers(heard.events)
    client.write_coil(2, False, device_id=5)
    client.read_discrete_inputs(103, count=1, device_id=5)
    client.write_coil(2, True, device_id=5)
    assert heard.one(Acknowledged).id == 1


def test_what_is_not_in_the_map_is_an_exception(master):
    _, client = master
    assert client.read_input_registers(200, count=1, device_id=5).exception_code == 2
    assert client.read_holding_registers(500, count=1, device_id=5).exception_code == 2
    assert client.write_register(1000, 1, device_id=5).exception_code == 2  # the mirror is ours
    assert client.write_coil(99, True, device_id=5).exception_code == 2


def test_other_slaves_on_the_wire_are_left_alone(master, cable):
    link, client = master
    link.post(State("READY"))
    with pytest.raises(ModbusException):
        client.read_input_registers(100, count=1, device_id=6)  # nobody: we must not answer for it
    # the long answer of another slave, then at once a request to us
    body = bytes([6, 4, 70]) + bytes(70)
    cable.noise(body + FramerRTU.compute_CRC(body).to_bytes(2, "big"), to="ours")
    assert client.read_input_registers(100, count=2, device_id=5).registers[1] == 3


@pytest.mark.parametrize(
    "junk",
    [b"\x05", b"\x05\x10\x00\x00\x00\x07\x0e", b"\x05\x03\x00\x64\x00\x01\x00\x00", bytes(range(256)), b"\xff" * 90],
)
def test_noise_before_a_request_does_not_hide_it(master, cable, junk):
    link, client = master
    link.post(State("READY"))
    cable.noise(junk, to="ours")
    assert client.read_input_registers(100, count=2, device_id=5).registers[1] == 3


def test_a_gate_pulse_counts_as_switched_when_the_plc_has_read_it(master):
    link, client = master
    heard = Heard(link)

    def gate():
        return client.read_discrete_inputs(100, count=16, device_id=5).bits[Bit.GATE]

    link.post(Gate(1, True))
    heard.take(0.05)
    assert not any(isinstance(event, Switched) for event in heard.events)
    assert gate()
    assert heard.one(Switched).active
    link.post(Gate(1, False))
    time.sleep(0.02)
    link.post(Gate(2, True))  # the PLC was too slow for the level between
    event = heard.one(Unswitched)
    assert (event.id, event.active) == (1, False)
    assert gate()
    assert heard.one(Switched).id == 2


def test_an_encoder_counts_only_when_both_words_come_together(master):
    link, client = master
    heard = Heard(link)
    client.write_register(5, 7, device_id=5)
    client.write_registers(5, [0x0001, 0x0002], device_id=5)
    wait_until(lambda: heard.take() or heard.counts)
    assert [event.count for event in heard.counts] == [0x0002_0001]


def test_a_device_that_vanishes_between_request_and_answer_leaves_no_task(opened, cable, caplog):
    """At 1200 baud the silence before an answer is long."""
    opened("modbus-slave", baud=1200)
    body = bytes([1, 4, 0, 100, 0, 1])
    request = body + FramerRTU.compute_CRC(body).to_bytes(2, "big")
    for _ in range(3):
        cable.noise(request)
        time.sleep(0.01)
        cable.unplug()
        time.sleep(0.01)
        cable.plug()
        time.sleep(0.15)
    gc.collect()
    assert "pending" not in caplog.text


def test_a_master_that_vanishes_harms_nothing(opened, cable):
    link = opened("modbus-slave")
    link.post(State("READY"))
    with MasterPlc(PlcSettings(port=cable.theirs)) as plc:
        wait_until(lambda: plc.program.states == ["READY"])
    link.post(Part(1, "PASS", 0.1, 1.0, expires_ns=time.monotonic_ns() + 100_000_000))
    heard = Heard(link)
    assert heard.one(Undelivered).id == 1
    with MasterPlc(PlcSettings(port=cable.theirs), Program()):
        link.post(Part(2, "PASS", 0.1, 1.0))
        assert heard.one(Acknowledged).id == 2
