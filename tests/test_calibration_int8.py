"""Contract 3, node by node: ranges, Q/DQ placement, FP16."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from stpm.calibration.fp16 import to_fp16
from stpm.calibration.qdq import activations, convolutions, describe, fused_with, in_head, placement, quantise
from stpm.calibration.ranges import BINS, OBSERVERS, Histogram, collect, entropy, minmax, mse, percentile
from stpm.calibration.sensitivity import sensitivity
from stpm.edge.errors import InputError

GOLDEN = Path(__file__).parent / "golden" / "stpm_placement.txt"


@pytest.fixture(scope="module")
def graphs(bundles):
    return {name: onnx.load(bundle.path / bundle.manifest.graph) for name, bundle in bundles.items()}


def run(model, tensor, output="anomaly_map"):
    if output not in {each.name for each in model.graph.output}:
        model = onnx.ModelProto.FromString(model.SerializeToString())
        model.graph.output.append(onnx.ValueInfoProto(name=output))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([output], {"input": tensor})[0]


def test_placement_is_the_reviewed_one(graphs):
    """When it changes on purpose: read the new text of describe(), then put it into the golden file."""
    assert describe(graphs["fp32"]) == GOLDEN.read_text()


def test_every_convolution_and_shortcut_is_quantised_by_the_rules(graphs):
    model = graphs["int8"]
    assert max(entry.version for entry in model.opset_import) <= 17
    producer = {output: node for node in model.graph.node for output in node.output}
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    adds = [node for node in model.graph.node if node.op_type == "Add" and not in_head(node)]
    # ResNet-18 to layer3: the stem, 3 × 4, and 2 downsampling convolutions; 6 residual Adds; all twice
    assert (len(convolutions), len(adds)) == (30, 12)
    for conv in convolutions:
        activation, weight = producer[conv.input[0]], producer[conv.input[1]]
        assert activation.op_type == weight.op_type == "DequantizeLinear"
        assert producer[activation.input[0]].op_type == producer[weight.input[0]].op_type == "QuantizeLinear"
        assert values[activation.input[1]].shape == ()
        channels = values[producer[weight.input[0]].input[0]].shape[0]
        assert values[weight.input[1]].shape == (channels,)
        assert {attribute.name: attribute.i for attribute in weight.attribute} == {"axis": 0}
        assert conv.input[2] in values  # the bias, float
        assert values[conv.input[2]].dtype == np.float32
    for add in adds:
        kinds = Counter(producer[name].op_type for name in add.input)
        assert kinds == {"Conv": 1, "DequantizeLinear": 1}  # main branch bare, shortcut quantised
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = values[node.input[1]], values[node.input[2]]
            assert scale.dtype == np.float32
            assert (scale > 0).all()
            assert zero.dtype == np.int8
            assert not zero.any()
            assert not in_head(node)
            if node.op_type == "DequantizeLinear":  # the pair shares scale and zero point
                assert node.input[1:] == producer[node.input[0]].input[1:]


def test_one_pair_per_tensor(graphs):
    quantised = Counter(node.input[0] for node in graphs["int8"].graph.node if node.op_type == "QuantizeLinear")
    assert set(quantised.values()) == {1}


def test_weights_stay_float_before_their_q(graphs):
    kinds = Counter(tensor.data_type for tensor in graphs["int8"].graph.initializer if len(tensor.dims) == 4)
    assert kinds == {TensorProto.FLOAT: 30}


def test_weights_use_half_their_range_so_that_sixteen_bits_hold_two_products(graphs):
    """A CPU without VNNI multiplies unsigned 8-bit activations (up to 255) and adds pairs in a signed 16-bit word."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graphs["int8"].graph.initializer}
    for node in graphs["int8"].graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in values:
            weight, scale = values[node.input[0]], values[node.input[1]]
            steps = np.round(weight / scale.reshape(-1, 1, 1, 1))
            assert 2 * 255 * np.abs(steps).max() <= 32767
            assert np.abs(steps).max() == 63


def test_int8_differs_from_fp32_by_little_but_differs(graphs, bundles):
    bundle = bundles["fp32"]
    tensor = bundle.manifest.preprocess(bundle.golden().frames[2])
    wanted, found = run(graphs["fp32"], tensor), run(graphs["int8"], tensor)
    assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.98
    assert not np.array_equal(wanted, found)


