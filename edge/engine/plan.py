"""A TensorRT plan: whether it is for this machine, and what is in it."""

import contextlib
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

from stpm.edge.engine.cuda import Gpu
from stpm.edge.errors import EngineError, PlanError
from stpm.edge.kernels.launches import FP16, FP32, INT8
from stpm.edge.manifest import Plan

INPUT = "input"
TEACHER, STUDENT = "teacher/", "student/"
AGAIN = "compile the plan again with `stpm-compile --bundle DIR`"


def import_tensorrt() -> Any:
    """The module; EngineError where it cannot be loaded. Ask the driver first: see `Gpu`."""
    try:
        import tensorrt
    except ImportError as error:
        raise EngineError(
            f"TensorRT cannot be loaded ({error}): pip install 'stpm-edge[tensorrt]', or on a Jetson take the package "
            "of JetPack"
        ) from error
    return tensorrt


def check_plan(plan: Plan, device: str, gpu: Gpu, version: str, folder: Path) -> None:
    """PlanError when the plan was made for another GPU or TensorRT, naming both."""
    major, minor = (int(number) for number in gpu.sm.split("."))
    ampere_or_later = plan.hardware_compatible and major >= 8
    same_version = version == plan.tensorrt
    later_version = plan.version_compatible and _loads(version, plan.tensorrt)
    same_gpu = (gpu.sm, gpu.name) == (plan.sm, device)
    if not ((same_gpu or ampere_or_later) and (same_version or later_version)):
        raise PlanError(
            f"the engine in {folder} was compiled by TensorRT {plan.tensorrt} for {device} (SM {plan.sm}), and this "
            f"machine has TensorRT {version} and {gpu.name} (SM {major}.{minor}): compile it here with "
            f"`stpm-compile --bundle {folder}`"
        )
    # the kernels of a plan for other GPUs are compiled by the driver, which must know their form
    known = slice(None) if plan.hardware_compatible else slice(1)
    if numbers(gpu.driver)[known] < numbers(plan.driver)[known]:
        raise PlanError(
            f"the engine in {folder} was compiled with a driver for CUDA {plan.driver}, and this machine's is for "
            f"CUDA {gpu.driver}: install a newer driver, or compile it here with `stpm-compile --bundle {folder}`"
        )


class Networks:
    """The plan, loaded. What TensorRT says while it works is kept for the next error."""

    def __init__(self, tensorrt: Any, file: Path, plan: Plan) -> None:
        self._tensorrt, self._scales = tensorrt, plan.scales
        logger, self._messages = _log(tensorrt)
        self.complaint()  # of an earlier engine
        try:
            runtime = tensorrt.Runtime(logger)
        except TypeError as error:  # what its constructor makes of a null pointer
            raise EngineError(
                f"TensorRT {tensorrt.__version__} does not start ({self.complaint()}): check that it fits this "
                "machine's driver"
            ) from error
        if plan.version_compatible:
            runtime.engine_host_code_allowed = True  # such a plan brings its own runtime
        if plan.dla_core is not None:
            runtime.DLA_core = plan.dla_core
        self._engine = runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise PlanError(
                f"TensorRT {tensorrt.__version__} cannot load {file} ({self.complaint()}): compile it on this machine "
                "with `stpm-compile --bundle DIR`"
            )

    def complaint(self) -> str:
        """What TensorRT has said since the last time, in one line."""
        said = "; ".join(" ".join(message.split()) for message in self._messages) or "it gives no reason"
        self._messages.clear()
        return said

    def context(self, profile: int, images: int, height: int, width: int, stream: int) -> Any:
        """For one profile, which is for this number of images. Its memory belongs to it."""
        context = self._engine.create_execution_context()
        if context is None:
            raise EngineError(
                f"TensorRT cannot make an execution context ({self.complaint()}): close other programs that "
                "use the GPU"
            )
        if profile and not context.set_optimization_profile_async(profile, stream):
            raise EngineError(f"TensorRT refuses profile {profile} of the plan ({self.complaint()}): {AGAIN}")
        if not context.set_input_shape(INPUT, (images, 3, height, width)):
            raise EngineError(f"TensorRT refuses {images} images of {height}×{width} ({self.complaint()}): {AGAIN}")
        return context

    def bind(self, context: Any, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise EngineError(f"TensorRT refuses the memory for {name} ({self.complaint()}): {AGAIN}")

    @property
    def taps(self) -> list[str]:
        """The layers whose features leave the engine, in its order."""
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        return [name.removeprefix(TEACHER) for name in names if name.startswith(TEACHER)]

    def kind(self, name: str) -> int:
        """FP32, FP16 or INT8 of edge/kernels/launches.py."""
        types = self._tensorrt.DataType
        kinds = {types.FLOAT: FP32, types.HALF: FP16, types.INT8: INT8}
        found = self._engine.get_tensor_dtype(name)
        if found not in kinds:
            raise PlanError(f"wanted {name} as FLOAT, HALF or INT8, found {found}: {AGAIN}")
        return kinds[found]

    def scale(self, name: str) -> float:
        """A stored value times this is the feature."""
        return self._scales[name] if self.kind(name) == INT8 else 1.0

    def vector(self, name: str, channels: int, profile: int) -> int:
        """How many channels of a pixel lie side by side; each profile has formats of its own."""
        formats = self._tensorrt.TensorFormat
        vectors = {formats.LINEAR: 1, formats.CHW4: 4, formats.CHW32: 32, formats.HWC8: -(-channels // 8) * 8}
        # 8.5 knows the formats of the first profile only; a plan with several has only LINEAR there
        several = profile > 0 and numbers(self._tensorrt.__version__) >= [8, 6]
        found = self._engine.get_tensor_format(*((name, profile) if several else (name,)))
        if found not in vectors:
            raise PlanError(f"wanted {name} as LINEAR, CHW4, CHW32 or HWC8, found {found}: {AGAIN}")
        return vectors[found]


@cache
def _log(tensorrt: Any) -> tuple[Any, deque[str]]:
    """The logger and its newest errors. One for all engines and for ever: TensorRT keeps a single pointer to it."""
    messages: deque[str] = deque(maxlen=20)
    severe = (tensorrt.ILogger.Severity.ERROR, tensorrt.ILogger.Severity.INTERNAL_ERROR)

    class Log(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            # an exception that leaves this method, Ctrl-C for one, ends the process
            with contextlib.suppress(BaseException):
                if severity in severe:
                    messages.append(message)

    return Log(), messages


def numbers(version: str) -> list[int]:
    """To compare versions by."""
    return [int(number) for number in version.split(".") if number.isdigit()]


def _loads(version: str, of: str) -> bool:
    """Whether this TensorRT may load version-compatible plans of that one: 8 → 10 and 10 → 11, but not 8 → 11."""
    oldest = {10: 8, 11: 10}
    major = numbers(version)[0]
    return numbers(version) >= numbers(of) and numbers(of)[0] >= oldest.get(major, major - 1)
