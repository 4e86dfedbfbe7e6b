"""The pretended GPU for programs that open it more than once at a time, as gpu_check.py and these tests do."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from cuda_on_cpu.driver import Context, Libcuda, Machine
from cuda_on_cpu.pretend import pretended


class Counted(Context):
    """A primary context is there until the last one that retained it has let go."""

    def push(self) -> None:
        vars(self._machine).setdefault("pushed", 0)
        super().push()
        self._machine.pushed += 1

    def pop(self) -> None:
        self._machine.pushed -= 1
        if not self._machine.pushed:
            super().pop()

    def detach(self) -> None:
        if not self._machine.pushed:
            super().detach()


def copy_on_device(
    self: Libcuda, target: ctypes.c_uint64, source: ctypes.c_uint64, size: ctypes.c_size_t, stream: ctypes.c_void_p
) -> int:
    machine = self._machine
    assert stream.value == 77
    machine.check(target.value)
    machine.check(source.value)
    machine.enqueue("cuMemcpyDtoDAsync_v2", lambda: ctypes.memmove(target.value, source.value, size.value) and None)
    return 0


@contextmanager
def several(machine: Machine, folder: Path, version: str = "10.3") -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch, pretended(machine, folder, version) as tensorrt:
        patch.setattr("cuda_on_cpu.driver.Context", Counted)
        patch.setattr(Libcuda, "cuMemcpyDtoDAsync_v2", copy_on_device, raising=False)
        yield tensorrt