def test_fp16_has_half_weights_a_float_head_and_float_ends(graphs, bundles):
    model = graphs["fp16"]
    kinds = Counter(tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4)
    assert kinds == {TensorProto.FLOAT16: 30}
    ends = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.elem_type for value in ends} == {TensorProto.FLOAT}
    assert sum(node.op_type == "Cast" for node in model.graph.node) == 1 + 6
    bundle = bundles["fp32"]
    tensor = bundle.manifest.preprocess(bundle.golden().frames[2])
    wanted = run(graphs["fp32"], tensor)
    np.testing.assert_allclose(run(model, tensor), wanted, atol=0.02 * wanted.max())


def test_a_weight_beyond_fp16_is_named(graphs):
    model = onnx.ModelProto()
    model.CopyFrom(graphs["fp32"])
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = 1e6
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    with pytest.raises(InputError, match=weight.name.replace(".", r"\.")):
        to_fp16(model)


def test_a_node_the_rules_do_not_cover_is_named(graphs):
    model = onnx.ModelProto()
    model.CopyFrom(graphs["fp32"])
    relu = next(node for node in model.graph.node if node.op_type == "Relu" and not in_head(node))
    relu.op_type = "HardSwish"
    with pytest.raises(InputError, match=f"{relu.name} of type HardSwish"):
        placement(model)


def test_an_add_without_a_shortcut_is_named():
    value = helper.make_tensor_value_info
    image, out = value("x", TensorProto.FLOAT, [1, 1, 8, 8]), value("y", TensorProto.FLOAT, [1, 1, 6, 6])
    weights = [numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), name) for name in ("v", "w")]
    main = [helper.make_node("Conv", ["x", weight.name], [f"of {weight.name}"], weight.name) for weight in weights]
    add = helper.make_node("Add", ["of v", "of w"], ["y"], "lonely")
    with pytest.raises(InputError, match=r"lonely.*found 0"):
        placement(helper.make_model(helper.make_graph([*main, add], "g", [image], [out], weights)))


def test_a_range_of_zero_does_not_divide(graphs):
    model = quantise(graphs["fp32"], dict.fromkeys(activations(graphs["fp32"]), 0.0))
    assert np.isfinite(run(model, np.zeros((1, 3, 128, 128), np.float32))).all()


def test_histogram_counts_everything_while_its_range_grows():
    random, histogram = np.random.default_rng(0), Histogram.empty()
    batches = [random.normal(0, scale, 1000) for scale in (1e-4, 1, 0.1, 300)]
    for batch in batches:
        histogram.add(batch)
    everything = np.abs(np.concatenate(batches))
    assert histogram.counts.sum() == len(everything)
    assert histogram.largest == everything.max() <= histogram.limit < 2 * everything.max()
    edge = histogram.limit / BINS
    for bins in (1, 10, 1000):
        # a value on an edge may have moved by rounding, none of 4000 random ones should
        assert histogram.counts[:bins].sum() == pytest.approx((everything < bins * edge).sum(), abs=1)


def test_observers():
    values = np.concatenate([np.zeros(5000), np.linspace(0.001, 1, 9999), [50.0]])
    histogram = Histogram.empty()
    histogram.add(values)
    assert minmax(histogram) == 50
    assert percentile(histogram, 0.999) == pytest.approx(0.9991, abs=0.02)
    assert percentile(histogram, 1.0) == 50

    def error(limit):
        step = limit / 127
        return np.sum((values - np.clip(np.round(values / step), 0, 127) * step) ** 2)

    # one outlier of 50 costs more when clipped than ten thousand values when rounded, a thousand times more values not
    assert mse(histogram) == pytest.approx(min(np.linspace(10, 50, 161), key=error), rel=0.02)


def test_collect_sees_the_input_and_refuses_nan(graphs):
    model = graphs["fp32"]
    names = activations(model)
    tensor = np.full((1, 3, 128, 128), -2.0, np.float32)
    found = collect(model, names, [tensor])
    assert set(found) == set(names)
    assert found["input"].largest == 2
    assert all(0 <= histogram.largest < 1e4 for histogram in found.values())
    with pytest.raises(InputError, match="not finite"):
        collect(model, names, [np.full_like(tensor, np.nan)])


def test_entropy_clips_a_lonely_outlier_and_keeps_a_full_range():
    random = np.random.default_rng(0)
    even, lonely = Histogram.empty(), Histogram.empty()
    even.add(random.random(100_000))
    lonely.add(np.append(np.abs(random.normal(0, 1, 100_000)), 50.0))
    assert entropy(even) > 0.95 * even.largest
    assert 2 < entropy(lonely) < 12


def test_entropy_of_few_bins_and_of_zeros_is_the_maximum():
    histogram = Histogram.empty()
    histogram.add(np.zeros(10))
    assert entropy(histogram) == 0
    histogram.counts[3], histogram.largest = 5, 3.5 * histogram.limit / BINS
    assert entropy(histogram) == histogram.largest


