"""edge/kernels compiled for one GPU, by the CUDA compiler of this machine."""

import shutil
import subprocess
from pathlib import Path

from stpm.edge.errors import EngineError
from stpm.edge.kernels.launches import MACROS, SOURCE

# where the toolkit lies when it is not on PATH, as on a Jetson
TOOLKIT = "/usr/local/cuda/bin"


def find_nvcc() -> str:
    """The path of the compiler; EngineError when there is none."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=TOOLKIT)
    if nvcc is None:
        raise EngineError(
            f"wanted nvcc to compile the kernels, found none on PATH or in {TOOLKIT}: install the CUDA toolkit"
        )
    return nvcc


def compile_kernels(sm: str, target: Path, for_later: bool = False) -> None:
    """Write the kernels for a GPU of compute capability `sm`, as "8.7", and `for_later` in a form that the driver
    compiles for any GPU from Ampere on. EngineError when the compiler will not."""
    nvcc = find_nvcc()
    macros = [f"-D{name}={value}" for name, value in MACROS.items()]
    number = sm.replace(".", "")
    form = ["-cubin", f"-arch=sm_{number}"]
    if for_later:
        native = f"arch=compute_{number},code=sm_{number}"
        form = ["-fatbin", "-gencode", native, "-gencode", "arch=compute_80,code=compute_80"]
    command = [nvcc, *form, "-O3", "-std=c++17", *macros, str(SOURCE), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        raise EngineError(
            f"{nvcc} cannot compile the kernels for SM {sm} ({lines[0] if lines else result.returncode}): use the "
            "toolkit that came with this machine's driver"
        )
