"""What the checks of gpu_check.py share: what they are given, how they end, and how they measure.

A check is a function of a `Job`. It returns a `Result`, or raises `SkippedError` or `FailedError` with the reason.
"""

import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from stpm.edge.engine.cuda import Gpu, Shared
from stpm.edge.errors import StpmError
from stpm.edge.kernels.launches import Launch
from stpm.edge.latency import Latency, Percentiles

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 20
MIB = 1 << 20


class SkippedError(Exception):
    """The check cannot be done here."""


class FailedError(Exception):
    """What was found is wrong; `figures` say by how much."""

    def __init__(self, reason: str, figures: object = None) -> None:
        super().__init__(reason)
        self.figures = figures


@dataclass(frozen=True)
class Sizes:
    """How much is measured. The defaults are those of STPM on 256×256; tests take less."""

    taps: tuple[tuple[int, int], ...] = ((64, 64), (128, 32), (256, 16))  # channels, and pixels on each side
    network: int = 256
    batches: tuple[int, ...] = (1, 8)
    frames: tuple[tuple[int, int], ...] = ((512, 512), (1280, 1024), (2448, 2048))  # width, height
    beyond_cache: int = 256 * MIB  # more than the L2 of any GPU so far
    repeats: int = 20
    warm_up: int = WARM_UP


@dataclass
class Job:
    """`folder` is for this run only; `work` keeps TensorRT's timings for the next one."""

    bundles: list[Path]
    runs: int
    folder: Path
    work: Path
    sizes: Sizes = field(default_factory=Sizes)
    device: str = "cuda"  # of torch
    provider: str = "CUDAExecutionProvider"  # of ONNX Runtime
    tactic_sources: tuple[str, ...] | None = None  # of PlanOptions
    plans: dict[tuple[Path, str], Any] = field(default_factory=dict)  # compiled bundles: gpu/engines.py


@dataclass(frozen=True)
class Result:
    """`line` is for the terminal, `figures` for the JSON file."""

    line: str
    figures: object


class Check(msgspec.Struct, frozen=True):
    name: str
    state: Literal["passed", "failed", "skipped"]
    reason: str  # of a failed or skipped one; else empty
    seconds: float
    figures: Any


def ended(name: str, check: Callable[[Job], Result], job: Job, clock: Callable[[], float]) -> tuple[Check, str]:
    """How the check ended, and its line for the terminal."""
    started = clock()
    state: Literal["passed", "failed", "skipped"] = "failed"
    figures: object = None
    try:
        result = check(job)
        state, reason, line, figures = "passed", "", result.line, result.figures
    except SkippedError as skipped:
        state, reason = "skipped", str(skipped)
    except (FailedError, StpmError) as error:
        reason, figures = str(error), getattr(error, "figures", None)
    except Exception as error:  # a check that breaks must not take those after it with it
        sys.excepthook(type(error), error, error.__traceback__)
        reason = f"{type(error).__name__}: {first_line(error)}"
    return Check(name, state, reason, round(clock() - started, 1), figures), line if state == "passed" else reason


def first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "it gives no reason")


def needed(*modules: str) -> None:
    """SkippedError unless these can be imported."""
    for name in modules:
        try:
            __import__(name)
        except ImportError as error:
            raise SkippedError(f"needs {name}, which cannot be loaded ({first_line(error)})") from error


def interleaved(
    contenders: dict[str, Callable[[], object]], runs: int, warm_up: int
) -> tuple[dict[str, Percentiles], dict[str, str]]:
    """Latency of each, measured in turn so that a busy machine slows them alike.

    One that fails while it warms up, which is when compilers run, is left out; the second dict says why.
    """
    left_out = {}
    for name, run in contenders.items():
        try:
            for _ in range(warm_up):
                run()
        except Exception as error:  # whatever a foreign compiler raises; the others go on
            left_out[name] = f"{type(error).__name__}: {first_line(error)}"
    latency = Latency()
    for _ in range(runs):
        for name, run in contenders.items():
            if name not in left_out:
                with latency.stage(name):
                    run()
    return latency.percentiles(), left_out


class Memory:
    """Arrays in the memory of a GPU, and launches that work on them; all of it lives as long as the Gpu."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._arrays: dict[int, Shared] = {}

    def put(self, array: np.ndarray) -> int:
        """The address of a copy of the array."""
        # on the stream of the launches: a copy on the default stream may still be under way when a kernel starts
        host = np.array(array, order="C")
        shared = Shared(host, self.gpu.allocate(host.nbytes), False)
        self.gpu.send(shared)
        self.gpu.wait()
        self._arrays[shared.device] = shared
        return shared.device

    def get(self, address: int) -> np.ndarray:
        """What lies there now, in the shape and type that was put."""
        shared = self._arrays[address]
        self.gpu.fetch(shared)
        self.gpu.wait()
        return shared.host.copy()

    def run(self, launch: Launch) -> None:
        self.gpu.launch(launch)
        self.gpu.wait()


@contextmanager
def opened(cubin: bytes) -> Iterator[Memory]:
    """A Gpu with the kernels; what is allocated on it goes at the end of the block."""
    gpu = Gpu()
    try:
        gpu.load(cubin)
        yield Memory(gpu)
    finally:
        gpu.close()


# the machine

CLOCKS = ("driver_version", "clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first GPU now: driver, clock, power, temperature."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"nvidia-smi": first_line(error)}
    values = [value.strip() for value in result.stdout.strip().split(",")]
    if result.returncode != 0 or len(values) != len(CLOCKS):
        return {"nvidia-smi": first_line(result.stderr + result.stdout)}
    return dict(zip(CLOCKS, values, strict=True))


def machine(gpu: Gpu) -> dict[str, str]:
    return {
        "gpu": gpu.name,
        "sm": gpu.sm,
        "driver": f"CUDA {gpu.driver}",
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions("torch", "tensorrt", "onnxruntime", "pycuda", "polygraphy", "numpy"),
    }


def versions(*modules: str) -> dict[str, str]:
    """By what is installed, whichever distribution brings the module; nothing is imported."""
    brought_by = metadata.packages_distributions()
    found = {}
    for name in modules:
        distributions = brought_by.get(name, [])
        found[name] = (
            f"{metadata.version(distributions[0])} ({distributions[0]})" if distributions else "not installed"
        )
    return found


def commit() -> str | None:
    """Of the checkout, with a + when it was changed since; None where git does not know."""
    try:
        head, status = (
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=30)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    name = head.stdout.strip()
    if not re.fullmatch("[0-9a-f]{40,64}", name):
        return None
    return name + ("+" if status.stdout.strip() else "")
