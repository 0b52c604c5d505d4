"""One optimizer step on a global batch, over all ranks: no host sync, whatever the split."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from hpctrain.checkpoint.state import HasParameters
from hpctrain.data.loading.loader import Batch
from hpctrain.errors import ConfigError
from hpctrain.launch.world import World
from hpctrain.training.bad_batches import BadBatch
from hpctrain.training.bad_steps import RECENT_STEPS
from hpctrain.training.step.averaging import WeightAverage
from hpctrain.training.step.precision import LossScale, NumberFormat
from hpctrain.training.step.priming import prime
from hpctrain.training.step.replica import Replica
from hpctrain.training.step.shares import count_passes, cut
from hpctrain.training.step.undisturbed import evaluating, with_statistics
from hpctrain.training.step.update import Update
from hpctrain.training.task import Fields, Task, check_task

if TYPE_CHECKING:  # torch takes its time to load what only sharded runs need
    from hpctrain.training.step.shards import Shards


class TrainStep:
    """Forward, backward, clip, update; call it with a batch and a learning rate.

    The gradient is that of the mean over the global batch, whatever the shares of the ranks: each
    sums over its own samples, and DDP's mean over ranks is undone. All ranks run the same number of
    passes, `grad_accum_steps`; a pass without samples runs one held row with weight 0.

    Attributes:
        model: the bare model, to evaluate and to save.
        optimizer: its optimizer.
        scaler: of the loss, in mixed float16; its state belongs into a checkpoint.
        grad_accum_steps: passes per rank and step.
        average: moving average of the parameters, updated by the job; None where none is wanted.
        shards: the parameters where they are spread over the ranks, else None.
        syncs: whether every step waits for the device, because the optimizer cannot refuse a bad
            update by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: Optimizer,
        world: World,
        *,
        number_format: NumberFormat,
        clip_norm: float | None,
        micro_batch_size: int | None,
        largest_share: int,
        example: Fields,
        smallest_share: int = 0,
        bucket_mb: float | None = None,
        clip_value: float | None = None,
        ema_decay: float | None = None,
        compress_gradients: str = "none",
        static_graph: bool = False,
        shards: Shards | None = None,
    ) -> None:
        """Wrap the model. Collective: all ranks.

        Args:
            model: on the device, in the dtype of `number_format`, identical on all ranks.
            task: computes the loss.
            optimizer: of the model's parameters.
            world: the ranks.
            number_format: of parameters and arithmetic.
            clip_norm: the norm of the whole gradient is clipped to this; None: not at all.
            micro_batch_size: at most so many samples in one pass; None: a rank's whole share.
            largest_share: the most samples of any rank in any batch.
            example: one row of every field, on the device.
            smallest_share: the fewest samples of any rank in any batch.
            bucket_mb: MB of gradients that are reduced together; None: as torch chooses.
            clip_value: every element of the gradient is clipped to this, after its norm.
            compress_gradients: "bf16" or "fp16": the format in which ranks exchange gradients.
            static_graph: whether every pass uses the same parameters equally often.
            ema_decay: of a moving average of the parameters; None: there is none.
            shards: the model where its parameters are spread over the ranks, and the optimizer's
                are those of `shards`; None: every rank has all of them.

        Raises:
            ConfigError: if the task is none, or a model with SyncBatchNorm would meet a pass
                without samples.
        """
        check_task(task)
        self.grad_accum_steps = count_passes(largest_share, micro_batch_size)
        self._statistics = with_statistics(model)
        if smallest_share < self.grad_accum_steps and world.topology.world_size > 1:
            _refuse_synchronised_statistics(self._statistics)
        self.model = model
        self.optimizer = optimizer
        self.shards = shards
        self._task = task
        self._world_size = world.topology.world_size
        self._communicator = world.communicator
        self._device = world.device
        self._pulse = world.pulse
        self._format = number_format
        self._arithmetic = number_format.arithmetic()
        self._held = number_format.cast(
            {name: row.clone() for name, row in example.items()}, task.inputs
        )
        self._rows = max(1, -(-largest_share // self.grad_accum_steps))
        self._replica: Replica | Shards = shards or Replica(
            model, self._world_size, world.device, bucket_mb, compress_gradients, static_graph
        )
        self.scaler = LossScale(world.device, enabled=number_format.scaled)
        self._update = Update(
            optimizer,
            clip_norm=clip_norm,
            clip_value=clip_value,
            scaler=self.scaler,
            device=torch.device("cpu") if shards and shards.offloaded else world.device,
            reduce_norm=self._replica.reduce_norm,
        )
        self.syncs = self._update.syncs
        self.average = None if ema_decay is None else WeightAverage(self._replica, ema_decay)
        # Gradients of the loss, by its dtype and what it is divided by: a run has two or three.
        self._seeds: dict[tuple[torch.dtype, int], Tensor] = {}
        # Of the last step: what `read` reduces.
        self._loss_sum: Tensor | None = None
        self._weight: Tensor | int = 0
        # Epoch, start, size and this rank's loss of the newest batches; losses stay on the device.
        self._recent: deque[tuple[int, int, int, Tensor | None]] = deque(maxlen=RECENT_STEPS)

    @property
    def bad_steps(self) -> Tensor:
        """Counts of steps that were not applied, see `BadSteps`; belongs into a checkpoint."""
        return self._update.bad_steps.counts()

    @property
    def held(self) -> HasParameters:
        """What this rank holds of the parameters, and updates."""
        return self._replica

    @property
    def idle_row(self) -> Fields:
        """One held row, for passes that only keep the others company."""
        return self._held

    def settle(self) -> None:
        """Have parameters where an update expects them, after passes without a backward one."""
        self._replica.settle()

    def before_update(self, do: Callable[[], None]) -> None:
        """Call something once, before the next time that the optimizer's state changes."""
        self._update.call_before(do)

    def communication_seconds(self) -> float:
        """Return how long this rank has waited for gradients after its own were there."""
        return self._replica.communication_seconds

    def prime(self) -> None:
        """Run the model a few times and leave no trace, before the state is restored.

        Collective: all ranks.

        Raises:
            TrainingError: if model, task and data do not fit, or a parameter has no gradient.
        """
        fields = {name: torch.cat([row] * self._rows) for name, row in self._held.items()}
        prime(
            self._replica,
            self._task,
            fields,
            arithmetic=self._arithmetic,
            device=self._device,
            communicator=self._communicator,
        )

    def __call__(self, batch: Batch, lr: float) -> None:
        """Update the parameters by one global batch. Collective: all ranks."""
        self._pulse.tick()  # a batch has come
        self._replica.begin()
        self._loss_sum, self._weight = None, 0
        *before, last = cut(batch.size, self.grad_accum_steps)
        if before:
            with self._replica.local():
                for first, stop in before:
                    loss, seed = self._forward(batch, first, stop)
                    self._replica.backward(loss, seed)
        loss, seed = self._forward(batch, *last)
        counts_samples = self._task.counts_samples
        self._pulse.tick()  # what follows waits for the other ranks
        factor = None if counts_samples else self._reduce_weight(batch.global_size)
        self._replica.backward_and_reduce(loss, seed)
        self._update.apply(self._replica.gradients(), lr, factor)
        self._recent.append((batch.epoch, batch.start, batch.global_size, self._loss_sum))

    def read(self) -> dict[str, float]:
        """Return the numbers of the last step, over all ranks. Collective: all ranks.

        One reduction and one host sync.

        Returns:
            loss: the mean over the global batch; grad_norm: before clipping; bad_steps: how many
            in a row, up to this one, had a gradient that was not finite; most_bad_steps: the most
            in a row since the last call; skipped_steps: all of them.
        """
        numbers = torch.zeros(6, dtype=torch.float64, device=self._device)
        if self._loss_sum is not None:
            numbers[0].copy_(self._loss_sum)
            numbers[1] = self._weight
        if self._world_size > 1:
            dist.all_reduce(numbers)
        # These are the same on all ranks already.
        numbers[2].copy_(self._update.grad_norm)
        numbers[3:].copy_(self._update.bad_steps.counts())
        self._update.bad_steps.look_anew()
        loss_sum, weight, norm, bad, most, skipped = numbers.tolist()
        return {
            "loss": loss_sum / weight if weight else float("nan"),
            "grad_norm": norm,
            "bad_steps": bad,
            "most_bad_steps": most,
            "skipped_steps": skipped,
        }

    def bad_batches(self, step: int) -> list[BadBatch]:
        """Return those of the newest batches that were not applied, oldest first.

        Waits for the device.

        Args:
            step: that the newest batch led to.
        """
        flags = self._update.bad_steps.recent().tolist()
        recent = list(self._recent)
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
            if bad
        ]

    def _forward(self, batch: Batch, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Run one pass over some of the rank's samples.

        Returns:
            The sum of the losses, and the gradient to begin the backward pass with.
        """
        if first == stop:
            return self._forward_without_samples()
        fields: Fields = batch.fields
        if stop - first < batch.size:
            fields = {name: tensor[first:stop] for name, tensor in fields.items()}
        with self._arithmetic:
            loss_sum, weight = self._task.loss(
                self._replica.module, self._format.cast(fields, self._task.inputs)
            )
        detached = loss_sum.detach()
        self._loss_sum = detached if self._loss_sum is None else self._loss_sum + detached
        self._weight = weight + self._weight
        return loss_sum, self._seed(loss_sum.dtype, batch.global_size)

    def _forward_without_samples(self) -> tuple[Tensor, Tensor]:
        """Take part in the reduction of the gradients without a sample of one's own."""
        with evaluating(self._statistics), self._arithmetic:
            loss_sum, _ = self._task.loss(self._replica.module, self._held)
        return loss_sum, torch.zeros_like(loss_sum)

    def _seed(self, dtype: torch.dtype, global_size: int) -> Tensor:
        """Return what the gradient of a sum of losses is multiplied with, ().

        The mean over the global batch divides by its size, and DDP's mean over the ranks is undone.
        """
        seed = self._seeds.get((dtype, global_size))
        if seed is None:
            factor = self._world_size / global_size
            seed = torch.tensor(factor, dtype=dtype, device=self._device)
            self._seeds[dtype, global_size] = seed
        return seed * self.scaler.scale if self.scaler.enabled else seed

    def _reduce_weight(self, global_size: int) -> Tensor:
        """Return what makes a mean over samples one over weights, (). Collective: all ranks."""
        weight = torch.zeros((), dtype=torch.float64, device=self._device)
        weight += self._weight
        if self._world_size > 1:
            dist.all_reduce(weight)
        # Where nothing at all counts, the gradient is 0 and stays so.
        return global_size / torch.where(weight == 0, 1.0, weight)


def _refuse_synchronised_statistics(modules: list[nn.Module]) -> None:
    """Refuse models whose ranks would wait in vain for one that has no samples.

    Raises:
        ConfigError: if a module is one.
    """
    if any(isinstance(module, nn.SyncBatchNorm) for module in modules):
        raise ConfigError(
            "the model has SyncBatchNorm, which needs samples on every rank in every pass; in the "
            "last batch of an epoch a rank may have none. Use GroupNorm or BatchNorm, or a "
            "data.global_batch_size that divides the data, with a smaller number of passes"
        )
