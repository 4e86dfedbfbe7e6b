"""What must be true after every scenario. Pure: evidence in, a sentence for each violation out."""

import re
from collections import Counter
from collections.abc import Callable, Iterator

from stpm.edge.engine.fake import DEFECTIVE
from stpm.tools.faults.evidence import Evidence, Row, Run
from stpm.tools.plc_sim import SILENCE_S

GROWTH_KB = 4 << 10  # of the main process from its first second of work on: counters, samples of latencies, a backlog
IN_HAND = 16  # parts whose fate may be open when the line is killed: plc.queue, and those on the wire
LATENCY_SLACK_MS = 5.0  # a verdict may be given in the same turn of the loop in which its time is over
SHOWN = 3  # violations of one kind


def violations(evidence: Evidence) -> list[str]:
    """Nothing: all is well."""
    found = [*evidence.broken, *evidence.left]
    found += recovery(evidence)
    for number, run in enumerate(evidence.runs, 1):
        for check in (books, verdicts_are_the_frames, nothing_passed_without_pass, gate, rejects_are_known):
            found += _few(check(run), f"run {number}: " if len(evidence.runs) > 1 else "")
        for check in (last_word, nothing_left, flat):
            found += _few(check(run), f"run {number}: " if len(evidence.runs) > 1 else "")
    return found


def books(run: Run) -> Iterator[str]:
    """1: every frame and every part is accounted for, in the line and in the journal."""
    rows = len(run.rows)
    if run.books is None:
        if rows + run.lost < run.judged_at_least:
            yield f"the journal has {rows} parts, {run.lost} records are lost; {run.judged_at_least} were judged"
        return
    said = run.books
    if said.captured + said.without_frame != said.judged + said.dropped:
        yield (
            f"captured {said.captured} + without a frame {said.without_frame} is not judged {said.judged} + dropped "
            f"{said.dropped}"
        )
    if not said.judged - run.lost <= rows <= said.judged:
        yield f"the journal has {rows} parts of {said.judged} that were judged, and says that {run.lost} are lost"
    if run.lost < said.lost_records:
        yield f"the line says that the journal lost {said.lost_records} records, the journal says {run.lost}"


def verdicts_are_the_frames(run: Run) -> Iterator[str]:
    """2: the frame that was judged is the frame of the part."""
    for row in run.rows:
        expected = expected_of(row)
        if expected is not None and row.verdict not in (expected, "UNKNOWN"):
            yield f"part {row.part} is {row.verdict}, though its frame {row.frame} is a {expected}"
        late = row.latency_ms is not None and row.latency_ms > run.deadline_ms + LATENCY_SLACK_MS
        if row.verdict == "PASS" and late:
            yield f"part {row.part} is PASS after {row.latency_ms:.0f} ms, its deadline was {run.deadline_ms:g} ms"


def expected_of(row: Row) -> str | None:
    """The verdict that the frame of the pattern camera must get from `engine.script=pattern`; None: not known."""
    if not re.fullmatch(r"#\d+", row.frame):
        return None
    return "FAIL" if int(row.frame[1:]) % DEFECTIVE == 0 else "PASS"


def nothing_passed_without_pass(run: Run) -> Iterator[str]:
    """2: what the PLC let through is a PASS in the journal, or on the wire where the journal has lost it."""
    rows = {row.part: row for row in run.rows}
    said = {(id, verdict) for _, id, verdict in run.wire.said}
    missing = 0
    for _, id in run.wire.passed:
        row = rows.get(id)
        missing += row is None
        if row is not None and row.verdict != "PASS":
            yield f"part {id} was let through, and the journal says {row.verdict} ({row.reason})"
        elif (id, "PASS") not in said:
            yield f"part {id} was let through without a PASS on the wire"
    if missing > run.lost:
        yield f"{missing} parts were let through that the journal does not know, and it says that {run.lost} are lost"
    for _, id, verdict in run.wire.said:
        if id in rows and rows[id].verdict != verdict:
            yield f"part {id} is {rows[id].verdict} in the journal and was {verdict} on the wire"
    for id, times in Counter(id for _, id in run.wire.passed).items():
        if times > 1:
            yield f"part {id} was let through {times} times"


