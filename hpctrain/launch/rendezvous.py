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
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from hpctrain.errors import LaunchError
from hpctrain.topology import Communicator, Topology
from hpctrain.utils.text import first_lines, listed

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
_PROBE_SECONDS = 5.0
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
    listener = listen(topology.world_size if topology.is_rank_zero else 8) if leads else None
    port = listener.getsockname()[1] if listener is not None else 0
    offer = None
    if topology.is_rank_zero:
        addresses = candidates(local_addresses(), topology.num_nodes, interface=interface, ip=ip)
        offer = (addresses, port, secrets.token_bytes(16))
    addresses, rank_zero_port, nonce = communicator.broadcast(offer)
    if not addresses:
        asked = [f"launch.interface = {interface!r}"] if interface else []
        asked += [f"launch.address = {ip!r}"] if ip else []
        raise LaunchError(
            f"rank 0's node {topology.hosts[0]} has no usable network address"
            + (f" for {' and '.join(asked)}; `ip address` there lists them." if asked else "."),
            everywhere=True,
        )
    with _answering(listener, nonce):
        reached = _probe(addresses, rank_zero_port, nonce) if leads else None
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
            gap = _probe_next(topology.node_rank, probes, agreed.ip, nonce)
        # Nobody goes on to the store before rank 0 has stopped answering probes on its socket.
        gaps = [found for found in communicator.all_gather(gap) if found is not None]
    if listener is not None and (agreed is None or gaps or not topology.is_rank_zero):
        listener.close()
        listener = None
    if agreed is None or gaps:
        text = _ring(gaps) if gaps else _table(addresses, probes, topology.hosts[0])
        raise LaunchError(text, everywhere=True)
    # The way back is the way out: the interface that holds the source of the connection.
    source = probes[topology.node_rank].sources[agreed.ip]
    here = {address.ip: address.interface for address in local_addresses()}
    way = agreed.interface if topology.node_rank == 0 else here.get(source, "")
    return Meeting(agreed.ip, rank_zero_port, way, listener)


def listen(num_peers: int) -> socket.socket:
    """Return a socket bound to a free port of every address, IPv6 and IPv4 alike."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        return socket.create_server(
            ("", 0),
            family=family,
            backlog=max(128, num_peers),
            dualstack_ipv6=family == socket.AF_INET6,
        )
    except OSError:  # IPv6 is compiled in, but switched off on this host
        return socket.create_server(("", 0), backlog=max(128, num_peers))


@contextmanager
def _answering(listener: socket.socket | None, nonce: bytes) -> Iterator[None]:
    """Answer every probe with the job's nonce while the body runs; on rank 0 only."""
    if listener is None:
        yield
        return
    listener.settimeout(0.05)
    done = threading.Event()

    def answer() -> None:
        while not done.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                try:
                    connection.sendall(nonce)
                except OSError:  # the prober has gone: its own result says so
                    continue

    thread = threading.Thread(target=answer, name="hpctrain-rendezvous", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        listener.settimeout(None)


def _probe(addresses: Sequence[Address], port: int, nonce: bytes) -> dict[str, str]:
    """Try all addresses at once; return the local source address of those that answered."""

    def attempt(address: Address) -> str | None:
        try:
            with socket.create_connection((address.ip, port), _PROBE_SECONDS) as connection:
                answer = b""
                while len(answer) < len(nonce) and (part := connection.recv(64)):
                    answer += part
                source: str = connection.getsockname()[0]
                # Another host may own the same private address, and another job the port.
                return source.split("%", maxsplit=1)[0] if answer == nonce else None
        except OSError:
            return None

    with ThreadPoolExecutor(max_workers=len(addresses)) as pool:
        sources = pool.map(attempt, addresses)
        return {
            address.ip: source
            for address, source in zip(addresses, sources, strict=True)
            if source is not None
        }


def _probe_next(
    node_rank: int, probes: Sequence[Probe], agreed_ip: str, nonce: bytes
) -> tuple[str, str, str] | None:
    """Try the next node; return both names and the address if it does not answer."""
    following = (node_rank + 1) % len(probes)
    # Rank 0's own probe may have gone by another of its addresses.
    ip = agreed_ip if following == 0 else probes[following].sources[agreed_ip]
    if _probe([Address("", ip)], probes[following].port, nonce):
        return None
    return probes[node_rank].host, probes[following].host, ip


def _ring(gaps: Sequence[tuple[str, str, str]]) -> str:
    """Say which neighbours cannot reach each other."""
    lines = ["every node reaches rank 0's, but not every node reaches the next one:"]
    unreached = [f"{host} does not reach {other} at {ip}" for host, other, ip in gaps]
    lines += first_lines(unreached, 8, "  ")
    return "\n".join([*lines, _ADVICE])


def _table(addresses: Sequence[Address], probes: Sequence[Probe], host: str) -> str:
    """Say who could not reach what."""
    lines = [f"no address of rank 0's node {host} is reached by every node:"]
    for address in addresses:
        missing = [probe.host for probe in probes if address.ip not in probe.sources]
        lines.append(f"  {address.ip} ({address.interface}): not reached from {listed(missing, 8)}")
    return "\n".join([*lines, _ADVICE])
