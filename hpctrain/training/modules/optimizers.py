"""`configure_optimizers`: which returns are understood, and which parameters a run trains.

The forms, their names and defaults are those of Lightning's `LRSchedulerConfig`, so that callbacks
and modules find what they know.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from hpctrain.checkpoint.state import HasParameters
from hpctrain.errors import ConfigError
from hpctrain.training.modules.overrides import is_own, place_of
from hpctrain.training.optim.ema import begin_training
from hpctrain.training.optim.optimizer import (
    make_fused,
    prepare_momentum,
    refuse_closure,
    refuse_unknown_kernels,
)
from hpctrain.training.optim.trial import TriedOptimizer, try_optimizer
from hpctrain.utils.text import listed, plural

if TYPE_CHECKING:  # torch takes its time to load what only sharded runs need
    from collections.abc import Iterator

    from hpctrain.training.parallel.fsdp import ShardedModel
from hpctrain.errors import TrainingError

_FUSED_AS_THEY_ARE = (SGD, Adagrad, Adam, AdamW)


@dataclass(slots=True, kw_only=True)
class SchedulerUse:
    """An LR scheduler, and when it is stepped; the fields of Lightning's `LRSchedulerConfig`.

    Attributes:
        scheduler: of torch, or one that follows its interface.
        name: that its learning rates are logged under.
        interval: "step" or "epoch": what its steps are counted in.
        frequency: of these, so many pass from one of its steps to the next.
        reduce_on_plateau: whether it is given the value of `monitor`, after the evaluation.
        monitor: name of a metric.
        strict: whether it is an error that there is no such metric.
    """

    scheduler: Any
    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured:
    """What `configure_optimizers` has returned, in one form.

    Attributes:
        optimizer: the one optimizer.
        uses: its LR schedulers, in the order in which they are stepped.
        notes: what the header should say of it.
        place: of the method, for messages: file, line and class.
        trained: sees that the parameters stay the same.
    """

    optimizer: Optimizer
    uses: Sequence[SchedulerUse] = ()
    notes: Sequence[str] = ()
    place: str = "configure_optimizers"
    trained: Trained | None = None


def configure(module: Any, model: nn.Module, sharded: ShardedModel | None = None) -> Configured:
    """Return the optimizer that a module makes, ready for its first step, and its schedulers.

    Under FSDP the module sees this rank's rows in the place of its parameters meanwhile, so that
    the optimizer is made of these, with all that its class prepares for them.

    Args:
        module: has `configure_optimizers`.
        model: whose parameters it trains, on the device and in the dtype of the run.
        sharded: the model where its parameters are spread over the ranks.

    Raises:
        ConfigError: if what it returns is none of the known forms, several optimizers or one that
            steps by itself, or trains what is no parameter of the model.
    """
    method = "configure_optimizers"
    place = f"{place_of(module, method)}, {type(module).__name__}.{method}"
    held: HasParameters = model if sharded is None else sharded
    with nullcontext() if sharded is None else rows_in_place(model, sharded):
        returned = module.configure_optimizers()
    found = parse(returned, module, place)
    optimizer = found.optimizer
    settled = settle_parameters(optimizer, held, place, spread=sharded is not None)
    notes = [_described_optimizer(found), *found.notes, *settled]
    refuse_closure(optimizer, place)
    refuse_unknown_kernels(optimizer, f"{place}: fused=True")
    if isinstance(optimizer, _FUSED_AS_THEY_ARE):
        make_fused(optimizer)
    prepare_momentum(optimizer, f"{place}: fused=True")
    begin_training(optimizer)
    # torch warns of a scheduler that is stepped before the optimizer, also where a step whose
    # gradient was not finite was left out. Here the order is the loop's.
    optimizer._opt_called = True  # type: ignore[attr-defined]
    return replace(found, notes=notes, trained=Trained(model, optimizer, place))


def _described_optimizer(found: Configured) -> str:
    """Return what the header says of an optimizer and its schedulers."""
    groups = found.optimizer.param_groups
    parts = [type(found.optimizer).__name__]
    if len(groups) > 1:
        parts.append(f"{len(groups)} groups of parameters")
    for use in found.uses:
        often = use.interval if use.frequency == 1 else f"{use.frequency} {use.interval}s"
        by = f" by {use.monitor}" if use.reduce_on_plateau else ""
        parts.append(f"{type(use.scheduler).__name__} every {often}{by}")
    return f"configure_optimizers: {', '.join(parts)}"


def tried(
    configured: Configured, held: HasParameters, *, rows: bool, ranks: int
) -> TriedOptimizer | None:
    """Try an optimizer on stand-ins of its parameters, see `try_optimizer`.

    Args:
        configured: the optimizer and its schedulers, as `configure` returns them.
        held: the model, or what this rank holds of it.
        rows: whether that is some rows of each parameter.
        ranks: that take the same steps.

    Raises:
        ConfigError: if it cannot be used or saved, or does not read what its schedulers set.
    """
    optimizer = configured.optimizer
    groups = {
        item: number
        for number, group in enumerate(optimizer.param_groups)
        for item in group["params"]
    }
    shown = try_optimizer(
        partial(_copy_of, optimizer, {item: name for name, item in held.named_parameters()}),
        held,
        lambda name, item: groups.get(item),
        rows=rows,
        ranks=ranks,
        place=configured.place,
    )
    if shown is not None and configured.uses:
        shown.check_rates(f"{configured.place}: {type(configured.uses[0].scheduler).__name__}")
    return shown


def _copy_of(optimizer: Optimizer, names: Mapping[Any, str], stand_ins: HasParameters) -> Optimizer:
    """Return an optimizer of stand-ins of the parameters, with the values that another has.

    Raises:
        ConfigError: if its class does not take them, as those of torch do.
    """
    made_of = dict(stand_ins.named_parameters())
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        chosen = [made_of[names[item]] for item in group["params"] if names[item] in made_of]
        if chosen:
            values = {key: item for key, item in group.items() if key != "params"}
            groups.append({**copy.deepcopy(values), "params": chosen})
    kind: Any = type(optimizer)
    known = inspect.signature(kind).parameters
    arguments = {key: item for key, item in optimizer.defaults.items() if key in known}
    try:
        made: Optimizer = kind(groups, **arguments)
    except Exception as error:
        raise ConfigError(f"{kind.__name__} cannot be built again: {error}") from error
    for key, item in vars(optimizer).items():
        if isinstance(item, bool | int | float | str) or item is None:
            setattr(made, key, item)  # what the constructor was given, and no group has
    prepare_momentum(made)
    begin_training(made)
    return made


def parse(returned: object, module: object, place: str) -> Configured:
    """Bring what `configure_optimizers` has returned into one form.

    Args:
        returned: by it.
        module: may have `lr_scheduler_step`, for schedulers that follow no interface of torch.
        place: of the method, for messages.

    Raises:
        ConfigError: if it is none of the known forms, or says what cannot be.
    """
    if returned is None:
        raise ConfigError(
            f"{place} returned None, so that nothing would be trained: return an optimizer. A loop "
            "of your own, with hpctrain.connect, is free to have none"
        )
    notes: list[str] = []
    optimizers, schedulers, monitor = _parts(returned, place, notes)
    if len(optimizers) != 1:
        raise ConfigError(
            f"{place} returned {plural(len(optimizers), 'optimizer')}: a step makes one update, "
            "and which of them is it? A loop of your own has as many as it likes: "
            "hpctrain.connect, world.setup, see docs/own-code.md"
        )
    (optimizer,) = optimizers
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"{place} returned a {type(optimizer).__name__}, which is not a torch.optim.Optimizer"
        )
    uses = [_use(each, monitor, place, notes) for each in schedulers]
    for use in uses:
        _check_scheduler(use, optimizer, module, place)
    return Configured(optimizer=optimizer, uses=uses, notes=notes, place=place)


_Parts = tuple[list[Any], list[Any], str | None]


def _parts(returned: object, place: str, notes: list[str]) -> _Parts:
    """Return optimizers, schedulers and the one `monitor` of what was returned."""
    if isinstance(returned, Optimizer):
        return [returned], [], None
    if isinstance(returned, Mapping):
        return _of_dicts([returned], place, notes)
    if isinstance(returned, list | tuple):
        items = list(returned)
        if len(items) == 2 and isinstance(items[0], list) and _are_optimizers(items[0]):
            schedulers = items[1] if isinstance(items[1], list | tuple) else [items[1]]
            return items[0], list(schedulers), None
        if items and all(isinstance(item, Mapping) for item in items):
            return _of_dicts(items, place, notes)
        if _are_optimizers(items):
            return items, [], None
    raise ConfigError(
        f"{place} returned {_described(returned)}: it returns an optimizer, [optimizer], "
        '([optimizer], [scheduler]), or {"optimizer": optimizer, "lr_scheduler": scheduler or '
        '{"scheduler": scheduler, "interval": "step", ...}}'
    )


def _of_dicts(items: Sequence[Mapping[str, Any]], place: str, notes: list[str]) -> _Parts:
    optimizers, schedulers = [], []
    for item in items:
        if "optimizer" not in item:
            raise ConfigError(f'{place} returned a dict without "optimizer": {sorted(item)}')
        _note_unknown(item, {"optimizer", "lr_scheduler", "monitor"}, place, notes)
        optimizers.append(item["optimizer"])
        if item.get("lr_scheduler") is not None:
            schedulers.append(item["lr_scheduler"])
    monitor = items[0].get("monitor") if len(items) == 1 else None
    return optimizers, schedulers, monitor


def _are_optimizers(items: object) -> bool:
    return isinstance(items, list) and all(isinstance(item, Optimizer) for item in items)


def _described(returned: object) -> str:
    if isinstance(returned, list | tuple):
        inside = ", ".join(type(item).__name__ for item in returned)
        return f"a {type(returned).__name__} of {inside or 'nothing'}"
    return f"a {type(returned).__name__}"


_KEYS = {item.name for item in fields(SchedulerUse)}


def _use(scheduler: Any, monitor: str | None, place: str, notes: list[str]) -> SchedulerUse:
    """Return a scheduler and when it is stepped, from an object or a dict."""
    if not isinstance(scheduler, Mapping):
        on_plateau = isinstance(scheduler, ReduceLROnPlateau)
        return SchedulerUse(
            scheduler=scheduler,
            reduce_on_plateau=on_plateau,
            monitor=monitor if on_plateau else None,
        )
    if "scheduler" not in scheduler:
        raise ConfigError(f'{place}: "lr_scheduler" has no key "scheduler": {sorted(scheduler)}')
    _note_unknown(scheduler, _KEYS, place, notes)
    use = SchedulerUse(**{key: value for key, value in scheduler.items() if key in _KEYS})
    if "reduce_on_plateau" not in scheduler:
        use.reduce_on_plateau = isinstance(use.scheduler, ReduceLROnPlateau)
    if use.interval == "epoch" and isinstance(use.scheduler, OneCycleLR):
        notes.append(
            f'{place}: OneCycleLR is stepped once an epoch; a cycle of steps has interval="step"'
        )
    if use.interval == "step" and use.reduce_on_plateau:
        notes.append(
            f"{place}: {type(use.scheduler).__name__} is stepped every step by {use.monitor}: of "
            "what steps log the newest value is that of a log step, see logging.every_steps"
        )
    return use


def _note_unknown(
    given: Mapping[str, Any], known: Iterable[str], place: str, notes: list[str]
) -> None:
    """Say which keys are not looked at: Lightning warns of them, and goes on."""
    if unknown := sorted(str(key) for key in given.keys() - set(known)):
        notes.append(f"{place}: {listed(unknown)} not known here, nor in Lightning, and not used")


def _check_scheduler(use: SchedulerUse, optimizer: Optimizer, module: object, place: str) -> None:
    """Refuse what could not be stepped, or not be saved.

    Raises:
        ConfigError: naming the method.
    """
    name = type(use.scheduler).__name__
    if use.interval not in ("step", "epoch"):
        raise ConfigError(f'{place}: interval={use.interval!r}: expected "step" or "epoch"')
    if not isinstance(use.frequency, int) or use.frequency < 1:
        raise ConfigError(f"{place}: frequency={use.frequency!r}: expected a number from 1")
    if use.reduce_on_plateau and use.monitor is None:
        raise ConfigError(
            f'{place}: {name} needs the name of a metric: {{"scheduler": scheduler, '
            '"monitor": "val_loss"}'
        )
    if not all(callable(getattr(use.scheduler, each, None)) for each in _STATE):
        raise ConfigError(
            f"{place}: the scheduler {name} has no {' and '.join(_STATE)}: no checkpoint could "
            "hold where it stands"
        )
    if not isinstance(use.scheduler, LRScheduler) and not is_own(module, "lr_scheduler_step"):
        raise ConfigError(
            f"{place}: {name} is not one of torch's LR schedulers: say in "
            "lr_scheduler_step(self, scheduler, metric) how it is stepped"
        )
    if getattr(use.scheduler, "optimizer", None) is not optimizer:
        raise ConfigError(f"{place}: {name} is of another optimizer than the one that is returned")


_STATE = ("state_dict", "load_state_dict")


@contextmanager
def rows_in_place(model: nn.Module, sharded: ShardedModel) -> Iterator[None]:
    """Have this rank's rows in the model in the body, where its parameters are otherwise."""
    rows = dict(sharded.named_parameters())
    # Those that are held once and stand at several places have the name of the first.
    names = {id(item): name for name, item in _plain_named(model, sharded)}
    spread = [
        (module, key, item)
        for module in model.modules()
        for key, item in module._parameters.items()
        if item is not None
    ]
    try:
        for module, key, item in spread:
            module._parameters[key] = rows[names[id(item)]]
        yield
    finally:
        for module, key, item in spread:
            module._parameters[key] = item


