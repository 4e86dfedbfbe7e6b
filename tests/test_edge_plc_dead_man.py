"""The gate output when the line hangs, when the link has a bug, and when it is closed: its safe level, in time."""

import select
import time

import pytest
from plc_bench import Heard, Station
from pymodbus.constants import ExcCodes

from stpm.edge.errors import PlcError
from stpm.edge.plc.ascii_port import AsciiPort, Nowhere
from stpm.edge.plc.gate_output import DEAD_MAN_NS, MS, GateOutput
from stpm.edge.plc.link import LinkThread
from stpm.edge.plc.messages import (
    Beat,
    Connected,
    Disconnected,
    Gate,
    GateReleased,
    Part,
    State,
    Switched,
    Undelivered,
    Unswitched,
)
from stpm.edge.plc.registers import Bit
from stpm.edge.plc.settings import PlcSettings, RemoteIo
from stpm.tools.cable import PtyCable
from stpm.tools.plc_modbus import SlavePlc, wait_until

POLARITIES = pytest.mark.parametrize("safe", [False, True], ids=["accept", "reject"])


@pytest.fixture(params=Station.PROTOCOLS)
def protocol(request):
    return request.param


@pytest.fixture
def station(monkeypatch):
    """Opens one and closes it."""
    made = []

    def make(protocol, safe=False, **settings):
        made.append(Station(protocol, monkeypatch, safe, **settings))
        return made[-1]

    yield make
    for each in made:
        each.__exit__()


def opened(bench, safe=False):
    """The gate is at its unsafe level, and the line is at work."""
    heard = Heard(bench.link, alive=True)
    heard.one(Connected)
    bench.link.post(State("RUNNING"))
    for active in (safe, not safe):
        bench.link.post(Gate(7, active))
        heard.one(Switched)
    wait_until(lambda: bench.output() != safe, 0.15)
    return heard


# --- a line that hangs


@POLARITIES
def test_a_line_that_hangs_loses_its_gate_and_gets_it_back_only_by_a_new_edge(station, protocol, safe):
    bench = station(protocol, safe)
    heard = opened(bench, safe)
    assert not any(isinstance(event, GateReleased) for event in heard.during(0.5))
    assert bench.output() != safe
    hangs = time.monotonic()
    heard.alive = False
    event = heard.one(GateReleased)
    # as a slave we only know that the PLC may read it
    word = "puts" if protocol == "modbus-slave" else "has put"
    assert f"the link {word} the gate output to its safe level" in event.sentence
    wait_until(lambda: bench.output() == safe, 0.2)
    assert 0.15 < time.monotonic() - hangs < 0.45
    # nothing that comes before the line is heard again opens it
    bench.link.post(Gate(8, not safe))
    assert "not been heard from" in heard.one(Unswitched).reason
    time.sleep(0.05)
    assert bench.output() == safe
    heard.alive = True
    heard.during(0.1)
    assert bench.output() == safe
    bench.link.post(Gate(9, not safe))
    assert heard.one(Switched).id == 9
    wait_until(lambda: bench.output() != safe)
    assert not any(isinstance(event, Switched | Unswitched | GateReleased) for event in heard.events)
    # and it watches again
    heard.alive = False
    heard.one(GateReleased)
    wait_until(lambda: bench.output() == safe, 0.2)


def test_without_a_first_sign_of_life_nothing_is_released(station, protocol):
    bench = station(protocol)
    bench.link.post(State("RUNNING"))
    bench.link.post(Gate(7, True))
    heard = Heard(bench.link)
    heard.one(Switched)
    assert not any(isinstance(event, GateReleased) for event in heard.during(0.4))
    assert bench.output()


def test_a_link_without_a_gate_does_nothing(station, protocol):
    bench = station(protocol)
    bench.link.alive(time.monotonic_ns())
    bench.link.post(State("RUNNING"))
    heard = Heard(bench.link)
    assert not any(isinstance(event, GateReleased) for event in heard.during(0.4))
    assert not bench.output()


