"""The dry run of an evaluation: its mistakes come up before the first step, not after an epoch.

Some rows are evaluated whole and in two parts of unequal size. Where a metric is a quotient of
sums, both ways lead to the same number; a metric of batches, such as their mean F1, depends on how
the data are cut, and so on the number of ranks.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from hpctrain.data.loading.batch import Samples
from hpctrain.errors import HpctrainError, TrainingError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.compiler import as_written
from hpctrain.training.dry_run.replay import Replay
from hpctrain.training.dry_run.step import Explain, explained
from hpctrain.training.metric_objects import MetricObjects
from hpctrain.training.metrics import Part, Totals, combine, quotient
from hpctrain.training.model.undisturbed import (
    evaluating,
    kept_generators,
    kept_model,
    seed_generators,
)
from hpctrain.training.model.wrappers import Call, call_directly
from hpctrain.training.modules.task import ModuleTask
from hpctrain.training.task.runner import TaskRunner
from hpctrain.training.task.task import Task

logger = logging.getLogger("hpctrain")

MOST_ROWS = 16
"""Of a rank: enough that a metric of batches is unlikely to come out the same by chance."""

_SCATTERED = 8
"""So many times the outputs are scattered: a metric of few rows may be the same by chance."""
_LOOSE_TOLERANCE, _TF32_TOLERANCE = 1e-4, 2e-3
"""The same where a row's outputs may differ with the batch it comes in: on CPUs, and elsewhere."""
_DRAWN_TOLERANCE = 1e-5
"""The same where only what is drawn at random may differ, and a GPU's order of summation."""
_FLOOR = 1e-6
"""Of the largest output: where a sum cancels out, so many of its digits are left."""


def rehearse(
    runner: TaskRunner,
    rows: Samples,
    world: World,
    *,
    further: Sequence[Samples] = (),
    explain: Explain = lambda error, fields: None,
) -> None:
    """Evaluate some rows, and leave no trace. Collective: all ranks.

    Args:
        runner: the bare model, and the task that computes the metrics.
        rows: real ones, as many on every rank.
        world: the ranks.
        further: those of a module's other loaders.
        explain: as `dry_run` takes it.

    Raises:
        TrainingError: on every rank, if the task breaks its contract, or gives a metric that
            depends on how the data are cut into batches. What model or task raise themselves comes
            out as it is.
    """
    model, task = runner.model, runner.task
    rehearsal = _Rehearsal(runner, rows, world)
    together = world.communicator
    with (
        # Outputs are kept and compared, and those of a CUDA graph lie where its next ones will.
        as_written() if runner.graphs else nullcontext(),
        torch.no_grad(),
        kept_generators(world.device),
        kept_model(model, task=task),
        evaluating(model.modules()),
        rehearsal.objects.untouched(),
        rehearsal.objects.local(),
    ):
        if isinstance(task, ModuleTask):
            with raise_together(together):
                task.rehearse(1 + len(further))
                for number, each in enumerate((rows, *further)):
                    if number:
                        rehearsal = _Rehearsal(runner, each, world)
                    task.begin_loader(number)
                    task.samples = each.size
                    with explained(explain, rehearsal.fields):
                        # What the loaders before have added up to is there in the hooks at the end.
                        rehearsal.run(begins=not number)
            try:
                # Outside: hooks may talk to the other ranks.
                task.end_rehearsal()
            finally:
                task.leave_evaluation()
            return
        with raise_together(together), explained(explain, rehearsal.fields):
            rehearsal.run()
        if rehearsal.count == 1:
            return  # every batch is of one row: there is no other cut
        with raise_together(together):
            rehearsal.cut()
        # What follows may call the model, and so wait for the others.
        exact = all(together.all_gather(rehearsal.exact))
        with raise_together(together):
            rehearsal.judge(exact=exact)


