"""Text files as tokens: one token a byte, so that no vocabulary is needed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.convert.sources.source import Arrays, identity_of
from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Field
from hpctrain.errors import DatasetError
from hpctrain.utils.files import open_regular

END_OF_FILE = 0
"""The token between two files; a byte that text does not have."""
DEFAULT_TOKENS = 1025
"""1,024 to predict from, and each one's successor."""


@dataclass(frozen=True)
class Text:
    """The bytes of files, one after the other, cut into rows of equal length.

    Attributes:
        name: what the user called it.
        paths: in their order.
        sizes: of the files, bytes.
        tokens: of one row.
    """

    name: str
    paths: Sequence[str]
    sizes: Sequence[int]
    tokens: int

    @classmethod
    def open(cls, name: str, paths: Sequence[str], tokens: int) -> Text:
        """Find out how long the files are.

        Raises:
            DatasetError: if there is not enough for one row.
        """
        try:
            text = cls(name, paths, [Path(path).stat().st_size for path in paths], tokens)
        except OSError as error:
            raise DatasetError(f"{error.filename}: {error.strerror}") from error
        if text.samples == 0:
            raise DatasetError(
                f"{name}: {text.total} bytes of text do not make one row of {tokens} tokens: "
                "give more text, or fewer tokens (--tokens)"
            )
        return text

    @property
    def total(self) -> int:
        """Tokens of all files, one more after each for its end."""
        return sum(self.sizes) + len(self.sizes)

    @property
    def samples(self) -> int:
        """Whole rows; what is left at the end is not served."""
        return self.total // self.tokens

    @property
    def fields(self) -> Mapping[str, Field]:
        return {"tokens": Field((self.tokens,), np.dtype(np.uint8))}

    @property
    def attributes(self) -> Mapping[str, Mapping[str, Any]]:
        return {"tokens": {"description": "bytes of text; 0 ends a file", "vocabulary_size": 256}}

    @cached_property
    def identity(self) -> str:
        return f"{identity_of(self.paths)} {self.tokens}"

    @cached_property
    def _starts(self) -> Int64s:
        return np.cumsum([0, *(size + 1 for size in self.sizes)], dtype=np.int64)

    def read(self, rows: Int64s) -> Arrays:
        """Return samples, as `Source.read` does."""
        out = np.full((len(rows), self.tokens), END_OF_FILE, np.uint8)
        # Neighbours are read in one go.
        cuts = np.flatnonzero(np.diff(rows) != 1) + 1
        for begin, stop in zip([0, *cuts], [*cuts, len(rows)], strict=True):
            if begin < stop:
                self._fill(
                    int(rows[begin]) * self.tokens, memoryview(out[begin:stop].data).cast("B")
                )
        return {"tokens": out}

    def _fill(self, position: int, out: memoryview) -> None:
        """Copy the tokens from a position on; ends of files are there already."""
        done = 0
        index = int(np.searchsorted(self._starts, position, side="right")) - 1
        while done < len(out):
            offset = position + done - int(self._starts[index])
            count = min(self.sizes[index] - offset, len(out) - done)
            if count > 0:
                self._read(index, offset, out[done : done + count])
            done += max(count, 0) + 1
            index += 1

    def _read(self, index: int, offset: int, out: memoryview) -> None:
        path = self.paths[index]
        try:
            with os.fdopen(open_regular(path), "rb", buffering=0) as file:
                file.seek(offset)
                done = 0
                while done < len(out):
                    count = file.readinto(out[done:])
                    if not count:
                        raise DatasetError(f"{path}: the file has changed while it was packed")
                    done += count
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror}") from error
