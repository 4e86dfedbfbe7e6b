"""AUROC, AUPRO and F1-max, exact: every distinct score is a threshold, ties count half."""

import cv2
import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating]

FPR_LIMIT = 0.3


def auroc(scores: Floats, positive: Bools) -> float | None:
    """Area under the ROC curve; None (not defined) unless both classes are there."""
    curve = roc(scores, positive)
    return None if curve is None else float(np.trapezoid(curve[1], curve[0]))


def aupro(maps: Floats, masks: Bools, limit: float = FPR_LIMIT) -> float | None:
    """Area under the per-region overlap over the false-positive rate up to `limit`, divided by `limit`; None where
    the curve is not defined."""
    curve = pro(maps, masks)
    if curve is None:
        return None
    return mean_up_to(*curve, limit)


def mean_up_to(x: Floats, y: Floats, limit: float) -> float:
    """Area under a curve from 0 to `limit`, divided by it."""
    inside = x <= limit
    end = np.interp(limit, x, y)
    return float(np.trapezoid(np.append(y[inside], end), np.append(x[inside], limit)) / limit)


def f1_max(scores: Floats, positive: Bools) -> tuple[float, float] | None:
    """The largest F1 = 2·TP / (2·TP + FP + FN) that a threshold reaches, and the threshold: what scores above it is
    positive, as on the line. None unless both classes are there."""
    if positive.all() or not positive.any():
        return None
    values, inverse = np.unique(-scores, return_inverse=True)  # highest score first
    true = np.cumsum(np.bincount(inverse, positive))
    f1 = 2 * true / (np.cumsum(np.bincount(inverse)) + positive.sum())
    best = int(np.argmax(f1))
    highest_below = -values[best + 1] if best + 1 < len(values) else -values[best] - abs(values[best])
    return float(f1[best]), float((highest_below - values[best]) / 2)


def roc(scores: Floats, positive: Bools) -> tuple[Floats, Floats] | None:
    """False- and true-positive rate at every threshold, from (0, 0) to (1, 1); None unless both classes are there."""
    scores, positive = scores.ravel(), positive.ravel()
    if positive.all() or not positive.any():
        return None
    return _curve(scores, ~positive / (~positive).sum(), positive / positive.sum())


def pro(maps: Floats, masks: Bools) -> tuple[Floats, Floats] | None:
    """False-positive rate and mean per-region overlap at every threshold; maps and masks are N×H×W.

    The overlap of each connected (8-neighbour) region counts the same, whatever its size; the false-positive rate is
    over all defect-free pixels of all images. None when there is no region or no defect-free pixel.
    """
    region_weight = np.zeros(masks.shape, np.float64)
    regions = 0
    for weight, mask in zip(region_weight, masks, strict=True):
        found, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        sizes = np.bincount(labels.ravel())
        weight[mask] = 1 / sizes[labels[mask]]
        regions += found - 1
    normal = ~masks
    if regions == 0 or not normal.any():
        return None
    return _curve(maps.ravel(), normal.ravel() / normal.sum(), region_weight.ravel() / regions)


def _curve(scores: Floats, x_weight: Floats, y_weight: Floats) -> tuple[Floats, Floats]:
    """Both weights summed over everything at or above each distinct score, highest first, from (0, 0)."""
    order = np.argsort(-scores)
    ranked = scores[order]
    last_of_ties = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    x = np.cumsum(x_weight[order])[last_of_ties]
    y = np.cumsum(y_weight[order])[last_of_ties]
    return np.append(0.0, x), np.append(0.0, y)
