"""Places, devices, threads and addresses: the arithmetic of a launch."""

from __future__ import annotations

import os
import resource
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpctrain.config.schema import LaunchSection
from hpctrain.errors import LaunchError
from hpctrain.launch.device import (
    Cores,
    Owner,
    Place,
    choose_backend,
    choose_device,
    crowding,
    device_index,
    device_kind,
    set_threads,
    take_instance,
    thread_budget,
    throttling,
)
from hpctrain.launch.environment import detect
from hpctrain.launch.mpi import is_walled_off
from hpctrain.launch.nccl_log import prepare_nccl
from hpctrain.launch.placement import Node, place
from hpctrain.launch.process_group import prepare_deterministic
from hpctrain.launch.rendezvous import Address, candidates
from hpctrain.utils.proc import raise_open_files

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
    ("visible", "local_rank", "local_world_size", "own", "shared"),
    [
        (1, 0, 1, 0, 0),
        (1, 3, 4, 0, 0),
        (4, 3, 4, 3, 3),
        (8, 3, 4, 3, 3),
        (2, 3, 4, None, 1),
        (0, 0, 2, None, None),
    ],
)
def test_device_index(
    visible: int, local_rank: int, local_world_size: int, own: int | None, shared: int | None
) -> None:
    assert device_index(visible, local_rank, local_world_size) == own
    assert device_index(visible, local_rank, local_world_size, share=True) == shared


def on_node(local_rank: int, local_world_size: int, **visible: int) -> Place:
    return Place(
        host="a",
        local_rank=local_rank,
        local_world_size=local_world_size,
        visible={"cuda": 0, "xpu": 0} | visible,
    )


@pytest.mark.parametrize(
    ("asked", "places", "kind"),
    [
        ("auto", [on_node(0, 1)], "cpu"),
        ("auto", [on_node(0, 1, cuda=1)], "cuda"),
        ("auto", [on_node(0, 2), on_node(1, 2, xpu=1)], "xpu"),
        ("cuda", [on_node(0, 1)], "cuda"),
    ],
)
def test_device_kind(asked: str, places: list[Place], kind: str) -> None:
    assert device_kind(asked, places) == kind


class Devices:
    """Stands for torch.cuda on a node with some devices."""

    def __init__(self, uuids: list[str | None], name: str = "NVIDIA A100", bus: int = 3) -> None:
        self.uuids = uuids
        self.about = {"name": name, "pci_domain_id": 0, "pci_bus_id": bus, "pci_device_id": 0}
        self.chosen: torch.device | None = None

    def is_available(self) -> bool:
        return bool(self.uuids)

    def device_count(self) -> int:
        return len(self.uuids)

    def set_device(self, device: torch.device) -> None:
        self.chosen = device

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(uuid=self.uuids[device.index], **self.about)


class Others:
    """A communicator whose other ranks see what this one sees, at their own local rank."""

    def __init__(self, ranks: int, instances: bool = False) -> None:
        self.ranks = ranks
        self.instances = instances

    def all_gather(self, value: Any) -> list[Any]:
        if isinstance(value, Place):
            return [replace(value, local_rank=rank) for rank in range(self.ranks)]
        if self.instances and isinstance(value, Owner):
            return [replace(value, uuid=f"MIG-{rank}") for rank in range(self.ranks)]
        return [value] * self.ranks


def choose(
    monkeypatch: pytest.MonkeyPatch,
    devices: Devices,
    ranks: int,
    instances: bool = False,
    **keys: Any,
) -> torch.device:
    monkeypatch.setattr(torch, "cuda", devices)
    topology = place(0, [A] * ranks, launcher="test", mpi=None)
    others: Any = Others(ranks, instances)
    return choose_device(LaunchSection(**keys), topology, others)


def test_a_rank_takes_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices([None, None])
    assert choose(monkeypatch, devices, 2) == torch.device("cuda", 0)
    assert devices.chosen == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("uuids", "ranks", "keys", "words"),
    [
        ([], 2, {"device": "cuda"}, "rank 0 on a has no cuda device of its own: 2 ranks there, 0"),
        (["x", "y"], 4, {}, "4 ranks there, 2 visible devices"),
        (["x"], 2, {}, r"ranks 0 and 1 on a have taken the same cuda device \(x\)"),
        ([], 1, {"device": "mps"}, "nobody has run hpctrain on an Apple GPU yet"),
    ],
)
def test_no_device_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
    uuids: list[str | None],
    ranks: int,
    keys: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(LaunchError, match=words):
        choose(monkeypatch, Devices(uuids), ranks, **keys)


