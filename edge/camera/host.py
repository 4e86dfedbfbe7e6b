"""The line's side of the camera process: its frames, whether it gets on, and the slots that are in use."""

import time
from pathlib import Path

import msgspec

from stpm.edge.camera.messages import (
    CameraEnded,
    CameraFailed,
    CameraOpened,
    CameraSettings,
    FrameReady,
    FromCamera,
    TakePicture,
)
from stpm.edge.channel import ChannelClosedError
from stpm.edge.ring import Ring
from stpm.edge.supervisor import Supervisor
from stpm.edge.worker import Worker

MODULE = "stpm.edge.camera.process"


def is_recorded(source: str) -> bool:
    """A folder or a file: every frame is wanted, at the pace of the line."""
    return Path(source).is_dir() or Path(source).is_file()


class CameraHost:
    def __init__(self, settings: CameraSettings, ring: Ring) -> None:
        self.recorded = is_recorded(settings.source)
        # a recording hands out each frame when it is asked for it, so that none waits and none is lost
        asked = msgspec.structs.replace(settings, trigger="software") if self.recorded else settings
        self._ring = ring
        self._stall_ns, self._open_ns = round(settings.stall_s * 1e9), round(settings.open_s * 1e9)
        self.supervisor = Supervisor(lambda: Worker(MODULE, asked, FromCamera, ring))
        self.opened: CameraOpened | None = None
        self.ended = False
        self.error = ""  # why it is not there
        self._held: set[int] = set()  # slots that have been announced and not been released
        self._progress, self._moved_ns = 0, 0

    @property
    def ready(self) -> bool:
        return self.opened is not None

    def fileno(self) -> int | None:
        return self.supervisor.worker.channel.fileno() if self.supervisor.worker else None

    def due_ns(self) -> int | None:
        """When the next start is due."""
        return None if self.ended else self.supervisor.due_ns()

    def take(self, trigger: int) -> bool:
        worker = self.supervisor.worker
        return worker is not None and self.ready and worker.channel.send(TakePicture(trigger, time.monotonic_ns()))

    def release(self, slot: int) -> None:
        self._held.discard(slot)
        self._ring.release(slot)

    def poll(self, now_ns: int) -> tuple[list[FrameReady], bool]:
        """The frames that have come, and True when the process has gone or was killed because it hangs."""
        if not self.ended and self.supervisor.tick(now_ns):
            self._moved_ns = now_ns
        worker = self.supervisor.worker
        if worker is None:
            return [], False
        try:
            messages = worker.channel.receive()
        except ChannelClosedError:
            self._down("the camera process has died", now_ns)
            return [], not self.ended
        frames = self._take_in(messages, now_ns)
        limit_ns = self._stall_ns if self.ready else self._open_ns
        if self._ring.progress != self._progress:
            self._progress, self._moved_ns = self._ring.progress, now_ns
        if now_ns - self._moved_ns > limit_ns and not self.ended:
            frames += self._down(f"the camera has hung for {limit_ns / 1e9:g} s", now_ns)
            return frames, True
        return frames, False

    def end(self) -> None:
        self.supervisor.end(grace_s=1)

    def _take_in(self, messages: list[FromCamera], now_ns: int) -> list[FrameReady]:
        frames = []
        for message in messages:
            match message:
                case FrameReady():
                    frames.append(message)
                    if message.slot is not None:
                        self._held.add(message.slot)
                case CameraOpened():
                    self.opened, self.error = message, ""
                    self._moved_ns = now_ns
                    self.supervisor.well(now_ns)
                case CameraEnded():
                    self.ended = True
                case CameraFailed():
                    self.error = message.sentence
        return frames

    def _down(self, sentence: str, now_ns: int) -> list[FrameReady]:
        frames = self._take_in(self.supervisor.down(now_ns), now_ns)
        self.error = self.error or sentence
        self.opened = None
        for slot in self._ring.taken:  # what it had claimed and not announced
            if slot not in self._held:
                self._ring.release(slot)
        return frames
