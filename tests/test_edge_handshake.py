"""The register map and the handshake: pure, with the clock passed in."""

import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from stpm.edge.plc.handshake import Handshake, Pending
from stpm.edge.plc.messages import (
    Acknowledged,
    Beat,
    ClearAsked,
    Counted,
    Enabled,
    Garbage,
    GateTimes,
    Part,
    PeerBeat,
    RecipeAsked,
    State,
    Triggered,
    Undelivered,
)
from stpm.edge.plc.registers import (
    STATUS_REGISTERS,
    Bit,
    Coil,
    Control,
    Status,
    control_tables,
    read_control,
    read_status,
    status_bits,
    status_registers,
)

MS = 1_000_000


# --- registers


def test_the_registers_are_these():
    """The table of docs/plc.md, by literal values."""
    status = Status(
        state="RUNNING",
        bits=frozenset({Bit.READY, Bit.RESULT_VALID, Bit.FAIL, Bit.HEARTBEAT}),
        error=7,
        recipe=3,
        bundle=0xDEADBEEF,
        verdict="FAIL",
        inspection=0x0001_0002,
        part_id=0xFFFF_FFFE,
        score=1.5,
        threshold=0.5,
        latency_ms=12.4,
        box=(1, 2, 3, 4),
        area=70000,
        judged=5,
        rejected=6,
        late=7,
        dropped=8,
        uptime_s=65536,
        waiting=2,
    )
    assert status_registers(status) == [
        *(0b10_0010_1001, 4, 7, 3, 2),
        *(2, 1, 0xFFFE, 0xFFFF),  # low word first
        *(0x0000, 0x3FC0, 0x0000, 0x3F00, 3000, 12),
        *(1, 2, 3, 4, 70000 - 65536, 1),
        *(5, 0, 6, 0, 7, 0, 8, 0, 0, 1),
        *(0xBEEF, 0xDEAD, 2, 1),
    ]
    assert [index for index, level in enumerate(status_bits(status)) if level] == [0, 3, 5, 9]
    assert read_status(status_registers(status)) == replace(status, latency_ms=12)


def test_the_map_in_the_document_is_the_map():
    text = (Path(__file__).resolve().parents[1] / "docs" / "plc.md").read_text()
    tables = {name: text.split(f"| {name} |")[1].split("\n\n")[0] for name in ("control coil", "status bit", "state")}
    for name, bits in (("control coil", Coil), ("status bit", Bit)):
        assert re.findall(r"^\| (\d+) \| (\w+) \|", tables[name], re.M) == [(str(bit.value), bit.name) for bit in bits]
    for state, code in re.findall(r"^\| `(\w+)` \| (\d) \|", tables["state"], re.M):
        assert status_registers(Status(state=state))[1] == int(code)
    rows = re.findall(r"^\| ([\d, to]+) \|", text.split("| status register |")[1].split("\n\n")[0], re.M)
    places = [[int(number) for number in re.findall(r"\d+", row)] for row in rows]
    assert [place[0] for place in places] == [0, *(place[-1] + 1 for place in places[:-1])]
    assert places[-1] == [STATUS_REGISTERS - 1]
    assert len(status_registers(Status())) == STATUS_REGISTERS


def test_all_zero_means_nothing_valid_and_not_ready():
    status = read_status([0] * 35)
    assert status == Status()
    assert not status.bits
    assert (status.state, status.verdict, status.score) == ("", "", None)


def test_pass_and_fail_are_different_bits_and_codes():
    codes = {verdict: status_registers(Status(verdict=verdict))[4] for verdict in ("PASS", "FAIL", "UNKNOWN")}
    assert codes == {"PASS": 1, "FAIL": 2, "UNKNOWN": 3}
    assert len({Bit.PASS, Bit.FAIL, Bit.UNKNOWN}) == 3


