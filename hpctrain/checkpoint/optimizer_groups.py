"""What an optimizer has learned and keeps in its groups of parameters, such as a step size."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hpctrain.checkpoint.tree import Json, UnsavableError, assign, decode, encode
from hpctrain.errors import CheckpointError

OWN = "optimizer-own/"
"""Begins the names of tensors of an optimizer that belong to no parameter."""

Facts = Callable[[Tensor], Mapping[str, Json]]
Place = Callable[[Tensor, Mapping[str, Json]], Tensor]

# Set before each step, or what a group consists of.
_NOT_LEARNED = {"params", "param_names", "lr", "lr_factor", "initial_lr"}


class LearnedGroups:
    """Values of an optimizer's groups that no config gives: what it has found out.

    Arguments of its class come from the config, unless the optimizer itself changes one: that is
    saved too, and counts as long as the config gives what it gave before. All else is learned, if
    the optimizer changes any of it; if not, it is what the code that built the optimizer says.

    Attributes:
        arguments: names that the class takes when it is built.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Take note of how an optimizer was built, before its first step."""
        self.arguments = constructor_arguments(type(optimizer))
        self._optimizer = optimizer
        self._built = [
            {key: _BuiltValue.of(value) for key, value in group.items() if key not in _NOT_LEARNED}
            for group in optimizer.param_groups
        ]

    def capture(
        self, names: Mapping[Tensor, str], tensors: dict[str, Tensor], facts: Facts
    ) -> list[Json]:
        """Return what each group has learned, as JSON.

        Args:
            names: of the parameters.
            tensors: takes those among the values.
            facts: see `encode`.

        Raises:
            UnsavableError: naming what a checkpoint cannot hold.
        """
        learns = any(
            key not in self.arguments and not self._is_as_built(index, key, value)
            for index, group in enumerate(self._optimizer.param_groups)
            for key, value in group.items()
            if key not in _NOT_LEARNED
        )
        return [
            self._capture(index, names, tensors, facts, learns=learns)
            for index in range(len(self._optimizer.param_groups))
        ]

    def _capture(
        self,
        index: int,
        names: Mapping[Tensor, str],
        tensors: dict[str, Tensor],
        facts: Facts,
        *,
        learns: bool,
    ) -> Json:
        """Return the values of a group; unless it `learns` at all, constants of the user's own."""
        group = self._optimizer.param_groups[index]
        learned, changed = {}, {}
        for key, value in group.items():
            is_argument, first = key in self.arguments, self._first(index, key)
            if key in _NOT_LEARNED or not (is_argument or learns):
                continue
            is_as_built = self._is_as_built(index, key, value)
            if is_as_built and (is_argument or not first.savable):
                continue
            where = f"{OWN}param_groups.{index}.{key}"
            now = encode(value, where, tensors, facts)
            if is_argument and first.savable:
                changed[key] = [encode(first.again(), f"{where}.built", tensors), now]
            else:
                learned[key] = now
        if not learned and not changed:
            return {"parameters": [], "learned": {}, "arguments": {}}
        if any(item not in names for item in group["params"]):
            raise UnsavableError("a group holds a tensor that is not a model's parameter")
        members = [names[item] for item in group["params"]]
        return {"parameters": members, "learned": learned, "arguments": changed}

    def _first(self, index: int, key: str) -> _BuiltValue:
        """Return the value that a group was built with."""
        built = self._built[index] if index < len(self._built) else {}
        return built.get(key, _ABSENT)

    def _is_as_built(self, index: int, key: str, value: object) -> bool:
        first = self._first(index, key)
        # An argument that is no number cannot be looked into, and the config gives it again.
        return first.is_still(value) or (
            key in self.arguments and not first.savable and value is first.value
        )

    def restore(
        self,
        names: Mapping[Tensor, str],
        saved: list[Json],
        tensors: Mapping[str, Tensor],
        place: Place,
    ) -> None:
        """Give each group what the one that its parameters were in had learned.

        Args:
            names: of the parameters.
            saved: JSON of all groups.
            tensors: those among the values.
            place: see `decode`.

        Raises:
            CheckpointError: if the groups were other ones.
        """
        owners = {name: group for group in saved for name in group["parameters"]}
        nothing: dict[str, Json] = {"learned": {}, "arguments": {}}
        for index, group in enumerate(self._optimizer.param_groups):
            found = [owners.get(names[item], nothing) for item in group["params"]]
            what = [(item["learned"], item["arguments"]) for item in found]
            if any(item != what[0] for item in what):
                raise CheckpointError(
                    f"{type(self._optimizer).__name__} has learned other values for each of its "
                    "groups, and the groups were other ones when this checkpoint was saved: bring "
                    "the old optimizer.groups back"
                )
            if what:
                self._put(group, self._built[index], *what[0], tensors, place)

    def _put(
        self,
        group: dict[str, Any],
        built: Mapping[str, _BuiltValue],
        learned: Mapping[str, Json],
        changed: Mapping[str, list[Json]],
        tensors: Mapping[str, Tensor],
        place: Place,
    ) -> None:
        # A run that returns to a checkpoint forgets what it has learned since.
        for key in [key for key in group if key not in _NOT_LEARNED]:
            if key not in built:
                del group[key]
            elif not built[key].is_still(group[key]):
                assign(group, key, built[key].again())
        for key, value in learned.items():
            assign(group, key, decode(value, tensors, place))
        for key, (began, now) in changed.items():
            # Who gives another argument today wants that one.
            if key in built and built[key].equals(decode(began, tensors)):
                assign(group, key, decode(now, tensors, place))


@dataclass(frozen=True, slots=True)
class _BuiltValue:
    """A value of a group as it was when the optimizer was built."""

    value: object
    encoded: Json
    tensors: Mapping[str, Tensor]
    savable: bool = True

    @classmethod
    def of(cls, value: object) -> _BuiltValue:
        tensors: dict[str, Tensor] = {}
        try:
            encoded = encode(value, "", tensors)
        except UnsavableError:
            return cls(value, None, {}, savable=False)
        return cls(None, encoded, {name: item.clone() for name, item in tensors.items()})

    def is_still(self, value: object) -> bool:
        """Tell whether a value is the same, without a look at numbers on a device."""
        if not self.savable:
            # A function has nothing that a step could change.
            return value is self.value and callable(value)
        try:
            return not self.tensors and encode(value, "", {}) == self.encoded
        except UnsavableError:
            return False

    def equals(self, value: object) -> bool:
        """Tell whether a value is the same, tensors too."""
        tensors: dict[str, Tensor] = {}
        return (
            self.savable
            and encode(value, "", tensors) == self.encoded
            and all(
                torch.equal(item.cpu(), self.tensors[name].cpu()) for name, item in tensors.items()
            )
        )

    def again(self) -> Any:
        """Return the value as it was, to be changed anew."""
        return decode(self.encoded, self.tensors) if self.savable else self.value


_ABSENT = _BuiltValue(None, None, {}, savable=False)


def constructor_arguments(kind: type) -> frozenset[str]:
    """Return all names that a class, and those that it hands its arguments on to, is built with."""
    names: set[str] = set()
    for each in kind.__mro__:
        if (build := vars(each).get("__init__")) is None:
            continue
        try:
            parameters = inspect.signature(build).parameters.values()
        except ValueError:  # written in C without a signature
            break
        names |= {item.name for item in parameters if item.kind is not item.VAR_KEYWORD}
        if not any(item.kind is item.VAR_KEYWORD for item in parameters):
            break
    return frozenset(names)
