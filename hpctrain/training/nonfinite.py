"""Non-finite gradients and losses (NaN, inf), and loss spikes: found, skipped, rolled back."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpctrain.config.schema import TrainingSection
from hpctrain.data.arrays import Int64s
from hpctrain.data.loading.batch import TrainBatches
from hpctrain.errors import HpctrainError, TrainingError
from hpctrain.launch.process_group import World
from hpctrain.training.position import Position
from hpctrain.utils.text import listed, plural

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
        warn: Callable[[str], None],
    ) -> None:
        """Take the policy from the config.

        Args:
            section: of the config.
            skipped: steps of the run that were not applied, before this job.
            explain: says what is known of the bad steps up to a step. Collective: all ranks.
            roll_back: puts parameters and optimizer back to the newest checkpoint and returns its
                step. Collective: all ranks.
            warn: takes what a user should know; does nothing on most ranks.
        """
        self._most = section.max_bad_steps
        self._policy = section.on_bad_steps
        self._explain = explain
        self._roll_back = roll_back
        self._warn = warn
        self._skipped = skipped
        self._warn_at = self._most
        self._rollbacks: dict[int, int] = {}

    def judge(self, place: Position, numbers: Mapping[str, float]) -> None:
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
            self._warn(
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
            self._warn_at = 2 * bad  # an endless row is not reported at every check
            self._warn(f"{fact}. They are skipped, as training.on_bad_steps says")
            return
        if self._policy == "rollback":
            step = self._roll_back()
            self._rollbacks[step] = self._rollbacks.get(step, 0) + 1
            if self._rollbacks[step] <= MOST_ROLLBACKS:
                self._warn(
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
            deviation = statistics.median([abs(item - median) for item in self._losses])
            # 1.4826 makes a standard deviation of it; below a tenth of the loss all is noise.
            width = max(1.4826 * deviation, 0.1 * abs(median))
            if loss > median + self.DEVIATIONS * width:
                said = f"loss spike: {loss:.4g}, {median:.4g} in the middle of the last logged"
        if loss - loss == 0:  # neither infinite nor not a number
            self._losses.append(loss)
        return said


_SHOWN_RUNS = 8
_SHOWN_RANKS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BadBatch:
    """A global batch that was not applied.

    Attributes:
        step: that it led to.
        epoch: that it is of.
        start: samples of the epoch before it.
        global_size: samples of all ranks.
        loss_is_finite: on this rank; where it is so on all, the gradient alone overflowed.
    """

    step: int
    epoch: int
    start: int
    global_size: int
    loss_is_finite: bool


def explain(batches: Sequence[BadBatch], loader: TrainBatches, world: World) -> str:
    """Return where the newest run of bad batches began. Collective: all ranks.

    Ranks whose own loss was not finite read their samples of that batch again and look for values
    that are not.

    Args:
        batches: those that are still known, oldest first; the same on all ranks but for
            `loss_is_finite`.
        loader: that served them.
        world: the ranks.
    """
    if not batches:
        return "which batch it was is not known any more"
    first = batches[-1]
    for batch in reversed(batches):
        if batch.step < first.step - 1:
            break
        first = batch
    story = None if first.loss_is_finite else _suspects(first, loader)
    stories = world.communicator.all_gather(None if story is None else (world.topology.host, story))
    where = (
        f"first in step {first.step} (epoch {first.epoch}, samples {first.start + 1} to "
        f"{first.start + first.global_size} of it)"
    )
    found = [
        f"rank {rank} on {known[0]}: {known[1]}"
        for rank, known in enumerate(stories)
        if known is not None
    ]
    if not found:
        return f"{where}; the loss was finite on every rank, the gradient overflowed"
    more = f"; and on {len(found) - _SHOWN_RANKS} more ranks" if found[_SHOWN_RANKS:] else ""
    return f"{where}; the loss was not finite on {'; '.join(found[:_SHOWN_RANKS])}{more}"


def _suspects(batch: BadBatch, loader: TrainBatches) -> str:
    """Return this rank's samples of a batch: those with values that are not finite, or all."""
    rows = loader.rows(batch.epoch, batch.start, batch.start + batch.global_size)
    try:
        values = loader.read(rows)
    except HpctrainError as error:
        return f"{listed_rows(loader, rows)}, which cannot be read again: {error}"
    bad = {
        name: rows[~np.isfinite(array.reshape(len(rows), -1)).all(axis=1)]
        for name, array in values.items()
        if array.dtype.kind in "fc"
    }
    found = [f"{name} of {listed_rows(loader, those)}" for name, those in bad.items() if len(those)]
    if found:
        return f"not finite in the data: {', '.join(found)}"
    return f"{listed_rows(loader, rows)} (all values of the data are finite)"


