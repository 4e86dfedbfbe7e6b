"""The line's side of the camera process: it kills, starts again, and keeps account of the slots, and never waits."""

import os
import signal
import time
from contextlib import contextmanager

import pytest
from played import Played

from stpm.edge.camera import host as camera_host
from stpm.edge.camera.host import CameraHost
from stpm.edge.camera.messages import CameraFailed, CameraOpened, CameraSettings, FrameReady, FromCamera
from stpm.edge.loop import newly_differing
from stpm.edge.ring import Ring


@contextmanager
def hosted(source, **settings):
    ring = Ring(64)  # what a network camera has queued while it was being opened comes at once
    host = CameraHost(CameraSettings(source=source, **settings), ring)
    try:
        yield host, ring
    finally:
        host.end()
        ring.close()


def poll_until(host, condition, within_s):
    """Poll as the line does; the frames that came. Their slots are given back."""
    frames, deadline = [], time.monotonic() + within_s
    while not condition(frames):
        assert time.monotonic() < deadline, (host.error, len(frames))
        found, _ = host.poll(time.monotonic_ns())
        for frame in found:
            if frame.slot is not None:
                host.release(frame.slot)
        frames += found
        time.sleep(0.002)
    return frames


def hold(host, count, within_s=15):
    """So many frames, whose slots are kept."""
    frames, deadline = [], time.monotonic() + within_s
    while len(frames) < count:
        assert time.monotonic() < deadline, host.error
        frames += host.poll(time.monotonic_ns())[0]
        time.sleep(0.002)
    return frames


@pytest.mark.parametrize("fault", ["hang", "exit", "close"])
def test_a_camera_that_fails_once_comes_back(fault, tmp_path):
    with hosted(f"pattern:fps=100,once={tmp_path / 'done'},{fault}@20", stall_s=0.5) as (host, ring):
        before = poll_until(host, lambda _: host.supervisor.restarts == 1, 15)
        assert [frame.number for frame in before][:19] == list(range(1, 20))
        after = poll_until(host, lambda frames: len(frames) >= 30, 10)
        assert [frame.number for frame in after][-30:] == list(range(1, 31))
        assert ring.taken == []
        assert host.ready


def test_a_killed_camera_process_leaves_no_slot_in_use_and_comes_back():
    with hosted("pattern:fps=200") as (host, ring):
        poll_until(host, lambda frames: len(frames) > 10, 15)
        for restarts in (1, 2):
            os.kill(host.supervisor.worker.process.pid, 9)
            poll_until(host, lambda _, wanted=restarts: host.supervisor.restarts == wanted, 5)
            poll_until(host, lambda frames: len(frames) > 10, 10)
        poll_until(host, lambda _: ring.taken == [], 2)


def test_a_camera_that_was_started_again_does_not_pass_off_its_last_picture_as_a_new_one(tmp_path):
    """The pattern begins with the same picture each time."""
    for frozen_after, problems in ((3, [False, True, False]), (0, [False, False, False])):
        source = f"pattern:fps=50,once={tmp_path / str(frozen_after)},exit@2"
        with hosted(source, frozen_after=frozen_after) as (host, _):
            frames = poll_until(host, lambda frames: len(frames) >= 3, 15)[:3]
            assert [frame.number for frame in frames] == [1, 1, 2]
            assert [bool(frame.problem) for frame in frames] == problems


def test_a_camera_process_that_is_killed_costs_the_line_no_time(tmp_path):
    with hosted(f"pattern:fps=100,once={tmp_path / 'done'},hang@5", stall_s=0.3) as (host, _):
        longest, deadline = 0.0, time.monotonic() + 15
        while host.supervisor.restarts < 1:
            assert time.monotonic() < deadline
            before = time.monotonic()
            for frame in host.poll(time.monotonic_ns())[0]:
                host.release(frame.slot)
            if host.error and not host.supervisor.worker:
                longest = max(longest, time.monotonic() - before)
            time.sleep(0.001)
        assert host.error == "the camera has hung for 0.3 s"
        assert 0 < longest < 0.1


# --- the account of the slots


def test_a_slot_is_given_back_once_and_only_by_who_holds_it():
    with hosted("pattern:fps=100") as (host, ring):
        frame, _ = hold(host, 2)
        host.release(frame.slot)
        for slot in (frame.slot, 7):  # back already; never announced
            with pytest.raises(AssertionError, match=f"slot {slot} is nobody's"):
                host.release(slot)
        assert len(ring.taken) >= 1


