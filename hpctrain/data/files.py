"""Files that are written whole or not at all, and their checksums."""

from __future__ import annotations

import os
from pathlib import Path

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