def listed_rows(loader: TrainBatches, rows: Int64s) -> str:
    """Return rows of the dataset as shards and their rows, such as "a.h5 rows 3, 7-9"."""
    texts: list[str] = []
    shard = ""
    runs = loader.runs(np.sort(rows))
    for name, first, last in runs:
        run = str(first) if first == last else f"{first}-{last}"
        texts.append(run if name == shard else f"{name} row{'s' * (last > first)} {run}")
        shard = name
    return listed(texts, _SHOWN_RUNS)


_SLOTS = 64
RECENT_STEPS = 256
"""So many steps are remembered one by one."""
BAD, FORGIVEN = 1.0, 0.5
"""Flags of steps that were not applied: one whose gradient was not finite; and one that overflowed
in float16, which a smaller loss scale may cure."""


class BadSteps:
    """Takes one flag a step, and counts them many steps at a time.

    Counting is a dozen small operations: noticeable if done in every step of a small model.
    """

    def __init__(self, device: torch.device) -> None:
        self._flags = torch.zeros(_SLOTS, device=device)
        self._slots = self._flags.unbind()
        self._used = 0
        self._positions = torch.arange(_SLOTS, device=device, dtype=torch.float32)
        self._counts = torch.zeros(3, device=device)
        self._before = torch.zeros(0, device=device)

    def next_flag(self) -> Tensor:
        """Return where the next step is to write its flag: (), float32, BAD, FORGIVEN or 0."""
        if self._used == _SLOTS:
            self._count()
        self._used += 1
        return self._slots[self._used - 1]

    def counts(self) -> Tensor:
        """Return the counts, (3,) float32, to read or to overwrite.

        In this order: bad steps in a row, up to the newest; the most in a row since `look_anew`;
        and all that were not applied, the forgiven ones too.
        """
        self._count()
        return self._counts

    def recent(self) -> Tensor:
        """Return the flags of the newest steps, oldest first, (at most RECENT_STEPS,) float32."""
        self._count()
        return self._before

    def look_anew(self) -> None:
        """Begin to look for the most bad steps in a row anew."""
        in_a_row, longest, _ = self.counts()
        longest.copy_(in_a_row)

    def _count(self) -> None:
        if self._used == 0:
            return
        flags, positions = self._flags[: self._used], self._positions[: self._used]
        in_a_row, longest, total = self._counts
        # Where the newest good step up to here was; before the first slot, if none was.
        good = torch.where(flags != BAD, positions, -1 - in_a_row).cummax(0).values
        runs = positions - good
        in_a_row.copy_(runs[-1])
        torch.maximum(longest, runs.max(), out=longest)
        total.add_(torch.count_nonzero(flags))
        self._before = torch.cat([self._before, flags])[-RECENT_STEPS:]
        self._used = 0


def bad_among(
    bad_steps: BadSteps, recent: Sequence[tuple[int, int, int, Tensor | None]], step: int
) -> list[BadBatch]:
    """Return those of the newest batches that were not applied, oldest first.

    Waits for the device.

    Args:
        bad_steps: flags of the steps.
        recent: epoch, start, size and this rank's loss of the newest batches, oldest first.
        step: that the newest batch led to.
    """
    flags = bad_steps.recent().tolist()
    known = min(len(flags), len(recent))
    return [
        BadBatch(
            step=step - known + 1 + index,
            epoch=epoch,
            start=start,
            global_size=size,
            loss_is_finite=loss is None or bool(torch.isfinite(loss)),
        )
        for index, (bad, (epoch, start, size, loss)) in enumerate(
            zip(flags[len(flags) - known :], recent[len(recent) - known :], strict=True)
        )
        if bad == BAD
    ]
