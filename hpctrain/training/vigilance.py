"""What is done about numbers that lie: gradients that are not finite, and losses that leap."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping

from hpctrain.config.schema import TrainingSection
from hpctrain.errors import TrainingError
from hpctrain.training.horizon import Place
from hpctrain.utils.text import plural

MOST_ROLLBACKS = 3
"""Returns to the same checkpoint, after which no further one would help."""


class BadStepPolicy:
    """Decides what follows steps whose gradient was not finite. None of them was applied.

    The same on all ranks, from numbers that are the same on all.
    """

    def __init__(
        self,
        section: TrainingSection,
        *,
        skipped: int = 0,
        explain: Callable[[int], str],
        roll_back: Callable[[], int],
        tell: Callable[[str], None],
    ) -> None:
        """Take the policy from the config.

        Args:
            section: of the config.
            skipped: steps of the run that were not applied, before this job.
            explain: says what is known of the bad steps up to a step. Collective: all ranks.
            roll_back: puts parameters and optimizer back to the newest checkpoint and returns its
                step. Collective: all ranks.
            tell: is told what a user should know; does nothing on most ranks.
        """
        self._most = section.max_bad_steps
        self._policy = section.on_bad_steps
        self._explain = explain
        self._roll_back = roll_back
        self._tell = tell
        self._skipped = skipped
        self._warn_at = self._most
        self._rollbacks: dict[int, int] = {}

    def judge(self, place: Place, numbers: Mapping[str, float]) -> None:
        """Act on the numbers of the steps up to `place`. Collective: all ranks.

        Raises:
            TrainingError: on every rank, if the run is to end here.
        """
        bad, skipped = int(numbers["most_bad_steps"]), int(numbers["skipped_steps"])
        if skipped > self._skipped and bad < self._most:
            what = (
                "had a gradient that was not finite"
                if bad
                else "overflowed in float16, so that the loss scale fell,"
            )
            self._tell(
                f"step {place.step:,}: {skipped - self._skipped} of the last steps {what} and were "
                f"not applied, {skipped} so far"
            )
        self._skipped = skipped
        if bad < self._warn_at:
            if bad < self._most:
                self._warn_at = self._most
            return
        fact = (
            f"step {place.step}: the gradient was not finite for {bad} steps in a row, none of "
            f"which was applied: {self._explain(place.step)}"
        )
        if self._policy == "skip":
            self._warn_at = 2 * bad  # an endless row is not told at every look at it
            self._tell(f"{fact}. They are skipped, as training.on_bad_steps says")
            return
        if self._policy == "rollback":
            step = self._roll_back()
            self._rollbacks[step] = self._rollbacks.get(step, 0) + 1
            if self._rollbacks[step] <= MOST_ROLLBACKS:
                self._tell(
                    f"{fact}. Parameters and optimizer are those of step {step:,} again; the data "
                    f"go on ({self._rollbacks[step]} of {MOST_ROLLBACKS} returns to it)"
                )
                return
            fact += f". {MOST_ROLLBACKS} returns to step {step} have not helped"
        raise TrainingError(
            f"{fact}. The last checkpoint is from before them: lower optimizer.lr, set "
            "training.clip_norm, or mend the data",
            everywhere=True,
        )


def nothing_applied(
    step: int, steps: int, scale: float | None, explain: Callable[[int], str]
) -> TrainingError:
    """Return what ends a job none of whose steps was applied. Collective: all ranks.

    Args:
        step: where it stands.
        steps: of this job.
        scale: of the loss, in mixed float16; None in other precisions.
        explain: as `BadStepPolicy` takes it.
    """
    why = (
        f"{explain(step)}. Lower optimizer.lr, set training.clip_norm, or mend the data"
        if scale is None
        else f"the loss scale of 16-mixed has come down to {scale:g} so far. Train longer, or set "
        'training.precision = "bf16-mixed"'
    )
    return TrainingError(
        f"none of the {plural(steps, 'step')} of this job was applied, up to step {step}: no "
        f"gradient was finite. Nothing was trained, and this end is not saved: {why}",
        everywhere=True,
    )


class SpikeWatch:
    """Notes losses far above those logged lately. For one rank, and never more than a note."""

    FEWEST = 10
    NUMBER = 50
    DEVIATIONS = 8.0

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=self.NUMBER)

    def look(self, loss: float) -> str | None:
        """Take note of a logged loss; return what to say if it is a spike.

        A median and the median deviation from it: spikes before do not hide the next.
        """
        said = None
        if len(self._losses) >= self.FEWEST:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(item - median) for item in self._losses)
            # 1.4826 makes a standard deviation of it; below a tenth of the loss all is noise.
            width = max(1.4826 * deviation, 0.1 * abs(median))
            if loss > median + self.DEVIATIONS * width:
                said = f"loss spike: {loss:.4g}, {median:.4g} in the middle of the last logged"
        if loss - loss == 0:  # neither infinite nor not a number
            self._losses.append(loss)
        return said
