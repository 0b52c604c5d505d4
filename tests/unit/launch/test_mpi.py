"""/dev/shm before MPI_Init, as it was measured with each library."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.errors import LaunchError
from hpctrain.launch import mpi
from hpctrain.launch.environment import Claim
from hpctrain.launch.launchers import LAUNCHERS
from hpctrain.launch.mpi import check_shared_memory, shared_memory_trouble

MB = 2**20


@pytest.mark.parametrize(
    ("family", "ranks", "total", "works"),
    [
        # MPI_Init ran, or ended by a bus error.
        ("mpich", 1, MB // 16, False),
        ("mpich", 1, MB, False),
        ("mpich", 1, 2 * MB, True),
        ("mpich", 2, 2 * MB, False),
        ("mpich", 2, 3 * MB, True),
        ("mpich", 3, 3 * MB, False),
        ("mpich", 3, 4 * MB, True),
        ("mpich", 4, 4 * MB, False),
        ("mpich", 4, 5 * MB, True),
        ("intel", 1, MB // 16, True),
        # UCX takes part from 16 MiB on.
        ("mpich", 1, 14 * MB, True),
        ("mpich", 1, 16 * MB, False),
        ("mpich", 1, 18 * MB, True),
        ("mpich", 4, 14 * MB, True),
        ("mpich", 4, 18 * MB, False),
        ("mpich", 4, 22 * MB, True),
        ("mpich", 8, 14 * MB, True),
        ("mpich", 8, 16 * MB, False),
        ("mpich", 8, 32 * MB, False),
        ("mpich", 8, 40 * MB, False),
        ("mpich", 8, 44 * MB, True),
        ("mpich", 12, 64 * MB, True),
        ("mpich", 16, 64 * MB, False),
        ("intel", 2, 5 * MB, False),
        ("intel", 8, 6 * MB, False),
        ("intel", 12, 7 * MB, False),
        ("intel", 12, 10 * MB, True),
        ("openmpi", 8, MB // 16, True),
    ],
)
def test_sizes_that_were_measured(family: str, ranks: int, total: int, works: bool) -> None:
    told = shared_memory_trouble(family, ranks, total=total, free=total, is_read_only=False)
    assert (told is None) == works


@pytest.mark.parametrize(
    ("family", "works"), [("mpich", False), ("intel", True), ("openmpi", True)]
)
def test_read_only(family: str, works: bool) -> None:
    told = shared_memory_trouble(family, 2, total=64 * MB, free=64 * MB, is_read_only=True)
    assert (told is None) == works


def test_what_dead_jobs_have_left_and_what_faster_ranks_have_taken() -> None:
    full = shared_memory_trouble("mpich", 2, total=64 * MB, free=MB // 2, is_read_only=False)
    assert full == "has 524 kB free of 67.1 MB, where more than 1.05 MB are needed"
    alone = shared_memory_trouble("mpich", 1, total=64 * MB, free=16 * MB, is_read_only=False)
    assert alone == "has 16.8 MB free of 67.1 MB, where more than 17.8 MB are needed"
    assert shared_memory_trouble("mpich", 4, total=5 * MB, free=2 * MB, is_read_only=False) is None


@pytest.mark.parametrize(
    ("world_size", "local_rank", "everywhere", "told"),
    [(2, 1, True, False), (4, 0, False, False), (4, 1, False, True)],
)
def test_one_rank_of_a_node_tells_it(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    world_size: int,
    local_rank: int,
    everywhere: bool,
    told: bool,
) -> None:
    monkeypatch.setattr(mpi, "shared_memory_trouble", lambda *_, **__: "is read-only")
    claim = Claim(
        launcher=next(row for row in LAUNCHERS if row.name == "mpich"),
        rank=local_rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=2,
    )
    with pytest.raises(
        LaunchError, match="is read-only: MPICH 5 would crash in MPI_Init"
    ) as raised:
        check_shared_memory(claim, "mpich", "MPICH 5", tmp_path)
    assert (raised.value.everywhere, raised.value.reported) == (everywhere, told)
    check_shared_memory(claim, "mpich", "MPICH 5", tmp_path / "not there")
