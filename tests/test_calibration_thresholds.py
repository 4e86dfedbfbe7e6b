"""The conformal threshold keeps its promise, and says when it cannot make one."""

import numpy as np
import pytest

from stpm.calibration.thresholds import conformal, normals_needed


def test_it_is_an_order_statistic():
    scores = np.arange(1, 100, dtype=np.float32)  # 99 normals
    assert conformal(scores, 0.01).value == 99
    assert conformal(scores, 0.05).value == 95
    assert conformal(scores[::-1], 0.05).value == 95
    assert conformal(scores, 0.05).false_reject_rate == 0.05


def test_too_few_normals_give_the_maximum_and_the_rate_that_holds():
    found = conformal(np.arange(1, 65, dtype=np.float32), 0.01)
    assert found.value == 64
    assert found.false_reject_rate == pytest.approx(1 / 65)
    assert found.normals == 64


@pytest.mark.parametrize("rate", [0.4, 0.1, 0.05, 0.01, 0.001])
def test_normals_needed_is_just_enough(rate):
    enough = normals_needed(rate)
    assert conformal(np.arange(enough, dtype=np.float32), rate).false_reject_rate == pytest.approx(rate)
    assert conformal(np.arange(enough - 1, dtype=np.float32), rate).false_reject_rate > rate


@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_new_parts_are_rejected_at_no_more_than_the_rate(rate):
    random = np.random.default_rng(0)
    rejected = []
    for _ in range(4000):
        scores = random.lognormal(0, 1, 101).astype(np.float32)
        rejected.append(scores[-1] > conformal(scores[:-1], rate).value)
    spread = 4 * np.sqrt(rate * (1 - rate) / len(rejected))
    assert rate - 0.01 - spread < np.mean(rejected) < rate + spread
