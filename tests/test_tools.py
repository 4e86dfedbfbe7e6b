"""Benchmark, evaluation, PLC simulator and the drawn parts."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

from stpm.edge.plc.protocol import Beat, Part, State, encode
from stpm.tools import bench, evaluate
from stpm.tools.parts import DEFECTS, add_defect, draw_part
from stpm.tools.plc_sim import Gate


def test_bench_measures_bundles_in_turn_and_writes_json(bundles, tmp_path, capsys):
    arguments = ["--runs", "5", "--json", str(tmp_path / "latency.json")]
    for precision in ("fp32", "int8"):
        arguments += ["--bundle", str(bundles[precision].path)]
    assert bench.main(arguments) == 0
    report = json.loads((tmp_path / "latency.json").read_text())
    assert report["schema"] == 2
    assert [bundle["precision"] for bundle in report["bundles"]] == ["fp32", "int8"]
    for bundle in report["bundles"]:
        assert list(bundle["stages"]) == ["inspection", "decision", "total"]
        for stage in bundle["stages"].values():
            assert stage["count"] == 5
            assert 0 < stage["p50"] <= stage["p90"] <= stage["p99"] <= stage["max"]
        stages = bundle["stages"]
        assert stages["total"]["p50"] >= stages["inspection"]["p50"] * 0.5
        assert 0 < bundle["inside"]["head"]["p50"] < bundle["inside"]["pyramids"]["p50"]
        assert bundle["inside"]["head"]["count"] == 5
    assert report["bundles"][1]["sha256"] == bundles["int8"].sha256
    printed = capsys.readouterr().out
    assert "× the speed of" in printed
    assert max(len(line) for line in printed.splitlines() if "│" not in line and "/" not in line) <= 100


def test_the_whole_line_is_measured_with_one_bundle(capsys):
    assert bench.main(["--line", "--bundle", "a", "--bundle", "b"]) == 2
    assert "wanted one --bundle with --line, found 2" in capsys.readouterr().err


def test_bench_looks_at_where_its_figures_go_before_it_measures(tmp_path, capsys, monkeypatch):
    words = ["--bundle", str(tmp_path / "nothing"), "--json"]
    assert bench.main([*words, str(tmp_path)]) == 2
    assert "wanted a file for --json, found the folder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert bench.main([*words, str(tmp_path / "file" / "figures.json")]) == 8
    assert f"{tmp_path / 'file'}" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    assert bench.main([*words, str(tmp_path / "figures.json")]) == 8
    assert "Permission denied" in capsys.readouterr().err


def test_bench_measures_the_whole_line(bundle, tmp_path, capsys):
    words = f"--line --bundle {bundle.path} --runs 120 --repeats 1 --json {tmp_path / 'line.json'}"
    assert bench.main(words.split()) == 0
    report = json.loads((tmp_path / "line.json").read_text())
    assert report["sha256"] == bundle.sha256
    figures = report["figures"]
    assert {"overhead", "gate", "serial", "camera", "capture to wire", "bare inspection"} <= set(figures)
    assert figures["overhead"]["count"] > 10
    assert figures["gate"]["count"] > 40
    for spread in figures.values():
        assert 0 < spread["p50"] <= spread["p99"] <= spread["p999"] <= spread["max"]
    # a camera that hangs is noticed after 2 s
    assert figures["camera"]["p50"] > 2000
    assert figures["capture to wire"]["p50"] > figures["overhead"]["p50"]
    printed = capsys.readouterr().out
    assert ("all targets met" in printed) == (not report["missed"])
    assert max(len(line) for line in printed.splitlines() if "│" not in line and "/" not in line) <= 100


def test_evaluation_agrees_with_the_manifest_and_writes_its_report(bundle, parts, tmp_path, capsys):
    assert evaluate.main(["--bundle", str(bundle.path), "--data", str(parts), "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    accuracy = bundle.manifest.accuracy
    for name in ("image_auroc", "pixel_auroc", "aupro"):
        figure = report["figures"][name]
        assert figure["value"] == pytest.approx(getattr(accuracy, name))
        low, high = figure["interval"]
        assert low <= figure["value"] + 1e-3
        assert high >= figure["value"] - 1e-3
    assert sum(kind["images"] for kind in report["kinds"].values()) == len(report["scores"]) == 8
    assert next(iter(report["kinds"])) == "good"
    assert report["kinds"]["good"]["figures"] == {}
    for name, kind in list(report["kinds"].items())[1:]:
        good = [score for image, score in report["scores"].items() if image.startswith("good/")]
        bad = [score for image, score in report["scores"].items() if image.startswith(f"{name}/")]
        above = np.mean([(b > g) + (b == g) / 2 for b in bad for g in good])
        assert kind["figures"]["image_auroc"]["value"] == pytest.approx(above)
        f1 = max(2 * sum(b >= at for b in bad) / (sum(each >= at for each in bad + good) + len(bad)) for at in bad)
        assert kind["figures"]["f1"]["value"] == pytest.approx(f1)
        for figure in kind["figures"].values():
            low, high = figure["interval"]
            assert low - 1e-3 <= figure["value"] <= high + 1e-3
    wrong = {
        name.replace("/", "_")
        for name, score in report["scores"].items()
        if (score > report["threshold"]) == name.startswith("good/")
    }
    assert {path.name for path in (tmp_path / "report" / "wrong").iterdir()} == wrong
    overview = cv2.imread(str(tmp_path / "report" / "overview.png"))
    assert overview.shape == (5 * (128 + 22), 3 * 2 * 128, 3)
    printed = capsys.readouterr().out
    assert "pixel AUROC" in printed
    assert max(map(len, printed.split("\nwritten:")[0].splitlines())) <= 100


def test_evaluation_of_good_parts_alone_is_not_defined_and_does_not_crash(bundle, parts, tmp_path, capsys):
    import shutil

    shutil.copytree(parts / "bushing" / "test" / "good", tmp_path / "test" / "good")
    assert evaluate.main(["--bundle", str(bundle.path), "--data", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("not defined") == 4


def lines(*messages, start=0):
    return b"".join(encode(message, start + index) for index, message in enumerate(messages))


def test_the_gate_opens_for_a_pass_and_nothing_else():
    gate = Gate()
    gate.feed(lines(State("READY"), Part(1, "PASS", 0.1), Part(2, "FAIL", 0.9), Part(3, "UNKNOWN", None)), 0)
    assert gate.passed == [1]
    assert gate.rejected == [2, 3]


def test_a_pass_before_ready_or_after_stopped_is_rejected():
    gate = Gate()
    gate.feed(
        lines(State("SELF_TEST"), Part(1, "PASS", 0.1), State("READY"), State("STOPPED"), Part(2, "PASS", 0.1)), 0
    )
    assert gate.passed == []
    assert gate.rejected == [1, 2]


def test_the_gate_notices_loss_damage_and_silence():
    gate = Gate()
    data = lines(State("READY"), Part(1, "PASS", 0.1), Part(2, "PASS", 0.1), Beat(2))
    first, second, _, fourth = data.splitlines(keepends=True)
    gate.feed(first, 0.0)
    gate.feed(second.replace(b"PASS", b"PASZ"), 0.1)
    assert gate.damaged == 1
    assert gate.passed == []
    gate.feed(fourth, 0.2)
    assert gate.lost == 2
    gate.feed(lines(Beat(2), start=4), 1.0)
    assert gate.silences == 0
    gate.feed(lines(Beat(2), start=5), 9.0)
    assert gate.silences == 1


def test_an_id_that_was_seen_before_is_rejected_until_the_next_boot():
    gate = Gate()
    gate.feed(lines(State("READY"), Part(1, "FAIL", 0.9), Part(1, "PASS", 0.1), Part(2, "PASS", 0.1)), 0)
    assert gate.passed == [2]
    assert gate.rejected == [1, 1]
    gate.feed(lines(State("BOOT", recipe=1), State("READY"), Part(1, "PASS", 0.1)), 0)
    assert gate.passed == [2, 1]
    assert gate.lost == 0


def test_verdicts_need_not_come_in_the_order_of_their_parts():
    """A part that was refused at once is known before those that still wait for the engine."""
    gate = Gate()
    gate.feed(lines(State("READY"), Part(9, "UNKNOWN", None), Part(1, "PASS", 0.1), Part(2, "PASS", 0.1)), 0)
    assert gate.passed == [1, 2]


def test_the_state_counts_once_though_it_comes_with_every_beat():
    gate = Gate()
    gate.feed(lines(State("READY"), Beat(0), State("READY"), Beat(0), State("FAULT"), Beat(0), State("FAULT")), 0)
    assert gate.states == ["READY", "FAULT"]


def test_empty_lines_mean_nothing():
    gate = Gate()
    gate.feed(b"\r\n" + lines(State("READY"), Beat(0)), 0)
    assert gate.ready
    assert gate.damaged == gate.lost == 0


def test_lines_may_come_in_pieces():
    gate = Gate()
    for byte in lines(State("READY"), start=65535) + lines(Part(1, "PASS", 0.5)):
        gate.feed(bytes([byte]), 0)
    assert gate.lost == gate.damaged == 0
    assert gate.passed == [1]


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_drawn_defect_lies_inside_its_mask(kind):
    part, holes = draw_part(5)
    defective, mask = add_defect(part, holes, kind, 5)
    changed = np.abs(defective.astype(int) - part).max(2) > 12
    assert 30 < mask.astype(bool).sum() < 0.02 * mask.size
    inside = changed & cv2.dilate(mask, np.ones((25, 25))).astype(bool)
    assert inside.sum() == changed.sum() > 20
    again, _ = add_defect(*draw_part(5), kind, 5)
    np.testing.assert_array_equal(again, defective)


@pytest.mark.parametrize("command", ["build", "train", "compile_bundle", "evaluate", "bench"])
def test_a_command_without_its_extra_says_what_to_install(command):
    code = (
        "import sys\nfor missing in ('torch', 'tqdm', 'onnx'):\n    sys.modules[missing] = None\n"
        f"from stpm.tools import commands\nsys.exit(commands.{command}())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    errors = result.stderr.strip().splitlines()
    assert len(errors) == 1
    assert "pip install 'stpm-edge[" in errors[0]


def test_installed_commands_lead_to_functions():
    from importlib.metadata import entry_points

    ours = [entry for entry in entry_points(group="console_scripts") if entry.value.startswith("stpm.")]
    assert {entry.name for entry in ours} >= {"stpm-build", "stpm-train", "stpm-run", "stpm-eval", "stpm-bench"}
    assert all(callable(entry.load()) for entry in ours)
