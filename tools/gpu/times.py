"""The kernels against the clock: the head beside a copy of the same bytes, and the three in one CUDA graph."""

import ctypes
from collections.abc import Callable
from functools import partial
from statistics import median

import msgspec

from stpm.edge.engine import cuda_graph
from stpm.edge.engine.cuda import Gpu
from stpm.edge.errors import DeviceError
from stpm.edge.kernels.launches import CALL
from stpm.edge.latency import Latency, Percentiles
from stpm.tools.gpu.base import Job, Memory, Result, Sizes, opened
from stpm.tools.gpu.kernels import FORMATS, Chain, Head, Resized, cubin, head_of


class HeadTime(msgspec.Struct, frozen=True):
    """Microseconds of match and combine. `cold` reads features that no cache holds, `warm` the same ones each time."""

    features: str
    images: int
    cold_us: float
    warm_us: float
    bytes: int  # read and written by both launches
    floor_us: float  # these bytes at the speed of a copy
    ratio: float  # cold / floor


class PreprocessTime(msgspec.Struct, frozen=True):
    frame: str
    us: float
    bytes: int
    floor_us: float
    ratio: float


class HeadTimes(msgspec.Struct, frozen=True):
    copy_gb_s: float  # device to device, bytes read and written
    launches_us: float  # match and combine on one pixel: what two launches in a graph cost by themselves
    head: list[HeadTime]
    preprocess: list[PreprocessTime]


class GraphTimes(msgspec.Struct, frozen=True):
    """Frame in pinned memory → copy → preprocess, match, combine → score and box in host memory; no networks."""

    frame: str
    features: str
    images: dict[str, Percentiles]  # launch of the graph until its answer is there, by number of images
    gpu_us: dict[str, float]  # of the same on the GPU's own clock


def times(job: Job) -> Result:
    """match + combine, and preprocess, against the time that their bytes take at the speed of a copy."""
    sizes, kernels = job.sizes, cubin(job)
    with opened(kernels) as memory:
        bytes_per_us = _copy_speed(memory.gpu, sizes)
    with opened(kernels) as memory:
        one = head_of(memory, Sizes(taps=((8, 1),)), "fp32", 1, side=1)
        alone = _microseconds(memory.gpu, [one.enqueue] * 100, sizes.repeats)
    head = [_head_time(kernels, sizes, name, images, bytes_per_us) for images in sizes.batches for name in FORMATS]
    frames = [_preprocess_time(kernels, sizes, width, height, bytes_per_us) for width, height in sizes.frames]
    first = next(each for each in head if each.features == "fp16 HWC8")
    line = (
        f"fp16, {first.images} image(s): {first.cold_us:.1f} µs, {first.ratio:.1f}× the floor of {first.floor_us:.1f} "
        f"µs; two empty launches {alone:.1f} µs; copy {bytes_per_us / 1e3:.0f} GB/s"
    )
    return Result(line, HeadTimes(round(bytes_per_us / 1e3, 1), alone, head, frames))


def _head_time(kernels: bytes, sizes: Sizes, name: str, images: int, bytes_per_us: float) -> HeadTime:
    with opened(kernels) as memory:
        heads = [head_of(memory, sizes, name, images)]
        # as many that reading them all drives the first out of every cache
        while len(heads) * heads[0].bytes < sizes.beyond_cache:
            heads.append(_twin(memory, sizes, name, heads[0]))
        cold = _microseconds(memory.gpu, [head.enqueue for head in heads], sizes.repeats)
        warm = _microseconds(memory.gpu, [heads[0].enqueue] * len(heads), sizes.repeats)
        floor = heads[0].bytes / bytes_per_us
        return HeadTime(name, images, cold, warm, heads[0].bytes, floor, cold / floor)


def _twin(memory: Memory, sizes: Sizes, name: str, of: Head) -> Head:
    """The same in memory of its own."""
    head = Head(memory, of.stored, [count for count, _ in sizes.taps], FORMATS[name][0], sizes.network)
    head.set_threshold(float(of.call.host["threshold"][0]))
    return head


def _preprocess_time(kernels: bytes, sizes: Sizes, width: int, height: int, bytes_per_us: float) -> PreprocessTime:
    with opened(kernels) as memory:
        call = memory.gpu.shared((1,), CALL)
        resized = Resized(memory, width, height, 1, sizes.network, call)
        memory.gpu.send(call)
        memory.gpu.send(resized.frames)
        enqueue = partial(memory.gpu.launch, resized.launch)
        us = _microseconds(memory.gpu, [enqueue] * 50, sizes.repeats)
        floor = resized.bytes / bytes_per_us
        return PreprocessTime(f"{width}×{height}", us, resized.bytes, floor, us / floor)


def _microseconds(gpu: Gpu, enqueued: list[Callable[[], None]], repeats: int) -> float:
    """Of each of these, all captured in one graph: the median over `repeats` launches of it, by CUDA events."""

    def enqueue() -> None:
        for each in enqueued:
            each()

    enqueue()
    gpu.wait()
    graph = gpu.captured(enqueue)
    taken = [_graph_ms(gpu, graph) for _ in range(repeats + 1)][1:]  # the first launch uploads the graph
    return median(taken) * 1e3 / len(enqueued)


def _graph_ms(gpu: Gpu, graph: cuda_graph.Graph) -> float:
    return gpu.timed({"graph": partial(gpu.replay, graph)})["graph"]


def _copy_speed(gpu: Gpu, sizes: Sizes) -> float:
    """Bytes read and written by copies within the device's memory, in a microsecond."""
    size = sizes.beyond_cache
    source, target = gpu.allocate(size), gpu.allocate(size)

    def copy() -> None:
        status = cuda_graph.driver().cuMemcpyDtoDAsync_v2(
            ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(size), ctypes.c_void_p(gpu.stream)
        )
        if status != 0:
            raise DeviceError(f"cannot copy within the GPU's memory (status {status}): check it with `nvidia-smi`")

    return 2 * size / _microseconds(gpu, [copy] * 4, sizes.repeats)


def graph_latency(job: Job) -> Result:
    """The three kernels and their copies as one graph: from its launch to the answer in host memory."""
    width, height = job.sizes.frames[min(1, len(job.sizes.frames) - 1)]
    latency, on_gpu = Latency(), {}
    for images in job.sizes.batches:
        with opened(cubin(job)) as memory:
            gpu = memory.gpu
            chain = Chain(memory, job.sizes, "fp16 HWC8", images, width, height)
            chain.enqueue()
            gpu.wait()
            graph = gpu.captured(chain.enqueue)
            for _ in range(job.sizes.warm_up):
                gpu.replay(graph)
                gpu.wait()
            for _ in range(job.runs):
                with latency.stage(str(images)):
                    gpu.replay(graph)
                    gpu.wait()
            on_gpu[str(images)] = median(_graph_ms(gpu, graph) for _ in range(job.sizes.repeats)) * 1e3
    found = latency.percentiles()
    line = "; ".join(f"{name} image(s): p50 {p.p50:.3f} p99 {p.p99:.3f} ms" for name, p in found.items())
    return Result(line, GraphTimes(f"{width}×{height}", "fp16 HWC8", found, on_gpu))
