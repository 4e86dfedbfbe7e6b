r"""The ASCII protocol on the serial line: text to bytes and back, without any I/O.

Every line is `BODY*CCCC\r\n`, ASCII. CCCC is the CRC-16/XMODEM of BODY (polynomial 0x1021, start 0), four upper-case
hexadecimal digits. BODY is one of

    STATE,<seq>,<state>[,<reason>]          BOOT, SELF_TEST, READY, FAULT or STOPPED; READY,SIMULATED without an engine
    PART,<seq>,<id>,<verdict>,<score>       PASS, FAIL or UNKNOWN; the score as 1.2345e-03, or NONE
    BEAT,<seq>,<judged>                     when no other line was due: the link and the judging loop are alive

<seq> is 0 with BOOT, counts every line up to 65535 and starts again at 0, so the PLC sees a lost line. <id> counts the
parts from 1 and only grows. Empty lines mean nothing: one is sent first, and one after a failed write. A reason has
no comma, no asterisk and no control character.

What the PLC must do: let a part through only for a PASS with that part's id and a right CRC while the state is READY.
Everything else rejects: FAIL, UNKNOWN, no PASS in time (lost, damaged or late), an id seen before. A gap in <seq>, a
wrong CRC and silence for three heartbeats are alarms.
"""

import binascii
import re
from dataclasses import dataclass

STATES = ("BOOT", "SELF_TEST", "READY", "FAULT", "STOPPED")
VERDICTS = ("PASS", "FAIL", "UNKNOWN")
SEQUENCE_MODULUS = 1 << 16


@dataclass(frozen=True)
class State:
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Part:
    id: int
    verdict: str
    score: float | None


@dataclass(frozen=True)
class Beat:
    judged: int


Message = State | Part | Beat


class ProtocolError(ValueError):
    """A line that is not of this protocol, or was damaged on the way."""


def encode(message: Message, sequence: int) -> bytes:
    """One line, its end included."""
    match message:
        case State(state, reason):
            body = f"STATE,{sequence},{state}" + (f",{_plain(reason)}" if reason else "")
        case Part(id, verdict, score):
            body = f"PART,{sequence},{id},{verdict},{'NONE' if score is None else format(score, '.4e')}"
        case Beat(judged):
            body = f"BEAT,{sequence},{judged}"
    return f"{body}*{_checksum(body):04X}\r\n".encode("ascii")


def decode(line: bytes) -> tuple[int, Message]:
    """The sequence number and message of one line (with or without its end). ProtocolError when it is damaged."""
    try:
        body, found = line.rstrip(b"\r\n").decode("ascii").split("*")
        if found != f"{_checksum(body):04X}":
            raise ProtocolError(f"wrong checksum in {line!r}")
        kind, sequence, *fields = body.split(",")
        return _whole(sequence, SEQUENCE_MODULUS), _message(kind, fields)
    except (ValueError, UnicodeDecodeError) as error:
        if isinstance(error, ProtocolError):
            raise
        raise ProtocolError(f"not a line of this protocol: {line!r}") from error


def _message(kind: str, fields: list[str]) -> Message:
    match kind, fields:
        case "STATE", [state, *reason] if state in STATES and len(reason) <= 1:
            return State(state, *reason)
        case "PART", [id, verdict, score] if verdict in VERDICTS:
            return Part(_whole(id), verdict, None if score == "NONE" else float(score))
        case "BEAT", [judged]:
            return Beat(_whole(judged))
    raise ProtocolError(f"unknown message {kind} with fields {fields}")


def _whole(digits: str, limit: int | None = None) -> int:
    # int() alone would also take " 7", "+7" and "7_0"
    if not digits.isdecimal() or (limit is not None and int(digits) >= limit):
        raise ProtocolError(f"not a number of this protocol: {digits!r}")
    return int(digits)


def _checksum(body: str) -> int:
    return binascii.crc_hqx(body.encode("ascii"), 0)


def _plain(reason: str) -> str:
    return re.sub(r"[^ -~]|[,*]", " ", reason)[:80].strip()
