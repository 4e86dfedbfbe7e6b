"""The enhanced teacher: what it learns, from which images, and that nothing else changes."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from stpm.build.cli import train_main
from stpm.build.enhance import Enhancement, WhetherPasted, WhichCategory, enhance, pasted, task
from stpm.build.methods.etstpm import EtStpm
from stpm.build.methods.stpm import Stpm
from stpm.build.pipeline import Job, prepare
from stpm.build.pyramid import TAPS, weights_hash
from stpm.build.steps import Steps
from stpm.build.train import Recipe, split
from stpm.build.weights import load_teacher
from stpm.edge.errors import ConfigError, InputError, TrainingError
from stpm.edge.preprocess import Preprocess
from stpm.tools.parts import draw_part

SMALL = Preprocess(height=64, width=64)


@pytest.fixture(scope="module")
def parts():
    return np.stack([SMALL.resize(draw_part(seed)[0]) for seed in range(24)])


@pytest.fixture(scope="module")
def upside_down(parts):
    return np.ascontiguousarray(255 - parts[:12])


def test_a_pasted_image_differs_in_one_rectangle_that_is_elsewhere_in_it(parts):
    image = np.random.default_rng(0).integers(256, size=(64, 48, 3)).astype(np.uint8)
    before, random, places = image.copy(), np.random.default_rng(1), set()
    for _ in range(20):
        rows, columns = np.nonzero((pasted(image, random) != image).any(2))
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        assert 0.01 < (bottom - top) * (right - left) / (64 * 48) < 0.2
        places.add((top, left))
    assert len(places) > 10
    np.testing.assert_array_equal(image, before)


def test_the_patch_comes_from_the_image():
    image = np.arange(64 * 64 * 3, dtype=np.int64).reshape(64, 64, 3)  # every pixel is another
    result = pasted(image, np.random.default_rng(3))
    rows, columns = np.nonzero((result != image).any(2))
    patch = result[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    y, x = np.unravel_index(patch[0, 0, 0] // 3, (64, 64))
    np.testing.assert_array_equal(patch, image[y : y + len(patch), x : x + patch.shape[1]])


def test_with_several_categories_these_are_the_classes_and_with_one_the_pasting(parts, upside_down):
    categories = task([parts, upside_down])
    assert isinstance(categories, WhichCategory)
    assert (categories.classes, len(categories)) == (2, 36)
    images, labels = categories.batch(np.array([0, 24, 35]), np.random.default_rng(0))
    assert labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(images[1], upside_down[0])
    one = task([parts])
    assert isinstance(one, WhetherPasted)
    images, labels = one.batch(np.arange(24), np.random.default_rng(0))
    changed = [not np.array_equal(image, part) for image, part in zip(images, parts, strict=True)]
    assert changed == labels.astype(bool).tolist()
    assert 0 < sum(changed) < 24


def test_the_teacher_learns_to_tell_them_apart_and_its_batch_norms_keep_their_statistics(parts, upside_down):
    hashes = []
    for _ in range(2):
        teacher = load_teacher("builtin", TAPS)
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        right = enhance(teacher, task([parts, upside_down]), SMALL, Enhancement(epochs=6, seed=1, batch=8))
        assert len(right) == 6
        assert right[-1] > 0.95 > right[0]
        after = teacher.state_dict()
        assert not torch.equal(before["layer1.0.conv1.weight"], after["layer1.0.conv1.weight"])
        for name in before:
            if "running" in name or "num_batches" in name:
                assert torch.equal(before[name], after[name]), name
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert not teacher.training
        hashes.append(weights_hash(after))
    assert hashes[0] == hashes[1]


def test_a_loss_that_is_not_finite_names_step_and_rate(parts, upside_down):
    recipe = Enhancement(epochs=5, seed=0, batch=4, learning_rate=1e12)
    said = r"the teacher is (nan|inf) in step \d of epoch \d at learning rate 1000000000000.0: .*--teacher-epochs"
    with pytest.raises(TrainingError, match=said):
        enhance(load_teacher("builtin", TAPS), task([parts, upside_down]), SMALL, recipe)


def test_a_last_step_that_breaks_the_teacher_is_noticed(parts, upside_down, monkeypatch):
    def step(optimiser):
        optimiser.param_groups[0]["params"][3].fill_(float("inf"))

    monkeypatch.setattr(torch.optim.SGD, "step", torch.no_grad()(step))
    both = task([parts, upside_down])
    recipe = Enhancement(epochs=1, seed=0, batch=len(both))
    with pytest.raises(
        TrainingError, match=r"weight of the teacher is not finite after epoch 1 at learning rate 0\.001"
    ):
        enhance(load_teacher("builtin", TAPS), both, SMALL, recipe)


def write(folder, images):
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        cv2.imwrite(str(folder / f"{number:03}.png"), image)


@pytest.fixture
def photos(parts, upside_down, tmp_path):
    root = tmp_path / "photos"
    write(root / "bushing" / "train" / "good", parts)
    write(root / "negative" / "train" / "good", upside_down)
    write(root / "few" / "train" / "good", parts[:3])
    write(root / "elsewhere", parts[:12])
    return root


def job(photos, method, tmp_path):
    return Job(photos, "bushing", "builtin", method, Recipe(epochs=1, batch=8), SMALL, Steps(tmp_path / "work"))


def test_a_job_teaches_the_student_of_the_enhanced_teacher_with_the_categories_beside_it(photos, tmp_path, capsys):
    plain = prepare(job(photos, Stpm(), tmp_path))
    zero = prepare(job(photos, EtStpm(teacher_epochs=0), tmp_path))
    assert weights_hash(zero.teacher.state_dict()) == weights_hash(plain.teacher.state_dict())
    assert weights_hash(zero.student.state_dict()) == weights_hash(plain.student.state_dict())
    enhanced = prepare(job(photos, EtStpm(teacher_epochs=1), tmp_path))
    assert "teacher: tells bushing from negative, " in capsys.readouterr().out
    assert weights_hash(enhanced.teacher.state_dict()) != weights_hash(plain.teacher.state_dict())
    assert weights_hash(enhanced.student.state_dict()) != weights_hash(plain.student.state_dict())
    again = prepare(job(photos, EtStpm(teacher_epochs=1), tmp_path))
    assert "teacher: done before" in capsys.readouterr().out
    assert weights_hash(again.teacher.state_dict()) == weights_hash(enhanced.teacher.state_dict())
    cv2.imwrite(str(photos / "negative" / "train" / "good" / "000.png"), np.zeros((64, 64, 3), np.uint8))
    prepare(job(photos, EtStpm(teacher_epochs=1), tmp_path))
    assert "teacher: tells bushing from negative, " in capsys.readouterr().out


def test_held_out_parts_are_not_seen_by_the_teacher(photos, tmp_path, monkeypatch):
    seen = []

    def recorded(categories):
        seen.extend(categories)
        return task(categories)

    monkeypatch.setattr("stpm.build.pipeline.task", recorded)
    made = job(photos, EtStpm(teacher_epochs=1), tmp_path)
    normals = prepare(made).normals.pixels
    training, _ = split(len(normals), made.recipe)
    np.testing.assert_array_equal(seen[0], normals[training])
    assert [len(images) for images in seen] == [24 - round(24 * 0.2), 12]


def test_a_category_beside_it_that_cannot_be_read_is_named(photos, tmp_path):
    for number in range(3):
        (photos / "negative" / "train" / "good" / f"{number:03}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"3 of 12 images cannot be decoded.*keep negative elsewhere"):
        prepare(job(photos, EtStpm(teacher_epochs=1), tmp_path))
    prepare(job(photos, Stpm(), tmp_path))


def test_a_student_without_its_enhanced_teacher_is_refused_before_one_is_made(photos, tmp_path):
    with pytest.raises(ConfigError, match=r"belongs to its teacher as it was fitted .* not in given\.npz: leave"):
        prepare(job(photos, EtStpm(teacher_epochs=1), tmp_path), Path("given.npz"))
    assert not (tmp_path / "work").exists()


def test_the_command_says_what_the_teacher_has_learned_from_one_category(parts, tmp_path, capsys):
    write(tmp_path / "bushing", parts)
    words = ["--category", "bushing", "--data", str(tmp_path), "--teacher", "builtin", "--epochs", "1", "--batch", "8"]
    words += ["--size", "64", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "student.npz")]
    assert train_main([*words, "--method", "etstpm", "--teacher-epochs", "1"]) == 0
    assert "tells images with a pasted patch from others" in capsys.readouterr().out
    assert train_main([*words, "--teacher-epochs", "1"]) == 2
    assert "--method stpm has no --teacher-epochs: leave it out" in capsys.readouterr().err
