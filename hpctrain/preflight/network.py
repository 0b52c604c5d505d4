"""The checks between ranks: names, interface, transport, clocks, speed, and who is late."""

from __future__ import annotations

import ipaddress
import os
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hpctrain.accelerator import synchronize
from hpctrain.launch.nccl_log import Transport, describe, fast_cards, find_trouble
from hpctrain.launch.process_group import World
from hpctrain.preflight.checks import HOST_FIX, Checks
from hpctrain.preflight.plugins import Plugin, find_plugin, judge_plugin
from hpctrain.preflight.rank_facts import RankFacts, Ranks
from hpctrain.preflight.reductions import judge_reductions, time_reductions
from hpctrain.preflight.report import Finding
from hpctrain.topology import Communicator
from hpctrain.training.summary import gather_transport
from hpctrain.utils.text import listed, number, plural

_FIX = "see that no firewall is between the nodes; launch.interface names another network"
_ROUNDS = 7
_SLOW_LOOKUP_SECONDS = 2.0
_FAST_LINK = 10
"""An idle link so many times faster than the chosen one is worth a word."""
_CLOCK_SECONDS = 1.0
_ARRIVAL_SECONDS = 0.1
_SLOW_RANK = 1.5


def check_network(checks: Checks, world: World) -> None:
    """Try the network of a ready process group. Collective: all ranks."""
    _check_names(checks)
    hosts = checks.hosts
    speeds = checks.gather("speed", HOST_FIX, lambda: fixed_computation(world.device))
    if speeds is not None:
        checks.add(judge_speed(speeds, hosts))
    if checks.topology.world_size == 1:
        checks.skip(["all-reduce", "transport", "clocks", "barrier"], "one process")
        return
    table = checks.gather("all-reduce", _FIX, lambda: time_reductions(world))
    transport = gather_transport(world)  # by now it is connected
    if table is not None:
        carrier = _carrier(checks, world, transport)
        checks.add(judge_reductions(table, world.backend or "", hosts, carrier))
    if transport is None:
        checks.add(judge_sockets(world.backend or "", checks.ranks))
    else:
        _check_plugin(checks)
        checks.add(judge_transport(transport, checks.topology.num_nodes))
    offsets = checks.gather("clocks", HOST_FIX, lambda: clock_offset(checks.communicator))
    if offsets is not None:
        checks.add(judge_clocks(offsets, hosts))
    waits = checks.gather("barrier", HOST_FIX, lambda: barrier_wait(checks.communicator))
    if waits is not None:
        checks.add(judge_arrival(waits, hosts))


def _check_names(checks: Checks) -> None:
    topology = checks.topology

    def look_up_here() -> Lookup | None:
        # One rank per node: a name server is easily overrun.
        if topology.local_rank != 0:
            return None
        return look_up(topology.host, topology.hosts[0])

    lookups = checks.gather("host names", HOST_FIX, look_up_here)
    if lookups is None or not checks.ranks:
        return
    agreed = checks.ranks[0].addresses if topology.num_nodes > 1 else ()
    checks.add(judge_names([each for each in lookups if each is not None], agreed))
    checks.add(judge_interface(checks.ranks))


def _check_plugin(checks: Checks) -> None:
    """Look for NCCL's plug-in on every node. Collective: all ranks."""

    def look_here() -> Plugin | None:
        if checks.topology.local_rank != 0:
            return None
        return find_plugin(os.environ, fast_cards(), is_rocm=torch.version.hip is not None)

    found = checks.gather("plug-in", HOST_FIX, look_here)
    if found is None or not checks.ranks:
        return
    plugins = {
        host: each for host, each in zip(checks.hosts, found, strict=True) if each is not None
    }
    nccl = checks.ranks[0].versions.get("NCCL", "")
    checks.add(judge_plugin(plugins, nccl, checks.topology.num_nodes))


