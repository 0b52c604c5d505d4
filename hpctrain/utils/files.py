"""Files: written whole or not at all, opened only if regular, checksums, and their file system.

The watchdog uses it too: what is not of the standard library is imported where it is needed.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hpctrain.utils.permissions import follow_folder, is_open_to_group

_LONGEST_NAME_BYTES = 255
"""Source: NAME_MAX of Linux and of every file system in use on clusters."""

_PIECE_BYTES = 4 * 2**20

# What file systems answer that sync no folders; they keep renames by themselves.
_FOLDERS_ARE_NOT_SYNCED = (
    errno.EINVAL,
    errno.EBADF,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EACCES,
    errno.EISDIR,
)

_LINKS_ARE_NOT_MADE = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


def temporary_name(path: Path) -> Path:
    """Return where to write a file before it has its name; hidden, in the same folder.

    No two writers get the same one, on whatever host, and no two calls: of several that replace
    a file at once, each writes its own, and the last to be renamed stays. Host, process and
    thread are in it for whoever finds one that a killed writer has left.
    """
    writer = f".{_short_host()}-{os.getpid()}-{threading.get_native_id()}-{os.urandom(4).hex()}"
    stem = path.name.encode()[: _LONGEST_NAME_BYTES - len(writer) - len("..tmp")]
    return path.with_name(f".{stem.decode(errors='ignore')}{writer}.tmp")


def _short_host() -> str:
    """Return the host's own name without its domain, as far as a file's name may hold it."""
    return "".join(c if c.isalnum() else "-" for c in socket.gethostname().partition(".")[0])[:32]


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Give the name of a file to write, which takes the place of `path` after the body.

    After a crash, of the process or the machine, `path` is there whole, new or as it was before.

    Raises:
        OSError: if it cannot be written; `path` is then as it was.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write, which takes the place of `path` after the body.

    Raises:
        OSError: if it cannot be written; `path` is then as it was.
    """
    with replacement(path) as temporary, temporary.open("xb") as file:
        yield file


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it is there whole, or as it was before.

    Raises:
        OSError: if it cannot be written; `path` is then as it was.
    """
    with replacing(path) as file:
        file.write(content)


def put_file(path: Path, content: bytes) -> None:
    """Write a file whole, in the place of one that is there, without waiting for the disk.

    No link of that name is followed: in a folder of several users it may lead anywhere.

    Raises:
        OSError: if it cannot be written; `path` is then as it was.
    """
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(content)
        follow_folder(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def create_file(path: Path, content: bytes) -> bool:
    """Write a file whole, unless its name is taken; of several that try, one does.

    Returns:
        Whether it was written.

    Raises:
        OSError: if it cannot be written; then it is not there.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
        follow_folder(temporary)
        sync(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            # Over NFS the answer to a link that was made may be lost, and the second try fails.
            return temporary.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in _LINKS_ARE_NOT_MADE:
                raise
            return _create_exclusively(path, content)
        return True
    finally:
        with suppress(OSError):
            temporary.unlink()


def _create_exclusively(path: Path, content: bytes) -> bool:
    """Write a file, for a moment not whole, where a file system has no links."""
    try:
        file = path.open("xb")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        follow_folder(path)
    except OSError:
        path.unlink(missing_ok=True)  # an empty file would keep everybody out
        raise
    return True


class AppendedFile:
    """A file to which whole pieces are appended: all of a piece, or nothing of it.

    Nothing stays in a buffer of the process: what was appended outlives its death.

    Raises:
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        # In a folder of several users somebody may have put a link there.
        follow = not is_open_to_group(path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = open_regular(path, flags, follow_links=follow)
        self._file = os.fdopen(descriptor, "ab", buffering=0)
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


def publish(temporary: Path, path: Path) -> None:
    """Give a file its name once its content is on disk.

    Raises:
        OSError: if that fails; `path` is then as it was, or the new one.
    """
    follow_folder(temporary)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, on disk before anything that follows.

    Raises:
        OSError: if they did not get there.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _FOLDERS_ARE_NOT_SYNCED or not path.is_dir():
            raise


def open_regular(
    path: str | Path,
    flags: int = os.O_RDONLY,
    *,
    follow_links: bool = True,
    folder: int | None = None,
    mode: int = 0o666,
) -> int:
    """Open a file, and nothing that only has its name, such as a pipe or a device.

    A pipe would keep a reader waiting for ever, a tape would be rewound.

    Args:
        path: of the file.
        flags: of `os.open`; with O_CREAT the file need not be there.
        follow_links: False where others may have put a link under this name.
        folder: descriptor of the one that a relative path begins in; None: the current one.
        mode: of a file that is made, less the umask.

    Raises:
        OSError: if it cannot be opened, is not a regular file, or is a link that is not to be
            followed, then with ELOOP.
    """
    try:
        facts = os.stat(path, dir_fd=folder, follow_symlinks=follow_links)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    else:
        _require_regular(facts, path)
    flags |= os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags, mode, dir_fd=folder)
    try:
        _require_regular(os.fstat(descriptor), path)  # it may have been exchanged
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_file(path: str | Path, buffering: int = -1) -> BinaryIO:
    """Open a file for reading bytes, see `open_regular`.

    Raises:
        OSError: if it cannot be opened, or is not a regular file.
    """
    return os.fdopen(open_regular(path), "rb", buffering)


def names_in(folder: Path) -> list[str]:
    """Return the names of what lies in a folder, sorted; none where it cannot be listed."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def require_regular(path: str | Path) -> os.stat_result:
    """Return the facts of a file that somebody else is about to open, see `open_regular`.

    Raises:
        OSError: if it cannot be looked at, or is not a regular file.
    """
    facts = Path(path).stat()
    _require_regular(facts, path)
    return facts


def _require_regular(facts: os.stat_result, path: str | Path) -> None:
    if stat.S_ISLNK(facts.st_mode):
        raise OSError(errno.ELOOP, "is a link", str(path))
    if stat.S_ISDIR(facts.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a directory, not a file", str(path))
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))


