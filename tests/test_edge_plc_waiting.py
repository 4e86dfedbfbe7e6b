"""What waits on its way to the PLC, and what waits for the line: in which order, how long, and told how often."""

import itertools
import time
from collections import Counter

import pytest
import serial
from plc_bench import Heard, answers

from stpm.edge.config import read_station
from stpm.edge.errors import ConfigError
from stpm.edge.plc import open_link
from stpm.edge.plc.inbox import Inbox, Noise
from stpm.edge.plc.messages import (
    Acknowledged,
    Beat,
    Connected,
    Delivered,
    Disconnected,
    Garbage,
    Gate,
    Part,
    State,
    Switched,
    Triggered,
    Undelivered,
    Unswitched,
)
from stpm.edge.plc.outbox import Outbox
from stpm.edge.plc.serial_port import LineTime, character_s
from stpm.edge.plc.settings import PlcSettings
from stpm.tools.plc_modbus import wait_until

MS = 1_000_000
SECOND = 1_000 * MS


# --- order of sending


def test_a_gate_edge_overtakes_results_and_those_the_rest():
    box = Outbox(8, 1000 * MS)
    for message in (State("READY"), Beat(0), Part(1, "PASS", 0.1), Part(2, "FAIL", 0.9), Gate(1, True)):
        assert box.put(message, 0) == []
    order = [type(message).__name__ for message in iter(box.next, None)]
    assert order == ["Gate", "Part", "Part", "State", "Beat"]


def test_a_gate_edge_that_is_overtaken_is_not_sent():
    box = Outbox(8, 1000 * MS)
    box.put(Gate(1, True), 0)
    assert box.put(Gate(1, False), 5) == [Unswitched(1, True, 5, "overtaken by a later edge")]
    assert box.next() == Gate(1, False)
    assert box.next() is None


def test_of_states_and_heartbeats_that_wait_for_a_busy_device_the_newest_remain():
    box = Outbox(8, 1000 * MS)
    for message in (State("READY"), Beat(1), Part(1, "PASS", 0.1), State("RUNNING"), Beat(2)):
        box.put(message, 0)
    box.condense()
    assert list(iter(box.next, None)) == [Part(1, "PASS", 0.1), State("RUNNING"), Beat(2)]


def test_an_old_part_is_not_sent():
    box = Outbox(8, 1000 * MS)
    box.put(Part(1, "PASS", 0.1), 0)
    box.put(Part(2, "PASS", 0.1, expires_ns=50 * MS), 0)
    assert box.due_ns() == 50 * MS
    assert [event.id for event in box.expired(50 * MS)] == [2]
    assert [event.id for event in box.expired(1000 * MS)] == [1]
    assert box.next() is None


def test_too_many_parts_lose_the_oldest():
    box = Outbox(2, 1000 * MS)
    lost = [event for id in (1, 2, 3) for event in box.put(Part(id, "PASS", 0.1), 0)]
    assert [event.id for event in lost] == [1]
    assert [box.next().id, box.next().id] == [2, 3]


@pytest.mark.parametrize("state", ["FAULT", "SELF_TEST", "STOPPED"])
def test_no_pass_and_no_earlier_state_comes_after_a_state_in_which_nothing_may_pass(state):
    box = Outbox(8, 1000 * MS)
    for message in (State("READY"), Beat(1), Part(1, "PASS", 0.1), State(state), Part(2, "UNKNOWN", None)):
        box.put(message, 0)
    order = [box.next() for _ in range(4)]
    assert order == [State(state), Part(1, "PASS", 0.1), Part(2, "UNKNOWN", None), Beat(1)]
    assert box.next() is None
    box.put(State(state), 0)
    box.put(State("RUNNING"), 0)
    assert [box.next(), box.next()] == [State(state), State("RUNNING")]


# --- noise


def noise(at_ms, lost=False, what="noise"):
    return Garbage(at_ms * MS, what, lost)


