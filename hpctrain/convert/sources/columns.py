"""Columns of Parquet and Arrow files (also Feather): numbers, and lists of equally many of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hpctrain.convert.sources.source import ArrayFacts, optional, reading
from hpctrain.data.dataset import require_fields
from hpctrain.errors import DatasetError

PARQUET = (".parquet", ".parq", ".pq")
ARROW = (".arrow", ".feather", ".ipc")
KNOWN = ", ".join((*PARQUET, *ARROW))
_WHAT = "Parquet and Arrow files are"


class _Pieces(Protocol):
    """A file, as the groups of rows that it is stored in.

    Attributes:
        counts: rows of each.
        schema: of the columns.
    """

    counts: list[int]
    schema: Any

    def read(self, piece: int, key: str) -> Any:
        """Return a column of one of them."""
        ...

    def close(self) -> None: ...


class _Parquet:
    """Pieces of a Parquet file: its row groups."""

    def __init__(self, path: str) -> None:
        self._file = optional("pyarrow.parquet", "arrow", _WHAT).ParquetFile(path)
        about = self._file.metadata
        self.counts = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
        self.schema = self._file.schema_arrow

    def read(self, piece: int, key: str) -> Any:
        return self._file.read_row_group(piece, columns=[key]).column(key)

    def close(self) -> None:
        self._file.close()


class _Arrow:
    """Pieces of an Arrow file, of either kind, mapped to memory: its record batches."""

    def __init__(self, path: str) -> None:
        arrow = optional("pyarrow", "arrow", _WHAT)
        ipc = optional("pyarrow.ipc", "arrow", _WHAT)
        self._map = arrow.memory_map(path)
        try:
            file = ipc.open_file(self._map)
            self._batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        except arrow.ArrowInvalid:
            # As a stream, which is how Hugging Face's datasets keep theirs.
            self._map.seek(0)
            file = ipc.open_stream(self._map)
            self._batches = list(file)
        self.schema = file.schema
        self.counts = [batch.num_rows for batch in self._batches]

    def read(self, piece: int, key: str) -> Any:
        return self._batches[piece].column(self.schema.get_field_index(key))

    def close(self) -> None:
        self._batches = []
        self._map.close()


class Column:
    """One column of a file, read a piece at a time; the last piece stays.

    Attributes:
        shape: of all its values, rows first.
        nbytes: of them.
    """

    def __init__(self, path: str, key: str) -> None:
        """Find out what the column holds.

        Raises:
            DatasetError: if that cannot become a field.
        """
        self._place = f'{path}: column "{key}"'
        self._key = key
        self._pieces = _open(path)
        self._starts = [0, *accumulate(self._pieces.counts)]
        self._kept: tuple[int, npt.NDArray[Any]] | None = None
        row, self.dtype = self._described()
        self.shape = (self._starts[-1], *row)
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __getitem__(self, selection: slice | tuple[slice, ...]) -> npt.NDArray[Any]:
        rows, *others = selection if isinstance(selection, tuple) else (selection,)
        first, stop, _ = rows.indices(self.shape[0])
        pieces = range(bisect_right(self._starts, first) - 1, bisect_right(self._starts, stop - 1))
        parts = []
        for piece in pieces:
            begin = self._starts[piece]
            inside = (slice(max(0, first - begin), stop - begin), *others)
            parts.append(self._piece(piece)[inside])
        return np.concatenate(parts)

    def close(self) -> None:
        """Close the file."""
        self._kept = None
        self._pieces.close()

    def _piece(self, piece: int) -> npt.NDArray[Any]:
        """Return the values of a piece, (rows, *shape)."""
        if self._kept is None or self._kept[0] != piece:
            begin = self._starts[piece]
            values = self._pieces.read(piece, self._key)
            flat = self._flat(values, self.shape[1:], begin)
            self._kept = piece, flat.reshape(-1, *self.shape[1:])
        return self._kept[1]

    def _flat(self, values: Any, shape: Sequence[int], begin: int) -> npt.NDArray[Any]:
        """Return the numbers of a column, after a check that each row has as many as the first."""
        arrow = optional("pyarrow", "arrow", _WHAT)
        if isinstance(values, arrow.ChunkedArray):
            values = values.combine_chunks()
        if isinstance(values, arrow.ChunkedArray):  # of pyarrow before 12, where it is one chunk
            values = values.chunk(0)
        if isinstance(values, arrow.ExtensionArray):
            values = values.storage
        per_row = 1
        for size in shape or ():
            if not _is_list(values.type):
                break  # a tensor of a fixed shape is stored as one list
            self._require_present(values, begin, per_row)
            lengths = values.value_lengths().to_numpy(zero_copy_only=False)
            full = size if _is_list(values.type.value_type) else _rest(shape, per_row)
            if len(lengths) and (lengths != full).any():
                row = begin + int(np.flatnonzero(lengths != full)[0]) // per_row
                raise DatasetError(
                    f"{self._place}, row {row}: a list of other length than that of the first row: "
                    "samples of a field have one shape. Pad the lists, or cut them"
                )
            values = values.flatten()
            per_row *= full
        self._require_present(values, begin, per_row)
        return np.asarray(values.to_numpy(zero_copy_only=False), self.dtype)

    def _require_present(self, values: Any, begin: int, per_row: int) -> None:
        """Check that there is a value everywhere; numbers with a point become NaN, as in pandas."""
        is_float = optional("pyarrow", "arrow", _WHAT).types.is_floating(values.type)
        if values.null_count and not is_float:
            gone = values.is_null().to_numpy(zero_copy_only=False)
            row = begin + int(np.flatnonzero(gone)[0]) // per_row
            raise DatasetError(
                f"{self._place}, row {row}: there is no value (null), {values.null_count} of them "
                "in this part of the file. Fill or drop these rows before packing, or leave the "
                "column out: name the others, FILES:COLUMN"
            )

    def _described(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype of a row."""
        arrow = optional("pyarrow", "arrow", _WHAT)
        kind = self._pieces.schema.field(self._key).type
        fixed = tuple(getattr(kind, "shape", ()))
        kind = getattr(kind, "storage_type", kind)
        shape: list[int] = []
        first: Any = None
        while _is_list(kind):
            if arrow.types.is_fixed_size_list(kind):
                shape.append(kind.list_size)
            else:
                if first is None:
                    first = self._first()
                inner = first
                for _ in shape:
                    inner = inner[0] if inner else []
                shape.append(len(inner))
            kind = kind.value_type
        if not (
            arrow.types.is_integer(kind)
            or arrow.types.is_floating(kind)
            or arrow.types.is_boolean(kind)
        ):
            raise DatasetError(
                f"{self._place} is {self._pieces.schema.field(self._key).type}, which is no "
                "number. Name the columns that are to be fields: FILES:COLUMN, several times"
            )
        return fixed or tuple(shape), np.dtype(kind.to_pandas_dtype())

    def _first(self) -> Any:
        """Return the first row."""
        if not self._starts[-1]:
            return []
        piece = bisect_right(self._starts, 0) - 1
        return self._pieces.read(piece, self._key)[0].as_py() or []


