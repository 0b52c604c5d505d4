"""The watchdog process: what it is told at its start, and its loop."""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hpctrain.launch.watchdog.coordinator import Coordinator
from hpctrain.launch.watchdog.coordinator_link import CoordinatorLink
from hpctrain.launch.watchdog.judge import Judge
from hpctrain.launch.watchdog.monitor import Daemons, LocalRanks
from hpctrain.launch.watchdog.verdicts import Group


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
        reports_its_loss: tells the user if the coordinator is gone.
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
