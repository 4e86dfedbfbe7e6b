"""What training runs on: the CPU, or a GPU that torch can use."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from stpm.edge.errors import ConfigError, DeviceError

DEVICES = ("auto", "cpu", "cuda")
CPU_FACTS = Path("/proc/cpuinfo")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def device_of(wish: str) -> str:
    """`cpu` or `cuda`; `auto` is the latter where there is one. A wish for `cuda` where there is none: ConfigError."""
    found = torch.cuda.is_available()
    if wish == "cuda" and not found:
        raise ConfigError(
            f"wanted an NVIDIA GPU for --device cuda, but torch {torch.__version__} finds none: install its driver "
            "and a torch built for CUDA, or train with --device cpu"
        )
    return "cuda" if found and wish != "cpu" else "cpu"


def emulates_bfloat16(device: str) -> bool:
    """Whether it has no arithmetic for it: x86 names that avx512_bf16 or amx_bf16, Arm bf16. GPUs before Ampere
    emulate it too, but fast enough."""
    return device == "cpu" and CPU_FACTS.is_file() and "bf16" not in CPU_FACTS.read_text()


def keep_freed_memory() -> None:
    """Let this process keep what it frees, instead of having it zeroed again by the kernel for every tensor of every
    step: a fifth of the time of a training on a CPU. Without glibc nothing is changed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


@contextmanager
def on(device: str, *networks: nn.Module) -> Iterator[None]:
    """The networks, in place, on this device, and on the CPU again at the end. Its memory too small: DeviceError."""
    try:
        for network in networks:
            network.to(device)
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"the GPU has not enough free memory for this training ({str(error).split('.')[0]}): end what else uses "
            "it, or train with --device cpu"
        ) from error
    finally:
        for network in networks:
            network.to("cpu")
