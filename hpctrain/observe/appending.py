"""Files that grow so that a kill or a full disk leaves them whole."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from hpctrain.utils.group_access import follow_folder, is_open


class AppendedFile:
    """A file to which whole pieces are appended: all of a piece, or nothing of it.

    Nothing stays in a buffer of the process: what was appended outlives its death.

    Raises:
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(_open_to_append(path), "ab", buffering=0)
        follow_folder(path)
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


def _open_to_append(path: Path) -> int:
    """Open a file, or make it; nothing else under its name, such as a pipe that nobody reads."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
    if is_open(path.parent):
        flags |= os.O_NOFOLLOW  # others may have put a link there
    descriptor = os.open(path, flags, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
