"""The other end of the cable: a PLC that reads the ASCII protocol, works a gate and notices what a real one must.

stpm-plc-sim              opens a pseudo-terminal, prints its name, and shows every line until Ctrl-C
stpm-run --camera photos --plc /dev/pts/7
"""

import os
import select
import sys
import threading
import time
import tty
from collections import Counter
from collections.abc import Callable
from types import TracebackType

from stpm.edge.command import parser, run_command, stop_on_signals
from stpm.edge.plc.protocol import SEQUENCE_MODULUS, Beat, Message, Part, ProtocolError, State, decode

SILENCE_S = 1.5  # three heartbeats


class Gate:
    """What a PLC program keeps: fed with bytes and the time, no I/O of its own."""

    def __init__(self, silence_s: float = SILENCE_S) -> None:
        self.passed: list[int] = []  # ids of parts that were let through
        self.rejected: list[int] = []
        self.verdicts: Counter[str] = Counter()
        self.states: list[str] = []
        self.beats = self.damaged = self.lost = self.silences = 0
        self._silence_s, self._last_heard = silence_s, 0.0
        self._expected: int | None = None
        self._rest = b""
        self._newest = 0  # the highest part id so far

    @property
    def ready(self) -> bool:
        return bool(self.states) and self.states[-1] == "READY"

    def feed(self, data: bytes, now: float) -> list[Message]:
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
            booted = message == State("BOOT")
            if self._expected is not None and sequence != self._expected and not booted:
                self.lost += (sequence - self._expected) % SEQUENCE_MODULUS
            self._expected = (sequence + 1) % SEQUENCE_MODULUS
            self._take(message)
            messages.append(message)
        return messages

    def _take(self, message: Message) -> None:
        match message:
            case State(state, _):
                self.states.append(state)
                if state == "BOOT":
                    self._newest = 0
            case Beat(_):
                self.beats += 1
            case Part(id, verdict, _):
                self.verdicts[verdict] += 1
                good = verdict == "PASS" and self.ready and id > self._newest
                (self.passed if good else self.rejected).append(id)
                self._newest = max(self._newest, id)

    def summary(self) -> str:
        return (
            f"PLC: {len(self.passed)} parts let through, {len(self.rejected)} rejected; {self.beats} heartbeats, "
            f"{self.lost} lost and {self.damaged} damaged lines, {self.silences} silences; "
            f"states {' '.join(self.states) or 'none'}"
        )


class PtyPlc:
    """A gate behind a pseudo-terminal; `port` is what stpm-run is given. Reads in its own thread until closed."""

    def __init__(self, show: Callable[[Message], None] | None = None) -> None:
        self.gate, self._show = Gate(), show
        self._ours, theirs = os.openpty()
        tty.setraw(theirs)
        self.port = os.ttyname(theirs)
        # our own handle on their side keeps the terminal alive while nobody else has it open
        self._theirs = theirs
        self._stop, self._woken = os.pipe()
        self._thread = threading.Thread(target=self._read, name="simulated PLC", daemon=True)
        self._thread.start()

    def __enter__(self) -> "PtyPlc":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.write(self._woken, b"x")
        self._thread.join()
        for handle in (self._ours, self._theirs, self._stop, self._woken):
            os.close(handle)

    def _read(self) -> None:
        stopping = False
        while not stopping:
            # after the wake-up, what is still in the terminal is read before the end
            readable, _, _ = select.select([self._ours, self._stop], [], [])
            stopping = self._stop in readable
            while select.select([self._ours], [], [], 0)[0]:
                for message in self.gate.feed(os.read(self._ours, 4096), time.monotonic()):
                    if self._show:
                        self._show(message)


def main(arguments: list[str] | None = None) -> int:
    parser(
        "stpm-plc-sim", "A simulated PLC on a pseudo-terminal, for trying stpm-run without hardware.", "  stpm-plc-sim"
    ).parse_args(arguments)

    def command() -> None:
        with stop_on_signals() as stop, PtyPlc(lambda message: print(message, flush=True)) as plc:
            print(f"reading {plc.port} (Ctrl-C ends it): stpm-run --camera SOURCE --plc {plc.port}", flush=True)
            stop.wait()
        print(plc.gate.summary())

    return run_command("stpm-plc-sim", command, "nothing is left behind")


if __name__ == "__main__":
    sys.exit(main())
