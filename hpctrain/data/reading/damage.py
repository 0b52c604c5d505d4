"""What may be wrong with the bytes of a chunk, and who is to hear of it."""

from __future__ import annotations

from hpctrain.data.reading.pieces import Bytes
from hpctrain.errors import DatasetError


class UndecodableError(Exception):
    """These bytes are not what the filter made. HDF5 is to look at them, and to say what it is."""


class DamagedChunkError(Exception):
    """A chunk becomes other bytes than its shape and dtype have, or asks for other memory.

    HDF5 is not to look at it: it would allocate whatever the chunk asks for.

    Attributes:
        number: which one of several.
    """

    number = 0


def damaged_rows(path: str, name: str, rows: tuple[int, int], error: Exception) -> DatasetError:
    """Return what to tell of a damaged chunk of some rows, the first and the last of them."""
    first, last = rows
    return DatasetError(
        f'{path}: field "{name}", row {first}: a chunk of the rows up to {last} is damaged: '
        f"{error}. Bring the file back, or write it anew"
    )


def too_much(room: Bytes) -> DamagedChunkError:
    """Return what to say of a chunk that becomes larger than its room."""
    return DamagedChunkError(f"it becomes more than the {len(room)} bytes that it is to have")


def require_room(size: int, room: Bytes) -> None:
    """Check that what a chunk asks for is not more than it is to become.

    Raises:
        DamagedChunkError: if it is.
    """
    if size > len(room):
        raise DamagedChunkError(
            f"it asks for {size:,} bytes in place of the {len(room):,} that it is to have"
        )
