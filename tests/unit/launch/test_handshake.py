"""Strangers at a socket of ours: nothing that they say is listened to, and they cost little."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.door import SECRET, Door
from helpers.garbage import STRUCTURED, random_strings
from helpers.limits import JOB_SECONDS

from hpctrain.launch import handshake
from hpctrain.launch.handshake import StrangerError, prove
from hpctrain.launch.rendezvous import answering, listen, probe
from hpctrain.launch.watchdog.process import Dialling


@pytest.fixture
def door() -> Iterator[Door]:
    made = Door()
    yield made
    made.close()


def test_both_ends_prove_the_secret(door: Door) -> None:
    with door.call() as connection:
        with door.changed:
            assert door.changed.wait_for(lambda: door.admitted, timeout=JOB_SECONDS)
        ((name, admitted),) = door.admitted
        assert name == "7"
        admitted.send(b"welcome")
        assert connection.recv(100) == b"welcome"
    assert str(door.keeper.refusals) == ""


@pytest.mark.parametrize(("secret", "purpose"), [("t" * 64, "test"), (SECRET, "other"), ("", "")])
def test_who_knows_another_secret_or_comes_for_something_else_is_refused(
    door: Door, secret: str, purpose: str
) -> None:
    with pytest.raises(OSError, match=r"hung up|reset"):
        door.call(secret, purpose)
    door.wait_for_refusals(1)
    assert not door.admitted
    assert "1 connection of strangers refused, the last from 127.0.0.1" in str(door.keeper.refusals)


def test_strangers_with_all_kinds_of_bytes(door: Door) -> None:
    """The short form of `benchmarks/untrusted_input.py`."""
    garbage = [*random_strings(40), *STRUCTURED]
    assert len(STRUCTURED) >= 50
    for text in garbage:
        with socket.create_connection(door.address, JOB_SECONDS) as stranger:
            stranger.settimeout(JOB_SECONDS)
            try:
                stranger.sendall(text)
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(1 << 16):
                    pass
            except OSError:  # it was parted with before it was done
                pass
    door.wait_for_refusals(len(garbage))
    assert not door.admitted
    door.call().close()


def greeted(address: tuple[str, int]) -> tuple[socket.socket, bytes]:
    connection = socket.create_connection(address, JOB_SECONDS)
    greeting = connection.recv(1000)
    assert greeting.startswith(b"hpctrain-1 ")
    return connection, greeting


def overheard(door: Door) -> bytes:
    """Return the proof that a caller sends, as somebody on the way sees it."""
    ours, between = socket.socketpair()
    stack = ExitStack()
    with stack, between, ours:
        upstream, greeting = greeted(door.address)
        stack.enter_context(upstream)
        between.sendall(greeting)

        class Patched(socket.socket):
            def getpeername(self) -> tuple[str, int]:
                return door.address

        ours = Patched(fileno=ours.detach())
        stack.enter_context(ours)
        said: list[bytes] = []

        def listen_in() -> None:
            said.append(between.recv(1000))
            between.close()

        thread = threading.Thread(target=listen_in)
        thread.start()
        with pytest.raises(OSError, match=r"hung up|reset"):
            prove(ours, SECRET, purpose="test", name="7")
        thread.join()
        return said[0]


def test_a_proof_that_was_overheard_is_worth_nothing(door: Door) -> None:
    proof = overheard(door)
    assert proof.count(b" ") == 2
    connection, _ = greeted(door.address)
    with connection:
        connection.sendall(proof)
        assert connection.recv(100) == b""
    assert not door.admitted


def test_the_same_proof_at_the_connection_that_it_was_made_for_counts(door: Door) -> None:
    """The test of the test above: it is the challenge that makes the difference."""
    connection, greeting = greeted(door.address)
    nonce = greeting.split()[1].decode()
    transcript = ("test", "7", f"127.0.0.1 {door.address[1]}", nonce, "n")
    with connection:
        proof = handshake._sign(SECRET, "caller", *transcript)
        connection.sendall(f"7 n {proof}\n".encode())
        assert connection.recv(100).decode() == (
            handshake._sign(SECRET, "listener", *transcript) + "\n"
        )


def test_a_challenge_that_is_sent_back_proves_nothing() -> None:
    """A stranger without the secret has two of ours talk to each other, or one to itself."""
    door, fake = Door(), socket.create_server(("127.0.0.1", 0))
    try:
        failures: list[OSError] = []

        def call() -> None:
            with socket.create_connection(fake.getsockname(), JOB_SECONDS) as connection:
                try:
                    prove(connection, SECRET, purpose="test", name="7")
                except OSError as error:
                    failures.append(error)

        caller = threading.Thread(target=call)
        caller.start()
        between, _ = fake.accept()
        upstream, greeting = greeted(door.address)
        with between, upstream:
            between.sendall(greeting)
            proof = between.recv(1000)
            upstream.sendall(proof)  # made for the stranger's address, and so refused
            assert upstream.recv(100) == b""
            between.sendall(proof.split()[2][:64] + b"\n")  # its own proof, as an answer
        caller.join()
        assert isinstance(failures[0], StrangerError)
        assert failures[0].is_final
        assert not door.admitted
    finally:
        fake.close()
        door.close()


@pytest.mark.parametrize("answer", [b"HTTP/1.0 400 Bad Request\r\n" * 9, b"\xff" * 500, b"", b"x"])
def test_another_program_at_the_address_is_no_listener_of_ours(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with (
            socket.create_connection(server.getsockname(), JOB_SECONDS) as connection,
            pytest.raises(StrangerError),
        ):
            prove(connection, SECRET, purpose="test", name="7")
        thread.join()


def test_who_is_slow_is_parted_with(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte by byte, half open, or silent: all the same."""
    monkeypatch.setattr(handshake, "PROOF_SECONDS", 0.3)
    with ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(door.address)) for _ in range(20)]
        for stranger in strangers[::2]:
            stranger.sendall(b"7")
        door.wait_for_refusals(20)
        assert not door.keeper._pending
    assert "no proof within 0.3 s" in str(door.keeper.refusals)


