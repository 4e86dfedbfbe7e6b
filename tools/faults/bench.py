"""The line under test: `stpm-run` as a process with its children, and what can be seen of it from outside."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from stpm.edge.control import Answer, Request, ask
from stpm.edge.errors import StorageError
from stpm.edge.journal.query import Filter, Journal, RunSummary
from stpm.tools.faults.evidence import Books, Evidence, Fault, Row, Run, Sample
from stpm.tools.faults.peers import PEERS, GatePeer, Peer

MARK = "STPM_FAULTS"  # in the environment of every process of a run, and of nobody else
READY_S, RECOVERY_S, STOP_S = 60.0, 20.0, 20.0
SAMPLE_S, LOOK_S = 0.1, 0.5
SETTLED_S = 1.0  # of work, before memory and files are looked at
TRIGGERED_FPS = 50
CHILDREN = {name: f"stpm.edge.{name}.process" for name in ("camera", "engine", "journal")}


class NotInTimeError(Exception):
    """What a scenario waited for did not come."""


class Bench:
    """One scenario: its link, its bundle, its folder, and the evidence it leaves. `slack`: how many times longer than
    its limit a recovery may take."""

    def __init__(self, link: str, bundle: Path, folder: Path, seed: int = 0, full: bool = False, slack: float = 1):
        self.link, self.bundle, self.folder = link, bundle, folder
        self.seed, self.full, self.slack = seed, full, slack
        self.journal = folder / "journal"
        self.evidence = Evidence()
        self.notes: list[str] = []
        self.environment: dict[str, str] = {}  # of stpm-run
        self._threads = set(threading.enumerate())

    def expect(self, good: bool, sentence: str) -> None:
        """What is special about this scenario."""
        if not good:
            self.evidence.broken.append(sentence)

    @contextmanager
    def peer(self) -> Iterator[Any]:
        """The PLC that goes with the link."""
        with PEERS[self.link]() as peer:
            yield peer

    @contextmanager
    def line(self, peer: Peer, *faults: str, camera: str = "", **settings: Any) -> Iterator["Line"]:
        """stpm-run from its start to an orderly stop, with a pattern camera that has these faults, or with another
        camera. Dots in the names of settings are written as two underscores."""
        # a picture must be there before the next trigger, or it may show the next part
        fps = TRIGGERED_FPS if settings.get("camera__trigger") == "software" else peer.fps
        source = camera or ",".join([f"pattern:width=160,height=120,fps={fps}", *faults])
        line = Line(self, peer, source, {name.replace("__", "."): value for name, value in settings.items()})
        try:
            line.until(lambda: peer.passing, READY_S, "READY")
            line.ready_s = time.monotonic() + SETTLED_S
            yield line
            if not line.ended:
                line.returns_to_running()
        except NotInTimeError as error:
            self.evidence.broken.append(str(error))
        finally:
            line.end()
            self.evidence.runs.append(line.run)

    def close(self) -> None:
        """What is left of the harness itself."""
        deadline = time.monotonic() + 2
        while (left := set(threading.enumerate()) - self._threads) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.evidence.left += [f"the thread {thread.name!r} of the harness is left" for thread in left]


class Line:
    def __init__(self, bench: Bench, peer: Peer, camera: str, settings: dict[str, Any]) -> None:
        self.bench, self.peer = bench, peer
        self.mark = uuid.uuid4().hex
        self.socket = bench.folder / "line.sock"
        self._temporary = bench.folder / "tmp"
        self._temporary.mkdir(exist_ok=True)
        self._output = (bench.folder / "output.txt").open("a+")
        self._began = self._output.tell()
        self.settings = {
            "camera.policy": "every",
            "engine.script": "pattern",
            "control.socket": str(self.socket),
            "journal.folder": str(bench.journal),
            "journal.passes_every": 20,
            "parts.alarm_after": 0,
            # the machine may have other things to do
            "parts.queue": 16,
            "parts.deadline_ms": 1000.0,
            **peer.settings,
            **settings,
        }
        self._runs_before = {run.id for run in _runs(bench.journal)}
        self._samples: list[Sample] = []
        self._mapped: set[str] = set()  # files in /dev/shm
        self._next_sample_s = 0.0
        self._judged = 0  # what it last said of itself
        self._next_look_s = 0.0
        self.attended = False  # an operator looks at what is latched, and clears it
        self.seen: set[str] = set()  # conditions that the operator found
        self.killed = self.ended = False
        self.more_files = 0
        self.ready_s = 0.0
        peer.begin()
        self._process = subprocess.Popen(
            self._command(camera),
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                **bench.environment,
                MARK: self.mark,
                "TMPDIR": str(self._temporary),
            },
        )

    def _command(self, camera: str) -> list[str]:
        words = [sys.executable, "-m", "stpm.edge.cli", "--camera", camera, "--backend", "fake", "--quiet"]
        if "recipes" not in self.settings:
            words += ["--bundle", str(self.bench.bundle)]
        for key, value in self.settings.items():
            words += ["--set", f"{key}={_toml(value)}"]
        return words

    # --- waiting

    def until(self, true: Callable[[], object], seconds: float = RECOVERY_S, what: str = "") -> None:
        """Until `true()`. NotInTimeError when that does not come."""
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                raise NotInTimeError(f"{what or 'what was waited for'} did not come within {seconds:g} s")
            if self._process.poll() is not None and not self.ended:
                tail = " / ".join(self.output.strip().splitlines()[-3:])
                raise NotInTimeError(f"stpm-run ended with exit code {self._process.returncode}: {tail}")
            self.turn()

    def stay(self, seconds: float) -> None:
        """Let the line work, or suffer, for so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.turn()

    def turn(self) -> None:
        now = time.monotonic()
        self.peer.pump()
        if now >= self._next_sample_s:
            self._next_sample_s = now + SAMPLE_S
            self._sample(now)
        if self.attended and now >= self._next_look_s:
            self._next_look_s = now + LOOK_S
            conditions = self.status()["conditions"]
            if conditions:
                self.seen |= set(conditions)
                self.tell("clear")
        time.sleep(0.005)

    def works(self, parts: int = 5) -> None:
        """So many further parts pass."""
        wanted = len(self.peer.passed) + parts
        self.until(lambda: len(self.peer.passed) >= wanted, what=f"{parts} parts that pass")

    def returns_to_running(self) -> None:
        """An operator clears what is latched."""
        self.attended = True
        self.until_state("READY", "RUNNING")
        self.attended = False

    def until_state(self, *states: str) -> None:
        self.until(lambda: self.status()["state"] in states, what=" or ".join(states))

    def until_restarted(self, role: str, times: int) -> None:
        self.until(lambda: self.restarts(role) >= times, what=f"{role} process number {times + 1}")

    def until_other(self, role: str, than: int, seconds: float = RECOVERY_S) -> None:
        """Another process of that kind than this one."""
        self.until(lambda: set(self.processes(role)) - {than}, seconds, f"another {role} process")

    def until_said(self, part: int) -> None:
        """The PLC has got the verdict of that part."""
        self.until(lambda: any(id == part for _, id, _ in self.peer.said), what=f"a verdict of part {part}")

    # --- faults

    @contextmanager
    def fault(
        self, what: str, limit_s: float | None = None, times: int = 1, latches: str | None = None
    ) -> Iterator[Fault]:
        """The cause of the fault is there while the block runs, or until it sets `gone_s`; then a PASS must come.

        `latches`: the condition that must be there until an operator clears it; "" for one that may be.
        """
        fault = Fault(what, time.monotonic(), limit_s=limit_s and limit_s * self.bench.slack)
        for _ in range(times):
            self.bench.evidence.faults.append(fault)
        yield fault
        over_s = time.monotonic()
        fault.gone_s = fault.gone_s or over_s
        passes, attended = self.peer.passes_since, self.attended
        self.attended = attended or latches is not None
        if latches:  # what was on its way to the PLC may still arrive as a PASS before it
            self.until(lambda: latches in self.seen, what=f"{latches!r}, latched after: {what},")
            over_s = time.monotonic()
        self.until(lambda: passes(over_s) and self.peer.passing, what=f"a PASS after: {what}")
        self.attended = attended
        self.seen.clear()
        fault.recovery_s = passes(over_s)[0] - fault.gone_s
        fault.survived = True

    def recovered(self, what: str, gone_s: float) -> None:
        """For what this run has begun with: the end of the one before it."""
        self.until(lambda: self.peer.passes_since(gone_s), what=f"a PASS after: {what}")
        first_s = self.peer.passes_since(gone_s)[0]
        self.bench.evidence.faults.append(Fault(what, gone_s, gone_s, first_s - gone_s, survived=True))

    def processes(self, role: str) -> list[int]:
        """The children of that kind; "line" is the main process."""
        if role == "line":
            return [self._process.pid]
        return sorted(pid for pid, words in family(self.mark).items() if CHILDREN[role] in words)

    def signal(self, role: str, number: int) -> int:
        """To the newest of them. Its process id."""
        self.until(lambda: self.processes(role), what=f"a {role} process")
        pid = self.processes(role)[-1]
        self.signal_pid(pid, number)
        return pid

    def signal_pid(self, pid: int, number: int) -> None:
        """One that is gone does not hear it."""
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def kill(self) -> None:
        """SIGKILL of the main process."""
        self._judged = self.judged
        self.killed = self.ended = True
        self._process.kill()
        self._process.wait()
        self._ended_s = time.monotonic()

    # --- what it says of itself

    def tell(self, verb: Any, recipe: int | None = None) -> Answer:
        return ask(str(self.socket), Request(verb, recipe, "harness"), timeout_s=60)

    def status(self) -> dict[str, Any]:
        return self.tell("status").details

    @property
    def judged(self) -> int:
        return int(sum(self.status()["parts"].values()))

    def restarts(self, role: str) -> int:
        return int(self.status()["restarts"][role])

    @property
    def output(self) -> str:
        self._output.flush()
        return Path(self._output.name).read_text()[self._began :]

    # --- its end

    def stop(self) -> None:
        if self.ended:
            return
        self.ended = True
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.bench.evidence.broken.append(f"stpm-run did not stop within {STOP_S:g} s")
            self._process.kill()
            self._process.wait()
        self._ended_s = time.monotonic()

    def end(self) -> None:
        self.stop()
        self.peer_settles()
        left = self._left()
        run = _run_of(self.bench.journal, self._runs_before)
        rows, alarms = _read(self.bench.journal, run)
        self.run = Run(
            ready_s=self.ready_s,
            ended_s=self._ended_s,
            killed=self.killed,
            code=self._process.returncode,
            books=None if self.killed else _books(self.output),
            rows=rows,
            alarms=alarms,
            lost=run.lost + (run.pending or 0) if run else 0,
            judged_at_least=self._judged,
            wire=self.peer.wire(),
            samples=self._samples,
            more_files=self.more_files,
            gate_delay_s=self.peer.delay_s if isinstance(self.peer, GatePeer) else None,
            deadline_ms=self.settings.get("parts.deadline_ms", 500.0),
            left=left,
        )
        if not self.killed and self.run.books is None:
            self.bench.evidence.broken.append(f"stpm-run ended without its summary: {self.output[-300:]!r}")
        self._output.close()

    def peer_settles(self) -> None:
        """What is still on the wire is read."""
        time.sleep(0.1)

    def _left(self) -> list[str]:
        deadline = time.monotonic() + 1
        while (processes := family(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.01)
        left = [f"the process {pid} is left: {' '.join(words)[:80]}" for pid, words in processes.items()]
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        if not self.killed and self.socket.exists():
            left.append("the control socket is left")
        left += [f"{path.name} is left in TMPDIR" for path in self._temporary.iterdir()]
        return left + [f"{path} is left" for path in self._mapped if Path(path).exists()]

    def _sample(self, now: float) -> None:
        process = Path("/proc", str(self._process.pid))
        try:
            files = len(os.listdir(process / "fd"))
            memory = re.search(r"VmRSS:\s+(\d+)", (process / "status").read_text())
            if len(self._samples) % 20 == 0:
                self._mapped |= set(re.findall(r"/dev/shm/\S+", (process / "maps").read_text()))
        except OSError:
            return  # it has just ended
        if memory:
            self._samples.append(Sample(now, files, int(memory.group(1))))


def family(mark: str) -> dict[int, list[str]]:
    """The processes of a run that are there, with their words."""
    found = {}
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                words = (folder / "cmdline").read_bytes().decode().split("\0")
                if any(words):  # a zombie has none
                    found[int(folder.name)] = words
        except OSError:
            continue  # it has gone, or is not ours
    return found


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + "}"
    return json.dumps(str(value) if isinstance(value, Path) else value)


def _books(output: str) -> Books | None:
    found = re.search(
        r"captured (\d+)(?: \+ without a frame (\d+))? = judged (\d+) \+ dropped (\d+)\s+"
        r"PASS (\d+)\s+FAIL (\d+)\s+UNKNOWN (\d+)",
        output,
    )
    if not found:
        return None
    captured, without, judged, dropped, good, bad, unknown = (int(each or 0) for each in found.groups())
    undelivered = re.search(r"(\d+) verdicts could not be delivered", output)
    lost = re.search(r"the journal lost (\d+) records", output)
    return Books(
        captured,
        without,
        judged,
        dropped,
        {"PASS": good, "FAIL": bad, "UNKNOWN": unknown},
        int(undelivered.group(1)) if undelivered else 0,
        int(lost.group(1)) if lost else 0,
    )


def _runs(folder: Path) -> list[RunSummary]:
    try:
        with Journal(folder) as journal:
            return journal.runs()
    except StorageError:
        return []  # none yet


def _run_of(folder: Path, before: set[int]) -> RunSummary | None:
    return next((run for run in _runs(folder) if run.id not in before), None)


def _read(folder: Path, run: RunSummary | None) -> tuple[list[Row], list[str]]:
    if run is None:
        return [], []
    with Journal(folder) as journal:
        parts = [
            Row(part, frame, verdict, outcome, reason, latency, datetime.fromisoformat(at).timestamp())
            for page in journal.parts(Filter(run=run.id))
            for _, _, at, part, frame, verdict, _, _, latency, _, reason, *_, outcome in page
        ]
        alarms = [row[3] for row in journal.events(Filter(run=run.id, kind="alarm"), 1_000_000)]
    return parts, alarms


def fill(folder: Path) -> Path:
    """A file that takes all the space that is left there."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return filler
    return filler


@contextmanager
def small_disk(point: Path, megabytes: int) -> Iterator[bool]:
    """A file system of that size; False where mounting one is not allowed."""
    point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(point)]
    with ExitStack() as stack:
        mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0
        if mounted:
            stack.callback(subprocess.run, ["umount", str(point)], check=True)
        yield bool(mounted)
