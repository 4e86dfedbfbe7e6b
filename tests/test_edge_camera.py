"""Frame sources: every recorded frame arrives, settings are read back, and what stops, hangs or lies is said."""

import http.server
import threading
import time
from itertools import pairwise

import cv2
import numpy as np
import pytest

from stpm.edge.camera import CameraSettings, open_source
from stpm.edge.camera import opencv as opencv_source
from stpm.edge.camera.pattern import number_in
from stpm.edge.errors import CameraError


def picture(value):
    return np.full((48, 64, 3), value, np.uint8)


@pytest.fixture
def folder(tmp_path):
    for index in range(3):
        cv2.imwrite(str(tmp_path / f"{index}.png"), picture(40 * index))
    return tmp_path


@pytest.fixture
def source():
    """Opens sources, and closes them in the end."""
    opened = []

    def opener(name, **settings):
        opened.append(open_source(CameraSettings(source=str(name), **settings)))
        return opened[-1]

    yield opener
    for each in opened:
        each.close()


def read_all(camera, limit=50):
    found = []
    while not camera.finished and len(found) < limit:
        frame = camera.read(timeout_s=1)
        assert frame is not None
        found.append(frame)
    return found


def test_folder_delivers_every_image_once_by_path(folder, source):
    (folder / "defects").mkdir()
    cv2.imwrite(str(folder / "defects" / "a.jpg"), picture(200))
    (folder / "notes.txt").write_text("not an image")
    camera = source(folder)
    found = read_all(camera)
    assert not camera.live
    assert [frame.name for frame in found] == ["0.png", "1.png", "2.png", "defects/a.jpg"]
    assert [int(frame.image.mean()) for frame in found] == [0, 40, 80, 200]
    assert camera.read(timeout_s=0) is None


