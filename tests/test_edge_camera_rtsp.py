"""A network camera over RTSP, from a real server: it stops, hangs, and comes back at the same address."""

import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from test_edge_camera_host import hosted, poll_until

SYSTEM_PYTHON = "/usr/bin/python3"
SCRIPT = Path(__file__).with_name("rtsp_server.py")
NEEDED = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"

pytestmark = pytest.mark.skipif(
    not Path(SYSTEM_PYTHON).exists()
    or subprocess.run([SYSTEM_PYTHON, "-c", NEEDED], capture_output=True, check=False).returncode != 0,
    reason="no RTSP server: apt-get install python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-good",
)


class Server:
    """At the same port each time."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"rtsp://127.0.0.1:{self.port}/video"
        self.start()

    def start(self):
        words = [SYSTEM_PYTHON, str(SCRIPT), str(self.port)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.stop()


def test_a_camera_over_rtsp_delivers_frames_that_differ(server):
    with hosted(server.url) as (host, _):
        frames = poll_until(host, lambda frames: len(frames) >= 30, 15)
        assert host.opened.live
        assert {frame.problem for frame in frames} == {""}
        assert {frame.shape for frame in frames} == {(240, 320, 3)}
        assert [frame.number for frame in frames[:30]] == list(range(1, 31))


def test_a_server_that_ends_and_comes_back_is_connected_again(server):
    with hosted(server.url, stall_s=1.0) as (host, _):
        poll_until(host, lambda frames: len(frames) >= 5, 15)
        server.stop()
        poll_until(host, lambda _: not host.ready, 5)
        time.sleep(0.5)
        server.start()
        there = time.monotonic()
        poll_until(host, lambda frames: len(frames) >= 5, 10)
        assert time.monotonic() - there < 5


def test_a_server_that_hangs_is_noticed_and_connected_again(server):
    with hosted(server.url, stall_s=1.0) as (host, _):
        poll_until(host, lambda frames: len(frames) >= 5, 15)
        server.process.send_signal(signal.SIGSTOP)
        poll_until(host, lambda _: not host.ready, 5)
        server.process.send_signal(signal.SIGCONT)
        poll_until(host, lambda frames: len(frames) >= 5, 15)
