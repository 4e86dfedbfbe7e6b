"""The loss as published, and a run that can be stopped."""

import re

import cv2
import msgspec
import numpy as np
import pytest
import torch

from stpm.build import train as training
from stpm.build.curve import learning_curve
from stpm.build.methods import base
from stpm.build.methods.stpm import Stpm
from stpm.build.pyramid import Pyramid, weights_hash
from stpm.build.train import OneCycle, Recipe, TrainingSet, split, train
from stpm.build.weights import load_teacher
from stpm.edge.errors import TrainingError
from stpm.edge.preprocess import Preprocess
from stpm.tools.parts import draw_part

METHOD = Stpm()
SMALL = Preprocess(height=64, width=64)
RECIPE = Recipe(epochs=3, batch=4, seed=3)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("builtin", METHOD.taps)


@pytest.fixture(scope="module")
def pixels():
    return np.stack([SMALL.resize(draw_part(seed)[0]) for seed in range(10)])


def run(teacher, pixels, folder, recipe=RECIPE):
    return train(METHOD, teacher, METHOD.new_student(recipe.seed), pixels, SMALL, recipe, folder)


def test_loss_is_the_authors_form():
    """Σ over taps of the mean over images and pixels of Σ over channels (t̂ − ŝ)², no ½: written as loops."""
    random = np.random.default_rng(0)
    shapes = [(2, 3, 4, 4), (2, 5, 2, 2)]
    teacher = [random.random(shape).astype(np.float32) + 0.1 for shape in shapes]
    student = [random.random(shape).astype(np.float32) + 0.1 for shape in shapes]
    wanted = 0.0
    for t, s in zip(teacher, student, strict=True):
        images, _, height, width = t.shape
        total = 0.0
        for n in range(images):
            for y in range(height):
                for x in range(width):
                    a, b = t[n, :, y, x], s[n, :, y, x]
                    total += float(((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2).sum())
        wanted += total / (images * height * width)
    targets = METHOD.targets([torch.from_numpy(t) for t in teacher])
    found = METHOD.loss(targets, [torch.from_numpy(s) for s in student])
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_split_is_disjoint_complete_and_by_seed():
    kept, held_out = split(320, Recipe(seed=0))
    assert len(held_out) == 64
    assert sorted([*kept, *held_out]) == list(range(320))
    assert not np.array_equal(held_out, split(320, Recipe(seed=1))[1])
    np.testing.assert_array_equal(held_out, split(320, Recipe(seed=0))[1])


def test_a_share_of_the_normals_leaves_the_held_out_as_they_are():
    all_of_them, held_out = split(320, Recipe(seed=0))
    for share, count in ((0.1, 26), (0.05, 13), (0.001, 1)):
        some, held_out_too = split(320, Recipe(seed=0, share=share))
        assert len(some) == count
        assert set(some) <= set(all_of_them)
        np.testing.assert_array_equal(held_out_too, held_out)


def test_training_lowers_the_loss_and_keeps_the_best_epoch(teacher, pixels, tmp_path):
    trained = run(teacher, pixels, tmp_path)
    assert len(trained.history) == 3
    assert trained.history[-1].loss < 0.8 * trained.history[0].loss
    validations = [epoch.validation for epoch in trained.history]
    assert trained.best_epoch == 1 + int(np.argmin(validations))
    assert not any(parameter.requires_grad for parameter in trained.student.parameters())


def test_one_cycle_rises_for_a_tenth_and_falls_to_nothing():
    recipe = OneCycle(learning_rate=2e-3)
    rates = [recipe.rate(progress) for progress in np.linspace(0, 1, 101)]
    assert rates[0] == pytest.approx(0.04 * 2e-3)
    assert int(np.argmax(rates)) == 10
    assert rates[10] == pytest.approx(2e-3)
    assert rates[55] == pytest.approx(1e-3)
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert np.all(np.diff(rates[:11]) > 0)
    assert np.all(np.diff(rates[10:]) < 0)


@pytest.mark.parametrize("recipe", [RECIPE, OneCycle(epochs=3, batch=4)])
def test_every_step_is_taken_at_the_rate_of_the_recipe(teacher, pixels, tmp_path, monkeypatch, recipe):
    used = []
    for optimiser in (torch.optim.SGD, torch.optim.AdamW):
        step = optimiser.step
        monkeypatch.setattr(
            optimiser, "step", lambda self, step=step: (used.append(self.param_groups[0]["lr"]), step(self))
        )
    run(teacher, pixels, tmp_path, recipe)
    # 8 images in batches of 4
    assert used == pytest.approx([recipe.rate(number / 6) for number in range(6)])


@pytest.mark.parametrize("recipe", [RECIPE, OneCycle(epochs=3, batch=4)])
def test_a_stopped_run_ends_with_the_same_weights(teacher, pixels, tmp_path, monkeypatch, recipe):
    whole = run(teacher, pixels, _made(tmp_path / "whole"), recipe)
    original = training._validate
    calls = []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    folder = _made(tmp_path / "parts")
    monkeypatch.setattr(training, "_validate", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(teacher, pixels, folder, recipe)
    monkeypatch.setattr(training, "_validate", original)
    resumed = run(teacher, pixels, folder, recipe)
    assert weights_hash(resumed.student.state_dict()) == weights_hash(whole.student.state_dict())
    assert resumed.history == whole.history


def test_without_room_the_teacher_looks_again_and_the_result_is_nearly_the_same(
    teacher, pixels, tmp_path, monkeypatch, capsys
):
    looked_at = []
    hook = teacher.register_forward_hook(lambda network, inputs, features: looked_at.append(len(inputs[0])))
    cached = run(teacher, pixels, _made(tmp_path / "a"))
    once = sum(looked_at)
    assert once == len(pixels) + 2  # one more of either set, for the shapes
    assert "WARNING" not in capsys.readouterr().out
    monkeypatch.setattr(training, "feature_cache", lambda shapes, folder: None)
    computed = run(teacher, pixels, _made(tmp_path / "b"))
    hook.remove()
    assert sum(looked_at) - once == RECIPE.epochs * len(pixels) + 2
    assert computed.history[-1].loss == pytest.approx(cached.history[-1].loss, rel=0.02)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert ["no room" in each for each in warnings] == [True, True]


@pytest.mark.parametrize("recipe", [RECIPE, OneCycle(epochs=3, batch=4)])
def test_a_loss_that_is_not_finite_stops_with_step_and_rate(teacher, pixels, tmp_path, monkeypatch, recipe):
    losses = iter([1.0, 1.0, 1.0, float("nan")])
    monkeypatch.setattr(Stpm, "loss", lambda self, targets, student: student[0].sum() * next(losses))
    rate = re.escape(f"{recipe.rate(0.5):.4g}")
    with pytest.raises(TrainingError, match=f"loss is nan in step 2 of epoch 2 at learning rate {rate}: train with"):
        run(teacher, pixels, tmp_path, recipe)


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_score_that_is_not_finite_stops_before_anything_is_kept_of_it(teacher, pixels, tmp_path, monkeypatch, epoch):
    scores = iter([*[1.0] * (epoch - 1), float("nan")])
    monkeypatch.setattr(training, "_validate", lambda *_: next(scores))
    with pytest.raises(TrainingError, match=rf"held-out images is nan after epoch {epoch} at .*0\.4: train with"):
        run(teacher, pixels, tmp_path)
    assert (tmp_path / "checkpoint.pth").exists() == (epoch > 1)


def test_the_teacher_does_not_change(teacher, pixels, tmp_path):
    before = weights_hash(teacher.state_dict())
    run(teacher, pixels, tmp_path, Recipe(epochs=1, batch=4))
    assert weights_hash(teacher.state_dict()) == before


def test_taps_have_the_strides_and_widths_of_resnet18():
    found = Pyramid().eval()(torch.zeros(1, 3, 256, 256))
    assert [tuple(feature.shape) for feature in found] == [(1, 64, 64, 64), (1, 128, 32, 32), (1, 256, 16, 16)]


def test_folding_batch_norm_changes_nothing(teacher):
    model = METHOD.graph(teacher, METHOD.new_student(0).eval(), 64, 64)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for folded, plain in zip(model.teacher(x), teacher(x), strict=True):
            torch.testing.assert_close(folded, plain, atol=1e-3, rtol=1e-3)


def _made(folder):
    folder.mkdir()
    return folder


# --- options


@pytest.mark.parametrize(
    ("backbone", "widths"),
    [("resnet34", (64, 128, 256)), ("resnet50", (256, 512, 1024)), ("wide_resnet50_2", (256, 512, 1024))],
)
def test_other_backbones_have_their_widths_and_fold_too(backbone, widths):
    method = Stpm(backbone)
    network = method.new_student(0).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = method.graph(network, method.new_student(1).eval(), 64, 64)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    with torch.inference_mode():
        features = network(x)
        assert tuple(feature.shape[1] for feature in features) == widths
        for folded, plain in zip(model.teacher(x), features, strict=True):
            torch.testing.assert_close(folded, plain, atol=1e-3, rtol=1e-3)
        assert model(x)[0].shape == (1, 1, 64, 64)


@pytest.mark.parametrize("taps", [("layer1",), ("layer2", "layer4"), ("layer1", "layer2", "layer3", "layer4")])
def test_a_pyramid_ends_at_its_last_tap_and_gives_those_asked_for(taps):
    network = Stpm(taps=taps).new_student(0).eval()
    assert [feature.shape[1] for feature in network(torch.zeros(1, 3, 64, 64))] == [
        {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}[tap] for tap in taps
    ]
    assert network.layers[-1] == taps[-1]


def test_methods_with_other_settings_are_other_steps():
    described = {str(base.described(method)) for method in (Stpm(), Stpm("resnet34"), Stpm(taps=("layer2",)))}
    assert len(described) == 3
    assert base.settings_of(Stpm()) == {"backbone": "resnet18", "taps": ["layer1", "layer2", "layer3"]}


def test_ways_of_turning_are_eight_different_ones_and_keep_the_pixels():
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    found = [training.turn(image, way) for way in range(8)]
    assert np.array_equal(found[0], image)
    assert len({each.tobytes() for each in found}) == 8
    for each in found:
        assert np.array_equal(np.sort(each.reshape(-1, 3), 0), np.sort(image.reshape(-1, 3), 0))
    assert {training.turn(image[:4], way).shape for way in range(4)} == {(4, 6, 3)}


@pytest.mark.parametrize("room", [True, False])
def test_a_turned_image_meets_the_features_of_the_teacher_of_that_image(teacher, pixels, tmp_path, monkeypatch, room):
    if not room:
        monkeypatch.setattr(training, "feature_cache", lambda shapes, folder: None)
    images = TrainingSet(pixels[:3], SMALL, METHOD, teacher, tmp_path, "", turned=True)
    assert (len(images), images.ways, images.cache is not None) == (3, 8, room)
    for index in (1, 3 * 5 + 2):
        turned = training.turn(pixels[index % 3], index // 3)
        wanted = METHOD.targets(teacher(torch.from_numpy(SMALL.normalise(turned))))
        for found, each in zip(images.targets(np.array([index])), wanted, strict=True):
            torch.testing.assert_close(found, each, atol=2e-3, rtol=1e-2)


def test_turning_changes_what_is_learned_and_not_how_much(teacher, pixels, tmp_path):
    plain = run(teacher, pixels, _made(tmp_path / "a"))
    turned = run(teacher, pixels, _made(tmp_path / "b"), msgspec.structs.replace(RECIPE, turned=True))
    again = run(teacher, pixels, _made(tmp_path / "c"), msgspec.structs.replace(RECIPE, turned=True))
    assert turned.history == again.history
    assert turned.history != plain.history
    assert turned.history[-1].loss < turned.history[0].loss


def test_bfloat16_learns_nearly_the_same(teacher, pixels, tmp_path):
    exact = run(teacher, pixels, _made(tmp_path / "a"))
    rounded = run(teacher, pixels, _made(tmp_path / "b"), msgspec.structs.replace(RECIPE, bfloat16=True))
    assert rounded.history != exact.history
    assert rounded.history[-1].loss == pytest.approx(exact.history[-1].loss, rel=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in rounded.student.parameters())


def test_training_stops_when_the_held_out_has_settled(teacher, pixels, tmp_path, monkeypatch, capsys):
    scores = iter([5.0, 3.0, 4.0, 3.5, 2.0, 1.0])
    monkeypatch.setattr(training, "_validate", lambda *_: next(scores))
    trained = run(teacher, pixels, tmp_path, msgspec.structs.replace(RECIPE, epochs=6, patience=2))
    assert [epoch.validation for epoch in trained.history] == [5.0, 3.0, 4.0, 3.5]
    assert trained.best_epoch == 2
    assert "stopped after epoch 4" in capsys.readouterr().out


def test_the_expected_end_is_told_after_the_first_epoch(teacher, pixels, tmp_path, capsys):
    run(teacher, pixels, tmp_path)
    first = capsys.readouterr().out.splitlines()[0]
    assert re.match(r"epoch 1/3: loss .*, about \d+ min left, until \d\d:\d\d$", first)


def test_the_learning_curve_is_a_picture_of_all_epochs():
    picture = learning_curve([(2.0, 0.5), (1.0, 0.2), (0.5, 0.3)], 2)
    image = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (480, 960, 3)
    other = learning_curve([(2.0, 0.5), (1.0, 0.2), (0.9, 0.3)], 2)
    assert other != picture
