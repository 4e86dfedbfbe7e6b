"""The gate: when it switches for which part, and that nothing but a PASS in time opens it."""

import numpy as np
import pytest

from stpm.edge.config import GateSettings
from stpm.edge.gate import MS, Gate

LONG_AGO = -(10**12)  # so that nothing can have gone past unseen


class Bench:
    """A gate, and its output level over time in whole milliseconds."""

    def __init__(self, **settings):
        self.decisions = {}
        self.gate = Gate(GateSettings(**settings), self.decisions.__setitem__)
        self.level = False
        self.edges = []

    def run(self, until_ms, since_ms=0, at=lambda ms: None):
        levels = []
        for ms in range(since_ms, until_ms):
            at(ms)
            for edge in self.gate.edges(ms * MS):
                self.level = edge.active
                self.edges.append((ms, edge.part, edge.active))
            levels.append(self.level)
        return levels


def on(levels, since_ms=0):
    """The stretches in which the output was on, as (from, to)."""
    steps = np.flatnonzero(np.diff([False, *levels, False])) + since_ms
    return [(int(first), int(last)) for first, last in steps.reshape(-1, 2)]


def test_a_rejected_part_gets_one_pulse_after_its_delay_from_capture():
    bench = Bench(mode="delay", polarity="reject", delay_ms=100, pulse_ms=20)
    bench.gate.hold(False, LONG_AGO)
    bench.gate.plan(1, 5 * MS)
    bench.gate.plan(2, 50 * MS)
    bench.gate.decide(1, False)
    bench.gate.decide(2, True)
    assert on(bench.run(300)) == [(105, 125)]
    assert bench.edges == [(105, 1, True), (125, 1, False)]
    assert bench.decisions == {1: "rejected", 2: "passed"}


def test_a_passed_part_opens_a_gate_that_is_closed_otherwise():
    bench = Bench(mode="delay", polarity="accept", delay_ms=100, pulse_ms=20)
    bench.gate.hold(False, LONG_AGO)
    for part, captured in ((1, 0), (2, 40), (3, 80)):
        bench.gate.plan(part, captured * MS)
    bench.gate.decide(1, True)
    bench.gate.decide(2, False)
    # nobody decides on 3
    assert on(bench.run(300)) == [(100, 120)]
    assert bench.decisions == {1: "passed", 2: "rejected", 3: "rejected"}


@pytest.mark.parametrize("polarity", ["accept", "reject"])
def test_a_verdict_after_the_part_has_passed_changes_nothing(polarity):
    bench = Bench(mode="delay", polarity=polarity, delay_ms=10, pulse_ms=20)
    bench.gate.hold(False, LONG_AGO)
    bench.gate.plan(1, 0)
    levels = bench.run(60, at=lambda ms: bench.gate.decide(1, True) if ms == 11 else None)
    assert on(levels) == ([] if polarity == "accept" else [(10, 30)])
    assert bench.decisions == {1: "rejected"}


def test_the_reject_wins_where_two_pulses_overlap():
    bench = Bench(mode="delay", polarity="accept", delay_ms=0, pulse_ms=50)
    bench.gate.hold(False, LONG_AGO)
    for part, captured, passes in ((1, 10, True), (2, 30, False), (3, 60, True), (4, 200, True)):
        bench.gate.plan(part, captured * MS)
        bench.gate.decide(part, passes)
    # 1 is cut short by 2; 3 begins in the pulse of 2 and is counted as rejected
    assert on(bench.run(300)) == [(10, 30), (80, 110), (200, 250)]
    assert bench.decisions == {1: "passed", 2: "rejected", 3: "rejected", 4: "passed"}


def test_overlapping_rejects_are_one_pulse():
    bench = Bench(mode="delay", polarity="reject", delay_ms=0, pulse_ms=50)
    bench.gate.hold(False, LONG_AGO)
    for part, captured in ((1, 10), (2, 30)):
        bench.gate.plan(part, captured * MS)
    assert on(bench.run(200)) == [(10, 80)]


