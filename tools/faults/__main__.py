"""python -m stpm.tools.faults: break the line on purpose, and look at what becomes of it."""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from stpm.edge.command import parser, run_command, say
from stpm.edge.errors import ConfigError, StpmError
from stpm.tools.faults.bundles import drawn
from stpm.tools.faults.evidence import Result
from stpm.tools.faults.run import Order, run
from stpm.tools.faults.scenarios import scenarios
from stpm.tools.faults.table import HEAD, Report, row, total, write

EXAMPLES = """\
  python -m stpm.tools.faults --bundle bundles/screw-int8
  python -m stpm.tools.faults --profile full --json faults.json
  python -m stpm.tools.faults --only soak --seed 7 --keep left"""
SLACK = {"ci": 3.0, "full": 1.0}


def main(arguments: list[str] | None = None) -> int:
    known = scenarios()
    options = parser("python -m stpm.tools.faults", "Break a line on purpose, and check what becomes of it.", EXAMPLES)
    options.add_argument("--bundle", type=Path, help="the folder of a bundle (default: one of drawn parts is made)")
    options.add_argument("--profile", choices=SLACK, default="ci", help="ci: minutes; full: with the long ones")
    options.add_argument("--only", action="append", metavar="NAME", help="of a scenario; may be given again")
    options.add_argument("--seed", type=int, default=0, help="of everything that is random (default 0)")
    options.add_argument("--jobs", type=int, help="scenarios at a time (default: 2, full: 1)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    options.add_argument("--keep", type=Path, metavar="DIR", help="keep journals and outputs there")
    options.add_argument("--cache", type=Path, default=Path(".cache/faults"), help="for the bundle of drawn parts")
    options.add_argument("--list", action="store_true", help="say what there is, and break nothing")
    chosen = options.parse_args(arguments)
    bad: list[Result] = []

    def command() -> None:
        unknown = [name for name in chosen.only or [] if name not in known]
        if unknown:
            raise ConfigError(f"there is no scenario {unknown[0]}: see --list")
        full = chosen.profile == "full"
        names = [name for name, each in known.items() if name in (chosen.only or known) and (full or not each.long)]
        if chosen.list:
            for name in names:
                say(f"{name:<33} {known[name].link:<13} {known[name].about}")
            return
        bundle = chosen.bundle or drawn(chosen.cache)
        keep = str(chosen.keep) if chosen.keep else ""
        orders = [Order(name, str(bundle), chosen.seed, full, SLACK[chosen.profile], keep) for name in names]
        results = _run_all(orders, chosen.jobs or (1 if full else 2))
        bad.extend(result for result in results if result.violations)
        if chosen.json:
            write(chosen.json, Report(1, chosen.profile, chosen.seed, results))
        if bad:
            raise StpmError(f"{len(bad)} of {len(results)} scenarios violate what must always be true")

    return run_command("faults", command, "the lines under test have ended")


def _run_all(orders: list[Order], jobs: int) -> list[Result]:
    """In the order in which they were given; each is shown when it has ended."""
    results: dict[str, Result] = {}
    say(HEAD)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        waiting = {pool.submit(run, order): order for order in orders}
        for future in as_completed(waiting):
            result = future.result()
            results[result.scenario] = result
            say(row(result))
            for sentence in result.violations:
                say(f"    VIOLATED: {sentence}")
            for note in result.notes:
                say(f"    {note}")
    ordered = [results[order.name] for order in orders]
    say(total(ordered))
    return ordered


if __name__ == "__main__":
    sys.exit(main())
