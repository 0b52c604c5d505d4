"""Hooks of a module and of callbacks: called, refused at start, or saved (`on_save_checkpoint`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from hpctrain.checkpoint.state import UnsavableError
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.training.modules.callbacks import CALLED, has_hook
from hpctrain.training.modules.log import Logs
from hpctrain.training.modules.overrides import is_base, is_own, place_of
from hpctrain.training.modules.stand_in import TrainerStandIn
from hpctrain.utils.text import did_you_mean

_OWN_LOOP = (
    "A step here is one optimizer's, over all ranks, by its own order; what a loop has to do "
    "otherwise is an own loop: docs/own-code.md, hpctrain.connect"
)

_OF_LIGHTNING_1 = "A module keeps what it needs of its steps, and uses it in"

REFUSED = {
    "optimizer_step": _OWN_LOOP,
    "optimizer_zero_grad": _OWN_LOOP,
    "backward": _OWN_LOOP,
    "configure_gradient_clipping": (
        "Gradients are clipped by training.clip_norm and training.clip_value"
    ),
    "configure_sharded_model": "Build the model in configure_model",
    "training_epoch_end": f"{_OF_LIGHTNING_1} on_train_epoch_end",
    "validation_epoch_end": f"{_OF_LIGHTNING_1} on_validation_epoch_end",
    "test_epoch_end": f"{_OF_LIGHTNING_1} on_test_epoch_end",
}
"""Methods of a module that are not called, and the way out."""

_OF_MODULES = frozenset(
    {
        *("on_before_batch_transfer", "on_after_batch_transfer"),
        *(
            f"on_{stage}_model_{what}"
            for stage in ("validation", "test", "predict")
            for what in ("zero_grad", "eval", "train")
        ),
    }
)
"""Hooks that modules have and callbacks have not."""


class Hooks:
    """Calls a hook of the callbacks, in their order, and then of the module.

    Attributes:
        callbacks: objects with Lightning's names for hooks.
        trial: whether what runs is put back afterwards: callbacks are then left out, since what
            they do is done, in files and in themselves.
    """

    def __init__(self, module: nn.Module, trainer: TrainerStandIn, logs: Logs) -> None:
        self._module = module
        self._trainer = trainer
        self._logs = logs
        self.callbacks: Sequence[Any] = ()
        self.trial = False
        self._known: dict[str, tuple[list[Callable[..., Any]], Callable[..., Any] | None]] = {}

    def set_callbacks(self, callbacks: Sequence[Any]) -> None:
        """Have the hooks of these called, too, before the module's."""
        self.callbacks = self._trainer.callbacks = list(callbacks)
        self._known.clear()
        for each in self.callbacks:
            for name in ("log", "log_dict"):  # as Lightning gives them the module's
                if not hasattr(each, name):
                    with suppress(AttributeError):  # one with slots has no place for it
                        setattr(each, name, getattr(self._logs, name))

    def has(self, name: str) -> bool:
        """Tell whether anybody has a hook of this name."""
        of_callbacks, of_module = self._known.get(name) or self._find(name)
        return of_module is not None or bool(of_callbacks and not self.trial)

    def call(self, name: str, *args: Any) -> Any:
        """Call a hook, and return what the module's own returns."""
        of_callbacks, of_module = self._known.get(name) or self._find(name)
        if not of_callbacks and of_module is None:
            return None
        logs = self._logs
        before, logs.fx = logs.fx, name
        try:
            if not self.trial:
                for hook in of_callbacks:
                    hook(self._trainer, self._module, *args)
            return None if of_module is None else of_module(*args)
        finally:
            logs.fx = before

    def call_callbacks(self, name: str, *args: Any) -> None:
        """Call a hook of the callbacks alone, whatever is tried."""
        of_callbacks, _ = self._known.get(name) or self._find(name)
        for hook in of_callbacks:
            hook(self._trainer, self._module, *args)

    def _find(self, name: str) -> tuple[list[Callable[..., Any]], Callable[..., Any] | None]:
        """Look a hook up, once: steps ask for a dozen of them."""
        of_module = getattr(self._module, name) if is_own(self._module, name) else None
        of_callbacks = [getattr(each, name) for each in self.callbacks if has_hook(each, name)]
        found = self._known[name] = of_callbacks, of_module
        return found


def refuse_unknown_ways(module: nn.Module) -> None:
    """Refuse what a module does that a step over ranks cannot do.

    Raises:
        ConfigError: naming the method, its place and the way out.
    """
    kind = type(module).__name__
    if getattr(module, "automatic_optimization", True) is False:
        raise ConfigError(
            f"model.use: {kind} sets automatic_optimization = False "
            f"({place_of(module, 'training_step')}): manual optimization is an own loop: "
            "docs/own-code.md, hpctrain.connect"
        )
    for name, way in REFUSED.items():
        if is_own(module, name):
            raise ConfigError(
                f"model.use: {kind}.{name} ({place_of(module, name)}) is not called here. {way}"
            )
    takes = inspect.signature(module.training_step).parameters  # type: ignore[arg-type]
    if "dataloader_iter" in takes:
        raise ConfigError(
            f"model.use: {kind}.training_step ({place_of(module, 'training_step')}) takes a "
            "dataloader_iter: batches come one by one here, in the one order of the data. Take "
            "(batch, batch_idx)"
        )
    _refuse_further_arguments(module, list(takes.values()))


