"""The anomaly score of STPM (Wang et al. 2021), in numpy: the one definition.

Graphs and kernels are tested against this file; it is written to be read, not to be fast.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

# Both feature vectors get one more channel, √EPS. Two zero vectors are then equal (level 0) and a zero vector is at
# right angles to any other (level 1), without a branch; vectors of ordinary length do not notice.
EPS = 1e-12


def level_map(teacher: Array, student: Array) -> Array:
    """One minus the cosine between two feature maps, C×H×W each → H×W, in [0, 1] for non-negative features.

    Wang et al., eq. 1: ½‖t/‖t‖ − s/‖s‖‖² = 1 − t·s / (‖t‖‖s‖).
    """
    t, s = teacher.astype(np.float64), student.astype(np.float64)
    tt, ss, ts = (t * t).sum(0), (s * s).sum(0), (t * s).sum(0)
    cosine = (ts + EPS) / (np.sqrt(tt + EPS) * np.sqrt(ss + EPS))
    level: Array = np.maximum(1 - cosine, 0).astype(np.float32)
    return level


def upsample(level: Array, height: int, width: int) -> Array:
    """h×w → height×width, bilinear with half-pixel centres, the border repeated."""
    rows = _interpolation(level.shape[0], height)
    columns = _interpolation(level.shape[1], width)
    larger: Array = (rows @ level.astype(np.float64) @ columns.T).astype(np.float32)
    return larger


def anomaly_map(levels: list[Array], height: int, width: int) -> Array:
    """The product of the level maps, each upsampled to height×width (Wang et al., eq. 4)."""
    product = np.ones((height, width), np.float32)
    for level in levels:
        product *= upsample(level, height, width)
    return product


def score(anomaly: Array) -> float:
    """The maximum of the anomaly map."""
    return float(anomaly.max())


def bounding_box(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int] | None:
    """x, y, width and height of the smallest box around the true pixels of an H×W mask; None when there are none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def _interpolation(source: int, target: int) -> npt.NDArray[np.float64]:
    """The target×source matrix of linear interpolation with half-pixel centres."""
    position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    left = np.minimum(position.astype(int), max(source - 2, 0))
    matrix = np.zeros((target, source))
    matrix[np.arange(target), left] = 1 - (position - left)
    matrix[np.arange(target), np.minimum(left + 1, source - 1)] += position - left
    return matrix
