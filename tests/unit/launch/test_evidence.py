"""What there is to see of ranks: their collectives, stacks, and the launcher's processes above."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.limits import JOB_SECONDS
from helpers.waiting import wait_for
from torch import distributed

from hpctrain.launch.watchdog.client import flight_record
from hpctrain.launch.watchdog.evidence import (
    GroupPosition,
    HeldUp,
    Requests,
    held_up,
    positions,
    python_stacks,
)
from hpctrain.launch.watchdog.monitor import Daemons
from hpctrain.launch.watchdog.start import daemons_above
from hpctrain.launch.watchdog.verdicts import Group, Stall, Stand, main_stack, place_of, story


def at(last: int, pending: int = 0, name: str = "gloo:all_reduce", group: str = "0") -> Any:
    return GroupPosition(group=group, last=last, pending=pending, name=name)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ({}, None),
        ({0: [at(5)], 1: [at(5)]}, None),  # nobody waits
        (
            {0: [at(6, 6)], 1: [at(5)], 2: [at(6, 6)]},
            HeldUp(number=6, waiting={"gloo:all_reduce": [0, 2]}, absent=[1]),
        ),
        # DDP has several on their way: the first of them is it.
        (
            {0: [at(9, 6)], 1: [at(5)]},
            HeldUp(number=6, waiting={"gloo:all_reduce": [0]}, absent=[1]),
        ),
        (
            {0: [at(6, 6)], 1: [at(6, 6, "gloo:barrier")]},
            HeldUp(number=6, waiting={"gloo:all_reduce": [0], "gloo:barrier": [1]}, absent=[]),
        ),
        (
            {0: [at(6, 6)], 1: [at(6, 6)]},
            HeldUp(number=6, waiting={"gloo:all_reduce": [0, 1]}, absent=[]),
        ),
        # Of two groups the one that somebody is missing in.
        (
            {0: [at(6, 6), at(3, 3, group="7")], 1: [at(6, 6)], 2: [at(2, group="7")]},
            HeldUp(number=3, waiting={"gloo:all_reduce": [0]}, absent=[2]),
        ),
    ],
)
def test_what_holds_the_ranks_up(
    ranks: Mapping[int, Sequence[GroupPosition]], expected: HeldUp | None
) -> None:
    assert held_up(ranks) == expected


def nccl_entry(number: int, state: str, *, retired: bool, p2p: bool = False) -> dict[str, Any]:
    """As torch 2.13 writes it for NCCL."""
    return {
        "collective_seq_id": number,
        "input_dtypes": ["BFloat16"],
        "input_sizes": [[1024, 2], [3]],
        "is_p2p": p2p,
        "process_group": ["0", "default_pg"],
        "profiling_name": "nccl:all_reduce",
        "retired": retired,
        "state": state,
    }


def test_the_position_of_a_rank_under_nccl() -> None:
    entries = [
        nccl_entry(8, "scheduled", retired=False),
        nccl_entry(6, "completed", retired=False),  # torch's thread has not been there yet
        nccl_entry(7, "started", retired=False),
        nccl_entry(9, "scheduled", retired=False, p2p=True),
    ]
    (position,) = positions(json.dumps({"entries": entries}).encode())
    assert position == at(8, 7, "nccl:all_reduce of 2,051 BFloat16")


def test_the_record_of_gloo() -> None:
    """The real one: torch's form of it is not documented."""
    assert flight_record() is None
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        distributed.all_reduce(torch.ones(3, 2))
        distributed.barrier()
        distributed.all_reduce(torch.ones(5))
        record = flight_record()
        assert record is not None
        (position,) = positions(record)
        assert (position.pending, position.name) == (0, "gloo:all_reduce of 5 Float")
    finally:
        distributed.destroy_process_group()


STACK = """\
  File "/opt/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 9 in barrier
  File "<frozen importlib._bootstrap>", line 2 in _call
  File "/home/me/my_transforms.py", line 12 in augment
  File "/home/me/train.py", line 3 in main"""


@pytest.mark.parametrize(
    ("stack", "place"),
    [
        (STACK, "augment (my_transforms.py:12)"),
        (STACK.splitlines()[0], "barrier (distributed_c10d.py:9)"),
        ('  File "/v/lib/python3.12/site-packages/hpctrain/x.py", line 1 in read', "read (x.py:1)"),
        ("", ""),
    ],
)
def test_where_a_stack_stands(stack: str, place: str) -> None:
    assert place_of(stack) == place


