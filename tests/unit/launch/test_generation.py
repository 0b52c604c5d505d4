"""Worlds in one store: restarts, processes of the past, other jobs."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from helpers.limits import JOB_SECONDS
from torch.distributed import HashStore

from hpctrain.errors import LaunchError
from hpctrain.launch.generation import Process, agree, may_restart

Outcome = str | LaunchError


def process(rank: int, world_size: int = 3, *, restarts: bool = True) -> Process:
    return Process(rank=rank, world_size=world_size, place="here:1", may_restart=restarts)


def run(
    store: HashStore, processes: Sequence[Process], seconds: float = JOB_SECONDS
) -> list[Outcome]:
    """Run processes side by side, and return what becomes of each."""
    outcomes: list[Outcome] = [""] * len(processes)

    def one(index: int) -> None:
        try:
            outcomes[index] = agree(store, processes[index], longest_seconds=seconds)
        except LaunchError as error:
            outcomes[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_every_restart_is_a_world_of_its_own() -> None:
    store = HashStore()
    names = []
    for _ in range(3):
        (name,) = set(run(store, [process(rank) for rank in range(3)]))
        names.append(name)
    assert len(set(names)) == 3


@pytest.mark.parametrize("dead", [[0], [1], [2], [1, 2], [0, 1]])
def test_processes_of_the_past_are_no_part_of_it(dead: list[int]) -> None:
    """Some had come, and were killed while they waited for the others."""
    store = HashStore()
    for outcome in run(store, [process(rank) for rank in dead], seconds=0.3):
        assert isinstance(outcome, LaunchError)
    assert len(set(run(store, [process(rank) for rank in range(3)]))) == 1


def test_a_process_that_was_killed_between_two_messages() -> None:
    store = HashStore()
    store.add("hpctrain/generation/hellos", 1)  # announced, and never sent
    assert len(set(run(store, [process(rank) for rank in range(3)]))) == 1


@pytest.mark.parametrize(
    "hello",
    ["", "1", "1 2 3 4", "x y z", "-1 0123456789abcdef 3", "1 ../x 3", "٣ 0123456789abcdef 3"],
)
def test_what_others_write_into_the_store_is_no_hello(hello: str) -> None:
    store = HashStore()
    number = store.add("hpctrain/generation/hellos", 1)
    store.set(f"hpctrain/generation/hellos/{number}", hello)
    assert len(set(run(store, [process(rank) for rank in range(3)]))) == 1


def test_a_restart_with_another_number_of_ranks() -> None:
    store = HashStore()
    run(store, [process(rank, 4) for rank in (1, 2, 3)], seconds=0.3)
    assert len(set(run(store, [process(rank, 2) for rank in range(2)]))) == 1


def test_another_job_in_the_store_is_refused_at_once() -> None:
    store = HashStore()
    run(store, [process(rank, 2, restarts=False) for rank in range(2)])
    for rank in range(2):
        (outcome,) = run(store, [process(rank, 2, restarts=False)])
        assert f"met another world at MASTER_ADDR:MASTER_PORT = here:1: rank {rank}" in str(outcome)


def test_ranks_that_count_differently() -> None:
    outcomes = run(HashStore(), [process(0, 2), process(1, 3)], seconds=1.0)
    assert "1 of 2 ranks have not come" in str(outcomes[0])
    assert "its WORLD_SIZE is 2" in str(outcomes[1])


def test_a_rank_that_is_there_twice() -> None:
    outcomes = run(HashStore(), [process(0), process(1), process(2), process(2)], seconds=20.0)
    errors = [outcome for outcome in outcomes if isinstance(outcome, LaunchError)]
    assert len({outcome for outcome in outcomes if isinstance(outcome, str)}) == 1
    assert len(errors) == 1


def test_who_has_not_come_is_named() -> None:
    outcomes = run(HashStore(), [process(0), process(2)], seconds=1.0)
    assert "1 of 3 ranks have not come to MASTER_ADDR:MASTER_PORT = here:1 in time: 1" in str(
        outcomes[0]
    )
    assert "rank 2 has waited in vain" in str(outcomes[1])
    assert "some other rank has not come" in str(outcomes[1])


def test_only_an_agent_restarts() -> None:
    assert not may_restart({"RANK": "0"})
    assert may_restart({"TORCHELASTIC_RUN_ID": "x"})
    assert not may_restart({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "False"})
