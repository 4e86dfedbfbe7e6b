"""FP16 written into the graph: half-precision weights and activations in both networks, the head in float32.

The head stays float32 because squared features overflow 65504 and its epsilon underflows.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from stpm.calibration.qdq import in_head, replace_nodes
from stpm.edge.errors import InputError


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float model with its networks in FP16; input and outputs stay float32.

    A weight beyond the range of FP16 is an InputError that names it.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.value_info[:]
    # the exporter names some of the head's constants after nothing; the networks have none
    heads = [node for node in graph.node if in_head(node) or node.op_type == "Constant"]
    networks = [node for node in graph.node if node not in heads]
    used = {name for node in networks for name in node.input}
    for tensor in graph.initializer:
        if tensor.name in used and tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            if np.abs(values).max() > np.finfo(np.float16).max:
                raise InputError(f"the weight {tensor.name} does not fit into FP16: build with --engine fp32")
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))

    image = graph.input[0].name
    made = {output for node in networks for output in node.output}
    taps = dict.fromkeys(name for node in heads for name in node.input if name in made)
    to_half = helper.make_node("Cast", [image], [f"{image}/fp16"], f"{image}/Cast", to=TensorProto.FLOAT16)
    to_float = [helper.make_node("Cast", [tap], [f"{tap}/fp32"], f"{tap}/Cast", to=TensorProto.FLOAT) for tap in taps]
    for node in networks:
        _rename_inputs(node, {image: f"{image}/fp16"})
    for node in heads:
        _rename_inputs(node, {tap: f"{tap}/fp32" for tap in taps})
    replace_nodes(graph, [to_half, *networks, *to_float, *heads])
    onnx.checker.check_model(result, full_check=True)
    return result


def _rename_inputs(node: onnx.NodeProto, names: dict[str, str]) -> None:
    for index, name in enumerate(node.input):
        node.input[index] = names.get(name, name)
