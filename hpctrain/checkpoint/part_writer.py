"""A rank's own part of a checkpoint, written in the background; rank 0 makes it whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hpctrain.checkpoint.format import write_part
from hpctrain.checkpoint.host import HostCopies
from hpctrain.checkpoint.writing import Written
from hpctrain.errors import CheckpointError

_TRIES = 2
_PAUSE_SECONDS = 1.0

Outcome = dict[str, Written] | str
"""The files of a part, or why they could not be written."""


class PartWriter:
    """Writes the parts of one rank, other than rank 0. Its thread never communicates.

    Attributes:
        done: so many parts have been written, or have failed.
    """

    def __init__(self, rank: int) -> None:
        self.done = 0
        self._rank = rank
        self._host = HostCopies()
        self._thread: threading.Thread | None = None
        self._outcome: Outcome = {}

    def write(
        self, folder: Path, model: Mapping[str, Tensor], training: Mapping[str, Tensor]
    ) -> None:
        """Copy tensors to the host and write them in the background; one part at a time."""
        copies = self._host.copy("model", model), self._host.copy("training", training)
        self._thread = threading.Thread(
            target=self._write, args=(folder, *copies), name="hpctrain-checkpoint"
        )
        self._thread.start()

    def finish(self) -> Outcome:
        """Wait for the part that is being written, and return what has come of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._outcome

    def _write(
        self, folder: Path, model: Mapping[str, Tensor], training: Mapping[str, Tensor]
    ) -> None:
        for attempt in range(1, _TRIES + 1):
            try:
                self._outcome = write_part(folder, model, training, self._rank)
                break
            except (OSError, CheckpointError) as error:
                self._outcome = str(error)
                if attempt < _TRIES:
                    time.sleep(_PAUSE_SECONDS)
        self.done += 1
