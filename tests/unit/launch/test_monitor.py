"""A watchdog's local socket: its ranks come in, and other users and other programs do not."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from helpers.garbage import STRUCTURED, random_strings
from helpers.limits import FOREVER_SECONDS, JOB_SECONDS
from helpers.waiting import wait_for

from hpctrain.launch.watchdog.client import Pulse, WatchdogClient, join, proof_of_rank
from hpctrain.launch.watchdog.monitor import LocalRanks
from hpctrain.launch.watchdog.processes import is_ending
from hpctrain.launch.watchdog.protocol import Channel
from hpctrain.launch.watchdog.verdicts import Group

SECRET = "s" * 64
NOBODY = 65534

AS_NOBODY = f"import os, socket, sys\nos.setgroups([])\nos.setuid({NOBODY})\n"
CALLER = (
    AS_NOBODY
    + """
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect("\\0" + sys.argv[1])
    try:
        connection.sendall(sys.argv[2].encode() + b"\\n")
        print("cut off" if connection.recv(100) == b"" else "let in", flush=True)
    except OSError:
        print("cut off", flush=True)
"""
)
PLANTED = (
    AS_NOBODY
    + """
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind("\\0" + sys.argv[1])
    listener.listen()
    print("listening", flush=True)
    connection, _ = listener.accept()
    print(connection.recv(1000), flush=True)
