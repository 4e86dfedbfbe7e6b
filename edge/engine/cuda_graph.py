"""CUDA graphs through the driver's own library: calls that pycuda does not have."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

from stpm.edge.errors import DeviceError

LIBRARY = "libcuda.so.1"
# Calls of other threads, as those of a debugger or a second engine, do not disturb the capture.
THREAD_LOCAL = 1


class Graph:
    """What was captured, ready to run as often as wanted."""

    def __init__(self, executable: int) -> None:
        self._executable: int | None = executable

    def launch(self, stream: int) -> None:
        if self._executable is None:
            raise DeviceError("the CUDA graph is closed: open the engine again")
        _call("cuGraphLaunch", ctypes.c_void_p(self._executable), ctypes.c_void_p(stream))

    def close(self) -> None:
        if self._executable is not None:
            # the status does not matter: a lost device has dropped the graph already
            driver().cuGraphExecDestroy(ctypes.c_void_p(self._executable))
            self._executable = None


def capture(stream: int, enqueue: Callable[[], None]) -> Graph:
    """DeviceError when the driver refuses. When `enqueue` fails, the stream is as before, and its error comes out."""
    handle, graph, executable = ctypes.c_void_p(stream), ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuStreamBeginCapture_v2", handle, THREAD_LOCAL)
    try:
        enqueue()
    except BaseException:
        # ends the capture; that it is invalid by now is known
        driver().cuStreamEndCapture(handle, ctypes.byref(graph))
        if graph:
            driver().cuGraphDestroy(graph)
        raise
    _call("cuStreamEndCapture", handle, ctypes.byref(graph))
    try:
        _call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
    finally:
        driver().cuGraphDestroy(graph)
    assert executable.value is not None
    return Graph(executable.value)


def pop_context() -> None:
    """Take the current context off this thread's stack."""
    _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@cache
def driver() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise DeviceError(f"this machine has no NVIDIA driver ({error}): install it") from error


def _call(name: str, *arguments: Any) -> None:
    function = getattr(driver(), name, None)
    if function is None:
        raise DeviceError(f"the NVIDIA driver is too old, it has no {name}: install one for CUDA 11.4 or later")
    status = function(*arguments)
    if status != 0:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        meaning = (text.value or b"unknown error").decode()
        raise DeviceError(f"{name} failed ({status}: {meaning}): check the GPU with `nvidia-smi`")
