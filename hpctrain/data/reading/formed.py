"""Rows of fields that are not delivered as they are stored: read, and made what is wished for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import h5py
import numpy as np

from hpctrain.data.arrays import Bytes, Int64s, groups_of, within
from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.files.storage import HDF5_FAILURES
from hpctrain.data.forms import Form, Rows, UnfitRowError
from hpctrain.data.reading.handles import Handles, Locate, open_hdf5, where_it_is
from hpctrain.data.reading.scatter import Destinations, RowReader, scatter_by_runs
from hpctrain.data.reading.shards import MOST_OPEN_IN_HDF5
from hpctrain.data.reading.threads import ThreadMemory
from hpctrain.errors import DatasetError

READ_BYTES = 16 * 2**20
"""Stored rows that are read at once, about."""
MOST_TEXTS = 2**14
"""Rows of texts that are read at once, whatever their length."""


def stored_of(dataset: Dataset) -> Dataset:
    """Return a dataset of the fields as they are stored, by the paths of their HDF5 datasets.

    Of fields that are delivered as they are stored, nothing changes.
    """
    paths = {name: _path(name, field) for name, field in dataset.fields.items()}
    fields = {}
    for name, field in dataset.fields.items():
        form = field.form
        if form is None:
            fields[name] = field
        elif form.is_direct:
            fields[form.path] = Field(form.shape, form.stored)
    shards = tuple(
        dataclasses.replace(
            shard,
            layouts={path: shard.layouts[name] for name, path in paths.items() if path in fields},
        )
        for shard in dataset.shards
    )
    return Dataset(source=dataset.source, fields=fields, shards=shards)


def _path(name: str, field: Field) -> str:
    return name if field.form is None else field.form.path


class FormedReader:
    """Reads rows through a reader of stored ones. For one thread at a time."""

    def __init__(
        self,
        dataset: Dataset,
        axis: int,
        open_stored: Callable[[Dataset], RowReader],
        locate: Locate = where_it_is,
    ) -> None:
        """Prepare; no file is opened yet.

        Args:
            dataset: of the fields as they are delivered.
            axis: of the HDF5 datasets, which counts the rows.
            open_stored: returns a reader of the fields as they are stored.
            locate: as ShardReader takes it.
        """
        self.dataset = dataset
        self._axis = axis
        self._stored = open_stored(stored_of(dataset))
        self._files: Handles[h5py.File] = Handles(
            open_hdf5, h5py.File.close, locate, MOST_OPEN_IN_HDF5
        )
        self._rows, self._staging = ThreadMemory(), ThreadMemory()

    @property
    def files_opened(self) -> int:
        """How often a file was opened."""
        return self._stored.files_opened + self._files.opened

    def read_runs(
        self, name: str, rows: Int64s, counts: Int64s, out: Bytes, places: Int64s
    ) -> None:
        """Read runs of consecutive rows, as `RowReader.read_runs` does."""
        field = self.dataset.fields[name]
        form = field.form
        if form is None:
            self._stored.read_runs(name, rows, counts, out, places)
            return
        made = out.view(field.dtype.newbyteorder("=")).reshape(len(out), *field.shape)
        most = max(1, READ_BYTES // form.row_bytes) if form.is_direct else MOST_TEXTS
        rows, counts, places = _shortened(rows, counts, places, most)
        for group in groups_of(counts, most):
            first, count, to = rows[group], counts[group], places[group]
            samples = np.repeat(first, count) + within(count)
            stored = self._read(form, first, count)
            try:
                made[np.repeat(to, count) + within(count)] = form.make(stored)
            except UnfitRowError as error:
                ((shard, row),) = self.dataset.places(samples[[error.row]])
                raise DatasetError(
                    f'{shard.path}: field "{name}", row {row}: {error} (data.fields)'
                ) from None

    def scatter_runs(
        self, name: str, rows: Int64s, counts: Int64s, into: Destinations, places: Int64s
    ) -> None:
        """Read runs of consecutive rows, each to its place, as `RowReader.scatter_runs` does."""
        if self.dataset.fields[name].form is None:
            self._stored.scatter_runs(name, rows, counts, into, places)
        else:
            scatter_by_runs(self, self._staging, name, rows, counts, into, places)

    def close(self) -> None:
        """Close all files. Reading on opens them again."""
        self._stored.close()
        self._files.close()

    def _read(self, form: Form, firsts: Int64s, counts: Int64s) -> Rows:
        """Return stored rows, (rows, *shape)."""
        total = int(counts.sum())
        if not form.is_direct:
            return self._read_by_hdf5(form, firsts, counts)
        memory = self._rows.take(total * form.row_bytes).reshape(total, form.row_bytes)
        self._stored.read_runs(form.path, firsts, counts, memory, np.cumsum(counts) - counts)
        rows: Rows = memory.view(form.stored.newbyteorder("="))
        return rows.reshape(total, *form.shape)

    def _read_by_hdf5(self, form: Form, firsts: Int64s, counts: Int64s) -> Rows:
        """Return rows that hold pointers, or are otherwise for h5py alone to convert."""
        stops, shards = self.dataset.shard_stops, self.dataset.shards
        found = []
        for row, count in zip(firsts.tolist(), counts.tolist(), strict=True):
            done = 0
            while done < count:
                index = int(np.searchsorted(stops, row + done, side="right"))
                shard = shards[index]
                first = row + done - int(stops[index]) + shard.samples
                size = min(count - done, shard.samples - first)
                try:
                    dataset = self._files.get(shard)[form.path]
                    of = dataset
                    if form.stored.hasobject and form.members:
                        of = dataset.fields(form.members[0])
                    rows = (slice(None),) * self._axis + (slice(first, first + size),)
                    part = of[rows]
                except HDF5_FAILURES as error:
                    raise DatasetError(
                        f'{shard.path}: field "{form.path}", row {first}: {error}'
                    ) from error
                found.append(np.moveaxis(part, self._axis, 0))
                done += size
        return np.concatenate(found)


def _shortened(
    firsts: Int64s, counts: Int64s, places: Int64s, most: int
) -> tuple[Int64s, Int64s, Int64s]:
    """Cut runs into such of at most `most` rows."""
    pieces = -(-counts // most)
    owners = np.repeat(np.arange(len(counts)), pieces)
    done = within(pieces) * most
    return firsts[owners] + done, np.minimum(most, counts[owners] - done), places[owners] + done