def test_devices_are_shared_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = choose(monkeypatch, Devices(["x"]), 2, share_device=True)
    assert device == torch.device("cuda", 0)
    section = LaunchSection(share_device=True, backend="nccl")
    assert choose_backend(LaunchSection(share_device=True), device) == "gloo"
    with pytest.raises(LaunchError, match="nccl cannot run where ranks share"):
        choose_backend(section, device)


MIG = "NVIDIA A100-SXM4-40GB MIG 1g.5gb"


def test_instances_of_one_gpu_are_named_before_nccl_refuses_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices = Devices(["x"], name=MIG)
    with pytest.raises(LaunchError) as caught:
        choose(monkeypatch, devices, 2, instances=True)
    message = str(caught.value)
    assert "ranks 0 and 1 on a have two MIG instances of the GPU 0000:03:00, MIG-0 and" in message
    assert "launch.share_device = true" in message
    chosen = torch.device("cuda", 0)
    assert choose(monkeypatch, devices, 2, instances=True, backend="gloo") == chosen
    assert choose(monkeypatch, devices, 2, instances=True, share_device=True) == chosen
    whole = Devices(["x"])
    assert choose(monkeypatch, whole, 2, instances=True) == chosen


def test_one_instance_for_two_ranks_says_how_each_gets_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(LaunchError, match="A process sees one MIG instance only: show each rank"):
        choose(monkeypatch, Devices(["MIG-0"], name=MIG), 2)


@pytest.mark.parametrize(
    ("shown", "ranks", "share", "expected"),
    [
        ("MIG-a,MIG-b", 2, False, ["MIG-a", "MIG-b"]),
        ("MIG-GPU-1/3/0, MIG-GPU-1/4/0", 2, False, ["MIG-GPU-1/3/0", "MIG-GPU-1/4/0"]),
        ("MIG-a,MIG-b", 3, False, ["MIG-a,MIG-b"] * 3),  # too few: told as ever
        ("MIG-a,MIG-b", 3, True, ["MIG-a", "MIG-b", "MIG-a"]),
        ("MIG-a", 2, False, ["MIG-a"] * 2),
        ("GPU-a,GPU-b", 2, False, ["GPU-a,GPU-b"] * 2),  # whole ones are all seen
        ("0,1", 2, False, ["0,1"] * 2),
        ("", 2, False, [""] * 2),
    ],
)
def test_each_rank_is_shown_its_own_instance(
    shown: str, ranks: int, share: bool, expected: list[str]
) -> None:
    found = []
    for rank in range(ranks):
        environ = {"CUDA_VISIBLE_DEVICES": shown}
        take_instance(rank, ranks, share=share, environ=environ)
        found.append(environ["CUDA_VISIBLE_DEVICES"])
    assert found == expected


def test_idle_devices_are_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choose(monkeypatch, Devices(["x", "y", "z"]), 1)
    assert [record.getMessage() for record in caplog.records] == [
        "2 cuda devices stay idle on a: start as many ranks per node as there are"
    ]


@pytest.mark.parametrize(
    ("device", "asked", "backend"),
    [
        ("cpu", "auto", "gloo"),
        ("cuda:1", "auto", "nccl"),
        ("xpu:0", "auto", "xccl"),
        ("cuda:0", "gloo", "gloo"),
    ],
)
def test_the_backend_is_that_of_the_device(device: str, asked: Any, backend: str) -> None:
    assert choose_backend(LaunchSection(backend=asked), torch.device(device)) == backend


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([Cores(0, (0, 1), 2)] * 16, None),
        ([Cores(0, (0,), 8)] * 16, "16 ranks, rank 0 among them, are pinned to the same core of 8"),
        ([Cores(0, (0, 1), 8)] * 2, None),
        ([Cores(0, (0,), 8), Cores(0, (1,), 8)], "rank 0 is pinned to 1 core of 8"),
        ([Cores(0, (0,), 2), Cores(0, (1,), 2)], None),
    ],
)
def test_crowding(ranks: list[Cores], words: str | None) -> None:
    problem = crowding(ranks)
    assert (problem is None) if words is None else (problem is not None and words in problem)


