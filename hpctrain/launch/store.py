"""The control plane of a world without MPI: torchrun, Kubeflow, variables set by hand.

Messages of all ranks go round by round by way of a torch.distributed store.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import distributed as dist

from hpctrain.errors import LaunchError
from hpctrain.launch.environment import Claim
from hpctrain.launch.generation import Process, agree, may_restart
from hpctrain.launch.messages import DecodingError, decode, encode
from hpctrain.launch.rendezvous import is_loopback, listen
from hpctrain.launch.waiting import (
    HEAD_START_SECONDS,
    ended_from_outside,
    limit_seconds,
    missing_text,
)
from hpctrain.topology import closing_together

_NAME_SECONDS = 5.0
_LEAVE_SECONDS = 10.0
# Source: RFC 6761, section 6.3; the /etc/hosts of Debian and of Red Hat.
_LOCALHOST = re.compile(
    r"(?:[\w.-]+\.)?localhost[46]?(?:\.localdomain[46]?)?\.?|ip6-(?:localhost|loopback)",
    re.IGNORECASE,
)
_IN_A_POD = "KUBERNETES_SERVICE_HOST"

LONGEST_WAIT = timedelta(minutes=30)
"""As long as torch itself waits in a collective."""

# torch's store takes 8 MiB at a time. Source: MAX_PAYLOAD_LEN of
# torch/csrc/distributed/c10d/TCPStoreLibUvBackend.cpp.
_PIECE_BYTES = 4 * 2**20
_MOST_BYTES = 2**32
_SIZE = struct.Struct("<Q")


@contextmanager
def store_world(claim: Claim) -> Iterator[StoreCommunicator]:
    """Meet at MASTER_ADDR:MASTER_PORT and give the communicator. Collective: all ranks.

    Raises:
        LaunchError: if the address is not a host, nobody answers there, or another world does.
    """
    assert claim.launcher is not None
    assert claim.rank is not None
    assert claim.world_size is not None
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    _resolve(address)
    seconds = limit_seconds(claim.world_size)
    with ended_from_outside(2 * seconds + _LEAVE_SECONDS, partial(_last_words, claim)):
        store, generation = _meet(claim, f"{address}:{port}", seconds)
    store.set_timeout(LONGEST_WAIT)
    own = dist.PrefixStore(f"hpctrain/{generation}", store)
    communicator = StoreCommunicator(own, claim.rank, claim.world_size)
    with closing_together(communicator, partial(_leave, own, claim.rank, claim.world_size)):
        yield communicator


def _meet(claim: Claim, place: str, seconds: float) -> tuple[dist.Store, str]:
    """Return the store that all ranks share, and the name of their world in it.

    Collective: all ranks.
    """
    assert claim.rank is not None
    assert claim.world_size is not None
    try:
        store = _open(claim, timedelta(seconds=seconds))
    except (dist.DistError, OSError, RuntimeError) as error:
        action = "open" if claim.rank == 0 else "reach"
        is_taken = "EADDRINUSE" in str(error) or getattr(error, "errno", 0) == errno.EADDRINUSE
        raise LaunchError(
            f"rank {claim.rank} cannot {action} MASTER_ADDR:MASTER_PORT = {place}: "
            f"{str(error).splitlines()[0]}" + (" Choose another MASTER_PORT." if is_taken else "")
        ) from error
    is_agents = may_restart(os.environ)
    process = Process(
        rank=claim.rank,
        world_size=claim.world_size,
        place=place,
        may_restart=is_agents,
        is_on_loopback=not is_agents and loopback_of(claim, os.environ) is not None,
    )
    return store, agree(store, process, longest_seconds=seconds)


def _open(claim: Claim, timeout: timedelta) -> dist.Store:
    """Return the store at MASTER_ADDR:MASTER_PORT, without waiting for all ranks to come."""
    assert claim.rank is not None
    assert claim.world_size is not None
    if may_restart(os.environ):
        # torch's own rendezvous knows torchrun's agent, which holds the store itself.
        found: tuple[dist.Store, int, int] = next(
            dist.rendezvous("env://", claim.rank, claim.world_size, timeout=timeout)
        )
        return found[0]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listener = None
    ip = loopback_of(claim, os.environ)
    if claim.rank == 0 and ip is not None:
        # torch's own socket listens at all addresses.
        listener = listen(claim.world_size, ip, port)
    return dist.TCPStore(
        address,
        port,
        claim.world_size,
        is_master=claim.rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        # The store takes the descriptor over and closes it.
        master_listen_fd=listener.detach() if listener is not None else None,
        # Until torch 2.8 the libuv kind cannot take one.
        use_libuv=listener is None or torch.__version__ >= "2.8",
    )


def _last_words(claim: Claim, asked: str | None) -> str | None:
    """Say why this process ends while it waits for others to meet."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    where = f"while it waited for others at MASTER_ADDR:MASTER_PORT = {place}"
    if asked is None:
        return f"rank {claim.rank} has got no answer {where}"
    return f"rank {claim.rank} was ended by {asked} {where}" if claim.rank == 0 else None