@pytest.mark.parametrize(
    ("score", "threshold", "ratio"),
    [
        (0.001, 0.002, 500),
        (0.002, 0.002, 1000),
        (0.002000000001, 0.002, 1001),  # a FAIL is above 1000, however little
        (0.0019999999999, 0.002, 1000),
        (0.7, 0.7, 1000),  # 700.0 / 0.7 is a little more than 1000
        (0.9906310562484156, 0.9906310562484155, 1001),  # and here it is 1000
        (99.0, 0.002, 65534),
        (None, 0.002, 65535),
        (float("nan"), 0.002, 65535),
        (0.001, 0.0, 65535),
    ],
)
def test_the_ratio_takes_the_side_of_the_verdict(score, threshold, ratio):
    registers = status_registers(Status(score=score, threshold=threshold))
    assert registers[13] == ratio
    if score is None or score != score:
        assert struct.unpack("<f", struct.pack("<HH", *registers[9:11]))[0] == -1.0


def test_what_does_not_fit_is_capped_and_not_wrapped():
    registers = status_registers(Status(latency_ms=1e9, score=1e300, error=-3, box=(-1, 99999, 0, 0)))
    assert registers[14] == 65535
    assert registers[2] == 0
    assert registers[15:17] == [0, 65535]
    assert struct.unpack("<f", struct.pack("<HH", *registers[9:11]))[0] == pytest.approx(3.4028234e38)


def test_control_is_read_from_these_places():
    coils = [True, False, True, False, True, False]
    registers = [2, 0x0001, 0x0002, 150, 40, 0xFFFF, 0x7FFF]
    control = read_control(coils, registers)
    assert control == Control(
        enable=True,
        result_ack=True,
        clear_fault=True,
        recipe=2,
        part_id=0x0002_0001,
        delay=150,
        pulse_ms=40,
        count=0x7FFF_FFFF,
    )
    assert control_tables(control) == (coils, registers)


# --- handshake


class Plc:
    """A handshake and the PLC's side of it, one step at a time."""

    def __init__(self, queue=8, acknowledge_ms=500):
        self.now = 0
        self.handshake = Handshake(queue, acknowledge_ms * MS, 1000 * MS, 500 * MS, 0)
        self.control = Control()
        self.handshake.hear(self.control, 0, counted=False)
        self.handshake.post(State("READY"), 0)
        self.events()

    def set(self, **changes):
        self.control = replace(self.control, **changes)
        self.handshake.hear(self.control, self.now, counted=False)
        return self.events()

    def look(self):
        """The PLC reads the status."""
        bits = self.handshake.status(self.now).bits
        self.handshake.shown()
        self.handshake.tick(self.now)
        return bits

    def later(self, ms):
        self.now += ms * MS
        self.handshake.tick(self.now)
        return self.events()

    def part(self, id, verdict="PASS", expires_ms=None):
        expires = None if expires_ms is None else self.now + expires_ms * MS
        self.handshake.post(Part(id, verdict, 0.1, 0.5, expires_ns=expires), self.now)
        return self.events()

    def events(self):
        return self.handshake.events()

    @property
    def shows(self):
        return self.handshake.status(self.now).part_id


RESULT = {Bit.RESULT_VALID, Bit.PASS, Bit.FAIL, Bit.UNKNOWN}


def test_results_are_shown_one_at_a_time_between_two_edges():
    plc = Plc()
    plc.part(1)
    plc.part(2, "FAIL")
    assert plc.look() & RESULT == {Bit.RESULT_VALID, Bit.PASS}
    assert plc.shows == 1
    assert plc.set(result_ack=True) == [Acknowledged(1, 0)]
    assert not plc.look() & RESULT
    assert plc.shows == 1  # the registers keep it until the next one
    assert plc.later(50) == []  # RESULT_ACK is still on
    assert not plc.look() & RESULT
    plc.set(result_ack=False)
    assert plc.look() & RESULT == {Bit.RESULT_VALID, Bit.FAIL}
    assert plc.shows == 2
    assert plc.handshake.status(0).inspection == 2