def test_a_damaged_file_is_a_frame_with_a_problem(folder, source):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    good = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[1].tobytes()
    (folder / "3.jpg").write_bytes(good[: len(good) // 2])
    (folder / "4.png").touch()
    found = read_all(source(folder))
    assert [frame.image is None for frame in found] == [False, True, False, True, True]
    assert "damaged" in found[1].problem
    assert "truncated" in found[3].problem
    assert "empty" in found[4].problem


def test_loop_starts_again(folder, source):
    found = read_all(source(folder, loop=True), limit=7)
    assert [frame.name for frame in found] == ["0.png", "1.png", "2.png"] * 2 + ["0.png"]


def test_pace_is_kept_and_waiting_ends_at_the_timeout(folder, source):
    camera = source(folder, fps=10)
    start = time.monotonic()
    assert camera.read(timeout_s=1) is not None
    assert camera.read(timeout_s=0.02) is None
    assert time.monotonic() - start < 0.09
    assert camera.read(timeout_s=1) is not None
    assert camera.read(timeout_s=1) is not None
    assert 0.19 < time.monotonic() - start < 0.6
    assert camera.finished


def test_capture_time_is_monotonic_and_after_the_beginning(folder, source):
    found = read_all(source(folder))
    times = [time for frame in found for time in (frame.began_ns, frame.captured_ns)]
    assert times == sorted(times)
    assert abs(time.monotonic_ns() - times[-1]) < 5e9


def test_video_file(tmp_path, source):
    file = tmp_path / "line.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 200, (64, 48))
    assert writer.isOpened()
    for index in range(4):
        writer.write(picture(60 * index))
    writer.release()
    found = read_all(source(file))
    assert [round(frame.image.mean() / 60) for frame in found] == [0, 1, 2, 3]
    looped = read_all(source(file, loop=True), limit=6)
    assert [round(frame.image.mean() / 60) for frame in looped] == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("name", ["/dev/video97", "97", "nowhere", "http://127.0.0.1:9/stream", "pattern:colour=red"])
def test_a_source_that_does_not_open_is_named(name, source, capfd):
    with pytest.raises(CameraError, match=name.rpartition(":")[2]):
        source(name)


def test_an_empty_folder_and_a_text_file_are_refused(tmp_path, source, capfd):
    with pytest.raises(CameraError, match="found none"):
        source(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CameraError, match="no frame"):
        source(tmp_path / "notes.txt")


# --- Motion JPEG over HTTP, as cheap network cameras send it


class Stream(http.server.BaseHTTPRequestHandler):
    """`server.frames` frames of rising grey, 10 ms apart, and then what `server.then` says."""

    disable_nagle_algorithm = True  # it holds frames back for 40 ms

    def do_GET(self):
        try:
            if self.server.then == "nothing at all":
                self.server.stop.wait(20)
                return
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for index in range(self.server.frames):
                data = cv2.imencode(".jpg", picture(2 * index % 250))[1].tobytes()
                self._send(data)
                if self.server.stop.wait(0.01):
                    return
            if self.server.then == "hang":
                self.server.stop.wait(20)
            while self.server.then == "garbage" and not self.server.stop.wait(0.01):
                self._send(np.random.default_rng(0).bytes(2000))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the camera was closed

    def _send(self, data):
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
        self.wfile.write(head.encode() + data + b"\r\n")

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def serve():
    """Starts stream servers; an address is given for one that comes back."""
    running = []

    def start(frames, then, address=("127.0.0.1", 0)):
        server = http.server.ThreadingHTTPServer(address, Stream)
        server.frames, server.then, server.stop = frames, then, threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def stop():
            server.stop.set()
            server.shutdown()
            server.server_close()
            thread.join()

        running.append(stop)
        return f"http://127.0.0.1:{server.server_port}/", stop

    yield start
    for stop in running:
        stop()


def read_to_the_end(camera, within_s):
    """How many frames came, the error after them, and how long the last read took."""
    read, deadline = 0, time.monotonic() + within_s
    while time.monotonic() < deadline:
        start = time.monotonic()
        try:
            read += camera.read(timeout_s=1) is not None
        except CameraError as error:
            return read, str(error), time.monotonic() - start
    raise AssertionError(f"no error within {within_s} s, {read} frames")


def test_a_stream_delivers_stamps_and_says_when_it_ends(serve, source, capfd):
    camera = source(serve(120, "end")[0])
    assert camera.live
    found = [camera.read(timeout_s=1) for _ in range(40)]
    assert found[0].image.shape == (48, 64, 3)
    grey = [int(frame.image.mean()) for frame in found]
    assert grey == list(range(grey[0], grey[0] + 80, 2))
    captured = [frame.captured_ns for frame in found]
    assert captured == sorted(captured)
    # once the frames from before the opening are through, each is waited for
    for last, frame in pairwise(found[30:]):
        assert last.captured_ns <= frame.began_ns < frame.captured_ns <= time.monotonic_ns()
    read, error, _ = read_to_the_end(camera, 5)
    assert read > 50
    assert "stopped delivering" in error


def test_a_stream_that_falls_silent_is_given_up_before_the_watchdog_kills(serve, source, capfd):
    camera = source(serve(120, "hang")[0], stall_s=0.8)
    _, error, took_s = read_to_the_end(camera, 5)
    assert "stopped delivering" in error
    assert 0.3 < took_s < 0.8


def test_a_stream_that_turns_to_garbage_gives_no_picture_of_it(serve, source, capfd):
    camera = source(serve(120, "garbage")[0], stall_s=0.8)
    pictures, deadline = [], time.monotonic() + 5
    with pytest.raises(CameraError, match="stopped delivering"):  # noqa: PT012 (the last of many reads)
        while time.monotonic() < deadline:
            pictures.append(camera.read(timeout_s=1).image)
    assert max(np.ptp(image.reshape(-1)) for image in pictures) < 10  # each is of one grey


def test_a_server_that_accepts_and_says_nothing_does_not_open(serve, source, monkeypatch, capfd):
    monkeypatch.setattr(opencv_source, "OPEN_TIMEOUT_MS", 500)
    start = time.monotonic()
    with pytest.raises(CameraError, match="does not open"):
        source(serve(0, "nothing at all")[0])
    assert time.monotonic() - start < 3


def test_a_stream_opens_again_when_its_server_is_back(serve, source, capfd):
    url, stop = serve(10_000, "end")
    camera = source(url, stall_s=0.8)
    assert camera.read(timeout_s=1) is not None
    stop()
    read_to_the_end(camera, 5)
    with pytest.raises(CameraError, match="does not open"):
        source(url)
    serve(10_000, "end", ("127.0.0.1", int(url.rstrip("/").rpartition(":")[2])))
    assert source(url).read(timeout_s=1) is not None


def test_a_setting_that_did_not_stick_is_seen(serve, source, capfd):
    camera = source(serve(120, "end")[0], width=64, height=480, exposure=-5)
    asked_and_found = camera.settings()
    assert asked_and_found["width"] == ("64", "64")
    assert asked_and_found["height"] == ("480", "48")
    assert asked_and_found["exposure"][0] == "-5" != asked_and_found["exposure"][1]
    assert "gain" not in asked_and_found  # it was not asked for


# --- the drawn pattern


def test_the_pattern_carries_its_number_and_no_two_frames_are_alike(source):
    camera = source("pattern:fps=1000,width=100,height=40")
    images = [camera.read(timeout_s=1).image.copy() for _ in range(300)]  # an image is good until the next read
    assert [number_in(image) for image in images] == list(range(1, 301))
    assert images[0].shape == (40, 100, 3)
    assert len({image[20:].tobytes() for image in images[:90]}) == 90  # below the number too


def test_faults_come_at_their_frame(source):
    camera = source("pattern:fps=1000,garbage@2,damage@3,gap@4:7,freeze@5,close@8,slow@6:0.1")
    start = time.monotonic()
    found = read_all(camera, 5)
    assert [frame.image is None for frame in found] == [False, False, True, False, False]
    assert found[1].image.dtype == np.uint16
    assert found[2].problem
    assert [frame.missed for frame in found] == [0, 0, 0, 7, 0]
    frozen = found[4].image.copy()
    assert number_in(frozen) == 4
    assert time.monotonic() - start < 0.1
    assert (camera.read(timeout_s=1).image == frozen).all()
    assert time.monotonic() - start > 0.1
    assert (camera.read(timeout_s=1).image == frozen).all()
    with pytest.raises(CameraError, match="gone"):
        camera.read(timeout_s=1)


def test_a_fault_that_is_to_happen_once_spares_the_next_process(source, tmp_path):
    name = f"pattern:fps=1000,once={tmp_path / 'done'},close@2"
    with pytest.raises(CameraError, match="gone"):
        read_all(source(name), 3)
    assert len(read_all(source(name), 3)) == 3
