"""What a job asks for: the wishes of a command line over the config, and whether that can run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.batch.environments import KINDS, environment
from hpctrain.batch.job_script import Job
from hpctrain.batch.sites import Site, find_site, load_site, longest_hours
from hpctrain.batch.stop import reserve_seconds
from hpctrain.batch.sweep import Sweep
from hpctrain.config.schema import Config
from hpctrain.config.schema_job import SCHEDULERS, JobSection
from hpctrain.errors import ConfigError, UsageError

_TIME = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")

_RANKS, _CPUS_PER_RANK = 4, 8
"""Of a node of a cluster that is not known: one rank a GPU."""
_FIXED = ("mask_cpu:", "list:")
"""In a launcher's options: bindings that are written out for all ranks of a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What each node of a job has.

    Attributes:
        gpus: number that the scheduler is asked for; 0: none; None: the site's lines ask for them.
    """

    ranks: int
    cpus_per_rank: int
    gpus: int | None


def geometry(
    site: Site | None, *, ranks: int | None, cpus_per_rank: int | None, gpus: int | None
) -> Geometry:
    """Return the geometry of a node: one rank a GPU, and the CPUs shared among the ranks.

    Args:
        site: None: a cluster that is not known.
        ranks: ranks a node as asked for; None: what follows from the rest.
        cpus_per_rank: CPUs a rank, likewise.
        gpus: GPUs a node, likewise; 0: train on CPUs.

    Raises:
        UsageError: if the numbers contradict each other, or what the nodes of the site have.
    """
    if site is not None:
        _require_fitting(site, ranks, cpus_per_rank, gpus)
    usual_gpus = _RANKS if site is None else site.gpus_per_node
    if ranks is None:
        ranks = gpus or (_RANKS if site is None else site.ranks_per_node)
    if gpus is None:
        gpus = usual_gpus and ranks
    if gpus and ranks > gpus:
        raise UsageError(
            f"--ranks-per-node {ranks} --gpus-per-node {gpus}: a GPU carries one rank: take at "
            f"least {ranks} GPUs, or at most {gpus} ranks (--gpus-per-node 0 trains on CPUs)"
        )
    if cpus_per_rank is None:
        cpus_per_rank = _CPUS_PER_RANK
        if site is not None:
            cpus_per_rank = max(1, site.ranks_per_node * site.cpus_per_rank // ranks)
    return Geometry(ranks=ranks, cpus_per_rank=cpus_per_rank, gpus=gpus)


def _require_fitting(
    site: Site, ranks: int | None, cpus_per_rank: int | None, gpus: int | None
) -> None:
    """Check what is asked for against the nodes of a site."""
    usual = site.ranks_per_node
    line = "" if site.launcher is None else site.launcher.line
    if gpus is not None and site.gpus_per_node is None:
        raise UsageError(f"--gpus-per-node: a job on {site.name} asks for its GPUs by itself")
    if max(ranks or 0, gpus or 0) > usual and gpus != 0:
        raise UsageError(f"a node of {site.name} has {usual} GPUs, and carries {usual} ranks")
    if ranks not in (None, usual) and any(word in line for word in _FIXED):
        raise UsageError(
            f"--ranks-per-node {ranks}: the CPUs of {site.name} are bound to {usual} ranks by name"
        )
    cpus = usual * site.cpus_per_rank
    asked = (ranks or gpus or usual) * (cpus_per_rank or 1)
    if asked > cpus:
        raise UsageError(f"{asked} CPUs a node: {site.name} has {cpus} for the ranks of one")


def plan(config: Config, wishes: Mapping[str, Any], sweep: Sweep | None = None) -> Job:
    """Return the job that a command line asks for, over the config's [job] table.

    What both leave out the site knows.

    Args:
        config: of the run, or of one point of the sweep.
        wishes: options of the command line.
        sweep: what a job array trains; None: one run.

    Raises:
        UsageError: if the wishes contradict each other, or nodes or time are missing.
    """
    asked = _asked(config.job, wishes)
    site = site_of(asked)
    scheduler = asked["scheduler"] or (site.scheduler if site else None)
    if scheduler is None:
        raise UsageError(f"--scheduler is needed ({', '.join(SCHEDULERS)}), or --site")
    if site is not None and scheduler != site.scheduler:
        raise UsageError(f"--scheduler {scheduler}: {site.name} runs {site.scheduler}")
    for option in ("nodes", "time"):
        if asked[option] is None:
            raise UsageError(f"--{option} is needed, or {option} in the config's [job] table")
    _refuse_foreign(scheduler, site, asked)
    name = config.run.name
    node = geometry(
        site,
        ranks=asked["ranks_per_node"],
        cpus_per_rank=asked["cpus_per_rank"],
        gpus=asked["gpus_per_node"],
    )
    given = (
        *("account", "queue", "qos", "constraint", "memory", "mail"),
        *("max_jobs", "max_node_hours", "directives", "setup", "modules", "throttle"),
    )
    chosen = {key: asked[key] for key in given if asked[key] is not None}
    wanted = Job(
        command=(wishes["config"], *wishes["overrides"]),
        name=name,
        run_folder=str(Path(config.run.directory, name)),
        script=str(wishes["output"] or f"{name}.{site.name if site else scheduler}.sh"),
        scheduler=scheduler,
        site=site,
        nodes=asked["nodes"],
        seconds=parse_time(asked["time"]),
        ranks_per_node=node.ranks,
        cpus_per_rank=node.cpus_per_rank,
        gpus_per_node=node.gpus,
        env=tuple(asked["env"].items()),
        chain=wishes["chain"] or 1,
        environment=environment(config, wishes["config"], scheduler, asked),
        sweep=sweep,
        pack=wishes["pack"] or 1,
        **chosen,
    )
    _require_array(wanted)
    return wanted


def _require_array(job: Job) -> None:
    """Refuse what only a sweep has, and points that cannot share the nodes of a job.

    Raises:
        UsageError: naming what stands against it.
    """
    if job.sweep is None:
        if job.pack > 1:
            raise UsageError("--pack is for the points of a --sweep")
        return
    nodes, ranks, pack = job.nodes, job.ranks_per_node, job.pack
    launcher = job.site.launcher.line if job.site and job.site.launcher else ""
    if pack <= nodes:
        if nodes % pack:
            raise UsageError(f"--pack {pack}: {nodes} nodes cannot be shared out among {pack}")
        if pack > 1 and job.scheduler == "lsf" and launcher:
            raise UsageError(
                f"--pack {pack}: {job.name} is started by jsrun, which packs by itself"
            )
        return
    if job.scheduler != "slurm":
        raise UsageError(
            f"--pack {pack}: under {job.scheduler.upper()} each point has whole nodes: take at "
            f"least {pack} nodes, or --pack {nodes}"
        )
    if (nodes * ranks) % pack or pack % nodes:
        raise UsageError(
            f"--pack {pack}: {nodes} x {ranks} ranks cannot be shared out among {pack} points, "
            "each with as many ranks of one node"
        )
    if job.gpus_per_node is None or any(word in launcher for word in _FIXED):
        name = job.site.name if job.site else ""
        raise UsageError(
            f"--pack {pack}: GPUs and CPUs of {name} are bound to the ranks of a whole node: take "
            f"--pack {nodes}, or less"
        )
    if (job.gpus_per_node * nodes) % pack:
        raise UsageError(f"--pack {pack}: not a divisor of {job.gpus_per_node * nodes} GPUs")


def _asked(section: JobSection, wishes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is asked for: options count before keys, and lists of both are joined."""
    asked = dataclasses.asdict(section)
    if any(wishes[kind] is not None for kind in KINDS):
        asked |= dict.fromkeys(KINDS)
    if wishes["site"] or wishes["scheduler"] or wishes["site_file"]:
        asked |= dict.fromkeys(("site", "site_file", "scheduler"))
    for key, before in asked.items():
        wish = wishes[key]
        if isinstance(before, tuple):
            asked[key] = (*before, *(wish or ()))
        elif isinstance(before, dict):
            asked[key] = {**before, **dict(_assignment(text) for text in wish or ())}
        elif wish is not None:
            asked[key] = wish
    return asked


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--env {text!a}: expected NAME=VALUE")
    return name, value


