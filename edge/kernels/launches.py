"""What the kernels are launched with: grid, block and parameters. Pure: no GPU is touched here.

The geometry is written here and nowhere else: `MACROS` goes to the compiler. The structs are those of the .cuh files,
and the tests compare their sizes and offsets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stpm.edge.preprocess import Preprocess
from stpm.edge.score import EPS

SOURCE = Path(__file__).with_name("kernels.cu")
KERNELS = ("stpm_preprocess", "stpm_match", "stpm_combine")

TILE_X, TILE_Y = 32, 8  # threads of a block that works on a picture; a warp is one row
TILES = 4  # rows of such blocks that one block of `combine` takes
PIXELS, SLICES = 32, 8  # threads of a block of `match`
MACROS = {
    "STPM_TILE_X": TILE_X,
    "STPM_TILE_Y": TILE_Y,
    "STPM_TILES": TILES,
    "STPM_PIXELS": PIXELS,
    "STPM_SLICES": SLICES,
}
MOST_TAPS = 4

FP32, FP16, INT8 = 0, 1, 2  # StpmType
DTYPES: dict[int, npt.DTypeLike] = {FP32: np.float32, FP16: np.float16, INT8: np.int8}

CALL = np.dtype(
    [("frame", "u8"), ("pitch", "i8"), ("stride", "i8"), ("threshold", "f4"), ("padding", "i4")], align=True
)
FINDING = np.dtype(
    [("score", "f4"), ("left", "i4"), ("top", "i4"), ("right", "i4"), ("bottom", "i4"), ("area", "i4")], align=True
)
_FEATURES = np.dtype(
    [("data", "u8"), ("scale", "f4"), ("type", "i4"), ("vector", "i4"), ("padding", "i4")], align=True
)
_TAP = np.dtype(
    [
        ("teacher", _FEATURES),
        ("student", _FEATURES),
        ("levels", "u8"),
        ("channels", "i4"),
        ("height", "i4"),
        ("width", "i4"),
        ("first_block", "i4"),
    ],
    align=True,
)
_AXIS = np.dtype([("start", "u8"), ("offset", "u8"), ("weight", "u8")], align=True)
_PREPROCESS = np.dtype(
    [
        ("call", "u8"),
        ("rows", _AXIS),
        ("columns", _AXIS),
        ("tensor", "u8"),
        ("mean", "f4", 3),
        ("std", "f4", 3),
        ("height", "i4"),
        ("width", "i4"),
        ("half", "i4"),
        ("half_up", "i4"),
    ],
    align=True,
)
_MATCH = np.dtype([("taps", _TAP, MOST_TAPS), ("findings", "u8"), ("count", "i4"), ("eps", "f4")], align=True)
_LEVEL = np.dtype([("values", "u8"), ("height", "i4"), ("width", "i4")], align=True)
_COMBINE = np.dtype(
    [
        ("levels", _LEVEL, MOST_TAPS),
        ("call", "u8"),
        ("map", "u8"),
        ("mask", "u8"),
        ("findings", "u8"),
        ("count", "i4"),
        ("height", "i4"),
        ("width", "i4"),
        ("padding", "i4"),
    ],
    align=True,
)
PARAMETERS = {"stpm_preprocess": _PREPROCESS, "stpm_match": _MATCH, "stpm_combine": _COMBINE}


@dataclass(frozen=True)
class Launch:
    """One launch of `kernel`, whose only argument is the struct in `parameters`."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: bytes


@dataclass(frozen=True)
class Features:
    """Where the features of one network at one tap lie: images × ⌈channels / vector⌉ × pixels × vector.

    A stored value times `scale` is the feature. 8 channels are read at once where `vector` is a multiple of 8: `data`
    must then be aligned to 32 bytes.
    """

    data: int
    type: int = FP32
    vector: int = 1
    scale: float = 1.0


@dataclass(frozen=True)
class Tap:
    """Both networks' features at a layer, and where its level maps go: float32 images × height × width."""

    teacher: Features
    student: Features
    levels: int
    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Axis:
    """output[i] = Σ weight[k] · input[start[i] + k − offset[i]] for k from offset[i] up to offset[i + 1]."""

    start: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int32]
    weight: npt.NDArray[np.float32]


Addresses = tuple[int, int, int]


