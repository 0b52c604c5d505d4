"""Where no launcher is, MPI is not even loaded; nor by what a data worker imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.limits import JOB_SECONDS

from hpctrain.convert.digits import pack_digits

pytestmark = pytest.mark.ranks(2)

ROOT = Path(__file__).parents[2]

# Stands in for mpi4py on a login node: loading the library there is the end of the process.
DEADLY = """
import os, sys
sys.stderr.write("mpi4py was imported\\n")
sys.stderr.flush()
os._exit(86)
"""


def run(folder: Path, *command: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    deadly = folder / "deadly" / "mpi4py"
    deadly.mkdir(parents=True, exist_ok=True)
    (deadly / "__init__.py").write_text(DEADLY, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ
        | {
            "MPI4PY_LIBMPI": str(folder / "no-such-libmpi.so"),
            "PYTHONPATH": f"{deadly.parent}:{ROOT}",
        }
        | (env or {}),
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


def test_the_deadly_module_is_deadly(tmp_path: Path) -> None:
    """The test of the tests below: under a launcher MPI is wanted, and mpi4py is imported."""
    claim = {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0"}
    code, output = run(tmp_path, "-m", "hpctrain", "run.toml", env=claim)
    assert code == 86
    assert "mpi4py was imported" in output


def test_a_job_and_all_commands_alone(tmp_path: Path) -> None:
    pack_digits(tmp_path / "data" / "digits")
    config = (ROOT / "configs" / "run.toml").read_text(encoding="utf-8")
    (tmp_path / "run.toml").write_text(config, encoding="utf-8")
    for arguments in (
        ["run.toml", "training.max_epochs=1"],
        ["status", "runs/digits"],
        ["data", "pack", "digits", "data/again"],
        ["--help"],
        ["--version"],
    ):
        code, output = run(tmp_path, "-m", "hpctrain", *arguments)
        assert code == 0, f"{arguments}: {output}"


LOOP = """
import sys

import torch
from torch.utils.data import DataLoader, Dataset

import hpctrain


class Rows(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        import hpctrain.data
        import hpctrain.models
        import hpctrain.training.task.task

        loaded = [name for name in sys.modules if name.partition(".")[0] == "mpi4py"]
        assert not loaded, loaded
        return torch.tensor(index)


if __name__ == "__main__":
    with hpctrain.connect() as world:
        for how in ("spawn", "forkserver"):
            loader = DataLoader(Rows(), batch_size=2, num_workers=1, multiprocessing_context=how)
            rows = torch.cat(list(loader)).tolist()
            if world.topology.is_rank_zero:
                print(how, rows, world.topology.world_size, flush=True)
"""


def test_data_workers_of_an_own_loop_under_mpirun(tmp_path: Path) -> None:
    """Workers start Python anew and import the user's module: never MPI with it."""
    (tmp_path / "loop.py").write_text(LOOP, encoding="utf-8")
    result = subprocess.run(
        ["mpirun", "-np", "2", sys.executable, "loop.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for how in ("spawn", "forkserver"):
        assert f"{how} [0, 1, 2, 3, 4, 5, 6, 7] 2" in result.stdout


def test_what_workers_import_needs_no_mpi(tmp_path: Path) -> None:
    code = "import hpctrain, hpctrain.data, hpctrain.models, hpctrain.training.task.task"
    code += ", hpctrain.launch.process_group, hpctrain.launch.failure, hpctrain.launch.mpi"
    assert run(tmp_path, "-c", code) == (0, "")
