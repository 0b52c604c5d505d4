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

from hpctrain.launch.watchdog.coordinator import Hub
from hpctrain.launch.watchdog.judge import Judge
from hpctrain.launch.watchdog.monitor import Daemons, LocalRanks
from hpctrain.launch.watchdog.spoke import Spoke
from hpctrain.launch.watchdog.verdicts import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a watchdog has to know.

    Attributes:
        leader: lowest rank of its node.
        groups: ranks of every node, by their lowest rank; on other nodes than the hub's only the
            own ones and the hub's.
        secret: of the job; it comes over stdin, and stands in no name, argument or variable.
        ranks_fd: listening socket for the ranks of this node.
        hub_fd: listening socket for the other watchdogs; None where there are none, and elsewhere.
        hub_address: host and port of the hub; None at the hub.
        speaks_for_hub: tells the user if the hub is gone.
        daemons: the launcher's processes above the ranks of this node: id, start time, name, and
            whether it started the ranks itself.
    """

    leader: int
    groups: dict[int, Group]
    secret: str = field(repr=False)
    ranks_fd: int
    hub_fd: int | None
    hub_address: tuple[str, int] | None
    speaks_for_hub: bool
    daemons: tuple[tuple[int, str, str, bool], ...]
    hang_timeout_seconds: float
    first_step_timeout_seconds: float


def run(orders: Orders) -> None:
    """Watch until all ranks of this node have left or ended."""
    selector = selectors.DefaultSelector()
    hub = _hub(orders, selector)
    ranks = LocalRanks(
        orders.groups[orders.leader],
        socket.socket(fileno=orders.ranks_fd),
        orders.secret,
        selector,
        hub.send,
    )
    hub.obey = ranks.obey
    daemons = Daemons(orders.daemons, orders.groups[orders.leader], selector, hub.send)
    most = min(1.0, orders.hang_timeout_seconds / 5)
    while not ranks.done:
        wait = min(most, ranks.due_seconds(), hub.due_seconds(time.monotonic()))
        # In the order of events, as the kernel saw them: the first to die is the one to name.
        for key, _ in selector.select(wait):
            key.data()
        now = time.monotonic()
        ranks.look(now)
        daemons.look()
        hub.look(now)
    hub.leave()


def _hub(orders: Orders, selector: selectors.BaseSelector) -> Hub | Spoke:
    if orders.hub_address is None:
        judge = Judge(
            orders.groups,
            hang_timeout_seconds=orders.hang_timeout_seconds,
            first_step_timeout_seconds=orders.first_step_timeout_seconds,
        )
        listener = None if orders.hub_fd is None else socket.socket(fileno=orders.hub_fd)
        return Hub(
            judge,
            orders.groups,
            leader=orders.leader,
            secret=orders.secret,
            listener=listener,
            selector=selector,
        )
    return Spoke(
        orders.hub_address,
        leader=orders.leader,
        secret=orders.secret,
        group=orders.groups[orders.leader],
        hub=orders.groups[0],
        speaks_for_hub=orders.speaks_for_hub,
        selector=selector,
    )


def parse_orders(content: dict[str, Any]) -> Orders:
    """Return orders from their JSON object, whose keys and tuples have become text and lists."""
    groups = {
        int(leader): Group(host=group["host"], ranks=tuple(group["ranks"]))
        for leader, group in content["groups"].items()
    }
    address = content["hub_address"]
    return Orders(
        **{
            **content,
            "groups": groups,
            "hub_address": tuple(address) if address else None,
            "daemons": tuple(tuple(daemon) for daemon in content["daemons"]),
        }
    )


def main() -> None:
    """Read the orders from stdin and run."""
    with suppress(OSError):
        # A rank may be pinned to the core that it computes on: that one is not for us.
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    run(parse_orders(json.load(sys.stdin)))
