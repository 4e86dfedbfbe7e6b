"""The line: every part gets exactly one outcome, whatever happens. No process and no clock: time is a number."""

import msgspec
import numpy as np
import pytest
from line_bench import KNOWN, THRESHOLD, Bench

from stpm.edge.gate import MS
from stpm.edge.plc import messages as plc

# --- free run


def test_a_frame_is_a_part_and_the_score_decides():
    bench = Bench(camera__policy="every")
    for score in (0.1, 0.9, 0.5, float("nan")):
        bench.frame()
        bench.answer(score)
    assert bench.link.verdicts == [(1, "PASS"), (2, "FAIL"), (3, "PASS"), (4, "UNKNOWN")]
    assert bench.settled().verdicts == {"PASS": 2, "FAIL": 1, "UNKNOWN": 1}
    assert bench.journal.outcomes[1] == ("delivered", "", True)


def test_latest_keeps_the_newest_frame_and_counts_the_others():
    bench = Bench()
    for _ in range(4):
        bench.frame()
    bench.answer()
    bench.answer()
    assert bench.link.verdicts == [(1, "PASS"), (2, "PASS")]
    assert bench.settled().dropped == {"a newer frame came": 2}


def test_every_keeps_all_in_order_and_an_overrun_is_a_reject_that_is_told():
    bench = Bench(camera__policy="every", parts__queue=2)
    for _ in range(4):
        bench.frame()
    bench.tick()
    assert bench.link.verdicts == [(4, "UNKNOWN")]
    assert "overrun" in bench.journal.parts[0][2]
    assert bench.link.states[-1] == "DEGRADED"
    for _ in range(3):
        bench.answer()
    assert bench.link.verdicts[1:] == [(1, "PASS"), (2, "PASS"), (3, "PASS")]
    bench.settled()
    bench.line.clear("somebody", bench.now)
    bench.tick()
    assert bench.link.states[-1] == "RUNNING"


@pytest.mark.parametrize("problem", ["damaged", "the camera is frozen"])
def test_a_frame_with_a_problem_never_reaches_the_engine(problem):
    bench = Bench()
    bench.frame(problem=problem)
    assert not bench.engines.asked
    assert bench.link.verdicts == [(1, "UNKNOWN")]
    assert bench.journal.parts[0][2] == problem
    bench.settled()


def test_a_failed_inspection_is_a_reject_and_the_next_part_is_judged():
    bench = Bench()
    bench.frame()
    bench.fail("out of memory")
    bench.frame()
    bench.answer()
    assert bench.link.verdicts == [(1, "UNKNOWN"), (2, "PASS")]
    assert bench.journal.parts[0][2] == "out of memory"
    bench.settled()


def test_no_verdict_in_time_is_a_reject_and_what_comes_later_changes_nothing():
    bench = Bench(camera__policy="every", parts__deadline_ms=100)
    bench.frame()
    bench.frame()
    bench.tick(101)
    assert bench.link.verdicts == [(1, "UNKNOWN"), (2, "UNKNOWN")]
    assert bench.line.counts.late == 2
    bench.answer(0.1)
    assert bench.link.verdicts == [(1, "UNKNOWN"), (2, "UNKNOWN")]
    assert not bench.engines.asked
    bench.settled()


def test_a_verdict_that_comes_just_after_the_deadline_is_late_even_if_nobody_looked_before():
    bench = Bench(parts__deadline_ms=100)
    bench.frame()
    bench.ms += 101
    bench.answer(0.1)
    assert bench.link.verdicts == [(1, "UNKNOWN")]


def test_the_slot_of_a_late_part_is_not_lent_while_the_engine_reads_it():
    bench = Bench(parts__deadline_ms=100)
    bench.journal.lends = True
    bench.frame()
    bench.tick(101)
    assert len(bench.free) == 99
    bench.answer()
    bench.settled()


def test_a_lent_slot_is_not_given_back_by_the_line():
    bench = Bench()
    bench.journal.lends = True
    bench.frame()
    bench.answer(0.9)
    assert len(bench.free) == 99