@pytest.mark.parametrize(("polarity", "level"), [("accept", False), ("reject", True)])
def test_while_it_is_held_the_level_rejects_and_no_part_counts_as_passed(polarity, level):
    bench = Bench(mode="delay", polarity=polarity, delay_ms=20, pulse_ms=10)
    bench.gate.plan(1, 0)
    bench.gate.decide(1, True)
    assert set(bench.run(40)) == {level}
    assert bench.decisions == {1: "rejected"}
    bench.gate.hold(False, LONG_AGO)
    assert on(bench.run(60, 40), 40) == []
    assert not bench.gate.waiting


def test_a_fault_closes_an_open_gate_at_once():
    bench = Bench(mode="delay", polarity="accept", delay_ms=0, pulse_ms=100)
    bench.gate.hold(False, LONG_AGO)
    bench.gate.plan(1, 0)
    bench.gate.decide(1, True)
    assert on(bench.run(150, at=lambda ms: bench.gate.hold(ms >= 30, ms * MS))) == [(0, 30)]


def test_a_part_that_is_past_the_gate_before_anybody_knows_of_it_is_missed_and_no_other_is_hit():
    bench = Bench(mode="delay", polarity="reject", delay_ms=10, pulse_ms=20)
    bench.gate.hold(False, LONG_AGO)
    bench.run(100)
    bench.gate.plan(1, 0)  # was due at 10, and is long past
    bench.gate.plan(2, 80 * MS)  # was due at 90: its pulse begins late, and is whole
    bench.gate.plan(3, 150 * MS)
    assert on(bench.run(250, 100), 100) == [(100, 120), (160, 180)]
    assert bench.decisions == {1: "missed", 2: "rejected", 3: "rejected"}


def test_a_part_is_due_from_its_frame_when_that_comes_after_its_trigger():
    bench = Bench(mode="delay", polarity="reject", delay_ms=100, pulse_ms=20)
    bench.gate.hold(False, LONG_AGO)
    bench.gate.plan(1, 0)
    bench.gate.plan(1, 7 * MS)
    assert on(bench.run(200)) == [(107, 127)]


def test_a_pulse_that_is_over_does_not_reject_the_next_part_though_nobody_looked_in_between():
    bench = Bench(mode="delay", polarity="accept", delay_ms=0, pulse_ms=10)
    bench.gate.hold(False, LONG_AGO)
    bench.gate.plan(1, 10 * MS)
    bench.gate.plan(2, 25 * MS)
    bench.gate.decide(2, True)
    assert [edge.active for edge in bench.gate.edges(26 * MS)] == [True]
    assert bench.decisions == {1: "rejected", 2: "passed"}


def test_due_is_the_next_change():
    gate = Gate(GateSettings(mode="delay", polarity="reject", delay_ms=100, pulse_ms=20))
    gate.hold(False, LONG_AGO)
    assert gate.due_ns() is None
    gate.plan(1, 7)
    assert gate.due_ns() == 100 * MS + 7
    assert [edge.due_ns for edge in gate.edges(100 * MS + 9)] == [100 * MS + 7]
    assert gate.due_ns() == 120 * MS + 9  # it began 2 ns late


@pytest.mark.parametrize("speed", [lambda ms: 1.0, lambda ms: 1.0 if ms < 80 else 0.5, lambda ms: float(ms % 40 < 20)])
def test_with_an_encoder_the_pulse_comes_at_its_count_whatever_the_speed(speed):
    bench = Bench(mode="encoder", polarity="accept", counts=100, pulse_ms=20, encoder_timeout_ms=50)
    bench.gate.hold(False, LONG_AGO)
    position = np.cumsum([0.0, *(speed(ms) for ms in range(600))])

    def at(ms):
        if ms % 5 == 0:
            bench.gate.encoder.add(ms * MS, int(position[ms]))
        if ms == 30:
            bench.gate.plan(1, 22 * MS)  # captured 8 ms ago
            bench.gate.decide(1, True)

    (first, last) = on(bench.run(600, at=at))[0]
    wanted = int(np.searchsorted(position, position[22] + 100))
    assert abs(first - wanted) <= 5  # read every 5 ms
    assert last - first == 20


