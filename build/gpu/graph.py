"""The form of a graph that TensorRT compiles: without the head, with one stem, for batches.

The features of the taps become the outputs `teacher/TAP` and `student/TAP`; edge/kernels make the score of them. The
two first convolutions read the same image, so they become one with twice the channels, which is exact. The rest stays
two branches of one engine: as grouped convolutions TensorRT's INT8 is slower, and it does not join branches itself.

Where int8 follows the stem it can be divided in two places. As float: every branch keeps its own Q/DQ, which every
version can take. As int8: the convolution writes int8 itself, a quarter of the memory, but with one scale; so the
student is scaled as a whole until its scale there is the teacher's. Its integers stay the same, and cosines do not see
it.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from stpm.calibration.qdq import drop_unused_weights, in_head, pair, replace_nodes
from stpm.edge.engine.plan import INPUT
from stpm.edge.errors import InputError
from stpm.edge.kernels.launches import MOST_TAPS

BATCH = "images"
_BRANCH = re.compile(r"/(teacher|student)/(layer\d)/")


@dataclass(frozen=True)
class Network:
    """`scales` belong to the outputs that are int8: a stored value times its scale is the feature."""

    model: onnx.ModelProto
    scales: dict[str, float]


Stem = Literal["float", "int8", "apart"]


def for_tensorrt(model: onnx.ModelProto, int8_features: bool = False, stem: Stem = "float") -> Network:
    """fp32.onnx, fp16.onnx or int8.onnx of a bundle, for any number of images.

    With `int8_features`, taps that the next block reads as int8 leave as int8 too. `stem` says how the first
    convolutions are joined, or that they stay apart. Whatever is not two pyramids with the same taps is an InputError.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.value_info[:]
    _half_input(graph)
    features = _cut_head(result, int8_features)
    if stem != "apart":
        _fuse_stems(graph, divide_int8=stem == "int8")
    scales = {name: _scale_of(graph, name) for name, kind in features.items() if kind == TensorProto.INT8}
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH
    drop_unused_weights(graph)
    onnx.checker.check_model(result, full_check=True)
    return Network(result, scales)


def _producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in graph.node for output in node.output}


def _readers(graph: onnx.GraphProto, tensor: str) -> list[onnx.NodeProto]:
    return [node for node in graph.node if tensor in node.input]


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def _half_input(graph: onnx.GraphProto) -> None:
    """An image that is only read as FP16 comes as FP16."""
    readers = _readers(graph, INPUT)
    if [node.op_type for node in readers] == ["Cast"]:
        _rename(graph, readers[0].output[0], INPUT)
        graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
        graph.node.remove(readers[0])


