"""SIGKILL and SIGSTOP of every process of the line."""

import random
import signal
import time

from stpm.edge.journal.query import Filter, Journal
from stpm.tools.faults.bench import Bench
from stpm.tools.faults.scenarios import scenario
from stpm.tools.plc_sim import SILENCE_S


def _killed(bench: Bench, role: str, trigger: str = "free", latches: str | None = None) -> None:
    with bench.peer() as peer, bench.line(peer, camera__trigger=trigger) as line:
        peer.trigger_s = 0.15 if trigger == "software" else None
        line.works()
        for number in (1, 2):
            with line.fault(f"SIGKILL of the {role}", latches=latches) as fault:
                line.signal(role, signal.SIGKILL)
                fault.gone_s = time.monotonic()
                line.until_restarted(role, number)
            line.works()


@scenario("ascii+ack")
def camera_killed(bench: Bench) -> None:
    """SIGKILL of the camera process"""
    _killed(bench, "camera", latches="missed")


@scenario("modbus slave")
def camera_killed_with_triggers(bench: Bench) -> None:
    """the same, where the PLC triggers: each part is judged"""
    _killed(bench, "camera", "software")


@scenario("gate")
def engine_killed(bench: Bench) -> None:
    """SIGKILL of the engine process"""
    _killed(bench, "engine")


@scenario("ascii+ack")
def journal_killed(bench: Bench) -> None:
    """SIGKILL of the journal process: no part waits for it"""
    with bench.peer() as peer, bench.line(peer) as line:
        line.works(20)
        for _ in range(2):
            with line.fault("SIGKILL of the journal"):
                killed = line.signal("journal", signal.SIGKILL)
                line.until_state("DEGRADED")
            line.until_other("journal", killed)
            line.returns_to_running()
            line.works(20)  # what waited is written
        line.works(20)
        unknown = line.status()["parts"].get("UNKNOWN", 0)
        bench.expect(unknown == 0, f"{unknown} parts are UNKNOWN because the journal was killed")


def _line_killed(bench: Bench) -> None:
    """The PLC hears silence and lets nothing pass; the next start declares what the journal has lost."""
    with bench.peer() as peer:
        with bench.line(peer) as line:
            line.works(20)
            began = time.monotonic()
            line.kill()
            time.sleep(SILENCE_S + 0.3)
            bench.expect(not peer.passes_since(began + 0.2), "parts were let through after the line was killed")
        lost = bench.evidence.runs[-1].lost
        with bench.line(peer) as line:
            line.recovered("SIGKILL of the line", began + SILENCE_S)
            line.works()
    with Journal(bench.journal) as journal:
        first, second = journal.runs()
        told = [row[3] for row in journal.events(Filter(run=second.id, kind="journal"), 100)]
    bench.expect(first.end == "killed", f"the journal says that the killed run ended as {first.end!r}")
    bench.expect(first.lost == lost, f"{lost} records were lost, the journal says {first.lost}")
    declared = any(f"{lost} records" in text for text in told)
    bench.expect(declared or not lost, f"{lost} lost records were not declared, but {told}")


@scenario("ascii+ack")
def line_killed(bench: Bench) -> None:
    """SIGKILL of stpm-run itself, and another start"""
    _line_killed(bench)


@scenario("gate")
def line_killed_at_the_gate(bench: Bench) -> None:
    """the same, where the line works the gate"""
    _line_killed(bench)


@scenario("modbus master")
def line_killed_as_master(bench: Bench) -> None:
    """the same, where the PLC's memory keeps what was written last"""
    _line_killed(bench)


@scenario("modbus slave")
def line_killed_as_slave(bench: Bench) -> None:
    """the same, where the PLC gets no answer any more"""
    _line_killed(bench)


