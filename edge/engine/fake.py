"""An engine with scripted answers: for tests, and for trying camera, PLC and gate before a real engine is there."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np

from stpm.edge.bundle import Bundle
from stpm.edge.camera.pattern import number_in
from stpm.edge.engine.base import Inference, Inspection, InspectsOnHost, check_input
from stpm.edge.errors import DeviceError, EngineError
from stpm.edge.preprocess import Image, Preprocess, Tensor

DEFECTIVE = 3  # by `pattern`, each frame of the pattern camera whose number this divides


@dataclass(frozen=True)
class ByNumber:
    """The score follows from the number that the pattern camera has drawn into the frame."""

    good: float
    defective: float


Answer = float | Exception | Callable[[], float] | ByNumber


class FakeEngine(InspectsOnHost):
    """Answers each input with the next score of the script; an exception in it is raised instead, a callable is
    called for its score.

    Inputs in `known` (their bytes) get the answer recorded for them and do not advance the script.
    """

    def __init__(
        self,
        script: Iterable[Answer],
        preprocess: Preprocess | None = None,
        known: dict[bytes, Inference] | None = None,
    ) -> None:
        self._script: Iterator[Answer] | None = iter(script)
        self._preprocess = preprocess or Preprocess()
        self._known = known or {}
        self._frame: Image | None = None

    @classmethod
    def of(cls, bundle: Bundle, script: str = "") -> "FakeEngine":
        """Passes the bundle's self test, then answers by the script, again and again, whatever the camera shows.

        The script is words with commas between them, one for each frame: `pass`, `fail`, `nan`, `raise`, `lost` (the
        device is gone), `hang` (no answer, ever), `exit` (the process dies), a number of seconds to wait before a
        pass, or `pattern`: the number drawn into the frame of a pattern camera decides, each third one fails, so that
        whoever knows the number knows the verdict. WORD*N stands for N of them. Without a script every third part is
        defective.
        """
        spec, golden, threshold = bundle.manifest.preprocess, bundle.golden(), bundle.manifest.threshold.value
        known = {
            spec(frame).tobytes(): Inference(golden.maps[index : index + 1], golden.scores[index : index + 1])
            for index, frame in enumerate(golden.frames)
        }
        return cls(cycle(_answers(script or "pass*2,fail", threshold)), spec, known)

    def warm_up(self) -> None:
        """Nothing is lazy here."""

    def inspect(self, frame: Image, threshold: float, with_map: bool = False) -> Inspection:
        self._frame = frame
        try:
            return super().inspect(frame, threshold, with_map)
        finally:
            self._frame = None  # a view of the ring

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
        if isinstance(score, ByNumber):
            score = self._by_number(score)
        elif callable(score):
            score = score()
        height, width = self._preprocess.height, self._preprocess.width
        anomaly = np.zeros((1, height, width), np.float32)
        anomaly[0, height // 2, width // 2] = score
        return Inference(anomaly, np.array([score], np.float32))

    def _by_number(self, score: ByNumber) -> float:
        if self._frame is None:
            raise EngineError("`pattern` in engine.script is for camera frames: there is no number in a tensor")
        return score.defective if number_in(self._frame) % DEFECTIVE == 0 else score.good


def _answers(script: str, threshold: float) -> list[Answer]:
    answers: list[Answer] = []
    for word in script.split(","):
        name, _, times = word.strip().partition("*")
        if times and not times.isdecimal():
            raise EngineError(f"wanted WORD*N in the script of the fake engine, found {word!r}: correct engine.script")
        answers += [_answer(name, threshold)] * int(times or 1)
    return answers


def _answer(word: str, threshold: float) -> Answer:
    match word:
        case "pass":
            return threshold / 2
        case "fail":
            return threshold * 2
        case "nan":
            return float("nan")
        case "raise":
            return EngineError("the script of the fake engine says so")
        case "lost":
            return DeviceError("the script of the fake engine says that the device is lost")
        case "hang":
            return partial(_after, 1e9, threshold / 2)
        case "exit":
            return partial(os._exit, 1)
        case "pattern":
            return ByNumber(threshold / 2, threshold * 2)
    try:
        return partial(_after, float(word), threshold / 2)
    except ValueError:
        raise EngineError(f"the script of the fake engine has no word {word!r}: correct engine.script") from None


def _after(seconds: float, score: float) -> float:
    time.sleep(seconds)
    return score
