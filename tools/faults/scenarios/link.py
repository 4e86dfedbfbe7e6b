"""Cables that are pulled, lines that arrive damaged, PLCs that are silent, refuse, or count wrongly."""

import random
import signal
from collections.abc import Callable
from functools import partial

from stpm.tools.faults.bench import Bench
from stpm.tools.faults.scenarios import scenario

SERIAL_S = 1.0  # from the moment at which it is plugged in again


def _above(limit: int, value: Callable[[], int]) -> bool:
    return value() > limit


def _unplugged(bench: Bench) -> None:
    with bench.peer() as peer, bench.line(peer) as line:
        line.works()
        for seconds in (0.3, 1.2):
            # an open gate could not be closed meanwhile
            with line.fault(f"unplugged for {seconds:g} s", SERIAL_S, latches="" if bench.link == "gate" else None):
                peer.cable.unplug("ours")
                line.until_state("FAULT")
                line.stay(seconds)
                peer.cable.plug("ours")
            line.works()


@scenario("ascii+ack")
def serial_unplugged(bench: Bench) -> None:
    """the serial device vanishes, and comes back"""
    _unplugged(bench)


@scenario("modbus master")
def serial_unplugged_as_master(bench: Bench) -> None:
    """the same, where we write into the PLC"""
    _unplugged(bench)


@scenario("modbus slave")
def serial_unplugged_as_slave(bench: Bench) -> None:
    """the same, where the PLC polls us"""
    _unplugged(bench)


@scenario("gate")
def serial_unplugged_at_the_gate(bench: Bench) -> None:
    """the same, where the line works the gate"""
    _unplugged(bench)


@scenario("ascii+ack")
def half_lines(bench: Bench) -> None:
    """lines of which only the first half arrives"""
    with bench.peer() as peer, bench.line(peer) as line:
        line.works()
        for _ in range(5):
            with line.fault("half a line"):
                peer.cable.half_line("theirs")
                line.until(
                    partial(_above, peer.plc.gate.damaged, lambda: peer.plc.gate.damaged), what="a damaged line"
                )
                peer.plc.say_bytes(b"TRIG,7")  # and half of one of the PLC's
            line.works(2)
        bench.expect(line.status()["garbage"] >= 5, "the halves of the PLC's lines were not noticed")


@scenario("ascii+ack")
def noise(bench: Bench) -> None:
    """bytes that nobody has sent, in both directions"""
    dice = random.Random(bench.seed)
    with bench.peer() as peer, bench.line(peer) as line:
        line.works()
        for _ in range(20):
            with line.fault("noise"):
                peer.cable.noise(dice.randbytes(dice.randint(1, 300)), "ours")
                peer.cable.noise(dice.randbytes(dice.randint(1, 300)), "theirs")
                line.stay(0.02)
        bench.expect(line.status()["garbage"] > 0, "the noise was not noticed")


