"""The camera process, as the line starts it: every captured frame is announced or its number is missing, the pixels
belong to the number, and whatever a camera does wrong is said or makes the process stand still."""

import os
import signal
import socket
import threading
import time
from contextlib import suppress

import cv2
import numpy as np
import pytest

from stpm.edge.camera import open_source
from stpm.edge.camera.messages import (
    CameraEnded,
    CameraFailed,
    CameraOpened,
    CameraSettings,
    FrameReady,
    FromCamera,
    TakePicture,
)
from stpm.edge.camera.pattern import number_in
from stpm.edge.channel import ChannelClosedError
from stpm.edge.ring import Ring
from stpm.edge.worker import Worker


class Camera:
    """The line's part, reduced to what these tests look at."""

    def __init__(self, source, slots=8, **settings):
        self.ring = Ring(slots)
        self.worker = Worker(
            "stpm.edge.camera.process", CameraSettings(source=source, **settings), FromCamera, self.ring
        )
        self._messages = []

    def next(self, timeout_s=5.0):
        """The next message; None when none came, or when the process has gone."""
        deadline = time.monotonic() + timeout_s
        while not self._messages and time.monotonic() < deadline:
            try:
                self._messages = self.worker.channel.receive(deadline - time.monotonic())
            except ChannelClosedError:
                return None
        return self._messages.pop(0) if self._messages else None

    def opened(self):
        message = self.next(15)
        assert isinstance(message, CameraOpened), message
        return message

    def pixels(self, frame):
        """A copy of the frame; its slot is given back."""
        image = self.ring.image(frame.slot, frame.shape).copy()
        self.ring.release(frame.slot)
        return image

    def frames(self, count):
        """So many frames with their pixels (None without a slot)."""
        found = []
        for _ in range(count):
            frame = self.next()
            assert isinstance(frame, FrameReady), frame
            found.append((frame, self.pixels(frame) if frame.slot is not None else None))
        return found

    def end_message(self):
        """What the process says last, past all frames."""
        while isinstance(message := self.next(), FrameReady):
            if message.slot is not None:
                self.ring.release(message.slot)
        return message

    def ask(self, trigger):
        asked_ns = time.monotonic_ns()
        assert self.worker.channel.send(TakePicture(trigger, asked_ns))
        return asked_ns

    def gone(self, within_s):
        deadline = time.monotonic() + within_s
        while self.worker.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.worker.process.poll() is not None


class NumberedStream:
    """A network camera: the pattern as motion JPEG over HTTP. It knows when it began to send each frame."""

    def __init__(self, fps):
        self.sent_ns = {}  # by the number in the picture
        self._period_s = 1 / fps
        self._stop = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._socket.close()
        self._thread.join()

    def _run(self):
        source = open_source(CameraSettings(source=f"pattern:width=160,height=120,fps={1 / self._period_s}"))
        with suppress(OSError):  # the reader or the test has gone
            connection, _ = self._socket.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # otherwise frames leave 40 ms later
                connection.recv(4096)
                kind = b"multipart/x-mixed-replace; boundary=frame"
                connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: " + kind + b"\r\n\r\n")
                while not self._stop.is_set():
                    image = source.read(1).image
                    data = cv2.imencode(".jpg", image)[1].tobytes()
                    self.sent_ns[number_in(image)] = time.monotonic_ns()
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                    connection.sendall(head.encode() + data + b"\r\n")


@pytest.fixture
def start():
    cameras = []

    def starter(source, **settings):
        cameras.append(Camera(source, **settings))
        return cameras[-1]

    yield starter
    for camera in cameras:
        camera.worker.end(0)
        camera.ring.close()


@pytest.fixture
def folder(tmp_path):
    for index in range(12):
        cv2.imwrite(str(tmp_path / f"{index:02}.png"), np.full((48, 64, 3), 20 * index, np.uint8))
    return str(tmp_path)


def test_frames_are_numbered_stamped_and_their_pixels_are_theirs(start):
    camera = start("pattern:fps=100,width=320,height=240")
    assert camera.opened().live
    found = camera.frames(50)
    assert [frame.number for frame, _ in found] == list(range(1, 51))
    assert [number_in(image) for _, image in found] == list(range(1, 51))
    assert {frame.shape for frame, _ in found} == {(240, 320, 3)}
    assert not any(frame.problem or frame.trigger for frame, _ in found)
    times = [frame.captured_ns for frame, _ in found]
    assert times == sorted(times)
    assert 0.4 < (times[-1] - times[0]) / 1e9 < 2


