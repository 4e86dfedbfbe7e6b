"""What a scenario has left to be checked: plain data, so that a test can doctor it.

Times of the harness are monotonic seconds; only the gate's times and the journal's are of the wall clock.
"""

import msgspec


class Fault(msgspec.Struct):
    """Something was broken. `gone_s`: when its cause was gone; `recovery_s`: from then to the first PASS that the PLC
    got (None: none came, or none was to be expected)."""

    what: str
    began_s: float
    gone_s: float = 0.0
    recovery_s: float | None = None
    limit_s: float | None = None  # how long the recovery may take
    survived: bool = False


class Books(msgspec.Struct):
    """What the line itself says at its end."""

    captured: int
    without_frame: int
    judged: int
    dropped: int
    verdicts: dict[str, int]
    undelivered: int = 0
    lost_records: int = 0


class Row(msgspec.Struct):
    """A part in the journal."""

    part: int
    frame: str
    verdict: str
    outcome: str
    reason: str
    latency_ms: float | None
    at_s: float  # wall clock, when it was judged


class Wire(msgspec.Struct):
    """What the PLC has heard from one run of the line."""

    passed: list[tuple[float, int]] = []  # when, and which part was let through
    said: list[tuple[float, int, str]] = []  # every verdict that arrived
    last_word: str = ""  # the last state
    last_heard_s: float = 0.0
    openings: list[tuple[float, float]] | None = None  # of an accepting gate, wall clock; None: the PLC has its own


class Sample(msgspec.Struct):
    """Of the main process."""

    at_s: float
    files: int
    memory_kb: int


class Run(msgspec.Struct):
    """One stpm-run, from its start to its end."""

    ready_s: float
    ended_s: float
    killed: bool
    code: int
    books: Books | None  # none when it was killed
    rows: list[Row]
    alarms: list[str]
    lost: int  # records that were handed to the journal and are not in it
    judged_at_least: int  # what it last said of itself
    wire: Wire
    samples: list[Sample]
    more_files: int = 0  # that may stay open by the end: an earlier bundle that stays loaded
    gate_delay_s: float | None = None
    deadline_ms: float = 500.0
    left: list[str] = []  # processes, sockets, files that were still there afterwards


class Evidence(msgspec.Struct):
    faults: list[Fault] = []
    runs: list[Run] = []
    broken: list[str] = []  # what a scenario itself had expected and did not find
    left: list[str] = []  # of the harness


class Result(msgspec.Struct):
    """One line of the table."""

    scenario: str
    link: str
    injected: int
    survived: int
    parts: int
    wrong: int
    lost_records: int
    recovery_s: float | None  # the longest
    grown_kb: int  # memory of the main process, from its first second of work to its end
    took_s: float
    violations: list[str]
    faults: list[Fault]
    skipped: str = ""
    notes: list[str] = []