def test_a_dead_engine_rejects_its_part_and_later_ones_wait_for_another_until_their_deadline():
    bench = Bench(camera__policy="every", parts__deadline_ms=100)
    bench.frame()
    bench.engines.there.clear()
    bench.line.engine_lost(bench.engines.asked.pop(1).part, "the engine has died", bench.now)
    bench.frame()
    bench.tick(50)
    bench.frame()
    assert bench.link.verdicts == [(1, "UNKNOWN")]
    bench.tick(51)
    assert bench.link.verdicts == [(1, "UNKNOWN"), (2, "UNKNOWN")]
    bench.engines.there.add(1)
    bench.tick()
    bench.answer()
    assert bench.link.verdicts[2:] == [(3, "PASS")]
    bench.settled()


def test_frames_that_the_device_lost_are_rejected_parts_and_a_fault_until_somebody_has_looked():
    bench = Bench(camera__policy="every")
    bench.frame()
    bench.answer()
    bench.frame(missed=2)
    bench.answer()
    assert bench.link.verdicts == [(1, "PASS"), (2, "UNKNOWN"), (3, "UNKNOWN"), (4, "PASS")]
    assert bench.link.states[-1] == "FAULT"
    counts = bench.settled()
    assert (counts.captured, counts.without_frame) == (2, 2)
    bench.line.link_event(plc.ClearAsked(bench.now), bench.now)
    bench.tick()
    assert bench.link.states[-1] == "RUNNING"
    assert ("operator", "the PLC cleared missed") in bench.journal.events


def test_frames_that_were_captured_and_never_announced_are_counted():
    bench = Bench(camera__policy="every")
    bench.frame()
    bench.answer()
    bench.frame(lost=2)
    bench.answer()
    counts = bench.settled()
    assert counts.captured == 4
    assert counts.dropped == {"lost in the camera": 2}
    assert [verdict for _, verdict in bench.link.verdicts] == ["PASS", "UNKNOWN", "UNKNOWN", "PASS"]


def test_a_camera_that_begins_again_counts_from_one():
    bench = Bench(camera__policy="every")
    bench.frame()
    bench.answer()
    bench.line.camera_lost("unplugged", bench.now)
    bench.number = 0
    bench.frame()
    bench.answer()
    assert bench.link.verdicts == [(1, "PASS"), (2, "PASS")]
    assert bench.settled().captured == 2


@pytest.mark.parametrize(
    ("settings", "recorded", "fault"),
    [
        ({"camera__policy": "every"}, False, True),
        ({"camera__policy": "latest"}, False, False),
        ({"camera__policy": "every"}, True, False),
        ({"camera__policy": "every", "camera__trigger": "software", "plc__port": "x"}, False, False),
        ({"camera__policy": "every", "gate__mode": "delay", "gate__delay_ms": 100}, False, False),
    ],
)
def test_parts_that_nobody_counted_while_the_camera_was_away_are_a_fault_where_the_plc_counts_too(
    settings, recorded, fault
):
    bench = Bench(recorded, **settings)
    bench.frame()
    bench.answer()
    bench.line.camera_lost("the camera has hung", bench.now)
    bench.tick()
    assert (bench.link.states[-1] == "FAULT") == fault
    assert ("missed" in bench.line.health.conditions) == fault


@pytest.mark.parametrize(("phase", "fault"), [("SELF_TEST", False), ("READY", True)])
def test_parts_count_from_ready_on(phase, fault):
    bench = Bench(camera__policy="every")
    bench.line.health.phase = phase
    bench.line.camera_lost("the camera has hung", bench.now)
    assert bench.line.health.faulty == fault


def test_a_device_that_says_it_lost_thousands_of_frames_does_not_become_thousands_of_records():
    bench = Bench(camera__policy="every")
    bench.frame()
    bench.answer()
    bench.frame(missed=5000)
    bench.answer()
    assert bench.link.verdicts == [(1, "PASS"), (5002, "PASS")]
    assert bench.link.states[-1] == "FAULT"
    assert "5000 frames" in bench.line.health.conditions["missed"].sentence
    bench.settled()


