"""Reading that bears a passing failure, and notices files that change while a run reads them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpctrain.data.dataset import Dataset, Shard
from hpctrain.data.order.permutation import Int64s
from hpctrain.data.reading.destinations import Destinations
from hpctrain.data.reading.row_reader import RowReader
from hpctrain.data.storage import HDF5_FAILURES
from hpctrain.errors import DatasetError

READ_RETRIES = 3
FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 30.0
"""Before the first retry, and at most; each wait is four times as long as the one before."""
LOOK_SECONDS = 10.0
"""So often some of the files that have been read are looked at."""
MOST_LOOKS = 64
"""Files that are looked at one time: each may cost a metadata server a request."""

logger = logging.getLogger(__name__)


class SteadyAccess:
    """Reads rows through another reader. For one thread at a time.

    Attributes:
        failed_reads: how often a read failed, whatever came of it.
    """

    def __init__(self, reader: RowReader, retries: int = READ_RETRIES) -> None:
        """Read by `reader`, and try so many times more what fails."""
        self.failed_reads = 0
        self._reader = reader
        self._retries = retries
        self._watch = _Watch(reader.dataset)

    @property
    def dataset(self) -> Dataset:
        return self._reader.dataset

    @property
    def files_opened(self) -> int:
        return self._reader.files_opened

    def read_runs(
        self, name: str, rows: Int64s, counts: Int64s, out: npt.NDArray[Any], places: Int64s
    ) -> None:
        """Read runs of consecutive rows, as `RowReader.read_runs` does."""
        self._try(rows, counts, lambda: self._reader.read_runs(name, rows, counts, out, places))

    def scatter_runs(
        self, name: str, rows: Int64s, counts: Int64s, into: Destinations, places: Int64s
    ) -> None:
        """Read runs of consecutive rows, each to its place, as `RowReader.scatter_runs` does."""
        self._try(rows, counts, lambda: self._reader.scatter_runs(name, rows, counts, into, places))

    def close(self) -> None:
        """Close all files. Reading on opens them again."""
        self._reader.close()

    def _try(self, rows: Int64s, counts: Int64s, read: Callable[[], None]) -> None:
        """Read these runs of rows, again and again where that may help."""
        try:
            self._watch.note(rows, counts)
        except DatasetError:
            self.failed_reads += 1
            raise
        wait = FIRST_WAIT_SECONDS
        for left in range(self._retries, -1, -1):
            try:
                read()
                return
            except DatasetError as error:
                self.failed_reads += 1
                # A file that became another explains more than what a read of it fails of.
                self._watch.look(everything=True)
                if not left or not isinstance(error.__cause__, HDF5_FAILURES):
                    raise
                logger.warning("%s. Trying again in %g s, %d tries left", error, wait, left)
            self._reader.close()
            time.sleep(wait)
            wait = min(4 * wait, LONGEST_WAIT_SECONDS)


class _Seen(NamedTuple):
    """What is known of a file without reading it.

    Size and time tell one content from another. The inode only helps to say what happened: user
    space file systems make numbers up as they go.
    """

    size: int
    modified_ns: int
    inode: int

    def is_same(self, other: _Seen | None) -> bool:
        """Tell whether the content is the same, as far as can be told."""
        return other is not None and self[:2] == other[:2]


class _Watch:
    """The files of the shards that were read, as they were when they were first read."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._stops = dataset.shard_stops
        self._is_known = np.zeros(len(dataset.shards), bool)
        self._seen: dict[str, _Seen] = {}
        self._to_look: list[str] = []
        self._next = time.monotonic() + LOOK_SECONDS

    def note(self, rows: Int64s, counts: Int64s) -> None:
        """Take down the files that rows lie in, and look at some if it is time.

        Raises:
            DatasetError: if one is not what it was.
        """
        firsts = np.searchsorted(self._stops, rows, side="right")
        lasts = np.searchsorted(self._stops, rows + counts - 1, side="right")
        if not (self._is_known[firsts].all() and self._is_known[lasts].all()):
            for first, last in set(zip(firsts.tolist(), lasts.tolist(), strict=True)):
                for index in range(first, last + 1):
                    if not self._is_known[index]:
                        self._take_down(self._dataset.shards[index])
                        self._is_known[index] = True
        if time.monotonic() >= self._next:
            self.look()
            self._next = time.monotonic() + LOOK_SECONDS

    def look(self, *, everything: bool = False) -> None:
        """Look at some of the files that were read, each in its turn.

        Raises:
            DatasetError: if one is not what it was.
        """
        if everything:
            self._to_look = []
        if not self._to_look:
            self._to_look = list(self._seen)
        number = len(self._to_look) if everything else MOST_LOOKS
        looked, self._to_look = self._to_look[:number], self._to_look[number:]
        for path in looked:
            now, before = _look_at(path), self._seen[path]
            if not before.is_same(now):
                raise DatasetError(
                    f"{path}: this file {_difference(before, now)} while the run reads it: what "
                    "was read before and after does not belong together. Bring the old file back, "
                    "or start a new run with the new one"
                )

    def _take_down(self, shard: Shard) -> None:
        for path in (shard.path, *shard.sources):
            # A shard that is not there is for its reader to tell; HDF5 would make up the values
            # of a source that is not.
            seen = _look_at(path)
            if seen is not None:
                self._seen.setdefault(path, seen)
            elif path != shard.path:
                raise DatasetError(
                    f"{shard.path}: its values come from {path}, which is not there (any more); "
                    "HDF5 would give fill values in their place. Bring it back"
                )


def _look_at(path: str) -> _Seen | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return _Seen(found.st_size, found.st_mtime_ns, found.st_ino)


def _difference(before: _Seen, now: _Seen | None) -> str:
    if now is None:
        return "went away"
    if now.size < before.size:
        return f"was truncated from {before.size} to {now.size} bytes"
    if now.inode != before.inode:
        return "was replaced by another"
    return "was written to"
