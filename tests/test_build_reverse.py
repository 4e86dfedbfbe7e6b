"""Reverse distillation: a student that sees only the teacher's features; from training to an int8 engine."""

import numpy as np
import pytest
import torch
from quantised_steps import differences, run, taps
from torch.utils.flop_counter import FlopCounterMode

from stpm.build.cli import build_main
from stpm.build.distil import FineTuning, distil
from stpm.build.export import check_parity, export_graph
from stpm.build.fake_quant import FakeQuantNetwork
from stpm.build.gpu.graph import for_tensorrt
from stpm.build.methods.reverse import Reverse
from stpm.build.methods.stpm import Stpm
from stpm.build.pyramid import TAPS
from stpm.build.train import OneCycle, train
from stpm.calibration.qdq import activations, placement, quantise
from stpm.calibration.ranges import collect, mse
from stpm.edge.bundle import open_bundle
from stpm.edge.errors import ConfigError
from stpm.edge.preprocess import Preprocess
from stpm.edge.score import anomaly_map, level_map
from stpm.tools.parts import draw_part, write_dataset

SMALL = Preprocess(height=64, width=64)
METHOD = Reverse()


@pytest.fixture(scope="module")
def teacher():
    return METHOD.load_teacher("builtin", "")


@pytest.fixture(scope="module")
def pixels():
    return np.stack([SMALL.resize(draw_part(seed)[0]) for seed in range(10)])


@pytest.fixture(scope="module")
def images(pixels):
    return torch.from_numpy(np.concatenate([SMALL.normalise(image) for image in pixels]))


@pytest.fixture(scope="module")
def student(teacher, images):
    """Untrained, with batch norms that do something."""
    student = METHOD.new_student(1)
    student.train()(teacher(images))
    return student.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def graph(teacher, student):
    return export_graph(METHOD.graph(teacher, student, 64, 64), SMALL)


@pytest.fixture(scope="module")
def ranges(graph, pixels):
    batches = [SMALL.normalise(image) for image in pixels]
    return {name: mse(histogram) for name, histogram in collect(graph, activations(graph), batches).items()}


def test_it_costs_less_than_stpm():
    cost = {}
    for method in (METHOD, Stpm()):
        graph = method.graph(method.load_teacher("builtin", ""), method.new_student(0), 256, 256)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            graph(torch.zeros(1, 3, 256, 256))
        cost[method.name] = counter.get_total_flops() / 2e9
    assert cost["reverse"] == pytest.approx(3.59, abs=0.01)
    assert cost["reverse"] < cost["stpm"]


def test_the_student_sees_all_three_features_of_the_teacher_and_not_the_image(teacher, student, images):
    with torch.inference_mode():
        targets = METHOD.targets(teacher(images[:1]))
        answer = METHOD.answer(student, images[:1], targets)
        assert [a.shape for a in answer] == [t.shape for t in targets]
        for one, other in zip(answer, METHOD.answer(student, images[1:2], targets), strict=True):
            assert torch.equal(one, other)
        for index in range(3):
            changed = [feature + (number == index) for number, feature in enumerate(targets)]
            for one, other in zip(answer, METHOD.answer(student, images[:1], changed), strict=True):
                assert not torch.equal(one, other)


