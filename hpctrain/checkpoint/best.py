"""Which of several evaluations is the best: decided here, for whoever asks.

The summary, `ckpt ls` and `ckpt export --best` name the checkpoint that `checkpoint.keep_best`
keeps, and a plateau counts by the same comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["min", "max"]


@dataclass(frozen=True, slots=True)
class Best:
    """The best of several checkpoints."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True, slots=True)
class Preference:
    """By which metric one evaluation is better than another, and which direction of it is.

    Attributes:
        metric: its name.
        mode: which direction is better.
        count: how many of the best are kept.
    """

    metric: str
    mode: Mode
    count: int = 1

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Preference | None:
        """Return what the meta.json of a checkpoint says; None: its run keeps no best."""
        found = meta.get("keep_best") or {}
        metric, mode = found.get("metric"), found.get("mode")
        if metric is None or mode not in ("min", "max"):
            return None
        count = str(found.get("count", "1"))
        return cls(metric, mode, max(1, int(count)) if count.isdecimal() else 1)

    def to_json(self) -> dict[str, str]:
        """Return what meta.json is to say: words, since older releases read nothing else there."""
        said = {"metric": self.metric, "mode": self.mode}
        return said if self.count == 1 else {**said, "count": str(self.count)}

    def is_better(self, value: float, than: float | None) -> bool:
        """Tell whether a value is better than another, of which None is the worst.

        One that is not a finite number is never better, and of equals the first stays.
        """
        if not math.isfinite(value):
            return False
        return than is None or (value > than if self.mode == "max" else value < than)

    def best_of(self, evaluated: Iterable[tuple[int, Mapping[str, float] | None]]) -> Best | None:
        """Return the best of (step, metrics of an evaluation at that step), None if there is none.

        Of equals it is the one of the lowest step, which was there first.
        """
        return next(iter(self.ranked(evaluated)), None)

    def ranked(self, evaluated: Iterable[tuple[int, Mapping[str, float] | None]]) -> list[Best]:
        """Return the best of these that a run keeps, the best one first: at most `count`."""
        found = [
            Best(self.metric, metrics[self.metric], step)
            for step, metrics in evaluated
            if metrics is not None and math.isfinite(metrics.get(self.metric, math.nan))
        ]
        sign = -1 if self.mode == "max" else 1
        return sorted(found, key=lambda best: (sign * best.value, best.step))[: self.count]
