"""The line: parts from their trigger to their verdict, and what is told to whom. No I/O; the time is passed in.

trigger → frame → engine → score → verdict → part → wire, gate, journal

Every part gets exactly one outcome, and every captured frame is one of a part or a counted drop. A part without a PASS
in time is rejected, whatever the reason. What comes too late changes nothing any more.
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from stpm.edge.at_gate import AtGate
from stpm.edge.camera.messages import FrameReady
from stpm.edge.config import Station
from stpm.edge.engine.messages import EngineReady, Inspect, Inspected, InspectionFailed
from stpm.edge.errors import ConfigError, EngineError, PlcError
from stpm.edge.gate import MS
from stpm.edge.health import Health
from stpm.edge.latency import Latency
from stpm.edge.parts import Counts, Part
from stpm.edge.plc import messages as plc
from stpm.edge.plc.base import Link
from stpm.edge.policy import Verdict, judge
from stpm.edge.triggers import LONGEST_GAP, Triggers

NOISE_NS = 1_000_000_000  # between two lines of the journal about noise
FREE_RUN = 0  # the trigger of a frame that answers none


class Engines(Protocol):
    """The loaded recipes."""

    active: int

    def known(self, recipe: int) -> EngineReady:
        """What the engine of that recipe has said of its bundle."""

    def bundle(self, recipe: int) -> str:
        """sha256 of its bundle; empty before its engine has said so."""

    def free(self, recipe: int) -> bool:
        """Whether that engine can take a part now: not busy, starting or dead."""

    def ask(self, recipe: int, question: Inspect, now_ns: int) -> None: ...


class Journal(Protocol):
    def part(self, part: Part, lend: bool) -> bool:
        """True when the journal has borrowed the part's slot for a picture, and gives it back by itself."""

    def outcome(self, part: Part, last: bool) -> None: ...

    def event(self, kind: str, text: str) -> None: ...


