"""Callbacks beside a hand-written task: the part of Lightning's protocol that makes sense there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hpctrain.training.modules.callbacks import CALLED, hooks_of
from hpctrain.training.modules.lr_schedulers import Boundary
from hpctrain.training.modules.stand_in import TrainerStandIn
from hpctrain.training.position import Position, StopAt

TASK_HOOKS = frozenset(
    {
        *("setup", "teardown", "on_fit_start", "on_fit_end", "on_exception"),
        *("on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end"),
        *("on_train_batch_end", "on_validation_start", "on_validation_end"),
        *("on_validation_epoch_start", "on_validation_epoch_end"),
        *("state_dict", "load_state_dict", "on_save_checkpoint", "on_load_checkpoint"),
    }
)
"""Hooks that are called beside a hand-written task; its batches are its own."""


class TaskCallbacks:
    """Calls callbacks at the places of a run; does nothing where there are none.

    They get a trainer with the facts of the run, and the bare model. `on_train_batch_end` gets the
    mean loss of this rank's samples as `outputs["loss"]`, and no batch.

    Attributes:
        items: the callbacks.
        trainer: that they get.
    """

    def __init__(self, items: Sequence[Any] = (), trainer: TrainerStandIn | None = None) -> None:
        """Call these.

        Args:
            items: the callbacks.
            trainer: that they get; None: there are none.
        """
        self.items = list(items)
        self.trainer: Any = trainer
        if trainer is not None:
            trainer.callbacks = self.items
        self._hooks = {id(item): frozenset(hooks_of(item)) & TASK_HOOKS for item in self.items}
        self._ends_steps = any("on_train_batch_end" in each for each in self._hooks.values())

    def notes(self) -> list[str]:
        """Return what the header should say of hooks that are not called."""
        return [
            f"callback {type(item).__name__}: {name} is not called: beside a task of your own "
            "callbacks see its steps and evaluations, and not its batches"
            for item in self.items
            for name in sorted({*hooks_of(item)} & CALLED - TASK_HOOKS)
        ]

    def set_up(self) -> None:
        """Begin the job, before the model goes to its device."""
        self._call("setup", "fit")

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """Take note of the optimizer."""
        if self.items:
            self.trainer.optimizers = [optimizer]

    def begin_training(self, place: Position) -> None:
        """Begin to train, at a place."""
        if not self.items:
            return
        self.trainer.global_step, self.trainer.current_epoch = place.step, place.epoch
        self.trainer.state.stage = "train"
        self._call("on_fit_start")
        self._call("on_train_start")

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch, or go on in one."""
        if self.items:
            self.trainer.current_epoch = epoch
            self._call("on_train_epoch_start")

    def end_step(self, place: Position, stop_at: StopAt, loss: Callable[[], Tensor | None]) -> None:
        """End the step that led to a place.

        Args:
            place: where the run stands.
            stop_at: how long an epoch is.
            loss: returns that of this rank's samples; None where it had none.
        """
        if not self.items:
            return
        self.trainer.global_step = place.step
        if self._ends_steps:
            mean = loss()
            if mean is None:
                mean = torch.zeros((), device=self.trainer.strategy.root_device)
            batch_idx = Boundary.before(place, stop_at).batch
            self._call("on_train_batch_end", {"loss": mean}, None, batch_idx)

    def end_epoch(self) -> None:
        """End an epoch."""
        self._call("on_train_epoch_end")

    def begin_evaluation(self) -> None:
        """Begin an evaluation."""
        if not self.items:
            return
        self.trainer.state.stage = "validate"
        self._call("on_validation_start")
        self._call("on_validation_epoch_start")

    def end_evaluation(self, metrics: Mapping[str, float] | None) -> None:
        """End an evaluation; None: it was cut short, and what its beginning did is undone."""
        if not self.items:
            return
        if metrics is not None:
            known = {name: torch.tensor(value) for name, value in metrics.items()}
            self.trainer.callback_metrics = self.trainer.logged_metrics = known
            self._call("on_validation_epoch_end")
        self._call("on_validation_end")
        self.trainer.state.stage = "train"

    def end_training(self, epoch: int) -> None:
        """End the job."""
        if not self.items:
            return
        self.trainer.current_epoch = epoch
        for name in ("on_train_end", "on_fit_end"):
            self._call(name)
        self._call("teardown", "fit")

    def fail(self, error: BaseException) -> None:
        """Tell of what ends the job."""
        self._call("on_exception", error)

    def _call(self, name: str, *args: Any) -> None:
        for item in self.items:
            if name in self._hooks[id(item)]:
                getattr(item, name)(self.trainer, self.trainer.model, *args)