@pytest.mark.parametrize(
    ("collectives", "words"),
    [
        (
            [at(6, 6), at(5), at(6, 6)],
            [
                "ranks 0, 2 wait in gloo:all_reduce (number 6 of its process group)",
                "; rank 1 has not entered it",
                "rank 1@a is elsewhere than the others, after step 2, in augment (my_transforms.py",
            ],
        ),
        (
            [at(6, 6), at(6, 6, "gloo:barrier"), at(6, 6)],
            [
                "ranks 0, 2 wait in gloo:all_reduce, rank 1 waits in gloo:barrier",
                "different orders",
            ],
        ),
        ([at(6, 6)] * 3, ["ranks 0 to 2 wait in gloo:all_reduce", "the network does not deliver"]),
    ],
)
def test_a_hang_names_the_collective(collectives: Sequence[Any], words: Sequence[str]) -> None:
    stands = tuple(
        Stand(
            rank=rank,
            host="a",
            progress=3,
            step=2,
            state="S",
            stack=STACK if rank == 1 else "",
            collectives=(position,),
        )
        for rank, position in enumerate(collectives)
    )
    text = story(Stall(60, stands), "runs/x/stacks")
    for each in words:
        assert each in text


def test_stacks_of_threads_that_run() -> None:
    ready, over = threading.Event(), threading.Event()

    def somewhere() -> None:
        ready.set()
        over.wait(JOB_SECONDS)

    thread = threading.Thread(target=somewhere, name="beside")
    thread.start()
    try:
        ready.wait(JOB_SECONDS)
        text = python_stacks()
    finally:
        over.set()
        thread.join()
    assert "[beside] (most recent call first)" in text
    assert "in somewhere" in text
    assert "in test_stacks_of_threads_that_run" in main_stack(text)


def test_a_request_is_taken_each_time(tmp_path: Path) -> None:
    asked: list[int] = []
    requests = Requests(tmp_path, lambda: asked.append(1), every_seconds=0.01)
    try:
        for count in (1, 2):
            (tmp_path / "STACKS").touch()
            wait_for(lambda: len(asked) == count)  # noqa: B023
            assert not (tmp_path / "STACKS").exists()
    finally:
        requests.close()


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A shell, an mpirun, a proxy, a wrapper and a rank, which says its process id."""
    program = f"{sys.executable} -c 'import os; print(os.getpid(), flush=True); input()'"
    chain = [("rank.sh", program)]
    for name in ("hydra_pmi_proxy", "mpirun", "shell.sh"):
        chain.append((name, str(tmp_path / chain[-1][0])))
    for name, inner in chain:
        # With something to follow the shell stays, as the parent.
        (tmp_path / name).write_text(f"#!/bin/sh\n{inner}\ntrue\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    with subprocess.Popen(
        tmp_path / "shell.sh", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def test_the_launchers_processes_are_watched_and_shells_are_not(
    tree: subprocess.Popen[str],
) -> None:
    assert tree.stdout is not None
    rank = int(tree.stdout.readline())
    daemons = daemons_above("MPICH's mpirun", rank)
    assert [each[2:] for each in daemons] == [("hydra_pmi_proxy", True), ("mpirun", False)]
    assert daemons_above("RANK and WORLD_SIZE in the environment", rank) == ()
    told: list[dict[str, Any]] = []
    with selectors.DefaultSelector() as selector:
        watch = Daemons(daemons, Group(host="a", ranks=(0, 1)), selector, told.append)
        os.kill(tree.pid, signal.SIGKILL)  # as when a terminal is closed above nohup
        assert selector.select(0) == []
        os.kill(daemons[0][0], signal.SIGKILL)
        for key, _ in selector.select(JOB_SECONDS):
            key.data()
        watch.look()
        # The mpirun above may have followed it by now.
        gone = told[0]["launcher_gone"]
        assert (gone["name"], gone["pid"]) == ("hydra_pmi_proxy", daemons[0][0])
        assert not gone["is_front_end"]
        assert gone["signal"] in ("SIGKILL", None)  # by the kernel's age


def test_a_process_that_was_gone_before_the_watch_began() -> None:
    told: list[dict[str, Any]] = []
    with selectors.DefaultSelector() as selector:
        # Its id is another process's by now: this one's.
        watch = Daemons(
            ((os.getpid(), "1", "prted", True),), Group(host="a", ranks=(0,)), selector, told.append
        )
        watch.look()
    assert [message["launcher_gone"]["name"] for message in told] == ["prted"]
