"""A thread that copies shards to the node's disk, and knows which of them are there by now."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from io import FileIO

import xxhash

from hpctrain.data.staging.folder import StageFolder
from hpctrain.data.staging.plan import Copy
from hpctrain.errors import DatasetError
from hpctrain.utils.files import open_regular

PIECE_BYTES = 4 * 2**20
_LOOK_SECONDS = (0.2, 10.0)
"""Between two looks at what the other ranks of the node have copied: at first, and at last."""
_LONGEST_END_SECONDS = 10.0
"""A file system that hangs must not keep a job that has ended."""


class Copier:
    """Makes this rank's copies, and tells where every shard is to be read.

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
        tell: Callable[[str], None],
    ) -> None:
        """Begin to copy.

        Args:
            folder: joined.
            all_copies: that the ranks of this node make together.
            own_copies: that this one makes.
            done: is told after how many seconds all of them were there.
            tell: is told what went wrong.
        """
        # The thread must not refer to this object, or it would never be collected.
        self._places: dict[str, str] = {}
        ended = threading.Event()
        self._thread = threading.Thread(
            target=_work,
            args=(folder, list(all_copies), own_copies, self._places, ended, done, tell),
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
    tell: Callable[[str], None],
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
                tell(str(error))
            awaited = _look(folder, awaited, places)
        wait = _LOOK_SECONDS[0]
        while awaited := _look(folder, awaited, places):
            if ended.wait(wait):
                return
            wait = min(2 * wait, _LOOK_SECONDS[1])
        done(time.monotonic() - begin)
    except OSError as error:
        tell(f"{folder.path}: {error.strerror or error}; the other shards are read where they are")


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
        stopped: tells whether to leave off.

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
