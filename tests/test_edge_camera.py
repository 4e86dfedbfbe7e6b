"""Frame sources: every recorded frame arrives, live ones are the newest, and what stops is said."""

import http.server
import threading
import time

import cv2
import numpy as np
import pytest

from stpm.edge.camera import open_camera
from stpm.edge.camera.live import LiveCamera
from stpm.edge.errors import CameraError


def picture(value):
    return np.full((48, 64, 3), value, np.uint8)


@pytest.fixture
def folder(tmp_path):
    for index in range(3):
        cv2.imwrite(str(tmp_path / f"{index}.png"), picture(40 * index))
    return tmp_path


def read_all(camera, limit=50):
    found = []
    while not camera.finished and len(found) < limit:
        frame = camera.read(timeout=1)
        assert frame is not None
        found.append(frame)
    camera.close()
    return found


def test_folder_delivers_every_image_once_by_path(folder):
    (folder / "defects").mkdir()
    cv2.imwrite(str(folder / "defects" / "a.jpg"), picture(200))
    (folder / "notes.txt").write_text("not an image")
    found = read_all(open_camera(str(folder)))
    assert [frame.name for frame in found] == ["0.png", "1.png", "2.png", "defects/a.jpg"]
    assert [frame.number for frame in found] == [1, 2, 3, 4]
    assert [int(frame.image.mean()) for frame in found] == [0, 40, 80, 200]


def test_a_damaged_file_is_a_frame_with_a_problem(folder):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    good = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[1].tobytes()
    (folder / "3.jpg").write_bytes(good[: len(good) // 2])
    (folder / "4.png").touch()
    found = read_all(open_camera(str(folder)))
    assert [frame.image is None for frame in found] == [False, True, False, True, True]
    assert "damaged" in found[1].problem
    assert "truncated" in found[3].problem
    assert "empty" in found[4].problem


def test_loop_starts_again(folder):
    found = read_all(open_camera(str(folder), loop=True), limit=7)
    assert [frame.name for frame in found] == ["0.png", "1.png", "2.png"] * 2 + ["0.png"]
    assert [frame.number for frame in found] == list(range(1, 8))


def test_pace_is_kept_and_waiting_ends_at_the_timeout(folder):
    camera = open_camera(str(folder), fps=10)
    start = time.monotonic()
    assert camera.read(timeout=1) is not None
    assert camera.read(timeout=0.02) is None
    assert time.monotonic() - start < 0.09
    assert camera.read(timeout=1) is not None
    assert camera.read(timeout=1) is not None
    assert 0.19 < time.monotonic() - start < 0.6
    assert camera.finished


def test_capture_time_is_monotonic(folder):
    times = [frame.captured_ns for frame in read_all(open_camera(str(folder)))]
    assert times == sorted(times)
    assert abs(time.monotonic_ns() - times[-1]) < 5e9


def test_video_file(tmp_path):
    file = tmp_path / "line.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 200, (64, 48))
    assert writer.isOpened()
    for index in range(4):
        writer.write(picture(60 * index))
    writer.release()
    found = read_all(open_camera(str(file)))
    assert [round(frame.image.mean() / 60) for frame in found] == [0, 1, 2, 3]
    looped = read_all(open_camera(str(file), loop=True), limit=6)
    assert [round(frame.image.mean() / 60) for frame in looped] == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("source", ["/dev/video97", "97", "nowhere", "http://127.0.0.1:9/stream"])
def test_a_source_that_does_not_open_is_named(source, capfd):
    with pytest.raises(CameraError, match=source):
        open_camera(source)


def test_an_empty_folder_and_a_text_file_are_refused(tmp_path, capfd):
    with pytest.raises(CameraError, match="found none"):
        open_camera(str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CameraError, match="no frame"):
        open_camera(str(tmp_path / "notes.txt"))


class Stream(http.server.BaseHTTPRequestHandler):
    """Motion JPEG over HTTP, as cheap network cameras send it: 40 frames, then the end."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for index in range(40):
            data = cv2.imencode(".jpg", picture(5 * index))[1].tobytes()
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
            try:
                self.wfile.write(head.encode() + data + b"\r\n")
            except (BrokenPipeError, ConnectionResetError):
                return
            time.sleep(0.02)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def stream():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stream)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_live_stream_gives_the_newest_frame_counts_the_rest_and_says_when_it_ends(stream, capfd):
    camera = open_camera(stream)
    assert isinstance(camera, LiveCamera)
    read = 0
    first = camera.read(timeout=5)
    time.sleep(0.3)
    second = camera.read(timeout=5)
    read += 2
    assert second.number > first.number + 1
    assert second.image.mean() > first.image.mean()
    with pytest.raises(CameraError, match="stopped delivering"):  # noqa: PT012 (the last of many reads)
        for _ in range(50):
            read += camera.read(timeout=5) is not None
    camera.close()
    assert camera.captured == read + camera.dropped
    assert camera.dropped > 0


def test_closing_a_live_camera_counts_the_frame_nobody_read(stream, capfd):
    camera = open_camera(stream)
    assert camera.read(timeout=5) is not None
    time.sleep(0.2)
    camera.close()
    assert camera.captured == 1 + camera.dropped
