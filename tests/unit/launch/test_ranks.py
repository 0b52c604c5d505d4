"""The environment of a rank's helpers: nothing of a world, all of the job."""

from __future__ import annotations

import pytest

from hpctrain.launch.environment import detect, without_rank
from hpctrain.launch.launchers import LAUNCHERS


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.name)
def test_no_launcher_is_seen_any_more(launcher: object) -> None:
    row = LAUNCHERS[LAUNCHERS.index(launcher)]  # type: ignore[arg-type]
    told = (*row.markers, *row.rank, *row.world_size, *row.local_rank, *row.local_world_size)
    env = dict.fromkeys(told, "1")
    assert detect(without_rank(env)).launcher is None
    assert without_rank(env) == {}


def test_what_tools_of_the_job_need_stays() -> None:
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_CONF": "/etc/slurm.conf",
        "LSB_JOBID": "3",
        "PBS_JOBID": "4",
        "OMP_NUM_THREADS": "2",
        "PATH": "/bin",
    }
    protocols = {"PMI_FD": "9", "PMIX_SERVER_URI41": "x", "OMPI_MCA_ess": "y", "SLURM_PROCID": "0"}
    assert without_rank(job | protocols) == job
