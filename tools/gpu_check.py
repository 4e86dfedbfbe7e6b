"""One command that proves the GPU part on this machine: kernels, CUDA graphs, TensorRT, and what they are faster than.

    python tools/gpu_check.py --bundle bundles/screw-fp16 --bundle bundles/screw-int8 --json gpu-check.json

`sh tools/gpu_check.sh` prepares everything and calls this. Each check ends as passed, failed or skipped, with a reason
for the last two. Latencies alone fail no check; wrong answers do.

JSON, schema 1: {schema, started, machine, commit, before, after, runs, bundles, checks}. `machine` names GPU, driver
and versions; `commit` ends in + where the checkout was changed, null where git does not know; `before` and `after`
are clock, power and temperature by nvidia-smi. `checks` is a list of {name, state, reason, seconds, figures}: state is
passed, failed or skipped, and figures are

    tests      {summary}: the GPU tests, by pytest
    kernels    {largest_difference, tolerance} by kernel, against edge/score.py and edge/preprocess.py
    head       HeadTimes in gpu/times.py: µs of match + combine and of preprocess, beside the time of a copy
    graph      GraphTimes there: ms from the launch of a graph of the three kernels to its answer
    engines    Engines in gpu/engines.py: ms of each bundle's TensorRT engine, compiled in several ways
    rivals     Rivals in gpu/rivals.py: TensorRT, torch eager, torch.compile and ONNX Runtime in turn
    int8       Ratio in gpu/engines.py: INT8 beside FP16 in turn
    inspector  list of Inspected in gpu/inspector.py: layers that an INT8 engine should not have
    sanitizer  {tool: summary}: compute-sanitizer over the kernels' tests

and null where a check gave none. A stage's percentiles are {count, p50, p90, p99, max} in milliseconds.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic

import msgspec

from stpm.edge.bundle import open_bundle
from stpm.edge.cli import count
from stpm.edge.command import parser, run_command
from stpm.edge.engine.cuda import Gpu
from stpm.edge.storage import write_json
from stpm.tools.gpu.base import (
    ROOT,
    Check,
    FailedError,
    Job,
    Result,
    SkippedError,
    clocks,
    commit,
    ended,
    first_line,
    machine,
    needed,
)
from stpm.tools.gpu.engines import engines, int8_against_fp16
from stpm.tools.gpu.inspector import inspector
from stpm.tools.gpu.kernels import against_reference
from stpm.tools.gpu.rivals import rivals
from stpm.tools.gpu.times import graph_latency, times

SCHEMA = 1
TOOLKIT = "/usr/local/cuda/bin"  # where compute-sanitizer lies when it is not on PATH
SANITIZERS = ("memcheck", "racecheck")
TESTS_LIMIT_S = 3600

EXAMPLES = """\
  python tools/gpu_check.py
  python tools/gpu_check.py --bundle bundles/screw-fp16 --bundle bundles/screw-int8 --json gpu-check.json
  python tools/gpu_check.py --only kernels --only head"""


class Report(msgspec.Struct, frozen=True):
    schema: int
    started: str
    machine: dict[str, str]
    commit: str | None
    before: dict[str, str]
    after: dict[str, str]
    runs: int
    bundles: list[str]
    checks: list[Check]


def gpu_tests(job: Job) -> Result:
    """The tests that need a GPU, in a process of their own."""
    return Result(*_pytest([], "tests/gpu", "tests/test_edge_kernels.py"))


def sanitizer(job: Job) -> Result:
    """compute-sanitizer over the kernels' tests: no access out of bounds, no race in shared memory."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=TOOLKIT)
    if tool is None:
        raise SkippedError(f"needs compute-sanitizer, found none on PATH or in {TOOLKIT}: install the CUDA toolkit")
    figures = {}
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", "99"]
        figures[name], _ = _pytest(command, "tests/test_edge_kernels.py")
    return Result("; ".join(f"{name} clean: {summary}" for name, summary in figures.items()), figures)


