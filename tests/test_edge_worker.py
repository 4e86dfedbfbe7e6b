"""Child processes, channels and the ring: real processes, real sockets, real shared memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from worker_child import Task, Word

from stpm.edge.channel import LONGEST, Channel, ChannelClosedError, pair
from stpm.edge.ring import IMAGE_BYTES, Ring
from stpm.edge.supervisor import FIRST_DELAY_NS, LONGEST_DELAY_NS, WELL_NS, Supervisor
from stpm.edge.worker import Worker

HERE = Path(__file__).parent


@pytest.fixture
def ring():
    ring = Ring(4)
    yield ring
    ring.close()


@pytest.fixture
def child(ring, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    workers = []

    def start(what):
        workers.append(Worker("worker_child", Task(what), Word, ring))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()


def hear(worker, count=1):
    words = []
    deadline = time.monotonic() + 10
    while len(words) < count:
        assert time.monotonic() < deadline, "the child says nothing"
        words += [word.text for word in worker.channel.receive(0.1)]
    return words


def gone(pid, seconds=5):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_a_child_is_configured_answers_and_ends_when_its_channel_closes(child):
    worker = child("talk")
    (pid,) = hear(worker)
    assert int(pid) == worker.process.pid
    for text in ("one", "two", "three"):
        assert worker.channel.send(Word(text))
    assert hear(worker, 3) == ["ONE", "TWO", "THREE"]
    worker.end(grace_s=5)
    assert not worker.alive


def test_pixels_go_through_the_ring(child, ring):
    worker = child("draw")
    _, word = hear(worker, 2)
    slot = int(word.split()[1])
    assert ring.taken == [slot]
    assert (ring.image(slot, (4, 5, 3)) == 7).all()
    assert ring.progress == 1
    ring.release(slot)
    assert ring.taken == []


def test_a_child_that_does_not_listen_is_killed(child):
    worker = child("deaf")
    hear(worker)
    worker.end(grace_s=0.1)
    assert gone(worker.process.pid)


def test_the_death_of_a_child_is_heard_after_its_last_words(child):
    worker = child("die")
    assert len(hear(worker)) == 1
    with pytest.raises(ChannelClosedError):  # noqa: PT012 (the last of many)
        for _ in range(100):
            worker.channel.receive(0.1)


def test_what_a_killed_child_had_said_is_not_lost(child):
    worker = child("talk")
    deadline = time.monotonic() + 10
    while not os.path.exists(f"/proc/{worker.process.pid}") or not _readable(worker):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [word.text for word in worker.kill()] == [str(worker.process.pid)]


def _readable(worker):
    import select

    return select.select([worker.channel], [], [], 0)[0]


def test_a_child_dies_with_its_parent_even_when_that_is_killed(tmp_path):
    """A parent of its own starts a deaf child and is killed with SIGKILL."""
    code = (
        "from worker_child import Task, Word\n"
        "from stpm.edge.ring import Ring\n"
        "from stpm.edge.worker import Worker\n"
        "worker = Worker('worker_child', Task('deaf'), Word, Ring(2))\n"
        "while not (words := worker.channel.receive(0.1)): pass\n"
        "print(words[0].text, flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(HERE)}
    )
    with parent:
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    assert gone(pid)


# --- channel


@pytest.fixture
def channels():
    ends = [Channel(end, Word) for end in pair()]
    yield ends
    for end in ends:
        end.close()


def test_messages_keep_their_borders_and_their_order(channels):
    ours, theirs = channels
    for number in range(50):
        assert ours.send(Word(str(number)))
    assert [word.text for word in theirs.receive()] == [str(number) for number in range(50)]
    assert theirs.receive() == []


def test_a_sender_never_waits_for_one_who_does_not_read(channels):
    ours, theirs = channels
    started = time.monotonic()
    sent = 0
    while ours.send(Word("x" * 1000)):
        sent += 1
    assert 10 < sent < 10_000
    assert time.monotonic() - started < 5
    assert len(theirs.receive()) == sent
    assert ours.send(Word("again"))


def test_sending_to_nobody_is_no_error_and_is_told(channels):
    ours, theirs = channels
    theirs.close()
    assert not ours.send(Word("hello"))
    with pytest.raises(ChannelClosedError):
        ours.receive()


def test_a_message_that_is_too_long_is_refused_whole(channels):
    ours, theirs = channels
    with pytest.raises(ValueError, match="longer than"):
        ours.send(Word("x" * LONGEST))
    assert theirs.receive() == []


def test_receive_waits_for_the_first_message_only(channels):
    ours, theirs = channels
    started = time.monotonic()
    assert theirs.receive(0.05) == []
    assert time.monotonic() - started >= 0.05
    ours.send(Word("now"))
    started = time.monotonic()
    assert len(theirs.receive(5)) == 1
    assert time.monotonic() - started < 1


# --- ring


def test_slots_are_claimed_until_none_is_left_and_do_not_share_pixels(ring):
    slots = [ring.claim() for _ in range(4)]
    assert sorted(slots) == [0, 1, 2, 3]
    assert ring.claim() is None
    for slot in slots:
        ring.image(slot, (8, 8, 3))[:] = slot
        ring.map(slot, (8, 8))[:] = slot + 0.5
    for slot in slots:
        assert (ring.image(slot, (8, 8, 3)) == slot).all()
        assert (ring.map(slot, (8, 8)) == slot + 0.5).all()
    ring.release(2)
    assert ring.claim() == 2


def test_a_frame_without_room_and_a_slot_that_is_none_are_refused(ring):
    assert ring.image(0, (IMAGE_BYTES // 3, 1, 3)).size
    for slot, shape in ((0, (IMAGE_BYTES // 3 + 1, 1, 3)), (4, (1, 1, 3)), (-1, (1, 1, 3))):
        with pytest.raises(ValueError, match="no room"):
            ring.image(slot, shape)


def test_only_what_is_written_takes_memory(ring):
    before = _shared_kilobytes()
    ring.image(0, (480, 640, 3))[:] = 1
    assert 900 <= _shared_kilobytes() - before < 2000


def _shared_kilobytes():
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssShmem")))


def test_a_closed_ring_gives_its_memory_back_when_the_last_view_goes():
    ring = Ring(2)
    view = ring.image(0, (480, 640, 3))
    view[:] = 3
    ring.close()
    ring.close()
    assert np.all(view == 3)


# --- supervisor


class FakeWorker:
    def __init__(self):
        self.killed = False

    def kill(self):
        self.killed = True
        return ["last words"]


def test_a_child_that_keeps_dying_is_started_ever_later_and_a_well_one_at_once():
    supervisor = Supervisor(FakeWorker)
    now, delays = 0, []
    assert supervisor.tick(now)
    assert not supervisor.tick(now)
    for _ in range(8):
        assert supervisor.down(now) == ["last words"]
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
    assert supervisor.due_ns() - now == FIRST_DELAY_NS
