"""`hpctrain.connect()` in programs that do not know of it: ways to leave, and to come back."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.jobs import in_turn
from helpers.launching import ROOT
from helpers.limits import JOB_SECONDS
from helpers.resuming import ONE_THREAD
from helpers.runs import metrics
from safetensors.numpy import load_file

pytestmark = pytest.mark.ranks(2)

ALONE = """
import sys

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import hpctrain
from hpctrain.errors import LaunchError

for attempt in range(2):
    try:
        with hpctrain.connect() as world:
            model = DistributedDataParallel(torch.nn.Linear(2, 1))
            model(torch.ones(3, 2)).sum().backward()
            distributed.barrier()
            try:
                with hpctrain.connect():
                    pass
            except LaunchError as error:
                print("refused", error)
            raise ValueError("batch too large, try a smaller one")
    except ValueError as error:
        print("caught", error)
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
with hpctrain.connect() as world:
    pass
assert distributed.is_initialized()  # it was there before
distributed.destroy_process_group()
with hpctrain.connect() as world:
    sys.exit()
"""

AGAIN = """
import sys

import hpctrain

for attempt in range(2):
    with hpctrain.connect() as world:
        # In one piece: print() writes its words one by one where stdout is not buffered.
        sys.stdout.write(f"in {world.topology.rank}\\n")
"""

SCRIPT = """
import sys

from hpctrain.launch.environment import this_process
from hpctrain.training.program import started

for attempt in range(2):
    with started(this_process()) as job:
        sys.stdout.write(f"in {job.topology.rank}\\n")
    sys.stdout.flush()
    if FAILS and job.topology.rank == 1:
        raise ValueError("between two calls")
"""

MPI_FIRST = """
from mpi4py import MPI

import sys
import hpctrain

for attempt in range(2):
    with hpctrain.connect() as world:
        sizes = world.communicator.all_gather(world.topology.world_size)
total = MPI.COMM_WORLD.allreduce(1)
if MPI.COMM_WORLD.Get_rank() == 0:
    print("after", total, sizes, flush=True)
with hpctrain.connect() as world:
    sys.exit(0)
"""

EARLY = """
import torch
from torch import distributed

import hpctrain
from hpctrain.config.schema import LaunchSection


def main():
    with hpctrain.connect(LaunchSection(hang_timeout_seconds=8.0)) as world:
        if world.topology.rank != 0:
            return
        distributed.all_reduce(torch.ones(1))


main()
"""

RESTARTED = """
import os
import signal
from pathlib import Path

import torch
from torch import distributed

import hpctrain

with hpctrain.connect() as world:
    if world.topology.rank == 1 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    total = torch.ones(1)
    distributed.all_reduce(total)
    # In one piece: print() writes its words one by one where stdout is not buffered.
    os.write(1, f"rank {world.topology.rank} sum {int(total)}\\n".encode())
"""

MPIRUN = ("mpirun", "-np", "2", sys.executable)


def run(folder: Path, text: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    (folder / "loop.py").write_text(text, encoding="utf-8")
    return subprocess.run(
        [*launcher, "loop.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )


@pytest.mark.parametrize("launcher", [(), ("mpirun", "-np", "1")])
def test_a_failure_of_one_process_is_its_callers(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    """A notebook's kernel, pytest and a loop that tries again survive it; sys.exit() is success."""
    ended = run(tmp_path, ALONE, *launcher, sys.executable)
    assert ended.returncode == 0, ended.stderr
    refused, caught = ended.stdout.splitlines()[:2]
    assert refused.startswith("refused connect() was called while another")
    assert caught == "caught batch too large, try a smaller one"
    assert ended.stdout.splitlines() == [refused, caught] * 2
    assert ended.stderr == ""


def test_a_launch_that_fails_is_one_message(tmp_path: Path) -> None:
    """As on the command line, where nobody catches it: MPI runs once a process."""
    ended = run(tmp_path, AGAIN, *MPIRUN)
    assert sorted(ended.stdout.splitlines()[:2]) == ["in 0", "in 1"]
    assert ended.returncode == 69, ended.stderr
    assert ended.stderr.count("hpctrain: error: MPICH 5.0.2 has been finalized") == 1
    assert "Traceback" not in ended.stderr


def test_a_script_has_several_worlds_of_mpi_and_fails_between_them(tmp_path: Path) -> None:
    """The other rank waits in a world that the failing one will not join: the job ends."""
    ended = run(tmp_path, f"FAILS = False\n{SCRIPT}", *MPIRUN)
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.split()) == ["0", "0", "1", "1", "in", "in", "in", "in"]
    ended = run(tmp_path, f"FAILS = True\n{SCRIPT}", *MPIRUN)
    assert ended.returncode == 70, ended.stderr
    assert "ValueError: between two calls" in ended.stderr


def test_mpi_that_is_up_is_joined_and_left_as_it_was(tmp_path: Path) -> None:
    ended = run(tmp_path, MPI_FIRST, *MPIRUN)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["after 2 [2, 2]"]


def test_a_rank_that_leaves_the_others_behind_is_named(tmp_path: Path) -> None:
    """Without a single heartbeat from the loop, and within the hang timeout."""
    ended = run(tmp_path, EARLY, *MPIRUN)
    assert ended.returncode == 70, ended.stderr
    assert "rank 1 exited connect() while rank 0 is still running" in ended.stderr
    assert "no progress for 8 s (hang timeout)" in ended.stderr
    assert "all_reduce" in ended.stderr  # the stack of the one that runs


