"""The loaded bundles, an engine process for each, and which of them judges.

A change (another recipe, a bundle that was replaced on disk, a rollback) is made between two parts: the engine that is
to take over passes its self test first, while the old one still judges; when it fails, nothing changes. The engine it
replaced stays loaded, so that a rollback needs no file. One that is not needed any more ends when it has answered for
the part that it still has; nothing here waits for that.
"""

from collections.abc import Callable
from dataclasses import dataclass

from stpm.edge.config import Station
from stpm.edge.engine.host import EngineHost
from stpm.edge.engine.messages import EngineReady, EngineSettings, Inspect, Inspected, InspectionFailed
from stpm.edge.errors import ConfigError
from stpm.edge.ring import Ring
from stpm.edge.worker import await_end

END_S = 1.0


@dataclass
class Change:
    """What waits for an engine's self test."""

    recipe: int
    host: EngineHost
    what: str  # for people
    done: Callable[[bool, str], None]  # told once how it ended
    given_up: bool = False


class Recipes:
    def __init__(self, station: Station, ring: Ring) -> None:
        self._station, self._ring = station, ring
        self._hosts = {int(number): self._host(path) for number, path in station.recipes.items()}
        self._previous: dict[int, EngineHost] = {}
        self._leaving: list[EngineHost] = []
        self._change: Change | None = None
        self.active = station.recipe if station.recipe is not None else min(self._hosts)
        if self.active not in self._hosts:
            raise ConfigError(f"recipe {self.active} is not in [recipes]: known are {self._named}")

    @property
    def numbers(self) -> list[int]:
        return sorted(self._hosts)

    @property
    def _named(self) -> str:
        return ", ".join(map(str, self.numbers))

    # --- what the line asks for

    def known(self, recipe: int) -> EngineReady:
        known = self._hosts[recipe].known
        assert known is not None  # the line begins when all engines have said so
        return known

    def bundle(self, recipe: int) -> str:
        known = self._hosts[recipe].known
        return known.sha256 if known else ""

    def free(self, recipe: int) -> bool:
        return self._hosts[recipe].free

    def ask(self, recipe: int, question: Inspect, now_ns: int) -> None:
        self._hosts[recipe].ask(question, now_ns)

    # --- what the loop asks for

    @property
    def ready(self) -> bool:
        return all(host.ready for host in self._hosts.values())

    def raise_failure(self) -> None:
        """At start-up the first engine that does not come up ends the run, with its own kind of error."""
        for host in self._hosts.values():
            if host.error is not None:
                raise host.error

    def failures(self) -> dict[int, str]:
        """Of the recipes whose engine is not there."""
        return {
            number: str(host.error or "the engine is starting")
            for number, host in self._hosts.items()
            if not host.ready and not (self._change is not None and self._change.host is host)
        }

    def filenos(self) -> list[int]:
        return [number for host in self._everyone() if (number := host.fileno()) is not None]

    def due_ns(self) -> int | None:
        times = [host.due_ns() for host in self._everyone()]
        return min((time for time in times if time is not None), default=None)

    def restarts(self) -> int:
        return sum(max(host.supervisor.restarts, 0) for host in self._everyone())

    def poll(self, now_ns: int) -> tuple[list[Inspected | InspectionFailed], list[tuple[int, str]]]:
        """Answers, and the parts that died with their engine, each with the reason."""
        answers: list[Inspected | InspectionFailed] = []
        lost: list[tuple[int, str]] = []
        for host in self._everyone():
            messages, dead = host.poll(now_ns)
            answers += [message for message in messages if isinstance(message, Inspected | InspectionFailed)]
            if dead is not None:
                lost.append((dead, str(host.error)))
            if self._change is not None and self._change.host is host:
                self._settle(self._change)
        for number, host in list(self._previous.items()):
            if host.gone:  # started again, it would find another bundle on disk than its own
                del self._previous[number]
                self._retire(host)
        self._leaving = [host for host in self._leaving if not host.over]
        return answers, lost

    def end(self) -> None:
        """All of them at once."""
        await_end([process for host in self._everyone() for process in host.close()], END_S)

    # --- changes

    def switch(self, recipe: int, done: Callable[[bool, str], None], now_ns: int) -> None:
        """Judge with another recipe, when its engine has passed its self test once more."""
        host = self._hosts.get(recipe)
        if host is None:
            done(False, f"recipe {recipe} is not loaded: known are {self._named}")
        elif recipe == self.active:
            self._give_up(f"recipe {recipe} was asked for again")
            done(True, f"recipe {recipe} is the active one already")
        elif not host.free:
            done(False, f"the engine of recipe {recipe} is not ready: {host.error or 'it is busy'}")
        elif self._begin(Change(recipe, host, f"recipe {recipe}", done)):
            host.test(now_ns)

    def reload(self, recipe: int, done: Callable[[bool, str], None], now_ns: int) -> None:
        """Load the bundle of a recipe again, which somebody has replaced on disk."""
        host = self._hosts.get(recipe)
        if host is None:
            done(False, f"recipe {recipe} is not loaded: known are {self._named}")
            return
        coming = self._host(host.settings.bundle)
        if self._begin(Change(recipe, coming, f"recipe {recipe} loaded again", done)):
            coming.poll(now_ns)

    def rollback(self, recipe: int, done: Callable[[bool, str], None], now_ns: int) -> None:
        """Judge with the bundle that the last reload of a recipe replaced."""
        host = self._previous.get(recipe)
        if host is None or not host.free:
            done(False, f"there is no earlier bundle of recipe {recipe} to go back to")
        elif self._begin(Change(recipe, host, f"recipe {recipe} rolled back", done)):
            host.test(now_ns)

    def _give_up(self, why: str) -> None:
        """A switch that is under way: its self test ends, and then nothing follows from it."""
        change = self._change
        if change is not None and self._hosts.get(change.recipe) is change.host:
            if not change.given_up:
                change.done(False, f"{change.what} was given up: {why}")
            change.given_up, change.done = True, lambda good, text: None

    def _begin(self, change: Change) -> bool:
        if self._change is not None:
            change.done(False, f"{self._change.what} is still under way: try again when it is done")
            return False
        self._change = change
        return True

    def _settle(self, change: Change) -> None:
        host = change.host
        if host.ready and host.known is not None:
            self._change = None
            if host is not self._hosts[change.recipe]:
                replaced = self._previous.pop(change.recipe, None)
                if replaced is not None and replaced is not host:
                    self._retire(replaced)
                self._previous[change.recipe] = self._hosts[change.recipe]
                self._hosts[change.recipe] = host
            elif not change.given_up:
                self.active = change.recipe
            change.done(True, f"{change.what}: {host.known.category}, bundle {host.known.sha256[:12]}")
        elif host.error is not None:
            self._change = None
            if host not in self._hosts.values():
                self._retire(host)
            change.done(False, f"{change.what} was refused: {host.error}")

    def _everyone(self) -> list[EngineHost]:
        coming = [self._change.host] if self._change else []
        hosts = [*self._hosts.values(), *self._previous.values(), *coming, *self._leaving]
        return list(dict.fromkeys(hosts))

    def _retire(self, host: EngineHost) -> None:
        host.retire()
        if host not in self._leaving:
            self._leaving.append(host)

    def _host(self, bundle: str) -> EngineHost:
        choice = self._station.engine
        settings = EngineSettings(bundle, choice.backend, choice.script)
        return EngineHost(settings, self._ring, round(choice.hang_ms * 1e6))
