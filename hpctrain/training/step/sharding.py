"""Which parts of a model are gathered as one, where its parameters are spread over the ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from hpctrain.errors import ConfigError
from hpctrain.training.step.patterns import fitting_modules


def find_units(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the modules whose parameters are gathered together, outermost first.

    What is in none of them is gathered with the model itself. Memory holds one or two units at a
    time, so that a unit should be a layer: large enough for a message that is worth it.

    Args:
        model: whose modules.
        patterns: names of modules, with * and ?, or of their classes; none: the blocks that the
            model repeats, which are the children of its module lists, and the outermost modules of
            every class, other than torch's own, that occurs more than once.

    Raises:
        ConfigError: if a pattern fits nothing, or a parameter is in two units that are not inside
            one another.
    """
    # A list of modules is never called, so that nothing would tell when to gather it.
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    }
    units = _chosen(modules, patterns) if patterns else _repeated(model, modules)
    units = [name for name in units if any(True for _ in modules[name].parameters())]
    _refuse_tied(modules, units)
    return units


def _chosen(modules: dict[str, nn.Module], patterns: Sequence[str]) -> list[str]:
    chosen = {
        name for pattern in patterns for name in fitting_modules(modules, pattern, "training.shard")
    }
    return [name for name in modules if name in chosen]


def _repeated(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    counts = Counter(type(module) for module in modules.values())
    lists = {id(module) for module in model.modules() if isinstance(module, nn.ModuleList)}
    units: list[str] = []
    for name, module in modules.items():
        if any(name.startswith(f"{unit}.") for unit in units):
            continue
        kind = type(module)
        own = not kind.__module__.startswith("torch.")
        parent = model.get_submodule(name.rpartition(".")[0])
        if id(parent) in lists or (own and counts[kind] > 1):
            units.append(name)
    return units


def _refuse_tied(modules: dict[str, nn.Module], units: Sequence[str]) -> None:
    """Refuse what would be torn apart: one parameter under the care of two units."""
    owner: dict[int, str] = {}
    for unit in reversed(units):  # the innermost takes its parameters first
        for name, parameter in modules[unit].named_parameters():
            first = owner.setdefault(id(parameter), unit)
            if not (first == unit or first.startswith(f"{unit}.")):
                raise ConfigError(
                    f"training.shard: the units {unit} and {first} share the parameter {name}, "
                    "which has one place only: name a module that holds both of them, or neither"
                )
