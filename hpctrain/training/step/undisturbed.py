"""Passes through a model that training must not notice."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hpctrain.accelerator import kept_generator
from hpctrain.training.step.attributes import Attributes
from hpctrain.training.step.disturbance import Disturbance
from hpctrain.training.step.names_and_values import Names, Values
from hpctrain.training.step.sync_check import checksum


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