def test_a_belt_that_stops_just_before_the_capture_is_known_with_the_next_count():
    """At the capture the last count was 10 ms old and the belt seemed to run; it had stopped."""
    bench = Bench(mode="encoder", polarity="accept", counts=50, pulse_ms=20, encoder_timeout_ms=500)
    bench.gate.hold(False, LONG_AGO)
    counts = {0: 0, 10: 10, 30: 10, 100: 10, 110: 20, 120: 30, 130: 40, 140: 50, 150: 60, 160: 70}

    def at(ms):
        if ms in counts:
            bench.gate.encoder.add(ms * MS, counts[ms])
        if ms == 20:
            bench.gate.plan(1, 20 * MS)
            bench.gate.decide(1, True)

    # at count 10 + 50, which is at 150 ms, and not at 20 + 50
    assert on(bench.run(200, at=at)) == [(150, 170)]


@pytest.mark.parametrize("every_ms", [5, 20, 50])
@pytest.mark.parametrize("short", [1, 10, 30])
def test_a_reject_waits_for_a_belt_that_stops_just_before_the_gate(every_ms, short):
    """By its speed the part would be there; the belt stands for half a second and then brings it."""
    bench = Bench(mode="encoder", polarity="reject", counts=1000, pulse_ms=40, encoder_timeout_ms=200)
    bench.gate.hold(False, LONG_AGO)
    bench.gate._unseen = None
    stops = 1000 + 100 - short

    def at(ms):
        if ms % every_ms == 0:
            bench.gate.encoder.add(ms * MS, min(ms, stops) + max(0, ms - stops - 500))
        if ms == 100:
            bench.gate.plan(1, 100 * MS)
            bench.gate.decide(1, False)

    levels = bench.run(2200, at=at)
    comes = 1100 + 500
    assert all(levels[comes : comes + 38])
    assert not any(levels[: stops - every_ms - 1])
    assert not any(levels[comes + 40 + every_ms :])
    assert bench.decisions == {1: "rejected"}


@pytest.mark.parametrize(("every_ms", "captured", "pulse"), [(20, 100, (1100, 1140)), (100, 110, (1110, 1200))])
def test_a_belt_that_runs_on_lengthens_a_reject_to_the_next_count_at_most(every_ms, captured, pulse):
    """Where counts come more rarely than a pulse lasts, nobody knows before that whether the belt has stopped."""
    bench = Bench(mode="encoder", polarity="reject", counts=1000, pulse_ms=40, encoder_timeout_ms=200)
    bench.gate.hold(False, LONG_AGO)
    bench.gate._unseen = None

    def at(ms):
        if ms % every_ms == 0:
            bench.gate.encoder.add(ms * MS, ms)
        if ms == captured:
            bench.gate.plan(1, captured * MS)
            bench.gate.decide(1, False)

    assert on(bench.run(2000, at=at)) == [pulse]


def test_what_waits_for_a_count_wakes_nobody():
    gate = Gate(GateSettings(mode="encoder", polarity="reject", counts=100, pulse_ms=20))
    for ms in range(0, 60, 10):
        gate.encoder.add(ms * MS, ms)
    gate.hold(False, 0)
    gate.edges(50 * MS)
    assert gate.due_ns() is None
    for ms in range(60, 120, 10):
        gate.encoder.add(ms * MS, ms)
    gate.edges(110 * MS)
    assert gate.due_ns() == 120 * MS


def test_parts_are_abandoned_when_the_encoder_is_lost():
    bench = Bench(mode="encoder", polarity="accept", counts=100, pulse_ms=20)
    bench.gate.plan(1, 0)
    bench.gate.decide(1, True)
    bench.gate.abandon()
    assert bench.decisions == {1: "rejected"}
    assert not bench.gate.waiting


