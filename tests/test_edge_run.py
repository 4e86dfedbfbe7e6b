"""stpm-run as a process on a real pseudo-terminal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from stpm.edge.plc.protocol import State
from stpm.tools.plc_sim import PtyPlc

RUN = [sys.executable, "-m", "stpm.edge.cli"]


def command(bundle, parts, port, more=""):
    """stpm-run on the drawn test parts; `more` are further words."""
    fixed = [*RUN, "--bundle", bundle.path, "--camera", parts / "bushing" / "test", "--plc", port]
    return [*map(str, fixed), *more.split()]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60)


def start(*arguments):
    """In the background, with scripted verdicts."""
    words = [*command(*arguments), "--backend", "fake"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_folder_is_judged_and_every_part_reaches_the_plc(bundle, parts, tmp_path):
    with PtyPlc() as plc:
        result = run(bundle, parts, plc.port, f"--results {tmp_path / 'results'}")
    assert result.returncode == 0, result.stderr
    assert "captured 8 = judged 8 + dropped 0" in result.stdout
    gate = plc.gate
    assert gate.states == ["BOOT", "SELF_TEST", "READY", "STOPPED"]
    assert sorted(gate.passed + gate.rejected) == list(range(1, 9))
    assert gate.damaged == gate.lost == 0
    records = [json.loads(line) for line in (tmp_path / "results" / "parts.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == list(range(1, 9))
    threshold = bundle.manifest.threshold.value
    for record in records:
        assert record["verdict"] == ("FAIL" if record["score"] > threshold else "PASS")
        assert (record["id"] in gate.passed) == (record["verdict"] == "PASS")
        pictures = list((tmp_path / "results" / "rejects").glob(f"*-{record['id']:06d}.png"))
        assert len(pictures) == (record["verdict"] == "FAIL")
    assert gate.verdicts["FAIL"] > 0


def test_the_office_is_not_needed(bundle, parts):
    """As on an edge box: torch and the other floors cannot be imported, OpenVINO can."""
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision', 'onnx', 'onnxruntime', 'tqdm') or "
        "name in ('stpm.build', 'stpm.calibration', 'stpm.tools'):\n"
        "            raise ImportError('blocked: ' + name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from stpm.edge.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "--bundle",
        bundle.path,
        "--camera",
        parts / "bushing" / "test",
        "--plc",
        "none",
        "--parts",
        "2",
    ]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "judged 2" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_and_the_last_word_is_stopped(bundle, parts, number):
    with PtyPlc() as plc:
        process = start(bundle, parts, plc.port, "--loop --fps 50")
        wait_for(lambda: len(plc.gate.passed) > 5)
        process.send_signal(number)
        output, errors = process.communicate(timeout=10)
    assert process.returncode == 0, errors
    assert plc.gate.states[-1] == "STOPPED"
    assert "dropped 0" in output
    assert "captured" in output


def test_heartbeats_come_while_no_part_does(bundle, parts):
    with PtyPlc() as plc:
        result = run(bundle, parts, plc.port, "--backend fake --fps 2 --heartbeat 0.1 --parts 3")
    assert result.returncode == 0, result.stderr
    assert plc.gate.beats >= 6
    assert plc.gate.silences == 0


def test_a_plc_that_does_not_read_ends_the_run_with_code_7(bundle, parts):
    ours, theirs = os.openpty()
    try:
        result = run(bundle, parts, os.ttyname(theirs), "--backend fake --loop --quiet")
    finally:
        os.close(ours)
        os.close(theirs)
    assert result.returncode == 7
    assert "did not take a line" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_plc_that_disappears_ends_the_run_with_code_7(bundle, parts):
    ours, theirs = os.openpty()
    name = os.ttyname(theirs)
    process = start(bundle, parts, name, "--loop --fps 50 --quiet")
    received = b""
    while b"PART" not in received:
        received += os.read(ours, 4096)
    os.close(theirs)
    os.close(ours)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 7
    assert "PLC port" in errors
    assert "Traceback" not in errors
    assert "1 verdict could not be delivered" in output


def test_the_only_bundle_is_found_and_named(bundle, parts, tmp_path):
    shutil.copytree(bundle.path, tmp_path / "bundles" / "only")
    words = [*RUN, "--camera", str(parts / "bushing" / "test"), "--plc", "none", "--parts", "1"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "bundle bundles/only: bushing, stpm int8" in result.stdout


def test_the_fake_engine_says_that_it_is_one(bundle, parts):
    result = run(bundle, parts, "none", "--backend fake")
    assert "no part is inspected" in result.stderr
    assert "PASS 6  FAIL 2" in result.stdout


def test_a_full_disk_does_not_stop_the_line(bundle, parts, tmp_path):
    """The records go to a device that is always full; every part is judged all the same."""
    results = tmp_path / "results"
    results.mkdir()
    (results / "parts.jsonl").symlink_to("/dev/full")
    result = run(bundle, parts, "none", f"--backend fake --results {results}")
    assert result.returncode == 0, result.stderr
    assert "captured 8 = judged 8" in result.stdout
    assert "8 records or pictures could not be written" in result.stdout


def test_a_terminal_that_goes_away_does_not_stop_the_line(bundle, parts):
    with PtyPlc() as plc:
        process = start(bundle, parts, plc.port, "--loop --fps 50 --parts 30")
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=30) == 0
        process.stderr.close()
    assert len(plc.gate.passed) == 20
    assert plc.gate.states[-1] == "STOPPED"


def test_a_long_heartbeat_does_not_delay_the_stop(bundle, parts):
    with PtyPlc() as plc:
        process = start(bundle, parts, plc.port, "--fps 0.01 --heartbeat 600")
        wait_for(lambda: plc.gate.passed)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        assert time.monotonic() - asked < 5
    assert plc.gate.states[-1] == "STOPPED"


def test_scripted_verdicts_are_announced_on_the_wire(bundle, parts):
    seen = []
    with PtyPlc(seen.append) as plc:
        run(bundle, parts, plc.port, "--backend fake")
    assert State("READY", "SIMULATED") in seen
