"""How many records the line has handed over: one small file for each run, beside the database.

The line counts here before it hands a record to the journal process, so that whoever is killed, the next start knows
how many records there were: the page cache outlives a process. It does not outlive a power failure, which may take the
last seconds of the count as it takes the last seconds of the database.

    handed-<start of the run>.count    magic 8 bytes, handed uint64, closed uint32, CRC-32 of these; little-endian

The file is written with pwrite and not through a mapping: where the file system finds no room for a mapped page, it
kills the process that wrote there, and that is the line. The count of a run that goes on is locked.
"""

import fcntl
import os
import struct
import zlib
from datetime import datetime, timezone
from pathlib import Path

import msgspec

_MAGIC = b"STPMHAND"
_LAYOUT = struct.Struct("<8sQI")
_STAMP = "%Y%m%dT%H%M%S%fZ"
_DIGITS = "[0-9]" * 8 + "T" + "[0-9]" * 12 + "Z"  # what it looks like, for glob


class Handed(msgspec.Struct, frozen=True):
    """What a count file says."""

    records: int
    closed: bool  # the run came to its end; otherwise the line was killed, or goes on


class HandedCount:
    """The count of the run that began `at`, for the line to write. OSError when it cannot be made or written."""

    def __init__(self, folder: Path, at: str) -> None:
        self._descriptor = os.open(count_file(folder, at), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.write(0)
        except OSError:
            os.close(self._descriptor)
            raise

    def write(self, records: int, closed: bool = False) -> None:
        content = _LAYOUT.pack(_MAGIC, records, closed)
        os.pwrite(self._descriptor, content + zlib.crc32(content).to_bytes(4, "little"), 0)

    def close(self) -> None:
        os.close(self._descriptor)


def read_count(path: Path) -> Handed | None:
    """None when the file is missing, short or damaged: then nobody knows how many records there were."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    body, check = content[: _LAYOUT.size], content[_LAYOUT.size :]
    if len(body) < _LAYOUT.size or check != zlib.crc32(body).to_bytes(4, "little"):
        return None
    magic, records, closed = _LAYOUT.unpack(body)
    return Handed(records, bool(closed)) if magic == _MAGIC else None


def count_file(folder: Path, at: str) -> Path:
    return folder / f"handed-{stamp(at)}.count"


def ended_runs(folder: Path) -> list[tuple[str, Path]]:
    """When each run began whose count is there and whose line has gone, oldest first."""
    return [(_began(path), path) for path in sorted(folder.glob(f"handed-{_DIGITS}.count")) if not _locked(path)]


def stamp(at: str) -> str:
    """The start of a run as it stands in file names: 20260315T101112123456Z."""
    return datetime.fromisoformat(at).astimezone(timezone.utc).strftime(_STAMP)


def _began(path: Path) -> str:
    moment = datetime.strptime(path.name[len("handed-") : -len(".count")], _STAMP)
    return moment.replace(tzinfo=timezone.utc).isoformat(timespec="microseconds")


def _locked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
