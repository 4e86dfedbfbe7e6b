"""The state that follows from what is wrong."""

from stpm.edge.health import Health


def running():
    health = Health()
    health.phase = "RUNNING"
    return health


def test_a_fault_beats_a_warning_and_both_go_with_their_cause():
    health = running()
    assert health.warn("journal", "disk full", 8)
    assert (health.state, health.reason, health.code) == ("DEGRADED", "journal", 0)
    assert health.fault("camera", "unplugged", 6)
    assert (health.state, health.reason, health.code) == ("FAULT", "camera journal", 6)
    assert health.settle("camera")
    assert health.state == "DEGRADED"
    assert health.settle("journal")
    assert (health.state, health.reason, health.code) == ("RUNNING", "", 0)


def test_only_the_first_time_is_news():
    health = running()
    assert health.fault("camera", "unplugged")
    assert not health.fault("camera", "still unplugged")
    assert health.settle("camera")
    assert not health.settle("camera")


def test_what_is_latched_stays_until_somebody_clears_it():
    health = running()
    health.fault("missed", "trigger 3 never came", latched=True)
    assert not health.settle("missed")
    assert health.state == "FAULT"
    assert health.clear() == ["missed"]
    assert health.state == "RUNNING"


def test_clearing_leaves_what_is_still_there():
    health = running()
    health.fault("camera", "unplugged")
    assert health.clear() == []
    assert health.state == "FAULT"


def test_before_ready_and_after_the_end_the_phase_is_the_state():
    health = Health()
    health.fault("camera", "unplugged")
    for phase in ("BOOT", "SELF_TEST", "STOPPED"):
        health.phase = phase
        assert health.state == phase
        assert health.reason == ""


def test_scripted_verdicts_are_announced_wherever_parts_could_pass():
    health = running()
    health.simulated = True
    assert health.reason == "SIMULATED"
    health.warn("journal", "disk full")
    assert health.reason == "SIMULATED journal"
    health.settle("journal")
    health.phase = "READY"
    assert health.reason == "SIMULATED"
