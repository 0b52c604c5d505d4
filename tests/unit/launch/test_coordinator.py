"""The watchdogs' coordinator over real sockets: who is heard, and what becomes of the others."""

from __future__ import annotations

import functools
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.launch.handshake import prove
from hpctrain.launch.rendezvous import listen
from hpctrain.launch.watchdog import coordinator, protocol
from hpctrain.launch.watchdog.coordinator import PURPOSE, Coordinator
from hpctrain.launch.watchdog.judge import Judge
from hpctrain.launch.watchdog.process import CoordinatorLink
from hpctrain.launch.watchdog.verdicts import Group

SECRET = "s" * 64
GROUPS = {
    0: Group(host="a", ranks=(0, 1)),
    2: Group(host="b", ranks=(2, 3)),
    4: Group(host="c", ranks=(4, 5)),
}


class Lab:
    """A coordinator, and time that passes while something is waited for."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.orders: list[protocol.Order] = []
        self.selector = selectors.DefaultSelector()
        self.listener = listen(2, "127.0.0.1")
        self.address: tuple[str, int] = self.listener.getsockname()
        judge = Judge(GROUPS, hang_timeout_seconds=600, first_step_timeout_seconds=600)
        self.coordinator = Coordinator(
            judge, GROUPS, leader=0, secret=SECRET, listener=self.listener, selector=self.selector
        )
        self.coordinator.obey = self.orders.append
        self.links: list[CoordinatorLink] = []
        self.sockets: list[socket.socket] = []

    def link(self, leader: int) -> tuple[CoordinatorLink, list[protocol.Order]]:
        orders: list[protocol.Order] = []
        link = CoordinatorLink(
            self.address,
            leader=leader,
            secret=SECRET,
            group=GROUPS[leader],
            coordinator=GROUPS[0],
            reports_its_loss=leader == 2,
            selector=self.selector,
        )
        link.obey = orders.append
        self.links.append(link)
        return link, orders

    def proven(self, name: str) -> socket.socket:
        """Return a connection of a program that knows the secret, and speaks by hand."""
        connection = socket.create_connection(self.address, JOB_SECONDS)
        self.sockets.append(connection)
        thread = threading.Thread(
            target=prove, args=(connection, SECRET), kwargs={"purpose": PURPOSE, "name": name}
        )
        thread.start()
        self.until(lambda: not thread.is_alive())
        return connection

    def until(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + JOB_SECONDS
        while not condition():
            assert time.monotonic() < end
            for key, _ in self.selector.select(0.01):
                key.data()
            now = time.monotonic()
            self.coordinator.look(now)
            for link in self.links:
                link.look(now)

    def is_cut_off(self, connection: socket.socket) -> bool:
        connection.setblocking(False)
        try:
            return not connection.recv(1 << 16)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    def close(self) -> None:
        for link in self.links:
            link.leave()
        for connection in self.sockets:
            connection.close()
        self.coordinator.leave()
        for channel in self.coordinator._channels.values():
            channel.close()
        self.selector.close()
        self.listener.close()


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    made = Lab()
    monkeypatch.setattr(coordinator, "say", made.said.append)
    monkeypatch.setattr("hpctrain.launch.watchdog.process.say", made.said.append)
    monkeypatch.setattr("hpctrain.launch.watchdog.judge._ECHO_SECONDS", 0.0)
    monkeypatch.setattr("hpctrain.launch.watchdog.judge._LAUNCHER_SECONDS", 0.0)
    monkeypatch.setattr("hpctrain.launch.watchdog.coordinator._ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(coordinator, "_FAREWELL_SECONDS", 0.0)
    yield made
    made.close()


def test_all_nodes_are_heard_and_then_nobody_else_can_connect(lab: Lab) -> None:
    (two, _), (four, heard) = lab.link(2), lab.link(4)
    two.send({"moved": False})  # kept until the coordinator is reached
    lab.until(lambda: lab.coordinator._door is None)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(lab.address)
    death = {"rank": 3, "oom_kills": 0, "step": 5, "about": {}, "signal": "SIGKILL"}
    two.send({"died": {**death, "signal_number": 9, "host": "forged"}})
    lab.until(lambda: protocol.EndRanks(137) in heard)
    lab.until(lambda: protocol.EndRanks(137) in lab.orders)
    assert lab.said == ["hpctrain: rank 3@b was killed by SIGKILL; the job ends.\n"]
    assert four._channel is not None


def test_strangers_are_told_of_once_and_end_nothing(lab: Lab) -> None:
    for text in (b"GET / HTTP/1.0\r\n\r\n", b'{"end": 0}\n', b"\x1b[2J\n" * 300):
        stranger = socket.create_connection(lab.address, JOB_SECONDS)
        lab.sockets.append(stranger)
        stranger.sendall(text)
        lab.until(functools.partial(lab.is_cut_off, stranger))
    link, orders = lab.link(2)
    lab.until(lambda: 2 not in lab.coordinator._awaited)
    assert orders == []
    assert lab.orders == []
    (said,) = lab.said
    assert said.startswith("hpctrain: watchdog on a: 1 connection of strangers refused, the last")
    assert link._channel is not None


def test_a_node_that_never_comes_among_strangers_is_told_with_them(lab: Lab) -> None:
    stranger = socket.create_connection(lab.address, JOB_SECONDS)
    lab.sockets.append(stranger)
    stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
    lab.until(lambda: lab.said)
    lab.coordinator._connect_until = 0.0
    lab.until(lambda: len(lab.said) == 2)
    assert "is gone" in lab.said[1]
    assert "flooded? 1 connection of strangers refused, the last from 127.0.0.1" in lab.said[1]


SENT_AFTER_THE_PROOF = [
    b"GET / HTTP/1.0\r\n",
    b"[]\n",
    b"{}\n",
    b"\xff\xfe\n",
    b"[" * 100_000 + b"\n",
    b'{"moved": NaN}\n',
    b'{"moved": 1}\n',
    b'{"failing": 1e3, "rank": 2, "may_be_echo": false}\n',
    b'{"failing": %b, "rank": 2, "may_be_echo": false}\n' % (b"9" * 4000),
    b'{"failing": %b, "rank": 2, "may_be_echo": false}\n' % (b"9" * 30),
    b'{"stands": [[]]}\n',
    b'{"stands": {}}\n',
    b'{"shown": 1, "missing": [0]}\n',
    b'{"shown": 3, "missing": []}\n',
    b'{"launcher_gone": {"name": "prted", "pid": -1, "is_front_end": false}}\n',
    b'{"launcher_gone": {"name": 7, "pid": 1, "is_front_end": false}}\n',
    b'{"died": null}\n',
    b'{"died": {"rank": 2, "oom_kills": 0, "step": 1, "about": {"a": [[]]}}}\n',
    b'{"end": 0}\n',
    b"x" * (protocol.longest_report(GROUPS[2]) + 1),  # and no line feed
    # Of others, for whom it does not speak
    b'{"died": {"rank": 0, "oom_kills": 0, "step": 1, "about": {}}}\n',
    b'{"failing": 70, "rank": 4, "may_be_echo": false}\n',
    b'{"leaving": true, "rank": 1}\n',
    b'{"stands": [{"rank": 5, "progress": 1, "step": 1, "state": "S", "stack": ""}]}\n',
    b'{"folder": "/tmp"}\n',
]


@pytest.mark.parametrize("text", SENT_AFTER_THE_PROOF, ids=range(len(SENT_AFTER_THE_PROOF)))
def test_a_node_that_says_what_it_may_not_is_lost_and_nothing_of_it_is_heard(
    lab: Lab, text: bytes
) -> None:
    connection = lab.proven("2")
    connection.sendall(b'{"here": true}\n')
    lab.until(lambda: 2 not in lab.coordinator._awaited)
    connection.sendall(text)
    lab.until(lambda: lab.said)
    assert "node b with ranks 2 to 3 is gone" in lab.said[0]
    assert lab.coordinator._folder is None
    assert lab.orders == [protocol.EndRanks(69)]


@pytest.mark.parametrize("name", ["0", "1", "3", "-2", "x", "9" * 500])
def test_a_name_that_is_no_node_is_not_let_in(lab: Lab, name: str) -> None:
    connection = lab.proven(name)
    lab.until(lambda: lab.is_cut_off(connection))
    assert not lab.coordinator._channels
    assert lab.said == []


def test_a_node_whose_first_connection_was_in_vain_is_taken_at_the_second(lab: Lab) -> None:
    """Its proof was taken, and the answer came too late for it."""
    first = lab.proven("2")
    first.close()
    second = lab.proven("2")
    second.sendall(b'{"here": true}\n')
    lab.until(lambda: 2 not in lab.coordinator._awaited)
    assert lab.said == []
    assert lab.orders == []


def test_a_coordinator_that_is_none_is_not_believed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program has the address, and says how the job is to end."""
    monkeypatch.setattr("hpctrain.launch.watchdog.process.CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        lab.address = server.getsockname()
        link, orders = lab.link(2)
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"hpctrain-1 %b\n" % (b"00" * 16) + b'{"end": 0}\n' * 100)
            lab.until(lambda: orders)
    assert orders == [protocol.EndRanks(69)]
    assert "another job answers there" in lab.said[0]
    assert link._channel is None


