"""A dataset's reader: of plain rows, of rows along another axis, or of a view of them."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Dataset
from hpctrain.data.reading.formed import FormedReader
from hpctrain.data.reading.handles import Locate, where_it_is
from hpctrain.data.reading.heaps import HeapReader
from hpctrain.data.reading.other_axis import OtherAxisReader
from hpctrain.data.reading.retry import READ_RETRIES, Retrying
from hpctrain.data.reading.scatter import RowReader
from hpctrain.data.reading.shards import ShardReader
from hpctrain.data.reading.threads import Helpers
from hpctrain.data.reading.views import ViewReader
from hpctrain.data.view import Part, View


def open_rows(
    dataset: Dataset,
    *,
    retries: int = READ_RETRIES,
    locate: Locate = where_it_is,
    helpers: Helpers | None = None,
) -> Retrying | ViewReader:
    """Return what reads the rows of a dataset; no file is opened yet.

    Args:
        dataset: a view, too.
        retries: how often a read that fails is tried again.
        locate: as ShardReader takes it.
        helpers: as ShardReader takes it.
    """

    def open_stored(dataset: Dataset, axis: int) -> RowReader:
        if axis > 0:
            return OtherAxisReader(Part(dataset, axis), locate)
        return ShardReader(dataset, locate, helpers)

    def open_part(part: Part) -> Retrying:
        dataset, axis = part.dataset, part.axis
        if part.heap is not None:
            return Retrying(HeapReader(part, locate, helpers), retries)
        if all(field.form is None for field in dataset.fields.values()):
            return Retrying(open_stored(dataset, axis), retries)
        reader = FormedReader(dataset, axis, lambda stored: open_stored(stored, axis), locate)
        return Retrying(reader, retries)

    return ViewReader(dataset, open_part) if isinstance(dataset, View) else open_part(Part(dataset))


def read_rows(
    dataset: Dataset, rows: Int64s, *, retries: int = READ_RETRIES
) -> dict[str, npt.NDArray[Any]]:
    """Return rows of a dataset, (rows, *shape) a field, read with files of their own.

    Raises:
        DatasetError: if one cannot be read.
    """
    values = {}
    with closing(open_rows(dataset, retries=retries)) as access:
        for name, field in dataset.fields.items():
            out = np.empty((len(rows), field.row_bytes), np.uint8)
            places = np.arange(len(rows), dtype=np.int64)
            access.read_runs(name, rows, np.ones_like(rows), out, places)
            native = out.view(field.dtype.newbyteorder("="))
            values[name] = native.reshape(len(rows), *field.shape)
    return values
