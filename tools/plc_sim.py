"""The other end of the cable: a PLC that reads the ASCII protocol, works a gate and notices what a real one must.

stpm-plc-sim              opens a pseudo-terminal, prints its name, and shows every line until Ctrl-C
stpm-run --camera photos --plc PORT

With `--protocol modbus-master` or `modbus-slave` (what the station file of stpm-run says) it is the PLC at the other
end of that: see plc_modbus.py.
"""

import os
import select
import sys
import tempfile
import threading
import time
import tty
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import get_args

from stpm.edge.command import parser, run_command, say, stop_on_signals
from stpm.edge.plc.messages import (
    PASSING,
    Acknowledged,
    Beat,
    Incoming,
    Outgoing,
    Part,
    State,
)
from stpm.edge.plc.messages import Gate as GateLevel
from stpm.edge.plc.protocol import SEQUENCE_MODULUS, ProtocolError, decode, encode_plc
from stpm.edge.plc.settings import PlcSettings, Protocol
from stpm.tools.cable import PtyCable

SILENCE_S = 1.5  # three heartbeats


class Gate:
    """What a PLC program keeps: fed with bytes and the time, no I/O of its own."""

    def __init__(self, silence_s: float = SILENCE_S) -> None:
        self.passed: list[int] = []  # ids of parts that were let through
        self.rejected: list[int] = []
        self.verdicts: Counter[str] = Counter()
        self.states: list[str] = []
        self.recipe, self.enabled = 0, False  # as the last STATE says
        self.levels: list[tuple[int, bool]] = []  # of the gate output, and for which part
        self.beats = self.damaged = self.lost = self.silences = 0
        self._silence_s, self._last_heard = silence_s, 0.0
        self._expected: int | None = None
        self._rest = b""
        self._seen: set[int] = set()  # ids; verdicts need not come in the order of their parts

    @property
    def ready(self) -> bool:
        """Parts may pass."""
        return bool(self.states) and self.states[-1] in PASSING

    def feed(self, data: bytes, now: float) -> list[Outgoing]:
        """The messages completed by these bytes."""
        if self.ready and now - self._last_heard > self._silence_s:
            self.silences += 1
        self._last_heard = now
        *lines, self._rest = (self._rest + data).split(b"\n")
        messages = []
        for line in lines:
            if not line.strip():
                continue
            try:
                sequence, message = decode(line)
            except ProtocolError:
                self.damaged += 1
                continue
            booted = isinstance(message, State) and message.state == "BOOT"
            if self._expected is not None and sequence != self._expected and not booted:
                self.lost += (sequence - self._expected) % SEQUENCE_MODULUS
            self._expected = (sequence + 1) % SEQUENCE_MODULUS
            self._take(message)
            messages.append(message)
        return messages

    def _take(self, message: Outgoing) -> None:
        match message:
            case State(state):
                self.recipe, self.enabled = message.recipe, message.enabled
                if not self.states or self.states[-1] != state:  # it comes again with every beat
                    self.states.append(state)
                if state == "BOOT":
                    self._seen.clear()
            case Beat():
                self.beats += 1
            case GateLevel(id, active):
                self.levels.append((id, active))
            case Part(id, verdict):
                self.verdicts[verdict] += 1
                good = verdict == "PASS" and self.ready and id not in self._seen
                (self.passed if good else self.rejected).append(id)
                self._seen.add(id)

    def summary(self) -> str:
        return (
            f"PLC: {len(self.passed)} parts let through, {len(self.rejected)} rejected; {self.beats} heartbeats, "
            f"{self.lost} lost and {self.damaged} damaged lines, {self.silences} silences; "
            f"states {' '.join(self.states) or 'none'}"
        )


