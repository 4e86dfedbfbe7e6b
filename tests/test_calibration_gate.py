"""The accuracy gate: what it compares, what it refuses, and which settings are tried."""

import shutil

import numpy as np
import onnx
import pytest

from stpm.build import assemble, graphs
from stpm.build.cli import build_main
from stpm.build.graphs import spread
from stpm.build.settings import settings
from stpm.calibration.dataset import Images, Labelled, LabelledImage
from stpm.calibration.evaluation import Evaluation
from stpm.calibration.gate import Measured, compare, cross_fitted, drops, name_of, table
from stpm.calibration.ranges import OBSERVERS
from stpm.calibration.scratches import with_faint_scratches
from stpm.edge.bundle import open_bundle
from stpm.edge.errors import DeviceError, EngineError
from stpm.edge.manifest import Accuracy, Attempt, Gate, Limits, Setting, Threshold

QAD = Setting("qad", "mse")
FP32 = Accuracy(160, 0.9, 0.98, 0.92)


def measured(scores, maps, accuracy=FP32, threshold=2.5):
    empty = Labelled([], np.zeros((0, 2, 2, 3), np.uint8), np.zeros((0, 2, 2), bool), np.zeros(0, bool))
    found = Threshold(threshold, "tail", 0.01, len(scores), (0.0, 0.1))
    maps, scores = np.asarray(maps, np.float32), np.asarray(scores, np.float32)
    return Measured(maps, scores, found, 0.125, Evaluation(empty, maps[:0], scores[:0]), accuracy)


def test_what_is_compared_on_the_held_out_normals():
    maps = np.arange(16).reshape(4, 2, 2)
    fp32 = measured([1, 2, 2, 3], maps)
    int8 = measured([2, 4, 4, 6], [maps[0], maps[1], -maps[2], maps[3]], threshold=5)
    found = compare(QAD, int8, fp32, Limits())
    assert found.map_correlation == pytest.approx((1 + 1 - 1 + 1) / 4)
    assert found.score_correlation == pytest.approx(1)
    assert found.score_ratio == pytest.approx(2)
    assert (found.false_rejects, found.false_rejects_at_fp32) == (0.125, 0.75)


def test_false_rejects_are_counted_on_the_half_that_the_threshold_does_not_know():
    scores = np.array([1, 10, 2, 20, 3, 30], np.float32)  # thresholds 3 and 30
    assert cross_fitted(scores, "quantile", 0.01) == 0.5
    assert cross_fitted(scores, 15.0, 0.01) == pytest.approx(2 / 6)
    assert cross_fitted(np.ones(1, np.float32), 0.5, 0.01) == 0


def test_constant_maps_do_not_count_as_agreeing():
    fp32 = measured([1, 2], np.zeros((2, 2, 2)))
    assert compare(QAD, fp32, fp32, Limits()).map_correlation == 0


@pytest.mark.parametrize(
    ("accuracy", "passes"),
    [
        (Accuracy(160, 0.896, 0.978, 0.915), True),
        (Accuracy(160, 0.894, 0.98, 0.92), False),
        (Accuracy(160, 0.9, 0.976, 0.92), False),
        (Accuracy(160, 0.9, 0.98, 0.909), False),
        (Accuracy(160, 0.99, 0.99, 0.99), True),
        (Accuracy(160, 0.9, None, None), True),
        (Accuracy(160, None, None, None), False),
    ],
)
def test_each_figure_has_its_limit(accuracy, passes):
    fp32, int8 = (
        measured([1, 2], np.eye(2)[None].repeat(2, 0)),
        measured([1, 2], np.eye(2)[None].repeat(2, 0), accuracy),
    )
    assert compare(QAD, int8, fp32, Limits()).passed == passes


def test_a_figure_that_is_not_defined_loses_nothing():
    assert drops(Accuracy(1, 0.8, None, 0.7), FP32) == [
        ("image_auroc", pytest.approx(0.1)),
        ("pixel_auroc", None),
        ("aupro", pytest.approx(0.22)),
    ]


def test_settings_go_from_the_asked_one_to_layers_in_fp16():
    layers = [f"layer {number}" for number in range(30)]
    asked = []

    def most_sensitive():
        asked.append(1)
        return layers

    tried = settings(Setting("ptq", "percentile"), most_sensitive)
    first = [next(tried) for _ in range(5)]
    assert first[0] == Setting("ptq", "percentile")
    assert {setting.observer for setting in first[:4]} == set(OBSERVERS)
    assert first[4] == Setting("qad", "percentile")
    assert not asked  # the sweep takes time, so it comes last
    rest = list(tried)
    assert [setting.fp16_layers for setting in rest] == [layers[:1], layers[:2], layers[:4], layers[:8]]
    assert {setting.quantize for setting in rest} == {"qad"}
    of_qad = list(settings(QAD, most_sensitive))
    assert [setting.quantize for setting in of_qad] == ["qad"] + ["ptq"] * 4 + ["qad"] * 4
    assert len({name_of(setting) for setting in of_qad}) == 9


