"""The results for people (100 columns) and for machines."""

from pathlib import Path

import msgspec

from stpm.edge.storage import write_json
from stpm.tools.faults.evidence import Result

HEAD = (
    f"{'scenario':<33} {'link':<13} {'faults':>6} {'survived':>8} {'parts':>6} {'wrong':>5} {'lost':>5} "
    f"{'recovery s':>10} {'took s':>6}"
)


class Report(msgspec.Struct):
    schema: int
    profile: str
    seed: int
    results: list[Result]


def row(result: Result) -> str:
    if result.skipped:
        return f"{result.scenario:<33} {result.link:<13} skipped: {result.skipped}"
    recovery = "-" if result.recovery_s is None else f"{result.recovery_s:.2f}"
    return (
        f"{result.scenario:<33} {result.link:<13} {result.injected:>6} {result.survived:>8} {result.parts:>6} "
        f"{result.wrong:>5} {result.lost_records:>5} {recovery:>10} {result.took_s:>6.1f}"
    )


def total(results: list[Result]) -> str:
    done = [result for result in results if not result.skipped]
    longest = max((result.recovery_s for result in done if result.recovery_s is not None), default=None)
    return row(
        Result(
            f"{len(done)} scenarios",
            "",
            sum(result.injected for result in done),
            sum(result.survived for result in done),
            sum(result.parts for result in done),
            sum(result.wrong for result in done),
            sum(result.lost_records for result in done),
            longest,
            max((result.grown_kb for result in done), default=0),
            sum(result.took_s for result in done),
            [],
            [],
        )
    )


def write(path: Path, report: Report) -> None:
    write_json(path, report)
