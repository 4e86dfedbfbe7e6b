"""The names of TensorRT: what is recorded is what the real bindings have, and the fake module has nothing else."""

import copy
import functools
import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tensorrt_api import record, surface

RECORDED = tuple(record.WHEELS)
WORKSPACE = 1 << 30

# what pybind11 makes of these, in every version; the fake has to agree
CONTRACT = """
int(trt.TacticSource.JIT_CONVOLUTIONS)
1 << int(trt.BuilderFlag.TF32)
1 << trt.BuilderFlag.TF32
trt.BuilderFlag.TF32 | trt.BuilderFlag.REFIT
trt.BuilderFlag.TF32 == int(trt.BuilderFlag.TF32)
trt.BuilderFlag.TF32 == trt.BuilderFlag(int(trt.BuilderFlag.TF32))
trt.BuilderFlag.TF32 != trt.BuilderFlag.REFIT
trt.BuilderFlag.TF32 < trt.BuilderFlag.REFIT
trt.BuilderFlag.TF32 >= trt.BuilderFlag.REFIT
trt.DataType.FLOAT < trt.DataType.HALF
trt.MemoryPoolType.WORKSPACE < 3
trt.BuilderFlag["TF32"]
list(trt.BuilderFlag)
{trt.DataType.FLOAT: 1}[trt.float32]
hash(trt.DataType.HALF)
[trt.DataType.HALF, str(trt.DataType.HALF), trt.float16.name, trt.float16.value, trt.float16.itemsize]
trt.DataType.HALF.NOPE
isinstance(trt.DataType.HALF, int)
sorted(trt.BuilderFlag.__members__)
trt.EngineCapability.STANDARD.name
trt.ILogger.Severity is trt.Logger.Severity
trt.Logger.INFO
issubclass(trt.Logger, trt.ILogger)
trt.nope
trt.Builder.nope
trt.IBuilderConfig()
trt.Logger(trt.Logger.INFO, 1)
isinstance(trt.Logger(min_severity=trt.Logger.INFO), trt.ILogger)
trt.Logger().nope
setattr(trt.Logger(), "nope", 1)
setattr(trt.Logger(), "log", 1)
setattr(trt.Logger(), "min_severity", trt.Logger.INFO)
trt.Logger().log(trt.Logger.VERBOSE)
trt.Logger().log(severity=trt.Logger.VERBOSE, msg="")
trt.Logger().log(level=trt.Logger.VERBOSE, msg="")
type("Mine", (trt.ILogger,), {"__init__": lambda self: trt.ILogger.__init__(self)})().log.__name__ and 1
type("Mine", (trt.ILogger,), {"__init__": lambda self: None})()
setattr(type("Mine", (trt.IProfiler,), {})(), "nope", 1)
trt.volume((2, 3, 4))
""".strip().splitlines()
ANSWERS = """
def answer(expression):
    try:
        return repr(eval(expression, {"trt": trt}))
    except Exception as problem:
        return type(problem).__name__
"""


def recorder(*words, **environment):
    command = [sys.executable, record.__file__, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@functools.cache
def why_not(version):
    """Why the bindings cannot be had here, asked once: without a network that takes a while."""
    try:
        with record.unpacked(version, record.CACHE):
            return ""
    except record.NotPossibleHereError as problem:
        return str(problem)


@pytest.fixture
def real(request):
    """The version of which the test needs the real bindings: its parameter, or 8.6."""
    version = getattr(request, "param", "8.6")
    if why_not(version):
        pytest.skip(why_not(version))
    return version


def in_real(version, *words):
    with record.unpacked(version, record.CACHE) as folder:
        return record.run(folder, *words)


@pytest.mark.parametrize("real", RECORDED, indirect=True)
def test_recorded_names_are_those_of_the_real_bindings(real):
    result = recorder("--check", "--only", real)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('   "set_memory_pool_limit": "(pool, pool_size) -> None",\n', ""),
        ('"JIT_CONVOLUTIONS": 4', '"JIT_CONVOLUTIONS": 1'),
        ('"create_network": "(flags=)', '"create_network": "(flag=)'),
        ('"num_DLA_cores": "get -> int"', '"num_DLA_cores": "get set -> int"'),
    ],
    ids=["a name", "a number", "a keyword", "a setter"],
)
def test_a_record_that_is_wrong_is_found(real, tmp_path, old, new):
    text = (surface.HERE / f"{real}.json").read_text()
    assert old in text
    (tmp_path / f"{real}.json").write_text(text.replace(old, new))
    result = recorder("--check", "--only", real, "--into", tmp_path)
    assert result.returncode == 1
    assert old.strip().split(":")[0] in result.stdout


