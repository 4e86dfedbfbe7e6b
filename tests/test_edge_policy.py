"""Anything that is not a clear PASS rejects the part."""

import math

import pytest

from stpm.edge.policy import judge


@pytest.mark.parametrize(
    ("score", "verdict"),
    [
        (0.0, "PASS"),
        (0.5, "PASS"),
        (math.nextafter(0.5, 1), "FAIL"),
        (9.0, "FAIL"),
        (math.nan, "UNKNOWN"),
        (math.inf, "UNKNOWN"),
        (-math.inf, "UNKNOWN"),
        (None, "UNKNOWN"),
    ],
)
def test_verdict(score, verdict):
    assert judge(score, threshold=0.5).verdict == verdict


def test_an_unknown_says_why():
    assert judge(None, 0.5, "the lens is covered").reason == "the lens is covered"
    assert judge(None, 0.5).reason
    assert "nan" in judge(math.nan, 0.5).reason
