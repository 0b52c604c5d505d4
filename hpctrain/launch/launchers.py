"""The launchers that hpctrain knows: a table, one row each, of how a process learns its place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """How a process learns its place from one launcher.

    Attributes:
        markers: variables that are all set in its processes, and together in nobody else's.
        rank, world_size, local_rank, local_world_size: the variables that may hold each value;
            the first one that is set counts.
        mpi_families: families of MPI libraries that can join its world; empty: no MPI at all.
        processes: executables, or scripts of an interpreter, that start its ranks. Of several rows
            that have one name the first counts.
        foreign: variables that in its processes are another launcher's, and confuse MPI_Init.
        sets_size: whether it always sets one of `world_size`; otherwise only MPI knows.
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
    processes: frozenset[str] = frozenset()
    foreign: tuple[str, ...] = ()
    sets_size: bool = True
    fix: str = ""


MPICH_ABI = frozenset({"mpich", "intel", "mvapich", "cray"})
OPEN_MPI = frozenset({"openmpi", "spectrum"})

_HYDRA = frozenset({"hydra_pmi_proxy", "hydra_bstrap_proxy", "pmi_proxy"})
# Hydra's has a proxy between itself and each rank: below these two names there is none.
_MPIRUN = frozenset({"mpirun", "mpiexec", "mpirun.openmpi", "mpiexec.openmpi"})

# The likeliest innermost launcher comes first: mpirun inside an srun step or a batch job inherits
# the variables of Slurm, torchrun started by srun those of the step, and so on. Of rows that read
# the rank from the same variable the one that knows most comes first.
LAUNCHERS = (
    Launcher(
        name="torchrun",
        label="torchrun",
        markers=("TORCHELASTIC_RUN_ID", "RANK"),
        rank=("RANK",),
        world_size=("WORLD_SIZE",),
        local_rank=("LOCAL_RANK",),
        local_world_size=("LOCAL_WORLD_SIZE",),
        processes=frozenset(
            {
                "pt_elastic",
                "torchrun",
                "torch.distributed.run",
                "torch.distributed.launch",
                "accelerate",
                "accelerate.commands.launch",
            }
        ),
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
        processes=frozenset({"jsmd", "jskd"}),
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
        # Open MPI 4 and Spectrum fork the ranks of the head node from mpirun itself, a link to
        # orterun, or a copy of it.
        processes=frozenset(
            {"prterun", "prted", "prte", "orterun", "orted", "oshrun", "shmemrun", *_MPIRUN}
        ),
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
        processes=_HYDRA | {"mpispawn"},
        foreign=("PMIX_NAMESPACE",),
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
        processes=frozenset({"flux-shell"}),
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
        processes=_HYDRA,
        foreign=("PMIX_NAMESPACE",),
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
        processes=_HYDRA,
        foreign=("PMIX_NAMESPACE",),
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
        processes=frozenset({"slurmstepd"}),
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
        processes=frozenset({"palsd"}),
        sets_size=False,
        fix="load the site's Cray MPICH or MPICH module, and its mpi4py or MPI4PY_LIBMPI",
    ),
    # Cray's ALPS on XC and XE systems gives the rank alone, and PMI by files.
    # Source: libfabric, prov/gni/test; HPX, its parcelport's variables. Not seen on a cluster.
    Launcher(
        name="alps",
        label="aprun",
        markers=("ALPS_APP_PE",),
        rank=("ALPS_APP_PE",),
        world_size=(),
        mpi_families=MPICH_ABI,
        processes=frozenset({"apinit"}),
        sets_size=False,
        fix="load the site's Cray MPICH module, and its mpi4py or MPI4PY_LIBMPI",
    ),
    # PRRTE's own prterun and prun: PMIx without Open MPI's variables.
    Launcher(
        name="prrte",
        label="PRRTE's prterun",
        markers=("PMIX_RANK", "PMIX_NAMESPACE"),
        rank=("PMIX_RANK",),
        world_size=(),
        mpi_families=MPICH_ABI | OPEN_MPI,
        processes=frozenset({"prterun", "prted", "prte"}),
        sets_size=False,
        fix="start the job with the mpirun of the bound library, or bind mpi4py to a library that "
        "speaks PMIx, such as Open MPI",
    ),
    # MPICH's simpler launchers, such as mpiexec.gforker, and others that speak its protocol.
    Launcher(
        name="pmi",
        label="a PMI launcher",
        markers=("PMI_RANK", "PMI_SIZE"),
        rank=("PMI_RANK",),
        world_size=("PMI_SIZE",),
        local_rank=("PMI_LOCAL_RANK",),
        local_world_size=("PMI_LOCAL_SIZE",),
        mpi_families=MPICH_ABI,
        processes=frozenset({"mpiexec.gforker", "mpiexec.remshell", *_MPIRUN}),
        foreign=("PMIX_NAMESPACE",),
        fix="bind mpi4py to MPICH or Intel MPI: load its module, or set "
        "MPI4PY_LIBMPI=/path/to/libmpi.so.12",
    ),
    # Source: https://github.com/kubeflow/training-operator,
    # pkg/controller.v1/pytorch/envvar.go and elastic.go.
    Launcher(
        name="kubeflow",
        label="Kubeflow's PyTorchJob",
        markers=("PET_NNODES", "RANK", "WORLD_SIZE"),
        rank=("RANK",),
        world_size=("WORLD_SIZE",),
    ),
    # torchrun's variables without torchrun.
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


def library_name(version: str) -> str:
    """Return name and version from what MPI_Get_library_version says, such as "MPICH 5.0.2".

    MPICH goes on with lines about its build, Open MPI with its package and commit.
    """
    first = version.strip("\0 \n").splitlines()[0]
    words = first.replace("Version:", " ").split(",")[0].split()
    return " ".join(word for word in words if word not in ("Library", "Version"))


def library_family(library: str) -> str:
    """Return the family of an MPI library from its version string, "unknown" if it has none.

    Source: the first words of MPI_Get_library_version of each implementation.
    """
    for words, family in (
        ("Spectrum MPI", "spectrum"),
        ("Open MPI", "openmpi"),
        ("Intel(R) MPI", "intel"),
        ("MVAPICH", "mvapich"),
        ("CRAY MPICH", "cray"),
        ("MPICH", "mpich"),
    ):
        if words.lower() in library.lower():
            return family
    return "unknown"