@pytest.mark.parametrize("verdict", ["PASS", "FAIL", "UNKNOWN"])
def test_exactly_one_verdict_bit_is_on_while_valid(verdict):
    plc = Plc()
    assert not plc.look() & RESULT
    plc.part(1, verdict)
    assert plc.look() & RESULT == {Bit.RESULT_VALID, Bit[verdict]}


def test_result_valid_is_seen_low_between_two_results():
    """A PLC that drops RESULT_ACK before it has seen RESULT_VALID fall must not take two results for one."""
    plc = Plc()
    plc.part(1)
    plc.part(2)
    plc.look()
    plc.set(result_ack=True)
    plc.set(result_ack=False)
    assert not plc.look() & RESULT
    assert plc.look() & RESULT
    assert plc.shows == 2


def test_an_ack_that_was_on_before_the_result_is_none():
    plc = Plc()
    plc.set(result_ack=True)
    plc.part(1)
    assert not plc.look() & RESULT
    plc.set(result_ack=False)
    assert plc.look() & RESULT
    assert plc.set(result_ack=True) == [Acknowledged(1, 0)]


def test_an_ack_of_what_the_plc_has_not_seen_is_none():
    plc = Plc()
    plc.part(1)
    assert plc.set(result_ack=True) == []
    plc.look()
    assert plc.set(result_ack=False) == []
    assert plc.set(result_ack=True) == [Acknowledged(1, 0)]


def test_a_result_without_ack_is_withdrawn_and_a_late_ack_is_not_the_next_ones():
    plc = Plc()
    plc.part(1)
    plc.part(2)
    plc.look()
    assert plc.later(499) == []
    (event,) = plc.later(1)
    assert event == Undelivered(1, 500 * MS, "not acknowledged in time")
    assert not plc.look() & RESULT
    assert plc.set(result_ack=True) == []  # meant part 1
    plc.later(200)
    assert not plc.look() & RESULT
    plc.set(result_ack=False)
    assert plc.look() & RESULT
    assert plc.shows == 2


def test_results_expire_shown_or_waiting():
    plc = Plc()
    plc.part(1, expires_ms=100)
    plc.part(2, expires_ms=150)
    plc.look()
    assert plc.handshake.due_ns() == 100 * MS
    assert [event.id for event in plc.later(100)] == [1]
    assert not plc.look() & RESULT
    assert [event.id for event in plc.later(50)] == [2]
    plc.later(500)
    assert not plc.look() & RESULT


def test_an_ack_that_never_falls_lets_the_waiting_results_expire():
    plc = Plc()
    plc.part(1)
    plc.part(2, expires_ms=300)
    plc.look()
    plc.set(result_ack=True)
    (event,) = plc.later(300)
    assert event == Undelivered(2, 300 * MS, "RESULT_ACK did not fall")


def test_too_many_results_lose_the_oldest_that_waits_and_say_so_until_cleared():
    plc = Plc(queue=3)
    lost = [event for id in range(1, 7) for event in plc.part(id)]
    assert [event.id for event in lost] == [2, 3]  # 1 is shown
    assert all("overrun" in event.reason for event in lost)
    assert Bit.OVERRUN in plc.look()
    plc.set(result_ack=True)
    assert Bit.OVERRUN in plc.look()
    assert plc.set(clear_fault=True) == [ClearAsked(0)]
    assert not plc.look() & {Bit.OVERRUN}


def test_every_part_has_one_outcome_whatever_the_plc_does():
    """A PLC that acknowledges at random, reads at random and vanishes at random."""
    import random

    for seed in range(30):
        dice = random.Random(seed)
        plc = Plc(queue=3, acknowledge_ms=60)
        outcomes = []
        for id in range(1, 301):
            outcomes += plc.part(id, expires_ms=200)
            for _ in range(dice.randrange(4)):
                match dice.randrange(5):
                    case 0:
                        outcomes += plc.set(result_ack=not plc.control.result_ack)
                    case 1 | 2:
                        plc.look()
                    case 3:
                        outcomes += plc.later(dice.randrange(40))
                    case 4:
                        plc.handshake.forget()
                        outcomes += plc.set()
            outcomes += plc.events()
        outcomes += plc.later(1000) + plc.events()
        answered = [event.id for event in outcomes if isinstance(event, Acknowledged | Undelivered)]
        assert sorted(answered) == list(range(1, 301)), f"seed {seed}"
        assert any(isinstance(event, Acknowledged) for event in outcomes)


