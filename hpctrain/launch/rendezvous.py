"""Where all ranks meet: an address of rank 0 that every node has reached, not one that looks right.

Host names resolve to 127.0.1.1, to a management network that other nodes cannot reach, or not at
all; so rank 0 offers all of its addresses, one rank of every node tries them, and all agree on the
first that everybody has reached. The socket on which rank 0 answered then becomes the store's: no
port is closed and hoped to be free again.
"""

from __future__ import annotations

import ipaddress
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from hpctrain.errors import LaunchError
from hpctrain.launch.handshake import Doorkeeper, Refusals, StrangerError, prove
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

_PURPOSE = "probe"
_PROBE_SECONDS = 5.0
_PAUSE_SECONDS = 0.05
_BACKLOG = 1024


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


def listen(num_peers: int, ip: str | None = None, port: int = 0) -> socket.socket:
    """Return a socket that listens at one address, or at all, IPv6 and IPv4 alike.

    Args:
        num_peers: that may connect at the same time.
        ip: the address; None: every one of this node.
        port: 0: one that is free.
    """
    backlog = max(_BACKLOG, num_peers)
    if ip is not None:
        is_ipv4 = ipaddress.ip_address(ip).version == 4
        family = socket.AF_INET if is_ipv4 else socket.AF_INET6
        return socket.create_server((ip, port), family=family, backlog=backlog)
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        return socket.create_server(
            ("", port), family=family, backlog=backlog, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError:  # IPv6 is compiled in, but switched off on this host
        return socket.create_server(("", port), backlog=backlog)


def is_loopback(ip: str) -> bool:
    """Return whether an address leads to this host alone."""
    parsed = ipaddress.ip_address(ip.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


@contextmanager
def answering(
    listener: socket.socket | None, secret: str, expected: int
) -> Iterator[Refusals | None]:
    """Answer the probes of this job while the body runs, where there is a listener.

    Gives what there is to say of strangers, whom the port may be full of.

    Args:
        listener: of this rank, given back as it was.
        secret: of the job.
        expected: probes that may come at the same time.
    """
    if listener is None:
        yield None
        return
    over, to_end_it = socket.socketpair()
    with over, to_end_it, selectors.DefaultSelector() as selector:
        door = Doorkeeper(
            listener,
            selector,
            secret=secret,
            purpose=_PURPOSE,
            expected=expected,
            admit=lambda _, connection: connection.close(),  # the proof was all
        )
        is_over = threading.Event()
        selector.register(over, selectors.EVENT_READ, is_over.set)

        def answer() -> None:
            while not is_over.is_set():
                for key, _ in selector.select(door.due_seconds(time.monotonic())):
                    key.data()
                door.look(time.monotonic())

        thread = threading.Thread(target=answer, name="hpctrain-rendezvous", daemon=True)
        thread.start()
        try:
            yield door.refusals
        finally:
            to_end_it.send(b"\n")
            thread.join()
            door.close()
            _hang_up(listener)
            listener.setblocking(True)


def _hang_up(listener: socket.socket) -> None:
    """Part with those who still wait at a socket that is about to be the store's."""
    with suppress(OSError):  # in the end: nobody is there any more
        for _ in range(_BACKLOG):
            listener.accept()[0].close()


def probe(ips: Sequence[str], port: int, secret: str) -> dict[str, str]:
    """Try all addresses at once; return the local source address for each that answered.

    Args:
        ips: addresses of one rank.
        port: where it listens, on all of them.
        secret: of the job, which it proves: another host may own the same private address, and
            another job the port.
    """
    until = time.monotonic() + _PROBE_SECONDS
    with ThreadPoolExecutor(max_workers=len(ips)) as pool:
        sources = pool.map(lambda ip: _try_until(ip, port, secret, until), ips)
        return {ip: source for ip, source in zip(ips, sources, strict=True) if source is not None}


def _try_until(ip: str, port: int, secret: str, until: float) -> str | None:
    """Try an address, and again where this node was dropped among a flood of strangers."""
    while True:
        try:
            return _source_towards(ip, port, secret, max(0.1, until - time.monotonic()))
        except ConnectionRefusedError:
            return None
        except StrangerError as error:
            if error.is_final:
                return None
        except ConnectionError:
            pass
        except OSError:  # no way there
            return None
        if time.monotonic() + _PAUSE_SECONDS >= until:
            return None
        time.sleep(_PAUSE_SECONDS)


def _source_towards(ip: str, port: int, secret: str, seconds: float) -> str:
    """Return this node's own address on the way to a listener that has proved the secret.

    Raises:
        OSError: if it is not reached, or does not prove it.
    """
    with socket.create_connection((ip, port), seconds) as connection:
        prove(connection, secret, purpose=_PURPOSE, name=_PURPOSE)
        source: str = connection.getsockname()[0]
        return source.split("%", maxsplit=1)[0]
