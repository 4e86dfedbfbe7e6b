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
    networks = [node for node in graph.node if not in_head(node)]
    used = {name for node in networks for name in node.input}
    for tensor in graph.initializer:
        if tensor.name in used and tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            if np.abs(values).max() > np.finfo(np.float16).max:
                raise InputError(f"the weight {tensor.name} does not fit into FP16: build with --engine fp32")
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))

    image = graph.input[0].name
    made = {output for node in networks for output in node.output}
    taps = dict.fromkeys(name for node in graph.node if in_head(node) for name in node.input if name in made)
    to_half = helper.make_node("Cast", [image], [f"{image}/fp16"], f"{image}/Cast", to=TensorProto.FLOAT16)
    to_float = [helper.make_node("Cast", [tap], [f"{tap}/fp32"], f"{tap}/Cast", to=TensorProto.FLOAT) for tap in taps]
    for node in graph.node:
        for index, name in enumerate(node.input):
            if not in_head(node) and name == image:
                node.input[index] = f"{image}/fp16"
            if in_head(node) and name in taps:
                node.input[index] = f"{name}/fp32"
    heads = [node for node in graph.node if in_head(node)]
    replace_nodes(graph, [to_half, *networks, *to_float, *heads])
    onnx.checker.check_model(result, full_check=True)
    return result
