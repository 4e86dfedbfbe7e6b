"""How TensorRT is asked, version by version; and stpm-compile."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu.driver import Machine
from cuda_on_cpu.pretend import pretended
from tensorrt_api import surface

from stpm.build.cli import build_main
from stpm.build.gpu.cli import main
from stpm.build.gpu.kernels import compile_kernels
from stpm.build.gpu.plan import PlanOptions, compile_tensorrt
from stpm.edge.bundle import open_bundle
from stpm.edge.engine import open_engine
from stpm.edge.engine.plan import Networks
from stpm.edge.engine.tensorrt import TensorRtEngine
from stpm.edge.errors import DeviceError, EngineError, SelfTestError
from stpm.edge.preprocess import Preprocess
from stpm.edge.selftest import self_test

SPEC = Preprocess(64, 64)

# the settings, by version


OPTIONS = {
    "plain": PlanOptions(),
    "all of 8.6": PlanOptions(
        (1, 8),
        512,
        3,
        1,
        ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"),
        hardware_compatible=True,
        version_compatible=True,
    ),
}


def asked(version, graph, options, tmp_path):
    """What was asked of this TensorRT: network flags, config, and what the manifest will say."""
    machine = Machine()
    with pretended(machine, tmp_path, version) as tensorrt:
        files = compile_tensorrt(graph, SPEC, tmp_path, options, tmp_path / "caches")
        names = {
            kind: {int(member): name for name, member in getattr(tensorrt, kind).__members__.items()}
            for kind in (
                "NetworkDefinitionCreationFlag",
                "BuilderFlag",
                "MemoryPoolType",
                "TacticSource",
                "TensorFormat",
            )
        }
    assert machine.left == ""
    return machine, files, names


def flags_of(machine, names):
    called = [call.args[0] for call in machine.config.set_flag.call_args_list]
    return {names["BuilderFlag"][int(flag)] for flag in called}


@pytest.mark.parametrize("version", surface.VERSIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_precision_is_in_the_graph_and_flags_only_where_they_are_needed(version, precision, graphs, tmp_path):
    machine, files, names = asked(version, graphs[precision], OPTIONS["plain"], tmp_path)
    network_flags = {
        name for bit, name in names["NetworkDefinitionCreationFlag"].items() if machine.network.flags >> bit & 1
    }
    flags = flags_of(machine, names)
    if version.startswith("8"):
        assert network_flags == {"EXPLICIT_BATCH"}
        assert flags == {"fp32": set(), "fp16": {"FP16"}, "int8": {"FP16", "INT8"}}[precision]
    else:
        assert network_flags == {"STRONGLY_TYPED"}
        assert flags == set()
    machine.config.set_memory_pool_limit.assert_called_once()
    pool, size = machine.config.set_memory_pool_limit.call_args.args
    assert (names["MemoryPoolType"][int(pool)], size) == ("WORKSPACE", 1024 << 20)
    assert machine.config.set_tactic_sources.called is False
    # the pretended TensorRT has the first two switched on
    assert files.plan.tactic_sources == [names["TacticSource"][0], names["TacticSource"][1]]
    if version != "8.5" and precision != "int8":
        assert files.plan.tensorrt.startswith(version)
    assert (files.plan.sm, files.plan.driver, files.device) == ("8.7", "12.6", "Pretended GPU")
    assert b"-cubin -arch=sm_87" in (tmp_path / "kernels.cubin").read_bytes()


@pytest.mark.parametrize("version", [version for version in surface.VERSIONS if version != "8.5"])
def test_every_setting_reaches_the_builder(version, graphs, tmp_path):
    machine, files, names = asked(version, graphs["int8"], OPTIONS["all of 8.6"], tmp_path)
    config = machine.config
    assert config.builder_optimization_level == 3
    assert config.max_aux_streams == 1
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert "VERSION_COMPATIBLE" in flags_of(machine, names)
    mask = config.set_tactic_sources.call_args.args[0]
    chosen = {name for bit, name in names["TacticSource"].items() if mask >> bit & 1}
    assert chosen == {"EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"}
    profiles = [call.args[0] for call in config.add_optimization_profile.call_args_list]
    assert [profile.shapes["input"] for profile in profiles] == [(1, 3, 64, 64), (8, 3, 64, 64)]
    assert files.plan.batches == [1, 8]
    assert files.plan.settings == {
        "workspace_mib": 512,
        "optimization_level": 3,
        "aux_streams": 1,
        "int8_features": False,
        "stem": "float",
    }
    for output in machine.network.outputs:
        allowed = {name for bit, name in names["TensorFormat"].items() if output.allowed_formats >> bit & 1}
        assert allowed == {"LINEAR", "CHW32"}


def test_an_engine_of_85_with_several_profiles_has_plain_formats_only(graphs, tmp_path):
    """It would not tell the formats of any profile but the first."""
    for batches, wanted in (((1,), {"LINEAR", "HWC8"}), ((1, 2), {"LINEAR"})):
        machine, _, names = asked("8.5", graphs["fp16"], PlanOptions(batches), tmp_path)
        for output in machine.network.outputs:
            allowed = {name for bit, name in names["TensorFormat"].items() if output.allowed_formats >> bit & 1}
            assert allowed == wanted


def test_settings_that_a_version_does_not_have_are_refused_by_name(graphs, tmp_path):
    for options, message in (
        (PlanOptions(hardware_compatible=True), "TensorRT 8.5.3.1 has no AMPERE_PLUS, it has none at all"),
        (PlanOptions(tactic_sources=("CUDNN2",)), "has no CUDNN2, it has CUBLAS, CUBLAS_LT, CUDNN"),
        (PlanOptions(optimization_level=2), "cannot compile the graph .*builder_optimization_level"),
        (PlanOptions(version_compatible=True), "cannot compile the graph .*version_compatible"),
        (PlanOptions(dla_core=0), "wanted DLA core 0, found 0 cores"),
    ):
        with pytest.raises(EngineError, match=message) as caught:
            asked("8.5", graphs["fp16"], options, tmp_path)
        assert len(str(caught.value).splitlines()) == 1


def test_timings_are_used_again(graphs, tmp_path):
    caches = tmp_path / "caches"
    machine, _, _ = asked("10.13", graphs["fp16"], OPTIONS["plain"], tmp_path)
    (cache,) = caches.glob("*.timing")
    assert cache.name.startswith("tensorrt-10.13")
    assert "Pretended-GPU" in cache.name
    cache.write_bytes(b"timings of the last time")
    machine, _, _ = asked("10.13", graphs["fp16"], OPTIONS["plain"], tmp_path)
    # the first call is that of the compilation; polygraphy reads the file once more to add to it
    assert machine.config.create_timing_cache.call_args_list[0].args == (b"timings of the last time",)


def test_a_dla_core_is_asked_for_with_the_gpu_to_fall_back_on(graphs, tmp_path, monkeypatch):
    machine = Machine()
    with pretended(machine, tmp_path, "10.3") as tensorrt:
        builder = tensorrt.__surface__.behaviour["Builder"]
        monkeypatch.setattr(builder, "num_DLA_cores", 2)
        options = PlanOptions(dla_core=1)
        files = compile_tensorrt(graphs["fp16"], SPEC, tmp_path, options, tmp_path / "caches")
        with pytest.raises(EngineError, match="a DLA computes in FP16"):
            compile_tensorrt(graphs["int8"], SPEC, tmp_path, options, tmp_path / "caches")
        names = {"BuilderFlag": {int(member): name for name, member in tensorrt.BuilderFlag.__members__.items()}}
    assert (machine.config.DLA_core, files.plan.dla_core) == (1, 1)
    with pretended(Machine(), tmp_path), TensorRtEngine.of_files(tmp_path, files, SPEC) as engine:
        engine.inspect(np.zeros((64, 64, 3), np.uint8), 1.0)  # without a graph: what runs on a DLA is not captured
        engine.inspect(np.zeros((64, 64, 3), np.uint8), 1.0)
    assert machine.config.default_device_type.name == "DLA"
    assert "GPU_FALLBACK" in flags_of(machine, names)


def test_the_driver_is_asked_before_tensorrt(graphs, tmp_path):
    """TensorRT 8.6 ends the interpreter when it is started without one."""
    machine = Machine(devices=0)
    with pretended(machine, tmp_path, "8.6"), pytest.raises(DeviceError):
        compile_tensorrt(graphs["fp16"], SPEC, tmp_path, OPTIONS["plain"], tmp_path / "caches")
    assert not any(call.startswith("trt") for call in machine.calls)


def test_every_failing_call_of_a_compilation_is_heard(graphs, tmp_path):
    good, _, _ = asked("10.3", graphs["fp32"], OPTIONS["plain"], tmp_path)
    for number, name in enumerate(good.calls):
        machine = Machine()
        machine.fail_at = number
        with pretended(machine, tmp_path):
            if name in ("Event.record", "Event.query"):  # waiting before the closing
                continue
            with pytest.raises(EngineError) as caught:
                compile_tensorrt(graphs["fp32"], SPEC, tmp_path, OPTIONS["plain"], tmp_path / "caches")
        assert len(str(caught.value).splitlines()) == 1, str(caught.value)
        assert machine.left == ""


# the compiler of the kernels


def test_without_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("stpm.build.gpu.kernels.TOOLKIT", str(tmp_path))
    with pytest.raises(EngineError, match="wanted nvcc to compile the kernels, found none on PATH"):
        compile_kernels("8.7", tmp_path / "kernels.cubin")


def test_when_nvcc_does_not_know_the_gpu(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho \"nvcc fatal: Unsupported gpu architecture 'sm_72'\" >&2\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(EngineError, match=r"for SM 7.2 \(nvcc fatal: Unsupported gpu architecture 'sm_72'\)"):
        compile_kernels("7.2", tmp_path / "kernels.cubin")


def test_the_real_nvcc_writes_a_cubin(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    compile_kernels("8.7", tmp_path / "kernels.cubin")
    assert (tmp_path / "kernels.cubin").read_bytes()[:4] == b"\x7fELF"


# stpm-compile


def test_compiling_adds_an_engine_and_keeps_everything_else(bundles, compiled):
    for precision, bundle in bundles.items():
        made = compiled[precision].manifest
        assert set(made.engines) == {"openvino", "tensorrt"}
        assert set(made.files) == set(bundle.manifest.files) | {"tensorrt.plan", "kernels.cubin"}
        assert made.threshold == bundle.manifest.threshold
        assert made.engines["openvino"] == bundle.manifest.engines["openvino"]
        assert made.engines["tensorrt"].plan.batches == [1, 2]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_plan_for_later_gpus_and_versions_runs_there(bundles, library, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundles["fp32"].path, folder)
    words = f"--bundle {folder} --work {tmp_path / 'work'} --hardware-compatible --version-compatible"
    with pretended(Machine(library), tmp_path, "10.3"):
        assert main(words.split()) == 0
    bundle = open_bundle(folder)
    for version, sm in (("10.3", (8, 7)), ("10.13", (8, 9)), ("11.4", (12, 0))):
        machine = Machine(library, sm=sm, name="Another GPU")
        with pretended(machine, tmp_path, version), open_engine(bundle) as engine:
            assert self_test(bundle, engine) < 0.01
        assert machine.left == ""


def test_an_engine_that_is_wrong_for_several_images_is_not_kept(bundles, library, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "bundle"
    shutil.copytree(bundles["fp32"].path, folder)
    before = files_of(folder)
    right = Networks.vector
    monkeypatch.setattr(Networks, "vector", lambda self, name, channels, profile: right(self, name, channels, 0))
    with pretended(Machine(library), tmp_path):
        words = f"--bundle {folder} --work {tmp_path / 'work'} --engine-batch 2"
        assert main(words.split()) == SelfTestError.exit_code
    assert files_of(folder) == before
    assert "with 2 images at once" in capsys.readouterr().err


def test_ctrl_c_while_compiling_is_not_taken_for_a_failure(graphs, tmp_path):
    machine = Machine()

    told = []

    def interrupted(*arguments):
        monitor = machine.config.progress_monitor
        monitor.phase_start("Building", None, 3)
        monitor.bar.refresh = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
        told.append(monitor.step_complete("Building", 1))
        return

    with pretended(machine, tmp_path, "10.13") as tensorrt:
        builder = tensorrt.__surface__.behaviour["Builder"]
        builder.build_serialized_network = interrupted
        with pytest.raises(KeyboardInterrupt):
            compile_tensorrt(graphs["fp32"], SPEC, tmp_path, OPTIONS["plain"], tmp_path / "caches")
    assert told == [False]  # which ends the compilation
    assert machine.left == ""


def test_a_compilation_that_fails_leaves_the_bundle_as_it_was(bundles, library, tmp_path, capsys):
    folder = tmp_path / "bundle"
    shutil.copytree(bundles["fp32"].path, folder)
    before = files_of(folder)
    machine = Machine(library)
    machine.error, machine.fail_at = machine.error, 40
    with pretended(machine, tmp_path):
        assert main(["--bundle", str(folder), "--work", str(tmp_path / "work")]) == EngineError.exit_code
    assert files_of(folder) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert "stpm-compile: " in capsys.readouterr().err


def test_an_engine_with_other_answers_is_not_kept(bundles, library, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "bundle"
    shutil.copytree(bundles["fp32"].path, folder)
    before = files_of(folder)
    monkeypatch.setattr("stpm.edge.kernels.launches.EPS", 50.0)
    with pretended(Machine(library), tmp_path):
        assert main(["--bundle", str(folder), "--work", str(tmp_path / "work")]) == SelfTestError.exit_code
    assert files_of(folder) == before
    assert "fails its self test" in capsys.readouterr().err


def test_compiling_again_replaces_the_engine(compiled, library, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(compiled["fp32"].path, folder)
    with pretended(Machine(library), tmp_path, "11.4"):
        assert main(["--bundle", str(folder), "--work", str(tmp_path / "work")]) == 0
    manifest = open_bundle(folder).manifest
    assert manifest.engines["tensorrt"].plan.tensorrt.startswith("11.4")
    assert manifest.engines["tensorrt"].plan.batches == [1]


def test_a_bundle_is_built_and_measured_through_the_gpu(bundles, trained, library, tmp_path, capsys):
    # training and distillation are done
    words = f"--engine int8 {trained} --qad-epochs 1 --max-drop 1,1,1 --backend tensorrt --out {tmp_path / 'bundle'}"
    machine = Machine(library)
    with pretended(machine, tmp_path):
        assert build_main(words.split()) == 0
        bundle = open_bundle(tmp_path / "bundle")
        with open_engine(bundle) as engine:
            assert engine.describe()["backend"] == "tensorrt"
            assert self_test(bundle, engine) < 1e-4  # its golden frames are its own
    assert machine.left == ""
    assert set(bundle.manifest.engines) == {"tensorrt"}
    other = bundles["int8"].manifest
    assert bundle.manifest.accuracy.image_auroc == pytest.approx(other.accuracy.image_auroc, abs=0.3)
    assert bundle.manifest.threshold.value == pytest.approx(other.threshold.value, rel=0.5)
    assert bundle.manifest.threshold.value != other.threshold.value
    assert "compiling for tensorrt" in capsys.readouterr().out


def test_compiling_needs_no_torch():
    code = (
        "import sys\nsys.modules['torch'] = None\nsys.modules['torchvision'] = None\n"
        "import stpm.build.gpu.cli\nprint(json.dumps(sorted(m for m in sys.modules if m.startswith('stpm.'))))"
    )
    result = subprocess.run([sys.executable, "-c", "import json\n" + code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    assert "stpm.build.gpu.plan" in json.loads(result.stdout)


def test_on_a_machine_without_a_gpu_the_command_ends_in_a_sentence(bundles, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda", None)
    folder = tmp_path / "bundle"
    shutil.copytree(bundles["fp32"].path, folder)
    assert main(["--bundle", str(folder), "--work", str(tmp_path / "work")]) == EngineError.exit_code
    assert "stpm-compile: " in capsys.readouterr().err
