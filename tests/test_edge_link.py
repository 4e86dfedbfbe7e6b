"""The link and its ASCII port on real pseudo-terminals: order, faults, reconnecting, closing."""

import os
import select
import threading
import time
from collections import Counter

import pytest
import serial
from plc_bench import Heard, answers

from stpm.edge.errors import PlcError
from stpm.edge.plc import open_link
from stpm.edge.plc.link import LinkThread
from stpm.edge.plc.messages import (
    Acknowledged,
    Beat,
    ClearAsked,
    Connected,
    Counted,
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
from stpm.edge.plc.protocol import encode
from stpm.edge.plc.serial_port import adapter_notes
from stpm.edge.plc.settings import PlcSettings
from stpm.tools.plc_modbus import wait_until
from stpm.tools.plc_sim import PtyPlc


@pytest.fixture
def opened():
    """Opens links and closes them."""
    links = []

    def open_it(port, safe_gate=False, **settings):
        link = open_link(PlcSettings(port=port, **settings), safe_gate)
        links.append(link)
        return link

    yield open_it
    for link in links:
        link.close(State("STOPPED"))


def test_lines_are_numbered_and_the_first_is_set_apart(opened, cable):
    theirs = os.open(cable.theirs, os.O_RDWR | os.O_NOCTTY)
    link = opened(cable.ours)

    def came():
        assert select.select([theirs], [], [], 2)[0]
        return os.read(theirs, 4096)

    link.post(State("BOOT"))
    assert came() == b"\r\n" + encode(State("BOOT"), 0)
    link.post(Beat(0))
    assert came() == encode(Beat(0), 1)
    assert link.close(State("STOPPED"))
    assert came() == encode(State("STOPPED"), 2)
    os.close(theirs)


def test_every_part_is_delivered_and_passes_the_gate(opened, cable, plc):
    link = opened(cable.ours, queue=100)
    link.post(State("RUNNING"))
    for id in range(1, 51):
        link.post(Part(id, "PASS", 0.1))
    events = Heard(link).until(lambda events: sum(answers(events).values()) == 50)
    assert all(isinstance(event, Delivered | Connected) for event in events)
    wait_until(lambda: len(plc.gate.passed) + len(plc.gate.rejected) == 50)
    assert plc.gate.lost == plc.gate.damaged == 0


@pytest.mark.parametrize("baud", [-1, 10**12])
def test_an_impossible_speed_is_a_sentence(cable, baud):
    with pytest.raises(PlcError, match="does not open"):
        open_link(PlcSettings(port=cable.ours, baud=baud))


def test_a_port_is_not_shared(opened, cable):
    opened(cable.ours)
    with pytest.raises(PlcError, match="does not open"):
        open_link(PlcSettings(port=cable.ours))


def test_a_port_that_is_not_there_is_a_sentence():
    with pytest.raises(PlcError, match=r"ttyUSB77 does not open .*--plc none"):
        open_link(PlcSettings(port="/dev/ttyUSB77"))


def test_none_delivers_at_once_to_nowhere(opened):
    link = opened("none")
    link.post(State("READY"))
    link.post(Part(1, "PASS", 0.1))
    link.post(Gate(1, True))
    heard = Heard(link)
    assert heard.one(Delivered).id == 1
    assert heard.one(Switched).active
    assert link.close(State("STOPPED"))


def test_what_the_plc_says_is_told(opened, cable, plc):
    link = opened(cable.ours, enable=True)
    said = [
        Triggered(0, 7),
        Triggered(0),
        PeerBeat(0),
        Counted(0, 99),
        RecipeAsked(0, 2),
        Enabled(0, True),
        ClearAsked(0),
        GateTimes(0, 1, 2),
    ]
    before = time.monotonic_ns()
    for message in said:
        plc.say(message)
    heard = Heard(link)
    told = heard.until(lambda events: len(events) + len(heard.counts) == len(said) + 1)[1:]
    assert heard.counts.pop().count == 99
    heard = told
    said = [message for message in said if not isinstance(message, Counted)]
    assert [type(event) for event in heard] == [type(message) for message in said]
    assert (heard[0].number, heard[1].number, heard[3].recipe) == (7, None, 2)
    assert all(before <= event.at_ns <= time.monotonic_ns() for event in heard)


def test_enable_is_not_told_to_a_line_that_does_not_wait_for_it(opened, cable, plc):
    link = opened(cable.ours)
    plc.say(Enabled(0, False))
    plc.say(PeerBeat(0))
    heard = Heard(link)
    heard.one(PeerBeat)
    assert not any(isinstance(event, Enabled) for event in heard.events)


def test_an_acknowledged_part_is_acknowledged_and_nothing_else(opened, cable):
    with PtyPlc(device=cable.theirs, acknowledge=True):
        link = opened(cable.ours, acknowledge=True)
        link.post(State("READY"))
        for id in (1, 2, 3):
            link.post(Part(id, "PASS", 0.1))
        heard = Heard(link)
        assert [heard.one(Acknowledged).id for _ in range(3)] == [1, 2, 3]
        assert not any(isinstance(event, Delivered | Undelivered | Garbage) for event in heard.events)


def test_a_missing_ack_is_undelivered_and_a_late_one_is_garbage(opened, cable, plc):
    link = opened(cable.ours, acknowledge=True, acknowledge_ms=50)
    link.post(Part(1, "PASS", 0.1))
    began = time.monotonic()
    heard = Heard(link)
    event = heard.one(Undelivered)
    assert (event.id, event.reason) == (1, "not acknowledged in time")
    assert 0.04 < time.monotonic() - began < 0.5
    plc.say(Acknowledged(1, 0))
    assert "does not wait" in heard.one(Garbage).what
    assert not answers(heard.events)


def test_noise_is_told_and_harms_nothing(opened, cable, plc):
    link = opened(cable.ours)
    heard = Heard(link)
    plc.say(PeerBeat(0))
    heard.one(PeerBeat)
    cable.noise(bytes(range(128, 256)) + b"\n")
    plc.say(Triggered(0, 1))
    assert "not a line" in heard.one(Garbage).what
    assert heard.one(Triggered).number == 1
    plc.lose_a_line()
    plc.say(Triggered(0, 3))
    assert "some are lost" in heard.one(Garbage).what
    assert heard.one(Triggered).number == 3


def test_a_half_line_costs_that_line_only(opened, cable, plc):
    link = opened(cable.ours)
    link.post(State("READY"))
    wait_until(lambda: plc.gate.states == ["READY"])
    cable.half_line()
    link.post(Part(1, "PASS", 0.1))
    wait_until(lambda: cable.halved)
    # glued to the half line, so it is damaged too; a real half line ends with a failed write, see the next test
    link.post(Part(2, "PASS", 0.1))
    link.post(Part(3, "PASS", 0.1))
    wait_until(lambda: plc.gate.passed == [3])
    assert plc.gate.damaged == 1
    assert plc.gate.lost == 2


def test_what_follows_a_torn_line_is_still_understood(opened, cable, plc, monkeypatch):
    """A write fails half-way: what comes next must not be glued to the half that is out."""
    link = opened(cable.ours)
    link.post(State("READY"))
    wait_until(lambda: plc.gate.states == ["READY"])
    whole = serial.Serial.write

    def half(port, data):
        whole(port, data[: len(data) // 2])
        raise serial.SerialTimeoutException("Write timeout")

    with monkeypatch.context() as torn:
        torn.setattr(serial.Serial, "write", half)
        link.post(Part(1, "PASS", 0.25))
        heard = Heard(link)
        assert "Write timeout" in heard.one(Undelivered).reason
        assert "did not take a line" in heard.one(Disconnected).sentence
    link.post(State("FAULT", "PlcError"))
    wait_until(lambda: plc.gate.states[-1] == "FAULT")
    assert plc.gate.damaged == 1
    assert plc.gate.passed == []


def test_an_unplugged_port_comes_back_with_the_newest_state_first(opened, cable, plc):
    link = opened(cable.ours)
    link.post(State("RUNNING"))
    wait_until(lambda: plc.gate.states == ["RUNNING"])
    heard = Heard(link)
    cable.unplug()
    assert "is gone" in heard.one(Disconnected).sentence
    for state in ("FAULT", "DEGRADED", "READY"):
        link.post(State(state))
    link.post(Beat(3))
    link.post(Part(7, "PASS", 0.1))
    time.sleep(0.3)
    cable.plug()
    back = time.monotonic()
    heard.events.clear()
    heard.one(Connected)
    assert time.monotonic() - back < 1.0
    assert heard.one(Delivered).id == 7
    beats = plc.gate.beats
    link.post(Beat(4))
    wait_until(lambda: plc.gate.beats > beats)
    assert plc.gate.passed == [7]
    assert plc.gate.states == ["RUNNING", "READY"]
    assert plc.gate.lost == 0


def test_a_reader_that_stops_is_noticed_and_recovered_from(opened, cable, plc):
    link = opened(cable.ours, timeout_ms=100, queue=1000, baud=4_000_000)
    link.post(State("READY"))
    heard = Heard(link)
    heard.one(Connected)
    cable.stalled = True
    posted = 0
    while not any(isinstance(event, Disconnected) for event in heard.events):
        posted += 1
        link.post(Part(posted, "PASS", 0.25))
        if select.select([link.fileno()], [], [], 0)[0]:
            heard.events += link.events()
        assert posted < 100_000
        time.sleep(0.0001)
    assert "did not take a line" in heard.one(Disconnected).sentence
    time.sleep(0.4)
    assert not any(isinstance(event, Connected) for event in heard.events)  # the port opens, but takes nothing
    cable.stalled = False
    heard.one(Connected, timeout_s=1.0)
    events = heard.until(lambda events: sum(answers(events).values()) == posted)
    assert set(answers(events).values()) == {1}


def test_parts_that_wait_for_the_port_overrun_and_expire(opened, cable):
    link = opened(cable.ours, queue=8, expire_ms=200)
    heard = Heard(link)
    heard.one(Connected)
    cable.unplug()
    heard.one(Disconnected)
    for id in range(1, 21):
        link.post(Part(id, "FAIL", 0.9))
    events = heard.until(lambda events: sum(answers(events).values()) == 20)
    assert set(answers(events).values()) == {1}
    reasons = Counter(event.reason.split(":")[0] for event in events if isinstance(event, Undelivered))
    assert reasons == {"overrun": 12, "too old before it could be sent": 8}


def test_a_cut_cable_is_silence_and_lost_lines(opened, cable, plc):
    link = opened(cable.ours)
    link.post(State("READY"))
    wait_until(lambda: plc.gate.states == ["READY"])
    heard = Heard(link)
    cable.cut()
    for id in (1, 2, 3):
        link.post(Part(id, "PASS", 0.1))
        assert heard.one(Delivered).id == id  # nobody can know better without ACK
    plc.say(PeerBeat(0))
    cable.splice()
    link.post(Part(4, "PASS", 0.1))
    wait_until(lambda: plc.gate.passed == [4])
    assert plc.gate.lost == 3
    assert not any(isinstance(event, Disconnected) for event in heard.events)


def test_a_gate_edge_is_switched_and_the_newest_level_comes_back_after_a_break(opened, cable, plc):
    link = opened(cable.ours)
    link.post(State("READY"))
    heard = Heard(link)
    for active in (True, False, True):
        link.post(Gate(5, active))
        assert heard.one(Switched).active == active
    cable.unplug()
    heard.one(Disconnected)
    link.post(Gate(5, False))
    link.post(Gate(6, True))
    link.post(Gate(6, False))
    overtaken = [heard.one(Unswitched) for _ in range(2)]
    assert [(event.id, event.active) for event in overtaken] == [(5, False), (6, True)]
    cable.plug()
    event = heard.one(Switched)
    assert (event.id, event.active) == (6, False)
    wait_until(lambda: len(plc.gate.levels) == 4)
    assert plc.gate.levels[-1] == (6, False)


def test_a_level_that_was_switched_before_the_break_is_restored_without_an_event(opened, cable, plc):
    link = opened(cable.ours)
    link.post(State("READY"))
    link.post(Gate(5, True))
    heard = Heard(link)
    heard.one(Switched)
    cable.unplug()
    cable.plug()
    heard.one(Disconnected)
    heard.until(lambda events: isinstance(events[-1], Connected))
    wait_until(lambda: plc.gate.levels == [(5, True), (5, True)])
    assert not any(isinstance(event, Switched | Unswitched) for event in heard.events)


@pytest.mark.parametrize("safe", [False, True])
def test_closing_leaves_the_safe_level_and_then_the_last_word(opened, cable, safe):
    seen = []
    with PtyPlc(seen.append, device=cable.theirs):
        link = opened(cable.ours, safe)
        link.post(State("READY"))
        wait_until(lambda: seen)
        link.post(Gate(5, not safe))
        Heard(link).one(Switched)
        assert link.close(State("FAULT", "EngineError"))
        wait_until(lambda: len(seen) >= 4)
    assert seen[-2:] == [Gate(5, safe), State("FAULT", "EngineError")]


def test_closing_without_the_port_is_bounded_and_answers_for_everything(opened, cable):
    link = opened(cable.ours)
    heard = Heard(link)
    heard.one(Connected)
    cable.unplug()
    heard.one(Disconnected)
    for id in (1, 2, 3):
        link.post(Part(id, "PASS", 0.1))
    link.post(Gate(3, True))
    began = time.monotonic()
    assert not link.close(State("STOPPED"))
    assert time.monotonic() - began < 1.2
    link.post(Part(4, "PASS", 0.1))
    link.post(Gate(4, True))
    events = link.events()
    assert answers(events) == {1: 1, 2: 1, 3: 1, 4: 1}
    assert all(isinstance(event, Undelivered | Unswitched) for event in events)
    assert [event.id for event in events if isinstance(event, Unswitched)] == [3, 4]


def test_closing_a_port_that_takes_nothing_is_bounded(opened, cable):
    link = opened(cable.ours, timeout_ms=100, queue=10_000, baud=4_000_000)
    link.post(State("READY"))
    heard = Heard(link)
    cable.stalled = True
    for id in range(1, 5001):
        link.post(Part(id, "PASS", 0.1))
    heard.one(Disconnected)
    time.sleep(0.3)  # what little room there was is filled by attempts to connect
    began = time.monotonic()
    assert not link.close(State("STOPPED"))
    assert time.monotonic() - began < 1.3
    assert answers(heard.events + link.events()) == dict.fromkeys(range(1, 5001), 1)


def test_closing_twice_is_fine(opened, cable, plc):
    link = opened(cable.ours)
    assert link.close(State("STOPPED"))
    assert link.close(State("FAULT"))
    wait_until(lambda: plc.gate.states == ["STOPPED"])


def test_posts_from_many_threads_are_each_answered_once(opened, cable, plc):
    link = opened(cable.ours, queue=10_000)

    def post(first):
        for id in range(first, first + 200):
            link.post(Part(id, "PASS", 0.1))

    threads = [threading.Thread(target=post, args=(first,)) for first in (1, 201, 401, 601)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = Heard(link).until(lambda events: sum(answers(events).values()) == 800)
    assert answers(events) == dict.fromkeys(range(1, 801), 1)


class FakePort:
    """A port that does what it is told, and takes down when it was opened."""

    def __init__(self, send=lambda message: [], fails=False):
        self.opened = []
        self._send, self.fails = send, fails

    def open(self):
        self.opened.append(time.monotonic())
        if self.fails and len(self.opened) > 1:
            raise PlcError("not there")
        return []

    def send(self, message, now_ns):
        return self._send(message)

    def wait(self, wake, timeout_s):
        if self.fails:
            raise PlcError("gone")
        select.select([wake], [], [], timeout_s)
        return []

    def tick(self, now_ns):
        return []

    def backlog_s(self):
        return 0.0

    def close(self, timeout_s):
        return False


def test_a_bug_in_the_thread_reaches_the_line():
    def send(message):
        raise ZeroDivisionError("a bug")

    link = LinkThread(FakePort(send), PlcSettings())
    link.post(Part(1, "PASS", 0.1))
    with pytest.raises(ZeroDivisionError, match="a bug"):  # noqa: PT012 (whenever it comes)
        for _ in range(100):
            select.select([link.fileno()], [], [], 1)
            link.events()
    assert not link.close(State("FAULT"))


def test_a_port_that_answers_twice_is_heard_once():
    link = LinkThread(
        FakePort(lambda message: [Delivered(1, 0), Delivered(1, 0), Undelivered(1, 0, "")]), PlcSettings()
    )
    link.post(Part(1, "PASS", 0.1))
    heard = Heard(link)
    heard.one(Delivered)
    link.close(State("STOPPED"))
    assert not answers(heard.events + link.events())


def test_attempts_to_open_come_less_and_less_often_but_twice_a_second():
    port = FakePort(fails=True)
    link = LinkThread(port, PlcSettings())
    wait_until(lambda: len(port.opened) == 8)
    link.close(State("STOPPED"))
    gaps = [after - before for before, after in zip(port.opened, port.opened[1:], strict=False)][:7]
    for gap, wanted in zip(gaps, (0.05, 0.1, 0.2, 0.4, 0.5, 0.5), strict=False):
        assert wanted - 0.001 < gap < wanted + 0.15


def test_a_line_is_out_long_before_a_millisecond_has_passed(opened, cable, plc):
    """A generous bound for a busy machine; figures are in docs/plc.md."""
    link = opened(cable.ours, baud=4_000_000)
    heard, took = Heard(link), []
    for id in range(1, 201):
        posted = time.monotonic_ns()
        link.post(Part(id, "PASS", 0.1))
        took.append(heard.one(Delivered).at_ns - posted)
    assert sorted(took)[100] < 1_000_000


@pytest.mark.parametrize(("found", "left"), [("16\n", "1"), ("1\n", "1\n")])
def test_a_usb_adapter_is_told_to_pass_on_at_once(tmp_path, found, left):
    timer = tmp_path / "ttyUSB9" / "latency_timer"
    timer.parent.mkdir()
    timer.write_text(found)
    (tmp_path / "gate").symlink_to(tmp_path / "ttyUSB9")
    assert adapter_notes(str(tmp_path / "gate"), tmp_path) == []
    assert timer.read_text() == left


def test_an_adapter_that_may_not_be_told_is_reported_and_another_device_is_not(tmp_path):
    (tmp_path / "ttyUSB9").mkdir()
    (tmp_path / "ttyUSB9" / "latency_timer").symlink_to("/proc/version")  # nobody can write there
    (note,) = adapter_notes("/dev/ttyUSB9", tmp_path)
    assert "udev rule" in note.what
    assert adapter_notes("/dev/ttyS0", tmp_path) == []
