"""Files that grow, and files that are replaced, so that a kill or a full disk leaves them whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class AppendedFile:
    """A file to which whole pieces are appended: all of a piece, or nothing of it.

    Nothing stays in a buffer of the process: what was appended outlives its death.

    Raises:
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._good_bytes = self._file.seek(0, os.SEEK_END)
        self._torn = False

    def append(self, piece: bytes) -> None:
        """Append a piece.

        Raises:
            OSError: if it does not fit; what was written of it does not stay.
        """
        if self._torn:
            self._file.truncate(self._good_bytes)
            self._torn = False
        rest = memoryview(piece)
        try:
            while rest:
                written = self._file.write(rest)
                assert written is not None  # None is for files opened as non-blocking
                rest = rest[written:]
        except OSError:
            # A full disk takes a part. To shorten a file needs no space, but may fail as well.
            self._torn = True
            with suppress(OSError):
                self._file.truncate(self._good_bytes)
                self._torn = False
            raise
        self._good_bytes += len(piece)

    def close(self) -> None:
        """Close the file once it is on the disk.

        Raises:
            OSError: if it did not get there.
        """
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write, which takes the place of `path` once the body is through.

    Raises:
        OSError: if it cannot be written; `path` is then as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename last; file systems that cannot sync a folder keep renames by themselves."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
