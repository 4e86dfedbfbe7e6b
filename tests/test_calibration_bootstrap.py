"""Bootstrap intervals against drawing images and computing the exact figures again, and where they are not defined."""

import numpy as np
import pytest

from stpm.calibration.bootstrap import PixelHistograms, image_intervals, pixel_intervals
from stpm.calibration.metrics import aupro, auroc, f1_max


def labelled(good=12, defective=18, size=24, seed=0):
    """Maps and masks in which some defects are seen and some are not."""
    random = np.random.default_rng(seed)
    masks = np.zeros((good + defective, size, size), bool)
    for mask in masks[good:]:
        y, x = random.integers(0, size - 8, 2)
        mask[y : y + random.integers(2, 8), x : x + random.integers(2, 8)] = True
        mask[0, 0] = random.random() < 0.5  # a second region
    maps = random.random(masks.shape) ** 3 + masks * random.random((len(masks), 1, 1))
    return maps.astype(np.float32), masks


def drawn(random, positive):
    groups = (np.flatnonzero(positive), np.flatnonzero(~positive))
    return np.concatenate([random.choice(group, len(group)) for group in groups])


def slow_interval(figure, positive, draws=400):
    random = np.random.default_rng(99)
    return np.quantile([figure(drawn(random, positive)) for _ in range(draws)], [0.025, 0.975])


def test_the_intervals_are_those_of_drawing_images_and_computing_again():
    maps, masks = labelled()
    positive, scores = masks.any((1, 2)), maps.mean((1, 2)).astype(float)
    found = {**image_intervals(scores, positive), **pixel_intervals(PixelHistograms(maps, masks))}
    for name, figure in {
        "image_auroc": lambda of: auroc(scores[of], positive[of]),
        "f1": lambda of: f1_max(scores[of], positive[of])[0],
        "pixel_auroc": lambda of: auroc(maps[of], masks[of]),
        "aupro": lambda of: aupro(maps[of], masks[of]),
    }.items():
        wanted = slow_interval(figure, positive)
        # both ends are estimates from a few hundred draws
        assert found[name] == pytest.approx(wanted, abs=0.15 * (wanted[1] - wanted[0])), name


@pytest.mark.parametrize("seed", range(3))
def test_histograms_give_the_exact_figures_of_any_choice_of_images(seed):
    maps, masks = labelled(size=64, seed=seed)
    histograms = PixelHistograms(maps, masks)
    chosen = np.ones((2, len(maps)))
    chosen[1, 12:20] = 0
    for row, inside in zip(chosen, chosen.astype(bool), strict=True):
        assert histograms.auroc(row[None])[0] == pytest.approx(auroc(maps[inside], masks[inside]), abs=1e-3)
        assert histograms.aupro(row[None])[0] == pytest.approx(aupro(maps[inside], masks[inside]), abs=1e-3)


def test_the_intervals_of_some_images_are_those_that_they_have_alone():
    maps, masks = labelled(size=64)
    among = np.arange(len(maps)) % 3 > 0
    found = pixel_intervals(PixelHistograms(maps, masks), among)
    wanted = pixel_intervals(PixelHistograms(maps[among], masks[among]))
    assert found != pixel_intervals(PixelHistograms(maps, masks))
    for name, interval in wanted.items():
        assert found[name] == pytest.approx(interval, abs=1e-3), name  # other bins


def test_the_same_images_have_the_same_intervals():
    maps, masks = labelled()
    assert pixel_intervals(PixelHistograms(maps, masks)) == pixel_intervals(PixelHistograms(maps, masks))


@pytest.mark.parametrize(("good", "defective"), [(5, 0), (0, 5)])
def test_with_one_class_only_there_is_no_image_interval(good, defective):
    maps, masks = labelled(good, defective)
    assert image_intervals(maps.max((1, 2)), masks.any((1, 2))) == {"image_auroc": None, "f1": None}


def test_without_a_defect_there_is_no_pixel_interval():
    maps, masks = labelled(5, 0)
    assert pixel_intervals(PixelHistograms(maps, masks)) == {"pixel_auroc": None, "aupro": None}
    assert pixel_intervals(PixelHistograms(maps[:0], masks[:0])) == {"pixel_auroc": None, "aupro": None}
