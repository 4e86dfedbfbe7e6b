"""stpm-run as a process, with its camera, engine and journal processes, on a real pseudo-terminal."""

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from stpm.edge import manifest as manifests
from stpm.edge.bundle import file_hash
from stpm.edge.control import Request, ask
from stpm.edge.plc.messages import ClearAsked, Counted, Enabled, RecipeAsked, State, Triggered
from stpm.tools.plc_sim import PtyPlc

RUN = [sys.executable, "-m", "stpm.edge.cli"]
STARTED = []


def command(bundle, parts, port, more=""):
    """stpm-run on the drawn test parts; `more` are further words."""
    fixed = [*RUN, "--bundle", bundle.path, "--plc", port]
    camera = [] if "--camera" in more else ["--camera", parts / "bushing" / "test"]
    return [*map(str, [*fixed, *camera]), *more.split()]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60)


@pytest.fixture(autouse=True)
def _no_line_goes_on():
    """A line that a failed test has left would find the port of the next one."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def start(*arguments):
    """In the background, with scripted verdicts."""
    return begin([*command(*arguments), "--backend", "fake"])


def begin(words):
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in the background has them ignore Ctrl-C, and their children too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    STARTED.append(process)
    return process


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def stop(process):
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    return output


def children(process):
    """Their process ids, by the module they run."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                words = (folder / "cmdline").read_bytes().decode().split("\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if parent == process.pid and "-m" in words:
                found.setdefault(words[words.index("-m") + 1], []).append(int(folder.name))
    return found


def fill(disk):
    with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(b"x" * 4096)
    assert shutil.disk_usage(disk).free < 4096


def rows(journal, query):
    database = sqlite3.connect(f"file:{journal}/journal.sqlite?mode=ro", uri=True)
    try:
        return database.execute(query).fetchall()
    finally:
        database.close()


def test_a_folder_is_judged_and_every_part_reaches_the_plc_and_the_journal(bundle, parts, tmp_path):
    journal = tmp_path / "journal"
    with PtyPlc() as plc:
        result = run(bundle, parts, plc.port, f"--journal {journal}")
    assert result.returncode == 0, result.stderr
    assert "captured 8 = judged 8 + dropped 0" in result.stdout
    gate = plc.gate
    assert gate.states == ["BOOT", "SELF_TEST", "READY", "RUNNING", "STOPPED"]
    assert sorted(gate.passed + gate.rejected) == list(range(1, 9))
    assert gate.damaged == gate.lost == 0
    threshold = bundle.manifest.threshold.value
    records = rows(journal, "SELECT part, verdict, score, outcome, bundle FROM parts ORDER BY part")
    assert [record[0] for record in records] == list(range(1, 9))
    for part, verdict, score, outcome, sha256 in records:
        assert verdict == ("FAIL" if score > threshold else "PASS")
        assert (part in gate.passed) == (verdict == "PASS")
        assert outcome == "delivered"
        assert sha256 == bundle.sha256
    rejects = [part for part, verdict, *_ in records if verdict == "FAIL"]
    pictures = list(journal.glob("pictures/*/*-FAIL.png"))
    assert len(pictures) == len(rejects) > 0


