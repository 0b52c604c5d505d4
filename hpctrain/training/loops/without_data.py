"""A run without a loader: its samples come from elsewhere, such as an environment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hpctrain.config import Config
from hpctrain.config.semantics import NEWEST
from hpctrain.config.semantics import RECORD as SEMANTICS
from hpctrain.data.loading.batch import Batch
from hpctrain.training.checkpointing import Resumed
from hpctrain.training.position import Position, StopAt
from hpctrain.training.staging import Staging

_ENDLESS = 2**62
"""Samples of an epoch that never ends."""


class WithoutData:
    """Stands for the data of a run that has none: each step counts as one sample.

    Attributes:
        place: where the run goes on.
        stop_at: how long it is.
    """

    validations: Sequence[Any] = ()

    def __init__(self, config: Config, resumed: Resumed | None) -> None:
        self.place = Position() if resumed is None else resumed.place
        self.stop_at = StopAt(
            max_epochs=None,
            max_steps=config.training.max_steps,
            max_samples=None,
            epoch_samples=_ENDLESS,
            global_batch_size=1,
        )
        self.staging = Staging()
        self.train_loader = _Steps()

    def record(self, config: Config) -> dict[str, Any]:
        """Return the rules of the run."""
        return {SEMANTICS: NEWEST.to_json()}

    def close(self) -> None:
        """Do nothing: there is nothing open."""


class _Steps:
    """Serves steps without samples."""

    wait_seconds = 0.0
    failed_reads = 0
    epoch_size = _ENDLESS

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield steps for ever."""
        position = start
        while True:
            yield Batch(fields={}, size=1, global_size=1, epoch=epoch, start=position)
            position += 1
