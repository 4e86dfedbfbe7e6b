"""One network of a quantised graph in torch, to train through: node by node as it ships, Q/DQ as fake quantisation.

The graph itself is run, so there is one Q/DQ placement and not a second one in torch that could differ from it.
Rounding has the gradient 1 inside the range of its tensor and 0 outside (straight-through estimator).
"""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn import functional as F

from stpm.calibration.qdq import ACTIVATION_STEPS, SMALLEST_RANGE, WEIGHT_STEPS, drop_unused_weights, in_head
from stpm.edge.errors import InputError

Values = dict[str, torch.Tensor]


class FakeQuantNetwork(nn.Module):
    """float32 N×3×H×W → one N×C×h×w per tap, in the order in which the head reads them. A student that reads the
    teacher's taps, and not the image, takes the list of these instead.

    `network` is the prefix of its nodes ("/student/"). Weights and biases of its convolutions are parameters; their
    scales follow the weights, the scales of the activations stay those of the graph. What is not quantised in the
    graph is not quantised here.
    """

    def __init__(self, quantised: onnx.ModelProto, network: str) -> None:
        super().__init__()
        graph = quantised.graph
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        producer = {output: node for node in graph.node for output in node.output}
        read = [name for node in graph.node if in_head(node) for name in node.input]
        taps = [name for name in dict.fromkeys(read) if name in producer and not in_head(producer[name])]
        self._taps = [name for name in taps if _of(producer[name], network)]
        others = [name for name in taps if name not in self._taps and producer[name].op_type != "Constant"]
        needed = _ancestors(self._taps, {name: made for name, made in producer.items() if name not in others})
        self._inputs = [name for name in (graph.input[0].name, *others) if name in needed]
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        self._steps: list[tuple[str, Callable[[Values], torch.Tensor]]] = []
        for node in graph.node:
            made = node.output[0] in needed and node.output[0] not in self._inputs
            if made and not _of_weights(node, constants, producer):
                self._steps.append((node.output[0], self._step(node, constants, producer)))

    def forward(self, given: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
        tensors = [given] if isinstance(given, torch.Tensor) else given
        values = dict(zip(self._inputs, tensors, strict=True))
        for output, step in self._steps:
            values[output] = step(values)
        return [values[tap] for tap in self._taps]

    def into(self, graph: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of the float `graph` that this network was quantised from, with the weights as they are now."""
        result = onnx.ModelProto()
        result.CopyFrom(graph)
        for node in result.graph.node:
            if _key(node) in self.weights:
                for index, values in ((1, self.weights[_key(node)]), (2, self.biases[_key(node)])):
                    # a name of its own: the exporter stores equal tensors of both networks once
                    node.input[index] = f"{node.name}/{('weight', 'bias')[index - 1]}"
                    array = values.detach().contiguous().numpy()
                    result.graph.initializer.append(numpy_helper.from_array(array, node.input[index]))
        drop_unused_weights(result.graph)
        return result

    def _step(
        self, node: onnx.NodeProto, constants: Mapping[str, np.ndarray], producer: Mapping[str, onnx.NodeProto]
    ) -> Callable[[Values], torch.Tensor]:
        names = list(node.input)
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Conv":
            key = _key(node)
            quantised = names[1] in producer
            weight = producer[producer[names[1]].input[0]].input[0] if quantised else names[1]
            rounded = _fake_quant_weight if quantised else nn.Identity()
            self.weights[key] = nn.Parameter(torch.from_numpy(constants[weight].copy()))
            self.biases[key] = nn.Parameter(torch.from_numpy(constants[names[2]].copy()))
            options = {
                "stride": attributes["strides"],
                "padding": _padding(node, attributes),
                "dilation": attributes.get("dilations", [1, 1]),
                "groups": attributes.get("group", 1),
            }
            return lambda values: F.conv2d(values[names[0]], rounded(self.weights[key]), self.biases[key], **options)
        if node.op_type == "MaxPool":
            kernel, stride, padding = attributes["kernel_shape"], attributes["strides"], _padding(node, attributes)
            return lambda values: F.max_pool2d(values[names[0]], kernel, stride, padding)
        if node.op_type == "QuantizeLinear":
            scale = float(constants[names[1]])
            return lambda values: torch.fake_quantize_per_tensor_affine(
                values[names[0]], scale, 0, -ACTIVATION_STEPS - 1, ACTIVATION_STEPS
            )
        if node.op_type == "DequantizeLinear":  # the fake quantisation has done it
            return lambda values: values[names[0]]
        if node.op_type == "Relu":
            return lambda values: F.relu(values[names[0]])
        if node.op_type == "Add":
            return lambda values: values[names[0]] + values[names[1]]
        if node.op_type == "Concat":
            return lambda values: torch.cat([values[name] for name in names], attributes["axis"])
        if node.op_type == "DepthToSpace" and attributes["mode"] == b"CRD":
            return lambda values: F.pixel_shuffle(values[names[0]], attributes["blocksize"])
        raise InputError(f"cannot train through node {node.name} of type {node.op_type}: build with --quantize ptq")


def _fake_quant_weight(weight: torch.Tensor) -> torch.Tensor:
    """Per output channel, with the scale that `quantise` will give this weight."""
    largest = weight.detach().abs().flatten(1).amax(1)
    scale = largest.clamp(min=SMALLEST_RANGE) / WEIGHT_STEPS
    zero = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -WEIGHT_STEPS, WEIGHT_STEPS)


def _of(node: onnx.NodeProto, network: str) -> bool:
    return node.name.startswith(network)


def _key(node: onnx.NodeProto) -> str:
    return node.name.replace("/", "_").replace(".", "_")


def _of_weights(
    node: onnx.NodeProto, constants: Mapping[str, np.ndarray], producer: Mapping[str, onnx.NodeProto]
) -> bool:
    """Whether this is the Q or DQ of a weight."""
    if node.op_type == "DequantizeLinear":
        node = producer[node.input[0]]
    return node.op_type == "QuantizeLinear" and node.input[0] in constants


def _ancestors(taps: list[str], producer: Mapping[str, onnx.NodeProto]) -> set[str]:
    found: set[str] = set()
    waiting = list(taps)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += producer[name].input if name in producer else []
    return found


def _padding(node: onnx.NodeProto, attributes: Mapping[str, list[int]]) -> list[int]:
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    if (top, left) != (bottom, right):
        raise InputError(f"cannot train through node {node.name}: its padding is not the same on both sides")
    return [top, left]
