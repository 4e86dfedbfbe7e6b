"""From a camera frame to the network's input: the one definition, for training, calibration and the line.

uint8 H×W×3 BGR → ROI → resize (area) → RGB → /255 → (x − mean) / std → float32 1×3×h×w
"""

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from stpm.edge.errors import InputError, RegionError

Image = npt.NDArray[np.uint8]
Tensor = npt.NDArray[np.float32]


class Preprocess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`roi` is x, y, width, height in pixels of the camera frame; None takes the whole frame."""

    height: int = 256
    width: int = 256
    roi: tuple[int, int, int, int] | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __call__(self, image: Image) -> Tensor:
        """A camera frame (uint8 H×W×3 BGR, or H×W grey) as float32 1×3×height×width."""
        return self.normalise(self.resize(image))

    def resize(self, image: Image) -> Image:
        """The region of interest as uint8 height×width×3 BGR: the picture that the networks see."""
        image = widen_grey(image)
        x, y, width, height = self.region(*image.shape[:2])
        region = image[y : y + height, x : x + width]
        if region.shape[:2] == (self.height, self.width):
            return np.ascontiguousarray(region)
        return cv2.resize(region, (self.width, self.height), interpolation=cv2.INTER_AREA).astype(np.uint8)

    def normalise(self, resized: Image) -> Tensor:
        """uint8 height×width×3 BGR as float32 1×3×height×width, RGB, ImageNet mean and deviation removed."""
        rgb = resized[:, :, ::-1].astype(np.float32) / np.float32(255)
        rgb = (rgb - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(rgb.transpose(2, 0, 1)[None])

    def region(self, frame_height: int, frame_width: int) -> tuple[int, int, int, int]:
        """x, y, width and height of what is looked at in such a frame; RegionError when it does not lie inside."""
        if self.roi is None:
            return 0, 0, frame_width, frame_height
        x, y, width, height = self.roi
        if min(x, y) < 0 or min(width, height) < 1 or x + width > frame_width or y + height > frame_height:
            raise RegionError(
                f"the region of interest {x},{y},{width},{height} does not lie inside a frame of "
                f"{frame_width}×{frame_height} pixels: set the camera to the size the bundle was built for, "
                "or build with another --roi"
            )
        return self.roi


def widen_grey(image: Image) -> Image:
    """H×W or H×W×1 as H×W×3; anything that is not 8-bit grey or BGR is refused."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.size == 0:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"wanted a frame of uint8 pixels, found {found}: set the camera to an 8-bit format")
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise InputError(
            f"wanted a frame H×W (grey) or H×W×3 (BGR), found shape {image.shape}: convert it to BGR first"
        )
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
