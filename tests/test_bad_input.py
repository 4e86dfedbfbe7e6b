"""Each mistake gives one sentence on stderr, its documented exit code, and leaves nothing half-written."""

import os
import shutil
import subprocess
import sys

import pytest

from stpm.build.cli import build_main, train_main
from stpm.edge.bundle import open_bundle
from stpm.edge.cli import main as run_main
from stpm.tools.evaluate import main as eval_main


def build(out, data, *more):
    words = (
        "--engine int8 --quantize ptq --max-drop 1,1,1 --category bushing --teacher builtin --epochs 1 --size 128 "
        f"--data {data} --work {out.parent / 'work'} --out {out}"
    )
    return build_main([*words.split(), *map(str, more)])


def one_sentence(capfd, *expected):
    """What was printed on stderr is one line with these words in it."""
    errors = capfd.readouterr().err.strip().splitlines()
    mine = [line for line in errors if line.startswith("stpm-")]
    assert len(mine) == 1, errors
    assert "Traceback" not in "\n".join(errors)
    for words in expected:
        assert words in mine[0]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out" / "bundle"


def test_missing_folder(out, tmp_path, capfd):
    assert build(out, tmp_path / "nowhere") == 3
    one_sentence(capfd, "wanted a folder", "nowhere")
    assert not out.exists()


def test_empty_folder(out, tmp_path, capfd):
    assert build(out, tmp_path) == 3
    one_sentence(capfd, "found none")
    assert not out.exists()


def test_too_few_normals(out, parts, tmp_path, capfd):
    folder = shutil.copytree(parts / "bushing" / "train" / "good", tmp_path / "bushing")
    for path in sorted(folder.iterdir())[9:]:
        path.unlink()
    assert build(out, tmp_path) == 3
    one_sentence(capfd, "at least 10", "found 9")


def test_wrong_weights_file(out, parts, tmp_path, capfd):
    (tmp_path / "weights.pth").write_bytes(b"nonsense")
    assert build(out, parts, "--teacher", tmp_path / "weights.pth") == 3
    one_sentence(capfd, "weights.pth")
    assert build(out, parts, "--student", tmp_path / "missing.npz") == 3
    one_sentence(capfd, "missing.npz")
    assert not out.exists()


def test_tensorrt_is_refused_before_anything_is_trained(out, parts, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda", None)
    assert build(out, parts, "--backend", "tensorrt") == 5
    one_sentence(capfd, "pycuda")
    assert not out.parent.exists()


def test_out_that_is_not_a_bundle_is_not_replaced(trained, tmp_path, capfd):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    assert build_main(f"--engine int8 {trained} --out {tmp_path / 'thesis'}".split()) == 3
    one_sentence(capfd, "not a bundle")
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"


def test_a_full_disk_leaves_nothing_and_keeps_the_old_bundle(bundles, trained, small_disk, capfd):
    old = small_disk / "bundle"
    old.mkdir()
    (old / "manifest.json").write_text("the old one")
    assert build_main(f"--engine fp32 {trained} --out {old}".split()) == 8
    one_sentence(capfd, "no space left", "free some space")
    assert [path.name for path in small_disk.iterdir()] == ["bundle"]
    assert (old / "manifest.json").read_text() == "the old one"


def test_a_disk_that_fills_up_during_training(parts, small_disk, capfd):
    words = (
        f"--category bushing --data {parts} --teacher builtin --epochs 1 --work {small_disk} --out "
        f"{small_disk / 'student.npz'}"
    ).split()
    assert train_main(words) == 8
    one_sentence(capfd, "no space left")
    assert not (small_disk / "student.npz").exists()


def test_a_bundle_is_replaced_whole(bundles, trained, tmp_path):
    target = shutil.copytree(bundles["fp32"].path, tmp_path / "bundle")
    assert build_main(f"--engine int8 {trained} --qad-epochs 1 --max-drop 1,1,1 --out {target}".split()) == 0
    assert open_bundle(target).manifest.precision == "int8"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_train_then_build_with_the_student(bundles, trained, parts, tmp_path, capfd):
    student = tmp_path / "student.npz"
    assert train_main(f"{trained} --out {student}".split()) == 0
    assert "re-used" in capfd.readouterr().out
    assert build(tmp_path / "bundle", parts, "--student", student) == 0
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.student.sha256 == bundles["int8"].manifest.student.sha256
    assert manifest.student.source == "given"
    assert manifest.training.best_epoch is None


def test_damaged_bundle_and_other_schema(bundle, parts, tmp_path, capfd):
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    content = bytearray((copy / "openvino.bin").read_bytes())
    content[12345] ^= 0x10
    (copy / "openvino.bin").write_bytes(content)
    arguments = ["--bundle", str(copy), "--camera", str(parts), "--plc", "none"]
    assert run_main(arguments) == 4
    one_sentence(capfd, "openvino.bin is damaged")
    (copy / "manifest.json").write_text('{"schema": 99}')
    assert run_main(arguments) == 4
    one_sentence(capfd, "schema 99", "stpm-build")
    assert eval_main(["--bundle", str(copy), "--data", str(parts)]) == 4
    one_sentence(capfd, "schema 99")


def test_no_bundle_at_all(parts, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert run_main(["--camera", str(parts), "--plc", "none"]) == 4
    one_sentence(capfd, "found none", "stpm-build")


def test_plc_port_that_does_not_exist(bundle, parts, capfd):
    arguments = ["--bundle", str(bundle.path), "--camera", str(parts), "--backend", "fake", "--plc", "/dev/ttyUSB77"]
    assert run_main(arguments) == 7
    one_sentence(capfd, "/dev/ttyUSB77", "--plc none")


def test_camera_that_does_not_open(bundle, capfd):
    arguments = ["--bundle", str(bundle.path), "--backend", "fake", "--camera", "/dev/video77", "--plc", "none"]
    assert run_main(arguments) == 6
    one_sentence(capfd, "/dev/video77", "does not open")


def test_openvino_not_installed(bundle, parts, tmp_path, capfd, monkeypatch):
    (tmp_path / "openvino.py").write_text('raise ImportError("not here")')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for the engine process
    assert run_main(["--bundle", str(bundle.path), "--camera", str(parts), "--plc", "none"]) == 5
    one_sentence(capfd, "stpm-edge[cpu]")


def test_evaluation_without_labels(bundle, tmp_path, capfd):
    assert eval_main(["--bundle", str(bundle.path), "--data", str(tmp_path)]) == 3
    one_sentence(capfd, "labelled images")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--camera", "0", "--plc", "none", "--set", "exposure"],
        ["--camera", "0", "--plc", "none", "--fps", "0"],
        ["--camera", "0", "--plc", "none", "--parts", "-1"],
        ["--camera", "0", "--plc", "none", "--heartbeat", "inf"],
    ],
)
def test_wrong_command_line_is_code_2(arguments, capfd):
    with pytest.raises(SystemExit) as ended:
        run_main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize("size", ["32", "100", "256x100", "256x", "0x0", "-64", "256,256"])
