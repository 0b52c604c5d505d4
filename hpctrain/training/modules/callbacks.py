"""Callbacks of a run: found, refused, saved with it, and called beside a hand-written task.

They are called before the module, in the order in which they were named: those of the config, those
that a script has brought, those of the module's `configure_callbacks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpctrain.config import Config
from hpctrain.errors import ConfigError
from hpctrain.training.model.registered_state import RegisteredState
from hpctrain.training.modules.lr_schedulers import Boundary
from hpctrain.training.modules.stand_in import TrainerStandIn
from hpctrain.training.position import Position, StopAt
from hpctrain.utils.text import did_you_mean

CALLED = frozenset(
    {
        *("setup", "teardown", "on_fit_start", "on_fit_end", "on_exception"),
        *("on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end"),
        *("on_train_batch_start", "on_train_batch_end"),
        *(
            f"on_{stage}_{when}"
            for stage in ("validation", "test", "predict")
            for when in ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end")
        ),
        *("on_before_backward", "on_after_backward"),
        *("on_before_optimizer_step", "on_before_zero_grad"),
        *("state_dict", "load_state_dict", "on_save_checkpoint", "on_load_checkpoint"),
    }
)
"""Hooks that are called, all that Lightning's `Callback` has but `NOT_CALLED`."""

NOT_CALLED = {
    "on_sanity_check_start": "one row of the validation data is tried before the first step",
    "on_sanity_check_end": "one row of the validation data is tried before the first step",
}
"""Hooks that are not called, and what happens in their place."""

KEYS = {
    "BackboneFinetuning": "two runs, the second with checkpoint.initialize_from: a run trains the "
    "same parameters all the time",
    "BaseFinetuning": "two runs, the second with checkpoint.initialize_from: a run trains the same "
    "parameters all the time",
    "BatchSizeFinder": "`python -m hpctrain check`, which checks whether a batch fits into memory",
    "Checkpoint": "[checkpoint]",
    "DeviceStatsMonitor": "nothing: the summary has device memory, metrics.jsonl the seconds",
    "EMAWeightAveraging": "training.ema_decay",
    "EarlyStopping": "[early_stopping]: monitor, mode, patience, min_delta",
    "GradientAccumulationScheduler": "data.micro_batch_size: the global batch is one for the "
    "whole run",
    "LearningRateFinder": "optimizer.lr: short runs with training.max_steps compare several",
    "LearningRateMonitor": "nothing: metrics.jsonl has lr in every line",
    "ModelCheckpoint": "[checkpoint]: keep_best, keep_best_count, keep_last, every_steps",
    "ModelPruning": "torch.nn.utils.prune, after the run",
    "ModelSummary": "nothing: the header has the size of the model",
    "OnExceptionCheckpoint": "nothing: the newest checkpoint is whole, whatever ends the job",
    "ProgressBar": "logging.progress",
    "RichModelSummary": "nothing: the header has the size of the model",
    "RichProgressBar": "logging.progress",
    "SpikeDetection": "nothing: a loss far above the last ones is reported in the log",
    "StochasticWeightAveraging": "training.ema_decay",
    "TQDMProgressBar": "logging.progress",
    "ThroughputMonitor": "nothing: metrics.jsonl has samples_per_second in every line",
    "Timer": "run.max_seconds",
    "WeightAveraging": "training.ema_decay",
}
"""What does the work of Lightning's own callbacks here, by their names."""

_LIGHTNING = ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks")
_FREE = ("Callback", "LambdaCallback", "BasePredictionWriter")


