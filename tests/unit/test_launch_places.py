"""Places, devices, threads and addresses: the arithmetic of a launch."""

from __future__ import annotations

import pytest

from hpctrain.launch.device import device_index, thread_budget
from hpctrain.launch.discovery import Node, place
from hpctrain.launch.rendezvous import Address, candidates

A, B = Node("boot-a", "a"), Node("boot-b", "b")


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        # (local rank, local world size, node rank) of every rank
        ([A], [(0, 1, 0)]),
        ([A, A, B, B], [(0, 2, 0), (1, 2, 0), (0, 2, 1), (1, 2, 1)]),
        ([A, B, A, B], [(0, 2, 0), (0, 2, 1), (1, 2, 0), (1, 2, 1)]),  # --distribution=cyclic
        ([B, A, A], [(0, 1, 0), (0, 2, 1), (1, 2, 1)]),  # nodes by their lowest rank
        ([A, Node("boot-a", "c"), A], [(0, 2, 0), (0, 1, 1), (1, 2, 0)]),  # containers
    ],
)
def test_place(nodes: list[Node], expected: list[tuple[int, int, int]]) -> None:
    topologies = [place(rank, nodes, launcher="x", mpi=None) for rank in range(len(nodes))]
    assert [(t.local_rank, t.local_world_size, t.node_rank) for t in topologies] == expected
    assert [t.host for t in topologies] == [node.host for node in nodes]
    assert {t.num_nodes for t in topologies} == {len(set(nodes))}


@pytest.mark.parametrize(
    ("visible", "local_rank", "local_world_size", "index"),
    [(1, 0, 1, 0), (1, 3, 4, 0), (4, 3, 4, 3), (8, 3, 4, 3), (2, 0, 4, None), (0, 0, 2, None)],
)
def test_device_index(
    visible: int, local_rank: int, local_world_size: int, index: int | None
) -> None:
    assert device_index(visible, local_rank, local_world_size) == index


@pytest.mark.parametrize(
    ("cores", "sharing", "threads"), [(8, 2, 4), (2, 16, 1), (7, 2, 3), (1, 1, 1)]
)
def test_thread_budget(cores: int, sharing: int, threads: int) -> None:
    assert thread_budget(cores, sharing) == threads


ADDRESSES = [
    Address("lo", "127.0.0.1"),
    Address("lo", "::1"),
    Address("docker0", "172.17.0.1"),
    Address("ib0", "fd00::5"),
    Address("ib0", "fe80::1"),
    Address("ib0", "10.1.0.5"),
    Address("eth0", "192.168.7.5"),
]


@pytest.mark.parametrize(
    ("num_nodes", "interface", "ip", "expected"),
    [
        (1, None, None, ["127.0.0.1", "::1"]),
        (2, None, None, ["192.168.7.5", "10.1.0.5", "fd00::5"]),
        (2, "ib0", None, ["10.1.0.5", "fd00::5", "fe80::1"]),
        (2, None, "172.17.0.1", ["172.17.0.1"]),
        (1, "eth0", None, ["192.168.7.5"]),
        (2, "eth1", None, []),
    ],
)
def test_candidates(
    num_nodes: int, interface: str | None, ip: str | None, expected: list[str]
) -> None:
    offered = candidates(ADDRESSES, num_nodes, interface=interface, ip=ip)
    assert [address.ip for address in offered] == expected
