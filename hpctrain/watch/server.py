"""A server for the page of some runs, on loopback or a Unix socket of one's own.

A login node is shared: all its users reach its loopback. So a browser proves by a token, which
works once and becomes a cookie, that it is the user's; a name in the Host header that is not this
machine's own is refused, since it may be another site's that points here; GET is all there is, of
nothing but what grows in the runs that were named. Standard library only.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hpctrain.errors import OutputError, UsageError
from hpctrain.version import __version__
from hpctrain.watch import page
from hpctrain.watch.run_files import RunFiles

IDLE_SECONDS = 30 * 60.0
"""Without a page that asks, a server ends."""

FIRST_PORT, LAST_PORT = 8765, 8864
"""Ports that are tried in turn where none was asked for."""

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_MOST_CONNECTIONS = 64
_WAITING_SECONDS = 20.0
"""For a request, on a connection that was opened."""
_LOOKED_SECONDS = 2.0
"""Facts are not gathered more often, however many pages ask."""
_TYPES = {".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": page.SERVED_POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Door:
    """Who may look: the bearer of a token, once, and of the cookie that it became, for good."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Begin with one token.

        Args:
            say: takes the token of the next browser, whenever one was used.
        """
        self._say = say
        self._lock = threading.Lock()
        self._token = secrets.token_urlsafe(24)
        self._cookies: set[str] = set()

    def announce(self) -> None:
        """Tell the token."""
        self._say(self._token)

    def enter(self, token: str) -> str | None:
        """Return a cookie for a token; None if it is not the present one. It is then used up."""
        with self._lock:
            if not secrets.compare_digest(token.encode(), self._token.encode()):
                return None
            cookie = secrets.token_urlsafe(24)
            self._cookies.add(cookie)
            self._token = secrets.token_urlsafe(24)
        self.announce()
        return cookie

    def knows(self, cookie: str) -> bool:
        """Tell whether a cookie was given out here."""
        known = [secrets.compare_digest(cookie.encode(), each.encode()) for each in self._cookies]
        return any(known)


class Watched:
    """The runs of a server, gathered at most every two seconds."""

    def __init__(self, runs: Sequence[RunFiles], clock: Callable[[], float]) -> None:
        self.runs = runs
        self._clock = clock
        self._lock = threading.Lock()
        self._shown: dict[str, Any] = {}
        self._shown_at = -_LOOKED_SECONDS

    def overview(self) -> dict[str, Any]:
        """Return the facts and the growing files of all runs."""
        with self._lock:
            if self._clock() - self._shown_at >= _LOOKED_SECONDS:
                self._shown = {
                    "runs": [
                        {
                            "name": run.name,
                            "facts": run.facts(),
                            "files": [asdict(each) for each in run.growing()],
                        }
                        for run in self.runs
                    ]
                }
                self._shown_at = self._clock()
            return self._shown


class Server(ThreadingHTTPServer):
    """Answers the page; a thread a connection, of which there is a bound."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 2 * _MOST_CONNECTIONS

    def __init__(
        self,
        address: tuple[str, int] | Path,
        watched: Watched,
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Listen.

        Args:
            address: host and port, or the path of a Unix socket that is not there yet.
            watched: the runs.
            say: takes the token of the next browser.
            clock: seconds, monotonic.

        Raises:
            OSError: if nobody can listen there.
        """
        self.is_local_socket = isinstance(address, Path)
        self.watched = watched
        self.door = Door(say)
        self.clock = clock
        self.asked_at = clock()
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        if isinstance(address, Path):
            self.address_family = socket.AF_UNIX
            before = os.umask(0o177)
            try:
                super().__init__(str(address), _Handler)  # type: ignore[arg-type]
            finally:
                os.umask(before)
        else:
            super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind, without the look-up of a name that http.server makes."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name = "localhost"
        self.server_port = 0 if self.is_local_socket else self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, unless there are too many."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Leave it: a browser that went away is no matter of the terminal."""

    def serve_until_idle(self, idle_seconds: float = IDLE_SECONDS) -> None:
        """Answer until no page has asked for so long."""
        self.timeout = min(5.0, idle_seconds)
        self.door.announce()
        while self.clock() - self.asked_at < idle_seconds:
            self.handle_request()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version = f"hpctrain/{__version__}"
    sys_version = ""
    protocol_version = "HTTP/1.1"
    timeout = _WAITING_SECONDS

    def address_string(self) -> str:
        return "local"

    def log_message(self, *_: Any) -> None:
        """Keep the terminal free: it may be the user's prompt."""

    def do_GET(self) -> None:
        """Answer what a page may ask for, those who may ask."""
        asked = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(asked.query).items()}
        if not self._is_for_us():
            self._refuse(HTTPStatus.FORBIDDEN, "this name is not that of this server")
        elif asked.path == "/" and "token" in query:
            self._enter(query["token"])
        elif not self._is_known():
            self._refuse(
                HTTPStatus.FORBIDDEN,
                "this browser is not known here: open the address that was printed last, once",
            )
        else:
            self.server.asked_at = self.server.clock()
            self._answer(asked.path, query)

    def _answer(self, path: str, query: Mapping[str, str]) -> None:
        name = path.removeprefix("/assets/")
        if path == "/":
            self._send(page.served(), "text/html")
        elif path == "/runs":
            self._send(page.as_json(self.server.watched.overview()), "application/json")
        elif path == "/file":
            self._send_piece(query)
        elif name in (*page.STYLES, *page.SCRIPTS):
            self._send(page.asset(name), _TYPES[Path(name).suffix])
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _is_for_us(self) -> bool:
        host = self.headers.get("Host", "").lower()
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        return name in _LOCAL_NAMES

    @property
    def _cookie_name(self) -> str:
        # A browser gives the cookies of one host to all its ports.
        return f"hpctrain-{self.server.server_port}"

    def _is_known(self) -> bool:
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(self._cookie_name)
        except CookieError:
            return False
        return cookie is not None and self.server.door.knows(cookie.value)

    def _enter(self, token: str) -> None:
        cookie = self.server.door.enter(token)
        if cookie is None and not self._is_known():
            self._refuse(
                HTTPStatus.FORBIDDEN,
                "this address was used already: open the one that was printed last",
            )
            return
        self.server.asked_at = self.server.clock()
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", "/")
        if cookie is not None:
            self.send_header(
                "Set-Cookie", f"{self._cookie_name}={cookie}; Path=/; HttpOnly; SameSite=Strict"
            )
        self._finish(b"", "text/plain")

    def _send_piece(self, query: Mapping[str, str]) -> None:
        runs = self.server.watched.runs
        try:
            run, start = int(query["run"]), int(query["from"])
            if not 0 <= run < len(runs) or not 0 <= start < 2**62:
                raise ValueError(query)
            piece = runs[run].piece(query["name"], start)
        except (KeyError, ValueError):
            self._refuse(HTTPStatus.BAD_REQUEST, "run, name and from are needed")
        except OSError:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such file")
        else:
            self.send_response(HTTPStatus.OK)
            self._finish(piece, "application/octet-stream")

    def _send(self, text: str, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self._finish(text.encode(), f"{kind}; charset=utf-8")

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.send_response(status)
        self._finish(f"hpctrain: {why}\n".encode(), "text/plain; charset=utf-8")

    def _finish(self, content: bytes, kind: str) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def serve(
    runs: Sequence[RunFiles],
    say: Callable[[str], None],
    *,
    port: int | None = None,
    unix_socket: Path | None = None,
    idle_seconds: float = IDLE_SECONDS,
) -> None:
    """Serve the page of some runs until nobody has looked at it for a while.

    Args:
        runs: that it shows.
        say: prints lines: how to get there from another machine, and the address to open.
        port: on loopback; None: the first free one.
        unix_socket: path of a socket to listen at, in place of a port.
        idle_seconds: for which nobody asks.

    Raises:
        OutputError: if nobody can listen there.
        UsageError: if the path of a socket is too long.
    """
    shown_port = port or FIRST_PORT

    def say_address(token: str) -> None:
        say(f"open http://localhost:{shown_port}/?token={token}")

    server = _listening(runs, say_address, port, unix_socket)
    with server:
        host = socket.gethostname()
        if unix_socket is None:
            shown_port = server.server_port
            far = f"localhost:{shown_port}"
        else:
            far = str(unix_socket.resolve())
        say(f"from another machine: ssh -N -L {shown_port}:{far} {host}")
        try:
            server.serve_until_idle(idle_seconds)
        finally:
            if unix_socket is not None:
                unix_socket.unlink(missing_ok=True)
    say(f"nobody has looked for {idle_seconds / 60:.0f} minutes: the server ends")


def _listening(
    runs: Sequence[RunFiles],
    say_address: Callable[[str], None],
    port: int | None,
    unix_socket: Path | None,
) -> Server:
    watched = Watched(runs, time.monotonic)
    if unix_socket is not None:
        if len(os.fsencode(unix_socket)) > 100:
            raise UsageError(f"{unix_socket}: the path of a Unix socket has at most 100 bytes")
        try:
            return Server(unix_socket, watched, say_address)
        except OSError as error:
            raise OutputError(
                f"{unix_socket}: nobody can listen there: {error.strerror}"
            ) from error
    for tried in range(FIRST_PORT, LAST_PORT + 1) if port is None else [port]:
        try:
            return Server(("127.0.0.1", tried), watched, say_address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or tried in (port, LAST_PORT):
                raise OutputError(
                    f"port {tried} of this node cannot be listened at: {error.strerror}; "
                    "choose another by --port, or --unix-socket PATH"
                ) from error
    raise AssertionError("unreachable")
