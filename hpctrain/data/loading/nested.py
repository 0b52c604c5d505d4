"""Batches of any structure: tensors in dicts, lists, tuples and dataclasses, and what lies beside.

What a `collate_fn` makes is the user's own: its containers stay of their types, and what holds no
tensors is carried along. An object that moves itself, as graphs and tokenised texts do, has a
method `to`, and is asked to.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(
    function: Callable[[Tensor], Tensor],
    data: Any,
    others: Callable[[Any], Any] = lambda leaf: leaf,
) -> Any:
    """Return the same structure with every tensor replaced.

    Args:
        function: of a tensor.
        data: any nesting of dicts, lists, tuples, named tuples and dataclasses.
        others: of what is neither a tensor nor one of these.
    """
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, Mapping):
        items = {key: map_tensors(function, value, others) for key, value in data.items()}
        return items if type(data) is dict else _rebuilt_mapping(data, items, others)
    if isinstance(data, list | tuple):
        values = [map_tensors(function, value, others) for value in data]
        if hasattr(data, "_fields"):
            return type(data)(*values)
        return values if type(data) is list else type(data)(values)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        # Not made anew: its constructor may want what no field holds.
        made = copy.copy(data)
        for field in dataclasses.fields(data):
            value = map_tensors(function, getattr(data, field.name), others)
            object.__setattr__(made, field.name, value)
        return made
    return others(data)


def _rebuilt_mapping(
    data: Mapping[Any, Any], items: dict[Any, Any], others: Callable[[Any], Any]
) -> Any:
    """Return a mapping of the same type with other items."""
    if hasattr(data, "to"):  # it moves itself, and knows how it is built
        moved = others(data)
        if moved is not data:
            return moved
    made: Any = copy.copy(data)
    try:
        made.update(items)
    except (AttributeError, TypeError):
        return items
    return made


def moved(data: Any, device: torch.device, move: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Return a structure on a device.

    Args:
        data: as `map_tensors` takes it.
        device: where to.
        move: what moves a tensor; None: its own method.
    """

    def itself(leaf: Any) -> Any:
        to = getattr(leaf, "to", None)
        return to(device) if callable(to) and not isinstance(leaf, type) else leaf

    return map_tensors(move or (lambda tensor: tensor.to(device)), data, itself)


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the values of a tensor of the host one after the other, (bytes,) uint8.

    It is the memory of the tensor where its values lie there in this order.
    """
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    if flat.numel() == 1:
        # Of one value torch takes any stride for contiguous, and views only a stride of 1 as bytes.
        flat = flat.as_strided((1,), (1,))
    return flat.view(torch.uint8)


def named_tensors(data: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a structure, each with where it is, such as "image" or "1.mask"."""
    if isinstance(data, Tensor):
        yield name, data
        return
    inner: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(data, Mapping):
        inner = iter(data.items())
    elif isinstance(data, list | tuple):
        inner = iter(zip(getattr(data, "_fields", range(len(data))), data, strict=True))
    elif dataclasses.is_dataclass(data) and not isinstance(data, type):
        inner = iter((field.name, getattr(data, field.name)) for field in dataclasses.fields(data))
    for key, value in inner:
        yield from named_tensors(value, f"{name}.{key}" if name else str(key))
