"""FP16 written into the graph: half-precision weights and activations in the networks, or in chosen layers of them.

The head stays float32 because squared features overflow 65504 and its epsilon underflows.
"""

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from stpm.calibration.qdq import drop_unused_weights, in_head, replace_nodes
from stpm.edge.errors import InputError

_CAST: dict[int, str] = {TensorProto.FLOAT16: "fp16", TensorProto.FLOAT: "fp32"}


def to_fp16(model: onnx.ModelProto, layers: Collection[str] | None = None) -> onnx.ModelProto:
    """The model with its networks, or only the nodes named in `layers`, in FP16; input and outputs stay float32.

    A weight beyond the range of FP16 is an InputError that names it.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.value_info[:]
    weights = {tensor.name: tensor for tensor in graph.initializer}
    in_half: set[str] = set()
    known = set(weights)
    nodes: list[onnx.NodeProto] = []

    def cast(tensor: str, kind: int) -> str:
        """The name of `tensor` as this kind; the Cast goes before the first node that reads it."""
        name = f"{tensor}/{_CAST[kind]}"
        if name not in known:
            known.add(name)
            nodes.append(helper.make_node("Cast", [tensor], [name], f"{tensor}/Cast", to=kind))
        return name

    def half_weight(tensor: str) -> str:
        name = f"{tensor}/fp16"
        if name not in known:
            known.add(name)
            values = numpy_helper.to_array(weights[tensor])
            if np.abs(values).max() > np.finfo(np.float16).max:
                raise InputError(f"the weight {tensor} does not fit into FP16: build with --engine fp32")
            graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), name))
        return name

    for node in graph.node:
        # the exporter names some of the head's constants after nothing; the networks have none
        network = not (in_head(node) or node.op_type == "Constant")
        half = network and (layers is None or node.name in layers)
        for index, name in enumerate(node.input):
            if half and name in weights:
                node.input[index] = half_weight(name)
            elif half and name not in in_half:
                node.input[index] = cast(name, TensorProto.FLOAT16)
            elif not half and name in in_half:
                node.input[index] = cast(name, TensorProto.FLOAT)
        if half:
            in_half.update(node.output)
        nodes.append(node)
    replace_nodes(graph, nodes)
    drop_unused_weights(graph)
    onnx.checker.check_model(result, full_check=True)
    return result
