"""What the line tells a link, and what a link tells the line; the same for every protocol."""

from dataclasses import dataclass, field

STATES = ("BOOT", "SELF_TEST", "READY", "RUNNING", "DEGRADED", "FAULT", "STOPPED")
PASSING = ("READY", "RUNNING", "DEGRADED")  # parts may pass; in every other state the PLC rejects
VERDICTS = ("PASS", "FAIL", "UNKNOWN")
# of what a PLC may set: delay in ms or counts
LONGEST_DELAY, LONGEST_PULSE_MS = 600_000, 10_000


# --- from the line to the PLC


@dataclass(frozen=True)
class State:
    state: str  # one of STATES
    reason: str = ""
    recipe: int = 0
    code: int = 0  # of the fault: the exit code it would have
    bundle: str = ""  # sha256 of the bundle of that recipe; links that can carry it show the first eight digits
    enabled: bool = True  # parts are inspected: what the PLC's ENABLE has come to


@dataclass(frozen=True)
class Part:
    id: int
    verdict: str
    score: float | None
    # for links that can carry more than the verdict
    threshold: float = 0.0
    latency_ms: float = 0.0
    box: tuple[int, int, int, int] | None = None
    area: int = 0
    expires_ns: int | None = field(default=None, compare=False)  # monotonic: of no use to the PLC after that


@dataclass(frozen=True)
class Beat:
    """The line is alive. Without one for `heartbeat_s` the PLC must reject."""

    judged: int
    rejected: int = 0
    late: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Gate:
    """Switch the gate output now. `active` is the level of the output, not the fate of a part.

    The output goes to the level that was asked for last. An edge that a later one overtakes before it got out is not
    sent: so late, it would hit another part.
    """

    id: int  # the part for which it switches
    active: bool


Outgoing = State | Part | Beat | Gate


# --- from the PLC, or the link itself, to the line; `at_ns` is monotonic


@dataclass(frozen=True)
class Connected:
    at_ns: int


@dataclass(frozen=True)
class Disconnected:
    at_ns: int
    sentence: str


@dataclass(frozen=True)
class Triggered:
    """A part is in front of the camera. `number` is the PLC's own count of its triggers, where it has one."""

    at_ns: int
    number: int | None = None


@dataclass(frozen=True)
class Delivered:
    """The last byte of this part's result has been handed to the port, with at most a tenth of a second of line time
    before it, or the PLC has taken the write."""

    id: int
    at_ns: int


@dataclass(frozen=True)
class Acknowledged:
    """The PLC says that it has this part's result."""

    id: int
    at_ns: int


@dataclass(frozen=True)
class Undelivered:
    """This part's result did not reach the PLC, or was not acknowledged, in time. It is not sent again."""

    id: int
    at_ns: int
    reason: str


@dataclass(frozen=True)
class Switched:
    """The gate output of this part has been switched."""

    id: int
    active: bool
    at_ns: int


@dataclass(frozen=True)
class Unswitched:
    """The gate output of this part was not switched to that level, and will not be: late, or refused by the PLC."""

    id: int
    active: bool
    at_ns: int
    reason: str


@dataclass(frozen=True)
class GateReleased:
    """The link has put the gate output to its safe level itself: the line had not been heard from."""

    at_ns: int
    sentence: str


@dataclass(frozen=True)
class Counted:
    """The encoder stood at `count` (unsigned, 32 bits, wraps) at `at_ns`."""

    at_ns: int
    count: int


@dataclass(frozen=True)
class PeerBeat:
    """The PLC's heartbeat has moved."""

    at_ns: int


@dataclass(frozen=True)
class Enabled:
    """The PLC allows or forbids inspection."""

    at_ns: int
    on: bool


@dataclass(frozen=True)
class RecipeAsked:
    at_ns: int
    recipe: int


@dataclass(frozen=True)
class GateTimes:
    """The PLC sets the reject delay (ms or counts) and the pulse (ms). With 0 that of the station's file counts, also
    after another value."""

    at_ns: int
    delay: int
    pulse_ms: int


@dataclass(frozen=True)
class ClearAsked:
    at_ns: int


@dataclass(frozen=True)
class Garbage:
    """Something that is wrong with the line, though it works: noise, a wrong checksum, a gap in the PLC's numbers, an
    exception answer, an adapter that waits. At most one a second of those without `lost`."""

    at_ns: int
    what: str
    lost: bool = False  # something that the PLC said did not arrive, or arrived damaged: it may have been a trigger
    count: int = 1  # so many are told with this one


def gate_times(at_ns: int, delay: int, pulse_ms: int) -> GateTimes | Garbage:
    """What the PLC has set; Garbage where it cannot be meant."""
    if delay <= LONGEST_DELAY and pulse_ms <= LONGEST_PULSE_MS:
        return GateTimes(at_ns, delay, pulse_ms)
    return Garbage(
        at_ns,
        f"the PLC sets a reject delay of {delay} and a pulse of {pulse_ms} ms, at most {LONGEST_DELAY} and "
        f"{LONGEST_PULSE_MS} ms are taken: both stay as they were, correct them in the PLC",
    )


Incoming = (
    Connected
    | Disconnected
    | Triggered
    | Delivered
    | Acknowledged
    | Undelivered
    | Switched
    | Unswitched
    | GateReleased
    | Counted
    | PeerBeat
    | Enabled
    | RecipeAsked
    | GateTimes
    | ClearAsked
    | Garbage
)
