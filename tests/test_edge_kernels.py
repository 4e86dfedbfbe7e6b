"""The kernels against the definitions in edge/preprocess.py and edge/score.py: on the CPU always, on a GPU if any."""

import shutil
import subprocess

import numpy as np
import pytest
from cuda_on_cpu.library import Host, build
from gpu.card import card, reason

from stpm.edge.errors import RegionError
from stpm.edge.kernels import launches
from stpm.edge.kernels.launches import CALL, FINDING, FP16, FP32, INT8, MACROS, SOURCE, Features, Resize, Tap
from stpm.edge.preprocess import Preprocess
from stpm.edge.score import anomaly_map, level_map

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 110, 120)


@pytest.fixture(params=["cpu", "gpu"])
def device(request):
    if request.param == "cpu":
        return Host(request.getfixturevalue("library"))
    if reason():
        pytest.skip(reason())
    return card()


def call(device, frames=None, threshold=0.0):
    values = np.zeros(1, CALL)
    values["threshold"] = threshold
    if frames is not None:
        values["frame"] = device.put(frames)
        values["pitch"], values["stride"] = frames.strides[-3], frames[0].nbytes
    return device.put(values)


# preprocess


def run_preprocess(device, spec, frames, half=False):
    resize = Resize.of(spec, *frames.shape[1:3])
    rows, columns = resize.placed(device.put)
    tensor = device.put(np.full((len(frames), 3, spec.height, spec.width), 7, np.float16 if half else np.float32))
    device.run(
        launches.preprocess(spec, rows, columns, resize.half_up, call(device, frames), tensor, half, len(frames))
    )
    return device.get(tensor)


def grey(tensor, spec):
    """The tensor back in grey levels of 0 to 255, B, G, R."""
    mean, std = (np.asarray(each, np.float32)[None, :, None, None] for each in (spec.mean, spec.std))
    return ((tensor.astype(np.float32) * std + mean) * 255)[:, ::-1]


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# frame height and width, region, network height and width
EXACT = {
    "as it is": (256, 256, None, 256, 256),
    "halved, where OpenCV rounds up": (128, 96, None, 64, 48),
    "quartered": (128, 128, None, 32, 32),
    "other in each direction": (96, 256, None, 48, 32),
    "odd output": (21, 35, None, 7, 5),
    "region": (80, 90, (3, 5, 64, 64), 32, 32),
    "constant rows": (1, 70, None, 1, 35),
}
CLOSE = {
    "odd factor": (301, 223, None, 64, 48),
    "hardly smaller": (65, 67, None, 64, 64),
    "enlarged": (20, 30, None, 64, 64),
    "enlarged a little": (60, 63, None, 64, 64),
    "enlarged in one direction": (40, 200, None, 64, 64),
    "one pixel": (1, 1, None, 16, 16),
    "region of an odd frame": (97, 131, (7, 9, 83, 71), 31, 33),
}


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_preprocess_is_the_definition(device, case):
    frame_height, frame_width, roi, height, width = case
    spec = Preprocess(height, width, roi)
    frames = noise((2, frame_height, frame_width, 3))
    found = run_preprocess(device, spec, frames)
    wanted = np.concatenate([spec(frame) for frame in frames])
    np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.parametrize("case", CLOSE.values(), ids=CLOSE)
def test_preprocess_is_within_one_grey_level_of_opencv(device, case):
    """OpenCV adds in another order, so that a mean of almost x.5 may round the other way; and it drops bits where it
    enlarges."""
    frame_height, frame_width, roi, height, width = case
    spec = Preprocess(height, width, roi)
    frames = noise((2, frame_height, frame_width, 3))
    found = grey(run_preprocess(device, spec, frames), spec)
    wanted = np.stack([spec.resize(frame) for frame in frames]).transpose(0, 3, 1, 2).astype(np.float32)
    difference = np.abs(found - wanted)
    assert difference.max() < 1.01
    enlarged = min(spec.region(*frames.shape[1:3])[2:]) < 64
    assert (difference > 0.01).mean() < (0.13 if enlarged and height == 64 else 0.005)


