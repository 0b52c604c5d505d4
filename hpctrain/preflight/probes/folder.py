"""Tries the run folder's file system, and leaves nothing behind."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpctrain.errors import CheckpointError
from hpctrain.utils.files import filesystem_of, sync

_CHUNK_BYTES = 4 * 2**20
_MOST_BYTES = 64 * 2**20
_MOST_SECONDS = 5.0
_KEPT_FREE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFacts:
    """What a file system did.

    Attributes:
        place: the folder that was tried: the run folder, or the nearest one above it.
        filesystem: its type, such as "lustre".
        written_bytes: to one file.
        write_seconds: until they were on disk.
        rename_seconds: of a rename with both folders on disk.
        free_bytes: that a user may still write.
    """

    place: str
    filesystem: str
    written_bytes: int
    write_seconds: float
    rename_seconds: float
    free_bytes: int


def nearest_folder(path: Path) -> Path:
    """Return the folder itself, or where its first missing parent would be made.

    Raises:
        CheckpointError: if a file is in the way.
    """
    for folder in (path, *path.parents):
        if folder.is_dir():
            return folder
        if os.path.lexists(folder):
            raise CheckpointError(f"{folder} is no folder")
    raise CheckpointError(f"{path} has no parent that is there")


@contextmanager
def trial_folder(path: Path) -> Iterator[Path]:
    """Make a hidden folder below a run folder, or beside its place, and remove it.

    Raises:
        CheckpointError: if that is not possible.
    """
    folder = nearest_folder(path) / f".hpctrain-check-{secrets.token_hex(8)}"
    try:
        folder.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot make a folder in {folder.parent}: {error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def try_folder(folder: Path) -> FolderFacts:
    """Do to a folder what saving a checkpoint does: write, sync, rename, sync.

    Raises:
        CheckpointError: naming the step that failed.
    """
    what = "written"
    try:
        free = shutil.disk_usage(folder).free
        # Small where little is free: the check must not be what fills a disk.
        wanted = max(_CHUNK_BYTES, min(_MOST_BYTES, free - _KEPT_FREE_BYTES))
        temporary, final = folder / "file.tmp", folder / "file"
        written, chunk = 0, secrets.token_bytes(_CHUNK_BYTES)  # that no file system compresses
        begin = time.perf_counter()
        with temporary.open("wb") as file:
            while written < wanted and time.perf_counter() - begin < _MOST_SECONDS:
                file.write(chunk)
                written += len(chunk)
            file.flush()
            what = "synced to disk"
            os.fsync(file.fileno())
        write_seconds = time.perf_counter() - begin
        what = "renamed"
        begin = time.perf_counter()
        os.replace(temporary, final)
        sync(folder)
        rename_seconds = time.perf_counter() - begin
    except OSError as error:
        raise CheckpointError(f"a file in {folder.parent} cannot be {what}: {error}") from error
    return FolderFacts(
        place=str(folder.parent.absolute()),
        filesystem=filesystem_of(folder),
        written_bytes=written,
        write_seconds=write_seconds,
        rename_seconds=rename_seconds,
        free_bytes=free,
    )
