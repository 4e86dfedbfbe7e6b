"""A TensorRT plan, by polygraphy, from TensorRT 8.5 to 11.

The precision is written in the graph. From TensorRT 10 on the network is strongly typed, so that is all there is to
say; before, the builder must also be allowed FP16 and INT8. What a version does not have is looked up by name, because
the numbers behind the names differ between versions.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import onnx
from tqdm import tqdm

from stpm.build.gpu.graph import Network, Stem, for_tensorrt
from stpm.build.gpu.kernels import compile_kernels, find_nvcc
from stpm.edge.engine.cuda import Gpu
from stpm.edge.engine.plan import INPUT, import_tensorrt, numbers
from stpm.edge.errors import EngineError
from stpm.edge.manifest import EngineFiles, Plan
from stpm.edge.preprocess import Preprocess

PLAN, KERNELS = "tensorrt.plan", "kernels.cubin"
MIB = 1 << 20
# What the kernels can read of each type; TensorRT takes the fastest.
FORMATS = {"FLOAT": ("LINEAR", "CHW32"), "HALF": ("LINEAR", "HWC8"), "INT8": ("LINEAR", "CHW32")}


class PlanOptions(msgspec.Struct, frozen=True):
    """None leaves a setting to TensorRT."""

    batches: tuple[int, ...] = (1,)
    workspace_mib: int = 1024
    optimization_level: int | None = None
    aux_streams: int | None = None
    tactic_sources: tuple[str, ...] | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    dla_core: int | None = None
    int8_features: bool = False
    stem: Stem = "float"


def check_gpu() -> None:
    """EngineError, or one of its kinds, when this machine cannot compile a plan."""
    Gpu().close()
    import_tensorrt()
    find_nvcc()


def compile_tensorrt(
    graph: onnx.ModelProto,
    preprocess: Preprocess,
    folder: Path,
    options: PlanOptions,
    caches: Path,
) -> EngineFiles:
    """Write plan and kernels for the GPU of this machine into `folder`. EngineError, or one of its kinds, when there
    is no GPU or TensorRT refuses. What TensorRT measures is kept in `caches` and makes the next time shorter."""
    # The driver is asked first: where there is none, TensorRT 8.6 ends the interpreter
    gpu = Gpu()
    try:
        tensorrt = import_tensorrt()
        network = for_tensorrt(graph, options.int8_features, options.stem)
        print(
            f"plan: TensorRT {tensorrt.__version__} compiles for {gpu.name} (SM {gpu.sm}); this takes minutes",
            flush=True,
        )
        plan, sources = _compile(tensorrt, network, preprocess, options, _cache(caches, tensorrt, gpu))
        (folder / PLAN).write_bytes(plan)
        compile_kernels(gpu.sm, folder / KERNELS, options.hardware_compatible)
    finally:
        gpu.close()
    elsewhere = ("hardware_compatible", "version_compatible", "dla_core")
    settings: dict[str, bool | int | str] = {
        name: value
        for name, value in msgspec.structs.asdict(options).items()
        if isinstance(value, int | str) and name not in elsewhere
    }
    return EngineFiles(
        PLAN,
        gpu.name,
        Plan(
            KERNELS,
            tensorrt.__version__,
            gpu.sm,
            gpu.driver,
            sources,
            sorted(options.batches),
            network.scales,
            options.hardware_compatible,
            options.version_compatible,
            options.dla_core,
            settings,
        ),
    )


def _cache(caches: Path, tensorrt: Any, gpu: Gpu) -> Path:
    """Timings hold for one TensorRT on one kind of GPU with one driver: another one would refuse the whole file."""
    caches.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"tensorrt-{tensorrt.__version__}-{gpu.name}-sm{gpu.sm}-cuda{gpu.driver}")
    return caches / f"{name}.timing"


def _compile(
    tensorrt: Any, network: Network, preprocess: Preprocess, options: PlanOptions, cache: Path
) -> tuple[bytes, list[str]]:
    """The plan, and the names of the tactic sources that it may use."""
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_bytes
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.WARNING), _progress(tensorrt) as monitor:
            builder, definition, parser = network_from_onnx_bytes(
                network.model.SerializeToString(), strongly_typed=numbers(tensorrt.__version__) >= [10]
            )
            _set_formats(tensorrt, definition, len(options.batches))
            config = _config(tensorrt, builder, definition, preprocess, options, cache, monitor)
            _allow_precisions(tensorrt, network.model, config)
            plan = engine_bytes_from_network((builder, definition, parser), config, save_timing_cache=str(cache))
    except PolygraphyException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise EngineError(
            f"TensorRT {tensorrt.__version__} cannot compile the graph ({' '.join(lines)}): its own messages are above"
        ) from error
    except TypeError as error:
        if "factory function returned nullptr" not in str(error):
            raise
        raise EngineError(
            f"TensorRT {tensorrt.__version__} does not start: check that it fits this machine's driver"
        ) from error
    return bytes(plan), _sources(tensorrt, config)


def _config(
    tensorrt: Any,
    builder: Any,
    definition: Any,
    preprocess: Preprocess,
    options: PlanOptions,
    cache: Path,
    monitor: Any,
) -> Any:
    from polygraphy.backend.trt import CreateConfig

    settings: dict[str, Any] = {
        "profiles": _profiles(options.batches, preprocess),
        "memory_pool_limits": {tensorrt.MemoryPoolType.WORKSPACE: options.workspace_mib * MIB},
        "load_timing_cache": str(cache) if cache.is_file() else None,
        # for the engine inspector: which layers were fused, in which types
        "profiling_verbosity": tensorrt.ProfilingVerbosity.DETAILED,
    }
    if options.tactic_sources is not None:
        members = tensorrt.TacticSource.__members__
        settings["tactic_sources"] = [_named(tensorrt, members, name) for name in options.tactic_sources]
    if options.optimization_level is not None:
        settings["builder_optimization_level"] = options.optimization_level
    if options.aux_streams is not None:
        settings["max_aux_streams"] = options.aux_streams
    if options.hardware_compatible:
        levels = getattr(tensorrt, "HardwareCompatibilityLevel", None)
        members = levels.__members__ if levels is not None else {}
        settings["hardware_compatibility_level"] = _named(tensorrt, members, "AMPERE_PLUS")
    if options.version_compatible:
        settings["version_compatible"] = True
    if options.dla_core is not None:
        if any(output.dtype == tensorrt.DataType.FLOAT for output in _outputs(definition)):
            raise EngineError("a DLA computes in FP16, and in this graph there is FP32: build with --engine fp16")
        cores = builder.num_DLA_cores
        if options.dla_core >= cores:
            raise EngineError(f"wanted DLA core {options.dla_core}, found {cores} cores on this GPU: leave --dla away")
        settings |= {"use_dla": True, "allow_gpu_fallback": True}
    if monitor is not None:
        settings["progress_monitor"] = monitor
    config = CreateConfig(**settings)(builder, definition)
    if options.dla_core is not None:
        config.DLA_core = options.dla_core
    return config


def _allow_precisions(tensorrt: Any, model: onnx.ModelProto, config: Any) -> None:
    """The flags without which a network that is not strongly typed stays in FP32. With Q/DQ nodes INT8 needs no
    calibrator, and its float parts may be FP16."""
    if numbers(tensorrt.__version__) >= [10]:
        return
    int8 = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if int8:
        config.set_flag(tensorrt.BuilderFlag.INT8)
    if int8 or any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer):
        config.set_flag(tensorrt.BuilderFlag.FP16)


def _profiles(batches: tuple[int, ...], preprocess: Preprocess) -> list[Any]:
    """One for each number of images, with that number only: a fixed size is compiled best."""
    from polygraphy.backend.trt import Profile

    shapes = [(images, 3, preprocess.height, preprocess.width) for images in sorted(batches)]
    return [Profile().add(INPUT, min=shape, opt=shape, max=shape) for shape in shapes]


def _set_formats(tensorrt: Any, definition: Any, profiles: int) -> None:
    # an engine of 8.5 tells the formats of its first profile only
    all_known = profiles == 1 or numbers(tensorrt.__version__) >= [8, 6]
    names = {getattr(tensorrt.DataType, name): name for name in FORMATS}
    for output in _outputs(definition):
        formats = FORMATS[names[output.dtype]] if all_known else ("LINEAR",)
        output.allowed_formats = sum(1 << int(getattr(tensorrt.TensorFormat, name)) for name in formats)


def _outputs(definition: Any) -> list[Any]:
    return [definition.get_output(index) for index in range(definition.num_outputs)]


def _named(tensorrt: Any, members: Any, name: str) -> Any:
    if name not in members:
        known = ", ".join(members) or "none at all"
        raise EngineError(f"TensorRT {tensorrt.__version__} has no {name}, it has {known}: choose out of these")
    return members[name]


def _sources(tensorrt: Any, config: Any) -> list[str]:
    used = config.get_tactic_sources()
    return [name for name, member in tensorrt.TacticSource.__members__.items() if used & 1 << int(member)]


@contextmanager
def _progress(tensorrt: Any) -> Iterator[Any]:
    """A bar for the outermost phase, where TensorRT tells how far it is (from 9 on); else None."""
    if not hasattr(tensorrt, "IProgressMonitor"):
        yield None
        return

    class Monitor(tensorrt.IProgressMonitor):  # type: ignore[misc]
        """TensorRT takes no exception from here: Ctrl-C is remembered, and ends the compilation at its next step."""

        def __init__(self) -> None:
            tensorrt.IProgressMonitor.__init__(self)
            self.bar: Any = None
            self.outermost = ""
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._remembering():
                if parent_phase is None:
                    self.outermost = phase_name
                    self.bar = tqdm(total=num_steps, desc="compiling", unit="step", disable=None, leave=False)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._remembering():
                if self.bar is not None and phase_name == self.outermost:
                    self.bar.n = step
                    self.bar.refresh()
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            with self._remembering():
                if self.bar is not None and phase_name == self.outermost:
                    self.bar.close()

        @contextmanager
        def _remembering(self) -> Iterator[None]:
            try:
                yield
            except KeyboardInterrupt:
                self.interrupted = True

    monitor = Monitor()
    try:
        yield monitor
    except Exception as error:
        # a compilation that was interrupted ends as one that failed
        if monitor.interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        if monitor.bar is not None:
            monitor.bar.close()
