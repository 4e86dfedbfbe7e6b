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
from stpm.edge.worker import Worker, await_end

MODULE = "stpm.edge.camera.process"
END_S = 1.0


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

    @property
    def differing(self) -> dict[str, tuple[str, str]]:
        """The settings that the camera did not take when it was opened last, each as it was asked for and as it was
        read back; nothing while it is not open."""
        settings = self.opened.settings if self.opened else {}
        return {name: (asked, found) for name, (asked, found) in settings.items() if asked != found}

    def fileno(self) -> int | None:
        return self.supervisor.fileno()

    def due_ns(self) -> int | None:
        """When the next start is due."""
        return None if self.ended else self.supervisor.due_ns()

    def take(self, trigger: int) -> bool:
        worker = self.supervisor.worker
        return worker is not None and self.ready and worker.channel.send(TakePicture(trigger, time.monotonic_ns()))

    def release(self, slot: int) -> None:
        """The line, or the journal, needs the slot of a frame no longer."""
        assert slot in self._held, f"slot {slot} is nobody's, or was given back before"
        self._held.remove(slot)
        self._ring.release(slot)

    def poll(self, now_ns: int) -> tuple[list[FrameReady], bool]:
        """The frames that have come, and True when the process is gone after these."""
        refused = self.supervisor.refused
        if not self.ended and self.supervisor.tick(now_ns):
            self._moved_ns = now_ns
            self.error = "" if refused else self.error
        if self.supervisor.refused:
            self.error = f"the system does not start a camera process ({self.supervisor.refused}): it is tried again"
        frames: list[FrameReady] = []
        if self.supervisor.worker is not None:
            try:
                frames = self._take_in(self.supervisor.worker.channel.receive(), now_ns)
            except ChannelClosedError as closed:
                self._down(str(closed) or "the camera process has died", now_ns)
            else:
                self._look_at_progress(now_ns)
        last = self.supervisor.last_words(now_ns)
        if last is None:
            return frames, False
        frames += self._take_in([message for message in last if not isinstance(message, CameraOpened)], now_ns)
        for slot in self._ring.taken:  # what it had claimed and not announced
            if slot not in self._held:
                self._ring.release(slot)
        return frames, not self.ended

    def end(self) -> None:
        await_end(self.supervisor.close(), END_S)

    def _look_at_progress(self, now_ns: int) -> None:
        """Kill one that hangs."""
        limit_ns = self._stall_ns if self.ready else self._open_ns
        if self._ring.progress != self._progress:
            self._progress, self._moved_ns = self._ring.progress, now_ns
        if now_ns - self._moved_ns > limit_ns and not self.ended:
            self._down(f"the camera has hung for {limit_ns / 1e9:g} s", now_ns)

    def _take_in(self, messages: list[FromCamera], now_ns: int) -> list[FrameReady]:
        frames = []
        for message in messages:
            match message:
                case FrameReady():
                    frames.append(message)
                    if message.slot is not None:
                        assert message.slot not in self._held, f"slot {message.slot} was taken while it was in use"
                        self._held.add(message.slot)
                case CameraOpened():
                    self.opened, self.error = message, ""
                    self._moved_ns = now_ns
                    self.supervisor.well(now_ns)
                case CameraEnded():
                    self.ended = True
                case CameraFailed():  # its last word; it may hang when it closes the device
                    self.error = message.sentence
                    self._down(message.sentence, now_ns)
        return frames

    def _down(self, sentence: str, now_ns: int) -> None:
        self.error = self.error or sentence
        self.opened = None
        self.supervisor.down(now_ns)
