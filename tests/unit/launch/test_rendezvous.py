"""A rendezvous among strangers: what is said where a flood of them has kept a node away."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.errors import LaunchError
from hpctrain.launch.communicators import SingleCommunicator
from hpctrain.launch.rendezvous import meet
from hpctrain.topology import Topology

TWO_NODES = Topology(
    rank=0,
    world_size=2,
    local_rank=0,
    local_world_size=1,
    node_rank=0,
    num_nodes=2,
    hosts=("n1", "n2"),
    launcher="test",
)


class KeptAway(SingleCommunicator):
    """Rank 0's: the other node says that it got no answer, after strangers have come."""

    world_size = 2

    def __init__(self, strangers: Sequence[bytes]) -> None:
        self._strangers = list(strangers)

    def all_gather(self, value: Any) -> list[Any]:
        if len(value) == 2:  # gaps and refusals
            return [value, (None, "")]
        _, port, _ = value
        for words in self._strangers:
            # Until it is hung up, on what it has said unread or not.
            with (
                socket.create_connection(("127.0.0.1", port), JOB_SECONDS) as connection,
                suppress(ConnectionError),
            ):
                connection.sendall(words)
                while connection.recv(4096):
                    pass
        return [value, (1, port, {})]


def test_a_flood_is_named_where_a_node_is_not_reached() -> None:
    strangers = [b"GET / HTTP/1.0\r\n\r\n", b"\x1b[31m" * 300, b'{"secret": 1}\n']
    with pytest.raises(LaunchError) as caught:
        meet(TWO_NODES, KeptAway(strangers), ip="127.0.0.1")
    message = str(caught.value)
    assert "127.0.0.1 (lo): not reached from n2" in message
    # The last may be counted only after it has been hung up on.
    assert re.search(
        r"Is the port flooded\? [23] connections of strangers refused, the last", message
    )
    assert "\x1b" not in message


def test_nobody_speaks_of_a_flood_where_none_was() -> None:
    with pytest.raises(LaunchError, match="not reached from n2") as caught:
        meet(TWO_NODES, KeptAway([]), ip="127.0.0.1")
    assert "flooded" not in str(caught.value)
