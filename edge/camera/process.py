"""The camera process: frames of a source into the ring, each announced to the line.

In a process of its own, because a read that hangs in a driver cannot be interrupted. It makes progress visible
(`Ring.advance`), and the line kills it when that stands still.
"""

import time
import zlib
from collections import deque

import numpy as np

from stpm.edge.camera import Captured, Source, open_source
from stpm.edge.camera.messages import (
    CameraEnded,
    CameraFailed,
    CameraOpened,
    CameraSettings,
    FrameReady,
    TakePicture,
    ToCamera,
)
from stpm.edge.channel import Channel, ChannelClosedError
from stpm.edge.errors import CameraError, InputError
from stpm.edge.preprocess import Image, widen_grey
from stpm.edge.ring import IMAGE_BYTES, Ring
from stpm.edge.worker import serve

READ_S = 0.1  # how long the loop may wait for a frame
IDLE_S = 0.05  # or for a trigger
ROOM_S = 0.002  # or for a slot
ANSWER_S = 1.0  # a camera that does not answer a trigger for so long is broken
LONGEST_QUEUE = 50  # frames that may lie in a driver or network before the one that a trigger waits for
FROZEN_S = 2.0  # and one that shows the same picture for so long
SAMPLE_ROWS = 16  # every so many go into the digest


def main(settings: CameraSettings, channel: Channel[ToCamera], ring: Ring) -> None:
    source: Source | None = None
    try:
        source = open_source(settings)
        channel.send(CameraOpened(source.description, source.live, source.settings()))
        Capture(settings, source, channel, ring).run()
    except CameraError as error:
        # before it is closed, because the driver of a camera that is gone may hang there
        channel.send(CameraFailed(str(error)))
    except ChannelClosedError:
        pass  # the line has ended, or has given us up
    finally:
        if source is not None:
            source.close()