def test_without_a_free_slot_a_live_frame_is_announced_and_counted(start):
    camera = start("pattern:fps=100", slots=2)
    camera.opened()
    held = [camera.next() for _ in range(5)]
    assert [frame.number for frame in held] == [1, 2, 3, 4, 5]
    assert [frame.slot is None for frame in held] == [False, False, True, True, True]
    assert [bool(frame.problem) for frame in held] == [False, False, True, True, True]
    for frame in held[:2]:
        assert number_in(camera.pixels(frame)) == frame.number
    while (frame := camera.next()).slot is None:
        assert "no free slot" in frame.problem
    assert number_in(camera.pixels(frame)) == frame.number
    assert not frame.problem


def test_a_line_that_does_not_listen_sees_the_gap_in_the_numbers(start):
    camera = start("pattern:fps=2000,width=64,height=32", slots=2)
    camera.opened()
    time.sleep(1.0)  # some hundred messages fit into the channel
    numbers, gap, deadline = [], 0, time.monotonic() + 5
    while not gap and time.monotonic() < deadline:
        numbers.append(camera.next().number)
        gap = numbers[-1] - len(numbers)
    assert numbers[:100] == list(range(1, 101))
    assert gap > 0
    assert camera.next().number > numbers[-1]  # and it goes on


def test_no_recorded_frame_is_lost_however_slow_the_line_is(start, folder):
    camera = start(folder, slots=2, trigger="software")
    assert not camera.opened().live
    for trigger in range(1, 15):  # more than there are
        camera.ask(trigger)
    held, found, ended = [camera.next(), camera.next()], [], False
    assert camera.next(0.3) is None  # both slots are in use: it waits
    while held:
        frame = held.pop(0)
        found.append((frame.number, frame.trigger, frame.name, int(camera.pixels(frame).mean())))
        if not ended:
            message = camera.next()
            ended = isinstance(message, CameraEnded)
            held += [] if ended else [message]
    assert ended
    assert found == [(n + 1, n + 1, f"{n:02}.png", 20 * n) for n in range(12)]


def test_a_recording_waits_to_be_asked(start, folder):
    camera = start(folder, trigger="software")
    camera.opened()
    assert camera.next(0.3) is None
    asked_ns = camera.ask(7)
    ((frame, _),) = camera.frames(1)
    assert (frame.trigger, frame.name) == (7, "00.png")
    assert frame.captured_ns > asked_ns
    assert camera.next(0.3) is None


def test_a_trigger_gets_the_first_frame_that_came_after_it(start):
    camera = start("pattern:fps=50", trigger="software")
    camera.opened()
    assert camera.next(0.3) is None  # frames that nobody asked for are not announced
    last = 0
    for trigger in range(1, 11):
        time.sleep(0.013)  # at another moment of the frame each time
        asked_ns = camera.ask(trigger)
        ((frame, image),) = camera.frames(1)
        assert frame.trigger == trigger
        assert frame.number == trigger  # those between are not counted
        assert asked_ns < frame.captured_ns < asked_ns + 0.1e9
        assert number_in(image) > last
        last = number_in(image)


def test_a_trigger_never_gets_a_picture_that_a_network_camera_had_sent_before(start, capfd):
    with NumberedStream(fps=100) as stream:
        camera = start(stream.url, trigger="software")
        camera.opened()
        waited_s = []
        for trigger in range(1, 41):
            time.sleep(0.0137)  # at another moment of the frame each time
            if trigger % 2:  # the computer is busy, and frames pile up
                os.kill(camera.worker.process.pid, signal.SIGSTOP)
                time.sleep(0.06)
            asked_ns = camera.ask(trigger)
            os.kill(camera.worker.process.pid, signal.SIGCONT)
            ((frame, image),) = camera.frames(1)
            assert frame.trigger == trigger
            assert stream.sent_ns[number_in(image)] > asked_ns
            waited_s.append((frame.captured_ns - asked_ns) / 1e9)
        assert np.median(waited_s) < 0.05


def test_a_trigger_that_another_has_followed_gets_no_picture_of_its_part(start):
    camera = start("pattern:fps=20", trigger="software")
    camera.opened()
    os.kill(camera.worker.process.pid, signal.SIGSTOP)  # the computer is busy, and triggers pile up
    asked_ns = [camera.ask(trigger) for trigger in (4, 9, 6)]
    os.kill(camera.worker.process.pid, signal.SIGCONT)
    (first, no_image), (second, _), (last, image) = camera.frames(3)
    assert [frame.trigger for frame in (first, second, last)] == [4, 9, 6]
    assert [frame.number for frame in (first, second, last)] == [1, 2, 3]
    assert first.slot is second.slot is no_image is None
    assert "before the next trigger" in first.problem
    assert [first.captured_ns, second.captured_ns] == asked_ns[:2]  # where the part was when it was expected
    assert last.captured_ns > asked_ns[2]
    assert (last.problem, image is None) == ("", False)
    assert camera.next(0.2) is None


