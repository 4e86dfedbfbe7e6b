"""TensorRT on a GPU: plans of the given bundles, their latency, and INT8 beside FP16."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter

import msgspec
import numpy as np

from stpm.edge.bundle import Bundle, open_bundle
from stpm.edge.engine import Engine, open_engine
from stpm.edge.errors import StpmError
from stpm.edge.latency import Percentiles
from stpm.edge.preprocess import Tensor
from stpm.edge.selftest import self_test
from stpm.tools.gpu_check_base import FailedError, Job, Result, SkippedError, interleaved, needed


class EngineTimes(msgspec.Struct, frozen=True):
    bundle: str
    precision: str
    int8_features: bool
    engine: dict[str, str]
    compile_s: float
    deviation: float  # the largest in the self test, as a share of the golden scores
    inspect: Percentiles  # a frame in host memory → score and box, one image
    infer: dict[str, Percentiles]  # a tensor in host memory → maps and scores in host memory, by number of images
    per_image_ms: float  # of the largest batch, p50
    inside: dict[str, float]  # ms of the parts of an inspection by CUDA events, without the graph, p50


class Ratio(msgspec.Struct, frozen=True):
    """How many times INT8 is faster than FP16, by the medians of frames taken in turn."""

    fp16: str
    int8: str
    latency: dict[str, Percentiles]
    inspect: float
    infer: float
    images: int


# plans


def with_plan(job: Job, path: Path, int8_features: bool = False) -> tuple[Bundle, float]:
    """A copy of the bundle with a plan for this GPU, and the seconds that it took; compiled once in a run."""
    needed("tensorrt", "onnx", "polygraphy")
    from stpm.build.gpu.cli import compile_bundle
    from stpm.build.gpu.plan import PlanOptions

    key = path, int8_features
    if key not in job.plans:
        copy = job.folder / f"{len(job.plans)}-{path.name}"
        started = perf_counter()
        try:
            bundle = open_bundle(path)
            shutil.copytree(path, copy)
            options = PlanOptions(tuple(sorted({1, *job.sizes.batches})), int8_features=int8_features)
            compile_bundle(open_bundle(copy), options, job.work)
            job.plans[key] = open_bundle(copy), perf_counter() - started
            assert bundle.manifest.graph == job.plans[key][0].manifest.graph
        except StpmError as error:
            job.plans[key] = error
    if isinstance(job.plans[key], StpmError):
        raise job.plans[key]
    made: tuple[Bundle, float] = job.plans[key]
    return made


def variants(job: Job) -> list[tuple[Path, bool]]:
    """Every bundle, and those of INT8 a second time with features that leave TensorRT as int8."""
    if not job.bundles:
        raise SkippedError("needs a bundle: give --bundle DIR")
    found = []
    for path in job.bundles:
        found += [(path, False)]
        if open_bundle(path).manifest.precision == "int8":
            found += [(path, True)]
    return found


def batch_of(bundle: Bundle, images: int) -> Tensor:
    """The golden frames, again and again."""
    frames = bundle.golden().frames
    tensors = [bundle.manifest.preprocess(frames[index % len(frames)]) for index in range(images)]
    return np.concatenate(tensors)


def inspection(engine: Engine, bundle: Bundle) -> Callable[[], object]:
    """Inspects the golden frames in turn."""
    frames, threshold = bundle.golden().frames, bundle.manifest.threshold.value
    index = 0

    def run() -> None:
        nonlocal index
        engine.inspect(frames[index % len(frames)], threshold)
        index += 1

    return run


# the checks


def engines(job: Job) -> Result:
    """Compile, self test, and latency; each bundle by itself."""
    measured = [_measured(job, path, int8_features) for path, int8_features in variants(job)]
    parts = [
        f"{each.precision}{' with int8 features' if each.int8_features else ''}: inspect p50 {each.inspect.p50:.3f} "
        f"p99 {each.inspect.p99:.3f} ms, {each.per_image_ms:.3f} ms an image in the largest batch"
        for each in measured
    ]
    return Result("; ".join(parts), measured)


def _measured(job: Job, path: Path, int8_features: bool) -> EngineTimes:
    bundle, seconds = with_plan(job, path, int8_features)
    with open_engine(bundle, "tensorrt") as engine:
        deviation = self_test(bundle, engine)
        work: dict[str, Callable[[], object]] = {"inspect": inspection(engine, bundle)}
        for images in job.sizes.batches:
            work[str(images)] = partial(engine.infer, batch_of(bundle, images))
        latency, left_out = interleaved(work, job.runs, job.sizes.warm_up)
        if left_out:
            raise FailedError(f"{path}: {'; '.join(left_out.values())}")
        parts = engine.profile(bundle.golden().frames[0], job.runs)
        largest = max(job.sizes.batches)
        return EngineTimes(
            str(path),
            bundle.manifest.precision,
            int8_features,
            engine.describe(),
            round(seconds, 1),
            deviation,
            latency["inspect"],
            {str(images): latency[str(images)] for images in job.sizes.batches},
            latency[str(largest)].p50 / largest,
            {name: float(np.median(samples)) for name, samples in parts.items()},
        )


def int8_against_fp16(job: Job) -> Result:
    """Both engines open at once, frame by frame in turn."""
    chosen: dict[str, Path] = {}
    for path in job.bundles:
        chosen.setdefault(open_bundle(path).manifest.precision, path)
    if not {"fp16", "int8"} <= set(chosen):
        raise SkippedError("needs an fp16 and an int8 bundle: give both with --bundle")
    images, work = max(job.sizes.batches), {}
    with ExitStack() as stack:
        for precision in ("fp16", "int8"):
            bundle, _ = with_plan(job, chosen[precision])
            engine = stack.enter_context(open_engine(bundle, "tensorrt"))
            work[f"{precision} inspect"] = inspection(engine, bundle)
            work[f"{precision} infer"] = partial(engine.infer, batch_of(bundle, images))
        latency, left_out = interleaved(work, job.runs, job.sizes.warm_up)
    if left_out:
        raise FailedError("; ".join(left_out.values()))
    one, many = (latency[f"fp16 {verb}"].p50 / latency[f"int8 {verb}"].p50 for verb in ("inspect", "infer"))
    line = f"INT8 has {one:.2f}× the speed of FP16 on a frame, {many:.2f}× on {images} images"
    return Result(line, Ratio(str(chosen["fp16"]), str(chosen["int8"]), latency, one, many, images))
