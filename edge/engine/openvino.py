"""The embedded default: OpenVINO on any x86 or Arm CPU."""

from pathlib import Path
from time import perf_counter

import numpy as np

from stpm.edge.bundle import Bundle
from stpm.edge.engine.base import Inference, InspectsOnHost, check_input
from stpm.edge.errors import EngineError
from stpm.edge.preprocess import Image, Preprocess, Tensor

# One frame at a time, as soon as possible. Without the precision hint a CPU with bf16 units computes an fp32 graph
# in bf16; the precision is written in the graph and nowhere else.
LATENCY = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
WARM_UP_RUNS = 5


class OpenVinoEngine(InspectsOnHost):
    def __init__(self, bundle: Bundle) -> None:
        files = bundle.manifest.engines.get("openvino")
        if files is None:
            raise EngineError(
                f"{bundle.path} was compiled for {', '.join(bundle.manifest.engines)}, not for openvino: "
                "build it again with `stpm-build --backend openvino`"
            )
        self._load(bundle.path / files.main, files.device, bundle.manifest.preprocess)

    @classmethod
    def of_file(cls, model: Path, preprocess: Preprocess) -> "OpenVinoEngine":
        """The engine of a model file that is not in a bundle yet: an IR (.xml) or an ONNX graph, on the CPU."""
        engine = cls.__new__(cls)
        engine._load(model, "CPU", preprocess)
        return engine

    def _load(self, model: Path, device: str, preprocess: Preprocess) -> None:
        try:
            import openvino
        except ImportError as error:
            raise EngineError(
                f"this bundle needs OpenVINO, which is not installed ({error}): pip install 'stpm-edge[cpu]'"
            ) from error
        self._preprocess, self._device = preprocess, device
        self._core = openvino.Core()
        try:
            self._model = self._core.read_model(model)
            self._compiled = self._core.compile_model(self._model, device, LATENCY)
        except RuntimeError as error:
            raise EngineError(
                f"OpenVINO cannot load {model} on {device} ({_first_line(error)}): build the bundle again"
            ) from error
        self._request = self._compiled.create_infer_request()
        self._description = {
            "backend": "openvino",
            "device": self._core.get_property(device, "FULL_DEVICE_NAME"),
            "openvino": openvino.get_version(),
        }

    def warm_up(self) -> None:
        zeros = np.zeros((1, 3, self._preprocess.height, self._preprocess.width), np.float32)
        for _ in range(WARM_UP_RUNS):
            self.infer(zeros)

    def infer(self, tensor: Tensor) -> Inference:
        check_input(tensor, self._preprocess)
        if self._request is None:
            raise EngineError("the engine is closed: open it again")
        maps = np.empty((len(tensor), *tensor.shape[2:]), np.float32)
        scores = np.empty(len(tensor), np.float32)
        for index in range(len(tensor)):
            try:
                outputs = self._request.infer([tensor[index : index + 1]], share_inputs=True)
            except RuntimeError as error:
                raise EngineError(f"OpenVINO failed on a frame ({_first_line(error)})") from error
            maps[index] = outputs[0][0, 0]
            # not the graph's own maximum: numpy's is the one that does not lose a NaN
            scores[index] = maps[index].max()
        return Inference(maps, scores)

    def profile(self, frame: Image, runs: int) -> dict[str, list[float]]:
        compiled = self._core.compile_model(self._model, self._device, {**LATENCY, "PERF_COUNT": True})
        request = compiled.create_infer_request()
        spent: dict[str, list[float]] = {"preprocess": [], "pyramids": [], "head": []}
        for run in range(-WARM_UP_RUNS, runs):
            start = perf_counter()
            tensor = self._preprocess(frame)
            preprocessed = perf_counter()
            request.infer([tensor])
            if run < 0:
                continue
            # a node keeps the name that the exporter gave it, the path of the torch module
            milliseconds = {"preprocess": (preprocessed - start) * 1e3, "pyramids": 0.0, "head": 0.0}
            for node in request.profiling_info:
                milliseconds["head" if "head/" in node.node_name else "pyramids"] += (
                    node.real_time.total_seconds() * 1e3
                )
            for name, value in milliseconds.items():
                spent[name].append(value)
        return spent

    def describe(self) -> dict[str, str]:
        return dict(self._description)

    def close(self) -> None:
        self._request = self._compiled = self._model = None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
