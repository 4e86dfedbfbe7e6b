"""Recorded sources: every frame is delivered, when it is asked for, at a given pace, once or for ever."""

import time
from pathlib import Path
from typing import cast

import cv2

from stpm.edge.camera.base import Captured
from stpm.edge.command import printable
from stpm.edge.errors import CameraError, InputError
from stpm.edge.images import list_images, read_image
from stpm.edge.preprocess import Image


class Pace:
    """When the next frame is due: as often as `fps` says, at once when it is None."""

    def __init__(self, fps: float | None) -> None:
        self._interval = 1 / fps if fps else 0.0
        self._due = time.monotonic()

    def wait(self, timeout: float) -> bool:
        """True when the frame is due, False when `timeout` seconds passed before."""
        left = self._due - time.monotonic()
        if left > timeout:
            time.sleep(timeout)
            return False
        time.sleep(max(left, 0))
        # a consumer that is late does not get a burst afterwards
        self._due = max(self._due, time.monotonic() - self._interval) + self._interval
        return True


class Recording:
    live, triggered = False, True

    def settings(self) -> dict[str, tuple[str, str]]:
        return {}

    def trigger(self) -> None:
        """The next frame is taken when it is read."""


class FolderSource(Recording):
    """The images of a folder and of its sub-folders, by path.

    A file that cannot be decoded is a frame with a problem.
    """

    def __init__(self, folder: Path, fps: float | None, loop: bool) -> None:
        folders = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]
        self._paths = [path for each in folders for path in list_images(each)]
        if not self._paths:
            raise CameraError(f"wanted images in the folder {folder}, found none: check --camera")
        self._folder, self._loop, self._pace, self._taken = folder, loop, Pace(fps), 0
        self.description = f"{len(self._paths)} images in {folder}"

    @property
    def finished(self) -> bool:
        return not self._loop and self._taken >= len(self._paths)

    def read(self, timeout_s: float) -> Captured | None:
        if self.finished or not self._pace.wait(timeout_s):
            return None
        path = self._paths[self._taken % len(self._paths)]
        self._taken += 1
        began_ns = time.monotonic_ns()
        image: Image | None = None
        problem = ""
        try:
            image = read_image(path)
        except InputError as error:
            problem = str(error)
        # a real camera stamps the frame when it is there, not when reading began
        return Captured(began_ns, time.monotonic_ns(), printable(path.relative_to(self._folder)), image, problem)

    def close(self) -> None:
        """Nothing is held open."""


class VideoFile(Recording):
    """The frames of a video file."""

    def __init__(self, path: Path, fps: float | None, loop: bool) -> None:
        self._path, self._loop, self._taken = path, loop, 0
        self._capture = cv2.VideoCapture(str(path))
        own = self._capture.get(cv2.CAP_PROP_FPS) if self._capture.isOpened() else 0
        self._next = self._decode()
        if self._next is None:
            raise CameraError(f"wanted a video file, found no frame that can be decoded in {path}: convert the file")
        self._pace = Pace(fps or own or None)
        self.description = f"video file {path}"

    @property
    def finished(self) -> bool:
        return self._next is None

    def read(self, timeout_s: float) -> Captured | None:
        if self._next is None or not self._pace.wait(timeout_s):
            return None
        image, now = self._next, time.monotonic_ns()
        self._taken += 1
        self._next = self._decode()
        if self._next is None and self._loop:
            self._capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
            self._next = self._decode()
        return Captured(now, now, f"{self._path.name}#{self._taken}", image)

    def close(self) -> None:
        self._capture.release()

    def _decode(self) -> Image | None:
        good, image = self._capture.read()
        return cast(Image, image) if good else None
