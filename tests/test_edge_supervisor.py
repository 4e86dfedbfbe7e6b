"""One child process is kept alive, and nothing waits for it: its start, its last words, its end."""

import select
import signal
import time
from pathlib import Path

import pytest
from worker_child import Task, Word

from stpm.edge.channel import Channel, pair
from stpm.edge.ring import Ring
from stpm.edge.supervisor import FIRST_DELAY_NS, GRACE_NS, LAST_WORDS_NS, LONGEST_DELAY_NS, WELL_NS, Supervisor
from stpm.edge.worker import Worker, await_end

HERE = Path(__file__).parent
SECOND = 1_000_000_000
AT_ONCE_S = 0.05  # what does not wait takes no longer, on a machine that has other things to do


@pytest.fixture
def supervise(monkeypatch):
    """A supervisor of worker_child.py, which does what `what` says."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    ring, made = Ring(2), []

    def make(what="talk", **more):
        made.append(Supervisor(lambda: Worker("worker_child", Task(what), Word, ring), **more))
        return made[-1]

    yield make
    await_end([process for each in made for process in each.close()], 0)
    ring.close()


def heard(supervisor):
    """The child's first word."""
    deadline = time.monotonic() + 10
    while not (words := supervisor.worker.channel.receive(0.1)):
        assert time.monotonic() < deadline, "the child says nothing"
    return words[0].text


def over(supervisor, now, seconds=5):
    """What the killed child had still said, once it is gone."""
    deadline = time.monotonic() + seconds
    while (said := supervisor.last_words(now)) is None:
        assert time.monotonic() < deadline, "it is not gone"
        time.sleep(0.001)
    while not supervisor.empty:
        assert time.monotonic() < deadline, "it has not ended"
        supervisor.reap(now)
    return [word.text for word in said]


def test_a_child_that_keeps_dying_is_started_ever_later_and_a_well_one_at_once(supervise):
    supervisor = supervise()
    now, delays = 0, []
    assert supervisor.tick(now)
    assert not supervisor.tick(now)
    for _ in range(8):
        supervisor.down(now)
        over(supervisor, now)
        delays.append(supervisor.due_ns() - now)
        assert not supervisor.tick(supervisor.due_ns() - 1)
        now = supervisor.due_ns()
        assert supervisor.tick(now)
        assert supervisor.due_ns() is None
    assert delays[:3] == [FIRST_DELAY_NS, 2 * FIRST_DELAY_NS, 4 * FIRST_DELAY_NS]
    assert delays[-1] == LONGEST_DELAY_NS
    assert supervisor.restarts == 8
    supervisor.well(now)
    now += WELL_NS + 1
    supervisor.down(now)
    over(supervisor, now)
    assert supervisor.due_ns() - now == FIRST_DELAY_NS


def test_one_that_never_gets_ready_is_tried_ever_more_rarely_and_one_that_was_ready_comes_back_soon(supervise):
    supervisor = supervise(longest_failing_ns=30 * SECOND)
    now, delays = 0, []
    for well in [False] * 12 + [True, False]:
        assert supervisor.tick(now)
        if well:
            supervisor.well(now)
        supervisor.down(now)
        over(supervisor, now)
        delays.append(supervisor.due_ns() - now)
        now = supervisor.due_ns()
    assert delays[5:9] == [3_200_000_000, 6_400_000_000, 12_800_000_000, 25_600_000_000]
    assert delays[9:12] == [30 * SECOND] * 3
    assert delays[12:] == [LONGEST_DELAY_NS, 30 * SECOND]


def test_a_system_that_starts_no_process_is_a_sentence_and_is_tried_again():
    answers = [OSError(24, "Too many open files"), OSError(12, "Cannot allocate memory"), OSError(24, "Again")] * 3

    def refuse():
        raise answers.pop(0)

    supervisor = Supervisor(refuse, 30 * SECOND)
    now, delays = 0, []
    assert not supervisor.tick(now)
    assert supervisor.refused == "Too many open files"
    for _ in range(8):
        delays.append(supervisor.due_ns() - now)
        assert not supervisor.tick(supervisor.due_ns() - 1)
        now = supervisor.due_ns()
        assert not supervisor.tick(now)
    assert not answers
    assert delays[:2] == [FIRST_DELAY_NS, 2 * FIRST_DELAY_NS]
    assert delays[-1] == LONGEST_DELAY_NS  # and not that of a child which fails
    assert supervisor.restarts == -1
    assert supervisor.empty


