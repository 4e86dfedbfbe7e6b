"""What is around the line: the wall clock, the disk."""

from stpm.tools.faults.bench import Bench, fill, small_disk
from stpm.tools.faults.clock import Clock
from stpm.tools.faults.scenarios import SkippedError, scenario

HOUR = 3600


@scenario("modbus master")
def clock_steps(bench: Bench) -> None:
    """the wall clock is set by hours: nothing moves"""
    if not Clock.available():
        raise SkippedError("there is no C compiler for the clock that can be set")
    clock = Clock(bench.folder)
    bench.environment = clock.environment
    with bench.peer() as peer, bench.line(peer, plc__peer_timeout_s=2.0) as line:
        line.works()
        for hours in (1, -2, 24, 0):
            with line.fault(f"the clock is set to {hours:+} h"):
                clock.set(hours * HOUR)
                line.stay(0.3)
            line.works(3)
        unknown = line.status()["parts"].get("UNKNOWN", 0)
        bench.expect(unknown == 0, f"{unknown} parts are UNKNOWN because the clock was set")
        bench.expect(peer.states.count("FAULT") == 0, "the line was in FAULT because the clock was set")


@scenario("ascii+ack")
def disk_full(bench: Bench) -> None:
    """the journal's disk is full: parts go on, records wait"""
    point = bench.folder / "disk"
    with small_disk(point, 24) as mounted:
        if not mounted:
            raise SkippedError("mounting a small file system needs root")
        bench.journal = point / "journal"
        with bench.peer() as peer, bench.line(peer, journal__max_gb=0.004) as line:
            line.works()
            with line.fault("no space left"):
                filler = fill(point)
                line.until_state("DEGRADED")
                line.works(30)
                filler.unlink()
            line.returns_to_running()
            line.works()
            unknown = line.status()["parts"].get("UNKNOWN", 0)
            bench.expect(unknown == 0, f"{unknown} parts are UNKNOWN because the disk was full")
