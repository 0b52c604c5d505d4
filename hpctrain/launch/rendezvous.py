"""Where all ranks meet: an address of rank 0 that every node has reached, not one that looks right.

Host names resolve to 127.0.1.1, to a management network that other nodes cannot reach, or not at
all; so rank 0 offers all of its addresses, one rank of every node tries them, and all agree on the
first that everybody has reached. The socket on which rank 0 answered then becomes the store's: no
port is closed and hoped to be free again.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from hpctrain.errors import LaunchError
from hpctrain.launch.probing import answering, is_loopback, listen, probe
from hpctrain.topology import Communicator, Topology
from hpctrain.utils.text import first_lines, listed, printable_lines

_CONTAINER_BRIDGES = (
    "docker",
    "br-",
    "cni",
    "flannel",
    "podman",
    "virbr",
    "veth",
    "lxcbr",
    "lxdbr",
)
_SHOWN_FLOODS = 4
_ADVICE = (
    "Is a firewall between the nodes? launch.interface or launch.address names the network to use."
)


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """One address of one interface of this node."""

    interface: str
    ip: str


@dataclass(frozen=True, slots=True)
class Meeting:
    """What all ranks agreed on.

    Attributes:
        interface: this node's interface on the way to rank 0.
        listener: rank 0's bound and listening socket; None on the others.
    """

    ip: str
    port: int
    interface: str
    listener: socket.socket | None


@dataclass(frozen=True, slots=True)
class Probe:
    """What one node found.

    Attributes:
        port: where its lowest rank listens.
        sources: this node's own address on the way to each address of rank 0 that it reached.
    """

    host: str
    port: int
    sources: Mapping[str, str]


def local_addresses() -> list[Address]:
    """Return the addresses of all interfaces that are up."""
    stats = psutil.net_if_stats()
    return [
        Address(name, entry.address.split("%")[0])
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6) and stats[name].isup
    ]


def candidates(
    addresses: Sequence[Address],
    num_nodes: int,
    *,
    interface: str | None = None,
    ip: str | None = None,
) -> list[Address]:
    """Return the addresses to offer, the likeliest first.

    On one node that is loopback. Between nodes loopback, link-local addresses and the bridges of
    containers are left out: they exist on every node and lead nowhere else.
    """
    chosen = []
    for address in addresses:
        parsed = ipaddress.ip_address(address.ip)
        wanted = (interface in (None, address.interface)) and (ip in (None, address.ip))
        named = interface is not None or ip is not None
        elsewhere = not (
            parsed.is_loopback
            or parsed.is_link_local
            or address.interface.startswith(_CONTAINER_BRIDGES)
        )
        if wanted and (named or (parsed.is_loopback if num_nodes == 1 else elsewhere)):
            chosen.append(address)
    return sorted(chosen, key=lambda item: (ipaddress.ip_address(item.ip).version, item))


def meet(
    topology: Topology,
    communicator: Communicator,
    *,
    interface: str | None = None,
    ip: str | None = None,
) -> Meeting:
    """Agree on an address of rank 0 that every node reaches. Collective: all ranks.

    Then every node tries the next one, in a ring: a network may let all reach the first node, and
    not each other.

    Args:
        topology: the ranks and their nodes; the lowest rank of a node probes for it.
        communicator: carries offers and results.
        interface: offer only addresses of this interface of rank 0's node.
        ip: offer only this address.

    Raises:
        LaunchError: on every rank, if no address is reached by all nodes, or a node cannot reach
            the next one.
    """
    leads = topology.local_rank == 0
    addresses: list[Address] = []
    only_at = None
    if topology.is_rank_zero:
        addresses = candidates(local_addresses(), topology.num_nodes, interface=interface, ip=ip)
        if addresses and all(is_loopback(each.ip) for each in addresses):
            # Nobody else needs to reach this job.
            addresses = addresses[:1]
            only_at = addresses[0].ip
    listener = listen(topology.world_size, only_at) if leads else None
    port = listener.getsockname()[1] if listener is not None else 0
    addresses, rank_zero_port, secret = communicator.broadcast(
        (addresses, port, secrets.token_hex(32)) if topology.is_rank_zero else None
    )
    if not addresses:
        if listener is not None:
            listener.close()
        asked = [f"launch.interface = {interface!r}"] if interface else []
        asked += [f"launch.address = {ip!r}"] if ip else []
        raise LaunchError(
            f"rank 0's node {topology.hosts[0]} has no usable network address"
            + (f" for {' and '.join(asked)}; `ip address` there lists them." if asked else "."),
            everywhere=True,
        )
    expected = topology.num_nodes * len(addresses) if topology.is_rank_zero else 1
    with answering(listener, secret, expected) as refusals:
        reached = probe([each.ip for each in addresses], rank_zero_port, secret) if leads else None
        answers = communicator.all_gather((topology.node_rank, port, reached))
        probes = [
            Probe(topology.hosts[node], node_port, sources)
            for node, node_port, sources in answers
            if sources is not None
        ]
        agreed = next(
            (address for address in addresses if all(address.ip in it.sources for it in probes)),
            None,
        )
        gap = None
        if agreed is not None and leads and topology.num_nodes > 1:
            gap = _probe_next(topology.node_rank, probes, agreed.ip, secret)
        # Nobody goes on to the store before rank 0 has stopped answering probes on its socket.
        results = communicator.all_gather((gap, str(refusals or "")))
    gaps = [gap for gap, _ in results if gap is not None]
    if listener is not None and (agreed is None or gaps or not topology.is_rank_zero):
        listener.close()
        listener = None
    if agreed is None or gaps:
        lines = _ring(gaps) if gaps else _table(addresses, probes, topology.hosts[0])
        strangers = {text for _, text in results if text}
        lines += [f"Is the port flooded? {text}." for text in sorted(strangers)[:_SHOWN_FLOODS]]
        raise LaunchError(printable_lines("\n".join([*lines, _ADVICE])), everywhere=True)
    # The way back is the way out: the interface that holds the source of the connection.
    source = probes[topology.node_rank].sources[agreed.ip]
    here = {address.ip: address.interface for address in local_addresses()}
    way = agreed.interface if topology.node_rank == 0 else here.get(source, "")
    return Meeting(agreed.ip, rank_zero_port, way, listener)


def _probe_next(
    node_rank: int, probes: Sequence[Probe], agreed_ip: str, secret: str
) -> tuple[str, str, str] | None:
    """Try the next node; return both names and the address if it does not answer."""
    following = (node_rank + 1) % len(probes)
    # Rank 0's own probe may have gone by another of its addresses.
    ip = agreed_ip if following == 0 else probes[following].sources[agreed_ip]
    if probe([ip], probes[following].port, secret):
        return None
    return probes[node_rank].host, probes[following].host, ip


def _ring(gaps: Sequence[tuple[str, str, str]]) -> list[str]:
    """Say which neighbours cannot reach each other."""
    lines = ["every node reaches rank 0's, but not every node reaches the next one:"]
    unreached = [f"{host} does not reach {other} at {ip}" for host, other, ip in gaps]
    return lines + first_lines(unreached, 8, "  ")


def _table(addresses: Sequence[Address], probes: Sequence[Probe], host: str) -> list[str]:
    """Say who could not reach what."""
    lines = [f"no address of rank 0's node {host} is reached by every node:"]
    for address in addresses:
        missing = [probe.host for probe in probes if address.ip not in probe.sources]
        lines.append(f"  {address.ip} ({address.interface}): not reached from {listed(missing, 8)}")
    return lines
