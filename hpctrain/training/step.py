"""One optimizer step on a global batch, over all ranks: no host sync, whatever the split."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hpctrain.data.loader import Batch
from hpctrain.errors import TrainingError
from hpctrain.launch.world import World
from hpctrain.training.optimizers import is_fused, set_learning_rate
from hpctrain.training.precision import NumberFormat
from hpctrain.training.task import Fields, Task
from hpctrain.training.undisturbed import frozen_statistics, kept_generators


class TrainStep:
    """Forward, backward, clip, update; call it with a batch and a learning rate.

    The gradient is that of the mean over the global batch, whatever the shares of the ranks: each
    sums over its own samples, and DDP's mean over ranks is undone. All ranks run the same number of
    passes, `grad_accum_steps`; a pass without samples runs one held row with weight 0.

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

    Attributes:
        grad_accum_steps: passes per rank and step.
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
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self._task = task
        self._world_size = world.topology.world_size
        self._format = number_format
        self._clip_norm = clip_norm
        self._parameters = [item for item in model.parameters() if item.requires_grad]
        self._held = number_format.cast({name: row.clone() for name, row in example.items()})
        self.grad_accum_steps = (
            1 if micro_batch_size is None else -(-largest_share // micro_batch_size)
        )
        self.syncs = not is_fused(optimizer)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=number_format.scaled)
        self._replica: DistributedDataParallel | None = None
        if self._world_size > 1:
            self._replica = DistributedDataParallel(
                model,
                device_ids=[world.device.index] if world.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        self._steps = 0
        # Of the last step, on the device until somebody asks: the losses and weights of its passes,
        # its gradient norm; and the bad steps in a row.
        self._losses: list[Tensor] = []
        self._weights: list[Tensor | int] = []
        self._norm = torch.zeros((), device=world.device)
        self.bad_steps = torch.zeros((), device=world.device)

    def __call__(self, batch: Batch, lr: float) -> None:
        """Update the parameters by one global batch. Collective: all ranks."""
        self._steps += 1
        self._backward(batch)
        if not self._task.counts_samples:
            self._reweight(batch.global_size)
        self._update(lr)

    def read(self) -> dict[str, float]:
        """Return the numbers of the last step, over all ranks. Collective: all ranks.

        One reduction and one host sync.
        """
        sums = torch.stack((self._total(self._losses), self._total(self._weights)))
        if self._world_size > 1:
            dist.all_reduce(sums)
        state = torch.stack((self._norm, self.bad_steps)).double()
        loss_sum, weight, norm, bad = torch.cat((sums, state)).tolist()
        return {
            "loss": loss_sum / weight if weight else float("nan"),
            "grad_norm": norm,
            "bad_steps": int(bad),
        }

    def communication_seconds(self) -> float:
        """Return how long steps have waited for gradients so far, about.

        DDP times one step in a hundred itself, which costs nothing more: what it spent on
        reductions beyond what ran beside the backward pass, times the number of steps.
        """
        if self._replica is None:
            return 0.0
        timed: dict[str, int] = self._replica._get_ddp_logging_data()
        exposed = timed.get("avg_backward_comm_time", 0) - timed.get(
            "avg_backward_compute_comm_overlap_time", 0
        )
        return self._steps * max(0, exposed) * 1e-9

    def prime(self) -> None:
        """Run the model forward and backward once on the held row, and leave no trace.

        DDP rebuilds its buckets after the first backward, and sums in another order from then on.
        So that a run that starts again sums as one that never stopped, every start goes through
        this before the state is restored. Finds parameters that the loss does not reach.

        Collective: all ranks.

        Raises:
            TrainingError: if a parameter has no gradient.
        """
        buffers = {name: item.clone() for name, item in self.model.named_buffers()}
        with kept_generators(), frozen_statistics(self.model):
            self._pass(self.model, self._held, 0.0)
            unused = [
                name
                for name, item in self.model.named_parameters()
                if item.requires_grad and item.grad is None
            ]
            self._zero_grad()
            if unused:
                shown = ", ".join(unused[:8]) + (", ..." if unused[8:] else "")
                raise TrainingError(
                    f"{len(unused)} parameters of the model have no part in the loss: {shown}. "
                    "Use them, remove them, or set requires_grad = False"
                )
            if self._replica is not None:
                self._pass(self._replica, self._held, 0.0)
                self._zero_grad()
                with self._format.arithmetic():
                    self._task.loss(self._replica, self._held)
        for name, item in self.model.named_buffers():
            item.copy_(buffers[name])
        self._losses, self._weights = [], []

    @property
    def _forward_model(self) -> nn.Module:
        """The model as a training pass runs it."""
        return self.model if self._replica is None else self._replica

    def _backward(self, batch: Batch) -> None:
        passes = self.grad_accum_steps
        fields = self._format.cast(batch.fields)
        self._losses, self._weights = [], []
        for index in range(passes):
            first, stop = index * batch.size // passes, (index + 1) * batch.size // passes
            last = index + 1 == passes
            quiet = nullcontext() if last or self._replica is None else self._replica.no_sync()
            with quiet:
                if stop == first:
                    self._empty_pass()
                elif passes == 1:
                    self._pass(self._forward_model, fields, self._world_size / batch.global_size)
                else:
                    part = {name: tensor[first:stop] for name, tensor in fields.items()}
                    self._pass(self._forward_model, part, self._world_size / batch.global_size)

    def _pass(self, model: nn.Module, fields: Fields, scale: float) -> None:
        with self._format.arithmetic():
            loss_sum, weight = self._task.loss(model, fields)
        self.scaler.scale(loss_sum * scale).backward()
        self._losses.append(loss_sum.detach())
        self._weights.append(weight)

    def _empty_pass(self) -> None:
        """Take part in the reduction of the gradients without a sample of its own."""
        with frozen_statistics(self.model):
            with self._format.arithmetic():
                loss_sum, _ = self._task.loss(self._forward_model, self._held)
            self.scaler.scale(loss_sum * 0.0).backward()

    def _total(self, parts: Sequence[Tensor | int]) -> Tensor:
        """Return the sum over the passes of this rank: () float64, on the device."""
        total = torch.zeros((), dtype=torch.float64, device=self._norm.device)
        for part in parts:
            total += part
        return total

    def _reweight(self, global_size: int) -> None:
        """Turn the mean over samples into the mean over weights, which only the data know."""
        weight = self._total(self._weights)
        if self._world_size > 1:
            dist.all_reduce(weight)
        factor = global_size / weight.clamp(min=torch.finfo(torch.float64).tiny)
        grads = [item.grad for item in self._parameters if item.grad is not None]
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))

    def _update(self, lr: float) -> None:
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        grads = [item.grad for item in self._parameters if item.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self._clip_norm is not None:
            factor = (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, factor)
        bad = (~torch.isfinite(norm)).float()
        self._norm = norm
        self.bad_steps.add_(1).mul_(bad)
        set_learning_rate(self.optimizer, lr)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif not self.syncs:
            # Fused kernels leave parameters and state alone where this flag is set.
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bad.item():
            self.optimizer.step()
        self._zero_grad()

    def _zero_grad(self) -> None:
        # Views of DDP's buckets stay; zeroing them is cheaper than new gradients each step.
        self.optimizer.zero_grad(set_to_none=self._world_size == 1)
