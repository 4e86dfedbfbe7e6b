"""The line at its gate: what the link is asked for, and what becomes of parts of which nobody knows where they are."""

import pytest
from line_bench import Bench

from stpm.edge.gate import MS
from stpm.edge.plc import messages as plc


def gated(**settings):
    return Bench(camera__policy="every", gate__mode="delay", gate__delay_ms=100, gate__pulse_ms=20, **settings)


def level_over(bench, ms, at=lambda ms: None):
    """The gate output after each millisecond."""
    levels = []
    for step in range(ms):
        bench.tick(1)
        at(step)
        edges = bench.link.of(plc.Gate)
        levels.append(bool(edges) and edges[-1].active)
    return levels


def test_a_part_without_a_verdict_is_rejected_at_the_gate():
    bench = gated(gate__polarity="reject", parts__deadline_ms=500)
    bench.frame()
    levels = level_over(bench, 150)
    assert levels.index(True) == 99
    assert sum(levels) == 20
    assert bench.line.counts.gates == {"rejected": 1}
    bench.answer(0.1)
    assert bench.link.verdicts == [(1, "PASS")]
    assert bench.journal.outcomes[1][1] == "rejected"


def test_only_a_pass_opens_the_gate():
    bench = gated(gate__polarity="accept")
    bench.frame()
    bench.answer(0.1)
    bench.tick(50)
    bench.frame()
    bench.answer(0.9)
    levels = level_over(bench, 200)
    assert (levels.index(True), sum(levels)) == (49, 20)
    assert bench.journal.outcomes == {1: ("delivered", "passed", True), 2: ("delivered", "rejected", True)}


def test_a_triggered_part_is_before_the_gate_from_its_capture_on():
    bench = Bench(
        camera__trigger="software", plc__port="x", gate__mode="delay", gate__delay_ms=100, gate__polarity="accept"
    )
    bench.trigger()
    bench.tick(8)
    bench.frame(trigger=bench.taken[0], age_ms=1)
    bench.answer(0.1)
    assert level_over(bench, 150).index(True) == 107 - 8 - 1


def test_a_fault_rejects_all_that_is_on_its_way():
    bench = gated(gate__polarity="accept")
    bench.frame()
    bench.answer(0.1)
    bench.line.health.fault("camera", "unplugged")
    assert not any(level_over(bench, 200))
    assert bench.line.counts.gates == {"rejected": 1}


def test_the_line_is_not_finished_while_a_part_is_before_the_gate():
    bench = gated(gate__polarity="accept")
    bench.frame()
    bench.answer(0.1)
    bench.line.stop()
    bench.tick(50)
    assert not bench.line.finished
    bench.tick(60)
    bench.tick(60)
    assert bench.line.finished


@pytest.mark.parametrize(("polarity", "dangerous"), [("reject", True), ("accept", False)])
def test_an_edge_that_was_not_switched_is_a_fault_where_a_part_may_have_passed(polarity, dangerous):
    bench = gated(gate__polarity=polarity)
    bench.line.link_event(plc.Unswitched(1, not dangerous, bench.now, "the cable is cut"), bench.now)
    bench.tick()
    assert bench.line.health.state == "READY"
    bench.line.link_event(plc.Unswitched(1, dangerous, bench.now, "the cable is cut"), bench.now)
    bench.tick()
    assert bench.line.health.state == "FAULT"
    assert bench.line.counts.gates == {"not switched": 2}


def test_a_lost_encoder_rejects_and_is_a_fault_until_it_is_heard():
    bench = Bench(
        camera__policy="every",
        gate__mode="encoder",
        gate__counts=700,
        gate__polarity="accept",
        gate__encoder_timeout_ms=50,
        plc__port="x",
    )
    counts = iter(range(0, 100000, 10))

    def feed(ms):
        bench.line.link_event(plc.Counted(bench.now, next(counts)), bench.now)

    level_over(bench, 5, feed)
    assert bench.line.health.state == "READY"
    bench.frame()
    bench.answer(0.1)
    assert any(level_over(bench, 120, feed))
    bench.frame()
    bench.answer(0.1)
    level_over(bench, 60)
    assert bench.line.health.state == "FAULT"
    assert not any(level_over(bench, 200, feed))
    assert bench.line.health.state == "RUNNING"
    assert bench.line.counts.gates == {"passed": 1, "rejected": 1}