def test_the_office_is_not_needed(bundle, parts, tmp_path):
    """As on an edge box: torch and the other floors cannot be imported, by the line or by its children."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision', 'onnx', 'onnxruntime', 'tqdm') or "
        "name in ('stpm.build', 'stpm.calibration', 'stpm.tools'):\n"
        "            raise ImportError('blocked: ' + name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    words = command(bundle, parts, "none", f"--parts 2 --journal {tmp_path / 'journal'}")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 0, result.stderr
    assert "judged 2" in result.stdout
    blocked = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True, env=environment)
    assert "blocked: torch" in blocked.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_and_the_last_word_is_stopped(bundle, parts, number):
    with PtyPlc() as plc:
        process = start(bundle, parts, plc.port, "--loop --fps 50")
        wait_for(lambda: len(plc.gate.passed) > 5)
        family = [pid for pids in children(process).values() for pid in pids]
        assert len(family) == 2
        process.send_signal(number)
        output, errors = process.communicate(timeout=10)
    assert process.returncode == 0, errors
    assert plc.gate.states[-1] == "STOPPED"
    assert "dropped 0" in output
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]


def test_heartbeats_come_at_their_interval(bundle, parts):
    with PtyPlc() as plc:
        result = run(bundle, parts, plc.port, "--backend fake --fps 2 --heartbeat 0.1 --parts 3")
    assert result.returncode == 0, result.stderr
    assert plc.gate.beats >= 6
    assert plc.gate.silences == 0


def test_a_plc_that_does_not_read_is_told_at_the_end_of_a_recording_with_code_7(bundle, parts):
    ours, theirs = os.openpty()
    try:
        more = "--backend fake --loop --parts 1500 --quiet --set plc.expire_ms=50"
        result = run(bundle, parts, os.ttyname(theirs), more)
    finally:
        os.close(ours)
        os.close(theirs)
    assert result.returncode == 7, result.stderr
    assert "could not be delivered" in result.stderr
    assert "judged 1500" in result.stdout
    assert "Traceback" not in result.stderr


def test_a_plc_that_disappears_and_comes_back_is_found_again(bundle, parts, tmp_path):
    port = tmp_path / "plc"
    first = PtyPlc()
    with first:
        port.symlink_to(first.port)
        process = start(bundle, parts, str(port), "--camera pattern:fps=50 --quiet")
        wait_for(lambda: first.gate.passed)
    port.unlink()
    time.sleep(0.3)
    with PtyPlc() as second:
        port.symlink_to(second.port)
        plugged = time.monotonic()
        wait_for(lambda: second.gate.passed, seconds=5)
        recovered = time.monotonic() - plugged
        output = stop(process)
    assert recovered < 1.0
    assert second.gate.states[-1] == "STOPPED"
    assert "could not be delivered" in output


def test_the_only_bundle_is_found_and_named(bundle, parts, tmp_path):
    shutil.copytree(bundle.path, tmp_path / "bundles" / "only")
    words = [*RUN, "--camera", str(parts / "bushing" / "test"), "--plc", "none", "--parts", "1"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "bundle bundles/only" in result.stdout


def test_the_fake_engine_says_that_it_is_one(bundle, parts):
    seen = []
    with PtyPlc(seen.append) as plc:
        result = run(bundle, parts, plc.port, "--backend fake")
    assert "no part is inspected" in result.stderr
    assert "PASS 6  FAIL 2" in result.stdout
    reasons = {message.state: message.reason for message in seen if isinstance(message, State)}
    assert reasons["READY"] == reasons["RUNNING"] == "SIMULATED"


def test_a_full_disk_does_not_stop_the_line(bundle, parts, small_disk):
    fill(small_disk)
    result = run(bundle, parts, "none", f"--backend fake --journal {small_disk} --loop --parts 200 --quiet")
    assert result.returncode == 0, result.stderr
    assert "judged 200" in result.stdout
    assert "the journal lost" in result.stdout


def test_a_terminal_that_goes_away_does_not_stop_the_line(bundle, parts):
    with PtyPlc() as plc:
        process = start(bundle, parts, plc.port, "--loop --fps 50 --parts 30")
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=30) == 0
        process.stderr.close()
    assert len(plc.gate.passed) == 20
    assert plc.gate.states[-1] == "STOPPED"


def test_a_terminal_that_nobody_reads_does_not_stop_the_line(bundle, parts):
    with PtyPlc() as plc:
        process = start(bundle, parts, plc.port, "--loop --parts 2700")
        wait_for(lambda: len(plc.gate.passed) == 1800, 90)  # more lines than a pipe and our queue hold
        output, _ = process.communicate(timeout=20)
    assert plc.gate.states[-1] == "STOPPED"
    assert "lines left out" in output


def test_a_long_heartbeat_does_not_delay_the_stop(bundle, parts):
    with PtyPlc() as plc:
        process = start(bundle, parts, plc.port, "--fps 0.01 --heartbeat 600")
        wait_for(lambda: plc.gate.passed)
        asked = time.monotonic()
        stop(process)
        assert time.monotonic() - asked < 5
    assert plc.gate.states[-1] == "STOPPED"


# --- triggers, gate


def test_triggers_of_the_plc_take_pictures_and_their_numbers_come_back(bundle, parts, tmp_path):
    seen = []
    with PtyPlc(seen.append, acknowledge=True) as plc:
        more = (
            f"--camera pattern:fps=100 --set camera.trigger=software --set plc.acknowledge=true --journal {tmp_path}"
        )
        process = start(bundle, parts, plc.port, more)
        wait_for(lambda: plc.gate.ready)
        for number in (101, 102, 103, 106):
            plc.say(Triggered(0, number))
            wait_for(lambda number=number: number in plc.gate.passed + plc.gate.rejected)
        plc.say(ClearAsked(0))
        wait_for(lambda: plc.gate.states[-1] == "RUNNING")
        stop(process)
    assert plc.gate.verdicts == {"PASS": 3, "FAIL": 1, "UNKNOWN": 2}
    assert set(plc.gate.passed) <= {101, 102, 106}
    assert "FAULT" in plc.gate.states
    parts_of = dict(rows(tmp_path, "SELECT part, outcome FROM parts"))
    assert parts_of == dict.fromkeys((101, 102, 103, 104, 105, 106), "acknowledged")
    times = [at for (at,) in rows(tmp_path, "SELECT latency_ms FROM parts WHERE verdict != 'UNKNOWN'")]
    assert max(times) < 100


def test_the_gate_switches_at_its_time_after_the_capture(bundle, parts):
    edges = []

    def note(message):
        edges.append((time.monotonic(), message))

    with PtyPlc(note) as plc:
        gate = "--set gate.mode=delay --set gate.delay_ms=200 --set gate.pulse_ms=30 --set gate.polarity=accept"
        process = start(bundle, parts, plc.port, f"--camera pattern:fps=10 --set camera.policy=every {gate} --parts 9")
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert [active for _, active in plc.gate.levels] == [True, False] * 6
    assert "6 passed" in output
    assert "3 rejected" in output
    heard = {message.id: at for at, message in edges if type(message).__name__ == "Part"}
    opened = {message.id: at for at, message in edges if type(message).__name__ == "Gate" and message.active}
    # the verdict comes a few milliseconds after the capture, the gate 200 ms after it
    waits = [opened[id] - heard[id] for id in opened]
    assert all(0.15 < wait < 0.21 for wait in waits), waits


def test_counts_of_an_encoder_move_the_gate(bundle, parts):
    with PtyPlc() as plc:
        gate = "--set gate.mode=encoder --set gate.counts=100 --set gate.pulse_ms=20 --set gate.polarity=accept"
        process = start(bundle, parts, plc.port, f"--camera pattern:fps=10 --set camera.policy=every {gate}")
        wait_for(lambda: plc.gate.states)
        began = time.monotonic()
        while time.monotonic() - began < 3 or not plc.gate.levels:
            plc.say(Counted(0, int((time.monotonic() - began) * 1000)))
            time.sleep(0.01)
            assert time.monotonic() - began < 20
        output = stop(process)
    assert "passed" in output
    assert plc.gate.levels[0][1] is True


def test_inspection_can_be_enabled_and_disabled_by_the_plc(bundle, parts):
    with PtyPlc() as plc:
        process = start(bundle, parts, plc.port, "--camera pattern:fps=50 --set plc.enable=true")
        wait_for(lambda: plc.gate.ready)
        time.sleep(0.3)
        assert not plc.gate.passed
        plc.say(Enabled(0, True))
        wait_for(lambda: plc.gate.passed)
        plc.say(Enabled(0, False))
        time.sleep(0.1)
        count = len(plc.gate.passed)
        time.sleep(0.3)
        assert len(plc.gate.passed) == count
        output = stop(process)
    assert "not enabled" in output


# --- recipes and operators


def test_recipes_are_switched_reloaded_and_rolled_back_while_parts_are_judged(bundles, parts, tmp_path):
    """By the PLC and by stpm-ctl; what is refused changes nothing, and no part is lost over it."""
    one, two = (shutil.copytree(bundles[name].path, tmp_path / name) for name in ("int8", "fp32"))
    socket, journal = tmp_path / "line.sock", tmp_path / "journal"
    station = tmp_path / "station.toml"
    station.write_text(
        f'[recipes]\n1 = "{one}"\n2 = "{two}"\n[control]\nsocket = "{socket}"\n[journal]\nfolder = "{journal}"\n'
    )
    with PtyPlc() as plc:
        words = [*RUN, "--config", station, "--camera", "pattern:fps=50", "--plc", plc.port, "--backend", "fake"]
        words += ["--set", "camera.policy=every", "--quiet"]
        process = begin([*map(str, words)])
        wait_for(lambda: plc.gate.passed)
        tell = lambda verb, recipe=None: ask(str(socket), Request(verb, recipe, "anna"))  # noqa: E731
        assert tell("status").details["recipe"] == 1
        assert tell("recipe", 2).ok
        assert tell("status").details["recipe"] == 2
        judged = sum(tell("status").details["parts"].values())
        wait_for(lambda: sum(tell("status").details["parts"].values()) > judged + 2)
        assert not tell("recipe", 3).ok
        plc.say(RecipeAsked(0, 1))
        wait_for(lambda: tell("status").details["recipe"] == 1)

        # recipe 1 is replaced on disk: by a damaged bundle, which is refused, then by another one
        content = (one / "manifest.json").read_bytes()
        (one / "manifest.json").write_bytes(content[:100])
        refused = tell("reload", 1)
        assert not refused.ok
        assert "damaged" in refused.text
        shutil.rmtree(one)
        shutil.copytree(bundles["fp16"].path, one)
        assert not tell("rollback", 1).ok
        assert tell("reload", 1).ok
        time.sleep(0.2)
        assert tell("rollback", 1).ok
        time.sleep(0.2)
        assert tell("stop").ok
        output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert not plc.gate.verdicts["UNKNOWN"]
    judged_by = [sha for (sha,) in rows(journal, "SELECT bundle FROM parts ORDER BY part")]
    order = [sha for index, sha in enumerate(judged_by) if index == 0 or sha != judged_by[index - 1]]
    named = {bundles[name].sha256: name for name in bundles}
    assert [named[sha] for sha in order] == ["int8", "fp32", "int8", "fp16", "int8"]
    events = [text for (text,) in rows(journal, "SELECT text FROM events WHERE kind = 'recipe'")]
    assert any("the PLC: recipe 1" in text for text in events)
    assert any("anna: recipe 1 loaded again was refused" in text for text in events)
    assert re.search(r"captured (\d+) = judged", output)


def test_a_self_test_that_fails_never_becomes_ready(bundle, parts, tmp_path):
    """An engine whose golden frames come out otherwise."""
    broken = shutil.copytree(bundle.path, tmp_path / "broken")
    file = broken / bundle.manifest.golden.file
    with np.load(file) as golden:
        arrays = {**golden, "scores": golden["scores"] * 3}
    np.savez(file, **arrays)
    files = {**bundle.manifest.files, file.name: file_hash(file)}
    (broken / "manifest.json").write_bytes(manifests.encode(msgspec.structs.replace(bundle.manifest, files=files)))
    with PtyPlc() as plc:
        words = [*RUN, "--bundle", broken, "--camera", parts / "bushing" / "test", "--plc", plc.port]
        result = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 5, result.stderr
    assert "fails its self test" in result.stderr
    assert plc.gate.states == ["BOOT", "SELF_TEST", "FAULT"]


# --- check


def test_check_says_what_is_wrong_and_moves_nothing(bundle, parts, tmp_path):
    with PtyPlc() as plc:
        good = run(bundle, parts, plc.port, f"--check --journal {tmp_path / 'journal'}")
    assert good.returncode == 0, good.stdout + good.stderr
    assert good.stdout.count("ok ") == 5
    assert not (tmp_path / "journal").exists()
    assert not plc.gate.states

    bad = run(bundle, parts, "/dev/ttyUSB77", "--check --camera pattern:fps=50")
    assert bad.returncode == 6
    assert "FAIL  camera" in bad.stdout
    assert "320×320" in bad.stdout
    assert "FAIL  plc" in bad.stdout
    assert "ok    recipe 1" in bad.stdout
