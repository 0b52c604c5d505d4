"""Registry of models and optimizers that were set up, and the backward passes of an own loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from hpctrain.errors import ConfigError, TrainingError
from hpctrain.training.compiler import backward

if TYPE_CHECKING:  # a world is made faster without
    from hpctrain.training.loops.setup import Setup
    from hpctrain.training.loops.stepper import Stepper
    from hpctrain.training.model.precision import LossScale
    from hpctrain.training.nonfinite import BadSteps


@dataclass(slots=True)
class Setups:
    """All that was set up in a world.

    Attributes:
        scaler: of all losses; None before the first setup.
        bad_steps: updates that were not applied, of all optimizers.
        current: the samples of the running pass; None between batches, and without a loader.
        beside: the process group of reductions beside a backward pass; None before the first.
    """

    all: list[Setup] = field(default_factory=list)
    scaler: LossScale | None = None
    bad_steps: BadSteps | None = None
    current: Any = None
    beside: dist.ProcessGroup | None = None

    @property
    def is_idle(self) -> bool:
        """Whether this rank has no samples in the running pass."""
        return self.current is not None and not self.current.size

    def models(self) -> list[nn.Module]:
        """Return all models, in the order in which they were set up."""
        return [model for setup in self.all for model in setup.models]

    def held(self) -> list[Any]:
        """Return what this rank has of each model."""
        return [held for setup in self.all for held in setup.held]

    def steppers(self) -> list[Stepper]:
        """Return what steps for each optimizer."""
        return [stepper for setup in self.all for stepper in setup.optimizers]

    def stepper_of(self, optimizer: Optimizer) -> Stepper:
        """Return what steps for an optimizer.

        Raises:
            ConfigError: if it was not set up.
        """
        for stepper in self.steppers():
            if stepper.optimizer is optimizer:
                return stepper
        raise ConfigError(
            f"{type(optimizer).__name__} was not set up: net, optimizer = world.setup(net, "
            "optimizer)",
            everywhere=True,
        )

    def factor(self, samples: int | None, world_size: int) -> float:
        """Return by how much a mean over samples counts in the mean over ranks.

        Args:
            samples: of the running pass; None: each rank's loss counts the same.
            world_size: number of ranks.

        Raises:
            TrainingError: if the pass has another number of samples.
        """
        if samples is None:
            return 1.0
        if self.current is None:
            raise TrainingError(
                f"samples={samples}: there is no batch of world.loader under way, by which it "
                "would count; leave samples out, or give weight= to run.step"
            )
        if samples != self.current.size:
            raise TrainingError(
                f"samples={samples}, and this pass has {self.current.size}: give batch.size, or, "
                "where what counts depends on the data, weight= to run.step"
            )
        # The mean over the global batch divides by its size, and that over ranks is undone.
        factor: float = world_size * samples / self.current.global_size
        return factor

    def group(self) -> dist.ProcessGroup:
        """Return the process group of reductions beside a backward pass. Collective: all ranks."""
        if self.beside is None:
            self.beside = dist.new_group()
        return self.beside

    def backward(
        self, loss: Tensor, factor: float | Tensor = 1.0, before: Stepper | None = None
    ) -> None:
        """Run a backward pass from a loss. Where a model is spread, collective: all ranks.

        A rank without samples has no gradients; its pass runs for what others wait for in it.

        Args:
            loss: (), of the running pass.
            factor: by which its gradients count, in the mean over ranks.
            before: the optimizer that steps next, where that is known: its gradients are reduced
                beside the pass. Collective: all ranks.
        """
        _check_loss(loss)
        for stepper in self.steppers():
            stepper.begun = True
        is_spread = any(held.spread for held in self.held())
        if before is not None:
            before.expect(None if self.is_idle else loss)
        if self.is_idle:
            if not is_spread:
                self._backward_of_none(loss)
                return
            factor = 0.0
        if isinstance(factor, Tensor):
            seed = factor.detach().to(loss.dtype).reshape(())
        else:
            seed = torch.full_like(loss, factor)
        if self.scaler is not None and self.scaler.enabled:
            seed = seed * self.scaler.scale.to(seed.dtype)
        for held in self.held():
            if held.spread:
                held.count_uses(not self.is_idle)
        backward(loss, seed)

    def _backward_of_none(self, loss: Tensor) -> None:
        """Run a backward pass that leaves no gradients, as a mean over all ranks' rows needs it."""
        parameters = [item for model in self.models() for item in model.parameters()]
        kept = [item.grad for item in parameters]
        for item in parameters:
            item.grad = None
        backward(loss, torch.zeros_like(loss))
        for item, gradient in zip(parameters, kept, strict=True):
            item.grad = gradient


def _check_loss(loss: object) -> None:
    """Refuse a loss that has no backward pass.

    Raises:
        TrainingError: saying what it is.
    """
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        what = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TrainingError(f"the loss is {what}: expected one number, such as a mean")
    if not loss.requires_grad:
        raise TrainingError(
            "no parameter has a part in the loss: something between them is detached, or computed "
            "without gradients"
        )
