"""A graph in ONNX Runtime, tensor by tensor and nothing fused, and beside it the network that is trained through."""

import onnx
import onnxruntime
import torch

from stpm.build.fake_quant import FakeQuantNetwork


def run(model, names, tensor):
    """What ONNX Runtime computes there."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    known = {value.name for value in model.graph.output}
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(shown.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(names, {"input": tensor})


def taps(model, network):
    """The features of one network, as the head reads them."""
    read = [name for node in model.graph.node if node.name.startswith("/head/") for name in node.input]
    return [name for name in dict.fromkeys(read) if name.startswith(network)]


def differences(quantised, network, tensor):
    """For every step of the network its mean difference from ONNX Runtime, as a share of the mean value.

    Each step begins from what ONNX Runtime has made before: further on, roundings that fell to the other side have
    become differences of their own.
    """
    trained = FakeQuantNetwork(quantised, network)
    made = [name for node in quantised.graph.node if node.op_type != "Constant" for name in node.output]
    names = [name for name in made if not name.endswith("/int8")]
    values = dict(zip(names, run(quantised, names, tensor), strict=True))
    values = {name: torch.from_numpy(value.copy()) for name, value in values.items()} | {"input": torch.tensor(tensor)}
    # what goes between Q and DQ is a number of steps there, and already the rounded value here
    values |= {
        f"{name}/int8": values[f"{name}/dequantised"] for name in (*names, "input") if f"{name}/dequantised" in values
    }
    with torch.inference_mode():
        return {
            name: float((step(values) - values[name]).abs().mean() / values[name].abs().mean())
            for name, step in trained._steps
        }
