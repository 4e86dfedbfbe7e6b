"""Recipes, with real engine processes of the fake engine: changes under way, and engines that are busy meanwhile."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from stpm.edge.config import EngineChoice, Station
from stpm.edge.engine import host as engine_host
from stpm.edge.engine.messages import Inspect
from stpm.edge.recipes import END_S, Recipes
from stpm.edge.ring import Ring

AT_ONCE_S = 0.15  # a turn that starts a process, on a machine that has other things to do


class Bench:
    """What the loop does with recipes."""

    def __init__(self, path, script, recipes=1, hang_ms=2000.0):
        paths = {str(number + 1): str(path) for number in range(recipes)}
        choice = EngineChoice("fake", script, hang_ms)
        self.ring = Ring(2)
        self.recipes = Recipes(Station(engine=choice, recipes=paths), self.ring)
        self.answers, self.lost, self.told = [], [], []
        self.longest_s = 0.0  # that a turn took
        self.pids = set()
        self.until(lambda: self.recipes.ready)

    def turn(self):
        before = time.monotonic()
        answers, lost = self.recipes.poll(time.monotonic_ns())
        self.longest_s = max(self.longest_s, time.monotonic() - before)
        self.answers += [answer.part for answer in answers]
        self.lost += lost
        self.pids |= set(self.running())

    def until(self, true, seconds=20):
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, (self.told, self.lost, self.recipes.failures())
            self.turn()
            time.sleep(0.002)

    def ask(self, part, recipe=1):
        self.recipes.ask(recipe, Inspect(part, 0, (256, 256, 3), 0.5, False), time.monotonic_ns())

    def change(self, verb, recipe=1):
        """Whether it was done."""
        told = len(self.told)
        before = time.monotonic()
        verb(recipe, lambda *what: self.told.append(what), time.monotonic_ns())
        self.longest_s = max(self.longest_s, time.monotonic() - before)
        self.until(lambda: len(self.told) > told)
        return self.told[-1][0]

    def running(self):
        """Process ids of the engines that are still children of ours."""
        hosts = self.recipes._everyone()
        workers = [host.supervisor.worker for host in hosts if host.supervisor.worker]
        return [worker.process.pid for worker in workers]

    def there(self):
        return {pid for pid in self.pids if Path(f"/proc/{pid}").exists()}


@pytest.fixture
def bench(bundle):
    made = []

    def make(script, path=bundle.path, **more):
        made.append(Bench(path, script, **more))
        return made[-1]

    yield make
    for each in made:
        each.recipes.end()
        each.ring.close()
        assert not each.there()


def test_the_part_in_an_engine_that_hangs_is_lost_though_two_reloads_have_replaced_it(bench):
    line = bench("hang", hang_ms=1500.0)
    line.ask(7)
    assert line.change(line.recipes.reload)
    assert line.recipes.free(1)
    assert line.change(line.recipes.reload)
    line.until(lambda: line.lost)
    ((part, sentence),) = line.lost
    assert part == 7
    assert "has not answered within 1.5 s" in sentence
    line.until(lambda: len(line.there()) == 2)  # the one that judges, and the one to go back to
    assert line.longest_s < AT_ONCE_S
    assert not line.answers


def test_the_part_in_an_engine_that_is_slow_is_answered_though_two_reloads_have_replaced_it(bench):
    line = bench("1.5", hang_ms=10_000.0)
    line.ask(7)
    for _ in range(2):
        assert line.change(line.recipes.reload)
    assert not line.answers
    line.until(lambda: line.answers == [7])
    line.until(lambda: len(line.there()) == 2)
    assert not line.lost
    assert line.longest_s < AT_ONCE_S


def test_the_part_in_a_replaced_engine_that_dies_is_lost_and_there_is_nothing_to_go_back_to(bench):
    line = bench("hang", hang_ms=60_000.0)
    line.ask(7)
    (first,) = line.running()
    assert line.change(line.recipes.reload)
    os.kill(first, signal.SIGKILL)
    line.until(lambda: line.lost)
    assert line.lost == [(7, "the engine process has died")]
    assert not line.change(line.recipes.rollback)
    line.until(lambda: len(line.there()) == 1)


def test_a_replaced_engine_that_does_not_end_holds_nobody_up(bench):
    line = bench("pass")
    (first,) = line.running()
    assert line.change(line.recipes.reload)
    os.kill(first, signal.SIGSTOP)
    assert line.change(line.recipes.reload)
    assert first in line.there()
    line.until(lambda: first not in line.there())
    assert line.longest_s < AT_ONCE_S


def test_a_reload_that_is_refused_leaves_no_process_and_changes_nothing(bench, bundle, tmp_path):
    own = shutil.copytree(bundle.path, tmp_path / "own")
    line = bench("pass", path=own)
    before = line.running()
    (own / "manifest.json").write_bytes(b"{")
    assert not line.change(line.recipes.reload)
    assert "recipe 1 loaded again was refused" in line.told[0][1]
    line.until(lambda: line.there() == set(before))
    line.ask(1)
    line.until(lambda: line.answers == [1])
    assert line.longest_s < AT_ONCE_S


def test_a_self_test_that_hangs_blocks_other_changes_for_a_while_only(bench, monkeypatch):
    monkeypatch.setattr(engine_host, "LONGEST_TEST_NS", 700_000_000)
    line = bench("pass", recipes=2)
    _, second = line.running()
    os.kill(second, signal.SIGSTOP)
    told = []
    line.recipes.switch(2, lambda *what: told.append(what), time.monotonic_ns())
    assert not line.change(line.recipes.reload)
    assert "still under way" in line.told[0][1]
    line.until(lambda: told)
    ((good, text),) = told
    assert not good
    assert "has not finished its self test within 0.7 s" in text
    assert line.recipes.active == 1
    assert line.change(line.recipes.reload)
    line.until(lambda: line.recipes.ready)  # the other one has been started again
    assert line.change(line.recipes.switch, 2)
    assert line.recipes.active == 2
    assert line.longest_s < AT_ONCE_S


def test_the_last_recipe_that_was_asked_for_is_the_one(bench):
    """2, and 1 again while the engine of 2 is still at its self test."""
    line = bench("pass", recipes=2)
    told = []
    now_ns = time.monotonic_ns()
    line.recipes.switch(2, lambda *what: told.append((2, *what)), now_ns)
    line.recipes.switch(1, lambda *what: told.append((1, *what)), now_ns)
    assert [(recipe, good) for recipe, good, _ in told] == [(2, False), (1, True)]
    assert "given up" in told[0][2]
    assert not line.recipes.failures()
    assert not line.change(line.recipes.switch, 2)  # its self test has not ended
    line.until(lambda: line.recipes.ready)
    assert line.recipes.active == 1
    assert line.change(line.recipes.switch, 2)
    assert line.recipes.active == 2
    assert len(told) == 2


def test_the_end_of_all_engines_is_awaited_once(bench):
    line = bench("pass", recipes=3)
    for pid in line.running():
        os.kill(pid, signal.SIGSTOP)
    before = time.monotonic()
    line.recipes.end()
    assert END_S <= time.monotonic() - before < 2 * END_S
    assert not line.there()
