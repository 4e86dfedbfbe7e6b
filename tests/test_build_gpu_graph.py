"""What TensorRT is given: the graph, node by node."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from stpm.build.gpu.graph import for_tensorrt
from stpm.edge.errors import InputError
from stpm.edge.preprocess import Preprocess
from stpm.edge.score import anomaly_map, level_map

SPEC = Preprocess(64, 64)
TAPS = ("layer1", "layer2", "layer3")
NAMES = [f"{side}/{tap}" for tap in TAPS for side in ("teacher", "student")]


def run(model, image):
    """In float, without the fusions that change the rounding."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    half = session.get_inputs()[0].type == "tensor(float16)"
    found = session.run(None, {"input": image.astype(np.float16) if half else image})
    return {output.name: value for output, value in zip(session.get_outputs(), found, strict=True)}


def score_map(network, image):
    features = {
        name: value.astype(np.float32) * network.scales.get(name, 1)
        for name, value in run(network.model, image).items()
    }
    levels = [level_map(features[f"teacher/{tap}"][0], features[f"student/{tap}"][0]) for tap in TAPS]
    return anomaly_map(levels, SPEC.height, SPEC.width)


IMAGE = np.random.default_rng(7).normal(0, 1, (1, 3, SPEC.height, SPEC.width)).astype(np.float32)


@pytest.mark.parametrize("stem", ["float", "int8", "apart"])
@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "one stem in fp16"])
def test_features_and_head_give_what_the_whole_graph_gives(graphs, name, stem):
    network = for_tensorrt(graphs[name], stem=stem)
    found, wanted = score_map(network, IMAGE), run(graphs[name], IMAGE)["anomaly_map"][0, 0]
    np.testing.assert_allclose(found, wanted, atol=(3e-3 if stem == "int8" or name == "fp16" else 1e-4) * wanted.max())


def test_int8_features_are_the_features_rounded(int8_graph):
    network = for_tensorrt(int8_graph, int8_features=True)
    stored, features = run(network.model, IMAGE), run(for_tensorrt(int8_graph).model, IMAGE)
    for name, scale in network.scales.items():
        wanted = np.clip(np.rint(features[name] / np.float32(scale)), -128, 127)
        assert stored[name].dtype == np.int8
        np.testing.assert_array_equal(stored[name], wanted)


@pytest.mark.parametrize("stem", ["float", "int8"])
@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_the_first_convolution_is_one_for_both(graphs, name, stem):
    graph = for_tensorrt(graphs[name], stem=stem).model.graph
    (conv,) = [node for node in graph.node if node.op_type == "Conv" and node.name == "/stem/conv1/Conv"]
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert weights["stem.conv1.weight"].shape == (128, 3, 7, 7)
    assert weights["stem.conv1.bias"].shape == (128,)
    convs = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convs) == len([node for node in graphs[name].graph.node if node.op_type == "Conv"]) - 1
    assert conv.input[0] == ("input" if name != "int8" else "input/dequantised")
    kinds = [node.op_type for node in graph.node if node.name.startswith("/stem")]
    quantised = ["QuantizeLinear"] if (name, stem) == ("int8", "int8") else []
    assert kinds == ["Conv", "Relu", "MaxPool", *quantised, "Split"]


def test_the_first_convolutions_may_stay_apart(graphs):
    for name in ("fp32", "fp16", "int8"):
        graph = for_tensorrt(graphs[name], stem="apart").model.graph
        assert not any(node.op_type == "Split" for node in graph.node)


def test_dividing_int8_leaves_the_teacher_and_only_scales_the_student(int8_graph):
    """The int8 values of the student are the same, so its features differ by one factor."""
    whole = onnx.ModelProto()
    whole.CopyFrom(int8_graph)
    for side in ("teacher", "student"):
        for tap in TAPS:
            name = f"/{side}/{tap}/{tap}.1/relu_1/Relu_output_0"
            whole.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    before, after = run(whole, IMAGE), run(for_tensorrt(int8_graph, stem="int8").model, IMAGE)
    factors = []
    for tap in TAPS:
        for side in ("teacher", "student"):
            old, new = before[f"/{side}/{tap}/{tap}.1/relu_1/Relu_output_0"], after[f"{side}/{tap}"]
            factor = float((old * new).sum() / (old * old).sum())
            # a value between two integers may fall on the other side
            assert np.abs(new - factor * old).mean() < 0.02 * np.abs(new).mean()
            if side == "teacher":
                assert factor == pytest.approx(1, abs=1e-2)
            else:
                factors.append(factor)
    assert factors[0] != pytest.approx(1, abs=0.05)
    assert factors == pytest.approx([factors[0]] * 3, rel=1e-2)


def test_stems_of_two_precisions_stay_apart(graphs):
    nodes = for_tensorrt(graphs["one stem in fp16"]).model.graph.node
    assert not any(node.name.startswith("/stem") for node in nodes)


def test_outputs_are_the_taps_in_pairs_and_inputs_take_any_number_of_images(graphs):
    for name, kind in (("fp32", TensorProto.FLOAT), ("fp16", TensorProto.FLOAT16), ("int8", TensorProto.FLOAT)):
        graph = for_tensorrt(graphs[name]).model.graph
        assert [output.name for output in graph.output] == NAMES
        assert {output.type.tensor_type.elem_type for output in graph.output} == {kind}
        assert graph.input[0].type.tensor_type.elem_type == (
            TensorProto.FLOAT16 if name == "fp16" else TensorProto.FLOAT
        )
        several = run(for_tensorrt(graphs[name]).model, np.concatenate([IMAGE, -IMAGE, IMAGE]))
        assert {len(value) for value in several.values()} == {3}


