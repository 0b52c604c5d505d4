"""Messages between watchdogs, and between a watchdog and its ranks: JSON, one object a line."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any, NoReturn

Message = dict[str, Any]

LONGEST_BYTES = 1 << 16
"""Of one message, where nothing else is said."""

# A node that has lost power or network acknowledges nothing: with these its connection ends after
# 8 s, where the defaults of TCP would take hours. The kernel answers for a live node, whatever its
# processes are busy with.
_SILENCE_SECONDS = 8
_PROBE_EVERY_SECONDS = 2


class Channel:
    """One end of a connection; sends and receives whole messages, in order."""

    def __init__(self, connection: socket.socket, longest_bytes: int = LONGEST_BYTES) -> None:
        self._connection = connection
        self._longest_bytes = longest_bytes
        self._received = b""
        self._unsent = b""

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._connection.fileno()

    def send(self, message: Message) -> None:
        """Send a message, or as much of it as the connection takes now; `flush` sends the rest.

        A peer that is gone is no error here: `receive` says so.
        """
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Go on sending what the connection has not taken yet."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent = b""

    def receive(self) -> list[Message] | None:
        """Return the messages that have come whole, and None once the peer is gone.

        A peer that says what is no message, or a longer one than it may, counts as gone.
        """
        try:
            data = self._connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if max(map(len, [*lines, self._received])) > self._longest_bytes:
            return None
        try:
            return [parse_message(line) for line in lines]
        except ValueError:
            return None

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def parse_message(line: bytes) -> Message:
    """Return the message that a line holds.

    Raises:
        ValueError: if it holds none.
    """
    try:
        message = json.loads(line, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(message, dict):
        raise ValueError("it is not an object")
    return message


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")


def notice_silence(connection: socket.socket) -> None:
    """Have the kernel end a TCP connection whose other host is silent for 8 s."""
    num_probes = _SILENCE_SECONDS // _PROBE_EVERY_SECONDS - 1
    for level, option, value in (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", _PROBE_EVERY_SECONDS),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", _PROBE_EVERY_SECONDS),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", num_probes),
        # Keep-alive rests while data is on its way; this holds then. In milliseconds.
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 1000 * _SILENCE_SECONDS),
    ):
        with suppress(AttributeError, OSError):
            connection.setsockopt(level, getattr(socket, option), value)