def test_the_first_noise_is_told_at_once_and_the_rest_of_a_second_together():
    kind = Noise()
    assert kind.add(noise(5)) == [noise(5)]
    for at_ms in (6, 7, 900):
        assert kind.add(noise(at_ms, what=f"at {at_ms}")) == []
    assert kind.due(1004 * MS) == []
    (told,) = kind.due(1005 * MS)
    assert (told.count, told.lost) == (3, False)
    assert told.what == "3 times within a second, the last: at 900"
    # the next second begins with that
    assert kind.add(noise(1100)) == []
    assert kind.due(2005 * MS) == [noise(1100)]
    assert kind.due(9000 * MS) == []
    assert kind.add(noise(9000)) == [noise(9000)]


def test_a_lost_line_is_told_at_once_whatever_else_is_wrong():
    inbox = Inbox(False)
    inbox.tell([noise(0), noise(1), noise(2, True), noise(3), noise(3, True)], 3 * MS)
    assert inbox.take() == [noise(0), noise(2, True), noise(3, True)]
    assert inbox.due_ns() == 1000 * MS
    inbox.tell([], 1000 * MS)
    assert [(each.count, each.lost) for each in inbox.take()] == [(2, False)]
    inbox.close()


def test_no_noise_is_forgotten_at_the_end():
    inbox = Inbox(False)
    inbox.tell([noise(0), noise(1), noise(2)], 2 * MS)
    inbox.give_up(3 * MS, "the link is closed")
    assert sum(each.count for each in inbox.take()) == 3
    inbox.close()


@pytest.fixture
def opened(cable):
    links = []

    def open_it(**settings):
        links.append(open_link(PlcSettings(port=cable.ours, **settings)))
        return links[-1]

    yield open_it
    for link in links:
        link.close(State("STOPPED"))


def test_in_a_burst_of_noise_every_line_counts_and_may_have_been_a_trigger(opened, cable, plc):
    link = opened()
    heard = Heard(link)
    plc.say(Triggered(0, 1))
    heard.one(Triggered)
    for _ in range(40):
        cable.noise(b"\x80\xff\n")
    heard.until(lambda events: sum(each.count for each in events if isinstance(each, Garbage)) == 40)
    assert all(each.lost for each in heard.events if isinstance(each, Garbage))


def test_an_ack_that_nobody_waits_for_is_not_lost(opened, plc):
    link = opened(acknowledge=True)
    plc.say(Acknowledged(9, 0))
    assert not Heard(link).one(Garbage).lost


# --- line time


@pytest.mark.parametrize(
    ("parity", "stop_bits", "baud", "expected"), [("N", 1, 9600, 10 / 9600), ("E", 2, 1200, 12 / 1200)]
)
def test_a_character_takes_as_long_as_its_bits(parity, stop_bits, baud, expected):
    assert character_s(PlcSettings(parity=parity, stop_bits=stop_bits, baud=baud)) == expected


def test_line_time_is_what_the_wire_needs_or_what_the_device_says():
    line = LineTime(0.001)
    assert line.left_s(0, 5.0) == 0
    line.wrote(100, 5.0)
    assert line.left_s(0, 5.02) == pytest.approx(0.08)
    line.wrote(50, 5.05)
    assert line.left_s(0, 5.05) == pytest.approx(0.1)
    assert line.left_s(120, 5.05) == pytest.approx(0.12)
    assert line.overdue_s(1, 5.1) == 0
    assert line.overdue_s(1, 5.4) == pytest.approx(0.25)
    assert line.overdue_s(0, 5.4) == 0


