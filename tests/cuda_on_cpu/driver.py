"""A GPU that is not there: what pycuda.driver and libcuda have of it, on the CPU, as far as edge/engine uses them.

Device memory is host memory, and launches run the kernels that g++ compiled. Every call is counted and may be told to
fail. It watches what a driver does not forgive: calls without a context or from another thread, memory used after it
was freed or freed twice, synchronous calls during a capture, and whatever is left when the context goes.
"""

import ctypes
import threading
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from cuda_on_cpu.library import Library

from stpm.edge.kernels.launches import PARAMETERS, Launch


class Error(Exception):
    pass


class LogicError(Error):
    pass


class OutOfMemoryError(Error):
    pass


class Machine:
    """One GPU. `calls` are the names of the calls so far; `fail_at` makes the call of that number fail."""

    def __init__(
        self,
        library: Library | None = None,
        sm: tuple[int, int] = (8, 7),
        version: int = 12060,
        integrated: bool = False,
        devices: int = 1,
        name: str = "Pretended GPU",
    ) -> None:
        self.library, self.sm, self.version = library, sm, version
        self.integrated, self.devices, self.name = integrated, devices, name
        self.calls: list[str] = []
        self.fail_at: int | None = None
        self.error: type[Error] = LogicError
        self.lost = False  # a lost device fails at every call from then on
        self.hangs = False
        self.memory: dict[int, np.ndarray] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.pending: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.context: int | None = None  # the thread that has it
        self.launches: list[Launch] = []

    def call(self, name: str, while_capturing: bool = False) -> None:
        number = len(self.calls)
        self.calls.append(name)
        if self.lost:
            self.pending = []
            raise LogicError(f"{name} failed: the device is lost")
        if number == self.fail_at:
            self.lost = self.error is LogicError
            self.pending = [] if self.lost else self.pending
            raise self.error(f"{name} failed: as told")
        if name == "mem_get_info" and self.context is None:
            raise LogicError("mem_get_info failed: invalid device context")
        if name not in ("init", "Device.count", "Device", "retain_primary_context", "get_driver_version", "push"):
            assert self.context == threading.get_ident(), f"{name} without a context in this thread"
        if self.captured is not None and not while_capturing:
            raise LogicError(f"{name} failed: operation not permitted when stream is capturing")

    def answers(self, name: str) -> bool:
        """A call of TensorRT's: it does not raise, it gives nothing."""
        try:
            self.call(name, while_capturing=True)
        except Error:
            return False
        return True

    def enqueue(self, name: str, work: Callable[[], None]) -> None:
        self.call(name, while_capturing=True)
        (self.pending if self.captured is None else self.captured).append(work)

    def synchronise(self) -> None:
        work, self.pending = self.pending, []
        for each in work:
            each()

    def allocate(self, size: int) -> int:
        memory = np.full(size + 256, 0xA5, np.uint8)
        address = memory.ctypes.data + -memory.ctypes.data % 256
        self.memory[address] = memory
        return address

    def free(self, address: int) -> None:
        assert not self.pending, "memory is freed while work is under way"
        self.memory.pop(address)  # a KeyError is a double free

    def check(self, address: int) -> None:
        """Fails unless the address lies in memory that is still there."""
        assert any(start <= address < start + len(memory) for start, memory in self.memory.items()), "use after free"

    @property
    def left(self) -> str:
        """What was not given back; empty is right."""
        held = [f"{len(self.memory)} pieces of memory"] if self.memory else []
        held += [f"{len(self.graphs)} graphs"] if self.graphs else []
        held += ["the context"] if self.context is not None else []
        return ", ".join(held)


class Memory:
    def __init__(self, machine: Machine, size: int) -> None:
        self._machine, self._address = machine, machine.allocate(size)

    def __int__(self) -> int:
        return self._address

    def get_device_pointer(self) -> int:
        self._machine.call("get_device_pointer")
        return self._address

    def free(self) -> None:
        # a lost device gives nothing back; what it held is gone with it
        self._machine.free(self._address)
        self._machine.call("free")


def pycuda_driver(machine: Machine) -> SimpleNamespace:
    """The module pycuda.driver."""
    return SimpleNamespace(
        Error=Error,
        LogicError=LogicError,
        MemoryError=OutOfMemoryError,
        init=lambda: machine.call("init"),
        Device=_device(machine),
        get_driver_version=lambda: (machine.call("get_driver_version"), machine.version)[1],
        device_attribute=SimpleNamespace(INTEGRATED="INTEGRATED"),
        event_flags=SimpleNamespace(DISABLE_TIMING=2),
        host_alloc_flags=SimpleNamespace(DEVICEMAP=2),
        Stream=lambda flags: (machine.call("Stream"), SimpleNamespace(handle=77))[1],
        Event=lambda flags=0: Event(machine),
        mem_alloc=lambda size: (machine.call("mem_alloc"), Memory(machine, size))[1],
        mem_get_info=lambda: (machine.call("mem_get_info"), (3 << 20, 8 << 20))[1],
        pagelocked_empty=lambda shape, dtype, mem_flags=0: _pinned(machine, shape, dtype, mem_flags),
        memcpy_htod_async=lambda device, host, stream: _copy(
            machine, "memcpy_htod_async", device, host.ctypes.data, host.nbytes, stream
        ),
        memcpy_dtoh_async=lambda host, device, stream: _copy(
            machine, "memcpy_dtoh_async", host.ctypes.data, device, host.nbytes, stream
        ),
        module_from_buffer=lambda cubin: (machine.call("module_from_buffer"), Module(machine, cubin))[1],
    )


