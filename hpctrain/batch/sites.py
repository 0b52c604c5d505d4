"""What the big sites want in a job script: a table, one row a site, each line with its reason.

Limits are those of the queue that is named here, as the source of the site gave them in 2025;
another `--queue` has its own. The site's scheduler has the last word on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpctrain.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Because:
    """A line of a script, and why it is there."""

    line: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Jobs of at most so many nodes may take at most so many hours."""

    nodes: int
    hours: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One machine.

    Attributes:
        source: documents that its lines and limits were taken from.
        queue: partition, queue or quality of service that its limits are of.
        queue_option: option that names it to the scheduler.
        gpus_per_node: number that the scheduler is asked for; None: in the site's own `directives`.
        directives: lines for the scheduler, without their prefix; {nodes} is the number of nodes.
        modules: commands that bring what NCCL or RCCL lacks, to ranks that run in no image.
        image_modules: the same for ranks in an image.
        exports: variables, without the word export.
        launcher: options of the launcher that bind ranks; {cpus} is the CPUs of a rank.
        limits: hours by number of nodes, ascending; the first that holds a job counts; empty: not
            known.
        fewest_nodes: smallest number of nodes that a job of its queue may have.
        container_gpus: option of Apptainer that brings the GPUs into a container; empty: none.
    """

    name: str
    title: str
    source: str
    scheduler: str
    queue: str | None
    queue_option: str = ""
    ranks_per_node: int
    cpus_per_rank: int
    gpus_per_node: int | None
    directives: tuple[Because, ...] = ()
    modules: tuple[Because, ...] = ()
    image_modules: tuple[Because, ...] = ()
    exports: tuple[Because, ...] = ()
    launcher: Because | None = None
    notes: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()
    fewest_nodes: int = 1
    container_gpus: str = "--nv"


_MIOPEN = (
    Because(
        line="MIOPEN_USER_DB_PATH; MIOPEN_USER_DB_PATH=/tmp/miopen-$SLURM_JOB_ID-"
        "$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')",
        reason="MIOpen keeps a database of kernels, which needs file locks: not on Lustre. "
        "Nobody can have prepared a folder of this name.",
    ),
    Because(
        line="MIOPEN_CUSTOM_CACHE_DIR=$MIOPEN_USER_DB_PATH",
        reason="The same for its compiled kernels: node-local, and gone with the job.",
    ),
)

_WAY = "hpctrain check names the way that is taken, and warns of plain sockets."

SITES = (
    Site(
        name="perlmutter",
        title="Perlmutter at NERSC, GPU nodes (4 A100 each)",
        source="docs.nersc.gov: systems/perlmutter/running-jobs, jobs/policy",
        scheduler="slurm",
        queue="regular",
        queue_option="--qos",
        ranks_per_node=4,
        cpus_per_rank=32,
        gpus_per_node=4,
        directives=(Because(line="--constraint=gpu", reason="The GPU nodes, not the CPU ones."),),
        exports=(
            Because(
                line="FI_MR_CACHE_MONITOR=userfaultfd",
                reason="With Libfabric's default monitor of registered memory NCCL can hang.",
            ),
            Because(
                line="HDF5_USE_FILE_LOCKING=FALSE",
                reason="HDF5 refuses to open files where the file system does not lock.",
            ),
        ),
        limits=(Limit(nodes=1792, hours=48),),
        notes=(
            # Source: job scripts of NERSC's users, 2024 to 2026; no page of NERSC itself was found.
            "NCCL reaches Slingshot by its plug-in aws-ofi-nccl alone, which is in NERSC's modules",
            "pytorch/... and nccl/...: load nccl/VERSION-cu12 or -cu13, by the CUDA of your torch,",
            "before you submit. Under Shifter: --module=gpu,nccl-plugin.",
            _WAY,
        ),
    ),
    Site(
        name="frontier",
        container_gpus="--rocm",
        title="Frontier at OLCF (8 GCDs of MI250X a node)",
        source="docs.olcf.ornl.gov: systems/frontier_user_guide",
        scheduler="slurm",
        queue="batch",
        queue_option="--partition",
        ranks_per_node=8,
        cpus_per_rank=7,
        gpus_per_node=None,
        directives=(
            Because(
                line="--network=disable_rdzv_get",
                reason="The plug-in for RCCL below sends large messages by a protocol of its own, "
                "alt_read.",
            ),
        ),
        # Source: docs.olcf.ornl.gov, software/analytics/pytorch_frontier, as of 2026 (cpe/26.03).
        modules=(
            Because(
                line="[[ ${LOADEDMODULES:-} == *rocm/* ]] || module load rocm",
                reason="RCCL reaches Slingshot by a plug-in alone, else it takes plain sockets. "
                "Its module wants ROCm's before it: yours, if you have loaded one.",
            ),
            Because(
                line="module load rccl-net-plugin",
                reason="The plug-in, and what libfabric has to be told for it.",
            ),
        ),
        exports=(
            Because(
                line="NCCL_SOCKET_IFNAME=hsn0",
                reason="RCCL is to meet over Slingshot, not over the management network.",
            ),
            *_MIOPEN,
        ),
        launcher=Because(
            line="--gpus-per-task=1 --gpu-bind=closest",
            reason="Each rank gets the GCD beside its cores, as its only one. Seven cores a rank: "
            "the eighth of every die is the system's.",
        ),
        limits=(Limit(nodes=91, hours=2), Limit(nodes=183, hours=6), Limit(nodes=9472, hours=12)),
        notes=(
            "For data.stage: with --constraint=nvme every node has a disk at /mnt/bb/$USER.",
            "An image has to bring RCCL's plug-in for Slingshot itself: aws-ofi-nccl, or, before",
            "ROCm 7, aws-ofi-rccl.",
            _WAY,
        ),
    ),
    Site(
        name="summit",
        title="Summit at OLCF (6 V100 a node)",
        source="docs.olcf.ornl.gov: systems/summit_user_guide",
        scheduler="lsf",
        queue="batch",
        queue_option="-q",
        ranks_per_node=6,
        cpus_per_rank=7,
        gpus_per_node=None,
        directives=(
            Because(line="-nnodes {nodes}", reason="Summit counts nodes, not slots."),
            Because(
                line='-alloc_flags "gpumps smt1"',
                reason="One thread a core; MPS lets ranks of other resource sets share a GPU.",
            ),
        ),
        launcher=Because(
            line="jsrun -n {ranks} -r {ranks_per_node} -a 1 -g 1 -c {cpus} -brs",
            reason="A resource set a rank: 1 task, 1 GPU and its cores, bound to the set.",
        ),
        notes=(
            "Summit was switched off at the end of 2024: this is for machines like it.",
            "The script itself runs on a launch node, jsrun's ranks on the compute nodes.",
        ),
        limits=(
            Limit(nodes=45, hours=2),
            Limit(nodes=91, hours=6),
            Limit(nodes=921, hours=12),
            Limit(nodes=4608, hours=24),
        ),
    ),
    Site(
        name="polaris",
        title="Polaris at ALCF (4 A100 a node)",
        source="docs.alcf.anl.gov: polaris/running-jobs",
        scheduler="pbs",
        queue="prod",
        queue_option="-q",
        ranks_per_node=4,
        cpus_per_rank=8,
        gpus_per_node=None,
        directives=(
            Because(line="-l select={nodes}:system=polaris", reason="Whole nodes of Polaris."),
            Because(line="-l place=scatter", reason="Each chunk on a node of its own."),
            Because(
                line="-l filesystems=home:eagle",
                reason="The job waits while one of these is down, instead of failing on it.",
            ),
        ),
        # Source: docs.alcf.anl.gov, polaris/applications-and-libraries/libraries/nccl, of 2024-10.
        # NCCL_NET is left out: with a plug-in of another name NCCL would not start.
        exports=(
            Because(
                line="LD_LIBRARY_PATH=/soft/libraries/aws-ofi-nccl/v1.9.1-aws/lib:"
                "/soft/libraries/hwloc/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}",
                reason="NCCL reaches Slingshot by its plug-in aws-ofi-nccl alone, else it takes "
                "plain sockets. The site's module conda sets this and what follows itself.",
            ),
            Because(
                line="NCCL_NET_GDR_LEVEL=PHB",
                reason="GPUs send to the network by themselves, not by way of host memory.",
            ),
            Because(line="NCCL_CROSS_NIC=1", reason="Rings may change the card between nodes."),
            Because(
                line="FI_MR_CACHE_MONITOR=userfaultfd",
                reason="With Libfabric's default monitor of registered memory NCCL can hang.",
            ),
            Because(
                line="FI_CXI_DISABLE_HOST_REGISTER=1",
                reason="Registering host memory with CUDA can deadlock beside NCCL.",
            ),
            Because(
                line="FI_CXI_DEFAULT_CQ_SIZE=131072",
                reason="The default queue of completions is too short for many ranks.",
            ),
        ),
        launcher=Because(
            line="--depth {cpus} --cpu-bind depth",
            reason="Each rank is bound to its own cores, in the order of the ranks.",
        ),
        notes=(
            "Fewer than 10 nodes: --queue debug-scaling (1 h) or preemptable (72 h, no warning).",
            _WAY,
        ),
        limits=(Limit(nodes=24, hours=3), Limit(nodes=99, hours=6), Limit(nodes=496, hours=24)),
        fewest_nodes=10,
    ),
    Site(
        name="aurora",
        container_gpus="",
        title="Aurora at ALCF (2 x 52 cores, 12 GPU tiles a node)",
        source="docs.alcf.anl.gov: aurora/running-jobs-aurora, data-science/frameworks/oneCCL",
        scheduler="pbs",
        queue="prod",
        queue_option="-q",
        ranks_per_node=12,
        cpus_per_rank=8,
        gpus_per_node=None,
        directives=(
            Because(line="-l select={nodes}", reason="Whole nodes."),
            Because(line="-l place=scatter", reason="Each chunk on a node of its own."),
            Because(
                line="-l filesystems=home:flare",
                reason="The job waits while one of these is down, instead of failing on it.",
            ),
        ),
        exports=(
            Because(
                line="TMPDIR=/tmp",
                reason="The site's own is so long that paths of sockets in it exceed 107 bytes.",
            ),
            Because(
                line="CCL_PROCESS_LAUNCHER=pmix",
                reason="oneCCL, the carrier of the backend xccl, finds its ranks by PALS's PMIx.",
            ),
            Because(line="CCL_ATL_TRANSPORT=mpi", reason="oneCCL talks between nodes by MPI."),
        ),
        launcher=Because(
            line="--cpu-bind list:1-8:9-16:17-24:25-32:33-40:41-48:"
            "53-60:61-68:69-76:77-84:85-92:93-100",
            reason="A rank a GPU tile, on its socket; cores 0 and 52 are the system's.",
        ),
        notes=("The ranks compute on torch's device xpu, over its backend xccl, if it has them.",),
        limits=(
            Limit(nodes=512, hours=6),
            Limit(nodes=1024, hours=12),
            Limit(nodes=1919, hours=18),
            Limit(nodes=10624, hours=24),
        ),
    ),
    Site(
        name="lumi",
        container_gpus="--rocm",
        title="LUMI-G at CSC (8 GCDs of MI250X a node)",
        source="docs.lumi-supercomputer.eu: runjobs/scheduled-jobs; the LUMI AI guide",
        scheduler="slurm",
        queue="standard-g",
        queue_option="--partition",
        ranks_per_node=8,
        cpus_per_rank=7,
        gpus_per_node=8,
        image_modules=(
            Because(
                line="module use /appl/local/laifs/modules",
                reason="The site's own place for modules of images.",
            ),
            Because(
                line="module load lumi-aif-singularity-bindings",
                reason="What an image has to see of the node, its network above all.",
            ),
        ),
        exports=(
            Because(
                line="NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3",
                reason="RCCL is to meet over Slingshot, by any of its four interfaces.",
            ),
            Because(
                line="NCCL_NET_GDR_LEVEL=3",
                reason="GPUs send to the network by themselves, not by way of host memory.",
            ),
            Because(
                line="FI_MR_CACHE_MONITOR=userfaultfd",
                reason="With Libfabric's default monitor of registered memory RCCL can hang.",
            ),
            *_MIOPEN,
        ),
        launcher=Because(
            line='"--cpu-bind=mask_cpu:fe000000000000,fe00000000000000,fe0000,fe000000,fe,fe00,'
            'fe00000000,fe0000000000"',
            reason="GCD i is beside these cores of rank i; the first of a die is the system's.",
        ),
        limits=(Limit(nodes=1024, hours=48),),
        notes=(
            # Source: LUMI AI Guide, 05-multi-gpu-and-node, as of 2026; LUMI's EasyBuild recipes.
            "RCCL reaches Slingshot by its plug-in alone: aws-ofi-nccl, or, before ROCm 7,",
            "aws-ofi-rccl. The site's images have it (--environment IMAGE):",
            "/appl/local/laifs/containers/lumi-multitorch-*.sif. Without an image, build the",
            "module aws-ofi-rccl by EasyBuild, and load it before you submit.",
            _WAY,
        ),
    ),
    Site(
        name="juwels",
        title="JUWELS Booster at JSC (4 A100 a node)",
        source="scripts of its users; the limits are not verified",
        scheduler="slurm",
        queue="booster",
        queue_option="--partition",
        ranks_per_node=4,
        cpus_per_rank=12,
        gpus_per_node=4,
        notes=(
            "Host names with an i appended are those of the InfiniBand network.",
            "Nothing is to be set: hpctrain takes the first address that all nodes reach.",
        ),
        limits=(Limit(nodes=936, hours=24),),
    ),
    Site(
        name="della",
        title="Della at Princeton (2 A100 a node)",
        source="researchcomputing.princeton.edu: systems/della",
        scheduler="slurm",
        queue=None,
        ranks_per_node=2,
        cpus_per_rank=8,
        gpus_per_node=None,
        directives=(
            Because(
                line="--gres=gpu:2",
                reason="Both GPUs of a node, visible to both ranks: bound one to a task they could "
                "not copy to each other.",
            ),
        ),
        notes=("The limits are those of the quality of service that --time leads to: see qos.",),
    ),
)


def find_site(name: str) -> Site:
    """Return a site by its name.

    Raises:
        UsageError: if there is none.
    """
    for site in SITES:
        if site.name == name:
            return site
    known = ", ".join(site.name for site in SITES)
    raise UsageError(f"--site {name}: not known; known are {known}. Leave it out for a generic one")


def longest_hours(site: Site, nodes: int) -> float | None:
    """Return how long a job of so many nodes may take, None if it may not run at all."""
    return next((limit.hours for limit in site.limits if nodes <= limit.nodes), None)
