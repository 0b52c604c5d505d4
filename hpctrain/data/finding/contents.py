"""What one HDF5 file holds, as far as training needs to know: asked of HDF5 once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.data.claims import require_plausible, require_row
from hpctrain.data.coding import Coding, without_plain
from hpctrain.data.dataset import ELSEWHERE, Field, Layout, Shard, require_fields, require_supported
from hpctrain.errors import DatasetError
from hpctrain.utils.text import listed

OR_CHOOSE = (
    ". Or leave it out: `python -m hpctrain data info` shows what can train, and the tools take "
    "--fields"
)

LEAST_PIECE_BYTES = 1024
"""Rows that lie in smaller pieces, along a last axis or so, are better collected by HDF5."""


@dataclass(frozen=True, slots=True)
class Array:
    """One HDF5 dataset.

    Attributes:
        shape: all axes.
        dtype: as stored.
        chunks: shape of a chunk; None without chunks.
        offset: bytes from the start of the file, where all of it lies there as in memory.
        reason: why only HDF5 can read it, if there is no offset.
        sources: other files that its values come from.
        coding: how its numbers stand for values; None: nobody has looked.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...] | None
    offset: int | None
    reason: str
    sources: tuple[str, ...] = ()
    coding: Coding | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all values, as memory holds them."""
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def is_elsewhere(self) -> bool:
        """Whether the values are in other files, which may come and go by themselves."""
        return self.reason in ELSEWHERE

    def field(self, axis: int) -> Field:
        """Return what a sample is where this axis counts the samples."""
        return Field(self.shape[:axis] + self.shape[axis + 1 :], self.dtype)

    def layout(self, axis: int) -> Layout:
        """Return where the rows lie along this axis."""
        chunk_rows = 1 if self.chunks is None else self.chunks[axis]
        if axis:
            piece_bytes = math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize
            base = self.offset if piece_bytes >= LEAST_PIECE_BYTES else None
            return Layout(None, chunk_rows, f"along axis {axis}", base)
        return Layout(self.offset, chunk_rows, self.reason)


@dataclass(frozen=True, slots=True)
class Contents:
    """One HDF5 file.

    Attributes:
        path: of the file.
        size: of the file, bytes.
        modified_ns: when it was last written to.
        checksum: xxh3-64 of the whole file, hexadecimal; None if it was never computed.
        arrays: by path inside of the file.
    """

    path: str
    size: int
    modified_ns: int
    checksum: str | None
    arrays: Mapping[str, Array]

    def shard(self, names: Sequence[str] | None, axis: int) -> tuple[Shard, dict[str, Field]]:
        """Return this file as a shard of these fields; None: of all that it holds.

        Raises:
            DatasetError: if a field is not there or cannot become a tensor, or has other rows.
        """
        wanted = list(self.arrays) if names is None else list(names)
        require_fields(wanted, self.arrays, self.path)
        arrays = {name: self.arrays[name] for name in wanted}
        for name, array in arrays.items():
            if axis >= len(array.shape):
                raise DatasetError(
                    f'{self.path}: field "{name}" has the shape {array.shape}, and no axis {axis}: '
                    f"the first one is 0, the last {len(array.shape) - 1}"
                )
        fields = {name: array.field(axis) for name, array in arrays.items()}
        for name, field in fields.items():
            try:
                require_supported(name, field, self.path)
            except DatasetError as error:
                raise DatasetError(f"{error}{OR_CHOOSE if names is None else ''}") from None
            require_row(name, field.row_bytes, self.path)
            self._require_stored(name, arrays[name])
        samples = self._common_rows({name: each.shape[axis] for name, each in arrays.items()})
        layouts = {name: array.layout(axis) for name, array in arrays.items()}
        sources = sorted({source for array in arrays.values() for source in array.sources})
        codings = {name: array.coding for name, array in arrays.items() if array.coding is not None}
        shard = Shard(
            path=self.path,
            samples=samples,
            size=self.size,
            checksum=self.checksum,
            layouts=layouts,
            sources=tuple(sources),
            codings=without_plain(codings) if len(codings) == len(arrays) else None,
        )
        return shard, fields

    def _require_stored(self, name: str, array: Array) -> None:
        """Check that the values of an array fit into what there is."""
        if array.offset is None:
            stored = self.size + sum(_size_of(source) for source in array.sources)
            require_plausible(name, array.num_bytes, self.path, stored)
        elif array.offset + array.num_bytes > self.size:
            raise DatasetError(
                f'{self.path}: field "{name}" ends at byte '
                f"{array.offset + array.num_bytes:,}, and the file at {self.size:,}: it is "
                "truncated. Bring the whole file back"
            )

    def _common_rows(self, rows: Mapping[str, int]) -> int:
        for name, count in rows.items():
            if count == 0:
                raise DatasetError(f'{self.path}: field "{name}" has no rows')
        if len(set(rows.values())) > 1:
            counts = listed([f"{name} {count}" for name, count in rows.items()], 30)
            raise DatasetError(
                f"{self.path}: the fields have different numbers of rows: {counts}. "
                "Name those that belong together: `python -m hpctrain data info` shows what there "
                "is, and the tools take --fields"
            )
        return next(iter(rows.values()), 0)


def _size_of(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0
