"""What a script asks for, compared with the processes that there are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.errors import ExitCode, LaunchError
from hpctrain.launch.environment import Claim
from hpctrain.launch.launchers import LAUNCHERS
from hpctrain.lightning import launching
from hpctrain.lightning.launching import compare, start_ranks
from hpctrain.topology import Topology

ALONE = Claim(launcher=None, rank=None, world_size=None)
LAUNCHED = Claim(launcher=LAUNCHERS[0], rank=0, world_size=2)


def world(ranks: int, nodes: int = 1) -> Topology:
    return Topology(
        rank=0,
        world_size=ranks,
        local_rank=0,
        local_world_size=ranks // nodes,
        node_rank=0,
        num_nodes=nodes,
        hosts=tuple(f"n{node}" for node in range(nodes)),
        launcher="mpirun",
        mpi=None,
    )


@pytest.mark.parametrize(
    ("ranks", "nodes", "devices", "num_nodes"),
    [(2, 1, None, None), (2, 1, 2, 1), (4, 2, 2, 2), (4, 2, None, 2), (1, 1, 1, 1)],
)
def test_what_fits(ranks: int, nodes: int, devices: int | None, num_nodes: int | None) -> None:
    compare(world(ranks, nodes), devices, num_nodes)


@pytest.mark.parametrize(
    ("ranks", "nodes", "devices", "num_nodes", "told"),
    [
        (2, 1, 4, 1, r"the launcher started 2 ranks; devices=4 asks for 4: start 4"),
        (2, 1, 1, 1, r"devices=1 asks for 1: start 1"),
        (4, 2, 4, 2, r"4 ranks on 2 nodes; devices=4 asks for 8"),
        (4, 2, 2, 1, r"num_nodes=1 asks for 1: .* or set num_nodes=2"),
        (2, 1, None, 2, r"2 ranks on 1 node; num_nodes=2"),
    ],
)
def test_what_does_not_fit(
    ranks: int, nodes: int, devices: int | None, num_nodes: int | None, told: str
) -> None:
    with pytest.raises(LaunchError, match=told) as caught:
        compare(world(ranks, nodes), devices, num_nodes)
    assert caught.value.everywhere


def test_ranks_of_a_launcher_start_nothing() -> None:
    assert start_ranks(LAUNCHED, 2, 2, "auto") is None


@pytest.mark.parametrize(
    ("devices", "num_nodes", "device", "gpus", "told"),
    [
        (None, 2, "auto", 0, r"num_nodes=2: no launcher .* srun --nodes=2 --ntasks=2 python"),
        (4, 2, "auto", 4, r"--nodes=2 --ntasks=8"),
        (4, 1, "cuda", 2, r"devices=4: this node shows 2 GPUs"),
        (4, 1, "auto", 2, r'accelerator="cpu"'),
        (2, 1, "cuda", 0, r"shows 0 GPUs"),
        (2, 1, "cpu", 0, r"is not a script .* hpctrain.launch\(function, np=2\)"),  # this is pytest
    ],
)
def test_numbers_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch,
    devices: int | None,
    num_nodes: int,
    device: str,
    gpus: int,
    told: str,
) -> None:
    monkeypatch.setattr(launching, "_visible_gpus", lambda: gpus)
    with pytest.raises(LaunchError, match=told):
        start_ranks(ALONE, devices, num_nodes, device)


def test_idle_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_visible_gpus", lambda: 8)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    told = start_ranks(ALONE, None, None, "auto")
    assert told == "1 of 8 GPUs in use; start all: python -m hpctrain run train.py --devices 8"
    assert start_ranks(ALONE, 1, 1, "auto") is None
    assert start_ranks(ALONE, None, None, "cpu") is None
    monkeypatch.setattr(launching, "_visible_gpus", lambda: 1)
    assert start_ranks(ALONE, None, None, "auto") is None


SCRIPT = """
import os
import sys

import hpctrain.training.job

sys.modules["hpctrain.launch.start_ranks"] = type(sys)("start_ranks")

def start(num_processes, command):
    print(num_processes, *command[1:])
    raise SystemExit

sys.modules["hpctrain.launch.start_ranks"].start = start
from hpctrain.lightning import Trainer

# Its modules are known by what they can do; only tests and benchmarks have it.
assert not {"lightning", "pytorch_lightning"} & set(sys.modules)
mistaken = os.fork()  # spares a script that imports torch anew
if mistaken == 0:
    Trainer(max_epoch=3)
print(os.waitstatus_to_exitcode(os.waitpid(mistaken, 0)[1]), flush=True)
Trainer(devices=3, accelerator="cpu")
"""


def test_a_script_begins_again_as_it_was_started(tmp_path: Path) -> None:
    """With the interpreter's options and its own; only mpirun itself is another's here.

    A wrong argument is one message. Nothing imports Lightning itself.
    """
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "train.py", "--lr", "1"]
    found = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    expected = f"{ExitCode.CONFIG:d}\n3 -W ignore train.py --lr 1\n"
    assert found.stdout == expected, found.stderr
    assert found.stderr.count("\n") == 1
    assert "did you mean max_epochs" in found.stderr