@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_preprocess_keeps_a_flat_picture_flat(device, value):
    spec = Preprocess(64, 64)
    frames = np.full((1, 333, 217, 3), value, np.uint8)
    np.testing.assert_allclose(run_preprocess(device, spec, frames), spec(frames[0]), atol=2e-6)


def test_preprocess_writes_half_precision(device):
    spec = Preprocess(32, 32)
    frames = noise((3, 64, 64, 3))
    found = run_preprocess(device, spec, frames, half=True)
    wanted = np.concatenate([spec(frame) for frame in frames])
    np.testing.assert_array_equal(found, wanted.astype(np.float16))


def test_preprocess_reads_frames_with_padded_rows(device):
    spec = Preprocess(16, 16)
    padded = noise((1, 32, 40, 3))
    values = np.zeros(1, CALL)
    values["frame"], values["pitch"] = device.put(padded), padded.strides[1]
    resize = Resize.of(spec, 32, 32)
    axes = resize.placed(device.put)
    tensor = device.put(np.zeros((1, 3, 16, 16), np.float32))
    device.run(launches.preprocess(spec, *axes, resize.half_up, device.put(values), tensor, False, 1))
    np.testing.assert_allclose(device.get(tensor), spec(padded[0, :, :32]), atol=2e-6)


def test_a_region_outside_the_frame_is_refused_before_the_launch():
    with pytest.raises(RegionError, match="does not lie inside a frame of 30×20 pixels"):
        Resize.of(Preprocess(roi=(0, 0, 31, 20)), 20, 30)


def test_the_weights_of_every_output_pixel_add_up_to_one():
    for source, target in ((301, 64), (20, 64), (64, 64), (1, 5), (4096, 7)):
        spec = Preprocess(target, target)
        for axis in (Resize.of(spec, source, source).rows, Resize.of(spec, source, source).columns):
            sums = np.add.reduceat(axis.weight, axis.offset[:-1])
            np.testing.assert_allclose(sums, 1, atol=1e-5)
            assert axis.start.min() >= 0
            assert (axis.start + np.diff(axis.offset)).max() <= source


# match


