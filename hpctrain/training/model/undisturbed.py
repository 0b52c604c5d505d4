"""Passes that leave no trace, and what a model does to itself in them."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from hpctrain.accelerator import kept_generator
from hpctrain.checkpoint.tensors import checksum, tensor_bytes
from hpctrain.errors import TrainingError
from hpctrain.topology import Communicator, raise_together
from hpctrain.training.model.attributes import Attributes
from hpctrain.utils.text import listed

logger = logging.getLogger("hpctrain")


def seed_generators(seed: int) -> None:
    """Seed torch, on all devices, numpy and Python."""
    torch.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - users' transforms draw from it
    random.seed(seed)


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Leave the generators of torch, numpy and Python as they stood before the body."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - users draw from it
    with kept_generator(device):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def kept_model(model: nn.Module, **others: object) -> Iterator[Disturbance]:
    """Leave a model as it was before the body: all that hangs on its names, and its attributes.

    Args:
        model: parameters (or this rank's rows of them), buffers, train flags, plain attributes.
        others: more objects whose attributes are kept, by a name for messages.

    Yields:
        What the body has done to the model: known after it, unless it fails.
    """
    attributes = Attributes({"": model, **others})
    names = Names(attributes.modules)
    values = Values([*names.tensors(), *attributes.tensors])
    parameters = dict(model.named_parameters())
    shapes = {name: item.shape for name, item in model.named_buffers()}
    found = Disturbance()
    try:
        yield found
        now = dict(model.named_parameters())
        found.registered = [name for name in now if name not in parameters]
        for name, item in parameters.items():
            here = now.get(name, item)
            if here is not item and not hasattr(item, "to_local"):
                found.replaced[name] = item.requires_grad
            if here is not item or values.changed(item):
                found.moved[name] = int(checksum(here.detach()))
        saved = model.state_dict().keys()
        found.buffers = {
            name: name in saved
            for name, item in model.named_buffers()
            if shapes.get(name) != item.shape
        }
    finally:
        names.put_back()
        values.put_back()
        found.attributes = attributes.put_back()


@contextmanager
def kept_tensors(model: nn.Module) -> Iterator[None]:
    """Leave parameters, buffers and train flags as they were before the body.

    Attributes stay the module's own, and with them the buffers that go with some, see
    `Names.put_back`.
    """
    names = Names(model.modules())
    values = Values(names.tensors())
    try:
        yield
    finally:
        names.put_back(keep_caches=True)
        values.put_back()


@contextmanager
def copied_buffers(model: nn.Module) -> Iterator[None]:
    """Have copies in place of a model's buffers in the body.

    Its backward pass may come after that: what it needs of the copies is not touched any more.
    """
    before = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    copies: dict[Tensor, Tensor] = {}  # one that is in two modules stays one
    for module, buffers in before:
        for name, buffer in buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(buffer, buffer.clone())
    try:
        yield
    finally:
        for module, buffers in before:
            module._buffers.clear()
            module._buffers.update(buffers)


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Set the train flag of just these modules to False in the body."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def with_statistics(model: nn.Module) -> list[nn.Module]:
    """Return the modules that keep running statistics of batches: batch norms and their like."""
    return [module for module in model.modules() if isinstance(module, _NormBase)]


@dataclass(slots=True)
class Disturbance:
    """What passes have done to a model, and what has been undone since.

    Attributes:
        moved: parameters whose values have changed: checksums of what they became, by name.
        replaced: parameters that have become other objects; True: they are trained.
        registered: parameters that were not there before.
        buffers: those that were not there before, or had another shape; True: they are saved.
        attributes: what has changed, cannot be copied, and so is not undone.
    """

    moved: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, bool] = field(default_factory=dict)
    registered: list[str] = field(default_factory=list)
    buffers: dict[str, bool] = field(default_factory=dict)
    attributes: list[str] = field(default_factory=list)


def judge(found: Disturbance, communicator: Communicator) -> None:
    """Refuse what would be trained wrongly, and report what was left behind. Collective: all ranks.

    Raises:
        TrainingError: on every rank, naming the parameters.
    """
    with raise_together(communicator):
        if found.registered:
            raise TrainingError(
                f"the forward pass registers the parameters {listed(found.registered)}, which the "
                "optimizer does not know and would not train: create them in __init__"
            )
        trained = [name for name, is_trained in found.replaced.items() if is_trained]
        if trained:
            raise TrainingError(
                f"the forward pass puts new parameters in the place of {listed(trained)}, and the "
                "optimizer holds those of before, which it would train in vain: change them in "
                "place, under torch.no_grad(), or keep them as buffers"
            )
    everyone = communicator.all_gather(found.moved)
    names = {name for moved in everyone for name in moved}
    unequal = sorted(name for name in names if len({moved.get(name) for moved in everyone}) > 1)
    if unequal:
        raise TrainingError(
            f"the forward pass changes the parameters {listed(unequal)} by the samples of each "
            "rank, so that the ranks would train different models: keep them as buffers, of which "
            "those of rank 0 count, change them by other parameters alone (an embedding without "
            "max_norm), or train on one rank",
            everywhere=True,
        )
    if found.attributes and communicator.rank == 0:
        logger.warning(
            "the dry run has changed %s of the model, which cannot be copied, and so is not what "
            "it was: a run without hpctrain begins elsewhere",
            listed(found.attributes),
        )


class Names:
    """Parameters, buffers, modules and train flags of modules, by their names."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Take down what the modules have."""
        # A script module's own tables cannot be filled; the values of its tensors can.
        self._modules = [
            (
                module,
                dict(module._parameters),
                dict(module._buffers),
                dict(module._modules),
                set(module._non_persistent_buffers_set),
                module.training,
            )
            for module in modules
            if not isinstance(module, torch.jit.ScriptModule)
        ]
        self._needs_gradient = [
            (item, item.requires_grad)
            for _, parameters, *_ in self._modules
            for item in parameters.values()
            if item is not None
        ]
        # Under FSDP torch itself puts gathered parameters in the place of this rank's rows.
        self._spread = any(hasattr(item, "to_local") for item, _ in self._needs_gradient)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all parameters and buffers."""
        for _, parameters, buffers, *_ in self._modules:
            for item in (*parameters.values(), *buffers.values()):
                if item is not None:
                    yield item

    def put_back(self, *, keep_caches: bool = False) -> None:
        """Give the modules what they had.

        Args:
            keep_caches: leave buffers that are not saved, and were not there or had another shape:
                what a module keeps for later passes, and knows of by attributes that stay too.
        """
        for module, parameters, buffers, modules, not_saved, training in self._modules:
            if keep_caches:
                now = module._non_persistent_buffers_set
                caches = {
                    name: item
                    for name, item in module._buffers.items()
                    if name in now and _shape(item) != _shape(buffers.get(name))
                }
                buffers = buffers | caches  # noqa: PLW2901
                not_saved = not_saved | caches.keys()  # noqa: PLW2901
            if not self._spread:
                _fill(module._parameters, parameters)
            _fill(module._buffers, buffers)
            _fill(module._modules, modules)
            module._non_persistent_buffers_set = not_saved
            if module.training != training:
                module.training = training
        for item, needed in self._needs_gradient:
            if item.requires_grad != needed:
                item.requires_grad_(needed)


class Values:
    """The values of tensors, put back into the memory that they had."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Take copies: on the device where they leave it room enough, else on the host."""
        unique = {id(item): item for item in tensors if has_memory(item)}
        memory = {key: _memory(item) for key, item in unique.items()}
        crowded = _crowded(memory.values())
        self._kept = {
            key: (
                unique[key],
                part,
                part.cpu() if part.device in crowded else part.clone(),
            )
            for key, part in memory.items()
        }

    def changed(self, tensor: Tensor) -> bool:
        """Tell whether the values of a tensor have changed."""
        kept = self._kept.get(id(tensor))
        if kept is None:
            return False
        now, before = _memory(tensor), kept[2].to(tensor.device)
        return now.shape != before.shape or not torch.equal(tensor_bytes(now), tensor_bytes(before))

    def put_back(self) -> None:
        """Give the tensors the values that they had."""
        with torch.no_grad():
            for tensor, memory, value in self._kept.values():
                if _memory(tensor).data_ptr() != memory.data_ptr():
                    tensor.data = memory
                memory.copy_(value)


def _memory(tensor: Tensor) -> Tensor:
    """Return a tensor over the memory of another, or of this rank's rows of it."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()


def has_memory(tensor: Tensor) -> bool:
    """Tell whether a tensor has memory of its own, in which each element is once."""
    if is_lazy(tensor) or tensor.layout != torch.strided:
        return False
    return not any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def _crowded(tensors: Iterable[Tensor]) -> set[torch.device]:
    """Return the devices on which copies of tensors would take much of what is free."""
    sizes: dict[torch.device, int] = {}
    for item in tensors:
        sizes[item.device] = sizes.get(item.device, 0) + item.numel() * item.element_size()
    return {
        device
        for device, size in sizes.items()
        if device.type == "cuda" and _PART * size > torch.cuda.mem_get_info(device)[0]
    }


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _fill(table: dict[str, Any], items: dict[str, Any]) -> None:
    """Make a table hold just some items, if it does not."""
    same = table.keys() == items.keys() and all(table[key] is item for key, item in items.items())
    if not same:
        table.clear()
        table.update(items)


_PART = 4
"""Copies may take this part of the free memory of a device, one over it."""