def _refuse_further_arguments(module: nn.Module, takes: Sequence[inspect.Parameter]) -> None:
    """Refuse a `training_step` that waits for what Lightning 1 gave it."""
    ways = {"optimizer_idx": "several optimizers are", "hiddens": "what is carried over batches is"}
    is_named = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for item in takes[2:]:
        if item.default is inspect.Parameter.empty and item.kind not in is_named:
            way = ways.get(item.name, "what needs more is")
            raise ConfigError(
                f"model.use: {type(module).__name__}.training_step "
                f"({place_of(module, 'training_step')}) takes {item.name}, which nobody gives it: "
                f"a step gets (batch, batch_idx), and {way} an own loop: docs/own-code.md, "
                "hpctrain.connect"
            )


def notes_of_module(module: nn.Module) -> list[str]:
    """Return what the header should say of methods that only look like hooks."""
    known = CALLED | _OF_MODULES
    strange = {
        name
        for kind in type(module).__mro__
        if not is_base(kind)
        for name, value in vars(kind).items()
        if name.startswith("on_") and inspect.isfunction(value) and name not in known
    }
    kind, notes = type(module).__name__, []
    for name in sorted(strange):
        of_training = f"on_train_{name.removeprefix('on_')}"  # as Lightning 1 had it of all stages
        meant = [of_training] if of_training in known else sorted(known)
        notes.append(
            f"{kind}.{name} ({place_of(module, name)}) is not called: it is the name of no hook"
            f"{did_you_mean(name, meant)}"
        )
    return notes


def no_leaving(module: nn.Module) -> str:
    """Return why a hook cannot end an epoch, and what can."""
    return (
        f"{type(module).__name__}.on_train_batch_start ({place_of(module, 'on_train_batch_start')})"
        " returned -1, to leave the rest of the epoch out: an epoch is all of its samples. For "
        "fewer set training.limit_train_batches; an own loop (docs/own-code.md) may leave any time"
    )


def check_loaders(module: nn.Module, step: str, loaders: int) -> None:
    """See that a step takes the number of its loader where there are several, as Lightning does.

    Args:
        module: whose step.
        step: such as "validation_step".
        loaders: that it gets batches of.

    Raises:
        ConfigError: naming the method, its place and the way out.
    """
    hooks = [f"on_{step.removesuffix('_step')}_batch_{when}" for when in ("start", "end")]
    for name in (step, *(hook for hook in hooks if is_own(module, hook))):
        if not is_own(module, name):
            continue
        takes = inspect.signature(getattr(module, name)).parameters
        number = takes.get("dataloader_idx")
        varies = any(item.kind is inspect.Parameter.VAR_POSITIONAL for item in takes.values())
        where = f"{type(module).__name__}.{name} ({place_of(module, name)})"
        if loaders > 1 and number is None and not varies:
            raise ConfigError(
                f"model.use: there are {loaders} loaders for {step}, and {where} has no argument "
                "dataloader_idx to tell them apart: add dataloader_idx=0"
            )
        if loaders == 1 and number is not None and number.default is inspect.Parameter.empty:
            raise ConfigError(
                f"model.use: there is one loader for {step}, and {where} asks for its number: "
                "leave the argument out, or write dataloader_idx=0"
            )


SAVES, LOADS = "on_save_checkpoint", "on_load_checkpoint"


OWN_STATE = "checkpoint_of_module"
"""Its name among what is saved with a run."""


class OwnState:
    """Saved with a run: whatever a module adds to its checkpoint, tensors and what JSON has."""

    def __init__(self, module: nn.Module, trainer: TrainerStandIn) -> None:
        self._module = module
        self._trainer = trainer

    @staticmethod
    def is_of(module: nn.Module) -> bool:
        """Tell whether a module adds something."""
        return is_own(module, SAVES) or is_own(module, LOADS)

    def state_dict(self) -> dict[str, Any]:
        """Return what `on_save_checkpoint` adds.

        Raises:
            UnsavableError: if it changes which tensors of the model are saved.
        """
        checkpoint = self._facts()
        if is_own(self._module, SAVES):
            given = dict(checkpoint["state_dict"])
            self._module.on_save_checkpoint(checkpoint)  # type: ignore[operator]
            if not _same(given, checkpoint.get("state_dict")):
                raise UnsavableError(self._refused(SAVES))
        return {key: item for key, item in checkpoint.items() if key not in self._facts()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give `on_load_checkpoint` what was added; the model has its tensors by then.

        Raises:
            CheckpointError: if it changes tensors on their way into the model.
        """
        checkpoint = {**self._facts(), **state}
        if is_own(self._module, LOADS):
            given = dict(checkpoint["state_dict"])
            self._module.on_load_checkpoint(checkpoint)  # type: ignore[operator]
            if not _same(given, checkpoint.get("state_dict")):
                raise CheckpointError(self._refused(LOADS))

    def _facts(self) -> dict[str, Any]:
        return {
            "epoch": self._trainer.current_epoch,
            "global_step": self._trainer.global_step,
            "state_dict": dict(self._module.state_dict()),
        }

    def _refused(self, method: str) -> str:
        return (
            f"{type(self._module).__name__}.{method} ({place_of(self._module, method)}) changes "
            'checkpoint["state_dict"]: a checkpoint holds the tensors of the model as they are. '
            "Leave a part of it out by register_buffer(..., persistent=False), and rename by "
            "checkpoint.initialize_names"
        )


def _same(given: Mapping[str, Any], now: Any) -> bool:
    return (
        isinstance(now, Mapping)
        and given.keys() == now.keys()
        and all(now[name] is item for name, item in given.items())
    )