def _cut_head(model: onnx.ModelProto, int8_features: bool) -> dict[str, int]:
    """Make what the head reads the outputs of the graph; their names and types."""
    graph = model.graph
    shapes = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    producers = _producers(graph)
    read = {name for node in graph.node if in_head(node) for name in node.input if name in producers}
    found: dict[str, str] = {}
    for tensor in sorted(read):
        producer = producers[tensor]
        if in_head(producer) or producer.op_type == "Constant":
            continue
        branch = _BRANCH.match(tensor)
        if branch is None:
            raise InputError(
                f"the head reads {tensor}, which is no tap of teacher or student: TensorRT engines are for methods "
                "that compare the same taps of both"
            )
        found["/".join(branch.groups())] = producer.input[0] if producer.op_type == "Cast" else tensor
    taps = [name.removeprefix("teacher/") for name in found if name.startswith("teacher/")]
    if not 1 <= len(taps) <= MOST_TAPS or set(found) != {
        f"{side}/{tap}" for side in ("teacher", "student") for tap in taps
    }:
        raise InputError(
            f"wanted 1 to {MOST_TAPS} taps that teacher and student both have, found {', '.join(sorted(found))}: "
            "TensorRT engines are for methods that compare the same taps of both"
        )
    replace_nodes(graph, [node for node in graph.node if not in_head(node) and node.op_type != "Constant"])
    del graph.output[:]
    kinds = {}
    for name in [f"{side}/{tap}" for tap in taps for side in ("teacher", "student")]:
        tensor, shape = found[name], shapes[found[name]].type.tensor_type
        quantised = f"{tensor}/int8"
        kinds[name] = shape.elem_type
        if int8_features and quantised in _producers(graph):
            tensor, kinds[name] = quantised, TensorProto.INT8
        sizes = [dimension.dim_value for dimension in shape.shape.dim]
        _rename(graph, tensor, name)
        graph.output.append(helper.make_tensor_value_info(name, kinds[name], sizes))
    _drop_unread(graph)
    return kinds


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Casts to the head that nothing reads any more."""
    outputs = {value.name for value in graph.output}
    read = {name for node in graph.node for name in node.input} | outputs
    replace_nodes(graph, [node for node in graph.node if read.intersection(node.output)])


@dataclass(frozen=True)
class _Stem:
    """conv1 → ReLU → max pooling, and the Q/DQ pair after it where there is one."""

    conv: onnx.NodeProto
    relu: onnx.NodeProto
    pool: onnx.NodeProto
    pair: tuple[onnx.NodeProto, onnx.NodeProto] | None


def _stems(graph: onnx.GraphProto) -> list[_Stem]:
    """Of teacher and student; empty where they are not alike."""
    entries = {INPUT} | {node.output[0] for node in graph.node if node.name in (f"{INPUT}/DQ", f"{INPUT}/Cast")}
    stems = []
    for conv in [node for node in graph.node if node.op_type == "Conv" and node.input[0] in entries]:
        relu, pool = _only(graph, conv.output[0], "Relu"), None
        if relu is not None:
            pool = _only(graph, relu.output[0], "MaxPool")
        if relu is None or pool is None:
            return []
        first = _only(graph, pool.output[0], "QuantizeLinear")
        second = _only(graph, first.output[0], "DequantizeLinear") if first else None
        stems.append(_Stem(conv, relu, pool, (first, second) if first and second else None))
    if len(stems) != 2 or stems[0].conv.input[0] != stems[1].conv.input[0]:
        return []
    alike = all(
        list(getattr(stems[0], part).attribute) == list(getattr(stems[1], part).attribute) for part in ("conv", "pool")
    )
    stems.sort(key=lambda stem: not stem.conv.name.startswith("/teacher/"))
    return stems if alike and (stems[0].pair is None) == (stems[1].pair is None) else []


def _only(graph: onnx.GraphProto, tensor: str, kind: str) -> onnx.NodeProto | None:
    readers = _readers(graph, tensor)
    return readers[0] if len(readers) == 1 and readers[0].op_type == kind else None


def _fuse_stems(graph: onnx.GraphProto, divide_int8: bool) -> None:
    stems = _stems(graph)
    producers = _producers(graph)
    weights = [_weight_pair(producers, stem.conv) for stem in stems]
    if not stems:
        return
    teacher, student = stems
    nodes, removed = [], [node for stem in stems for node in (stem.conv, stem.relu, stem.pool)]
    quantise = None
    if divide_int8 and teacher.pair and student.pair:
        quantise = teacher.pair[0]
        wanted, found = (_value(graph, each[0].input[1]) for each in (teacher.pair, student.pair))
        _scale_student(graph, float(wanted / found))
        removed += [teacher.pair[0], student.pair[0]]
    for index, role in enumerate(("weight", "bias"), start=1):
        names = [stem.conv.input[index] for stem in stems]
        if role == "weight" and weights[0] and weights[1]:
            names = [each[0].input[0] for each in weights if each]
            scales = [_value(graph, each[0].input[1]) for each in weights if each]
            removed += [node for each in weights if each for node in each]
            nodes += pair(graph, "stem.conv1.weight", np.concatenate(scales), axis=0)
        values = np.concatenate([_value(graph, name) for name in names])
        graph.initializer.append(numpy_helper.from_array(values, f"stem.conv1.{role}"))
    nodes += _joined(teacher, student, weights[0] is not None, quantise)
    first = min(list(graph.node).index(node) for node in removed)
    kept = [node for node in graph.node if node not in removed]
    # everything before the first convolution makes its input; weights may come anywhere before their use
    entry = producers.get(teacher.conv.input[0])
    place = max(first, kept.index(entry) + 1 if entry is not None else 0)
    replace_nodes(graph, kept[:place] + nodes + kept[place:])


def _weight_pair(
    producers: dict[str, onnx.NodeProto], conv: onnx.NodeProto
) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """The Q and DQ nodes of the weight; None where it is not quantised."""
    last = producers.get(conv.input[1])
    return None if last is None else (producers[last.input[0]], last)


def _joined(
    teacher: _Stem, student: _Stem, quantised_weight: bool, quantise: onnx.NodeProto | None
) -> list[onnx.NodeProto]:
    def like(node: onnx.NodeProto, name: str, inputs: list[str]) -> onnx.NodeProto:
        made = helper.make_node(node.op_type, inputs, [f"/stem/{name}_output"], f"/stem/{name}")
        made.attribute.extend(node.attribute)
        return made

    weight = "stem.conv1.weight/dequantised" if quantised_weight else "stem.conv1.weight"
    nodes = [like(teacher.conv, "conv1/Conv", [teacher.conv.input[0], weight, "stem.conv1.bias"])]
    nodes.append(like(teacher.relu, "relu/Relu", [nodes[-1].output[0]]))
    nodes.append(like(teacher.pool, "maxpool/MaxPool", [nodes[-1].output[0]]))
    ends = [stem.pool.output[0] for stem in (teacher, student)]
    if quantise is not None:
        nodes.append(like(quantise, "maxpool/Q", [nodes[-1].output[0], *quantise.input[1:]]))
        ends = [stem.pair[0].output[0] for stem in (teacher, student) if stem.pair]
    nodes.append(helper.make_node("Split", [nodes[-1].output[0]], ends, "/stem/Split", axis=1))
    return nodes


def _scale_student(graph: onnx.GraphProto, factor: float) -> None:
    """Every activation of the student times `factor`, its int8 values as before: ReLU networks are homogeneous."""
    stem = {stem.conv.input[1] for stem in _stems(graph)}
    scaled: set[str] = set()
    producers = _producers(graph)
    for node in graph.node:
        if node.op_type == "Conv" and node.name.startswith("/student/"):
            scaled.add(node.input[2])
            if node.input[1] in stem:
                quantised = _weight_pair(producers, node)
                scaled.update(quantised[0].input[:2] if quantised else [node.input[1]])
        # the weights of a student may be named like its activations, but no node makes them
        activation = node.op_type == "QuantizeLinear" and node.input[0] in producers
        if activation and node.input[0].lstrip("/").startswith("student/"):
            scaled.add(node.input[1])
    for tensor in graph.initializer:
        if tensor.name in scaled:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), tensor.name))


def _value(graph: onnx.GraphProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(tensor for tensor in graph.initializer if tensor.name == name))


def _scale_of(graph: onnx.GraphProto, output: str) -> float:
    return float(_value(graph, _producers(graph)[output].input[1]))
