"""Chunks that only HDF5 reads, checked before: it takes what they become, whatever that is."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hpctrain.data.reading.chunk_listing import NO_FILTER
from hpctrain.data.reading.damage import DamagedChunkError, UndecodableError
from hpctrain.data.reading.filters import Pipeline
from hpctrain.data.reading.helpers import ThreadMemory
from hpctrain.data.reading.libraries import leaves_partial_chunks_unfiltered
from hpctrain.data.storage import filters_of

MOST_CHECKED = 2**26
"""Chunks of one dataset of which it is noted, in a byte each, that they were checked."""


@dataclass(frozen=True, slots=True)
class _Checked:
    """What is known of the chunks of one dataset.

    Attributes:
        pipeline: undoes their filters.
        unfiltered: whether partial ones went through none; None: nobody knows.
        seen: by place in the grid, whether it was checked.
    """

    pipeline: Pipeline
    unfiltered: bool | None
    seen: npt.NDArray[np.bool_]


class SoundChunks:
    """Checks each chunk once, when it is first wanted. For one thread."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], _Checked | None] = {}
        self._memory = ThreadMemory()

    def require(self, dataset: h5py.Dataset, axis: int, first: int, stop: int) -> None:
        """Check the chunks that hold some of these rows along an axis.

        Raises:
            DamagedChunkError: if one becomes other than its shape and dtype say.
        """
        key = dataset.file.filename, dataset.name
        if key not in self._known:
            self._known[key] = _known(dataset)
        checked = self._known[key]
        if checked is None:
            return
        sides = [range(count) for count in checked.seen.shape]
        sides[axis] = range(first // dataset.chunks[axis], -(-stop // dataset.chunks[axis]))
        for place in itertools.product(*sides):
            if not checked.seen[place]:
                self._check(dataset, checked, place)
                checked.seen[place] = True

    def _check(self, dataset: h5py.Dataset, checked: _Checked, place: tuple[int, ...]) -> None:
        pairs = list(zip(place, dataset.chunks, strict=True))
        corner = tuple(index * size for index, size in pairs)
        stored = dataset.id.get_chunk_info_by_coord(corner)
        if stored.byte_offset is None:
            return
        if stored.size > checked.pipeline.most_stored:
            raise DamagedChunkError(f"it is {stored.size:,} bytes in the file")
        mask, content = dataset.id.read_direct_chunk(corner)
        ends = zip(pairs, dataset.shape, strict=True)
        if any((index + 1) * size > end for (index, size), end in ends):
            if checked.unfiltered is None:
                return
            mask = NO_FILTER if checked.unfiltered else mask
        raw: Any = np.frombuffer(content, np.uint8)
        try:
            checked.pipeline.decode(raw, [len(raw)], [mask], self._memory)
        except UndecodableError:
            return  # HDF5 meets it again, and says what and where


def _known(dataset: h5py.Dataset) -> _Checked | None:
    """Return what it takes to check the chunks of a dataset; None: they are not to be checked."""
    if dataset.chunks is None or not hasattr(dataset.id, "get_chunk_info_by_coord"):
        return None
    grid = [-(-a // b) for a, b in zip(dataset.shape, dataset.chunks, strict=True)]
    # In the file a value may have another size than in memory.
    chunk_bytes = math.prod(dataset.chunks) * dataset.id.get_type().get_size()
    try:
        pipeline = Pipeline(filters_of(dataset), chunk_bytes)
    except UndecodableError:
        return None
    if pipeline.is_plain or math.prod(grid) > MOST_CHECKED:
        return None
    unfiltered = leaves_partial_chunks_unfiltered(dataset.id.get_create_plist())
    return _Checked(pipeline, unfiltered, np.zeros(grid, bool))
