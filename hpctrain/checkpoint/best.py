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
    """By which metric one evaluation is better than another, and which direction of it is."""

    metric: str
    mode: Mode

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Preference | None:
        """Return what the meta.json of a checkpoint says; None: its run keeps no best."""
        found = meta.get("keep_best") or {}
        metric, mode = found.get("metric"), found.get("mode")
        return cls(metric, mode) if metric is not None and mode in ("min", "max") else None

    def to_json(self) -> dict[str, str]:
        """Return what meta.json is to say."""
        return {"metric": self.metric, "mode": self.mode}

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
        best: Best | None = None
        for step, metrics in sorted(evaluated, key=lambda item: item[0]):
            value = None if metrics is None else metrics.get(self.metric)
            if value is not None and self.is_better(value, best.value if best else None):
                best = Best(self.metric, value, step)
        return best
