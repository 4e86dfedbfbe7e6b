"""Engines that raise, hang, answer rubbish, die, or lose their device. After a restart the script begins again."""

from typing import Any

from stpm.tools.faults.bench import Bench
from stpm.tools.faults.scenarios import scenario


def _dies(bench: Bench, script: str, what: str, times: int = 2, **settings: Any) -> None:
    """Each time the engine process ends, another takes over."""
    with bench.peer() as peer, bench.line(peer, engine__script=script, **settings) as line:
        for number in range(1, times + 1):
            with line.fault(what) as fault:
                line.until_restarted("engine", number)
                fault.gone_s = max(at for at, _ in peer.passed)  # the engine was well until then
        line.works()


@scenario("ascii")
def engine_raises(bench: Bench) -> None:
    """single inspections fail: these parts are UNKNOWN"""
    script = "pattern*19,raise,pattern*7,raise*3"
    with bench.peer() as peer, bench.line(peer, engine__script=script) as line:
        with line.fault("an inspection that raises", times=8) as fault:
            line.until(lambda: line.status()["parts"].get("UNKNOWN", 0) >= 8, what="UNKNOWN parts")
            fault.gone_s = max(at for at, _ in peer.passed)
        bench.expect(line.restarts("engine") == 0, "the engine was started again for single failures")


@scenario("ascii+ack")
def engine_raises_always(bench: Bench) -> None:
    """ten failures in a row: another process"""
    _dies(bench, "pattern*25,raise*10", "ten inspections that raise")


@scenario("modbus master")
def engine_answers_nan(bench: Bench) -> None:
    """a score that is no number is UNKNOWN"""
    script = "pattern*11,nan,pattern*4,nan*2"
    with (
        bench.peer() as peer,
        bench.line(peer, engine__script=script) as line,
        line.fault("a score that is NaN", times=6) as fault,
    ):
        line.until(lambda: line.status()["parts"].get("UNKNOWN", 0) >= 6, what="UNKNOWN parts")
        fault.gone_s = max(at for at, _ in peer.passed)


@scenario("gate")
def engine_hangs(bench: Bench) -> None:
    """an inspection that never returns"""
    _dies(bench, "pattern*9,hang", "an inspection that hangs", 1, engine__hang_ms=500.0)


@scenario("ascii+ack")
def engine_dies(bench: Bench) -> None:
    """the process ends in the middle of an inspection"""
    _dies(bench, "pattern*25,exit", "the engine process dies")


@scenario("modbus slave")
def engine_loses_its_device(bench: Bench) -> None:
    """the GPU is gone: another process"""
    _dies(bench, "pattern*12,lost", "the device is lost")