def _carrier(checks: Checks, world: World, transport: Transport | None) -> str:
    """Return what carries reductions, with its version and its way where these are known."""
    told = describe(transport, checks.topology.num_nodes) if transport is not None else ""
    version = checks.ranks[0].versions.get("NCCL") if checks.ranks else None
    known = f"NCCL {version}" if world.backend == "nccl" and version else world.backend or ""
    return told or known


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What a node's resolver says.

    Attributes:
        own: addresses of this node's own host name; empty where it has none.
        rank_zero: those of rank 0's host name.
        seconds: that both took.
    """

    host: str
    own: tuple[str, ...]
    rank_zero: tuple[str, ...]
    seconds: float


def look_up(host: str, rank_zero_host: str) -> Lookup:
    """Look both names up."""
    begin = time.perf_counter()
    own = resolve(host)
    other = own if rank_zero_host == host else resolve(rank_zero_host)
    seconds = time.perf_counter() - begin
    return Lookup(host=host, own=own, rank_zero=other, seconds=seconds)


def resolve(name: str) -> tuple[str, ...]:
    """Return the addresses of a host name, none where it does not resolve."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    return tuple(dict.fromkeys(str(entry[4][0]).split("%", maxsplit=1)[0] for entry in found))


def clock_offset(communicator: Communicator) -> float:
    """Return how far this rank's clock is before rank 0's, s. Collective: all ranks.

    As exact as a barrier, which is some milliseconds.
    """
    offsets: list[float] = []
    for _ in range(_ROUNDS):
        communicator.barrier()
        now = time.time()
        offsets.append(now - communicator.broadcast(now))
    return statistics.median(offsets)


def barrier_wait(communicator: Communicator) -> float:
    """Return how long this rank waits for the others in a barrier, s. Collective: all ranks.

    Those that come last wait least.
    """
    waits = []
    communicator.barrier()
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        communicator.barrier()
        waits.append(time.perf_counter() - begin)
    return statistics.median(waits)


def fixed_computation(device: torch.device) -> float:
    """Return the time of a fixed multiplication of matrices, s: the median of some."""
    width = 4096 if device.type == "cuda" else 512
    matrix = torch.full((width, width), 1 / width, device=device)
    times: list[float] = []
    end = time.perf_counter() + 1.0
    while len(times) < 10 and (len(times) < 3 or time.perf_counter() < end):
        begin = time.perf_counter()
        for _ in range(4):
            matrix = matrix @ matrix
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def judge_names(lookups: Sequence[Lookup], agreed: Sequence[str]) -> Finding:
    """Look for host names that lead nowhere. hpctrain meets without them; much else does not.

    Args:
        lookups: of every node, rank 0's first.
        agreed: addresses of the interface of rank 0's node that all nodes have reached.
    """
    first, several = lookups[0], len(lookups) > 1
    wrong = []
    nameless = [each.host for each in lookups if not each.own]
    if nameless:
        wrong.append(f"the own name of {listed(nameless)} does not resolve")
    loops = [each for each in lookups if several and _loopback(each.own)]
    if loops:
        wrong.append(
            f"{listed([f'{each.host} resolves to {each.own[0]}' for each in loops])} on itself"
        )
    if several:
        lost = [
            f"{each.host}: {listed(each.rank_zero) or 'not at all'}"
            for each in lookups[1:]
            if agreed and not set(each.rank_zero) & set(agreed)
        ]
        if lost:
            wrong.append(
                f"rank 0's name {first.host} leads elsewhere than the agreed {agreed[0]}: "
                f"{listed(lost)}"
            )
    slow = max(lookups, key=lambda each: each.seconds)
    if slow.seconds > _SLOW_LOOKUP_SECONDS:
        wrong.append(f"{slow.host} takes {number(slow.seconds)} s to look names up")
    if wrong:
        return Finding(
            name="host names",
            status="warn",
            fact="; ".join(wrong),
            fix="hpctrain needs no names, but other libraries do: have the site put every node's "
            "address into DNS or /etc/hosts",
        )
    met = f"; all met at {agreed[0]}" if agreed else ""
    return Finding(
        name="host names", status="pass", fact=f"{first.host} is {listed(first.own)}{met}"
    )


