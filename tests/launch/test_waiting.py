"""Starts at which somebody does not come: limits, names, signals, and several programs at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers.launching import mpirun_command, mpirun_environment
from helpers.limits import FOREVER_SECONDS, JOB_SECONDS
from helpers.ports import free_port
from helpers.waiting import wait_for

pytestmark = pytest.mark.ranks(3)

# What a wait at the start may take: here nobody else comes however long one waits.
SHORT = {"HPCTRAIN_START_SECONDS": "3"}
ONE_STAYS_AWAY = f"""
rank=${{PMI_RANK:-$OMPI_COMM_WORLD_RANK}}
if [[ $rank == 1 ]]; then exec sleep {FOREVER_SECONDS:.0f}; fi
exec "$@"
"""
TRAIN = (sys.executable, "-m", "hpctrain", "no.toml")

# One mpirun, two programs: a world of those that train, beside one that does not know of it.
PROGRAM = """
import sys

from mpi4py import MPI

import hpctrain

if sys.argv[1] == "simulates":
    MPI.COMM_WORLD.Split(0)
else:
    with hpctrain.connect(communicator=MPI.COMM_WORLD.Split(1)) as world:
        import torch

        total = torch.tensor([float(MPI.COMM_WORLD.Get_rank())])
        torch.distributed.all_reduce(total)
        if world.topology.is_rank_zero:
            topology = world.topology
            sys.stdout.write(f"{topology.world_size} {int(total)} {topology.reasons['rank']}\\n")
# In one piece: print() writes its words one by one where stdout is not buffered.
sys.stdout.write(f"both {MPI.COMM_WORLD.allreduce(1)}\\n")
"""


def run(*command: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    result = subprocess.run(
        command,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("mpi", ["mpich", "openmpi"])
def test_who_does_not_come_to_mpi_init_is_named(mpi: str) -> None:
    command = mpirun_command(mpi, mpi, 3, "-m", "hpctrain", "no.toml")
    at = next(index for index, word in enumerate(command) if word.endswith("python"))
    script = ("bash", "-c", ONE_STAYS_AWAY, "rank")
    code, output = run(*command[:at], *script, *command[at:], env=mpirun_environment(mpi) | SHORT)
    assert code != 0, output  # that of the killed one, under some
    assert output.count("hpctrain: error: MPI_Init has not come back within 3 s") == 1
    assert "on this node rank 1 (process " in output
    assert ", sleep) has not called it" in output


def test_a_program_that_knows_nothing_of_us_is_named() -> None:
    other = "from mpi4py import MPI; MPI.COMM_WORLD.Barrier()"
    both = ("-np", "1", sys.executable, "-c", other, ":", "-np", "2", *TRAIN)
    code, output = run("mpirun", *both, env=SHORT)
    # Hydra kills the ones that wait, and may give that of one of them.
    assert code in (69, signal.SIGKILL), output
    told = "1 of 3 ranks have not come to the start of this job within 3 s: 0."
    assert output.count(f"hpctrain: error: {told}") == 1
    assert "MPI.APPNUM is 1 here" in output
    assert "hpctrain.connect(communicator=...)" in output


def test_a_part_of_the_ranks_is_a_world(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    program = (sys.executable, str(tmp_path / "program.py"))
    both = ("-np", "1", *program, "simulates", ":", "-np", "2", *program, "trains")
    code, output = run("mpirun", *both)
    assert code == 0, output
    assert "2 3 the communicator that connect() was given" in output.splitlines()
    assert output.count("both 3") == 3


def test_one_program_started_as_two_is_one_world_and_says_so() -> None:
    both = ("-np", "1", *TRAIN, ":", "-np", "1", *TRAIN)
    code, output = run("mpirun", *both)
    assert code == 78, output
    assert output.count("ranks 1 were started by mpirun as another program (MPI.APPNUM)") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_wait_in_mpi_init(number: signal.Signals) -> None:
    with subprocess.Popen(
        ["mpirun", "-np", "2", "bash", "-c", ONE_STAYS_AWAY, "rank", *TRAIN],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        rank = None
        try:
            wait_for(lambda: in_mpi_init(job.pid), "rank in MPI_Init")
            rank = in_mpi_init(job.pid)
            assert rank is not None
            rank.send_signal(number)
            output, _ = job.communicate(timeout=JOB_SECONDS)
        finally:
            job.kill()
    assert f"rank 0 was ended by {number.name} while it waited for others in MPI_Init" in output


def in_mpi_init(mpirun: int) -> psutil.Process | None:
    """Return the process below mpirun that waits in MPI_Init."""
    for process in psutil.Process(mpirun).children(recursive=True):
        try:
            files = list(Path(f"/proc/{process.pid}/fd").iterdir())
            if any("hpctrain-in-mpi-init" in str(file.readlink()) for file in files):
                return process
        except OSError:
            continue
    return None


RANK_ZERO_IS_LATE = """
rank=${PMI_RANK:-$OMPI_COMM_WORLD_RANK}
if [[ $rank == 0 ]]; then until [[ -e $0 ]]; do sleep 0.1; done; fi
exec "$@"
"""


@pytest.mark.parametrize(("mpirun", "library"), [("mpich", "openmpi"), ("openmpi", "mpich")])
def test_a_failed_start_is_told_once_though_rank_zero_comes_late(
    mpirun: str, library: str, tmp_path: Path
) -> None:
    """Later than its head start, and before the one that has told it has left."""
    command = mpirun_command(mpirun, library, 4, "-m", "hpctrain", "no.toml")
    at = next(index for index, word in enumerate(command) if word.endswith("python"))
    script = ("bash", "-c", RANK_ZERO_IS_LATE, str(tmp_path / "go"))
    with subprocess.Popen(
        [*command[:at], *script, *command[at:]],
        env=mpirun_environment(mpirun),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        try:
            assert job.stdout is not None
            first = next(line for line in job.stdout if line.startswith("hpctrain: error"))
            (tmp_path / "go").touch()
            rest, _ = job.communicate(timeout=JOB_SECONDS)
        finally:
            job.kill()
    assert "which cannot join its world" in first
    assert "hpctrain: error" not in rest
    assert job.returncode == 69


def test_a_world_by_hand_names_who_is_missing_and_ends_on_a_signal() -> None:
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3"}
    code, output = run(*TRAIN, env={**world, **SHORT, "RANK": "0"})
    assert code == 69, output
    assert "2 of 3 ranks have not come to MASTER_ADDR:MASTER_PORT = 127.0.0.1:" in output
    assert "in time: 1, 2. That is loopback, which no other host reaches" in output
    with subprocess.Popen(
        TRAIN, env=os.environ | world | {"RANK": "0"}, stderr=subprocess.PIPE, text=True
    ) as rank:
        try:
            wait_for(lambda: answers(int(world["MASTER_PORT"])), "store")
            rank.terminate()
            _, output = rank.communicate(timeout=JOB_SECONDS)
        finally:
            rank.kill()
    assert "rank 0 was ended by SIGTERM while it waited for others at MASTER_ADDR" in output
    assert rank.returncode == 128 + signal.SIGTERM


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port)):
            return True
    except OSError:
        return False