def test_a_trigger_is_an_edge_with_its_number_and_its_mirror():
    plc = Plc()
    assert plc.set(part_id=41) == []
    assert plc.set(trigger=True) == [Triggered(0, 41)]
    assert plc.look() >= {Bit.TRIGGER_ACK, Bit.BUSY}
    assert plc.set(trigger=True) == []
    assert plc.set(trigger=False) == []
    assert not plc.look() & {Bit.TRIGGER_ACK}
    assert Bit.BUSY in plc.look()
    plc.part(41)
    assert Bit.BUSY not in plc.look()
    assert plc.set(part_id=0, trigger=True) == [Triggered(0, None)]


def busy(plc):
    return Bit.BUSY in plc.look()


def trigger(plc, number=0):
    plc.set(trigger=True, part_id=number)
    plc.set(trigger=False)


@pytest.mark.parametrize("state", [State("FAULT"), State("SELF_TEST"), State("RUNNING", enabled=False)])
def test_a_trigger_that_is_not_inspected_does_not_make_it_busy(state):
    plc = Plc()
    trigger(plc, 40)
    assert busy(plc)
    plc.handshake.post(state, plc.now)
    assert not busy(plc)
    trigger(plc, 41)
    assert not busy(plc)
    plc.handshake.post(State("RUNNING"), plc.now)
    trigger(plc, 42)
    assert busy(plc)


def test_busy_ends_when_no_result_can_come_any_more():
    """The line ignored that trigger, and says nothing of it."""
    plc = Plc()
    trigger(plc, 41)
    assert plc.handshake.due_ns() == 1000 * MS
    plc.later(999)
    assert busy(plc)
    plc.later(1)
    assert not busy(plc)


def test_a_result_answers_its_own_trigger():
    plc = Plc()
    trigger(plc, 41)
    trigger(plc, 43)
    plc.part(42)  # it was missed, and is rejected
    plc.part(43)
    assert busy(plc)
    plc.part(41)
    assert not busy(plc)
    trigger(plc)
    trigger(plc)
    plc.part(44)
    assert busy(plc)
    plc.part(45)
    assert not busy(plc)


def test_what_is_on_at_the_first_look_is_no_edge():
    handshake = Handshake(8, 500 * MS, 1000 * MS, 500 * MS, 0)
    handshake.hear(Control(enable=True, trigger=True, recipe_change=True, clear_fault=True), 5, counted=False)
    assert handshake.events() == [Enabled(5, True)]
    assert not handshake.status(5).bits & {Bit.TRIGGER_ACK, Bit.RECIPE_ACK, Bit.CLEAR_ACK}
    # and after the link was down
    handshake.hear(Control(enable=True), 6, counted=False)
    handshake.forget()
    handshake.hear(Control(enable=True, trigger=True), 7, counted=False)
    assert handshake.events() == [Enabled(7, True)]


def test_nothing_is_shown_before_the_plc_has_been_heard():
    """An acknowledgement that is stuck on would be taken for the first result's."""
    handshake = Handshake(8, 500 * MS, 1000 * MS, 500 * MS, 0)
    handshake.post(Part(1, "PASS", 0.1), 0)
    handshake.shown()
    handshake.hear(Control(result_ack=True), 1, counted=False)
    handshake.shown()
    assert not any(isinstance(event, Acknowledged) for event in handshake.events())
    handshake.hear(Control(), 2, counted=False)
    assert Bit.RESULT_VALID in handshake.status(2).bits


def test_an_ack_that_rose_while_the_link_was_down_counts():
    plc = Plc()
    plc.part(1)
    plc.look()
    plc.handshake.forget()
    assert Acknowledged(1, 0) in plc.set(result_ack=True)


