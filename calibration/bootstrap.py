"""How far the accuracy figures of a test set can be trusted: bootstrap intervals over its images.

Images are drawn with replacement, good and defective ones separately, as many of each as there are: the pixels of one
image go together, because they are not independent of each other. So that a thousand draws take a second, each image
is reduced to histograms of its anomaly map over bins shared by all; a draw is then a weighted sum of these. The
figures themselves stay exact (metrics.py).
"""

import cv2
import numpy as np

from stpm.calibration.metrics import FPR_LIMIT, Bools, Floats, mean_up_to

DRAWS = 1000
SHARE = 0.95
BINS = 4096  # half of them at ranks of all pixels, half at ranks of those on a defect
Interval = tuple[float, float]


def image_intervals(scores: Floats, positive: Bools, seed: int = 0) -> dict[str, Interval | None]:
    """Of image AUROC and F1-max; None unless both classes are there."""
    if positive.all() or not positive.any():
        return {"image_auroc": None, "f1": None}
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last_of_ties = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    weights = _draws(positive, seed)[:, order]
    true = np.cumsum(weights * positive[order], 1)[:, last_of_ties]
    false = np.cumsum(weights * ~positive[order], 1)[:, last_of_ties]
    f1 = 2 * true / (true + false + positive.sum())
    return {"image_auroc": _interval(_area(false, true)), "f1": _interval(f1.max(1))}


def pixel_intervals(
    histograms: "PixelHistograms", among: Bools | None = None, seed: int = 0
) -> dict[str, Interval | None]:
    """Of pixel AUROC and AUPRO, on all images or those marked by `among`; None where there is no defect or nothing
    else."""
    among = np.ones(len(histograms.defective), bool) if among is None else among
    weights = np.zeros((DRAWS, len(among)))
    weights[:, among] = _draws(histograms.defective[among], seed)
    return {"pixel_auroc": _interval(histograms.auroc(weights)), "aupro": _interval(histograms.aupro(weights))}


class PixelHistograms:
    """Anomaly maps N×H×W with their masks, as histograms of each image over shared bins; the figures of any weighted
    choice of the images come from these, within 1e-3 of the exact ones."""

    def __init__(self, maps: Floats, masks: Bools) -> None:
        ranks = np.linspace(0, 1, BINS // 2)
        edges = np.unique([np.quantile(values, ranks) for values in (maps[:, ::2, ::2], maps[masks]) if values.size])
        self.defective: Bools = np.array([mask.any() for mask in masks], bool)
        # highest scores first: pixels without a defect, pixels with one, and shares of the connected regions
        self._normal, self._defect, self._overlap = parts = np.zeros((3, len(maps), len(edges) + 1))
        for index, (anomaly, mask) in enumerate(zip(maps, masks, strict=True)):
            bins = len(edges) - np.searchsorted(edges, anomaly.ravel(), side="right").reshape(mask.shape)
            _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
            share = 1 / np.maximum(np.bincount(labels.ravel()), 1)
            for part, inside, weight in ((0, ~mask, None), (1, mask, None), (2, mask, share[labels[mask]])):
                parts[part, index] = np.bincount(bins[inside], weight, len(edges) + 1)

    def auroc(self, weights: Floats) -> Floats:
        """Of each row of draws × images; not a number where it has no defect or nothing else."""
        return _area(np.cumsum(weights @ self._normal, 1), np.cumsum(weights @ self._defect, 1))

    def aupro(self, weights: Floats) -> Floats:
        normal, overlap = np.cumsum(weights @ self._normal, 1), np.cumsum(weights @ self._overlap, 1)
        return _area_up_to(normal, overlap, FPR_LIMIT)


def _draws(positive: Bools, seed: int) -> Floats:
    """draws × images: how often each image was drawn."""
    random = np.random.default_rng(seed)
    weights = np.zeros((DRAWS, len(positive)))
    for members in (np.flatnonzero(positive), np.flatnonzero(~positive)):
        if len(members):
            weights[:, members] = random.multinomial(len(members), np.full(len(members), 1 / len(members)), DRAWS)
    return weights


def _area(x: Floats, y: Floats) -> Floats:
    """Under each curve of cumulated weights; not a number where a draw has none of a kind."""
    x, y = _from_zero(x), _from_zero(y)
    return np.asarray(np.trapezoid(y, x, axis=1))


def _area_up_to(x: Floats, y: Floats, limit: float) -> Floats:
    curves = zip(_from_zero(x), _from_zero(y), strict=True)
    return np.array([mean_up_to(curve_x, curve_y, limit) for curve_x, curve_y in curves])


def _from_zero(cumulated: Floats) -> Floats:
    """As shares of the whole, from 0 on."""
    with np.errstate(invalid="ignore"):
        shares = cumulated / cumulated[:, -1:]
    return np.concatenate([np.zeros((len(shares), 1)), shares], 1)


def _interval(values: Floats) -> Interval | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)
