"""What a run leaves on disk: one JSON line per part and a picture of every reject.

A full disk degrades to counting: the line goes on, and the number of records that were lost is known.
"""

from pathlib import Path
from types import TracebackType

import cv2
import msgspec
from stpm.edge.camera import Frame
from stpm.edge.engine import Inference
from stpm.edge.errors import StorageError
from stpm.edge.picture import defect_picture
from stpm.edge.policy import Verdict
from stpm.edge.preprocess import Preprocess
from stpm.edge.storage import storage_errors


class Record(msgspec.Struct, frozen=True):
    id: int
    name: str
    verdict: str
    score: float | None
    threshold: float
    latency_ms: float
    reason: str


class Results:
    def __init__(self, folder: Path, preprocess: Preprocess, threshold: float) -> None:
        self._preprocess, self._threshold = preprocess, threshold
        self._pictures = folder / "rejects"
        self.lost = 0
        with storage_errors(folder):
            self._pictures.mkdir(parents=True, exist_ok=True)
            self._file = (folder / "parts.jsonl").open("ab", buffering=0)

    def add(self, frame: Frame, verdict: Verdict, inference: Inference | None, latency_ms: float) -> None:
        record = Record(
            frame.number, frame.name, verdict.verdict, verdict.score, self._threshold, latency_ms, verdict.reason
        )
        try:
            with storage_errors(self._pictures):
                self._file.write(msgspec.json.encode(record) + b"\n")
                if verdict.verdict == "FAIL" and frame.image is not None and inference is not None:
                    self._save_picture(frame, verdict, inference)
        except StorageError:
            self.lost += 1

    def _save_picture(self, frame: Frame, verdict: Verdict, inference: Inference) -> None:
        assert frame.image is not None
        caption = f"part {frame.number}  {verdict.verdict}  {verdict.score:.3e} > {self._threshold:.3e}  {frame.name}"
        picture = defect_picture(self._preprocess.resize(frame.image), inference.maps[0], self._threshold, caption)
        _, encoded = cv2.imencode(".png", picture)
        (self._pictures / f"{frame.number:06d}.png").write_bytes(encoded.tobytes())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Results":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