def test_the_gates_edges_carry_the_id_of_the_part():
    bench = Bench(
        camera__trigger="software", plc__port="x", gate__mode="delay", gate__delay_ms=50, gate__polarity="accept"
    )
    bench.trigger(41)
    bench.frame(trigger=bench.taken[0])
    bench.answer(0.1)
    level_over(bench, 150)
    assert bench.link.of(plc.Gate) == [plc.Gate(41, True), plc.Gate(41, False)]


@pytest.mark.parametrize(("polarity", "dangerous"), [("reject", True), ("accept", False)])
@pytest.mark.parametrize(("late_ms", "fault"), [(9, False), (11, True)])
def test_an_edge_that_comes_late_is_a_fault_where_a_part_may_have_passed(polarity, dangerous, late_ms, fault):
    bench = gated(gate__polarity=polarity)
    bench.link.switches = False
    bench.frame()
    bench.answer(0.9 if polarity == "reject" else 0.1)
    level_over(bench, 125)
    for edge in bench.link.of(plc.Gate)[-2:]:
        due_ns = (100 if edge.active else 120) * MS
        bench.line.link_event(plc.Switched(edge.id, edge.active, due_ns + late_ms * MS), bench.now)
        bench.tick()
        state = "FAULT" if fault and (edge.active == dangerous or dangerous) else "RUNNING"
        assert bench.line.health.state == state
    assert bench.line.latency.percentiles()["gate jitter"]


@pytest.mark.parametrize("polarity", ["reject", "accept"])
def test_an_output_that_the_link_has_put_back_is_a_fault_and_works_again_when_somebody_has_looked(polarity):
    bench = gated(gate__polarity=polarity)
    bench.line.link_event(plc.GateReleased(bench.now, "the line was not heard for 200 ms"), bench.now)
    bench.tick()
    assert bench.line.health.state == "FAULT"
    assert "may have passed" in bench.line.health.conditions["gate"].sentence
    level_over(bench, 101)  # a moment later the line says it again
    assert set(level_over(bench, 300)) == ({True} if polarity == "reject" else {False})
    bench.line.clear("somebody", bench.now)
    level_over(bench, 200)
    bench.frame()
    bench.answer(0.9 if polarity == "reject" else 0.1)
    assert sum(level_over(bench, 200)) == 20


def encoder_bench(**settings):
    settings = {"gate__encoder_timeout_ms": 50, **settings}
    return Bench(gate__mode="encoder", gate__counts=700, plc__port="x", **settings)


def count(bench, value):
    bench.line.link_event(plc.Counted(bench.now, value), bench.now)


def test_a_counter_that_was_set_back_is_a_fault_that_rejects_until_somebody_has_looked():
    bench = encoder_bench(camera__policy="every", gate__polarity="accept")
    position = 5000

    def feed(ms):
        nonlocal position
        position += 10
        count(bench, position)

    level_over(bench, 10, feed)
    bench.frame()
    bench.answer(0.1)
    position = 0  # somebody has switched the counter off and on
    assert not any(level_over(bench, 200, feed))
    assert bench.line.health.state == "FAULT"
    assert "ran back" in bench.line.health.conditions["tracking"].sentence
    assert bench.line.counts.gates == {"rejected": 1}
    bench.line.clear("somebody", bench.now)
    level_over(bench, 200, feed)
    bench.frame()
    bench.answer(0.1)
    assert any(level_over(bench, 200, feed))


def test_triggers_while_the_encoder_stands_are_a_fault():
    """A counter card that has died says the same count for ever: no reject would come to its part."""
    bench = encoder_bench(camera__trigger="software", gate__polarity="reject")
    for number in range(1, 5):
        for _ in range(4):
            bench.tick(10)
            count(bench, 100 + 10 * number)
        bench.trigger(number)
        bench.frame(trigger=bench.taken[-1])
        bench.answer()
    assert bench.line.health.state == "RUNNING"
    for number in range(5, 10):  # the count that came with the last one may have been new
        assert bench.line.health.state == ("RUNNING" if number < 9 else "FAULT")
        bench.trigger(number)
        for _ in range(4):
            bench.tick(10)
            count(bench, 140)
    assert "stood still" in bench.line.health.conditions["tracking"].sentence
    assert bench.link.of(plc.Gate)[-1].active


def test_frames_of_a_belt_that_stands_do_not_pile_up_for_ever():
    bench = encoder_bench(camera__policy="every", gate__polarity="accept")
    for _ in range(1001):
        count(bench, 100)
        bench.frame()
        bench.answer()
        bench.tick(10)
    assert bench.line.health.state == "FAULT"
    assert bench.line.counts.gates == {"rejected": 1001}
    assert "more than 1000 parts" in bench.line.health.conditions["tracking"].sentence


