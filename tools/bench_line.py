"""The whole line, measured: `tools/bench.py --line`. Real processes, a drawn camera, a PLC on a pseudo-terminal.

overhead    capture to the last byte handed to the serial port, less the inspection and the wait for an engine that was
            busy with another part
gate        how far from its due time the gate's line is handed to the port
serial      an unplugged port: from plugging it in again to the first verdict that is delivered
camera      a camera that hangs: from its last frame to the first verdict on a new one, noticing included

The bare inspection is timed in the same minute, without a line around it, so that the ratio survives a busy machine.

JSON, schema 1: {schema, started, machine, bundle, sha256, engine, parts, figures: {name: {count, p50, p99, p999,
max}}, missed}, in milliseconds.
"""

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import numpy as np
from tqdm import tqdm

from stpm.edge.bundle import open_bundle
from stpm.edge.config import Station, checked, read_station
from stpm.edge.engine import open_engine
from stpm.edge.loop import Loop
from stpm.edge.plc import open_link
from stpm.tools.cable import PtyCable
from stpm.tools.plc_sim import PtyPlc

SCHEMA = 1
FPS = 30
LOAD = 0.6  # of the engine at most, so that parts do not wait for each other on a slow machine
# milliseconds, on two cores
TARGETS = {
    ("overhead", "p99"): 2.0,
    ("overhead", "p999"): 5.0,
    ("gate", "p99"): 3.0,
    ("serial", "max"): 1000.0,
    ("camera", "max"): 3000.0,
}


class Spread(msgspec.Struct, frozen=True):
    """Milliseconds over `count` samples."""

    count: int
    p50: float
    p99: float
    p999: float
    max: float


class LineBenchmark(msgspec.Struct, frozen=True):
    schema: int
    started: str
    machine: dict[str, str]
    bundle: str
    sha256: str
    engine: dict[str, str]
    parts: int
    figures: dict[str, Spread]
    missed: list[str]  # targets that were not met


def measure_line(bundle: Path, backend: str, parts: int, repeats: int, machine: dict[str, str]) -> LineBenchmark:
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    samples: dict[str, list[float]] = {}
    with tqdm(total=2 + 2 * repeats, desc="measuring the line", unit="run", disable=None, leave=False) as bar:
        engine = _overhead(bundle, backend, parts, samples)
        bar.update()
        _gate(bundle, parts, samples)
        bar.update()
        for name, measure in (("serial", _unplug), ("camera", _hang)):
            for _ in range(repeats):
                samples.setdefault(name, []).append(measure(bundle))
                bar.update()
    figures = {name: _spread(values) for name, values in samples.items()}
    missed = [
        f"{name} {which} {getattr(figures[name], which):.2f} ms, wanted below {limit:g} ms"
        for (name, which), limit in TARGETS.items()
        if getattr(figures[name], which) >= limit
    ]
    sha256 = open_bundle(bundle).sha256
    return LineBenchmark(SCHEMA, started, machine, str(bundle), sha256, engine, parts, figures, missed)


def report(benchmark: LineBenchmark) -> str:
    """The figures as a table, and whether the targets were met."""
    lines = [f"{'milliseconds':<30}{'p50':>10}{'p99':>10}{'p99.9':>10}{'max':>10}{'n':>8}"]
    lines += [
        f"{name:<30}{spread.p50:>10.2f}{spread.p99:>10.2f}{spread.p999:>10.2f}{spread.max:>10.2f}{spread.count:>8}"
        for name, spread in benchmark.figures.items()
    ]
    ratio = benchmark.figures["capture to wire"].p50 / benchmark.figures["bare inspection"].p50
    lines.append(f"capture to wire is {ratio:.2f} times the bare inspection (p50, same minute)")
    lines += [f"MISSED: {sentence}" for sentence in benchmark.missed] or ["all targets met"]
    return "\n".join(lines)