def test_the_table_fits_the_terminal():
    worst = Attempt(Setting("qad", "percentile", ["a"] * 8), FP32, 0.1, 0.1, 123.456, 1.0, 1.0, False)
    text = table(Gate(Limits(), "drawn", FP32, 1.0, [worst, worst]))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert text.count("FAIL") == 2
    assert "normals, half of them with a drawn scratch" in text


def words(trained, tmp_path, more):
    return f"--engine int8 {trained} --qad-epochs 1 --out {tmp_path / 'bundle'} {more}".split()


def failing(monkeypatch, verdict):
    """The gate with a verdict of its own on every setting; the engines are real."""
    real, tried = assemble.compare, []

    def judged(setting, int8, fp32, limits):
        tried.append(setting)
        attempt = real(setting, int8, fp32, limits)
        return Attempt(
            **{name: getattr(attempt, name) for name in Attempt.__struct_fields__} | {"passed": verdict(setting)}
        )

    monkeypatch.setattr(assemble, "compare", judged)
    return tried


def test_layers_stay_fp16_when_nothing_else_passes(trained, tmp_path, monkeypatch, capfd):
    tried = failing(monkeypatch, lambda setting: len(setting.fp16_layers) == 2)
    monkeypatch.setattr("stpm.build.settings.OBSERVERS", {"mse": None})
    real, distilled_from = graphs.distil, []

    def distil(method, graph, quantised, *arguments):
        distilled_from.append(sum(node.op_type == "QuantizeLinear" for node in quantised.graph.node))
        return real(method, graph, quantised, *arguments)

    monkeypatch.setattr(graphs, "distil", distil)
    assert build_main(words(trained, tmp_path, "--quantize ptq")) == 0
    assert [len(setting.fp16_layers) for setting in tried] == [0, 0, 1, 2]
    # the one without such layers is there from the fixture; the others round less, and are distilled for that
    assert len(distilled_from) == 2
    assert distilled_from[1] < distilled_from[0]
    manifest = open_bundle(tmp_path / "bundle").manifest
    layers = manifest.calibration.setting.fp16_layers
    assert len(layers) == 2
    assert manifest.calibration.setting == manifest.gate.attempts[-1].setting == tried[-1]
    assert [attempt.passed for attempt in manifest.gate.attempts] == [False, False, False, True]
    # the engine in the folder is the one of the last attempt
    model = onnx.load(tmp_path / "bundle" / "int8.onnx")
    halves = {node.name for node in model.graph.node if node.op_type == "Conv" and node.input[1].endswith("/fp16")}
    assert halves == set(layers)
    casts = {node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    assert not casts & {output for node in model.graph.node if node.name in layers for output in node.output}
    report = (tmp_path / "bundle" / "report.html").read_text()
    assert all(layer in report for layer in layers)
    assert "qad mse, 2 FP16" in capfd.readouterr().out


def test_a_gpu_too_small_for_the_fine_tuning_ends_the_build_and_is_no_verdict_on_a_setting(
    trained, tmp_path, monkeypatch, capfd
):
    def distil(*arguments):
        raise DeviceError("the GPU has not enough free memory")

    monkeypatch.setattr(graphs, "distil", distil)
    assert build_main(words(trained, tmp_path, "--seed 0 --qad-epochs 3")) == 5
    assert "not enough free memory" in capfd.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_an_engine_that_loses_too_much_is_never_written(trained, tmp_path, monkeypatch, capfd):
    failing(monkeypatch, lambda setting: False)
    monkeypatch.setattr("stpm.build.settings.OBSERVERS", {"mse": None})
    monkeypatch.setattr("stpm.build.settings.LAYERS_IN_FP16", (1,))
    assert build_main(words(trained, tmp_path, "")) == 10
    errors = capfd.readouterr().err
    assert "no int8 engine is as accurate as FP32" in errors
    assert errors.count("FAIL") == 3
    assert not list(tmp_path.iterdir())


def test_a_setting_that_gives_no_scores_is_passed_over(trained, tmp_path, monkeypatch, capfd):
    real, calls = assemble.measure, []

    def measured(*arguments):
        calls.append(1)
        if len(calls) == 2:  # FP32 comes first
            raise EngineError("the engine gives 3 scores that are not finite")
        return real(*arguments)

    monkeypatch.setattr(assemble, "measure", measured)
    assert build_main(words(trained, tmp_path, "--quantize ptq --max-drop 1,1,1")) == 0
    assert "int8 ptq mse cannot be used (the engine gives 3 scores" in capfd.readouterr().out
    (attempt,) = open_bundle(tmp_path / "bundle").manifest.gate.attempts
    assert attempt.setting == Setting("ptq", "minmax")


@pytest.mark.parametrize("kinds", [["dent"], ["good"], []])
def test_labels_of_one_kind_cannot_judge(parts, trained, tmp_path, kinds):
    """AUROC of defects alone is not defined: the gate would pass everything."""
    data = tmp_path / "data" / "bushing"
    shutil.copytree(parts / "bushing" / "train", data / "train")
    for kind in kinds:
        shutil.copytree(parts / "bushing" / "test" / kind, data / "test" / kind)
    assert build_main(words(trained, tmp_path, f"--quantize ptq --max-drop 1,1,1 --data {data.parent}")) == 0
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.gate.images == "drawn"
    assert manifest.accuracy is None
    assert "drawn scratch" in (tmp_path / "bundle" / "report.html").read_text()


def test_defects_among_the_good_parts_are_named(trained, tmp_path, monkeypatch, capfd):
    real = assemble.infer_all

    def with_defect(engine, pixels, preprocess, title):
        maps, scores = real(engine, pixels, preprocess, title)
        if title == "training images":
            scores = scores * 0 + np.linspace(1e-3, 1.2e-3, len(scores), dtype=np.float32)
            scores[4] = 0.5
        return maps, scores

    monkeypatch.setattr(assemble, "infer_all", with_defect)
    assert build_main(words(trained, tmp_path, "--quantize ptq --max-drop 1,1,1")) == 0
    printed = capfd.readouterr().out
    assert "WARNING: 1 of 13 training images score far above the others" in printed
    assert printed.count("far above") == 1


def test_calibration_images_are_spread():
    assert spread(np.arange(10, 20), 3).tolist() == [10, 14, 19]
    assert spread(np.arange(5), 9).tolist() == [0, 1, 2, 3, 4]


def test_the_manifest_says_what_was_compared(bundle):
    gate, setting = bundle.manifest.gate, bundle.manifest.calibration.setting
    assert gate.images == "labelled"
    assert setting == QAD == gate.attempts[-1].setting
    assert gate.attempts[-1].accuracy == bundle.manifest.accuracy
    assert 0.9 < gate.attempts[-1].map_correlation <= 1
    assert bundle.manifest.calibration.fine_tuning["epochs"] == 1


def test_only_int8_has_a_gate(bundles):
    assert bundles["fp32"].manifest.gate is None
    assert bundles["fp16"].manifest.gate is None


def test_without_labels_drawn_scratches_are_compared(parts, trained, tmp_path):
    good = parts / "bushing" / "train" / "good"
    assert build_main(words(trained, tmp_path, f"--quantize ptq --max-drop 1,1,1 --data {good}")) == 0
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.gate.images == "drawn"
    assert manifest.gate.fp32.images == 2 * manifest.training.held_out
    assert manifest.gate.fp32.pixel_auroc is not None
    assert manifest.accuracy is None  # drawn scratches say nothing about real defects


def test_faint_scratches_have_their_mask_and_change_nothing_else():
    random = np.random.default_rng(0)
    pixels = random.integers(60, 200, (5, 64, 64, 3)).astype(np.uint8)
    found = with_faint_scratches(Images(list("abcde"), pixels, [], (64, 64)), seed=1)
    assert found.defective.tolist() == [False] * 5 + [True] * 5
    assert found.masked.all()
    np.testing.assert_array_equal(found.pixels[:5], pixels)
    assert not found.masks[:5].any()
    for before, after, mask in zip(pixels, found.pixels[5:], found.masks[5:], strict=True):
        changed = np.abs(after.astype(int) - before).max(2)
        assert 3 <= mask.sum() < 0.1 * mask.size
        assert changed[mask].min() > 10
        near = np.zeros_like(mask)
        ys, xs = np.nonzero(mask)
        for step_y in (-1, 0, 1):
            for step_x in (-1, 0, 1):
                near[np.clip(ys + step_y, 0, 63), np.clip(xs + step_x, 0, 63)] = True
        assert not changed[~near].any()
    again = with_faint_scratches(Images(list("abcde"), pixels, [], (64, 64)), seed=1)
    np.testing.assert_array_equal(again.pixels, found.pixels)


def test_labelled_items_know_what_is_defective():
    assert LabelledImage("a", "drawn scratch", None).defective
    assert not LabelledImage("a", "good", None).defective