def test_results_for_a_slow_line_wait_where_they_expire_and_overrun(opened, plc):
    """28 characters take 233 ms at 1200 baud: what was "delivered" must not be seconds away from the PLC."""
    link = opened(baud=1200, queue=4, expire_ms=600)
    heard = Heard(link)
    heard.one(Connected)
    began = time.monotonic_ns()
    for id in range(1, 11):
        link.post(Part(id, "PASS", 0.1))
    events = heard.until(lambda events: sum(answers(events).values()) == 10)
    assert set(answers(events).values()) == {1}
    reasons = Counter(event.reason.split(":")[0] for event in events if isinstance(event, Undelivered))
    assert reasons["overrun"] >= 5
    assert reasons["too old before it could be sent"] >= 1
    times = [event.at_ns - began for event in events if isinstance(event, Delivered)]
    assert 2 <= len(times) <= 4
    # each of them only when those before were nearly out
    assert all(after - before > 100 * MS for before, after in itertools.pairwise(times))


def test_a_gate_edge_overtakes_results_that_wait_for_a_slow_line(opened, plc):
    link = opened(baud=1200, queue=20, expire_ms=2000)
    heard = Heard(link)
    heard.one(Connected)
    for id in range(1, 7):
        link.post(Part(id, "PASS", 0.1))
    heard.one(Delivered)
    link.post(Gate(1, True))
    heard.one(Switched)
    assert sum(answers(heard.events).values()) <= 2
    wait_until(lambda: plc.gate.levels == [(1, True)])


def test_a_gate_edge_that_waited_too_long_for_a_slow_line_does_not_open(opened, plc):
    link = opened(baud=600)
    heard = Heard(link)
    heard.one(Connected)
    link.post(State("RUNNING", "a reason that takes a while"))
    wait_until(lambda: plc.gate.states == ["RUNNING"])
    link.post(Gate(1, True))
    assert "too old" in heard.one(Unswitched).reason
    link.post(Gate(2, False))
    assert heard.one(Switched).id == 2
    assert plc.gate.levels[:1] != [(1, True)]


def test_states_and_beats_for_a_slow_line_do_not_pile_up(opened, plc):
    link = opened(baud=1200)
    Heard(link).one(Connected)
    for count in range(40):
        link.post(Beat(count))
        link.post(State("DEGRADED" if count % 2 else "RUNNING"))
    link.post(State("FAULT"))
    wait_until(lambda: plc.gate.states[-1:] == ["FAULT"], 2)
    time.sleep(0.5)
    assert plc.gate.beats <= 3


def test_a_device_that_lets_nothing_out_is_like_a_pulled_cable_until_a_line_gets_out(opened, plc, monkeypatch):
    """A pseudo-terminal never says that something waits in it: here it does."""
    link = opened(timeout_ms=100)
    heard = Heard(link)
    heard.one(Connected)
    waiting = [60]
    monkeypatch.setattr(serial.Serial, "out_waiting", property(lambda port: waiting[0]))
    link.post(State("RUNNING"))
    time.sleep(0.15)
    link.post(Beat(1))
    assert "60 bytes do not leave" in heard.one(Disconnected, 1.0).sentence
    assert not any(isinstance(event, Connected) for event in heard.during(1.0))
    waiting[0] = 0
    heard.one(Connected, 1.0)
    link.post(Part(1, "PASS", 0.1))
    heard.one(Delivered)


def test_a_device_that_is_stopped_is_closed_in_time(opened, plc, monkeypatch):
    link = opened(timeout_ms=100)
    Heard(link).one(Connected)
    flushed = []
    monkeypatch.setattr(serial.Serial, "out_waiting", property(lambda port: 60))
    monkeypatch.setattr(serial.Serial, "reset_output_buffer", lambda port: flushed.append(port))
    began = time.monotonic()
    assert not link.close(State("STOPPED"))
    assert time.monotonic() - began < 1.2
    assert flushed  # the kernel waits half a minute for what is left


@pytest.mark.parametrize("timeout_ms", [0, 501])
def test_a_timeout_that_would_keep_the_last_words_waiting_is_refused(timeout_ms):
    with pytest.raises(ConfigError, match=r"plc\.timeout_ms"):
        read_station(None, {"plc.timeout_ms": timeout_ms})
    assert read_station(None, {"plc.timeout_ms": 500}).plc.timeout_ms == 500
