"""Q/DQ placement: the INT8 precision is written into the graph, for OpenVINO and TensorRT alike.

Rules (TensorRT 8.5 to 11 fuse INT8 convolutions only under all of them):
  - the input of every convolution is quantised per tensor, its weight per output channel (axis 0);
    its bias stays float
  - nothing between a convolution and its ReLU, nor between the main branch and the Add
  - the shortcut input of every Add is quantised, so that the fused conv + add + ReLU writes INT8
  - one shared Q/DQ pair per tensor; symmetric int8, zero points 0, float32 scales; weights as float → Q → DQ
  - weights take 63 of the 127 steps: a CPU without VNNI adds two products of 8-bit numbers in 16 bits, and with full
    weights that sum saturates and the scores are nonsense (a hundred times too large on a Haswell)
  - transposed convolutions and attention stay float: engines have them rarely in INT8
The head stays float32: it divides by lengths and multiplies small differences.

Written by hand because none of the libraries tried on this graph keeps to these rules: onnxruntime.quantization puts Q
between a convolution and its ReLU, NNCF takes uint8 and stores weights as int8, and NVIDIA ModelOpt, the closest,
needs opset 19 and has no half-range weights (figures: docs/int8.md).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from stpm.edge.errors import InputError

HEAD = "/head/"
ACTIVATION_STEPS = 127
WEIGHT_STEPS = 63
SMALLEST_RANGE = 1e-8  # of a tensor that is always zero, whose scale must not be
_KNOWN = {"Conv", "Relu", "MaxPool", "Add", "Concat", "DepthToSpace"}
_FLOAT = {"ConvTranspose", "Sigmoid", "Mul"}  # of a decoder and its attention; engines have them rarely in INT8


@dataclass(frozen=True)
class Use:
    """One input of one node that reads a quantised tensor."""

    tensor: str
    node: str
    input: int


def in_head(node: onnx.NodeProto) -> bool:
    return node.name.startswith(HEAD)


def convolutions(model: onnx.ModelProto) -> list[str]:
    """The names of the layers that can be quantised, in graph order."""
    return [node.name for node in model.graph.node if node.op_type == "Conv" and not in_head(node)]


def fused_with(model: onnx.ModelProto, layers: Collection[str]) -> set[str]:
    """These convolutions and what an engine computes together with each: its ReLU, or its residual Add and ReLU."""
    producer = {output: node for node in model.graph.node for output in node.output}
    found = set(layers)
    for node in model.graph.node:
        if in_head(node):
            continue
        if node.op_type == "Add" and _residual(node, producer):
            main = producer[node.input[1 - _shortcut(node, producer)]]
            if main.name in found:
                found.add(node.name)
        if node.op_type == "Relu" and producer[node.input[0]].name in found:
            found.add(node.name)
    return found


def placement(model: onnx.ModelProto, in_float: Collection[str] = ()) -> list[Use]:
    """Every activation input that gets quantised, in graph order, without those of the convolutions `in_float`.

    A node the rules do not cover is an InputError.
    """
    producer = {output: node for node in model.graph.node for output in node.output}
    uses = []
    for node in model.graph.node:
        if in_head(node) or node.op_type == "Constant":
            continue
        if node.op_type not in _KNOWN | _FLOAT:
            raise InputError(
                f"cannot place Q/DQ around node {node.name} of type {node.op_type}: the rules cover "
                f"{', '.join(sorted(_KNOWN | _FLOAT))}; teach calibration/qdq.py this node, or build with "
                "--engine fp16"
            )
        if node.op_type == "Conv" and node.name not in in_float:
            uses.append(Use(node.input[0], node.name, 0))
        if node.op_type == "Add" and _residual(node, producer):
            shortcut = _shortcut(node, producer)
            main = producer[node.input[1 - shortcut]]
            if main.name not in in_float:  # it is fused with that convolution, and shares its precision
                uses.append(Use(node.input[shortcut], node.name, shortcut))
    return uses


def _residual(add: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether it adds to what a convolution makes; x + x·A of an attention does not, and stays float."""
    return any(producer[name].op_type == "Conv" for name in add.input if name in producer)


