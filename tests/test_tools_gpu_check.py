"""gpu_check.py without a GPU: every check on a pretended one, every reason to skip, the file, and the exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from cuda_on_cpu.driver import Machine
from gpu.several import several

from stpm.edge.bundle import MANIFEST, open_bundle
from stpm.edge.manifest import encode
from stpm.tools import gpu_check
from stpm.tools.gpu import base, kernels
from stpm.tools.gpu import rivals as rival_engines
from stpm.tools.gpu.base import FailedError, Job, Result, Sizes, SkippedError, interleaved
from stpm.tools.gpu.engines import VARIANTS, engines, int8_against_fp16, with_plan
from stpm.tools.gpu.inspector import findings, inspector, layers_of, untold
from stpm.tools.gpu.kernels import against_reference
from stpm.tools.gpu.rivals import rivals
from stpm.tools.gpu.times import graph_latency, times

ROOT = Path(__file__).resolve().parents[1]
SMALL = Sizes(
    taps=((32, 4), (64, 2)),
    network=16,
    batches=(1, 2),
    frames=((40, 30), (64, 48)),
    beyond_cache=100_000,
    repeats=1,
    warm_up=1,
)


def job_of(folder, *bundles, **fields):
    (folder / "job").mkdir()
    words = {"runs": 2, "sizes": SMALL, "device": "cpu", "provider": "CPUExecutionProvider"} | fields
    return Job([bundle.path for bundle in bundles], folder=folder / "job", work=folder / "work", **words)


@pytest.fixture
def machine(request, tmp_path):
    """A pretended GPU without kernels: everything is called and nothing computed, so it takes no time."""
    machine = Machine()
    with several(machine, tmp_path):
        yield machine
    assert machine.left == ""


@pytest.fixture
def computing(library, tmp_path):
    machine = Machine(library)
    with several(machine, tmp_path) as tensorrt:
        yield tensorrt
    assert machine.left == ""


@pytest.fixture
def tolerant(machine, bundles, tmp_path):
    """Bundles that let a GPU pass which computes nothing: its answers are 0, so they are wrong by 100 %."""
    made = {}
    for precision in ("fp16", "int8"):
        copy, manifest = tmp_path / "tolerant" / precision, bundles[precision].manifest
        shutil.copytree(bundles[precision].path, copy)
        golden = msgspec.structs.replace(manifest.golden, tolerance=2.0)
        (copy / MANIFEST).write_bytes(encode(msgspec.structs.replace(manifest, golden=golden)))
        made[precision] = open_bundle(copy)
    return made


# the kernels


def test_kernels_are_compared_with_the_definition(computing, tmp_path):
    result = against_reference(job_of(tmp_path))
    assert set(result.figures["largest_difference"]) == {"preprocess", "match", "combine"}
    for name, found in result.figures["largest_difference"].items():
        assert found <= result.figures["tolerance"][name]
    assert "match" in result.line


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("level_map", lambda t, s: np.zeros(t.shape[1:], np.float32) + 0.5),
        ("anomaly_map", lambda levels, height, width: np.full((height, width), np.nan, np.float32)),
    ],
)
def test_kernels_that_are_not_the_definition_fail(computing, tmp_path, monkeypatch, name, wrong):
    monkeypatch.setattr(kernels, name, wrong)
    with pytest.raises(FailedError, match=r"differ from edge/score\.py") as caught:
        against_reference(job_of(tmp_path))
    assert caught.value.figures["largest_difference"]


def test_a_finding_that_is_not_that_of_the_map_fails(computing, tmp_path, monkeypatch):
    combine, set_threshold = kernels.launches.combine, kernels.Head.set_threshold
    monkeypatch.setattr(kernels.launches, "combine", lambda *words: combine(*words[:-3], 8, *words[-2:]))
    with pytest.raises(FailedError, match="the finding is not that of the map, on fp32"):
        against_reference(job_of(tmp_path))
    monkeypatch.setattr(kernels.launches, "combine", combine)
    monkeypatch.setattr(kernels.Head, "set_threshold", lambda self, value: set_threshold(self, 2 * value))
    with pytest.raises(FailedError, match="the finding is not that of the map, on fp32"):
        against_reference(Job([], 1, tmp_path / "job", tmp_path))


def test_without_a_compiler_the_kernels_are_skipped(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("stpm.build.gpu.kernels.TOOLKIT", "/nowhere")
    for check in (against_reference, times, graph_latency):
        with pytest.raises(SkippedError, match="wanted nvcc"):
            check(Job([], 1, tmp_path, tmp_path))


def test_the_head_is_timed_against_a_copy(machine, tmp_path):
    figures = times(job_of(tmp_path)).figures
    # every pretended graph takes 0.25 ms; four copies of 100 kB, read and written
    assert figures.copy_gb_s == pytest.approx(2 * 100_000 * 4 / 250e-6 / 1e9, abs=0.1)
    assert [(each.features, each.images) for each in figures.head] == [
        (name, images) for images in (1, 2) for name in ("fp32", "fp16 HWC8", "int8 CHW32")
    ]
    first = figures.head[0]
    # two networks' features, level maps written and read, map and mask
    assert first.bytes == 2 * 4 * (32 * 16 + 64 * 4) + 2 * 4 * (16 + 4) + 16 * 16 * 5
    assert first.ratio == pytest.approx(first.cold_us / first.floor_us)
    assert first.floor_us == pytest.approx(first.bytes / (figures.copy_gb_s * 1e3), rel=0.02)
    assert figures.head[3].bytes == 2 * first.bytes
    assert [each.frame for each in figures.preprocess] == ["40×30", "64×48"]
    assert figures.preprocess[0].bytes == 40 * 30 * 3 + 3 * 16 * 16 * 2
    msgspec.json.encode(figures)


def test_cold_features_are_more_than_a_cache_holds(machine, tmp_path):
    times(job_of(tmp_path))
    # fp32 features of one image take 7.6 kB, so it takes 14 sets of them
    starts = {launch.parameters for launch in machine.launches if launch.kernel == "stpm_match"}
    assert len(starts) > 14


def test_the_graph_is_captured_once_and_replayed_for_every_frame(machine, tmp_path):
    result = graph_latency(job_of(tmp_path))
    assert set(result.figures.images) == {"1", "2"}
    assert all(found.count == 2 for found in result.figures.images.values())
    assert machine.calls.count("cuStreamBeginCapture_v2") == 2
    assert machine.calls.count("cuGraphLaunch") == 2 * (1 + 2 + 1)  # warm-up, runs, and one by the GPU's clock
    assert "p50" in result.line


# TensorRT


def test_an_engine_is_made_tested_and_timed(computing, bundles, tmp_path):
    job = job_of(tmp_path, bundles["fp16"], sizes=Sizes(batches=(1,), warm_up=0), runs=1)
    found = engines(job).figures.measured[0]
    assert 0 < found.deviation <= 0.01
    assert found.engine["tensorrt"].startswith("10.3")
    assert (found.inspect.count, found.infer["1"].count, found.per_image_ms) == (1, 1, found.infer["1"].p50)
    assert "tensorrt" not in open_bundle(bundles["fp16"].path).manifest.engines  # a copy got the plan


def test_a_variant_that_is_refused_does_not_end_the_check(tolerant, tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "int8 stem", {"dla_core": 0})
    figures = engines(job_of(tmp_path, tolerant["int8"])).figures
    assert [each.variant for each in figures.measured] == ["plain", "stems apart", "int8 features"]
    (why,) = figures.refused.values()
    assert "DLA" in why
    monkeypatch.setitem(VARIANTS, "plain", {"dla_core": 0})
    (tmp_path / "again").mkdir()
    with pytest.raises(base.StpmError, match="DLA"):
        engines(job_of(tmp_path / "again", tolerant["int8"]))


def test_bundles_are_compiled_in_every_way(tolerant, tmp_path):
    result = engines(job_of(tmp_path, tolerant["fp16"], tolerant["int8"]))
    assert [(each.precision, each.variant) for each in result.figures.measured] == [
        ("fp16", "plain"),
        ("fp16", "stems apart"),
        ("int8", "plain"),
        ("int8", "stems apart"),
        ("int8", "int8 stem"),
        ("int8", "int8 features"),
    ]
    assert result.figures.refused == {}
    for each in result.figures.measured:
        assert each.deviation == pytest.approx(1)
        assert set(each.infer) == {"1", "2"}
        assert each.per_image_ms == each.infer["2"].p50 / 2
        assert each.inside == {"preprocess": 0.25, "pyramids": 0.25, "head": 0.25}
        assert each.inspect.count == 2
    assert "int8 int8 features: inspect p50" in result.line
    msgspec.json.encode(result.figures)


def test_a_plan_that_fails_its_self_test_fails_the_check(machine, bundles, tmp_path):
    """This GPU computes nothing. The bundle is not compiled a second time."""
    job = job_of(tmp_path, bundles["fp16"])
    check, reason = base.ended("engines", engines, job, lambda: 0.0)
    assert (check.state, check.figures) == ("failed", None)
    assert "fails its self test" in reason
    before = len(machine.calls)
    with pytest.raises(base.StpmError, match="fails its self test"):
        with_plan(job, bundles["fp16"].path)
    assert len(machine.calls) == before


def test_int8_is_compared_with_fp16_in_turn(tolerant, tmp_path):
    job = job_of(tmp_path, tolerant["fp16"], tolerant["int8"])
    ratio = int8_against_fp16(job).figures
    assert list(ratio.latency) == ["fp16 inspect", "fp16 infer", "int8 inspect", "int8 infer"]
    assert ratio.inspect == ratio.latency["fp16 inspect"].p50 / ratio.latency["int8 inspect"].p50
    assert ratio.images == 2


def test_reasons_why_tensorrt_is_not_checked(bundles, tmp_path, monkeypatch):
    job = job_of(tmp_path)
    for check in (engines, int8_against_fp16, inspector):
        with pytest.raises(SkippedError, match=r"needs an? .*bundle"):
            check(job)
    job.bundles = [bundles["int8"].path]
    with pytest.raises(SkippedError, match="an fp16 and an int8 bundle"):
        int8_against_fp16(job)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for check in (engines, inspector):
        with pytest.raises(SkippedError, match="needs tensorrt, which cannot be loaded"):
            check(job)


# the inspector


def conv(name, *inputs, output, **fields):
    """As TensorRT 8.6 tells a convolution with its residual: name, format and size of each tensor."""
    tensors = [{"Name": each, "Dimensions": [1, 64, 64, 64], "Format/Datatype": kind} for each, kind in inputs]
    made = {"Name": output[0], "Dimensions": [1, 64, 64, 64], "Format/Datatype": output[1]}
    return {
        "Name": name,
        "LayerType": "CaskConvolution",
        "Inputs": tensors,
        "Outputs": [made],
        "ParameterType": "Convolution",
        **fields,
    }


I8 = "Thirty-two wide channel vectorized row major Int8 format"
F16 = "Channel major FP16 format where channel % 8 == 0"
F32 = "Row major linear FP32"
CLEAN = [
    conv("/teacher/layer1.0/conv1/Conv + /teacher/layer1.0/relu/Relu", ("a", I8), output=("b", I8)),
    conv(
        "/teacher/layer1.0/conv2/Conv + /teacher/layer1.0/Add + /teacher/layer1.0/relu_1/Relu",
        ("b", I8),
        ("a", I8),
        output=("c", I8),
    ),
    conv("/teacher/layer1.1/conv2/Conv + PWN(/Add, /Relu)", ("c", I8), output=("teacher/layer1", F32)),
]


def tensor(name, kind):
    return {"Name": name, "Location": "Device", "Dimensions": [1, 64, 64, 64], "Format/Datatype": kind}


def layer(name, kind, source, target, **fields):
    return {"Name": name, "LayerType": kind, "Inputs": [tensor(*source)], "Outputs": [tensor(*target)], **fields}


REFORMAT_86 = layer(
    "Reformatting CopyNode for Input Tensor 0 to /teacher/layer1.0/conv2/Conv",
    "Reformat",
    ("b", "Four wide channel vectorized row major Int8 format"),
    ("Reformatted b", I8),
    ParameterType="Reformat",
    Origin="REFORMAT",
    TacticValue="0x0",
)
BAD = {
    "a float Add of 8.6": (
        layer(
            "PWN(PWN(/teacher/layer1.0/relu_1/Relu), /teacher/layer1.0/Add)",
            "PointWiseV2",
            ("x", F32),
            ("y", F32),
            ParameterType="PointWise",
            ParameterSubType="PointWiseExpression",
            Operations=[
                "const auto var0 = pwgen::iPlus(arg0, arg1);",
                "const auto var1 = pwgen::iMax(var0, literal0);",
            ],
        ),
        "adds in float",
    ),
    "known by its operations only": (
        layer(
            "PWN(x)", "PointWiseV2", ("x", F16), ("y", F16), Operations=["const auto v = pwgen::iPlus(arg0, arg1);"]
        ),
        "adds in float",
    ),
    "an ElementWise": (
        layer("(Unnamed Layer* 9)", "ElementWise", ("x", F32), ("y", F32), ParameterSubType="SUM"),
        "adds in float",
    ),
    "a generated kernel of 10": (
        layer("__myl_CastCastAddMax_myl0_12", "kgen", ("x", "Half"), ("y", "Half")),
        "adds in float",
    ),
    "known by its origin": (
        layer("__mye123", "kgen", ("x", "Float"), ("y", "Int8"), Metadata="[ONNX Layer: /student/layer2.0/Add]"),
        "adds in float",
    ),
}


def test_a_clean_int8_engine_gives_no_finding():
    assert findings(CLEAN) == []
    assert untold(CLEAN) == 0


@pytest.mark.parametrize(("bad", "sentence"), BAD.values(), ids=BAD)
def test_a_float_add_is_found(bad, sentence):
    assert findings([*CLEAN, bad]) == [f"{bad['Name']} {sentence}"]


def test_a_shortcut_in_float_is_found():
    bad = conv("/student/layer1.0/conv2/Conv + /student/layer1.0/Add", ("b", I8), ("s", F32), output=("z", I8))
    assert findings([bad]) == [f"{bad['Name']} is an INT8 convolution and adds a shortcut in float"]
    scale = {"Name": "scale", "Dimensions": [64], "Format/Datatype": "Float"}
    bad["Inputs"][1] = scale
    assert findings([bad]) == []


def test_a_reformat_between_int8_convolutions_is_found():
    first, second, last = CLEAN
    after = conv(second["Name"], ("Reformatted b", I8), output=("c", I8))
    assert findings([first, REFORMAT_86, after, last]) == [
        f"{REFORMAT_86['Name']} reformats INT8 between two convolutions"
    ]
    assert findings([REFORMAT_86, after]) == []  # what made its input is no convolution
    assert findings([first, REFORMAT_86]) == []
    to_float = {**REFORMAT_86, "Outputs": [tensor("Reformatted b", F32)]}
    assert findings([first, to_float, after]) == []  # a tap's copy in float is meant
    assert findings([{"Name": "Reformatting CopyNode for Input Tensor 0 to /Conv", "LayerType": "Reformat"}]) == []


def test_what_is_no_float_add():
    for innocent in (
        layer("/Add", "ElementWise", ("x", I8), ("y", "Int8")),
        layer("Address", "Shuffle", ("x", F32), ("y", F32)),
        layer("resum", "Shuffle", ("x", F32), ("y", F32)),
        layer("padding", "Padding", ("x", F32), ("y", F32)),
        layer("/Add", "ElementWise", ("x", "?"), ("y", "")),
    ):
        assert findings([innocent]) == []


def test_layers_of_which_little_is_told_are_counted():
    assert findings(["conv1 + relu", "/teacher/layer1.0/Add"]) == []
    assert untold(["conv1 + relu", {"Name": "x"}, {"Name": "y", "Inputs": None}, *CLEAN]) == 3


class Inspector:
    execution_context = None
    error_recorder = None
    answer = ""

    def get_engine_information(self, format):
        assert format.name == "JSON"
        assert self.execution_context is not None, "types are told for a given size only"
        return self.answer


@pytest.fixture
def answers(tolerant, monkeypatch):
    """What the inspector of the pretended TensorRT will say."""
    behaviour = sys.modules["tensorrt"].__surface__.behaviour

    def say(text):
        monkeypatch.setattr(Inspector, "answer", text)
        monkeypatch.setattr(
            behaviour["ICudaEngine"], "create_engine_inspector", lambda self: Inspector(), raising=False
        )

    return say


def test_the_inspector_is_asked(answers, tolerant, tmp_path):
    job = job_of(tmp_path, tolerant["fp16"], tolerant["int8"])
    answers(json.dumps({"Layers": CLEAN, "Bindings": ["input"]}))
    (figures,) = inspector(job).figures
    assert (figures.bundle, figures.layers, figures.kinds) == (str(job.bundles[1]), 3, {"CaskConvolution": 3})
    assert figures.findings == []
    answers(json.dumps({"Layers": [*CLEAN, next(iter(BAD.values()))[0]], "Bindings": []}))
    with pytest.raises(FailedError, match="1 findings, the first: PWN") as caught:
        inspector(job)
    assert caught.value.figures[0].layers == 4


def test_a_plan_that_tells_names_only_is_no_proof(answers, tolerant, tmp_path):
    job = job_of(tmp_path, tolerant["int8"])
    answers(json.dumps({"Layers": [each["Name"] for each in CLEAN], "Bindings": ["input"]}))
    with pytest.raises(SkippedError, match=r"names of its layers and nothing else.*DETAILED"):
        inspector(job)
    for text in ("", "{}", "[1]"):
        answers(text)
        with pytest.raises(FailedError, match="cannot be read"):
            layers_of(with_plan(job, tolerant["int8"].path)[0])


# the rivals


@pytest.fixture
def no_compiler(monkeypatch):
    def refuse(model, mode):
        assert mode == "reduce-overhead"
        raise RuntimeError("no Triton here\nand more lines")

    monkeypatch.setattr(torch, "compile", refuse)


def test_rivals_run_in_turn_with_the_engines(tolerant, tmp_path, monkeypatch):
    torches = {"torch eager fp32": lambda: None}, {"torch.compile fp32": "no Triton here"}
    monkeypatch.setattr(rival_engines, "_torch", lambda device, tensor: torches)
    job = job_of(tmp_path, tolerant["int8"])
    found = rivals(job).figures
    one, two = found.rounds
    assert list(one.latency) == [
        "TensorRT int8",
        "torch eager fp32",
        "ONNX Runtime int8",
    ]
    assert one.left_out == {"torch.compile fp32": "no Triton here"}
    assert one.speed["torch eager fp32"] == 1
    assert (two.images, "ONNX Runtime int8" in two.latency) == (2, False)
    assert two.left_out["ONNX Runtime"] == "the graph of a bundle is for one image"
    assert any("random weights" in note for note in found.notes)
    msgspec.json.encode(found)


def test_rivals_without_bundle_or_gpu(tmp_path, no_compiler):
    job = job_of(tmp_path, runs=1, sizes=Sizes(network=32, batches=(1,), warm_up=1))
    found = rivals(job).figures
    assert {"torch eager fp32", "torch eager fp16"} == set(found.rounds[0].latency)
    left_out = found.rounds[0].left_out
    assert left_out["torch.compile fp16"] == "RuntimeError: no Triton here"
    assert "needs a bundle" in left_out["TensorRT"]
    assert "needs a bundle" in left_out["ONNX Runtime"]
    job.device = "cuda"
    if not torch.cuda.is_available():
        with pytest.raises(SkippedError, match="sees no CUDA device"):
            rivals(job)


def test_onnxruntime_that_falls_back_is_left_out(bundles, tmp_path, monkeypatch):
    tensor = np.zeros((1, 3, 128, 128), np.float32)
    with pytest.raises(FailedError, match="has no CUDAExecutionProvider: install onnxruntime-gpu"):
        rival_engines._onnxruntime_run(bundles["fp32"].path, "CUDAExecutionProvider", tensor)
    with pytest.raises(FailedError, match="another size"):
        rival_engines._onnxruntime_run(bundles["fp32"].path, "CPUExecutionProvider", tensor[:, :, :64])
    monkeypatch.setattr("onnxruntime.InferenceSession.get_providers", lambda self: ["SomethingElse"])
    with pytest.raises(FailedError, match="cannot use CPUExecutionProvider here"):
        rival_engines._onnxruntime_run(bundles["fp32"].path, "CPUExecutionProvider", tensor)


def test_contenders_take_turns_and_broken_ones_are_left_out():
    order = []

    def breaks():
        raise ValueError("\n  first words\nsecond")

    latency, left_out = interleaved(
        {"a": lambda: order.append("a"), "x": breaks, "b": lambda: order.append("b")}, 3, 1
    )
    assert order == ["a", "b", *"ababab"]
    assert {name: found.count for name, found in latency.items()} == {"a": 3, "b": 3}
    assert left_out == {"x": "ValueError: first words"}


# pytest and compute-sanitizer, in processes of their own


@pytest.fixture
def processes(monkeypatch):
    """What is started, and how it ends."""
    started, ends = [], []

    def run(command, **words):
        started.append(command)
        code, out = ends.pop(0)
        return subprocess.CompletedProcess(command, code, out, "")

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    return started, ends


def test_the_gpu_tests_are_run_and_their_summary_kept(processes, tmp_path):
    started, ends = processes
    ends += [(0, "....ss\n===== 99 passed, 2 skipped in 12.34s =====\n")]
    result = gpu_check.gpu_tests(job_of(tmp_path))
    assert result.figures == {"summary": "99 passed, 2 skipped in 12.34s"}
    assert started[0][:5] == [sys.executable, "-m", "pytest", "tests/gpu", "tests/test_edge_kernels.py"]
    assert "gpu and not compile" in started[0]


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        ((1, "1 failed, 98 passed in 3s\n"), r"ended with 1 \(1 failed, 98 passed in 3s\)"),
        ((0, "90 skipped in 1s\n"), "90 skipped"),
        ((5, "no tests ran in 0.1s\n"), "no tests ran"),
        ((4, ""), "it gives no reason"),
    ],
)
def test_gpu_tests_that_fail_or_do_not_run_fail_the_check(processes, tmp_path, end, sentence, capsys):
    processes[1].append(end)
    with pytest.raises(FailedError, match=sentence):
        gpu_check.gpu_tests(job_of(tmp_path))


def test_the_sanitizer_runs_the_kernels_tests(processes, tmp_path, monkeypatch):
    started, ends = processes
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: f"/somewhere/{name}")
    ends += [(0, "90 passed in 100s\n"), (0, "90 passed in 300s\n")]
    result = gpu_check.sanitizer(job_of(tmp_path))
    assert result.figures == {"memcheck": "90 passed in 100s", "racecheck": "90 passed in 300s"}
    assert started[1][:5] == ["/somewhere/compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "99"]
    ends += [(99, "90 passed in 100s\n========= ERROR SUMMARY: 3 errors\n")]
    with pytest.raises(FailedError, match="ended with 99"):
        gpu_check.sanitizer(job_of(tmp_path / "job"))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: None)
    with pytest.raises(SkippedError, match="needs compute-sanitizer, found none on PATH or in /usr/local/cuda/bin"):
        gpu_check.sanitizer(Job([], 1, tmp_path, tmp_path))


def test_the_selected_tests_are_those_of_a_gpu():
    """The -k expression must not lose any test of tests/gpu, and must leave the CPU's away."""
    words = ["tests/gpu", "tests/test_edge_kernels.py", "-k", "gpu and not compile", "--collect-only", "-q"]
    result = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True)
    names = [line for line in result.stdout.splitlines() if "::" in line]
    kernels = [name for name in names if "test_edge_kernels" in name]
    assert len(kernels) > 80
    assert all("[gpu" in name for name in kernels)
    written = sum(file.read_text().count("\ndef test_") for file in (ROOT / "tests/gpu").glob("test_*.py"))
    assert len({name.partition("[")[0] for name in names if "tests/gpu" in name}) == written


