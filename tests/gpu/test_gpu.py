"""What only a GPU can show: captured graphs, its memory, and TensorRT from graph to verdict.

Every test also runs on the pretended GPU of cuda_on_cpu, so that it is known to work before it meets a real one.
"""

import shutil
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cuda_on_cpu.driver import Machine, OutOfMemoryError
from gpu.card import card, reason
from gpu.several import several

from stpm.build.gpu.cli import main as compile_main
from stpm.build.gpu.kernels import compile_kernels
from stpm.edge.bundle import MANIFEST, open_bundle
from stpm.edge.engine import open_engine
from stpm.edge.engine.cuda import Gpu
from stpm.edge.errors import DeviceError, EngineError, PlanError
from stpm.edge.manifest import encode
from stpm.edge.score import bounding_box
from stpm.edge.selftest import self_test
from stpm.tools.gpu.base import Memory, Sizes, opened
from stpm.tools.gpu.kernels import Chain

SMALL = Sizes(taps=((16, 8), (32, 4)), network=32)
SLACK = 16 << 20  # what a driver may keep for itself


class Place:
    """The GPU that a test runs on; `machine` is None for a real one."""

    def __init__(self, machine: Machine | None) -> None:
        self.machine = machine

    @property
    def name(self) -> str:
        return "pretended" if self.machine else "real"

    def in_use(self) -> int:
        """Bytes of device memory."""
        if self.machine:
            return sum(len(memory) for memory in self.machine.memory.values())
        import pycuda.driver

        free, total = pycuda.driver.mem_get_info()
        return total - free

    def next_call_finds_no_memory(self) -> None:
        """A real one has no such amount as is asked for."""
        if self.machine:
            self.machine.fail_at, self.machine.error = len(self.machine.calls), OutOfMemoryError


@pytest.fixture(params=["pretended", "real"])
def place(request, tmp_path):
    if request.param == "real":
        if reason():
            pytest.skip(reason())
        card()  # keeps the context while the tests open and close theirs
        yield Place(None)
        return
    machine = Machine(request.getfixturevalue("library"))
    with several(machine, tmp_path):
        yield Place(machine)
    assert machine.left == ""


@pytest.fixture
def memory(place, tmp_path):
    gpu = Gpu()
    file = tmp_path / "kernels.cubin"
    try:
        compile_kernels(gpu.sm, file)
    finally:
        gpu.close()
    with opened(file.read_bytes()) as memory:
        yield memory


@pytest.fixture(scope="module")
def kept():
    """Bundles with a plan, by place and precision: making one takes minutes on a real GPU."""
    return {}


@pytest.fixture(params=["fp16", "int8"])
def bundle(request, place, bundles, kept, tmp_path_factory):
    key = place.name, request.param
    if place.name == "real":
        pytest.importorskip("tensorrt", reason="no TensorRT: pip install 'stpm-edge[tensorrt]'", exc_type=ImportError)
    if key not in kept:
        folder = tmp_path_factory.mktemp("gpu")
        shutil.copytree(bundles[request.param].path, folder / request.param)
        words = f"--bundle {folder / request.param} --work {folder / 'work'} --engine-batch 2"
        assert compile_main(words.split()) == 0
        kept[key] = open_bundle(folder / request.param)
    return kept[key]


# graphs


def answer(memory, chain, run, frames, threshold):
    chain.frames.host[...] = frames
    chain.call.host["threshold"] = threshold
    run()
    memory.gpu.wait()
    return [chain.findings.host.copy(), memory.get(chain.resized.tensor), memory.get(chain.head.map)]


def test_a_graph_takes_another_frame_and_another_threshold(memory):
    random, gpu = np.random.default_rng(0), memory.gpu
    chain = Chain(memory, SMALL, "fp16 HWC8", 2, width=64, height=48)
    usual = float(chain.call.host["threshold"][0])
    cases = [(random.integers(0, 256, (2, 48, 64, 3), np.uint8), usual * share) for share in (1.0, 0.5)]
    eager = [answer(memory, chain, chain.enqueue, *case) for case in cases]
    chain.findings.host["area"] = -1
    graph = gpu.captured(chain.enqueue)
    gpu.wait()
    assert (chain.findings.host["area"] == -1).all()  # captured, not run
    captured = [answer(memory, chain, lambda: gpu.replay(graph), *case) for case in (*cases, cases[0])]
    for found, wanted in zip(captured, (*eager, eager[0]), strict=True):
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
    assert (captured[1][0]["area"] > captured[0][0]["area"]).all()
    assert (captured[1][1] != captured[0][1]).any()


def test_a_capture_that_breaks_off_leaves_the_stream_as_it_was(memory):
    gpu = memory.gpu
    chain = Chain(memory, SMALL, "int8 CHW32", 1, width=64, height=48)

    def broken():
        chain.head.enqueue()
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        gpu.captured(broken)
    chain.enqueue()
    gpu.wait()
    assert chain.findings.host["score"][0] == memory.get(chain.head.map).max() > 0


def test_work_on_the_gpu_takes_time(memory):
    chain = Chain(memory, SMALL, "fp32", 1, width=64, height=48)
    chain.enqueue()
    taken = memory.gpu.timed({"first": chain.enqueue, "second": chain.enqueue})
    assert list(taken) == ["first", "second"]
    assert all(0 < milliseconds < 1000 for milliseconds in taken.values())


# memory


