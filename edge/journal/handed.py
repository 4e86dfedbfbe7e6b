"""How many records the line has handed over: one small file for each run, in shared memory.

The line counts here before it hands a record to the journal process, so that whoever is killed, the next start knows
how many records there were. It does so in the loop that judges parts, which must not wait for a disk: so the file lies
in /dev/shm, and beside the database only on a system that has none. What lies there outlives every process and no
power failure; then the count is gone, and the next journal says that it is.

    /dev/shm/stpm-<hash of the journal folder>-<start of the run>.count, for its own user alone:
    magic 8 bytes, handed uint64, closed uint32, CRC-32 of these; little-endian

The file is written with pwrite and not through a mapping: where the file system finds no room for a mapped page, it
kills the process that wrote there, and that is the line. The count of a run that goes on is locked.
"""

import fcntl
import hashlib
import os
import struct
import zlib
from datetime import datetime, timezone
from pathlib import Path

import msgspec

SHARED_MEMORY = Path("/dev/shm")

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
        path = count_file(folder, at)
        path.parent.mkdir(parents=True, exist_ok=True)
        # anybody may make files in /dev/shm: it must be a new one
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
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
    """None when the file is missing, short, damaged or another user's: then nobody knows how many records there
    were."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, PermissionError):
        return None
    body, check = content[: _LAYOUT.size], content[_LAYOUT.size :]
    if len(body) < _LAYOUT.size or check != zlib.crc32(body).to_bytes(4, "little"):
        return None
    magic, records, closed = _LAYOUT.unpack(body)
    return Handed(records, bool(closed)) if magic == _MAGIC else None


def count_file(folder: Path, at: str) -> Path:
    """Of the run that began `at` and whose journal is in `folder`."""
    place, prefix = _place(folder)
    return place / f"{prefix}{stamp(at)}.count"


def ended_runs(folder: Path) -> list[tuple[str, Path]]:
    """When each run began whose count is there, and ours to read, and whose line has gone; oldest first."""
    place, prefix = _place(folder)
    return [(_began(path), path) for path in sorted(place.glob(f"{prefix}{_DIGITS}.count")) if _free(path)]


def _place(folder: Path) -> tuple[Path, str]:
    """Where the counts of a journal lie, and how their names begin."""
    if not SHARED_MEMORY.is_dir():
        return folder, "handed-"
    name = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
    return SHARED_MEMORY, f"stpm-{name}-"


def stamp(at: str) -> str:
    """The start of a run as it stands in file names: 20260315T101112123456Z."""
    return datetime.fromisoformat(at).astimezone(timezone.utc).strftime(_STAMP)


def _began(path: Path) -> str:
    moment = datetime.strptime(path.stem.rpartition("-")[2], _STAMP)
    return moment.replace(tzinfo=timezone.utc).isoformat(timespec="microseconds")


def _free(path: Path) -> bool:
    """Whether nobody holds it, as far as we may look."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
