"""Scratches drawn on photos of good parts, where a defect is needed and none is at hand."""

import cv2
import numpy as np

from stpm.calibration.dataset import Images, Labelled, LabelledImage
from stpm.edge.preprocess import Image, Preprocess


def scratched(frame: Image, preprocess: Preprocess, place: tuple[float, float]) -> Image:
    """A light line with a dark core, a fifth of the picture long, through a place given as a share of the picture."""
    x, y, width, height = preprocess.roi or (0, 0, frame.shape[1], frame.shape[0])
    start, end = (
        (round(x + width * (place[0] + step)), round(y + height * (place[1] + step))) for step in (-0.1, 0.1)
    )
    result = frame.copy()
    cv2.line(result, start, end, (255, 255, 255), max(4, width // 40))
    cv2.line(result, start, end, (0, 0, 0), max(2, width // 80))
    return result


def with_faint_scratches(normals: Images, seed: int) -> Labelled:
    """Every normal twice, as it is and with one faint scratch, whose mask is known.

    The scratches are short, one to three pixels wide and a tenth to a third of the grey scale lighter or darker than
    the part: some are found and some are not, so that a worse engine finds fewer.
    """
    random = np.random.default_rng(seed)
    drawn, masks = zip(*(_faint_scratch(pixels, random) for pixels in normals.pixels), strict=True)
    good = [LabelledImage(path, "good", None) for path in normals.paths]
    scratches = [LabelledImage(path, "drawn scratch", None) for path in normals.paths]
    return Labelled(
        good + scratches,
        np.concatenate([normals.pixels, np.stack(drawn)]),
        np.concatenate([np.zeros(normals.pixels.shape[:3], bool), np.stack(masks)]),
        np.ones(2 * len(good), bool),
    )


def _faint_scratch(pixels: Image, random: np.random.Generator) -> tuple[Image, np.ndarray]:
    height, width = pixels.shape[:2]
    centre = random.uniform(0.2, 0.8, 2) * (width, height)
    angle, length = random.uniform(0, np.pi), random.uniform(0.04, 0.12) * width
    reach = np.array([np.cos(angle), np.sin(angle)]) * length
    line = np.zeros((height, width), np.uint8)
    start, end = (tuple(int(value) for value in np.round(centre + step * reach)) for step in (-1, 1))
    cv2.line(line, start, end, 255, int(random.integers(1, 4)), cv2.LINE_AA)
    change = random.uniform(25, 85) * random.choice((-1, 1))
    result = pixels + change * (line / 255)[:, :, None]
    return np.clip(np.round(result), 0, 255).astype(np.uint8), line > 127