@pytest.mark.parametrize(
    "message",
    [
        {"end": 256},
        {"end": "0"},
        {"end": True},
        {"reply": 0, "may_speak": True},  # a rank of another node
        {"reply": 2, "may_speak": 1},
        {"stacks": "relative"},
        {"stacks": "/a\0b"},
        {"stacks": 7},
        {"show_stacks": "relative"},
        {"die": 1},
        {},
    ],
    ids=str,
)
def test_orders_that_are_none(message: dict[str, object]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        protocol.parse_order(message, GROUPS[2])


def test_all_nodes_are_asked_to_show_where_they_are(lab: Lab, tmp_path: Path) -> None:
    """Once one has answered and the other has not, the user is told so."""
    (two, heard), (four, _) = lab.link(2), lab.link(4)
    lab.until(lambda: lab.coordinator._door is None)
    lab.coordinator.send({"folder": str(tmp_path)})
    (tmp_path / "STACKS").touch()
    order = protocol.ShowStacks(tmp_path / "stacks")
    lab.until(lambda: order in heard and order in lab.orders)
    assert not (tmp_path / "STACKS").exists()
    lab.coordinator.send({"shown": 2, "missing": []})
    two.send({"shown": 1, "missing": [3]})
    four.send({"moved": False})  # it is there, but has no stacks to show
    lab.until(lambda: lab.said)
    assert "wrote the stacks of 3 ranks to" in lab.said[0]
    assert "none from rank 3, 4, 5" in lab.said[0]


def test_the_end_of_a_launcher_on_another_node_ends_all(lab: Lab) -> None:
    (two, _), (_, heard) = lab.link(2), lab.link(4)
    gone = {"name": "\x1bprted", "pid": 4, "signal": "SIGKILL", "is_front_end": False}
    two.send({"launcher_gone": gone})
    lab.until(lambda: protocol.EndRanks(69) in heard)
    assert "\\x1bprted (process 4 on b), which had started ranks 2 to 3, was killed" in lab.said[0]


def test_what_ranks_say_is_escaped(lab: Lab, tmp_path: Path) -> None:
    lab.coordinator.send({"folder": str(tmp_path)})
    connection = lab.proven("2")
    stack = "\x1b]0;x\x07\n\u202eevil\n"
    stand = {"progress": 1, "step": 1, "state": "T", "stack": stack}
    lines = [
        {"here": True},
        {"died": {"rank": 2, "oom_kills": 0, "step": 1, "about": {}, "signal": stack}},
        {"stands": [{"rank": 2, **stand}]},
    ]
    connection.sendall("".join(json.dumps(line) + "\n" for line in lines).encode())
    lab.until(lambda: lab.said)
    assert "\x1b" not in lab.said[0]
    assert "\u202e" not in lab.said[0]
    report = (tmp_path / "crash-rank-2.json").read_text(encoding="utf-8")
    assert "\x1b" not in json.loads(report)["traceback"]
