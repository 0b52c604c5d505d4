"""docs/own-code.md, "Scripts and notebooks", run as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.launching import ROOT
from helpers.limits import JOB_SECONDS
from helpers.slurm import Lab

pytestmark = pytest.mark.ranks(2)

PAGE = (ROOT / "docs" / "own-code.md").read_text(encoding="utf-8")
PAGE = PAGE.partition("\n## Scripts and notebooks\n")[2].partition("\n## ")[0]
PROGRAMS = dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, program in PROGRAMS.items():
        (tmp_path / name).write_text(program, encoding="utf-8")
    return tmp_path


def command(beginning: str) -> list[str]:
    (found,) = [line for line in COMMANDS if line.startswith(beginning)]
    return found.split()


def run(folder: Path, words: list[str]) -> str:
    words = [sys.executable if word == "python" else word for word in words]
    ended = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=JOB_SECONDS, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_script(folder: Path) -> None:
    assert run(folder, command("python -m hpctrain run")) == "sum over 2 ranks: 6.0\n"


def test_a_cell(folder: Path) -> None:
    assert run(folder, ["python", "cell.py"]) == "here is rank 0\nthe sum is 10\n"


def test_one_import_changed_under_slurm(folder: Path, slurm: Lab) -> None:
    """Both ranks, one on each of two nodes, train on their half."""
    srun, *words = command("srun")
    words = [sys.executable if word == "python" else word for word in words]
    ended = slurm.run(srun, "--mpi=pmi2", "-N2", *words, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "trained on 1798 samples, 899 of them here\n"


def test_one_import_changed_is_one_job(folder: Path) -> None:
    """What a rank raises between the calls ends the other; another world is refused."""
    program = PROGRAMS["myscript.py"].replace("SLURM_PROCID", "PMI_RANK")
    program = program.replace("SLURM_NTASKS", "PMI_SIZE")
    failing = program.replace("    total = ", "    assert rank == 0, 'of mine'\n    total = ")
    (folder / "failing.py").write_text(failing, encoding="utf-8")
    other = program.replace("    setup(rank, world_size)", "    setup(rank, 3)")
    assert other != program
    (folder / "other.py").write_text(other, encoding="utf-8")
    for name, told in (("failing.py", "AssertionError: of mine"), ("other.py", "world_size=3")):
        ended = subprocess.run(
            ["mpirun", "-np", "2", sys.executable, name],
            cwd=folder,
            env=os.environ,
            capture_output=True,
            text=True,
            timeout=JOB_SECONDS,
            check=False,
        )
        assert ended.returncode != 0
        assert told in ended.stderr
