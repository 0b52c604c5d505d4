"""A dataset's reader: of plain rows, of rows along another axis, or of a view of them."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.data.dataset import Dataset
from hpctrain.data.order.permutation import Int64s
from hpctrain.data.reading.access import RowAccess
from hpctrain.data.reading.axis_access import AxisAccess
from hpctrain.data.reading.handles import Locate, where_it_is
from hpctrain.data.reading.helpers import Helpers
from hpctrain.data.reading.row_reader import SteadyReader
from hpctrain.data.reading.steady import READ_RETRIES, SteadyAccess
from hpctrain.data.reading.view_access import ViewAccess
from hpctrain.data.view import Part, View


def open_rows(
    dataset: Dataset,
    *,
    retries: int = READ_RETRIES,
    locate: Locate = where_it_is,
    helpers: Helpers | None = None,
) -> SteadyReader:
    """Return what reads the rows of a dataset; no file is opened yet.

    Args:
        dataset: a view, too.
        retries: how often a read that fails is tried again.
        locate: as RowAccess takes it.
        helpers: as RowAccess takes it.
    """

    def open_part(part: Part) -> SteadyReader:
        reader = AxisAccess(part, locate) if part.axis else RowAccess(part.dataset, locate, helpers)
        return SteadyAccess(reader, retries)

    return ViewAccess(dataset, open_part) if isinstance(dataset, View) else open_part(Part(dataset))


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