class PtyPlc:
    """A gate behind a pseudo-terminal; `port` is what stpm-run is given. Reads in its own thread until closed.

    `device`: the end of a cable to open instead of a terminal of its own. `acknowledge`: answer every PART with ACK.
    """

    def __init__(
        self,
        show: Callable[[Outgoing], None] | None = None,
        acknowledge: bool = False,
        device: str | None = None,
    ) -> None:
        self.gate, self._show = Gate(), show
        self.acknowledge = acknowledge
        self._sequence = 0
        self._saying = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="plc")
        if device is None:
            self._ours, theirs = os.openpty()
            tty.setraw(theirs)
            # a name that goes with us: /dev/pts/7 may be somebody else's tomorrow, and a link would open that
            self.port = str(Path(self._folder.name) / "port")
            os.symlink(os.ttyname(theirs), self.port)
            # our own handle on their side keeps the terminal alive while nobody else has it open
            self._handles = [self._ours, theirs]
        else:
            self._ours = os.open(device, os.O_RDWR | os.O_NOCTTY)
            self.port, self._handles = device, [self._ours]
        self._stop, self._woken = os.pipe()
        self._thread = threading.Thread(target=self._read, name="simulated PLC", daemon=True)
        self._thread.start()

    def say(self, message: Incoming) -> None:
        """One line of the PLC: Triggered, Acknowledged, PeerBeat, Counted, RecipeAsked, Enabled, ClearAsked or
        GateTimes."""
        with self._saying:
            line = encode_plc(message, self._sequence)
            self._sequence = (self._sequence + 1) % SEQUENCE_MODULUS
            os.write(self._ours, line)

    def say_bytes(self, data: bytes) -> None:
        """Noise, or half a line."""
        with self._saying:
            os.write(self._ours, data)

    def lose_a_line(self) -> None:
        """The next line's number leaves one out."""
        with self._saying:
            self._sequence = (self._sequence + 1) % SEQUENCE_MODULUS

    def __enter__(self) -> "PtyPlc":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.write(self._woken, b"x")
        self._thread.join()
        for handle in (*self._handles, self._stop, self._woken):
            os.close(handle)
        self._folder.cleanup()

    def _read(self) -> None:
        stopping = False
        while not stopping:
            # after the wake-up, what is still in the terminal is read before the end
            readable, _, _ = select.select([self._ours, self._stop], [], [])
            stopping = self._stop in readable
            while select.select([self._ours], [], [], 0)[0]:
                try:
                    data = os.read(self._ours, 4096)
                except OSError:  # our end of a cable was unplugged
                    return
                for message in self.gate.feed(data, time.monotonic()):
                    if self.acknowledge and isinstance(message, Part):
                        self.say(Acknowledged(message.id, 0))
                    if self._show:
                        self._show(message)


def main(arguments: list[str] | None = None) -> int:
    options = parser(
        "stpm-plc-sim",
        "A simulated PLC on a pseudo-terminal, for trying stpm-run without hardware.",
        "  stpm-plc-sim\n  stpm-plc-sim --acknowledge\n  stpm-plc-sim --protocol modbus-slave",
    )
    protocols = [name for name in get_args(Protocol) if name != "pins"]
    options.add_argument(
        "--protocol", choices=protocols, default="ascii", help="what stpm-run is set to (default ascii)"
    )
    options.add_argument("--acknowledge", action="store_true", help="ascii: answer every PART with ACK")
    chosen = options.parse_args(arguments)

    def command() -> None:
        if chosen.protocol == "ascii":
            _show_ascii(chosen.acknowledge)
        else:
            _show_modbus(chosen.protocol)

    return run_command("stpm-plc-sim", command, "nothing is left behind")


def _show_ascii(acknowledge: bool) -> None:
    with stop_on_signals() as stop, PtyPlc(lambda message: say(str(message)), acknowledge) as plc:
        say(f"reading {plc.port} (Ctrl-C ends it): stpm-run --camera SOURCE --plc {plc.port}")
        stop.wait()
    say(plc.gate.summary())


def _show_modbus(protocol: str) -> None:
    from stpm.tools.plc_modbus import MasterPlc, SlavePlc

    kind = SlavePlc if protocol == "modbus-master" else MasterPlc
    with stop_on_signals() as stop, PtyCable() as cable, kind(PlcSettings(port=cable.theirs)) as plc:
        say(f'the PLC of `protocol = "{protocol}"` is at {cable.ours} (Ctrl-C ends it)')
        shown = 0
        while not stop.wait(0.1):
            for result in plc.program.results[shown:]:
                shown += 1
                say(f"part {result.part_id} {result.verdict} score {result.score} threshold {result.threshold}")
    say(plc.program.summary())


if __name__ == "__main__":
    sys.exit(main())
