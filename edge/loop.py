"""The event loop of a station: child processes, descriptors and timers around the line, which decides.

start-up (everything opens, self test) → READY → work → shut-down, with the safe state as the last word in any case.
"""

import gc
import select
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from stpm.edge.camera.host import CameraHost
from stpm.edge.config import Station
from stpm.edge.control import Answer, Control, Request
from stpm.edge.errors import CameraError, EngineError, PlcError, StorageError, StpmError
from stpm.edge.line import Line
from stpm.edge.notify import Notify
from stpm.edge.plc import messages as plc
from stpm.edge.plc.base import Link
from stpm.edge.recipes import Recipes
from stpm.edge.record import Record
from stpm.edge.ring import Ring

SLOTS = 32
LONGEST_WAIT_S = 0.05  # a signal and a progress that stands still are looked at this often
START_UP_S = 180.0
JOURNAL_S = 3.0
FINISH_S = 5.0  # what a stop may wait for the parts in hand


class Loop:
    """One station. `report` is told every part and every change of state; it must not wait."""

    def __init__(self, station: Station, link: Link, report: Callable[[str], None]) -> None:
        self._station, self._link, self._report = station, link, report
        self._ring = Ring(SLOTS)
        self._camera = CameraHost(station.camera, self._ring)
        self._recipes = Recipes(station, self._ring)
        self.record = Record(station, self._ring)
        self.line = Line(
            station,
            self._recipes,
            link,
            self.record,
            self._camera.take,
            self._camera.release,
            report,
            self._camera.recorded,
        )
        self._accepted: dict[str, tuple[str, str]] = {}  # settings that the camera did not take at the start
        self._control: Control | None = None
        self._notify = Notify()
        self._stop_asked = False

    def run(self, stop: threading.Event) -> None:
        """Judge parts until `stop` is set, the source ends, or the last part is done. StpmError when that fails."""
        last = plc.State("STOPPED")
        try:
            if self._station.control.socket:
                self._control = Control(self._station.control.socket)
            self._start_up(stop)
            if not (stop.is_set() or self._stop_asked):
                self._ready()
                self._work(stop)
                self._finish()
        except StpmError as error:
            last = plc.State("FAULT", type(error).__name__, self._recipes.active, error.exit_code)
            raise
        except BaseException as error:
            last = plc.State("FAULT", f"unexpected {type(error).__name__}", self._recipes.active, 1)
            raise
        finally:
            self._shut_down(last)
        if self.line.counts.undelivered and self._camera.recorded:
            raise PlcError(
                f"{self.line.counts.undelivered} of {self.line.counts.judged} verdicts could not be delivered to the "
                "PLC: check cable and PLC, then run it again"
            )

    # --- start-up

    def _start_up(self, stop: threading.Event) -> None:
        """Everything opens side by side. What does not is an error now; later it would be mended."""
        line, deadline = self.line, time.monotonic() + START_UP_S
        line.tick(time.monotonic_ns())  # BOOT
        line.health.phase = "SELF_TEST"
        while not (self._recipes.ready and self._camera.ready) and not (stop.is_set() or self._stop_asked):
            self._turn()
            self._recipes.raise_failure()
            if self._camera.error:
                raise CameraError(self._camera.error)
            if time.monotonic() > deadline:
                raise EngineError(f"the station has not come up within {START_UP_S:g} s: start it again")

    def _ready(self) -> None:
        known = self._recipes.known(self._recipes.active)
        self._report(f"self test passed: largest deviation {known.deviation:.2%} of the golden scores")
        self._report("engine: " + ", ".join(known.description.values()))
        opened = self._camera.opened
        if opened is not None:
            self._report(f"camera: {opened.description}")
            self._accepted = self._camera.differing
            for name, (asked, found) in self._accepted.items():
                self._report(f"WARNING: camera.{name}: asked for {asked}, the camera says {found}")
        if known.description.get("backend") == "fake":
            self.line.health.simulated = True
        self._begin_journal()
        gc.collect()
        gc.freeze()  # what is there now stays; later collections are short
        self.line.health.phase = "READY"
        now = time.monotonic_ns()
        self._look_after(now)  # what has broken since it came up
        self.line.tick(now)
        self._notify.say("READY=1")

    def _begin_journal(self) -> None:
        """A journal that cannot be written does not stop the line: the state is DEGRADED then."""
        self.record.begin({number: self._recipes.known(number) for number in self._recipes.numbers})
        deadline = time.monotonic() + JOURNAL_S
        while not (self.record.open or self.record.problem) and time.monotonic() < deadline:
            self._turn()

    # --- work

    def _work(self, stop: threading.Event) -> None:
        while not (stop.is_set() or self._stop_asked or self.line.finished):
            self._turn()
            if self._camera.ended and not self.line.ended:
                self.line.ended = True
            if self._camera.recorded and self._camera.error:
                raise CameraError(self._camera.error)  # begun again, a recording would be judged twice

    def _finish(self) -> None:
        """The parts in hand get their verdict, and it is delivered; then it is over, in any case after a while."""
        self.line.stop()
        deadline = time.monotonic() + FINISH_S
        while not self.line.finished and time.monotonic() < deadline:
            self._turn()

    def _turn(self) -> None:
        """Wait for something to happen, and let the line decide."""
        descriptors = [
            number
            for number in (self._camera.fileno(), self._link.fileno(), self.record.fileno(), *self._recipes.filenos())
            if number is not None
        ]
        if self._control is not None:
            descriptors += self._control.filenos()
        select.select(descriptors, [], [], self._wait_s())
        now = time.monotonic_ns()
        self._link.alive(now)  # before edges of this turn: a link that has not heard of us takes none
        line = self.line
        answers, lost = self._recipes.poll(now)
        for answer in answers:
            line.inspected(answer, now)
        for key, sentence in lost:
            line.engine_lost(key, sentence, now)
        for event in self._link.events():
            if isinstance(event, plc.RecipeAsked):
                self._recipes.switch(event.recipe, self._told("the PLC"), now)
            else:
                line.link_event(event, now)
        frames, gone = self._camera.poll(now)
        for frame in frames:
            line.frame_ready(frame, now)
        if gone:
            line.camera_lost(self._camera.error, now)
        for slot in self.record.poll(now):
            self._camera.release(slot)
        self._look_after(now)
        line.tick(time.monotonic_ns())  # what was done meanwhile may have taken its time
        if self._control is not None:
            for request, reply in self._control.poll():
                self._answer(request, reply, now)
        self._notify.alive(now)

    def _wait_s(self) -> float:
        """Until the next thing is due."""
        now = time.monotonic_ns()
        times = [self.line.due_ns(), self._recipes.due_ns(), self._camera.due_ns()]
        earliest: int = min(time for time in times if time is not None)
        return min(max(earliest - now, 0) / 1e9, LONGEST_WAIT_S)

    def _look_after(self, now: int) -> None:
        """What the processes are up to, as conditions of the line."""
        health = self.line.health
        if health.phase not in ("READY", "RUNNING"):
            return
        absent = self._recipes.failures()
        for number in self._recipes.numbers:
            active = number == self._recipes.active
            name = "engine" if active else f"engine {number}"
            if number not in absent:
                self._settle(name, "engine")
                self.line.health.settle(f"engine {number}")
            elif active:
                self._raise(name, "engine", absent[number], EngineError.exit_code)
            elif health.warn(name, absent[number], EngineError.exit_code):
                self.record.event("engine", absent[number])
        if self._camera.ready or self._camera.ended:
            self._settle("camera", "camera")
        else:
            self._raise("camera", "camera", self._camera.error or "the camera is opening", CameraError.exit_code)
        self._compare_settings()
        if self.record.problem:
            if health.warn("journal", self.record.problem, StorageError.exit_code):
                self._report(f"journal: {self.record.problem}")
        elif health.settle("journal"):
            self._report("journal: is written again")

    def _compare_settings(self) -> None:
        """A camera that was opened again may have come back with other settings than at the start."""
        if not self._camera.ready:
            return
        changed = newly_differing(self._accepted, self._camera.differing)
        if not changed:
            self._settle("settings", "camera")
        elif self.line.health.warn("settings", "; ".join(changed), CameraError.exit_code):
            self.line.alarm("; ".join(changed))

    def _raise(self, name: str, kind: str, sentence: str, code: int) -> None:
        if self.line.health.fault(name, sentence, code):
            self.record.event(kind, sentence)
            self._report(f"{kind}: {sentence}")

    def _settle(self, name: str, kind: str) -> None:
        if self.line.health.settle(name):
            self.record.event(kind, f"{name} is there again")
            self._report(f"{kind}: {name} is there again")

    # --- operators

    def _told(self, by: str, reply: Callable[[Answer], None] = lambda answer: None) -> Callable[[bool, str], None]:
        """What is done when a change of recipe has come to its end."""

        def done(good: bool, text: str) -> None:
            self.record.event("recipe", f"{by}: {text}")
            self._report(f"recipe: {text}")
            if good:
                self.line.health.conditions.pop("recipe", None)
            else:
                self.line.health.warn("recipe", text, EngineError.exit_code, latched=True)
            reply(Answer(good, text))

        return done

    def _answer(self, request: Request, reply: Callable[[Answer], None], now: int) -> None:
        recipe = self._recipes.active if request.recipe is None else request.recipe
        match request.verb:
            case "status":
                reply(Answer(True, self.line.health.state, self.status()))
            case "recipe":
                self._recipes.switch(recipe, self._told(request.by, reply), now)
            case "reload":
                self._recipes.reload(recipe, self._told(request.by, reply), now)
            case "rollback":
                self._recipes.rollback(recipe, self._told(request.by, reply), now)
            case "clear":
                self.line.clear(request.by, now)
                reply(Answer(True, "cleared"))
            case "stop":
                self.record.event("operator", f"{request.by} stopped the line")
                self._stop_asked = True
                reply(Answer(True, "stopping"))

    def status(self) -> dict[str, object]:
        counts, health = self.line.counts, self.line.health
        return {
            "state": health.state,
            "conditions": {name: condition.sentence for name, condition in health.conditions.items()},
            "recipe": self._recipes.active,
            "parts": dict(counts.verdicts),
            "captured": counts.captured,
            "without frame": counts.without_frame,
            "dropped": dict(counts.dropped),
            "late": counts.late,
            "undelivered": counts.undelivered,
            "garbage": counts.garbage,
            "gate": dict(counts.gates),
            "lost": {"records": self.record.lost, "pictures": self.record.lost_pictures},
            "restarts": {
                "camera": self._camera.supervisor.restarts,
                "engine": self._recipes.restarts(),
            },
        }

    # --- shut-down

    def _shut_down(self, last: plc.State) -> None:
        """The safe state first, then let go of everything; what fails on the way does not keep the rest from it."""
        with ExitStack() as rest:
            rest.callback(self._ring.close)
            if self._control is not None:
                rest.callback(self._control.close)
            rest.callback(self.record.close)
            rest.callback(lambda: self.line.close(time.monotonic_ns()))
            rest.callback(self._recipes.end)
            rest.callback(self._camera.end)
            rest.callback(self.record.event, "state", last.state + (f" ({last.reason})" if last.reason else ""))
            rest.callback(self._close_link, last)
            self.line.health.phase = "STOPPED"
            self._notify.say("STOPPING=1")

    def _close_link(self, last: plc.State) -> None:
        if not self._link.close(last):
            # the PLC hears no heartbeat from now on, and rejects
            self._report(f"the last state {last.state} could not be sent")
        for event in self._link.events():
            if not isinstance(event, plc.RecipeAsked):
                self.line.link_event(event, time.monotonic_ns())


def newly_differing(accepted: dict[str, tuple[str, str]], now: dict[str, tuple[str, str]]) -> list[str]:
    """Settings of the camera that differ from what was asked for, and did not, or not like this, at the start."""
    return [
        f"camera.{name}: asked for {asked}, the camera says {found} since it was opened again"
        for name, (asked, found) in now.items()
        if accepted.get(name) != (asked, found)
    ]
