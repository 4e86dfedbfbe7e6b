"""The TensorRT engine through its whole life, on a pretended GPU: order of calls, lifetimes, and every error."""

import ctypes
import gc
import re
import sys
import threading
import weakref

import msgspec
import numpy as np
import pytest
from cuda_on_cpu.driver import LogicError, Machine, OutOfMemoryError
from cuda_on_cpu.pretend import pretended

from stpm.edge.bundle import Bundle
from stpm.edge.engine import open_engine
from stpm.edge.engine.cuda_graph import driver
from stpm.edge.engine.messages import EngineReady, EngineSettings, Inspect
from stpm.edge.engine.process import main as engine_process
from stpm.edge.engine.tensorrt import TensorRtEngine
from stpm.edge.errors import DeviceError, EngineError, FrameError, PlanError
from stpm.edge.preprocess import Preprocess
from stpm.edge.ring import Ring
from stpm.edge.score import bounding_box
from stpm.edge.selftest import self_test


@pytest.fixture
def bundle(compiled):
    return compiled["fp32"]


@pytest.fixture
def machine(library):
    return Machine(library)


@pytest.fixture
def gpu(machine, tmp_path, monkeypatch):
    """The machine while it is there; nothing may be left on it."""
    monkeypatch.setattr("stpm.edge.engine.tensorrt.WARM_UP_RUNS", 1)
    with pretended(machine, tmp_path):
        yield machine
    assert machine.left == ""


def changed(bundle: Bundle, **fields) -> Bundle:
    """The bundle with another plan."""
    files = bundle.manifest.engines["tensorrt"]
    plan = msgspec.structs.replace(files.plan, **fields)
    engines = bundle.manifest.engines | {"tensorrt": msgspec.structs.replace(files, plan=plan)}
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, engines=engines), bundle.sha256)


class OnGpu:
    """An array in device memory, as other libraries show theirs."""

    def __init__(self, address, shape, kind="|u1", strides=None):
        self.__cuda_array_interface__ = {"shape": shape, "typestr": kind, "strides": strides, "data": (address, False)}


# the frame


def test_a_frame_is_one_graph_launch(gpu, bundle):
    frames = bundle.golden().frames
    with open_engine(bundle) as engine:
        engine.inspect(frames[0], 1.0)
        before = len(gpu.calls)
        engine.inspect(frames[1], 1.0)
        calls = gpu.calls[before:]
        assert calls == ["cuGraphLaunch", "Event.record", "Event.query"]
        names = [launch.kernel for launch in gpu.launches[-3:]]
        assert names == ["stpm_preprocess", "stpm_match", "stpm_combine"]


def test_the_map_is_copied_only_when_asked_for(gpu, bundle):
    frames = bundle.golden().frames
    with open_engine(bundle) as engine:
        engine.inspect(frames[0], 1.0)
        before = len(gpu.calls)
        assert engine.inspect(frames[1], 1.0, with_map=True).map.shape == (128, 128)
        assert gpu.calls[before:].count("memcpy_dtoh_async") == 2  # map and mask


def test_nothing_is_allocated_after_the_first_frame(gpu, bundle):
    frames = bundle.golden().frames
    with open_engine(bundle) as engine:
        self_test(bundle, engine)
        engine.warm_up()
        before = len(gpu.calls)
        for frame in frames:
            engine.inspect(frame, 1.0, with_map=True)
            engine.infer(bundle.manifest.preprocess(frame))
        assert not {"mem_alloc", "pagelocked_empty", "Event", "cuGraphInstantiateWithFlags"} & set(gpu.calls[before:])


def test_the_threshold_is_not_frozen_in_the_graph(gpu, bundle):
    golden = bundle.golden()
    with open_engine(bundle) as engine:
        score = engine.inspect(golden.frames[2], 1.0).score
        found = [engine.inspect(golden.frames[2], score * share).area for share in (0.9, 0.5, 0.1, 1.0)]
    assert 0 < found[0] < found[1] < found[2]
    assert found[3] == 0