@pytest.mark.parametrize("policy", ["latest", "every"])
def test_a_frame_of_another_size_than_the_bundles_photos_is_not_judged(policy):
    bench = Bench(camera__policy=policy)
    bench.frame(size=(128, 96))
    assert bench.engines.asked == {}
    bench.tick()
    assert bench.link.states[-1] == "DEGRADED"
    assert bench.link.of(plc.State)[-1].reason == "size"
    assert bench.journal.parts[0][1:] == (
        "UNKNOWN",
        "the frame has 128×96 pixels and the bundle was built from photos of 64×48",
    )
    bench.frame()
    bench.answer()
    assert bench.link.verdicts == [(1, "UNKNOWN"), (2, "PASS")]
    assert bench.link.states[-1] == "RUNNING"
    bench.settled()


def test_a_line_that_only_simulates_takes_frames_of_any_size():
    bench = Bench()
    bench.line.health.simulated = True
    bench.frame(size=(128, 96))
    bench.answer()
    assert bench.link.verdicts == [(1, "PASS")]


def test_frames_before_ready_are_no_parts_and_are_counted_with_those_that_were_not_announced():
    bench = Bench(camera__policy="every")
    bench.line.health.phase = "SELF_TEST"
    bench.frame(lost=2)
    bench.line.health.phase = "READY"
    bench.frame()
    bench.answer()
    assert bench.link.verdicts == [(1, "PASS")]
    assert bench.settled().dropped == {"before READY": 3}


def test_the_next_thing_that_is_due_is_a_deadline_a_beat_or_the_gate():
    gate = {"gate__mode": "delay", "gate__delay_ms": 100, "gate__pulse_ms": 20}
    bench = Bench(camera__policy="every", parts__deadline_ms=80, plc__heartbeat_s=0.3, **gate)
    assert bench.line.due_ns() == 300 * MS
    bench.ms = 10
    bench.frame()
    assert bench.line.due_ns() == 90 * MS + 1
    bench.answer(0.9)
    assert bench.line.due_ns() == 110 * MS


def test_the_limit_ends_the_run_after_exactly_so_many_parts():
    bench = Bench(camera__policy="every", parts__limit=2)
    for _ in range(4):
        bench.frame()
    bench.answer()
    assert not bench.line.finished
    bench.answer()
    assert bench.line.finished
    assert bench.settled().dropped == {"after the last part": 2}


def test_a_recording_is_asked_for_one_frame_at_a_time():
    bench = Bench(recorded=True)
    assert bench.taken == [0]
    bench.tick()
    assert bench.taken == [0]
    bench.frame(trigger=0)
    bench.tick()
    assert bench.taken == [0]
    bench.answer()
    assert bench.taken == [0, 0]
    bench.line.ended = True
    bench.tick()
    assert bench.line.finished


def test_stopping_judges_what_has_begun_and_drops_what_has_not():
    bench = Bench()
    bench.frame()
    bench.frame()
    bench.line.stop()
    assert not bench.line.finished
    bench.answer()
    assert bench.line.finished
    assert bench.settled().dropped == {"stopped": 1}


# --- triggers


def triggered(**settings):
    return Bench(camera__trigger="software", plc__port="x", **settings)


def test_a_trigger_takes_a_picture_and_its_id_goes_all_the_way():
    bench = triggered()
    bench.trigger(41)
    bench.trigger(42)
    assert len(bench.taken) == 2
    bench.frame(trigger=bench.taken[0])
    bench.answer()
    bench.frame(trigger=bench.taken[1])
    bench.answer(0.9)
    assert bench.link.verdicts == [(41, "PASS"), (42, "FAIL")]
    bench.settled()


def test_a_trigger_without_a_frame_is_a_reject_at_its_deadline():
    bench = triggered(parts__deadline_ms=100)
    bench.trigger()
    bench.tick(101)
    assert bench.link.verdicts == [(1, "UNKNOWN")]
    assert "no frame within 100 ms" in bench.journal.parts[0][2]
    assert bench.settled().without_frame == 1


