"""Training state to named tensors and JSON and back: trees of Python objects, and generators."""

from __future__ import annotations

import math
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from hpctrain.accelerator import generator_state, set_generator_state
from hpctrain.checkpoint.tensors import storable_dtype
from hpctrain.errors import CheckpointError

Json = Any
"""None, bool, int, float, str, and lists and dictionaries of these."""

Placement = Callable[[Tensor, Mapping[str, Json]], Tensor]
"""Puts a saved tensor where it belongs, by what stands beside its name."""

_DEEPEST = 32
_OF_JSON = (bool, int, str)
_NUMBERS = "biuf"
_WITHOUT_PARTS: Mapping[type, tuple[str, Callable[[Any], Json]]] = {
    float: ("float", repr),  # infinite, or not a number
    complex: ("complex", lambda value: [repr(value.real), repr(value.imag)]),
    bytes: ("bytes", bytes.hex),
    torch.Size: ("size", list),
    torch.dtype: ("dtype", lambda value: str(value).removeprefix("torch.")),
    torch.device: ("device", str),
}
# What a defaultdict makes of a missing key: a function of the user's own could not be named.
_FACTORIES: Mapping[str, Callable[[], Any]] = {
    factory.__name__: factory for factory in (dict, list, set, tuple, int, float, bool, str)
}


class UnsavableError(CheckpointError):
    """What a checkpoint cannot hold, with the place of it in the tree."""


