"""A machine with an NVIDIA GPU, pretended: pycuda, libcuda, TensorRT and nvcc for as long as a block lasts."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from cuda_on_cpu.driver import Libcuda, Machine, pycuda_driver
from cuda_on_cpu.networks import behaviours
from tensorrt_api import surface

NVCC = """#!/bin/sh
# the last word is the file to write
for word; do last=$word; done
echo "pretended cubin $*" > "$last"
"""


@contextmanager
def pretended(machine: Machine, folder: Path, version: str = "10.3") -> Iterator[ModuleType]:
    """The tensorrt module of this version; `folder` gets the compiler."""
    made: list[ModuleType] = []
    pycuda, driver = ModuleType("pycuda"), ModuleType("pycuda.driver")
    vars(driver).update(vars(pycuda_driver(machine)))
    vars(pycuda)["driver"] = driver
    (folder / "nvcc").write_text(NVCC)
    (folder / "nvcc").chmod(0o755)
    libcuda = Libcuda(machine)
    with (
        pytest.MonkeyPatch.context() as patch,
        surface.installed(version, behaviours(machine, lambda: made[0])) as tensorrt,
    ):
        made.append(tensorrt)
        patch.setitem(sys.modules, "pycuda", pycuda)
        patch.setitem(sys.modules, "pycuda.driver", driver)
        patch.setattr("stpm.edge.engine.cuda_graph.driver", lambda: libcuda)
        patch.setenv("PATH", str(folder), prepend=":")
        yield tensorrt
