"""The kernels on a GPU without TensorRT: what they work on, and their answers against the definition."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stpm.build.gpu.kernels import compile_kernels
from stpm.edge.engine.cuda import Gpu, Shared
from stpm.edge.errors import EngineError
from stpm.edge.kernels import launches
from stpm.edge.kernels.launches import CALL, DTYPES, FINDING, FP16, FP32, INT8, Features, Resize, Tap
from stpm.edge.preprocess import Preprocess
from stpm.edge.score import anomaly_map, level_map
from stpm.tools.gpu.base import FailedError, Job, Memory, Result, Sizes, SkippedError, opened

# TensorRT's formats that the features come in, as (type, channels side by side); 0: all channels of a pixel
FORMATS = {"fp32": (FP32, 1), "fp16 HWC8": (FP16, 0), "int8 CHW32": (INT8, 32)}
SCALE = 0.03  # of int8 features
TOLERANCES = {"preprocess": 2e-6, "match": 2e-6, "combine": 2e-5}  # of values around 1; combine: relative


def cubin(job: Job) -> bytes:
    """The kernels, compiled once for a run; SkippedError without a compiler."""
    file = job.folder / "kernels.cubin"
    if not file.is_file():
        gpu = Gpu()
        try:
            compile_kernels(gpu.sm, file)
        except EngineError as error:
            raise SkippedError(str(error)) from error
        finally:
            gpu.close()
    return file.read_bytes()


# features as networks leave them


def random_features(sizes: Sizes, images: int, seed: int) -> list[list[npt.NDArray[np.float32]]]:
    """Teacher's and student's per tap, as after a ReLU."""
    random = np.random.default_rng(seed)
    return [
        [np.maximum(random.standard_normal((images, c, n, n), np.float32), 0) for _ in range(2)] for c, n in sizes.taps
    ]


def packed(features: npt.NDArray[np.float32], kind: int, vector: int) -> np.ndarray:
    """images × channels × height × width in one of TensorRT's formats."""
    images, channels, height, width = features.shape
    vector = vector or -(-channels // 8) * 8
    if kind == INT8:
        features = np.clip(np.rint(features / SCALE), -128, 127)
    padded = np.zeros((images, -(-channels // vector) * vector, height, width), DTYPES[kind])
    padded[:, :channels] = features
    grouped = padded.reshape(images, -1, vector, height, width)
    return np.ascontiguousarray(grouped.transpose(0, 1, 3, 4, 2))


def unpacked(memory: np.ndarray, kind: int, channels: int) -> npt.NDArray[np.float32]:
    """What the kernels see of it."""
    images, groups, height, width, vector = memory.shape
    plain = memory.transpose(0, 1, 4, 2, 3).reshape(images, groups * vector, height, width)[:, :channels]
    return plain.astype(np.float32) * np.float32(SCALE if kind == INT8 else 1)


class Head:
    """Features in device memory, and the two launches that make an anomaly map of them."""

    def __init__(self, memory: Memory, stored: list[list[np.ndarray]], channels: Sequence[int], kind: int, side: int):
        images, taps = len(stored[0][0]), []
        self.stored, self.bytes = stored, 0
        for pair, count in zip(stored, channels, strict=True):
            height, width = pair[0].shape[2:4]
            teacher, student = (
                Features(memory.put(each), kind, each.shape[4], SCALE if kind == INT8 else 1.0) for each in pair
            )
            levels = memory.put(np.zeros((images, height, width), np.float32))
            taps.append(Tap(teacher, student, levels, count, height, width))
            self.bytes += sum(each.nbytes for each in pair) + 2 * 4 * images * height * width  # levels: there and back
        self.levels = [tap.levels for tap in taps]
        self.map = memory.put(np.zeros((images, side, side), np.float32))
        self.mask = memory.put(np.zeros((images, side, side), np.uint8))
        self.findings = memory.gpu.shared((images,), FINDING)
        self.call = memory.gpu.shared((1,), CALL)
        self.bytes += images * side * side * (4 + 1)
        found = self.findings.device
        self._launches = (
            launches.match(taps, found, images),
            launches.combine(taps, self.call.device, self.map, self.mask, found, side, side, images),
        )
        self._gpu = memory.gpu

    def enqueue(self) -> None:
        for launch in self._launches:
            self._gpu.launch(launch)

    def set_threshold(self, threshold: float) -> None:
        self.call.host["threshold"] = threshold
        self._gpu.send(self.call)
        self._gpu.wait()


def head_of(memory: Memory, sizes: Sizes, name: str, images: int, side: int | None = None) -> Head:
    """On random features, with a threshold that one pixel in a hundred is above."""
    kind, vector = FORMATS[name]
    stored = [[packed(each, kind, vector) for each in pair] for pair in random_features(sizes, images, 0)]
    head = Head(memory, stored, [c for c, _ in sizes.taps], kind, side or sizes.network)
    head.set_threshold(np.inf)
    head.enqueue()
    memory.gpu.wait()
    head.set_threshold(float(np.quantile(memory.get(head.map), 0.99)))
    return head


class Resized:
    """Frames in memory that the GPU can reach, and the launch that makes the networks' input of them."""

    def __init__(self, memory: Memory, width: int, height: int, images: int, side: int, call: Shared) -> None:
        gpu, spec = memory.gpu, Preprocess(side, side)
        resize = Resize.of(spec, height, width)
        rows, columns = resize.placed(memory.put)
        self.frames = gpu.shared((images, height, width, 3), np.uint8)
        self.tensor = memory.put(np.zeros((images, 3, side, side), np.float16))
        self.bytes = self.frames.host.nbytes + images * 3 * side * side * 2
        call.host["frame"], call.host["pitch"], call.host["stride"] = self.frames.device, width * 3, height * width * 3
        self.launch = launches.preprocess(spec, rows, columns, resize.half_up, call.device, self.tensor, True, images)


class Chain:
    """All three kernels with the copies around them, as the line runs them but for the networks between."""

    def __init__(self, memory: Memory, sizes: Sizes, name: str, images: int, width: int, height: int) -> None:
        self._gpu = memory.gpu
        self.head = head_of(memory, sizes, name, images)
        self.resized = Resized(memory, width, height, images, sizes.network, self.head.call)
        self.frames, self.call, self.findings = self.resized.frames, self.head.call, self.head.findings

    def enqueue(self) -> None:
        self._gpu.send(self.frames)
        self._gpu.send(self.call)
        self._gpu.launch(self.resized.launch)
        self.head.enqueue()
        self._gpu.fetch(self.findings)


# the checks


def against_reference(job: Job) -> Result:
    """Each kernel on random input, and the definition in numpy."""
    with opened(cubin(job)) as memory:
        worst = {"preprocess": _preprocess_difference(memory), "match": 0.0, "combine": 0.0}
        small = Sizes(taps=((64, 16), (128, 8), (256, 4)), network=64)
        for name in FORMATS:
            for kernel, difference in _head_difference(memory, small, name).items():
                worst[kernel] = float(np.maximum(worst[kernel], difference))  # max() would lose a NaN
    # written this way round so that a NaN fails too
    wrong = [name for name, found in worst.items() if not found <= TOLERANCES[name]]
    text = ", ".join(f"{name} {found:.1e}" for name, found in worst.items())
    figures = {"largest_difference": worst, "tolerance": TOLERANCES}
    if wrong:
        raise FailedError(f"{', '.join(wrong)} differ from edge/score.py and edge/preprocess.py ({text})", figures)
    return Result(f"largest difference from the definition: {text}", figures)


def _preprocess_difference(memory: Memory) -> float:
    """A frame that is halved, where the answer is exact."""
    spec = Preprocess(48, 64)
    frames = np.random.default_rng(1).integers(0, 256, (2, 96, 128, 3), np.uint8)
    resize = Resize.of(spec, 96, 128)
    rows, columns = resize.placed(memory.put)
    call = np.zeros(1, CALL)
    call[0] = (memory.put(frames), frames.strides[1], frames.strides[0], 0, 0)
    tensor = memory.put(np.full((2, 3, 48, 64), 7, np.float32))
    memory.run(launches.preprocess(spec, rows, columns, resize.half_up, memory.put(call), tensor, False, 2))
    return float(np.abs(memory.get(tensor) - np.concatenate([spec(frame) for frame in frames])).max())


def _head_difference(memory: Memory, sizes: Sizes, name: str) -> dict[str, float]:
    """Two images; the finding must also be that of the map, bit by bit."""
    kind, vector = FORMATS[name]
    channels = [count for count, _ in sizes.taps]
    stored = [[packed(each, kind, vector) for each in pair] for pair in random_features(sizes, 2, 3)]
    seen = [[unpacked(each, kind, count) for each in pair] for pair, count in zip(stored, channels, strict=True)]
    side = sizes.network
    wanted = [np.stack([level_map(t[image], s[image]) for image in range(2)]) for t, s in seen]
    maps = np.stack([anomaly_map([level[image] for level in wanted], side, side) for image in range(2)])
    head = Head(memory, stored, channels, kind, side)
    threshold = float(np.quantile(maps, 0.97))
    head.set_threshold(threshold)
    head.enqueue()
    memory.gpu.fetch(head.findings)
    levels, found, mask = [memory.get(each) for each in head.levels], memory.get(head.map), memory.get(head.mask)
    figures = head.findings.host
    if not (
        np.array_equal(mask, found > threshold)
        and np.array_equal(figures["score"], found.max((1, 2)))
        and np.array_equal(figures["area"], mask.sum((1, 2)))
    ):
        raise FailedError(f"the finding is not that of the map, on {name} features")
    return {
        "match": float(np.max([np.abs(a - b).max() for a, b in zip(levels, wanted, strict=True)])),
        "combine": float(np.abs(found / maps - 1).max()),
    }
