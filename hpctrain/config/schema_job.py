"""The config's `[job]`: what `python -m hpctrain job` asks of a batch system.

Plain data, a part of `hpctrain.config.schema`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from annotated_types import Gt

from hpctrain.config.value_types import Count, CountOrNever, Text

Scheduler = Literal["slurm", "lsf", "pbs", "flux"]
SCHEDULERS: tuple[str, ...] = get_args(Scheduler)
Container = Literal["apptainer", "pyxis", "podman-hpc", "shifter"]
CONTAINERS: tuple[str, ...] = get_args(Container)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSection:
    """What `python -m hpctrain job` asks of the batch system; its options count before these keys.

    It is no part of the run: neither the run folder nor a checkpoint holds it.
    """

    site: Text | None = None
    """A machine that hpctrain knows, or one of a site file; `job --sites` lists them."""

    site_file: Text | None = None
    """A site file of one's own."""

    scheduler: Scheduler | None = None
    """Of a cluster that is no known site."""

    account: Text | None = None
    """Whom the time is charged to."""

    queue: Text | None = None
    """Partition or queue; none: the site's usual one."""

    qos: Text | None = None
    """Quality of service, of Slurm."""

    constraint: Text | None = None
    """What the nodes have to have, as the scheduler puts it: "gpu&hbm80g", "system=polaris"."""

    memory: Text | None = None
    """Host memory of each node, such as "64G"; none: what the site gives."""

    mail: Text | None = None
    """Address that the scheduler writes to when a job ends or fails."""

    nodes: Count | None = None
    """Number of nodes."""

    time: Text | None = None
    """Limit of each job, hours:minutes:seconds."""

    ranks_per_node: Count | None = None
    """Ranks of each node; none: one a GPU."""

    cpus_per_rank: Count | None = None
    """CPUs of each rank; none: those of a node, shared out."""

    gpus_per_node: CountOrNever | None = None
    """GPUs of each node; 0: train on CPUs."""

    directives: tuple[str, ...] = ()
    """Further options for the scheduler, one a line, such as "--reservation=gpu_hack"."""

    setup: tuple[str, ...] = ()
    """Lines of bash that come before Python is looked for, such as "module load pytorch/2.8"."""

    env: dict[str, str] = field(default_factory=dict)
    """Variables of the job and all its ranks."""

    environment: Text | None = None
    """An image (.sif), or a packed environment (.tar.gz) that every node gets a copy of."""

    conda: Text | None = None
    """Name or path of a conda environment."""

    venv: Text | None = None
    """Path of a virtual environment; none: .venv, where there is one."""

    modules: tuple[str, ...] = ()
    """Modules of the site that bring Python or what it needs."""

    container: Container | None = None
    """What runs `image`."""

    image: Text | None = None
    """File or address of an image, as `container` knows it."""

    binds: tuple[str, ...] = ()
    """Folders that the image sees, "/outside" or "/outside:/inside", beside those of the run."""

    max_jobs: Count = 50
    """Jobs of the run at most, one submitted by the other."""

    max_node_hours: Annotated[float, Gt(0)] | None = None
    """Node-hours that all jobs of the run may take together, each at its limit."""

    throttle: Count | None = None
    """Points of a sweep that may run at once; none: as many as the site lets."""
