"""Contract 7: every captured frame has one outcome, and whatever happens the last word on the wire is safe."""

import threading
import time

import numpy as np
import pytest

from stpm.edge.camera import Frame
from stpm.edge.engine.fake import FakeEngine
from stpm.edge.errors import CameraError, EngineError, PlcError, SelfTestError
from stpm.edge.loop import FAILURES_IN_A_ROW, Line
from stpm.edge.plc.protocol import Beat, Part, State

IMAGE = np.zeros((256, 256, 3), np.uint8)


class Script:
    """A camera that hands out what it is given: frames, None for a timeout, exceptions, or something to call."""

    dropped = 0

    def __init__(self, *items):
        self.items, self.captured, self.closed = list(items), 0, False

    @property
    def finished(self):
        return not self.items

    def read(self, timeout):
        item = self.items.pop(0)
        if callable(item):
            item = item()
        if isinstance(item, Exception):
            raise item
        if item is None:
            time.sleep(timeout)
            return None
        self.captured += 1
        return Frame(self.captured, time.monotonic_ns(), f"{self.captured}.png", *item)

    def close(self):
        self.closed = True


class Wire:
    """A link that remembers; it breaks at the messages for which `breaks` is true."""

    def __init__(self, breaks=lambda message: False):
        self.messages, self.closed, self.breaks = [], False, breaks

    def send(self, message):
        assert not self.closed
        if self.breaks(message):
            raise PlcError("the cable is cut")
        self.messages.append(message)

    def close(self):
        self.closed = True

    @property
    def parts(self):
        return [(message.id, message.verdict) for message in self.messages if isinstance(message, Part)]

    @property
    def states(self):
        return [message.state for message in self.messages if isinstance(message, State)]


def engine_of(bundle, *script):
    """Passes the self test, then follows the script; numbers are multiples of the threshold."""
    threshold = bundle.manifest.threshold.value
    fake = FakeEngine.of(bundle)
    return FakeEngine([item * threshold if isinstance(item, float) else item for item in script], known=fake._known)


def line_of(bundle, camera, wire, *script, **options):
    return Line(bundle, engine_of(bundle, *script), camera, wire, report=lambda text: None, **options)


def frames(count):
    return [(IMAGE,)] * count


def test_one_line_per_part_between_ready_and_stopped(bundle):
    camera, wire = Script(*frames(3)), Wire()
    summary = line_of(bundle, camera, wire, 0.5, 2.0, 1.0).run(threading.Event())
    assert wire.states == ["BOOT", "SELF_TEST", "READY", "STOPPED"]
    assert wire.messages[:3] == [State("BOOT"), State("SELF_TEST"), State("READY", "SIMULATED")]
    assert wire.messages[-1] == State("STOPPED")
    assert wire.parts == [(1, "PASS"), (2, "FAIL"), (3, "PASS")]
    assert summary.captured == summary.judged == 3
    assert wire.closed
    assert camera.closed


def test_everything_that_cannot_be_judged_is_unknown(bundle):
    camera = Script((IMAGE,), (None, "file damaged"), (IMAGE,), (IMAGE.astype(np.uint16),), (IMAGE,))
    wire = Wire()
    summary = line_of(bundle, camera, wire, float("nan"), EngineError("out of order"), 0.5).run(threading.Event())
    assert [verdict for _, verdict in wire.parts] == ["UNKNOWN", "UNKNOWN", "UNKNOWN", "UNKNOWN", "PASS"]
    assert summary.captured == summary.judged + summary.dropped == 5
    assert wire.messages[-1] == State("STOPPED")


def test_an_engine_that_keeps_failing_ends_in_fault(bundle):
    camera, wire = Script(*frames(20)), Wire()
    line = line_of(bundle, camera, wire, 0.5, *[EngineError("dead")] * 20)
    with pytest.raises(EngineError, match="does not recover"):
        line.run(threading.Event())
    assert [verdict for _, verdict in wire.parts] == ["PASS"] + ["UNKNOWN"] * FAILURES_IN_A_ROW
    assert wire.messages[-1] == State("FAULT", "EngineError")
    assert line.summary.captured == line.summary.judged


def test_a_recovered_engine_starts_the_count_again(bundle):
    script = ([EngineError("hiccup")] * (FAILURES_IN_A_ROW - 1) + [0.5]) * 2
    camera, wire = Script(*frames(len(script))), Wire()
    line_of(bundle, camera, wire, *script).run(threading.Event())
    assert wire.states[-1] == "STOPPED"


