"""Parameters that are trained differently from the others: chosen by their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from hpctrain.checkpoint.state import HasParameters
from hpctrain.config.schema import ParameterGroup
from hpctrain.errors import ConfigError
from hpctrain.utils.text import did_you_mean

LR_FACTOR = "lr_factor"
"""Key of an optimizer's groups: their learning rate as a factor of the run's."""


def parameter_groups(
    model: HasParameters, groups: Sequence[ParameterGroup], *, decay_norms_and_biases: bool
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups, as a torch optimizer takes them.

    The first pattern that fits a parameter counts; a weight decay that a pattern gives holds for
    norms and biases too.

    Args:
        model: whose parameters.
        groups: of the config.
        decay_norms_and_biases: False: parameters of fewer than two dimensions, which are the
            scales and shifts of normalisations and all biases, have a weight decay of 0.

    Returns:
        Groups in the order of their first parameters, each with `params` and with what differs
        from the optimizer's own values. Empty if there is nothing to train.

    Raises:
        ConfigError: if a pattern fits no parameter that no pattern before it has taken.
    """
    found: dict[tuple[float, float | None], dict[str, Any]] = {}
    fitting = set()
    names = [name for name, item in model.named_parameters() if item.requires_grad]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, decay = 1.0, None if decay_norms_and_biases or parameter.ndim > 1 else 0.0
        for index, group in enumerate(groups):
            if fnmatch.fnmatchcase(_without_compile(name), _without_compile(group.pattern)):
                fitting.add(index)
                factor = group.lr_factor
                decay = decay if group.weight_decay is None else group.weight_decay
                break
        made = found.setdefault((factor, decay), {"params": []})
        made["params"].append(parameter)
        if factor != 1:
            made[LR_FACTOR] = factor
        if decay is not None:
            made["weight_decay"] = decay
    for index, group in enumerate(groups):
        if index not in fitting:
            hint = did_you_mean(group.pattern, names, quote='"')
            raise ConfigError(
                f'optimizer.groups.pattern = "{group.pattern}": fits no parameter that is trained '
                f"and that no pattern before it has taken{hint} (names are such as "
                f'"{names[0] if names else "layers.0.weight"}")'
            )
    return list(found.values())


def _without_compile(name: str) -> str:
    """Return a name, or a pattern of names, without what torch.compile has put into it."""
    return name.replace("_orig_mod.", "")
