"""A threshold from held-out normals alone."""

import math

from stpm.edge.manifest import Threshold
from stpm.edge.score import Array


def conformal(scores: Array, false_reject_rate: float) -> Threshold:
    """The smallest held-out score that keeps false rejects at or below the rate, whatever the distribution.

    With n exchangeable normal scores, a new one lies above the k-th smallest with probability 1 − k/(n + 1). So
    k = ⌈(n + 1)(1 − rate)⌉; for a rate below 1/(n + 1) there is no such k, the maximum is taken, and the rate
    recorded is the 1/(n + 1) that it can promise.
    """
    count = len(scores)
    # a rounding error in the product must not ask for one more
    rank = min(count, math.ceil((count + 1) * (1 - false_reject_rate) - 1e-9))
    promised = max(false_reject_rate, 1 / (count + 1))
    return Threshold(float(sorted(scores)[rank - 1]), "conformal", promised, count)


def normals_needed(false_reject_rate: float) -> int:
    """How many held-out normals it takes to promise this rate."""
    return math.ceil(1 / false_reject_rate - 1e-9) - 1
