"""What the dry run has seen a model do to itself, and what of that cannot be trained rightly."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from hpctrain.errors import TrainingError
from hpctrain.topology import Communicator, raise_together
from hpctrain.utils.text import listed

logger = logging.getLogger("hpctrain")


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
    """Refuse what would be trained wrongly, and tell what was left behind. Collective: all ranks.

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
