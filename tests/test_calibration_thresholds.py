"""Thresholds from normals alone keep their promises, and say when they cannot make one."""

from argparse import ArgumentTypeError

import numpy as np
import pytest

from stpm.calibration.thresholds import (
    described,
    fit,
    normals_needed,
    outliers,
    quantile,
    tail,
    threshold_rule,
    warning,
)
from stpm.edge.errors import InputError

# name → (draw n scores, the share of such scores above a value)
DISTRIBUTIONS = {
    "light tail": (lambda random, n: random.exponential(1, n), lambda value: np.exp(-value)),
    "heavy tail": (lambda random, n: random.pareto(4, n) + 1, lambda value: value**-4.0),
    "bounded": (lambda random, n: 1 - random.random(n) ** (1 / 3), lambda value: max(0.0, 1 - value) ** 3),
}


def test_quantile_is_an_order_statistic():
    scores = np.arange(1, 100, dtype=np.float32)  # 99 normals
    assert quantile(scores, 0.01).value == 99
    assert quantile(scores, 0.05).value == 95
    assert quantile(scores[::-1], 0.05).value == 95
    assert quantile(scores, 0.05).false_reject_rate == 0.05


def test_too_few_normals_give_the_maximum_and_the_rate_that_holds():
    found = quantile(np.arange(1, 65, dtype=np.float32), 0.01)
    assert found.value == 64
    assert found.false_reject_rate == pytest.approx(1 / 65)
    assert found.normals == 64
    # the share above the maximum of 64 is distributed as Beta(1, 64)
    assert found.interval == pytest.approx((1 - 0.975 ** (1 / 64), 1 - 0.025 ** (1 / 64)), rel=0.02)


@pytest.mark.parametrize("rate", [0.4, 0.1, 0.05, 0.01, 0.001])
def test_normals_needed_is_just_enough(rate):
    enough = normals_needed(rate)
    assert quantile(np.arange(enough, dtype=np.float32), rate).false_reject_rate == pytest.approx(rate)
    assert quantile(np.arange(enough - 1, dtype=np.float32), rate).false_reject_rate > rate


@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_new_parts_are_rejected_at_no_more_than_the_rate(rate):
    random = np.random.default_rng(0)
    rejected = []
    for _ in range(1000):
        scores = random.lognormal(0, 1, 101).astype(np.float32)
        rejected.append(scores[-1] > quantile(scores[:-1], rate).value)
    spread = 4 * np.sqrt(rate * (1 - rate) / len(rejected))
    assert rate - 0.01 - spread < np.mean(rejected) < rate + spread


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_tail_meets_the_rate_from_few_normals_and_its_interval_holds(name):
    """64 normals, 1 %: the highest score alone would give 1.54 %, the best fit 1.2 to 1.6 %."""
    draw, above = DISTRIBUTIONS[name]
    random = np.random.default_rng(1)
    rates, held = [], 0
    for _ in range(150):
        found = tail(draw(random, 64), 0.01)
        rates.append(above(found.value))
        low, high = found.interval
        held += low <= rates[-1] <= high
    assert np.mean(rates) < 0.0135
    assert held / 150 > 0.88
    assert np.median(rates) > 0.0005  # and it does not buy that with a threshold that nothing ever exceeds


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_tail_of_many_normals_is_the_true_one(name):
    draw, above = DISTRIBUTIONS[name]
    found = tail(draw(np.random.default_rng(2), 20_000), 0.001)
    assert above(found.value) == pytest.approx(0.001, rel=0.35)
    low, high = found.interval
    assert low < 0.001 < high < 0.002


def test_a_tail_does_not_depend_on_the_unit():
    scores = np.random.default_rng(3).lognormal(0, 1, 64)
    one, other = tail(scores, 0.01), tail(scores * 1e-6, 0.01)
    assert other.value == pytest.approx(one.value * 1e-6)
    assert other.interval == pytest.approx(one.interval)


def test_a_rarer_rate_gives_a_higher_threshold_beyond_the_scores():
    scores = np.random.default_rng(4).lognormal(0, 1, 64)
    values = [tail(scores, rate).value for rate in (0.1, 0.01, 0.001)]
    assert values[0] < values[1] < values[2]
    assert values[2] > scores.max()


def test_without_a_tail_to_fit_it_is_the_quantile():
    scores = np.random.default_rng(5).lognormal(0, 1, 64)
    assert tail(scores[:19], 0.01) == quantile(scores[:19], 0.01)
    assert tail(scores, 0.4) == quantile(scores, 0.4)


def test_equal_scores_have_no_tail():
    with pytest.raises(InputError, match="all the same"):
        tail(np.full(64, 0.5), 0.01)


def test_by_hand():
    found = fit(np.arange(1, 11), 8.5, 0.01)
    assert (found.value, found.rule, found.false_reject_rate, found.normals) == (8.5, "manual", 0.2, 10)
    assert fit(np.zeros(0), 8.5, 0.01).false_reject_rate is None
    assert described(fit(np.zeros(0), 8.5, 0.01)) == "8.500e+00 (manual, 0 normals)"


def test_too_few_normals_are_said_with_the_interval():
    scores = np.random.default_rng(6).lognormal(0, 1, 64)
    found = tail(scores, 0.01)
    text = warning(found, 0.01)
    assert "64 held-out normals are too few" in text
    assert "99 would be enough" in text
    assert f"{found.interval[1]:.2%}" in text
    assert "highest score" in warning(quantile(scores, 0.01), 0.01)
    assert warning(tail(scores, 0.05), 0.05) is None
    assert warning(fit(scores, 1.0, 0.01), 0.01) is None


def test_outliers_stand_out_and_a_long_tail_does_not():
    random = np.random.default_rng(7)
    scores = random.lognormal(-8, 0.5, 200)
    assert len(outliers(scores)) == 0
    scores[[20, 90]] = np.exp(-8) * 100, np.exp(-8) * 50
    assert outliers(scores).tolist() == [20, 90]
    assert len(outliers(np.full(20, 1e-3))) == 0


@pytest.mark.parametrize(("text", "value"), [("tail", "tail"), ("quantile", "quantile"), ("9e-4", 9e-4)])
def test_the_rule_on_the_command_line(text, value):
    assert threshold_rule(text) == value


@pytest.mark.parametrize("text", ["max", "0", "-1", "nan", "inf", ""])
def test_a_rule_that_is_none(text):
    with pytest.raises(ArgumentTypeError, match="tail, quantile or a score above 0"):
        threshold_rule(text)


def test_scores_without_a_spread_above_zero_are_refused():
    with pytest.raises(InputError, match="threshold of 0"):
        fit(np.zeros(12), "quantile", 0.01)


def test_a_rare_rate_from_few_normals_stays_within_reason():
    """One in a thousand from 64: without a belief about the shape the threshold is often six times the true one."""
    random = np.random.default_rng(1)
    values = [tail(random.exponential(1, 64), 0.001).value for _ in range(60)]
    true = np.log(1000)
    assert true < np.median(values) < 2 * true
    assert np.quantile(values, 0.9) < 3.5 * true
