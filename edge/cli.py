"""stpm-run: judge the parts in front of a camera and tell the PLC."""

import argparse
import math
import re
import sys
from contextlib import ExitStack
from pathlib import Path

import msgspec

from stpm.edge.bundle import Bundle, find_bundle, open_bundle
from stpm.edge.check import check
from stpm.edge.command import parser, run_command, stop_on_signals
from stpm.edge.config import Station, checked, read_station
from stpm.edge.engine import BACKENDS
from stpm.edge.latency import table
from stpm.edge.loop import Loop
from stpm.edge.plc import open_link
from stpm.edge.plc.messages import State
from stpm.edge.terminal import Terminal

EXAMPLES = """\
  stpm-run --camera 0 --plc /dev/ttyUSB0
  stpm-run --config line1.toml --check
  stpm-run --config line1.toml --set camera.exposure=200 --set gate.delay_ms=350
  stpm-run --camera rtsp://10.0.0.7/stream --plc /dev/ttyS1 --baud 19200 --bundle bundles/screw-int8
  stpm-run --camera photos/test --plc none --journal journal
  stpm-run --camera pattern:fps=30 --plc none --backend fake     no camera, no PLC, no engine"""


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


def setting(text: str) -> tuple[str, object]:
    """KEY=VALUE, the value as in TOML, or a bare word."""
    key, equals, value = text.partition("=")
    if not equals or not all(re.fullmatch("[A-Za-z0-9_]+", part) for part in key.split(".")):
        raise argparse.ArgumentTypeError(f"wanted TABLE.KEY=VALUE, found {text}")
    try:
        return key, msgspec.toml.decode(f"value = {value}")["value"]
    except msgspec.DecodeError:
        return key, value


def main(arguments: list[str] | None = None) -> int:
    options = parser("stpm-run", "Judge the parts in front of a camera with a bundle and tell the PLC.", EXAMPLES)
    add = options.add_argument
    add(
        "--config", type=Path, metavar="FILE", help="the station, as TOML (docs/station.md); options below override it"
    )
    add("--camera", metavar="SOURCE", help="index, /dev/videoN, URL, genicam:NAME, video file, or folder of images")
    add("--plc", metavar="PORT", help="serial device or pseudo-terminal, or `none`")
    add("--protocol", choices=("ascii", "modbus-master", "modbus-slave", "pins"), help="of the PLC (default: ascii)")
    add("--bundle", type=Path, metavar="DIR", help="recipe 1 (default: the only bundle in ./bundles)")
    add(
        "--backend",
        choices=("auto", *BACKENDS),
        help="inference engine; `fake` tries out camera and PLC with scripted verdicts (default: auto)",
    )
    add("--fps", type=positive, help="pace of a folder or video file; asked of a live camera")
    add("--loop", action="store_true", default=None, help="start a folder or video file again at its end")
    add("--parts", type=count, metavar="N", help="stop after N parts")
    add("--baud", type=count, help="speed of the serial line (default: 115200)")
    add("--heartbeat", type=positive, metavar="S", help="a beat on the PLC line every S seconds (default: 0.5)")
    add("--journal", metavar="DIR", help="write every part, and pictures of the rejects (docs/journal.md)")
    add("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="any other key of the station")
    add("--check", action="store_true", help="try everything, move nothing, and say what is wrong")
    add("--quiet", action="store_true", help="no line per part on the terminal")
    chosen = options.parse_args(arguments)
    return run_command(
        "stpm-run",
        lambda: _run(chosen),
        "a second signal cut the orderly stop short; the PLC hears no heartbeat from now on",
    )


def station_of(options: argparse.Namespace) -> Station:
    """The station file with the options on top."""
    given = {
        "camera.source": options.camera,
        "camera.fps": options.fps,
        "camera.loop": options.loop,
        "plc.port": options.plc,
        "plc.protocol": options.protocol,
        "plc.baud": options.baud,
        "plc.heartbeat_s": options.heartbeat,
        "engine.backend": options.backend,
        "parts.limit": options.parts,
        "journal.folder": options.journal,
        "recipes.1": str(options.bundle) if options.bundle else None,
        "recipe": 1 if options.bundle else None,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    station = checked(read_station(options.config, {**overrides, **dict(options.set)}))
    if not station.recipes:
        station = msgspec.structs.replace(station, recipes={"1": str(find_bundle())})
    return station


def _run(options: argparse.Namespace) -> None:
    station = station_of(options)
    if options.check:
        check(station)
        return
    if station.engine.backend == "fake":
        print("WARNING: --backend fake: the verdicts are scripted, no part is inspected", file=sys.stderr)
    # a thread that is busy hands the interpreter over sooner: the gate must not wait for 5 ms
    sys.setswitchinterval(0.0005)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        terminal = stack.enter_context(Terminal(options.quiet))
        for number, path in station.recipes.items():
            for text in _introduced(number, open_bundle(Path(path))):
                terminal.report(text)
        link = open_link(station.plc, station.gate.safe)
        stack.callback(link.close, State("STOPPED"))  # where the loop has not done it
        loop = Loop(station, link, terminal.report)
        try:
            loop.run(stop)
        finally:
            for text in summary(loop):
                terminal.report(text)


def _introduced(number: str, bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    lines = [
        f"recipe {number}: bundle {bundle.path}: {manifest.category}, {manifest.method} {manifest.precision}, "
        f"threshold {manifest.threshold.value:.3e}, made {manifest.created}"
    ]
    if manifest.threshold_changes:
        change = manifest.threshold_changes[-1]
        lines.append(
            f"threshold changed {change.at} by {change.by}, before {change.before.value:.3e}: {change.reason}"
        )
    return lines


def summary(loop: Loop) -> list[str]:
    counts, record = loop.line.counts, loop.record
    verdicts = counts.verdicts
    without = f" + without a frame {counts.without_frame}" if counts.without_frame else ""
    dropped = ", ".join(f"{number} {reason}" for reason, number in counts.dropped.items() if number)
    lines = [
        f"\ncaptured {counts.captured}{without} = judged {counts.judged} + dropped {sum(counts.dropped.values())}   "
        f"PASS {verdicts['PASS']}  FAIL {verdicts['FAIL']}  UNKNOWN {verdicts['UNKNOWN']}"
    ]
    if dropped:
        lines.append(f"dropped: {dropped}")
    if counts.gates:
        lines.append("gate: " + ", ".join(f"{number} {what}" for what, number in counts.gates.items()))
    if counts.late:
        lines.append(f"{counts.late} verdicts were not there in time")
    if counts.undelivered:
        lines.append(f"{counts.undelivered} verdicts could not be delivered to the PLC")
    if record.lost or record.lost_pictures:
        lines.append(f"the journal lost {record.lost} records and {record.lost_pictures} pictures: {record.problem}")
    percentiles = loop.line.latency.percentiles()
    if percentiles:
        lines.append(table(percentiles))
    return lines


if __name__ == "__main__":
    sys.exit(main())
