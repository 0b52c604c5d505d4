"""All that an optimizer has learned, to named tensors and JSON and back, bit for bit.

What a user gives an optimizer comes from the config; a checkpoint holds what it has found out: its
`state`, under parameters and any other key, and of `param_groups` what it has changed itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hpctrain.checkpoint.state import (
    HasParameters,
    Json,
    Placement,
    UnsavableError,
    assign,
    decode,
    encode,
    require_savable,
)
from hpctrain.errors import CheckpointError

SLOTS = "optimizer/"
"""Begins the names of tensors that are a slot of a parameter's state: "optimizer/NAME/slot"."""
PARTS = "optimizer-parts/"
"""The same of tensors inside such a slot: of a list, for example."""
OWN = "optimizer-own/"
"""Begins the names of tensors of an optimizer that belong to no parameter."""

Facts = Callable[[Tensor], Mapping[str, Json]]

# Set before each step, or what a group consists of.
_NOT_LEARNED = {"params", "param_names", "lr", "lr_factor", "initial_lr"}


@dataclass(frozen=True, slots=True)
class SavedOptimizer:
    """An optimizer as a checkpoint holds it.

    Attributes:
        tensors: the optimizer's own memory, by names that begin with `SLOTS`, `PARTS` or `OWN`.
        values: JSON; None: of a checkpoint that holds slots only.
    """

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Json] | None


class OptimizerState:
    """What an optimizer knows beyond what it was built with.

    Attributes:
        optimizer: the optimizer.
        check: check of what is to be put back, which raises where training cannot go on from it.
    """

    def __init__(self, optimizer: Optimizer, *, rows: bool = False) -> None:
        """Take note of how an optimizer was built, before its first step.

        Args:
            optimizer: the optimizer.
            rows: whether its parameters are the rows that one rank holds of them.
        """
        self.optimizer = optimizer
        self._rows = rows
        self.check: Callable[[SavedOptimizer], None] = lambda saved: None
        self._groups = _LearnedGroups(optimizer)
        self._built_with: set[Any] = {key for key, content in optimizer.state.items() if content}

    def capture(self, model: HasParameters) -> SavedOptimizer:
        """Return the state.

        Args:
            model: module whose parameters' names are saved.

        Raises:
            UnsavableError: naming what a checkpoint cannot hold.
        """
        names: dict[Tensor, str] = {item: name for name, item in model.named_parameters()}
        tensors: dict[str, Tensor] = {}
        slots: dict[str, Json] = {}
        other: list[Json] = []
        facts = self._facts(names, None)
        kind = type(self.optimizer)
        try:
            state: Mapping[Any, Any] = self.optimizer.state
            for key, content in state.items():
                if not isinstance(key, Tensor):
                    where = f"{OWN}state.{key}"
                    other.append([encode(each, where, tensors, facts) for each in (key, content)])
                elif key not in names:
                    raise UnsavableError("it keeps state of a tensor that is not a parameter")
                elif content and (found := self._capture_slots(names, key, content, tensors)):
                    slots[names[key]] = found
            groups = self._groups.capture(names, tensors, facts)
        except UnsavableError as error:
            raise UnsavableError(f"{kind.__name__} cannot be saved: {error}") from error
        values = {
            "kind": f"{kind.__module__}.{kind.__qualname__}",
            "slots": slots,
            "other": other,
            "groups": groups,
        }
        return SavedOptimizer(tensors, values)

    def restore(self, model: HasParameters, saved: SavedOptimizer) -> None:
        """Put saved state back, each tensor on the device that it belongs to.

        Raises:
            CheckpointError: if the state belongs to no parameter, or the groups were others.
        """
        self.check(saved)
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        values = saved.values or {}
        slots: dict[str, dict[str, Tensor]] = {name: {} for name in values.get("slots", {})}
        for key, tensor in saved.tensors.items():
            if key.startswith(SLOTS):
                name, _, slot = key.removeprefix(SLOTS).rpartition("/")
                slots.setdefault(name, {})[slot] = tensor
        for name, whole in slots.items():
            if name not in parameters:
                raise CheckpointError(
                    f"the checkpoint has optimizer state of {name!r}, the model not"
                )
            place = self._place(parameters[name])
            content: dict[Any, Any] = {slot: place(item, {}) for slot, item in whole.items()}
            for slot, item in values.get("slots", {}).get(name, ()):
                content[decode(slot, {})] = decode(item, saved.tensors, place)
            _put(self.optimizer.state[parameters[name]], content)
        known: set[Any] = {parameters[name] for name in slots}
        if saved.values is not None:
            place = self._place(None)
            state: dict[Any, Any] = self.optimizer.state
            for key, item in values["other"]:
                known.add(where := decode(key, {}))
                assign(state, where, decode(item, saved.tensors, place))
            names: dict[Tensor, str] = {item: name for name, item in parameters.items()}
            self._groups.restore(names, values["groups"], saved.tensors, place)
        for later in [key for key in self.optimizer.state if key not in known | self._built_with]:
            del self.optimizer.state[later]

    def _capture_slots(
        self,
        names: Mapping[Tensor, str],
        parameter: Tensor,
        content: Any,
        tensors: dict[str, Tensor],
    ) -> list[Json]:
        """Take in the state of one parameter; return what of it is more than a tensor in a slot."""
        name = names[parameter]
        if type(content) is not dict:
            raise UnsavableError(f"its state of {name} is a {type(content).__name__}, not a dict")
        facts = self._facts(names, parameter)
        pairs = []
        for slot, value in content.items():
            if isinstance(value, Tensor) and type(slot) is str and "/" not in slot:
                is_like = _is_like(value, parameter)  # of thousands most are, and that is quick
                if not is_like:
                    require_savable(f"{slot} of {name}", value)
                if is_like or not facts(value):
                    tensors[f"{SLOTS}{name}/{slot}"] = value.detach()
                    continue
            where = f"{PARTS}{name}/{str(slot).replace('/', '|')}"
            pairs.append([encode(slot, where, {}), encode(value, where, tensors, facts)])
        return pairs

    def _facts(self, names: Mapping[Tensor, str], parameter: Tensor | None) -> Facts:
        """Return what says where a tensor is, if that is not where tensors usually are."""

        def facts(tensor: Tensor) -> dict[str, Json]:
            if tensor in names:
                raise UnsavableError(f"it keeps the parameter {names[tensor]} itself as a value")
            said: dict[str, Json] = {}
            usual = self._usual_device(tensor, parameter)
            if tensor.device != usual and "cpu" in (tensor.device.type, usual.type):
                said["on_host"] = tensor.device.type == "cpu"
            if not self._rows and not _is_usual(tensor, parameter):
                # Sums over another order in memory round otherwise.
                said["strides"] = list(torch.empty_like(tensor, device="meta").stride())
            return said

        return facts

    def _place(self, parameter: Tensor | None) -> Placement:
        """Return what puts a saved tensor where the optimizer had it."""

        def place(tensor: Tensor, facts: Mapping[str, Json]) -> Tensor:
            device = self._usual_device(tensor, parameter)
            if "on_host" in facts:
                near = self._near(parameter).device
                device = torch.device("cpu") if facts["on_host"] else near
            strides = facts.get("strides") or _usual_strides(tensor, parameter)
            kept = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=device)
            return kept.copy_(tensor)

        return place

    def _usual_device(self, tensor: Tensor, parameter: Tensor | None) -> torch.device:
        """Return where tensors of the state are: counts of steps may be on the host."""
        groups = self.optimizer.param_groups
        on_device = tensor.ndim or any(
            group.get("fused") or group.get("capturable") for group in groups
        )
        return self._near(parameter).device if on_device else torch.device("cpu")

    def _near(self, parameter: Tensor | None) -> Tensor:
        if parameter is not None:
            return parameter
        first: Tensor = self.optimizer.param_groups[0]["params"][0]
        return first


