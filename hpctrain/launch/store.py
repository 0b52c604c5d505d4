"""The control plane of a world without MPI: torchrun, Kubeflow, variables set by hand."""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import distributed as dist

from hpctrain.errors import LaunchError
from hpctrain.launch.encoding import encode
from hpctrain.launch.exchange import LONGEST_WAIT, Exchange
from hpctrain.launch.generation import Process, agree, may_restart
from hpctrain.launch.launchers import Claim
from hpctrain.launch.probing import is_loopback, listen
from hpctrain.launch.waits import ended_from_outside, limit_seconds
from hpctrain.topology import closing_together

_NAME_SECONDS = 5.0
_LEAVE_SECONDS = 10.0
# Source: RFC 6761, section 6.3; the /etc/hosts of Debian and of Red Hat.
_LOCALHOST = re.compile(
    r"(?:[\w.-]+\.)?localhost[46]?(?:\.localdomain[46]?)?\.?|ip6-(?:localhost|loopback)",
    re.IGNORECASE,
)
_IN_A_POD = "KUBERNETES_SERVICE_HOST"


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
