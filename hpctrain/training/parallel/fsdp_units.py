"""Units of FSDP, the modules that it gathers as one, and parameters that every rank keeps whole."""

from __future__ import annotations

import copy
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.overrides import TorchFunctionMode

from hpctrain.data.loading.batch import moved
from hpctrain.errors import ConfigError
from hpctrain.launch.process_group import World
from hpctrain.training.compiler import as_written
from hpctrain.training.model.precision import real_view
from hpctrain.training.model.preparation import fitting_modules
from hpctrain.training.model.undisturbed import kept_generators
from hpctrain.training.task.task import Task
from hpctrain.utils.text import listed


def find_units(
    model: nn.Module, patterns: Sequence[str], unfit: Mapping[str, str] = {}
) -> list[str]:
    """Return the names of the modules whose parameters are gathered together, outermost first.

    What is in none of them is gathered with the model itself. Memory holds one or two units at a
    time, so that a unit should be a layer: large enough for a message that is worth it. Every rank
    calls a unit in every pass, and nothing else reads its parameters.

    Args:
        model: whose modules.
        patterns: names of modules, with * and ?, or of their classes; none: the blocks that the
            model repeats, which are the children of its module lists, and the outermost modules of
            every class, other than torch's own, that occurs more than once.
        unfit: modules that cannot be units, and why; without patterns they are gathered with what
            they are in, and the modules inside them are looked at.

    Raises:
        ConfigError: if a pattern fits nothing, or what cannot be a unit.
    """
    # A list of modules is never called, so that nothing would tell when to gather it.
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    }
    unfit = {**unfit, **_tied(model, modules)}
    if not patterns:
        units = _repeated(model, modules, unfit)
    else:
        units = _chosen(modules, patterns)
        for name in units:
            if name in unfit:
                raise ConfigError(
                    f"training.shard: {name} cannot be gathered as one: it {unfit[name]}. Name a "
                    "module around it, which holds all of that, or leave it out"
                )
    return [name for name in units if any(True for _ in modules[name].parameters())]


def _chosen(modules: dict[str, nn.Module], patterns: Sequence[str]) -> list[str]:
    chosen = {
        name for pattern in patterns for name in fitting_modules(modules, pattern, "training.shard")
    }
    return [name for name in modules if name in chosen]


def _repeated(
    model: nn.Module, modules: dict[str, nn.Module], unfit: Mapping[str, str]
) -> list[str]:
    counts = Counter(type(module) for module in modules.values())
    lists = {id(module) for module in model.modules() if isinstance(module, nn.ModuleList)}
    units: list[str] = []
    for name, module in modules.items():
        if name in unfit or any(name.startswith(f"{unit}.") for unit in units):
            continue
        kind = type(module)
        own = not kind.__module__.startswith("torch.")
        parent = model.get_submodule(name.rpartition(".")[0])
        if id(parent) in lists or (own and counts[kind] > 1):
            units.append(name)
    return units


