"""Pictures of parts on disk: FOLDER/pictures/YYYYMMDD/<start of the run>-<part>-<verdict>.png, within a limit.

What lies there is measured once, when the journal opens, and counted from then on. A picture is written under a name
that starts with a dot and renamed, so a half one never carries the name of a picture. It is not flushed: a power
failure may leave the last ones empty.
"""

import errno
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

import cv2
import msgspec
import numpy as np

from stpm.edge.errors import InputError
from stpm.edge.journal.handed import stamp
from stpm.edge.journal.messages import PartRecord, days_ago
from stpm.edge.picture import defect_picture
from stpm.edge.preprocess import Image, Preprocess, widen_grey
from stpm.edge.ring import Ring
from stpm.edge.score import Array

FOLDER = "pictures"
WAITING_BYTES = 128 << 20  # of pixels that wait to be drawn, or for the disk
AGAIN_S = 1.0  # between two attempts on a disk that refuses
EXPIRE_S = 60.0
_EXPIRE = 100  # deleted at a time


class Drawing(msgspec.Struct, frozen=True):
    """What a picture is made of, out of the ring: uint8 H×W×3, and its float32 H×W map, if any."""

    part: PartRecord
    image: Image
    map: Array | None

    @property
    def bytes(self) -> int:
        return self.image.nbytes + (0 if self.map is None else self.map.nbytes)


def copy_out(ring: Ring, part: PartRecord, slot: int) -> Drawing:
    """The frame as the networks saw it with its map, or the whole frame. ValueError, InputError or cv2.error when the
    record does not fit the slot."""
    image = ring.image(slot, part.shape)
    if part.map_shape is None:
        return Drawing(part, widen_grey(image).copy(), None)
    height, width = part.map_shape
    resized = Preprocess(height, width, part.roi).resize(image)
    return Drawing(part, resized.copy(), ring.map(slot, part.map_shape).copy())


def draw(drawing: Drawing) -> bytes:
    """As PNG."""
    part, picture = drawing.part, drawing.image
    if drawing.map is not None:
        score = "" if part.score is None else f"  {part.score:.3e}"
        caption = f"{part.part}  {part.frame}  {part.verdict}{score}  threshold {part.threshold:.3e}"
        anomaly = np.nan_to_num(drawing.map, nan=np.inf)
        picture = defect_picture(drawing.image, anomaly, max(part.threshold, 1e-30), caption)
    return bytes(cv2.imencode(".png", picture)[1])


def picture_path(run_at: str, part: int, part_at: str, verdict: str) -> Path:
    """Below the journal's folder."""
    return Path(FOLDER, stamp(part_at)[:8], f"{stamp(run_at)}-{part:08d}-{verdict}.png")


class Pictures:
    """Those in one journal folder. Whatever writes or deletes raises OSError."""

    def __init__(self, folder: Path, max_bytes: float) -> None:
        self._folder, self._limit = folder, max_bytes
        self._bytes: dict[str, int] | None = None  # of each day; None before it is measured
        self._oldest: deque[tuple[Path, int]] = deque()  # what is left of the oldest day, with sizes

    def measure(self, alive: Callable[[], None]) -> None:
        """Look at all that is there and delete the unfinished; `alive` is called now and then."""
        found: dict[str, int] = {}
        for day in _days(self._folder / FOLDER):
            found[day.name] = 0
            for entry in _files(day):
                if entry.name.startswith("."):
                    os.unlink(entry.path)
                else:
                    found[day.name] += entry.stat().st_size
            alive()
        self._bytes = found
        self._oldest.clear()

    @property
    def measured(self) -> bool:
        return self._bytes is not None

    def write(self, path: Path, content: bytes) -> None:
        """`path` as picture_path gives it. The oldest make room for it."""
        assert self._bytes is not None
        while self._bytes and sum(self._bytes.values()) + len(content) > self._limit:
            self._delete_oldest()
        target = self._folder / path
        partial = target.with_name(f".{target.name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, target)
        except OSError:
            partial.unlink(missing_ok=True)  # it may fill the disk
            raise
        day = target.parent.name
        self._bytes[day] = self._bytes.get(day, 0) + len(content)

    def expire(self, before_day: str) -> bool:
        """Delete some of those that were taken before that day (YYYYMMDD). True when there may be more."""
        assert self._bytes is not None
        for _ in range(_EXPIRE):
            if not self._bytes or min(self._bytes) >= before_day:
                return False
            self._delete_oldest()
        return True

    def _delete_oldest(self) -> None:
        """One picture, or a day that has none left."""
        assert self._bytes is not None
        day = min(self._bytes)
        folder = self._folder / FOLDER / day
        if not self._oldest or self._oldest[0][0].parent != folder:
            entries = _files(folder) if folder.is_dir() else []
            self._oldest = deque(sorted((Path(entry.path), entry.stat().st_size) for entry in entries))
        if self._oldest:
            path, size = self._oldest[0]
            path.unlink(missing_ok=True)
            self._oldest.popleft()
            self._bytes[day] -= size
        else:
            del self._bytes[day]
            try:
                folder.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    raise


class PictureQueue:
    """Pictures that wait to be drawn and written. Nothing here raises: what cannot be kept is counted.

    `now` is monotonic, seconds; `alive` is called in the middle of what may take long.
    """

    def __init__(self, pictures: Pictures, max_days: float, alive: Callable[[], None]) -> None:
        self._pictures, self._max_days, self._alive = pictures, max_days, alive
        self.run_at = ""
        self.lost = 0
        self.reason = ""  # why pictures cannot be written at present
        self._waiting: deque[Drawing] = deque()
        self._bytes = 0
        self._again = self._expire_again = 0.0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def busy(self, now: float) -> bool:
        """Whether there is something to draw now."""
        return bool(self._waiting) and now >= self._again

    def add(self, ring: Ring, part: PartRecord, slot: int) -> None:
        """Take what the picture needs out of the ring; the slot is free after that."""
        try:
            drawing = copy_out(ring, part, slot)
        except (ValueError, InputError, cv2.error):
            self.lost += 1
            return
        if self._bytes + drawing.bytes > WAITING_BYTES:
            self.lost += 1
            return
        self._waiting.append(drawing)
        self._bytes += drawing.bytes

    def work(self, now: float) -> None:
        """Draw and write one; delete those that are too old."""
        if now < self._again:
            return
        try:
            if not self._pictures.measured:
                self._pictures.measure(self._alive)
            if self._waiting:
                self._write(self._waiting[0])
                self._bytes -= self._waiting.popleft().bytes
                self.reason = ""
            if now >= self._expire_again and not self._pictures.expire(stamp(days_ago(self._max_days))[:8]):
                self._expire_again = now + EXPIRE_S
        except OSError as error:
            self.reason = f"cannot write pictures ({error.strerror}): they are counted until it can be"
            self._again = now + AGAIN_S

    def _write(self, drawing: Drawing) -> None:
        try:
            content = draw(drawing)
        except (ValueError, cv2.error):
            self.lost += 1
            return
        part = drawing.part
        self._pictures.write(picture_path(self.run_at, part.part, part.at, part.verdict), content)


def _files(folder: Path) -> list[os.DirEntry[str]]:
    """What else is there somebody has put there, and may keep."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.is_file(follow_symlinks=False)]


def _days(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]" * 8) if path.is_dir())