# the command


@pytest.fixture
def checks(monkeypatch):
    """Three checks that take no time."""

    def wrong(job):
        raise FailedError("it is 7", {"found": 7})

    def absent(job):
        raise SkippedError("there is none")

    made = {"good": lambda job: Result("fine", {"figure": job.runs}), "wrong": wrong, "absent": absent}
    monkeypatch.setattr(gpu_check, "CHECKS", made)
    return made


def test_the_file_says_how_every_check_ended(machine, checks, bundles, tmp_path, capsys):
    file = tmp_path / "figures.json"
    words = ["--bundle", str(bundles["fp16"].path), "--runs", "9", "--json", str(file), "--work", str(tmp_path)]
    assert gpu_check.main(words) == 1
    report = json.loads(file.read_text())
    assert report["schema"] == 1
    assert (report["runs"], report["bundles"]) == (9, [str(bundles["fp16"].path)])
    assert [(each["name"], each["state"], each["reason"]) for each in report["checks"]] == [
        ("good", "passed", ""),
        ("wrong", "failed", "it is 7"),
        ("absent", "skipped", "there is none"),
    ]
    assert [each["figures"] for each in report["checks"]] == [{"figure": 9}, {"found": 7}, None]
    assert (report["machine"]["gpu"], report["machine"]["sm"]) == ("Pretended GPU", "8.7")
    assert {"torch", "tensorrt", "onnxruntime", "pycuda", "numpy", "python"} <= set(report["machine"])
    assert report["machine"]["torch"].startswith(torch.__version__.split("+")[0])
    msgspec.convert(report, gpu_check.Report)
    printed = capsys.readouterr().out
    assert "passed   good       fine\nfailed   wrong      it is 7\nskipped  absent     there is none\n" in printed
    assert "1 passed, 1 failed, 1 skipped" in printed