def test_every_observer_lies_within_the_values(graphs):
    model = graphs["fp32"]
    tensor = np.random.default_rng(0).normal(0, 1, (1, 3, 128, 128)).astype(np.float32)
    for name, histogram in collect(model, activations(model), [tensor]).items():
        for observer, observe in OBSERVERS.items():
            assert 0 < observe(histogram) <= histogram.largest, (observer, name)


def test_a_layer_left_in_float_keeps_its_weights_and_frees_its_shortcut(graphs):
    model = graphs["fp32"]
    layer = "/teacher/layer1/layer1.0/conv2/Conv"
    ranges = dict.fromkeys(activations(model), 4.0)
    mixed = quantise(model, ranges, in_float=[layer])
    nodes = {node.name: node for node in mixed.graph.node}
    plain = next(node for node in model.graph.node if node.name == layer)
    assert list(nodes[layer].input) == list(plain.input)
    add = nodes["/teacher/layer1/layer1.0/Add"]
    producer = {output: node.op_type for node in mixed.graph.node for output in node.output}
    assert "DequantizeLinear" not in [producer.get(name) for name in add.input]
    assert placement(model, [layer]) == [use for use in placement(model) if use.node not in (layer, add.name)]


def test_a_layer_in_fp16_inside_an_int8_graph(graphs, bundles):
    model = graphs["fp32"]
    layers = ["/teacher/conv1/Conv", "/student/layer2/layer2.0/conv2/Conv"]
    half = fused_with(model, layers)
    assert half == {
        *layers,
        "/teacher/relu/Relu",
        "/student/layer2/layer2.0/Add",
        "/student/layer2/layer2.0/relu_1/Relu",
    }
    manifest = bundles["fp32"].manifest
    tensor = manifest.preprocess(bundles["fp32"].golden().frames[2])
    ranges = {name: minmax(found) for name, found in collect(model, activations(model), [tensor]).items()}
    mixed = to_fp16(quantise(model, ranges, in_float=layers), half)
    kinds = {tensor.name: tensor.data_type for tensor in mixed.graph.initializer}
    for node in mixed.graph.node:
        if node.op_type == "Conv":
            kind = TensorProto.FLOAT16 if node.name in layers else TensorProto.FLOAT
            assert kinds.get(node.input[1], TensorProto.FLOAT) == kind
    producer = {output: node for node in mixed.graph.node for output in node.output}
    for node in mixed.graph.node:
        if node.name in half and node.op_type in ("Relu", "Add"):  # nothing between a convolution and its ReLU
            assert any(producer[name].name in half for name in node.input)
    # image and ReLU of the first layer; input, shortcut and result of the block
    assert sum(node.op_type == "Cast" for node in mixed.graph.node) == 2 + 3
    # FP16 is much nearer to float than INT8 is: behind the first layer, before other layers are rounded
    stem = "/teacher/relu/Relu_output_0"
    exact, pure = run(model, tensor, stem), run(quantise(model, ranges), tensor, stem)
    error, rounding = (np.abs(found - exact).mean() for found in (run(mixed, tensor, f"{stem}/fp32"), pure))
    assert 0 < error < 0.1 * rounding
    # and in the map, a value here and there may fall to another step
    unrounded = run(quantise(model, ranges, in_float=layers), tensor)
    assert np.abs(run(mixed, tensor) - unrounded).mean() < 0.1 * unrounded.mean()


def test_a_calibration_set_that_is_empty_or_of_another_size(graphs):
    model = graphs["fp32"]
    with pytest.raises(InputError, match="found none"):
        collect(model, activations(model), [])
    with pytest.raises(InputError, match=r"\(1, 3, 128, 128\).*found \(1, 3, 96, 96\)"):
        collect(model, activations(model), [np.zeros((1, 3, 96, 96), np.float32)])


def test_sensitivity_ranks_the_layer_that_does_the_damage_first(graphs, bundles):
    model = graphs["fp32"]
    tensor = bundles["fp32"].manifest.preprocess(bundles["fp32"].golden().frames[2])
    ranges = {name: minmax(found) for name, found in collect(model, activations(model), [tensor]).items()}
    culprit = "/student/layer2/layer2.1/conv2/Conv"
    ranges[next(use.tensor for use in placement(model) if use.node == culprit)] *= 30
    found = sensitivity(model, ranges, lambda graph: run(graph, tensor))
    assert set(found) == set(convolutions(model))
    assert next(iter(found)) == culprit
    assert list(found.values()) == sorted(found.values(), reverse=True)
