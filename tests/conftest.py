"""Shared fixtures. Every test fails that leaves a thread or an open file behind."""

import gc
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from cuda_on_cpu.driver import Machine
from cuda_on_cpu.library import Library, build
from cuda_on_cpu.pretend import pretended
from journal_line import Line, counts
from tqdm import tqdm

from stpm.build.cli import build_main
from stpm.build.export import export_graph
from stpm.build.gpu.cli import main as compile_main
from stpm.build.methods.stpm import Stpm
from stpm.calibration.fp16 import to_fp16
from stpm.calibration.qdq import activations, convolutions, quantise
from stpm.edge.bundle import Bundle, open_bundle
from stpm.edge.preprocess import Preprocess
from stpm.tools.cable import PtyCable
from stpm.tools.parts import write_dataset
from stpm.tools.plc_sim import PtyPlc

# tqdm's monitor thread lives as long as the process
tqdm.monitor_interval = 0


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest):
    if "bundles" in request.fixturenames:
        request.getfixturevalue("bundles")  # engines keep pools of threads: let them start before counting
    threads = set(threading.enumerate())
    files = _open_files()
    yield
    deadline = time.monotonic() + 2
    # threads of a library may be about to end, and to close their files
    while (set(threading.enumerate()) - threads or _open_files() - files) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - threads
    assert not _open_files() - files


def _open_files() -> set[str]:
    """The devices, terminals and regular files that are open, and where each handle points."""
    found = set()
    for handle in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(handle)
        except FileNotFoundError:
            continue
        if target.startswith(("/dev/pts", "/dev/ptmx", "/tmp")) and "pytest" not in Path(target).name:
            found.add(f"{handle.name} {target}")
    return found


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of drawn bushings in the MVTec layout: ROOT/bushing."""
    root = tmp_path_factory.mktemp("parts")
    write_dataset(root, "bushing", good=16, test=4)
    return root


@pytest.fixture(scope="session")
def recipe(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Options of a small and short training."""
    work = tmp_path_factory.mktemp("work")
    return f"--category bushing --data {parts} --teacher builtin --epochs 12 --batch 4 --size 128 --work {work}"


@pytest.fixture(scope="session")
def bundles(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """fp32, fp16 and int8 bundles of one student; made by stpm-build itself."""
    out = tmp_path_factory.mktemp("bundles")
    made = {}
    for precision in ("fp32", "fp16", "int8"):
        words = f"--engine {precision} {recipe} --qad-epochs 1 --max-drop 1,1,1 --out {out / precision}"
        assert build_main(words.split()) == 0
        made[precision] = open_bundle(out / precision)
    return made


@pytest.fixture(scope="session")
def trained(recipe: str, bundles: dict[str, Bundle]) -> str:
    """The options that give the student of `bundles` without training it again."""
    return recipe


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The CUDA kernels, compiled for the CPU."""
    file = tmp_path_factory.mktemp("kernels") / "libkernels.so"
    return Library(build("library.cpp", file, "-fPIC", "-shared", "-DSTPM_FIBERS"))


@pytest.fixture(scope="session")
def compiled(
    bundles: dict[str, Bundle], library: Library, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Bundle]:
    """The bundles with a TensorRT engine for a pretended GPU, made by stpm-compile itself."""
    made = {}
    for precision, bundle in bundles.items():
        folder = tmp_path_factory.mktemp("compiled")
        shutil.copytree(bundle.path, folder / precision)
        with pretended(Machine(library), folder):
            words = f"--bundle {folder / precision} --work {folder / 'work'} --engine-batch 2"
            assert compile_main(words.split()) == 0
        made[precision] = open_bundle(folder / precision)
    return made


@pytest.fixture
def bundle(bundles: dict[str, Bundle]) -> Bundle:
    return bundles["int8"]


@pytest.fixture(scope="session")
def float_graph() -> onnx.ModelProto:
    """Two pyramids of fresh weights and the head, for 64×64."""
    method = Stpm()
    teacher, student = method.new_student(0), method.new_student(1)
    for pyramid in (teacher, student):  # biases that are not all zero
        for module in pyramid.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.bias, -0.2, 0.5)
    return export_graph(method.graph(teacher, student, 64, 64), Preprocess(64, 64))


@pytest.fixture(scope="session")
def int8_graph(float_graph: onnx.ModelProto) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    # as different as those of a teacher and a student are
    ranges = {name: float(random.uniform(1, 6)) for name in activations(float_graph)}
    return quantise(float_graph, ranges)


@pytest.fixture(scope="session")
def graphs(float_graph: onnx.ModelProto, int8_graph: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
    """The same in every precision."""
    some = [name for name in convolutions(float_graph) if name.endswith("/conv1/Conv")]
    stems_float = [name for name in some if "layer" not in name]
    ranges = dict.fromkeys(activations(float_graph), 4.0)
    mixed = quantise(float_graph, ranges, in_float=stems_float[:1])
    return {
        "fp32": float_graph,
        "fp16": to_fp16(float_graph),
        "int8": int8_graph,
        "one stem in fp16": to_fp16(mixed, {stems_float[0]}),
    }


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 30 MB: one copy of the fp32 graph fits, its bundle does not."""
    point = tmp_path / "small"
    point.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(point)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield point
    for count in counts(point):  # of a journal that could not be written to its end
        count.unlink()
    gc.collect()  # OpenVINO closes the file that it could not finish when the error is forgotten
    subprocess.run(["umount", str(point)], check=True)


@pytest.fixture
def cable():
    """A serial cable between the line (`ours`) and a PLC (`theirs`)."""
    with PtyCable() as cable:
        yield cable


@pytest.fixture
def plc(cable):
    """A PLC that speaks the ASCII protocol, at the other end of it."""
    with PtyPlc(device=cable.theirs) as plc:
        yield plc


@pytest.fixture
def lines():
    """Makes lines with a journal, `journal_line.Line`, that are closed in the end."""
    made = []

    def make(*arguments, **settings):
        made.append(Line(*arguments, **settings))
        return made[-1]

    yield make
    for line in made:
        line.close()
        for count in counts(line.folder):  # whose end no journal has seen
            count.unlink()
