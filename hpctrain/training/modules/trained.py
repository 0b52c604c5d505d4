"""Which parameters a run trains: said once, by the optimizer, before ranks share the work."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from hpctrain.checkpoint.state import HasParameters
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.utils.text import listed, plural


def settle_parameters(
    optimizer: Optimizer, held: HasParameters, place: str, *, spread: bool
) -> list[str]:
    """Compare what an optimizer updates with what a model trains; what it leaves out is frozen.

    Else that would get gradients, which count in their norm, and nobody would use them.

    Args:
        optimizer: before its first step.
        held: the model, or what this rank holds of it.
        place: where the optimizer comes from, for messages.
        spread: whether `held` is rows, of which it is settled what is trained.

    Returns:
        What the header should say of it.

    Raises:
        ConfigError: if it updates what is no parameter of the model, or leaves out rows.
    """
    names: dict[Any, str] = {item: name for name, item in held.named_parameters()}
    given = [item for group in optimizer.param_groups for item in group["params"]]
    if strange := [str(tuple(item.shape)) for item in given if item not in names]:
        raise ConfigError(
            f"{place}: the optimizer updates {plural(len(strange), 'tensor')} of shape "
            f"{listed(strange, 3)} that no attribute of the module holds as a parameter: no "
            "checkpoint would hold them. Make it a parameter of the module; and take parameters "
            "from the module in this very method, since those that were put aside in __init__ may "
            "be others by now"
        )
    if not any(item.requires_grad for item in given):
        raise ConfigError(f"{place}: no parameter of the optimizer requires a gradient")
    updated = set(given)
    left_out = [item for item in names if item.requires_grad and item not in updated]
    if not left_out:
        return []
    which = listed([names[item] for item in left_out], 3)
    if spread:
        raise ConfigError(
            f"{place}: the optimizer leaves out {which}: with parameters that are spread over "
            "ranks these have to be frozen before, by requires_grad_(False) where the module is "
            "built; with ddp that is done here"
        )
    for item in left_out:
        item.requires_grad_(False)
    return [f"{place}: the optimizer leaves out {which}: they are frozen"]


class Trained:
    """Sees that a run trains the same parameters all the time.

    Ranks reduce the gradients that there were in the beginning. One that is trained later on would
    have another gradient on each of them, and on one rank the sum of all its gradients so far.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, place: str) -> None:
        """Take note of what is trained.

        Args:
            model: whose parameters.
            optimizer: that updates them.
            place: where it comes from, for messages.
        """
        self._model = model
        self._optimizer = optimizer
        self._place = place
        self._frozen = {name for name, item in model.named_parameters() if not item.requires_grad}
        self._groups = [len(group["params"]) for group in optimizer.param_groups]

    def check(self) -> None:
        """Compare that with what is trained now.

        Raises:
            TrainingError: naming what has changed.
        """
        names = {name for name, item in self._model.named_parameters() if not item.requires_grad}
        way_out = (
            "A run trains the same parameters from its beginning to its end: let them have a group "
            "with a learning rate of 0 meanwhile, or train in two runs, the second with "
            "checkpoint.initialize_from"
        )
        if changed := sorted(names ^ self._frozen):
            now = "frozen" if changed[0] in names else "no longer frozen"
            raise TrainingError(
                f"{listed(changed, 3)}: {now} since the run began, by a hook or a callback. "
                f"{way_out}"
            )
        if [len(group["params"]) for group in self._optimizer.param_groups] != self._groups:
            raise TrainingError(
                f"{self._place}: the optimizer has other groups of parameters than when it was "
                f"made, by a hook or a callback. {way_out}"
            )
