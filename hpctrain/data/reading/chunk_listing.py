"""Where the chunks of an HDF5 dataset are: what HDF5 says, and what it leaves out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.data.order.permutation import Int64s
from hpctrain.data.reading.damage import UndecodableError
from hpctrain.data.reading.filters import Pipeline
from hpctrain.data.reading.libraries import leaves_partial_chunks_unfiltered

NO_FILTER = 2**32 - 1
"""The mask of a chunk that went through none of its filters."""


def list_chunks(
    dataset: h5py.Dataset, grid: Sequence[int], pipeline: Pipeline, chunk_bytes: int
) -> Int64s:
    """Return what is known of every chunk.

    Args:
        dataset: in chunks.
        grid: how many chunks there are along every axis.
        pipeline: of its filters.
        chunk_bytes: of the values of one chunk.

    Returns:
        (chunks, 3) int64, in the order of the grid: offset in the file, bytes there, mask of the
        filters that it skipped. The offset is -1 of chunks that were never written, and of those
        that are for HDF5 to read.

    Raises:
        UndecodableError: if HDF5 names a place that cannot be.
    """
    table = np.full((math.prod(grid), 3), -1, np.int64)
    found: list[Any] = []
    dataset.id.chunk_iter(found.append)
    if not found:
        return table
    places = np.array([each.chunk_offset for each in found], np.int64) // dataset.chunks
    try:
        numbers: npt.NDArray[Any] = np.ravel_multi_index(tuple(places.T), grid)
    except ValueError as error:
        raise UndecodableError(f"a chunk lies outside the data: {error}") from error
    size = Path(dataset.file.filename).stat().st_size
    if any(each.byte_offset + each.size > size for each in found):
        raise UndecodableError("a chunk lies past the end of the file")
    facts = np.array([(each.byte_offset, each.size, each.filter_mask) for each in found], np.int64)
    table[numbers] = _corrected(dataset, places, facts, pipeline, chunk_bytes)
    return table


def _corrected(
    dataset: h5py.Dataset, places: Int64s, facts: Int64s, pipeline: Pipeline, chunk_bytes: int
) -> Int64s:
    """Correct what HDF5 says of chunks, (chunks, 3), by what it does not say.

    Args:
        dataset: whose chunks they are.
        places: (chunks, axes) int64, in the grid.
        facts: offset, size, mask of the filters that each skipped.
        pipeline: of its filters.
        chunk_bytes: of the values of one chunk.
    """
    is_whole = facts[:, 1] == chunk_bytes
    if pipeline.is_plain:
        facts[~is_whole, 0] = -1
        return facts
    unfiltered = leaves_partial_chunks_unfiltered(dataset.id.get_create_plist())
    is_partial = ((places + 1) * dataset.chunks > dataset.shape).any(axis=1)
    if unfiltered:
        facts[is_partial, 2] = NO_FILTER
    elif unfiltered is None:
        # Such a chunk has the size of its values. Few that went through filters do.
        facts[is_partial & is_whole, 0] = -1
    return facts