def test_what_is_put_on_the_gpu_is_found_there_again(memory):
    arrays = [np.arange(7, dtype=np.int8), np.random.default_rng(0).random((3, 5, 2)), np.zeros((1, 1), np.float16)]
    addresses = [memory.put(array) for array in arrays]
    for shared in memory._arrays.values():  # it shall come from the GPU
        shared.host.fill(0)
    for address, array in zip(addresses, arrays, strict=True):
        assert address % 256 == 0
        found = memory.get(address)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("size", [1, 3, 256, 257, 1 << 20])
def test_memory_is_aligned_for_the_widest_loads(place, size):
    gpu = Gpu()
    try:
        assert gpu.allocate(size) % 256 == 0
        assert gpu.shared((size,), np.uint8).device % 256 == 0
        assert gpu.allocate(size) % 256 == 0
    finally:
        gpu.close()


def test_more_memory_than_there_is_gives_a_sentence_and_the_gpu_goes_on(place):
    gpu = Gpu()
    try:
        place.next_call_finds_no_memory()
        with pytest.raises(DeviceError, match=r"out of GPU memory: cannot allocate 1073741824\.0 MiB, \d+ of \d+ MiB"):
            gpu.allocate(1 << 50)
        Memory(gpu).put(np.zeros(1000))
    finally:
        gpu.close()


def test_another_thread_is_refused(place):
    gpu = Gpu()
    caught = []

    def elsewhere():
        for act in (lambda: gpu.allocate(100), gpu.wait, gpu.close):
            try:
                act()
            except EngineError as error:
                caught.append(str(error))

    try:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert len(caught) == 3
        assert all("belongs to the thread that opened it" in text for text in caught)
        gpu.allocate(100)
    finally:
        gpu.close()


def test_closing_gives_all_memory_back(place):
    def once():
        gpu = Gpu()
        gpu.allocate(64 << 20)
        gpu.shared((1 << 20,), np.uint8)
        gpu.close()

    once()
    before = place.in_use()
    for _ in range(20):
        once()
    assert place.in_use() <= before + (SLACK if place.name == "real" else 0)


# TensorRT


class Padded:
    """A frame in device memory whose rows are longer than they need to be."""

    def __init__(self, memory: Memory, frame: np.ndarray) -> None:
        height, width, _ = frame.shape
        rows = np.zeros((height, width + 5, 3), np.uint8)
        rows[:, :width] = frame
        self.__cuda_array_interface__ = {
            "shape": frame.shape,
            "typestr": "|u1",
            "strides": rows.strides,
            "data": (memory.put(rows), False),
        }


def test_the_engine_gives_the_recorded_answers(bundle):
    with open_engine(bundle, "tensorrt") as engine:
        assert self_test(bundle, engine) <= bundle.manifest.golden.tolerance
        assert engine.describe()["backend"] == "tensorrt"


def test_inspect_infer_and_a_frame_on_the_gpu_agree(bundle):
    golden = bundle.golden()
    gpu = Gpu()
    try:
        with open_engine(bundle, "tensorrt") as engine:
            inferred = engine.infer(np.concatenate([bundle.manifest.preprocess(frame) for frame in golden.frames]))
            for index in (0, len(golden.frames) - 1):
                frame = golden.frames[index]
                threshold = float(golden.scores[index]) / 2
                found = engine.inspect(frame, threshold, with_map=True)
                assert found.score == found.map.max()
                assert (found.box, found.area) == (bounding_box(found.mask), int(found.mask.sum()))
                # the resize of the kernel may differ by a grey level, and INT8 by a step
                assert float(inferred.scores[index]) == pytest.approx(found.score, rel=0.1)
                on_gpu = engine.inspect_on_gpu(Padded(Memory(gpu), frame), threshold)
                assert (on_gpu.score, on_gpu.box, on_gpu.area) == (found.score, found.box, found.area)
    finally:
        gpu.close()


def test_the_same_frame_gives_the_same_answer(bundle):
    frames = bundle.golden().frames[:2]
    with open_engine(bundle, "tensorrt") as engine:
        first = [engine.inspect(frame, 1.0).score for frame in frames]
        assert [engine.inspect(frame, 1.0).score for frame in frames] == first
        parts = engine.profile(frames[0], 1)
    assert {name: len(samples) for name, samples in parts.items()} == {"preprocess": 1, "pyramids": 1, "head": 1}


def test_opening_and_closing_again_and_again_loses_no_memory(place, bundle):
    def life():
        with open_engine(bundle, "tensorrt") as engine:
            engine.inspect(bundle.golden().frames[0], 1.0)

    life()
    before = place.in_use()
    for _ in range(20 if place.name == "real" else 1):
        life()
    assert place.in_use() <= before + (SLACK if place.name == "real" else 0)


def test_a_plan_for_another_gpu_is_refused(place, bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    files = bundle.manifest.engines["tensorrt"]
    other = msgspec.structs.replace(files, plan=msgspec.structs.replace(files.plan, sm="1.0"))
    engines = bundle.manifest.engines | {"tensorrt": other}
    Path(copy / MANIFEST).write_bytes(encode(msgspec.structs.replace(bundle.manifest, engines=engines)))
    before = place.in_use()
    with pytest.raises(PlanError, match=r"\(SM 1\.0\), and this machine has TensorRT .* compile it here with"):
        open_engine(open_bundle(copy))
    assert place.in_use() <= before + (SLACK if place.name == "real" else 0)
