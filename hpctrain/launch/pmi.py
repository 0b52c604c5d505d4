"""What a process manager left in the environment for the MPI library, checked before MPI_Init.

Where a library cannot speak to the process manager, MPI_Init aborts or waits for ever, and leaves
no room for a message of ours.
"""

from __future__ import annotations

import os
import stat

from hpctrain.errors import LaunchError
from hpctrain.launch.launchers import Environment
from hpctrain.launch.table import Launcher

_PMIX_OF_SLURM = "slurm.pmix."


def check_process_manager(launcher: Launcher, env: Environment, version: str) -> None:
    """Check that the variables of the process manager are this process's and the library's own.

    Args:
        launcher: what started this process.
        env: its environment.
        version: all that MPI_Get_library_version says.

    Raises:
        LaunchError: if they are another step's, or of a kind that the library cannot speak.
    """
    if launcher.name == "srun":
        _check_step(env)
    # MPICH tells how it was built; what is derived from it does not.
    built = next((line for line in version.splitlines() if "MPICH configure" in line), None)
    if built is not None and "pmix" not in built and "PMIX_RANK" in env and "PMI_RANK" not in env:
        raise LaunchError(
            f"{launcher.label} speaks PMIx to this process, and the MPICH that mpi4py is bound to "
            "was built without. Start it as srun --mpi=pmi2, or bind mpi4py to an MPI that speaks "
            "PMIx: the site's module, or MPI4PY_LIBMPI=/path/to/libmpi.so.",
            everywhere=True,
        )


def check_descriptor(launcher: Launcher, env: Environment) -> None:
    """Check that the connection to the process manager is there: a rank's children have none.

    Python closes it in what it starts, and MPI_Init would write into whatever has its number now.

    Raises:
        LaunchError: if it is not.
    """
    text = env.get("PMI_FD", "")
    speaks_pmi = launcher.rank[0] == "PMI_RANK" or launcher.name == "srun"
    if not speaks_pmi or "PMIX_RANK" in env or not text.isdecimal():
        return
    try:
        if stat.S_ISSOCK(os.fstat(int(text)).st_mode):
            return
        what = "is something else here"
    except OSError:
        what = "is closed here"
    raise LaunchError(
        f"PMI_FD={text}, the connection to the process manager, {what}: the variables of a rank "
        "were inherited by a process that is none. Start it without them: env -u PMI_FD "
        "-u PMI_RANK -u PMI_SIZE ..."
    )


def _check_step(env: Environment) -> None:
    """Compare the step that the process manager names with the one that this process is in.

    sbatch hands the whole environment on: a job that is submitted by a rank has that rank's
    SLURM_STEP_ and PMI variables in its script, and in every step but for what srun overwrites.
    """
    namespace = env.get("PMIX_NAMESPACE", "")
    named = {
        "PMI_JOBID": env.get("PMI_JOBID"),
        "PMIX_NAMESPACE": namespace if namespace.startswith(_PMIX_OF_SLURM) else None,
    }
    job, step = env.get("SLURM_JOB_ID"), env["SLURM_STEP_ID"]
    told = {
        variable: value.removeprefix(_PMIX_OF_SLURM)
        for variable, value in named.items()
        if value is not None
    }
    # Cray's plugin names the job alone; the parts of a heterogeneous job have several ids.
    ours = (job, f"{job}.{step}")
    if job is None or "SLURM_HET_SIZE" in env or not told or any(v in ours for v in told.values()):
        return
    variable, other = next(iter(told.items()))
    raise LaunchError(
        f"this is step {job}.{step} of Slurm, but {variable} is of step {other}: the variables of "
        "another step were inherited by this job. Submit jobs from within a step by sbatch "
        "--export=NONE, or say in the script, before anything is started: "
        "unset ${!PMI*} ${!SLURM_STEP*}.",
        everywhere=True,
    )
