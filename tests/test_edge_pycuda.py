"""The real pycuda, where it is installed, on a libcuda that pretends: its calls are used as it wants them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_cpu.library import build

LIFE = """
import ctypes, sys
import numpy as np
from stpm.edge.engine.cuda import Gpu
from stpm.edge.errors import DeviceError
from stpm.edge.kernels import launches
from stpm.edge.kernels.launches import CALL, FINDING, Features, Resize, Tap
from stpm.edge.preprocess import Preprocess
from stpm.edge.score import anomaly_map, level_map

def life():
    gpu = Gpu()
    print(gpu.name, gpu.sm, gpu.driver)
    gpu.load(b"\\x7fELF")
    spec = Preprocess(64, 64)
    random = np.random.default_rng(0)
    frames = [random.integers(0, 256, (128, 128, 3), np.uint8) for _ in range(2)]
    pixels, call = gpu.shared((128, 128, 3), np.uint8), gpu.shared((1,), CALL)
    tensor, findings = gpu.staged((1, 3, 64, 64), np.float32), gpu.shared((1,), FINDING)
    resize = Resize.of(spec, 128, 128)
    axes = resize.placed(gpu.constant)
    start = launches.preprocess(spec, *axes, resize.half_up, call.device, tensor.device, False, 1)
    features = [random.random((1, 16, 8, 8), np.float32) for _ in range(2)]
    teacher, student = (Features(gpu.constant(each)) for each in features)
    tap = Tap(teacher, student, gpu.allocate(256), 16, 8, 8)
    anomaly, mask = gpu.shared((1, 64, 64), np.float32), gpu.allocate(64 * 64)
    match = launches.match([tap], findings.device, 1)
    combine = launches.combine([tap], call.device, anomaly.device, mask, findings.device, 64, 64, 1)

    def enqueue():
        gpu.send(pixels)
        gpu.send(call)
        for launch in (start, match, combine):
            gpu.launch(launch)
        for shared in (tensor, anomaly, findings):
            gpu.fetch(shared)

    graph = gpu.captured(enqueue)
    wanted = anomaly_map([level_map(*(each[0] for each in features))], 64, 64)
    for frame, threshold in zip(frames, (0.0, float(wanted.mean())), strict=True):
        np.copyto(pixels.host, frame)
        call.host[0] = (pixels.device, 384, 0, threshold, 0)
        gpu.replay(graph)
        gpu.wait()
        np.testing.assert_allclose(tensor.host, spec(frame), atol=2e-6)
        np.testing.assert_allclose(anomaly.host[0], wanted, atol=2e-6)
        assert findings.host["area"][0] == (anomaly.host > threshold).sum()
    times = gpu.timed({"one": lambda: gpu.launch(match), "two": lambda: gpu.launch(combine)})
    assert set(times) == {"one", "two"} and all(0 <= value < 1e4 for value in times.values())
    try:
        gpu.allocate(1 << 50)
        raise AssertionError("so much memory")
    except DeviceError as error:
        print(error)
    gpu.close()
    gpu.close()

for _ in range(3):
    life()
left = ctypes.CDLL("libcuda.so.1").stpm_left()
assert left == 0, left
print("done")
"""


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory) -> Path:
    """A folder with libcuda.so.1: what tests/cuda_on_cpu/libcuda.cpp has, and a refusal for all else pycuda names."""
    package = importlib.util.find_spec("pycuda")
    if package is None:
        pytest.skip("pycuda is not installed: pip install pycuda takes ten minutes and the CUDA toolkit")
    (module,) = Path(package.submodule_search_locations[0]).glob("_driver*.so")
    folder = tmp_path_factory.mktemp("libcuda")
    first = build("libcuda.cpp", folder / "libcuda.so.1", "-fPIC", "-shared", "-DSTPM_FIBERS", "-Wno-unused-parameter")

    def symbols(file: Path, kind: str) -> set[str]:
        words = subprocess.run(["nm", "-D", kind, file], capture_output=True, text=True, check=True).stdout.split()
        return {word for word in words if word.startswith("cu")}

    missing = symbols(module, "--undefined-only") - symbols(first, "--defined-only")
    refusals = "\n".join(f'extern "C" int {name}() {{ return 801; }}' for name in sorted(missing))
    (folder / "whole.cpp").write_text(f'#include "libcuda.cpp"\n{refusals}\n')
    flags = ("-fPIC", "-shared", "-DSTPM_FIBERS", "-Wno-unused-parameter", "-Wl,-soname,libcuda.so.1")
    build(str(folder / "whole.cpp"), first, *flags)
    return folder


@pytest.mark.parametrize("board", ["card", "jetson"])
def test_a_life_with_the_real_pycuda(libcuda, board):
    environment = (
        os.environ | {"LD_LIBRARY_PATH": str(libcuda)} | ({"STPM_INTEGRATED": "1"} if board == "jetson" else {})
    )
    result = subprocess.run([sys.executable, "-c", LIFE], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "libcuda of the tests 8.7 12.6"
    assert "out of GPU memory: cannot allocate 1073741824.0 MiB, 3 of 8 MiB are free" in result.stdout
    assert result.stdout.splitlines()[-1] == "done"
    assert result.stderr == ""