"""
)


class Watchdog:
    """The part of a watchdog that its ranks see, for one rank."""

    def __init__(self) -> None:
        self.name = f"hpctrain-test-{secrets.token_hex(8)}"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind("\0" + self.name)
        self.listener.listen(128)
        self.members: list[WatchdogClient] = []
        self.sent: list[dict[str, Any]] = []
        self.selector = selectors.DefaultSelector()
        group = Group(host="here", ranks=(3,))
        self.ranks = LocalRanks(group, self.listener, SECRET, self.selector, self.sent.append)

    def join(self) -> WatchdogClient:
        client = join("\0" + self.name, SECRET, 3, 0, Pulse())
        self.members.append(client)
        self.until(lambda: self.is_complete)
        return client

    def close(self) -> None:
        self.selector.close()
        self.listener.close()
        for rank in self.ranks._ranks.values():
            if rank.channel is not None:
                rank.channel.close()
            for descriptor in filter(None, (rank.pidfd, max(0, rank.stacks))):
                os.close(descriptor)
        os.close(self.ranks._memory_fd)
        for client in self.members:
            for thread in threading.enumerate():
                if thread.name == "hpctrain-watchdog":
                    thread.join(JOB_SECONDS)
            client._connection.close()

    def until(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + JOB_SECONDS
        while not condition():
            assert time.monotonic() < end
            for key, _ in self.selector.select(0.01):
                key.data()

    @property
    def is_complete(self) -> bool:
        return self.ranks._ranks[3].channel is not None


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    made = Watchdog()
    yield made
    made.close()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


def test_a_rank_comes_in_and_then_nobody_else(watchdog: Watchdog) -> None:
    client = watchdog.join()
    client.send_about({"device": "cpu"})
    client.leaving()
    watchdog.until(lambda: watchdog.sent)
    assert watchdog.sent == [{"leaving": True, "rank": 3}]
    assert watchdog.ranks._ranks[3].about == {"device": "cpu"}
    with (
        socket.socket(socket.AF_UNIX) as late,
        pytest.raises(ConnectionRefusedError),
    ):
        late.connect("\0" + watchdog.name)
    client.leave()
    watchdog.until(lambda: watchdog.ranks.done)


@pytest.mark.parametrize(("fault", "told"), [("SIGSEGV", "SIGSEGV"), ("SIGKILL", "SIGKILL")])
def test_a_rank_that_a_launcher_has_killed_is_not_the_one_that_failed(
    fault: str, told: str
) -> None:
    """Both are gone before the watchdog looks, and it may see first what came last."""
    sent: list[dict[str, Any]] = []
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind("\0" + f"hpctrain-test-{secrets.token_hex(8)}")
        group = Group(host="here", ranks=(0, 1))
        local = LocalRanks(group, listener, SECRET, selector, sent.append)
        sleepers = [subprocess.Popen(["sleep", str(FOREVER_SECONDS)]) for _ in range(2)]
        with ExitStack() as stack:
            stack.callback(os.close, local._memory_fd)
            for rank, process in zip(local._ranks.values(), sleepers, strict=True):
                pipe = socket.socketpair()
                stack.enter_context(pipe[0])
                stack.enter_context(pipe[1])
                rank.channel, rank.pid = Channel(pipe[0]), process.pid
                rank.pidfd = os.pidfd_open(process.pid)
                stack.callback(os.close, rank.pidfd)
                selector.register(rank.pidfd, selectors.EVENT_READ)
            sleepers[0].send_signal(signal.Signals[fault])
            wait_for(lambda: is_ending(sleepers[0].pid), "end of the first")
            sleepers[1].kill()
            wait_for(lambda: is_ending(sleepers[1].pid), "end of the second")
            local._ended(local._ranks[1])
            local._ended(local._ranks[0])
            for process in sleepers:
                process.wait()
    deaths = [message["died"] for message in sent]
    assert [death["rank"] for death in deaths] == ([0, 1] if fault != "SIGKILL" else [1, 0])
    assert {death["rank"]: death["signal"] for death in deaths} == {0: told, 1: "SIGKILL"}


@needs_root
def test_another_user_is_cut_off_even_with_the_right_proof(watchdog: Watchdog) -> None:
    hello = json.dumps({"hello": 3, "proof": proof_of_rank(SECRET, 3)})
    command = [sys.executable, "-I", "-S", "-c", CALLER, watchdog.name, hello]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stranger:
        watchdog.until(lambda: stranger.poll() is not None)
        assert stranger.stdout is not None
        assert stranger.stdout.read() == "cut off\n"
    assert not watchdog.is_complete


@needs_root
def test_a_socket_that_another_user_has_planted_is_told_nothing() -> None:
    name = f"hpctrain-test-{secrets.token_hex(8)}"
    command = [sys.executable, "-I", "-S", "-c", PLANTED, name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "listening\n"
        with pytest.raises(OSError, match="another user's process has taken its address"):
            join("\0" + name, SECRET, 3, 0, Pulse())
        assert stranger.stdout.read() == "b''\n"


HELLOS = [
    {"hello": 3},
    {"hello": 3, "proof": ""},
    {"hello": 3, "proof": proof_of_rank("another secret", 3)},
    {"hello": 3, "proof": proof_of_rank(SECRET, 4)},
    {"hello": 4, "proof": proof_of_rank(SECRET, 4)},
    {"hello": True, "proof": proof_of_rank(SECRET, 1)},
    {"hello": 3, "proof": proof_of_rank(SECRET, 3)},  # and no descriptor comes with it
]


def test_other_programs_of_the_same_user_are_sent_away(watchdog: Watchdog) -> None:
    texts = [json.dumps(hello).encode() + b"\n" for hello in HELLOS]
    texts += [*random_strings(50), *STRUCTURED]
    outcomes = []

    def call_all() -> None:
        for text in texts:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(JOB_SECONDS)
                try:
                    connection.connect("\0" + watchdog.name)
                    connection.sendall(text)
                    outcomes.append(connection.recv(100))
                except OSError:
                    outcomes.append(b"")

    caller = threading.Thread(target=call_all)
    caller.start()
    watchdog.until(lambda: not caller.is_alive())
    assert outcomes == [b""] * len(texts)
    assert not watchdog.is_complete
    assert watchdog.sent == []


def test_a_rank_says_nothing_for_others(watchdog: Watchdog) -> None:
    client = watchdog.join()
    messages: list[dict[str, Any]] = [
        {"died": {"rank": 0}},
        {"stands": []},
        {"moved": True},
        {"failing": "70", "may_be_echo": False},
        {"folder": "/tmp"},
        {"about": {"a": [[[]]]}},
        {"bye?": True},
    ]
    for message in messages:
        client._channel.send(message)
    client._channel.send({"failing": 70, "may_be_echo": False, "rank": 0})
    watchdog.until(lambda: watchdog.sent)
    assert watchdog.sent == [{"failing": 70, "may_be_echo": False, "rank": 3}]
    client.leave()
    watchdog.until(lambda: watchdog.ranks.done)
