"""torch's compiler: it stays out of processes that compile nothing, and of what is only tried out.

torch._dynamo brings FSDP, distributed tensors and sympy with it: 2 of the 6 CPU seconds that a rank
takes to start (torch 2.13, measured). Every optimizer and every DDP import it, to mark functions
that it is to leave alone, and to ask how it is set. Until something else imports it there is
nothing to leave alone, and it is set as it comes. Where another torch has other insides than what
is looked for here, it imports its compiler as ever.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.overrides import has_torch_function

_COMPILER = "torch._dynamo"
_MARK = "__dynamo_disable"
"""Under which torch keeps, on a function, what it calls in its place.

Source: torch/_compile.py, 2.13.
"""


def leave_out_compiler() -> None:
    """Have optimizers and passes under DDP not import the compiler until something else does."""
    if is_loaded():
        return
    for owner in (Optimizer, DistributedDataParallel):
        for member in vars(owner).values():
            marking = _made_in("torch._compile", member)
            if marking is not None and not hasattr(marking.__wrapped__, _MARK):
                setattr(marking.__wrapped__, _MARK, _marked_late(marking))
    for each in vars(torch.optim).values():
        if isinstance(each, type) and issubclass(each, Optimizer):
            step = vars(each).get("step")
            # Not yet inside of what runs hooks, which the first optimizer of a class puts there.
            if getattr(step, "__code__", None) in _GRADIENT_SWITCHES:
                each.step = _step_late(step)  # type: ignore[method-assign]


def is_loaded() -> bool:
    """Return whether this process has the compiler, and so may compile."""
    return _COMPILER in sys.modules


def _made_in(module: str, member: Any) -> Any:
    """Return the wrapper of a module, inside of others, that is around a function; None: none."""
    while hasattr(member, "__wrapped__"):
        if getattr(member, "__globals__", {}).get("__name__") == module:
            return member
        member = member.__wrapped__
    return None


def _marked_late(marking: Any) -> Callable[..., Any]:
    """Return what calls a function as it is, and has it be marked once there is a compiler."""
    function = marking.__wrapped__

    def call(*args: Any, **kwargs: Any) -> Any:
        if not is_loaded():
            return function(*args, **kwargs)
        delattr(function, _MARK)
        return marking(*args, **kwargs)

    return call


_SWITCH = "_use_grad_for_differentiable"


def _gradient_switches() -> set[Any]:
    """Return the code around steps that switches gradients off, and imports the compiler."""
    decorate = getattr(sys.modules[Optimizer.__module__], _SWITCH, None)
    return set() if decorate is None else {decorate(lambda: None).__code__}


_GRADIENT_SWITCHES = _gradient_switches()


def _step_late(step: Any) -> Callable[..., Any]:
    """Return a step that does the same, without breaks for graphs that nobody makes."""
    plain = step.__wrapped__

    @functools.wraps(plain)
    def late(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if is_loaded():
            return step(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, *args, **kwargs)

    return late


@contextmanager
def compiler_unasked() -> Iterator[None]:
    """Make a DDP, which asks the compiler only how it is set, without one."""
    if is_loaded():
        yield
        return
    torch._dynamo = _Absent(_COMPILER)  # type: ignore[assignment]
    try:
        yield
    finally:
        if isinstance(vars(torch).get("_dynamo"), _Absent):
            del torch._dynamo


class _Absent:
    """The compiler's module, or that of its tools, before it is imported: by anything but DDP."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if not is_loaded():
            if (self._name, name) == (_COMPILER, "utils"):
                return _Absent(f"{_COMPILER}.utils")
            if name == "get_optimize_ddp_mode":
                return lambda: "ddp_optimizer"  # as torch._dynamo.config comes
        return getattr(importlib.import_module(self._name), name)


def backward(loss: Tensor, seed: Tensor) -> None:
    """Run backward from `loss`, (), whose own gradient is `seed`, (), of the same dtype.

    `torch.autograd.backward` compares the two shapes by what the compiler knows of symbols, for
    which it imports sympy; and then calls this.
    """
    run = getattr(torch.autograd.graph, "_engine_run_backward", None)
    if run is None or has_torch_function((loss,)) or loss.shape != seed.shape:
        torch.autograd.backward(loss, seed)
    else:
        run((loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True)


@contextmanager
def as_written() -> Iterator[None]:
    """Run compiled functions as they are written: what is only tried is not worth a compilation."""
    stance = getattr(torch.compiler, "set_stance", None)
    if stance is None:
        yield
        return
    with ExitStack() as stack:
        if is_loaded():
            stack.enter_context(stance("force_eager"))
            yield
            return
        torch_compile = torch.compile

        def first_compile(*args: Any, **kwargs: Any) -> Any:
            torch.compile = torch_compile
            stack.enter_context(stance("force_eager"))
            return torch_compile(*args, **kwargs)

        torch.compile = first_compile
        stack.callback(setattr, torch, "compile", torch_compile)
        yield