def test_a_frame_that_lies_on_the_gpu_is_not_copied(gpu, bundle):
    frame, threshold = bundle.golden().frames[2], float(bundle.golden().scores[2]) / 2
    height, width, _ = frame.shape
    with open_engine(bundle) as engine:
        wanted = engine.inspect(frame, threshold)
        padded = np.zeros((height, width + 5, 3), np.uint8)
        padded[:, :width] = frame
        address = gpu.allocate(padded.nbytes)
        ctypes.memmove(address, padded.ctypes.data, padded.nbytes)
        before = len(gpu.calls)
        found = engine.inspect_on_gpu(OnGpu(address, (height, width, 3), strides=((width + 5) * 3, 3, 1)), threshold)
        assert found == wanted
        assert gpu.calls[before:] == ["cuGraphLaunch", "Event.record", "Event.query"]
        gpu.free(address)


def test_a_frame_on_the_gpu_may_be_the_first(gpu, bundle):
    frame = bundle.golden().frames[1]
    with open_engine(bundle) as engine:
        address = gpu.allocate(frame.nbytes)
        ctypes.memmove(address, np.ascontiguousarray(frame).ctypes.data, frame.nbytes)
        found = engine.inspect_on_gpu(OnGpu(address, frame.shape), 1.0)
        assert found.score == engine.inspect(frame, 1.0).score
        gpu.free(address)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), "__cuda_array_interface__, found ndarray"),
        (OnGpu(0, (256, 256)), "uint8 H×W×3"),
        (OnGpu(0, (256, 256, 3), "<f4"), "uint8 H×W×3"),
        (OnGpu(0, (256, 256, 3), strides=(1024, 4, 1)), "3 bytes side by side"),
        (OnGpu(0, (256, 256, 3)), "whose memory is not there"),
        (OnGpu(64, (256, 256, 3), strides=(700, 3, 1)), "3 bytes side by side"),
        (OnGpu(64, (9, 7, 3)), "like the first one, found 7×9"),
    ],
)
def test_a_wrong_frame_on_the_gpu_is_refused(gpu, bundle, frame, message):
    with open_engine(bundle) as engine:
        engine.inspect(bundle.golden().frames[0], 1.0)
        with pytest.raises(FrameError, match=message):
            engine.inspect_on_gpu(frame, 1.0)


def test_a_frame_of_another_size_is_refused_and_the_next_one_judged(gpu, bundle):
    frames = bundle.golden().frames
    with open_engine(bundle) as engine:
        score = engine.inspect(frames[0], 1.0).score
        with pytest.raises(FrameError, match=r"wanted frames of \d+×\d+ pixels like the first one, found 64×48"):
            engine.inspect(np.zeros((48, 64, 3), np.uint8), 1.0)
        assert engine.inspect(frames[0], 1.0).score == score


def test_a_grey_frame_is_widened(gpu, bundle):
    frame = np.ascontiguousarray(bundle.golden().frames[0][:, :, 0])
    with open_engine(bundle) as engine:
        assert engine.inspect(frame, 1.0).score == engine.inspect(np.repeat(frame[:, :, None], 3, 2), 1.0).score


