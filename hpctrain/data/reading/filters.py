"""What HDF5's filters did to chunks, undone outside HDF5 and the lock that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from hpctrain.data.reading.damage import DamagedChunkError, UndecodableError
from hpctrain.data.reading.decoders import (
    BITSHUFFLE,
    FLETCHER32,
    SHUFFLE,
    ZSTD,
    Decode,
    decoder,
)
from hpctrain.data.reading.headers import bitshuffle_compresses
from hpctrain.data.reading.helpers import ThreadMemory
from hpctrain.data.reading.pieces import Bytes
from hpctrain.data.reading.shuffling import unshuffle
from hpctrain.data.reading.zstd import ZstdFrames, zstd_frames
from hpctrain.data.storage import Filter

OVERHEAD = (8, 2**16)
"""What does not compress grows: by at most 1/8, and so many bytes of headers and tables."""


class _Step(NamedTuple):
    """One filter to undo.

    Attributes:
        decode: undoes it.
        most: bytes that may come out.
        size: bytes that have to, where that is known.
    """

    decode: Decode
    most: int
    size: int | None


class Pipeline:
    """Undoes the filters of one dataset. Any thread may use it.

    Attributes:
        most_stored: bytes that a chunk may take in the file.
    """

    def __init__(self, filters: Sequence[Filter], chunk_bytes: int) -> None:
        """Prepare for chunks of so many bytes.

        Raises:
            UndecodableError: naming a filter that only HDF5 can undo.
        """
        self._chunk_bytes = chunk_bytes
        part, some = OVERHEAD
        self.most_stored = chunk_bytes + chunk_bytes // part + some if filters else chunk_bytes
        self._filters = list(filters)
        self._decoders = [decoder(each) for each in filters]
        self._all = (1 << len(filters)) - 1
        # By the mask of the filters that a chunk skipped.
        self._steps: dict[int, list[_Step]] = {}
        # What undoes neighbouring chunks in one go, if anything does.
        numbers = [each.number for each in filters]
        self._item_bytes = filters[0].values[0] if numbers == [SHUFFLE, ZSTD] else 1
        self._frames = zstd_frames() if numbers in ([ZSTD], [SHUFFLE, ZSTD]) else None

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to undo."""
        return not self._filters

    def decode(
        self, raw: Bytes, sizes: Sequence[int], skipped: Sequence[int], memory: ThreadMemory
    ) -> Bytes:
        """Return the values of chunks, (chunks, chunk_bytes) uint8, for as long as `memory` is.

        Args:
            raw: the chunks one after the other, as in the file.
            sizes: bytes of each.
            skipped: of each, the mask of the filters that it did not go through.
            memory: to decode to.

        Raises:
            DamagedChunkError: if a chunk becomes other than `chunk_bytes`, or asks for memory out
                of proportion to them. It never gets more.
            UndecodableError: if the bytes are damaged otherwise.
        """
        if self._frames is not None and not any(skipped):
            with suppress(DamagedChunkError, UndecodableError):  # which of them, is told below
                return self._decode_frames(self._frames, raw, sizes, memory)
        chunks = len(sizes)
        scratch = self.most_stored if len(self._filters) > 1 else 0
        room = memory.take(chunks * self._chunk_bytes + 2 * scratch)
        out: Bytes = room[2 * scratch :].reshape(chunks, -1)
        between = [room[:scratch], room[scratch : 2 * scratch]]
        end = 0
        for i, size in enumerate(sizes):
            end += size
            try:
                content = self._decode_one(raw[end - size : end], skipped[i], out[i], between)
            except DamagedChunkError as error:
                error.number = i
                raise
            if chunks == 1:
                return content[None]
            if content.ctypes.data != out[i].ctypes.data:
                out[i] = content
            del content  # a filter's own memory is the next chunk's, still in the cache
        return out

    def _decode_frames(
        self, frames: ZstdFrames, raw: Bytes, sizes: Sequence[int], memory: ThreadMemory
    ) -> Bytes:
        """Decode chunks of Zstd in one call, if each is one frame of the right size."""
        chunks = len(sizes)
        if not frames.are_of(self._chunk_bytes, raw, sizes):
            raise UndecodableError("not one frame a chunk")
        rooms = chunks if self._item_bytes == 1 else 2 * chunks
        room: Bytes = memory.take(rooms * self._chunk_bytes).reshape(rooms, -1)
        _require_size(frames.decode(raw, room[:chunks]), chunks * self._chunk_bytes)
        return unshuffle(self._item_bytes, room[:chunks], room[chunks:])

    def _decode_one(self, raw: Bytes, skipped: int, out: Bytes, between: list[Bytes]) -> Bytes:
        """Decode a chunk, to its place if that is free, by way of memory between two filters."""
        content = raw
        steps = self._steps_of(skipped)
        for i, (decode, most, size) in enumerate(steps):
            room = out if i == len(steps) - 1 else between[i % 2][:most]
            content = decode(content, room)
            _require_size(len(content), len(content) if size is None else size)
        _require_size(len(content), self._chunk_bytes)
        return content

    def _steps_of(self, skipped: int) -> list[_Step]:
        """Return what is to be done, in its order, for chunks that skipped some of the filters."""
        mask = skipped & self._all
        if mask not in self._steps:
            steps: list[_Step] = []
            size: int | None = self._chunk_bytes  # before each filter, as long as it is known
            for i, (each, decode) in enumerate(zip(self._filters, self._decoders, strict=True)):
                if not mask >> i & 1:
                    steps.append(_Step(decode, self.most_stored if size is None else size, size))
                    size = _size_after(each, size)
            self._steps[mask] = steps[::-1]
        return self._steps[mask]


def _size_after(each: Filter, size: int | None) -> int | None:
    """Return how many bytes a filter makes of so many, if that does not depend on them."""
    if size is None:
        return None
    if each.number == SHUFFLE:
        return size
    if each.number == FLETCHER32:
        return size + 4
    if each.number == BITSHUFFLE and not bitshuffle_compresses(each.values):
        return size
    return None


def _require_size(found: int, wanted: int) -> None:
    if found != wanted:
        raise DamagedChunkError(f"it becomes {found:,} bytes, and is to have {wanted:,}")
