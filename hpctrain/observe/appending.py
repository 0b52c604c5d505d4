"""Files that grow so that a kill or a full disk leaves them whole."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


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