def holds(path: str) -> bool:
    """Tell whether this is such a file, by its name."""
    return path.endswith((*PARQUET, *ARROW))


def arrays_in(path: str, key: str | None = None) -> dict[str, ArrayFacts]:
    """Return the columns of a file, as `Format.arrays_in` does."""
    with reading(path):
        pieces = _open(path)
        try:
            names = list(pieces.schema.names)
        finally:
            pieces.close()
        if key is not None:
            require_fields([key], names, path)
        return {name: _facts(path, name) for name in (names if key is None else [key])}


def open_array(path: str, key: str) -> Column:
    """Return a column, as `Format.open_array` does."""
    with reading(f'{path}: column "{key}"'):
        return Column(path, key)


def close_array(array: Any) -> None:
    """Close the file of a column."""
    array.close()


def _facts(path: str, name: str) -> ArrayFacts:
    column = Column(path, name)
    try:
        # pandas keeps the index of a frame as a column of this name.
        is_index = name.startswith("__index_level_")
        return ArrayFacts(column.shape, column.dtype, {}, is_index)
    finally:
        column.close()


def _open(path: str) -> _Pieces:
    if path.endswith(PARQUET):
        return _Parquet(path)
    return _Arrow(path)


def _is_list(kind: Any) -> bool:
    types = optional("pyarrow", "arrow", _WHAT).types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _rest(shape: Sequence[int], done: int) -> int:
    """Return how many numbers a row has for each of the lists that were gone into."""
    return int(np.prod(shape, dtype=np.int64)) // done


def text_pieces(path: str) -> int:
    """Return in how many groups of rows a file is stored.

    Raises:
        DatasetError: if it cannot be read.
    """
    with reading(path):
        pieces = _open(path)
        try:
            return len(pieces.counts)
        finally:
            pieces.close()


def texts_in(path: str, piece: int, key: str) -> list[str]:
    """Return the texts of a column, in one group of rows.

    Raises:
        DatasetError: if the column is not there, or is none of texts.
    """
    with reading(f'{path}: column "{key}"'):
        pieces = _open(path)
        try:
            require_fields([key], pieces.schema.names, path)
            types = optional("pyarrow", "arrow", _WHAT).types
            kind = pieces.schema.field(key).type
            if not (types.is_string(kind) or types.is_large_string(kind)):
                raise DatasetError(
                    f'{path}: column "{key}" is {kind}, and no text: name the one that is, '
                    "FILES:COLUMN"
                )
            found: list[str | None] = pieces.read(piece, key).to_pylist()
        finally:
            pieces.close()
    return [text for text in found if text is not None]
