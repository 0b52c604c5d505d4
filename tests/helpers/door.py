"""A socket with its doorkeeper, as a process has it that others call."""

from __future__ import annotations

import selectors
import socket
import threading
import time

from hpctrain.launch.handshake import Doorkeeper, prove
from hpctrain.launch.rendezvous import listen

from .limits import JOB_SECONDS

SECRET = "s" * 64


class Door:
    """A Doorkeeper that runs, and what it has let in."""

    def __init__(self, purpose: str = "test") -> None:
        self.listener = listen(4, "127.0.0.1")
        self.address: tuple[str, int] = self.listener.getsockname()
        self.admitted: list[tuple[str, socket.socket]] = []
        self.changed = threading.Condition()
        self.selector = selectors.DefaultSelector()
        self.keeper = Doorkeeper(
            self.listener,
            self.selector,
            secret=SECRET,
            purpose=purpose,
            expected=2,
            admit=self._admit,
        )
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _admit(self, name: str, connection: socket.socket) -> None:
        with self.changed:
            self.admitted.append((name, connection))
            self.changed.notify_all()

    def _run(self) -> None:
        while not self.over.is_set():
            for key, _ in self.selector.select(0.01):
                key.data()
            with self.changed:
                self.keeper.look(time.monotonic())
                self.changed.notify_all()

    def call(self, secret: str = SECRET, purpose: str = "test", name: str = "7") -> socket.socket:
        connection = socket.create_connection(self.address, JOB_SECONDS)
        try:
            prove(connection, secret, purpose=purpose, name=name)
        except BaseException:
            connection.close()
            raise
        return connection

    def wait_for_refusals(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(
                lambda: self.keeper.refusals.count >= count, timeout=JOB_SECONDS
            )

    def close(self) -> None:
        self.over.set()
        self.thread.join()
        self.keeper.close()
        self.selector.close()
        self.listener.close()
        for _, connection in self.admitted:
            connection.close()