def test_nothing_passes_around_the_summary(teacher, student, images):
    """One value of the summary is made from a whole neighbourhood; a student of ones in its place answers for none."""
    seen = []
    handle = student.summary.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        targets = teacher(images[:1])
        student(targets)
        handle.remove()
        constant = student.summary.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
        one, other = student(targets), student(teacher(images[1:2]))
        constant.remove()
    assert tuple(seen[0].shape) == (1, 512, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_loss_is_a_cosine_of_everything_and_one_of_the_hardest_places():
    random = np.random.default_rng(0)
    shapes = [(2, 3, 6, 5), (2, 5, 2, 2)]  # of whose 30 and 4 places a tenth is 3, and at least 1
    teacher = [random.random(shape).astype(np.float32) for shape in shapes]
    student = [random.random(shape).astype(np.float32) for shape in shapes]

    def distance(a, b):
        return float(1 - (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))

    wanted = 0.0
    for t, s, places in zip(teacher, student, (3, 1), strict=True):
        for a, b in zip(t, s, strict=True):
            each = [distance(a[:, y, x], b[:, y, x]) for y in range(a.shape[1]) for x in range(a.shape[2])]
            wanted += (distance(a, b) + np.mean(sorted(each)[-places:])) / len(t)
    found = METHOD.loss([torch.from_numpy(t) for t in teacher], [torch.from_numpy(s) for s in student])
    assert float(found) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_training_brings_the_features_together(teacher, pixels, images, tmp_path, bfloat16):
    recipe = OneCycle(epochs=6, batch=4, seed=3, bfloat16=bfloat16)
    trained = train(METHOD, teacher, METHOD.new_student(3), pixels, SMALL, recipe, tmp_path)
    assert trained.history[-1].loss < 0.6 * trained.history[0].loss
    assert trained.history[-1].validation < 0.5 * trained.history[0].validation
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_graph_is_exact_and_its_map_is_the_product(teacher, student, graph, pixels):
    model = METHOD.graph(teacher, student, 64, 64)
    tensor = SMALL.normalise(pixels[0])
    check_parity(model, graph, tensor)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    with torch.inference_mode():
        features = teacher(torch.from_numpy(tensor))
        answer = student(features)
    levels = [level_map(t[0].numpy(), s[0].numpy()) for t, s in zip(features, answer, strict=True)]
    (found,) = run(graph, ["anomaly_map"], tensor)
    np.testing.assert_allclose(found[0, 0], anomaly_map(levels, 64, 64), rtol=1e-2, atol=1e-4)


def test_every_convolution_is_quantised(graph):
    kinds = {node.name: node.op_type for node in graph.graph.node if not node.name.startswith("/head/")}
    quantised = {use.node for use in placement(graph)}
    assert quantised == {name for name, kind in kinds.items() if kind in ("Conv", "Add")}
    adds = [use.tensor for use in placement(graph) if kinds[use.node] == "Add" and "/student/" in use.node]
    assert [name.split("/")[2] for name in adds] == ["layer3", "layer3", "layer2", "layer1"]
    assert ["DepthToSpace" in name for name in adds] == [True, False, True, True]  # what comes into the block


@pytest.mark.parametrize("network", ["/teacher/", "/student/"])
def test_what_is_trained_through_is_what_the_quantised_graph_computes(graph, ranges, pixels, network):
    found = differences(quantise(graph, ranges), network, SMALL.normalise(pixels[0]))
    # not zero: a value half way between two steps may fall to either
    assert {name: share for name, share in found.items() if not share < 1e-3} == {}
    assert len(found) > 40


def test_fine_tuning_against_the_quantised_teacher_goes_back_into_the_graph(graph, ranges, pixels, tmp_path):
    quantised = quantise(graph, ranges)
    before = FakeQuantNetwork(quantised, "/student/")
    recipe = FineTuning(epochs=2, batch=4, learning_rate=1e-3, seed=0)
    tuned, _ = distil(METHOD, graph, quantised, pixels, SMALL, recipe, tmp_path, "cpu")
    after = FakeQuantNetwork(quantise(tuned, ranges), "/student/")
    teacher = FakeQuantNetwork(quantised, "/teacher/")
    with torch.inference_mode():
        targets = teacher(torch.from_numpy(np.concatenate([SMALL.normalise(image) for image in pixels])))
        assert METHOD.loss(targets, after(targets)) < 0.9 * METHOD.loss(targets, before(targets))


def test_tensorrt_gets_the_taps_of_both_and_one_stem(graph, ranges, pixels):
    quantised, tensor = quantise(graph, ranges), SMALL.normalise(pixels[0])
    network = for_tensorrt(quantised)
    names = [value.name for value in network.model.graph.output]
    assert sorted(names) == sorted(f"{side}/{tap}" for side in ("teacher", "student") for tap in TAPS)
    read = {side: taps(quantised, f"/{side}/") for side in ("teacher", "student")}
    found = run(network.model, names, tensor)
    wanted = [read[name.split("/")[0]][TAPS.index(name.split("/")[1])] for name in names]
    for one, other in zip(found, run(quantised, wanted, tensor), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    int8 = for_tensorrt(quantise(graph, ranges), int8_features=True)
    assert set(int8.scales) == {"teacher/layer1", "teacher/layer2", "student/layer2", "student/layer3"}


def test_what_it_has_no_decoder_for_is_refused():
    with pytest.raises(ConfigError, match="found --taps layer1"):
        Reverse(taps=("layer1",))
    with pytest.raises(ConfigError, match="--backbone resnet18 or resnet34 for --method reverse, found resnet50"):
        Reverse(backbone="resnet50")


@pytest.mark.usefixtures("bundles")  # which start the pools of threads that engines keep
def test_from_photos_to_a_bundle(tmp_path, capsys):
    write_dataset(tmp_path / "photos", "bushing", 24, 4)
    words = ["--category", "bushing", "--data", str(tmp_path / "photos"), "--teacher", "builtin", "--epochs", "2"]
    words += ["--work", str(tmp_path / "work"), "--method", "reverse", "--engine", "fp16", "--size", "128x96"]
    assert build_main([*words, "--out", str(tmp_path / "bundle")]) == 0
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.method == "reverse"
    assert (manifest.preprocess.width, manifest.preprocess.height) == (128, 96)
    settings = manifest.training.settings
    assert (settings["schedule"], settings["batch"], settings["epochs"]) == ("one-cycle", 8, 2)
    capsys.readouterr()
    assert build_main([*words, "--patience", "3", "--out", str(tmp_path / "b")]) == 2
    assert "--patience with the one-cycle schedule" in capsys.readouterr().err