@pytest.mark.parametrize("delivered_first", [True, False])
def test_the_last_outcome_of_a_part_is_the_second_of_delivery_and_gate(delivered_first):
    bench = gated(gate__polarity="accept")
    bench.link.delivers = delivered_first
    bench.frame()
    bench.answer(0.1)
    level_over(bench, 150)
    bench.line.link_event(plc.Delivered(1, bench.now), bench.now)
    assert bench.journal.outcomes == {1: ("delivered", "passed", True)}
    assert bench.journal.lasts == [(1, False), (1, True)]


def test_only_the_newest_edge_is_given_again():
    bench = gated(gate__polarity="accept")
    bench.link.switches = False
    bench.frame()
    bench.answer(0.1)
    level_over(bench, 130)
    assert bench.link.of(plc.Gate) == [plc.Gate(1, True), plc.Gate(1, False)]
    bench.line.link_event(plc.Unswitched(1, True, bench.now, "overtaken"), bench.now)
    level_over(bench, 200)
    assert len(bench.link.of(plc.Gate)) == 2
    bench.line.link_event(plc.Unswitched(1, False, bench.now, "no answer"), bench.now)
    level_over(bench, 90)
    assert len(bench.link.of(plc.Gate)) == 2
    level_over(bench, 20)
    assert not bench.link.of(plc.Gate)[2].active


def test_a_part_that_is_known_too_late_to_be_pushed_off_is_a_fault():
    bench = gated(gate__polarity="reject")
    bench.tick(500)
    bench.frame(age_ms=300)
    bench.answer(0.9)
    assert bench.line.counts.gates == {"missed": 1}
    assert "past the gate" in bench.line.health.conditions["gate"].sentence


def test_triggers_that_come_faster_than_counts_are_no_fault():
    bench = encoder_bench(camera__trigger="software", gate__polarity="accept", gate__encoder_timeout_ms=200)
    for step in range(40):
        if step % 4 == 0:
            count(bench, 100 * step)
        bench.tick(45)
        bench.trigger(step + 1)
        bench.frame(trigger=bench.taken[-1])
        bench.answer()
    assert bench.line.health.state == "RUNNING"


def test_the_way_that_the_plc_sets_is_the_one_that_counts_are_compared_with():
    bench = encoder_bench(camera__policy="every", gate__polarity="accept")
    bench.line.link_event(plc.GateTimes(bench.now, 3000, 0), bench.now)
    for value in (0, 2000):  # from a standstill
        count(bench, value)
        bench.tick(20)
    assert bench.line.health.state == "READY"


@pytest.mark.parametrize(("late_ms", "fault"), [(19, False), (21, True)])
def test_an_accepting_gate_that_opens_a_pulse_too_late_is_open_for_another_part(late_ms, fault):
    bench = gated(gate__polarity="accept")
    bench.link.switches = False
    bench.frame()
    bench.answer(0.1)
    level_over(bench, 105)
    bench.line.link_event(plc.Switched(1, True, (100 + late_ms) * MS), bench.now)
    bench.tick()
    assert bench.line.health.faulty == fault


@pytest.mark.parametrize(("polarity", "fault"), [("reject", True), ("accept", False)])
def test_a_camera_that_was_away_is_a_fault_where_uncounted_parts_pass(polarity, fault):
    bench = gated(gate__polarity=polarity)
    bench.frame()
    bench.answer(0.1)
    bench.line.camera_lost("the camera has hung", bench.now)
    bench.tick()
    assert bench.line.health.faulty == fault


def test_a_rejecting_output_is_on_while_nothing_is_inspected():
    bench = gated(gate__polarity="reject", plc__enable=True)
    assert all(level_over(bench, 5))
    bench.line.link_event(plc.Enabled(bench.now, True), bench.now)
    assert all(level_over(bench, 115))  # those that went past before
    bench.frame()
    bench.answer(0.1)
    assert not any(level_over(bench, 50)[6:])
    bench.line.stop()
    levels = level_over(bench, 150)
    assert not any(levels[:68])  # the last part passes
    assert levels[-1]


