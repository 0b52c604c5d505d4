"""Which batch job a process belongs to, as its environment says."""

from __future__ import annotations

from typing import Any

import pytest

from hpctrain.checkpoint.lease_rules import this_holder
from hpctrain.utils.batch_job import BatchJob, batch_job, job_identity, lineage


@pytest.mark.parametrize(
    ("environ", "expected", "identity"),
    [
        ({}, None, None),
        ({"SLURM_JOB_ID": ""}, None, None),
        ({"SLURM_JOB_ID": "7"}, {"scheduler": "slurm", "id": "7"}, "slurm 7.0"),
        (
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "SLURM_CLUSTER_NAME": "alps"},
            {"scheduler": "slurm", "id": "7", "restart": 2, "cluster": "alps"},
            "slurm 7.2",
        ),
        (
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "often"},
            {"scheduler": "slurm", "id": "7"},
            "slurm 7.0",
        ),
        ({"LSB_JOBID": "8", "LSB_JOBINDEX": "0"}, {"scheduler": "lsf", "id": "8"}, "lsf 8.0"),
        (
            {"LSB_JOBID": "8", "LSB_JOBINDEX": "3"},
            {"scheduler": "lsf", "id": "8", "element": "3"},
            "lsf 8[3].0",
        ),
        # PBS names its server in the id.
        (
            {"PBS_JOBID": "9.head"},
            {"scheduler": "pbs", "id": "9.head", "cluster": "head"},
            "pbs 9.head.0",
        ),
    ],
)
def test_the_job_of_an_environment(
    environ: dict[str, str], expected: dict[str, Any] | None, identity: str | None
) -> None:
    job = None if expected is None else BatchJob(**expected)
    assert batch_job(environ) == job
    assert job_identity(environ) == identity
    # The lease names the same job, by the id that its scheduler's commands are asked with.
    holder = this_holder(environ)
    assert holder.job == (None if job is None else job.name)
    assert (holder.restart, holder.cluster) == ((job.restart, job.cluster) if job else (0, ""))


@pytest.mark.parametrize(
    ("attempt", "number"), [(None, 1), ("", 1), ("3", 3), ("0", 1), ("-2", 1), ("x", 1)]
)
def test_the_place_of_a_job_in_its_chain(attempt: str | None, number: int) -> None:
    environ = {"HPCTRAIN_TOKEN": "chain-1"}
    environ |= {} if attempt is None else {"HPCTRAIN_ATTEMPT": attempt}
    assert lineage(environ) == ("chain-1", number)
    assert lineage({}) == (None, 1)
