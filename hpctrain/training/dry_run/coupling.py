"""Whether a loss is a sum over samples: that of some rows, compared with those of their halves."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from hpctrain.data.loading.batch import Samples
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.undisturbed import evaluating, kept_generators, kept_model
from hpctrain.training.modules.task import ModuleTask
from hpctrain.training.parallel.ddp import DDPModel
from hpctrain.training.task.task import Task
from hpctrain.utils.text import plural

if TYPE_CHECKING:
    from hpctrain.training.parallel.fsdp import ShardedModel

MOST_ROWS = 8
"""So many rows are compared at most: those of a pass, which fit into memory."""

# Relative. Rows differ in the last bits with the size of their batch: on a GPU, in TF32 by more.
_EXACT, _ROUGH, _NARROW = 1e-4, 2e-3, 2e-2

_ANSWER = (
    "so that it depends on the number of ranks and on data.micro_batch_size. For a mean over "
    "tokens, masks or weighted classes return the sum of the losses and that of the weights, with "
    "counts_samples = False; where it is meant, as with a contrastive loss, set "
    "batch_dependent_loss = true on the task"
)


def find_coupling(
    wrapped: DDPModel | ShardedModel,
    task: Task,
    rows: Samples,
    number_format: NumberFormat,
    device: torch.device,
    pass_size: int,
) -> str | None:
    """Return how the loss of a sample depends on the others in its pass, None if it does not.

    Without dropout, batch statistics or gradients, and without leaving a trace. What draws at
    random all the same is not judged. Under FSDP, collective: all ranks.

    Args:
        wrapped: of the model.
        task: computes the loss; it may say `batch_dependent_loss = True` itself.
        rows: real ones, at least two; as many on every rank.
        number_format: of parameters and arithmetic.
        device: of this rank.
        pass_size: samples of the largest pass, for the message.
    """
    if getattr(task, "batch_dependent_loss", False):
        return None
    comparison = _Comparison(wrapped, task, number_format, device)
    count = rows.size
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),  # three sizes of batches would be compiled
        kept_model(wrapped.model, task=task),
        evaluating(wrapped.model.modules()),
    ):
        if isinstance(task, ModuleTask):
            task.begin_dry_run(count)
        whole = comparison.loss(rows, 0, count)
        if not comparison.same(whole, comparison.loss(rows, 0, count, seed=1)):
            return None
        try:
            halves = [comparison.loss(rows, *bounds) for bounds in _halves(count)]
        except Exception as error:
            if wrapped.spread:  # whose ranks are in the middle of something
                raise
            return f"it cannot be computed for half of {count} rows ({error}): {_seen(pass_size)}"
    together = {name: halves[0][name] + halves[1][name] for name in whole}
    if comparison.same(whole, together):
        return None
    return (
        f"that of {count} rows is {whole['loss']:.6g}, and {together['loss']:.6g} as the sum of "
        f"those of its halves: {_seen(pass_size)}"
    )


def _halves(count: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (0, count // 2), (count // 2, count)


def _seen(pass_size: int) -> str:
    return f"it sees the {plural(pass_size, 'sample')} of one pass of one rank, {_ANSWER}"


class _Comparison:
    def __init__(
        self,
        wrapped: DDPModel | ShardedModel,
        task: Task,
        number_format: NumberFormat,
        device: torch.device,
    ) -> None:
        self._wrapped, self._task, self._format = wrapped, task, number_format
        self._device = device
        # Spread parameters are gathered in the narrow format.
        mixed = number_format.autocast is not None and wrapped.spread
        self._arithmetic: AbstractContextManager[object] = (
            number_format.arithmetic() if mixed else nullcontext()
        )
        narrow = mixed or any(item.element_size() < 4 for item in wrapped.model.parameters())
        self._tolerance = _NARROW if narrow else _EXACT if device.type == "cpu" else _ROUGH

    def loss(self, rows: Samples, start: int, stop: int, seed: int = 0) -> dict[str, float]:
        """Return the sums of losses and weights of some of the rows."""
        fields = self._format.cast(rows.part(start, stop), self._task.inputs)
        if isinstance(self._task, ModuleTask):
            self._task.samples = stop - start
        with self._arithmetic, kept_generators(self._device):
            torch.manual_seed(seed)
            loss_sum, weight = self._wrapped.call_alone(self._task.loss, fields)
        self._wrapped.settle()
        return {"loss": float(loss_sum), "weight": float(weight)}

    def same(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Tell whether both are equal but for rounding, or no numbers."""
        return all(
            not abs(one[name] - other[name])
            > self._tolerance * max(abs(one[name]), abs(other[name]))
            for name in one
        )
