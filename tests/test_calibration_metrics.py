"""The figures against scikit-learn and against a slow threshold sweep."""

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve, roc_auc_score

from stpm.calibration.metrics import aupro, auroc, f1_max


@pytest.mark.parametrize("digits", [1, 2, 8])
@pytest.mark.parametrize("seed", range(4))
def test_auroc_is_scikit_learns_with_and_without_ties(seed, digits):
    random = np.random.default_rng(seed)
    positive = random.random(300) < 0.3
    scores = np.round(random.normal(0, 1, 300) + positive, digits)
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)


def test_auroc_without_both_classes_is_not_defined():
    assert auroc(np.arange(3.0), np.zeros(3, bool)) is None
    assert auroc(np.arange(3.0), np.ones(3, bool)) is None


def regions_of(mask):
    """Connected components by flood fill, 8 neighbours."""
    left, found = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left:
        stack, region = [left.pop()], []
        while stack:
            y, x = stack.pop()
            region.append((y, x))
            for neighbour in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if neighbour in left:
                    left.remove(neighbour)
                    stack.append(neighbour)
        found.append(region)
    return found


def slow_aupro(maps, masks, limit):
    regions = [(image, region) for image, mask in enumerate(masks) for region in regions_of(mask)]
    xs, ys = [0.0], [0.0]
    for threshold in sorted(set(maps.ravel()), reverse=True):
        above = maps >= threshold
        xs.append(above[~masks].mean())
        ys.append(np.mean([np.mean([above[image][pixel] for pixel in region]) for image, region in regions]))
    grid = np.linspace(0, limit, 200_001)
    values = np.interp(grid, xs, ys)
    return np.trapezoid(values, grid) / limit


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("digits", [1, 6])
def test_aupro_is_the_slow_sweep(seed, digits):
    random = np.random.default_rng(seed)
    masks = np.zeros((3, 12, 14), bool)
    masks[0, 2:5, 2:4] = masks[0, 9, 9] = masks[1, 3:9, 5:12] = True
    masks[0, 5, 4] = True  # touches the first region at a corner only
    maps = np.round(random.random(masks.shape) + 0.5 * masks, digits)
    assert aupro(maps, masks) == pytest.approx(slow_aupro(maps, masks, 0.3), abs=2e-4 if digits > 1 else 2e-3)


def test_small_and_large_regions_count_the_same():
    masks = np.zeros((1, 20, 20), bool)
    masks[0, 0, 0] = masks[0, 10:20, 0:10] = True
    maps = np.zeros(masks.shape)
    maps[0, 0, 0] = 1  # the small one is found, the large one looks like everything else
    # 0.5 at once, then the straight line of the tie from (0, 0.5) to (1, 1)
    assert aupro(maps, masks) == pytest.approx(0.5 + 0.5 * 0.15)


def test_perfect_and_undefined():
    masks = np.zeros((2, 8, 8), bool)
    assert aupro(np.zeros(masks.shape), masks) is None
    assert aupro(np.zeros(masks.shape), ~masks) is None
    masks[0, 2:4, 2:4] = True
    assert aupro(masks.astype(float), masks) == pytest.approx(1)


def test_a_real_number_of_pixels_takes_seconds():
    """160 images of 256×256, as screw has."""
    import time

    random = np.random.default_rng(0)
    maps = random.random((160, 256, 256), np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[:100, 50:60, 50:60] = True
    start = time.monotonic()
    found = aupro(maps, masks)
    assert found == pytest.approx(0.15, abs=0.01)  # chance: the diagonal up to 0.3
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("digits", [1, 6])
@pytest.mark.parametrize("seed", range(4))
def test_f1_max_is_scikit_learns_and_its_threshold_reaches_it(seed, digits):
    random = np.random.default_rng(seed)
    positive = random.random(200) < 0.4
    scores = np.round(random.normal(0, 1, 200) + positive, digits)
    f1, threshold = f1_max(scores, positive)
    precision, recall, _ = precision_recall_curve(positive, scores)
    assert f1 == pytest.approx(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)), abs=1e-12)
    rejected = scores > threshold
    assert f1 == pytest.approx(2 * (rejected & positive).sum() / (rejected.sum() + positive.sum()), abs=1e-12)


def test_f1_max_where_everything_is_positive_at_best_has_a_threshold_below_all():
    f1, threshold = f1_max(np.array([2.0, 1.0, 3.0]), np.array([True, True, False]))
    assert f1 == 0.8
    assert threshold < 1
    assert f1_max(np.arange(3.0), np.ones(3, bool)) is None
