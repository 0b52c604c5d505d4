"""Copies of shards on the node's own disk: the thread that makes them, and the folder they lie in.

The folder is held by the ranks that use it, and removed after the last. A lock of the kernel's says
whether anybody does; it ends with the process, however that ends. So what a killed job has left is
known for what it is, and a node's disk has working locks, which shared file systems need not have.

The disk is one that others use too. So the folder is this user's alone, whatever is done in it goes
by its descriptor, and nothing is removed but files that have names of ours.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

import xxhash

from hpctrain.data.staging.plan import COPY_NAME, Copy
from hpctrain.errors import DatasetError
from hpctrain.utils.files import file_checksum, open_regular, temporary_name
from hpctrain.utils.permissions import (
    names_in,
    open_directory,
    open_private,
    require_stable,
)

PIECE_BYTES = 4 * 2**20
_LOOK_SECONDS = (0.2, 10.0)
"""Between two looks at what the other ranks of the node have copied: at first, and at last."""
_LONGEST_END_SECONDS = 10.0
"""A file system that hangs must not keep a job that has ended."""
LEFT = ".left-"
"""Before the name of a file that a dead job has left, until its checksum has been looked at."""
_LOCK = ".lock"
_KEY = re.compile(r"\w{1,64}", re.ASCII)
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Copier:
    """Makes this rank's copies, and knows where every shard is to be read.

    The thread ends when all is there, with `close`, when the object is collected, and at exit;
    then this rank lets go of the folder.
    """

    def __init__(
        self,
        folder: StageFolder,
        *,
        all_copies: Sequence[Copy],
        own_copies: Sequence[Copy],
        done: Callable[[float], None],
        report: Callable[[str], None],
    ) -> None:
        """Begin to copy.

        Args:
            folder: joined.
            all_copies: that the ranks of this node make together.
            own_copies: that this one makes.
            done: takes the seconds after which all of them were there.
            report: takes what went wrong.
        """
        # The thread must not refer to this object, or it would never be collected.
        self._places: dict[str, str] = {}
        ended = threading.Event()
        self._thread = threading.Thread(
            target=_work,
            args=(folder, list(all_copies), own_copies, self._places, ended, done, report),
            name="hpctrain-staging",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, _end, folder, ended, self._thread)
        self._thread.start()

    def locate(self, path: str) -> str:
        """Return where a shard is to be read: its copy, once that is whole, or `path` itself."""
        return self._places.get(path, path)

    def close(self) -> None:
        """End the thread and let go of the folder. Shards are read from it no more."""
        self._places.clear()
        self._finalizer()


def _work(
    folder: StageFolder,
    awaited: list[Copy],
    own_copies: Sequence[Copy],
    places: dict[str, str],
    ended: threading.Event,
    done: Callable[[float], None],
    report: Callable[[str], None],
) -> None:
    begin = time.monotonic()
    try:
        for copy in own_copies:
            if folder.holds(copy) or folder.adopt(copy):
                continue  # of another live job, or of a dead one
            try:
                if not copy_whole(copy, folder, ended.is_set):
                    return
            except DatasetError as error:
                report(str(error))
            awaited = _look(folder, awaited, places)
        wait = _LOOK_SECONDS[0]
        while awaited := _look(folder, awaited, places):
            if ended.wait(wait):
                return
            wait = min(2 * wait, _LOOK_SECONDS[1])
        done(time.monotonic() - begin)
    except OSError as error:
        report(
            f"{folder.path}: {error.strerror or error}; the other shards are read where they are"
        )


def _look(folder: StageFolder, awaited: list[Copy], places: dict[str, str]) -> list[Copy]:
    """Note which of the awaited copies are whole, and return the others."""
    names = folder.names()
    for copy in awaited:
        if copy.name in names:
            places[copy.source] = str(folder.path / copy.name)
    return [copy for copy in awaited if copy.name not in names]


def copy_whole(copy: Copy, folder: StageFolder, stopped: Callable[[], bool]) -> bool:
    """Copy one shard; under its name it is there whole or not at all.

    Args:
        copy: to make.
        folder: joined.
        stopped: returns whether to leave off.

    Returns:
        Whether it is there; False if it was stopped.

    Raises:
        DatasetError: if the shard is not what the index says.
        OSError: if it cannot be read or written.
    """
    out, temporary = folder.new_file(copy)
    try:
        with os.fdopen(out, "wb", 0), os.fdopen(open_regular(copy.source), "rb", 0) as source:
            found = _copied(source, out, stopped)
        if found is None:
            return False
        size, digest = found
        if size != copy.size or digest != (copy.checksum or digest):
            raise DatasetError(
                f"{copy.source}: is not what its index says, by size or checksum; it is read where "
                "it is. See `python -m hpctrain data verify`"
            )
        folder.publish(temporary, copy)
    finally:
        folder.discard(temporary)
    return True


def _copied(source: FileIO, out: int, stopped: Callable[[], bool]) -> tuple[int, str] | None:
    """Copy a file; return its size and checksum, None if stopped before its end."""
    digest, size = xxhash.xxh3_64(), 0
    buffer = memoryview(bytearray(PIECE_BYTES))
    while count := source.readinto(buffer):
        if stopped():
            return None
        digest.update(buffer[:count])
        size += count
        written = 0
        while written < count:
            written += os.write(out, buffer[written:count])
    return size, digest.hexdigest()


def _end(folder: StageFolder, ended: threading.Event, thread: threading.Thread) -> None:
    ended.set()
    if thread is not threading.current_thread():
        thread.join(_LONGEST_END_SECONDS)
    folder.leave()


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
    """Take its name from every copy: only a checksum shows whether it survived a crash whole."""
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
