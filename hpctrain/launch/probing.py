"""Trying addresses: sockets that answer for this job, and who else has answered there."""

from __future__ import annotations

import ipaddress
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from hpctrain.launch.handshake import Doorkeeper, Refusals, StrangerError, prove

_PURPOSE = "probe"
_PROBE_SECONDS = 5.0
_PAUSE_SECONDS = 0.05
_BACKLOG = 1024


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
