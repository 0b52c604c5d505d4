"""Which checkpoints stay: pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpctrain.checkpoint.best import Mode, Preference


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
    mode: Mode = "min"

    @property
    def preference(self) -> Preference | None:
        """By what the best is found; None: no best."""
        return None if self.metric is None else Preference(self.metric, self.mode)

    def surplus(self, checkpoints: Sequence[tuple[int, Mapping[str, float] | None]]) -> list[int]:
        """Return the steps to delete.

        Args:
            checkpoints: (step, metrics of an evaluation at that step) of every whole one.
        """
        steps = sorted(step for step, _ in checkpoints)
        kept = set(steps[-self.keep_last :])
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        if self.preference is not None and (best := self.preference.best_of(checkpoints)):
            kept.add(best.step)
        return [step for step in steps if step not in kept]