def test_the_deadline_runs_from_the_trigger_and_a_late_frame_does_not_prolong_it():
    bench = triggered(parts__deadline_ms=100)
    bench.trigger()
    bench.tick(90)
    bench.frame(trigger=bench.taken[0], age_ms=60)
    bench.tick(11)
    assert bench.link.verdicts == [(1, "UNKNOWN")]
    bench.answer(0.1)
    assert bench.link.of(plc.Part)[0].expires_ns == 1000 * MS
    bench.settled()


def test_a_frame_after_its_deadline_is_dropped_and_not_taken_for_another_part():
    bench = triggered(parts__deadline_ms=100)
    bench.trigger()
    bench.tick(101)
    bench.trigger()
    bench.frame(trigger=bench.taken[0])
    assert not bench.engines.asked
    bench.frame(trigger=bench.taken[1])
    bench.answer()
    assert bench.link.verdicts == [(1, "UNKNOWN"), (2, "PASS")]
    assert bench.settled().dropped == {"came after the deadline of its part": 1}


def test_a_trigger_while_the_camera_is_away_is_a_reject_at_once():
    bench = triggered()
    bench.camera_there = False
    bench.trigger()
    assert bench.link.verdicts == [(1, "UNKNOWN")]
    bench.settled()


def test_parts_that_wait_for_a_camera_that_dies_are_rejected_at_once():
    bench = triggered()
    bench.trigger()
    bench.trigger()
    bench.line.camera_lost("unplugged", bench.now)
    assert bench.link.verdicts == [(1, "UNKNOWN"), (2, "UNKNOWN")]
    assert bench.journal.parts[0][2] == "unplugged"
    bench.settled()


def test_a_gap_in_the_plcs_numbers_rejects_the_missing_parts_and_is_a_fault():
    bench = triggered()
    for number in (5, 8):
        bench.trigger(number)
        bench.frame(trigger=bench.taken[-1])
        bench.answer()
    assert sorted(bench.link.verdicts) == [(5, "PASS"), (6, "UNKNOWN"), (7, "UNKNOWN"), (8, "PASS")]
    assert bench.link.states[-1] == "FAULT"
    assert bench.line.health.code == 7
    bench.settled()


def test_a_number_that_comes_twice_is_one_part():
    bench = triggered()
    bench.trigger(5)
    bench.trigger(5)
    assert len(bench.taken) == 1
    assert bench.line.counts.garbage == 1


@pytest.mark.parametrize("restart", [1, 5000])
def test_a_plc_that_counts_anew_costs_no_parts(restart):
    bench = triggered()
    for number in (50, restart):
        bench.trigger(number)
        bench.frame(trigger=bench.taken[-1])
        bench.answer()
    assert bench.link.verdicts == [(50, "PASS"), (restart, "PASS")]
    # a jump ahead may be a PLC that counts anew, or a minute without a link: somebody must look
    assert bench.link.states[-1] == ("RUNNING" if restart == 1 else "FAULT")
    assert any("counts its triggers from" in text for _, text in bench.journal.events)


@pytest.mark.parametrize(("number", "lost", "fault"), [(None, True, True), (None, False, False), (5, True, False)])
def test_a_damaged_line_may_have_been_a_trigger_and_is_a_fault_where_no_number_will_tell(number, lost, fault):
    bench = triggered()
    bench.trigger(number)
    bench.frame(trigger=bench.taken[-1])
    bench.answer()
    bench.line.link_event(plc.Garbage(bench.now, "3 damaged lines", lost=lost, count=3), bench.now)
    bench.tick()
    assert (bench.link.states[-1] == "FAULT") == fault
    assert bench.line.counts.garbage == 3


@pytest.mark.parametrize(
    ("phase", "number", "fault"),
    [("READY", None, True), ("READY", 7, True), ("READY", 1, False), ("BOOT", None, False)],
)
def test_the_first_trigger_may_be_the_one_that_was_lost(phase, number, fault):
    bench = triggered()
    bench.line.health.phase = phase
    bench.line.link_event(plc.Garbage(bench.now, "a damaged line", lost=True), bench.now)
    bench.line.health.phase = "READY"
    bench.tick()
    assert bench.link.states[-1] == "READY"
    bench.trigger(number)
    bench.tick()
    assert (bench.link.states[-1] == "FAULT") == fault


