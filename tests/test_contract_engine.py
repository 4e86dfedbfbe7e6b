"""Contract 5: what every engine must do, run over all of them."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from cuda_on_cpu.driver import Machine
from cuda_on_cpu.pretend import pretended

from stpm.edge.engine import Inference, open_engine
from stpm.edge.engine.fake import FakeEngine
from stpm.edge.errors import EngineError, SelfTestError, StpmError
from stpm.edge.preprocess import Preprocess
from stpm.edge.score import bounding_box
from stpm.edge.selftest import self_test

ENGINES = [("openvino", "fp32"), ("openvino", "fp16"), ("openvino", "int8"), ("fake", "int8")]
ENGINES += [("tensorrt", "fp32"), ("tensorrt", "fp16"), ("tensorrt", "int8")]


@pytest.fixture(params=ENGINES, ids="-".join)
def opened(request, bundles, tmp_path):
    """TensorRT runs on a pretended GPU: our kernels on the CPU, the networks in ONNX Runtime."""
    backend, precision = request.param
    bundle = bundles[precision]
    with ExitStack() as stack:
        if backend == "tensorrt":
            bundle = request.getfixturevalue("compiled")[precision]
            machine = Machine(request.getfixturevalue("library"))
            stack.callback(lambda: machine.left == "" or pytest.fail(f"left behind: {machine.left}"))
            stack.enter_context(pretended(machine, tmp_path))
        yield bundle, stack.enter_context(open_engine(bundle, backend))


def test_passes_its_self_test(opened):
    bundle, engine = opened
    # the machine that built it; TensorRT is not, its INT8 rounds in other places
    allowed = {"fp32": 1e-4, "fp16": 2e-3, "int8": bundle.manifest.golden.tolerance}
    same = engine.describe()["backend"] != "tensorrt"
    assert self_test(bundle, engine) <= (1e-4 if same else allowed[bundle.manifest.precision])


def test_answers_have_the_promised_shape_and_the_score_is_the_maximum(opened):
    bundle, engine = opened
    engine.warm_up()
    frames = bundle.golden().frames
    batch = np.concatenate([bundle.manifest.preprocess(frame) for frame in frames])
    found = engine.infer(batch)
    assert found.maps.shape == (3, 128, 128)
    assert found.maps.dtype == found.scores.dtype == np.float32
    np.testing.assert_allclose(found.maps.max((1, 2)), found.scores, rtol=1e-6)
    assert (found.maps >= 0).all()
    single = engine.infer(batch[1:2])
    np.testing.assert_allclose(single.maps[0], found.maps[1], atol=1e-6)


def test_inspects_a_frame_as_it_comes_from_the_camera(opened):
    bundle, engine = opened
    frame, threshold = bundle.golden().frames[2], float(bundle.golden().scores[2]) / 2
    wanted = engine.infer(bundle.manifest.preprocess(frame))
    found = engine.inspect(frame, threshold, with_map=True)
    tolerance = 1e-2 * float(wanted.scores[0])
    assert found.score == pytest.approx(wanted.scores[0], abs=tolerance)
    np.testing.assert_allclose(found.map, wanted.maps[0], atol=tolerance)
    above = found.map > threshold
    assert found.area == above.sum() > 0
    assert found.box == bounding_box(above)
    np.testing.assert_array_equal(found.mask, above)
    assert engine.inspect(frame, threshold) == replace(found, map=None, mask=None)
    high = engine.inspect(frame, found.score)
    assert (high.score, high.box, high.area) == (found.score, None, 0)


@pytest.mark.parametrize("frame", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8), None])
def test_what_is_no_frame_is_refused(opened, frame):
    with pytest.raises(StpmError, match="wanted a frame"):
        opened[1].inspect(frame, 1.0)


def test_answers_belong_to_the_caller(opened):
    bundle, engine = opened
    frames = bundle.golden().frames
    first = engine.infer(bundle.manifest.preprocess(frames[0]))
    kept = first.maps.copy()
    engine.infer(bundle.manifest.preprocess(frames[2]))
    np.testing.assert_array_equal(first.maps, kept)


@pytest.mark.parametrize(
    "tensor",
    [
        np.zeros((1, 3, 128, 127), np.float32),
        np.zeros((1, 3, 128, 128), np.float64),
        np.zeros((3, 128, 128), np.float32),
        np.full((1, 3, 128, 128), np.nan, np.float32),
        np.full((1, 3, 128, 128), np.inf, np.float32),
        np.zeros((0, 3, 128, 128), np.float32),
        np.zeros((1, 128, 128, 3), np.float32).transpose(0, 3, 1, 2),
        None,
    ],
    ids=["size", "dtype", "no batch", "nan", "inf", "empty", "strided", "none"],
)
def test_a_wrong_input_is_an_engine_error(opened, tensor):
    with pytest.raises(EngineError, match="wanted a contiguous and finite float32"):
        opened[1].infer(tensor)


def test_closing_twice_is_fine_and_inference_afterwards_is_an_error(opened):
    _, engine = opened
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.infer(np.zeros((1, 3, 128, 128), np.float32))


def test_describes_itself(opened):
    assert {"backend", "device"} <= set(opened[1].describe())


def test_profile_divides_each_inference(opened):
    bundle, engine = opened
    inside = engine.profile(bundle.golden().frames[0], runs=3)
    assert set(inside) == {"preprocess", "pyramids", "head"}
    assert all(len(samples) == 3 for samples in inside.values())
    if engine.describe()["backend"] == "openvino":  # the others only pretend
        assert all(0 < head < pyramids for head, pyramids in zip(inside["head"], inside["pyramids"], strict=True))


def test_a_nan_between_network_and_head_does_not_become_a_pass(tmp_path):
    """OpenVINO's relu and its maximum lose a NaN; the head and the engine are written so that none gets lost."""
    import torch

    from stpm.build.export import export_graph
    from stpm.build.head import ProductHead
    from stpm.edge.engine.openvino import OpenVinoEngine

    class Overflowing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = ProductHead(64, 64)

        def forward(self, x):
            large = x[:, :, ::4, ::4] * 1e30
            return self.head([large], [large * 1.5])

    graph = export_graph(Overflowing(), Preprocess(64, 64))
    onnx.save(graph, tmp_path / "overflow.onnx")
    with OpenVinoEngine.of_file(tmp_path / "overflow.onnx", Preprocess(64, 64)) as engine:
        assert not np.isfinite(engine.infer(np.ones((1, 3, 64, 64), np.float32)).scores[0])
        assert np.isfinite(engine.infer(np.full((1, 3, 64, 64), 1e-30, np.float32)).scores[0])


