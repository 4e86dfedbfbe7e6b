"""The line's side of an engine process: how long it may take for what, and what becomes of the part that it has."""

import pytest
from played import Played

from stpm.edge.engine import host as engine_host
from stpm.edge.engine.host import LONGEST_LOADING_NS, LONGEST_PAUSE_NS, LONGEST_TEST_NS, EngineHost
from stpm.edge.engine.messages import (
    EngineFailed,
    EngineReady,
    EngineSettings,
    FromEngine,
    Inspect,
    Inspected,
    TestYourself,
    ToEngine,
)
from stpm.edge.errors import BundleError, DeviceError, EngineError
from stpm.edge.ring import Ring
from stpm.edge.supervisor import GRACE_NS, LAST_WORDS_NS, LONGEST_DELAY_NS

READY = EngineReady({"backend": "a test"}, 0.0, "screw", "5" * 64, 0.5, (4, 4), None)
HANG_NS = 2_000_000_000
SECOND = 1_000_000_000


def question(part):
    return Inspect(part, 0, (4, 4, 3), 0.5, True)


class Bench:
    def __init__(self, monkeypatch):
        self.started, self.refusals = [], []
        monkeypatch.setattr(engine_host, "Worker", self._start)
        self.ring = Ring(1)
        self.host = EngineHost(EngineSettings("bundle"), self.ring, HANG_NS)
        self.now = 0

    def _start(self, *_):
        if self.refusals:
            raise self.refusals.pop(0)
        self.started.append(Played(FromEngine, ToEngine))
        return self.started[-1]

    @property
    def engine(self):
        return self.started[-1]

    def poll(self, after_ns=1):
        """Messages and lost part."""
        self.now += after_ns
        return self.host.poll(self.now)

    def ready(self):
        self.poll()
        self.engine.there.send(READY)
        self.poll()
        assert self.host.free

    def ends(self):
        """The process that was killed is gone."""
        assert self.engine.killed
        self.engine.there.close()
        self.poll()
        self.poll()


@pytest.fixture
def bench(monkeypatch):
    bench = Bench(monkeypatch)
    yield bench
    for each in bench.started:
        each.there.close()
    bench.host.close()
    bench.ring.close()


def test_loading_may_take_minutes_a_self_test_seconds_and_a_part_what_the_station_allows(bench):
    bench.poll()
    bench.poll(LONGEST_LOADING_NS)
    assert not bench.engine.killed
    bench.engine.there.send(READY)
    bench.poll(0)
    bench.host.test(bench.now)
    assert bench.engine.there.receive() == [TestYourself()]
    bench.poll(LONGEST_TEST_NS)
    assert not bench.engine.killed
    bench.engine.there.send(READY)
    bench.poll(0)
    bench.host.ask(question(1), bench.now)
    assert bench.poll(HANG_NS) == ([], None)
    assert bench.poll(1) == ([], 1)
    assert "has not answered within 2 s" in str(bench.host.error)


def test_a_self_test_that_hangs_is_given_up(bench):
    bench.ready()
    bench.host.test(bench.now)
    bench.poll(LONGEST_TEST_NS + 1)
    assert bench.engine.killed
    assert "has not finished its self test within 10 s" in str(bench.host.error)
    bench.ends()
    bench.poll(SECOND)
    bench.poll(LONGEST_LOADING_NS)  # its successor loads, and is not in a test
    assert not bench.engine.killed
    bench.poll(1)
    assert bench.engine.killed


def test_an_engine_that_fails_is_killed_at_once_and_its_part_is_lost_then(bench):
    """It may hang in the driver when it lets go of the device."""
    bench.ready()
    bench.host.ask(question(7), bench.now)
    bench.engine.there.send(EngineFailed("DeviceError", "the GPU is gone", 5))
    _, lost = bench.poll()
    assert lost == 7
    assert bench.engine.killed
    assert isinstance(bench.host.error, DeviceError)
    assert not bench.host.free


def test_nothing_that_a_killed_engine_still_says_is_taken_for_an_answer(bench):
    bench.ready()
    bench.host.ask(question(7), bench.now)
    assert bench.poll(HANG_NS + 1) == ([], 7)
    bench.engine.there.send(Inspected(7, 0.1, None, 0, None, 0, 0))
    assert bench.poll() == ([], None)
    bench.ends()
    assert bench.poll(SECOND) == ([], None)
    assert len(bench.started) == 2


def test_what_does_not_load_is_tried_ever_more_rarely_and_what_has_judged_comes_back_soon(bench):
    pauses = []
    for loads in [False] * 12 + [True]:
        bench.poll()
        if loads:
            bench.engine.there.send(READY)
            bench.poll()
        bench.engine.there.send(EngineFailed("BundleError", "it is another bundle", 4))
        bench.poll()
        began = bench.now
        bench.ends()
        pauses.append(bench.host.due_ns() - began)
        bench.now = bench.host.due_ns()
    assert pauses[:3] == [100_000_000, 200_000_000, 400_000_000]
    assert pauses[-2:] == [LONGEST_PAUSE_NS, LONGEST_DELAY_NS]
    assert isinstance(bench.host.error, BundleError)


def test_a_system_that_starts_no_engine_process_is_a_sentence_and_is_tried_again_soon(bench):
    bench.refusals += [OSError(24, "Too many open files")] * 9
    for _ in range(9):
        assert bench.poll() == ([], None)
        assert "does not start an engine process (Too many open files)" in str(bench.host.error)
        assert bench.host.due_ns() - bench.now <= LONGEST_DELAY_NS
        bench.now = bench.host.due_ns()
    bench.ready()
    assert bench.host.error is None


def test_an_engine_that_says_what_nobody_understands_is_replaced(bench):
    bench.ready()
    bench.host.ask(question(3), bench.now)
    bench.engine.end.send(b"rubbish")
    assert bench.poll() == ([], 3)
    assert isinstance(bench.host.error, EngineError)
    assert "has sent what is no message" in str(bench.host.error)


# --- one that is not needed any more


def test_a_retired_engine_answers_for_the_part_that_it_has_and_ends(bench):
    bench.ready()
    bench.host.ask(question(5), bench.now)
    bench.host.retire()
    assert not bench.host.free
    assert bench.poll() == ([], None)
    assert not bench.host.over
    answer = Inspected(5, 0.1, None, 0, None, 0, 0)
    bench.engine.there.send(answer)
    assert bench.poll() == ([answer], None)
    assert bench.engine.there.send(READY) is False  # its channel is closed: it is asked to end
    assert not bench.host.over
    bench.poll(GRACE_NS - 1)
    assert not bench.engine.killed
    bench.engine.there.close()
    bench.poll()
    assert bench.host.over


def test_a_retired_engine_that_hangs_with_a_part_loses_it_and_is_not_started_again(bench):
    bench.ready()
    bench.host.ask(question(5), bench.now)
    bench.host.retire()
    assert bench.poll(HANG_NS) == ([], None)
    assert bench.poll(1) == ([], 5)
    assert "has not answered within 2 s" in str(bench.host.error)
    bench.poll(LAST_WORDS_NS)
    bench.poll(100 * SECOND)
    assert len(bench.started) == 1
    assert bench.host.due_ns() is None
    assert not bench.host.over
    bench.ends()
    assert bench.host.over


def test_a_retired_engine_that_does_not_end_when_it_is_asked_to_is_killed(bench):
    bench.ready()
    bench.host.retire()
    bench.poll()
    bench.poll(GRACE_NS)
    bench.poll()
    assert bench.engine.killed
    assert not bench.host.over