def require_savable(name: str, tensor: Tensor, *, own_class: bool = False) -> None:
    """Refuse a tensor that does not come back from a file as it is.

    Args:
        name: for the message.
        tensor: any.
        own_class: whether it may be of a class of its own, since what is read is copied into it.

    Raises:
        UnsavableError: if it has no numbers yet, is of a class of its own, or of a type that
            safetensors does not have.
    """
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        problem = "has no shape before its first use (a lazy module)"
    elif type(tensor) not in (Tensor, nn.Parameter) and not (own_class and _is_plain(tensor)):
        problem = f"is a {type(tensor).__module__}.{type(tensor).__qualname__}, not a plain tensor"
    elif tensor.layout is not torch.strided:
        problem = f"is laid out as {tensor.layout}, and only dense tensors can be saved"
    elif tensor.device.type == "meta":
        problem = "has no numbers: it is on the device meta"
    elif not storable_dtype(tensor.dtype):
        problem = f"is of {tensor.dtype}, which a checkpoint cannot hold"
    else:
        return
    raise UnsavableError(f"{name} {problem}")


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor of a class of its own keeps its numbers as all do."""
    return getattr(type(tensor), "__torch_dispatch__", None) in (
        Tensor.__torch_dispatch__,
        torch._C._disabled_torch_dispatch_impl,
    )


def encode(
    value: object,
    name: str,
    tensors: MutableMapping[str, Tensor],
    facts: Callable[[Tensor], Mapping[str, Json]] = lambda tensor: {},
) -> Json:
    """Return a tree as JSON, its tensors under names.

    Lists and what JSON has stand for themselves; all else is {kind: content}.

    Args:
        value: None, bool, int, float, complex, str, bytes, list, tuple, dict, OrderedDict,
            defaultdict, deque, set, frozenset, tensors, numpy's arrays and numbers, and torch's
            sizes, dtypes and devices, in one another. Of these very types: another class would not
            come back as itself.
        name: name of the whole, for the names of its tensors, and for messages.
        tensors: takes the tensors of the tree.
        facts: more that is to stand beside a tensor's name.

    Raises:
        UnsavableError: naming what is of another type.
    """
    return _Encoder(tensors, facts).encode(value, name, 0)


class _Encoder:
    def __init__(
        self,
        tensors: MutableMapping[str, Tensor],
        facts: Callable[[Tensor], Mapping[str, Json]],
    ) -> None:
        self._tensors = tensors
        self._facts = facts

    def encode(self, value: Any, name: str, depth: int) -> Json:
        if depth > _DEEPEST:
            raise UnsavableError(f"{name}: more than {_DEEPEST} containers in one another")
        if isinstance(value, Tensor):
            require_savable(name, value)
            return {"tensor": self._keep(value, name), **self._facts(value)}
        kind = type(value)
        if value is None or kind in _OF_JSON or (kind is float and math.isfinite(value)):
            return value
        if kind in _WITHOUT_PARTS:
            word, content = _WITHOUT_PARTS[kind]
            return {word: content(value)}
        if isinstance(value, np.generic) and value.dtype.kind in _NUMBERS:
            return {"number": [value.dtype.name, value.tobytes().hex()]}
        if kind is np.ndarray and value.dtype.kind in _NUMBERS:
            return {"ndarray": self._keep(torch.from_numpy(value.copy()), name)}
        return self._container(value, name, depth)

    def _container(self, value: Any, name: str, depth: int) -> Json:
        kind = type(value)
        if kind in (list, tuple, set, frozenset, deque):
            items = [
                self.encode(item, f"{name}.{index}", depth + 1) for index, item in enumerate(value)
            ]
            if kind is deque:
                return {"deque": [value.maxlen, items]}
            return items if kind is list else {kind.__name__: items}
        if kind not in (dict, OrderedDict, defaultdict):
            raise UnsavableError(
                f"{name} is a {kind.__module__}.{kind.__qualname__}: tensors, numbers, texts and "
                "containers of these can be saved"
            )
        pairs = []
        for key, item in value.items():
            where = f"{name}.{str(key).replace('/', '|')}"
            if isinstance(key, Tensor):
                raise UnsavableError(f"{name} has a tensor as a key")
            pairs.append([self.encode(key, where, depth + 1), self.encode(item, where, depth + 1)])
        if kind is defaultdict:
            return {"defaultdict": [_factory_name(value, name), pairs]}
        return {kind.__name__: pairs}

    def _keep(self, tensor: Tensor, name: str) -> str:
        """Put a tensor under a name that no other one has."""
        unique, number = name, 1
        while unique in self._tensors:
            number += 1
            unique = f"{name}~{number}"
        self._tensors[unique] = tensor.detach()
        return unique


def _factory_name(value: defaultdict[Any, Any], name: str) -> str | None:
    factory = value.default_factory
    if factory is None:
        return None
    for known, of_that_name in _FACTORIES.items():
        if factory is of_that_name:
            return known
    raise UnsavableError(
        f"{name} is a defaultdict that makes what is missing by a function of its own, which "
        "cannot be saved: use a class such as list or int"
    )


def decode(
    value: Json,
    tensors: Mapping[str, Tensor],
    place: Placement = lambda tensor, facts: tensor.clone(),
) -> Any:
    """Return the tree that `encode` has made JSON of.

    Args:
        value: the JSON.
        tensors: tensors of the tree, by name.
        place: function of a tensor and what stands beside its name, which puts it where it belongs.

    Raises:
        CheckpointError: if it is not what `encode` gives, or a tensor is missing.
    """
    try:
        return _decode(value, tensors, place)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"saved values cannot be understood: {error!r}") from error


def _decode(
    value: Json,
    tensors: Mapping[str, Tensor],
    place: Placement,
) -> Any:
    def items(values: list[Json]) -> list[Any]:
        return [_decode(item, tensors, place) for item in values]

    def pairs(values: list[Json]) -> list[tuple[Any, Any]]:
        return [(key, item) for key, item in map(items, values)]

    if isinstance(value, list):
        return items(value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return place(tensors[value["tensor"]], value)
    ((kind, content),) = value.items()
    makers: Mapping[str, Callable[[Any], Any]] = {
        "float": float,
        "complex": lambda parts: complex(*map(float, parts)),
        "bytes": bytes.fromhex,
        "size": torch.Size,
        "dtype": lambda name: getattr(torch, name),
        "device": torch.device,
        "number": lambda both: np.frombuffer(bytes.fromhex(both[1]), np.dtype(both[0]))[0],
        "ndarray": lambda name: tensors[name].numpy().copy(),
        "tuple": lambda values: tuple(items(values)),
        "set": lambda values: set(items(values)),
        "frozenset": lambda values: frozenset(items(values)),
        "deque": lambda both: deque(items(both[1]), maxlen=both[0]),
        "dict": lambda values: dict(pairs(values)),
        "OrderedDict": lambda values: OrderedDict(pairs(values)),
        "defaultdict": lambda both: defaultdict(
            None if both[0] is None else _FACTORIES[both[0]], pairs(both[1])
        ),
    }
    return makers[kind](content)


def assign(holder: MutableMapping[Any, Any], key: Any, value: Any) -> None:
    """Put a value under a key, in the object that is there: others may hold that one too."""
    there: Any = holder.get(key)
    if type(there) is not type(value):
        holder[key] = value
    elif isinstance(there, Tensor):
        facts = [(item.shape, item.dtype, item.device) for item in (there, value)]
        if facts[0] == facts[1]:
            with torch.no_grad():
                there.copy_(value)
        else:
            holder[key] = value
    elif isinstance(there, list):
        there[:] = value
    elif isinstance(there, dict | set):
        there.clear()
        there.update(value)
    else:
        holder[key] = value


class HasParameters(Protocol):
    """A model, or what one rank holds of it."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return the parameters by name."""
        ...


def rng_to_tensors(device: torch.device) -> tuple[dict[str, Tensor], Any]:
    """Return the state of the generators of torch (host and this device), numpy and Python."""
    tensors = {"torch": torch.get_rng_state()}
    own = generator_state(device)
    if own is not None:
        tensors[device.type] = own
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - users' transforms draw from it
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).view(np.uint8).copy())
    version, internal, gauss = random.getstate()
    tensors["python"] = torch.tensor(internal, dtype=torch.int64)
    return tensors, {"numpy": [kind, *rest], "python": [version, gauss]}


def restore_rng(tensors: Mapping[str, Tensor], values: Any, device: torch.device) -> None:
    """Put the generators back; that of another type of device does not matter here."""
    torch.set_rng_state(tensors["torch"])
    if device.type in tensors:
        set_generator_state(device, tensors[device.type])
    kind, *rest = values["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().view(np.uint32), *rest))  # noqa: NPY002
    version, gauss = values["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
