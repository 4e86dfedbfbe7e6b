"""Writing that leaves either the whole thing or nothing."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from stpm.edge.errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """OSErrors of writing to `target` as StorageError with a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"no space left while writing {target} ({error.strerror}): free some space and run the command again"
            ) from error
        raise StorageError(f"cannot write {target} ({error.strerror}): check the path and its permissions") from error


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it takes the name `target` when the block ends well and is deleted when it does not.

    An earlier folder of that name is replaced: between two renames there is a moment without either, never one
    with a mixture.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    previous = target.with_name(f".{target.name}.previous-{os.getpid()}")
    with storage_errors(target):
        _clear_after_killed(target)
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    _flush(path)
            if target.exists():
                os.rename(target, previous)
            os.rename(partial, target)
            _flush(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if previous.exists() and not target.exists():
                os.rename(previous, target)
            shutil.rmtree(previous, ignore_errors=True)


def _clear_after_killed(target: Path) -> None:
    """What a process that was killed left of `target`: an earlier folder gets its name back, the rest goes."""
    for left in list(target.parent.glob(f".{target.name}.p*-*")):
        kind, _, process = left.name.removeprefix(f".{target.name}.").partition("-")
        if kind not in ("partial", "previous") or not process.isdecimal() or Path("/proc", process).exists():
            continue
        if kind == "previous" and not target.exists():
            os.rename(left, target)
        else:
            shutil.rmtree(left)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A file to write; it takes the name `target` when the block ends well and is deleted when it does not.

    What a process that was killed left of it goes.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    with storage_errors(target):
        for left in target.parent.glob(f".{target.name}.partial-*"):
            if not Path("/proc", left.name.rpartition("-")[2]).exists():
                left.unlink()
        try:
            yield partial
            _flush(partial)
            os.replace(partial, target)
            _flush(target.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_file(target: Path, content: bytes) -> None:
    """Replace one file at once: temporary file, fsync, rename."""
    with new_file(target) as partial:
        partial.write_bytes(content)


def write_json(target: Path, value: object) -> None:
    """Replace a file by `value` as indented JSON."""
    write_file(target, msgspec.json.format(msgspec.json.encode(value)) + b"\n")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