def stored(features, kind, vector, scale=1.0):
    """images × channels × height × width as one of TensorRT's formats; unused channels are filled with rubbish."""
    images, channels, height, width = features.shape
    vectors = -(-channels // vector)
    if kind == INT8:
        features = np.clip(np.rint(features / scale), -128, 127)
    padded = np.full((images, vectors * vector, height, width), 99, launches.DTYPES[kind])
    padded[:, :channels] = features
    return np.ascontiguousarray(padded.reshape(images, vectors, vector, height, width).transpose(0, 1, 3, 4, 2))


def read_back(memory, kind, channels, scale=1.0):
    """The features that a kernel sees in this memory, float32 images × channels × height × width."""
    images, vectors, height, width, vector = memory.shape
    plain = memory.transpose(0, 1, 4, 2, 3).reshape(images, vectors * vector, height, width)[:, :channels]
    return plain.astype(np.float32) * np.float32(scale)


def run_match(device, taps):
    """`taps` are pairs of (memory, kind, vector, scale, channels); the level maps, float32 images × h × w each."""
    images = len(taps[0][0][0])
    made = []
    for teacher, student in taps:
        memory, _, _, _, channels = teacher
        height, width = memory.shape[2:4]
        levels = device.put(np.full((images, height, width), -7, np.float32))
        t, s = (Features(device.put(m), kind, vector, scale) for m, kind, vector, scale, _ in (teacher, student))
        made.append(Tap(t, s, levels, channels, height, width))
    findings = device.put(np.ones(images, FINDING))
    device.run(launches.match(made, findings, images))
    return [device.get(tap.levels) for tap in made], device.get(findings)


def positive(shape, seed):
    """Features as after a ReLU: about half of them 0."""
    return np.maximum(np.random.default_rng(seed).normal(0, 1, shape), 0).astype(np.float32)


LAYOUTS = [(FP32, 1), (FP16, 1), (INT8, 1), (FP32, 32), (FP16, 8), (FP16, 32), (INT8, 32), (INT8, 4), (FP16, 64)]


@pytest.mark.parametrize(("kind", "vector"), LAYOUTS)
@pytest.mark.parametrize(("channels", "height", "width"), [(64, 8, 8), (5, 3, 7), (1, 1, 1), (100, 5, 9), (64, 1, 33)])
def test_match_is_the_definition(device, kind, vector, channels, height, width):
    scale = 0.031 if kind == INT8 else 1.0
    shape = (2, channels, height, width)
    pair = [(stored(positive(shape, seed), kind, vector, scale), kind, vector, scale, channels) for seed in (0, 1)]
    levels, _ = run_match(device, [pair])
    for image in range(2):
        t, s = (read_back(each[0], kind, channels, scale)[image] for each in pair)
        np.testing.assert_allclose(levels[0][image], level_map(t, s), atol=2e-6)


def test_match_takes_all_taps_in_one_launch_each_in_its_own_format(device):
    formats = [
        (64, 16, 16, FP16, 8, 1.0),
        (128, 8, 8, INT8, 32, 0.02),
        (256, 4, 4, FP32, 1, 1.0),
        (512, 2, 2, FP16, 512, 1.0),
    ]
    taps = [
        [
            (stored(positive((3, channels, h, w), seed + number), kind, vector, scale), kind, vector, scale, channels)
            for seed in (0, 10)
        ]
        for number, (channels, h, w, kind, vector, scale) in enumerate(formats)
    ]
    levels, findings = run_match(device, taps)
    for found, (teacher, student) in zip(levels, taps, strict=True):
        for image in range(3):
            t, s = (read_back(memory, kind, c, scale)[image] for memory, kind, _, scale, c in (teacher, student))
            np.testing.assert_allclose(found[image], level_map(t, s), atol=2e-6)
    assert (findings["score"] == 0).all()
    assert (findings["area"] == 0).all()
    assert (findings["right"] == -1).all()


def test_match_takes_a_teacher_and_a_student_in_different_formats(device):
    t, s = positive((1, 64, 4, 4), 0), positive((1, 64, 4, 4), 1)
    pair = [(stored(t, FP16, 64), FP16, 64, 1.0, 64), (stored(s, FP32, 1), FP32, 1, 1.0, 64)]
    levels, _ = run_match(device, [pair])
    np.testing.assert_allclose(levels[0][0], level_map(t[0].astype(np.float16).astype(np.float32), s[0]), atol=2e-6)


def level_of(device, teacher, student, kind=FP32, vector=1):
    pair = [(stored(each, kind, vector), kind, vector, 1.0, each.shape[1]) for each in (teacher, student)]
    return run_match(device, [pair])[0][0]


def test_match_of_zeros(device):
    t, zero = positive((1, 16, 4, 4), 0) + 1, np.zeros((1, 16, 4, 4), np.float32)
    assert (level_of(device, zero, zero) == 0).all()
    np.testing.assert_allclose(level_of(device, t, zero), 1, atol=1e-6)
    np.testing.assert_allclose(level_of(device, t, t), 0, atol=3e-7)
    np.testing.assert_allclose(level_of(device, t, 1000 * t), 0, atol=3e-7)


def test_no_level_is_below_zero(device):
    """`combine` compares the bits of the values, which would put a −1e-8 above everything."""
    t = positive((1, 100, 16, 16), 0)
    for factor in (1, 1.1, 3.7, 1e-3):
        assert not np.signbit(level_of(device, t, np.float32(factor) * t)).any()


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e-3, 1e8, 1e17])
def test_match_of_extremes(device, size):
    t, s = positive((1, 32, 4, 4), 0) * np.float32(size), positive((1, 32, 4, 4), 1)
    np.testing.assert_allclose(level_of(device, t, s)[0], level_map(t[0], s[0]), atol=2e-6)
    np.testing.assert_allclose(level_of(device, t, t)[0], level_map(t[0], t[0]), atol=3e-7)


