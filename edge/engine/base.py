"""What every engine can do."""

from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stpm.edge.errors import EngineError
from stpm.edge.preprocess import Image, Preprocess, Tensor
from stpm.edge.score import Array, bounding_box


@dataclass(frozen=True)
class Inference:
    """`maps` is float32 N×height×width, `scores` float32 N; both belong to the caller."""

    maps: Array
    scores: Array


@dataclass(frozen=True)
class Inspection:
    """What is known of one frame. `box` is x, y, width and height of all that lies above the threshold, in pixels of
    the map, and `area` their number; None and 0 when nothing does. Where asked for, `map` is float32 height×width and
    `mask`, true above the threshold, bool height×width."""

    score: float
    box: tuple[int, int, int, int] | None
    area: int
    map: Array | None = None
    mask: npt.NDArray[np.bool_] | None = None


class Engine(Protocol):
    """Both networks and the head, loaded and ready. Made by `open_engine`; closed once, or used in a `with`."""

    def warm_up(self) -> None:
        """Run once or more, so that the first part does not pay for lazy set-up."""

    def infer(self, tensor: Tensor) -> Inference:
        """float32 N×3×height×width from `Preprocess`. A wrong shape or dtype, or a failing run, is an EngineError."""

    def inspect(self, frame: Image, threshold: float, with_map: bool = False) -> Inspection:
        """A camera frame, uint8 H×W×3 BGR, from its pixels to its score: what the line asks for. An InputError for
        what is no frame, an EngineError when the run fails; an engine that is set up by its first frame, as TensorRT's
        is, refuses frames of another size (FrameError)."""

    def profile(self, frame: Image, runs: int) -> dict[str, list[float]]:
        """Milliseconds in the "preprocess", the "pyramids" and the "head" of each of `runs` inspections, by the
        engine's own counters."""

    def describe(self) -> dict[str, str]:
        """Backend, device and versions, for logs and reports."""

    def close(self) -> None:
        """Give everything back; a second call does nothing, a later `infer` is an EngineError."""

    def __enter__(self) -> "Engine": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ClosesOnExit:
    def close(self) -> None:
        raise AssertionError("an engine defines close")

    def __enter__(self):  # type: ignore[no-untyped-def]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class InspectsOnHost(ClosesOnExit):
    """An engine that takes tensors: before it and after it the frame is worked on by numpy."""

    _preprocess: Preprocess

    def infer(self, tensor: Tensor) -> Inference:
        raise AssertionError("an engine defines infer")

    def inspect(self, frame: Image, threshold: float, with_map: bool = False) -> Inspection:
        inference = self.infer(self._preprocess(frame))
        anomaly = inference.maps[0]
        above = anomaly > threshold
        found = Inspection(float(inference.scores[0]), bounding_box(above), int(above.sum()))
        return replace(found, map=anomaly, mask=above) if with_map else found


def check_input(tensor: Tensor, preprocess: Preprocess) -> None:
    """EngineError unless `tensor` is a contiguous, finite float32 N×3×height×width with N ≥ 1."""
    height, width = preprocess.height, preprocess.width
    good = (
        isinstance(tensor, np.ndarray)
        and tensor.dtype == np.float32
        and tensor.ndim == 4
        and tensor.shape[0] >= 1
        and tensor.shape[1:] == (3, height, width)
        and tensor.flags.c_contiguous
        and bool(np.isfinite(tensor).all())
    )
    if not good:
        found = f"{tensor.dtype} {tensor.shape}" if isinstance(tensor, np.ndarray) else type(tensor).__name__
        raise EngineError(
            f"wanted a contiguous and finite float32 N×3×{height}×{width}, found {found}: "
            "pass the frame through the bundle's own preprocessing"
        )
