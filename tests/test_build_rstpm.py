"""RSTPM: two pairs, of which the second does not see the image; from training to an int8 engine."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stpm.build import train as training
from stpm.build.cli import build_main
from stpm.build.export import check_parity, export_graph
from stpm.build.fake_quant import FakeQuantNetwork
from stpm.build.gpu.graph import for_tensorrt
from stpm.build.methods.rstpm import SECOND, Rstpm, SumProductHead, Teachers
from stpm.build.pyramid import TAPS, Pyramid
from stpm.build.report import _short
from stpm.build.train import Recipe, train
from stpm.build.weights import load_into, write_weights
from stpm.calibration.qdq import activations, convolutions, placement, quantise
from stpm.calibration.ranges import collect, minmax
from stpm.edge.bundle import open_bundle
from stpm.edge.errors import ConfigError, InputError
from stpm.edge.preprocess import Preprocess
from stpm.edge.score import level_map, upsample
from stpm.tools.parts import draw_part, write_dataset

SMALL = Preprocess(height=64, width=64)
SHARED = Rstpm()


@pytest.fixture(scope="module")
def teacher():
    return SHARED.load_teacher("builtin", "")


@pytest.fixture(scope="module")
def pixels():
    return np.stack([SMALL.resize(draw_part(seed)[0]) for seed in range(10)])


def untrained(method):
    """Its teachers with random weights, and its students."""
    taps = TAPS if method.shared else (*TAPS, "layer4")
    second = None if method.shared else Pyramid(TAPS, SECOND)
    return Teachers(Pyramid(taps, method.backbone), second).eval(), method.new_student(0).eval()


@pytest.mark.parametrize(
    ("variant", "decoder_millions", "giga_macs"),
    [("published", 100.6, 47.4), ("lite", 18.6, 15.7), ("shared", 6.6, 6.1)],
)
def test_size_and_cost_of_the_variants(variant, decoder_millions, giga_macs):
    """Those of the published one are what its layer list comes to by hand."""
    method = Rstpm(variant=variant)
    teachers, students = untrained(method)
    count = sum(parameter.numel() for parameter in students.second.parameters())
    assert count / 1e6 == pytest.approx(decoder_millions, abs=0.05)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        method.graph(teachers, students, 256, 256)(torch.zeros(1, 3, 256, 256))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga_macs, abs=0.05)


@pytest.mark.parametrize(
    ("variant", "attention"), [("published", TAPS), ("lite", ("layer3",)), ("shared", ()), ("shared", TAPS)]
)
def test_both_students_answer_with_the_shapes_of_their_teachers(variant, attention):
    method = Rstpm(variant=variant, attention=attention)
    teachers, students = untrained(method)
    with torch.inference_mode():
        targets = method.targets(teachers(torch.zeros(1, 3, 64, 64)))
        answer = method.answer(students, torch.zeros(1, 3, 64, 64), targets)
    wide = 1 if method.shared else 4
    shapes = [(1, 64, 16, 16), (1, 128, 8, 8), (1, 256, 4, 4)]
    shapes += [(1, wide * 64, 16, 16), (1, wide * 128, 8, 8), (1, wide * 256, 4, 4)]
    assert [tuple(feature.shape) for feature in answer] == shapes
    assert len(students.second.attention) == len(attention)
    assert torch.isfinite(method.loss(targets, answer))


@pytest.mark.parametrize("attention", [(), ("layer2",)])
def test_the_second_student_sees_deep_features_and_through_attention_others_but_never_the_image(attention):
    method = Rstpm(variant="lite", attention=attention)
    teachers, students = untrained(method)
    images = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        targets = method.targets(teachers(images[0]))
        first, other_image = (method.answer(students, image, targets) for image in images)
        assert not torch.equal(first[0], other_image[0])
        for a, b in zip(first[3:], other_image[3:], strict=True):
            assert torch.equal(a, b)

        def moved(index):
            """Whether layer1, where all ends, changes with that feature of the teachers."""
            changed = [feature + (number == index) for number, feature in enumerate(targets)]
            return not torch.equal(method.answer(students, images[0], changed)[3], first[3])

        assert moved(6)
        assert moved(4) == bool(attention)  # layer2 of the second teacher
        assert not any(moved(index) for index in (0, 1, 2, 3, 5))


def test_the_map_is_the_product_of_the_sums():
    random = np.random.default_rng(0)
    shapes = [(3, 8, 8), (4, 4, 4), (5, 2, 2), (6, 8, 8), (4, 4, 4), (3, 2, 2)]
    teacher, student = ([random.random(shape).astype(np.float32) for shape in shapes] for _ in range(2))
    levels = [upsample(level_map(t, s), 32, 24) for t, s in zip(teacher, student, strict=True)]
    wanted = (levels[0] + levels[3]) * (levels[1] + levels[4]) * (levels[2] + levels[5])
    as_torch = [[torch.from_numpy(feature)[None] for feature in features] for features in (teacher, student)]
    found, score = SumProductHead(32, 24)(*as_torch)
    np.testing.assert_allclose(found[0, 0].numpy(), wanted, rtol=1e-4, atol=1e-7)
    assert float(score) == pytest.approx(wanted.max(), rel=1e-4)


def test_each_pair_learns_by_its_own_loss(teacher):
    students = SHARED.new_student(0)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    targets = SHARED.targets(teacher(images))
    answer = SHARED.answer(students, images, targets)
    SHARED.loss(targets, [*answer[:3], *(feature.detach() for feature in answer[3:])]).backward()
    assert all(parameter.grad is not None for parameter in students.first.parameters())
    assert all(parameter.grad is None for parameter in students.second.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("bfloat16", [False, True])
def test_training_lowers_the_loss_of_both_pairs(teacher, pixels, tmp_path, bfloat16):
    recipe = Recipe(epochs=6, batch=4, seed=3, bfloat16=bfloat16, learning_rate=0.1)
    trained = train(SHARED, teacher, SHARED.new_student(3), pixels, SMALL, recipe, tmp_path)
    assert trained.history[-1].loss < 0.7 * trained.history[0].loss
    images = torch.from_numpy(np.concatenate([SMALL.normalise(image) for image in pixels]))
    for first, second in ((slice(0, 3), slice(0, 3)), (slice(3, 6), slice(0, 3))):
        distances = []
        for student in (SHARED.new_student(3).eval(), trained.student):
            with torch.inference_mode():
                targets = SHARED.targets(teacher(images))
                answer = SHARED.answer(student, images, targets)[first]
            cosine = [torch.cosine_similarity(t, s).mean() for t, s in zip(targets[second], answer, strict=True)]
            distances.append(float(1 - torch.stack(cosine).mean()))
        assert distances[1] < 0.8 * distances[0]


def test_without_room_for_the_features_of_the_teacher_it_learns_the_same(teacher, pixels, tmp_path, monkeypatch):
    losses = []
    for kept in (training.feature_cache, lambda shapes, folder: None):
        monkeypatch.setattr(training, "feature_cache", kept)
        folder = tmp_path / str(len(losses))
        folder.mkdir()
        recipe = Recipe(epochs=1, batch=4, seed=3, learning_rate=0.01)
        losses.append(train(SHARED, teacher, SHARED.new_student(3), pixels, SMALL, recipe, folder).history[0].loss)
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_the_graph_is_exact_and_what_has_no_rule_stays_float(teacher, pixels):
    method = Rstpm(attention=TAPS)
    students = method.new_student(1)
    students.train()(torch.rand(4, 3, 64, 64), teacher(torch.rand(4, 3, 64, 64)))  # batch norms that do something
    model = method.graph(teacher, students.eval(), 64, 64)
    graph = export_graph(model, SMALL)
    check_parity(model, graph, SMALL.normalise(pixels[0]))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    kinds = {node.name: node.op_type for node in graph.graph.node}
    quantised = {use.node for use in placement(graph)}
    assert {kinds[name] for name in quantised} == {"Conv", "Add"}
    assert {name for name, kind in kinds.items() if kind == "Conv" and not name.startswith("/head/")} <= quantised
    adds = [name for name, kind in kinds.items() if kind == "Add" and name.startswith("/student/second")]
    assert len(adds) - len(quantised.intersection(adds)) == 3  # x + x·A
    assert sum(kind == "ConvTranspose" for kind in kinds.values()) == 3


def test_bottlenecks_of_a_second_teacher_are_quantised_too():
    method = Rstpm(variant="lite")
    graph = export_graph(method.graph(*untrained(method), 64, 64), SMALL)
    kinds = {node.name: node.op_type for node in graph.graph.node}
    uses = placement(graph)
    adds = [use for use in uses if kinds[use.node] == "Add" and use.node.startswith("/teacher/second/")]
    assert len(adds) == 3 + 4 + 6  # the blocks of layer1 to layer3
    # a shortcut is the input of the block, or its 1×1 convolution: never what the third convolution has made
    assert not any("/conv3/" in use.tensor for use in adds)
    assert sum("/downsample/" in use.tensor for use in adds) == 3
    with pytest.raises(InputError, match="TensorRT engines are for methods that compare the same taps"):
        for_tensorrt(graph)
    names = [_short(name) for name in convolutions(graph)]
    sides = ["teacher" if name.startswith("/teacher/") else "student" for name in convolutions(graph)]
    assert len(set(zip(sides, names, strict=True))) == len(names)  # each has its own bar in the report


def test_weights_of_other_settings_are_refused():
    weights = Rstpm(attention=("layer2", "layer3")).new_student(0).state_dict()
    with pytest.raises(InputError, match=r"without a tensor second\.attention\.layer2.*, but x has one: .*settings"):
        load_into(Rstpm(attention=("layer3",)).new_student(0), weights, "x")
    load_into(Pyramid(), Pyramid((*TAPS, "layer4")).state_dict(), "x")  # whole layers may be there
    with pytest.raises(InputError, match=r"without a tensor layer1\.2"):
        load_into(Pyramid(), Pyramid(TAPS, "resnet34").state_dict(), "x")


def test_what_contradicts_the_method_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"rstpm compares layer1, layer2, layer3, found --taps layer1"):
        Rstpm(taps=("layer1",))
    with pytest.raises(ConfigError, match="some of layer1, layer2, layer3 for --attention, found layer4"):
        Rstpm(attention=("layer4",))
    with pytest.raises(ConfigError, match="leave --second-teacher out"):
        SHARED.load_teacher("builtin", "imagenet")
    with pytest.raises(InputError, match=r"layer4\.0\.conv1\.weight.*missing in builtin: give a resnet18 file"):
        Rstpm(variant="lite").load_teacher("builtin", "imagenet")


def test_the_second_teacher_comes_from_its_own_file(tmp_path):
    write_weights(tmp_path / "first.npz", Pyramid((*TAPS, "layer4")).state_dict())
    second = Pyramid(TAPS, SECOND)
    write_weights(tmp_path / "second.npz", second.state_dict())
    teachers = Rstpm(variant="lite").load_teacher(str(tmp_path / "first.npz"), str(tmp_path / "second.npz"))
    assert torch.equal(teachers.second.layer3[0].conv1.weight, second.layer3[0].conv1.weight)
    assert not any(parameter.requires_grad for parameter in teachers.parameters())
    assert not teachers.training


def test_int8_follows_the_float_graph_and_is_not_trained_through(teacher, pixels):
    students = SHARED.new_student(1)
    images = torch.from_numpy(np.concatenate([SMALL.normalise(image) for image in pixels]))
    students.train()(images, teacher(images))
    graph = export_graph(SHARED.graph(teacher, students.eval(), 64, 64), SMALL)
    batches = [SMALL.normalise(image) for image in pixels]
    histograms = collect(graph, activations(graph), batches)
    quantised = quantise(graph, {name: minmax(histogram) for name, histogram in histograms.items()})
    maps = []
    for model in (graph, quantised):
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        maps.append(np.concatenate([session.run(["anomaly_map"], {"input": batch})[0] for batch in batches]))
    assert np.corrcoef(maps[0].ravel(), maps[1].ravel())[0, 1] > 0.95
    assert not np.array_equal(maps[0], maps[1])
    with pytest.raises(InputError, match=r"cannot train through .*--quantize ptq"):
        FakeQuantNetwork(quantised, "/student/")


def test_from_photos_to_a_bundle(bundles, tmp_path, capsys):
    write_dataset(tmp_path / "photos", "bushing", 24, 4)
    words = ["--category", "bushing", "--data", str(tmp_path / "photos"), "--teacher", "builtin", "--epochs", "1"]
    words += [
        "--batch",
        "8",
        "--size",
        "64",
        "--work",
        str(tmp_path / "work"),
        "--method",
        "rstpm",
        "--attention",
        "layer3",
    ]
    assert build_main([*words, "--engine", "fp16", "--out", str(tmp_path / "bundle")]) == 0
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.method == "rstpm"
    assert manifest.method_settings["attention"] == ["layer3"]
    assert manifest.method_settings["variant"] == "shared"
    capsys.readouterr()
    assert build_main([*words, "--engine", "int8", "--backend", "tensorrt", "--out", str(tmp_path / "b")]) == 2
    assert "--method rstpm has no TensorRT kernels" in capsys.readouterr().err
