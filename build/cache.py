"""Where the teacher's features of all training images are kept: in memory, on disk, or nowhere, by what is free."""

import math
import os
import shutil
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch

MEMORY_FACTS = Path("/proc/meminfo")
# above this a file is as good: the kernel keeps of it in memory what memory there is
MEMORY_LIMIT = 4 << 30
SHARE = 0.5  # of what is free, the rest is for others


def feature_cache(shapes: list[tuple[int, ...]], folder: Path) -> list[torch.Tensor] | None:
    """A float16 tensor of each shape, not filled; None where neither memory nor the disk of `folder` has the room.

    The file has no name, so it is gone with the process, however that ends.
    """
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    size = 2 * int(ends[-1])
    if size <= min(MEMORY_LIMIT, SHARE * free_memory()):
        whole = torch.empty(size // 2, dtype=torch.float16)
    elif size <= SHARE * shutil.disk_usage(folder).free:
        with TemporaryFile(dir=folder) as file:
            # a mapped file that turns out to have no room kills the process
            os.posix_fallocate(file.fileno(), 0, size)
            whole = torch.from_numpy(np.memmap(file, np.float16, "r+", shape=(size // 2,)))
    else:
        return None
    parts = whole.tensor_split(ends[:-1].tolist())
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def free_memory() -> int:
    """Bytes that a process can have without any being swapped out."""
    available = next(line for line in MEMORY_FACTS.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(available.split()[1]) << 10
