"""Files: written whole or not at all, their checksums, and what file system they are on."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import xxhash


def file_checksum(path: str | Path) -> str:
    """Return the xxh3-64 of a file, 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with Path(path).open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(2**20))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return str(digest.hexdigest())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it is there whole, or as it was before."""
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(content)
        publish_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return where to write a file before it has its name; hidden, in the same folder."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def publish_file(temporary: Path, path: Path) -> None:
    """Give a file its name once its content is on disk."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def filesystem_of(path: Path) -> str:
    """Return the type of the file system that holds a path, "unknown" where nobody tells."""
    whole = path.resolve()
    mounts = [
        (len(Path(mount.mountpoint).parts), mount.fstype)
        for mount in psutil.disk_partitions(all=True)
        if whole.is_relative_to(mount.mountpoint)
    ]
    # Of two on one place, the later covers the earlier.
    return max(reversed(mounts), key=lambda mount: mount[0], default=(0, "unknown"))[1]
