"""Quantisation-aware distillation trains through the graph that ships."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from quantised_steps import differences, run, taps

from stpm.build.distil import FineTuning, distil
from stpm.build.fake_quant import FakeQuantNetwork
from stpm.build.methods.stpm import Stpm
from stpm.build.train import split
from stpm.calibration.qdq import activations, describe, quantise
from stpm.calibration.ranges import collect, mse
from stpm.edge.errors import InputError
from stpm.edge.preprocess import Preprocess
from stpm.tools.parts import draw_part

METHOD, SPEC = Stpm(), Preprocess(128, 128)


@pytest.fixture(scope="module")
def pixels():
    return np.stack([SPEC.resize(draw_part(seed)[0]) for seed in range(10)])


@pytest.fixture(scope="module")
def graphs(bundles, pixels):
    """The float graph of the fp32 bundle, the ranges of some parts, and the graph quantised with them."""
    graph = onnx.load(bundles["fp32"].path / "fp32.onnx")
    batches = [SPEC.normalise(image) for image in pixels[:4]]
    ranges = {name: mse(found) for name, found in collect(graph, activations(graph), batches).items()}
    return graph, ranges, quantise(graph, ranges)


def taps_of(model, network, tensor):
    return run(model, taps(model, network), tensor)


@pytest.mark.parametrize("network", ["/teacher/", "/student/"])
def test_it_computes_what_the_quantised_graph_computes(graphs, pixels, network):
    graph, _, quantised = graphs
    tensor = SPEC.normalise(pixels[0])
    with torch.inference_mode():
        found = FakeQuantNetwork(quantised, network)(torch.from_numpy(tensor))
    wanted, plain = taps_of(quantised, network, tensor), taps_of(graph, network, tensor)
    assert [tuple(tap.shape[1:]) for tap in found] == [(64, 32, 32), (128, 16, 16), (256, 8, 8)]
    for tap, ours, floats in zip(found, wanted, plain, strict=True):
        rounding = np.abs(ours - floats).mean()
        # a value half way between two steps may fall to either side, and the layers after it carry that on; without
        # any rounding it would be 1
        assert np.abs(tap.numpy() - ours).mean() < 0.85 * rounding
        assert rounding > 0
    steps = differences(quantised, network, tensor)  # where nothing is carried on
    assert {name: share for name, share in steps.items() if not share < 1e-3} == {}
    assert len(steps) > 30


def test_the_gradient_passes_the_rounding_and_reaches_every_weight(graphs, pixels):
    student = FakeQuantNetwork(graphs[2], "/student/")
    taps = student(torch.from_numpy(SPEC.normalise(pixels[0])))
    torch.stack([tap.square().mean() for tap in taps]).sum().backward()
    assert len(list(student.parameters())) == 2 * 15
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_weights_go_back_into_the_graph_unchanged(graphs, pixels):
    graph, ranges, quantised = graphs
    back = FakeQuantNetwork(quantised, "/student/").into(graph)
    onnx.checker.check_model(back, full_check=True)
    tensor = SPEC.normalise(pixels[1])
    for network in ("/teacher/", "/student/"):
        for wanted, found in zip(taps_of(graph, network, tensor), taps_of(back, network, tensor), strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert describe(back) == describe(graph)
    quantise(back, ranges)


def test_only_the_student_changes_even_where_both_share_a_tensor(graphs):
    """The exporter stores equal weights of both networks once."""
    graph, _, quantised = graphs
    student = FakeQuantNetwork(quantised, "/student/")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    before, after = graph, student.into(graph)

    def weights(model, network):
        values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        convs = [node for node in model.graph.node if node.op_type == "Conv" and node.name.startswith(network)]
        return [values[name] for node in convs for name in node.input[1:]]

    for one, other in zip(weights(before, "/teacher/"), weights(after, "/teacher/"), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(weights(before, "/student/"), weights(after, "/student/"), strict=True):
        np.testing.assert_allclose(other, one + 1, rtol=1e-6)


def test_distillation_brings_the_quantised_networks_closer(graphs, pixels, tmp_path):
    """On held-out parts, computed by ONNX Runtime on the graph that ships."""
    graph, ranges, quantised = graphs
    recipe = FineTuning(epochs=3, batch=4, seed=0)
    distilled, best_epoch = distil(METHOD, graph, quantised, pixels, SPEC, recipe, tmp_path, "cpu")
    assert 1 <= best_epoch <= 3
    tuned = quantise(distilled, ranges)
    _, held_out = split(len(pixels), recipe)

    def distance(model):
        losses = []
        for image in pixels[held_out]:
            taps = [
                [torch.from_numpy(tap) for tap in taps_of(model, network, SPEC.normalise(image))]
                for network in ("/teacher/", "/student/")
            ]
            losses.append(float(METHOD.loss(METHOD.targets(taps[0]), taps[1])))
        return np.mean(losses)

    assert distance(tuned) < 0.98 * distance(quantised)


def test_a_node_that_cannot_be_trained_is_named(graphs):
    model = onnx.ModelProto()
    model.CopyFrom(graphs[2])
    relu = next(node for node in model.graph.node if node.op_type == "Relu" and node.name.startswith("/student/"))
    relu.op_type = "HardSwish"
    with pytest.raises(InputError, match=f"{relu.name} of type HardSwish"):
        FakeQuantNetwork(model, "/student/")


def test_lopsided_padding_is_named(graphs):
    model = onnx.ModelProto()
    model.CopyFrom(graphs[2])
    conv = next(node for node in model.graph.node if node.name == "/student/conv1/Conv")
    pads = next(attribute for attribute in conv.attribute if attribute.name == "pads")
    pads.ints[0] = 2
    with pytest.raises(InputError, match="/student/conv1/Conv: its padding"):
        FakeQuantNetwork(model, "/student/")
