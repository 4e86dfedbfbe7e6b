"""A teacher whose channels are divided by how much they vary on good parts, in its weights."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from stpm.build.equalise import QUIETEST, equalise, spreads
from stpm.build.methods.reverse import Reverse
from stpm.build.methods.stpm import Stpm
from stpm.build.pipeline import Job, prepare
from stpm.build.pyramid import TAPS, Pyramid, weights_hash
from stpm.build.steps import Steps
from stpm.build.train import OneCycle, split
from stpm.edge.errors import ConfigError
from stpm.edge.preprocess import Preprocess
from stpm.tools.parts import draw_part

SMALL = Preprocess(height=64, width=64)


@pytest.fixture(scope="module")
def pixels():
    return np.stack([SMALL.resize(draw_part(seed)[0]) for seed in range(11)])


def teacher_of(backbone):
    """Random weights whose batch norms do something, some channels of them silent or nearly."""
    torch.manual_seed(5)
    teacher = Pyramid(TAPS, backbone)
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.1, 2)
            torch.nn.init.normal_(module.bias)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return teacher.eval().requires_grad_(False)


def features_of(teacher, pixels):
    with torch.inference_mode():
        return teacher(torch.from_numpy(np.concatenate([SMALL.normalise(image) for image in pixels])))


def test_the_spread_is_the_standard_deviation_over_all_places(pixels):
    teacher = teacher_of("resnet18")
    teacher.layer2[1].bn2.weight[3], teacher.layer2[1].bn2.bias[3] = 0, -1e6  # a channel that is silent
    found = spreads(teacher, pixels, SMALL)
    for spread, feature in zip(found, features_of(teacher, pixels), strict=True):
        wanted = feature.double().numpy().std((0, 2, 3))
        quietest = QUIETEST * np.sort(wanted)[(len(wanted) - 1) // 2]
        np.testing.assert_allclose(spread.numpy(), np.maximum(wanted, quietest), rtol=1e-4)
    assert float(found[1][3]) == pytest.approx(QUIETEST * float(found[1].median()), rel=1e-4)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34"])
def test_every_channel_is_what_it_was_divided_by_its_spread(pixels, backbone):
    teacher = teacher_of(backbone)
    before, found = features_of(teacher, pixels), spreads(teacher, pixels, SMALL)
    equalise(teacher, found)
    for one, other, spread in zip(before, features_of(teacher, pixels), found, strict=True):
        wanted = (one / spread.view(1, -1, 1, 1)).numpy()
        np.testing.assert_allclose(other.numpy(), wanted, rtol=1e-3, atol=1e-4 * wanted.max())
    for spread in spreads(teacher, pixels, SMALL):
        np.testing.assert_allclose(spread.median(), 1, rtol=1e-3)


def test_what_its_blocks_do_not_allow_is_refused():
    for teacher in (Pyramid(("layer1", "layer3")), Pyramid(TAPS, "resnet50")):
        with pytest.raises(ConfigError, match="wanted a resnet18 or resnet34 with all its layers as taps"):
            equalise(teacher, [])


def job(folder, method, tmp_path):
    recipe = OneCycle(epochs=1, batch=8)
    return Job(folder, "bushing", "builtin", method, recipe, SMALL, Steps(tmp_path / "work"))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos" / "bushing" / "train" / "good"
    folder.mkdir(parents=True)
    for seed in range(20):
        cv2.imwrite(str(folder / f"{seed:03}.png"), draw_part(seed)[0])
    return tmp_path / "photos"


def test_a_job_equalises_on_the_parts_that_are_trained_on_and_only_where_the_method_says_so(photos, tmp_path, capsys):
    plain = prepare(job(photos, Stpm(), tmp_path))
    assert "varied" not in capsys.readouterr().out
    made = job(photos, Reverse(), tmp_path)
    equal = prepare(made)
    assert "teacher: the strongest channel varied " in capsys.readouterr().out
    training, held_out = split(20, made.recipe)
    trained_on, others = (spreads(plain.teacher, plain.normals.pixels[which], SMALL) for which in (training, held_out))
    before = features_of(plain.teacher, plain.normals.pixels)
    after = features_of(equal.teacher, plain.normals.pixels)
    for one, other, spread, wrong in zip(before, after, trained_on, others, strict=True):
        assert (one / spread.view(1, -1, 1, 1) - other).abs().max() < 1e-3 * other.abs().max()
        assert (one / wrong.view(1, -1, 1, 1) - other).abs().max() > 1e-2 * other.abs().max()
    again = prepare(made)
    assert "teacher: done before" in capsys.readouterr().out
    assert weights_hash(again.teacher.state_dict()) == weights_hash(equal.teacher.state_dict())
    assert weights_hash(again.student.state_dict()) == weights_hash(equal.student.state_dict())


def test_a_student_without_its_equalised_teacher_is_refused(photos, tmp_path):
    with pytest.raises(ConfigError, match=r"a student of reverse belongs to its teacher .* not in given\.npz: leave"):
        prepare(job(photos, Reverse(), tmp_path), Path("given.npz"))
