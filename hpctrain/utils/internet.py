"""Whether a failure is that of a network: compute nodes have no way to the internet.

Libraries that download wrap what failed in errors of their own, or say it in words alone. So an
error is looked at with all that caused it.

Standard library only.
"""

from __future__ import annotations

import errno
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

_NUMBERS = frozenset(
    {
        *(errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN),
        *(errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EADDRNOTAVAIL),
    }
)
# Of requests, urllib3, httpx, aiohttp, botocore and huggingface_hub, none of which is imported.
_CLASSES = frozenset(
    {
        *("ConnectionError", "ConnectTimeout", "ReadTimeout", "ProxyError", "ConnectError"),
        *("MaxRetryError", "NewConnectionError", "NameResolutionError", "ConnectTimeoutError"),
        *("ClientConnectorError", "ClientConnectorDNSError", "EndpointConnectionError"),
        *("LocalEntryNotFoundError", "OfflineModeIsEnabled"),
    }
)
_WORDS = (
    "name or service not known",
    "temporary failure in name resolution",
    "nodename nor servname provided",
    "no address associated with hostname",
    "network is unreachable",
    "no route to host",
    "max retries exceeded",
    "couldn't connect to",
    "could not resolve host",
)
# Source: the manual pages of curl and wget, "EXIT CODES" and "EXIT STATUS".
_CODES_OF_PROGRAMS = {"curl": (5, 6, 7, 28), "wget": (4,), "wget2": (4,)}
_DEPTH = 32


def network_failure(error: BaseException) -> str | None:
    """Return the failure of a network that is behind an error, in words; None if none is."""
    for each in _behind(error):
        if _is_of_network(each):
            first = str(each).strip().partition("\n")[0]
            return f"{type(each).__name__}: {first}" if first else type(each).__name__
    return None


def _behind(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it, the outermost first."""
    seen: list[BaseException] = []
    following: list[BaseException | None] = [error]
    while following and len(seen) < _DEPTH:
        each = following.pop(0)
        if each is None or each in seen:
            continue
        seen.append(each)
        yield each
        reason = getattr(each, "reason", None)  # of URLError, and of urllib3's
        following += [
            *(each.__cause__, each.__context__),
            reason if isinstance(reason, BaseException) else None,
        ]


def _is_of_network(error: BaseException) -> bool:
    if type(error).__name__ == "HTTPError" and getattr(error, "code", None) is not None:
        return False  # a server has answered
    if isinstance(error, socket.gaierror | ConnectionRefusedError):
        return True
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        return True
    # builtins.ConnectionError is raised by itself by huggingface's `datasets`; its subclasses tell
    # of pipes too.
    if type(error).__name__ in _CLASSES:
        return True
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode in _CODES_OF_PROGRAMS.get(_program(error), ())
    words = str(error).lower()
    return any(each in words for each in _WORDS)


def _program(error: subprocess.CalledProcessError) -> str:
    command = error.cmd
    words = command.split() if isinstance(command, str) else [str(word) for word in command]
    return Path(words[0]).name if words else ""