def _plain_named(model: nn.Module, sharded: ShardedModel) -> Iterable[tuple[str, nn.Parameter]]:
    """Return the parameters of the model, under the names that their rows have."""
    names = [name for name, _ in sharded.named_parameters()]
    return zip(names, model.parameters(), strict=True)


def settle_parameters(
    optimizer: Optimizer, held: HasParameters, place: str, *, spread: bool
) -> list[str]:
    """Compare what an optimizer updates with what a model trains; what it leaves out is frozen.

    Else that would get gradients, which count in their norm, and nobody would use them.

    Args:
        optimizer: before its first step.
        held: the model, or what this rank holds of it.
        place: where the optimizer comes from, for messages.
        spread: whether `held` is rows, of which it is settled what is trained.

    Returns:
        What the header should say of it.

    Raises:
        ConfigError: if it updates what is no parameter of the model, or leaves out rows.
    """
    names: dict[Any, str] = {item: name for name, item in held.named_parameters()}
    given = [item for group in optimizer.param_groups for item in group["params"]]
    if strange := [str(tuple(item.shape)) for item in given if item not in names]:
        raise ConfigError(
            f"{place}: the optimizer updates {plural(len(strange), 'tensor')} of shape "
            f"{listed(strange, 3)} that no attribute of the module holds as a parameter: no "
            "checkpoint would hold them. Make it a parameter of the module; and take parameters "
            "from the module in this very method, since those that were put aside in __init__ may "
            "be others by now"
        )
    if not any(item.requires_grad for item in given):
        raise ConfigError(f"{place}: no parameter of the optimizer requires a gradient")
    updated = set(given)
    left_out = [item for item in names if item.requires_grad and item not in updated]
    if not left_out:
        return []
    which = listed([names[item] for item in left_out], 3)
    if spread:
        raise ConfigError(
            f"{place}: the optimizer leaves out {which}: with parameters that are spread over "
            "ranks these have to be frozen before, by requires_grad_(False) where the module is "
            "built; with ddp that is done here"
        )
    for item in left_out:
        item.requires_grad_(False)
    return [f"{place}: the optimizer leaves out {which}: they are frozen"]


