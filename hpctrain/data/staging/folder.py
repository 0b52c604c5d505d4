"""The folder of the copies on one node: held by the ranks that use it, removed after the last.

A lock of the kernel's says whether anybody does; it ends with the process, however that ends. So
what a killed job has left is known for what it is, and a node's disk has working locks, which
shared file systems need not have.

The disk is one that others use too. So the folder is this user's alone, whatever is done in it goes
by its descriptor, and nothing is removed but files that have names of ours.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpctrain.data.staging.plan import COPY_NAME, Copy
from hpctrain.utils.files import file_checksum, open_regular, temporary_name
from hpctrain.utils.permissions import (
    names_in,
    open_directory,
    open_private,
    require_stable,
)

LEFT = ".left-"
"""Before the name of a file that a dead job has left, until its checksum has been looked at."""
_LOCK = ".lock"
_KEY = re.compile(r"\w{1,64}", re.ASCII)
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class StageFolder:
    """A folder for the copies of some datasets, on the disk of this node.

    Attributes:
        path: of the folder; all that is in it under the name of a copy is whole.
    """

    def __init__(self, directory: str, key: str) -> None:
        """Name the folder; it is made by `join`.

        Args:
            directory: of the disk.
            key: of the folder, letters and digits.
        """
        assert _KEY.fullmatch(key), key
        self._directory = os.path.realpath(directory)
        self._key = key
        self.path = Path(self._directory, _root_name(), key)
        self._lock: int | None = None
        self._folder = -1

    def join(self) -> None:
        """Hold the folder, so that nobody removes it; make it if it is not there.

        Whoever finds it held by nobody sets aside what is in it.

        Raises:
            OSError: if that is not possible here.
        """
        while True:
            with _roots(self._directory, make=True) as (_, root):
                try:
                    lock = _open_lock(self._key, root, os.O_CREAT)
                except FileNotFoundError:
                    continue  # another job has just removed what was empty
                try:
                    if self._hold(lock, root):
                        return
                except BaseException:
                    os.close(lock)
                    raise
                os.close(lock)

    def _hold(self, lock: int, root: int) -> bool:
        """Take the folder; False if whoever was last has removed it in the meantime."""
        if _take(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
            folder = open_private(self._key, root, self.path, make=True)
            try:
                _set_aside(folder)
            finally:
                os.close(folder)
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            if not _is_at(lock, self._key + _LOCK, root):
                return False
            self._folder = open_private(self._key, root, self.path, make=False)
        except FileNotFoundError:
            return False
        self._lock = lock
        return True

    def leave(self) -> None:
        """Let go of the folder; the last to do so removes it."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        folder, self._folder = self._folder, -1
        os.close(folder)
        try:
            if _take(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                with suppress(OSError), _roots(self._directory) as (disk, root):
                    _remove(self._key, root, self.path)
                    os.rmdir(_root_name(), dir_fd=disk)  # if nothing of another job is in it
        finally:
            os.close(lock)

    def bytes_there(self) -> int:
        """Return the size of what is there already, whole or not."""
        with os.scandir(self._folder) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)

    def names(self) -> set[str]:
        """Return the names of the copies that are whole."""
        return {name for name in names_in(self._folder) if COPY_NAME.fullmatch(name)}

    def holds(self, copy: Copy) -> bool:
        """Tell whether a copy is there, whole."""
        try:
            os.stat(copy.name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def adopt(self, copy: Copy) -> bool:
        """Take over a copy that a dead job has left, if it is what it should be."""
        left = f"{LEFT}{copy.name}"
        with suppress(OSError):
            if copy.checksum is not None and file_checksum(self.path / left) == copy.checksum:
                self.publish(left, copy)
                return True
            self.discard(left)
        return False

    def new_file(self, copy: Copy) -> tuple[int, str]:
        """Return the descriptor and the name of a new file that is to become a copy."""
        name = temporary_name(self.path / copy.name).name
        return os.open(name, _NEW_FILE, 0o600, dir_fd=self._folder), name

    def publish(self, name: str, copy: Copy) -> None:
        """Give a file the name of the copy that it is."""
        os.rename(name, copy.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def discard(self, name: str) -> None:
        """Remove a file, if it is still there."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._folder)


def sweep(directory: str, keep: str | None = None) -> None:
    """Remove what dead jobs of this user have left in a directory, but for the folder `keep`."""
    with suppress(OSError), _roots(directory) as (disk, root):
        for name in names_in(root):
            key = name.removesuffix(_LOCK)
            if key not in (name, keep) and _KEY.fullmatch(key):
                _remove_if_left(key, root, Path(directory, _root_name(), key))
        os.rmdir(_root_name(), dir_fd=disk)  # if nothing is left in it


def _remove_if_left(key: str, root: int, path: Path) -> None:
    """Remove a folder that nobody holds."""
    with suppress(OSError):
        lock = _open_lock(key, root)
        try:
            if _take(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                _remove(key, root, path)
        finally:
            os.close(lock)


def _root_name() -> str:
    return f"hpctrain-{os.geteuid()}"


@contextmanager
def _roots(directory: str, *, make: bool = False) -> Iterator[tuple[int, int]]:
    """Give a disk's directory, and the folder of all of this user's copies in it, as descriptors.

    Raises:
        OSError: if it is not there, is not this user's own, or somebody else can exchange it.
    """
    real = require_stable(directory)
    disk = open_directory(real)
    try:
        root = open_private(_root_name(), disk, real / _root_name(), make=make)
        try:
            yield disk, root
        finally:
            os.close(root)
    finally:
        os.close(disk)


def _set_aside(folder: int) -> None:
    """Take its name from every copy: only a checksum tells whether it survived a crash whole."""
    for name in names_in(folder):
        if COPY_NAME.fullmatch(name):
            os.rename(name, f"{LEFT}{name}", src_dir_fd=folder, dst_dir_fd=folder)
        elif _is_half(name):
            os.unlink(name, dir_fd=folder)


def _is_half(name: str) -> bool:
    """Tell whether this is the name of a copy in the making."""
    return name.startswith(".") and bool(COPY_NAME.match(name, 1))


def _remove(key: str, root: int, path: Path) -> None:
    """Remove a folder and its lock, for the one who holds that alone; what is not ours stays."""
    with suppress(FileNotFoundError):
        folder = open_private(key, root, path, make=False)
        try:
            for name in names_in(folder):
                if COPY_NAME.fullmatch(name.removeprefix(LEFT)) or _is_half(name):
                    os.unlink(name, dir_fd=folder)
        finally:
            os.close(folder)
        os.rmdir(key, dir_fd=root)
    os.unlink(key + _LOCK, dir_fd=root)


def _open_lock(key: str, root: int, create: int = 0) -> int:
    flags = os.O_RDWR | create
    return open_regular(key + _LOCK, flags, follow_links=False, folder=root, mode=0o600)


def _take(lock: int, how: int) -> bool:
    try:
        fcntl.flock(lock, how)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, name: str, root: int) -> bool:
    """Tell whether an open file is still the one of a name."""
    try:
        there = os.stat(name, dir_fd=root, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)