def test_a_number_tells_that_the_damaged_line_before_it_was_no_trigger():
    bench = triggered()
    bench.line.link_event(plc.Garbage(bench.now, "a damaged line", lost=True), bench.now)
    for number in (1, None):
        bench.trigger(number)
        bench.tick()
        assert not bench.line.health.faulty


@pytest.mark.parametrize(("number", "fault"), [(51, False), (1, True), (7, True)])
def test_a_plc_that_counts_anew_does_not_tell_whether_a_trigger_was_lost_before(number, fault):
    bench = triggered()
    bench.trigger(50)
    bench.line.link_event(plc.Garbage(bench.now, "a damaged line", lost=True), bench.now)
    bench.trigger(50)  # says nothing of it
    bench.trigger(number)
    assert bench.line.health.faulty == fault


def test_noise_is_in_the_journal_once_a_second():
    bench = triggered()
    for _ in range(50):
        bench.line.link_event(plc.Garbage(bench.now, "noise", lost=True), bench.now)
        bench.tick(50)
    assert sum(kind == "plc" for kind, _ in bench.journal.events) == 3
    assert bench.line.counts.garbage == 50


def test_a_trigger_without_a_number_that_is_ignored_shifts_all_later_ones():
    bench = triggered(plc__enable=True)
    bench.trigger()
    bench.tick()
    assert bench.link.states[-1] == "FAULT"
    bench = triggered(plc__enable=True)
    bench.trigger(4)
    bench.tick()
    assert bench.link.states[-1] == "READY"


def test_a_trigger_that_means_nothing_here_shifts_none():
    for bench in (Bench(camera__policy="every"), triggered()):
        bench.line.stop()
        bench.trigger()
        bench.tick()
        assert bench.line.counts.garbage == 1
        assert not bench.line.health.faulty
    bench = Bench(camera__policy="every")
    bench.trigger()
    assert not bench.line.health.faulty


@pytest.mark.parametrize(("waited_ms", "verdict"), [(49, "PASS"), (51, "UNKNOWN")])
def test_a_picture_long_after_its_trigger_may_show_another_part(waited_ms, verdict):
    bench = triggered(parts__deadline_ms=100)
    bench.trigger(1)
    bench.tick(waited_ms)
    bench.frame(trigger=bench.taken[-1])
    if bench.engines.asked:
        bench.answer(0.1)
    assert bench.link.verdicts == [(1, verdict)]
    bench.settled()


def test_a_picture_taken_after_the_next_trigger_may_show_that_part():
    bench = triggered()
    bench.trigger(1)
    bench.tick(100)
    bench.trigger(2)
    bench.tick(5)
    bench.frame(trigger=1)
    bench.tick(3)
    bench.frame(trigger=2)
    bench.answer()
    assert bench.link.verdicts == [(1, "UNKNOWN"), (2, "PASS")]
    assert "after the trigger of part 2" in bench.journal.parts[0][2]
    bench.settled()


@pytest.mark.parametrize(("age_ms", "verdicts"), [(3, [(1, "UNKNOWN")]), (20, [(1, "PASS")])])
def test_a_trigger_that_is_heard_after_a_picture_was_taken_before_it(age_ms, verdicts):
    """The next part's trigger is 10 ms old when it is heard; the picture of the part before came meanwhile."""
    bench = triggered(
        gate__mode="delay", gate__delay_ms=300, gate__pulse_ms=20, gate__polarity="reject", plc__peer_timeout_s=0
    )
    bench.trigger(1)
    bench.tick(100)
    bench.frame(trigger=1, age_ms=age_ms)
    bench.line.link_event(plc.Triggered(bench.now - 10 * MS, 2), bench.now)
    bench.answer()
    assert bench.link.verdicts == verdicts
    bench.frame(trigger=2)
    bench.answer()
    assert bench.link.verdicts == [*verdicts, (2, "PASS")]
    for _ in range(500):
        bench.tick(1)
    # the one that is not known is rejected where it was triggered, and does not take the other with it
    gates = [bench.journal.outcomes[part][1] for part in (1, 2)]
    assert gates == ["rejected" if verdicts[0][1] == "UNKNOWN" else "passed", "passed"]
    bench.settled()