def test_nothing_failed_is_success(machine, checks, capsys):
    assert gpu_check.main(["--only", "good", "--only", "absent"]) == 0


def test_a_check_that_breaks_does_not_take_the_others_with_it(machine, checks, capsys):
    checks["good"] = lambda job: {}["no such thing"]
    checks["last"] = lambda job: Result("fine", None)
    assert gpu_check.main(["--only", "good", "--only", "last"]) == 1
    captured = capsys.readouterr()
    assert "failed   good       KeyError: 'no such thing'" in captured.out
    assert "passed   last" in captured.out
    assert "Traceback" in captured.err


def test_all_checks_are_in_the_table_and_the_docstring():
    for name in gpu_check.CHECKS:
        assert f"\n    {name:<10} " in gpu_check.__doc__
    assert list(gpu_check.CHECKS) == [
        "tests",
        "kernels",
        "head",
        "graph",
        "engines",
        "rivals",
        "int8",
        "inspector",
        "sanitizer",
    ]


def test_the_kernels_by_the_command_itself(computing, tmp_path, capsys):
    assert gpu_check.main(["--only", "kernels", "--json", str(tmp_path / "figures.json")]) == 0
    (check,) = json.loads((tmp_path / "figures.json").read_text())["checks"]
    assert check["figures"]["largest_difference"]["match"] < 2e-6