def test_int8_features_are_those_that_the_next_block_reads(int8_graph):
    network = for_tensorrt(int8_graph, int8_features=True)
    kinds = {output.name: output.type.tensor_type.elem_type for output in network.model.graph.output}
    assert kinds == {name: TensorProto.FLOAT if "layer3" in name else TensorProto.INT8 for name in NAMES}
    assert set(network.scales) == {name for name in NAMES if "layer3" not in name}
    assert all(scale > 0 for scale in network.scales.values())


def test_nothing_of_the_head_is_left(graphs):
    for graph in graphs.values():
        model = for_tensorrt(graph).model
        assert not any("/head/" in node.name or node.op_type in ("Constant", "Resize") for node in model.graph.node)
        read = {name for node in model.graph.node for name in node.input}
        assert {tensor.name for tensor in model.graph.initializer} <= read


def test_a_graph_that_is_not_two_pyramids_is_refused(float_graph):
    for old, message in (("/student/", "which is no tap"), ("/student/layer2/", "wanted 1 to 4 taps")):
        model = onnx.ModelProto()
        model.CopyFrom(float_graph)
        for node in model.graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    new = "/someone/" if message.startswith("which") else "/student/layer4/"
                    names[index] = name.replace(old, new)
        with pytest.raises(InputError, match=message):
            for_tensorrt(model)


# the parser's rules, from TensorRT 8.5 on


@pytest.mark.parametrize("stem", ["float", "int8", "apart"])
@pytest.mark.parametrize("int8_features", [False, True])
def test_quantised_nodes_obey_the_parser_of_every_version(graphs, int8_features, stem):
    for name in ("int8", "one stem in fp16"):
        model = for_tensorrt(graphs[name], int8_features, stem).model
        assert {entry.version for entry in model.opset_import} == {13}
        check_rules(model)


def check_rules(model):
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    producer = {output: node for node in graph.node for output in node.output}
    readers = {}
    for node in graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    outputs = {output.name for output in graph.output}
    quantised = set()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(node.input) == 3, "the zero point must be there"
            scale, zero = weights[node.input[1]], weights[node.input[2]]
            assert scale.data_type == TensorProto.FLOAT
            assert zero.data_type == TensorProto.INT8
            assert (numpy_helper.to_array(scale) > 0).all()
            assert not numpy_helper.to_array(zero).any()
            assert list(scale.dims) == list(zero.dims)
            if node.op_type == "QuantizeLinear":
                per_channel = node.input[0] in weights
                if per_channel:
                    values = weights[node.input[0]]
                    assert values.data_type == TensorProto.FLOAT, "a weight goes in as float"
                    assert next(a.i for a in node.attribute if a.name == "axis") == 0
                    assert list(scale.dims) == [values.dims[0]]
                else:
                    assert list(scale.dims) == []
                assert node.input[0] not in quantised, f"two pairs on {node.input[0]}"
                quantised.add(node.input[0])
                after = readers[node.output[0]]
                if after[0].op_type == "Split":
                    after = [reader for output in after[0].output for reader in readers[output]]
                assert {each.op_type for each in after} == {"DequantizeLinear"}
                values = [numpy_helper.to_array(weights[each.input[1]]) for each in (node, *after)]
                assert all(np.array_equal(value, values[0]) for value in values)
        if node.op_type == "Conv":
            first, second = (producer.get(name) for name in node.input[:2])
            both = [each is not None and each.op_type == "DequantizeLinear" for each in (first, second)]
            assert both in ([True, True], [False, False]), f"{node.name}: only one of input and weight is quantised"
            if all(both):
                assert weights[node.input[2]].data_type == TensorProto.FLOAT
                for after in readers[node.output[0]]:
                    shortcut = after.op_type == "QuantizeLinear" and "downsample" in node.name
                    assert after.op_type in ("Relu", "Add") or shortcut, f"{after.name} keeps {node.name} from fusing"
        if node.op_type == "Add":
            kinds = sorted(producer[name].op_type for name in node.input)
            assert kinds[0] == "Conv"
            assert kinds[1] == "DequantizeLinear", f"{node.name}: a float Add"
        for output in node.output:
            assert output in readers or output in outputs, f"nobody reads {output}"


def test_the_check_of_the_rules_sees_what_breaks_them(int8_graph):
    def broken(change):
        model = onnx.ModelProto()
        model.CopyFrom(for_tensorrt(int8_graph).model)
        change(model.graph)
        return model

    def first(graph, kind, name=""):
        return next(node for node in graph.node if node.op_type == kind and name in node.name)

    changes = [
        lambda graph: first(graph, "QuantizeLinear").input.pop(),
        lambda graph: first(graph, "Conv", "layer1").input.__setitem__(1, "stem.conv1.weight"),
        lambda graph: first(graph, "Add").input.__setitem__(1, first(graph, "Relu").output[0]),
        lambda graph: first(graph, "QuantizeLinear", "layer2.0.conv1.weight").attribute.__delitem__(0),
        lambda graph: next(t for t in graph.initializer if t.name.endswith("/scale")).CopyFrom(
            numpy_helper.from_array(np.float32(-1), "input/scale")
        ),
    ]
    for change in changes:
        with pytest.raises((AssertionError, StopIteration)):
            check_rules(broken(change))
