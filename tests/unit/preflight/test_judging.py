"""The preflight's judgements of network, model, data, storage and time, on tables."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.preflight_tables import rank

from hpctrain.data.dataset import Dataset, Field, Layout, Shard
from hpctrain.preflight.compute import (
    MEMORY_FIX,
    StepFacts,
    judge_memory,
    judge_pinned_memory,
    judge_step,
    step_fix,
)
from hpctrain.preflight.data import (
    Reading,
    judge_dataset,
    judge_locking,
    judge_reading,
    judge_visibility,
)
from hpctrain.preflight.network import (
    Lookup,
    judge_arrival,
    judge_clocks,
    judge_interface,
    judge_names,
    judge_speed,
)
from hpctrain.preflight.reductions import Reduction, judge_reductions
from hpctrain.preflight.storage import (
    FolderFacts,
    judge_folder,
    judge_shared,
    judge_space,
    judge_walltime,
)

MB, GB = 10**6, 10**9


def lookup(host: str, own: str | None, rank_zero: str | None, seconds: float = 0.0) -> Lookup:
    return Lookup(
        host=host,
        own=(own,) if own else (),
        rank_zero=(rank_zero,) if rank_zero else (),
        seconds=seconds,
    )


@pytest.mark.parametrize(
    ("lookups", "agreed", "status", "words"),
    [
        ([lookup("a", "127.0.1.1", "127.0.1.1")], (), "pass", "a is 127.0.1.1"),
        ([lookup("a", None, None)], (), "warn", "the own name of a does not resolve"),
        ([lookup("a", "10.0.0.1", "10.0.0.1", seconds=9)], (), "warn", "takes 9.00 s"),
        (
            [lookup("a", "10.0.0.1", "10.0.0.1"), lookup("b", "10.0.0.2", "10.0.0.1")],
            ("10.0.0.1",),
            "pass",
            "all met at 10.0.0.1",
        ),
        (  # Debian's own entry
            [lookup("a", "127.0.1.1", "127.0.1.1"), lookup("b", "10.0.0.2", "10.0.0.1")],
            ("10.0.0.1",),
            "warn",
            "a resolves to 127.0.1.1 on itself",
        ),
        (  # a management network
            [lookup("a", "10.8.0.1", "10.8.0.1"), lookup("b", "10.8.0.2", "10.8.0.1")],
            ("10.0.0.1",),
            "warn",
            "leads elsewhere than the agreed 10.0.0.1: b: 10.8.0.1",
        ),
        (
            [lookup("a", "10.0.0.1", "10.0.0.1"), lookup("b", "10.0.0.2", None)],
            ("10.0.0.1",),
            "warn",
            "b: not at all",
        ),
    ],
)
def test_names(lookups: list[Lookup], agreed: tuple[str, ...], status: str, words: str) -> None:
    finding = judge_names(lookups, agreed)
    assert (finding.status, words in finding.fact) == (status, True), finding


@pytest.mark.parametrize(
    ("num_nodes", "speeds", "status", "words"),
    [
        (1, {"eth0": 1000, "hsn0": 200_000}, "pass", "one node"),
        (2, {"eth0": 1000, "hsn0": 200_000}, "warn", "hsn0 there has 200,000"),
        (2, {"eth0": 25_000, "hsn0": 200_000}, "pass", "reached from every node"),
        (2, {"eth0": 0, "hsn0": 200_000}, "pass", "reached"),  # the driver does not tell
    ],
)
def test_interface(num_nodes: int, speeds: dict[str, int], status: str, words: str) -> None:
    ranks = [
        rank(i, node_rank=i % num_nodes, interface="eth0", link_speeds=speeds) for i in range(2)
    ]
    finding = judge_interface(ranks)
    assert (finding.status, words in finding.fact) == (status, True), finding


@pytest.mark.parametrize(
    ("backend", "latency", "large", "status", "words"),
    [
        ("gloo", 0.0005, 0.2, "pass", "64 MiB"),
        ("gloo", 0.05, 0.2, "warn", "latency above 20.0 ms"),
        ("gloo", 0.0005, 5.0, "warn", "bandwidth below 50.0 MB/s"),
        ("nccl", 0.0001, 0.2, "warn", "bandwidth below 1.00 GB/s"),
        ("nccl", 0.0001, 0.01, "pass", "64 MiB"),
    ],
)
def test_reductions(backend: str, latency: float, large: float, status: str, words: str) -> None:
    def of_a_rank(slower: float) -> list[Reduction]:
        return [
            Reduction(num_bytes=8, seconds=latency * slower, repeats=30),
            Reduction(num_bytes=2**26, seconds=large, repeats=3),
        ]

    finding = judge_reductions([of_a_rank(1), of_a_rank(0.5)], backend)
    assert (finding.status, words in finding.fact) == (status, True), finding
    first, last = finding.values["sizes"]
    assert first["seconds"] == latency  # of the slowest rank
    assert last["bus_bytes_per_second"] == pytest.approx(2**26 / large)  # 2 (W - 1) / W is 1


def test_skew() -> None:
    hosts = ["a", "b", "b"]
    assert judge_clocks([0.0, 0.01, -0.02], hosts).status == "pass"
    late = judge_clocks([0.0, 0.01, -7.5], hosts)
    assert (late.status, late.fact) == ("warn", "b is -7.500 s from rank 0's a")
    assert judge_arrival([0.0, 0.01, 0.02], hosts).status == "pass"
    arrival = judge_arrival([0.5, 0.01, 0.5], hosts)
    assert arrival.status == "warn"
    assert "rank 1 on b comes last, by 490 ms" in arrival.fact
    assert judge_speed([1.0, 1.1, 1.2], hosts).status == "pass"
    slow = judge_speed([1.0, 1.0, 3.0], hosts)
    assert slow.status == "warn"
    assert "rank 2 on b (3.00 x)" in slow.fact


def step_facts(
    *, finite: bool = True, used: int = GB, free: int = 8 * GB, seconds: float = 0.1
) -> StepFacts:
    return StepFacts(
        parameters=1000,
        parameter_bytes=4000,
        checkpoint_bytes=12000,
        samples=32,
        passes=2,
        seconds=seconds,
        finite=finite,
        used_bytes=used,
        free_bytes=free,
        total_bytes=16 * GB,
    )


def test_step() -> None:
    finding = judge_step([step_facts(), step_facts(seconds=0.3)])
    assert finding.status == "pass"
    assert "a step takes 300 ms" in finding.fact
    bad = judge_step([step_facts(), step_facts(finite=False)])
    assert bad.status == "warn"
    assert "not finite (rank 1)" in bad.fact


@pytest.mark.parametrize(
    ("message", "memory"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", True),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", True),
        ("ValueError: the second rank is unwell", False),
    ],
)
def test_the_fix_of_a_failed_step(message: str, memory: bool) -> None:
    assert (step_fix(message) == MEMORY_FIX) == memory


@pytest.mark.parametrize(
    ("device", "nodes", "free", "status", "words"),
    [
        # The ranks of a host share its memory, and look at different moments.
        ("cpu", [0, 0], [8 * GB, 7 * GB], "pass", "2.00 GB by 2 ranks of a; 7.00 GB of"),
        ("cpu", [0, 0], [2 * GB, GB], "warn", "1.00 GB of 16.0 GB are left (6 %)"),
        ("cuda", [0, 0], [8 * GB, GB], "warn", "1.00 GB by rank 1 of b"),
        ("cuda", [0, 1], [8 * GB, 7 * GB], "pass", "by rank 1 of b"),
    ],
)
def test_memory(device: str, nodes: list[int], free: list[int], status: str, words: str) -> None:
    finding = judge_memory([step_facts(free=each) for each in free], ["a", "b"], nodes, device)
    assert (finding.status, words in finding.fact) == (status, True), finding


def test_pinned_memory_of_a_node() -> None:
    steps = [replace(step_facts(), pinned_bytes=each) for each in (3 * GB, GB, GB)]
    fine = judge_pinned_memory(steps, ["a", "a", "b"], [0, 0, 1], 8 * GB)
    assert (fine.status, fine.values["pinned_bytes"]) == ("pass", 4 * GB)
    assert "4.00 GB of the host's memory on a; 8.00 GB are free" in fine.fact
    assert judge_pinned_memory(steps, ["a", "a", "b"], [0, 0, 1], 4 * GB).status == "warn"


def dataset(reason: str) -> Dataset:
    layout = Layout(None if reason else 2048, reason=reason)
    return Dataset(
        source="data",
        fields={"image": Field((8, 8), np.dtype("float32"))},
        shards=(Shard("data/0.h5", 10, 4608, None, {"image": layout}),),
    )


def test_dataset() -> None:
    assert judge_dataset(dataset(""), None).status == "pass"
    assert "10 samples in 1 shard (image float32[8, 8])" in judge_dataset(dataset(""), None).fact
    slow = judge_dataset(dataset("chunked, gzip"), dataset(""))
    assert slow.status == "warn"
    assert "chunked, gzip" in slow.fact
    assert "10 for validation" in slow.fact


def test_visibility() -> None:
    assert judge_visibility({"a": [], "b": []}).status == "pass"
    finding = judge_visibility({"a": [], "b": ["/scratch/0.h5: No such file or directory"]})
    assert finding.status == "fail"
    assert "1 of 2 nodes" in finding.fact
    assert "b: /scratch/0.h5" in finding.fact


@pytest.mark.parametrize(
    ("step_rate", "status"), [(None, "pass"), (100.0, "pass"), (500.0, "warn")]
)
def test_reading(step_rate: float | None, status: str) -> None:
    reading = Reading(samples=100, batches=4, num_bytes=1000, seconds=1.0)
    finding = judge_reading([reading, reading], step_rate)
    assert finding.status == status
    assert finding.values["samples_per_second"] == 200


@pytest.mark.parametrize(
    ("failure", "off", "status"),
    [
        (None, False, "pass"),
        ("Function not implemented", False, "warn"),
        ("Function not implemented", True, "pass"),
    ],
)
def test_locking(failure: str | None, off: bool, status: str) -> None:
    assert judge_locking(failure, "lustre", off).status == status


def folder(filesystem: str = "lustre", seconds: float = 1.0) -> FolderFacts:
    return FolderFacts(
        place="/scratch/runs",
        filesystem=filesystem,
        written_bytes=64 * MB,
        write_seconds=seconds,
        rename_seconds=0.001,
        free_bytes=GB,
    )


@pytest.mark.parametrize(
    ("facts", "checkpoint_bytes", "status", "words"),
    [
        (folder(), None, "pass", "64.0 MB/s"),
        (folder(), 640 * MB, "pass", "about 10.0 s"),
        (folder(), MB, "pass", "less than a second"),
        (folder(), 100 * GB, "warn", "(0:26:02)"),
        (folder("tmpfs"), MB, "warn", "may not outlive the job"),
    ],
)
def test_folder(facts: FolderFacts, checkpoint_bytes: int | None, status: str, words: str) -> None:
    finding = judge_folder(facts, checkpoint_bytes)
    assert (finding.status, words in finding.fact) == (status, True), finding


@pytest.mark.parametrize(
    ("seen", "status"),
    [({"a": True}, "skip"), ({"a": True, "b": True}, "pass"), ({"a": True, "b": False}, "warn")],
)
def test_shared(seen: dict[str, bool], status: str) -> None:
    assert judge_shared(seen, "/tmp/runs").status == status


@pytest.mark.parametrize(
    ("checkpoint_bytes", "status"),
    [(None, "skip"), (100 * MB, "pass"), (250 * MB, "pass"), (260 * MB, "warn"), (2 * GB, "fail")],
)
def test_space(checkpoint_bytes: int | None, status: str) -> None:
    assert judge_space(GB, checkpoint_bytes, kept=3).status == status


@pytest.mark.parametrize(
    ("seconds", "problem", "needed", "status", "words"),
    [
        (math.inf, None, None, "pass", "no limit is known"),
        (math.inf, "qstat is not installed here", 100.0, "warn", "not installed"),
        (7200, None, 100.0, "pass", "2:00:00 left; all steps take about 0:01:40"),
        (7200, None, 8000.0, "pass", "has to be submitted again"),
        (100, None, None, "warn", "0:01:40 left"),
        (-1, None, None, "fail", "0:00:00 left"),
    ],
)
def test_walltime(
    seconds: float, problem: str | None, needed: float | None, status: str, words: str
) -> None:
    finding = judge_walltime(seconds, problem, needed)
    assert (finding.status, words in finding.fact) == (status, True), finding
