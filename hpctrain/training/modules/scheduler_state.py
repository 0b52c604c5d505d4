"""State of LR schedulers in a checkpoint, and how a run resumes from it.

Where the code makes the schedulers that it made when the checkpoint was saved, they come back as
they were, bit for bit. Where it makes others, theirs hold: hyperparameters come from the code. A
schedule of steps or epochs alone is then made up from its beginning to the place of the run; one
that follows a metric keeps what it has seen.
"""

from __future__ import annotations

import copy
import functools
import heapq
import inspect
import json
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hpctrain.checkpoint.state import UnsavableError, encode
from hpctrain.errors import CheckpointError
from hpctrain.training.modules.optimizers import Configured, SchedulerUse
from hpctrain.training.position import Position, StopAt
from hpctrain.utils.text import listed, metric

_OF_THE_CODE = "hpctrain: of the code"
_NESTED = "hpctrain: state of an object"
_DEEPEST = 16
_IN_CODE = (
    *(type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
    *(functools.partial, weakref.ReferenceType, Enum, Optimizer, nn.Module),
)
_FUNCTIONS = (types.FunctionType, functools.partial, types.MethodType)
_HOLDERS = (*_FUNCTIONS, LRScheduler)
_STATE = ("state_dict", "load_state_dict")
# What differs between two of one kind without being said by the code.
_COUNTS = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial")

_SAID = ("interval", "frequency", "monitor")

Tree = Any
"""What `hpctrain.checkpoint.state.encode` takes."""


class SchedulerStates:
    """The schedulers and learning rates of an optimizer, to be saved with a run.

    Attributes:
        place: where the run stands.
        notes: what the header should say of a change since the checkpoint.
    """

    def __init__(
        self,
        configured: Configured,
        stop_at: StopAt,
        step_scheduler: Callable[[Any, Any], None] | None = None,
    ) -> None:
        """Take note of how they were made, before the first step.

        Args:
            configured: the optimizer and its schedulers.
            stop_at: how long an epoch is.
            step_scheduler: a module's own way to step them; None: that of torch.
        """
        self.place = Position()
        self.notes: list[str] = []
        self._configured = configured
        self._stop_at = stop_at
        self._own_way = step_scheduler is not None
        self._groups = configured.optimizer.param_groups
        self._built_rates = _rates(self._groups)
        self._built = [_said(use, portable_state(use.scheduler)) for use in configured.uses]

    def state_dict(self) -> dict[str, Any]:
        """Return how they were made, and how they are now."""
        return {
            "place": self.place.to_json(),
            "built_rates": self._built_rates,
            "rates": _rates(self._groups),
            "built": self._built,
            "now": [portable_state(use.scheduler) for use in self._configured.uses],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; `notes` say what is not as it was.

        Raises:
            CheckpointError: if a scheduler refuses it.
        """
        self.place = Position(**state["place"])
        before = state["rates"]
        differences = _differences(state["built"], self._built)
        if not _same(state["built_rates"], self._built_rates):
            rates = [
                f"[{', '.join(metric(float(rate)) for rate in all_of_them)}]"
                for all_of_them in (state["built_rates"], self._built_rates)
            ]
            differences.insert(0, f"lr: {rates[0]} then, {rates[1]} now")
        if not differences:
            for use, now in zip(self._configured.uses, state["now"], strict=True):
                load_portable(use.scheduler, now)
            _set_rates(self._groups, before)
            return
        self._re_evaluate(state)
        now_first = float(self._groups[0]["lr"])
        self.notes.append(
            f"{self._configured.place} makes another schedule than when this was saved "
            f"({listed(differences)}): the new one holds; lr {metric(float(before[0]))} before and "
            f"{metric(now_first)} now"
        )

    def _re_evaluate(self, state: Mapping[str, Any]) -> None:
        """Bring the schedulers that the code makes today to the place of the run."""
        uses = self._configured.uses
        if not uses:
            return  # the rates that the code says are in the groups
        followers = [use for use in uses if use.reduce_on_plateau or self._own_way]
        pure = [use for use in uses if use not in followers]
        with _quietly():
            for use in _in_turn(
                [(calls_until(use, self.place, self._stop_at), use) for use in pure]
            ):
                use.scheduler.step()
        for index, use in enumerate(uses):
            if use in followers:
                self._go_on(index, use, state)

    def _go_on(self, index: int, use: SchedulerUse, state: Mapping[str, Any]) -> None:
        """Give a scheduler that follows a metric what it has seen, if it is of the same kind."""
        saved = state["built"][index] if index < len(state["built"]) else {}
        mine = self._built[index]
        alike = ("kind", "monitor")
        if any(saved.get(key) != mine[key] for key in alike):
            return
        if saved["state"].get("mode") != mine["state"].get("mode"):
            return
        built, now, live = saved["state"], state["now"][index], portable_state(use.scheduler)
        seen = {
            key: value
            for key, value in now.items()
            if key in live and not _same(value, built.get(key))
        }
        load_portable(use.scheduler, {**live, **seen})
        if len(state["rates"]) == len(self._groups):
            # So many falls as there were, from where the code begins today.
            _set_rates(
                self._groups,
                [
                    rate * (mine_first / first) if float(first) else mine_first
                    for rate, first, mine_first in zip(
                        state["rates"], state["built_rates"], self._built_rates, strict=True
                    )
                ],
            )


def calls_until(use: SchedulerUse, place: Position, stop_at: StopAt) -> int:
    """Return how often a scheduler that no metric decides about is stepped before a place."""
    if use.interval == "epoch":
        return place.epoch // use.frequency
    if use.frequency == 1:
        return place.step
    in_epoch = -(-place.position // stop_at.global_batch_size)
    return place.epoch * (stop_at.epoch_steps // use.frequency) + in_epoch // use.frequency


def portable_state(scheduler: Any) -> dict[str, Tree]:
    """Return a copy of what a scheduler knows, of kinds that a checkpoint can hold.

    Functions, the optimizer and what else comes with the code are left to the code; objects inside
    it that have a state of their own are asked for that.

    Raises:
        UnsavableError: naming what cannot be saved.
    """
    with _quietly():
        state = scheduler.state_dict()
    found = _portable(state, type(scheduler).__name__, 0)
    if not isinstance(found, dict):
        raise UnsavableError(f"state_dict of {type(scheduler).__name__} returns no dict")
    encode(found, type(scheduler).__name__, {})  # refuses what is left
    return found


def _portable(value: Any, name: str, depth: int) -> Tree:
    if depth > _DEEPEST:
        raise UnsavableError(f"{name}: more than {_DEEPEST} objects in one another")
    if isinstance(value, Mapping):
        return {key: _portable(item, f"{name}.{key}", depth + 1) for key, item in value.items()}
    if type(value) in (list, tuple):
        items = [_portable(item, f"{name}.{i}", depth + 1) for i, item in enumerate(value)]
        return type(value)(items)
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, _IN_CODE) or inspect.isroutine(value):
        return {_OF_THE_CODE: True}
    if all(callable(getattr(value, each, None)) for each in _STATE):
        with _quietly():
            inside = value.state_dict()
        return {_NESTED: _portable(inside, name, depth + 1)}
    return copy.deepcopy(value)


def load_portable(scheduler: Any, saved: Mapping[str, Tree]) -> None:
    """Have a scheduler, or an object inside one, go on from what was saved of it.

    Raises:
        CheckpointError: if it refuses that.
    """
    with _quietly():
        state = {
            key: _merged(item, saved[key]) if key in saved else item
            for key, item in scheduler.state_dict().items()
        }
        state |= {key: item for key, item in saved.items() if key not in state}
        try:
            scheduler.load_state_dict(state)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CheckpointError(
                f"{type(scheduler).__name__} refuses its state of the checkpoint: "
                f"{type(error).__name__}: {error}"
            ) from error


def _merged(live: Any, saved: Tree) -> Any:
    """Return a saved value, with what comes from the code in it."""
    if isinstance(saved, dict):
        if _OF_THE_CODE in saved:
            return live
        if _NESTED in saved:
            load_portable(live, saved[_NESTED])
            return live
        there = live if isinstance(live, Mapping) else {}
        merged = {key: _merged(there.get(key), item) for key, item in saved.items()}
        if not isinstance(live, dict) or type(live) is dict:
            return merged
        kept = copy.copy(live)  # MultiStepLR counts its milestones in a class of its own
        kept.clear()
        kept.update(merged)
        return kept
    if isinstance(saved, list | tuple) and isinstance(live, list | tuple):
        known = [*live, *[None] * (len(saved) - len(live))]
        return type(saved)(_merged(each, item) for each, item in zip(known, saved, strict=False))
    return saved


def _said(use: SchedulerUse, state: Mapping[str, Tree]) -> dict[str, Any]:
    """Return what the code says of a scheduler, and how it began."""
    kind = type(use.scheduler)
    return {
        "kind": f"{kind.__module__}.{kind.__qualname__}",
        "interval": use.interval,
        "frequency": use.frequency,
        "monitor": use.monitor,
        "state": dict(state),
        "functions": _functions(use.scheduler, 0),
    }


def _functions(value: Any, depth: int) -> Tree:
    """Return what shows whether the functions of a scheduler are those that they were.

    That is their names, and the numbers and texts in them: in their code, their closures and
    defaults. Two versions of Python compile them to other bytes.
    """
    if isinstance(value, bool | int | float | str):
        return value
    if depth > _DEEPEST:
        return None
    if isinstance(value, LRScheduler):
        value = {key: item for key, item in vars(value).items() if _holds(item)}
    if isinstance(value, _FUNCTIONS):
        return [_name(value), [_functions(item, depth + 1) for item in _in_function(value)]]
    if isinstance(value, Mapping):
        return [[str(key), _functions(item, depth + 1)] for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_functions(item, depth + 1) for item in value]
    return type(value).__qualname__


def _in_function(function: Any) -> Sequence[Any]:
    """Return what a function computes with."""
    if isinstance(function, functools.partial):
        return [function.func, list(function.args), function.keywords]
    if isinstance(function, types.MethodType):
        return []
    try:
        enclosed = inspect.getclosurevars(function).nonlocals
    except ValueError:  # a name that is bound later
        enclosed = {}
    constants = function.__code__.co_consts
    return [constants, enclosed, function.__defaults__, function.__kwdefaults__]


def _name(function: Any) -> str:
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


def _holds(item: Any) -> bool:
    """Tell whether an attribute of a scheduler is a function, or has some in it."""
    items = item if isinstance(item, list) else [item]
    return any(isinstance(one, _HOLDERS) for one in items)


def _differences(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return in words what the code says otherwise than it did."""
    if [each["kind"] for each in then] != [each["kind"] for each in now]:
        kinds = [
            ", ".join(each["kind"].rpartition(".")[2] for each in all_of_them) or "none"
            for all_of_them in (then, now)
        ]
        return [f"{kinds[0]} then, {kinds[1]} now"]
    found = []
    for before, after in zip(then, now, strict=True):
        name = after["kind"].rpartition(".")[2]
        pairs = [(key, before[key], after[key]) for key in _SAID]
        states = before["state"], after["state"]
        keys = [key for key in states[1] if key not in _COUNTS]
        pairs += [(key, states[0].get(key), states[1][key]) for key in keys]
        found += [
            f"{name}.{key}: {_shown(old)} then, {_shown(new)} now"
            for key, old, new in pairs
            if not _same(old, new)
        ]
        if not _same(before["functions"], after["functions"]):
            found.append(f"{name}: its functions are others, or compute with other numbers")
    return found


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _same(first: Tree, second: Tree) -> bool:
    return _print(first) == _print(second)


def _print(value: Tree) -> str:
    tensors: dict[str, Tensor] = {}
    encoded = encode(value, "", tensors)
    return json.dumps([encoded, [(name, item.tolist()) for name, item in tensors.items()]])


def _rates(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [
        rate.detach().clone() if isinstance(rate := group["lr"], Tensor) else rate
        for group in groups
    ]


def _set_rates(groups: Sequence[dict[str, Any]], rates: Sequence[Any]) -> None:
    for group, rate in zip(groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(float(rate))
        else:
            group["lr"] = rate


def _in_turn(counts: Sequence[tuple[int, SchedulerUse]]) -> Iterator[SchedulerUse]:
    """Yield each so often as is said, spread evenly."""
    times = [_moments(index, count) for index, (count, _) in enumerate(counts)]
    for _, index in heapq.merge(*times):
        yield counts[index][1]


def _moments(index: int, count: int) -> Iterator[tuple[float, int]]:
    return (((call + 1) / count, index) for call in range(count))


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch's advice to itself: it is for loops that are written by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
