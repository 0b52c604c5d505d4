"""One process in larger jobs: what is said, and what is refused."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from helpers.environments import recorded

from hpctrain.errors import LaunchError
from hpctrain.launch.environment import detect, launchers_in
from hpctrain.launch.placement import Node, place
from hpctrain.launch.reporter import IN_MPI_INIT, Seen, missing_ranks_message
from hpctrain.launch.surroundings import (
    alone_in,
    expand,
    is_login_node,
    only_one_of,
    other_hosts,
    spare_login_node,
)

PBS = {"PBS_JOBID": "41.pbs", "PBS_NODEFILE": "nodes", "PBS_TASKNUM": "1"}
LSF = {"LSB_JOBID": "7", "LSB_MCPU_HOSTS": "h1 4 h2 4", "LSB_DJOB_NUMPROC": "8"}
GRID_ENGINE = {"JOB_ID": "3", "PE_HOSTFILE": "hosts", "NSLOTS": "8"}
TORN_PBS = PBS | {"PBS_NODEFILE": "none"}
FILES = {"one": "x1\nx1\n"} | {
    "nodes": "x1.a.b\nx1.a.b\nx2.a.b\nx2.a.b\n",
    "hosts": "h1.s 4 q UNDEFINED\nh2.s 4 q -\n",
}


@pytest.mark.parametrize(
    ("env", "host", "words", "is_refused"),
    [
        # the script of a job, which forgot its launcher
        (recorded("sbatch"), "n1", "job 11 of Slurm has 2 nodes. To use them: srun", False),
        (recorded("salloc"), "login", "job 8 of Slurm has 2 nodes", False),
        (PBS, "x1", "job 41.pbs of PBS has 2 nodes. To use them: mpiexec -n 4", False),
        (LSF, "h1", "job 7 of LSF has 2 nodes. To use them: mpirun -np 8", False),
        (GRID_ENGINE, "h1", "job 3 of Grid Engine has 2 nodes. To use them: mpirun -np 8", False),
        (
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "1"},
            "n1",
            "job 1 of Slurm has 4 tasks",
            False,
        ),
        # on other nodes: ssh, pbsdsh, blaunch
        (recorded("sbatch"), "n2.cluster", "as by ssh, pbsdsh or blaunch", True),
        (PBS | {"PBS_TASKNUM": "3"}, "x1", "Start all of them from the script: mpiexec -n 4", True),
        (PBS, "x2", "job 41.pbs of PBS of 2 nodes", True),
        (LSF, "h2", "job 7 of LSF of 2 nodes", True),
        (LSF | {"LSF_PM_TASKID": "2"}, "h1", "as by ssh, pbsdsh or blaunch", True),
        # the first of them, and those on nodes to which PBS has brought no list of hosts
        (LSF | {"LSF_PM_TASKID": "1"}, "h1", "job 7 of LSF has 2 nodes", False),
        (TORN_PBS | {"PBS_NODENUM": "1"}, "x2", "in job 41.pbs of PBS, and not where", True),
        (TORN_PBS | {"PBS_TASKNUM": "2"}, "x1", "script: mpiexec -n N python", True),
        (TORN_PBS | {"PBS_NUM_NODES": "3"}, "x1", "PBS has 3 nodes. To use them: mpiexec", False),
        # on one node with several: each of pbsdsh's
        (PBS | {"PBS_NODEFILE": "one", "PBS_TASKNUM": "2"}, "x1", "of 2 tasks, and not", True),
        (GRID_ENGINE, "h2.s", "job 3 of Grid Engine of 2 nodes", True),
        # by Slurm itself, which may run the script on any node
        (recorded("sbatch") | {"SLURMD_NODENAME": "n2"}, "n2", "this is one process", False),
        # nothing to say
        ({}, "here", None, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "n1"}, "n1", None, False),
        (PBS | {"PBS_NODEFILE": "none"}, "x1", None, False),
        (LSF | {"LSB_MCPU_HOSTS": "h1 8"}, "h1", None, False),  # cores for one process
        (recorded("srun-shell"), "n1", None, False),
    ],
)
def test_one_process_of_a_job(
    env: dict[str, str], host: str, words: str | None, is_refused: bool
) -> None:
    found = alone_in(env, host, lambda path: FILES.get(path, ""), is_shells=False)
    if words is None:
        assert found is None
    else:
        assert found is not None
        assert words in found.text
        assert found.is_refused == is_refused


@pytest.mark.parametrize(
    ("hosts", "is_refused"), [("127.0.0.1 4 192.0.2.1 4", False), ("192.0.2.1 4 127.0.0.1 4", True)]
)
def test_hosts_by_names_of_another_network(hosts: str, is_refused: bool) -> None:
    """Which of them this one is their addresses tell."""
    found = alone_in(LSF | {"LSB_MCPU_HOSTS": hosts}, "n1", str, is_shells=False)
    assert found is not None
    assert found.is_refused == is_refused


@pytest.mark.parametrize(
    ("recorded_as", "job", "words"),
    [
        ("aprun", PBS, "job 41.pbs of PBS has 2 nodes. To use them in one run: aprun -n 4 python"),
        ("pals", PBS, "To use them in one run: mpiexec -n 4 python"),
        ("jsrun", LSF, "jsrun has started one process, and job 7 of LSF has 2 nodes"),
        ("openmpi", GRID_ENGINE, "To use them in one run: mpirun -np N python"),
        ("openmpi", {}, None),
        ("mpich", LSF | {"LSB_MCPU_HOSTS": "h1 8"}, None),
    ],
)
def test_the_only_process_of_a_launcher(
    recorded_as: str, job: dict[str, str], words: str | None
) -> None:
    """As in a loop over `aprun -n 1`, each of which is a run of its own."""
    (launcher, *_) = launchers_in(recorded(recorded_as))
    found = only_one_of(launcher, job, lambda path: FILES.get(path, ""))
    if words is None:
        assert found is None
    else:
        assert found is not None
        assert words in found.text
        assert not found.is_refused


def test_ssh_into_a_job_that_adopts_it() -> None:
    group = "0::/system.slice/slurmstepd.scope/job_42/step_extern/user/task_special\n"
    found = alone_in({}, "n1", lambda path: group if "cgroup" in path else "", is_shells=False)
    assert found is not None
    assert not found.is_refused
    assert "by ssh into job 42 of Slurm" in found.text
    assert "srun --jobid=42 --overlap -n N" in found.text


def test_a_shell_that_is_a_task() -> None:
    found = alone_in(recorded("srun-shell"), "n1", str, is_shells=True)
    assert found is not None
    assert not found.is_refused
    for words in ("itself a task", "srun --overlap -n", "env -u SLURM_STEP_ID -u SLURM_PROCID"):
        assert words in found.text
    interactive = recorded("srun-shell") | {"SLURM_STEP_ID": "4294967290"}
    found = alone_in(interactive, "n1", str, is_shells=True)
    assert found is not None
    assert "srun -n" in found.text


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ("n1",)),
        ("n[1-2],login", ("n1", "n2", "login")),
        ("r1n[08-10,12]-ib", ("r1n08-ib", "r1n09-ib", "r1n10-ib", "r1n12-ib")),
        ("", ()),
        ("r[1-2]n[3-4]", ()),
        ("n[a-b]", ()),
    ],
)
def test_lists_of_nodes(text: str, names: tuple[str, ...]) -> None:
    assert expand(text) == names


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"NODE_RANK": "1", "MASTER_ADDR": "a"}, "NODE_RANK=1 is set, RANK and WORLD_SIZE are not"),
        ({"NODE_RANK": "0", "MASTER_ADDR": "a", "NNODES": "2"}, "--node-rank $NODE_RANK"),
        ({"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "2"}, "SkyPilot has started this"),
        ({"DSTACK_NODE_RANK": "1", "DSTACK_NODES_NUM": "2"}, "dstack"),
        ({"AWS_BATCH_JOB_NODE_INDEX": "0", "AWS_BATCH_JOB_NUM_NODES": "2"}, "AWS Batch has"),
        ({"_CONDOR_PROCNO": "1", "_CONDOR_NPROCS": "4"}, "HTCondor"),
        ({"NODE_RANK": "0", "MASTER_ADDR": "a", "NNODES": "1"}, None),
        ({"NODE_RANK": "0"}, None),
        ({"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "1"}, None),
    ],
)
def test_nodes_that_are_given_one_command(env: dict[str, str], words: str | None) -> None:
    if words is None:
        assert detect(env).launcher is None
        return
    with pytest.raises(LaunchError) as caught:
        detect(env)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "group", "expected"),
    [
        ({}, "0::/user.slice", True),
        ({"SLURM_JOB_ID": "1"}, "0::/user.slice", False),
        ({"SLURM_CONF": ""}, "0::/user.slice", False),  # a client that leads nowhere
        ({"PATH": "/nowhere"}, "0::/user.slice", False),
        ({}, "0::/system.slice/slurmstepd.scope/job_42/step_extern", False),  # by ssh
    ],
)
def test_login_nodes(changes: dict[str, str], group: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text(f"{group}\n", encoding="utf-8")
    (tmp_path / "sbatch").write_text("", encoding="utf-8")
    (tmp_path / "sbatch").chmod(0o755)
    env = {"PATH": str(tmp_path), "SLURM_CONF": "/opt/slurm.conf"} | changes
    assert is_login_node(env, tmp_path) == expected


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (
            {"SLURM_STEP_NODELIST": "n[1-3]", "SLURMD_NODENAME": "n1"},
            "one of ranks 2 to 3 on n2, n3 has",
        ),
        ({"LSB_JOBID": "7", "LSB_MCPU_HOSTS": f"{socket.gethostname()} 2 b9 2"}, "to 3 on b9 has"),
        ({}, "one of ranks 2 to 3 has not called it"),
    ],
)
def test_who_is_missing_on_other_hosts_is_named(env: dict[str, str], words: str) -> None:
    waiting = {rank: Seen(rank, "python", frozenset({IN_MPI_INIT})) for rank in (0, 1)}
    assert words in missing_ranks_message(waiting, 4, 300, other_hosts(env))


def test_all_processes_of_a_world_share_the_cores_of_a_login_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sbatch").write_text("", encoding="utf-8")
    (tmp_path / "sbatch").chmod(0o755)
    for name in ("OMP_NUM_THREADS", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_CONF", "/opt/slurm.conf")
    taken: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3, 19)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: taken.append(cores))
    nodes = [Node("boot", "login")] * 8
    for rank in range(8):
        spare_login_node(place(rank, nodes, launcher="mpirun", mpi=None))
    assert len(taken) == 8
    assert len(set().union(*taken)) == 2