def test_the_pictures_of_a_recording_show_no_other_part():
    bench = triggered(recorded=True)
    bench.trigger(1)
    bench.tick(20)
    bench.trigger(2)
    bench.tick(5)
    bench.frame(trigger=1)
    bench.answer()
    bench.frame(trigger=2)
    bench.answer()
    assert bench.link.verdicts == [(1, "PASS"), (2, "PASS")]
    bench.settled()


@pytest.mark.parametrize(
    ("protocol", "number", "state"),
    [("modbus-master", None, "FAULT"), ("modbus-master", 1, "RUNNING"), ("ascii", None, "RUNNING")],
)
def test_triggers_without_numbers_may_be_lost_while_the_link_is_down(protocol, number, state):
    bench = triggered(plc__protocol=protocol)
    bench.trigger(number)
    bench.frame(trigger=1)
    bench.answer()
    bench.line.link_event(plc.Disconnected(bench.now, "the PLC does not answer"), bench.now)
    bench.line.link_event(plc.Connected(bench.now), bench.now)
    bench.tick()
    assert bench.line.health.state == state


def test_numbered_triggers_that_were_ignored_are_no_gap():
    bench = triggered(plc__enable=True)
    for on, numbers in ((True, [100]), (False, [101, 102]), (True, [103])):
        bench.line.link_event(plc.Enabled(bench.now, on), bench.now)
        for number in numbers:
            bench.trigger(number)
        if on:
            bench.frame(trigger=bench.taken[-1])
            bench.answer()
    assert bench.link.verdicts == [(100, "PASS"), (103, "PASS")]
    assert bench.line.health.state == "RUNNING"


def test_a_gap_that_is_seen_while_inspection_is_off_may_be_from_before():
    bench = triggered(plc__enable=True)
    bench.line.link_event(plc.Enabled(bench.now, True), bench.now)
    bench.trigger(100)
    bench.line.link_event(plc.Enabled(bench.now, False), bench.now)
    bench.trigger(101)
    assert not bench.line.health.faulty
    bench.trigger(103)
    assert "triggers 102 to 102 never came" in bench.line.health.conditions["missed"].sentence


def test_a_number_that_was_ignored_and_comes_again_is_a_part():
    bench = triggered(plc__enable=True)
    bench.trigger(7)
    bench.line.link_event(plc.Enabled(bench.now, True), bench.now)
    bench.trigger(7)
    bench.trigger(7)
    assert len(bench.taken) == 1
    assert not bench.line.health.faulty
    assert not any("counts its triggers" in text for _, text in bench.journal.events)


def test_a_camera_that_goes_after_the_last_part_is_no_fault():
    bench = Bench(camera__policy="every")
    bench.line.stop()
    bench.line.camera_lost("unplugged", bench.now)
    assert not bench.line.health.faulty


def test_what_is_open_when_missed_is_cleared_gets_its_outcome_before_that():
    bench = triggered()
    bench.trigger()
    bench.frame(trigger=bench.taken[-1])
    bench.line.link_event(plc.Garbage(bench.now, "a damaged line", lost=True), bench.now)
    bench.tick()
    bench.line.link_event(plc.ClearAsked(bench.now), bench.now)
    bench.tick()
    assert bench.link.verdicts == [(1, "UNKNOWN")]
    order = [type(message).__name__ for message in bench.link.posted if not isinstance(message, plc.Beat)]
    assert order[-2:] == ["Part", "State"]
    bench.answer(0.1)  # changes nothing any more
    assert bench.link.verdicts == [(1, "UNKNOWN")]
    bench.settled()


def test_a_part_that_is_open_when_something_else_is_cleared_keeps_its_verdict():
    bench = triggered()
    bench.trigger()
    bench.frame(trigger=bench.taken[-1])
    bench.line.health.fault("gate", "a part may have passed", 7, latched=True)
    bench.line.clear("somebody", bench.now)
    bench.answer(0.1)
    assert bench.link.verdicts == [(1, "PASS")]