@scenario("gate")
def gate_lines_damaged(bench: Bench) -> None:
    """every fifth piece of a line to the gate is lost"""
    dice = random.Random(bench.seed)
    with bench.peer() as peer, bench.line(peer) as line:
        line.works()
        with line.fault("lost pieces of lines"):
            peer.cable.garble = lambda data: data if dice.random() > 0.2 else data[: len(data) // 2]
            line.stay(4.0)
            peer.cable.garble = None
        bench.expect(peer.plc.gate.damaged > 0, "no line was damaged")


def _wrong_parity(bench: Bench) -> None:
    """What a receiver that expects another parity makes of bytes: some with another top bit, some lost."""
    dice = random.Random(bench.seed)

    def garbled(data: bytes) -> bytes:
        return bytes(byte ^ 0x80 if dice.random() < 0.5 else byte for byte in data if dice.random() > 0.05)

    with bench.peer() as peer, bench.line(peer) as line:
        line.works()
        with line.fault("wrong parity"):
            peer.cable.garble = garbled
            line.stay(1.5)
            peer.cable.garble = None
        line.works()


@scenario("ascii+ack")
def wrong_parity(bench: Bench) -> None:
    """both ends set to another parity, for a while"""
    _wrong_parity(bench)


@scenario("modbus slave")
def wrong_parity_as_slave(bench: Bench) -> None:
    """the same, where the PLC polls us"""
    _wrong_parity(bench)


def _silent(bench: Bench, seconds: float) -> None:
    with bench.peer() as peer, bench.line(peer, plc__peer_timeout_s=1.0) as line:
        line.works()
        with line.fault(f"the PLC is silent for {seconds:g} s"):
            peer.cable.cut()
            line.until_state("FAULT")
            line.stay(seconds)
            peer.cable.splice()
        line.works()


@scenario("ascii+ack")
def plc_silent(bench: Bench) -> None:
    """the cable is cut: nothing is heard"""
    _silent(bench, 2.0)


@scenario("modbus master")
def plc_silent_as_master(bench: Bench) -> None:
    """the PLC answers nothing"""
    _silent(bench, 2.0)


@scenario("modbus slave")
def plc_silent_as_slave(bench: Bench) -> None:
    """the PLC does not poll"""
    _silent(bench, 2.0)


@scenario("ascii+ack", long=True)
def plc_silent_for_a_minute(bench: Bench) -> None:
    """a real minute"""
    _silent(bench, 60.0)


@scenario("modbus master", long=True)
def plc_silent_for_a_minute_as_master(bench: Bench) -> None:
    """a real minute"""
    _silent(bench, 60.0)


@scenario("modbus slave", long=True)
def plc_silent_for_a_minute_as_slave(bench: Bench) -> None:
    """a real minute"""
    _silent(bench, 60.0)


def _restarted(bench: Bench) -> None:
    with bench.peer() as peer, bench.line(peer) as line:
        for _ in range(5):
            line.works(3)
            with line.fault("the PLC was switched off and on"):
                peer.restart()
        line.works()


@scenario("ascii+ack")
def plc_restarts(bench: Bench) -> None:
    """switched off and on, it has forgotten the state"""
    _restarted(bench)


@scenario("modbus master")
def plc_restarts_as_master(bench: Bench) -> None:
    """the same, where we have written it all long ago"""
    _restarted(bench)


@scenario("ascii+ack")
def state_line_lost(bench: Bench) -> None:
    """the line that says RUNNING after a FAULT is damaged"""
    with bench.peer() as peer, bench.line(peer) as line:
        line.works()
        lost: list[bytes] = []

        def garbled(data: bytes) -> bytes:
            if b"STATE" in data and b"FAULT" not in data and not lost:
                lost.append(data)
                return data.replace(b"STATE", b"STATF")
            return data

        with line.fault("a STATE line is damaged"):
            line.signal("engine", signal.SIGKILL)
            line.until(lambda: peer.state == "FAULT", what="FAULT")
            peer.cable.garble = garbled
            line.until(lambda: lost, what="a line with another state")
        line.works()


@scenario("modbus master")
def plc_refuses(bench: Bench) -> None:
    """the PLC answers every write with an exception"""
    from pymodbus.constants import ExcCodes

    with bench.peer() as peer, bench.line(peer) as line:
        line.works()
        for code in (ExcCodes.DEVICE_BUSY, ExcCodes.DEVICE_FAILURE):
            enough = line.status()["undelivered"] + 3
            with line.fault(f"exception {code.name}"):
                peer.plc.refuse = code
                line.until(partial(_above, enough, lambda: line.status()["undelivered"]), what="undelivered results")
                peer.plc.refuse = None
        line.works()


@scenario("ascii+ack")
def acknowledgements_missing(bench: Bench) -> None:
    """the PLC reads and does not acknowledge"""
    with bench.peer() as peer, bench.line(peer) as line:
        line.works()
        with line.fault("no ACK"):
            peer.plc.acknowledge = False
            line.until(lambda: line.status()["undelivered"] > 10, what="undelivered results")
            peer.plc.acknowledge = True
        line.works()


@scenario("ascii+ack")
def triggers_lost(bench: Bench) -> None:
    """a gap in the triggers: rejects, and FAULT until cleared"""
    with bench.peer() as peer, bench.line(peer, camera__trigger="software") as line:
        peer.trigger_s = 0.08
        line.works(3)
        with line.fault("two triggers lost", times=2):
            peer.number += 2
            missed = {peer.number - 1, peer.number}
            line.until(lambda: peer.state == "FAULT", what="FAULT")
            peer.clear()
        line.works(3)
        peer.trigger_s = None
        line.until_said(peer.number)
        said = {verdict for _, id, verdict in peer.said if id in missed}
        bench.expect(said == {"UNKNOWN"}, f"the verdicts of the missed parts are {said}")


@scenario("modbus slave")
def triggers_come_twice(bench: Bench) -> None:
    """a trigger with the number of the one before is no part"""
    with bench.peer() as peer, bench.line(peer, camera__trigger="software") as line:
        peer.trigger_s = 0.15
        line.works(2)
        for times in range(1, 4):
            with line.fault("a trigger again"):
                peer.trigger(peer.number)
                line.until(partial(_above, times - 1, lambda: line.status()["garbage"]), what="the second trigger")
        peer.trigger_s = None
        line.until_said(peer.number)
        judged, unknown = line.judged, line.status()["parts"].get("UNKNOWN", 0)
        bench.expect(judged == peer.number, f"{peer.number} triggers, and 3 again, made {judged} parts")
        bench.expect(unknown == 0, f"{unknown} parts are UNKNOWN because of triggers that came twice")
