"""Processes that are not where they believe: below ranks, in shells of steps, on other nodes."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.launching import mpirun_command, mpirun_environment
from helpers.limits import JOB_SECONDS
from helpers.slurm import Lab

pytestmark = pytest.mark.ranks(2)

LIMIT = "OMP_NUM_THREADS"

# No torch: from exec to a world.
WORLD = """
from hpctrain.errors import LaunchError
from hpctrain.launch.process_group import control_plane

try:
    with control_plane() as (topology, _):
        print("a world of", topology.world_size, flush=True)
except LaunchError as error:
    print("refused:", error, flush=True)
"""

# A rank of MPI that is none of ours, and what it starts.
PARENT = """
import os
import subprocess
import sys

from mpi4py import MPI

from hpctrain.launch.environment import without_rank

if MPI.COMM_WORLD.Get_rank() == 0:
    for options in ({}, {"close_fds": False}, {"env": without_rank(os.environ)}):
        subprocess.run([sys.executable, "world.py"], check=True, **options)
MPI.COMM_WORLD.Barrier()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "world.py").write_text(WORLD, encoding="utf-8")
    (tmp_path / "parent.py").write_text(PARENT, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("mpi", ["mpich", "openmpi"])
def test_a_child_of_a_rank_does_not_take_its_place(mpi: str, folder: Path) -> None:
    """It would write into a descriptor that is another file's now, or wait for ever."""
    result = subprocess.run(
        mpirun_command(mpi, mpi, 2, "parent.py"),
        cwd=folder,
        env=mpirun_environment(mpi),
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    first, second, third = result.stdout.splitlines()
    for line in (first, second):
        assert line.startswith("refused: this process was started by process ")
        assert "nobody can take it twice" in line
    assert third == "a world of 1"


def test_a_descriptor_that_is_gone_is_a_message(folder: Path) -> None:
    """As below a rank that is no Python process."""
    env = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "PMI_FD": "77"}
    result = subprocess.run(
        [sys.executable, "world.py"],
        cwd=folder,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert "refused: PMI_FD=77, the connection to the process manager, is closed here" in (
        result.stdout
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("-n1", ["this shell is itself a task of a step", "--overlap -n", "a world of 1"]),
        ("-n2 --mpi=pmi2", ["refused: the shell that this was typed in", "srun --overlap -n 2"]),
    ],
)
def test_a_shell_that_is_a_task_says_so(
    slurm: Lab, folder: Path, options: str, words: list[str]
) -> None:
    if shutil.which("script") is None:
        pytest.skip("script, which makes a terminal, is not installed (bsdutils)")
    typed = f"{sys.executable} world.py\nexit\n"
    result = subprocess.run(
        ["script", "-qec", f"srun {options} --pty bash --norc", "/dev/null"],
        input=typed,
        cwd=folder,
        env=slurm.environment,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    for word in words:
        assert word in result.stdout.replace("\r\n", ""), result.stdout


def test_one_process_of_a_larger_job(slurm: Lab, folder: Path) -> None:
    """In the script, and by something like ssh on the other node."""
    script = f"""
    {sys.executable} world.py
    srun -w n2 -N1 -n1 env -u SLURM_STEP_ID -u SLURMD_NODENAME {sys.executable} world.py
    """
    job = slurm.submit(script, "-N2", "-n4", cwd=folder)
    slurm.wait_until_over(job)
    output = (folder / "out").read_text(encoding="utf-8")
    assert f"this is one process, and job {job} of Slurm has 2 nodes. To use them: srun" in output
    assert output.count("a world of 1") == 1
    assert "refused: this process on n2 was started by none of the launchers" in output


def test_np_in_a_job_without_an_mpirun(slurm: Lab, tmp_path: Path) -> None:
    """In the shell of a step, which holds the cores; bound to a library that came alone."""
    library = next((Path(sys.prefix) / "lib").rglob("libmpi.so.12"))
    alone = slurm.folder / "alone" / "deep" / "lib"  # no folder above has a bin with an mpirun
    alone.mkdir(parents=True)
    shutil.copy(library.resolve(), alone / "libmpi.so.12")
    env = {
        "PATH": os.defpath,
        "MPI4PY_LIBMPI": str(alone / "libmpi.so.12"),
        "LD_LIBRARY_PATH": f"{library.parent}:{library.parent / 'mpich'}",
    }
    command = f"{sys.executable} -m hpctrain no.toml --np 2; echo code $?"
    result = slurm.run("srun", "-n1", "bash", "-c", command, env=env, cwd=tmp_path)
    output = result.stdout + result.stderr
    assert "code 78" in output, output
    assert "bin/srun --overlap --nodes=1" in output
    assert output.count("no.toml: no such file") == 1


def test_a_login_node_is_spared(folder: Path) -> None:
    """A batch system that is set up, and no job."""
    (folder / "sbatch").write_text("#!/bin/sh\n", encoding="utf-8")
    (folder / "sbatch").chmod(0o755)
    (folder / "slurm.conf").touch()
    script = f"{WORLD}\nimport os\nprint('cores', len(os.sched_getaffinity(0)), flush=True)\n"
    (folder / "world.py").write_text(script, encoding="utf-8")
    path = f"{folder}:{os.environ['PATH']}"
    env = {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    clean = {name: os.environ[name] for name in os.environ if name != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [sys.executable, "world.py"],
        cwd=folder,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    cores = min(2, len(os.sched_getaffinity(0)))
    assert result.stdout.splitlines() == ["a world of 1", f"cores {cores}"], result.stderr
    assert result.stderr.count("a login node? This takes 2 cores in all") == 1


ON_A_LOGIN_NODE = """
import os

import torch

import hpctrain


def body():
    with hpctrain.connect() as world:
        mine = (sorted(os.sched_getaffinity(0)), torch.get_num_threads())
        return world.communicator.all_gather(mine)


if __name__ == "__main__":
    print(hpctrain.launch(body, np=2), body(), sep="\\n")
"""


def test_ranks_and_loops_of_ones_own_on_the_login_node_of_a_slurm(
    slurm: Lab, tmp_path: Path
) -> None:
    """Both say so in one line, and take two threads at most, however many processes."""
    (tmp_path / "loop.py").write_text(ON_A_LOGIN_NODE, encoding="utf-8")
    clean = {name: slurm.environment[name] for name in slurm.environment if name != LIMIT}
    result = subprocess.run(
        [sys.executable, "loop.py"],
        cwd=tmp_path,
        env=clean | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    over_ranks, alone = map(ast.literal_eval, result.stdout.splitlines())
    for told in (over_ranks, alone):
        assert len({core for cores, _ in told for core in cores}) <= 2
        assert sum(threads for _, threads in told) <= 2
    assert len(over_ranks) == 2
    assert result.stderr.count("a login node? This takes 2 cores in all") == 2
    assert result.stderr.count("hpctrain: note: ") == 2
