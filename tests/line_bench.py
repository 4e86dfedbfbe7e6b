"""A line with everything around it: engines, link and journal that do what a test says, and a clock in ms."""

from collections import deque

from stpm.edge.camera.messages import FrameReady
from stpm.edge.config import read_station
from stpm.edge.engine.messages import EngineReady, Inspected, InspectionFailed
from stpm.edge.gate import MS
from stpm.edge.line import Line
from stpm.edge.plc import messages as plc

LONG_MS = 10**6
THRESHOLD = 0.5
KNOWN = EngineReady({"backend": "scripted"}, 0.0, "screw", "a" * 64, THRESHOLD, (64, 48), None)


class Engines:
    """Two recipes, each with an engine that is asked and answers when the test says so."""

    def __init__(self):
        self.active = 1
        self.there = {1, 2}
        self.bundles = {}
        self.asked = {}

    def known(self, recipe):
        return self.bundles.get(recipe, KNOWN)

    def bundle(self, recipe):
        return KNOWN.sha256

    def free(self, recipe):
        return recipe in self.there and recipe not in self.asked

    def ask(self, recipe, question, now_ns):
        assert self.free(recipe)
        self.asked[recipe] = question


class Link:
    """Delivers at once, unless told otherwise."""

    def __init__(self):
        self.posted, self.out, self.delivers, self.switches = [], deque(), True, True

    def post(self, message):
        self.posted.append(message)
        if isinstance(message, plc.Part) and self.delivers:
            self.out.append(plc.Delivered(message.id, 0))
        if isinstance(message, plc.Gate) and self.switches:
            self.out.append(plc.Switched(message.id, message.active, -LONG_MS * MS))

    def of(self, kind):
        return [message for message in self.posted if isinstance(message, kind)]

    @property
    def verdicts(self):
        return [(part.id, part.verdict) for part in self.of(plc.Part)]

    @property
    def states(self):
        return [state.state for state in self.of(plc.State)]


class Journal:
    def __init__(self):
        self.parts, self.outcomes, self.events, self.lends = [], {}, [], False
        self.lasts = []

    def part(self, part, lend):
        self.parts.append((part.id, part.verdict.verdict, part.verdict.reason))
        return self.lends and lend and part.frame is not None and part.frame.slot is not None

    def outcome(self, part, last):
        self.outcomes[part.id] = (part.delivery, part.gate, last)
        self.lasts.append((part.id, last))

    def event(self, kind, text):
        self.events.append((kind, text))


class Bench:
    """A line with everything around it, and a clock in milliseconds."""

    def __init__(self, recorded=False, **settings):
        self.station = read_station(None, {name.replace("__", "."): value for name, value in settings.items()})
        self.engines, self.link, self.journal = Engines(), Link(), Journal()
        self.taken, self.released, self.camera_there = [], [], True
        self.ms, self.number, self.free = 0, 0, set(range(100))
        self.line = Line(
            self.station,
            self.engines,
            self.link,
            self.journal,
            self._take,
            self._release,
            lambda text: None,
            recorded,
        )
        self.line.health.phase = "READY"
        self.line.gate.tick(-LONG_MS * MS, True)  # for so long that nothing can have gone past unseen
        self.tick()

    def _take(self, trigger):
        if self.camera_there:
            self.taken.append(trigger)
        return self.camera_there

    def _release(self, slot):
        assert slot not in self.free, "a slot was given back twice"
        self.free.add(slot)

    @property
    def now(self):
        return self.ms * MS

    def tick(self, ms=0):
        self.ms += ms
        while self.link.out:
            self.line.link_event(self.link.out.popleft(), self.now)
        self.line.tick(self.now)

    def frame(self, trigger=None, problem="", missed=0, lost=0, with_slot=True, age_ms=0, size=(64, 48)):
        self.number += 1 + lost
        slot = self.free.pop() if with_slot else None
        width, height = size
        self.line.frame_ready(
            FrameReady(self.number, (self.ms - age_ms) * MS, "f", slot, (height, width, 3), problem, trigger, missed),
            self.now,
        )

    def trigger(self, number=None):
        self.line.link_event(plc.Triggered(self.now, number), self.now)

    def answer(self, score=0.1, recipe=1):
        part = self.engines.asked.pop(recipe).part
        self.line.inspected(Inspected(part, score, None, 0, None, self.now - MS, self.now), self.now)
        self.tick()

    def fail(self, sentence="out of order"):
        part = self.engines.asked.pop(1).part
        self.line.inspected(InspectionFailed(part, "EngineError", sentence), self.now)
        self.tick()

    def settled(self):
        """All parts closed: the books balance and every slot is back."""
        counts = self.line.counts
        assert counts.balanced, counts
        assert len(self.free) == 100
        ids = [id for id, _ in self.link.verdicts]
        assert len(ids) == len(set(ids)) == counts.judged
        assert [id for id, _, _ in self.journal.parts] == ids
        return counts
