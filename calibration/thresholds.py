"""A threshold from held-out normals alone, without defects: two rules and a warning.

`tail` extrapolates: a generalised-Pareto distribution is fitted to the largest scores, and the threshold is where it
puts the asked share of good parts above. It reaches rates that are rarer than one in the number of normals, on the
assumption that the tail goes on as it began. `quantile` assumes nothing, and cannot promise such rates.
"""

import math
from argparse import ArgumentTypeError

import numpy as np

from stpm.edge.errors import InputError
from stpm.edge.manifest import Threshold
from stpm.edge.score import Array

# The tail: a quarter of the normals, but at least ten and not more than it takes. Tried with 15, 25 and 35 % of 64
# and 200 scores of five distributions.
TAIL_SHARE = 0.25
SMALLEST_TAIL, LARGEST_TAIL = 10, 250
# What is believed of the shape ξ before seeing scores: most tails lie between bounded (-0.5) and heavy (0.7).
SHAPES = np.linspace(-0.7375, 1.2625, 81)  # without 0, where the formula has a limit
SHAPE_MEAN, SHAPE_SPREAD = 0.1, 0.3
CONFIDENCE = 0.95
# the score's logarithm this many robust standard deviations above the median of good parts is suspicious
OUTLIER = 5.0

RULES = ("tail", "quantile")


def fit(scores: Array, rule: str | float, false_reject_rate: float) -> Threshold:
    """The threshold by a rule of RULES, or by hand, for the scores of normals that the student was not trained on."""
    values = np.asarray(scores, np.float64)
    if isinstance(rule, float):
        return manual(rule, values)
    found = {"tail": tail, "quantile": quantile}[rule](values, false_reject_rate)
    if not (math.isfinite(found.value) and found.value > 0):
        raise InputError(
            f"wanted scores of normals that a threshold can lie above, found a threshold of {found.value}: check that "
            "the images differ from each other, and the student's training"
        )
    return found


def tail(scores: np.ndarray, false_reject_rate: float) -> Threshold:
    """The score that a new good part exceeds with this probability, after what the normals say about their tail.

    Excesses y over the threshold u of the tail follow P(Y > y) = (1 + ξy/σ)^(-1/ξ) (Pickands 1975). With a few dozen
    of them the best fit is too optimistic (its false rejects were 1.2 to 1.6 times the asked 1 % at 64 normals), so
    the probability is averaged over all (ξ, σ) by how well they fit (a posterior on a grid; prior: ξ near 0.1, any σ).
    `interval` is the 95 % interval of the false-reject rate at this threshold. Where there is no tail to fit (fewer
    than 20 scores) or nothing to extrapolate (a rate that lies in the body), it is the threshold of `quantile`.
    """
    count = len(scores)
    excesses = math.ceil(np.clip(TAIL_SHARE * count, SMALLEST_TAIL, LARGEST_TAIL))
    if count < 2 * SMALLEST_TAIL or false_reject_rate >= excesses / count:
        return quantile(scores, false_reject_rate)
    ordered = np.sort(scores)
    start = float(ordered[-excesses - 1])
    tail_share = (excesses + 0.5) / (count + 1)
    belief, shape, scale = _posterior(ordered[-excesses:] - start)

    def exceeded(value: float) -> np.ndarray:
        """P(score > value) for every (ξ, σ) of the grid."""
        inside = np.maximum(1 + shape * (value - start) / scale, 0)
        with np.errstate(divide="ignore"):
            return tail_share * np.where(inside > 0, inside ** (-1 / shape), 0)

    low, high = start, float(ordered[-1])
    while float(np.sum(belief * exceeded(high))) > false_reject_rate:
        high += high - start
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(belief * exceeded(middle)) > false_reject_rate else (low, middle)
    return Threshold(high, "tail", false_reject_rate, count, _interval(exceeded(high), belief))