@scenario("ascii+ack", long=True)
def line_killed_often(bench: Bench) -> None:
    """SIGKILL of stpm-run at ten random moments: no count is lost"""
    dice = random.Random(bench.seed)
    with bench.peer() as peer:
        for _ in range(10):
            with bench.line(peer) as line:
                line.stay(dice.uniform(0, 1.5))
                began = time.monotonic()
                line.kill()
        with bench.line(peer) as line:
            line.recovered("ten times SIGKILL of the line", began)
    with Journal(bench.journal) as journal:
        runs = journal.runs()
    ends = [run.end for run in runs]
    bench.expect(ends == ["killed"] * 10 + ["closed"], f"the journal says that the runs ended {ends}")
    bench.expect(not any(run.pending for run in runs[:-1]), "records of killed runs are neither lost nor written")


@scenario("ascii+ack")
def camera_stopped(bench: Bench) -> None:
    """SIGSTOP of the camera process: shortly, then for good"""
    with bench.peer() as peer, bench.line(peer) as line:
        line.works()
        with line.fault("SIGSTOP of the camera, 0.5 s"):
            line.signal("camera", signal.SIGSTOP)
            line.stay(0.5)
            line.signal("camera", signal.SIGCONT)
        bench.expect(line.restarts("camera") == 0, "the camera was given up after half a second")
        with line.fault("SIGSTOP of the camera for good", 3.0, latches="missed") as fault:
            line.signal("camera", signal.SIGSTOP)
            fault.gone_s = time.monotonic()  # its successor is well
            line.until_restarted("camera", 1)
        line.works()


@scenario("modbus slave")
def engine_stopped(bench: Bench) -> None:
    """SIGSTOP of the engine process: shortly, then for good"""
    with bench.peer() as peer, bench.line(peer, engine__hang_ms=1000.0) as line:
        line.works()
        with line.fault("SIGSTOP of the engine, 0.7 s"):
            line.signal("engine", signal.SIGSTOP)
            line.stay(0.7)
            line.signal("engine", signal.SIGCONT)
        bench.expect(line.restarts("engine") == 0, "the engine was given up before its time")
        with line.fault("SIGSTOP of the engine for good") as fault:
            line.signal("engine", signal.SIGSTOP)
            fault.gone_s = time.monotonic()
            line.until_restarted("engine", 1)
        line.works()


@scenario("ascii+ack")
def journal_stopped(bench: Bench) -> None:
    """SIGSTOP of the journal process for 2 s: nobody waits"""
    with bench.peer() as peer, bench.line(peer) as line:
        line.works()
        with line.fault("SIGSTOP of the journal, 2 s"):
            line.signal("journal", signal.SIGSTOP)
            line.stay(2.0)
            line.signal("journal", signal.SIGCONT)
        line.works()
        status = line.status()
        bench.expect(status["parts"].get("UNKNOWN", 0) == 0, "parts waited for the journal")
        bench.expect(status["lost"]["records"] == 0, "records were lost though the journal went on")


@scenario("ascii+ack", long=True)
def journal_stopped_for_good(bench: Bench) -> None:
    """SIGSTOP of the journal until it is killed, after 20 s"""
    with bench.peer() as peer, bench.line(peer) as line:
        line.works()
        with line.fault("SIGSTOP of the journal for good"):
            stopped = line.signal("journal", signal.SIGSTOP)
            line.until_other("journal", stopped, 40)
        line.returns_to_running()
        line.works()


@scenario("ascii+ack")
def line_stopped(bench: Bench) -> None:
    """SIGSTOP of stpm-run itself: no verdict comes too late"""
    with bench.peer() as peer, bench.line(peer) as line:
        line.works()
        with line.fault("SIGSTOP of the line, 2 s"):
            line.signal("line", signal.SIGSTOP)
            time.sleep(2.0)
            resumed = time.monotonic()
            line.signal("line", signal.SIGCONT)
        first = peer.passes_since(resumed)[0]
        line.works()
        bench.notes.append(f"the first PASS came {first - resumed:.2f} s after SIGCONT")