def build_callbacks(
    config: Config, targets: Sequence[Callable[..., Any]], brought: Sequence[Any]
) -> list[Any]:
    """Return the callbacks that the config names, and those that a script has brought.

    Args:
        config: whose `callbacks`.
        targets: what to call for each of them.
        brought: objects.

    Raises:
        ConfigError: if one refuses its arguments, or is none.
    """
    found = []
    for component, target in zip(config.callbacks, targets, strict=True):
        place = f'[[callbacks]] use = "{component.use}"'
        try:
            made = target(**component.arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{place} refuses its arguments: {error}") from error
        check_callback(made, place)
        found.append(made)
    for item in brought:
        check_callback(item, f"callbacks: {type(item).__name__}")
    return [*found, *brought]


def with_those_of_module(callbacks: Sequence[Any], module: object) -> list[Any]:
    """Return the callbacks, and those that a module brings, in place of others of their class.

    Raises:
        ConfigError: if one of them is none.
    """
    configure = getattr(module, "configure_callbacks", None)
    made = configure() if callable(configure) else ()
    own = list(made) if isinstance(made, list | tuple) else [made]
    for item in own:
        check_callback(item, f"{type(module).__name__}.configure_callbacks: {type(item).__name__}")
    kinds = {type(item) for item in own}
    return [*(item for item in callbacks if type(item) not in kinds), *own]


def check_callback(callback: Any, place: str) -> None:
    """Refuse what would never be called, and what has a key of its own.

    Args:
        callback: the object.
        place: where it was named, for the message.

    Raises:
        ConfigError: naming the way out.
    """
    if isinstance(callback, type):
        raise ConfigError(f"{place} is a class: bring an object of it, {callback.__name__}(...)")
    name = name_in_lightning(callback)
    if name is not None and name not in _FREE:
        instead = KEYS.get(name, "a callback of your own, which inherits from Callback")
        raise ConfigError(f"{place} is Lightning's {name}. What does its work here is {instead}")
    if name is not None or any(each not in NOT_CALLED for each in hooks_of(callback)):
        return
    kind = type(callback).__name__
    if strange := _named_as_hooks(callback):
        left = f"{strange[0]}, which is the name of no hook{did_you_mean(strange[0], CALLED)}"
    else:
        left = ", ".join(sorted(hooks_of(callback))) or "no method that is the name of a hook"
    raise ConfigError(
        f"{place}: {kind} has {left}, so that it would never be called: hooks are such as "
        "on_train_batch_end(self, trainer, module, outputs, batch, batch_idx)"
    )


def notes_of(callbacks: Sequence[Any]) -> list[str]:
    """Return what the header should say of them, and of hooks that are not called."""
    if not callbacks:
        return []
    notes = [f"callbacks: {', '.join(type(item).__name__ for item in callbacks)}"]
    for item in callbacks:
        said = {name: NOT_CALLED[name] for name in hooks_of(item) if name in NOT_CALLED}
        for name in _named_as_hooks(item):
            said[name] = "it is the name of no hook"
        kind = type(item).__name__
        notes += [f"callback {kind}: {name} is not called: {why}" for name, why in said.items()]
    return notes


def hooks_of(callback: Any) -> list[str]:
    """Return the hooks that a callback has itself."""
    return [name for name in (*CALLED, *NOT_CALLED) if has_hook(callback, name)]


def name_in_lightning(callback: Any) -> str | None:
    """Return the name of the class of Lightning's own that a callback is of; None if of none."""
    for kind in type(callback).__mro__:
        if kind.__module__.startswith(_LIGHTNING):
            return kind.__name__
    return None


def has_hook(callback: Any, name: str) -> bool:
    """Tell whether a callback has a method itself, not by the class that has all and does nothing.

    A class of Lightning's that does something, such as its writer of predictions, has its own.
    """
    if name in getattr(callback, "__dict__", {}):  # LambdaCallback has them so
        return callable(callback.__dict__[name])
    for kind in type(callback).__mro__:
        if name in vars(kind):
            is_base = kind.__module__.startswith(_LIGHTNING) and kind.__name__ == "Callback"
            return not is_base and callable(getattr(callback, name))
    return False


def _named_as_hooks(callback: Any) -> list[str]:
    """Return methods with a name like that of a hook, and none of them."""
    return [
        name
        for kind in type(callback).__mro__
        if not kind.__module__.startswith(_LIGHTNING)
        for name, value in vars(kind).items()
        if name.startswith("on_") and callable(value) and name not in {*CALLED, *NOT_CALLED}
    ]


class CallbackState:
    """What a callback knows, as a checkpoint holds it: by both of Lightning's ways.

    `state_dict` and `load_state_dict` are the callback's own; `on_save_checkpoint` and
    `on_load_checkpoint` get a dict of their own, in which are facts of the run.
    """

    def __init__(self, callback: Any, trainer: Any, module: nn.Module) -> None:
        """Ask and tell this callback.

        Args:
            callback: the object.
            trainer: that its hooks get.
            module: that its hooks get.
        """
        self._callback = callback
        self._trainer = trainer
        self._module = module

    def state_dict(self) -> dict[str, Any]:
        """Return what both ways give."""
        found: dict[str, Any] = {"facts": self._facts()}
        if has_hook(self._callback, "state_dict"):
            found["state"] = dict(self._callback.state_dict())
        if has_hook(self._callback, "on_save_checkpoint"):
            checkpoint = _OwnPart(self._facts())
            self._callback.on_save_checkpoint(self._trainer, self._module, checkpoint)
            found["saved"] = {k: item for k, item in checkpoint.items() if k not in found["facts"]}
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give both ways what they gave."""
        if has_hook(self._callback, "on_load_checkpoint"):
            checkpoint = _OwnPart({**state["facts"], **state.get("saved", {})})
            self._callback.on_load_checkpoint(self._trainer, self._module, checkpoint)
        if "state" in state and has_hook(self._callback, "load_state_dict"):
            self._callback.load_state_dict(state["state"])

    def _facts(self) -> dict[str, Any]:
        return {"epoch": self._trainer.current_epoch, "global_step": self._trainer.global_step}


class _OwnPart(dict[str, Any]):
    """What of a checkpoint a callback sees; the rest is named where it asks for it."""

    def __missing__(self, key: str) -> Any:
        raise KeyError(
            f"{key!r}: a callback sees its own part of a checkpoint here, and {', '.join(self)}; "
            "the weights are the module's own, pl_module.state_dict()"
        )


def register(
    callbacks: Sequence[Any], states: RegisteredState, trainer: Any, module: nn.Module
) -> None:
    """Have all that callbacks know saved with the run, each under its class and number."""
    numbers: dict[str, int] = {}
    ways = ("state_dict", "on_save_checkpoint")
    for item in callbacks:
        name = type(item).__qualname__
        number = numbers[name] = numbers.get(name, 0) + 1
        if any(has_hook(item, way) for way in ways):
            suffix = "" if number == 1 else f" {number}"
            states.add(f"callback {name}{suffix}", CallbackState(item, trainer, module))


TASK_HOOKS = frozenset(
    {
        *("setup", "teardown", "on_fit_start", "on_fit_end", "on_exception"),
        *("on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end"),
        "on_train_batch_end",
        *(
            f"on_{stage}_{when}"
            for stage in ("validation", "test", "predict")
            for when in ("start", "end", "epoch_start", "epoch_end")
        ),
        *("state_dict", "load_state_dict", "on_save_checkpoint", "on_load_checkpoint"),
    }
)
"""Hooks that are called beside a hand-written task; its batches are its own."""


_STAGE_NAMES = {"validate": "validation", "test": "test", "predict": "predict"}
"""What hooks of a stage are named after."""


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

    def notes(self, part: str = "") -> list[str]:
        """Return what the header should say of hooks that are not called.

        Args:
            part: of the names that are meant, such as "on_test_".
        """
        return [
            f"callback {type(item).__name__}: {name} is not called: beside a task of your own "
            "callbacks see its steps and evaluations, and not its batches"
            for item in self.items
            for name in sorted({*hooks_of(item)} & CALLED - TASK_HOOKS)
            if name.startswith(part)
        ]

    def set_up(self, stage: str = "fit") -> None:
        """Begin the job, before the model goes to its device."""
        if self.items:
            self.trainer.state.begin(stage)
        self._call("setup", stage)

    def check_stage(self, stage: str) -> list[str]:
        """Return what to say of hooks that a command for one stage does not call.

        Args:
            stage: "validate", "test" or "predict".

        Raises:
            ConfigError: if predictions are what one is there for, and it would get none.
        """
        notes = self.notes(f"on_{_STAGE_NAMES[stage]}_")
        if notes and stage == "predict":
            raise ConfigError(
                f"{notes[0]}: predictions are written to --output; a LightningModule's "
                "predict_step has such callbacks called"
            )
        return notes

    def begin_stage(self, stage: str) -> None:
        """Begin an evaluation, or predictions, that no training surrounds."""
        if self.items:
            self.trainer.state.stage = stage
            for when in ("start", "epoch_start"):
                self._call(f"on_{_STAGE_NAMES[stage]}_{when}")

    def end_stage(self, stage: str, metrics: Mapping[str, float]) -> None:
        """End it, and the job.

        Args:
            stage: "validate", "test" or "predict".
            metrics: of an evaluation.
        """
        if not self.items:
            return
        self._know(metrics)
        for when in ("epoch_end", "end"):
            self._call(f"on_{_STAGE_NAMES[stage]}_{when}")
        self._tear_down(stage)

    def _know(self, metrics: Mapping[str, float]) -> None:
        known = {name: torch.tensor(value) for name, value in metrics.items()}
        self.trainer.callback_metrics = self.trainer.logged_metrics = known

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
            self._know(metrics)
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
        self._tear_down("fit")

    def _tear_down(self, stage: str) -> None:
        self._call("teardown", stage)
        self.trainer.state.end()

    def fail(self, error: BaseException) -> None:
        """Tell of what ends the job."""
        self._call("on_exception", error)
        if self.items:
            self.trainer.state.end(failed=True)

    def _call(self, name: str, *args: Any) -> None:
        for item in self.items:
            if name in self._hooks[id(item)]:
                getattr(item, name)(self.trainer, self.trainer.model, *args)