def _overhead(bundle: Path, backend: str, parts: int, samples: dict[str, list[float]]) -> dict[str, str]:
    """The line on a real engine, and the same engine alone before and after it."""
    opened = open_bundle(bundle)
    frame, threshold = opened.golden().frames[0], opened.manifest.threshold.value
    bare = samples.setdefault("bare inspection", [])

    def alone() -> dict[str, str]:
        with open_engine(opened, backend) as engine:
            engine.warm_up()
            for _ in range(max(parts // 4, 10)):
                began = time.perf_counter()
                engine.inspect(frame, threshold)
                bare.append((time.perf_counter() - began) * 1e3)
            return engine.describe()

    alone()
    height, width = frame.shape[:2]
    fps = min(FPS, LOAD * 1e3 / float(np.median(bare)))
    camera = f"pattern:fps={fps:.1f},width={width},height={height}"
    with _plc() as port:
        loop = _run(_station(bundle, camera, port, {"engine.backend": backend, "parts.limit": parts}))
    for name in ("capture to line", "inspection", "capture to wire", "overhead"):
        samples[name] = loop.line.latency.milliseconds(name)
    return alone()


def _gate(bundle: Path, parts: int, samples: dict[str, list[float]]) -> None:
    gate = {"gate.mode": "delay", "gate.delay_ms": 150, "gate.pulse_ms": 15, "gate.polarity": "reject"}
    script = {"engine.backend": "fake", "engine.script": "fail", "parts.alarm_after": 0}
    with _plc() as port:
        loop = _run(_station(bundle, f"pattern:fps={FPS}", port, {**gate, **script, "parts.limit": parts}))
    samples["gate"] = loop.line.latency.milliseconds("gate jitter")


def _unplug(bundle: Path) -> float:
    with PtyCable() as cable, PtyPlc(device=cable.theirs) as plc:
        station = _station(
            bundle, f"pattern:fps={FPS}", cable.ours, {"engine.backend": "fake", "engine.script": "pass"}
        )
        with _running(station):
            _wait(lambda: plc.gate.passed)
            cable.unplug()
            time.sleep(1.0)
            before = len(plc.gate.passed)
            plugged = time.perf_counter()
            cable.plug()
            _wait(lambda: len(plc.gate.passed) > before)
            return (time.perf_counter() - plugged) * 1e3


def _hang(bundle: Path) -> float:
    with tempfile.TemporaryDirectory() as folder, PtyPlc() as plc:
        camera = f"pattern:fps={FPS},hang@60,once={folder}/done"
        # "latest": where frames are counted, somebody would have to look first
        fake: dict[str, object] = {"engine.backend": "fake", "engine.script": "pass", "camera.policy": "latest"}
        station = _station(bundle, camera, plc.port, fake)
        with _running(station):
            _wait(lambda: len(plc.gate.passed) > 20)
            _wait(lambda: not plc.gate.ready or Path(folder, "done").exists())
            time.sleep(0.2)  # what was on its way
            last, before = time.perf_counter() - 0.2, len(plc.gate.passed)
            _wait(lambda: len(plc.gate.passed) > before)
            return (time.perf_counter() - last) * 1e3


def _station(bundle: Path, camera: str, port: str, more: dict[str, object]) -> Station:
    settings = {"camera.source": camera, "camera.policy": "every", "plc.port": port, "recipes": {"1": str(bundle)}}
    return checked(read_station(None, {**settings, **more}))


def _run(station: Station, stop: threading.Event | None = None) -> Loop:
    """The line itself, in this process, with its children."""
    switch = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)  # as stpm-run does
    try:
        loop = Loop(station, open_link(station.plc, station.gate.safe), lambda text: None)
        loop.run(stop or threading.Event())
        return loop
    finally:
        sys.setswitchinterval(switch)


@contextmanager
def _running(station: Station) -> Iterator[None]:
    """In a process of its own."""
    code = (
        "import sys, msgspec\n"
        "from stpm.edge.config import Station\n"
        "from stpm.tools.bench_line import _run\n"
        "_run(msgspec.json.decode(sys.argv[1], type=Station))"
    )
    words = [sys.executable, "-c", code, msgspec.json.encode(station).decode()]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def _plc() -> Iterator[str]:
    """A simulated PLC in a process of its own; the name of its terminal."""
    words = [sys.executable, "-m", "stpm.tools.plc_sim"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        reader = threading.Thread(target=process.stdout.read, daemon=True)
        reader.start()
        try:
            yield line.split()[1]
        finally:
            process.terminate()
            reader.join()


def _wait(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the line did not do what it should")
        time.sleep(0.001)


def _spread(values: list[float]) -> Spread:
    p50, p99, p999 = (float(value) for value in np.percentile(values, [50, 99, 99.9]))
    return Spread(len(values), p50, p99, p999, float(max(values)))
