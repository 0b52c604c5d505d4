"""The server of the page: for one user, of the runs that were named, and not for ever."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.made_runs import made_run

from hpctrain.errors import OutputError
from hpctrain.watch.run_files import RunFiles
from hpctrain.watch.server import Server, Watched, serve


class Site:
    """A server in a thread, and what it has said."""

    def __init__(self, server: Server, tokens: list[str]) -> None:
        self.server, self.tokens = server, tokens

    def ask(
        self, path: str, method: str = "GET", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        try:
            connection.request(method, path, headers={"Host": "localhost", **headers})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def enter(self) -> str:
        status, headers, _ = self.ask(f"/?token={self.tokens[-1]}")
        assert status == 303
        return headers["Set-Cookie"].partition(";")[0]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "secret.jsonl").write_text("secret")
    with served(made_run(tmp_path / "run")) as site:
        yield site


@contextmanager
def served(*folders: Path) -> Iterator[Site]:
    tokens: list[str] = []
    runs = [RunFiles(folder, lambda _: None) for folder in folders]
    server = Server(("127.0.0.1", 0), Watched(runs, lambda: 0.0), tokens.append)
    server.door.announce()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield Site(server, tokens)
    finally:
        server.shutdown()
        server.server_close()


def test_a_token_lets_one_browser_in(site: Site) -> None:
    token = site.tokens[-1]
    cookie = site.enter()
    assert re.fullmatch(rf"hpctrain-{site.server.server_port}=[\w-]{{32}}", cookie)
    status, headers, text = site.ask("/", Cookie=cookie)
    assert status == 200
    assert b"assets/page.js" in text
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    # The token is used up; there is another one, for another browser.
    assert site.ask(f"/?token={token}")[0] == 403
    assert site.tokens[-1] != token
    assert site.enter() != cookie


def test_what_is_there_for_the_page(site: Site) -> None:
    cookie = site.enter()
    told = json.loads(site.ask("/runs", Cookie=cookie)[2])
    assert told["runs"][0]["name"] == "run"
    assert [file["name"] for file in told["runs"][0]["files"]] == ["metrics.jsonl", "log.txt"]
    whole = site.ask("/file?run=0&name=metrics.jsonl&from=0", Cookie=cookie)[2]
    assert site.ask("/file?run=0&name=metrics.jsonl&from=7", Cookie=cookie)[2] == whole[7:]
    for name, kind in (("page.js", "javascript"), ("page.css", "css"), ("uPlot.iife.min.js", "")):
        status, headers, _ = site.ask(f"/assets/{name}", Cookie=cookie)
        assert status == 200
        assert kind in headers["Content-Type"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/file?run=0&name=../secret.jsonl&from=0", 404),
        ("/file?run=0&name=machine/../../secret.jsonl&from=0", 404),
        ("/file?run=0&name=%2Fetc%2Fpasswd&from=0", 404),
        ("/file?run=0&name=exit.json&from=0", 404),
        ("/file?run=1&name=metrics.jsonl&from=0", 400),
        ("/file?run=-1&name=metrics.jsonl&from=0", 400),
        ("/file?run=0&name=metrics.jsonl&from=-1", 400),
        ("/file?run=0&name=metrics.jsonl&from=99999999999999999999", 400),
        ("/file?run=zero&name=metrics.jsonl&from=0", 400),
        ("/file", 400),
        ("/assets/../server.py", 404),
        ("/assets/page.html", 404),
        ("/etc/passwd", 404),
        ("//evil.example/", 404),
    ],
)
def test_nothing_else_is_there(site: Site, path: str, expected: int) -> None:
    status, _, text = site.ask(path, Cookie=site.enter())
    assert status == expected
    assert b"secret" not in text


def test_strangers_see_nothing(site: Site) -> None:
    cookie = site.enter()
    wrong = f"hpctrain-{site.server.server_port}=" + "x" * 32
    for headers in ({}, {"Cookie": wrong}, {"Cookie": "\x00;=;"}, {"Cookie": "hpctrain=1"}):
        for path in ("/", "/runs", "/assets/page.js", "/?token=", "/?token=%00%ff"):
            status, _, text = site.ask(path, **headers)
            assert status == 403
            assert b"run" not in text.replace(b"hpctrain", b"")
    # Another site's name that points here, as DNS rebinding has it.
    for host in (
        "evil.example",
        "evil.example:80",
        "localhost.evil.example",
        "",
        "127.0.0.1.nip.io",
    ):
        assert site.ask("/runs", Cookie=cookie, Host=host)[0] == 403
    for host in ("localhost:9999", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert site.ask("/runs", Cookie=cookie, Host=host)[0] == 200
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE"):
        assert site.ask("/runs", method, Cookie=cookie)[0] == 501


def test_connections_that_say_nothing_do_not_keep_others_out(site: Site) -> None:
    cookie = site.enter()
    address = ("127.0.0.1", site.server.server_port)
    idle = [socket.create_connection(address) for _ in range(60)]
    try:
        for each in idle[:30]:
            each.sendall(os.urandom(50) + b"\r\n\r\n")
        assert site.ask("/runs", Cookie=cookie)[0] == 200
    finally:
        for each in idle:
            each.close()


def test_a_socket_of_ones_own(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "page.socket"
    run = RunFiles(made_run(tmp_path / "run"), lambda _: None)
    modes: list[int] = []

    def say(line: str) -> None:
        said.append(line)
        if path.exists():
            modes.append(stat.S_IMODE(path.stat().st_mode))

    serve([run], say, unix_socket=path, idle_seconds=0.2)
    assert set(modes) == {0o600}
    assert not path.exists()
    assert said[0].startswith("from another machine: ssh -N -L 8765:")
    assert "token=" in said[1]
    assert said[-1].endswith("the server ends")


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    run = RunFiles(made_run(tmp_path / "run"), lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OutputError, match=f"port {port} of this node.*--port"):
            serve([run], print, port=port)