class Capture:
    def __init__(self, settings: CameraSettings, source: Source, channel: Channel[ToCamera], ring: Ring) -> None:
        self._source, self._channel, self._ring = source, channel, ring
        self._on_demand = source.triggered or settings.trigger == "software"
        # a recording may show what it likes
        self._frozen = Frozen(settings.frozen_after if source.live else 0, ring.last_picture)
        self._wanted: deque[TakePicture] = deque()  # pictures, oldest first
        self._asked_ns: int | None = None  # when the device was triggered for the oldest one
        self._passed_over = 0  # frames that were older than the trigger that waits
        self._number = 0

    def run(self) -> None:
        ended = False
        while True:
            self._ring.advance()
            idle = ended or (self._source.triggered and not self._wanted)
            room = self._source.live or len(self._ring.taken) < self._ring.slots  # a recording waits for it
            self._wanted.extend(self._channel.receive(IDLE_S if idle else 0 if room else ROOM_S))
            if self._source.finished and not ended:
                ended = self._channel.send(CameraEnded())
            if room and not ended and (self._wanted or not self._source.triggered):
                self._step()
            elif self._source.live:
                self._source.read(0)  # so that a camera that is lost between two triggers is noticed

    def _step(self) -> None:
        """One frame, or a while without one."""
        if self._source.triggered and self._asked_ns is None:
            self._pass_over(time.monotonic_ns())
            self._source.trigger()
            self._asked_ns = time.monotonic_ns()
        captured = self._source.read(READ_S)
        if captured is None:
            silent_s = (time.monotonic_ns() - (self._asked_ns or time.monotonic_ns())) / 1e9
            if self._source.live and silent_s > ANSWER_S:
                raise CameraError(f"{self._source.description} has not answered a trigger for {ANSWER_S:g} s")
            return
        problem = captured.problem or self._frozen.look(captured.image, captured.captured_ns)
        self._ring.last_picture = self._frozen.last_picture
        if not (problem or self._source.triggered):
            self._pass_over(captured.began_ns)
        if not self._on_demand:
            self._announce(captured, problem, None)
        elif self._wanted and (self._source.triggered or captured.began_ns >= self._wanted[0].at_ns):
            self._asked_ns, self._passed_over = None, 0
            self._announce(captured, problem, self._wanted.popleft().trigger)
        elif self._wanted:
            self._passed_over += 1
            if self._passed_over > LONGEST_QUEUE:
                raise CameraError(
                    f"{self._source.description} gives frames from before the trigger only: this computer does not "
                    "keep up with it, so lower camera.fps or the size"
                )

    def _pass_over(self, exposed_ns: int) -> None:
        """Answer the triggers that one has followed by `exposed_ns`: a picture from then on may show a later part, and
        the one whose part it shows would wait for theirs. A recording has its own order."""
        while self._source.live and len(self._wanted) > 1 and self._wanted[1].at_ns <= exposed_ns:
            asked = self._wanted.popleft()
            problem = "no picture was taken before the next trigger, and one taken later may show another part"
            self._announce(Captured(asked.at_ns, asked.at_ns, "", None), problem, asked.trigger)

    def _announce(self, captured: Captured, problem: str, trigger: int | None) -> None:
        self._number += 1
        slot, shape = None, (0, 0, 0)
        if captured.image is not None:
            try:
                image = widen_grey(captured.image)
                slot, shape, problem = self._keep(image, problem)
            except InputError as error:
                problem = str(error)
        name = captured.name or str(self._number)
        frame = FrameReady(self._number, captured.captured_ns, name, slot, shape, problem, trigger, captured.missed)
        while not self._channel.send(frame):
            if self._source.live:  # the line sees the gap in the numbers
                if slot is not None:
                    self._ring.release(slot)
                return
            self._ring.advance()
            self._wanted.extend(self._channel.receive(IDLE_S))

    def _keep(self, image: Image, problem: str) -> tuple[int | None, tuple[int, int, int], str]:
        """Slot, shape and problem of a frame that goes into the ring if there is room."""
        height, width = image.shape[:2]
        if image.nbytes > IMAGE_BYTES:
            return (
                None,
                (0, 0, 0),
                f"a frame of {width}×{height} pixels is too large: set the camera to a smaller size",
            )
        slot = self._ring.claim()
        if slot is None:
            return None, (0, 0, 0), "no free slot: the line takes no frames"
        self._ring.image(slot, (height, width, 3))[:] = image
        return slot, (height, width, 3), problem


class Frozen:
    """Notices a picture that comes again: no sensor gives the same one twice, a hung driver does, and what it gives is
    not the part that is in front of the camera.

    Of each a digest is compared with that of the one before, and only when these are the same the whole, so that a
    healthy camera pays little.
    """

    def __init__(self, after: int, last_picture: int) -> None:
        """`last_picture`: digest of the one that the process before this one had last, or 0."""
        self._after = after
        self.last_picture = last_picture
        self._last: Image | None = None
        self._alike = 1
        self._since_ns = 0

    def look(self, image: Image | None, now_ns: int) -> str:
        """The problem with a picture that is the same as the one before. CameraError when that goes on."""
        if not self._after or image is None:
            return ""
        before, self.last_picture = self.last_picture, _digest(image)
        last, self._last = self._last, image
        if before != self.last_picture or (last is not None and not np.array_equal(last, image)):
            self._alike, self._since_ns = 1, now_ns
            return ""
        if last is None:
            self._since_ns = now_ns
        self._alike += 1
        if self._alike < self._after:
            return f"the same picture again: number {self._alike}, and the camera counts as frozen at {self._after}"
        if now_ns - self._since_ns > FROZEN_S * 1e9:
            raise CameraError(f"the camera has shown the same picture for {FROZEN_S:g} s: it is frozen")
        return f"the camera is frozen: picture number {self._alike} that is the same"


def _digest(image: Image) -> int:
    """Of some rows; never 0."""
    return zlib.crc32(image[::SAMPLE_ROWS].tobytes()) | 1 << 32


if __name__ == "__main__":
    serve(CameraSettings, ToCamera, main)
