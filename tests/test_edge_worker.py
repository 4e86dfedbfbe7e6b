"""Child processes and the ring: real processes, real shared memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from worker_child import Task, Word

from stpm.edge.channel import ChannelClosedError
from stpm.edge.ring import IMAGE_BYTES, Ring
from stpm.edge.worker import REAP_S, Worker, await_end

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
        worker.end(0)


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
    assert worker.process.returncode == 0


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


def test_the_end_of_many_is_awaited_once_for_all(child):
    workers = [child("deaf") for _ in range(4)]
    for worker in workers:
        hear(worker)
        worker.channel.close()
    started = time.monotonic()
    await_end([worker.process for worker in workers], 0.5)
    assert 0.5 <= time.monotonic() - started < 0.5 + REAP_S
    assert {worker.process.returncode for worker in workers} == {-signal.SIGKILL}


def test_a_child_takes_no_module_from_the_folder_that_it_is_started_in(child, tmp_path, monkeypatch):
    (tmp_path / "socket.py").write_text("raise SystemExit('this is not the socket of Python')\n")
    monkeypatch.chdir(tmp_path)
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 cannot leave the folder out")
    assert hear(child("talk"))


def test_a_child_that_the_system_does_not_start_leaves_nothing(child, monkeypatch):
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        child("talk")
    assert os.listdir("/proc/self/fd") == before


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


def test_a_digest_is_there_for_the_next_one_who_maps_the_ring(ring):
    assert ring.last_picture == 0
    ring.last_picture = (1 << 33) - 1
    ring.advance()
    again = Ring(4, os.dup(ring.descriptor))
    assert (again.last_picture, again.progress, again.taken) == ((1 << 33) - 1, 1, [])
    again.close()