def test_never_ready_when_the_self_test_fails(bundle):
    wire = Wire()
    threshold = bundle.manifest.threshold.value
    with pytest.raises(SelfTestError):
        Line(bundle, FakeEngine([threshold] * 9), Script(*frames(1)), wire).run(threading.Event())
    assert wire.states == ["BOOT", "SELF_TEST", "FAULT"]
    assert wire.parts == []


@pytest.mark.parametrize(
    ("trouble", "reason"), [(CameraError("unplugged"), "CameraError"), (MemoryError(), "unexpected MemoryError")]
)
def test_trouble_in_the_camera_ends_in_fault(bundle, trouble, reason):
    wire = Wire()
    with pytest.raises(type(trouble)):
        line_of(bundle, Script(*frames(1), trouble), wire, 0.5).run(threading.Event())
    assert wire.messages[-1] == State("FAULT", reason)
    assert wire.closed


def test_a_broken_link_stops_the_line_and_the_part_is_counted(bundle):
    wire = Wire(breaks=lambda message: isinstance(message, Part) and message.id == 2)
    camera = Script(*frames(5))
    line = line_of(bundle, camera, wire, *[0.5] * 5)
    with pytest.raises(PlcError):
        line.run(threading.Event())
    assert line.summary.captured == line.summary.judged == 2
    assert line.summary.undelivered == 1
    assert wire.messages[-1] == State("FAULT", "PlcError")
    assert wire.closed
    assert camera.closed


def test_everything_is_released_when_even_the_last_word_fails(bundle):
    wire, camera = (
        Wire(breaks=lambda message: isinstance(message, Part | State) and message != State("BOOT")),
        Script(),
    )
    with pytest.raises(PlcError):
        line_of(bundle, camera, wire).run(threading.Event())
    assert wire.closed
    assert camera.closed


def test_stop_ends_after_the_part_in_hand(bundle):
    stop = threading.Event()
    camera, wire = Script((IMAGE,), lambda: stop.set() or (IMAGE,), *frames(5)), Wire()
    summary = line_of(bundle, camera, wire, *[0.5] * 7).run(stop)
    assert summary.judged == 2
    assert wire.states[-1] == "STOPPED"


def test_parts_limits_the_run(bundle):
    wire = Wire()
    line_of(bundle, Script(*frames(5)), wire, *[0.5] * 5, parts=3).run(threading.Event())
    assert len(wire.parts) == 3


def test_heartbeats_fill_the_silence_and_only_the_silence(bundle):
    wire = Wire()
    camera = Script((IMAGE,), *[None] * 4, (IMAGE,), (IMAGE,))
    line_of(bundle, camera, wire, 0.5, 0.5, 0.5, heartbeat_s=0.05).run(threading.Event())
    after_ready = wire.messages[3:]
    assert [type(message) for message in after_ready] == [Part, Beat, Beat, Beat, Beat, Part, Part, State]
    assert after_ready[1] == Beat(1)


def test_stages_are_timed(bundle):
    summary = line_of(bundle, Script(*frames(4)), Wire(), *[0.5] * 4).run(threading.Event())
    percentiles = summary.latency.percentiles()
    assert set(percentiles) == {"inspection", "decision", "wire", "capture to wire"}
    assert all(
        stage.count == 4 and 0 < stage.p50 <= stage.p90 <= stage.p99 <= stage.max for stage in percentiles.values()
    )


def test_no_ready_when_stopped_during_the_self_test(bundle):
    stop, wire = threading.Event(), Wire()
    stop.set()
    line_of(bundle, Script(*frames(1)), wire, 0.5).run(stop)
    assert wire.states == ["BOOT", "SELF_TEST", "STOPPED"]


def test_a_bug_while_a_part_is_examined_still_counts_the_part(bundle):
    wire = Wire()
    line = line_of(bundle, Script(*frames(3)), wire, 0.5, MemoryError())
    with pytest.raises(MemoryError):
        line.run(threading.Event())
    assert line.summary.captured == line.summary.judged == 2
    assert line.summary.verdicts == {"PASS": 1, "UNKNOWN": 1}
    assert wire.messages[-1] == State("FAULT", "unexpected MemoryError")
