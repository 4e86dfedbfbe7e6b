"""Contract 2 against loops, against torch, and at the extremes."""

import math

import numpy as np
import pytest
import torch

from stpm.build.head import ProductHead
from stpm.build.head import level_map as torch_level_map
from stpm.edge.score import anomaly_map, bounding_box, level_map, score, upsample


def features(channels, height, width, seed):
    random = np.random.default_rng(seed)
    return np.maximum(random.normal(0, 1, (channels, height, width)), 0).astype(np.float32)


def slow_level_map(teacher, student):
    channels, height, width = teacher.shape
    found = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            t = [float(teacher[c, y, x]) for c in range(channels)]
            s = [float(student[c, y, x]) for c in range(channels)]
            lengths = math.sqrt(sum(v * v for v in t)) * math.sqrt(sum(v * v for v in s))
            if lengths == 0:
                found[y, x] = 0 if t == s else 1
            else:
                found[y, x] = 1 - sum(a * b for a, b in zip(t, s, strict=True)) / lengths
    return found


def slow_upsample(level, height, width):
    rows, columns = level.shape
    found = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * rows / height - 0.5, 0), rows - 1)
            u = min(max((x + 0.5) * columns / width - 0.5, 0), columns - 1)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            upper = level[top, left] * (1 - u + left) + level[top, right] * (u - left)
            lower = level[bottom, left] * (1 - u + left) + level[bottom, right] * (u - left)
            found[y, x] = upper * (1 - v + top) + lower * (v - top)
    return found


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 1, 1), (3, 5, 7), (64, 4, 4)])
def test_level_map_is_one_minus_the_cosine(channels, height, width):
    teacher, student = features(channels, height, width, 0), features(channels, height, width, 1)
    teacher[:, 0, 0] = 0
    found = level_map(teacher, student)
    # one zero vector: the definition gives 1 − 1e-6 over the length of the other
    np.testing.assert_allclose(found, slow_level_map(teacher, student), atol=1e-5)
    assert found.min() >= 0
    assert found.max() <= 1


def test_paper_form_is_the_same_number():
    """Wang et al. write ½‖t̂ − ŝ‖²."""
    teacher, student = features(8, 3, 3, 2) + 0.1, features(8, 3, 3, 3) + 0.1
    unit = [f / np.linalg.norm(f, axis=0) for f in (teacher, student)]
    np.testing.assert_allclose(level_map(teacher, student), 0.5 * ((unit[0] - unit[1]) ** 2).sum(0), atol=1e-6)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_length_does_not_matter_but_direction_does(scale):
    teacher = features(8, 4, 4, 4) + 0.01
    np.testing.assert_allclose(level_map(teacher, teacher * np.float32(scale)), 0, atol=1e-6)
    orthogonal = np.zeros((2, 1, 1), np.float32), np.zeros((2, 1, 1), np.float32)
    orthogonal[0][0], orthogonal[1][1] = scale, scale
    assert level_map(*orthogonal)[0, 0] == pytest.approx(1, abs=1e-5)


def test_two_zero_vectors_agree_and_one_disagrees():
    zero, one = np.zeros((4, 1, 1), np.float32), np.ones((4, 1, 1), np.float32)
    assert level_map(zero, zero)[0, 0] == 0
    assert level_map(zero, one)[0, 0] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "columns", "height", "width"), [(1, 1, 3, 3), (2, 3, 7, 5), (4, 4, 16, 16), (5, 3, 5, 3)]
)
def test_upsample_is_bilinear_with_half_pixel_centres(rows, columns, height, width):
    level = np.random.default_rng(0).random((rows, columns)).astype(np.float32)
    np.testing.assert_allclose(upsample(level, height, width), slow_upsample(level, height, width), atol=1e-6)


def test_anomaly_map_is_the_product_and_the_score_its_maximum():
    levels = [np.random.default_rng(i).random((2**i, 2**i)).astype(np.float32) for i in (3, 2, 1)]
    found = anomaly_map(levels, 16, 16)
    wanted = np.prod([slow_upsample(level, 16, 16) for level in levels], axis=0)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert score(found) == pytest.approx(wanted.max(), abs=1e-6)


def test_torch_head_is_the_same_head():
    shapes = [(6, 8, 8), (8, 4, 4), (10, 2, 2)]
    teachers = [features(*shape, seed) for seed, shape in enumerate(shapes)]
    students = [features(*shape, seed + 10) for seed, shape in enumerate(shapes)]
    teachers[0][:, 0, 0] = students[0][:, 0, 0] = 0
    teachers[1][:, 1, 1] = 0
    wanted = anomaly_map([level_map(t, s) for t, s in zip(teachers, students, strict=True)], 32, 32)
    product, maximum = ProductHead(32, 32)(
        [torch.from_numpy(t)[None] for t in teachers], [torch.from_numpy(s)[None] for s in students]
    )
    np.testing.assert_allclose(product[0, 0].numpy(), wanted, atol=1e-5)
    assert float(maximum[0]) == pytest.approx(score(wanted), abs=1e-5)


def test_torch_level_map_of_zeros_is_finite():
    zero = torch.zeros(1, 4, 2, 2)
    assert torch_level_map(zero, zero).abs().max() == 0
    assert torch_level_map(zero, zero + 1).min() == pytest.approx(1, abs=1e-5)


def test_bounding_box_holds_every_true_pixel_and_no_empty_edge():
    mask = np.zeros((7, 9), bool)
    assert bounding_box(mask) is None
    mask[2, 3] = mask[5, 1] = True
    assert bounding_box(mask) == (1, 2, 3, 4)
    mask[:] = True
    assert bounding_box(mask) == (0, 0, 9, 7)