class Line:
    def __init__(
        self,
        station: Station,
        engines: Engines,
        link: Link,
        journal: Journal,
        take_picture: Callable[[int], bool],
        release: Callable[[int], None],
        report: Callable[[str], None],
        recorded: bool,
    ) -> None:
        self.station, self.engines, self.link, self.journal = station, engines, link, journal
        self._take_picture, self._release, self._report = take_picture, release, report
        self._recorded = recorded  # frames are asked for one by one, so that none waits and none is lost
        self._triggered = station.camera.trigger == "software"
        self._latest = station.camera.policy == "latest" and not recorded
        self.health, self.counts, self.latency = Health(), Counts(), Latency()
        self.gate = AtGate(station.gate, self.health, self.counts, self.latency, self)
        self.enabled = not station.plc.enable
        self.ended = False  # no further frame will come
        self._deadline_ns = round(station.parts.deadline_ms * MS)
        self._expire_ns = round(station.plc.expire_ms * MS)
        self._key = self._id = 0
        self._triggers = Triggers()
        self._noise_told_ns = 0
        self._next_number = 1  # of the camera's frames
        self._asked_for_frame = False
        self._newest: tuple[FrameReady, int] | None = None  # free run, policy latest: waits for the engine since
        self._awaiting: dict[int, Part] = {}  # triggered, no frame yet
        self._queue: deque[Part] = deque()  # with a frame, for the engine
        self._asked: dict[int, Part] = {}  # in an engine
        self._sent: dict[int, Part] = {}  # on the link, by id
        self._rejects_in_a_row = 0
        self._beat_ns = round(station.plc.heartbeat_s * 1e9)
        self._next_beat_ns = 0
        self._peer_heard_ns: int | None = None
        self._announced = plc.State("")

    # --- what happens

    def triggered(self, at_ns: int, number: int | None, now_ns: int) -> None:
        """The PLC says that a part is in front of the camera."""
        stopping = self.finishing or self.health.phase not in ("READY", "RUNNING")
        if not self.enabled or not self._triggered or stopping:
            self.counts.garbage += 1
            why = "inspection is not enabled" if not self.enabled else "the line is not ready, or stops"
            why = why if self._triggered else 'camera.trigger is not "software"'
            self.journal.event("plc", f"a trigger was ignored: {why}")
            doubt = self._triggers.ignore(number)
            if self._triggered and not stopping:
                self._out_of_step(doubt)
            return
        if self._triggers.came_before(number):
            self.counts.garbage += 1
            self.journal.event("plc", f"trigger {number} came twice; the second one is ignored")
            return
        taken = self._triggers.take(number)
        if taken.note:
            self.journal.event("plc", taken.note)
        self._missed(taken.missing, taken.doubt, at_ns, now_ns)
        self.gate.triggered(at_ns)
        part = self._new_part(at_ns, number)
        for each in self._undecided:  # whose picture came before we heard of this part
            if each.frame is not None and self._may_show(part, each, each.frame):
                self.gate.captured(each, each.began_ns)  # where it was when its picture was taken, nobody knows
                self._judge(each, judge(None, 0, _shows_next(part)), now_ns)
        self._awaiting[part.key] = part
        if not self._take_picture(part.key):
            self._judge(part, judge(None, 0, "the camera is not there"), now_ns)

    def frame_ready(self, frame: FrameReady, now_ns: int) -> None:
        lost = frame.number - self._next_number
        self._next_number = frame.number + 1
        self.counts.captured += 1
        self._asked_for_frame = False
        self.latency.add("capture to line", now_ns - frame.captured_ns)
        if self._triggered and frame.trigger:
            part = self._awaiting.pop(frame.trigger, None)
            if part is None:
                self._drop(frame, "came after the deadline of its part")
            else:
                self._got_frame(part, frame, now_ns)
            return
        if self.health.phase not in ("READY", "RUNNING"):
            self.counts.captured += lost
            self.counts.dropped["before READY"] += lost
            self._drop(frame, "before READY")
            return
        self._count_lost(frame.missed + lost, lost, now_ns)
        if not self.enabled:
            self._drop(frame, "not enabled")
        elif self.finishing:
            self._drop(frame, "after the last part")
        elif self._latest and frame.slot is None:
            self._drop(frame, frame.problem)
        elif self._latest and not frame.problem:
            if self._newest is not None:
                self._drop(self._newest[0], "a newer frame came")
            self._newest = frame, now_ns
            self._work(now_ns)
        else:
            self._got_frame(self._new_part(frame.captured_ns), frame, now_ns)

    def inspected(self, answer: Inspected | InspectionFailed, now_ns: int) -> None:
        part = self._asked.pop(answer.part)
        if isinstance(answer, InspectionFailed):
            self._judge(part, judge(None, 0, answer.sentence), now_ns)
        else:
            part.found = answer
            self.latency.add("inspection", answer.ended_ns - answer.began_ns)
            if now_ns - part.began_ns > self._deadline_ns:
                self._late(part, now_ns)
            self._judge(part, judge(answer.score, part.known.threshold), now_ns)
        self._give_back(part)
        self._work(now_ns)

    def engine_lost(self, key: int, sentence: str, now_ns: int) -> None:
        """The engine that had this part is dead; the part is not waited for."""
        part = self._asked.pop(key, None)
        if part is not None:
            self._judge(part, judge(None, 0, sentence), now_ns)
            self._give_back(part)

    def camera_lost(self, sentence: str, now_ns: int) -> None:
        """The camera process is gone: what was asked of it does not come. Its successor counts frames from 1."""
        self._next_number = 1
        self._asked_for_frame = False
        for part in list(self._awaiting.values()):
            self._judge(part, judge(None, 0, sentence), now_ns)
        # an accepting gate passes none that nobody has counted
        counted = self._triggered or self._latest or self._recorded
        uncounted = not (counted or (self.gate.used and self.station.gate.polarity == "accept"))
        if uncounted and not self.finishing and self.health.phase in ("READY", "RUNNING"):
            self._out_of_step(f"{sentence}; how many parts went past meanwhile, nobody has counted")

    def link_event(self, event: plc.Incoming, now_ns: int) -> None:
        match event:
            case plc.Delivered(id, at_ns):
                self._delivered(id, "delivered", at_ns)
            case plc.Acknowledged(id, at_ns):
                self._delivered(id, "acknowledged", at_ns)
            case plc.Undelivered(id, _, reason):
                self._undelivered(id, reason)
            case plc.Connected():
                if self.health.settle("plc"):
                    self.journal.event("plc", "the PLC link is there again")
            case plc.Disconnected(_, sentence):
                if self.health.fault("plc", sentence, PlcError.exit_code):
                    self.alarm(sentence)
                # a gap in the lines of ascii tells whether something was said meanwhile; bits and pins tell nothing
                if self._triggers.unnumbered and self.station.plc.protocol != "ascii":
                    self._out_of_step(f"{sentence}; triggers without numbers may have been lost meanwhile")
            case plc.PeerBeat(at_ns):
                self._peer_heard_ns = at_ns
                if self.health.settle("silence"):
                    self.journal.event("plc", "the PLC beats again")
            case plc.ClearAsked():
                self.clear("the PLC", now_ns)
            case plc.Switched(id, active, at_ns):
                self.gate.switched(id, active, at_ns)
            case plc.Unswitched(id, active, _, reason):
                self.gate.not_switched(id, active, reason, now_ns)
            case plc.GateReleased(_, sentence):
                self.gate.released(sentence)
            case plc.Triggered(at_ns, number):
                self.triggered(at_ns, number, now_ns)
            case plc.Counted(at_ns, count):
                self.gate.counted(at_ns, count)
            case plc.GateTimes(_, delay, pulse_ms):
                self.gate.set_times(delay, pulse_ms)
            case plc.Enabled(_, on):
                if on != self.enabled:
                    self.enabled = on
                    self.journal.event("plc", f"inspection {'enabled' if on else 'disabled'}")
            case plc.Garbage(_, what, lost, count):
                self.counts.garbage += count
                if lost:
                    self._lost_line(what, now_ns)
                else:
                    self.journal.event("plc", what)
            case _:
                raise AssertionError(f"{event} is not for the line")

    def tick(self, now_ns: int) -> None:
        """Everything that is due by now."""
        for part in self._undecided:
            if now_ns - part.began_ns > self._deadline_ns:
                self._late(part, now_ns)
        self._work(now_ns)
        self._listen(now_ns)
        self.gate.tick(now_ns, self.enabled and not self.finishing)
        self._announce()
        if now_ns >= self._next_beat_ns:
            counts = self.counts
            self.link.post(plc.Beat(counts.judged, counts.rejected, counts.late, sum(counts.dropped.values())))
            self._next_beat_ns = now_ns + self._beat_ns

    def due_ns(self) -> int:
        """When `tick` has something to do next, as far as it is known now."""
        times = [part.began_ns + self._deadline_ns + 1 for part in self._undecided]
        gate = self.gate.due_ns()
        return min([self._next_beat_ns, *times, *([gate] if gate is not None else [])])

    def clear(self, by: str, now_ns: int) -> None:
        """Somebody has looked at what is latched. Where ours and the PLC's parts may be different ones, those that are
        still open would be taken for later ones: they get their outcome before that."""
        if "missed" in self.health.conditions:
            self._end_open("FAULT was cleared while it was open", now_ns)
        cleared = self.health.clear()
        self.journal.event("operator", f"{by} cleared {', '.join(cleared) or 'nothing: nothing was latched'}")

    def close(self, now_ns: int) -> None:
        """The link is closed: open parts get their verdict, and what the link has not answered is not delivered."""
        self.stop()
        self._end_open("the line has stopped", now_ns)
        for id in list(self._sent):
            self._undelivered(id, "the line has stopped")

    def stop(self) -> None:
        """No further part: what waits without one is dropped; parts that have begun are still judged."""
        self.ended = True
        if self._newest is not None:
            self._drop(self._newest[0], "stopped")
            self._newest = None

    @property
    def finishing(self) -> bool:
        limit = self.station.parts.limit
        return self.ended or (limit is not None and self.counts.judged + len(self._undecided) >= limit)

    @property
    def finished(self) -> bool:
        """The last part has its outcome: no frame will come, and no part is open anywhere."""
        return self.finishing and not (self._undecided or self._newest or self._sent or self.gate.waiting)

    # --- from trigger to verdict

    @property
    def _undecided(self) -> list[Part]:
        """The parts that have begun and have no verdict."""
        begun = [*self._asked.values(), *self._queue, *self._awaiting.values()]
        return [part for part in begun if part.verdict is None]

    def _new_part(self, began_ns: int, number: int | None = None) -> Part:
        self._key += 1
        self._id = number if number is not None else self._id + 1
        known = self.engines.known(self.engines.active)
        part = Part(self._id, self._key, self.engines.active, known, began_ns)
        self.gate.expect(part)
        if self.health.phase == "READY":
            self.health.phase = "RUNNING"
        return part

    def _missed(self, numbers: range, sentence: str, at_ns: int, now_ns: int) -> None:
        """Parts went past of which nothing was seen: each is rejected, and FAULT stays until somebody has looked."""
        for number in numbers:
            self._judge(self._new_part(at_ns, number), judge(None, 0, sentence), now_ns)
        self._out_of_step(sentence)

    def _end_open(self, sentence: str, now_ns: int) -> None:
        for part in self._undecided:
            self._judge(part, judge(None, 0, sentence), now_ns)

    def _lost_line(self, what: str, now_ns: int) -> None:
        """The PLC has said something that did not arrive; noise may be a thousand such lines a second."""
        if now_ns >= self._noise_told_ns:
            self._noise_told_ns = now_ns + NOISE_NS
            self.journal.event("plc", what)
        expected = self._triggered and self.health.phase in ("READY", "RUNNING")
        self._out_of_step(self._triggers.lost(what, expected))

    def _out_of_step(self, doubt: str) -> None:
        """Where there is a doubt, the PLC's parts and ours may not be the same any more: FAULT until somebody has
        looked."""
        if doubt and self.health.fault("missed", doubt, PlcError.exit_code, latched=True):
            self.alarm(doubt)

    def _count_lost(self, missed: int, captured: int, now_ns: int) -> None:
        """Frames that did not come before this one: the device left them out, or (`captured` of them) we did."""
        self.counts.captured += captured
        if captured:
            self.counts.dropped["lost in the camera"] += captured
        if not missed or not self.enabled or self.finishing:
            return
        sentence = f"the camera lost {missed} frames"
        if self._latest:
            self.journal.event("camera", sentence)
        elif missed > LONGEST_GAP:
            self._id += missed
            self._out_of_step(sentence)
        else:
            first = self._id + 1
            self._missed(range(first, first + missed), sentence, now_ns, now_ns)

    def _got_frame(self, part: Part, frame: FrameReady, now_ns: int) -> None:
        part.frame, part.arrived_ns = frame, now_ns
        doubt = self._doubt(part, frame)
        if doubt:
            self._judge(part, judge(None, 0, doubt), now_ns)
            self._give_back(part)
            return
        self.gate.captured(part, frame.captured_ns)
        if frame.problem or frame.slot is None:
            self._judge(part, judge(None, 0, frame.problem or "the frame could not be kept"), now_ns)
            self._give_back(part)
        elif len(self._queue) >= self.station.parts.queue:
            sentence = f"{len(self._queue)} frames wait for the engine"
            if self.health.warn("overrun", sentence, EngineError.exit_code, latched=True):
                self.alarm(f"overrun: {sentence}")
            self._judge(part, judge(None, 0, f"overrun: {sentence}"), now_ns)
            self._give_back(part)
        else:
            self._queue.append(part)
            self._work(now_ns)

    def _doubt(self, part: Part, frame: FrameReady) -> str:
        """Why its picture may show another part; only a triggered one can be later than its part."""
        waited_ns = frame.captured_ns - part.began_ns
        if waited_ns > self._deadline_ns / 2:
            return f"its picture was taken {waited_ns / MS:.0f} ms after the trigger, and may show another part"
        after = next((each for each in self._awaiting.values() if self._may_show(each, part, frame)), None)
        return _shows_next(after) if after else ""

    def _may_show(self, other: Part, part: Part, frame: FrameReady) -> bool:
        """Whether the picture for `part` may show `other`, which came after it. A recording has its own order."""
        return not self._recorded and part.began_ns < other.began_ns <= frame.captured_ns

    def _work(self, now_ns: int) -> None:
        """Give the engines what they can take; ask a recording for its next frame when none is on its way."""
        while self._queue:
            part = self._queue[0]
            if part.verdict is None and not self.engines.free(part.recipe):
                break
            self._queue.popleft()
            if part.verdict is None:
                self._ask(part, now_ns)
            else:  # too late while it waited
                self._give_back(part)
        if self._newest is not None and self.engines.free(self.engines.active):
            frame, arrived_ns = self._newest
            self._newest = None
            part = self._new_part(frame.captured_ns)
            part.frame, part.arrived_ns = frame, arrived_ns
            self._ask(part, now_ns)
        idle = not (self._asked_for_frame or self._queue or self._asked or self.finishing or self._triggered)
        if self._recorded and idle and self.health.phase in ("READY", "RUNNING"):
            self._asked_for_frame = self._take_picture(FREE_RUN)

    def _ask(self, part: Part, now_ns: int) -> None:
        frame = part.frame
        assert frame is not None
        assert frame.slot is not None
        part.known = self.engines.known(part.recipe)  # a bundle may have been replaced since the part began
        problem = self._misfit(part.known, frame)
        if problem:
            self._judge(part, judge(None, 0, problem), now_ns)
            self._give_back(part)
            return
        part.asked_ns = now_ns
        self._asked[part.key] = part
        with_map = bool(self.station.journal.folder)
        question = Inspect(part.key, frame.slot, frame.shape, part.known.threshold, with_map)
        self.engines.ask(part.recipe, question, now_ns)

    def _misfit(self, known: EngineReady, frame: FrameReady) -> str:
        """Why the bundle cannot judge a frame of that size; empty when it can."""
        height, width = frame.shape[:2]
        if (width, height) == known.photo_size or self.health.simulated:
            self.health.settle("size")
            return ""
        sentence = (
            f"the frame has {width}×{height} pixels and the bundle was built from photos of "
            f"{known.photo_size[0]}×{known.photo_size[1]}"
        )
        if self.health.warn("size", sentence, ConfigError.exit_code):
            self.alarm(f"{sentence}: set camera.width and camera.height")
        return sentence

    def _late(self, part: Part, now_ns: int) -> None:
        if part.verdict is not None:
            return
        self.counts.late += 1
        where = "no frame" if part.frame is None else "no verdict"
        self._judge(part, judge(None, 0, f"{where} within {self.station.parts.deadline_ms:g} ms"), now_ns)

    # --- from verdict to wire, gate and journal

    def _judge(self, part: Part, verdict: Verdict, now_ns: int) -> None:
        """The one outcome of a part; a second one changes nothing."""
        if part.verdict is not None:
            return
        part.verdict, part.judged_ns = verdict, now_ns
        self.counts.verdicts[verdict.verdict] += 1
        self.counts.without_frame += part.frame is None
        self._awaiting.pop(part.key, None)
        earlier = self._sent.pop(part.id, None)
        if earlier is not None:
            self._close(earlier, "undelivered")
        self._sent[part.id] = part
        self.link.post(
            plc.Part(
                part.id,
                verdict.verdict,
                verdict.score,
                part.known.threshold,
                (now_ns - part.captured_ns) / MS,
                part.found.box if part.found else None,
                part.found.area if part.found else 0,
                part.began_ns + self._expire_ns,
            )
        )
        self.gate.judged(part)
        self._alarm(verdict)
        self._tell(part, verdict)
        # an engine that is late still reads the slot: no picture then
        if self.journal.part(part, lend=part.key not in self._asked) and part.frame is not None:
            part.frame = msgspec.structs.replace(part.frame, slot=None)

    def _alarm(self, verdict: Verdict) -> None:
        limit = self.station.parts.alarm_after
        self._rejects_in_a_row = 0 if verdict.verdict == "PASS" else self._rejects_in_a_row + 1
        if self._rejects_in_a_row == 0:
            self.health.settle("rejects")
        elif limit and self._rejects_in_a_row >= limit:
            sentence = f"{self._rejects_in_a_row} parts in a row were rejected"
            if self.health.warn("rejects", sentence):
                self.alarm(sentence)

    def _tell(self, part: Part, verdict: Verdict) -> None:
        score = "-" if verdict.score is None else f"{verdict.score:.3e}"
        name = part.frame.name if part.frame else "no frame"
        reason = f"  {verdict.reason}" if verdict.verdict == "UNKNOWN" else ""
        took = (part.judged_ns - part.captured_ns) / MS
        self._report(f"part {part.id:>6}  {verdict.verdict:<7} {score:>10}  {took:6.1f} ms  {name}{reason}")

    def _delivered(self, id: int, how: str, at_ns: int) -> None:
        part = self._sent.get(id)
        if part is None:
            return
        if part.found is not None:
            total, inspection = at_ns - part.captured_ns, part.found.ended_ns - part.found.began_ns
            self.latency.add("capture to wire", total)
            self.latency.add("overhead", total - inspection - (part.asked_ns - part.arrived_ns))
        self._close(self._sent.pop(id), how)

    def _undelivered(self, id: int, reason: str) -> None:
        part = self._sent.pop(id, None)
        if part is not None:
            self._close(part, "undelivered")
            self.alarm(f"the PLC has not got the verdict of part {id}: {reason}")

    def _close(self, part: Part, delivery: str) -> None:
        part.delivery = delivery
        self.counts.undelivered += delivery == "undelivered"
        self.journal.outcome(part, last=part not in self.gate)

    def _listen(self, now_ns: int) -> None:
        """A PLC that has stopped beating may have stopped reading too."""
        longest_s = self.station.plc.peer_timeout_s
        if not longest_s or self.health.phase not in ("READY", "RUNNING"):
            return
        if self._peer_heard_ns is None:
            self._peer_heard_ns = now_ns
        if now_ns - self._peer_heard_ns > longest_s * 1e9:
            sentence = f"the PLC has not beaten for {longest_s:g} s"
            if self.health.fault("silence", sentence, PlcError.exit_code):
                self.alarm(sentence)

    def _announce(self) -> None:
        """Tell the PLC, the journal and the terminal when the state has changed."""
        health = self.health
        active = self.engines.active
        bundle = self.engines.bundle(active)
        state = plc.State(health.state, health.reason, active, health.code, bundle, self.enabled)
        before, self._announced = self._announced, state
        if state != before:
            self.link.post(state)
        if (state.state, state.reason, state.recipe) != (before.state, before.reason, before.recipe):
            text = f"{state.state}{f' ({state.reason})' if state.reason else ''}, recipe {state.recipe}"
            self.journal.event("state", text)
            self._report(text)

    # --- what the gate tells

    def post(self, message: plc.Gate) -> None:
        self.link.post(message)

    def event(self, kind: str, text: str) -> None:
        self.journal.event(kind, text)

    def alarm(self, sentence: str) -> None:
        self.journal.event("alarm", sentence)
        self._report(f"ALARM: {sentence}")

    def past_gate(self, part: Part) -> None:
        self.journal.outcome(part, last=self._sent.get(part.id) is not part)

    # --- slots

    def _drop(self, frame: FrameReady, reason: str) -> None:
        self.counts.dropped[reason] += 1
        if frame.slot is not None:
            self._release(frame.slot)

    def _give_back(self, part: Part) -> None:
        if part.frame is not None and part.frame.slot is not None:
            self._release(part.frame.slot)
            part.frame = msgspec.structs.replace(part.frame, slot=None)


def _shows_next(part: Part) -> str:
    return f"its picture was taken after the trigger of part {part.id}, and may show that one"
