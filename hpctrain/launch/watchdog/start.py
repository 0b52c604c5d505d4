"""Starting the watchdogs: one per node, all ranks together.

Each learns which processes of the launcher stand above the ranks of its node: when they are gone
nobody clears up after the ranks. hydra_pmi_proxy, prted, orted, slurmstepd or an agent of torchrun
start them, some of these under mpirun itself. Where one is killed its ranks train on: without
output, beyond the reach of a stop, and in the way of the next job. Shells above them are none of
this: a job that was started by `nohup mpirun ... &` outlives its shell.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from hpctrain.errors import LaunchError
from hpctrain.launch.environment import names_of
from hpctrain.launch.launchers import LAUNCHERS
from hpctrain.launch.rendezvous import Meeting, listen
from hpctrain.launch.watchdog.client import Pulse, WatchdogClient, join
from hpctrain.launch.watchdog.process import Orders
from hpctrain.launch.watchdog.verdicts import Group
from hpctrain.topology import Communicator, Topology, closing_together, raise_together
from hpctrain.utils.proc import (
    PROC,
    ancestors,
    name_of,
    network_namespace,
    pid_namespace,
    start_time,
)
from hpctrain.utils.process_aside import start_aside

FRONT_ENDS = frozenset(
    {
        *("mpirun", "mpiexec", "mpiexec.hydra", "hydra_bstrap_proxy"),
        *("mpirun.openmpi", "mpiexec.openmpi", "orterun", "mpirun.mpich", "mpiexec.mpich"),
        *("prterun", "torchrun", "torch.distributed.run"),
    }
)
"""What users call, and what it starts in between; Intel MPI's mpirun is a script that stays."""

Daemon = tuple[int, str, str, bool]
"""Process id, start time (ids are used again), name, and whether it started the ranks itself."""

_LEAVE_SECONDS = 5.0
# Strangers on this node may connect too, and are sent away one by one.
_BACKLOG = 128


def daemons_above(label: str, process: int | None = None, proc: Path = PROC) -> tuple[Daemon, ...]:
    """Return the processes through which a launcher has started this process, the nearest first.

    Args:
        label: of the launcher, as `Topology.launcher` has it.
        process: id of another process.
        proc: where the process file system is.
    """
    own = next((row.processes for row in LAUNCHERS if row.label == label), frozenset())
    found: list[Daemon] = []
    for pid in ancestors(process, proc):
        # A front end may be a script, whose own name it is then.
        names = [*names_of(pid, proc), *([name_of(pid, proc)] if found else [])]
        known = own if not found else own | FRONT_ENDS
        name = next((name for name in names if name in known), None)
        began = start_time(pid, proc)
        if name is not None and began is not None:
            found.append((pid, began, name, not found))
        elif found:
            break
    return tuple(found)


@contextmanager
def watched(
    topology: Topology,
    communicator: Communicator,
    meeting: Meeting,
    pulse: Pulse,
    *,
    hang_timeout_seconds: float,
    first_step_timeout_seconds: float,
) -> Iterator[WatchdogClient | None]:
    """Have watchdogs see to it that no rank dies or stands still unnoticed. Collective: all ranks.

    Gives None where there is nothing to watch with: outside Linux.

    Args:
        topology: the ranks and their nodes.
        communicator: carries addresses; a barrier ends the watch.
        meeting: the proven address of rank 0.
        pulse: heartbeats of this rank.
        hang_timeout_seconds: with all ranks alive, the job ends after so long without progress.
        first_step_timeout_seconds: the same while a rank is in something that may take longer.

    Raises:
        LaunchError: on every rank, if a watchdog cannot be started.
    """
    said = communicator.all_gather(
        (topology.node_rank, _spaces(), daemons_above(topology.launcher))
    )
    spaces = [(node_rank, space) for node_rank, space, _ in said]
    if any(space is None for _, space in spaces):
        yield None
        return
    # Within one group a process id and an abstract address mean the same to all.
    members: dict[object, list[int]] = {}
    for rank, place in enumerate(spaces):
        members.setdefault(place, []).append(rank)
    own = members[spaces[topology.rank]]
    leader = own[0]
    groups = {
        ranks[0]: Group(host=topology.hosts[spaces[ranks[0]][0]], ranks=tuple(ranks))
        for ranks in members.values()
    }
    is_coordinator = topology.is_rank_zero and len(groups) > 1
    coordinator_listener = listen(len(groups), meeting.ip) if is_coordinator else None
    port = coordinator_listener.getsockname()[1] if coordinator_listener is not None else 0
    # Everybody on a node can read the names of its sockets: the name and the secret are two.
    port, name, secret = communicator.broadcast(
        (port, secrets.token_hex(16), secrets.token_hex(32))
    )
    address = f"\0hpctrain-{name}-{leader}"

    process: subprocess.Popen[bytes] | None = None
    with raise_together(communicator):
        if topology.rank == leader:
            coordinator_leader = leader == 0
            speaker = min((key for key in groups if key != 0), default=None)
            ranks_listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            ranks_listener.bind(address)
            ranks_listener.listen(max(_BACKLOG, len(own)))
            orders = Orders(
                leader=leader,
                groups=groups if coordinator_leader else {key: groups[key] for key in {0, leader}},
                secret=secret,
                ranks_fd=ranks_listener.fileno(),
                coordinator_fd=None
                if coordinator_listener is None
                else coordinator_listener.fileno(),
                coordinator_address=None if coordinator_leader else (meeting.ip, port),
                reports_its_loss=leader == speaker,
                daemons=tuple(dict.fromkeys(daemon for rank in own for daemon in said[rank][2])),
                hang_timeout_seconds=hang_timeout_seconds,
                first_step_timeout_seconds=first_step_timeout_seconds,
            )
            process = _start(orders, topology.host)
            ranks_listener.close()
            if coordinator_listener is not None:
                coordinator_listener.close()
    with raise_together(communicator):
        try:
            client = join(address, secret, topology.rank, own.index(topology.rank), pulse)
        except OSError as error:
            raise LaunchError(
                f"the watchdog of {topology.host} does not answer: {error.strerror}"
            ) from error

    def leave() -> None:
        client.leave()
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LEAVE_SECONDS)

    with closing_together(communicator, leave):
        yield client


def _spaces() -> tuple[str, str] | None:
    """Return the PID and network namespaces of this process; None where it cannot be watched."""
    needed = (os, "memfd_create"), (socket, "recv_fds"), (socket, "SO_PEERCRED")
    if not all(hasattr(module, name) for module, name in needed):
        return None
    spaces = pid_namespace(), network_namespace()
    return spaces if all(spaces) else None


def _start(orders: Orders, host: str) -> subprocess.Popen[bytes]:
    """Start a watchdog that outlives its ranks by just what it needs to tell of their end.

    Raises:
        LaunchError: if the node has no room for a process more.
    """
    descriptors = [
        number for number in (orders.ranks_fd, orders.coordinator_fd) if number is not None
    ]
    try:
        process = start_aside(
            "hpctrain.launch.watchdog.process", "main", stdin=subprocess.PIPE, pass_fds=descriptors
        )
        assert process.stdin is not None
        with process.stdin as stdin:
            stdin.write(json.dumps(asdict(orders)).encode())
    except OSError as error:
        raise LaunchError(f"no watchdog can be started on {host}: {error.strerror}") from error
    return process
