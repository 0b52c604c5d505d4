"""Open MPI 4, whose mpirun is the parent of its ranks, in an interactive shell on a Slurm node."""

from __future__ import annotations

import shutil

import pytest
from helpers.launching import BODIES
from helpers.open_mpi_4 import FOLDER, LIBRARY, ranks_of_open_mpi_4
from helpers.slurm import Lab

pytestmark = pytest.mark.ranks(2)


def in_a_shell(slurm: Lab, *command: str) -> tuple[int, str]:
    """Run a command as one does in the shell of `srun -n1 --pty bash`."""
    result = slurm.run("srun", "-n1", "bash", "-c", '"$@"; exit $?', "shell", *command, env=LIBRARY)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["mpirun.openmpi", "mpiexec.openmpi"])
def test_its_ranks_are_one_world(slurm: Lab, name: str) -> None:
    command = ranks_of_open_mpi_4(2, str(BODIES / "communicator.py"), name=name)
    code, output = in_a_shell(slurm, *command)
    assert "passed 2 Open MPI's mpirun gloo" in output
    assert code == 0, output


def test_a_launcher_that_nobody_knows_is_not_taken_for_the_step(slurm: Lab) -> None:
    """Two solo runs would start."""
    start = slurm.folder / "start"  # /tmp and /dev/shm are each node's own
    command = ranks_of_open_mpi_4(2, "-m", "hpctrain", "no.toml", name=str(start))
    shutil.copy(FOLDER / "usr" / "bin" / "orterun", start)
    code, output = in_a_shell(slurm, *command)
    assert code == 69, output
    assert output.count("hpctrain: error: two launchers disagree") == 1
    assert "SLURM_STEP_NUM_TASKS=1" in output
    assert "OMPI_COMM_WORLD_SIZE=2" in output
    assert "env -u SLURM_STEP_ID" in output
