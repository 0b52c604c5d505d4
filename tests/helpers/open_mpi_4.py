"""Debian's Open MPI 4 without installing it: its files lie over /usr in a mount namespace.

No wheel has it, and two Open MPIs on one machine would be in each other's way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / ".venv-openmpi4"
LIBRARY = {"MPI4PY_LIBMPI": "/usr/lib/x86_64-linux-gnu/libmpi.so.40"}

_OVER_USR = 'mount -t overlay overlay -o "lowerdir=$0/usr:/usr" /usr && exec "$@"'


def open_mpi_4(*command: str) -> list[str]:
    """Return what runs a command where /usr has Open MPI 4, and skip where that cannot be."""
    if not (FOLDER / "usr" / "bin" / "orterun").exists():
        pytest.skip(f"{FOLDER} is not there: see tests/run.sh")
    if os.geteuid() != 0:
        pytest.skip("mounting over /usr needs root")
    prefix = ["unshare", "--mount", "bash", "-c", _OVER_USR, str(FOLDER)]
    probe = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no mount namespaces: {probe.stderr.strip()}")
    return [*prefix, *command]


def ranks_of_open_mpi_4(ranks: int, *arguments: str, name: str = "mpirun.openmpi") -> list[str]:
    """Return what starts ranks of our Python under its mpirun."""
    options = ("--allow-run-as-root", "--oversubscribe", "-np", str(ranks))
    return open_mpi_4(name, *options, sys.executable, *arguments)
