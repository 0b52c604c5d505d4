"""What a script finds after a run: its module trained, whole, on the host."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from hpctrain.checkpoint.export import Weights
from hpctrain.checkpoint.format import resolved
from hpctrain.checkpoint.tensors import tensors_from_raw
from hpctrain.config import Config
from hpctrain.lightning.facts import run_folder
from hpctrain.training.modules.unsharded import Unsharded
from hpctrain.training.plain_names import load_checked

_RANK_ZERO = (
    *("lightning_utilities.core.rank_zero", "lightning.fabric.utilities.rank_zero"),
    *("lightning.pytorch.utilities.rank_zero", "pytorch_lightning.utilities.rank_zero"),
    "lightning_fabric.utilities.rank_zero",
)


class AfterFit:
    """A callback, the last one: takes what the ranks hold together while they are together."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = Unsharded(model)
        self._weights: dict[str, Tensor] = {}
        self._trained = False

    def on_fit_end(self, trainer: Any, module: nn.Module) -> None:
        """Take the whole parameters of a module whose rows are spread. Collective: all ranks."""
        del trainer
        self._trained = True
        self._weights = Unsharded.gathered(module)

    def settle(self, config: Config, *, is_complete: bool) -> None:
        """Leave the module as a script expects it.

        Args:
            config: of the run.
            is_complete: whether it has come to its end, in this job or before.
        """
        if self._weights:
            self._before.restore(self._weights)
            self._weights = {}
        if is_complete and not self._trained:
            # The job before had come to the end: nothing was trained here.
            weights = Weights.read(resolved(run_folder(config)))
            load_checked(self._model, tensors_from_raw(weights.tensors), str(weights.source))
        self._model.cpu()


def tell_rank(rank: int) -> None:
    """Let Lightning's `rank_zero_only` know the rank, where a script has imported it.

    Functions that a script or a logger decorates with it run on rank 0 then: under mpirun there is
    no variable by which it would know.
    """
    for name in _RANK_ZERO:
        decorator = getattr(sys.modules.get(name), "rank_zero_only", None)
        if decorator is not None:
            decorator.rank = rank
