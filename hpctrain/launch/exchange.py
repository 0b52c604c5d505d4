"""Messages of all ranks by way of a torch.distributed store, round by round."""

from __future__ import annotations

import struct
import time
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from hpctrain.errors import LaunchError
from hpctrain.launch.decoding import DecodingError, decode
from hpctrain.launch.roll_call import HEAD_START_SECONDS, tell_missing

LONGEST_WAIT = timedelta(minutes=30)
"""As long as torch itself waits in a collective."""

# torch's store takes 8 MiB at a time. Source: MAX_PAYLOAD_LEN of
# torch/csrc/distributed/c10d/TCPStoreLibUvBackend.cpp.
_PIECE_BYTES = 4 * 2**20
_MOST_BYTES = 2**32
_SIZE = struct.Struct("<Q")


class Exchange:
    """Rounds in which every rank puts a message into the store, and takes those of all.

    Every rank writes its part under keys of its own and reads all parts. At most two rounds are
    under way at a time, as a maximum may be started before the last one is waited for. So a rank
    that sees all parts of a round knows that everybody has read those of the one two before it, and
    deletes its own part of that: the store does not grow with the run.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._round = 0
        self._limit_seconds: float | None = None
        # Of the rounds whose own message is still in the store, by number.
        self._keys: dict[int, list[str]] = {}

    def limit(self, seconds: float | None) -> None:
        """Say how long one wait for the others may take; None: as long as torch itself waits."""
        self._limit_seconds = seconds
        self._store.set_timeout(LONGEST_WAIT if seconds is None else timedelta(seconds=seconds))

    def put(self, message: bytes) -> int:
        """Put this rank's message of the next round; return the number of the round."""
        number, self._round = self._round, self._round + 1
        data = memoryview(_SIZE.pack(len(message)) + message)
        keys = [_key(number, self._rank, piece) for piece in range(-(-len(data) // _PIECE_BYTES))]
        self._keys[number] = keys
        for piece, key in reversed(list(enumerate(keys))):
            # The first piece last: who sees it finds all others. The binding takes bytes, whatever
            # it says of itself.
            part = bytes(data[piece * _PIECE_BYTES : (piece + 1) * _PIECE_BYTES])
            self._store.set(key, part)  # type: ignore[arg-type]
        return number

    def take(self, number: int) -> list[Any]:
        """Return the messages of all ranks of a round.

        Raises:
            LaunchError: if something is none, which no rank of this job has put there.
        """
        firsts = self._firsts(number)
        for key in self._keys.pop(number - 2, ()):
            self._store.delete_key(key)
        return [self._decoded(number, rank, first) for rank, first in enumerate(firsts)]

    def _firsts(self, number: int) -> list[bytes]:
        """Return the first pieces of a round; wait until all ranks have put theirs."""
        keys = [_key(number, rank, 0) for rank in range(self._world_size)]
        try:
            return self._store.multi_get(keys)
        except RuntimeError as error:  # torch's DistStoreError is one
            seconds = self._limit_seconds
            if seconds is None or "timeout" not in str(error).lower():
                raise
            there = {rank: 0 for rank, key in enumerate(keys) if self._store.check([key])}
            if self._rank != min(there):
                time.sleep(HEAD_START_SECONDS)
            raise LaunchError(tell_missing(there, len(keys), seconds)) from error

    def _decoded(self, number: int, rank: int, first: bytes) -> Any:
        try:
            if len(first) < _SIZE.size:
                raise DecodingError("it is too short")
            (size,) = _SIZE.unpack_from(first)
            if size > _MOST_BYTES:
                raise DecodingError(f"it has {size} bytes")
            num_pieces = -(-(_SIZE.size + size) // _PIECE_BYTES)
            keys = [_key(number, rank, piece) for piece in range(1, num_pieces)]
            # They were there before the first one: what is not will never be.
            if keys and not self._store.check(keys):
                raise DecodingError("parts of it are missing")
            rest = self._store.multi_get(keys) if keys else []
            return decode(b"".join([first[_SIZE.size :], *rest]))
        except DecodingError as error:
            raise LaunchError(
                f"rank {self._rank} found in the store at MASTER_ADDR:MASTER_PORT what rank {rank} "
                f"has not written ({error}): another program writes there"
            ) from error


def _key(number: int, rank: int, piece: int) -> str:
    return f"{number}/{rank}/{piece}"
