r"""The ASCII protocol on the serial line: text to bytes and back, both ways, without any I/O.

Every line is `BODY*CCCC\r\n`, ASCII. CCCC is the CRC-16/XMODEM of BODY (polynomial 0x1021, start 0), four upper-case
hexadecimal digits. BODY is one of

    ours
    STATE,<seq>,<state>[,<words>]           one of messages.STATES; comes again after every BEAT, but for BOOT. Words
                                            with a space between: a reason, SIMULATED without an engine; then
                                            recipe=<n>, the one in use, none at first; then enable=0 while no part is
                                            inspected
    PART,<seq>,<id>,<verdict>,<score>       PASS, FAIL or UNKNOWN; the score as 1.2345e-03, or NONE
    BEAT,<seq>,<judged>                     the link and the judging loop are alive
    GATE,<seq>,<id>,<0|1>                   the gate output has this level from now on

    the PLC's
    TRIG,<seq>[,<number>]                   a part is in front of the camera; the PLC's own count of its triggers
    ACK,<seq>,<id>                          the PLC has the PART with that id
    BEAT,<seq>                              the PLC is alive
    COUNT,<seq>,<count>                     the encoder, 32 bits that wrap
    RECIPE,<seq>,<n>                        change to recipe n
    ENABLE,<seq>,<0|1>                      inspect, or do not
    CLEAR,<seq>                             clear the fault
    TIMES,<seq>,<delay>,<pulse_ms>          reject delay (ms or counts, to 600000) and pulse (to 10000); 0:
                                            what the station says

<seq> starts with 0, counts every line of its sender up to 65535 and starts again at 0, so the other side sees a lost
line. <id> is the PLC's number of the trigger, or counts the parts from 1. Empty lines mean nothing: one is sent first,
and one after a failed write. A reason has no comma, no asterisk, no equals sign and no control character.

What the PLC must do: let a part through only for a PASS with that part's id and a right CRC while the state is READY,
RUNNING or DEGRADED. Everything else rejects: FAIL, UNKNOWN, no PASS in time (lost, damaged or late), an id seen
before. A gap in <seq>, a wrong CRC and silence for three heartbeats are alarms.
"""

import binascii
import re

from stpm.edge.plc.messages import (
    STATES,
    VERDICTS,
    Acknowledged,
    Beat,
    ClearAsked,
    Counted,
    Enabled,
    Garbage,
    Gate,
    GateTimes,
    Incoming,
    Outgoing,
    Part,
    PeerBeat,
    RecipeAsked,
    State,
    Triggered,
    gate_times,
)

__all__ = [
    "Beat",
    "Gate",
    "LineReader",
    "Part",
    "ProtocolError",
    "State",
    "decode",
    "decode_plc",
    "encode",
    "encode_plc",
]

SEQUENCE_MODULUS = 1 << 16
U32 = 1 << 32
LONGEST_LINE = 256  # bytes; more without an end is noise


class ProtocolError(ValueError):
    """A line that is not of this protocol, or was damaged on the way."""


# --- ours


def encode(message: Outgoing, sequence: int) -> bytes:
    """One of our lines, its end included."""
    match message:
        case State(state, reason, recipe, _, _, enabled):
            words = [_plain(reason), f"recipe={recipe}" if recipe else "", "" if enabled else "enable=0"]
            body = ",".join(["STATE", str(sequence), state, *filter(None, [" ".join(filter(None, words))])])
        case Part(id, verdict, score):
            body = f"PART,{sequence},{id},{verdict},{'NONE' if score is None else format(score, '.4e')}"
        case Beat(judged):
            body = f"BEAT,{sequence},{judged}"
        case Gate(id, active):
            body = f"GATE,{sequence},{id},{active:d}"
    return _line(body)


def decode(line: bytes) -> tuple[int, Outgoing]:
    """The sequence number and message of one of our lines (with or without its end); of a Part and a State what the
    line carries. ProtocolError when it is damaged."""
    kind, sequence, fields = _fields(line)
    return sequence, _ours(kind, fields)


def _ours(kind: str, fields: list[str]) -> Outgoing:
    match kind, fields:
        case "STATE", [state, *text] if state in STATES and len(text) <= 1:
            words = " ".join(text).split(" ")
            enabled = words[-1] != "enable=0"
            if not enabled:
                words.pop()
            recipe = words.pop().removeprefix("recipe=") if words and words[-1].startswith("recipe=") else "0"
            return State(state, " ".join(words), _whole(recipe), enabled=enabled)
        case "PART", [id, verdict, score] if verdict in VERDICTS:
            return Part(_whole(id), verdict, None if score == "NONE" else _real(score))
        case "BEAT", [judged]:
            return Beat(_whole(judged))
        case "GATE", [id, level]:
            return Gate(_whole(id), _whole(level, 2) == 1)
    raise ProtocolError(f"unknown message {kind} with fields {fields}")


# --- the PLC's


