"""What a module puts into a checkpoint by itself: `on_save_checkpoint`, `on_load_checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hpctrain.checkpoint.state import UnsavableError
from hpctrain.errors import CheckpointError
from hpctrain.training.modules.overrides import is_own, place_of
from hpctrain.training.modules.stand_in import TrainerStandIn

SAVES, LOADS = "on_save_checkpoint", "on_load_checkpoint"


OWN_STATE = "checkpoint_of_module"
"""Its name among what is saved with a run."""


class OwnState:
    """Saved with a run: whatever a module adds to its checkpoint, tensors and what JSON has."""

    def __init__(self, module: nn.Module, trainer: TrainerStandIn) -> None:
        self._module = module
        self._trainer = trainer

    @staticmethod
    def is_of(module: nn.Module) -> bool:
        """Tell whether a module adds something."""
        return is_own(module, SAVES) or is_own(module, LOADS)

    def state_dict(self) -> dict[str, Any]:
        """Return what `on_save_checkpoint` adds.

        Raises:
            UnsavableError: if it changes which tensors of the model are saved.
        """
        checkpoint = self._facts()
        if is_own(self._module, SAVES):
            given = dict(checkpoint["state_dict"])
            self._module.on_save_checkpoint(checkpoint)  # type: ignore[operator]
            if not _same(given, checkpoint.get("state_dict")):
                raise UnsavableError(self._told(SAVES))
        return {key: item for key, item in checkpoint.items() if key not in self._facts()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give `on_load_checkpoint` what was added; the model has its tensors by then.

        Raises:
            CheckpointError: if it changes tensors on their way into the model.
        """
        checkpoint = {**self._facts(), **state}
        if is_own(self._module, LOADS):
            given = dict(checkpoint["state_dict"])
            self._module.on_load_checkpoint(checkpoint)  # type: ignore[operator]
            if not _same(given, checkpoint.get("state_dict")):
                raise CheckpointError(self._told(LOADS))

    def _facts(self) -> dict[str, Any]:
        return {
            "epoch": self._trainer.current_epoch,
            "global_step": self._trainer.global_step,
            "state_dict": dict(self._module.state_dict()),
        }

    def _told(self, method: str) -> str:
        return (
            f"{type(self._module).__name__}.{method} ({place_of(self._module, method)}) changes "
            'checkpoint["state_dict"]: a checkpoint holds the tensors of the model as they are. '
            "Leave a part of it out by register_buffer(..., persistent=False), and rename by "
            "checkpoint.initialize_names"
        )


def _same(given: Mapping[str, Any], now: Any) -> bool:
    return (
        isinstance(now, Mapping)
        and given.keys() == now.keys()
        and all(now[name] is item for name, item in given.items())
    )
