"""The watchdog process: its orders, its connection to the coordinator, and its loop."""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hpctrain.launch.handshake import StrangerError, prove
from hpctrain.launch.watchdog.coordinator import CONNECT_SECONDS, PURPOSE, Coordinator, Obey, say
from hpctrain.launch.watchdog.judge import Judge
from hpctrain.launch.watchdog.monitor import Daemons, LocalRanks
from hpctrain.launch.watchdog.protocol import (
    Bye,
    Channel,
    EndRanks,
    Message,
    notice_silence,
    parse_order,
)
from hpctrain.launch.watchdog.verdicts import Group, NodeLost, story


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a watchdog has to know.

    Attributes:
        leader: lowest rank of its node.
        groups: ranks of every node, by their lowest rank; on other nodes than the coordinator's
            only the own ones and the coordinator's.
        secret: of the job; it comes over stdin, and stands in no name, argument or variable.
        ranks_fd: listening socket for the ranks of this node.
        coordinator_fd: listening socket for the other watchdogs; None where there are none, and
            elsewhere.
        coordinator_address: host and port of the coordinator; None at the coordinator.
        reports_its_loss: reports to the user if the coordinator is gone.
        daemons: the launcher's processes above the ranks of this node: id, start time, name, and
            whether it started the ranks itself.
    """

    leader: int
    groups: dict[int, Group]
    secret: str = field(repr=False)
    ranks_fd: int
    coordinator_fd: int | None
    coordinator_address: tuple[str, int] | None
    reports_its_loss: bool
    daemons: tuple[tuple[int, str, str, bool], ...]
    hang_timeout_seconds: float
    first_step_timeout_seconds: float


def run(orders: Orders) -> None:
    """Watch until all ranks of this node have left or ended."""
    selector = selectors.DefaultSelector()
    coordinator = _coordinator(orders, selector)
    ranks = LocalRanks(
        orders.groups[orders.leader],
        socket.socket(fileno=orders.ranks_fd),
        orders.secret,
        selector,
        coordinator.send,
    )
    coordinator.obey = ranks.obey
    daemons = Daemons(orders.daemons, orders.groups[orders.leader], selector, coordinator.send)
    most = min(1.0, orders.hang_timeout_seconds / 5)
    while not ranks.done:
        wait = min(most, ranks.due_seconds(), coordinator.due_seconds(time.monotonic()))
        # In the order of events, as the kernel saw them: the first to die is the one to name.
        for key, _ in selector.select(wait):
            key.data()
        now = time.monotonic()
        ranks.look(now)
        daemons.look()
        coordinator.look(now)
    coordinator.leave()


def _coordinator(orders: Orders, selector: selectors.BaseSelector) -> Coordinator | CoordinatorLink:
    if orders.coordinator_address is None:
        judge = Judge(
            orders.groups,
            hang_timeout_seconds=orders.hang_timeout_seconds,
            first_step_timeout_seconds=orders.first_step_timeout_seconds,
        )
        listener = (
            None if orders.coordinator_fd is None else socket.socket(fileno=orders.coordinator_fd)
        )
        return Coordinator(
            judge,
            orders.groups,
            leader=orders.leader,
            secret=orders.secret,
            listener=listener,
            selector=selector,
        )
    return CoordinatorLink(
        orders.coordinator_address,
        leader=orders.leader,
        secret=orders.secret,
        group=orders.groups[orders.leader],
        coordinator=orders.groups[0],
        reports_its_loss=orders.reports_its_loss,
        selector=selector,
    )


def parse_orders(content: dict[str, Any]) -> Orders:
    """Return orders from their JSON object, whose keys and tuples have become text and lists."""
    groups = {
        int(leader): Group(host=group["host"], ranks=tuple(group["ranks"]))
        for leader, group in content["groups"].items()
    }
    address = content["coordinator_address"]
    return Orders(
        **{
            **content,
            "groups": groups,
            "coordinator_address": tuple(address) if address else None,
            "daemons": tuple(tuple(daemon) for daemon in content["daemons"]),
        }
    )


def main() -> None:
    """Read the orders from stdin and run."""
    with suppress(OSError):
        # A rank may be pinned to the core that it computes on: that one is not for us.
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    run(parse_orders(json.load(sys.stdin)))


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
            reports_its_loss: this is the one watchdog that reports the coordinator's end.
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
