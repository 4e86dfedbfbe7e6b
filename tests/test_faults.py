"""A real line, broken on purpose (`python -m stpm.tools.faults`), and that the checks after it see what is wrong."""

import os
import re
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest

from stpm.edge.camera.messages import CameraSettings
from stpm.edge.camera.pattern import PatternSource
from stpm.edge.engine.fake import FakeEngine
from stpm.edge.errors import EngineError
from stpm.edge.selftest import self_test
from stpm.tools.faults.bench import MARK, Bench, family
from stpm.tools.faults.checks import violations
from stpm.tools.faults.clock import Clock
from stpm.tools.faults.evidence import Books, Evidence, Fault, Row, Run, Sample, Wire
from stpm.tools.faults.scenarios import scenarios
from stpm.tools.faults.table import HEAD, Report, row

SCENARIOS = [name for name, each in scenarios().items() if not each.long]


@pytest.fixture(scope="session")
def results(request, bundles, tmp_path_factory):
    """Of the scenarios whose tests were selected: several at a time, since they mostly wait."""
    chosen = [item.callspec.params["name"] for item in request.session.items if "results" in item.fixturenames]
    file = tmp_path_factory.mktemp("faults") / "faults.json"
    words = [
        sys.executable,
        "-m",
        "stpm.tools.faults",
        "--bundle",
        bundles["int8"].path,
        "--json",
        file,
        "--jobs",
        "3",
    ]
    for name in chosen:
        words += ["--only", name]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=600)
    assert file.exists(), done.stdout + done.stderr
    report = msgspec.json.decode(file.read_bytes(), type=Report)
    assert (done.returncode == 0) == (not any(result.violations for result in report.results))
    return {result.scenario: result for result in report.results}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_line_survives(results, name):
    result = results[name]
    if result.skipped:
        pytest.skip(result.skipped)
    assert not result.violations
    assert result.survived == result.injected > 0
    assert result.wrong == 0
    assert result.parts > 0


# --- the checks: what is right, doctored


def evidence():
    """Of a run of 30 parts in which nothing was wrong."""
    rows, said, passed = [], [], []
    for part in range(1, 31):
        verdict = "FAIL" if part % 3 == 0 else "PASS"
        rows.append(Row(part, f"#{part}", verdict, "acknowledged", "", 10.0, 1000.0 + part / 10))
        said.append((10 + part / 10, part, verdict))
        if verdict == "PASS":
            passed.append((10 + part / 10, part))
    run = Run(
        ready_s=10.0,
        ended_s=14.0,
        killed=False,
        code=0,
        books=Books(32, 0, 30, 2, {"PASS": 20, "FAIL": 10, "UNKNOWN": 0}),
        rows=rows,
        alarms=[],
        lost=0,
        judged_at_least=30,
        wire=Wire(passed, said, "STOPPED", 14.0),
        samples=[Sample(10 + number / 10, 20, 50_000) for number in range(40)],
    )
    return Evidence([Fault("something", 11.0, 11.5, 0.2, 1.0, True)], [run])


def test_nothing_is_said_when_all_is_well():
    assert violations(evidence()) == []


def _no_pass(run):
    run.wire.passed.append((13.0, 30))


def _never_judged(run):
    run.wire.passed.append((13.0, 31))
    run.wire.said.append((13.0, 31, "PASS"))


def _passed_twice(run):
    run.wire.passed.append(run.wire.passed[0])


def _another_frame(run):
    run.rows[2].frame = "#4"


def _another_verdict_on_the_wire(run):
    run.wire.said[2] = (11.0, 3, "PASS")


def _too_late(run):
    run.rows[0].latency_ms = 700.0


def _unbalanced(run):
    run.books.dropped = 1


def _missing_in_the_journal(run):
    del run.rows[7]


def _more_lost_than_the_journal_says(run):
    run.books.lost_records = 3


def _reject_that_nobody_knows_of(run):
    run.rows[2].outcome = "undelivered"


def _reject_without_an_outcome(run):
    run.rows[2].outcome = ""


def _last_word(run):
    run.wire.last_word = "RUNNING"


def _passed_after_the_end(run):
    run.wire.passed[-1] = (run.ended_s + 2, run.wire.passed[-1][1])


def _heard_after_kill(run):
    run.killed, run.books, run.wire.last_heard_s = True, None, run.ended_s + 1


def _open_gate(run):
    # part 3 was captured at 1000.29 and is in front of the gate at 1000.54
    run.gate_delay_s, run.wire.openings = 0.25, [(1000.5, 1000.6)]


def _files(run):
    for number, sample in enumerate(run.samples):
        sample.files += number // 10


def _memory(run):
    for number, sample in enumerate(run.samples):
        sample.memory_kb += 500 * number


def _crash(run):
    run.code = 1


def _left(run):
    run.left.append("the control socket is left")


