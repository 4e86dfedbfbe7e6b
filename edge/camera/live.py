"""Live sources through OpenCV: a thread reads as fast as the device delivers and keeps the newest frame only.

Without it the driver's queue hands out old frames, and the reject comes one part late.
"""

import threading
import time
from typing import cast

import cv2

from stpm.edge.camera.base import Frame
from stpm.edge.errors import CameraError
from stpm.edge.preprocess import Image

SILENCE_S = 5.0


class LiveCamera:
    def __init__(self, source: str, fps: float | None) -> None:
        self._source = source
        self._capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
        if not self._capture.isOpened():
            raise CameraError(
                f"the camera {source} does not open: check that it is plugged in, that no other program uses it and "
                "that this user may read it (`ls -l /dev/video*`)"
            )
        if fps:
            self._capture.set(cv2.CAP_PROP_FPS, fps)
        self.captured = self.dropped = 0
        self.finished = False
        self._newest: Frame | None = None
        self._failure = ""
        self._last_ns = time.monotonic_ns()
        self._arrived = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._pump, name=f"camera {source}", daemon=True)
        self._thread.start()

    def read(self, timeout: float) -> Frame | None:
        with self._arrived:
            self._arrived.wait_for(lambda: self._newest is not None or self._failure, timeout)
            frame, self._newest = self._newest, None
        if frame is None:
            silent = (time.monotonic_ns() - self._last_ns) / 1e9
            if self._failure or silent > SILENCE_S:
                what = self._failure or f"has sent no frame for {silent:.0f} s"
                raise CameraError(f"the camera {self._source} {what}: check cable and power, then start again")
        return frame

    def close(self) -> None:
        self._stopping.set()
        with self._arrived:
            self.dropped += self._newest is not None
            self._newest = None
        # a read that hangs in the driver cannot be interrupted; the daemon thread then ends with the process
        self._thread.join(timeout=2)
        if not self._thread.is_alive():
            self._capture.release()

    def _pump(self) -> None:
        while not self._stopping.is_set():
            image, failure = self._grab()
            with self._arrived:
                if image is None:
                    self._failure = failure
                elif not self._stopping.is_set():
                    self._last_ns = time.monotonic_ns()
                    self.captured += 1
                    self.dropped += self._newest is not None
                    self._newest = Frame(self.captured, self._last_ns, str(self.captured), image)
                self._arrived.notify()
            if image is None:
                return

    def _grab(self) -> tuple[Image | None, str]:
        try:
            good, image = self._capture.read()
        except cv2.error as error:
            return None, f"failed in OpenCV ({error.err})"
        if not good or image is None:
            return None, "has stopped delivering frames"
        return cast(Image, image), ""