def test_what_a_killed_child_had_said_is_heard_before_another_starts(supervise):
    supervisor = supervise()
    supervisor.tick(0)
    pid = supervisor.worker.process.pid
    assert select.select([supervisor.fileno()], [], [], 10)[0]
    before = time.monotonic()
    supervisor.down(0)
    assert time.monotonic() - before < AT_ONCE_S
    assert supervisor.worker is None
    assert not supervisor.tick(10 * SECOND)
    assert supervisor.due_ns() == LAST_WORDS_NS
    assert select.select([supervisor.fileno()], [], [], 10)[0]
    assert over(supervisor, 0) == [str(pid)]
    assert supervisor.last_words(0) is None  # once
    assert supervisor.due_ns() == FIRST_DELAY_NS
    assert supervisor.tick(FIRST_DELAY_NS)
    assert supervisor.restarts == 1


class Undead:
    """A child that hangs in a driver: SIGKILL does not end it, and its end of the channel stays open."""

    def __init__(self):
        ours, theirs = pair()
        self.channel, self.theirs = Channel(ours, Word), Channel(theirs, Word)
        self.killed = 0
        self.returncode = None
        self.process = self

    def kill(self):
        self.killed += 1

    def poll(self):
        return self.returncode


def test_a_child_that_even_sigkill_does_not_end_is_waited_for_by_nobody():
    undead = [Undead(), Undead()]
    supervisor = Supervisor(list(undead).pop)
    supervisor.tick(0)
    child = undead[1]
    child.theirs.send(Word("help"))
    before = time.monotonic()
    supervisor.down(0)
    assert supervisor.last_words(LAST_WORDS_NS - 1) is None
    assert not supervisor.tick(LAST_WORDS_NS - 1)
    assert [word.text for word in supervisor.last_words(LAST_WORDS_NS)] == ["help"]
    assert time.monotonic() - before < AT_ONCE_S
    assert not child.theirs.send(Word("too late"))
    assert supervisor.tick(LAST_WORDS_NS)  # another one
    assert not supervisor.empty
    child.returncode = -9
    supervisor.dismiss(LAST_WORDS_NS)
    undead[0].returncode = 0
    supervisor.reap(LAST_WORDS_NS)
    assert supervisor.empty
    for each in undead:
        each.theirs.close()


def test_another_starts_when_the_killed_one_has_ended_and_not_only_fallen_silent():
    """A driver takes its time to give a device back, and closes the channel before."""
    child, successor = Undead(), Undead()
    supervisor = Supervisor([successor, child].pop)
    supervisor.tick(0)
    child.theirs.close()
    supervisor.down(0)
    assert supervisor.last_words(1) == []
    assert supervisor.due_ns() == LAST_WORDS_NS
    assert not supervisor.tick(LAST_WORDS_NS - 1)
    child.returncode = -9
    assert supervisor.tick(LAST_WORDS_NS - 1)
    successor.returncode = 0
    supervisor.close()
    successor.theirs.close()


def test_a_dismissed_child_ends_by_itself_and_a_deaf_one_is_killed_after_a_while(supervise):
    for what, code in (("talk", 0), ("deaf", -signal.SIGKILL)):
        supervisor = supervise(what)
        supervisor.tick(0)
        heard(supervisor)
        process = supervisor.worker.process
        before = time.monotonic()
        supervisor.dismiss(0)
        supervisor.reap(GRACE_NS - 1)
        assert time.monotonic() - before < AT_ONCE_S
        assert supervisor.worker is supervisor.fileno() is None
        deadline = time.monotonic() + 10
        while not supervisor.empty:
            supervisor.reap(GRACE_NS if what == "deaf" else GRACE_NS - 1)
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert process.returncode == code


def test_at_the_end_of_a_run_every_process_is_there_to_be_waited_for(supervise):
    supervisor = supervise("deaf")
    supervisor.tick(0)
    heard(supervisor)
    processes = {supervisor.worker.process}
    supervisor.dismiss(0)
    supervisor.tick(0)
    processes.add(supervisor.worker.process)
    supervisor.down(0)
    assert set(supervisor.close()) == processes
    assert supervisor.fileno() is None
    await_end(processes, 0)
    assert all(process.poll() is not None for process in processes)