def test_restarts_over_agents_form_a_world_each(tmp_path: Path) -> None:
    """Each agent counts its own restarts: only that of the killed rank has had one, or both."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (tmp_path / "loop.py").write_text(RESTARTED, encoding="utf-8")
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
                *("--nproc-per-node", "1", "--max-restarts", "2", "--node-rank", str(number)),
                *("--master-addr", "127.0.0.1", "--master-port", str(port), "loop.py"),
            ],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [agent.communicate(timeout=JOB_SECONDS)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    for number, output in enumerate(outputs):
        assert f"rank {number} sum 2" in output.splitlines()


def test_restarts_of_torchrun_form_a_world_each(tmp_path: Path) -> None:
    """One store, the agent's, outlives them all."""
    agent = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ended = run(tmp_path, RESTARTED, sys.executable, *agent, "--max-restarts", "2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert sorted(ended.stdout.splitlines()) == ["rank 0 sum 2", "rank 1 sum 2"]
    assert "rank 1@" in ended.stderr  # the watchdog's word on the first
    assert "met another world" not in ended.stderr


DOCS = Path(__file__).parents[2] / "docs" / "own-code.md"

AS_FSDP = """
import os
import runpy
import sys

os.environ["HPCTRAIN_STRATEGY"] = "fsdp"
os.chdir("fsdp")
sys.path.insert(0, os.getcwd())
runpy.run_path("loop.py", run_name="__main__")
"""


def programs() -> dict[str, str]:
    """Return the programs of the section on own loops, by their names."""
    section = (
        DOCS.read_text(encoding="utf-8").partition("\n## Own loops\n")[2].partition("\n## ")[0]
    )
    return dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", section, re.DOTALL))


def accuracies(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [each["accuracy"] for each in map(json.loads, lines) if each["kind"] == "evaluation"]


def test_programs_of_the_docs_and_loops_by_hand(tmp_path: Path, digits: Path) -> None:
    """On three ranks, in ddp and fsdp, and the first of them on one: all without a change."""
    for folder in (tmp_path, tmp_path / "fsdp", tmp_path / "alone"):
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "train").symlink_to(digits / "train")
        (folder / "data" / "valid").symlink_to(digits / "validation")
        for name, text in programs().items():
            (folder / name).write_text(text, encoding="utf-8")
    (tmp_path / "as_fsdp.py").write_text(AS_FSDP, encoding="utf-8")
    shutil.copy(DOCS.parents[1] / "configs" / "run.toml", tmp_path)
    (tmp_path / "data" / "digits").symlink_to(digits)
    names = ["loop.py", "gan.py", "actor_critic.py", "sweep.py", "study.py", "as_fsdp.py"]
    lines = [["own_loops.py"], *([str(tmp_path / name)] for name in names)]
    ended = in_turn(tmp_path, 3, *lines, env=ONE_THREAD)
    assert ended[0].stdout.splitlines()[-1] == "passed 11"
    alone = subprocess.run(
        [sys.executable, "loop.py"],
        cwd=tmp_path / "alone",
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    runs = [tmp_path / folder / "runs" / "mine" for folder in ("", "fsdp", "alone")]
    found = [accuracies(run) for run in runs]
    assert [len(each) for each in found] == [10, 10, 10]
    for each in found:
        assert abs(each[-1] - found[-1][-1]) < 0.02
        assert each[-1] > 0.8
    for run in ("gan", "walk", "lr-0.01", "lr-0.001"):
        ending = json.loads((tmp_path / "runs" / run / "exit.json").read_text(encoding="utf-8"))
        assert (ending["code"], ending["reason"]) == (0, "complete")
    for run, reason, evaluations in (("trial-0", "pruned", 1), ("trial-1", "complete", 2)):
        ending = json.loads((tmp_path / "runs" / run / "exit.json").read_text(encoding="utf-8"))
        assert (ending["code"], ending["reason"]) == (0, reason)
        assert len(accuracies(tmp_path / "runs" / run)) == evaluations


TASK = """
from uncertain import Uncertain


class Task(Uncertain):
    def set_progress(self, step, epoch, stage):
        with open("told.txt", "a", encoding="utf-8") as file:
            print(step, epoch, stage, file=file)
"""


def test_a_task_learns_where_the_run_stands(site: Path) -> None:
    """Step, epoch and stage, also where a run goes on; the page's has parameters and logs."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    program = page.split("```python\n# uncertain.py\n")[1].split("```")[0]
    (site / "uncertain.py").write_text(program, encoding="utf-8")
    (site / "their_task.py").write_text(TASK, encoding="utf-8")
    line = ["run.toml", "task.use=their_task:Task", "run.name=told", "data.global_batch_size=719"]
    line.append("logging.every_steps=1")
    jobs = [[*line, "training.max_epochs=1"], [*line, "training.max_epochs=2"]]
    jobs.append(["ckpt", "export", "runs/told", "told.safetensors"])
    for ended in in_turn(site, 1, *jobs):
        assert ended.code == 0, ended.output
    weights = [record["logged"]["weight"] for record in metrics(site / "runs" / "told", "train")]
    assert len(set(weights)) == len(weights) == 4
    assert [record["entropy"] for record in metrics(site / "runs" / "told", "epoch")]
    # What is given away is the model alone.
    assert "log_variance" not in " ".join(load_file(site / "told.safetensors"))
    told = (site / "told.txt").read_text(encoding="utf-8").splitlines()
    assert told == [
        *("0 0 train", "1 0 train", "2 1 train", "2 1 validation", "2 1 train"),
        *("2 1 train", "3 1 train", "4 2 train", "4 2 validation", "4 2 train"),
    ]