def test_a_region_of_the_frame(gpu, bundle):
    frame = bundle.golden().frames[2]
    height, width, _ = frame.shape
    spec = Preprocess(roi=(0, 0, width // 2, height // 2))
    files = bundle.manifest.engines["tensorrt"]
    with TensorRtEngine.of_files(bundle.path, files, spec) as engine:
        found = engine.inspect(frame, 1.0, with_map=True)
        wanted = engine.infer(spec(frame))
    # the region is enlarged, where OpenCV drops a bit: see launches.py
    assert found.score == pytest.approx(float(wanted.scores[0]), rel=0.05)
    assert np.corrcoef(found.map.ravel(), wanted.maps[0].ravel())[0, 1] > 0.999


def test_on_a_jetson_a_frame_is_not_copied(library, bundle, tmp_path):
    machine = Machine(library, integrated=True)
    golden = bundle.golden()
    with pretended(machine, tmp_path):
        with open_engine(bundle) as engine:
            assert self_test(bundle, engine) < 0.01
            before = len(machine.calls)
            plain = engine.inspect(golden.frames[2], float(golden.scores[2]) / 2)
            assert machine.calls[before:] == ["cuGraphLaunch", "Event.record", "Event.query"]
            found = engine.inspect(golden.frames[2], float(golden.scores[2]) / 2, with_map=True)
            assert found.box == plain.box == bounding_box(found.mask)
        # the captured frame has no copy, only the tables of the resize were; maps are fetched from the GPU
        assert machine.calls.count("memcpy_htod_async") == 6
        assert machine.calls.count("memcpy_dtoh_async") == 2 * (len(golden.frames) + 1)
    assert machine.left == ""


def test_batches_are_cut_into_what_the_plan_has(gpu, bundle):
    frames = bundle.golden().frames
    tensor = np.concatenate([bundle.manifest.preprocess(frame) for frame in (*frames, *frames[:2])])
    with open_engine(bundle) as engine:
        before = len(gpu.calls)
        found = engine.infer(tensor)
        assert gpu.calls[before:].count("execute_async_v3") == 3  # 2 + 2 + 1
        for index in range(5):
            np.testing.assert_allclose(engine.infer(tensor[index : index + 1]).maps[0], found.maps[index], atol=1e-5)


# what a plan is for


@pytest.mark.parametrize(
    ("machine_is", "plan_is", "sentence"),
    [
        ({"sm": (8, 9), "name": "RTX"}, {}, r"for Pretended GPU \(SM 8.7\), .* TensorRT 10.3.0 and RTX \(SM 8.9\)"),
        ({}, {"tensorrt": "8.6.1"}, r"compiled by TensorRT 8.6.1 .* this machine has TensorRT 10.3.0"),
        ({"version": 11040}, {}, r"driver for CUDA 12.6, and this machine's is for CUDA 11.4: install a newer driver"),
        ({"name": "Other GPU"}, {}, r"Other GPU \(SM 8.7\)"),
        ({"sm": (7, 5)}, {"hardware_compatible": True}, "SM 7.5"),
        ({}, {"tensorrt": "7.2.3", "version_compatible": True}, "TensorRT 7.2.3"),
        ({"version": 12050}, {"hardware_compatible": True}, "CUDA 12.6, and this machine's is for CUDA 12.5"),
        ({}, {"tensorrt": "10.9.0", "version_compatible": True}, "TensorRT 10.9.0"),
    ],
)
def test_a_plan_for_something_else_names_both_sides_and_the_command(
    library, bundle, tmp_path, machine_is, plan_is, sentence
):
    machine = Machine(library, **machine_is)
    with pretended(machine, tmp_path), pytest.raises(PlanError, match=sentence) as caught:
        open_engine(changed(bundle, **plan_is))
    assert f"stpm-compile --bundle {bundle.path}" in str(caught.value)
    assert "trt.Runtime" not in machine.calls
    assert machine.left == ""


@pytest.mark.parametrize(
    ("machine_is", "plan_is"),
    [
        ({}, {"tensorrt": "10.0.1", "version_compatible": True}),
        ({"version": 13000}, {}),
    ],
)
def test_a_compatible_plan_opens(library, bundle, tmp_path, machine_is, plan_is):
    with pretended(Machine(library, **machine_is), tmp_path), open_engine(changed(bundle, **plan_is)) as engine:
        assert self_test(bundle, engine) < 0.01


def test_a_damaged_plan_is_refused_with_the_words_of_tensorrt(gpu, bundle, tmp_path):
    files = bundle.manifest.engines["tensorrt"]
    (tmp_path / files.main).write_bytes(b"not a plan")
    (tmp_path / files.plan.kernels).write_bytes((bundle.path / files.plan.kernels).read_bytes())
    with pytest.raises(PlanError, match="magic tag"):
        TensorRtEngine.of_files(tmp_path, files, bundle.manifest.preprocess)


def test_a_bundle_without_a_plan_says_how_to_make_one(bundles):
    with pytest.raises(EngineError, match=r"not for tensorrt: compile it on this machine with `stpm-compile"):
        open_engine(bundles["fp32"], "tensorrt")


def test_a_bundle_with_a_plan_is_run_with_it_unless_asked_otherwise(gpu, bundle):
    with open_engine(bundle) as engine:
        assert engine.describe()["backend"] == "tensorrt"
    with open_engine(bundle, "openvino") as engine:
        assert engine.describe()["backend"] == "openvino"


# what goes wrong


def test_without_pycuda(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(EngineError, match="TensorRT engines need pycuda"):
        open_engine(bundle)


def test_without_a_driver(bundle, monkeypatch):
    class NoDriver:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.startswith("pycuda"):
                raise ImportError("libcuda.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr("sys.meta_path", [NoDriver])
    with pytest.raises(DeviceError, match=r"no NVIDIA driver .* run with --backend openvino"):
        open_engine(bundle)


def test_without_libcuda_a_graph_cannot_be_made(monkeypatch):
    monkeypatch.setattr("stpm.edge.engine.cuda_graph.LIBRARY", "libnone.so.1")
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        driver.__wrapped__()


def test_without_a_device(library, bundle, tmp_path):
    with pretended(Machine(library, devices=0), tmp_path), pytest.raises(DeviceError, match="found 0 of them"):
        open_engine(bundle)


def test_without_tensorrt(gpu, bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match="TensorRT cannot be loaded"):
        open_engine(bundle)


def test_from_another_thread(gpu, bundle):
    with open_engine(bundle) as engine:
        engine.inspect(bundle.golden().frames[0], 1.0)
        found = []

        def elsewhere():
            for act in (lambda: engine.inspect(bundle.golden().frames[0], 1.0), engine.close):
                try:
                    act()
                except EngineError as error:
                    found.append(str(error))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert len(found) == 2
        assert all("belongs to the thread that opened it" in message for message in found)
        engine.inspect(bundle.golden().frames[0], 1.0)


def test_when_the_gpu_hangs(gpu, bundle, monkeypatch):
    monkeypatch.setattr("stpm.edge.engine.cuda.LONGEST_WAIT_S", 0.02)
    with open_engine(bundle) as engine:
        engine.inspect(bundle.golden().frames[0], 1.0)
        gpu.hangs = True
        with pytest.raises(DeviceError, match=r"has not answered for 0\.02 s"):
            engine.inspect(bundle.golden().frames[0], 1.0)
        gpu.hangs = False
        gpu.synchronise()


def test_a_first_frame_that_fails_closes_the_engine(gpu, bundle):
    """There is no second first frame: what the first one allocated would be allocated again and again."""
    with open_engine(bundle) as engine:
        gpu.fail_at, gpu.error = len(gpu.calls) + 3, OutOfMemoryError
        with pytest.raises(DeviceError, match="out of GPU memory"):
            engine.inspect(bundle.golden().frames[0], 1.0)
        assert gpu.left == ""
        with pytest.raises(EngineError, match="closed"):
            engine.inspect(bundle.golden().frames[0], 1.0)


def test_a_closed_engine_holds_nothing_of_tensorrt(gpu, bundle):
    """Without the help of the garbage collector, which comes in any thread and at any time."""
    gc.collect()
    gc.disable()
    try:
        engine = open_engine(bundle)
        engine.inspect(bundle.golden().frames[0], 1.0)
        networks = weakref.ref(engine._passes[1]._networks)
        assert networks() is not None
        engine.close()
        assert networks() is None
    finally:
        gc.enable()


def test_several_images_may_take_longer_and_the_first_ones_longest(gpu, bundle, monkeypatch):
    monkeypatch.setattr("stpm.edge.engine.tensorrt.LONGEST_WAIT_S", 0.02)
    monkeypatch.setattr("stpm.edge.engine.tensorrt.LONGEST_SET_UP_S", 0.1)
    images = np.zeros((2, 3, 128, 128), np.float32)
    with open_engine(bundle) as engine:
        for longest in ("0.1 s", "0.04 s"):
            gpu.hangs = True
            with pytest.raises(DeviceError, match=f"has not answered for {longest}"):
                engine.infer(images)
            gpu.hangs = False
            engine.infer(images)


def test_when_tensorrt_refuses_a_frame(gpu, bundle):
    with open_engine(bundle) as engine:
        gpu.fail_at = len(gpu.calls) + 2  # after the two copies
        with pytest.raises(EngineError, match="TensorRT failed on a frame"):
            engine.infer(np.zeros((1, 3, 128, 128), np.float32))


def a_life(bundle, frames, machine):
    """Opens, works, closes; the number of calls before the closing."""
    with open_engine(bundle) as engine:
        engine.warm_up()
        for frame in frames[:2]:
            engine.inspect(frame, 1.0, with_map=True)
        engine.profile(frames[0], 1)
        return len(machine.calls)


@pytest.mark.parametrize("error", [LogicError, OutOfMemoryError])
def test_every_call_may_fail_and_nothing_is_left(bundle, tmp_path, error, monkeypatch):
    """Each call of a life is made to fail: once, when out of memory; from then on, when the device is lost."""
    monkeypatch.setattr("stpm.edge.engine.tensorrt.WARM_UP_RUNS", 1)
    frames = bundle.golden().frames
    good = Machine()  # without kernels: what they compute is tested elsewhere
    with pretended(good, tmp_path):
        closing = a_life(bundle, frames, good)
    assert good.left == ""
    # every kind of call where it comes first, somewhere, and last
    places = {name: [number for number, each in enumerate(good.calls) if each == name] for name in set(good.calls)}
    chosen = {number for each in places.values() for number in (each[0], each[len(each) // 2], each[-1])}
    for number in sorted(chosen):
        name = good.calls[number]
        machine, caught = Machine(), None
        machine.fail_at, machine.error = number, error
        with pretended(machine, tmp_path):
            try:
                a_life(bundle, frames, machine)
            except EngineError as found:
                caught = found
        assert machine.left == "", f"{name} (call {number}) leaves {machine.left}"
        if number >= closing:
            assert caught is None, f"closing is in nobody's way, but {name} was"
        elif name == "cuGraphDestroy":  # of the template of a graph that is there already
            assert caught is None or error is LogicError
        else:
            assert caught is not None, f"{name} (call {number}) fails and nobody hears of it"
            assert len(str(caught).splitlines()) == 1
            told = name.startswith(("cu", "trt", "deserialize", "set_", "execute", "create_"))
            assert isinstance(caught, DeviceError) or told
            assert told or error is LogicError or "out of GPU memory" in str(caught)
    assert closing > 100


def test_a_full_gpu_says_how_full(gpu, bundle):
    gpu.fail_at, gpu.error = 25, OutOfMemoryError
    with pytest.raises(DeviceError, match=r"out of GPU memory: .* 3 of 8 MiB are free"):
        open_engine(bundle)


class Line:
    """What an engine process hears of the line, one question at a time, and what it says."""

    def __init__(self, *questions):
        self.questions, self.said = list(questions), []

    def receive(self, timeout):
        question = self.questions.pop(0)
        return [question() if callable(question) else question]

    def send(self, message):
        self.said.append(message)
        return True


def test_a_device_lost_mid_run_ends_its_engine_process(gpu, bundle):
    """The line rejects the part that the process had, and starts another process (tests/test_edge_run.py, faults)."""
    frame, ring = bundle.golden().frames[0], Ring(1)
    ring.image(0, frame.shape)[:] = frame
    inspect = Inspect(1, 0, frame.shape, bundle.manifest.threshold.value, True)

    def lost():
        gpu.lost = True
        return inspect

    line = Line(inspect, inspect, lost, inspect)
    engine_process(EngineSettings(str(bundle.path), "tensorrt"), line, ring)
    ready, *answers, failed = line.said
    assert isinstance(ready, EngineReady)
    assert [answer.score for answer in answers] == [answers[0].score] * 2
    assert (ring.map(0, answers[0].map_shape) > 0).any()
    assert failed.kind == "DeviceError"
    assert "launch failure" in failed.sentence
    ring.close()


def test_sentences_name_what_to_do(gpu, bundle):
    gpu.fail_at = 30
    with pytest.raises(DeviceError) as caught:
        open_engine(bundle)
    assert re.search(r"cannot .* failed: as told\): check the GPU with `nvidia-smi`", str(caught.value))