def test_match_of_the_largest_half(device):
    t, s = np.full((1, 512, 2, 2), 65504, np.float32), positive((1, 512, 2, 2), 1)
    found = level_of(device, t, s, FP16, 8)[0]
    np.testing.assert_allclose(found, level_map(t[0], s[0].astype(np.float16).astype(np.float32)), atol=2e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_match_does_not_lose_a_nan_or_an_overflow(device, bad):
    t, s = positive((1, 16, 4, 4), 0), positive((1, 16, 4, 4), 1)
    t[0, 3, 2, 2] = bad
    s[0, 3, 2, 2] = 1
    found = level_of(device, t, s)[0]
    assert not np.isfinite(found[2, 2])
    assert np.isfinite(np.delete(found.ravel(), 10)).all()


# combine


def run_combine(device, levels, height, width, threshold):
    images = len(levels[0])
    taps = [Tap(Features(0), Features(0), device.put(level), 0, *level.shape[1:]) for level in levels]
    anomaly = device.put(np.full((images, height, width), -7, np.float32))
    mask = device.put(np.full((images, height, width), 7, np.uint8))
    empty = np.zeros(images, FINDING)
    empty["left"] = empty["top"] = np.iinfo(np.int32).max
    empty["right"] = empty["bottom"] = -1
    findings = device.put(empty)
    where = call(device, threshold=threshold)
    device.run(launches.combine(taps, where, anomaly, mask, findings, height, width, images))
    return device.get(anomaly), device.get(mask), device.get(findings)


SIZES = {
    "as in STPM": ((64, 32, 16), (256, 256)),
    "odd": ((7, 5, 3), (45, 67)),
    "one tap": ((8,), (64, 64)),
    "four taps": ((32, 16, 8, 4), (100, 40)),
    "single values": ((1, 1), (5, 3)),
    "smaller than the levels": ((64, 33), (31, 17)),
}


@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES)
def test_combine_is_the_definition(device, case):
    sizes, (height, width) = case
    random = np.random.default_rng(3)
    levels = [random.random((2, size, size + 1 if size > 1 else 1), np.float32) for size in sizes]
    wanted = np.stack([anomaly_map([level[image] for level in levels], height, width) for image in range(2)])
    threshold = float(np.quantile(wanted, 0.97))
    found, mask, findings = run_combine(device, levels, height, width, threshold)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(mask, found > threshold)
    np.testing.assert_array_equal(findings["score"], found.max((1, 2)))
    for image in range(2):
        rows, columns = np.nonzero(mask[image])
        assert findings["area"][image] == len(rows)
        if len(rows):
            box = [findings[name][image] for name in ("left", "top", "right", "bottom")]
            assert box == [columns.min(), rows.min(), columns.max(), rows.max()]


def test_combine_without_anything_above_the_threshold(device):
    _, mask, findings = run_combine(device, [np.full((1, 4, 4), 0.25, np.float32)], 64, 64, 0.25)
    assert findings["area"][0] == 0
    assert findings["score"][0] == 0.25
    assert not mask.any()


@pytest.mark.parametrize("place", [(0, 0), (63, 63), (31, 32), (0, 63)])
def test_combine_finds_a_single_pixel(device, place):
    level = np.zeros((1, 64, 64), np.float32)
    level[0][place] = 1
    _, _, findings = run_combine(device, [level], 64, 64, 0.5)
    assert list(findings[0]) == [1.0, place[1], place[0], place[1], place[0], 1]


def test_combine_does_not_lose_a_nan(device):
    level = np.random.default_rng(0).random((2, 16, 16), np.float32)
    level[1, 3, 3] = np.nan
    _, mask, findings = run_combine(device, [level], 64, 64, 0.5)
    assert np.isfinite(findings["score"][0])
    assert np.isnan(findings["score"][1])
    assert mask[1].any()