def _posterior(excesses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How likely each (ξ, σ) of a grid is after these excesses: belief (sums to 1), ξ as a column, σ as a row."""
    mean = float(excesses.mean())
    if mean <= 0:
        raise InputError(
            "the largest scores of the normals are all the same: check that the images differ, or use --threshold "
            "quantile"
        )
    shape = SHAPES[:, None]
    log_scale = math.log(mean) + np.linspace(-2.5, 2.5, 121)[None, :]
    inside = 1 + shape[:, :, None] * excesses / np.exp(log_scale)[:, :, None]
    possible = (inside > 0).all(2)
    logs = np.log(np.where(inside > 0, inside, 1)).sum(2)
    fits = -len(excesses) * log_scale - (1 + 1 / shape) * logs - ((shape - SHAPE_MEAN) / SHAPE_SPREAD) ** 2 / 2
    belief = np.exp(np.where(possible, fits - fits[possible].max(), -np.inf))
    return belief / belief.sum(), shape, np.exp(log_scale)


def _interval(rates: np.ndarray, belief: np.ndarray) -> tuple[float, float]:
    order = np.argsort(rates, axis=None)
    summed = np.cumsum(belief.ravel()[order])
    outside = (1 - CONFIDENCE) / 2
    ranked = rates.ravel()[order]
    low, high = np.minimum(np.searchsorted(summed, (outside, 1 - outside)), len(ranked) - 1)
    return float(ranked[low]), float(ranked[high])


def quantile(scores: np.ndarray, false_reject_rate: float) -> Threshold:
    """The smallest held-out score that keeps false rejects at or below the rate, whatever the distribution.

    With n exchangeable normal scores, a new one lies above the k-th smallest with probability 1 − k/(n + 1). So
    k = ⌈(n + 1)(1 − rate)⌉; for a rate below 1/(n + 1) there is no such k, the maximum is taken, and the rate
    recorded is the 1/(n + 1) that it can promise. The rate above the k-th smallest is distributed as
    Beta(n + 1 − k, k), which gives `interval`.
    """
    count = len(scores)
    # a rounding error in the product must not ask for one more
    rank = min(count, math.ceil((count + 1) * (1 - false_reject_rate) - 1e-9))
    promised = max(false_reject_rate, 1 / (count + 1))
    rates = (np.arange(100_000) + 0.5) / 100_000
    fits = (count - rank) * np.log(rates) + (rank - 1) * np.log1p(-rates)
    belief = np.exp(fits - fits.max())
    return Threshold(
        float(np.sort(scores)[rank - 1]), "quantile", promised, count, _interval(rates, belief / belief.sum())
    )


def manual(value: float, scores: np.ndarray) -> Threshold:
    """A threshold by hand; the share of the normals above it, if there are any, is its false-reject rate."""
    return Threshold(value, "manual", float(np.mean(scores > value)) if len(scores) else None, len(scores), None)


def normals_needed(false_reject_rate: float) -> int:
    """How many held-out normals it takes to promise this rate without assuming a distribution."""
    return math.ceil(1 / false_reject_rate - 1e-9) - 1


def warning(threshold: Threshold, false_reject_rate: float) -> str | None:
    """A sentence when the normals are too few to promise the asked rate by themselves."""
    needed = normals_needed(false_reject_rate)
    if threshold.rule == "manual" or threshold.normals >= needed:
        return None
    assert threshold.interval is not None
    low, high = threshold.interval
    relies = (
        "the threshold extrapolates their tail"
        if threshold.rule == "tail"
        else f"the threshold is their highest score, which promises {threshold.false_reject_rate:.1%}"
    )
    return (
        f"{threshold.normals} held-out normals are too few to promise a false-reject rate of "
        f"{false_reject_rate:.2%} ({needed} would be enough): {relies}, and the rate lies between {low:.2%} and "
        f"{high:.2%} with 95 % confidence"
    )


def outliers(scores: Array) -> np.ndarray:
    """Indices of scores that stand out from the other normals, highest first: defects among the good parts, or
    photos that went wrong. Log scores more than 5 robust standard deviations (1.4826 · MAD) above the median."""
    logs = np.log(np.maximum(np.asarray(scores, np.float64), 1e-30))
    centre = np.median(logs)
    spread = 1.4826 * np.median(np.abs(logs - centre))
    found = np.flatnonzero(logs > centre + OUTLIER * max(spread, 1e-3))
    return found[np.argsort(-logs[found])]


def described(threshold: Threshold) -> str:
    """As people read it, on one line."""
    parts = [threshold.rule, f"{threshold.normals} normals"]
    if threshold.false_reject_rate is not None:
        parts.append(f"false rejects {threshold.false_reject_rate:.2%}")
    if threshold.interval is not None:
        low, high = threshold.interval
        parts.append(f"95 % interval {low:.2%} to {high:.2%}")
    return f"{threshold.value:.3e} ({', '.join(parts)})"


def threshold_rule(text: str) -> str | float:
    """The value of --threshold: a rule, or a score."""
    if text in RULES:
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ArgumentTypeError(f"wanted {', '.join(RULES)} or a score above 0, found {text}")
    return value
