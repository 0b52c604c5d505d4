"""The folder of the copies on one node: held by the ranks that use it, removed after the last.

A lock of the kernel's says whether anybody does; it ends with the process, however that ends. So
what a killed job has left is known for what it is, and a node's disk has working locks, which
shared file systems need not have.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

from hpctrain.data.staging.plan import Copy
from hpctrain.utils.files import file_checksum

LEFT = ".left-"
"""Before the name of a file that a dead job has left, until its checksum has been looked at."""
_LOCK = ".lock"


class StageFolder:
    """A folder for the copies of some datasets, on the disk of this node.

    Attributes:
        path: of the folder; all that is in it under a plain name is whole.
    """

    def __init__(self, directory: str, key: str) -> None:
        self._root = Path(directory, f"hpctrain-{os.getuid()}")
        self.path = self._root / key
        self._lock: int | None = None

    def join(self) -> None:
        """Hold the folder, so that nobody removes it; make it if it is not there.

        Whoever finds it held by nobody sets aside what is in it.

        Raises:
            OSError: if that is not possible here.
        """
        while True:
            self._root.mkdir(mode=0o700, exist_ok=True)
            # In a directory like /tmp anybody could have made it, or made it lead elsewhere.
            if self._root.is_symlink() or self._root.stat().st_uid != os.getuid():
                raise PermissionError(f"{self._root} is not this user's own")
            try:
                lock = os.open(_lock_of(self.path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue  # another job has just removed what was empty
            if _take(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                self.path.mkdir(mode=0o700, exist_ok=True)
                _set_aside(self.path)
            fcntl.flock(lock, fcntl.LOCK_SH)
            # Whoever was last may have removed folder and lock in the meantime.
            if _is_at(lock, _lock_of(self.path)) and self.path.is_dir():
                self._lock = lock
                return
            os.close(lock)

    def leave(self) -> None:
        """Let go of the folder; the last to do so removes it."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            if _take(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                _remove(self.path)
        finally:
            os.close(lock)

    def bytes_there(self) -> int:
        """Return the size of what is there already, whole or not."""
        return sum(file.stat().st_size for file in self.path.iterdir())

    def names(self) -> set[str]:
        """Return the names of the copies that are whole."""
        return {file.name for file in self.path.iterdir() if not file.name.startswith(".")}

    def adopt(self, copy: Copy) -> bool:
        """Take over a copy that a dead job has left, if it is what it should be."""
        left = self.path / f"{LEFT}{copy.name}"
        with suppress(OSError):
            if copy.checksum is not None and file_checksum(left) == copy.checksum:
                left.rename(self.path / copy.name)
                return True
            left.unlink()
        return False


def _set_aside(folder: Path) -> None:
    """Take its name from every copy: only a checksum tells whether it survived a crash whole."""
    for file in folder.iterdir():
        if file.name.startswith(LEFT):
            continue
        if file.name.startswith("."):
            file.unlink()  # half a copy
        else:
            file.rename(folder / f"{LEFT}{file.name}")


def sweep(directory: str, keep: str | None = None) -> None:
    """Remove what dead jobs of this user have left in a directory, but for the folder `keep`."""
    for path in Path(directory, f"hpctrain-{os.getuid()}").glob(f"*{_LOCK}"):
        if path.stem == keep:
            continue
        with suppress(OSError):
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if _take(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    _remove(path.with_suffix(""))
            finally:
                os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a folder, for the one who holds its lock alone."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        _lock_of(folder).unlink()
        folder.parent.rmdir()  # only if nothing of another job is in it


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)


def _take(lock: int, how: int) -> bool:
    try:
        fcntl.flock(lock, how)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Tell whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