def test_the_head_is_the_definition(device):
    """match and combine after each other, on features as large as those of a ResNet-18."""
    shapes = [(64, 64), (128, 32), (256, 16)]
    features = [(positive((1, c, n, n), 1), positive((1, c, n, n), 2)) for c, n in shapes]
    pairs = [[(stored(f, FP16, 8), FP16, 8, 1.0, f.shape[1]) for f in pair] for pair in features]
    levels, _ = run_match(device, pairs)
    found, _, findings = run_combine(device, levels, 256, 256, 0.1)
    exact = [[f[0].astype(np.float16).astype(np.float32) for f in pair] for pair in features]
    wanted = anomaly_map([level_map(*pair) for pair in exact], 256, 256)
    np.testing.assert_allclose(found[0], wanted, rtol=2e-5)
    assert findings["score"][0] == pytest.approx(wanted.max(), rel=2e-5)


# the source


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_for_the_gpu(architecture, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH: the kernels cannot be compiled for a GPU")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    if f"sm_{architecture}" not in known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    macros = [f"-D{name}={value}" for name, value in MACROS.items()]
    command = [nvcc, "-cubin", f"-arch=sm_{architecture}", "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v"]
    result = subprocess.run(
        [*command, *macros, str(SOURCE), "-o", str(tmp_path / "kernels.cubin")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for kernel in launches.KERNELS:
        assert f"Compiling entry function '{kernel}'" in result.stderr
    # a register that spills costs more than the kernel does
    assert result.stderr.count("0 bytes spill stores, 0 bytes spill loads") == len(launches.KERNELS)


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_kernels_are_clean_under_sanitizers(sanitizer, tmp_path):
    program = build("sanitize.cpp", tmp_path / "sanitize", f"-fsanitize={sanitizer}", "-g", "-pthread")
    result = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "all launches done" in result.stdout


def test_parameters_are_laid_out_as_in_the_source(tmp_path):
    source = tmp_path / "layout.cpp"
    lines = []
    for kernel, struct in (
        ("stpm_preprocess", "StpmPreprocess"),
        ("stpm_match", "StpmMatch"),
        ("stpm_combine", "StpmCombine"),
    ):
        dtype = launches.PARAMETERS[kernel]
        lines += [f"check({struct}, {name}, {dtype.fields[name][1]})" for name in dtype.names]
        lines.append(f"static_assert(sizeof({struct}) == {dtype.itemsize});")
    for struct, dtype in (("StpmCall", CALL), ("StpmFinding", FINDING)):
        lines += [f"check({struct}, {name}, {dtype.fields[name][1]})" for name in dtype.names]
        lines.append(f"static_assert(sizeof({struct}) == {dtype.itemsize});")
    source.write_text(
        '#include <cstddef>\n#include "cuda_on_cpu.h"\n#include "kernels.cu"\n'
        "#define check(type, name, at) static_assert(offsetof(type, name) == at);\n"
        + "\n".join(lines)
        + "\nint main() {}\n"
    )
    build(str(source), tmp_path / "layout")


def test_a_launch_with_a_struct_of_another_size_is_refused(library):
    launch = launches.Launch("stpm_match", (1, 1, 1), (1, 1, 1), b"short")
    with pytest.raises(AssertionError, match="status -1"):
        library.run(launch)


def test_the_shim_stops_at_a_barrier_that_not_all_threads_reach(tmp_path):
    source = tmp_path / "uneven.cpp"
    source.write_text(
        '#include "cuda_on_cpu.h"\nvoid kernel(int) { if (threadIdx.x < 3) __syncthreads(); }\n'
        "int main() { cpu::launch(kernel, {1, 1, 1}, {8, 1, 1}, 0); }\n"
    )
    for flags in (["-DSTPM_FIBERS"], ["-pthread"]):
        program = build(str(source), tmp_path / "uneven", *flags)
        result = subprocess.run([program], capture_output=True, text=True, timeout=60)
        assert result.returncode != 0
        assert "a thread ended while others wait" in result.stderr
