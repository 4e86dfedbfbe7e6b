"""What every frame source can do."""

from dataclasses import dataclass
from typing import Protocol

from stpm.edge.preprocess import Image


@dataclass(frozen=True)
class Frame:
    """One captured frame. `image` is None when it was captured but cannot be used; `problem` then says why."""

    number: int  # counted from 1 over everything captured, dropped frames included
    captured_ns: int  # monotonic
    name: str  # file name, or the number of the frame
    image: Image | None
    problem: str = ""


class Camera(Protocol):
    @property
    def captured(self) -> int:
        """Frames captured so far."""

    @property
    def dropped(self) -> int:
        """Frames captured that were never read: a newer one replaced them, or the camera was closed."""

    @property
    def finished(self) -> bool:
        """True when a recorded source has no further frame."""

    def read(self, timeout: float) -> Frame | None:
        """The next frame, or None when none came within `timeout` seconds. CameraError when the source has stopped."""

    def close(self) -> None:
        """Release the device; a second call does nothing. From then on captured = read + dropped."""
