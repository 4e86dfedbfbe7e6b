"""What runs leave on disk: one JSON line per part and a picture of every reject. A later run adds to an earlier one.

A full disk degrades to counting: the line goes on, and the number of records that were lost is known.
"""

import errno
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import cv2
import msgspec

from stpm.edge.camera import Frame
from stpm.edge.engine import Inspection
from stpm.edge.errors import StorageError
from stpm.edge.picture import defect_picture
from stpm.edge.policy import Verdict
from stpm.edge.preprocess import Image, Preprocess
from stpm.edge.storage import storage_errors


class Record(msgspec.Struct, frozen=True):
    at: str  # UTC, ISO 8601
    id: int
    name: str
    verdict: str
    score: float | None
    threshold: float
    latency_ms: float
    reason: str
    box: tuple[int, int, int, int] | None  # x, y, width, height of what is above the threshold, in the resized frame
    area: int  # pixels above the threshold there


class Results:
    def __init__(self, folder: Path, preprocess: Preprocess, threshold: float) -> None:
        self._preprocess, self._threshold = preprocess, threshold
        self._pictures = folder / "rejects"
        self._run = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
        self.lost = 0
        with storage_errors(folder):
            self._pictures.mkdir(parents=True, exist_ok=True)
            self._file = (folder / "parts.jsonl").open("ab", buffering=0)

    def add(self, frame: Frame, verdict: Verdict, inspection: Inspection | None, latency_ms: float) -> None:
        record = Record(
            datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            frame.number,
            frame.name,
            verdict.verdict,
            verdict.score,
            self._threshold,
            latency_ms,
            verdict.reason,
            inspection.box if inspection else None,
            inspection.area if inspection else 0,
        )
        try:
            with storage_errors(self._pictures):
                line = msgspec.json.encode(record) + b"\n"
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, "No space left on device")
                if verdict.verdict != "PASS" and frame.image is not None:
                    self._save_picture(frame.image, verdict, inspection, f"{self._run}-{frame.number:06d}", frame.name)
        except StorageError:
            self.lost += 1

    def _save_picture(
        self, image: Image, verdict: Verdict, inspection: Inspection | None, stem: str, name: str
    ) -> None:
        if inspection is None or inspection.map is None:
            picture = image
        else:
            score = "" if verdict.score is None else f"  {verdict.score:.3e}"
            caption = f"{name}  {verdict.verdict}{score}  threshold {self._threshold:.3e}"
            picture = defect_picture(self._preprocess.resize(image), inspection.map, self._threshold, caption)
        _, encoded = cv2.imencode(".png", picture)
        (self._pictures / f"{stem}.png").write_bytes(encoded.tobytes())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Results":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
