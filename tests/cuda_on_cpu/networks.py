"""What a TensorRT does, by ONNX Runtime: behaviours for the modules of tensorrt_api.

A plan is the network as ONNX, with the formats of its outputs and the profiles. A version can only load its own.
"""

import ctypes
import pickle
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
from cuda_on_cpu.driver import Machine

from stpm.edge.kernels.launches import DTYPES, FP16, FP32, INT8

KINDS = {"FLOAT": FP32, "HALF": FP16, "INT8": INT8}
ONNX_TYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int8)": "INT8"}


@cache
def _session(model: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model)


def behaviours(machine: Machine, module: Any) -> Mapping[str, Any]:
    """`module()` is the fake module that they are for: it is not there yet when they are made."""

    def member(enum: str, name: str) -> Any:
        return getattr(getattr(module(), enum), name)

    def _construct(name: str) -> None:
        if not machine.answers(f"trt.{name}"):
            raise TypeError("pybind11::init(): factory function returned nullptr")

    class Tensor:
        def __init__(self, name: str, kind: str, shape: list[Any]) -> None:
            self.name, self.kind = name, kind
            self.shape = tuple(each if isinstance(each, int) else -1 for each in shape)
            self.allowed_formats = 1
            self.is_shape_tensor = False

        @property
        def dtype(self) -> Any:
            return member("DataType", self.kind)

    class INetworkDefinition:
        def __init__(self, flags: int) -> None:
            self.flags, self.model = flags, b""
            self.inputs: list[Tensor] = []
            self.outputs: list[Tensor] = []
            self.num_layers, self.name = 0, "network"
            self.num_inputs, self.num_outputs = 0, 0

        def take(self, model: bytes) -> None:
            self.model = model
            session = onnxruntime.InferenceSession(model)
            self.inputs, self.outputs = (
                [Tensor(each.name, ONNX_TYPES[each.type], each.shape) for each in values]
                for values in (session.get_inputs(), session.get_outputs())
            )
            self.num_inputs, self.num_outputs = len(self.inputs), len(self.outputs)

        def get_input(self, index: int) -> Tensor:
            return self.inputs[index]

        def get_output(self, index: int) -> Tensor:
            return self.outputs[index]

        def get_flag(self, flag: Any) -> bool:
            return bool(self.flags & 1 << int(flag))

        def __getitem__(self, index: int) -> Any:
            raise IndexError(index)

        def __len__(self) -> int:
            return 0

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: INetworkDefinition, logger: Any) -> None:
            self._network = network

        def parse(self, model: bytes, path: str | None = None) -> bool:
            self._network.take(bytes(model))
            return True

    class IOptimizationProfile:
        def __init__(self) -> None:
            self.shapes: dict[str, tuple[int, ...]] = {}

        def set_shape(self, name: str, min: Any, opt: Any, max: Any) -> None:
            assert tuple(min) == tuple(opt) == tuple(max), "every profile is for one size"
            self.shapes[name] = tuple(min)

        def __bool__(self) -> bool:
            return True

    class Builder:
        num_DLA_cores = 0  # noqa: N815

        def __init__(self, logger: Any) -> None:
            _construct("Builder")

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            return INetworkDefinition(flags)

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def create_builder_config(self) -> Any:
            machine.config = module().__surface__.recorder("IBuilderConfig")
            machine.config.get_tactic_sources.return_value = 0b11
            machine.config.num_optimization_profiles = 0
            machine.config.set_flag.side_effect = lambda flag: machine.flags.add(flag.name)
            machine.flags = set()
            return machine.config

        def build_serialized_network(self, network: INetworkDefinition, config: Any) -> Any:
            if not machine.answers("build_serialized_network"):
                return None
            machine.network = network
            profiles = [call.args[0] for call in config.add_optimization_profile.call_args_list]
            formats = {tensor.name: _widest(tensor.allowed_formats) for tensor in network.outputs}
            plan = {
                "version": module().__version__,
                "model": network.model,
                "batches": [profile.shapes["input"][0] for profile in profiles],
                "formats": formats,
                "version compatible": "VERSION_COMPATIBLE" in machine.flags,
                "DLA core": config.DLA_core if config.default_device_type.name == "DLA" else None,
            }
            return pickle.dumps(plan)

    def _widest(allowed: int) -> str:
        """The format that is hardest to read."""
        known = {int(each): name for name, each in module().TensorFormat.__members__.items()}
        return known[allowed.bit_length() - 1]

    class Runtime:
        def __init__(self, logger: Any) -> None:
            _construct("Runtime")
            self._logger = logger
            self.engine_host_code_allowed = False
            self.DLA_core = None

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            if not machine.answers("deserialize_cuda_engine"):
                return None
            try:
                facts = pickle.loads(bytes(plan))
            except Exception:
                severity = module().ILogger.Severity.ERROR
                self._logger.log(severity, "the plan does not begin with the magic tag")
                return None
            if facts["version compatible"] and not self.engine_host_code_allowed:
                self._logger.log(module().ILogger.Severity.ERROR, "Lean runtime: host code is not allowed")
                return None
            assert facts["DLA core"] == self.DLA_core, "for another DLA core"
            return ICudaEngine(facts)

    class ICudaEngine:
        def __init__(self, facts: dict[str, Any]) -> None:
            self.facts = facts
            self.session = _session(facts["model"])
            values = (*self.session.get_inputs(), *self.session.get_outputs())
            self.names = [value.name for value in values]
            self.kinds = {value.name: ONNX_TYPES[value.type] for value in values}
            self.sizes = {value.name: value.shape for value in values}
            self.num_io_tensors = len(self.names)
            self.num_optimization_profiles = len(facts["batches"])

        def get_tensor_name(self, index: int) -> str:
            return self.names[index]

        def get_tensor_dtype(self, name: str) -> Any:
            return member("DataType", self.kinds[name])

        def get_tensor_format(self, name: str, profile_index: int = 0) -> Any:
            return member("TensorFormat", self.format_of(name, profile_index))

        def format_of(self, name: str, profile: int) -> str:
            """The first profile has the format that is hardest to read, the others have LINEAR."""
            return self.facts["formats"].get(name, "LINEAR") if profile == 0 else "LINEAR"

        def create_execution_context(self) -> Any:
            return IExecutionContext(self) if machine.answers("create_execution_context") else None

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine, self._addresses = engine, {}
            self._images, self._profile = engine.facts["batches"][0], 0
            self._warm = False

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            self._images, self._profile = self._engine.facts["batches"][index], index
            return machine.answers("set_optimization_profile_async")

        def set_input_shape(self, name: str, shape: Any) -> bool:
            return machine.answers("set_input_shape") and next(iter(shape)) == self._images

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (self._images, *self._engine.sizes[name][1:])

        def set_tensor_address(self, name: str, address: int) -> bool:
            machine.check(address)
            self._addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            assert stream == 77
            assert set(self._addresses) == set(self._engine.names), "tensors without an address"
            assert machine.captured is None or self._warm, "captured before it ran once"
            assert machine.captured is None or self._engine.facts["DLA core"] is None, "a DLA cannot be captured"
            if not machine.answers("execute_async_v3"):
                return False
            (machine.pending if machine.captured is None else machine.captured).append(self._run)
            self._warm = True
            return True

        def _run(self) -> None:
            if machine.library is None:
                return
            image = self._view("input", self.get_tensor_shape("input"))
            names = self._engine.names[1:]
            for name, value in zip(names, self._engine.session.run(names, {"input": image}), strict=True):
                format_name = self._engine.format_of(name, self._profile)
                vector = {"LINEAR": 1, "CHW32": 32, "HWC8": -(-value.shape[1] // 8) * 8}[format_name]
                images, channels, height, width = value.shape
                padded = np.zeros((images, -(-channels // vector) * vector, height, width), value.dtype)
                padded[:, :channels] = value
                packed = padded.reshape(images, -1, vector, height, width).transpose(0, 1, 3, 4, 2)
                self._view(name, packed.shape)[...] = packed

        def _view(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
            dtype = np.dtype(DTYPES[KINDS[self._engine.kinds[name]]])
            address, size = self._addresses[name], int(np.prod(shape)) * dtype.itemsize
            machine.check(address)
            return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)

    made = (INetworkDefinition, OnnxParser, IOptimizationProfile, Builder, Runtime, ICudaEngine, IExecutionContext)
    return {each.__name__: each for each in made} | {"ITensor": Tensor}
