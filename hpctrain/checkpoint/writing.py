"""Files written so that they are on disk when they are closed, and their checksums known."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import xxhash

_PIECE_BYTES = 8 * 2**20
_AHEAD_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Written:
    """What was written to a file.

    Attributes:
        xxh3_64: checksum of it, as hexadecimal digits.
    """

    num_bytes: int
    xxh3_64: str


class DurableFile:
    """A new file; a context manager at whose end every byte is on disk.

    Checksums are taken of what is in memory, on the way to the file: what a disk loses or changes
    does not fit them. The system is told to write out what it has every few pieces, so that the
    disk works while the rest is still being copied, and the page cache stays with the data.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = xxhash.xxh3_64()
        self._length = self._handed_on = 0

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    @property
    def written(self) -> Written:
        return Written(self._length, self._digest.hexdigest())

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes.

        Raises:
            OSError: if there is no space, or the file system is gone.
        """
        view = memoryview(content)
        for begin in range(0, len(view), _PIECE_BYTES):
            piece = view[begin : begin + _PIECE_BYTES]
            self._digest.update(piece)
            self._file.write(piece)
            self._length += len(piece)
            if self._length - self._handed_on >= _AHEAD_BYTES:
                self._hand_on()

    def _hand_on(self) -> None:
        """Have the system begin to write out what it holds of this file."""
        if hasattr(os, "posix_fadvise"):
            descriptor, length = self._file.fileno(), self._length - self._handed_on
            os.posix_fadvise(descriptor, self._handed_on, length, os.POSIX_FADV_DONTNEED)
            self._handed_on = self._length


def write_file(path: Path, content: bytes) -> Written:
    """Write a file, on disk when this returns.

    Raises:
        OSError: if it cannot be written.
    """
    with DurableFile(path) as file:
        file.write(content)
    return file.written
