"""What is said of sizes, against the bytes that are there: a file of 1 KB may claim 2^60 rows.

Nothing is allocated, planned or read for hours because a file says so. No I/O.
"""

from __future__ import annotations

from hpctrain.errors import DatasetError
from hpctrain.utils.text import size

MOST_VALUES_PER_BYTE = 2**20
"""Bytes of values that a byte of a file may stand for. Deflate reaches 1032, zstd some 20,000; and
chunks that were never written, which are fill values, take none at all."""
ALWAYS_BYTES = 2**40
"""So much may be fill values that are stored nowhere."""
LARGEST_ROW_BYTES = 2**37
"""Of a row, which memory is to hold several times: a field of 3,200 x 3,200 x 3,200 numbers."""
MOST_SAMPLES = 2**42
"""Of a dataset: the order of an epoch is a list of its blocks."""


def require_plausible(name: str, claimed: int, place: str, stored: int) -> None:
    """Check that so many bytes of values may come of so many that are stored.

    Args:
        name: of the field.
        claimed: bytes of values.
        place: where that is said, for the message.
        stored: bytes of the files that they are in.

    Raises:
        DatasetError: if no compression does that.
    """
    if claimed > max(ALWAYS_BYTES, stored * MOST_VALUES_PER_BYTE):
        raise DatasetError(
            f'{place}: field "{name}" is said to have {size(claimed)} of values, and '
            f"{size(stored)} are stored: the file is damaged, or almost nothing was ever written "
            "to it. Bring the whole file back, or make it as long as its data"
        )


def require_row(name: str, row_bytes: int, place: str) -> None:
    """Check that memory may hold a row.

    Raises:
        DatasetError: if that of no node does.
    """
    if row_bytes > LARGEST_ROW_BYTES:
        raise DatasetError(
            f'{place}: field "{name}" is said to have {size(row_bytes)} in a row, more than memory '
            "holds several times: let another axis count the samples (axis in [data.fields])"
        )


def require_countable(samples: int, place: str) -> None:
    """Check that so many samples can be put in an order.

    Raises:
        DatasetError: if not.
    """
    if samples > MOST_SAMPLES:
        raise DatasetError(
            f"{place}: {samples:,} samples, and at most {MOST_SAMPLES:,} can be put in an order: "
            "the files are damaged, or larger rows are to be samples"
        )
