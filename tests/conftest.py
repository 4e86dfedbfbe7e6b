"""Shared fixtures. Every test fails that leaves a thread or an open file behind."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from cuda_on_cpu.driver import Machine
from cuda_on_cpu.library import Library, build
from cuda_on_cpu.pretend import pretended
from tqdm import tqdm

from stpm.build.cli import build_main
from stpm.build.gpu.cli import main as compile_main
from stpm.edge.bundle import Bundle, open_bundle
from stpm.tools.parts import write_dataset

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
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
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
def bundles(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """fp32, fp16 and int8 bundles of one student, trained for two epochs only; made by stpm-build itself."""
    out = tmp_path_factory.mktemp("bundles")
    made = {}
    for precision in ("fp32", "fp16", "int8"):
        words = (
            f"--engine {precision} --category bushing --data {parts} --teacher builtin --epochs 2 --batch 8 "
            f"--qad-epochs 1 --max-drop 1,1,1 --work {out / 'work'} --out {out / precision}"
        )
        assert build_main(words.split()) == 0
        made[precision] = open_bundle(out / precision)
    return made


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
