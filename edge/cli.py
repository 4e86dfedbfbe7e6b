"""stpm-run: judge the frames of a camera and tell the PLC."""

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from stpm.edge.bundle import Bundle, find_bundle, open_bundle
from stpm.edge.camera import open_camera
from stpm.edge.command import parser, run_command, say, stop_on_signals
from stpm.edge.engine import BACKENDS, open_engine
from stpm.edge.latency import table
from stpm.edge.loop import Line, Summary
from stpm.edge.plc import open_plc
from stpm.edge.results import Results

EXAMPLES = """\
  stpm-run --camera 0 --plc /dev/ttyUSB0
  stpm-run --camera rtsp://10.0.0.7/stream --plc /dev/ttyS1 --baud 19200 --bundle bundles/screw-int8
  stpm-run --camera photos/test --plc none --results results"""


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"wanted a number above 0, found {text}")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number above 0, found {text}")
    return value


def share(text: str) -> float:
    """A share on the command line."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"wanted a share between 0 and 1, found {text}")
    return value


def main(arguments: list[str] | None = None) -> int:
    options = parser("stpm-run", "Judge the frames of a camera with a bundle and tell the PLC.", EXAMPLES)
    add = options.add_argument
    add(
        "--camera",
        required=True,
        metavar="SOURCE",
        help="camera index, /dev/videoN, URL, video file, or folder of images",
    )
    add("--plc", required=True, metavar="PORT", help="serial device or pseudo-terminal, or `none`")
    add("--bundle", type=Path, metavar="DIR", help="default: the only bundle in ./bundles")
    add(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="inference engine; `fake` tries out camera and PLC with scripted verdicts (default: auto)",
    )
    add("--fps", type=positive, help="pace of a folder or video file; asked of a live camera")
    add("--loop", action="store_true", help="start a folder or video file again at its end")
    add("--parts", type=count, metavar="N", help="stop after N parts")
    add("--baud", type=count, default=115200, help="speed of the serial line, 8N1 (default: 115200)")
    add(
        "--heartbeat",
        type=positive,
        default=0.5,
        metavar="S",
        help="longest silence on the PLC line in seconds (default: 0.5)",
    )
    add("--results", type=Path, metavar="DIR", help="write parts.jsonl and a picture of every reject")
    add("--quiet", action="store_true", help="no line per part on the terminal")
    chosen = options.parse_args(arguments)
    return run_command(
        "stpm-run",
        lambda: _run(chosen),
        "a second signal cut the orderly stop short; the PLC hears no heartbeat from now on",
    )


def _run(options: argparse.Namespace) -> None:
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        bundle = open_bundle(options.bundle or find_bundle())
        _introduce(bundle, options.backend)
        engine = stack.enter_context(open_engine(bundle, options.backend))
        say("engine: " + ", ".join(engine.describe().values()))
        camera = open_camera(options.camera, options.fps, options.loop)
        stack.callback(camera.close)
        spec, threshold = bundle.manifest.preprocess, bundle.manifest.threshold.value
        results = stack.enter_context(Results(options.results, spec, threshold)) if options.results else None
        link = open_plc(options.plc, options.baud)
        stack.callback(link.close)
        line = Line(bundle, engine, camera, link, options.heartbeat, results, _reporter(options.quiet), options.parts)
        try:
            line.run(stop)
        finally:
            _print_summary(line.summary)


def _introduce(bundle: Bundle, backend: str) -> None:
    manifest = bundle.manifest
    say(
        f"bundle {bundle.path}: {manifest.category}, {manifest.method} {manifest.precision}, threshold "
        f"{manifest.threshold.value:.3e}, made {manifest.created}"
    )
    if manifest.threshold_changes:
        change = manifest.threshold_changes[-1]
        say(f"threshold changed {change.at} by {change.by}, before {change.before.value:.3e}: {change.reason}")
    if backend == "fake":
        print("WARNING: --backend fake: the verdicts are scripted, no part is inspected", file=sys.stderr)


def _reporter(quiet: bool) -> Callable[[str], None]:
    """What the line reports goes to the terminal; a terminal that has gone does not stop the line."""
    return lambda text: None if quiet and text.startswith("part ") else say(text)


def _print_summary(summary: Summary) -> None:
    verdicts = summary.verdicts
    say(
        f"\ncaptured {summary.captured} = judged {summary.judged} + dropped {summary.dropped}   "
        f"PASS {verdicts['PASS']}  FAIL {verdicts['FAIL']}  UNKNOWN {verdicts['UNKNOWN']}"
    )
    if summary.undelivered:
        say(f"{summary.undelivered} verdict could not be delivered to the PLC")
    if summary.lost_records:
        say(f"{summary.lost_records} records or pictures could not be written")
    if summary.judged:
        say(table(summary.latency.percentiles()))


if __name__ == "__main__":
    sys.exit(main())
