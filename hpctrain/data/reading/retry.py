"""Retries of reads that fail, and files that change while a run reads them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Dataset, Shard
from hpctrain.data.files.storage import HDF5_FAILURES
from hpctrain.data.reading.scatter import Destinations, RowReader
from hpctrain.errors import DatasetError

READ_RETRIES = 3
"""Tries of a read after the first, where nothing else is asked for."""
FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 30.0
"""Wait before the first retry, and before any; each is four times as long as the one before."""
CHECK_SECONDS = 10.0
"""Between checks of some of the files that have been read."""
MOST_CHECKED = 64
"""Files that are checked at one time: each may cost a metadata server a request."""

logger = logging.getLogger(__name__)


class Retrying:
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
                self._watch.check(everything=True)
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
        """Return whether the content is the same, as far as one can see."""
        return other is not None and self[:2] == other[:2]

    def is_begun_by(self, other: _Seen) -> bool:
        """Return whether the other may be this file, appended to."""
        return other.size >= self.size and other.inode == self.inode


class _Watch:
    """The files of the shards that were read, as they were when they were first read."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._stops = dataset.shard_stops
        self._is_known = np.zeros(len(dataset.shards), bool)
        self._seen: dict[str, _Seen] = {}
        self._growing = {each.path for each in dataset.shards if each.grows}
        self._to_check: list[str] = []
        self._next = time.monotonic() + CHECK_SECONDS

    def note(self, rows: Int64s, counts: Int64s) -> None:
        """Take down the files that rows lie in, and check some if it is time.

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
            self.check()
            self._next = time.monotonic() + CHECK_SECONDS

    def check(self, *, everything: bool = False) -> None:
        """Check some of the files that were read, each in its turn.

        Raises:
            DatasetError: if one is not what it was.
        """
        if everything:
            self._to_check = []
        if not self._to_check:
            self._to_check = list(self._seen)
        number = len(self._to_check) if everything else MOST_CHECKED
        checked, self._to_check = self._to_check[:number], self._to_check[number:]
        for path in checked:
            now, before = _identify(path), self._seen[path]
            if path in self._growing and now is not None and before.is_begun_by(now):
                continue
            if not before.is_same(now):
                raise DatasetError(
                    f"{path}: this file {_difference(before, now)} while the run reads it: what "
                    "was read before and after does not belong together. Bring the old file back, "
                    "or start a new run with the new one"
                )

    def _take_down(self, shard: Shard) -> None:
        for path in (shard.path, *shard.sources):
            # A shard that is not there is for its reader to report; HDF5 would make up the values
            # of a source that is not.
            seen = _identify(path)
            if seen is not None:
                self._seen.setdefault(path, seen)
            elif path != shard.path:
                raise DatasetError(
                    f"{shard.path}: its values come from {path}, which is not there (any more); "
                    "HDF5 would give fill values in their place. Bring it back"
                )


def _identify(path: str) -> _Seen | None:
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
