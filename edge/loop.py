"""The line itself: self test, READY, one verdict per part until told to stop, and the safe state at the end.

frame → engine (preprocess, networks, score) → verdict → part → wire
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from stpm.edge.bundle import Bundle
from stpm.edge.camera import Camera, Frame
from stpm.edge.engine import Engine, Inspection
from stpm.edge.errors import DeviceError, EngineError, PlcError, StpmError
from stpm.edge.latency import Latency
from stpm.edge.plc import Link
from stpm.edge.plc.link import Heartbeat
from stpm.edge.plc.protocol import Beat, Message, Part, State
from stpm.edge.policy import Verdict, judge
from stpm.edge.results import Results
from stpm.edge.selftest import self_test

# an engine that fails this often in a row will not recover by itself
FAILURES_IN_A_ROW = 10
# how long a stop may wait for a frame that does not come
LONGEST_WAIT_S = 0.1


@dataclass
class Summary:
    """captured = judged + dropped, always; judged = PASS + FAIL + UNKNOWN."""

    captured: int = 0
    dropped: int = 0
    undelivered: int = 0  # judged, but the link broke before the verdict was out
    verdicts: Counter[str] = field(default_factory=Counter)
    lost_records: int = 0
    latency: Latency = field(default_factory=Latency)

    @property
    def judged(self) -> int:
        return sum(self.verdicts.values())


@dataclass
class Line:
    """One camera, one engine, one PLC link. `report` is told about every part, after the PLC."""

    bundle: Bundle
    engine: Engine
    camera: Camera
    link: Link
    heartbeat_s: float = 0.5
    results: Results | None = None
    report: Callable[[str], None] = print
    parts: int | None = None  # stop after so many

    def __post_init__(self) -> None:
        self.summary = Summary()
        self._beat = Heartbeat(self.heartbeat_s)
        self._failures = 0
        self._failure = EngineError

    def run(self, stop: threading.Event) -> Summary:
        """Judge frames until `stop` is set or the source ends. The last line on the wire is STOPPED or FAULT."""
        last = State("STOPPED")
        try:
            self._start_up()
            if not stop.is_set():
                self._ready()
                self._judge_until(stop)
        except StpmError as error:
            last = State("FAULT", type(error).__name__)
            raise
        except BaseException as error:
            last = State("FAULT", f"unexpected {type(error).__name__}")
            raise
        finally:
            self._shut_down(last)
        return self.summary

    def _start_up(self) -> None:
        self._send(State("BOOT"))
        self._send(State("SELF_TEST"))
        deviation = self_test(self.bundle, self.engine)
        self.engine.warm_up()
        self.report(f"self test passed: largest deviation {deviation:.2%} of the golden scores")

    def _ready(self) -> None:
        simulated = self.engine.describe()["backend"] == "fake"
        self._send(State("READY", "SIMULATED" if simulated else ""))
        self.report("READY")

    def _judge_until(self, stop: threading.Event) -> None:
        while not stop.is_set() and not self.camera.finished and self.summary.judged != self.parts:
            frame = self.camera.read(timeout=min(self._beat.due_in(), LONGEST_WAIT_S))
            if frame is not None:
                self._judge(frame)
            elif self._beat.due_in() == 0:
                self._send(Beat(self.summary.judged))

    def _judge(self, frame: Frame) -> None:
        try:
            inspection, verdict = self._examine(frame)
        except BaseException:
            self.summary.verdicts["UNKNOWN"] += 1
            self.summary.undelivered += 1
            raise
        self.summary.verdicts[verdict.verdict] += 1
        self._deliver(Part(frame.number, verdict.verdict, verdict.score))
        elapsed = time.monotonic_ns() - frame.captured_ns
        self.summary.latency.add("capture to wire", elapsed)
        if self.results is not None:
            self.results.add(frame, verdict, inspection, elapsed / 1e6)
        score = "-" if verdict.score is None else f"{verdict.score:.3e}"
        self.report(
            f"part {frame.number:>6}  {verdict.verdict:<7} {score:>10}  {elapsed / 1e6:6.1f} ms  "
            f"{frame.name}{'  ' + verdict.reason if verdict.verdict == 'UNKNOWN' else ''}"
        )
        if self._failures >= FAILURES_IN_A_ROW:
            raise self._failure(f"the engine has failed and does not recover, the last time: {verdict.reason}")

    def _deliver(self, part: Part) -> None:
        try:
            with self.summary.latency.stage("wire"):
                self._send(part)
        except PlcError:
            self.summary.undelivered += 1
            raise

    def _examine(self, frame: Frame) -> tuple[Inspection | None, Verdict]:
        """The verdict of a frame; whatever goes wrong on the way is UNKNOWN, and that is a reject."""
        threshold = self.bundle.manifest.threshold.value
        if frame.image is None:
            return None, judge(None, threshold, frame.problem)
        stage = self.summary.latency.stage
        try:
            with stage("inspection"):
                inspection = self.engine.inspect(frame.image, threshold, with_map=self.results is not None)
        except EngineError as error:
            # a GPU that is gone does not come back: this part is rejected, and then the line stops
            self._failures += FAILURES_IN_A_ROW if isinstance(error, DeviceError) else 1
            self._failure = type(error)
            return None, judge(None, threshold, str(error))
        except StpmError as error:
            return None, judge(None, threshold, str(error))
        self._failures = 0
        with stage("decision"):
            verdict = judge(inspection.score, threshold)
        return inspection, verdict

    def _send(self, message: Message) -> None:
        self.link.send(message)
        self._beat.sent()

    def _shut_down(self, last: State) -> None:
        """Leave the output in the safe state, whatever else failed before; then let go and count."""
        try:
            self._send(last)
        except PlcError as error:
            # the PLC hears no heartbeat from now on, and rejects
            self.report(f"the last state {last.state} could not be sent: {error}")
        finally:
            self.link.close()
            self.camera.close()
            self.summary.captured, self.summary.dropped = self.camera.captured, self.camera.dropped
            self.summary.lost_records = self.results.lost if self.results else 0
