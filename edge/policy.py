"""From what is known about a part to its verdict. Pure: anything that is not a clear PASS or FAIL is UNKNOWN."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Verdict:
    verdict: Literal["PASS", "FAIL", "UNKNOWN"]
    score: float | None
    reason: str = ""


def judge(score: float | None, threshold: float, problem: str = "") -> Verdict:
    """FAIL above the threshold, PASS up to it, UNKNOWN without a finite score."""
    if score is None:
        return Verdict("UNKNOWN", None, problem or "no score")
    if not math.isfinite(score):
        return Verdict("UNKNOWN", None, f"the score is {score}")
    if score > threshold:
        return Verdict("FAIL", score, "score above the threshold")
    return Verdict("PASS", score)
