"""The line's side of an engine process."""

from subprocess import Popen

import msgspec

from stpm.edge import errors
from stpm.edge.channel import ChannelClosedError
from stpm.edge.engine.messages import (
    EngineFailed,
    EngineReady,
    EngineSettings,
    FromEngine,
    Inspect,
    Inspected,
    InspectionFailed,
    TestYourself,
)
from stpm.edge.errors import EngineError, StpmError
from stpm.edge.ring import Ring
from stpm.edge.supervisor import Supervisor
from stpm.edge.worker import Worker

MODULE = "stpm.edge.engine.process"
# loading a large engine from a slow disk takes its time; then it hangs
LONGEST_LOADING_NS = 120_000_000_000
# three golden frames, by an engine that is loaded and warm
LONGEST_TEST_NS = 10_000_000_000
# between two attempts to load what does not load: each compiles a model, and takes the cores from those that judge
LONGEST_PAUSE_NS = 30_000_000_000


class EngineHost:
    """One engine process and what is known of it."""

    def __init__(self, settings: EngineSettings, ring: Ring, hang_ns: int) -> None:
        self.settings, self._hang_ns = settings, hang_ns
        self._ring = ring
        self.supervisor = Supervisor(self._start, LONGEST_PAUSE_NS)
        self.known: EngineReady | None = None  # the newest that it said; outlives the process
        self.ready = False
        self.error: StpmError | None = None  # why it is not there
        self._busy: int | None = None
        self._testing = self._retired = False
        self._since_ns = 0  # of the question, or of the start

    def _start(self) -> Worker:
        """A restart is no reload: what judged before must judge again, or nothing."""
        sha256 = self.known.sha256 if self.known else ""
        return Worker(MODULE, msgspec.structs.replace(self.settings, sha256=sha256), FromEngine, self._ring)

    @property
    def free(self) -> bool:
        return self.ready and self._busy is None

    @property
    def gone(self) -> bool:
        return self.supervisor.worker is None

    @property
    def over(self) -> bool:
        """It was retired, has answered, and left nothing."""
        return self._retired and self.supervisor.empty

    def ask(self, question: Inspect, now_ns: int) -> None:
        assert self.supervisor.worker is not None
        self._busy, self._since_ns = question.part, now_ns
        self.supervisor.worker.channel.send(question)  # an engine that does not take it answers nothing: it hangs

    def test(self, now_ns: int) -> None:
        assert self.supervisor.worker is not None
        self.ready, self._testing, self._since_ns = False, True, now_ns
        self.supervisor.worker.channel.send(TestYourself())

    def retire(self) -> None:
        """It is asked nothing more and not started again; it ends when it has answered for the part that it has. To be
        polled until it is over."""
        self._retired, self.ready = True, False

    def fileno(self) -> int | None:
        return self.supervisor.fileno()

    def due_ns(self) -> int | None:
        """When the next start is due."""
        return None if self._retired else self.supervisor.due_ns()

    def poll(self, now_ns: int) -> tuple[list[FromEngine], int | None]:
        """What it says, and the part that is lost with a process that has died or was killed because it hangs."""
        refused = self.supervisor.refused
        if self._retired:
            self.supervisor.reap(now_ns)
        elif self.supervisor.tick(now_ns):
            self._since_ns = now_ns
            self.error = None if refused else self.error
        if self.supervisor.refused:
            self.error = EngineError(
                f"the system does not start an engine process ({self.supervisor.refused}): it is tried again"
            )
        messages, lost = ([], None) if self.gone else self._hear(now_ns)
        self.supervisor.last_words(now_ns)  # of no use: the part that it had is lost already
        if self._retired and self._busy is None:
            self.supervisor.dismiss(now_ns)
        return messages, lost

    def close(self) -> list[Popen[bytes]]:
        """The run is over. The processes whose end is to be awaited."""
        return self.supervisor.close()

    def _hear(self, now_ns: int) -> tuple[list[FromEngine], int | None]:
        assert self.supervisor.worker is not None
        try:
            messages: list[FromEngine] = self.supervisor.worker.channel.receive()
        except ChannelClosedError as closed:
            return [], self._down(str(closed) or "the engine process has died", now_ns)
        for message in messages:
            match message:
                case EngineReady():
                    self.known, self.ready, self.error = message, not self._retired, None
                    self._testing = False
                    self.supervisor.well(now_ns)
                case Inspected() | InspectionFailed():
                    self._busy = None
                case EngineFailed():  # its last word; it may hang in the driver when it lets go of the device
                    self.error = error_of(message)
                    return messages, self._down(message.sentence, now_ns)
        return messages, self._look_at_clock(now_ns)

    def _look_at_clock(self, now_ns: int) -> int | None:
        """Kill one that hangs."""
        if self._busy is not None:
            limit_ns, what = self._hang_ns, "answered"
        elif self._testing:
            limit_ns, what = LONGEST_TEST_NS, "finished its self test"
        else:
            limit_ns, what = LONGEST_LOADING_NS, "loaded"
        if (self._busy is None and self.ready) or now_ns - self._since_ns <= limit_ns:
            return None
        return self._down(f"the engine has not {what} within {limit_ns / 1e9:g} s", now_ns)

    def _down(self, sentence: str, now_ns: int) -> int | None:
        self.error = self.error or EngineError(sentence)
        self.ready = self._testing = False
        lost, self._busy = self._busy, None
        self.supervisor.down(now_ns)
        return lost


def error_of(failed: EngineFailed) -> StpmError:
    """The error that the engine process met."""
    kind: type[StpmError] = getattr(errors, failed.kind, EngineError)
    return kind(failed.sentence)