def test_the_scratched_golden_frame_is_the_largest(bundles):
    for bundle in bundles.values():
        scores = bundle.golden().scores
        assert scores[2] > scores[1] >= scores[0]


def test_engine_computes_the_score_of_the_definition(trained, bundles):
    """The head in the fp32 graph against edge/score.py, on the features that torch computes."""
    import torch

    from stpm.build.pyramid import Pyramid
    from stpm.build.weights import load_into, load_teacher, read_weights
    from stpm.edge.score import anomaly_map, level_map

    bundle = bundles["fp32"]
    teacher, student = load_teacher("builtin", ("layer1", "layer2", "layer3")), Pyramid()
    step = next(Path(trained.rpartition(" ")[2]).glob("train-*/student.npz"))
    load_into(student, read_weights(step), "test")
    tensor = bundle.manifest.preprocess(bundle.golden().frames[2])
    with torch.inference_mode():
        pairs = zip(teacher(torch.from_numpy(tensor)), student.eval()(torch.from_numpy(tensor)), strict=True)
        levels = [level_map(t[0].numpy(), s[0].numpy()) for t, s in pairs]
    wanted = anomaly_map(levels, 128, 128)
    with open_engine(bundle) as engine:
        found = engine.infer(tensor).maps[0]
    np.testing.assert_allclose(found, wanted, atol=1e-3 * wanted.max())


def test_low_precision_agrees_with_fp32(bundles):
    maps = {}
    for precision, bundle in bundles.items():
        with open_engine(bundle) as engine:
            maps[precision] = engine.infer(bundle.manifest.preprocess(bundles["fp32"].golden().frames[2])).maps.ravel()
    assert np.corrcoef(maps["fp32"], maps["fp16"])[0, 1] > 0.9999
    assert np.corrcoef(maps["fp32"], maps["int8"])[0, 1] > 0.98
    assert not np.array_equal(maps["fp32"], maps["int8"])


def scaled(bundle, factor):
    """An engine whose answers to the golden frames are all off by a factor."""
    golden = bundle.golden()
    known = {
        bundle.manifest.preprocess(frame).tobytes(): Inference(
            golden.maps[index : index + 1] * factor, golden.scores[index : index + 1] * factor
        )
        for index, frame in enumerate(golden.frames)
    }
    return FakeEngine([], bundle.manifest.preprocess, known)


def test_self_test_allows_the_tolerance_and_no_more(bundle):
    tolerance = bundle.manifest.golden.tolerance
    assert self_test(bundle, scaled(bundle, np.float32(1 + 0.95 * tolerance))) == pytest.approx(
        0.95 * tolerance, rel=0.01
    )
    for wrong in (1 + 1.05 * tolerance, 1 - 1.05 * tolerance, float("nan")):
        with pytest.raises(SelfTestError, match="golden frame 0"):
            self_test(bundle, scaled(bundle, np.float32(wrong)))


def test_self_test_looks_at_the_map_too(bundle):
    golden = bundle.golden()
    maps = golden.maps.copy()
    maps[1, 5, 5] = golden.scores[1] * 0.9
    known = {
        bundle.manifest.preprocess(frame).tobytes(): Inference(
            maps[index : index + 1], golden.scores[index : index + 1]
        )
        for index, frame in enumerate(golden.frames)
    }
    with pytest.raises(SelfTestError, match="golden frame 1"):
        self_test(bundle, FakeEngine([], bundle.manifest.preprocess, known))


def test_unknown_backend_is_refused_by_name(bundle):
    with pytest.raises(EngineError, match="'abacus'"):
        open_engine(bundle, "abacus")