def slot_names(saved: SavedOptimizer) -> dict[str, frozenset[str]]:
    """Return which slots of which parameter a checkpoint holds."""
    found: dict[str, set[str]] = {}
    for key in saved.tensors:
        if key.startswith(SLOTS):
            name, _, slot = key.removeprefix(SLOTS).rpartition("/")
            found.setdefault(name, set()).add(slot)
    for name, content in (saved.values or {}).get("slots", {}).items():
        found.setdefault(name, set()).update(str(slot) for slot, _ in content)
    return {name: frozenset(slots) for name, slots in found.items()}


def _put(slots: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    """Have a parameter's state be `content`, in the memory that it has."""
    for slot in [slot for slot in slots if slot not in content]:
        del slots[slot]
    for slot, value in content.items():
        assign(slots, slot, value)


def _is_like(tensor: Tensor, parameter: Tensor) -> bool:
    """Tell whether a tensor is another plain one that lies where and as its parameter does."""
    return (
        type(tensor) is Tensor
        and tensor is not parameter
        and tensor.dtype is parameter.dtype
        and tensor.device == parameter.device
        and tensor.layout is torch.strided
        and tensor.stride() == parameter.stride()
        and tensor.shape == parameter.shape
    )


def _is_usual(tensor: Tensor, parameter: Tensor | None) -> bool:
    """Tell whether a tensor lies in memory as `_usual_strides` says; quick where it mostly does."""
    if parameter is None or parameter.shape != tensor.shape:
        return tensor.is_contiguous() or _same_order(tensor, parameter)
    return tensor.stride() == parameter.stride() or _same_order(tensor, parameter)


def _same_order(tensor: Tensor, parameter: Tensor | None) -> bool:
    itself = torch.empty_like(tensor, device="meta").stride()
    return itself == _usual_strides(tensor, parameter)


def _usual_strides(tensor: Tensor, parameter: Tensor | None) -> tuple[int, ...]:
    """Return the parameter's order in memory, which fused kernels take for granted, or rows."""
    if parameter is not None and parameter.shape == tensor.shape:
        return torch.empty_like(parameter, device="meta").stride()
    return torch.empty(tensor.shape, device="meta").stride()


class _LearnedGroups:
    """Values of an optimizer's groups that no config gives: what it has found out.

    Arguments of its class come from the config, unless the optimizer itself changes one: that is
    saved too, and counts as long as the config gives what it gave before. All else is learned, if
    the optimizer changes any of it; if not, it is what the code that built the optimizer says.

    Attributes:
        arguments: names of the arguments of the class's constructor.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Take note of how an optimizer was built, before its first step."""
        self.arguments = _constructor_arguments(type(optimizer))
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
            names: names of the parameters.
            tensors: takes the tensors among the values.
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
        # An argument that is not a number cannot be compared, and the config gives it again.
        return first.is_still(value) or (
            key in self.arguments and not first.savable and value is first.value
        )

    def restore(
        self,
        names: Mapping[Tensor, str],
        saved: list[Json],
        tensors: Mapping[str, Tensor],
        place: Placement,
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
        place: Placement,
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
        """Tell whether a value is the same, without reading numbers on a device."""
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


def _constructor_arguments(kind: type) -> frozenset[str]:
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