def test_gate_times_that_changed_while_the_link_was_down_are_told():
    """Above all when a PLC has forgotten them: the station's own count again."""
    plc = Plc()
    plc.set(delay=150, pulse_ms=40)
    plc.handshake.forget()
    assert not any(isinstance(event, GateTimes) for event in plc.set())
    plc.handshake.forget()
    assert GateTimes(0, 0, 0) in plc.set(delay=0, pulse_ms=0)


def test_enable_is_shown_as_what_it_has_come_to():
    plc = Plc()
    assert Bit.ENABLED in plc.look()
    plc.set(enable=False)
    assert Bit.ENABLED in plc.look()  # heeded by the line, or not
    plc.handshake.post(State("READY", enabled=False), 0)
    assert Bit.ENABLED not in plc.look()


def test_the_other_wishes_of_the_plc():
    plc = Plc()
    assert plc.set(recipe=3) == []
    assert plc.set(recipe_change=True) == [RecipeAsked(0, 3)]
    assert Bit.RECIPE_ACK in plc.look()
    assert plc.set(heartbeat=True) == [PeerBeat(0)]
    assert plc.set(heartbeat=False) == [PeerBeat(0)]
    assert plc.set() == []
    assert plc.set(delay=150, pulse_ms=40) == [GateTimes(0, 150, 40)]
    assert plc.set(delay=0) == [GateTimes(0, 0, 40)]
    assert plc.set(pulse_ms=10_000) == [GateTimes(0, 0, 10_000)]
    (refused,) = plc.set(pulse_ms=10_001)
    assert isinstance(refused, Garbage)
    assert "at most 600000 and 10000 ms" in refused.what
    assert not refused.lost
    assert plc.set() == []
    assert plc.set(pulse_ms=10_000) == [GateTimes(0, 0, 10_000)]
    assert plc.set(enable=True) == [Enabled(0, True)]
    plc.handshake.hear(replace(plc.control, count=99), 8, counted=True)
    assert plc.events() == [Counted(8, 99)]


@pytest.mark.parametrize(
    ("state", "bits"),
    [
        ("BOOT", set()),
        ("SELF_TEST", set()),
        ("READY", {Bit.READY}),
        ("RUNNING", {Bit.READY}),
        ("DEGRADED", {Bit.READY, Bit.DEGRADED}),
        ("FAULT", {Bit.FAULT}),
        ("STOPPED", set()),
    ],
)
def test_states_are_bits(state, bits):
    plc = Plc()
    plc.handshake.post(State(state, "", 2, 5, "0123456789abcdef"), 0)
    status = plc.handshake.status(0)
    assert status.bits - {Bit.HEARTBEAT, Bit.ENABLED} == bits
    assert (status.state, status.recipe, status.error, status.bundle) == (state, 2, 5, 0x01234567)


def test_a_simulated_engine_is_a_bit():
    plc = Plc()
    plc.handshake.post(State("READY", "SIMULATED"), 0)
    assert Bit.SIMULATED in plc.look()


def test_the_heartbeat_moves_with_beats_and_with_a_busy_line():
    plc = Plc()

    def beat():
        return Bit.HEARTBEAT in plc.look()

    first = beat()
    plc.handshake.post(Beat(1), 0)
    assert beat() != first
    plc.part(1)
    assert beat() != first  # nothing new within half a heartbeat
    plc.later(250)
    plc.part(2)
    assert beat() == first


def test_pending_acks_are_answered_once_or_run_out():
    pending = Pending(100 * MS)
    pending.sent(1, 0)
    pending.sent(2, 10 * MS)
    assert pending.acknowledged(1)
    assert not pending.acknowledged(1)
    assert not pending.acknowledged(9)
    assert pending.due_ns() == 110 * MS
    assert pending.expired(109 * MS) == []
    assert pending.expired(110 * MS) == [Undelivered(2, 110 * MS, "not acknowledged in time")]
    assert pending.due_ns() is None
