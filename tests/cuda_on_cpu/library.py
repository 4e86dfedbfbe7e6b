"""The kernels of edge/kernels compiled for the CPU by g++, and a memory in which they run."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from stpm.edge.kernels.launches import MACROS, SOURCE, Launch

HERE = Path(__file__).parent
FLAGS = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
FLAGS += [f"-D{name}={value}" for name, value in MACROS.items()] + [f"-I{SOURCE.parent}", f"-I{HERE}"]


def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("no g++: the kernels cannot be compiled for the CPU (Debian: apt-get install g++)")
    return found


def build(source: str, out: Path, *flags: str) -> Path:
    result = subprocess.run(
        [compiler(), *FLAGS, *flags, str(HERE / source), "-o", str(out)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return out


class Library:
    def __init__(self, file: Path) -> None:
        self._launch = ctypes.CDLL(str(file)).launch

    def run(self, launch: Launch) -> None:
        triple = ctypes.c_uint * 3
        status = self._launch(
            launch.kernel.encode(),
            triple(*launch.grid),
            triple(*launch.block),
            launch.parameters,
            len(launch.parameters),
        )
        assert status == 0, f"{launch.kernel}: status {status}"


class Host:
    """Runs launches on the CPU; what it is given lives as long as it does."""

    name = "cpu"

    def __init__(self, library: Library) -> None:
        self._library, self._arrays = library, []

    def put(self, array: np.ndarray) -> int:
        """The address of a copy of the array, aligned to 256 bytes as device memory is."""
        memory = np.zeros(array.nbytes + 256, np.uint8)
        first = -memory.ctypes.data % 256
        view = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
        view[...] = array
        self._arrays.append((view, memory))
        return view.ctypes.data

    def get(self, address: int) -> np.ndarray:
        return next(view.copy() for view, _ in self._arrays if view.ctypes.data == address)

    def run(self, launch: Launch) -> None:
        self._library.run(launch)
