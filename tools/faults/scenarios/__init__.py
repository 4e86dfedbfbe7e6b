"""What is broken: one function for each scenario, with the link it runs over. The docstring is what a table shows."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from stpm.tools.faults.bench import Bench

Work = Callable[[Bench], None]

TOPICS = ("camera", "link", "engine", "processes", "surroundings", "recipes", "soak")


class SkippedError(Exception):
    """It cannot be done on this machine."""


class Scenario(NamedTuple):
    name: str
    link: str
    about: str
    work: Work
    long: bool  # only in the profile `full`


_ALL: dict[str, Scenario] = {}


def scenario(link: str, long: bool = False) -> Callable[[Work], Work]:
    """`link`: over which of peers.PEERS."""

    def add(work: Work) -> Work:
        _ALL[work.__name__] = Scenario(work.__name__, link, (work.__doc__ or "").strip(), work, long)
        return work

    return add


def scenarios() -> dict[str, Scenario]:
    """All, in the order of TOPICS."""
    for topic in TOPICS:
        importlib.import_module(f"{__name__}.{topic}")
    return dict(_ALL)
