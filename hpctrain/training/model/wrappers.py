"""Wrappers around the bare model: plain names without them, and the call of a task through them.

DistributedDataParallel and FSDP prepare gradients and parameters around the forward pass of the
module that they wrap. They wrap a module whose forward pass is whatever a task does, so that a task
gets the bare model at any world size: its methods, its attributes, its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from hpctrain.checkpoint.load import fitting_names
from hpctrain.errors import CheckpointError
from hpctrain.utils.text import listed, printable

T = TypeVar("T")

_EXTRA_STATE = "_extra_state"  # as torch calls what `get_extra_state` returns


class PlainNames:
    """Takes out of names what compiled modules and torch's parallel wrappers put into them.

    A module of the user's own that happens to be called `module` keeps its name.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look for wrappers; there are none in most models."""
        self._wrapped: list[tuple[str, str]] = []
        for name, module in model.named_modules(remove_duplicate=False):
            inner = _inside(module)
            if inner is not None:
                around = f"{name}." if name else ""
                self._wrapped.append((f"{around}{inner}.", around))
        self._wrapped.reverse()  # the innermost first: the names of the others stay right

    def __call__(self, name: str) -> str:
        """Return the plain name of a parameter or buffer."""
        for beginning, plain in self._wrapped:
            if name.startswith(beginning):
                name = plain + name.removeprefix(beginning)
        return name

    def of(self, named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """Yield what is named with its plain name."""
        if not self._wrapped:
            yield from named
        else:
            for name, item in named:
                yield self(name), item


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return all that a model saves, by plain names."""
    return dict(PlainNames(model).of(model.state_dict().items()))


def load_plain_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors into a model by plain names; those that it has not are passed over."""
    plain = PlainNames(model)
    raw = {plain(name): name for name in model.state_dict()}
    model.load_state_dict(
        {raw[name]: item for name, item in tensors.items() if name in raw}, strict=False
    )


def load_checked(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put all parameters and buffers into a model, by names that wrappers may have changed.

    Raises:
        CheckpointError: if some are missing or of another shape; `source` is for the message.
    """
    plain = PlainNames(model)
    here = {
        plain(name): item
        for name, item in model.state_dict().items()
        if isinstance(item, Tensor) and not name.endswith(_EXTRA_STATE)
    }
    there = fitting_names(here, tensors)
    weights = {there.get(name, name): item for name, item in tensors.items()}
    missing = [printable(name) for name in here if name not in weights]
    unlike = [
        f"{printable(name)} {tuple(weights[name].shape)}, not {tuple(item.shape)}"
        for name, item in here.items()
        if name in weights and weights[name].shape != item.shape
    ]
    if missing or unlike:
        what = f"has no {listed(missing)}" if missing else f"has {listed(unlike)}"
        raise CheckpointError(
            f"{source} {what}: it was saved of another model than [model] makes now"
        )
    load_plain_state(model, weights)


def adopt_buffers(
    model: nn.Module, grown: Mapping[str, bool], tensors: Mapping[str, Tensor]
) -> list[str]:
    """Give a model buffers that its own forward pass would register or make larger.

    Args:
        model: whose device the buffers go to.
        grown: their names in it; True: they are saved.
        tensors: saved ones, by plain names.

    Returns:
        The plain names of those that it has now.
    """
    plain = PlainNames(model)
    device = next(model.parameters()).device
    adopted = []
    for name, is_saved in grown.items():
        if is_saved and plain(name) in tensors:
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            module._buffers[key] = tensors[plain(name)].to(device, copy=True)
            module._non_persistent_buffers_set.discard(key)
            adopted.append(plain(name))
    return adopted


def _inside(module: nn.Module) -> str | None:
    """Return the name of the module that a wrapper holds; None of one that is no wrapper."""
    if "_orig_mod" in module._modules:  # of torch.compile
        return "_orig_mod"
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    return None


Method = Callable[[nn.Module, Any], Any]
"""A method of a task, such as `task.loss`: of the bare model and the fields of a pass."""

Call = Callable[[Method, Any], Any]
"""Calls a method of a task with the model and these fields."""


class Callee(nn.Module):
    """Wraps the model for those who watch forward passes; names and state are the model's own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: Method, fields: Any) -> Any:
        """Return what the method makes of the bare model and the fields."""
        return method(self.module, fields)


class UnhookedCallee(Callee):
    """A callee without hooks, which torch need not look for in every pass."""

    bare: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.__dict__["bare"] = module  # found without the search of nn.Module

    def forward(self, method: Method, fields: Any) -> Any:
        """Return what the method makes of the bare model and the fields."""
        return method(self.bare, fields)

    __call__ = forward


def call_directly(model: nn.Module) -> Call:
    """Return the call that nobody watches."""
    return lambda method, fields: method(model, fields)
