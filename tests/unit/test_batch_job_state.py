"""Whether another job is gone, by what the commands of schedulers print."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpctrain.batch.job_state import job_is_gone

SLURM = {"SLURM_JOB_ID": "9", "SLURM_CLUSTER_NAME": "alps"}
PBS = {"PBS_JOBID": "9.head"}
INVALID = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
UNREACHABLE = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"


@pytest.mark.parametrize(
    ("environ", "job", "cluster", "prints", "gone"),
    [
        (SLURM, "7", "alps", "echo RUNNING", False),
        (SLURM, "7", "alps", "echo COMPLETING", False),
        (SLURM, "7", "alps", "echo PENDING", False),
        (SLURM, "7", "alps", "true", True),
        (SLURM, "7", "alps", INVALID, True),
        (SLURM, "7", "alps", UNREACHABLE, None),
        # A number of another cluster, or of nobody knows which.
        (SLURM, "7", "jura", INVALID, None),
        (SLURM, "7", "", INVALID, None),
        ({"SLURM_JOB_ID": "9"}, "7", "", INVALID, None),
        # No option is made of what a file says.
        (SLURM, "--help", "alps", "true", None),
        (SLURM, "7 --help", "alps", "true", None),
        (PBS, "7.head", "head", """echo '{"Jobs":{"7.head":{"job_state":"R"}}}'""", False),
        (PBS, "7.head", "head", """echo '{"Jobs":{"7.head":{"job_state":"E"}}}'""", False),
        (PBS, "7.head", "head", """echo '{"Jobs":{"7.head":{"job_state":"F"}}}'""", True),
        (PBS, "7.head", "head", "echo 'qstat: Unknown Job Id 7.head' >&2; exit 153", True),
        (PBS, "7.head", "head", "echo 'qstat: 7.head Job has finished, use' >&2; exit 35", True),
        (PBS, "7.head", "head", "echo 'qstat: cannot connect to server' >&2; exit 111", None),
        (PBS, "7.head", "head", "echo nonsense", None),
        (PBS, "7.other", "other", "exit 153", None),
        ({"LSB_JOBID": "9"}, "7", "", "true", None),
        ({}, "7", "alps", "true", None),
    ],
)
def test_what_the_commands_say(
    tmp_path: Path,
    environ: dict[str, str],
    job: str,
    cluster: str,
    prints: str,
    gone: bool | None,
) -> None:
    for name in ("squeue", "qstat"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{prints}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path["PATH"])
        assert job_is_gone(job, cluster, environ | path) is gone
