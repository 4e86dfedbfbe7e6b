"""The Modbus map, without any I/O: what the PLC says as coils and registers, what we say as bits and registers.

Addresses count from the base that [plc.map] gives for each table. 32-bit values take two registers, the **low word
first**; floats are IEEE 754 single precision in the same order; signs are not used. All zero, as a PLC finds it before
the first write and after a power cut, means: nothing valid, not ready, reject.

PASS and FAIL are bits of their own and never each other's absence. Scores are small (often 1e-3), so besides the float
there is a whole number that a PLC without floats can compare: 1000 · score / threshold, where above 1000 is a FAIL.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from stpm.edge.plc.messages import STATES, VERDICTS

U16, U32 = 1 << 16, 1 << 32
MAP_VERSION = 1
NO_SCORE = -1.0
NO_RATIO = U16 - 1  # larger than every threshold


# --- from the PLC


class Coil(IntEnum):
    ENABLE = 0
    TRIGGER = 1  # rising edge; hold it until TRIGGER_ACK
    RESULT_ACK = 2  # raise it while RESULT_VALID is on, drop it when that has fallen
    RECIPE_CHANGE = 3  # rising edge
    CLEAR_FAULT = 4  # rising edge
    PLC_HEARTBEAT = 5  # toggles


CONTROL_COILS = len(Coil)
# recipe, part id (2), reject delay, pulse ms, encoder count (2)
CONTROL_REGISTERS = 7
ENCODER = 5  # first of the encoder's two registers


@dataclass(frozen=True)
class Control:
    """What the PLC has set."""

    enable: bool = False
    trigger: bool = False
    result_ack: bool = False
    recipe_change: bool = False
    clear_fault: bool = False
    heartbeat: bool = False
    recipe: int = 0
    part_id: int = 0  # the PLC's number of the trigger; 0: it does not count
    delay: int = 0
    pulse_ms: int = 0
    count: int = 0


def read_control(coils: Sequence[bool], registers: Sequence[int]) -> Control:
    """`coils` and `registers` from the bases on; more than CONTROL_COILS of the first do not matter."""
    recipe, part_low, part_high, delay, pulse_ms, count_low, count_high = registers[:CONTROL_REGISTERS]
    enable, trigger, result_ack, recipe_change, clear_fault, heartbeat = coils[:CONTROL_COILS]
    return Control(
        enable,
        trigger,
        result_ack,
        recipe_change,
        clear_fault,
        heartbeat,
        recipe,
        part_low + U16 * part_high,
        delay,
        pulse_ms,
        count_low + U16 * count_high,
    )


def control_tables(control: Control) -> tuple[list[bool], list[int]]:
    """The other way round: CONTROL_COILS coils and CONTROL_REGISTERS registers."""
    coils = [
        control.enable,
        control.trigger,
        control.result_ack,
        control.recipe_change,
        control.clear_fault,
        control.heartbeat,
    ]
    return coils, [
        control.recipe,
        *_words(control.part_id),
        control.delay,
        control.pulse_ms,
        *_words(control.count),
    ]


# --- from us


class Bit(IntEnum):
    READY = 0  # parts may pass: READY, RUNNING or DEGRADED
    BUSY = 1  # a trigger was taken whose result is not there yet, and still may come
    TRIGGER_ACK = 2  # TRIGGER was seen; falls with it
    RESULT_VALID = 3  # the result registers belong to one part; falls with RESULT_ACK
    PASS = 4  # these three only while RESULT_VALID is on, and exactly one of them
    FAIL = 5
    UNKNOWN = 6
    FAULT = 7
    OVERRUN = 8  # a result was lost because the PLC took none for too long; falls with CLEAR_FAULT
    HEARTBEAT = 9  # toggles
    DEGRADED = 10
    GATE = 11  # level of the gate output
    RECIPE_ACK = 12  # RECIPE_CHANGE was seen; falls with it. The recipe register tells when it has happened
    CLEAR_ACK = 13  # CLEAR_FAULT was seen; falls with it
    SIMULATED = 14  # the verdicts are made up (`--backend fake`): never for product
    ENABLED = 15  # parts are inspected: what ENABLE has come to


STATUS_BITS = len(Bit)  # one word


@dataclass(frozen=True)
class Status:
    """What the PLC may see at one moment."""

    state: str = ""
    bits: frozenset[Bit] = frozenset()
    error: int = 0
    recipe: int = 0
    bundle: int = 0  # first eight digits of its sha256
    verdict: str = ""  # of the last result that was presented
    inspection: int = 0  # counts the results that were presented
    part_id: int = 0
    score: float | None = None
    threshold: float = 0.0
    latency_ms: float = 0.0
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    area: int = 0
    judged: int = 0
    rejected: int = 0
    late: int = 0
    dropped: int = 0
    uptime_s: int = 0
    waiting: int = 0  # results after the one that is presented


STATUS_REGISTERS = 35
RESULT_END = 21  # what is about one result lies before it


def status_bits(status: Status) -> list[bool]:
    """STATUS_BITS bits, from bit 0 on."""
    return [bit in status.bits for bit in range(STATUS_BITS)]


def status_registers(status: Status) -> list[int]:
    """STATUS_REGISTERS registers. The first has the bits again: one read gets them with what they are about."""
    score = status.score if status.score is not None and math.isfinite(status.score) else None
    return [
        sum(1 << bit for bit in status.bits),  # 0
        STATES.index(status.state) + 1 if status.state else 0,  # 1
        _capped(status.error),  # 2
        _capped(status.recipe),  # 3
        VERDICTS.index(status.verdict) + 1 if status.verdict else 0,  # 4
        *_words(status.inspection),  # 5, 6
        *_words(status.part_id),  # 7, 8
        *_float(NO_SCORE if score is None else score),  # 9, 10
        *_float(status.threshold),  # 11, 12
        _ratio(score, status.threshold),  # 13
        _capped(status.latency_ms),  # 14
        *(_capped(edge) for edge in status.box),  # 15 to 18: x, y, width, height
        *_words(status.area),  # 19, 20
        *_words(status.judged),  # 21, 22
        *_words(status.rejected),  # 23, 24
        *_words(status.late),  # 25, 26
        *_words(status.dropped),  # 27, 28
        *_words(status.uptime_s),  # 29, 30
        *_words(status.bundle),  # 31, 32
        _capped(status.waiting),  # 33
        MAP_VERSION,  # 34
    ]


def read_status(registers: Sequence[int]) -> Status:
    """The other way round, as a PLC would read it from STATUS_REGISTERS registers; all zero are an empty Status."""

    def long(index: int) -> int:
        return registers[index] + U16 * registers[index + 1]

    def real(index: int) -> float:
        return float(struct.unpack(">f", struct.pack(">I", long(index)))[0])

    score = real(9)
    return Status(
        state=("", *STATES)[registers[1]],
        bits=frozenset(bit for bit in Bit if registers[0] >> bit & 1),
        error=registers[2],
        recipe=registers[3],
        bundle=long(31),
        verdict=("", *VERDICTS)[registers[4]],
        inspection=long(5),
        part_id=long(7),
        score=None if score == NO_SCORE or not registers[4] else score,
        threshold=real(11),
        latency_ms=registers[14],
        box=(registers[15], registers[16], registers[17], registers[18]),
        area=long(19),
        judged=long(21),
        rejected=long(23),
        late=long(25),
        dropped=long(27),
        uptime_s=long(29),
        waiting=registers[33],
    )


def _words(value: int) -> tuple[int, int]:
    value %= U32
    return value % U16, value // U16


def _float(value: float) -> tuple[int, int]:
    # beyond single precision: the largest there is, never infinity, on which some PLCs stop
    largest = 3.4028234e38
    return _words(struct.unpack(">I", struct.pack(">f", max(-largest, min(value, largest))))[0])


def _ratio(score: float | None, threshold: float) -> int:
    if score is None or threshold <= 0:
        return NO_RATIO
    ratio = math.ceil(min(1000 * score / threshold, NO_RATIO - 1))
    # rounding does not change sides
    return max(ratio, 1001) if score > threshold else min(ratio, 1000)


def _capped(value: float) -> int:
    return max(0, min(round(value), U16 - 1))
