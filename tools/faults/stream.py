"""A network camera: motion JPEG over HTTP, which stops, hangs, sends rubbish, and comes back at the same address."""

import contextlib
import http.server
import socket
import threading
import time
from typing import Literal

import cv2
import numpy as np

from stpm.edge.camera.messages import CameraSettings
from stpm.edge.camera.pattern import PatternSource

FPS = 25
PICTURES = 250  # that are repeated: far more than it takes to look frozen
BOUNDARY = b"frame"

Mode = Literal["well", "gone", "silent", "garbage"]


class Stream:
    def __init__(self) -> None:
        source = PatternSource("width=160,height=120,fps=1000000", CameraSettings())
        self._pictures = []
        for _ in range(PICTURES):
            captured = source.read(1)
            assert captured is not None
            assert captured.image is not None
            self._pictures.append(cv2.imencode(".jpg", captured.image)[1].tobytes())
        self._mode: Mode = "gone"
        self._noise = np.random.default_rng(0)
        self._leaving = threading.Event()
        self._connections: set[socket.socket] = set()
        self._server: _Server | None = None
        self._port = 0
        self.turn("well")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/video"

    def turn(self, mode: Mode) -> None:
        """From now on it is like this."""
        if mode == "gone":
            self._down()
        elif self._mode == "gone":
            self._up()
        self._mode = mode

    def _up(self) -> None:
        self._leaving.clear()
        self._server = _Server(("127.0.0.1", self._port), _Handler)
        self._server.stream = self
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="stream")
        self._thread.start()

    def _down(self) -> None:
        """Connections end, new ones are refused."""
        server, self._server = self._server, None
        if server is None:
            return
        self._leaving.set()
        server.shutdown()
        self._thread.join()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()  # joins the threads of the connections

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        self.turn("gone")

    def send(self, connection: socket.socket) -> None:
        """Until the reader or the camera is gone."""
        self._connections.add(connection)
        number, due_s = 0, time.monotonic()
        try:
            while not self._leaving.wait(max(0.0, due_s - time.monotonic())):
                due_s += 1 / FPS
                if self._mode == "silent":
                    continue
                picture = self._pictures[number % PICTURES]
                number += 1
                if self._mode == "garbage":
                    picture = self._noise.bytes(len(picture))
                head = b"--%s\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % (BOUNDARY, len(picture))
                connection.sendall(head + picture + b"\r\n")
        except OSError:
            return
        finally:
            self._connections.discard(connection)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    stream: Stream


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={BOUNDARY.decode()}")
        self.end_headers()
        self.server.stream.send(self.connection)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nobody wants to read it."""