def test_an_output_that_is_safe_already_is_not_told(station, protocol):
    bench = station(protocol)
    heard = opened(bench)
    bench.link.post(Gate(7, False))
    heard.one(Switched)
    heard.alive = False
    assert not any(isinstance(event, GateReleased) for event in heard.during(0.4))
    bench.link.post(Gate(8, True))
    assert "not been heard from" in heard.one(Unswitched).reason
    assert not bench.output()


def test_a_link_to_nowhere_is_watched_too():
    link = LinkThread(Nowhere(), PlcSettings(port="none"))
    link.alive(time.monotonic_ns())
    link.post(Gate(1, True))
    heard = Heard(link)
    heard.one(Switched)
    heard.one(GateReleased, 0.5)
    link.close(State("STOPPED"))


def test_a_bad_moment_of_the_plc_does_not_keep_the_gate_open(station):
    """The PLC refuses the safe level at first."""
    bench = station("modbus-master")
    heard = opened(bench)
    bench.plc.refuse = ExcCodes.DEVICE_BUSY
    heard.alive = False
    assert "puts" in heard.one(GateReleased).sentence
    assert bench.output()
    bench.plc.writes.clear()
    bench.plc.refuse = None
    wait_until(lambda: not bench.output(), 0.3)
    time.sleep(0.3)  # and then it is left alone
    assert [values for function, _, values, _ in bench.plc.writes if function == 5] == [[False]]


@pytest.mark.parametrize("protocol", ["ascii", "modbus-master", "modbus-slave"])
def test_a_port_that_comes_back_after_the_line_has_hung_does_not_open_the_gate(station, protocol):
    bench = station(protocol)
    heard = opened(bench)
    bench.cable.unplug()
    heard.alive = False
    heard.one(Disconnected)
    assert "puts" in heard.one(GateReleased).sentence
    levels = bench.plc.gate.levels if protocol == "ascii" else bench.plc.program.gate
    before = len(levels)
    bench.cable.plug()
    heard.one(Connected)
    wait_until(lambda: not bench.output())
    time.sleep(0.1)
    assert [level for level in levels[before:] if level in (True, (7, True))] == []


@POLARITIES
def test_a_plc_that_lost_its_memory_is_not_given_an_old_gate_level(station, safe):
    """Everything is written anew after a break, and the line has wanted something else meanwhile."""
    bench = station("modbus-master", safe)
    heard = opened(bench, safe)
    bench.cable.unplug()
    heard.one(Disconnected)
    bench.link.post(Gate(8, safe))
    bench.plc.forget()
    bench.plc.writes.clear()
    bench.cable.plug()
    heard.one(Connected)
    heard.one(Switched)
    levels = [values[Bit.GATE] for function, _, values, _ in bench.plc.writes if function == 15]
    assert levels
    assert set(levels) == {safe}


@POLARITIES
def test_a_block_of_remote_io_is_not_given_an_old_gate_level(monkeypatch, safe):
    io = RemoteIo(gate_coil=0, ready_coil=1)
    with PtyCable() as cable, SlavePlc(PlcSettings(port=cable.theirs, io=io)) as block:
        from stpm.edge.plc import open_link

        settings = PlcSettings(port=cable.ours, protocol="modbus-master", io=io, poll_ms=5, timeout_ms=100)
        link = open_link(settings, safe)
        link.post(State("RUNNING"))
        link.post(Gate(7, not safe))
        heard = Heard(link)
        heard.one(Switched)
        cable.unplug()
        heard.one(Disconnected)
        link.post(Gate(8, safe))
        block.writes.clear()
        cable.plug()
        heard.one(Switched)
        written = [values for _, address, values, _ in block.writes if address == 0]
        assert written
        assert all(values == [safe] for values in written)
        link.close(State("STOPPED"))


class SlowPort:
    """A port that takes a while for a State, and counts how often it was woken."""

    def __init__(self, slow_s=0.0, broken=None):
        self.slow_s, self.broken = slow_s, broken
        self.log, self.waits, self.busy = [], 0, False

    def open(self):
        return []

    def send(self, message, now_ns):
        if self.broken is not None and isinstance(message, self.broken):
            raise ZeroDivisionError("a bug")
        self.busy = True
        if isinstance(message, State):
            time.sleep(self.slow_s)
        self.log.append(message)
        return [Switched(message.id, message.active, now_ns)] if isinstance(message, Gate) else []

    def wait(self, wake, timeout_s):
        self.waits += 1
        select.select([wake], [], [], timeout_s)
        return []

    def tick(self, now_ns):
        return []

    def backlog_s(self):
        return 0.0

    def close(self, timeout_s):
        self.log.append(timeout_s)
        time.sleep(self.slow_s if timeout_s else 0)
        return True