def test_a_place_does_not_move_any_more_once_it_is_known():
    """The belt runs, and then at half its speed for far longer than counts are kept."""
    encoder_counts = [min(ms, 100) + max(ms - 100, 0) // 2 for ms in range(3000)]
    bench = Bench(mode="encoder", polarity="accept", counts=1000, pulse_ms=20, encoder_timeout_ms=500)
    bench.gate.hold(False, LONG_AGO)

    def at(ms):
        if ms % 10 == 0:
            bench.gate.encoder.add(ms * MS, encoder_counts[ms])
        if ms == 50:
            bench.gate.plan(1, 50 * MS)
            bench.gate.decide(1, True)

    wanted = encoder_counts.index(50 + 1000)
    assert abs(on(bench.run(3000, at=at))[0][0] - wanted) <= 4


def test_the_pause_after_an_edge_that_did_not_get_through_holds_up_no_other_edge():
    """What is not known may be anything, and something that is to be rejected comes."""
    bench = Bench(mode="delay", polarity="accept", delay_ms=0, pulse_ms=50)
    bench.gate.hold(False, LONG_AGO)
    bench.gate.plan(1, 0)
    bench.gate.decide(1, True)
    bench.gate.plan(2, 30 * MS)
    bench.run(100, at=lambda ms: bench.gate.not_switched(ms * MS) if ms == 10 else None)
    assert bench.edges == [(0, 1, True), (30, 2, False)]


@pytest.mark.parametrize("accept", [True, False])
def test_unseen_parts_are_rejected_though_the_fault_ends_while_nothing_is_inspected(accept):
    """The one that was given up passes nowhere, and the one that came after it has to wait."""
    bench = Bench(mode="delay", polarity="accept" if accept else "reject", delay_ms=100, pulse_ms=20)
    bench.gate.hold(False, LONG_AGO)

    def at(ms):
        if ms in (10, 40):
            bench.gate.plan(ms, ms * MS)
            bench.gate.decide(ms, ms == 40)
        if ms == 30:
            bench.gate.abandon()
        bench.gate.hold(30 <= ms < 60, ms * MS, idle=ms >= 50)

    bench.run(61, at=at)
    assert set(bench.run(160, 61, at)) == {not accept}
    assert bench.decisions == {10: "rejected", 40: "rejected"}


@pytest.mark.parametrize(("held_ms", "outcome"), [(105, "rejected"), (115, "missed"), (130, "missed")])
def test_a_fault_that_began_after_a_part_was_past_has_not_rejected_it(held_ms, outcome):
    bench = Bench(mode="delay", polarity="reject", delay_ms=100, pulse_ms=20)
    bench.gate.hold(False, LONG_AGO)
    bench.run(140, at=lambda ms: bench.gate.hold(ms >= held_ms, ms * MS))
    bench.gate.plan(1, 0)
    bench.run(150, 140)
    assert bench.decisions == {1: outcome}


def test_what_was_past_when_parts_were_given_up_was_not_rejected_by_that():
    bench = Bench(mode="delay", polarity="reject", delay_ms=100, pulse_ms=20)
    bench.gate.hold(False, LONG_AGO)
    bench.run(140, at=lambda ms: bench.gate.abandon() if ms == 130 else bench.gate.hold(ms > 130, ms * MS))
    bench.gate.plan(1, 0)
    bench.run(150, 140)
    assert bench.decisions == {1: "missed"}


def test_an_edge_that_did_not_get_through_is_given_again_after_a_moment():
    bench = Bench(mode="delay", polarity="reject", delay_ms=0, pulse_ms=500)
    bench.gate.hold(False, LONG_AGO)
    bench.gate.plan(1, 0)
    bench.run(20, at=lambda ms: bench.gate.not_switched(ms * MS) if ms == 10 else None)
    assert bench.edges == [(0, 1, True)]
    bench.run(200, 20)
    assert [(part, active) for _, part, active in bench.edges] == [(1, True), (0, True)]
    assert bench.edges[1][0] == 110


def test_a_passed_part_that_was_seen_too_late_is_not_said_to_have_passed():
    bench = Bench(mode="delay", polarity="accept", delay_ms=0, pulse_ms=10)
    bench.gate.hold(False, LONG_AGO)
    bench.gate.plan(1, 0)
    bench.gate.decide(1, True)
    assert bench.gate.edges(50 * MS) == []
    assert bench.decisions == {1: "rejected"}


def test_after_a_fault_a_rejecting_gate_rejects_until_the_last_part_that_it_may_not_have_seen_is_past():
    bench = Bench(mode="delay", polarity="reject", delay_ms=100, pulse_ms=20)
    levels = bench.run(300, at=lambda ms: bench.gate.hold(ms < 50, ms * MS))
    assert on(levels) == [(0, 50 + 100 + 20)]


def test_what_came_while_nothing_was_inspected_is_rejected_though_parts_from_before_are_still_on_their_way():
    bench = Bench(mode="delay", polarity="reject", delay_ms=100, pulse_ms=20)
    bench.gate.hold(False, LONG_AGO)
    bench.gate.plan(1, 0)
    bench.gate.decide(1, True)
    levels = bench.run(300, at=lambda ms: bench.gate.hold(False, ms * MS, idle=20 <= ms < 40))
    # what was in front of the camera until 40 is there until 160
    assert on(levels) == [(40, 40 + 100 + 20)]
    assert bench.decisions == {1: "rejected"}


def test_unseen_parts_are_rejected_though_inspection_ends_while_they_are_on_their_way():
    bench = Bench(mode="delay", polarity="reject", delay_ms=100, pulse_ms=20)

    def at(ms):
        bench.gate.hold(ms < 50, ms * MS, idle=ms >= 100)
        if ms == 60:
            bench.gate.plan(1, ms * MS)
            bench.gate.decide(1, True)

    levels = bench.run(300, at=at)
    # until 170 for the unseen, then for what the last part leaves, and from its end on nothing is inspected
    assert on(levels) == [(0, 170), (180, 300)]


def test_a_part_that_began_in_a_fault_does_not_pass_when_that_ends_in_front_of_the_gate():
    bench = Bench(mode="delay", polarity="accept", delay_ms=100, pulse_ms=20)
    bench.gate.plan(1, 0)
    bench.gate.decide(1, True)
    assert not any(bench.run(200, at=lambda ms: bench.gate.hold(95 < ms < 110, ms * MS)))
    assert bench.decisions == {1: "rejected"}


def test_after_a_fault_an_accepting_gate_passes_what_had_a_pass_before_it():
    bench = Bench(mode="delay", polarity="accept", delay_ms=100, pulse_ms=20)
    bench.gate.plan(1, 0)
    bench.gate.decide(1, True)
    levels = bench.run(300, at=lambda ms: bench.gate.hold(10 < ms < 50, ms * MS))
    assert on(levels) == [(100, 120)]


@pytest.mark.parametrize("polarity", ["accept", "reject"])
def test_with_an_encoder_the_unseen_parts_are_past_when_the_belt_has_moved_so_far(polarity):
    """The encoder is lost at 100 and is heard again at 200; the belt stands from 230 to 330."""
    bench = Bench(mode="encoder", polarity=polarity, counts=100, pulse_ms=20)
    counts = [*range(1000, 1230), *([1230] * 100), *range(1230, 2000)]

    def at(ms):
        if ms % 5 == 0 and not 100 <= ms < 200:
            bench.gate.encoder.add(ms * MS, counts[ms])
        if ms % 40 == 0:  # in front of the camera all the time, and all good
            bench.gate.plan(ms + 1, ms * MS)
            bench.gate.decide(ms + 1, True)
        if ms == 100:
            bench.gate.abandon()
        bench.gate.hold(100 <= ms < 200, ms * MS)

    levels = bench.run(600, at=at)
    # 100 counts after 200 the belt is at 1300, which is at 400 ms; a pulse later it works again
    rejecting = [level == (polarity == "reject") for level in levels]
    assert all(rejecting[100:418])
    assert not all(rejecting[422:600])


def test_what_was_abandoned_counts_as_rejected_once_and_the_gate_is_held_by_that():
    decided = []
    gate = Gate(
        GateSettings(mode="delay", polarity="accept", delay_ms=100, pulse_ms=20), lambda *each: decided.append(each)
    )
    gate.hold(False, 0)
    for part, captured in ((1, 0), (2, 50)):
        gate.plan(part, captured * MS)
        gate.decide(part, True)
    assert [edge.active for edge in gate.edges(105 * MS)] == [True]  # 1 is in front of it
    gate.abandon()
    gate.decide(2, True)
    gate.abandon()
    assert [edge.active for edge in gate.edges(110 * MS)] == [False]
    assert decided == [(1, "passed"), (2, "rejected")]
    gate.hold(False, 110 * MS)
    gate.plan(3, 115 * MS)
    gate.decide(3, True)
    assert gate.edges(215 * MS) == []
    assert gate.due_ns() == 230 * MS  # when the last part that it may not have seen is past
    assert [edge.active for edge in gate.edges(230 * MS)] == [True]
    gate.hold(True, 231 * MS)  # after a FAULT without that, parts that have a PASS may pass again
    gate.plan(4, 140 * MS)
    gate.decide(4, True)
    gate.hold(False, 239 * MS)
    gate.edges(239 * MS)
    assert [edge.part for edge in gate.edges(240 * MS)] == [4]
    assert decided[-1] == (4, "passed")


def test_a_counter_that_jumps_twice_does_not_shorten_the_wait_for_unseen_parts():
    gate = Gate(GateSettings(mode="encoder", polarity="accept", counts=100, pulse_ms=20))
    position = 0

    def belt(ms):
        nonlocal position
        position += 1
        assert not gate.encoder.add(ms * MS, position)
        return [edge.active for edge in gate.edges(ms * MS)]

    for ms in range(10):
        belt(ms)
    gate.plan(1, 5 * MS)
    gate.abandon()
    gate.hold(False, 10 * MS)
    for ms in range(10, 40):
        belt(ms)
    position = 10_000
    assert gate.encoder.add(40 * MS, position)
    gate.abandon()
    for ms in range(41, 45):
        belt(ms)
    gate.hold(False, 45 * MS)
    gate.plan(2, 45 * MS)
    gate.decide(2, True)
    opened = [ms for ms in range(46, 300) if True in belt(ms)]
    # 2 would be there at 145, and so may be what went past at 45: its pulse of 20 ms is waited for
    assert opened == []


def test_a_pass_that_is_seen_late_opens_the_gate_for_what_is_left_and_a_reject_for_its_whole_pulse():
    for passes, ends_ms in ((True, 120), (False, 135)):
        gate = Gate(GateSettings(mode="delay", polarity="accept", delay_ms=100, pulse_ms=20))
        gate.hold(False, LONG_AGO)
        gate.plan(1, 0)
        gate.decide(1, passes)
        gate.edges(115 * MS)
        assert gate.due_ns() == ends_ms * MS


def test_times_of_the_plc_hold_for_later_parts_and_zero_goes_back_to_the_stations():
    bench = Bench(mode="delay", polarity="accept", delay_ms=100, pulse_ms=20)
    bench.gate.hold(False, LONG_AGO)
    for part, times in ((1, (0, 0)), (2, (200, 30)), (3, (0, 0))):
        bench.gate.set_times(*times)
        bench.gate.plan(part, 300 * (part - 1) * MS)
        bench.gate.decide(part, True)
        bench.run(300 * part, 300 * (part - 1))
    assert bench.edges[::2] == [(100, 1, True), (500, 2, True), (700, 3, True)]
    assert [edge[0] for edge in bench.edges[1::2]] == [120, 530, 720]


def test_ten_thousand_parts_at_random_never_open_the_gate_for_a_part_that_may_not_pass():
    random = np.random.default_rng(5)
    gate = Gate(GateSettings(mode="delay", polarity="accept", delay_ms=40, pulse_ms=6))
    due, passes = {}, {}
    now, level = 0, False
    for part in range(10_000):
        now += int(random.integers(1, 30) * MS)
        while (next_ns := gate.due_ns()) is not None and next_ns <= now:
            level = _step(gate, next_ns, level, due, passes)
        gate.hold(bool(random.random() < 0.1), now)
        gate.plan(part, now)
        due[part] = now + 40 * MS
        passes[part] = bool(random.random() < 0.7)
        if random.random() < 0.95:
            gate.decide(part, passes[part])
        else:
            passes[part] = False
        level = _step(gate, now, level, due, passes)


def _step(gate, now, level, due, passes):
    for edge in gate.edges(now):
        level = edge.active
    in_front = [part for part, at in due.items() if at <= now < at + 6 * MS]
    for part in [part for part, at in due.items() if at + 6 * MS <= now]:
        del due[part]
    assert not level or (in_front and all(passes[part] for part in in_front))
    return level
