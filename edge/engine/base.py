"""What every engine can do."""

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np

from stpm.edge.errors import EngineError
from stpm.edge.preprocess import Tensor
from stpm.edge.score import Array


@dataclass(frozen=True)
class Inference:
    """`maps` is float32 N×height×width, `scores` float32 N; both belong to the caller."""

    maps: Array
    scores: Array


class Engine(Protocol):
    """Both networks and the head, loaded and ready. Made by `open_engine`; closed once, or used in a `with`."""

    def warm_up(self) -> None:
        """Run once or more, so that the first part does not pay for lazy set-up."""

    def infer(self, tensor: Tensor) -> Inference:
        """float32 N×3×height×width from `Preprocess`. A wrong shape or dtype, or a failing run, is an EngineError."""

    def profile(self, tensor: Tensor, runs: int) -> dict[str, list[float]]:
        """Milliseconds in the "pyramids" and in the "head" of each of `runs` inferences, by the engine's counters."""

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


def check_input(tensor: Tensor, height: int, width: int) -> None:
    """EngineError unless `tensor` is a contiguous, finite float32 N×3×height×width with N ≥ 1."""
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