def _tied(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Return the modules that share a parameter with one outside of them: it has one place only."""
    holders: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            holders.setdefault(parameter, []).append((f"{name}.{own}".lstrip("."), module))
    shared = {item: places for item, places in holders.items() if len(places) > 1}
    found = {}
    for name, module in modules.items():
        inside = set(module.modules())
        for parameter in module.parameters() if shared else ():
            for place, holder in shared.get(parameter, ()):
                if holder not in inside:
                    found[name] = f"shares a parameter with {place}, outside of it"
    return found


_PRETENDED_PASSES = 8
_REAL_PASSES = 4
"""So many, as a layer that is left out at random runs in most of them."""

_SKIPPED = "is not called in every pass, in which the other ranks would wait for this one"
_SEEN = {"data", "T", "mT", "H", "mH", "real", "imag"}
"""Properties that give the numbers of a parameter; all others say what it is only."""
_HARMLESS = {
    *("size", "dim", "numel", "nelement", "element_size", "stride", "is_floating_point"),
    *("is_complex", "requires_grad_", "type", "get_device", "register_hook", "__hash__"),
    *("detach_", "share_memory_"),
}
_IN_PLACE = {
    *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__"),
    *("__ipow__", "__imod__", "__iand__", "__ior__", "__ixor__"),
}
_VIEWS = {"detach", "view", "reshape", "flatten", "view_as", "squeeze", "unsqueeze", "__getitem__"}


@dataclass(frozen=True, slots=True)
class Findings:
    """What a trial has found.

    Attributes:
        unfit: modules that cannot be gathered as one for their forward pass: the reasons, fit to
            follow the name of the module in a sentence.
        moved: parameters that a forward pass changes, such as those of a teacher. What is gathered
            is a copy, whose changes would be lost.
    """

    unfit: Mapping[str, str] = field(default_factory=dict)
    moved: Sequence[str] = ()


def try_out(world: World, model: nn.Module, task: Task, fields: Any) -> Findings:
    """Find out what FSDP has to know of a model.

    Rank 0 runs the task a few times, if it can without a number being computed, else on the host;
    on copies of model and task. Where that fails nothing is known: what is wrong is reported by the
    dry run, with its traceback.

    Collective: all ranks.

    Args:
        world: the ranks.
        model: on the host, whole.
        task: computes the loss.
        fields: of one sample.
    """
    found: Findings | None = None
    with world.pulse.long_phase():
        if world.topology.is_rank_zero:
            rows = moved(fields, torch.device("cpu"))
            with kept_generators(world.device):
                for run in (_pretended, _real):
                    if found is None:
                        found = _try(run, model, task, rows)
        return world.communicator.broadcast(found) or Findings()


def try_whole(model: nn.Module, task: Task, fields: Any) -> None:
    """Run the task once on a model that is still whole, on the host; the model is used up.

    Without a number being computed, if that can be: then it takes no time and no memory.

    Raises:
        Exception: what the task raises on numbers, if it does on the host what it should do there.
    """
    try:
        _pretended(model, task, fields)
    except Exception:  # noqa: BLE001 - it may be of the pretence
        task.loss(model, fields)


Run = Callable[[nn.Module, Task, Any], Findings]


def _try(run: Run, model: nn.Module, task: Task, fields: Any) -> Findings | None:
    try:
        return run(model, task, fields)
    except Exception:  # noqa: BLE001 - code of the user's, on a device that it may not be meant for
        return None


def _pretended(model: nn.Module, task: Task, fields: Any) -> Findings:
    """Run on tensors that have shapes and no numbers, so that it costs next to nothing."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        copies = copy.deepcopy((model, task, fields))
    with mode:
        return _watched(*copies, passes=_PRETENDED_PASSES)


def _real(model: nn.Module, task: Task, fields: Any) -> Findings:
    return _watched(*copy.deepcopy((model, task, fields)), passes=_REAL_PASSES)


def _watched(model: nn.Module, task: Task, fields: Any, *, passes: int) -> Findings:
    watch = _Watch(model)
    with as_written(), watch:  # what is compiled would be compiled for the watch as well
        for _ in range(passes):
            task.loss(model, fields)
            watch.end_pass()
        skipped = watch.skipped()
        model.eval()
        # Here only what is read where counts: units that training does not call are another's.
        with suppress(Exception):
            task.evaluate(model, fields)
    return Findings({**skipped, **watch.read}, sorted(watch.moved))


class _Watch(TorchFunctionMode):
    """Sees which modules are called, and from where parameters are read.

    Attributes:
        read: by the names of modules: how a parameter inside was read while they did not run.
        moved: names of the parameters that were changed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.read: dict[str, str] = {}
        self.moved: set[str] = set()
        self._running: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._passes: list[Counter[str]] = []
        self._versions = {name: item._version for name, item in model.named_parameters()}
        self._model = model
        self._holders: dict[int, tuple[str, list[str]]] = {}
        names = {id(item): name for name, item in model.named_parameters()}
        # Tensors over the memory of parameters, held so that their ids stay theirs.
        self._views: dict[int, tuple[Tensor, str]] = {
            id(item): (item, name) for name, item in model.named_parameters()
        }
        for name, module in model.named_modules():
            if name:
                for item in module.parameters():
                    self._holders.setdefault(id(item), (names[id(item)], []))[1].append(name)
                module.register_forward_pre_hook(functools.partial(self._enter, name))
                module.register_forward_hook(functools.partial(self._leave, name), always_call=True)

    def end_pass(self) -> None:
        """Take note that a pass is over, and of what has changed inside of torch's functions."""
        self.moved |= {
            name
            for name, item in self._model.named_parameters()
            if item._version != self._versions.get(name, item._version)
        }
        self._passes.append(self._calls)
        self._calls = Counter()

    def skipped(self) -> dict[str, str]:
        """Return the modules that were not called equally often in every pass, and their like.

        Of a list of layers or experts a few passes leave out some; others follow later.
        """
        names = dict(self._model.named_modules())
        missing = {
            name
            for name in names
            if name and (not self._passes[0][name] or len({p[name] for p in self._passes}) > 1)
        }
        kinds = {(name.rpartition(".")[0], type(names[name])) for name in missing}
        return {
            name: _SKIPPED
            for name, module in names.items()
            if name and (name.rpartition(".")[0], type(module)) in kinds
        }

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Take note of the parameters that a function gets, and call it."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            harmless = getattr(func.__self__, "__name__", "") not in _SEEN
        else:
            harmless = name in _HARMLESS or name == "__set__"
        if not harmless:
            for item in _tensors([*args, *kwargs.values()]):
                self._look(item)
        result = func(*args, **kwargs)
        self._look_for_changes(func, name, args, kwargs.get("out"), result)
        return result

    def _look_for_changes(self, func: Any, name: str, args: Any, out: Any, result: Any) -> None:
        """Take note of parameters that a function has changed, by themselves or by a view."""
        first = list(_tensors([args[0]])) if args else []
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        sets = name == "__set__" and attribute == "data"
        if sets or (name.endswith("_") and not name.startswith("__")) or name in _IN_PLACE:
            self._note(first if name not in _HARMLESS else [])
        self._note(_tensors([out]))
        if name in _VIEWS or (name == "__get__" and attribute in _SEEN):
            for item in first:
                if isinstance(result, Tensor) and id(item) in self._views:
                    self._views[id(result)] = (result, self._views[id(item)][1])

    def _note(self, tensors: Iterable[Tensor]) -> None:
        self.moved |= {self._views[id(item)][1] for item in tensors if id(item) in self._views}

    def _look(self, item: Tensor) -> None:
        parameter, holders = self._holders.get(id(item), ("", []))
        for holder in holders:
            if not self._running[holder]:
                self.read.setdefault(
                    holder,
                    f"has its parameter {parameter} read outside of its forward pass: by another "
                    "module, or in another method",
                )

    def _enter(self, name: str, *_: Any) -> None:
        self._running[name] += 1
        self._calls[name] += 1

    def _leave(self, name: str, *_: Any) -> None:
        self._running[name] -= 1


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


logger = logging.getLogger("hpctrain")


def common_dtype(model: nn.Module) -> torch.dtype:
    """Return the real dtype that most numbers of the trained parameters have.

    FSDP gathers and reduces parameters of one dtype together, and no complex ones.
    """
    sizes = Counter[torch.dtype]()
    for item in model.parameters():
        if item.is_floating_point():
            sizes[item.dtype] += item.numel() * item.requires_grad
    return sizes.most_common(1)[0][0] if sizes else torch.float32


class WholeParameters:
    """Parameters that every rank has and updates, as with ddp.

    Numbers without rows, such as a temperature, those of another dtype than most have, and those
    that forward passes change, such as a teacher's.

    Attributes:
        named: by name.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, world_size: int, moved: Sequence[str] = ()
    ) -> None:
        """Put them on the device.

        Args:
            model: whose parameters, equal on all ranks.
            device: of this rank.
            world_size: number of ranks.
            moved: names of those that forward passes change.
        """
        common = common_dtype(model)
        self.named = {
            name: item
            for name, item in model.named_parameters()
            if name in moved
            or not item.ndim
            or item.is_complex()
            or (item.is_floating_point() and item.dtype != common)
        }
        for item in self.named.values():
            item.data = item.data.to(device)
        self._world_size = world_size

    def report(self) -> None:
        """Say which of them could have been spread, were they like most."""
        found = {name: item for name, item in self.named.items() if item.ndim}
        if found:
            logger.warning(
                "fsdp: every rank holds all of %s (%.1f MB): complex, of another dtype than most, "
                "or changed by forward passes",
                listed(list(found)),
                sum(item.numel() * item.element_size() for item in found.values()) / 1e6,
            )

    def clear_gradients(self) -> None:
        """Forget their gradients."""
        for item in self.named.values():
            item.grad = None

    def reduce(self) -> None:
        """Average their gradients, of which a missing one is 0, in a message for each dtype.

        Collective: all ranks.
        """
        messages: dict[torch.dtype, list[nn.Parameter]] = {}
        for item in self.named.values():
            if item.requires_grad:
                messages.setdefault(_sent_as(item), []).append(item)
        for dtype, items in messages.items():
            gradients = [
                torch.zeros_like(item) if item.grad is None else item.grad for item in items
            ]
            parts = [real_view(item.resolve_conj()).reshape(-1) for item in gradients]
            message = torch.cat([part.to(dtype) for part in parts])
            dist.all_reduce(message)
            means = (message / self._world_size).split([part.numel() for part in parts])
            for item, mean in zip(items, means, strict=True):
                item.grad = torch.empty_like(item)
                real_view(item.grad).copy_(mean.view(real_view(item.grad).shape))


def _sent_as(item: Tensor) -> torch.dtype:
    """Return the dtype in which a gradient is summed; single numbers cost no more in float64."""
    wide = not item.ndim or item.dtype.to_real() == torch.float64
    return torch.float64 if wide else torch.float32