def test_triggers_are_ignored_and_told_while_they_mean_nothing():
    bench = Bench()
    bench.trigger()
    bench = triggered(plc__enable=True)
    bench.trigger()
    assert bench.taken == []
    assert any("not enabled" in text for _, text in bench.journal.events)
    assert not bench.link.of(plc.State)[-1].enabled
    bench.line.link_event(plc.Enabled(bench.now, True), bench.now)
    bench.line.clear("somebody", bench.now)
    bench.tick()
    assert bench.link.of(plc.State)[-1].enabled
    bench.trigger()
    assert len(bench.taken) == 1


def test_frames_of_a_line_that_is_not_enabled_are_dropped_and_counted():
    bench = Bench(plc__enable=True, camera__policy="every")
    bench.frame()
    assert bench.settled().dropped == {"not enabled": 1}
    assert bench.line.health.phase == "READY"


# --- recipes


def test_a_part_is_judged_by_the_recipe_of_its_time():
    bench = triggered(camera__policy="every")
    bench.trigger()
    bench.engines.active = 2
    bench.trigger()
    for key in bench.taken:
        bench.frame(trigger=key)
    assert set(bench.engines.asked) == {1, 2}
    bench.answer(0.1, recipe=2)
    bench.answer(0.1, recipe=1)
    assert [part.id for part in bench.link.of(plc.Part)] == [2, 1]  # the one asked of recipe 2 first
    bench.settled()


def test_a_part_that_waited_while_its_bundle_was_replaced_is_judged_by_the_threshold_of_its_engine():
    bench = Bench(camera__policy="every")
    bench.frame()
    bench.frame()
    bench.engines.bundles[1] = msgspec.structs.replace(KNOWN, threshold=0.05, sha256="b" * 64)
    bench.answer(0.1)
    bench.answer(0.1)
    assert bench.link.verdicts == [(1, "PASS"), (2, "FAIL")]
    assert [part.threshold for part in bench.link.of(plc.Part)] == [THRESHOLD, 0.05]


# --- link


def test_a_verdict_that_is_not_delivered_is_counted_and_alarmed():
    bench = Bench()
    bench.link.delivers = False
    bench.frame()
    bench.answer(0.9)
    bench.line.link_event(plc.Undelivered(1, bench.now, "the cable is cut"), bench.now)
    assert bench.line.counts.undelivered == 1
    assert bench.journal.outcomes[1][0] == "undelivered"
    assert any(kind == "alarm" and "part 1" in text for kind, text in bench.journal.events)
    bench.settled()


def test_a_verdict_that_must_be_acknowledged_is_open_until_it_is():
    bench = Bench(plc__acknowledge=True)
    bench.link.delivers = False
    bench.frame()
    bench.answer()
    bench.line.stop()
    bench.tick()
    assert not bench.line.finished
    bench.line.link_event(plc.Acknowledged(1, bench.now), bench.now)
    assert bench.line.finished
    assert bench.journal.outcomes[1] == ("acknowledged", "", True)


def test_what_the_link_never_answered_is_undelivered_at_the_end():
    bench = Bench()
    bench.link.delivers = False
    bench.frame()
    bench.answer()
    bench.line.close(bench.now)
    assert bench.line.counts.undelivered == 1


def test_a_broken_link_is_a_fault_until_it_is_back():
    bench = Bench()
    bench.line.link_event(plc.Disconnected(bench.now, "unplugged"), bench.now)
    bench.tick()
    assert bench.link.states[-1] == "FAULT"
    bench.line.link_event(plc.Connected(bench.now), bench.now)
    bench.tick()
    assert bench.link.states[-1] == "READY"


def test_a_plc_that_stops_beating_is_a_fault():
    bench = Bench(plc__peer_timeout_s=1.0)
    bench.tick(900)
    bench.line.link_event(plc.PeerBeat(bench.now), bench.now)
    bench.tick(900)
    assert bench.link.states[-1] == "READY"
    bench.tick(200)
    assert bench.link.states[-1] == "FAULT"
    bench.line.link_event(plc.PeerBeat(bench.now), bench.now)
    bench.tick()
    assert bench.link.states[-1] == "READY"


