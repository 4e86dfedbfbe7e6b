"""The GPU, through pycuda: one context, one stream, and memory that lives until the device is closed.

pycuda has no call for CUDA graphs; those are in cuda_graph.py.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

import numpy as np
import numpy.typing as npt

from stpm.edge.engine.cuda_graph import Graph, capture, pop_context
from stpm.edge.errors import DeviceError, EngineError
from stpm.edge.kernels.launches import KERNELS, PARAMETERS, Launch

# A frame takes milliseconds. A GPU that is silent for this long hangs; the first run may take longer.
LONGEST_WAIT_S = 2.0
LONGEST_SET_UP_S = 30.0
# CU_STREAM_NON_BLOCKING, for which pycuda has no name: not held up by what others put on the default stream
NON_BLOCKING = 1


@dataclass(frozen=True)
class Shared:
    """A host array and where the GPU has it: the same memory when it is mapped, else a copy that `send` and `fetch`
    keep up to date."""

    host: npt.NDArray[Any]
    device: int
    mapped: bool


class Gpu:
    """Belongs to the thread that opens it, as CUDA contexts do; any other thread gets an EngineError.

    What goes wrong with the device is a DeviceError, and nothing that was started is left behind.
    """

    def __init__(self, index: int = 0) -> None:
        self._cuda = _pycuda()
        self._owner = threading.get_ident()
        self._closing = ExitStack()
        self._functions: dict[str, Any] = {}
        self._stream: Any = None
        self._done: Any = None
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._closing.close)
            self._open(index)
            on_failure.pop_all()

    def _open(self, index: int) -> None:
        cuda = self._cuda
        with self._translated("open the GPU"):
            cuda.init()
            count = cuda.Device.count()
            if count <= index:
                raise DeviceError(
                    f"wanted GPU number {index}, found {count} of them: check with `nvidia-smi` that the driver sees "
                    "it, and CUDA_VISIBLE_DEVICES"
                )
            device = cuda.Device(index)
            self.name: str = device.name()
            self.sm = "{}.{}".format(*device.compute_capability())
            version = cuda.get_driver_version()
            self.driver = f"{version // 1000}.{version % 1000 // 10}"
            self._integrated = bool(device.get_attribute(cuda.device_attribute.INTEGRATED))
            context = device.retain_primary_context()
            context.push()
            self._closing.callback(self._let_go_of, context)
            self._closing.callback(self._drop_stream)
            self._stream = cuda.Stream(NON_BLOCKING)
            self._done = cuda.Event(cuda.event_flags.DISABLE_TIMING)

    @property
    def stream(self) -> int:
        """The CUstream that everything runs on."""
        return int(self._stream.handle)

    def allocate(self, size: int) -> int:
        """The address of so many bytes of device memory, aligned to 256."""
        with self._translated(f"allocate {size / 2**20:.1f} MiB"):
            memory = self._cuda.mem_alloc(size)
        self._closing.callback(self._free, memory)
        return int(memory)

    def shared(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Shared:
        """Memory that both sides touch once a frame: mapped where host and GPU have one memory, else `staged`."""
        if not self._integrated:
            return self.staged(shape, dtype)
        host = self._pinned(shape, dtype, self._cuda.host_alloc_flags.DEVICEMAP)
        with self._translated("map pinned memory"):
            return Shared(host, int(host.base.get_device_pointer()), True)

    def staged(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Shared:
        """Memory of the GPU, which caches it, with a pinned copy on the host."""
        host = self._pinned(shape, dtype, 0)
        return Shared(host, self.allocate(host.nbytes), False)

    def _pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike, flags: int) -> Any:
        with self._translated("allocate pinned memory"):
            host = self._cuda.pagelocked_empty(shape, dtype, mem_flags=flags)
        self._closing.callback(self._free, host.base)
        host[...] = np.zeros((), dtype)
        return host

    def constant(self, array: npt.NDArray[Any]) -> int:
        """The address of a copy of the array."""
        address = self.allocate(array.nbytes)
        with self._translated("copy to the GPU"):
            # on our stream: it does not wait for the default one, where a plain copy may still be under way
            self._cuda.memcpy_htod_async(address, array, self._stream)
        self.wait()
        return address

    def load(self, cubin: bytes) -> None:
        """The kernels; once, before the first `launch`."""
        with self._translated("load the kernels"):
            module = self._cuda.module_from_buffer(cubin)
            for name in KERNELS:
                function = module.get_function(name)
                function.prepare([PARAMETERS[name]])
                self._functions[name] = function
        self._closing.callback(self._functions.clear)

    def launch(self, launch: Launch) -> None:
        with self._translated(f"launch {launch.kernel}"):
            self._functions[launch.kernel].prepared_async_call(
                launch.grid, launch.block, self._stream, launch.parameters
            )

    def send(self, shared: Shared) -> None:
        if not shared.mapped:
            with self._translated("copy to the GPU"):
                self._cuda.memcpy_htod_async(shared.device, shared.host, self._stream)

    def fetch(self, shared: Shared) -> None:
        if not shared.mapped:
            with self._translated("copy from the GPU"):
                self._cuda.memcpy_dtoh_async(shared.host, shared.device, self._stream)

    def captured(self, enqueue: Callable[[], None]) -> Graph:
        """What `enqueue` puts on the stream, as one CUDA graph. Nothing runs yet, and all addresses are frozen."""
        with self._translated("capture the frame"):
            graph = capture(self.stream, enqueue)
        self._closing.callback(graph.close)
        return graph

    def replay(self, graph: Graph) -> None:
        with self._translated("launch the graph"):
            graph.launch(self.stream)

    def wait(self, longest_s: float | None = None) -> None:
        """Until the stream is done. A GPU that hangs, or that is lost on the way, is a DeviceError."""
        longest_s = LONGEST_WAIT_S if longest_s is None else longest_s
        deadline = monotonic() + longest_s
        with self._translated("finish the frame"):
            self._done.record(self._stream)
            # polled, because a synchronising call would wait for a hanging GPU for ever
            while not self._done.query():
                if monotonic() > deadline:
                    raise DeviceError(
                        f"the GPU has not answered for {longest_s:g} s: look for errors of the driver with "
                        "`dmesg | grep -i -e nvrm -e xid`, and restart the machine if it does not recover"
                    )
                sleep(0)  # pycuda keeps the interpreter to itself, and the camera's thread wants it too

    def timed(self, stages: dict[str, Callable[[], None]]) -> dict[str, float]:
        """Milliseconds that the GPU spends in each of the stages, which are enqueued one after the other."""
        with self._translated("measure the time"):
            marks = [self._cuda.Event() for _ in range(len(stages) + 1)]
            marks[0].record(self._stream)
            for mark, enqueue in zip(marks[1:], stages.values(), strict=True):
                enqueue()
                mark.record(self._stream)
        self.wait()
        with self._translated("measure the time"):
            return {
                name: float(end.time_since(start)) for name, start, end in zip(stages, marks, marks[1:], strict=False)
            }

    def settle(self) -> None:
        """Wait, and take it as done when that fails: before memory goes that something may still be using."""
        if self._done is not None:
            with contextlib.suppress(DeviceError):
                self.wait()

    def close(self) -> None:
        self.check_thread()
        self.settle()
        self._closing.close()

    def check_thread(self) -> None:
        if threading.get_ident() != self._owner:
            raise EngineError(
                "this engine belongs to the thread that opened it: open and use an engine in one and the same thread"
            )

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        self.check_thread()
        cuda = self._cuda
        try:
            yield
        except cuda.MemoryError as error:
            raise DeviceError(
                f"out of GPU memory: cannot {what}{self._memory()} ({error}); close other programs that use the GPU, "
                "or compile with a smaller --engine-batch"
            ) from error
        except cuda.Error as error:
            raise DeviceError(
                f"cannot {what} ({error}): check the GPU with `nvidia-smi` and the driver's messages with `dmesg`"
            ) from error

    def _memory(self) -> str:
        try:
            free, total = self._cuda.mem_get_info()
        except self._cuda.Error:
            return ""
        return f", {free / 2**20:.0f} of {total / 2**20:.0f} MiB are free"

    def _free(self, memory: Any) -> None:
        # a lost device takes its memory with it, and says so at every call
        with contextlib.suppress(self._cuda.Error):
            memory.free()

    def _drop_stream(self) -> None:
        # pycuda gives them back with their context only while that is there
        self._stream = self._done = None

    def _let_go_of(self, context: Any) -> None:
        with contextlib.suppress(self._cuda.Error):
            context.pop()
        with contextlib.suppress(self._cuda.Error):
            context.detach()
        # to release a primary context pycuda pushes it once more, and leaves it there
        with contextlib.suppress(DeviceError):
            pop_context()


def _pycuda() -> Any:
    try:
        import pycuda.driver
    except ImportError as error:
        if "libcuda" in str(error):
            raise DeviceError(
                f"this machine has no NVIDIA driver ({error}): install it, or run with --backend openvino"
            ) from error
        if "undefined symbol" in str(error):
            raise DeviceError(
                f"the NVIDIA driver is older than the CUDA that pycuda was built with ({error}): install a newer "
                "driver, or build pycuda again on this machine"
            ) from error
        raise EngineError(
            f"TensorRT engines need pycuda, which cannot be loaded ({error}): pip install 'stpm-edge[tensorrt]'"
        ) from error
    return pycuda.driver
