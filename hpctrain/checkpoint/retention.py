"""Which checkpoints stay: pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What to keep.

    Attributes:
        keep_last: so many of the newest.
        keep_every: also those of every so many steps, for ever; 0: none.
        metric: also the best by this metric of the evaluation at its step; None: no best.
        mode: which direction of the metric is better.
    """

    keep_last: int
    keep_every: int = 0
    metric: str | None = None
    mode: Literal["min", "max"] = "min"

    def surplus(self, checkpoints: Sequence[tuple[int, Mapping[str, float] | None]]) -> list[int]:
        """Return the steps to delete.

        Args:
            checkpoints: (step, metrics of an evaluation at that step) of every whole one.
        """
        steps = sorted(step for step, _ in checkpoints)
        kept = set(steps[-self.keep_last :])
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        if self.metric is not None:
            sign = 1 if self.mode == "max" else -1
            competing = [
                (sign * metrics[self.metric], step)
                for step, metrics in checkpoints
                if metrics is not None and self.metric in metrics
            ]
            if competing:
                kept.add(max(competing)[1])
        return [step for step in steps if step not in kept]