def site_of(asked: Mapping[str, Any]) -> Site | None:
    """Return the site that is asked for by name or by file, None: none is.

    Raises:
        UsageError: if no site has this name.
        ConfigError: if a site file is wrong.
    """
    if asked["site"]:
        return find_site(asked["site"], asked["site_file"])
    return load_site(Path(asked["site_file"])) if asked["site_file"] else None


def _refuse_foreign(scheduler: str, site: Site | None, asked: Mapping[str, Any]) -> None:
    """Refuse wishes that this scheduler knows no way to fulfil.

    Raises:
        UsageError: naming the first.
    """
    if asked["qos"] is not None:
        if scheduler != "slurm":
            raise UsageError("--qos: Slurm alone has a quality of service; take --directive")
        if site is not None and site.queue_option == "--qos":
            raise UsageError(f"--qos: on {site.name} that is what --queue names")
    if scheduler == "flux":
        instead = {
            "memory": "Flux shares out nodes, cores and GPUs, no memory",
            "mail": "Flux itself sends none; where the site's does, --directive=--setattr=...",
            "throttle": "Flux has no job arrays, so each point is a job of its own; --pack N, or "
            "fewer values of --sweep at a time",
        }
        for key, reason in instead.items():
            if asked[key] is not None:
                raise UsageError(f"--{key}: {reason}")
    if asked["constraint"] is not None and scheduler == "pbs" and "=" not in asked["constraint"]:
        raise UsageError("--constraint: PBS wants RESOURCE=VALUE, such as system=polaris")