def test_an_edge_that_is_found_too_late_does_not_open_the_gate():
    """The link was busy while it was posted, and the line is at work again."""
    port = SlowPort(slow_s=0.3)
    link = LinkThread(port, PlcSettings())
    link.post(State("RUNNING"))
    wait_until(lambda: port.busy)
    link.post(Gate(1, True))
    heard = Heard(link, alive=True)
    assert "too old" in heard.one(Unswitched).reason
    assert Gate(1, True) not in port.log
    link.post(Gate(1, True))
    heard.one(Switched)
    link.close(State("STOPPED"))


def test_a_sign_of_life_wakes_nobody():
    port = SlowPort()
    link = LinkThread(port, PlcSettings())
    wait_until(lambda: port.waits)
    before = port.waits
    for _ in range(20):
        link.alive(time.monotonic_ns())
        time.sleep(0.002)
    assert port.waits <= before + 1
    link.close(State("STOPPED"))


def test_a_line_that_closes_its_link_is_not_called_dead():
    port = SlowPort(slow_s=0.3)
    link = LinkThread(port, PlcSettings())
    link.alive(time.monotonic_ns())
    link.post(Gate(1, True))
    Heard(link).one(Switched)
    link.close(State("STOPPED"))
    assert not any(isinstance(event, GateReleased) for event in link.events())
    assert port.log[1:3] == [Gate(1, False), State("STOPPED")]


# --- the switch itself


def watched(safe=False, alive_ns=0):
    gate = GateOutput(safe)
    gate.alive_ns = alive_ns
    edge = Gate(1, not safe)
    gate.posted(edge)
    gate.sends(edge)
    gate.hear([Switched(1, not safe, 0)])
    return gate


@POLARITIES
def test_it_waits_for_the_dead_man_and_not_longer(safe):
    gate = watched(safe)
    assert gate.due_ns() == DEAD_MAN_NS + 1
    assert not gate.release(DEAD_MAN_NS)
    assert gate.owed(DEAD_MAN_NS) is None
    assert gate.release(DEAD_MAN_NS + 1)
    assert gate.owed(DEAD_MAN_NS + 1) == Gate(1, safe)
    assert not gate.release(DEAD_MAN_NS + 2)  # told once


def test_it_tries_again_until_the_output_is_safe():
    gate = watched()
    gate.release(300 * MS)
    assert gate.owed(300 * MS)
    gate.hear([Unswitched(1, False, 0, "busy")])
    assert gate.owed(301 * MS) is None
    assert gate.due_ns() == 350 * MS
    assert gate.owed(350 * MS)
    gate.hear([Switched(1, False, 0)])
    assert gate.owed(500 * MS) is None
    assert gate.due_ns() is None


def test_an_output_nobody_knows_the_level_of_counts_as_open():
    gate = watched()
    gate.lost()
    assert gate.release(DEAD_MAN_NS + 1)
    assert gate.restored() == Gate(1, False)


def test_an_edge_towards_the_safe_level_may_be_as_old_as_it_likes():
    gate = watched()
    assert gate.refuses(Gate(1, False), 0, 10_000 * MS) == ""


# --- a link that has a bug


