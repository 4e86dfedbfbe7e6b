"""Latency of bundles, stage by stage: frame in memory → inspection → decision.

Several bundles are measured in turn, frame by frame, so that a busy machine slows them alike; compare the ratios.
The frames are the bundle's own golden frames. "preprocess", "pyramids" and "head" are the parts of an inspection by
the engine's own counters, from a separate pass because counting costs time.

JSON, schema 2: {schema, started, machine, runs, bundles: [{path, sha256, category, precision, engine, stages,
inside}]}, where stages and inside map a name to {count, p50, p90, p99, max} in milliseconds.
"""

import argparse
import errno
import os
import platform
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import msgspec
from tqdm import tqdm

from stpm.edge.bundle import Bundle, find_bundle, open_bundle
from stpm.edge.cli import count
from stpm.edge.command import parser, run_command
from stpm.edge.engine import BACKENDS, Engine, open_engine
from stpm.edge.errors import ConfigError
from stpm.edge.latency import Latency, Percentiles, table
from stpm.edge.policy import judge
from stpm.edge.preprocess import Image
from stpm.edge.storage import write_json
from stpm.tools.bench_line import measure_line, report

SCHEMA = 2
WARM_UP = 20

EXAMPLES = """\
  python tools/bench.py --bundle bundles/screw-int8
  python tools/bench.py --bundle bundles/screw-fp32 --bundle bundles/screw-int8 --json latency.json
  python tools/bench.py --line --bundle bundles/screw-int8 --runs 2000     the whole line, its recovery included"""


class Measured(msgspec.Struct, frozen=True):
    path: str
    sha256: str
    category: str
    precision: str
    engine: dict[str, str]
    stages: dict[str, Percentiles]
    inside: dict[str, Percentiles]  # parts of the inspection, by the engine's own counters


class Benchmark(msgspec.Struct, frozen=True):
    schema: int
    started: str
    machine: dict[str, str]
    runs: int
    bundles: list[Measured]


@dataclass
class Subject:
    bundle: Bundle
    engine: Engine
    frames: Image
    latency: Latency

    def run(self, index: int) -> None:
        """One frame, timed. Everything a part goes through on the line but the camera and the wire."""
        frame = self.frames[index % len(self.frames)]
        manifest, stage = self.bundle.manifest, self.latency.stage
        with stage("total"):
            with stage("inspection"):
                inspection = self.engine.inspect(frame, manifest.threshold.value)
            with stage("decision"):
                judge(inspection.score, manifest.threshold.value)


def measure(bundles: list[Path], backend: str, runs: int) -> Benchmark:
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with ExitStack() as stack:
        subjects = []
        for path in bundles:
            bundle = open_bundle(path)
            engine = stack.enter_context(open_engine(bundle, backend))
            subjects.append(Subject(bundle, engine, bundle.golden().frames, Latency()))
        for index in tqdm(range(-WARM_UP, runs), desc="measuring", unit="frame", disable=None, leave=False):
            if index == 0:
                for subject in subjects:
                    subject.latency = Latency()
            for subject in subjects:
                subject.run(index)
        return Benchmark(SCHEMA, started, machine(), runs, [_measured(subject, runs) for subject in subjects])


def _measured(subject: Subject, runs: int) -> Measured:
    manifest = subject.bundle.manifest
    counted = subject.engine.profile(subject.frames[0], runs)
    inside = Latency()
    for name, samples in counted.items():
        for milliseconds in samples:
            inside.add(name, int(milliseconds * 1e6))
    return Measured(
        str(subject.bundle.path),
        subject.bundle.sha256,
        manifest.category,
        manifest.precision,
        subject.engine.describe(),
        subject.latency.percentiles(),
        inside.percentiles(),
    )


def machine() -> dict[str, str]:
    return {
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )


def main(arguments: list[str] | None = None) -> int:
    options = parser("stpm-bench", "Measure the latency of one or several bundles, stage by stage.", EXAMPLES)
    add = options.add_argument
    add(
        "--bundle",
        type=Path,
        action="append",
        metavar="DIR",
        help="may be given several times (default: the only bundle in ./bundles)",
    )
    add("--backend", choices=("auto", *BACKENDS), default="auto")
    add("--runs", type=count, default=300, help="frames per bundle (default: 300)")
    add(
        "--line",
        action="store_true",
        help="measure the whole line: overhead, gate, recovery (see tools/bench_line.py)",
    )
    add("--repeats", type=count, default=5, help="with --line: how often port and camera fail (default: 5)")
    add("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    chosen = options.parse_args(arguments)
    return run_command("stpm-bench", lambda: _run(chosen), "nothing was written")


def _run_line(options: argparse.Namespace) -> None:
    if len(options.bundle or []) > 1:
        raise ConfigError(f"wanted one --bundle with --line, found {len(options.bundle)}: measure them one by one")
    bundle = options.bundle[0] if options.bundle else find_bundle()
    benchmark = measure_line(bundle, options.backend, options.runs, options.repeats, machine())
    print(", ".join(benchmark.machine.values()))
    print(f"{bundle}, {', '.join(benchmark.engine.values())}\n")
    print(report(benchmark))
    if options.json:
        write_json(options.json, benchmark)
        print(f"\nwritten: {options.json}")


def _run(options: argparse.Namespace) -> None:
    if options.json:  # before minutes of measuring
        options.json.parent.mkdir(parents=True, exist_ok=True)
        if options.json.is_dir():
            raise ConfigError(f"wanted a file for --json, found the folder {options.json}: give a name in it")
        if not os.access(options.json.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(options.json))
    if options.line:
        _run_line(options)
        return
    benchmark = measure(options.bundle or [find_bundle()], options.backend, options.runs)
    print(", ".join(benchmark.machine.values()))
    first = benchmark.bundles[0]
    for bundle in benchmark.bundles:
        ratio = first.stages["inspection"].p50 / bundle.stages["inspection"].p50
        note = "" if bundle is first else f"   inspection {ratio:.2f}× the speed of {first.path} (p50)"
        print(f"\n{bundle.path} ({bundle.precision}, {bundle.engine['backend']}){note}")
        print(table(bundle.stages))
        print("inside the inspection, by the engine's own counters:")
        print("\n".join(table(bundle.inside).splitlines()[1:]))
    if options.json:
        write_json(options.json, benchmark)
        print(f"\nwritten: {options.json}")


if __name__ == "__main__":
    sys.exit(main())