def test_pinning_is_told_with_the_fix_of_the_launcher(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # and so nothing is set here
    topology = place(0, [A] * 16, launcher="Open MPI's mpirun", mpi=None)
    set_threads(Others(16), topology)  # type: ignore[arg-type]
    (record,) = caplog.records
    assert "--bind-to none" in record.getMessage()


@pytest.mark.parametrize(
    ("cores", "sharing", "threads"), [(8, 2, 4), (2, 16, 1), (7, 2, 3), (1, 1, 1)]
)
def test_thread_budget(cores: int, sharing: int, threads: int) -> None:
    ranks = [Cores(0, tuple(range(cores)), 8)] * sharing
    elsewhere = [Cores(1, tuple(range(cores)), 8)] * 5
    assert thread_budget(ranks[0], [*ranks, *elsewhere]) == threads


@pytest.mark.parametrize(
    ("quotas", "threads", "words"),
    [
        # The job's group holds both ranks of the node, as under Slurm.
        ([(("job", 6.0),)] * 2, [3, 3], None),
        ([(("job", 1.5),)] * 2, [1, 1], "a quota of 1.5 cores"),
        # A container each.
        ([(("a", 4.0),), (("b", 2.5),)], [4, 2], None),
        ([(("a", 4.0), ("pod", 3.0)), (("b", 2.0), ("pod", 3.0))], [1, 1], None),
        ([(("a", 0.5),), ()], [1, 4], "is there for 1 rank, rank 0"),
    ],
)
def test_quotas_are_shared_by_the_ranks_in_a_group(
    quotas: list[tuple[tuple[str, float], ...]], threads: list[int], words: str | None
) -> None:
    ranks = [Cores(0, tuple(range(8)), 8, own) for own in quotas]
    assert [thread_budget(rank, ranks) for rank in ranks] == threads
    told = throttling(ranks)
    assert (told is None) if words is None else (told is not None and words in told)


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


@pytest.mark.parametrize(
    ("namespace", "above", "walled_off"),
    [
        ("pid:[4026531836]", ["hydra_pmi_proxy", "systemd"], False),
        ("pid:[4026531836]", [], False),  # /proc hides the processes of others
        ("pid:[4026532179]", ["hydra_pmi_proxy", "bash"], False),  # mpirun in the container too
        ("pid:[4026532179]", ["bash"], True),
        (None, [], False),
    ],
)
def test_a_rank_alone_in_its_container(
    namespace: str | None, above: list[str], walled_off: bool, tmp_path: Path
) -> None:
    launcher = detect({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}).launcher
    assert launcher is not None
    if namespace is not None:
        (tmp_path / "self" / "ns").mkdir(parents=True)
        (tmp_path / "self" / "ns" / "pid").symlink_to(namespace)
    assert is_walled_off(launcher, above, tmp_path) == walled_off


def test_the_settings_of_nccl_leave_those_of_the_user() -> None:
    environ = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "8"}
    before = dict(environ)
    prepare_nccl(660.0, has_flight_recorder=True, environ=environ)
    assert environ == before


@pytest.mark.parametrize(
    ("has_flight_recorder", "name"),
    [(True, "TORCH_FR_BUFFER_SIZE"), (False, "TORCH_NCCL_TRACE_BUFFER_SIZE")],
)
def test_the_record_of_collectives_has_one_name(has_flight_recorder: bool, name: str) -> None:
    environ: dict[str, str] = {}
    prepare_nccl(660.0, has_flight_recorder=has_flight_recorder, environ=environ)
    assert environ == {name: "2000", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "660"}


def test_open_files_are_raised_to_the_hard_limit() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] - 1, before[1]))
        raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_what_cublas_is_told_stays_if_the_user_has_said_it(given: str | None) -> None:
    environ = {} if given is None else {"CUBLAS_WORKSPACE_CONFIG": given}
    prepare_deterministic(environ)
    assert environ == {"CUBLAS_WORKSPACE_CONFIG": given or ":4096:8"}
