"""What every frame source can do. Sources live in the camera process: one that hangs takes nothing else with it."""

from dataclasses import dataclass
from typing import Protocol

from stpm.edge.preprocess import Image


@dataclass(frozen=True)
class Captured:
    """One frame of a source. `image` is uint8 H×W×3 BGR or H×W grey, and stays as it is until the next image but one;
    None when it cannot be used, `problem` then says why."""

    began_ns: int  # monotonic: when waiting for it began; what was exposed earlier is not it
    captured_ns: int  # monotonic: when its data were there, before any copy
    name: str  # file name, or empty
    image: Image | None
    problem: str = ""
    missed: int = 0  # frames that the device numbered and never delivered, just before this one


class Source(Protocol):
    description: str
    live: bool  # False for a recording, which waits and ends
    triggered: bool  # a frame comes only after `trigger`; otherwise frames come by themselves

    def settings(self) -> dict[str, tuple[str, str]]:
        """Each setting that was asked for, with what the device says it is now."""

    @property
    def finished(self) -> bool:
        """True when a recording has no further frame."""

    def trigger(self) -> None:
        """Expose one frame now. CameraError when the device is gone."""

    def read(self, timeout_s: float) -> Captured | None:
        """The next frame; None when none came in time. CameraError when the source has stopped."""

    def close(self) -> None:
        """Release the device; a second call does nothing."""