@pytest.mark.parametrize(
    ("doctor", "sentence"),
    [
        (_no_pass, "part 30 was let through, and the journal says FAIL"),
        (_never_judged, "1 parts were let through that the journal does not know"),
        (_passed_twice, "part 1 was let through 2 times"),
        (_another_frame, "part 3 is FAIL, though its frame #4 is a PASS"),
        (_another_verdict_on_the_wire, "part 3 is FAIL in the journal and was PASS on the wire"),
        (_too_late, "part 1 is PASS after 700 ms"),
        (_unbalanced, "captured 32 + without a frame 0 is not judged 30 + dropped 1"),
        (_missing_in_the_journal, "the journal has 29 parts of 30"),
        (_more_lost_than_the_journal_says, "the line says that the journal lost 3 records"),
        (_reject_that_nobody_knows_of, "part 3 was rejected (), with outcome 'undelivered' and without an alarm"),
        (_reject_without_an_outcome, "part 3 was rejected (), with outcome '' and without an alarm"),
        (_last_word, "the last word on the wire is RUNNING"),
        (_passed_after_the_end, "parts [29] were let through 1.5 s and more after the line had ended"),
        (_heard_after_kill, "something was heard 1.0 s after the line was killed"),
        (_open_gate, "the gate was open when part 3 (FAIL) was in front of it"),
        (_files, "3 more files are open at the end"),
        (_memory, "the memory of the main process has grown"),
        (_crash, "stpm-run ended with exit code 1"),
        (_left, "the control socket is left"),
    ],
)
def test_doctored_evidence_is_seen(doctor, sentence):
    doctored = evidence()
    doctor(doctored.runs[0])
    assert any(found.startswith(sentence) for found in violations(doctored)), violations(doctored)


def test_a_recovery_that_did_not_come_or_came_late_is_seen():
    never, late = Fault("never", 11.0, 11.5), Fault("late", 11.0, 11.5, 1.5, 1.0, True)
    assert violations(Evidence([never, late])) == [
        "never: it did not recover",
        "late: recovered after 1.50 s, wanted 1 s",
    ]


def test_lost_records_excuse_what_they_can_explain_and_no_more():
    doctored = evidence()
    run = doctored.runs[0]
    run.lost = 2
    del run.rows[6]
    run.rows[2].outcome = ""
    assert violations(doctored) == []
    del run.rows[10:13]
    assert any("the journal has 26 parts of 30" in found for found in violations(doctored))


# --- the harness itself


def test_a_leaked_process_is_found():
    with subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: "a mark of this test"}) as process:
        deadline = time.monotonic() + 5
        while process.pid not in family("a mark of this test"):
            assert time.monotonic() < deadline
        assert family("another mark") == {}
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert family("a mark of this test") == {}


SABOTAGE = """
import os
from dataclasses import replace
from stpm.edge import policy

judge = policy.judge

def open_judge(*what):
    verdict = judge(*what)
    return replace(verdict, verdict="PASS") if verdict.verdict == "UNKNOWN" else verdict

policy.judge = open_judge

from stpm.edge.camera.host import CameraHost
from stpm.edge.control import Control
from stpm.edge.line import Line
from stpm.edge.plc.link import LinkThread
from stpm.edge.record import Record

Line._drop = lambda line, frame, reason: frame.slot is None or line._release(frame.slot)
Record.outcome = lambda record, part, last: None
LinkThread._say_last = lambda link, last, expected: True
poll, close = CameraHost.poll, Control.close
CameraHost.poll = lambda host, now: (host._ring.progress % 10 or os.open(os.devnull, os.O_RDONLY)) and poll(host, now)
Control.close = lambda control: (close(control), control._path.touch())
"""


def test_a_line_that_is_wrong_in_every_way_is_caught(bundle, tmp_path):
    """It fails open, loses count, leaks, ends without a word and leaves things behind."""
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    bench = Bench("ascii", bundle.path, tmp_path)
    bench.environment = {"PYTHONPATH": str(tmp_path)}
    with bench.peer() as peer, bench.line(peer, engine__script="pattern*3,nan") as line:
        line.until(lambda: time.monotonic() > line.ready_s)
        line.stay(3)
    bench.close()
    found = "\n".join(violations(bench.evidence))
    for wanted in (
        r"captured \d+ \+ without a frame 0 is not judged \d+ \+ dropped 0",
        r"part \d+ is PASS, though its frame #\d+ is a FAIL",
        r"part \d+ was rejected \(score above the threshold\), with outcome '' and without an alarm",
        r"the last word on the wire is RUNNING",
        r"the control socket is left",
        r"\d+ more files are open at the end",
    ):
        assert re.search(wanted, found), found


def test_the_engine_that_reads_the_number_passes_its_self_test_and_fails_each_third_frame(bundle):
    engine, source = FakeEngine.of(bundle, "pattern"), PatternSource("fps=100000", CameraSettings())
    assert self_test(bundle, engine) == 0
    threshold = bundle.manifest.threshold.value
    fails = []
    for number in range(1, 10):
        captured = source.read(1)
        assert captured.name == f"#{number}"
        if engine.inspect(captured.image, threshold).score > threshold:
            fails.append(number)
    assert fails == [3, 6, 9]
    spec = bundle.manifest.preprocess
    with pytest.raises(EngineError, match="no number in a tensor"):
        engine.infer(np.zeros((1, 3, spec.height, spec.width), np.float32))


@pytest.mark.skipif(not Clock.available(), reason="there is no C compiler")
def test_the_clock_moves_the_wall_clock_and_nothing_else(tmp_path):
    clock = Clock(tmp_path)
    code = (
        "import sys, time\n"
        "for _ in sys.stdin:\n"
        "    print(time.time(), time.clock_gettime(time.CLOCK_REALTIME), time.monotonic(), flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **clock.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for offset in (0, 7200, -86400):
            clock.set(offset)
            process.stdin.write("\n")
            process.stdin.flush()
            wall, same, monotonic = map(float, process.stdout.readline().split())
            assert abs(wall - time.time() - offset) < 5
            assert abs(same - time.time() - offset) < 5
            assert abs(monotonic - time.monotonic()) < 5


def test_the_table_fits_and_every_scenario_says_what_it_breaks():
    from stpm.tools.faults.run import result_of

    for each in scenarios().values():
        assert 0 < len(each.about) <= 60, each.name
        assert len(row(result_of(each.name, each.link, evidence(), 12.3))) <= 100
    assert len(HEAD) <= 100
