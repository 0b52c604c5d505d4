"""Which parts of a model are gathered as one, where its parameters are spread over the ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from hpctrain.errors import ConfigError
from hpctrain.training.step.patterns import fitting_modules


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
