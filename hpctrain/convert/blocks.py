"""The values of one shard, a few MB at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.data.dataset import Dataset, Field, Shard
from hpctrain.data.decoding import FieldDecoding
from hpctrain.data.reading.rows import open_rows

BLOCK_BYTES = 4 * 2**20
LARGEST_BLOCK_BYTES = 256 * 2**20
"""Of a block that is one chunk."""


def one_shard(shard: Shard, fields: dict[str, Field]) -> Dataset:
    """Return a dataset of one shard."""
    return Dataset(shard.path, fields, (shard,))


def blocks_of(dataset: Dataset, name: str) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield the number of the first row of every block of a field, and its values.

    The values are (rows, *shape) in this machine's byte order, in memory that is used again for
    the next block.

    Raises:
        DatasetError: naming file, field and row that cannot be read.
    """
    field = dataset.fields[name]
    rows = _rows_of_block(field.row_bytes, max(s.layouts[name].chunk_rows for s in dataset.shards))
    buffer = np.empty((min(rows, dataset.samples), field.row_bytes), np.uint8)
    with closing(open_rows(dataset, retries=0)) as access:
        for start in range(0, dataset.samples, rows):
            part = buffer[: min(rows, dataset.samples - start)]
            access.read_runs(name, np.array([start]), np.array([len(part)]), part, np.array([0]))
            values = part.view(field.dtype.newbyteorder("="))
            yield start, values.reshape(len(part), *field.shape)


def decoded_blocks_of(
    dataset: Dataset, name: str, decoding: FieldDecoding | None
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield the blocks of a field as `blocks_of` does, decoded."""
    for start, numbers in blocks_of(dataset, name):
        if decoding is None:
            yield start, numbers
        else:
            codes = decoding.codes(np.arange(start, start + len(numbers)))
            yield start, decoding.decode(numbers, codes)


def _rows_of_block(row_bytes: int, chunk_rows: int) -> int:
    """Return how many rows to read at once; chunks are not cut, to be decompressed only once."""
    rows = max(1, BLOCK_BYTES // row_bytes)
    if chunk_rows <= rows:
        return rows - rows % chunk_rows
    return chunk_rows if chunk_rows * row_bytes <= LARGEST_BLOCK_BYTES else rows
