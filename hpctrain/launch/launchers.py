"""Who started this process, and which place in which world that launcher claims.

A pure function of the environment over a table, one row a launcher. A claim is not believed: where
MPI is there, `hpctrain.launch.discovery` compares it with MPI's own world before anything else
communicates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hpctrain.errors import LaunchError

Environment = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """How one launcher tells a process its place.

    Attributes:
        markers: variables that are all set in its processes, and together in nobody else's.
        rank, world_size, local_rank, local_world_size: the variables that may hold each value;
            the first one that is set counts.
        mpi_families: families of MPI libraries that can join its world; empty: no MPI at all.
        fix: what to do when MPI does not see the world that this launcher claims.
    """

    name: str
    label: str
    markers: tuple[str, ...]
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...] = ()
    local_world_size: tuple[str, ...] = ()
    mpi_families: frozenset[str] = frozenset()
    fix: str = ""


MPICH_ABI = frozenset({"mpich", "intel", "mvapich", "cray"})
OPEN_MPI = frozenset({"openmpi", "spectrum"})

# The innermost launcher comes first: mpirun inside an srun step or a batch job inherits the
# variables of Slurm, torchrun started by srun those of the step, and so on.
LAUNCHERS = (
    Launcher(
        name="torchrun",
        label="torchrun",
        markers=("TORCHELASTIC_RUN_ID", "RANK"),
        rank=("RANK",),
        world_size=("WORLD_SIZE",),
        local_rank=("LOCAL_RANK",),
        local_world_size=("LOCAL_WORLD_SIZE",),
    ),
    # Before Open MPI: Spectrum MPI's processes under jsrun carry OMPI_ variables too.
    Launcher(
        name="jsrun",
        label="jsrun",
        markers=("JSM_NAMESPACE_RANK",),
        rank=("JSM_NAMESPACE_RANK",),
        world_size=("JSM_NAMESPACE_SIZE",),
        local_rank=("JSM_NAMESPACE_LOCAL_RANK",),
        local_world_size=("JSM_NAMESPACE_LOCAL_SIZE",),
        mpi_families=OPEN_MPI,
        fix="load the site's Spectrum MPI module (module load spectrum-mpi)",
    ),
    Launcher(
        name="openmpi",
        label="Open MPI's mpirun",
        markers=("OMPI_COMM_WORLD_RANK",),
        rank=("OMPI_COMM_WORLD_RANK",),
        world_size=("OMPI_COMM_WORLD_SIZE",),
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_world_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        mpi_families=OPEN_MPI,
        fix="start the job with the mpirun of the bound library, or bind mpi4py to Open MPI: "
        "load its module, or set MPI4PY_LIBMPI=/path/to/libmpi.so",
    ),
    Launcher(
        name="mvapich2",
        label="MVAPICH2's mpirun",
        markers=("MV2_COMM_WORLD_RANK",),
        rank=("MV2_COMM_WORLD_RANK",),
        world_size=("MV2_COMM_WORLD_SIZE",),
        local_rank=("MV2_COMM_WORLD_LOCAL_RANK",),
        local_world_size=("MV2_COMM_WORLD_LOCAL_SIZE",),
        mpi_families=MPICH_ABI,
        fix="bind mpi4py to MVAPICH2: load its module, or set MPI4PY_LIBMPI=/path/to/libmpi.so",
    ),
    # Flux sets PMI_ variables too, for its own PMI server, and those of PALS for Cray MPICH.
    Launcher(
        name="flux",
        label="flux run",
        markers=("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
        rank=("FLUX_TASK_RANK",),
        world_size=("FLUX_JOB_SIZE",),
        local_rank=("FLUX_TASK_LOCAL_ID",),
        mpi_families=MPICH_ABI | OPEN_MPI,
        fix="start it as: flux run -o mpi=... with the plugin of the bound library",
    ),
    Launcher(
        name="intelmpi",
        label="Intel MPI's mpirun",
        markers=("PMI_RANK", "MPI_LOCALRANKID", "I_MPI_HYDRA_UUID"),
        rank=("PMI_RANK",),
        world_size=("PMI_SIZE",),
        local_rank=("MPI_LOCALRANKID",),
        local_world_size=("MPI_LOCALNRANKS",),
        mpi_families=MPICH_ABI,
        fix="start the job with the mpirun of the bound library, or bind mpi4py to Intel MPI: "
        "load its module, or set MPI4PY_LIBMPI=/path/to/libmpi.so.12",
    ),
    Launcher(
        name="mpich",
        label="MPICH's mpirun",
        markers=("PMI_RANK", "MPI_LOCALRANKID"),
        rank=("PMI_RANK",),
        world_size=("PMI_SIZE",),
        local_rank=("MPI_LOCALRANKID",),
        local_world_size=("MPI_LOCALNRANKS",),
        mpi_families=MPICH_ABI,
        fix="start the job with the mpirun of the bound library, or bind mpi4py to MPICH: "
        "load its module, or set MPI4PY_LIBMPI=/path/to/libmpi.so.12",
    ),
    # Without SLURM_STEP_ID it is a batch or interactive shell, whose SLURM_NTASKS is no world.
    Launcher(
        name="srun",
        label="srun",
        markers=("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        rank=("SLURM_PROCID",),
        world_size=("SLURM_STEP_NUM_TASKS",),
        local_rank=("SLURM_LOCALID",),
        mpi_families=MPICH_ABI | OPEN_MPI,
        fix="start it as srun --mpi=pmi2 (MPICH, Intel MPI), --mpi=pmix (Open MPI) or "
        "--mpi=cray_shasta (Cray MPICH); srun --mpi=list shows what this site has",
    ),
    # After srun: with --mpi=cray_shasta that sets PALS_ variables too, an older one without a size.
    Launcher(
        name="pals",
        label="PALS mpiexec",
        markers=("PALS_RANKID",),
        rank=("PALS_RANKID",),
        world_size=("PMI_SIZE",),
        local_rank=("PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"),
        local_world_size=("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
        mpi_families=MPICH_ABI,
        fix="load the site's Cray MPICH or MPICH module, and its mpi4py or MPI4PY_LIBMPI",
    ),
    # torchrun's variables without torchrun: Kubeflow's PyTorchJob, or set by hand.
    Launcher(
        name="environment",
        label="RANK and WORLD_SIZE in the environment",
        markers=("RANK", "WORLD_SIZE"),
        rank=("RANK",),
        world_size=("WORLD_SIZE",),
        local_rank=("LOCAL_RANK",),
        local_world_size=("LOCAL_WORLD_SIZE",),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a launcher says about this process; None is a value that it does not tell.

    Attributes:
        launcher: the row of the table; None: no launcher, this is one process.
        reasons: the variable behind each value.
    """

    launcher: Launcher | None
    rank: int | None
    world_size: int | None
    local_rank: int | None = None
    local_world_size: int | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs_mpi(self) -> bool:
        return self.launcher is not None and bool(self.launcher.mpi_families)