def loopback_of(claim: Claim, env: Mapping[str, str]) -> str | None:
    """Return the address of this host's loopback where all ranks meet; None: they meet elsewhere.

    In a pod the name "localhost" alone does not say so: Kubeflow gives it to rank 0, and the name
    of its host to the others. A host's own name may mean loopback on that host alone.
    """
    name = env["MASTER_ADDR"]
    is_one_host = claim.local_world_size == claim.world_size
    is_named = _LOCALHOST.fullmatch(name) and (is_one_host or _IN_A_POD not in env)
    try:
        found = socket.getaddrinfo(name, None, flags=0 if is_named else socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):  # a name, or none at all
        return None
    # IPv4 first, as it is where a name has both.
    ips = sorted(
        {str(address[0]).removeprefix("::ffff:") for *_, address in found}, key=lambda ip: ":" in ip
    )
    return ips[0] if ips and all(map(is_loopback, ips)) else None


def _resolve(address: str) -> None:
    """Check that MASTER_ADDR means some host; torch would try for minutes.

    Raises:
        LaunchError: if it means none for a while: a new pod's name may take some seconds.
    """
    end = time.monotonic() + _NAME_SECONDS
    while True:
        try:
            socket.getaddrinfo(address, None)
        except (OSError, UnicodeError) as error:
            if time.monotonic() < end:
                time.sleep(0.5)
                continue
            raise LaunchError(
                f"MASTER_ADDR={address} is unknown on {socket.gethostname()} ({error}). Set it to "
                "an address of rank 0's host, the same for every process.",
                everywhere=True,
            ) from error
        return


def _leave(store: dist.Store, rank: int, world_size: int) -> None:
    """Take leave of the store that rank 0 may hold: it goes last. Collective: all ranks.

    After a barrier alone the others may still be tidying up in the store.
    """
    if rank != 0:
        store.add("gone", 1)
        return
    end = time.monotonic() + _LEAVE_SECONDS
    while store.add("gone", 0) < world_size - 1 and time.monotonic() < end:
        time.sleep(0.005)


class StoreCommunicator:
    """Messages as keys of a torch.distributed store, of the types that `encoding` knows."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._messages = Exchange(dist.PrefixStore("messages", store), rank, world_size)
        self._reductions = Exchange(dist.PrefixStore("maxima", store), rank, world_size)
        self.limit_seconds: float | None = None
        self.limit(limit_seconds(world_size))

    def limit(self, seconds: float | None) -> None:
        """Say how long one wait for the others may take; None: as long as torch itself waits."""
        self.limit_seconds = seconds
        self._messages.limit(seconds)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank. Collective: all ranks."""
        number = self._messages.put(encode(value if self.rank == 0 else None))
        return self._messages.take(number)[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order. Collective: all ranks."""
        return self._messages.take(self._messages.put(encode(value)))

    def barrier(self) -> None:
        """Return once every rank has come. Collective: all ranks."""
        self.all_gather(None)

    def start_max(self, values: Sequence[int]) -> PendingMaximum:
        """Start an elementwise maximum of int64 values. Collective: all ranks."""
        return PendingMaximum(self._reductions, self._reductions.put(encode(tuple(values))))


class PendingMaximum:
    """A maximum whose own part is in the store already."""

    def __init__(self, exchange: Exchange, number: int) -> None:
        self._exchange = exchange
        self._number = number

    def wait(self) -> tuple[int, ...]:
        """Return the elementwise maximum over all ranks."""
        columns = zip(*self._exchange.take(self._number), strict=True)
        return tuple(max(column) for column in columns)


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
            raise LaunchError(missing_text(there, len(keys), seconds)) from error

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
