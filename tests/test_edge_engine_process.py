"""What the engine process does when an engine fails: which failures count, and what it says before it lets go."""

import threading
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from stpm.edge.channel import Channel, pair
from stpm.edge.engine import process
from stpm.edge.engine.base import Inspection
from stpm.edge.engine.messages import EngineFailed, EngineReady, EngineSettings, FromEngine, Inspect, ToEngine
from stpm.edge.engine.process import FAILURES_IN_A_ROW, main
from stpm.edge.errors import DeviceError, EngineError, FrameError, InputError, RegionError
from stpm.edge.ring import Ring

GOOD = Inspection(0.5, None, 0, np.zeros((4, 4), np.float32))


class Engine:
    """Answers with what the test has put into `answers`; an error is raised."""

    def __init__(self):
        self.answers = []
        self.closed, self.may_close = threading.Event(), threading.Event()
        self.may_close.set()

    def warm_up(self):
        """Nothing to do."""

    def describe(self):
        return {"backend": "a test"}

    def inspect(self, frame, threshold, with_map):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self):
        assert self.may_close.wait(10)
        self.closed.set()


class Running:
    def __init__(self, engine):
        self.engine = engine
        self.ring = Ring(1)
        ours, theirs = pair()
        self.line, self.theirs = Channel(ours, FromEngine), Channel(theirs, ToEngine)
        self.thread = threading.Thread(target=main, args=(EngineSettings("bundle"), self.theirs, self.ring))
        self.thread.start()
        self.parts, self.heard = 0, deque()

    def hear(self):
        if not self.heard:
            self.heard.extend(self.line.receive(10))
        return self.heard.popleft()

    def ask(self, answer):
        """The name of what came of it: Inspected, or the kind of the error."""
        self.engine.answers.append(answer)
        self.parts += 1
        self.line.send(Inspect(self.parts, 0, (4, 4, 3), 0.5, True))
        message = self.hear()
        assert message.part == self.parts
        return getattr(message, "kind", type(message).__name__)


@pytest.fixture
def running(monkeypatch):
    manifest = SimpleNamespace(
        category="screw",
        threshold=SimpleNamespace(value=0.5),
        training=SimpleNamespace(photo_size=(4, 4)),
        preprocess=SimpleNamespace(roi=None),
    )
    engine = Engine()
    monkeypatch.setattr(process, "open_bundle", lambda path: SimpleNamespace(manifest=manifest, sha256="5" * 64))
    monkeypatch.setattr(process, "open_engine", lambda *_: engine)
    monkeypatch.setattr(process, "self_test", lambda *_: 0.0)
    running = Running(engine)
    assert isinstance(running.hear(), EngineReady)
    yield running
    engine.may_close.set()
    running.line.close()
    running.thread.join(10)
    running.theirs.close()
    running.ring.close()
    assert engine.closed.is_set()


def test_frames_that_cannot_be_judged_say_nothing_of_the_engine(running):
    for number in range(3 * FAILURES_IN_A_ROW):
        error = (RegionError, InputError, FrameError)[number % 3]
        assert running.ask(error("the region does not fit")) == error.__name__
    assert running.ask(GOOD) == "Inspected"


def test_an_engine_that_fails_ten_times_in_a_row_is_given_up_and_bad_frames_between_do_not_help_it(running):
    for _ in range(FAILURES_IN_A_ROW - 1):
        assert running.ask(EngineError("out of memory")) == "EngineError"
    assert running.ask(GOOD) == "Inspected"  # it has recovered
    for _ in range(FAILURES_IN_A_ROW - 1):
        assert running.ask(EngineError("out of memory")) == "EngineError"
        assert running.ask(RegionError("the region does not fit")) == "RegionError"
    assert running.ask(EngineError("out of memory")) == "EngineError"
    failed = running.hear()
    assert isinstance(failed, EngineFailed)
    assert "has failed 10 times in a row and does not recover, the last time: out of memory" in failed.sentence
    assert running.engine.closed.wait(10)


def test_a_lost_device_is_told_before_the_driver_is_asked_to_let_go_of_it(running):
    running.engine.may_close.clear()
    running.engine.answers.append(DeviceError("the GPU is gone"))
    running.line.send(Inspect(1, 0, (4, 4, 3), 0.5, False))
    assert running.hear() == EngineFailed("DeviceError", "the GPU is gone", 5)
    assert not running.engine.closed.is_set()