def test_a_recording_answers_triggers_at_once_in_their_order(start, folder):
    camera = start(folder, trigger="software")
    camera.opened()
    for trigger in (4, 9, 6):
        camera.ask(trigger)
    found = camera.frames(3)
    assert [(frame.trigger, frame.name) for frame, _ in found] == [(4, "00.png"), (9, "01.png"), (6, "02.png")]


def test_a_frozen_camera_is_noticed_and_then_given_up(start):
    camera = start("pattern:fps=50,freeze@10", frozen_after=3)
    camera.opened()
    problems = [frame.problem for frame, _ in camera.frames(15)]
    # frames 9, 10 and 11 are alike, and none but the first of them may be judged
    assert [bool(problem) for problem in problems] == [False] * 9 + [True] * 6
    assert "the same picture again" in problems[9]
    assert "frozen" in problems[10]
    began = time.monotonic()
    failed = camera.end_message()
    assert isinstance(failed, CameraFailed)
    assert "frozen" in failed.sentence
    assert time.monotonic() - began < 3
    assert camera.gone(2)


def test_a_camera_that_freezes_between_triggers_answers_none_of_them_with_an_old_picture(start):
    camera = start("pattern:fps=50,freeze@20", trigger="software")
    camera.opened()
    time.sleep(0.8)
    camera.ask(1)
    ((frame, _),) = camera.frames(1)
    assert "frozen" in frame.problem


def test_identical_frames_are_allowed_where_it_is_switched_off_and_in_recordings(start, tmp_path):
    camera = start("pattern:fps=100,freeze@2", frozen_after=0)
    camera.opened()
    assert not any(frame.problem for frame, _ in camera.frames(50))
    for index in range(6):
        cv2.imwrite(str(tmp_path / f"{index}.png"), np.zeros((40, 40, 3), np.uint8))
    camera = start(str(tmp_path), trigger="software")
    camera.opened()
    for trigger in range(6):
        camera.ask(trigger)
    assert not any(frame.problem for frame, _ in camera.frames(6))


def test_what_is_no_picture_has_a_problem_and_the_next_one_is_good(start):
    camera = start("pattern:fps=100,garbage@2,damage@4,gap@6:3")
    camera.opened()
    found = camera.frames(7)
    assert [bool(frame.problem) for frame, _ in found] == [False, True, False, True, False, False, False]
    assert "uint16" in found[1][0].problem
    assert "damaged" in found[3][0].problem
    assert [frame.number for frame, _ in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [frame.missed for frame, _ in found] == [0, 0, 0, 0, 0, 3, 0]
    assert number_in(found[6][1]) == 7


def test_a_frame_larger_than_a_slot_has_a_problem(start):
    camera = start("pattern:fps=10,width=6000,height=4000")
    camera.opened()
    ((frame, image),) = camera.frames(1)
    assert image is None
    assert "6000×4000 pixels is too large" in frame.problem


def test_a_read_that_hangs_stops_the_progress(start):
    camera = start("pattern:fps=100,hang@10")
    camera.opened()
    camera.frames(9)
    before = camera.ring.progress
    time.sleep(0.3)
    assert camera.ring.progress <= before + 1
    assert camera.worker.process.poll() is None


def test_waiting_is_no_hanging(start, folder):
    for camera in (start("pattern:fps=1"), start(folder, trigger="software", slots=1)):
        camera.opened()
        before = camera.ring.progress
        time.sleep(0.5)
        assert camera.ring.progress > before + 2


@pytest.mark.parametrize("source", ["nowhere", "pattern:close@3", "/dev/video97"])
def test_a_failure_is_a_sentence_and_the_end_of_the_process(source, start, capfd):
    camera = start(source)
    message = camera.next(15)
    if isinstance(message, CameraOpened):
        message = camera.end_message()
    assert isinstance(message, CameraFailed)
    assert len(message.sentence) > 20
    assert camera.gone(2)
    assert camera.worker.process.returncode == 0


def test_a_camera_process_that_dies_closes_the_channel(start):
    camera = start("pattern:fps=100,exit@5")
    camera.opened()
    camera.frames(4)
    assert camera.end_message() is None
    assert camera.gone(1)


def test_the_process_ends_with_its_channel(start, folder):
    for camera in (start("pattern:fps=50"), start(folder, trigger="software")):
        camera.opened()
        camera.worker.channel.close()
        assert camera.gone(2)
        assert camera.worker.process.returncode == 0
