"""Finding and reading images, good and bad."""

import shutil

import cv2
import numpy as np
import pytest

from stpm.calibration.dataset import (
    LabelledImage,
    find_dataset,
    find_labelled,
    load_images,
    load_labelled,
    load_mask,
    load_normals,
)
from stpm.edge.errors import InputError
from stpm.edge.preprocess import Preprocess


def write(folder, count, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        cv2.imwrite(str(folder / f"{index:03d}{suffix}"), np.full((20, 30, 3), index, np.uint8))
    return folder


def test_mvtec_layout(parts):
    found = find_dataset(parts, "bushing")
    assert len(found.normals) == 16
    assert len(found.labelled) == 8
    assert [item.defective for item in found.labelled].count(True) == 4
    for item in found.labelled:
        assert (item.mask is not None) == item.defective


def test_plain_folder_with_and_without_the_category(tmp_path):
    write(tmp_path / "nut", 3)
    assert len(find_dataset(tmp_path, "nut").normals) == 3
    assert len(find_dataset(tmp_path / "nut", "nut").normals) == 3
    assert find_dataset(tmp_path, "nut").labelled == []


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        find_dataset(tmp_path / "nowhere", "nut")
    with pytest.raises(InputError, match="found none"):
        find_dataset(tmp_path, "nut")


@pytest.mark.parametrize(("count", "enough"), [(9, False), (10, True)])
def test_too_few_normals_are_refused_with_the_number(tmp_path, count, enough):
    write(tmp_path / "nut", count)
    dataset = find_dataset(tmp_path, "nut")
    if enough:
        assert load_normals(dataset, Preprocess()).pixels.shape == (10, 256, 256, 3)
    else:
        with pytest.raises(InputError, match="found 9"):
            load_normals(dataset, Preprocess())


def test_one_corrupt_image_is_skipped_and_named(tmp_path, capfd):
    folder = write(tmp_path / "nut", 30)
    (folder / "007.png").write_bytes(b"not an image")
    found = load_normals(find_dataset(tmp_path, "nut"), Preprocess())
    assert [path.name for path in found.unreadable] == ["007.png"]
    assert len(found.paths) == len(found.pixels) == 29
    assert found.pixels[7, 0, 0, 0] == 8  # nothing slipped out of step
    assert "007.png" in capfd.readouterr().out


def test_more_than_five_percent_corrupt_is_refused(tmp_path):
    folder = write(tmp_path / "nut", 20)
    (folder / "001.png").write_bytes(b"")
    assert len(load_normals(find_dataset(tmp_path, "nut"), Preprocess()).paths) == 19
    (folder / "002.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 of 20.*001\.png"):
        load_normals(find_dataset(tmp_path, "nut"), Preprocess())


def test_a_region_outside_the_images_is_not_taken_for_corruption(tmp_path):
    write(tmp_path / "nut", 12)
    with pytest.raises(InputError, match="region of interest"):
        load_images(find_dataset(tmp_path, "nut").normals, Preprocess(roi=(0, 0, 31, 20)), "reading")


def mask_item(tmp_path, mask, size=(512, 512)):
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((*size, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    return LabelledImage(tmp_path / "image.png", "dent", tmp_path / "mask.png")


def test_masks_follow_the_image_through_roi_and_resize(tmp_path):
    mask = np.zeros((512, 512), np.uint8)
    mask[100:200, 50:80] = 255
    found = load_mask(mask_item(tmp_path, mask), Preprocess())
    wanted = np.zeros((256, 256), bool)
    wanted[50:100, 25:40] = True
    np.testing.assert_array_equal(found, wanted)
    found = load_mask(mask_item(tmp_path, mask), Preprocess(roi=(50, 100, 256, 256)))
    assert found[:100, :30].all()
    assert found.sum() == 3000


def test_a_tiny_defect_does_not_vanish(tmp_path):
    mask = np.zeros((512, 512), np.uint8)
    mask[301, 77] = 255
    found = load_mask(mask_item(tmp_path, mask), Preprocess())
    assert np.argwhere(found).tolist() == [[150, 38]]


def test_a_mask_of_another_size_is_refused(tmp_path):
    with pytest.raises(InputError, match="100×100"):
        load_mask(mask_item(tmp_path, np.zeros((100, 100), np.uint8)), Preprocess())


def test_good_parts_and_defects_without_masks(parts, tmp_path):
    copy = shutil.copytree(parts / "bushing", tmp_path / "bushing")
    shutil.rmtree(copy / "ground_truth" / "dent")
    by_kind = {item.kind: item for item in find_dataset(tmp_path, "bushing").labelled}
    assert load_mask(by_kind["dent"], Preprocess()) is None
    assert not load_mask(by_kind["good"], Preprocess()).any()
    assert load_mask(by_kind["stain"], Preprocess()).any()


def test_defects_without_a_mask_among_others_are_counted_and_named(parts, tmp_path, capsys):
    copy = shutil.copytree(parts / "bushing", tmp_path / "bushing")
    small = Preprocess(64, 64)
    load_labelled(find_labelled(copy), small)
    assert "WARNING" not in capsys.readouterr().out
    (lost,) = (copy / "ground_truth" / "dent").iterdir()
    lost.rename(lost.with_suffix(".bmp"))
    images = load_labelled(find_labelled(copy), small)
    assert images.masked.tolist() == [item.kind != "dent" for item in images.items]
    said = capsys.readouterr().out
    assert "WARNING: 1 of 4 images of defects have no mask (the first is" in said
    assert str(copy / "test" / "dent") in said
    shutil.rmtree(copy / "ground_truth")
    load_labelled(find_labelled(copy), small)
    assert "WARNING" not in capsys.readouterr().out  # then the figures are not defined, which is seen
