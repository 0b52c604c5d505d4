"""Judges names, interface, all-reduce, and the skew between ranks."""

from __future__ import annotations

import ipaddress
import statistics
from collections.abc import Mapping, Sequence

from hpctrain.launch.nccl_log import Transport, describe, find_trouble
from hpctrain.preflight.finding import Finding
from hpctrain.preflight.probes.network import Lookup
from hpctrain.preflight.probes.process import RankFacts
from hpctrain.preflight.probes.reductions import Reduction
from hpctrain.utils.text import listed, number, plural, size

_SLOW_LOOKUP_SECONDS = 2.0
_LATENCY_SECONDS = {"nccl": 0.002}
_LATENCY_SECONDS_ELSE = 0.02
"""Of 8 bytes: above it, ranks are starved of their cores, or the network is not the fast one."""
_BYTES_PER_SECOND = {"nccl": 1e9}
_BYTES_PER_SECOND_ELSE = 50e6
"""Bus bandwidth of the largest size: below it, less than gigabit Ethernet, or NCCL over TCP."""
_FAST_LINK = 10
"""An idle link so many times faster than the chosen one is worth a word."""
_CLOCK_SECONDS = 1.0
_ARRIVAL_SECONDS = 0.1
_SLOW_RANK = 1.5

Ranks = Sequence[RankFacts]


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


def judge_reductions(
    table: Sequence[Sequence[Reduction]],
    backend: str,
    hosts: Sequence[str] = (),
    carrier: str = "",
) -> Finding:
    """Look for wrong sums, and hold latency and bandwidth against what any working network has.

    Args:
        table: of every rank, the same sizes.
        backend: that carries them.
        hosts: of every rank.
        carrier: the backend with its version, and its way where that is known.
    """
    ranks = len(table)
    rows = []
    for column in zip(*table, strict=True):
        seconds = max(each.seconds for each in column)
        moved = 2 * (ranks - 1) / ranks * column[0].num_bytes
        rows.append((column[0].num_bytes, seconds, moved / seconds, column[0].repeats))
    latency, bandwidth = rows[0][1], rows[-1][2]
    most_latency = _LATENCY_SECONDS.get(backend, _LATENCY_SECONDS_ELSE)
    least_bandwidth = _BYTES_PER_SECOND.get(backend, _BYTES_PER_SECOND_ELSE)
    shown = ", ".join(
        f"{_binary(count)} {number(seconds * 1000)} ms ({size(round(rate))}/s)"
        if count > 8
        else f"{_binary(count)} {number(seconds * 1e6)} us"
        for count, seconds, rate, _ in rows
    )
    values = {
        "backend": backend,
        "sizes": [
            {"bytes": c, "seconds": s, "bus_bytes_per_second": r, "repeats": n}
            for c, s, r, n in rows
        ],
    }
    if any(each.wrong for rank in table for each in rank):
        return _wrong_reductions(table, hosts, carrier or backend, values)
    slow = []
    if latency > most_latency:
        slow.append(f"latency above {number(most_latency * 1000)} ms")
    if bandwidth < least_bandwidth:
        slow.append(f"bandwidth below {size(int(least_bandwidth))}/s")
    if not slow:
        return Finding(name="all-reduce", status="pass", fact=f"{backend}: {shown}", values=values)
    fix = (
        "NCCL_DEBUG=INFO shows the transport; NET/Socket means that its plug-in for the site's "
        "network is missing"
        if backend == "nccl"
        else "give every rank a core of its own, and name the fast network by launch.interface"
    )
    return Finding(
        name="all-reduce",
        status="warn",
        fact=f"{backend}: {shown}; {' and '.join(slow)}",
        fix=fix,
        values=values,
    )


def _wrong_reductions(
    table: Sequence[Sequence[Reduction]],
    hosts: Sequence[str],
    carrier: str,
    values: Mapping[str, object],
) -> Finding:
    """Name the ranks, nodes and sizes of sums that came out wrong."""
    stories, found = [], []
    for column in zip(*table, strict=True):
        wrong = {rank: each.wrong for rank, each in enumerate(column) if each.wrong is not None}
        for rank, each in wrong.items():
            found.append({"bytes": column[0].num_bytes, "rank": rank, "wrong": each.count})
        if wrong:
            rank, first = next(iter(wrong.items()))
            names = listed([str(rank) for rank in wrong], 8)
            nodes = listed(list(dict.fromkeys(hosts[rank] for rank in wrong)), 8) if hosts else "?"
            stories.append(
                f"{_binary(column[0].num_bytes)} on rank {names} ({nodes}): on rank {rank} "
                f"{first.count:,} of {column[0].num_bytes // 4:,} elements, the first at "
                f"{first.index:,}: {first.value:g} in place of {first.expected:g}"
            )
    return Finding(
        name="all-reduce",
        status="fail",
        fact=f"{carrier} gives wrong sums of {'; of '.join(stories)}",
        fix="training would learn from wrong gradients and say nothing. Leave these nodes out and "
        "try again; where others fail too: no GPUDirect (NCCL_NET_GDR_LEVEL=LOC, and gdrcopy off), "
        "or other versions of NCCL, its plug-in and libfabric; give the site this line",
        values={**values, "wrong": found},
    )


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


def _binary(num_bytes: int) -> str:
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes // factor} {unit}"
    return f"{num_bytes} B"