def gate(run: Run) -> Iterator[str]:
    """2: an accepting gate is closed when a part that is no PASS is in front of it."""
    if run.wire.openings is None or run.gate_delay_s is None:
        return
    for row in run.rows:
        if row.verdict == "PASS" or row.latency_ms is None:
            continue
        there = row.at_s - row.latency_ms / 1000 + run.gate_delay_s
        if any(opens <= there <= closes for opens, closes in run.wire.openings):
            yield f"the gate was open when part {row.part} ({row.verdict}) was in front of it"


def rejects_are_known(run: Run) -> Iterator[str]:
    """3: of every reject it is known that the PLC got it, or somebody was told that it did not."""
    alarmed = {int(id) for text in run.alarms for id in re.findall(r"\bpart (\d+)\b", text)}
    open_ends = {row.part for row in run.rows[-IN_HAND:]} if run.killed else set()
    unknown = [
        row
        for row in run.rows
        if row.verdict != "PASS"
        and not {"delivered", "acknowledged"} & set(row.outcome.split())
        and row.part not in alarmed | open_ends
    ]
    if len(unknown) > run.lost:  # the record of the outcome may be one of those
        for row in unknown:
            yield f"part {row.part} was rejected ({row.reason}), with outcome {row.outcome!r} and without an alarm"


def last_word(run: Run) -> Iterator[str]:
    """5: the PLC is told that it is over, or it hears nothing any more."""
    late = [id for at, id in run.wire.passed if at > run.ended_s + SILENCE_S]
    if late:
        yield f"parts {late} were let through {SILENCE_S:g} s and more after the line had ended"
    if not run.killed and run.wire.last_word not in ("STOPPED", "FAULT"):
        yield f"the last word on the wire is {run.wire.last_word or 'nothing'}"
    if run.killed and run.wire.last_heard_s > run.ended_s + 0.2:
        yield f"something was heard {run.wire.last_heard_s - run.ended_s:.1f} s after the line was killed"
    if not run.killed and run.code not in (0, 7):
        yield f"stpm-run ended with exit code {run.code}"


def nothing_left(run: Run) -> Iterator[str]:
    """4: no process, socket or file of the line is left."""
    yield from run.left


def flat(run: Run) -> Iterator[str]:
    """4: open files and memory of the main process, from its first second of work to its last."""
    files, grown_kb = grown(run)
    if files > run.more_files:
        yield f"{files} more files are open at the end than at the beginning, {run.more_files} may be"
    if grown_kb > GROWTH_KB:
        yield f"the memory of the main process has grown by {grown_kb >> 10} MB"


def grown(run: Run) -> tuple[int, int]:
    """Files and KB: all of the last second above all of the first one. Nothing for runs that were too short."""
    begun = [sample for sample in run.samples if sample.at_s >= run.ready_s]
    first, last = begun[:10], begun[-10:]
    if len(begun) < 20:
        return 0, 0
    return (
        min(sample.files for sample in last) - max(sample.files for sample in first),
        min(sample.memory_kb for sample in last) - max(sample.memory_kb for sample in first),
    )


def recovery(evidence: Evidence) -> Iterator[str]:
    """6: it works again, in time."""
    for fault in evidence.faults:
        if not fault.survived:
            yield f"{fault.what}: it did not recover"
        elif fault.limit_s is not None and fault.recovery_s is not None and fault.recovery_s > fault.limit_s:
            yield f"{fault.what}: recovered after {fault.recovery_s:.2f} s, wanted {fault.limit_s:g} s"


def wrong_outcomes(run: Run) -> int:
    """Parts with a verdict that is not their frame's, let through without a PASS, or rejected unknown to anybody."""
    checks: list[Callable[[Run], Iterator[str]]] = [
        verdicts_are_the_frames,
        nothing_passed_without_pass,
        gate,
        rejects_are_known,
    ]
    return sum(len(list(check(run))) for check in checks)


def _few(sentences: Iterator[str], prefix: str) -> list[str]:
    found = list(sentences)
    more = [f"{prefix}and {len(found) - SHOWN} more of that kind"] if len(found) > SHOWN else []
    return [prefix + sentence for sentence in found[:SHOWN]] + more
