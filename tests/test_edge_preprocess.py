"""Contract 1 against a slow reference written out pixel by pixel."""

import numpy as np
import pytest

from stpm.edge.errors import InputError
from stpm.edge.preprocess import Preprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def frame(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_halving_takes_the_mean_of_four_pixels_and_swaps_to_rgb():
    image = frame(12, 16)
    found = Preprocess(height=6, width=8)(image)
    assert found.shape == (1, 3, 6, 8)
    assert found.dtype == np.float32
    for y in range(6):
        for x in range(8):
            for channel, bgr in enumerate((2, 1, 0)):
                mean = image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2, bgr].astype(float).mean()
                wanted = (mean / 255 - MEAN[channel]) / STD[channel]
                # resizing rounds to whole grey levels
                assert abs(found[0, channel, y, x] - wanted) <= 0.5001 / 255 / STD[channel]


@pytest.mark.parametrize("size", [18, 17, 20])
def test_resizing_weighs_every_pixel_by_the_area_it_covers(size):
    """3:1, and two ratios that cut pixels; bilinear sampling would skip some."""
    image = frame(size, size)
    found = Preprocess(height=6, width=6).resize(image)
    edges = np.linspace(0, size, 7)
    cover = np.clip(
        np.minimum(np.arange(1, size + 1), edges[1:, None]) - np.maximum(np.arange(size), edges[:-1, None]), 0, 1
    )
    wanted = np.einsum("yi,xj,ijc->yxc", cover, cover, image.astype(float)) * (6 / size) ** 2
    assert np.abs(found - wanted).max() <= 1


def test_normalising_is_exact_for_every_grey_level():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = Preprocess(16, 16)(levels)
    for channel in range(3):
        wanted = (np.arange(256) / 255 - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(found[0, channel].ravel(), wanted, atol=2e-7)


def test_training_and_line_see_the_same_tensor():
    """Training keeps the resized picture and normalises later; the line does both at once."""
    spec, image = Preprocess(), frame(480, 640)
    np.testing.assert_array_equal(spec(image), spec.normalise(spec.resize(image)))


def test_result_is_contiguous_for_the_engine():
    assert Preprocess()(frame(256, 256)).flags.c_contiguous


def test_grey_is_the_same_as_three_equal_channels():
    grey = frame(50, 70)[:, :, 0]
    wide = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(Preprocess()(grey), Preprocess()(wide))
    np.testing.assert_array_equal(Preprocess()(grey[:, :, None]), Preprocess()(wide))


def test_region_of_interest_is_x_y_width_height():
    image = frame(100, 200)
    found = Preprocess(height=20, width=30, roi=(50, 10, 30, 20)).resize(image)
    np.testing.assert_array_equal(found, image[10:30, 50:80])


@pytest.mark.parametrize("roi", [(0, 0, 201, 10), (-1, 0, 10, 10), (0, 95, 10, 6), (0, 0, 0, 10)])
def test_region_outside_the_frame_is_refused(roi):
    with pytest.raises(InputError, match="200×100"):
        Preprocess(roi=roi)(frame(100, 200))


@pytest.mark.parametrize(
    "image",
    [
        frame(8, 8).astype(np.float32),
        frame(8, 8).astype(np.uint16),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8),
        None,
    ],
)
def test_other_frames_are_refused_with_what_was_found(image):
    with pytest.raises(InputError, match="found"):
        Preprocess()(image)
