"""A camera that is not there: numbered frames at a given rate, and faults on demand, to try a station and to break it.

pattern:KEY=VALUE,...,FAULT@FRAME,...

    width, height, fps    of the frames (640, 480, 30)
    once=FILE             each fault happens only while FILE does not name it: a camera that was started again is well

    hang@N       the read for frame N never returns          slow@N:S    frame N comes S seconds late
    freeze@N     frame N for ever                            gap@N:K     the device leaves out K frames before N
    garbage@N    frame N is 16-bit noise                     damage@N    frame N comes damaged
    close@N      the camera says that it is gone             exit@N      the camera process dies

The number of a frame is drawn into its first rows as 32 blocks, black or white, so that whoever sees the frame can say
which it was.
"""

import os
import time
from pathlib import Path
from typing import cast

import numpy as np

from stpm.edge.camera.base import Captured
from stpm.edge.camera.messages import CameraSettings
from stpm.edge.camera.recorded import Pace
from stpm.edge.errors import CameraError
from stpm.edge.preprocess import Image

BITS = 32
BLOCK_HEIGHT = 16
FAULTS = ("hang", "freeze", "garbage", "damage", "close", "exit", "slow", "gap")


class PatternSource:
    live, triggered, finished = True, False, False

    def __init__(self, script: str, settings: CameraSettings) -> None:
        self._values = {"width": 640.0, "height": 480.0, "fps": settings.fps or 30.0}
        self._faults: dict[int, list[tuple[str, float]]] = {}
        self._once: Path | None = None
        for word in filter(None, script.split(",")):
            self._read_word(word)
        width, height = int(self._values["width"]), int(self._values["height"])
        if width < BITS or height <= BLOCK_HEIGHT:
            raise CameraError(f"wanted a pattern of {BITS}×{BLOCK_HEIGHT + 1} pixels or more, found {width}×{height}")
        random = np.random.default_rng(0)
        # more rows than a frame has: each frame begins at another one, so that no two are alike
        self._texture = random.integers(60, 190, (height + 97, width, 3), np.uint8)
        self._image, self._other = np.empty((2, height, width, 3), np.uint8)
        self._pace = Pace(self._values["fps"])
        self._number = 0
        self._frozen = False
        self.description = f"a drawn pattern, {width}×{height} at {self._values['fps']:g} fps"

    def settings(self) -> dict[str, tuple[str, str]]:
        return {}

    def trigger(self) -> None:
        """Frames come by themselves."""

    def read(self, timeout_s: float) -> Captured | None:
        began_ns = time.monotonic_ns()
        if not self._pace.wait(timeout_s):
            return None
        self._number += 1
        missed, problem = 0, ""
        due = [(fault, value) for fault, value in self._faults.get(self._number, []) if self._due(fault)]
        self._frozen = self._frozen or any(fault == "freeze" for fault, _ in due)
        if not self._frozen:
            self._draw()
        image: Image | None = self._image
        for fault, value in due:
            match fault:
                case "hang":
                    time.sleep(1e9)
                case "slow":
                    time.sleep(value)
                case "close":
                    raise CameraError("the pattern says that the camera is gone: this is a fault on demand")
                case "exit":
                    os._exit(1)
                case "gap":
                    missed = int(value)
                case "garbage":
                    image = cast(Image, self._texture[: len(self._image)].astype(np.uint16) << 8)
                case "damage":
                    image, problem = None, "the frame came damaged"
        return Captured(began_ns, time.monotonic_ns(), f"#{self._number}", image, problem, missed)

    def close(self) -> None:
        """Nothing is held open."""

    def _read_word(self, word: str) -> None:
        fault, at, rest = word.partition("@")
        key, _, value = word.partition("=")
        number, _, amount = rest.partition(":")
        try:
            if at and fault in FAULTS:
                self._faults.setdefault(int(number), []).append((fault, float(amount or 0)))
                return
            if key == "once":
                self._once = Path(value)
                return
            if key in self._values and float(value) > 0:
                self._values[key] = float(value)
                return
        except ValueError:
            pass  # said below
        raise CameraError(f"the pattern has no word {word!r}: known are width=, height=, fps=, once= and FAULT@FRAME")

    def _due(self, fault: str) -> bool:
        """Whether a fault happens, or has happened to an earlier process."""
        if self._once is None:
            return True
        done = self._once.read_text().split() if self._once.exists() else []
        if fault in done:
            return False
        self._once.write_text(" ".join([*done, fault]))
        return True

    def _draw(self) -> None:
        self._image, self._other = self._other, self._image
        start = self._number % 97
        self._image[:] = self._texture[start : start + len(self._image)]
        block = self._image.shape[1] // BITS
        bits = np.array([self._number >> bit & 1 for bit in range(BITS)], np.uint8) * 255
        self._image[:BLOCK_HEIGHT, : block * BITS] = np.repeat(bits, block)[None, :, None]


def number_in(image: Image) -> int:
    """The number that a pattern has drawn into a frame, uint8 H×W×3."""
    block = image.shape[1] // BITS
    row = image[BLOCK_HEIGHT // 2, block // 2 : block * BITS : block, 0]
    return sum(1 << bit for bit, value in enumerate(row) if value > 127)
