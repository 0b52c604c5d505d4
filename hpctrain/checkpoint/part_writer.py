"""A rank's own part of a checkpoint, written in the background; rank 0 makes it whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hpctrain.checkpoint.format import Snapshot, write_part
from hpctrain.checkpoint.host import HostCopies
from hpctrain.checkpoint.writing import Written
from hpctrain.errors import CheckpointError

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

    def write(self, folder: Path, snapshot: Snapshot) -> None:
        """Copy tensors to the host, what is lent meanwhile, and write them in the background.

        One part at a time.
        """
        model = self._host.copy("model", snapshot.model)
        training = self._host.copy("training", snapshot.training)
        lent = self._host.copy_later("lent", snapshot.lent)

        def write() -> None:
            try:
                lent.make()
                self._outcome = self._write(folder, model, training | lent.host)
            except (OSError, CheckpointError) as error:
                self._outcome = str(error)
            self.done += 1

        self._thread = threading.Thread(target=write, name="hpctrain-checkpoint")
        self._thread.start()
        snapshot.lend(lent.wait)

    def finish(self) -> Outcome:
        """Wait for the part that is being written, and return what has come of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._outcome

    def _write(
        self, folder: Path, model: Mapping[str, Tensor], training: Mapping[str, Tensor]
    ) -> dict[str, Written]:
        """Write the part; once more if the file system fails."""
        try:
            return write_part(folder, model, training, self._rank)
        except OSError:
            time.sleep(_PAUSE_SECONDS)
            return write_part(folder, model, training, self._rank)
