"""Optimizer step of an own loop: gradients averaged over ranks, clipped, refused if not finite."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpctrain.checkpoint.optimizer_state import OptimizerState
from hpctrain.config.schema import TrainingSection
from hpctrain.errors import TrainingError
from hpctrain.launch.process_group import World
from hpctrain.training.loops.gradients import Reducer
from hpctrain.training.loops.registry import Setups
from hpctrain.training.model.precision import LossScale
from hpctrain.training.model.wrappers import PlainNames
from hpctrain.training.optim.ema import EvaluationWeights, has_modes
from hpctrain.training.parallel.ddp import (
    take_buffers_of_rank_zero,
)
from hpctrain.training.update import Update


class WholeModel:
    """A model of which every rank has all parameters.

    Attributes:
        model: the model itself.
    """

    spread = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def named_parameters(self) -> Any:
        """Return all parameters, by plain names."""
        return PlainNames(self.model).of(self.model.named_parameters())


class Stepper:
    """The update of one optimizer: mean gradients, clipped, refused where they are not finite.

    Takes the place of the optimizer's own `step`, which it calls.

    Attributes:
        optimizer: the optimizer.
        state: what it has learned.
        begun: whether a backward pass has begun by way of the world since the last update.
        steps: updates so far, in this job.
        parameters: of the optimizer, or what this rank holds of them.
        applies: whether the update itself is under way.
        evaluation: its own weights for evaluations; None where it has one set only.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        held: Sequence[Any],
        world: World,
        *,
        section: TrainingSection,
        scaler: LossScale,
        setups: Setups,
    ) -> None:
        self.optimizer = optimizer
        self._setups = setups
        self.begun = False
        self.steps = 0
        self.applies = False
        self.plain_step = optimizer.step
        self._zero_grad = optimizer.zero_grad
        self._scaler = scaler
        self._sharded = [item for item in held if not isinstance(item, WholeModel)]
        self.parameters = [item for group in optimizer.param_groups for item in group["params"]]
        self._reducer = Reducer(self.parameters, world.topology.world_size, setups.group)
        self._whole = {id(item) for each in self._sharded for item in each.whole_parameters()}
        self._rank, self._world_size = world.topology.rank, world.topology.world_size
        self._modules = [list(each.model.modules()) for each in held]
        self.state = OptimizerState(optimizer, rows=bool(self._sharded))
        self.evaluation = (
            EvaluationWeights(optimizer, Named(held)) if has_modes(optimizer) else None
        )
        offloaded = any(each.offloaded for each in self._sharded)
        self.update = Update(
            optimizer,
            clip_norm=section.clip_norm,
            clip_value=section.clip_value,
            scaler=scaler,
            device=torch.device("cpu") if offloaded else world.device,
            counted=self._counted if self._sharded else None,
            reduce_norm=self._sharded[0].reduce_norm if self._sharded else None,
        )
        assert setups.bad_steps is not None
        self.update.bad_steps = setups.bad_steps
        self._uncounted = 0

    def take_over(self) -> None:
        """Have `optimizer.step()` and `optimizer.zero_grad()` be ours."""
        optimizer: Any = self.optimizer
        optimizer.step = types.MethodType(_step_of(self), optimizer)
        if self._sharded:
            optimizer.zero_grad = types.MethodType(_zero_grad_of(self), optimizer)

    def expect(self, loss: Tensor | None) -> None:
        """Reduce beside the backward pass that follows, the last before `apply`. Collective.

        Args:
            loss: what it begins with; None: this rank has no samples.
        """
        if not self._sharded:  # gradients of rows are reduced in any backward pass
            self._reducer.expect(loss)

    def apply(self, factor: Tensor | None = None) -> None:
        """Update the parameters by the mean of all ranks' gradients. Collective: all ranks.

        Args:
            factor: by which the gradients are too small, (); None: they are not.

        Raises:
            TrainingError: on this rank, if the gradients are not those of scaled losses where they
                have to be.
        """
        if self._scaler.enabled and not self.begun:
            raise TrainingError(
                'precision "16-mixed" scales losses before their backward pass: call '
                "world.backward(loss) or run.backward(loss) in place of loss.backward()"
            )
        if self._setups.is_idle and not self.begun:
            self._refuse_or_forget()
        self.begun = False
        gradients = self._gathered() if self._sharded else self._reducer.reduce()
        self.applies = True  # what a scheduler has put around `step` stays around it
        try:
            self.update.apply(gradients, None, factor)
        finally:
            self.applies = False
        for each in self._sharded:
            each.release()
            each.count_uses_anew()
        if self._world_size > 1:
            for modules in self._modules:
                take_buffers_of_rank_zero(modules, self._rank)  # as DistributedDataParallel does
        self.steps += 1

    def _refuse_or_forget(self) -> None:
        """See to it that the held sample of a rank without others counts for nothing.

        Raises:
            TrainingError: on this rank, where its gradients are in all ranks' already.
        """
        if self._sharded:
            raise TrainingError(
                "this rank has no samples in this batch, and its held one counted as much as any: "
                "call world.backward(loss, samples=batch.size) in place of loss.backward()"
            )
        for item in self.parameters:
            item.grad = None

    def clear_gradients(self, *, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters of this optimizer."""
        self._zero_grad(set_to_none=set_to_none)
        for each in self._sharded:
            each.clear_gradients()

    def _gathered(self) -> list[Tensor]:
        """Return this rank's rows of the gradients, and those of what every rank has."""
        if not self.steps:
            for each in self._sharded:
                each.find_rows()
        found: list[Tensor] = []
        whole: list[Tensor] = []
        for each in self._sharded:
            each.reduce_whole()
            each.gradients()
        for item in self.parameters:
            if item.grad is not None:
                (whole if id(item) in self._whole else found).append(item.grad)
        self._uncounted = len(whole) if self._rank else 0
        return found + whole

    def _counted(self, gradients: list[Tensor]) -> list[Tensor]:
        return gradients[: len(gradients) - self._uncounted]


def _step_of(stepper: Stepper) -> Callable[..., Any]:
    def step(_optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """Average the gradients over the ranks, clip them, and update. Collective: all ranks."""
        if stepper.applies:
            return stepper.plain_step()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepper.apply()
        return loss

    return step


def _zero_grad_of(stepper: Stepper) -> Callable[..., None]:
    def zero_grad(_optimizer: Optimizer, set_to_none: bool = True) -> None:
        """Forget the gradients, where torch keeps those of rows as well."""
        stepper.clear_gradients(set_to_none=set_to_none)

    return zero_grad


class Named:
    """Parameters of one or several models, by names that no two of them share."""

    def __init__(self, held: Sequence[Any], names: Sequence[str] = ()) -> None:
        """Take the models in.

        Args:
            held: what this rank has of each.
            names: of the models; none: one of them has no name, and several are numbered.
        """
        self._held = held
        self._names = names or _numbered(len(held))

    def named_parameters(self) -> Any:
        """Yield the parameters by name."""
        for name, held in zip(self._names, self._held, strict=True):
            around = f"{name}." if name else ""
            for inner, item in held.named_parameters():
                yield around + inner, item


def _numbered(count: int) -> list[str]:
    return [""] if count == 1 else [str(number) for number in range(count)]