def encode_plc(message: Incoming, sequence: int) -> bytes:
    """One line of the PLC, its end included. TypeError for what a PLC cannot say."""
    match message:
        case Triggered(_, number):
            body = f"TRIG,{sequence}" + (f",{number}" if number is not None else "")
        case Acknowledged(id):
            body = f"ACK,{sequence},{id}"
        case PeerBeat():
            body = f"BEAT,{sequence}"
        case Counted(_, count):
            body = f"COUNT,{sequence},{count}"
        case RecipeAsked(_, recipe):
            body = f"RECIPE,{sequence},{recipe}"
        case Enabled(_, on):
            body = f"ENABLE,{sequence},{on:d}"
        case ClearAsked():
            body = f"CLEAR,{sequence}"
        case GateTimes(_, delay, pulse_ms):
            body = f"TIMES,{sequence},{delay},{pulse_ms}"
        case _:
            raise TypeError(f"a PLC does not say {message}")
    return _line(body)


def decode_plc(line: bytes, at_ns: int) -> tuple[int, Incoming]:
    """The sequence number and message of one line of the PLC that ended at `at_ns`. ProtocolError when damaged."""
    kind, sequence, fields = _fields(line)
    return sequence, _theirs(kind, fields, at_ns)


def _theirs(kind: str, fields: list[str], at_ns: int) -> Incoming:
    match kind, fields:
        case "TRIG", []:
            return Triggered(at_ns)
        case "TRIG", [number]:
            return Triggered(at_ns, _whole(number, U32))
        case "ACK", [id]:
            return Acknowledged(_whole(id), at_ns)
        case "BEAT", []:
            return PeerBeat(at_ns)
        case "COUNT", [count]:
            return Counted(at_ns, _whole(count, U32))
        case "RECIPE", [recipe]:
            return RecipeAsked(at_ns, _whole(recipe, U32))
        case "ENABLE", [level]:
            return Enabled(at_ns, _whole(level, 2) == 1)
        case "CLEAR", []:
            return ClearAsked(at_ns)
        case "TIMES", [delay, pulse_ms]:
            return gate_times(at_ns, _whole(delay, U32), _whole(pulse_ms, U32))
    raise ProtocolError(f"unknown message {kind} with fields {fields}")


class LineReader:
    """Bytes of the PLC to messages. A damaged line and a gap in its numbers become Garbage."""

    def __init__(self) -> None:
        self._rest = b""
        self._expected: int | None = None
        self._joined_late = True

    def reopened(self) -> None:
        """The port was closed in between: its next bytes may begin in the middle of a line. The numbers go on, so
        that what was missed meanwhile shows as a gap."""
        self._rest, self._joined_late = b"", True

    def feed(self, data: bytes, at_ns: int) -> list[Incoming]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        messages: list[Incoming] = []
        for line in lines:
            if line.strip(b"\r"):
                messages += self._take(line, at_ns)
            self._joined_late = False
        if len(self._rest) > LONGEST_LINE:
            what = f"{len(self._rest)} bytes without the end of a line: {self._rest[:32]!r}"
            messages.append(Garbage(at_ns, what, lost=True))
            self._rest = b""
        return messages

    def _take(self, line: bytes, at_ns: int) -> list[Incoming]:
        try:
            kind, sequence, fields = _fields(line)
        except ProtocolError as error:
            # the rest of a line that began before we listened is no fault of the line
            joined_late = self._joined_late and not line.startswith(b"TRIG")
            return [] if joined_late else [Garbage(at_ns, str(error), lost=True)]
        messages: list[Incoming] = []
        expected, self._expected = self._expected, (sequence + 1) % SEQUENCE_MODULUS
        if expected is not None and sequence != expected:
            what = f"the PLC's next line is {sequence}, not {expected}: some are lost"
            messages.append(Garbage(at_ns, what, lost=True))
        try:
            messages.append(_theirs(kind, fields, at_ns))
        except ProtocolError as error:  # it arrived as it was meant, whatever that may be
            messages.append(Garbage(at_ns, str(error), lost=kind == "TRIG"))
        return messages


# --- both


def _line(body: str) -> bytes:
    return f"{body}*{_checksum(body):04X}\r\n".encode("ascii")


def _fields(line: bytes) -> tuple[str, int, list[str]]:
    try:
        body, found = line.rstrip(b"\r\n").decode("ascii").split("*")
        kind, sequence, *fields = body.split(",")
    except (ValueError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a line of this protocol: {_short(line)}") from error
    if found != f"{_checksum(body):04X}":
        raise ProtocolError(f"wrong checksum in {_short(line)}")
    return kind, _whole(sequence, SEQUENCE_MODULUS), fields


def _short(line: bytes) -> str:
    return repr(line[:80])


def _whole(digits: str, limit: int | None = None) -> int:
    # int() alone would also take " 7", "+7" and "7_0"
    if not digits.isdecimal() or len(digits) > 20 or (limit is not None and int(digits) >= limit):
        raise ProtocolError(f"not a number of this protocol: {digits!r}")
    return int(digits)


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ProtocolError(f"not a number of this protocol: {text!r}") from error


def _checksum(body: str) -> int:
    return binascii.crc_hqx(body.encode("ascii"), 0)


def _plain(reason: str) -> str:
    return re.sub(r"[^ -~]|[,*=]", " ", reason)[:80].strip()
