"""Messages between watchdogs, and between a watchdog and its ranks: JSON, one object a line."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any

Message = dict[str, Any]

# A node that has lost power or network acknowledges nothing: with these its connection ends after
# 8 s, where the defaults of TCP would take hours. The kernel answers for a live node, whatever its
# processes are busy with.
_SILENCE_SECONDS = 8
_PROBE_EVERY_SECONDS = 2


class Channel:
    """One end of a connection; sends and receives whole messages, in order."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
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
        """Return the messages that have come whole, and None once the peer is gone."""
        try:
            data = self._connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def notice_silence(connection: socket.socket) -> None:
    """Have the kernel end a TCP connection whose other host is silent for 8 s."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    num_probes = _SILENCE_SECONDS // _PROBE_EVERY_SECONDS - 1
    for option, value in (
        ("TCP_KEEPIDLE", _PROBE_EVERY_SECONDS),
        ("TCP_KEEPINTVL", _PROBE_EVERY_SECONDS),
        ("TCP_KEEPCNT", num_probes),
        # Keep-alive rests while data is on its way; this holds then. In milliseconds.
        ("TCP_USER_TIMEOUT", 1000 * _SILENCE_SECONDS),
    ):
        with suppress(AttributeError, OSError):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