def _shortcut(add: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto]) -> int:
    """Which input of a residual Add is the shortcut: what no convolution makes, or else the convolution that reads the
    input of the block, where the other one reads what a convolution in the block has made."""
    makers = [producer.get(name) for name in add.input]
    main = [maker is not None and maker.op_type == "Conv" for maker in makers]
    if all(main):
        main = [maker is not None and _inside(maker, producer) for maker in makers]
    if sum(main) != 1:
        raise InputError(
            f"cannot tell the shortcut of the Add node {add.name}: wanted one of its two inputs at the end of a chain "
            f"of convolutions, found {sum(main)}"
        )
    return main.index(False)


def _inside(conv: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether the input of this convolution comes from another one, through its ReLU."""
    relu = producer.get(conv.input[0])
    before = producer.get(relu.input[0]) if relu is not None and relu.op_type == "Relu" else None
    return before is not None and before.op_type == "Conv"


def activations(model: onnx.ModelProto) -> list[str]:
    """The names of the tensors whose ranges are needed, each once."""
    return list(dict.fromkeys(use.tensor for use in placement(model)))


def quantise(model: onnx.ModelProto, ranges: Mapping[str, float], in_float: Collection[str] = ()) -> onnx.ModelProto:
    """The float model with Q/DQ pairs; `ranges` gives the largest magnitude of every tensor of `activations`.

    The convolutions named in `in_float` are left as they are.
    """
    uses = placement(model, in_float)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.value_info[:]
    nodes = {node.name: node for node in graph.node}
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pairs: dict[str, list[onnx.NodeProto]] = {}

    for use in uses:
        if use.tensor not in pairs:
            scale = np.float32(max(ranges[use.tensor], SMALLEST_RANGE) / ACTIVATION_STEPS)
            pairs[use.tensor] = pair(graph, use.tensor, np.asarray(scale), None)
        nodes[use.node].input[use.input] = pairs[use.tensor][1].output[0]
    for node in nodes.values():
        if node.op_type == "Conv" and not in_head(node) and node.name not in in_float:
            name = node.input[1]
            if name not in pairs:
                largest = np.abs(weights[name]).reshape(len(weights[name]), -1).max(1)
                scale = (np.maximum(largest, SMALLEST_RANGE) / WEIGHT_STEPS).astype(np.float32)
                pairs[name] = pair(graph, name, scale, axis=0)
            node.input[1] = pairs[name][1].output[0]

    _insert(graph, pairs)
    onnx.checker.check_model(result, full_check=True)
    return result


def describe(model: onnx.ModelProto) -> str:
    """The placement as text, one quantised input per line, for review and for the golden test."""
    return "\n".join(f"{use.node} input {use.input} <- {use.tensor}" for use in placement(model)) + "\n"


def pair(graph: onnx.GraphProto, tensor: str, scale: np.ndarray, axis: int | None) -> list[onnx.NodeProto]:
    """The Q and DQ nodes of a tensor, not yet in the graph; their constants are."""
    zero = np.zeros(scale.shape, np.int8)
    constants = [f"{tensor}/scale", f"{tensor}/zero_point"]
    graph.initializer.append(numpy_helper.from_array(scale, constants[0]))
    graph.initializer.append(numpy_helper.from_array(zero, constants[1]))
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    quantised, restored = f"{tensor}/int8", f"{tensor}/dequantised"
    return [
        helper.make_node("QuantizeLinear", [tensor, *constants], [quantised], f"{tensor}/Q", **attributes),
        helper.make_node("DequantizeLinear", [quantised, *constants], [restored], f"{tensor}/DQ", **attributes),
    ]


def _insert(graph: onnx.GraphProto, pairs: dict[str, list[onnx.NodeProto]]) -> None:
    """Put every pair right after the node that makes its tensor: an ONNX graph is sorted."""
    ordered: list[onnx.NodeProto] = []
    made = {value.name for value in (*graph.input, *graph.initializer)}
    for tensor in [name for name in pairs if name in made]:
        ordered += pairs[tensor]
    for node in graph.node:
        ordered.append(node)
        for output in node.output:
            ordered += pairs.get(output, [])
    replace_nodes(graph, ordered)


def drop_unused_weights(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Make `nodes`, some of them from this graph, the nodes of the graph in this order."""
    copies = []
    for node in nodes:
        copies.append(onnx.NodeProto())
        copies[-1].CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)