def file_checksum(path: str | Path) -> str:
    """Return the xxh3-64 of a file, 16 hexadecimal digits.

    Raises:
        OSError: if it cannot be read.
    """
    import xxhash

    digest = xxhash.xxh3_64()
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return str(digest.hexdigest())


def is_checksum(text: str) -> bool:
    """Tell whether a text is a checksum as these functions return it, and not, say, a path."""
    return len(text) == 16 and not set(text) - set("0123456789abcdef")


def checksum(content: bytes) -> str:
    """Return the xxh3-64 of bytes, 16 hexadecimal digits."""
    import xxhash

    return str(xxhash.xxh3_64_hexdigest(content))


@dataclass(frozen=True, slots=True)
class Mount:
    """What holds a path.

    Attributes:
        filesystem: its type, "unknown" where that is not known.
        source: device, or what is exported; empty where that is not known.
        place: where it is mounted.
    """

    filesystem: str
    source: str
    place: str


def filesystem_of(path: Path) -> str:
    """Return the type of the file system that holds a path, "unknown" where that is not known."""
    return mount_of(path).filesystem


def mount_of(path: Path) -> Mount:
    """Return the file system that holds a path."""
    import psutil

    whole = path.resolve()
    mounts = [
        (len(Path(mount.mountpoint).parts), mount)
        for mount in psutil.disk_partitions(all=True)
        if whole.is_relative_to(mount.mountpoint)
    ]
    if not mounts:
        return Mount("unknown", "", whole.anchor)
    # Of two on one place, the later covers the earlier.
    _, found = max(reversed(mounts), key=lambda mount: mount[0])
    return Mount(found.fstype, found.device, found.mountpoint)