def test_a_size_that_the_networks_cannot_halve_is_code_2(size, out, parts, capfd):
    with pytest.raises(SystemExit) as ended:
        build(out, parts, f"--size={size}")
    assert ended.value.code == 2
    assert size in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["camera.source is missing", "--camera"]),
        (["--camera", "0"], ["plc.port is missing", "--plc"]),
        (["--camera", "0", "--plc", "none", "--set", "camera.exposre=3"], ["exposre", "did you mean `exposure`"]),
        (["--camera", "0", "--plc", "none", "--set", "gate.mode=delay"], ["gate.delay_ms"]),
        (["--config", "nowhere.toml"], ["nowhere.toml"]),
    ],
)
def test_a_station_that_cannot_be_is_code_2_before_anything_moves(arguments, words, capfd):
    assert run_main(arguments) == 2
    one_sentence(capfd, *words)


def test_a_station_with_a_recipe_that_is_not_loaded(bundle, parts, capfd):
    words = f"--bundle {bundle.path} --camera {parts} --plc none --set recipe=7".split()
    assert run_main(words) == 2
    one_sentence(capfd, "recipe 7", "known are 1")


@pytest.mark.parametrize("out", ["student.pth", "folder"])
def test_a_student_file_that_cannot_be_is_refused_before_training(parts, tmp_path, capfd, out):
    (tmp_path / "folder").mkdir()
    words = ["--category", "bushing", "--data", parts, "--teacher", "builtin", "--work", tmp_path / "work"]
    assert train_main([str(word) for word in [*words, "--out", tmp_path / out]]) == 3
    one_sentence(capfd, ".npz")
    assert not (tmp_path / "work").exists()


def test_an_interrupted_build_goes_on(parts, tmp_path):
    """Ctrl-C during training: code 130, no bundle; the same command again ends with one."""
    import signal
    import time

    command = [
        sys.executable,
        "-m",
        "stpm.build.cli",
        "--engine",
        "fp32",
        "--category",
        "bushing",
        "--data",
        parts,
        "--teacher",
        "builtin",
        "--epochs",
        4,
        "--batch",
        8,
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "b",
    ]
    command = [str(word) for word in command]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # a shell that runs the tests in the background has them ignore Ctrl-C, and their children too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "work").glob("train-*.partial/checkpoint.pth")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "same command again" in errors
    assert not (tmp_path / "b").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "training goes on after epoch" in again.stdout
    assert open_bundle(tmp_path / "b").manifest.precision == "fp32"
