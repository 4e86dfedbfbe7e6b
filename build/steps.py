"""Finished work, kept by the content of its inputs: the same inputs give the same folder back."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from stpm.edge.errors import StorageError
from stpm.edge.storage import storage_errors

# Raised when a step is changed so that its old results must not be used again.
STEP_VERSION = 1

Inputs = dict[str, str | int | float | list[str] | None]


class Steps:
    """Folders `root/NAME-KEY`, complete once they have that name. A stopped step leaves `NAME-KEY.partial` behind,
    and the same step finds it again: training goes on from its checkpoint there."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def run(self, name: str, inputs: Inputs, produce: Callable[[Path], None]) -> Path:
        """The folder of this step; `produce` fills it unless that was done before."""
        key = hashlib.sha256(msgspec.json.encode(inputs, order="sorted")).hexdigest()[:16]
        done = self._root / f"{name}-{key}"
        partial = self._root / f"{name}-{key}.partial"
        with storage_errors(done):
            self._root.mkdir(parents=True, exist_ok=True)
        with self._lock(self._root / f"{name}-{key}.lock"):
            if done.is_dir():
                print(f"{name}: done before, re-used ({done})", flush=True)
                return done
            with storage_errors(partial):
                partial.mkdir(exist_ok=True)
                produce(partial)
                os.rename(partial, done)
        return done

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StorageError(
                    f"another build is working on the same step ({path.stem}): wait for it, or give another --work DIR"
                ) from error
            yield


def default_work() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stpm-edge"