def test_slots_that_the_line_holds_outlive_the_camera_process_and_those_that_were_never_announced_do_not():
    with hosted("pattern:fps=100") as (host, ring):
        held = [frame.slot for frame in hold(host, 3)]
        os.kill(host.supervisor.worker.process.pid, signal.SIGSTOP)
        held += [frame.slot for frame in host.poll(time.monotonic_ns())[0]]
        lost = ring.claim()  # by the camera, just now
        os.kill(host.supervisor.worker.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        gone = False
        while not gone:
            assert time.monotonic() < deadline
            frames, gone = host.poll(time.monotonic_ns())
            held += [frame.slot for frame in frames]
        assert lost not in held
        assert sorted(ring.taken) == sorted(held)
        for slot in held:
            host.release(slot)


# --- a camera process that is played by the test


@pytest.fixture
def played(monkeypatch):
    """A host and the processes that it has started, newest last."""
    started, refusals = [], []

    def start(*_):
        if refusals:
            raise refusals.pop(0)
        started.append(Played(FromCamera, FromCamera))
        return started[-1]

    monkeypatch.setattr(camera_host, "Worker", start)
    ring = Ring(8)
    host = CameraHost(CameraSettings(source="pattern:"), ring)
    yield host, started, refusals, ring
    for each in started:
        each.there.close()
    host.end()
    ring.close()


def test_settings_that_the_camera_did_not_take_are_those_of_its_present_opening(played):
    host, started, _, _ = played
    host.poll(0)
    assert host.differing == {}
    started[0].there.send(CameraOpened("a camera", True, {"fps": ("30", "25"), "gain": ("2", "2")}))
    host.poll(1)
    assert host.differing == {"fps": ("30", "25")}
    started[0].there.close()
    host.poll(2)
    assert host.differing == {}
    host.poll(1_000_000_000)
    started[1].there.send(CameraOpened("a camera", True, {"fps": ("30", "30"), "gain": ("2", "1")}))
    host.poll(1_000_000_001)
    assert host.differing == {"gain": ("2", "1")}


def test_a_system_that_starts_no_camera_process_is_a_sentence_and_is_tried_again(played):
    host, started, refusals, _ = played
    refusals += [OSError(24, "Too many open files"), OSError(12, "Cannot allocate memory")]
    assert host.poll(0) == ([], False)
    assert host.error == "the system does not start a camera process (Too many open files): it is tried again"
    assert host.fileno() is None
    host.poll(host.due_ns())
    assert "Cannot allocate memory" in host.error
    host.poll(host.due_ns())
    started[0].there.send(CameraOpened("a camera", True))
    host.poll(1_000_000_000)
    assert host.ready
    assert host.error == ""


def test_a_refusal_is_not_the_reason_of_what_happens_after_it(played):
    host, started, refusals, _ = played
    refusals += [OSError(24, "Too many open files")]
    host.poll(0)
    host.poll(host.due_ns())
    started[0].there.close()
    host.poll(1_000_000_000)
    assert host.error == "the camera process has died"


def test_a_camera_that_has_failed_is_not_there_though_it_hangs_when_it_closes(played):
    host, started, _, _ = played
    host.poll(0)
    started[0].there.send(CameraOpened("a camera", True))
    host.poll(1)
    assert host.ready
    started[0].there.send(CameraFailed("unplugged"))
    host.poll(2)
    assert not host.ready
    assert not host.take(1)
    assert started[0].killed
    assert host.error == "unplugged"


def test_a_killed_process_that_has_said_nonsense_does_not_keep_the_line_awake(played):
    host, started, _, _ = played
    host.poll(0)
    assert host.fileno() is not None
    started[0].end.send(b"rubbish")
    host.poll(1)
    assert started[0].killed
    assert host.fileno() is None


def test_a_camera_process_that_says_what_nobody_understands_is_replaced_after_what_it_had_said(played):
    host, started, _, ring = played
    host.poll(0)
    slot = ring.claim()
    started[0].there.send(FrameReady(1, 0, "", slot, (4, 4, 3)))
    started[0].end.send(b"rubbish")
    frames, _ = host.poll(1)
    assert [frame.slot for frame in frames] == [slot]
    assert host.poll(2) == ([], False)
    assert started[0].killed
    started[0].there.close()
    assert host.poll(3) == ([], True)
    assert "the process has sent what is no message" in host.error
    assert ring.taken == [slot]
    host.release(slot)
    host.poll(1_000_000_000)
    assert len(started) == 2


def test_the_frames_that_a_hanging_process_had_announced_are_heard_before_it_is_gone(played):
    host, started, _, ring = played
    host.poll(0)
    started[0].there.send(CameraOpened("a camera", True))
    host.poll(1)
    late = 3_000_000_000
    assert host.poll(late) == ([], False)
    assert started[0].killed
    assert host.error == "the camera has hung for 2 s"
    assert not host.ready
    assert not host.take(1)
    slots = [ring.claim() for _ in range(3)]
    for number in (1, 2):
        started[0].there.send(FrameReady(number, 0, "", slots[number], (4, 4, 3)))
    started[0].there.send(CameraOpened("a camera", True))  # it had hung while it opened
    assert host.poll(late + 100_000_000) == ([], False)  # SIGKILL has not ended it yet, and no other is started
    started[0].there.close()
    frames, gone = host.poll(late + 200_000_000)
    assert gone
    assert [frame.number for frame in frames] == [1, 2]
    assert ring.taken == slots[1:]  # the third was never announced
    assert not host.ready
    assert host.error == "the camera has hung for 2 s"
    host.poll(late + 200_000_001)
    assert len(started) == 2
    for frame in frames:
        host.release(frame.slot)


def test_a_camera_that_comes_back_with_other_settings_is_told_and_what_was_accepted_at_the_start_is_not():
    accepted = {"fps": ("60", "30")}
    assert newly_differing(accepted, accepted) == []
    assert newly_differing(accepted, {}) == []
    (sentence,) = newly_differing(accepted, {**accepted, "exposure": ("200", "10000")})
    assert sentence.startswith("camera.exposure: asked for 200, the camera says 10000")
    assert len(newly_differing(accepted, {"fps": ("60", "15")})) == 1
