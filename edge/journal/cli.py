"""stpm-journal: what the line has recorded."""

import argparse
import re
import shutil
import sys
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np

from stpm.edge.command import parser, run_command, say
from stpm.edge.errors import StorageError
from stpm.edge.journal.export import FORMATS
from stpm.edge.journal.query import PART_COLUMNS, Filter, Journal, Row, RunSummary

VERDICTS = ("PASS", "FAIL", "UNKNOWN")
EVENTS = ("state", "alarm", "operator", "plc", "camera", "engine", "journal", "recipe")
WIDTH = 100
LARGEST = (1 << 63) - 1  # that SQLite takes
BAR_AFTER_S = 1.0

EXAMPLES = """\
  stpm-journal list /var/lib/stpm/journal --verdict FAIL --last 20
  stpm-journal summary /var/lib/stpm/journal --from 8h
  stpm-journal events --journal /var/lib/stpm/journal --kind journal
  stpm-journal export /var/lib/stpm/journal --format parquet --from 2026-03-01 --out march.parquet
  stpm-journal picture /var/lib/stpm/journal 1742

times are UTC: 2026-03-15, 2026-03-15T10:00, or so long ago: 30m, 8h, 2d. A line that runs is not disturbed."""


def main(arguments: list[str] | None = None) -> int:
    options = _options()
    given = options.parse_args(arguments)
    folder = given.journal or given.folder
    if folder is None or (given.journal and given.folder):
        options.error("wanted one journal folder: `stpm-journal COMMAND FOLDER`, or --journal DIR")

    def command() -> None:
        with Journal(folder) as journal:
            given.show(journal, given)

    return run_command("stpm-journal", command, "nothing was changed")


def _options() -> argparse.ArgumentParser:
    options = parser("stpm-journal", "List, filter, sum up and export what the line has recorded.", EXAMPLES)
    commands = options.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, summary: str, show: object) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="the journal folder of a station")
        command.add_argument("--journal", type=Path, metavar="DIR", help="the same as an option")
        command.set_defaults(show=show)
        return command

    listing = add("list", "one line per part, the newest last", show_parts)
    _add_filters(listing)
    _add_last(listing)
    add("runs", "one line per start of the line", show_runs)
    events = add("events", "changes of state, alarms, actions of operators and of the PLC", show_events)
    _add_times(events)
    events.add_argument("--kind", choices=EVENTS)
    _add_last(events)
    _add_filters(add("summary", "verdicts, latency and losses, per recipe and per run", show_summary))
    export = add("export", "the parts as one file", export_parts)
    _add_filters(export)
    export.add_argument("--format", choices=FORMATS, required=True)
    export.add_argument("--out", type=Path, required=True, metavar="FILE")
    picture = add("picture", "where the pictures of a part are", show_pictures)
    picture.add_argument("parts", type=_numbers, metavar="PART", help="a part, or a range: 1700-1720")
    picture.add_argument("--run", type=_count, metavar="N", help="of that run only")
    return options


def _add_times(command: argparse.ArgumentParser) -> None:
    command.add_argument("--from", dest="since", type=_time, metavar="TIME", help="from then on; UTC, or 8h for ago")
    command.add_argument("--to", dest="until", type=_time, metavar="TIME", help="before then")
    command.add_argument("--run", type=_count, metavar="N", help="of that run only; `stpm-journal runs` numbers them")


def _add_filters(command: argparse.ArgumentParser) -> None:
    _add_times(command)
    command.add_argument("--verdict", type=str.upper, choices=VERDICTS)
    command.add_argument("--part", dest="parts", type=_numbers, metavar="N", help="a part, or a range: 1700-1720")
    command.add_argument("--reason", metavar="TEXT", help="with this in the reason")
    command.add_argument("--min-score", type=float, metavar="SCORE")


def _add_last(command: argparse.ArgumentParser) -> None:
    command.add_argument("--last", type=_count, default=50, metavar="N", help="so many at most (default 50)")


def _time(text: str) -> str:
    """As it is in the database."""
    try:
        return _moment(text).isoformat(timespec="microseconds")
    except OverflowError as error:  # before the year 1, or after 9999
        raise ValueError(text) from error


def _moment(text: str) -> datetime:
    ago = re.fullmatch(r"(\d+)([mhd])", text)
    if ago:
        unit = {"m": "minutes", "h": "hours", "d": "days"}[ago.group(2)]
        return datetime.now(timezone.utc) - timedelta(**{unit: int(ago.group(1))})
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


_time.__name__ = "time"  # what argparse calls it when it is wrong


def _numbers(text: str) -> tuple[int, int]:
    begin, _, end = text.partition("-")
    first, last = int(begin), int(end or begin)
    if not 0 <= first <= last <= LARGEST:
        raise ValueError(f"wanted a part, or the first and the last of a range, found {text}")
    return first, last


_numbers.__name__ = "part or range"


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"wanted a whole number above 0, found {text}")
    return value


def _filter(given: argparse.Namespace) -> Filter:
    return Filter(**{name: value for name, value in vars(given).items() if name in Filter.__struct_fields__})


# --- what each command shows


def show_parts(journal: Journal, given: argparse.Namespace) -> None:
    say(f"{'time (UTC)':<19} {'run':>4} {'part':>8} {'verdict':<7} {'score':>9} {'ms':>7} {'outcome':<21} reason")
    rows = journal.newest(_filter(given), given.last)
    for row in rows:
        part = dict(zip(PART_COLUMNS, row, strict=True))
        score = "" if part["score"] is None else f"{part['score']:.3e}"
        latency = "" if part["latency_ms"] is None else f"{part['latency_ms']:.1f}"
        which = f"{_short(part['at'])[:19]} {part['run']:>4} {part['part']:>8} {part['verdict']:<7}"
        say(_cut(f"{which} {score:>9} {latency:>7} {part['outcome'][:21]:<21} {part['reason']}"))
    if not rows:
        say("no such parts")


