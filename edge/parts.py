"""One inspected item, and the counts over all of them."""

from collections import Counter
from dataclasses import dataclass, field

from stpm.edge.camera.messages import FrameReady
from stpm.edge.engine.messages import EngineReady, Inspected
from stpm.edge.policy import Verdict


@dataclass
class Part:
    """One inspected item."""

    id: int  # on the wire and in the journal: the PLC's number of its trigger, or our own count
    key: int  # of this run, never twice: what camera and engine are asked with
    recipe: int
    known: EngineReady  # of the bundle that judges it
    began_ns: int  # trigger, or capture where frames come by themselves
    frame: FrameReady | None = None
    verdict: Verdict | None = None
    found: Inspected | None = None
    arrived_ns: int = 0  # when its frame was announced to us
    asked_ns: int = 0  # when the engine got it; later than `arrived_ns` when it was busy with another part
    judged_ns: int = 0
    delivery: str = ""  # delivered, acknowledged or undelivered
    gate: str = ""  # passed, rejected or missed, where we work the gate

    @property
    def captured_ns(self) -> int:
        return self.frame.captured_ns if self.frame else self.began_ns


@dataclass
class Counts:
    """captured + without_frame = judged + dropped, once no part is open."""

    captured: int = 0
    without_frame: int = 0  # parts that were triggered and of which no frame came
    dropped: Counter[str] = field(default_factory=Counter)  # frames that are no part's, by reason
    verdicts: Counter[str] = field(default_factory=Counter)
    late: int = 0  # verdicts that were not there in time
    undelivered: int = 0
    garbage: int = 0  # damaged lines, gaps and wrong answers on the link
    gates: Counter[str] = field(default_factory=Counter)

    @property
    def judged(self) -> int:
        return sum(self.verdicts.values())

    @property
    def rejected(self) -> int:
        return self.judged - self.verdicts["PASS"]

    @property
    def balanced(self) -> bool:
        return self.captured + self.without_frame == self.judged + sum(self.dropped.values())
