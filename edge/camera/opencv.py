"""Live sources through OpenCV: USB cameras by index or device, network cameras by URL.

What is odd about them: the driver queues frames, so a reader that pauses gets old ones; a read may hang for ever (the
camera process is killed then); settings may be ignored without an error, so each is read back.
"""

import resource
import time
from typing import cast

import cv2

from stpm.edge.camera.base import Captured
from stpm.edge.camera.messages import CameraSettings
from stpm.edge.errors import CameraError
from stpm.edge.preprocess import Image

OPEN_TIMEOUT_MS = 4000
# of what the watchdog allows, so that a stream that falls silent ends in a sentence and not in a kill
READ_SHARE = 0.75
# a frame that is grabbed in less time was not waited for, and neither was one for which the thread never slept
QUEUED_NS = 1_000_000
# V4L2's numbers for who chooses the exposure
MANUAL_EXPOSURE = 1


class OpenCvSource:
    live, triggered, finished = True, False, False

    def __init__(self, settings: CameraSettings) -> None:
        self._name = settings.source
        self._capture = _open(settings.source, round(settings.stall_s * READ_SHARE * 1000))
        if not self._capture.isOpened():
            self._capture.release()
            raise CameraError(
                f"the camera {self._name} does not open: check that it is plugged in, that no other program uses it "
                "and that this user may read it (`ls -l /dev/video*`)"
            )
        self._settings = self._apply(settings)
        self.description = f"{self._name} through OpenCV ({self._capture.getBackendName()})"
        self._began_ns = 0  # the first frames may be from before it was opened

    def settings(self) -> dict[str, tuple[str, str]]:
        return self._settings

    def trigger(self) -> None:
        """Frames come by themselves; the process chooses the first one after the trigger."""

    def read(self, timeout_s: float) -> Captured | None:
        before_ns, slept = time.monotonic_ns(), _times_slept()
        try:
            good = self._capture.grab()
            captured_ns = time.monotonic_ns()
            if captured_ns - before_ns > QUEUED_NS and _times_slept() > slept:
                self._began_ns = before_ns
            # else it lay in a queue, where it may have come any time since that was last seen empty
            good, image = self._capture.retrieve() if good else (False, None)
        except cv2.error as error:
            raise CameraError(
                f"the camera {self._name} failed in OpenCV ({error.err}): check cable and power"
            ) from error
        if not good or image is None:
            raise CameraError(f"the camera {self._name} has stopped delivering frames: check cable and power")
        return Captured(self._began_ns, captured_ns, "", cast(Image, image))

    def close(self) -> None:
        self._capture.release()

    def _apply(self, settings: CameraSettings) -> dict[str, tuple[str, str]]:
        """In the order in which drivers take them: the format decides which sizes and rates there are."""
        capture = self._capture
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        report = {}
        if settings.fourcc is not None:
            capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*settings.fourcc.ljust(4)[:4]))
            code = int(capture.get(cv2.CAP_PROP_FOURCC))
            found = "".join(chr(code >> shift & 0xFF) for shift in (0, 8, 16, 24))
            report["fourcc"] = (settings.fourcc, found.strip("\0 "))
        if settings.exposure is not None:
            capture.set(cv2.CAP_PROP_AUTO_EXPOSURE, MANUAL_EXPOSURE)
        for name, wanted, number in (
            ("width", settings.width, cv2.CAP_PROP_FRAME_WIDTH),
            ("height", settings.height, cv2.CAP_PROP_FRAME_HEIGHT),
            ("fps", settings.fps, cv2.CAP_PROP_FPS),
            ("exposure", settings.exposure, cv2.CAP_PROP_EXPOSURE),
            ("gain", settings.gain, cv2.CAP_PROP_GAIN),
        ):
            if wanted is not None:
                capture.set(number, wanted)
                report[name] = (f"{wanted:g}", f"{capture.get(number):g}")
        return report


def _times_slept() -> int:
    """How often this thread has waited for something; that it had to yield its core to others does not count."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def _open(source: str, read_timeout_ms: int) -> cv2.VideoCapture:
    if source.isdigit():
        return cv2.VideoCapture(int(source))
    if "://" not in source:
        return cv2.VideoCapture(source)
    # without these a server that accepts and says nothing holds the read for half a minute
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPEN_TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, read_timeout_ms]
    # several threads decode several frames at a time, and each comes that much later
    limits += [cv2.CAP_PROP_N_THREADS, 1]
    return cv2.VideoCapture(source, cv2.CAP_FFMPEG, limits)