def _device(machine: Machine) -> type:
    class Device:
        def __init__(self, index: int) -> None:
            machine.call("Device")
            assert index < machine.devices

        @staticmethod
        def count() -> int:
            machine.call("Device.count")
            return machine.devices

        def name(self) -> str:
            return machine.name

        def compute_capability(self) -> tuple[int, int]:
            return machine.sm

        def get_attribute(self, attribute: str) -> int:
            assert attribute == "INTEGRATED"
            return int(machine.integrated)

        def retain_primary_context(self) -> "Context":
            machine.call("retain_primary_context")
            return Context(machine)

    return Device


class Context:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def push(self) -> None:
        self._machine.call("push")
        self._machine.context = threading.get_ident()

    def pop(self) -> None:
        assert not self._machine.memory, "memory is left when the context goes"
        assert not self._machine.graphs, "graphs are left when the context goes"
        self._machine.context = None

    def detach(self) -> None:
        assert self._machine.context is None


class Event:
    def __init__(self, machine: Machine) -> None:
        machine.call("Event")
        self._machine = machine

    def record(self, stream: object) -> None:
        self._machine.call("Event.record", while_capturing=True)

    def query(self) -> bool:
        self._machine.call("Event.query")
        if self._machine.hangs:
            return False
        self._machine.synchronise()
        return True

    def time_since(self, other: "Event") -> float:
        self._machine.call("Event.time_since")
        return 0.25


class Module:
    def __init__(self, machine: Machine, cubin: bytes) -> None:
        # the words of the compiler's command line
        assert cubin.startswith(b"pretended cubin"), "not what the compiler wrote"
        native = f"sm_{machine.sm[0]}{machine.sm[1]}".encode()
        if native not in cubin and b"code=compute_80" not in cubin:
            raise LogicError("cuModuleLoadDataEx failed: no kernel image is available for execution on the device")
        self._machine = machine

    def get_function(self, name: str) -> "Function":
        self._machine.call("get_function")
        return Function(self._machine, name)


class Function:
    def __init__(self, machine: Machine, name: str) -> None:
        self._machine, self._name = machine, name

    def prepare(self, types: list[np.dtype]) -> None:
        self._size = types[0].itemsize

    def prepared_async_call(self, grid: tuple, block: tuple, stream: object, parameters: bytes) -> None:
        assert len(parameters) == self._size
        launch = Launch(self._name, grid, block, parameters)
        self._machine.enqueue(f"launch {self._name}", lambda: self._run(launch))

    def _run(self, launch: Launch) -> None:
        self._machine.launches.append(launch)
        for address in _addresses(np.frombuffer(launch.parameters, PARAMETERS[self._name])[0]):
            self._machine.check(address)
        if self._machine.library is not None:
            self._machine.library.run(launch)


def _addresses(value: np.void | np.ndarray) -> list[int]:
    """Every pointer in a struct that is not null."""
    if value.dtype.names:
        return [address for name in value.dtype.names for address in _addresses(value[name])]
    if isinstance(value, np.ndarray) and value.ndim:
        return [address for each in value for address in _addresses(each)]
    return [int(value)] if value.dtype == np.uint64 and value else []


def _pinned(machine: Machine, shape: tuple[int, ...], dtype: object, flags: int) -> np.ndarray:
    machine.call("pagelocked_empty")
    assert not flags or machine.integrated
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = Memory(machine, size)

    class Pinned(np.ndarray):
        base = memory

    raw = np.frombuffer((ctypes.c_char * size).from_address(int(memory)), np.uint8)
    return raw.view(dtype).reshape(shape).view(Pinned)


def _copy(machine: Machine, name: str, to: int, source: int, size: int, stream: object) -> None:
    def work() -> None:
        machine.check(to if "htod" in name else source)
        ctypes.memmove(to, source, size)

    if stream is None:
        machine.call(name)
        work()
    else:
        machine.enqueue(name, work)


class Libcuda:
    """The graph calls of libcuda.so.1; they return a status."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._next = 1000

    def _status(self, name: str) -> int:
        try:
            self._machine.call(name, while_capturing=True)
        except Error:
            return 719
        return 0

    def cuStreamBeginCapture_v2(self, stream: ctypes.c_void_p, mode: int) -> int:  # noqa: N802
        assert (stream.value, mode) == (77, 1)
        status = self._status("cuStreamBeginCapture_v2")
        if status == 0:
            assert self._machine.captured is None
            self._machine.captured = []
        return status

    def cuStreamEndCapture(self, stream: ctypes.c_void_p, graph: object) -> int:  # noqa: N802
        work, self._machine.captured = self._machine.captured, None
        status = self._status("cuStreamEndCapture")
        if status == 0:
            assert work is not None
            self._give(graph, work)
        return status

    def cuGraphInstantiateWithFlags(self, executable: object, graph: ctypes.c_void_p, flags: object) -> int:  # noqa: N802
        status = self._status("cuGraphInstantiateWithFlags")
        if status == 0:
            self._give(executable, self._machine.graphs[graph.value])
        return status

    def cuGraphLaunch(self, executable: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:  # noqa: N802
        status = self._status("cuGraphLaunch")
        if status == 0:
            assert stream.value == 77
            self._machine.pending += self._machine.graphs[executable.value]
        return status

    def cuGraphDestroy(self, graph: ctypes.c_void_p) -> int:  # noqa: N802
        del self._machine.graphs[graph.value]
        return self._status("cuGraphDestroy")

    cuGraphExecDestroy = cuGraphDestroy  # noqa: N815

    def cuGetErrorString(self, status: int, text: object) -> int:  # noqa: N802
        text._obj.value = b"unspecified launch failure"
        return 0

    def cuCtxPopCurrent_v2(self, context: object) -> int:  # noqa: N802
        return 0

    def _give(self, handle: object, work: list[Callable[[], None]]) -> None:
        self._next += 1
        handle._obj.value = self._next
        self._machine.graphs[self._next] = work
