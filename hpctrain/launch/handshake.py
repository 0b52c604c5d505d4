"""Proof of the job's secret, by both ends of a connection, before anything else is said on it.

Sockets that listen are found by every scanner on the network. So whoever connects is a stranger
until it has proved the secret of the job by an HMAC over a challenge, and the listener has answered
with a proof of its own. The secret itself never travels. What is signed names the role, the
purpose, the caller, the address that it dialled and a nonce of either end: a proof that was seen
elsewhere, or is sent back, or is passed on by another host, is worth nothing.

Standard library only: the watchdog uses this too.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import secrets
import selectors
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

PROOF_SECONDS = 5.0
"""Time for a connection to prove the secret."""
LONGEST_PROOF_BYTES = 1024
"""Nothing of ours is longer before the secret is proved."""

_VERSION = "hpctrain-1"
_NONCE_BYTES = 16
_GREETING_BYTES = len(_VERSION) + 1 + 2 * _NONCE_BYTES + 1
_PROOF_BYTES = 2 * 32 + 1
# Strangers may hold so many beyond twice the callers that are expected. Few are taken at a time, so
# that a caller of ours has several turns to answer in before it would be the oldest.
_SPARE_CONNECTIONS = 256
_ACCEPTS_AT_ONCE = 16
_PAUSE_SECONDS = 0.1
_OUT_OF_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class StrangerError(OSError):
    """The other end does not prove the secret of this job.

    Attributes:
        is_final: it has answered, and wrongly; False: it has hung up, or said nothing in time.
    """

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final


def prove(connection: socket.socket, secret: str, *, purpose: str, name: str) -> None:
    """Prove the secret to a listener, and have it prove the same; blocks up to 5 s.

    Args:
        connection: just made, to a `Doorkeeper`.
        secret: of the job.
        purpose: what the listener is for.
        name: who calls.

    Raises:
        StrangerError: if the other end does not know the secret.
        OSError: if the connection ends.
    """
    until = time.monotonic() + PROOF_SECONDS
    greeting = _read_exactly(connection, _GREETING_BYTES, until).split()
    if len(greeting) != 2 or greeting[0] != _VERSION:
        raise StrangerError("another program answers there", is_final=True)
    own = secrets.token_hex(_NONCE_BYTES)
    transcript = (purpose, name, _address(connection.getpeername()), greeting[1], own)
    _set_time_left(connection, until)
    connection.sendall(f"{name} {own} {_sign(secret, 'caller', *transcript)}\n".encode())
    answer = _read_exactly(connection, _PROOF_BYTES, until)
    if answer != f"{_sign(secret, 'listener', *transcript)}\n":
        raise StrangerError("another job answers there", is_final=True)


@dataclass(slots=True)
class _Pending:
    """A connection that has not proved the secret yet."""

    connection: socket.socket
    host: str
    nonce: str
    until: float
    received: bytes = b""


class Doorkeeper:
    """Takes connections on a socket and hands over those that prove the secret.

    Strangers cost a bounded number of descriptors, for 5 s each, and 1 kB of memory: where more
    come, the oldest go, and callers of ours that are among them try again.
    """

    def __init__(
        self,
        listener: socket.socket,
        selector: selectors.BaseSelector,
        *,
        secret: str,
        purpose: str,
        expected: int,
        admit: Callable[[str, socket.socket], None],
    ) -> None:
        """Begin to take connections, whenever the selector's owner calls what it registers.

        Args:
            listener: bound and listening; stays the caller's to close.
            selector: every registered thing has a callable as its data.
            secret: of the job.
            purpose: what the listener is for.
            expected: callers of ours that may come at the same time.
            admit: takes the name and the connection of a caller, from then on its own.
        """
        self._listener = listener
        self._selector = selector
        self._secret = secret
        self._purpose = purpose
        self._most = 2 * expected + _SPARE_CONNECTIONS
        self._admit = admit
        self._pending: OrderedDict[socket.socket, _Pending] = OrderedDict()
        self._paused_until: float | None = None
        self.refusals = Refusals()
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, self._accept)

    def look(self, now: float) -> None:
        """Do what is due by the clock: part with those that are too slow."""
        while self._pending:
            oldest = next(iter(self._pending.values()))
            if now < oldest.until:
                break
            self._refuse(oldest, f"no proof within {PROOF_SECONDS:g} s")
        if self._paused_until is not None and now >= self._paused_until:
            self._paused_until = None
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def due_seconds(self, now: float) -> float:
        """Return how long it may take until `look` is next worth calling."""
        if self._paused_until is not None:
            return _PAUSE_SECONDS
        if not self._pending:
            return PROOF_SECONDS
        return max(0.0, next(iter(self._pending.values())).until - now)

    def close(self) -> None:
        """Take no more connections, and part with those that have proved nothing."""
        if self._paused_until is None:
            self._selector.unregister(self._listener)
        self._paused_until = None
        for pending in list(self._pending.values()):
            self._drop(pending)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                connection, address = self._listener.accept()
            except OSError as error:
                if error.errno in _OUT_OF_ROOM:
                    self._make_room()
                # Else nobody is left to take, or has hung up while waiting.
                return
            if len(self._pending) >= self._most:
                self._refuse_oldest("too many at once")
            self._greet(connection, str(address[0]))

    def _make_room(self) -> None:
        """Give up a connection, or a moment, where this process can open none."""
        if self._pending:
            self._refuse_oldest("too many open files")
        else:
            # The listener stays readable: without a pause this would go round and round.
            self._selector.unregister(self._listener)
            self._paused_until = time.monotonic() + _PAUSE_SECONDS

    def _greet(self, connection: socket.socket, host: str) -> None:
        nonce = secrets.token_hex(_NONCE_BYTES)
        until = time.monotonic() + PROOF_SECONDS
        pending = _Pending(connection, host, nonce, until)
        self._pending[connection] = pending
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(pending))
        with suppress(OSError):  # gone again: reading says so
            connection.send(f"{_VERSION} {nonce}\n".encode())

    def _hear(self, pending: _Pending) -> None:
        if pending.connection not in self._pending:
            return  # parted with since the selector saw it
        try:
            data = pending.connection.recv(LONGEST_PROOF_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        pending.received += data
        line, end, rest = pending.received.partition(b"\n")
        if not data:
            self._refuse(pending, "it hung up")
        elif end and not rest:
            self._judge(pending, line)
        elif end or len(pending.received) >= LONGEST_PROOF_BYTES:
            self._refuse(pending, "what it says is not a proof")

    def _judge(self, pending: _Pending, line: bytes) -> None:
        connection = pending.connection
        try:
            name, nonce, proof = line.decode("ascii").split(" ")
            address = _address(connection.getsockname())
        except (OSError, ValueError):
            self._refuse(pending, "what it says is not a proof")
            return
        transcript = (self._purpose, name, address, pending.nonce, nonce)
        if not hmac.compare_digest(proof, _sign(self._secret, "caller", *transcript)):  # ASCII
            self._refuse(pending, "it does not know the secret of this job")
            return
        del self._pending[connection]
        self._selector.unregister(connection)
        with suppress(OSError):  # gone again: its new owner will see
            connection.send(f"{_sign(self._secret, 'listener', *transcript)}\n".encode())
        self._admit(name, connection)

    def _refuse_oldest(self, why: str) -> None:
        self._refuse(next(iter(self._pending.values())), why)

    def _refuse(self, pending: _Pending, why: str) -> None:
        self._drop(pending)
        self.refusals.add(pending.host, why)

    def _drop(self, pending: _Pending) -> None:
        del self._pending[pending.connection]
        self._selector.unregister(pending.connection)
        pending.connection.close()


class Refusals:
    """Count of the strangers that were refused, and what there is to say of them."""

    def __init__(self) -> None:
        self.count = 0
        self._last = ""

    def add(self, host: str, why: str) -> None:
        """Take note of one."""
        self.count += 1
        self._last = f"the last from {host.removeprefix('::ffff:')}: {why}"

    def __str__(self) -> str:
        """Return what was refused, as part of a sentence; "" where nothing was."""
        if not self.count:
            return ""
        noun = "connection" if self.count == 1 else "connections"
        return f"{self.count:,} {noun} of strangers refused, {self._last}"


def _sign(secret: str, *parts: str) -> str:
    message = "\n".join((_VERSION, *parts)).encode()
    return hmac.new(secret.encode(), message, "sha256").hexdigest()


def _address(name: tuple[str, int]) -> str:
    """Return address and port of one end of a connection, the same as seen from either end."""
    parsed = ipaddress.ip_address(name[0].split("%", maxsplit=1)[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return f"{parsed} {name[1]}"


def _read_exactly(connection: socket.socket, count: int, until: float) -> str:
    received = b""
    while len(received) < count:
        _set_time_left(connection, until)
        data = connection.recv(count - len(received))
        if not data:
            raise StrangerError("the other end has hung up")
        received += data
    return received.decode("ascii", errors="replace")


def _set_time_left(connection: socket.socket, until: float) -> None:
    left = until - time.monotonic()
    if left <= 0:
        raise StrangerError(f"no answer within {PROOF_SECONDS:g} s")
    connection.settimeout(left)
