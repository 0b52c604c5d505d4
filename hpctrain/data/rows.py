"""A dataset's reader: of plain rows, of rows along another axis, or of a view of them."""

from __future__ import annotations

from hpctrain.data.access import Locate, RowAccess, where_it_is
from hpctrain.data.axis_access import AxisAccess
from hpctrain.data.dataset import Dataset
from hpctrain.data.row_reader import RowReader
from hpctrain.data.steady import READ_RETRIES, SteadyAccess
from hpctrain.data.view import Part, View
from hpctrain.data.view_access import ViewAccess


def open_rows(
    dataset: Dataset, *, retries: int = READ_RETRIES, locate: Locate = where_it_is
) -> RowReader:
    """Return what reads the rows of a dataset; no file is opened yet.

    Args:
        dataset: a view, too.
        retries: how often a read that fails is tried again.
        locate: as RowAccess takes it.
    """

    def open_part(part: Part) -> RowReader:
        reader = AxisAccess(part, locate) if part.axis else RowAccess(part.dataset, locate)
        return SteadyAccess(reader, retries)

    return ViewAccess(dataset, open_part) if isinstance(dataset, View) else open_part(Part(dataset))