def test_of_many_at_once_the_oldest_go(door: Door) -> None:
    most = door.keeper._most
    with ExitStack() as stack:
        for _ in range(3 * most):
            stack.enter_context(socket.create_connection(door.address, JOB_SECONDS))
        door.wait_for_refusals(2 * most)
        assert len(door.keeper._pending) <= most
        assert "too many at once" in str(door.keeper.refusals)
        stack.enter_context(door.call())


FLOODED = """
import resource, sys
sys.path[:0] = {path!r}
from helpers.door import Door

door = Door()
print(door.address[1], flush=True)
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
sys.stdin.readline()
with door.changed:
    door.changed.wait_for(lambda: door.admitted, timeout=60)
print(len(door.admitted), door.keeper.refusals, flush=True)
door.close()
"""


def test_a_flood_to_the_limit_of_descriptors_is_survived() -> None:
    paths = [str(Path(__file__).parents[2]), str(Path.cwd())]
    with subprocess.Popen(
        [sys.executable, "-c", FLOODED.format(path=paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        with ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(socket.create_connection(address, JOB_SECONDS))
            dialling = Dialling(address, "7", SECRET, purpose="test", seconds=JOB_SECONDS)
            dialling.join(JOB_SECONDS)
            assert dialling.connection is not None, dialling.failure
            stack.enter_context(dialling.connection)
            said, _ = process.communicate("\n", timeout=JOB_SECONDS)
    assert said.startswith("1 "), said
    assert "too many open files" in said


FULL = """
import os, resource, sys, time
sys.path[:0] = {path!r}
from helpers.door import Door

door = Door()
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
held = []
try:
    while True:
        held.append(os.dup(0))
except OSError:
    print(door.address[1], flush=True)
while door.keeper._paused_until is None:
    time.sleep(0.001)
for descriptor in held:
    os.close(descriptor)
with door.changed:
    door.changed.wait_for(lambda: door.admitted, timeout=60)
print(len(door.admitted), door.keeper.refusals.count, flush=True)
door.close()
"""


def test_a_process_without_a_descriptor_left_takes_callers_once_it_has_some() -> None:
    paths = [str(Path(__file__).parents[2]), str(Path.cwd())]
    with subprocess.Popen(
        [sys.executable, "-c", FULL.format(path=paths)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        dialling = Dialling(address, "7", SECRET, purpose="test", seconds=JOB_SECONDS)
        dialling.join(JOB_SECONDS)
        assert dialling.connection is not None, dialling.failure
        with dialling.connection:
            assert process.stdout.read() == "1 0\n"


@pytest.mark.parametrize("sent", [b"", b"7 "])
def test_connections_that_are_reset(door: Door, sent: bytes) -> None:
    for _ in range(20):
        stranger, _ = greeted(door.address)
        stranger.sendall(sent)
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stranger.close()
    door.wait_for_refusals(20)
    door.call().close()


def test_probes_among_strangers() -> None:
    """A port scanner, and another job's port, while the nodes try addresses."""
    with listen(4) as listener, listen(4) as others:
        port, elsewhere = listener.getsockname()[1], others.getsockname()[1]
        with (
            answering(listener, SECRET, 1) as refusals,
            answering(others, "t" * 64, 1),
            ExitStack() as stack,
        ):
            for text in STRUCTURED[:20]:
                stranger = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                stranger.sendall(text)
            assert probe(["127.0.0.1"], port, SECRET) == {"127.0.0.1": "127.0.0.1"}
        assert refusals is not None
        assert refusals.count
        assert listener.getblocking()
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()  # nobody is left for the store
        assert elsewhere != port
