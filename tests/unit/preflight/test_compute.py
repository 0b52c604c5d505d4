"""Steps and memory of the model, judged on tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpctrain.preflight.compute import (
    MEMORY_FIX,
    StepFacts,
    judge_memory,
    judge_pinned_memory,
    judge_step,
    step_fix,
)

MB, GB = 10**6, 10**9


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
