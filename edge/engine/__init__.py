"""Inference engines. This is the only place that knows the backends, and it imports each one when it is asked for."""

from stpm.edge.bundle import Bundle
from stpm.edge.engine.base import Engine, Inference, Inspection
from stpm.edge.errors import EngineError

__all__ = ["BACKENDS", "Engine", "Inference", "Inspection", "open_engine"]

BACKENDS = ("tensorrt", "openvino", "fake")


def open_engine(bundle: Bundle, backend: str = "auto", script: str = "") -> Engine:
    """Load the bundle into a backend; "auto" takes a real one that it was compiled for. `script` is for the fake."""
    if backend == "auto":
        backend = "tensorrt" if "tensorrt" in bundle.manifest.engines else "openvino"  # never the fake
    if backend == "fake":
        from stpm.edge.engine.fake import FakeEngine

        return FakeEngine.of(bundle, script)
    if backend == "openvino":
        from stpm.edge.engine.openvino import OpenVinoEngine

        return OpenVinoEngine(bundle)
    if backend == "tensorrt":
        from stpm.edge.engine.tensorrt import TensorRtEngine

        return TensorRtEngine(bundle)
    raise EngineError(f"wanted a backend out of {', '.join(BACKENDS)}, found {backend!r}: choose one of these")