def test_a_damaged_bundle_ends_before_anything_starts(machine, checks, tmp_path, capsys):
    assert gpu_check.main(["--bundle", str(tmp_path)]) == 4
    assert machine.calls == []


def test_without_a_gpu_it_is_a_sentence_and_5(checks, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycuda", None)
    file = tmp_path / "figures.json"
    for words in (["--probe"], ["--json", str(file)]):
        assert gpu_check.main(words) == 5
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not file.exists()
    with several(Machine(devices=0), tmp_path):
        assert gpu_check.main(["--probe"]) == 5
    assert "found 0 of them" in capsys.readouterr().err


def test_the_probe_names_the_gpu(machine, capsys):
    assert gpu_check.main(["--probe"]) == 0
    assert capsys.readouterr().out == "GPU: Pretended GPU, SM 8.7, driver for CUDA 12.6\n"


def test_it_runs_from_the_tools_folder():
    result = subprocess.run([sys.executable, "tools/gpu_check.py", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_it_imports_nothing_that_a_box_may_not_have():
    code = (
        "import sys; before = set(sys.modules); import stpm.tools.gpu_check; "
        "print(*{'torch', 'onnx', 'onnxruntime', 'pycuda', 'tensorrt', 'polygraphy', 'pytest'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert (result.returncode, result.stdout) == (0, "\n"), result.stderr


# the machine


def script(folder, name, text):
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_clocks_are_those_of_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script(tmp_path, "nvidia-smi", 'echo "580.1, 345 MHz, 1980 MHz, 76.5 W, [N/A], 31"')
    assert base.clocks() == {
        "driver_version": "580.1",
        "clocks.sm": "345 MHz",
        "clocks.max.sm": "1980 MHz",
        "power.draw": "76.5 W",
        "power.limit": "[N/A]",
        "temperature.gpu": "31",
    }
    script(tmp_path, "nvidia-smi", 'echo "Field is not a valid field"; exit 2')
    assert base.clocks() == {"nvidia-smi": "Field is not a valid field"}
    monkeypatch.setenv("PATH", "/nowhere")
    assert "No such file" in base.clocks()["nvidia-smi"]


def test_the_commit_is_known_in_a_checkout_only(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("no git")
    monkeypatch.setattr(base, "ROOT", tmp_path)
    assert base.commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    clean = base.commit()
    assert len(clean) == 40
    (tmp_path / "new").write_text("")
    assert base.commit() == clean + "+"
    monkeypatch.setenv("PATH", "/nowhere")
    assert base.commit() is None


# the shell script


@pytest.mark.parametrize("given", [{}, {"PYTHON": sys.executable}], ids=["its own", "given"])
def test_the_script_without_a_gpu(given):
    if subprocess.run([sys.executable, "-c", "import ctypes; ctypes.CDLL('libcuda.so.1')"], stderr=-3).returncode == 0:
        pytest.skip("this machine has a driver")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"} | given
    command = ["sh", str(ROOT / "tools/gpu_check.sh")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 5
    assert result.stdout == ""
    assert "no NVIDIA driver" in result.stderr
    assert len(result.stderr.splitlines()) == 1


# An interpreter that says what it was asked and does nothing; `$FAILS` is a word of what shall fail, with this code.
INTERPRETER = """
echo "$@" >> "$LOG"
case "$*" in *"$FAILS"*) exit ${CODE:-1} ;; esac
"""


@pytest.fixture
def interpreter(tmp_path):
    script(tmp_path, "interpreter", INTERPRETER)
    log = tmp_path / "log"

    def run(*words, fails="nothing at all", **environment):
        log.write_text("")
        command = ["sh", str(ROOT / "tools/gpu_check.sh"), *words]
        ours = {"PYTHON": str(tmp_path / "interpreter"), "LOG": str(log), "FAILS": fails}
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **ours, **environment}
        )
        asked = [line for line in log.read_text().splitlines() if not line.startswith("-c ")]
        return result, asked

    return run


def test_the_script_checks_the_given_bundles(interpreter, tmp_path):
    result, asked = interpreter("one two", "/three", OUT="out", RUNS="7")
    assert result.returncode == 0, result.stderr
    assert asked == [
        "-m stpm.tools.gpu_check --probe",
        f"-m stpm.tools.gpu_check --bundle {tmp_path}/one two --bundle /three --runs 7 "
        f"--json {tmp_path}/out/gpu-check.json",
    ]
    assert (tmp_path / "out").is_dir()


def test_the_script_builds_small_bundles(interpreter, tmp_path):
    result, asked = interpreter(OUT=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert [line.split()[1] for line in asked] == [
        "stpm.tools.gpu_check",
        "stpm.tools.parts",
        "stpm.build.cli",
        "stpm.build.cli",
        "stpm.tools.gpu_check",
    ]
    small = f"{ROOT}/.cache/gpu-check"
    assert f"--bundle {small}/fp16 --bundle {small}/int8 --runs 300" in asked[-1]
    assert "--engine int8" in asked[3]


def test_the_script_goes_on_without_the_bundle_that_cannot_be_built(interpreter, tmp_path):
    result, asked = interpreter(OUT=str(tmp_path), fails="--engine int8")
    assert result.returncode == 0
    assert "no int8 bundle can be built here" in result.stderr
    assert asked[-1].count("--bundle") == 1


def test_an_interpreter_without_the_project_gets_links(interpreter, tmp_path):
    result, asked = interpreter("/one", OUT=str(tmp_path), PYTHON="./interpreter", fails="import stpm.edge")
    assert result.returncode == 0, result.stderr
    assert len(asked) == 2
    # -S: without what is installed
    command = [sys.executable, "-S", "-c", "import stpm.edge.errors as found; print(found.__file__)"]
    links = f"{ROOT}/.cache/links"
    assert subprocess.run(command, capture_output=True, cwd="/").returncode != 0
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", env={"PYTHONPATH": links})
    assert result.stdout == f"{links}/stpm/edge/errors.py\n"


@pytest.mark.parametrize(("fails", "code", "asked"), [("--probe", "5", 1), ("--json", "1", 2)])
def test_the_script_ends_with_the_code_of_what_failed(interpreter, tmp_path, fails, code, asked):
    result, done = interpreter("/one", OUT=str(tmp_path), fails=fails, CODE=code)
    assert result.returncode == int(code)
    assert len(done) == asked


def test_the_options_that_the_script_gives_exist():
    text = (ROOT / "tools/gpu_check.sh").read_text().replace("\\\n", " ")
    commands = re.findall(r'"\$python" -m (stpm\S+) ([^;|]*)', text)
    assert {module for module, _ in commands} == {"stpm.build.cli", "stpm.tools.parts", "stpm.tools.gpu_check"}
    for module, words in commands:
        told = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True).stdout
        for option in re.findall(r"--[a-z-]+", words):
            assert option in told, f"{module} has no {option}"
