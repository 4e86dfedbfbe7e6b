"""TensorRT on a GPU: plans of the given bundles, their latency, and INT8 beside FP16."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import numpy as np

from stpm.edge.bundle import Bundle, open_bundle
from stpm.edge.engine import Engine, open_engine
from stpm.edge.errors import StpmError
from stpm.edge.latency import Percentiles
from stpm.edge.preprocess import Tensor
from stpm.edge.selftest import self_test
from stpm.tools.gpu.base import FailedError, Job, Result, SkippedError, interleaved, needed

# Ways to compile a bundle that only a GPU can choose between, as fields of PlanOptions.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stems apart": {"stem": "apart"},
    "int8 stem": {"stem": "int8"},
    "int8 features": {"int8_features": True},
}


class EngineTimes(msgspec.Struct, frozen=True):
    bundle: str
    precision: str
    variant: str  # of VARIANTS
    engine: dict[str, str]
    compile_s: float
    deviation: float  # the largest in the self test, as a share of the golden scores
    inspect: Percentiles  # a frame in host memory → score and box, one image
    infer: dict[str, Percentiles]  # a tensor in host memory → maps and scores in host memory, by number of images
    per_image_ms: float  # of the largest batch, p50
    inside: dict[str, float]  # ms of the parts of an inspection by CUDA events, without the graph, p50


class Engines(msgspec.Struct, frozen=True):
    measured: list[EngineTimes]
    refused: dict[str, str]  # variants that TensorRT would not compile or that fail their self test, and why


class Ratio(msgspec.Struct, frozen=True):
    """How many times INT8 is faster than FP16, by the medians of frames taken in turn."""

    fp16: str
    int8: str
    latency: dict[str, Percentiles]
    inspect: float
    infer: float
    images: int


# plans


def with_plan(job: Job, path: Path, variant: str = "plain") -> tuple[Bundle, float]:
    """A copy of the bundle with a plan for this GPU, and the seconds that it took; compiled once in a run."""
    needed("tensorrt", "onnx", "polygraphy")
    from stpm.build.gpu.cli import compile_bundle
    from stpm.build.gpu.plan import PlanOptions

    key = path, variant
    if key not in job.plans:
        copy = job.folder / f"{len(job.plans)}-{path.name}"
        started = perf_counter()
        try:
            bundle = open_bundle(path)
            shutil.copytree(path, copy)
            batches = tuple(sorted({1, *job.sizes.batches}))
            options = PlanOptions(batches, tactic_sources=job.tactic_sources, **VARIANTS[variant])
            compile_bundle(open_bundle(copy), options, job.work)
            job.plans[key] = open_bundle(copy), perf_counter() - started
            assert bundle.manifest.graph == job.plans[key][0].manifest.graph
        except StpmError as error:
            job.plans[key] = error
    if isinstance(job.plans[key], StpmError):
        raise job.plans[key]
    made: tuple[Bundle, float] = job.plans[key]
    return made


def variants(job: Job) -> list[tuple[Path, str]]:
    """Every bundle, and what else may be tried with it."""
    if not job.bundles:
        raise SkippedError("needs a bundle: give --bundle DIR")
    found = []
    for path in job.bundles:
        int8 = open_bundle(path).manifest.precision == "int8"
        found += [(path, name) for name in VARIANTS if int8 or "int8" not in name]
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
    """Compile, self test, and latency; each bundle by itself. The plain ones must work, the others are tried."""
    measured, refused = [], {}
    for path, variant in variants(job):
        try:
            measured.append(_measured(job, path, variant))
        except StpmError as error:
            if variant == "plain":
                raise
            refused[f"{path} {variant}"] = str(error)
    parts = [
        f"{each.precision} {each.variant}: inspect p50 {each.inspect.p50:.3f} "
        f"p99 {each.inspect.p99:.3f} ms, {each.per_image_ms:.3f} ms an image in the largest batch"
        for each in measured
    ]
    parts += [f"{name} refused" for name in refused]
    return Result("; ".join(parts), Engines(measured, refused))


def _measured(job: Job, path: Path, variant: str) -> EngineTimes:
    bundle, seconds = with_plan(job, path, variant)
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
            variant,
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
