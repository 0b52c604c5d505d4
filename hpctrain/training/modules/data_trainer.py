"""`self.trainer` of a data module: the run as one process has it.

What a data module makes is for all ranks together, and is cut for them here: a loader's batch size
is that of a step. One that shares its batch size, or its files, out among the ranks by itself would
do so twice; so it is told of one process, and the header of the log says so.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from hpctrain.training.modules.stand_in import TrainerStandIn
from hpctrain.utils.text import listed

_OF_ONE_PROCESS = ("world_size", "num_devices", "num_nodes")
_LATER = (
    *("estimated_stepping_batches", "num_training_batches", "num_val_batches", "optimizers"),
    *("lr_scheduler_configs", "train_dataloader", "val_dataloaders", "callbacks", "logger"),
    *("loggers", "callback_metrics", "logged_metrics"),
)
"""What depends on the data, or is made after them."""


class DataTrainer:
    """Facts of the run for a data module, as far as they are known when it makes its data."""

    def __init__(self, facts: TrainerStandIn, *, is_bound: bool) -> None:
        """Tell of a run.

        Args:
            facts: those of its module.
            is_bound: whether all of them are known.
        """
        self._facts = facts
        self._is_bound = is_bound
        self._asked: set[str] = set()

    def bind(self, facts: TrainerStandIn) -> None:
        """Take the facts of the run, once they are all there."""
        self._facts, self._is_bound = facts, True

    def notes(self) -> list[str]:
        """Return what the header should say of numbers that are not those of the ranks."""
        if not self._asked or self._facts.world_size == 1:
            return []
        asked = listed(sorted(self._asked), 3)
        told = f"the datamodule has asked for {asked}, and was told 1: what it makes is for all "
        return [f"{told}ranks together, and the batch size of its loaders that of a step"]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in _OF_ONE_PROCESS:
            self._asked.add(name)
            return 1
        if name in _LATER and not self._is_bound:
            raise AttributeError(
                f"self.trainer.{name} of a datamodule: it is known once the data are there; the "
                "module's own hooks, such as configure_optimizers, have it"
            )
        return getattr(self._facts, name)

    def __deepcopy__(self, memo: Any) -> DataTrainer:
        return self

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        # A collate_fn that is the data module's method takes it along to the workers.
        return _nobody, ()


def _nobody() -> None:
    """Stand for the trainer of a data module that is in another process."""


def introduce(datamodule: Any, facts: TrainerStandIn, *, is_bound: bool) -> DataTrainer | None:
    """Give a data module its trainer; None is none, and neither are a module's own loaders."""
    if datamodule is None or getattr(datamodule, "of_module", False):
        return None
    made = DataTrainer(facts, is_bound=is_bound)
    with suppress(AttributeError):  # one with slots has no place for it
        datamodule.trainer = made
    return made
