"""The forward passes of a step: each gives a sum of losses, and how its backward pass begins."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from hpctrain.data.loading.batch import ShareOfBatch
from hpctrain.training.model.precision import LossScale, NumberFormat
from hpctrain.training.model.undisturbed import (
    copied_buffers,
    evaluating,
    kept_generators,
    with_statistics,
)
from hpctrain.training.modules.task import ModuleTask
from hpctrain.training.modules.task_log import TaskLog
from hpctrain.training.parallel.ddp import DDPModel
from hpctrain.training.parallel.unused_parameters import differentiable, reach_all
from hpctrain.training.task.task import Task

if TYPE_CHECKING:  # torch takes its time to load what only sharded runs need
    from hpctrain.training.parallel.fsdp import ShardedModel


class Passes:
    """Runs the task on parts of a rank's share, and sums up what it returns.

    Attributes:
        loss_sum: of the passes of a step, detached, (); None where there were no samples; to be
            set back before each.
        weight: of the same, 0 before.
        moves: whether a forward pass changes parameters, such as a teacher's.
    """

    def __init__(
        self,
        task: Task,
        wrapped: DDPModel | ShardedModel,
        number_format: NumberFormat,
        scaler: LossScale,
        held: Any,
        world_size: int,
        device: torch.device,
        *,
        reused: bool = False,
        task_log: TaskLog | None = None,
    ) -> None:
        """Begin without a pass.

        Args:
            task: computes the loss.
            wrapped: of the model.
            number_format: of parameters and arithmetic.
            scaler: of the loss.
            held: one sample, cast, for passes without samples of parameters that are
                spread over the ranks.
            world_size: number of ranks.
            device: of this rank.
            reused: whether what the model returns lies where its next outputs will, as under CUDA
                graphs: then what is kept of it is copied.
            task_log: of a task that logs.
        """
        self.loss_sum: Tensor | None = None
        self.weight: Tensor | int = 0
        self.moves = False
        self._task = task
        self._module = task if isinstance(task, ModuleTask) else None
        self._task_logs = None if task_log is None else task_log.logs
        self._loss = differentiable(task.loss, wrapped.unused, spread=wrapped.spread)
        self._wrapped = wrapped
        self._alone = None if wrapped.distributed else partial(self._loss, wrapped.model)
        self._count_uses = wrapped.count_uses
        self._format = number_format
        self._arithmetic: AbstractContextManager[object] = number_format.arithmetic()
        self._run = self._compute if number_format.autocast is None else self._compute_cast
        self._scaler = scaler
        self._held = held
        self._world_size = world_size
        self._device = device
        self._reused = reused
        self._statistics: list[nn.Module] = with_statistics(wrapped.model)
        # Gradients of the loss, by its dtype and what it is divided by: a run has two or three.
        self._seeds: dict[tuple[torch.dtype, int], Tensor] = {}

    def forward(self, batch: ShareOfBatch, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Run one pass over some of the rank's samples. Under FSDP, collective: all ranks.

        Returns:
            The sum of the losses, and the gradient to begin the backward pass with.
        """
        if self._count_uses is not None:
            self._count_uses(first < stop)
        if first == stop:
            return self._forward_without_samples()
        if self._task_logs is not None:
            self._task_logs.weight = stop - first
        fields = batch.fields if stop - first == batch.size else batch.part(first, stop)
        loss_sum, weight = self._run(fields, stop - first)
        detached = loss_sum.detach()
        if self._reused:
            detached = detached.clone()
            weight = weight.clone() if isinstance(weight, Tensor) else weight
        self.loss_sum = detached if self.loss_sum is None else self.loss_sum + detached
        self.weight = weight + self.weight
        seed = self._seeds.get((loss_sum.dtype, batch.global_size))
        if seed is None:
            seed = self._make_seed(loss_sum.dtype, batch.global_size)
        return loss_sum, seed * self._scaler.scale if self._scaler.enabled else seed

    def _compute(self, fields: Any, samples: int) -> tuple[Tensor, Tensor | int]:
        """Return the sum of the losses of some samples, and its weight."""
        cast = self._format.cast(fields, self._task.inputs)
        if self._module is not None:
            self._module.begin_pass(cast, samples)
        result: tuple[Tensor, Tensor | int] = (
            self._wrapped.call(self._loss, cast) if self._alone is None else self._alone(cast)
        )
        return result

    def _compute_cast(self, fields: Any, samples: int) -> tuple[Tensor, Tensor | int]:
        """Return the same, in the arithmetic of a mixed precision."""
        with self._arithmetic:
            return self._compute(fields, samples)

    def _forward_without_samples(self) -> tuple[Tensor, Tensor]:
        """Take part in the reduction of the gradients without a sample of one's own.

        Where every rank has all parameters, no code of the user runs. Where they are spread, the
        others need this rank's in the order in which the model runs: it does so on a held row. So
        it does where passes change parameters, or this rank would keep those of before.
        """
        if self._module is not None:
            self._module.begin_pass(self._held, 0)
        elif self._task_logs is not None:
            self._task_logs.weight = 0
        if not self._wrapped.spread and not self.moves:
            loss_sum, _ = self._wrapped.call(reach_all, {})
            return loss_sum, torch.zeros_like(loss_sum)
        with (
            kept_generators(self._device),
            copied_buffers(self._wrapped.model),
            evaluating(self._statistics),
            nullcontext() if self._module is None else self._module.unseen(),
            self._arithmetic,
        ):
            loss_sum, _ = self._wrapped.call(self._loss, self._held)
        return loss_sum, torch.zeros_like(loss_sum)

    def _make_seed(self, dtype: torch.dtype, global_size: int) -> Tensor:
        """Return what the gradient of a sum of losses is multiplied with, (), and keep it.

        The mean over the global batch divides by its size, and DDP's mean over the ranks is undone.
        """
        factor = self._world_size / global_size
        seed = torch.tensor(factor, dtype=dtype, device=self._device)
        self._seeds[dtype, global_size] = seed
        return seed

    def reduce_weight(self, global_size: int) -> Tensor:
        """Return what makes a mean over samples one over weights, (). Collective: all ranks."""
        weight = torch.zeros((), dtype=torch.float64, device=self._device)
        weight += self.weight
        if self._world_size > 1:
            dist.all_reduce(weight)
        # Where nothing at all counts, the gradient is 0 and stays so.
        return global_size / torch.where(weight == 0, 1.0, weight)


class OwnGradients:
    """Gradients of several passes, added up where no graph writes.

    A graph writes the gradients of every pass to the same memory, and autograd takes the first ones
    as they are: the second pass would add to what it has just overwritten.

    Source: torch/csrc/autograd/functions/accumulate_grad.h, accumulateGrad, and
    torch/_inductor/cudagraph_trees.py of torch 2.13.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Begin.

        Args:
            parameters: those that are trained.
        """
        self._parameters = parameters
        self._own: dict[nn.Parameter, Tensor] = {}

    def keep(self) -> None:
        """Move gradients that the pass before has made to memory of their own.

        Those that were moved before, and added to since, stay where they are. Parameters without a
        part in the pass have no gradient, as ever.
        """
        moved = [
            (item, item.grad)
            for item in self._parameters
            if item.grad is not None and item.grad is not self._own.get(item)
        ]
        if not moved:
            return
        for item, gradient in moved:
            if item not in self._own:
                self._own[item] = torch.empty_like(gradient)
        own = [self._own[item] for item, _ in moved]
        torch._foreach_copy_(own, [gradient for _, gradient in moved])
        for (item, _), gradient in zip(moved, own, strict=True):
            item.grad = gradient