def _pytest(before: list[str], *paths: str) -> tuple[str, dict[str, str]]:
    """The last line of pytest, run behind the command `before`. FailedError when a test did, or none ran on a GPU."""
    needed("pytest")
    words = ["-m", "pytest", *paths, "-k", "gpu and not compile", "-q", "-p", "no:cacheprovider"]
    command = [*before, sys.executable, *words]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise FailedError(f"{' '.join(command)} did not end within {TESTS_LIMIT_S} s") from error
    lines = [line.strip("= ") for line in result.stdout.splitlines() if line.strip()]
    summary = next((line for line in reversed(lines) if " passed" in line or " failed" in line), "")
    if result.returncode != 0 or " passed" not in summary:
        print(result.stdout[-8000:], result.stderr[-2000:], sep="\n", file=sys.stderr)
        why = summary or (lines[-1] if lines else first_line(result.stderr))
        raise FailedError(f"{' '.join(command)} ended with {result.returncode} ({why}): its output is above")
    return summary, {"summary": summary}


CHECKS: dict[str, Callable[[Job], Result]] = {
    "tests": gpu_tests,
    "kernels": against_reference,
    "head": times,
    "graph": graph_latency,
    "engines": engines,
    "rivals": rivals,
    "int8": int8_against_fp16,
    "inspector": inspector,
    "sanitizer": sanitizer,
}


def check(job: Job, names: list[str]) -> Report:
    """DeviceError or EngineError where there is no GPU to check."""
    gpu = Gpu()  # open until the end: making a context anew for each check takes longer than some of them
    try:
        facts, before = machine(gpu), clocks()
        print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        checks = []
        for name in names:
            done, line = ended(name, CHECKS[name], job, monotonic)
            checks.append(done)
            print(f"{done.state:<8} {name:<10} {line}", flush=True)
        bundles = [str(path) for path in job.bundles]
        return Report(SCHEMA, started, facts, commit(), before, clocks(), job.runs, bundles, checks)
    finally:
        gpu.close()


def main(arguments: list[str] | None = None) -> int:
    options = parser("gpu_check", "Check the kernels and TensorRT on this machine's GPU, and time them.", EXAMPLES)
    add = options.add_argument
    add("--bundle", type=Path, action="append", default=[], metavar="DIR", help="may be given several times")
    add("--runs", type=count, default=300, help="frames per latency (default: 300)")
    add("--only", action="append", choices=CHECKS, metavar="CHECK", help=f"out of {', '.join(CHECKS)} (default: all)")
    add("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    add(
        "--tactic-sources",
        type=lambda text: tuple(text.split(",")),
        metavar="NAME,...",
        help="as of stpm-compile, where a library that TensorRT takes kernels from is not installed",
    )
    add("--work", type=Path, metavar="DIR", help="where TensorRT's timings are kept (default: ~/.cache/stpm-edge)")
    add("--probe", action="store_true", help="say which GPU there is and end")
    chosen = options.parse_args(arguments)
    failed: list[str] = []
    code = run_command("gpu_check", lambda: _run(chosen, failed), "nothing was written")
    return code or int(bool(failed))


def _run(options: argparse.Namespace, failed: list[str]) -> None:
    if options.probe:
        gpu = Gpu()
        print(f"GPU: {gpu.name}, SM {gpu.sm}, driver for CUDA {gpu.driver}")
        gpu.close()
        return
    for path in options.bundle:
        open_bundle(path)  # a damaged bundle ends here, before anything takes minutes
    from stpm.build.steps import default_work

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        work = options.work or default_work()
        job = Job(options.bundle, options.runs, Path(folder), work, tactic_sources=options.tactic_sources)
        report = check(job, options.only or list(CHECKS))
    failed += [each.name for each in report.checks if each.state == "failed"]
    if options.json:
        write_json(options.json, report)
        print(f"written: {options.json}")
    states = [each.state for each in report.checks]
    print(", ".join(f"{states.count(state)} {state}" for state in ("passed", "failed", "skipped")))


if __name__ == "__main__":
    sys.exit(main())