def test_beats_come_at_their_interval_and_only_from_a_line_that_works():
    bench = Bench(plc__heartbeat_s=0.1)
    for _ in range(100):
        bench.tick(10)
    assert 10 <= len(bench.link.of(plc.Beat)) <= 11


def test_rejects_in_a_row_are_an_alarm_that_a_pass_ends():
    bench = Bench(parts__alarm_after=3)
    for score in (0.9, 0.9, 0.9):
        bench.frame()
        bench.answer(score)
    assert bench.link.states[-1] == "DEGRADED"
    assert ("alarm", "3 parts in a row were rejected") in bench.journal.events
    bench.frame()
    bench.answer(0.1)
    assert bench.link.states[-1] == "RUNNING"


def test_parts_that_are_open_when_the_line_is_closed_get_their_outcome():
    bench = triggered(camera__policy="every")
    for _ in range(3):
        bench.trigger()
    for key in bench.taken[:2]:
        bench.frame(trigger=key)
    bench.line.close(bench.now)
    counts = bench.line.counts
    assert counts.balanced
    assert counts.verdicts == {"UNKNOWN": 3}
    assert counts.undelivered == 3


def test_a_trigger_after_the_last_part_is_ignored():
    bench = triggered(parts__limit=1)
    bench.trigger()
    bench.trigger()
    assert len(bench.taken) == 1


def test_an_answer_after_the_deadline_is_late_once():
    bench = Bench(parts__deadline_ms=100)
    bench.frame()
    bench.tick(101)
    bench.answer(0.1)
    assert bench.line.counts.late == 1


# --- everything at once


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("mode", ["latest", "every", "software"])
def test_the_books_balance_whatever_happens(seed, mode):
    """500 random happenings; then all is let run out: one outcome for each part, and no PASS that no score gave."""
    random = np.random.default_rng((seed, len(mode)))
    settings = {"camera__trigger": "software", "plc__port": "x"} if mode == "software" else {"camera__policy": mode}
    bench = Bench(parts__deadline_ms=30, parts__queue=3, **settings)
    bench.journal.lends = False
    good = set()
    number = 0
    for _ in range(500):
        bench.tick(int(random.integers(0, 12)))
        match int(random.integers(0, 12)):
            case 0 | 1 | 2 if mode == "software":
                number += 1 + int(random.random() < 0.05) * 2
                bench.trigger(number)
            case 0 | 1 | 2:
                bench.frame(
                    problem="damaged" if random.random() < 0.1 else "",
                    missed=int(random.random() < 0.05) * 2,
                    lost=int(random.random() < 0.05),
                    with_slot=True,
                )
            case 3 | 4 if mode == "software" and bench.taken:
                bench.frame(trigger=bench.taken.pop(int(random.integers(len(bench.taken)))))
            case 5 | 6 | 7 if 1 in bench.engines.asked:
                score = float(random.choice([0.1, 0.9]))
                part = bench.engines.asked[1].part
                late = bench.now - bench.line._asked[part].began_ns > 30 * MS
                if score < THRESHOLD and not late and bench.line._asked[part].verdict is None:
                    good.add(bench.line._asked[part].id)
                bench.answer(score)
            case 8 if 1 in bench.engines.asked and random.random() < 0.3:
                bench.fail()
            case 9 if random.random() < 0.2:
                if 1 in bench.engines.asked:
                    bench.line.engine_lost(bench.engines.asked.pop(1).part, "died", bench.now)
                bench.engines.there = bench.engines.there ^ {1}
            case 10 if random.random() < 0.1:
                bench.line.camera_lost("unplugged", bench.now)
                bench.number = 0
                bench.taken.clear()
    bench.engines.there.add(1)
    bench.line.stop()
    for _ in range(100):
        bench.tick(10)
        if 1 in bench.engines.asked:
            bench.answer(0.9)
    assert bench.line.finished
    counts = bench.settled()
    assert counts.judged > 20
    assert {id for id, verdict in bench.link.verdicts if verdict == "PASS"} == good
