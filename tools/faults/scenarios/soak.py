"""Everything at random, from a seed, for as many parts as are asked for."""

import random
import signal
import time
from collections.abc import Callable

from stpm.tools.faults.bench import Bench, Line
from stpm.tools.faults.peers import AcknowledgingPeer
from stpm.tools.faults.scenarios import scenario

PARTS, PARTS_SHORT = 10_000, 500
FPS = 60
CALM_S = (0.2, 1.5)  # between two faults


@scenario("ascii+ack")
def soak(bench: Bench) -> None:
    """random faults of camera, engine, journal, cable and PLC"""
    dice = random.Random(bench.seed)
    faults = [f"fps={FPS}"]
    for _ in range(12):
        fault, number = dice.choice(("garbage", "damage", "gap", "slow")), dice.randint(150, 2500)
        faults.append(f"{fault}@{number}:{dice.choice((1, 2)) if fault == 'gap' else 0.1}")
    script = f"pattern*{dice.randint(80, 200)},nan,pattern*{dice.randint(80, 200)},raise"
    wanted = PARTS if bench.full else PARTS_SHORT
    with (
        bench.peer() as peer,
        bench.line(peer, *faults, engine__script=script, engine__hang_ms=1000.0, plc__peer_timeout_s=2.0) as line,
    ):
        line.attended = True
        breaks = _breaks(line, peer, dice)
        while line.judged < wanted:
            line.stay(dice.uniform(*CALM_S))
            name = dice.choice(sorted(breaks))
            with line.fault(name):
                breaks[name]()
        bench.notes.append(f"restarts: {line.status()['restarts']}")


def _breaks(line: Line, peer: AcknowledgingPeer, dice: random.Random) -> dict[str, Callable[[], None]]:
    def kill(role: str) -> None:
        line.signal(role, signal.SIGKILL)
        line.stay(0.2)

    def stop(role: str, longest_s: float) -> None:
        pid = line.signal(role, signal.SIGSTOP)
        line.stay(dice.uniform(0.1, longest_s))
        line.signal_pid(pid, signal.SIGCONT)

    def unplug() -> None:
        peer.cable.unplug("ours")
        line.stay(dice.uniform(0.05, 1.0))
        peer.cable.plug("ours")

    def cut() -> None:
        peer.cable.cut()
        line.stay(dice.uniform(0.05, 3.0))
        peer.cable.splice()

    def noise() -> None:
        for _ in range(dice.randint(1, 10)):
            peer.cable.noise(dice.randbytes(dice.randint(1, 100)), dice.choice(("ours", "theirs")))
            line.stay(0.02)

    def garble() -> None:
        peer.cable.garble = lambda data: bytes(byte ^ (1 << dice.randrange(8)) for byte in data)
        line.stay(dice.uniform(0.05, 0.5))
        peer.cable.garble = None

    def no_acknowledgements() -> None:
        peer.plc.acknowledge = False
        line.stay(dice.uniform(0.1, 1.0))
        peer.plc.acknowledge = True

    def stop_line() -> None:
        line.signal("line", signal.SIGSTOP)
        time.sleep(dice.uniform(0.05, 1.0))
        line.signal("line", signal.SIGCONT)

    return {
        "SIGKILL of the camera": lambda: kill("camera"),
        "SIGKILL of the engine": lambda: kill("engine"),
        "SIGKILL of the journal": lambda: kill("journal"),
        "SIGSTOP of the camera": lambda: stop("camera", 3.0),
        "SIGSTOP of the engine": lambda: stop("engine", 1.5),
        "SIGSTOP of the journal": lambda: stop("journal", 3.0),
        "SIGSTOP of the line": stop_line,
        "unplugged": unplug,
        "cut": cut,
        "noise": noise,
        "garbled": garble,
        "half a line": lambda: peer.cable.half_line("theirs"),
        "no ACK": no_acknowledgements,
        "reload": lambda: _reload(line),
    }


def _reload(line: Line) -> None:
    line.more_files = 2  # the earlier bundle stays loaded
    line.tell("reload", 1)
