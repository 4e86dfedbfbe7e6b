"""What the camera process and the line say to each other."""

from typing import Literal

import msgspec

from stpm.edge.limits import AtLeastOne, Count, Positive


class CameraSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[camera] of a station. None leaves a setting as the camera has it."""

    source: str = ""  # index, /dev/videoN, URL, video file, folder of images, or genicam:NAME
    # free: every frame is a part; software: a frame for each trigger of the PLC
    trigger: Literal["free", "software"] = "free"
    # latest: the newest frame replaces one that waits; every: all wait, up to parts.queue
    policy: Literal["latest", "every"] = "latest"
    fps: Positive | None = None
    width: AtLeastOne | None = None
    height: AtLeastOne | None = None
    fourcc: str | None = None
    exposure: float | None = None  # of OpenCV in the driver's unit, of GenICam in microseconds
    gain: float | None = None
    loop: bool = False  # a folder or video file starts again at its end
    # a frame that is identical with the one before is not judged, and so many in a row are a frozen camera; 0: neither
    # is looked at, for sources that may repeat a picture. Recordings always may
    frozen_after: Count = 3
    stall_s: Positive = 2.0  # a camera process that does not get on for so long is killed and started again
    open_s: Positive = 10.0  # and one that has not opened its source


class CameraOpened(msgspec.Struct, frozen=True, tag=True):
    """The source is open. `settings`: each that was asked for, with what the camera says it is now."""

    description: str
    live: bool  # False for a folder or file: it waits for the line, and it ends
    settings: dict[str, tuple[str, str]] = {}  # name → asked for, read back


class FrameReady(msgspec.Struct, frozen=True, tag=True):
    """A frame lies in `slot` (None: it could not be kept, `problem` says why). The slot is the line's from now on."""

    number: int  # from 1 over everything that this process announced
    # monotonic: when the exposure's data were there, before any copy; of a trigger that was passed over, when it came
    captured_ns: int
    name: str  # file name, or the number of the frame
    slot: int | None
    shape: tuple[int, int, int] = (0, 0, 0)  # height, width, 3 of the uint8 BGR image in the slot
    problem: str = ""  # the frame must not be judged: damaged, the same again, too large, no free slot
    trigger: int | None = None  # the trigger that it answers
    missed: int = 0  # frames that the device numbered and never delivered, just before this one


class CameraEnded(msgspec.Struct, frozen=True, tag=True):
    """A recording is over; no frame follows."""


class CameraFailed(msgspec.Struct, frozen=True, tag=True):
    """The source does not open, has stopped or is frozen; the process ends after this."""

    sentence: str


class TakePicture(msgspec.Struct, frozen=True, tag=True):
    """Line → camera: deliver one frame that was exposed after `at_ns`, for this trigger. When a live camera gets the
    next trigger before that, the answer is a FrameReady without a picture."""

    trigger: int
    at_ns: int  # monotonic


FromCamera = CameraOpened | FrameReady | CameraEnded | CameraFailed
ToCamera = TakePicture
