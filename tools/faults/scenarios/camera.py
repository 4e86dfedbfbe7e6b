"""Cameras that go, hang, freeze, or deliver what is no picture."""

import time
from functools import partial
from pathlib import Path

from stpm.tools.faults.bench import Bench
from stpm.tools.faults.scenarios import scenario
from stpm.tools.faults.stream import Mode, Stream

HUNG_S = 3.0  # from the moment at which it hangs: the two seconds of camera.stall_s are in it


def _happened(done: Path, fault: str) -> bool:
    return done.exists() and fault in done.read_text().split()


def _uncounted(bench: Bench) -> str | None:
    """What a camera that was away leaves behind: where the PLC tracks the parts, nobody knows which are whose."""
    return None if bench.link == "gate" else "missed"


def _restarts(bench: Bench, *script: str, limit_s: float | None = None) -> None:
    """Faults of the pattern camera that end its process; each happens once, and its successor is well. Each in a run
    of its own: on a busy machine a second one comes while the first is still being cleared."""
    done = bench.folder / "happened"
    with bench.peer() as peer:
        for fault in script:
            name = fault.partition("@")[0]
            with bench.line(peer, fault, f"once={done}") as line:
                with line.fault(f"camera: {name}", limit_s, latches=_uncounted(bench)) as found:
                    line.until(partial(_happened, done, name), what=name)
                    found.gone_s = found.began_s = time.monotonic()
                    line.until_restarted("camera", 1)
                line.works()


@scenario("ascii+ack")
def camera_goes(bench: Bench) -> None:
    """the device closes; its process dies"""
    _restarts(bench, "close@30", "exit@30")


@scenario("gate")
def camera_hangs(bench: Bench) -> None:
    """a read never returns"""
    _restarts(bench, "hang@25", limit_s=HUNG_S)


@scenario("modbus slave")
def camera_freezes(bench: Bench) -> None:
    """the same picture for ever"""
    _restarts(bench, "freeze@35")


@scenario("gate")
def camera_sends_garbage(bench: Bench) -> None:
    """frames of another kind, damaged frames"""
    with (
        bench.peer() as peer,
        bench.line(peer, "garbage@20", "damage@23", "damage@24", "garbage@28") as line,
        line.fault("damaged frames", times=4),
    ):
        line.until(lambda: line.status()["parts"].get("UNKNOWN", 0) >= 4, what="four parts that are UNKNOWN")


@scenario("modbus master")
def camera_is_slow(bench: Bench) -> None:
    """a picture that comes later than the deadline of its part"""
    done = bench.folder / "happened"
    with (
        bench.peer() as peer,
        bench.line(peer, "slow@60:0.8", f"once={done}", camera__trigger="software", parts__deadline_ms=400.0) as line,
    ):
        peer.trigger_s = 0.2
        line.works(2)
        with line.fault("a picture 0.8 s late") as fault:
            line.until(partial(_happened, done, "slow"), what="a slow picture")
            fault.gone_s = fault.began_s = time.monotonic()
            line.until(lambda: line.status()["late"], what="a part that is late")
        peer.trigger_s = None
        line.until_said(peer.number)


@scenario("ascii")
def camera_loses_frames(bench: Bench) -> None:
    """the device leaves frames out: FAULT until cleared"""
    with bench.peer() as peer, bench.line(peer, "gap@80:2") as line:
        with line.fault("two frames left out"):
            line.until(lambda: peer.state == "FAULT", what="FAULT")
            line.stay(0.2)
            peer.clear()
        bench.expect(line.status()["without frame"] == 2, "the two parts without a frame were not counted")


def _stream(bench: Bench, what: str, mode: Mode) -> None:
    with Stream() as stream, bench.peer() as peer, bench.line(peer, camera=stream.url) as line:
        line.works()
        with line.fault(what, latches=_uncounted(bench)):
            stream.turn(mode)
            line.until_state("FAULT")
            line.stay(1.0)
            stream.turn("well")
        line.works()


@scenario("ascii+ack")
def stream_stops(bench: Bench) -> None:
    """the network camera is unplugged, and comes back"""
    _stream(bench, "HTTP: connection refused", "gone")


@scenario("ascii")
def stream_hangs(bench: Bench) -> None:
    """the network camera is connected and sends nothing"""
    _stream(bench, "HTTP: nothing comes", "silent")


@scenario("modbus slave")
def stream_sends_garbage(bench: Bench) -> None:
    """the network camera sends what is no JPEG"""
    _stream(bench, "HTTP: not a JPEG", "garbage")
