"""The main job from end to end, on drawn parts: train, build INT8, run against a simulated PLC, show what came of it.

python -m stpm.tools.demo --out demo
"""

import argparse
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from stpm.edge.journal.database import NAME
from stpm.tools.parts import write_dataset
from stpm.tools.plc_sim import PtyPlc

CATEGORY = "bushing"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("demo"))
    options.add_argument("--good", type=int, default=60)
    options.add_argument("--test", type=int, default=24)
    options.add_argument("--epochs", type=int, default=40)
    chosen = options.parse_args()
    out, started = chosen.out, time.monotonic()
    data, bundle = out / "data", out / f"{CATEGORY}-int8"

    say(f"1/4  drawing {chosen.good} good parts to learn from, and {2 * chosen.test} parts to judge")
    write_dataset(data, CATEGORY, chosen.good, chosen.test)

    say("2/4  stpm-build: train the student, quantise both networks to INT8, compile for OpenVINO, pack the bundle")
    run(
        "stpm.build.cli",
        "--engine",
        "int8",
        "--category",
        CATEGORY,
        "--data",
        data,
        "--teacher",
        "builtin",
        # few images: a smaller batch takes more steps
        "--epochs",
        chosen.epochs,
        "--batch",
        8,
        "--false-reject-rate",
        0.08,
        # on so few images one part more or less is 2 % of a figure
        "--max-drop",
        "0.03,0.01,0.03",
        "--out",
        bundle,
        "--work",
        out / "steps",
    )

    say("3/4  stpm-run: judge the parts and tell a simulated PLC on a pseudo-terminal")
    journal = out / "journal"
    shutil.rmtree(journal, ignore_errors=True)
    with PtyPlc() as plc:
        run(
            "stpm.edge.cli",
            "--bundle",
            bundle,
            "--camera",
            data / CATEGORY / "test",
            "--plc",
            plc.port,
            "--journal",
            journal,
            "--quiet",
        )
    print(plc.gate.summary())

    say("4/4  what came of it")
    print(outcome(journal, set(plc.gate.passed)))
    run("stpm.tools.evaluate", "--bundle", bundle, "--data", data, "--out", out / "report")
    print(
        f"\nlook at {bundle / 'report.html'}, {out / 'report' / 'overview.png'} and {journal / 'pictures'}/   "
        f"({time.monotonic() - started:.0f} s)"
    )
    return 0


def outcome(journal: Path, let_through: set[int]) -> str:
    """Per kind of part: how many came, and how many the gate let through."""
    came: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    with closing(sqlite3.connect(f"file:{journal / NAME}?mode=ro", uri=True)) as database:
        for part, frame in database.execute("SELECT part, frame FROM parts"):
            kind = Path(frame).parent.name
            came[kind] += 1
            passed[kind] += part in let_through
    rows = [f"{'part':<16}{'came':>6}{'let through':>13}{'rejected':>10}"]
    rows += [f"{kind:<16}{came[kind]:>6}{passed[kind]:>13}{came[kind] - passed[kind]:>10}" for kind in sorted(came)]
    return "\n".join(rows) + "\n"


def run(module: str, *arguments: object) -> None:
    """A command of this project in its own process; the demonstration ends when it fails."""
    finished = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