class Trained:
    """Sees that a run trains the same parameters all the time.

    Ranks reduce the gradients that there were in the beginning. One that is trained later on would
    have another gradient on each of them, and on one rank the sum of all its gradients so far.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, place: str) -> None:
        """Take note of what is trained.

        Args:
            model: whose parameters.
            optimizer: that updates them.
            place: where it comes from, for messages.
        """
        self._model = model
        self._optimizer = optimizer
        self._place = place
        self._frozen = {name for name, item in model.named_parameters() if not item.requires_grad}
        self._groups = [len(group["params"]) for group in optimizer.param_groups]

    def check(self) -> None:
        """Compare that with what is trained now.

        Raises:
            TrainingError: naming what has changed.
        """
        names = {name for name, item in self._model.named_parameters() if not item.requires_grad}
        way_out = (
            "A run trains the same parameters from its beginning to its end: let them have a group "
            "with a learning rate of 0 meanwhile, or train in two runs, the second with "
            "checkpoint.initialize_from"
        )
        if changed := sorted(names ^ self._frozen):
            now = "frozen" if changed[0] in names else "no longer frozen"
            raise TrainingError(
                f"{listed(changed, 3)}: {now} since the run began, by a hook or a callback. "
                f"{way_out}"
            )
        if [len(group["params"]) for group in self._optimizer.param_groups] != self._groups:
            raise TrainingError(
                f"{self._place}: the optimizer has other groups of parameters than when it was "
                f"made, by a hook or a callback. {way_out}"
            )