class _Rehearsal:
    """Evaluations of the same rows: whole, again, and in two parts of unequal size.

    Attributes:
        objects: the torchmetrics objects of the task.
        count: of the rows.
        fields: all of them, cast.
    """

    def __init__(self, runner: TaskRunner, rows: Samples, world: World) -> None:
        task = runner.task
        self.objects = MetricObjects(task, world.device)
        self.count = rows.size
        self.fields = runner.number_format.cast(rows.part(0, rows.size), task.inputs)
        self._task = task
        self._model = runner.model
        self._call = runner.call
        self._rows = rows
        self._format = runner.number_format
        self._device = world.device
        self._replay = Replay(runner.model, self.count)
        # Both even where there are enough: some tasks take rows in pairs.
        self._first = self.count // 6 * 2 or 1
        self._whole = Part()
        self._parts: list[Part] = []
        self._replayed = Part()
        # Metrics that differ when numbers are drawn anew, by the model too, and by the task alone.
        self._random: set[str] = set()
        self._drawn: set[str] = set()

    @property
    def exact(self) -> bool:
        """Whether a row had the same outputs of the model in every batch."""
        return self._replay.exact

    def run(self, *, begins: bool = True) -> None:
        """Evaluate the rows at once, and record what the model gives for them.

        Args:
            begins: whether torchmetrics objects forget what they have seen.

        Raises:
            TrainingError: if the task breaks its contract.
        """
        with self._replay.recording():
            self._whole = self._part(0, self.count, begins=begins)
        self._compute()

    def cut(self) -> None:
        """Evaluate the rows some times more, and in parts.

        Raises:
            TrainingError: if another time comes out other than one before.
        """
        with self._replay.computing():
            redrawn = self._part(0, self.count, seed=1)
        self._random = set(differing(self._whole, [redrawn], _DRAWN_TOLERANCE))
        self._replayed, again = self._from_record(), self._from_record()
        self._drawn = set(differing(self._replayed, [self._from_record(seed=1)]))
        if kept := remembered(self._replayed, again):
            raise TrainingError(_keeps(kept, self._task))
        try:
            for start, stop in ((0, self._first), (self._first, self.count)):
                with self._replay.of_rows(start, stop):
                    self._parts.append(self._part(start, stop))
        except Exception as error:
            if isinstance(error, HpctrainError) or _is_spread(self._model):
                raise
            logger.warning(
                "%s.evaluate takes %d rows, but no part of them (%s: %s): it was not found out "
                "whether its metrics depend on how the data are cut, and it fails where a batch is "
                "smaller",
                type(self._task).__name__,
                self.count,
                type(error).__name__,
                error,
            )
            self._parts.clear()

    def _from_record(self, seed: int = 0) -> Part:
        """Evaluate the rows on recorded outputs, of which each evaluation begins with the first."""
        with self._replay.of_all():
            return self._part(0, self.count, seed)

    def judge(self, *, exact: bool) -> None:
        """Compare the parts with the whole.

        Args:
            exact: see `exact`, on all ranks.

        Raises:
            TrainingError: naming the metrics that the cut has changed.
        """
        if not self._parts:
            return
        if exact:
            floor = _FLOOR * self._replay.largest
            found = differing(self._replayed, self._parts, floor=floor)
            found |= self._differing_when_scattered()
        elif self._is_narrow():
            return  # in few bits a row's outputs depend too much on the size of its batch
        else:
            loose = _LOOSE_TOLERANCE if self._device.type == "cpu" else _TF32_TOLERANCE
            found = differing(self._whole, self._parts, loose)
        excused = self._drawn if exact else self._random
        if getattr(self._task, "batch_dependent_loss", False):
            excused |= {"loss"}
        cut = {name: values for name, values in found.items() if name not in excused}
        if cut:
            sizes = self._first, self.count - self._first
            raise TrainingError(_depends_on_cut(cut, self._task, sizes, exact=exact))

    def _compute(self) -> None:
        """Compute the metrics of the rows, which may be too few for some."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                combine([self._whole], self._task, self.objects)
        except (ValueError, ArithmeticError) as error:
            logger.warning(
                "the metrics of %d rows of the validation data cannot be computed: %s: %s. It is "
                "tried again with all of them",
                self.count,
                type(error).__name__,
                error,
            )

    def _is_narrow(self) -> bool:
        """Tell whether the model computes in fewer bits than float32 has."""
        narrow = any(item.element_size() < 4 for item in self._model.parameters())
        return narrow or self._format.autocast is not None

    def _differing_when_scattered(self) -> dict[str, Difference]:
        """Compare with outputs that differ from row to row, as those of an untrained model may not.

        They may be none that a model gives: what comes of them counts only where it is a number.
        """
        found: dict[str, Difference] = {}
        floor = _FLOOR * self._replay.largest_scattered
        for seed in range(_SCATTERED):
            bounds = (0, self.count), (0, self._first), (self._first, self.count)
            try:
                whole, *parts = [self._scattered(start, stop, seed) for start, stop in bounds]
            except Exception:  # noqa: BLE001 - whatever a task makes of, say, a probability above 1
                return found
            found |= differing(whole, parts, floor=floor)
        return found

    def _scattered(self, start: int, stop: int, seed: int) -> Part:
        # Called directly: where it fails on one rank only, no other may wait for that.
        with self._replay.scattered(start, stop, seed):
            return self._part(start, stop, call=call_directly(self._model))

    def _part(
        self,
        start: int,
        stop: int,
        seed: int = 0,
        call: Call | None = None,
        *,
        begins: bool = True,
    ) -> Part:
        """Evaluate some of the rows with generators that begin at `seed`."""
        call, fields = call or self._call, self.fields
        if stop - start < self.count:
            fields = self._format.cast(self._rows.part(start, stop), self._task.inputs)
        if begins:
            self.objects.reset()
        totals = Totals(self._task, self.objects)
        with self._format.arithmetic(), kept_generators(self._device):
            seed_generators(seed)
            totals.add(call(self._task.evaluate, fields))
        return totals.part()


def _is_spread(model: nn.Module) -> bool:
    """Tell whether ranks hold parts of the parameters, and a pass that fails stops the others."""
    return any(hasattr(item, "to_local") for item in model.parameters())


_COUPLING_MODEL = (
    "Or else what the model computes for a sample depends on the rest of its batch, as with batch "
    "norms that have no running statistics"
)


def _keeps(found: Mapping[str, Difference], task: Task) -> str:
    name, (first, second) = next(iter(found.items()))
    return (
        f'{type(task).__name__}.evaluate gave for "{name}" {first:.6g}, and {second:.6g} for the '
        "same rows again: it keeps what it has seen. Return sums of this batch alone; they are "
        "added up over batches and ranks, and finish(sums) makes a metric of them"
    )


def _depends_on_cut(
    found: Mapping[str, Difference], task: Task, sizes: tuple[int, int], *, exact: bool
) -> str:
    name, (whole, parts) = next(iter(found.items()))
    others = [f'"{each}"' for each in list(found)[1:]]
    also = f" (so does {', '.join(others)})" if others else ""
    coupling = (
        ". A loss that couples the samples of a batch is declared by batch_dependent_loss = True"
        if "loss" in found
        else ""
    )
    return (
        f'{type(task).__name__}.evaluate: the metric "{name}" depends on how the data are cut into '
        f"batches, and so on the number of ranks{also}: {sum(sizes)} rows at once give "
        f"{whole:.6g}, the same rows as {sizes[0]} and {sizes[1]} give {parts:.6g}. Return what it "
        "is computed from, summed over the samples of the batch, and compute it in finish(sums) of "
        "the task; or predictions, as hpctrain.training.metrics.Gather(rows); or a torchmetrics "
        f"object{coupling}" + ("" if exact else f". {_COUPLING_MODEL}")
    )


TOLERANCE = 1e-3
"""Relative: above what sums in float32 lose, below what a cut changes."""

Difference = tuple[float, float]
"""A metric of the whole, and of the parts; of a tensor, its sum."""


def differing(
    whole: Part, parts: Sequence[Part], tolerance: float = TOLERANCE, floor: float = 0.0
) -> dict[str, Difference]:
    """Return what the parts add up to other than the whole. torchmetrics' own states are theirs.

    Args:
        whole: of some rows.
        parts: of the same rows.
        tolerance: relative.
        floor: differences below it are none: sums of numbers that cancel out have no more digits.
    """
    found: dict[str, Difference] = {}
    for name, value in whole.quotients.items():
        pair = quotient([value]), quotient([part.quotients[name] for part in parts])
        if _apart(torch.tensor(pair[0]), torch.tensor(pair[1]), tolerance, floor):
            found[name] = pair
    for name, expected in whole.sums.items():
        sums = [part.sums[name] for part in parts]
        same_shape = all(item.shape == expected.shape for item in sums)
        if not same_shape or _apart(expected, torch.stack(sums).sum(0), tolerance, floor):
            found[name] = _total([expected]), _total(sums)
    for name, expected in whole.rows.items():
        rows = [part.rows[name] for part in parts]
        if _apart(expected, torch.cat(rows), tolerance, floor):
            found[name] = _total([expected]), _total(rows)
    return found


def _total(tensors: Sequence[Tensor]) -> float:
    return sum(tensor.abs().double().sum().item() for tensor in tensors)


def _apart(one: Tensor, other: Tensor, tolerance: float, floor: float) -> bool:
    """Tell whether two differ, by more than a part of the largest; what is no number does not."""
    if one.shape != other.shape:
        return True
    if not one.is_complex():
        one, other = one.double(), other.double()
    finite = torch.isfinite(one) & torch.isfinite(other)
    one, other = one[finite], other[finite]
    if not one.numel():
        return False
    largest = torch.maximum(one.abs().max(), other.abs().max()).item()
    return bool((one - other).abs().max().item() > max(tolerance * largest, floor))


def remembered(first: Part, second: Part) -> dict[str, Difference]:
    """Return the sums that came out other the second time."""
    pairs = {
        name: pair
        for name in first.quotients
        for pair in zip(first.quotients[name], second.quotients[name], strict=True)
        if _apart(torch.tensor(pair[0]), torch.tensor(pair[1]), TOLERANCE, 0.0)
    }
    return pairs | differing(first, [second])
