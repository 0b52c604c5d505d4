"""What hangs on the names of modules, and the values of tensors: as they stood, put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hpctrain.checkpoint.tensors import tensor_bytes


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
