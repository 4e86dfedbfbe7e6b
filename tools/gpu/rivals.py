"""TensorRT beside what else could run the same networks: torch eager, torch.compile and ONNX Runtime, in one run.

Everyone gets the same float32 tensor in host memory and gives the map and the score back in host memory. The networks
of torch have random weights in the shapes of the bundle's: their latency does not depend on them.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from stpm.edge.bundle import open_bundle
from stpm.edge.engine import open_engine
from stpm.edge.errors import StpmError
from stpm.edge.latency import Percentiles
from stpm.edge.preprocess import Tensor
from stpm.tools.gpu.base import FailedError, Job, Result, SkippedError, first_line, interleaved, needed
from stpm.tools.gpu.engines import batch_of, variants, with_plan

Contenders = dict[str, Callable[[], object]]
Reasons = dict[str, str]

NOTES = [
    "host tensor to host map and score, everyone; warm-up and compilation excluded; taken in turn, frame by frame",
    "torch runs random weights in the shapes of the bundle's networks; TF32 and cudnn.benchmark are on, FP16 is "
    "autocast on channels-last weights",
    "ONNX Runtime runs the bundle's own graph, which is for one image",
]


class Round(msgspec.Struct, frozen=True):
    """`speed` is how many times each is as fast as the first of torch, by the medians."""

    images: int
    latency: dict[str, Percentiles]
    speed: dict[str, float]
    left_out: dict[str, str]  # and why


class Rivals(msgspec.Struct, frozen=True):
    notes: list[str]
    rounds: list[Round]


def rivals(job: Job) -> Result:
    needed("torch")
    rounds = []
    with ExitStack() as stack:
        engines, missing = _tensorrt(job, stack)
        for images in job.sizes.batches:
            tensor = _tensor(job, images)
            contenders: Contenders = {name: partial(engine.infer, tensor) for name, engine in engines.items()}
            made, not_made = _torch(job.device, tensor)
            contenders |= made
            made, more = _onnxruntime(job, tensor)
            contenders |= made
            latency, left_out = interleaved(contenders, job.runs, job.sizes.warm_up)
            rounds.append(_round(images, latency, missing | not_made | more | left_out))
    if not any(each.latency for each in rounds):
        raise SkippedError("; ".join(f"{name}: {why}" for name, why in rounds[0].left_out.items()))
    first = rounds[0]
    line = ", ".join(f"{name} {p.p50:.3f}" for name, p in first.latency.items()) + " ms (p50)"
    line += f"; left out: {', '.join(first.left_out)}" if first.left_out else ""
    return Result(line, Rivals(NOTES, rounds))


def _round(images: int, latency: dict[str, Percentiles], left_out: Reasons) -> Round:
    base = next((found.p50 for name, found in latency.items() if name.startswith("torch")), None)
    speed = {name: base / found.p50 for name, found in latency.items()} if base else {}
    return Round(images, latency, speed, left_out)


def _tensor(job: Job, images: int) -> Tensor:
    """Golden frames of the first bundle; without one, noise in STPM's size."""
    if job.bundles:
        return batch_of(open_bundle(job.bundles[0]), images)
    side = job.sizes.network
    return np.random.default_rng(0).normal(0, 1, (images, 3, side, side)).astype(np.float32)


def _tensorrt(job: Job, stack: ExitStack) -> tuple[dict[str, Any], Reasons]:
    """Engines of all bundles, compiled as they are by default, open until the stack closes."""
    found, reasons = {}, {}
    try:
        for path in [path for path, variant in variants(job) if variant == "plain"]:
            name = f"TensorRT {path.name}"
            try:
                bundle, _ = with_plan(job, path)
                found[name] = stack.enter_context(open_engine(bundle, "tensorrt"))
            except StpmError as error:
                reasons[name] = str(error)
    except SkippedError as skipped:
        reasons["TensorRT"] = str(skipped)
    return found, reasons


def _torch(device: str, tensor: Tensor) -> tuple[Contenders, Reasons]:
    import torch

    from stpm.build.methods import METHODS

    if device == "cuda" and not torch.cuda.is_available():
        return {}, {"torch": f"torch {torch.__version__} sees no CUDA device: install a build for this GPU"}
    torch.backends.cudnn.benchmark = True
    method = METHODS["stpm"]()
    height, width = tensor.shape[2:]

    def network() -> Any:
        return method.graph(method.new_student(0), method.new_student(1), height, width).to(device)

    compiled = partial(torch.compile, mode="reduce-overhead")  # CUDA graphs, as TensorRT gets them
    last = {"memory_format": torch.channels_last}
    makers: dict[str, tuple[Callable[[], Any], bool]] = {
        "torch eager fp32": (network, False),
        "torch eager fp16": (lambda: network().to(**last), True),
        "torch.compile fp32": (lambda: compiled(network()), False),
        "torch.compile fp16": (lambda: compiled(network().to(**last)), True),
    }
    found: Contenders = {}
    reasons: Reasons = {}
    for name, (make, half) in makers.items():
        try:
            found[name] = _torch_run(make(), device, half, tensor)
        except Exception as error:  # no compiler, no Triton, too old a GPU: the others still run
            reasons[name] = f"{type(error).__name__}: {first_line(error)}"
    return found, reasons


def _torch_run(model: Any, device: str, half: bool, tensor: Tensor) -> Callable[[], object]:
    import torch

    source = torch.from_numpy(tensor)
    # pinned, as the engine's own input is
    pinned = torch.empty(source.shape, pin_memory=device == "cuda")

    def run() -> object:
        pinned.copy_(source)
        with torch.inference_mode(), torch.autocast(device, torch.float16, enabled=half):
            found = model(pinned.to(device, non_blocking=True))
            return [each.float().cpu() for each in found]  # waits for the device

    return run


def _onnxruntime(job: Job, tensor: Tensor) -> tuple[Contenders, Reasons]:
    if not job.bundles:
        return {}, {"ONNX Runtime": "needs a bundle, whose graph it runs: give --bundle DIR"}
    if len(tensor) != 1:
        return {}, {"ONNX Runtime": "the graph of a bundle is for one image"}
    try:
        needed("onnxruntime")
    except SkippedError as skipped:
        return {}, {"ONNX Runtime": str(skipped)}
    found: Contenders = {}
    reasons: Reasons = {}
    for path in job.bundles:
        name = f"ONNX Runtime {path.name}"
        try:
            found[name] = _onnxruntime_run(path, job.provider, tensor)
        except FailedError as failed:
            reasons[name] = str(failed)
    return found, reasons


def _onnxruntime_run(path: Path, provider: str, tensor: Tensor) -> Callable[[], object]:
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise FailedError(f"onnxruntime {onnxruntime.__version__} has no {provider}: install onnxruntime-gpu")
    manifest = open_bundle(path).manifest
    if (manifest.preprocess.height, manifest.preprocess.width) != tensor.shape[2:]:
        raise FailedError(f"{path} has another size than the first bundle")
    session = onnxruntime.InferenceSession(str(path / manifest.graph), providers=[provider])
    # it falls back to the CPU without an error
    if session.get_providers()[0] != provider:
        raise FailedError(f"onnxruntime {onnxruntime.__version__} cannot use {provider} here: its message is above")
    return partial(session.run, None, {"input": tensor})