def show_runs(journal: Journal, given: argparse.Namespace) -> None:
    say(
        f"{'run':>4} {'began (UTC)':<19} {'station':<16} {'version':<8} {'records':>9} {'lost':>6}  {'end':<8} recipes"
    )
    for run in journal.runs():
        recipes = ", ".join(f"{number} {what.split()[0]}" for number, what in run.recipes.items() if what)
        say(
            _cut(
                f"{run.id:>4} {_short(run.at)[:19]} {run.station[:16]:<16} {run.version[:8]:<8} {run.records:>9} "
                f"{run.lost:>6}  {run.end:<8} {recipes}"
            )
        )


def show_events(journal: Journal, given: argparse.Namespace) -> None:
    """Not cut: what happened must be readable."""
    rows = journal.events(_filter(given), given.last)
    for run, at, kind, text in rows:
        say(f"{_short(at)} run {run:<4} {kind:<8} {text}")
    if not rows:
        say("no such events")


def show_summary(journal: Journal, given: argparse.Namespace) -> None:
    wanted = _filter(given)
    runs = {run.id: run for run in journal.runs()}
    groups = journal.groups(wanted)
    by_recipe: dict[str, Counter[str]] = defaultdict(Counter)
    by_run: dict[int, Counter[str]] = defaultdict(Counter)
    total: Counter[str] = Counter()
    for run, bundle, verdict, count in groups:
        by_recipe[_recipe(bundle, runs[run])][verdict] += count
        by_run[run][verdict] += count
        total[verdict] += count
    say(f"{'':<36} {'parts':>9} {'PASS':>9} {'FAIL':>9} {'UNKNOWN':>9} {'rejected':>9}")
    say(_counts("all", total))
    for recipe, counts in sorted(by_recipe.items()):
        say(_counts(f"recipe {recipe}", counts))
    for number, counts in sorted(by_run.items()):
        say(_counts(f"run {number} of {_short(runs[number].at)[:19]}", counts))
    _say_latency(journal, wanted)
    for run in runs.values():
        if given.run in (None, run.id):
            _say_losses(run)


def _counts(name: str, counts: Counter[str]) -> str:
    parts = sum(counts.values())
    rate = f"{100 * (1 - counts['PASS'] / parts):.2f} %" if parts else "-"
    return f"{name[:36]:<36} {parts:>9} " + " ".join(f"{counts[each]:>9}" for each in VERDICTS) + f" {rate:>9}"


def _recipe(bundle: str, run: RunSummary) -> str:
    """What the run calls this bundle: its number and category."""
    if bundle:
        for number, what in run.recipes.items():
            if bundle in what:
                return f"{number} {what.split()[0]} {bundle[:8]}"
    return bundle[:8] or "none"


def _say_latency(journal: Journal, wanted: Filter) -> None:
    where = PART_COLUMNS.index("latency_ms")
    latencies = array("f")
    for page in journal.parts(wanted):
        latencies.extend(row[where] for row in page if row[where] is not None)
    if latencies:
        p50, p90, p99, highest = np.percentile(np.frombuffer(latencies, np.float32), [50, 90, 99, 100])
        say(
            f"\nlatency, capture to verdict: p50 {p50:.1f} ms, p90 {p90:.1f} ms, p99 {p99:.1f} ms, "
            f"max {highest:.1f} ms ({len(latencies)} parts)"
        )


def _say_losses(run: RunSummary) -> None:
    if run.lost or run.lost_pictures:
        say(f"run {run.id} lost {run.lost} records and {run.lost_pictures} pictures")
    if run.end == "unknown":
        say(f"run {run.id}: its count of records is gone, it may have lost more")
    if run.pending:
        say(f"run {run.id}: {run.pending} records are not here yet; when the line does not run, they are lost")


def show_pictures(journal: Journal, given: argparse.Namespace) -> None:
    wanted = _filter(given)
    paths = [path for path in journal.pictures(wanted) if path.exists()]
    if not paths:
        kind = "no picture of" if journal.count(wanted) else "no part"
        first, last = given.parts
        number = f"{first}" if first == last else f"{first} to {last}"
        raise StorageError(
            f"found {kind} {number} in the journal: pictures are kept of rejects and a sample of passes, for "
            "[journal] max_days and up to max_gb"
        )
    for path in paths:
        say(str(path))


def export_parts(journal: Journal, given: argparse.Namespace) -> None:
    wanted = _filter(given)
    total = journal.count(wanted)
    FORMATS[given.format](given.out, _with_progress(journal.parts(wanted), total))
    say(f"{total} parts in {given.out}")


def _with_progress(pages: Iterator[list[Row]], total: int) -> Iterator[list[Row]]:
    """A bar on a terminal when it takes long."""
    from tqdm import tqdm

    with tqdm(total=total, unit=" parts", delay=BAR_AFTER_S, disable=not sys.stderr.isatty(), leave=False) as bar:
        for page in pages:
            yield page
            bar.update(len(page))


def _short(at: str) -> str:
    """2026-03-15 10:11:12.123"""
    return at[:23].replace("T", " ")


def _cut(line: str) -> str:
    width = max(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)
    line = line.rstrip()
    return line if len(line) <= width else line[: width - 1] + "…"


if __name__ == "__main__":
    sys.exit(main())