@POLARITIES
def test_a_bug_in_the_link_leaves_the_safe_level_and_a_fault(station, monkeypatch, safe):
    bench = station("ascii", safe)
    opened(bench, safe)
    monkeypatch.setattr(AsciiPort, "tick", lambda port, now_ns: 1 // 0)
    bench.link.post(Part(1, "PASS", 0.1))
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 (whenever it comes)
        for _ in range(100):
            select.select([bench.link.fileno()], [], [], 1)
            bench.link.events()
    wait_until(lambda: bench.states()[-1:] == ["FAULT"])
    assert bench.output() == safe
    assert not bench.link.close(State("STOPPED"))
    assert [event.id for event in bench.link.events() if isinstance(event, Undelivered)] == [1]


@pytest.mark.parametrize("broken", [Gate, State, Part])
def test_what_is_broken_does_not_keep_the_rest_from_being_said(broken):
    port = SlowPort()
    link = LinkThread(port, PlcSettings())
    link.post(State("RUNNING", recipe=2))
    link.post(Gate(1, True))
    Heard(link).one(Switched)
    wait_until(lambda: len(port.log) == 2)
    port.broken = broken
    link.post({Gate: Gate(2, True), State: State("DEGRADED"), Part: Part(1, "PASS", 0.1)}[broken])
    link._thread.join(2)
    words = [Gate(2 if broken is Gate else 1, False), State("FAULT", "unexpected ZeroDivisionError", 2, 1)]
    said = port.log[2:]
    assert [word for word in said if not isinstance(word, float | int)] == [
        word for word in words if not isinstance(word, broken)
    ]
    assert isinstance(said[-2], float)  # time for them to arrive
    with pytest.raises(ZeroDivisionError):
        link.events()
    link.close(State("STOPPED"))


# --- a link that is closed


def bound_s(timeout_ms):
    return 7 * timeout_ms / 1000 + 0.5


@pytest.mark.parametrize("timeout_ms", [100, 500])
def test_closing_is_bounded_while_the_plc_is_silent(station, timeout_ms):
    bench = station("modbus-master", timeout_ms=timeout_ms)
    opened(bench)
    bench.plc.silent = True
    began = time.monotonic()
    assert not bench.link.close(State("STOPPED"))
    assert time.monotonic() - began < bound_s(timeout_ms)
    assert not bench.link._thread.is_alive()


@POLARITIES
@pytest.mark.parametrize(("timeout_ms", "unheard"), [(100, 4), (500, 3)])
def test_a_plc_that_is_silent_for_a_moment_gets_the_last_words(station, safe, timeout_ms, unheard):
    bench = station("modbus-master", safe, timeout_ms=timeout_ms)
    opened(bench, safe)
    bench.plc.unheard = unheard
    assert bench.link.close(State("STOPPED"))
    wait_until(lambda: bench.states()[-1:] == ["STOPPED"])
    assert bench.output() == safe


@POLARITIES
def test_a_plc_that_was_given_up_gets_the_last_words_when_it_is_there_again(station, safe):
    bench = station("modbus-master", safe, timeout_ms=100)
    heard = opened(bench, safe)
    bench.plc.silent = True
    heard.one(Disconnected)
    bench.plc.silent = False
    assert bench.link.close(State("STOPPED"))
    wait_until(lambda: bench.states()[-1:] == ["STOPPED"])
    assert bench.output() == safe


@POLARITIES
def test_an_edge_that_the_plc_has_not_read_yet_is_not_the_last_word(station, safe):
    bench = station("modbus-slave", safe, scan_s=0.1)
    heard = opened(bench, safe)
    bench.link.post(Gate(8, safe))
    heard.one(Switched)
    bench.link.post(Gate(9, not safe))
    time.sleep(0.02)
    assert bench.link.close(State("STOPPED"))
    wait_until(lambda: bench.states()[-1:] == ["STOPPED"])
    assert bench.output() == safe


def test_beats_are_not_needed_for_it(station):
    """A line that beats through the link and hangs elsewhere does not count as alive."""
    bench = station("ascii")
    heard = opened(bench)
    heard.alive = False
    for _ in range(20):
        bench.link.post(Beat(1))
        heard.take(0.02)
    heard.one(GateReleased, 0.3)


def test_a_device_that_vanishes_while_closing_is_bounded(station):
    bench = station("modbus-master", timeout_ms=200)
    opened(bench)
    bench.cable.unplug()
    began = time.monotonic()
    assert not bench.link.close(State("STOPPED"))
    assert time.monotonic() - began < bound_s(200)
    with pytest.raises(PlcError, match="does not open"):
        bench.link._port.open()
