"""An engine with scripted answers: for tests, and for trying camera, PLC and gate before a real engine is there."""

from collections.abc import Iterable, Iterator
from itertools import cycle

import numpy as np

from stpm.edge.bundle import Bundle
from stpm.edge.engine.base import Inference, InspectsOnHost, check_input
from stpm.edge.errors import EngineError
from stpm.edge.preprocess import Image, Preprocess, Tensor


class FakeEngine(InspectsOnHost):
    """Answers each input with the next score of the script; an exception in the script is raised instead.

    Inputs in `known` (their bytes) get the answer recorded for them and do not advance the script.
    """

    def __init__(
        self,
        script: Iterable[float | Exception],
        preprocess: Preprocess | None = None,
        known: dict[bytes, Inference] | None = None,
    ) -> None:
        self._script: Iterator[float | Exception] | None = iter(script)
        self._preprocess = preprocess or Preprocess()
        self._known = known or {}

    @classmethod
    def of(cls, bundle: Bundle) -> "FakeEngine":
        """Passes the bundle's self test, then judges every third part defective whatever the camera shows."""
        spec, golden, threshold = bundle.manifest.preprocess, bundle.golden(), bundle.manifest.threshold.value
        known = {
            spec(frame).tobytes(): Inference(golden.maps[index : index + 1], golden.scores[index : index + 1])
            for index, frame in enumerate(golden.frames)
        }
        return cls(cycle([threshold / 2, threshold / 2, threshold * 2]), spec, known)

    def warm_up(self) -> None:
        """Nothing is lazy here."""

    def infer(self, tensor: Tensor) -> Inference:
        check_input(tensor, self._preprocess)
        if self._script is None:
            raise EngineError("the engine is closed: open it again")
        answers = [self._known.get(frame.tobytes()) or self._next() for frame in tensor]
        return Inference(
            np.concatenate([answer.maps for answer in answers]), np.concatenate([answer.scores for answer in answers])
        )

    def profile(self, frame: Image, runs: int) -> dict[str, list[float]]:
        return {part: [0.0] * runs for part in ("preprocess", "pyramids", "head")}

    def describe(self) -> dict[str, str]:
        return {"backend": "fake", "device": "a script"}

    def close(self) -> None:
        self._script = None

    def _next(self) -> Inference:
        assert self._script is not None
        score = next(self._script, None)
        if score is None:
            raise EngineError("the script of the fake engine has ended")
        if isinstance(score, Exception):
            raise score
        height, width = self._preprocess.height, self._preprocess.width
        anomaly = np.zeros((1, height, width), np.float32)
        anomaly[0, height // 2, width // 2] = score
        return Inference(anomaly, np.array([score], np.float32))
