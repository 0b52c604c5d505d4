"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Phases:
    """Seconds by phase since the start, of this rank, and since the last lap.

    `evaluation` is measured by `measure`; what other parts count themselves (waiting for data,
    communication, the stall of a save) is read from them when a lap ends; `compute` is the rest.
    """

    def __init__(
        self,
        counters: Mapping[str, Callable[[], float]],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._counters = dict(counters)
        self._clock = clock
        self._start = clock()
        self._measured: dict[str, float] = {}
        self._lap = self.totals()

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Count the time in the body as `phase`."""
        begin = self._clock()
        try:
            yield
        finally:
            self._measured[phase] = self._measured.get(phase, 0.0) + self._clock() - begin

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return self._clock() - self._start

    def totals(self) -> dict[str, float]:
        """Return the seconds of every phase since the start; together they are `elapsed`."""
        elapsed = self.elapsed()
        seconds = dict(self._measured)
        for name, read in self._counters.items():
            seconds[name] = seconds.get(name, 0.0) + read()
        return {"compute": max(0.0, elapsed - sum(seconds.values())), **seconds}

    def lap(self) -> dict[str, float]:
        """Return the seconds of every phase since the last call."""
        before, self._lap = self._lap, self.totals()
        return {name: value - before.get(name, 0.0) for name, value in self._lap.items()}