def judge_interface(ranks: Ranks) -> Finding:
    """Look whether a much faster network lies idle."""
    nodes: dict[int, RankFacts] = {rank.node_rank: rank for rank in reversed(ranks)}
    if len(ranks) == 1 or not ranks[0].interface:
        return Finding(name="interface", status="skip", fact="nothing to choose here")
    first = ranks[0]
    used = ", ".join(sorted({rank.interface for rank in ranks}))
    where = f"{used} ({', '.join(first.addresses)} on {first.host})"
    if len(nodes) == 1:
        return Finding(name="interface", status="pass", fact=f"{where}: all ranks are on one node")
    for rank in nodes.values():
        chosen = rank.link_speeds.get(rank.interface, 0)
        fastest = max(rank.link_speeds, key=lambda name: rank.link_speeds[name], default="")
        speed = rank.link_speeds.get(fastest, 0)
        if 0 < chosen * _FAST_LINK <= speed:
            return Finding(
                name="interface",
                status="warn",
                fact=f"{rank.host} talks over {rank.interface} ({chosen:,} Mb/s); {fastest} there "
                f"has {speed:,}",
                fix=f'launch.interface = "{fastest}", if all nodes reach each other over it',
            )
    return Finding(name="interface", status="pass", fact=f"{where}: reached from every node")


def judge_sockets(backend: str, ranks: Ranks) -> Finding:
    """Tell the way of a backend that has no log of it: gloo goes over sockets."""
    over = ", ".join(sorted({rank.interface for rank in ranks if rank.interface}))
    fact = f"{backend}, over sockets" + (f" of {over}" if over else "")
    return Finding(name="transport", status="pass", fact=fact)


def judge_transport(transport: Transport, num_nodes: int) -> Finding:
    """Tell the way that NCCL takes, and look whether a faster one lies idle."""
    fact = describe(transport, num_nodes) or "not known: NCCL_DEBUG is set, and its log elsewhere"
    trouble = find_trouble(transport, num_nodes)
    if trouble is not None:
        fact, _, fix = trouble.partition(": ")
        return Finding(name="transport", status="warn", fact=fact, fix=fix)
    return Finding(name="transport", status="pass", fact=fact)


def judge_clocks(offsets: Sequence[float], hosts: Sequence[str]) -> Finding:
    """Look for nodes whose clock is off."""
    worst = max(range(len(offsets)), key=lambda rank: abs(offsets[rank]))
    off = f"{hosts[worst]} is {offsets[worst]:+.3f} s from rank 0's {hosts[0]}"
    values = {"offset_seconds": list(offsets)}
    if abs(offsets[worst]) > _CLOCK_SECONDS:
        return Finding(
            name="clocks",
            status="warn",
            fact=off,
            fix="have the site look at its time service: times in logs do not compare",
            values=values,
        )
    fact = f"within {number(abs(offsets[worst]) * 1000)} ms of each other"
    return Finding(name="clocks", status="pass", fact=fact, values=values)


def judge_arrival(waits: Sequence[float], hosts: Sequence[str]) -> Finding:
    """Look for ranks that come late to a barrier which all enter at the same time."""
    late = [max(waits) - wait for wait in waits]
    last = max(range(len(late)), key=lambda rank: late[rank])
    values = {"late_seconds": late}
    fact = f"rank {last} on {hosts[last]} comes last, by {number(late[last] * 1000)} ms"
    if late[last] > _ARRIVAL_SECONDS:
        return Finding(
            name="barrier",
            status="warn",
            fact=fact,
            fix="look what else runs on that node, and whether ranks share a core there",
            values=values,
        )
    return Finding(name="barrier", status="pass", fact=fact, values=values)


def judge_speed(seconds: Sequence[float], hosts: Sequence[str]) -> Finding:
    """Name the ranks that compute much slower than the others."""
    usual = statistics.median(seconds)
    slow = [
        f"rank {rank} on {hosts[rank]} ({number(each / usual)} x)"
        for rank, each in enumerate(seconds)
        if each > _SLOW_RANK * usual
    ]
    values = {"seconds": list(seconds)}
    if slow:
        return Finding(
            name="speed",
            status="warn",
            fact=f"{plural(len(slow), 'rank')} of {len(seconds)} slower than the usual "
            f"{number(usual * 1000)} ms: {listed(slow)}; every step waits for them",
            fix="look what else runs there and at the clock speed of the device, or leave the "
            "node out (sbatch --exclude)",
            values=values,
        )
    spread = f", {number(max(seconds) * 1000)} ms at most" if len(seconds) > 1 else ""
    fact = f"a fixed multiplication takes {number(usual * 1000)} ms{spread}"
    return Finding(name="speed", status="pass", fact=fact, values=values)


def _loopback(addresses: Sequence[str]) -> bool:
    return bool(addresses) and all(ipaddress.ip_address(each).is_loopback for each in addresses)