def detect(env: Environment) -> Claim:
    """Return what the innermost launcher claims.

    Raises:
        LaunchError: if a variable that it must set is missing or is no sensible number.
    """
    for launcher in LAUNCHERS:
        if all(marker in env for marker in launcher.markers):
            return _claim(launcher, env)
    if "NODE_RANK" in env and "WORLD_SIZE" in env:
        raise LaunchError(
            f"NODE_RANK={env['NODE_RANK']} and WORLD_SIZE={env['WORLD_SIZE']} are set, RANK is "
            "not: where WORLD_SIZE counts nodes, the rank of a process is unknown. Set RANK and "
            "WORLD_SIZE for every process (WORLD_SIZE = nodes x processes per node), or start "
            "with torchrun --nnodes ... --node-rank $NODE_RANK."
        )
    if "RANK" in env or "WORLD_SIZE" in env:
        there, missing = ("RANK", "WORLD_SIZE") if "RANK" in env else ("WORLD_SIZE", "RANK")
        raise LaunchError(
            f"{there}={env[there]} is set, {missing} is not. Set both for every process, or "
            f"unset {there} to train in one process."
        )
    return _one_process("no launcher in the environment")


def _one_process(reason: str) -> Claim:
    return Claim(
        launcher=None,
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        reasons={"rank": reason, "world_size": reason},
    )


def _claim(launcher: Launcher, env: Environment) -> Claim:
    values: dict[str, int | None] = {}
    reasons: dict[str, str] = {}
    for name in ("rank", "world_size", "local_rank", "local_world_size"):
        variable = next((key for key in getattr(launcher, name) if key in env), None)
        values[name] = None if variable is None else _number(launcher, env, variable)
        if variable is not None:
            reasons[name] = f"{variable}={env[variable]}"
    rank, world_size = values["rank"], values["world_size"]
    if rank is None or (world_size is None and not launcher.mpi_families):
        missing = launcher.rank[0] if rank is None else launcher.world_size[0]
        raise LaunchError(f"{launcher.label} started this process, but {missing} is not set.")
    for part, whole in (("rank", "world_size"), ("local_rank", "local_world_size")):
        inner, outer = values[part], values[whole]
        if outer is not None and (outer < 1 or (inner is not None and inner >= outer)):
            raise LaunchError(
                f"{launcher.label} started this process, but {reasons.get(part, part)} and "
                f"{reasons[whole]} contradict each other: {part} has to be below {whole}. "
                "Are variables of another job still set in this shell?"
            )
    if launcher.name == "srun" and world_size == 1:
        # So does every shell of `srun --pty` look, and what is started in it by hand.
        return _one_process("a Slurm step of one task")
    return Claim(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=values["local_rank"],
        local_world_size=values["local_world_size"],
        reasons=reasons,
    )


def _number(launcher: Launcher, env: Environment, variable: str) -> int:
    text = env[variable]
    if not text.strip().isdecimal():
        raise LaunchError(
            f"{launcher.label} started this process, but {variable}={text!r} is not a whole "
            "number from 0. Are variables of another job still set in this shell?"
        )
    return int(text)
