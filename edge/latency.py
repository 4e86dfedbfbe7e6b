"""Durations of the stages of a part, and their percentiles."""

from array import array
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns

import msgspec
import numpy as np


class Percentiles(msgspec.Struct, frozen=True):
    """Milliseconds over `count` samples."""

    count: int
    p50: float
    p90: float
    p99: float
    max: float


class Latency:
    """Durations by stage, in the order in which the stages first appear; the newest `keep` of each."""

    def __init__(self, keep: int = 100_000) -> None:
        self._keep = keep
        self._ns: dict[str, array[int]] = defaultdict(lambda: array("q"))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = perf_counter_ns()
        try:
            yield
        finally:
            self.add(name, perf_counter_ns() - start)

    def add(self, name: str, nanoseconds: int) -> None:
        samples = self._ns[name]
        samples.append(nanoseconds)
        if len(samples) >= 2 * self._keep:  # rarely, so that the cost per sample stays flat
            del samples[: -self._keep]

    def milliseconds(self, name: str) -> list[float]:
        """The samples of a stage."""
        return [sample / 1e6 for sample in self._ns[name][-self._keep :]]

    def percentiles(self) -> dict[str, Percentiles]:
        return {name: _percentiles(samples[-self._keep :]) for name, samples in self._ns.items()}


def _percentiles(nanoseconds: "array[int]") -> Percentiles:
    milliseconds = np.asarray(nanoseconds) / 1e6
    p50, p90, p99 = (float(value) for value in np.percentile(milliseconds, [50, 90, 99]))
    return Percentiles(len(nanoseconds), p50, p90, p99, float(milliseconds.max()))


def table(percentiles: dict[str, Percentiles]) -> str:
    """One line per stage, milliseconds."""
    lines = [f"{'stage':<22}{'p50':>9}{'p90':>9}{'p99':>9}{'max':>9}{'n':>9}   (ms)"]
    lines += [
        f"{name:<22}{p.p50:>9.2f}{p.p90:>9.2f}{p.p99:>9.2f}{p.max:>9.2f}{p.count:>9}"
        for name, p in percentiles.items()
    ]
    return "\n".join(lines)
