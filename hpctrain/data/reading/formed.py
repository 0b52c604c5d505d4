"""Rows of fields that are not delivered as they are stored: read, and made what is wished for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import h5py
import numpy as np

from hpctrain.data.arrays import Bytes, Int64s, groups_of, within
from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.files.form_opening import categories_in
from hpctrain.data.files.global_heaps import require_sound_heap
from hpctrain.data.files.storage import HDF5_FAILURES
from hpctrain.data.forms import Form, Rows, UnfitRowError
from hpctrain.data.reading.handles import Locate, handles_in_hdf5, where_it_is
from hpctrain.data.reading.other_axis import Box, OtherAxisReader
from hpctrain.data.reading.scatter import Destinations, RowReader, scatter_by_runs
from hpctrain.data.reading.threads import ThreadMemory
from hpctrain.data.view import Part
from hpctrain.errors import DatasetError

READ_BYTES = 16 * 2**20
"""Stored rows that are read at once, about."""
MOST_TEXTS = 2**14
"""Rows of texts that are read at once, whatever their length."""
MOST_OF_A_ROW = 1 / 2
"""Bytes that a selection needs of those of a row, at most, to be read by itself: whole rows are
decoded by several threads."""
LEAST_PIECE_BYTES = 4096
"""Smaller pieces of rows that lie as in memory are not read by themselves."""


@dataclass(frozen=True, slots=True)
class Narrowed:
    """The smallest box of a row that holds all that is selected of it.

    Attributes:
        bounds: first and stop along each axis.
        shape: of the whole row.
        form: what becomes of the box.
    """

    bounds: Box
    shape: tuple[int, ...]
    form: Form

    def part(self, chunk: Sequence[int] | None = None) -> float:
        """Return the part of a row's values that such chunks hold; None: each value is one."""
        part = 1.0
        for (start, stop), size, step in zip(
            self.bounds, self.shape, chunk or (1,) * len(self.shape), strict=True
        ):
            part *= (min(size, -(-stop // step) * step) - start // step * step) / size
        return part

    @property
    def piece_bytes(self) -> int:
        """Bytes of the box that follow each other in memory, and in a file without chunks."""
        count = self.form.stored.itemsize
        for (start, stop), size in zip(reversed(self.bounds), reversed(self.shape), strict=True):
            count *= stop - start
            if stop - start != size:
                break
        return count


def narrowed(form: Form | None) -> Narrowed | None:
    """Return the box that a form selects of a row; None: nothing, or of a compound type."""
    if form is None or not form.picks or form.members or not form.is_direct:
        return None
    pairs = list(zip(form.picks, form.shape, strict=True))
    bounds = [(0, size) if pick is None else (min(pick), max(pick) + 1) for pick, size in pairs]
    picks = tuple(
        None if pick is None else tuple(index - start for index in pick)
        for (pick, _), (start, _) in zip(pairs, bounds, strict=True)
    )
    shape = tuple(stop - start for start, stop in bounds)
    return Narrowed(bounds, form.shape, dataclasses.replace(form, shape=shape, picks=picks))


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
        self._stored = open_stored(stored := stored_of(dataset))
        self._boxes = OtherAxisReader(Part(stored, axis), locate)
        self._narrowed = {name: narrowed(field.form) for name, field in dataset.fields.items()}
        self._reads_less: dict[tuple[str, str], bool] = {}
        self._files = handles_in_hdf5(locate)
        self._rows, self._staging = ThreadMemory(), ThreadMemory()

    @property
    def files_opened(self) -> int:
        """How often a file was opened."""
        return self._stored.files_opened + self._boxes.files_opened + self._files.opened

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
        narrow = self._narrow(name, form, rows, counts)
        form = form if narrow is None else narrow.form
        most = max(1, READ_BYTES // form.row_bytes) if form.is_direct else MOST_TEXTS
        rows, counts, places = _shortened(rows, counts, places, most)
        for group in groups_of(counts, most):
            first, count, to = rows[group], counts[group], places[group]
            samples = np.repeat(first, count) + within(count)
            if narrow is None:
                stored = self._read(form, first, count)
            else:
                stored = self._read_boxes(narrow, first, count)
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
        self._boxes.close()
        self._files.close()

    def _narrow(self, name: str, form: Form, rows: Int64s, counts: Int64s) -> Narrowed | None:
        """Return what is read in place of whole rows of these runs; None: they are."""
        narrow = self._narrowed[name]
        if narrow is None:
            return None
        stops, shards = self.dataset.shard_stops, self.dataset.shards
        firsts = np.searchsorted(stops, rows, side="right")
        lasts = np.searchsorted(stops, rows + counts - 1, side="right")
        for index in np.unique(np.concatenate([firsts, lasts])).tolist():
            key = name, shards[index].path
            if key not in self._reads_less:
                self._reads_less[key] = self._is_less(narrow, form, index)
            if not self._reads_less[key]:
                return None
        return narrow

    def _is_less(self, narrow: Narrowed, form: Form, index: int) -> bool:
        """Tell whether a box of a row is enough less than all of it, as it lies in a shard."""
        shard = self._boxes.dataset.shards[index]
        layout = shard.layouts[form.path]
        if layout.offset is not None or layout.base is not None:
            return narrow.piece_bytes >= LEAST_PIECE_BYTES and narrow.part() <= MOST_OF_A_ROW
        chunk = self._boxes.chunk_shape(shard, form.path)
        return chunk is not None and narrow.part(chunk) <= MOST_OF_A_ROW

    def _read_boxes(self, narrow: Narrowed, firsts: Int64s, counts: Int64s) -> Rows:
        """Return boxes of stored rows, (rows, *box)."""
        found = [
            self._boxes.read_box(shard, narrow.form.path, first, size, narrow.bounds)
            for row, count in zip(firsts.tolist(), counts.tolist(), strict=True)
            for shard, first, size in self._boxes.dataset.in_shards(row, count)
        ]
        return found[0] if len(found) == 1 else np.concatenate(found)

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
        found = []
        for row, count in zip(firsts.tolist(), counts.tolist(), strict=True):
            for shard, first, size in self.dataset.in_shards(row, count):
                try:
                    dataset = self._files.get(shard)[form.path]
                    if isinstance(dataset, h5py.Group):
                        dataset = _Categories(dataset, form.missing)
                    of = dataset
                    if form.stored.hasobject and form.members:
                        of = dataset.fields(form.members[0])
                    if form.stored.hasobject and isinstance(dataset, h5py.Dataset):
                        own = slice(first, first + size) if self._axis == 0 else slice(None)
                        require_sound_heap(dataset, own)
                    rows = (slice(None),) * self._axis + (slice(first, first + size),)
                    part = of[rows]
                except HDF5_FAILURES as error:
                    raise DatasetError(
                        f'{shard.path}: field "{form.path}", row {first}: {error}'
                    ) from error
                found.append(np.moveaxis(part, self._axis, 0))
        return np.concatenate(found)


class _Categories:
    """Texts, read by the codes that a file has for them."""

    def __init__(self, group: h5py.Group, missing: int | None) -> None:
        self._codes, self._texts = group["codes"], categories_in(group)
        self._may_lack = missing is not None

    def __getitem__(self, rows: tuple[slice, ...]) -> Rows:
        codes = self._codes[rows]
        lacking = codes < 0
        if lacking.any() and not self._may_lack:
            row = (rows[-1].start or 0) + int(np.argmax(lacking))
            raise ValueError(
                f"row {row} has no category, a missing value: leave such rows out, or say what "
                "stands for them: a mask, or missing = -100 that is task.ignore_index as well"
            )
        texts: Rows = np.where(lacking, b"", self._texts[codes])
        return texts


def _shortened(
    firsts: Int64s, counts: Int64s, places: Int64s, most: int
) -> tuple[Int64s, Int64s, Int64s]:
    """Cut runs into such of at most `most` rows."""
    pieces = -(-counts // most)
    owners = np.repeat(np.arange(len(counts)), pieces)
    done = within(pieces) * most
    return firsts[owners] + done, np.minimum(most, counts[owners] - done), places[owners] + done