def test_a_lost_encoder_is_looked_at_where_a_part_may_have_passed():
    bench = encoder_bench(camera__policy="every", gate__polarity="reject")
    for value in range(0, 200, 10):
        count(bench, value)
        bench.tick(10)
    bench.frame()
    bench.answer(0.9)
    bench.tick(60)
    bench.tick(10)  # nothing waits any more
    count(bench, 260)
    bench.tick(10)
    assert bench.line.health.state == "FAULT"
    assert "encoder" in bench.line.health.conditions
    bench.line.clear("somebody", bench.now)
    bench.tick()
    assert bench.line.health.state == "RUNNING"


def test_after_the_last_part_nothing_passes_though_its_verdict_is_still_awaited():
    bench = gated(gate__polarity="reject", parts__limit=1, parts__deadline_ms=500)
    bench.frame()
    levels = level_over(bench, 300)  # the verdict comes after its place in front of the gate
    assert all(levels[100:])


@pytest.mark.parametrize(
    ("between", "after_ms", "fault"),
    [("nothing", 22, False), ("a reject", 22, True), ("a FAULT", 22, True), ("a reject", 15, True)],
)
def test_an_edge_that_was_overtaken_is_a_fault_only_where_something_was_to_be_rejected(between, after_ms, fault):
    """Two passed parts follow each other closely, with nothing, a rejected part or a FAULT between them."""
    bench = gated(gate__polarity="accept")
    bench.link.switches = False
    for ms, score in ((0, 0.1), (after_ms, 0.9), (after_ms + 22, 0.1)):
        bench.tick(ms - bench.ms)
        if between == "a reject" or score < 0.5:
            bench.frame()
            bench.answer(score)

    def stumble(ms):
        if between == "a FAULT" and bench.ms == 125:
            bench.line.health.fault("camera", "away")
        else:
            bench.line.health.settle("camera")

    level_over(bench, 110, stumble)
    edges = bench.link.of(plc.Gate)
    assert [edge.active for edge in edges] == [True, False, True]
    bench.line.link_event(plc.Unswitched(edges[1].id, False, bench.now, "overtaken by a later edge"), bench.now)
    bench.tick()
    assert bench.line.health.faulty == fault


def test_the_newest_edge_that_was_not_switched_is_a_fault_though_nothing_is_to_be_rejected_yet():
    """The output stays on, and the next part finds it so."""
    bench = gated(gate__polarity="accept")
    bench.link.switches = False
    bench.frame()
    bench.answer(0.1)
    level_over(bench, 130)
    bench.line.link_event(plc.Unswitched(1, False, bench.now, "no answer"), bench.now)
    bench.tick()
    assert bench.line.health.faulty


def test_a_reject_that_ends_late_is_no_fault():
    bench = gated(gate__polarity="reject")
    bench.link.switches = False
    bench.frame()
    bench.answer(0.9)
    level_over(bench, 125)
    for active, at_ms in ((True, 100), (False, 120 + 30)):
        bench.line.link_event(plc.Switched(1, active, at_ms * MS), bench.now)
    bench.tick()
    assert not bench.line.health.faulty


def test_an_encoder_need_not_say_anything_before_the_line_is_ready():
    bench = encoder_bench(gate__polarity="accept")
    count(bench, 0)
    bench.tick()
    bench.line.health.phase = "SELF_TEST"
    bench.tick(60)
    assert "encoder" not in bench.line.health.conditions
    bench.line.health.phase = "READY"
    bench.tick()
    assert "encoder" in bench.line.health.conditions


def test_an_edge_of_no_part_that_was_asked_for_before_is_given_again_like_any_other():
    bench = gated(gate__polarity="reject")
    bench.link.switches = False
    bench.link.posted.clear()
    for ms in range(300):
        if ms in (10, 200):
            bench.line.health.fault("camera", "away")
        elif ms == 20:
            bench.line.health.settle("camera")
        bench.tick(1)
    edges = [(edge.id, edge.active) for edge in bench.link.of(plc.Gate)]
    assert edges == [(0, True), (0, False), (0, True)]
    bench.line.link_event(plc.Unswitched(0, True, bench.now, "no answer"), bench.now)
    bench.tick(99)
    assert len(bench.link.of(plc.Gate)) == 3
    bench.tick(1)
    assert bench.link.of(plc.Gate)[3:] == [plc.Gate(0, True)]


def test_a_counter_may_begin_anew_before_the_line_is_ready():
    bench = encoder_bench(gate__polarity="accept")
    bench.line.health.phase = "BOOT"
    for value in (123_456, 0):
        count(bench, value)
        bench.tick(10)
    bench.line.health.phase = "READY"
    bench.tick()
    assert bench.line.health.state == "READY"
