"""Images on disk. A file that cannot be decoded whole is an error with its name, never a half-grey picture."""

from pathlib import Path
from typing import cast

import cv2
import numpy as np

from stpm.edge.errors import InputError
from stpm.edge.preprocess import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}


def list_images(folder: Path) -> list[Path]:
    """The image files directly inside `folder`, by name. Missing folder: InputError."""
    if not folder.is_dir():
        raise InputError(f"wanted a folder of images, found no folder {folder}: check the path")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def read_image(path: Path) -> Image:
    """uint8 H×W×3 BGR; grey and 16-bit files are converted. InputError when the file cannot be decoded whole."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the image {path}: {error.strerror}") from error
    # libjpeg fills the rest of a truncated file with grey and reports success
    truncated = data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data[-1024:]
    image = None
    if data and not truncated:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        what = "empty" if not data else "truncated" if truncated else "damaged or not an image"
        raise InputError(f"cannot decode the image {path}: the file is {what}; replace or remove it")
    return cast(Image, image)