@dataclass(frozen=True)
class Resize:
    """The region of a frame, resized to the network's input as OpenCV's INTER_AREA does: sums over both axes."""

    rows: Axis
    columns: Axis
    half_up: bool  # how OpenCV rounds x.5 in its 2×2 case

    @classmethod
    def of(cls, preprocess: Preprocess, frame_height: int, frame_width: int) -> "Resize":
        """RegionError when the region does not lie inside such a frame."""
        x, y, width, height = preprocess.region(frame_height, frame_width)
        # OpenCV averages areas only when neither side grows; otherwise it interpolates on both
        shrinks = width >= preprocess.width and height >= preprocess.height
        axis = _averaged if shrinks else _interpolated
        half_up = (width, height) == (2 * preprocess.width, 2 * preprocess.height)
        return cls(axis(y, height, preprocess.height), axis(x, width, preprocess.width), half_up)

    def placed(self, put: Callable[[npt.NDArray[Any]], int]) -> tuple[Addresses, Addresses]:
        """Where start, offset and weight of the rows lie, and those of the columns, when `put` has put them there."""
        rows, columns = ((put(axis.start), put(axis.offset), put(axis.weight)) for axis in (self.rows, self.columns))
        return rows, columns


def _averaged(first: int, source: int, target: int) -> Axis:
    """Every output pixel is the mean of the interval of `source` / `target` input pixels that it covers."""
    scale = source / target
    starts, weights = [], []
    for index in range(target):
        low, high = index * scale, min((index + 1) * scale, source)
        start, end = int(np.floor(low + 1e-3)), int(np.ceil(high - 1e-3))
        edges = np.clip(np.arange(start, end + 1), low, high)
        starts.append(first + start)
        weights.append(np.diff(edges) / (high - low))
    return _axis(starts, weights)


def _interpolated(first: int, source: int, target: int) -> Axis:
    """Between the two nearest pixels, with weights of 11 bits: OpenCV's enlargement by areas.

    OpenCV also drops bits of the sums, so that one pixel in ten comes out one grey level lower there.
    """
    scale = source / target
    starts, weights = [], []
    for index in range(target):
        left = int(np.floor(index * scale))
        right = max(0.0, (index + 1) - (left + 1) / scale)
        share = np.rint((right - np.floor(right)) * 2048) / 2048
        if left >= source - 1:
            left, share = source - 1, 0.0
        starts.append(first + left)
        weights.append(np.array([1 - share, share] if share else [1.0]))
    return _axis(starts, weights)


def _axis(starts: list[int], weights: list[npt.NDArray[np.float64]]) -> Axis:
    counts = [len(each) for each in weights]
    return Axis(
        np.asarray(starts, np.int32),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        np.concatenate(weights).astype(np.float32),
    )


def preprocess(
    preprocess: Preprocess,
    rows: Addresses,
    columns: Addresses,
    half_up: bool,
    call: int,
    tensor: int,
    half: bool,
    images: int,
) -> Launch:
    """`rows` and `columns` are what `Resize.placed` gives."""
    values = np.zeros((), _PREPROCESS)
    values["call"], values["tensor"] = call, tensor
    values["rows"], values["columns"] = rows, columns
    values["mean"], values["std"] = preprocess.mean, preprocess.std
    values["height"], values["width"] = preprocess.height, preprocess.width
    values["half"], values["half_up"] = half, half_up
    grid = (_blocks(preprocess.width, TILE_X), _blocks(preprocess.height, TILE_Y), images)
    return Launch("stpm_preprocess", grid, (TILE_X, TILE_Y, 1), values.tobytes())


def match(taps: Sequence[Tap], findings: int, images: int) -> Launch:
    """Level maps of all taps; clears the findings."""
    values = np.zeros((), _MATCH)
    block = 0
    for index, tap in enumerate(taps):
        entry = values["taps"][index]
        for name, features in (("teacher", tap.teacher), ("student", tap.student)):
            entry[name] = (features.data, features.scale, features.type, features.vector, 0)
        entry["levels"], entry["channels"] = tap.levels, tap.channels
        entry["height"], entry["width"], entry["first_block"] = tap.height, tap.width, block
        block += _blocks(tap.height * tap.width, PIXELS)
    values["findings"], values["count"], values["eps"] = findings, len(taps), EPS
    return Launch("stpm_match", (block, images, 1), (PIXELS * SLICES, 1, 1), values.tobytes())


def combine(
    taps: Sequence[Tap], call: int, anomaly: int, mask: int, findings: int, height: int, width: int, images: int
) -> Launch:
    """Anomaly maps float32 and masks uint8, images × height × width, and one FINDING for each image."""
    values = np.zeros((), _COMBINE)
    for index, tap in enumerate(taps):
        values["levels"][index] = (tap.levels, tap.height, tap.width)
    values["call"], values["map"], values["mask"], values["findings"] = call, anomaly, mask, findings
    values["count"], values["height"], values["width"] = len(taps), height, width
    grid = (_blocks(width, TILE_X), _blocks(height, TILE_Y * TILES), images)
    return Launch("stpm_combine", grid, (TILE_X, TILE_Y, 1), values.tobytes())


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
