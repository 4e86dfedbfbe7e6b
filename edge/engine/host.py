"""The line's side of an engine process."""

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


class EngineHost:
    """One engine process and what is known of it."""

    def __init__(self, settings: EngineSettings, ring: Ring, hang_ns: int) -> None:
        self.settings, self._hang_ns = settings, hang_ns
        self._ring = ring
        self.supervisor = Supervisor(self._start)
        self.known: EngineReady | None = None  # the newest that it said; outlives the process
        self.ready = False
        self.error: StpmError | None = None  # why it is not there
        self._busy: int | None = None
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

    def ask(self, question: Inspect, now_ns: int) -> None:
        assert self.supervisor.worker is not None
        self._busy, self._since_ns = question.part, now_ns
        self.supervisor.worker.channel.send(question)  # an engine that does not take it answers nothing: it hangs

    def test(self, now_ns: int) -> None:
        assert self.supervisor.worker is not None
        self.ready, self._since_ns = False, now_ns
        self.supervisor.worker.channel.send(TestYourself())

    def fileno(self) -> int | None:
        return self.supervisor.worker.channel.fileno() if self.supervisor.worker else None

    def poll(self, now_ns: int) -> tuple[list[FromEngine], int | None]:
        """What it says, and the part that is lost with a process that has died or was killed because it hangs."""
        if self.supervisor.tick(now_ns):
            self._since_ns = now_ns
        worker = self.supervisor.worker
        if worker is None:
            return [], None
        messages: list[FromEngine] = []
        try:
            messages = worker.channel.receive()
        except ChannelClosedError:
            return [], self._down("the engine process has died", now_ns)
        for message in messages:
            match message:
                case EngineReady():
                    self.known, self.ready, self.error = message, True, None
                    self.supervisor.well(now_ns)
                case EngineFailed():
                    self.error = error_of(message)
                case Inspected() | InspectionFailed():
                    self._busy = None
        limit = self._hang_ns if self._busy is not None else LONGEST_LOADING_NS
        if (self._busy is not None or not self.ready) and now_ns - self._since_ns > limit:
            return messages, self._down(f"the engine has not answered for {limit / 1e9:g} s", now_ns)
        return messages, None

    def end(self) -> None:
        self.ready = False
        self.supervisor.end(grace_s=1)

    def _down(self, sentence: str, now_ns: int) -> int | None:
        self.error = self.error or EngineError(sentence)
        self.ready = False
        lost, self._busy = self._busy, None
        self.supervisor.down(now_ns)
        return lost


def error_of(failed: EngineFailed) -> StpmError:
    """The error that the engine process met."""
    kind: type[StpmError] = getattr(errors, failed.kind, EngineError)
    return kind(failed.sentence)
