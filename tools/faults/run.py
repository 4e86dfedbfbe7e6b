"""One scenario, from its start to its line in the table."""

import tempfile
import time
import traceback
from pathlib import Path

import msgspec

from stpm.tools.faults import checks
from stpm.tools.faults.bench import Bench
from stpm.tools.faults.evidence import Evidence, Result
from stpm.tools.faults.scenarios import Scenario, SkippedError, scenarios


class Order(msgspec.Struct, frozen=True):
    """What one scenario needs to know. `slack`: how many times longer than its target a recovery may take, on a
    machine that has other things to do."""

    name: str
    bundle: str
    seed: int
    full: bool
    slack: float
    keep: str = ""  # a folder for what the line has left


def run(order: Order) -> Result:
    """In a process of its own: its threads are counted."""
    chosen = scenarios()[order.name]
    if order.keep:
        folder = Path(order.keep, order.name)
        folder.mkdir(parents=True)
        return _run(chosen, order, folder)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder_name:
        return _run(chosen, order, Path(folder_name))


def _run(chosen: Scenario, order: Order, folder: Path) -> Result:
    bench = Bench(chosen.link, Path(order.bundle).resolve(), folder, order.seed, order.full, order.slack)
    began, skipped = time.monotonic(), ""
    try:
        chosen.work(bench)
    except SkippedError as reason:
        skipped = str(reason)
    except Exception:
        bench.evidence.broken.append(f"the scenario itself failed:\n{traceback.format_exc()}")
    bench.close()
    return result_of(chosen.name, chosen.link, bench.evidence, time.monotonic() - began, bench.notes, skipped)


def result_of(
    name: str, link: str, evidence: Evidence, took_s: float, notes: list[str] | None = None, skipped: str = ""
) -> Result:
    recoveries = [fault.recovery_s for fault in evidence.faults if fault.recovery_s is not None]
    return Result(
        name,
        link,
        len(evidence.faults),
        sum(fault.survived for fault in evidence.faults),
        sum(run.books.judged if run.books else len(run.rows) for run in evidence.runs),
        sum(checks.wrong_outcomes(run) for run in evidence.runs),
        sum(run.lost for run in evidence.runs),
        max(recoveries, default=None),
        max((checks.grown(run)[1] for run in evidence.runs), default=0),
        took_s,
        [] if skipped else checks.violations(evidence),
        evidence.faults,
        skipped,
        notes or [],
    )
