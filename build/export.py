"""Both networks and the head as one ONNX graph, checked against torch."""

import io
import warnings

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from stpm.edge.errors import StpmError
from stpm.edge.preprocess import Preprocess

# TensorRT 8.5 parses up to 17; nothing here needs more than 13, the first with per-channel Q/DQ
OPSET = 13
PARITY = 1e-3


def export_graph(model: nn.Module, preprocess: Preprocess) -> onnx.ModelProto:
    """`input` float32 1×3×H×W → `anomaly_map` float32 1×1×H×W, `score` float32 1."""
    example = torch.zeros(1, 3, preprocess.height, preprocess.width)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # the newer exporter starts at opset 18 and would lose the module paths in the node names
        warnings.filterwarnings("ignore", message="You are using the legacy TorchScript-based ONNX export")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.onnx.export(
            model,
            (example,),
            buffer,  # type: ignore[arg-type]
            input_names=["input"],
            output_names=["anomaly_map", "score"],
            opset_version=OPSET,
            dynamo=False,
        )
    graph = onnx.load_from_string(buffer.getvalue())
    _remove_identities(graph.graph)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def _remove_identities(graph: onnx.GraphProto) -> None:
    """The exporter stores equal weights once and passes copies on; every node shall read its weights itself."""
    source = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = source.get(name, name)
    for node in [node for node in graph.node if node.op_type == "Identity"]:
        graph.node.remove(node)


def check_parity(model: nn.Module, graph: onnx.ModelProto, tensor: np.ndarray) -> None:
    """StpmError when the graph's map differs from torch's by more than 0.1 % of its maximum on this input."""
    with torch.inference_mode():
        wanted = model(torch.from_numpy(tensor))[0].numpy()
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(["anomaly_map"], {"input": tensor})[0]
    difference = float(np.abs(found - wanted).max() / wanted.max())
    if not difference <= PARITY:
        raise StpmError(
            f"the exported graph differs from torch by {difference:.2%} of the largest score, where {PARITY:.2%} is "
            "allowed: please report this with the versions of torch and onnxruntime"
        )
