"""Where training runs, and that the networks come back from there."""

import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stpm.build import device
from stpm.build import train as training
from stpm.build.cli import train_main
from stpm.build.device import device_of, on
from stpm.build.export import export_graph
from stpm.build.fake_quant import FakeQuantNetwork
from stpm.build.methods import METHODS
from stpm.build.train import TrainingSet
from stpm.calibration.qdq import activations, quantise
from stpm.edge.errors import DeviceError
from stpm.edge.preprocess import Preprocess

SMALL = Preprocess(height=64, width=64)
PIXELS = np.zeros((4, 64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("wish", "there", "found"),
    [
        ("auto", False, "cpu"),
        ("auto", True, "cuda"),
        ("cpu", True, "cpu"),
        ("cpu", False, "cpu"),
        ("cuda", True, "cuda"),
    ],
)
def test_a_gpu_is_taken_where_there_is_one_and_the_cpu_is_not_refused(monkeypatch, wish, there, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert device_of(wish) == found


def test_cuda_without_a_gpu_is_refused_before_anything_is_read(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_main(f"--category x --data {tmp_path} --device cuda".split()) == 2
    assert "wanted an NVIDIA GPU for --device cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("facts", "option", "warned"),
    [
        ("flags : fpu avx512f avx512_vnni", "--bfloat16", True),
        ("flags : fpu avx512f avx512_bf16", "--bfloat16", False),
        ("Features : fp asimd bf16", "--bfloat16", False),
        ("flags : fpu", "", False),
    ],
)
def test_a_cpu_that_emulates_bfloat16_is_named_before_the_training(
    monkeypatch, tmp_path, capsys, facts, option, warned
):
    monkeypatch.setattr(device, "CPU_FACTS", tmp_path / "cpuinfo")
    device.CPU_FACTS.write_text(facts)
    assert (
        train_main(f"--category x --data {tmp_path / 'nowhere'} --teacher builtin --device cpu {option}".split()) == 3
    )
    assert ("this CPU has no bfloat16" in capsys.readouterr().out) == warned


class Elsewhere(torch.nn.Linear):
    """Says where it was sent."""

    def to(self, device):
        self.sent = [*getattr(self, "sent", []), device]
        return self


def test_networks_come_back_also_when_the_memory_of_the_gpu_was_too_small():
    network = Elsewhere(1, 1)
    with on("cuda", network):
        assert network.sent == ["cuda"]
    assert network.sent == ["cuda", "cpu"]
    with pytest.raises(DeviceError, match="--device cpu"), on("cuda", network):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    assert network.sent == ["cuda", "cpu"] * 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_freed_memory_is_used_again_without_the_kernel_zeroing_it():
    program = """
import resource, sys, torch
from stpm.build.device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(64 << 18) + 1  # of 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
keep_freed_memory()
faults()
print(plain, faults())
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    plain, kept = map(int, told.split())
    assert plain > 400  # 640 if the kernel takes pages of 2 MiB
    assert kept < plain / 20


class NeverMixed(TorchDispatchMode):
    """No operation on tensors of two devices, single numbers and copies from one to the other apart."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor) and each.ndim]
        devices = {tensor.device.type for tensor in tensors}
        assert len(devices) <= 1 or "copy" in str(function), f"{function} of {devices}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_training_stays_on_the_device_of_the_teacher(name, cached, tmp_path, monkeypatch):
    """`meta`, the device without memory, in the place of a GPU: it shows where everything is, and no values."""
    monkeypatch.setattr(training, "feature_cache", lambda shapes, folder: None)
    method, some = METHODS[name](), np.arange(2)
    teacher, student = method.load_teacher("builtin", ""), method.new_student(0).to("meta")
    here = TrainingSet(PIXELS, SMALL, method, teacher, tmp_path, "").targets(np.arange(4))
    images = TrainingSet(PIXELS, SMALL, method, teacher.to("meta"), tmp_path, "")
    images.cache = [target.half() for target in here] if cached else None
    with NeverMixed():
        targets = images.targets(some)
        loss = method.loss(targets, method.answer(student, images.input(some), targets))
        loss.backward()
        validation = method.validation(targets, method.answer(student, images.input(some), targets), (64, 64))
    assert {loss.device.type, validation.device.type} == {"meta"}
    assert [tuple(target.shape) for target in targets] == [tuple(target[some].shape) for target in here]


def test_fine_tuning_for_int8_stays_on_its_device(monkeypatch):
    def rounded(values, *grid):
        assert {each.device.type for each in grid if isinstance(each, torch.Tensor)} <= {values.device.type}
        return values.clone()

    # torch has no form of these for `meta`
    for name in ("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"):
        monkeypatch.setattr(torch, name, rounded)
    method = METHODS["stpm"]()
    graph = export_graph(method.graph(method.load_teacher("builtin", ""), method.new_student(0).eval(), 64, 64), SMALL)
    quantised = quantise(graph, dict.fromkeys(activations(graph), 1.0))
    student = FakeQuantNetwork(quantised, "/student/").to("meta")
    with NeverMixed():
        features = student(torch.zeros(1, 3, 64, 64, device="meta"))
        torch.stack([feature.sum() for feature in features]).sum().backward()
    assert {weight.grad.device.type for weight in student.weights.values()} == {"meta"}
