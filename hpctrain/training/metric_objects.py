"""Objects of torchmetrics that a task holds: found, reset, their state carried between ranks.

They are known by what they can do; nothing of torchmetrics is imported. What it does by itself over
ranks is left out: it waits for ranks that have no batch, and adds up in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpctrain.errors import TrainingError

State = Mapping[str, Any]
"""Of one object: its state variables by name, and how often it was updated under COUNT."""

COUNT = "_update_count"


class MetricObjects:
    """All objects of a task that compute metrics, by their path in it, the same on all ranks."""

    def __init__(self, task: Any, device: torch.device) -> None:
        """Find them, put them on the device, and have them add up in float64.

        Args:
            task: that holds them: in attributes, and in lists, dicts and modules there.
            device: of the batches.
        """
        self._objects = dict(_found(task))
        self._paths = {id(item): path for path, item in self._objects.items()}
        self._holders = {
            path: item
            for path, item in self._objects.items()
            if isinstance(getattr(item, "_defaults", None), dict)
        }
        for item in self._objects.values():
            item.to(device)
        if device.type != "mps":  # which has no float64
            for item in self._holders.values():
                _widen(item)

    def __bool__(self) -> bool:
        return bool(self._objects)

    def path_of(self, value: object) -> str | None:
        """Return where the task holds an object; None: nowhere."""
        return self._paths.get(id(value))

    def reset(self) -> None:
        """Forget all batches."""
        for item in self._holders.values():
            for name, default in item._defaults.items():
                if isinstance(default, list):
                    setattr(item, name, [])  # theirs clears the list that is there, in place
        for item in self._objects.values():
            item.reset()

    def own_newest(self) -> None:
        """Copy what each object has last put into a list, whose memory is another's."""
        for item in self._holders.values():
            for name in item._defaults:
                kept = getattr(item, name)
                if isinstance(kept, list) and kept and isinstance(kept[-1], Tensor):
                    kept[-1] = kept[-1].clone()

    def states(self) -> dict[str, State]:
        """Return what each object has added up, on the host."""
        return {
            path: {
                COUNT: int(getattr(item, COUNT, 1)),
                **{name: _on_host(getattr(item, name)) for name in item._defaults},
            }
            for path, item in self._holders.items()
        }

    def load(self, states: Mapping[str, State]) -> None:
        """Give objects the states that `states` gave; those that have none begin anew."""
        self.reset()
        for path, state in states.items():
            if (item := self._holders.get(path)) is None:
                continue
            for name in item._defaults:
                setattr(item, name, _to(state[name], item.device))
            item._update_count = state[COUNT]

    def merge(self, parts: Sequence[Mapping[str, State]]) -> None:
        """Give every object the state of all parts together.

        Args:
            parts: of `states`, in the order of the samples.

        Raises:
            TrainingError: if a state has no exact sum over parts.
        """
        for path in self._holders:
            self._merge(path, [part[path] for part in parts if path in part])

    def _merge(self, path: str, states: Sequence[State]) -> None:
        item = self._holders[path]
        # One without a batch has nothing to say, and might be taken for a batch of zeros.
        states = [state for state in states if state[COUNT]] or states[:1]
        for name in item._defaults:
            merged = _merged([state[name] for state in states], item, name)
            setattr(item, name, _to(merged, item.device))
        item._update_count = sum(state[COUNT] for state in states)
        item._computed = None

    def merge_begun(self, parts: Sequence[Mapping[str, State]]) -> None:
        """Give objects the state of all parts together; those in none of them stay as they are.

        Raises:
            TrainingError: if a state has no exact sum over parts.
        """
        for path in dict.fromkeys(path for part in parts for path in part):
            if path in self._holders:
                self._merge(path, [part[path] for part in parts if path in part])

    def compute(self, path: str) -> object:
        """Return what the object at `path` computes of its state."""
        return self._objects[path].compute()

    @contextmanager
    def local(self) -> Iterator[None]:
        """Keep the objects from reducing over ranks by themselves in the body."""
        before = {path: item.distributed_available_fn for path, item in self._reducing()}
        for _, item in self._reducing():
            item.distributed_available_fn = _not_distributed
        try:
            yield
        finally:
            for path, function in before.items():
                self._objects[path].distributed_available_fn = function

    def keep_local(self) -> None:
        """Keep the objects from reducing over ranks by themselves, for good."""
        for _, item in self._reducing():
            item.distributed_available_fn = _not_distributed

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Leave the objects as they were before the body, in which they begin anew."""
        before = {path: dict(vars(item)) for path, item in self._objects.items()}
        self.reset()
        try:
            yield
        finally:
            for path, attributes in before.items():
                vars(self._objects[path]).clear()
                vars(self._objects[path]).update(attributes)

    def _reducing(self) -> Iterator[tuple[str, Any]]:
        for path, item in self._objects.items():
            if hasattr(item, "distributed_available_fn"):
                yield path, item


def _not_distributed() -> bool:
    return False


def _found(task: Any) -> Iterator[tuple[str, Any]]:
    """Yield the objects that compute metrics, each once, with their path from the task."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", getattr(task, "__dict__", {}))]
    while waiting:
        path, value = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        inside: Any = ()
        if isinstance(value, nn.Module):
            if _computes(value):
                yield path, value
            inside = value.named_children()
        elif isinstance(value, Mapping):
            inside = value.items()
        elif isinstance(value, (list, tuple)):
            inside = enumerate(value)
        waiting += [(f"{path}.{key}" if path else str(key), item) for key, item in inside]


def _computes(module: nn.Module) -> bool:
    return all(callable(getattr(module, each, None)) for each in ("update", "compute", "reset"))


def _widen(item: Any) -> None:
    """Have an object add up floating-point numbers in float64, from its next reset on."""
    widened = False
    for name, default in item._defaults.items():
        if not isinstance(default, Tensor) or not default.is_floating_point():
            continue
        widened = True
        item._defaults[name] = default.double()
        setattr(item, name, getattr(item, name).double())
    # Aggregators cast what they are given to this; one with a network of its own keeps that's.
    if widened and hasattr(item, "_dtype") and not any(True for _ in item.parameters()):
        item._dtype = torch.float64


def _merged(values: Sequence[Any], item: Any, name: str) -> Any:
    """Return one state variable of all parts, as torchmetrics would reduce it over ranks."""
    if len(values) == 1:
        return values[0]
    reduction = item._reductions[name]
    if isinstance(values[0], list):
        return [element for value in values for element in value]
    if getattr(reduction, "__name__", "") == "dim_zero_mean":
        # Right for what is the same everywhere, such as the range of the data.
        if any(not torch.equal(value, values[0]) for value in values):
            raise TrainingError(
                f'{type(item).__name__} takes the mean over ranks of its state "{name}", whatever '
                "they have seen of the data: its value would depend on the number of ranks. Return "
                "sums from evaluate and compute the metric in finish(sums)"
            )
        return values[0]
    if getattr(reduction, "__name__", "") == "dim_zero_cat":
        return reduction(list(values))
    stacked = torch.stack(list(values))
    return stacked if reduction is None else reduction(stacked)


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, (list, tuple)):
        return [_on_host(item) for item in value]
    return value


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [_to(item, device) for item in value]
    return value
