"""The way from a node's watchdog to the coordinator."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from contextlib import suppress

from hpctrain.launch.handshake import StrangerError, prove
from hpctrain.launch.watchdog.coordinator import CONNECT_SECONDS, PURPOSE, Obey, say
from hpctrain.launch.watchdog.protocol import (
    Bye,
    Channel,
    EndRanks,
    Message,
    notice_silence,
    parse_order,
)
from hpctrain.launch.watchdog.verdicts import Group, NodeLost, story

_ATTEMPT_SECONDS = 10.0
_SHORTEST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0
_FAREWELL_SECONDS = 2.0


class CoordinatorLink:
    """A watchdog's connection to the coordinator, tried until it stands, or the time is over."""

    def __init__(
        self,
        address: tuple[str, int],
        *,
        leader: int,
        secret: str,
        group: Group,
        coordinator: Group,
        reports_its_loss: bool,
        selector: selectors.BaseSelector,
    ) -> None:
        """Begin to connect, in a thread: the ranks of this node are watched meanwhile.

        Args:
            address: of the coordinator.
            leader: lowest rank of this node.
            secret: of the job.
            group: of this node.
            coordinator: the group of the coordinator.
            reports_its_loss: this is the one watchdog that tells of the coordinator's end.
            selector: of the process.
        """
        self.obey: Obey
        self._group = group
        self._coordinator = coordinator
        self._speaks_for_hub = reports_its_loss
        self._selector = selector
        self._channel: Channel | None = None
        self._waiting: list[Message] = []
        self._over = False
        self._dialling = Dialling(
            address, str(leader), secret, purpose=PURPOSE, seconds=CONNECT_SECONDS
        )

    def send(self, message: Message) -> None:
        """Tell the coordinator, once it is reached."""
        if self._channel is None:
            self._waiting.append(message)
        else:
            self._channel.send(message)

    def look(self, _now: float) -> None:
        """Take over the connection once it stands, and send what did not go out at once."""
        if self._channel is not None:
            self._channel.flush()
        elif self._dialling.connection is not None:
            self._connected(self._dialling.connection)
        elif self._dialling.failure is not None and not self._over:
            self._lost(self._dialling.failure)

    def due_seconds(self, _now: float) -> float:
        """Return how long it may take until `look` is next worth calling."""
        return 0.02 if self._channel is None and not self._over else 1.0

    def leave(self) -> None:
        """Take leave of the coordinator."""
        self._dialling.join(_FAREWELL_SECONDS)
        self.look(time.monotonic())
        self.send({"bye": True})
        if self._channel is not None:
            self._channel.close()

    def _connected(self, connection: socket.socket) -> None:
        notice_silence(connection)
        connection.setblocking(False)
        self._channel = Channel(connection)
        self._selector.register(connection, selectors.EVENT_READ, self._hear)
        for message in ({"here": True}, *self._waiting):
            self._channel.send(message)
        self._waiting.clear()

    def _hear(self) -> None:
        assert self._channel is not None
        messages = self._channel.receive()
        try:
            orders = [parse_order(message, self._group) for message in messages or ()]
        except ValueError:
            messages = None
        if messages is None:
            self._selector.unregister(self._channel)
            if not self._over:
                self._lost("")
            return
        for order in orders:
            if isinstance(order, Bye | EndRanks):
                self._over = True
            self.obey(order)

    def _lost(self, why: str) -> None:
        self._over = True
        lost = NodeLost(self._coordinator)
        if self._speaks_for_hub:
            say(story(lost) + (f"Its watchdog at {why}\n" if why else ""))
        self.obey(EndRanks(lost.code))


class Dialling(threading.Thread):
    """Tries to reach a listener, with growing pauses, until it does or the time is over.

    Attributes:
        connection: to the listener, both ends proved; None until then.
        failure: what went wrong in the end.
    """

    def __init__(
        self, address: tuple[str, int], name: str, secret: str, *, purpose: str, seconds: float
    ) -> None:
        super().__init__(name="hpctrain-dialling", daemon=True)
        self.connection: socket.socket | None = None
        self.failure: str | None = None
        self._address = address
        self._who = name
        self._secret = secret
        self._purpose = purpose
        self._seconds = seconds
        self.start()

    def run(self) -> None:
        until = time.monotonic() + self._seconds
        pause = _SHORTEST_PAUSE_SECONDS
        tries = 0
        while True:
            tries += 1
            try:
                self.connection = self._attempt(max(0.1, until - time.monotonic()))
                return
            except OSError as error:
                left = until - time.monotonic()
                if left <= pause or (isinstance(error, StrangerError) and error.is_final):
                    host, port = self._address
                    self.failure = (
                        f"{host} port {port} was not reached in {tries} tries ({error}): is the "
                        "port flooded, or a firewall between the nodes?"
                    )
                    return
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _attempt(self, seconds: float) -> socket.socket:
        connection = socket.create_connection(self._address, min(seconds, _ATTEMPT_SECONDS))
        try:
            prove(connection, self._secret, purpose=self._purpose, name=self._who)
        except BaseException:
            with suppress(OSError):
                connection.close()
            raise
        return connection