def parse_time(text: str) -> int:
    """Return the seconds of a time such as "2:00:00" or "1-12:00:00".

    Raises:
        UsageError: if it is none. Schedulers differ in what "2:00" means.
    """
    match = _TIME.fullmatch(text)
    seconds = 0
    if match is not None:
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if not seconds:
        raise UsageError(f"--time {text}: expected hours:minutes:seconds, such as 2:00:00")
    return seconds


def check(job: Job, *, lanes: int | None, save_seconds: float) -> None:
    """Refuse a job that cannot run.

    Args:
        job: the job that is asked for.
        lanes: largest number of ranks that can train; None: any number can.
        save_seconds: seconds of a save of this run, 0 if there was none yet.

    Raises:
        ConfigError: with everything that stands against it.
    """
    problems = []
    ranks = job.ranks // job.pack
    if lanes is not None and ranks > lanes:
        problems.append(
            f"{job.nodes} nodes of {job.ranks_per_node} ranks are {ranks} ranks, and "
            f"data.lanes = {lanes} is the most that can train: set data.lanes={ranks}, or take "
            f"{max(1, lanes // job.ranks_per_node)} nodes"
        )
    needed = reserve_seconds(0.0, save_seconds)
    if job.seconds <= needed:
        problems.append(
            f"--time is {job.seconds} s, and the end of a job, with a save of {save_seconds:.0f} "
            f"s, takes up to {needed:.0f} s: no step could be trained"
        )
    if job.scheduler == "lsf" and job.seconds < 60:
        problems.append("--time: LSF counts whole minutes")
    whole = job.max_node_hours
    if whole is not None:
        least = job.elements * job.node_hours
        if job.chain > 1 and job.chain * least > whole + 1e-6:
            problems.append(
                f"--max-node-hours {whole:g}: the {job.chain} jobs of the chain may take "
                f"{job.chain * least:g} together"
            )
        elif job.most_jobs < 1:
            each = f"{job.elements} jobs, one of each element," if job.sweep else "one job"
            problems.append(f"--max-node-hours {whole:g}: {each} may take {least:g}")
    if job.chain > job.max_jobs:
        problems.append(f"--chain {job.chain}: more than --max-jobs {job.max_jobs}")
    problems += _beyond_queue(job)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"this job cannot run:{lines}")


def _beyond_queue(job: Job) -> list[str]:
    """Return what stands against a job in its queue, as far as that is known."""
    site = job.site
    queue = site.find_queue(job.queue) if site is not None else None
    if site is None or queue is None:
        return []
    problems = []
    if job.nodes < queue.fewest_nodes:
        problems.append(
            f"{job.nodes} nodes: {site.name}, queue {queue.name}, begins at {queue.fewest_nodes}. "
            "Take more, or another --queue"
        )
    hours = longest_hours(queue, job.nodes)
    if hours is None and queue.limits:
        problems.append(
            f"{job.nodes} nodes: {site.name}, queue {queue.name}, has at most "
            f"{queue.limits[-1].nodes}"
        )
    elif hours is not None and job.seconds > hours * 3600:
        problems.append(
            f"--time is {job.seconds / 3600:g} h: {site.name}, queue {queue.name}, allows "
            f"{hours:g} h for {job.nodes} nodes. Ask for less and --chain, or for another --queue"
        )
    return problems