def test_recording_says_that_it_is_offline(tmp_path):
    offline = recorder("--check", "--cache", tmp_path, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS="")
    assert offline.returncode == record.IMPOSSIBLE
    assert "pip could not fetch tensorrt_bindings==8.6.1: ERROR: No matching distribution" in offline.stdout


def test_recording_says_which_tool_it_lacks(real, tmp_path):
    without_tools = recorder("--check", "--only", real, PATH=str(tmp_path))
    assert (without_tools.returncode, without_tools.stdout) == (record.IMPOSSIBLE, "readelf is not installed\n")


@pytest.mark.parametrize("real", RECORDED, indirect=True)
def test_a_builder_without_gpu_is_a_type_error(real):
    """As on a real computer without a driver; a crash would be a negative status."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import tensorrt_bindings as trt; trt.Builder(trt.Logger())"
    result = in_real(real, "-c", code)
    assert result.returncode == 1
    assert "TypeError: pybind11::init(): factory function returned nullptr" in result.stderr


@pytest.mark.parametrize("real", RECORDED, indirect=True)
def test_the_fake_behaves_like_pybind11(real):
    code = f"""
import json, sys
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as trt
{ANSWERS}
print(json.dumps([answer(each) for each in {CONTRACT!r}]))
"""
    result = in_real(real, "-c", code)
    assert result.returncode == 0, result.stderr
    names = {"trt": surface.module(real)}
    exec(ANSWERS, names)
    fake = {each: names["answer"](each) for each in CONTRACT}
    assert fake == dict(zip(CONTRACT, json.loads(result.stdout), strict=True))


@pytest.mark.parametrize("version", surface.VERSIONS)
def test_unknown_names_are_refused(version):
    trt = surface.module(version)
    config = trt.Builder(trt.Logger()).create_builder_config()
    for thing in (trt, trt.IBuilderConfig, trt.BuilderFlag, config):
        with pytest.raises(AttributeError, match="no_such_thing"):
            thing.no_such_thing  # noqa: B018
    with pytest.raises(AttributeError):
        config.no_such_thing = 1
    with pytest.raises(AttributeError):
        config.num_optimization_profiles = 1
    with pytest.raises(AttributeError):
        config.set_flag = print
    with pytest.raises(TypeError):
        config.set_flag(flags=trt.BuilderFlag.TF32)
    with pytest.raises(ValueError, match="Bilder"):
        surface.module(version, {"Bilder": object})


def test_numbers_moved_in_11():
    old, new = surface.module("10.13"), surface.module("11.4")
    assert [int(trt.TacticSource.JIT_CONVOLUTIONS) for trt in (old, new)] == [4, 1]
    assert [int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) for trt in (old, new)] == [1, 0]
    assert not hasattr(new.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")
    for name in ("FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"):
        assert hasattr(old.BuilderFlag, name)
        assert not hasattr(new.BuilderFlag, name)
    assert old.BuilderFlag.STRIP_PLAN != new.BuilderFlag.STRIP_PLAN


NEW_IN_8_6 = [
    "IBuilderConfig.builder_optimization_level",
    "IBuilderConfig.hardware_compatibility_level",
    "IBuilderConfig.max_aux_streams",
    "ICudaEngine.num_aux_streams",
    "IExecutionContext.set_aux_streams",
    "INetworkDefinition.add_cast",
    "BuilderFlag.EXCLUDE_LEAN_RUNTIME",
    "BuilderFlag.VERSION_COMPATIBLE",
    "HardwareCompatibilityLevel.AMPERE_PLUS",
    "DataType.FP8",
    "fp8",
]


def test_8_5_lacks_what_came_with_8_6():
    old, new = surface.module("8.5"), surface.module("8.6")
    assert old.__version__ == "8.5.3.1"
    for path in NEW_IN_8_6:
        owner, _, name = path.rpartition(".")
        assert not hasattr(getattr(old, owner, None) if owner else old, name), path
        assert hasattr(getattr(new, owner) if owner else new, name), path
    for name in ("set_memory_pool_limit", "set_tactic_sources", "create_timing_cache", "DLA_core", "int8_calibrator"):
        assert hasattr(old.IBuilderConfig, name)
    for name in ("get_tensor_name", "get_tensor_shape", "num_io_tensors"):
        assert hasattr(old.ICudaEngine, name)
    engine = old.Runtime(old.Logger()).deserialize_cuda_engine(b"plan")
    assert engine.get_tensor_format("input") == old.TensorFormat.LINEAR
    with pytest.raises(TypeError):
        engine.get_tensor_format("input", 0)


class Network:
    num_inputs = 0

    def add_concatenation(self, inputs):
        self.joined = inputs

    def __getitem__(self, index):
        raise IndexError


class Builder:
    """A behaviour: only what the test needs."""

    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags=0):
        self.flags = flags
        return Network()

    def build_serialized_network(self, network, config):
        self.built = network, config
        return b"plan"

    def create_optimization_profile(self):
        return self.flags


@pytest.mark.parametrize("version", surface.VERSIONS)
def test_objects_of_a_behaviour_are_as_strict(version):
    trt = surface.module(version, {"Builder": Builder, "volume": sum})
    builder = trt.Builder(trt.Logger())
    network = builder.create_network()
    assert isinstance(network, trt.INetworkDefinition)
    assert network.num_inputs == 0
    assert list(network) == []
    network.add_concatenation([network, 3])
    assert surface.inside(network).joined == [surface.inside(network), 3]
    plan = builder.build_serialized_network(network, 5)
    assert (isinstance(plan, trt.IHostMemory), bytes(plan), plan.nbytes) == (True, b"plan", 4)
    with pytest.raises(AttributeError):
        plan.append(1)
    inside = surface.inside(builder)
    assert surface.made(trt, "Builder") == [inside]
    assert inside.built == (surface.inside(network), 5)
    assert builder.create_optimization_profile() == 0
    with pytest.raises(AttributeError):
        builder.flags  # noqa: B018
    with pytest.raises(AttributeError, match="create_builder_config"):
        builder.create_builder_config()
    assert trt.volume([2, 3]) == 5


@pytest.mark.parametrize("version", surface.VERSIONS)
def test_recorders_answer_with_the_right_classes(version):
    trt = surface.module(version)
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(b"plan")
    context = engine.create_execution_context()
    assert isinstance(context, trt.IExecutionContext)
    assert engine.create_execution_context() is context
    assert isinstance(context.engine, trt.ICudaEngine)
    assert engine
    config = trt.Builder(trt.Logger()).create_builder_config()
    cache = config.create_timing_cache(b"")
    surface.inside(config).get_timing_cache.return_value = surface.inside(cache)
    assert config.get_timing_cache() is cache
    assert engine.num_io_tensors == 0
    assert engine.get_tensor_mode("input") == trt.TensorIOMode.NONE
    assert context.set_tensor_address("input", 4096)
    surface.inside(context).set_tensor_address.assert_called_once_with("input", 4096)
    surface.inside(context).execute_async_v3.return_value = False
    assert not context.execute_async_v3(stream_handle=0)
    assert isinstance(engine.create_engine_inspector(), trt.EngineInspector)
    assert copy.deepcopy(trt.DataType.HALF) == trt.float16
    assert trt.nptype(trt.float16) is np.float16
    with pytest.raises(TypeError):
        trt.nptype(trt.DataType(99))
    assert hasattr(context, "execute_async_v2") == (version in ("8.5", "8.6"))


class Drive:
    """polygraphy builds an engine with the fake; afterwards the calls are in `config`, `builder` and `parser`."""

    def __init__(self, version, strongly_typed=False, **settings):
        with surface.installed(version) as trt:
            from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxBytes

            self.trt = trt
            settings = {name: value(trt) if callable(value) else value for name, value in settings.items()}
            network = NetworkFromOnnxBytes(b"onnx", strongly_typed=strongly_typed)
            self.plan = EngineBytesFromNetwork(network, config=CreateConfig(**settings))()
        self.builder, self.parser, self.config = (
            surface.made(trt, name)[0] for name in ("Builder", "OnnxParser", "IBuilderConfig")
        )

    @property
    def flags(self):
        return {call.args[0].name for call in self.config.set_flag.call_args_list}


@pytest.mark.parametrize("version", surface.VERSIONS)
def test_polygraphy_builds_with_the_fake(version, tmp_path):
    (tmp_path / "timing.cache").write_bytes(b"timings")
    drive = Drive(
        version,
        memory_pool_limits=lambda trt: {trt.MemoryPoolType.WORKSPACE: WORKSPACE},
        tactic_sources=lambda trt: [trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS],
        load_timing_cache=str(tmp_path / "timing.cache"),
    )
    trt, config = drive.trt, drive.config
    assert bytes(drive.plan) == b"serialized"
    drive.parser.parse.assert_called_once_with(b"onnx")
    drive.builder.build_serialized_network.assert_called_once()
    config.set_memory_pool_limit.assert_called_once_with(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.set_tactic_sources.assert_called_once_with(0b11 if version == "11.4" else 0b11000)
    config.create_timing_cache.assert_called_once_with(b"timings")
    config.set_timing_cache.assert_called_once_with(surface.made(trt, "ITimingCache")[0], ignore_mismatch=False)
    # explicit batch, which is bit 0, is asked for where it is not the only way
    drive.builder.create_network.assert_called_once_with(flags=1 if version.startswith("8.") else 0)
    assert drive.flags == set()


LEVELS = {
    "builder_optimization_level": 4,
    "max_aux_streams": 1,
    "version_compatible": True,
    "hardware_compatibility_level": lambda trt: trt.HardwareCompatibilityLevel.AMPERE_PLUS,
}


@pytest.mark.parametrize("version", [version for version in surface.VERSIONS if version != "8.5"])
def test_polygraphy_sets_what_came_with_8_6(version):
    drive = Drive(version, **LEVELS)
    assert (drive.config.builder_optimization_level, drive.config.max_aux_streams) == (4, 1)
    assert drive.config.hardware_compatibility_level == drive.trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert drive.flags == {"VERSION_COMPATIBLE"}


@pytest.mark.parametrize("name", ["builder_optimization_level", "max_aux_streams", "version_compatible"])
def test_polygraphy_cannot_set_it_on_8_5(name):
    with pytest.raises(Exception, match=f"{name}.* is not available on TensorRT version 8.5.3.1"):
        Drive("8.5", **{name: LEVELS[name]})


@pytest.mark.parametrize("version", surface.VERSIONS)
def test_polygraphy_and_strong_types(version):
    if version.startswith("8."):
        with pytest.raises(Exception, match="strongly_typed is not available"):
            Drive(version, strongly_typed=True)
        return
    drive = Drive(version, strongly_typed=True)
    drive.builder.create_network.assert_called_once_with(flags=1 if version == "11.4" else 2)


@pytest.mark.parametrize("version", surface.VERSIONS)
def test_polygraphy_and_precision_flags(version):
    if version == "11.4":
        with pytest.raises(Exception, match="fp16 in CreateConfig is not available on TensorRT version 11"):
            Drive(version, fp16=True)
        return
    assert Drive(version, fp16=True, int8=True).flags == {"FP16", "INT8"}


@pytest.mark.parametrize("version", ["8.5", "10.3"])
def test_polygraphy_can_subclass(version):
    with surface.installed(version) as trt:
        from polygraphy.backend.trt import Calibrator

        calibrator = Calibrator([{"input": 0}])
        assert isinstance(calibrator, trt.IInt8EntropyCalibrator2)
        assert calibrator.get_batch_size() == 1


def test_what_was_imported_before_comes_back(tmp_path, monkeypatch):
    (tmp_path / "office").mkdir()
    (tmp_path / "office" / "__init__.py").touch()
    for name in ("early", "late"):
        (tmp_path / "office" / f"{name}.py").write_text("import tensorrt\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = sys.modules.get("tensorrt")
    with surface.installed("8.5", fresh=("office",)) as old:
        early = importlib.import_module("office.early")
        with surface.installed("11.4", fresh=("office.early", "office.late")) as new:
            again = importlib.import_module("office.early")
            late = importlib.import_module("office.late")
            assert again.tensorrt is late.tensorrt is sys.modules["tensorrt"] is new
        office = sys.modules["office"]
        assert early.tensorrt is sys.modules["tensorrt"] is old
        assert office.early is sys.modules["office.early"] is early
        assert not hasattr(office, "late")
        assert "office.late" not in sys.modules
    assert sys.modules.get("tensorrt") is before
    assert not [name for name in sys.modules if name.startswith("office")]


def test_records_are_small_enough_to_review():
    for version in RECORDED:
        assert (surface.HERE / f"{version}.json").stat().st_size < 40_000
