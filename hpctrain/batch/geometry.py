"""Ranks, GPUs and CPUs of a node: what is given, and what follows from it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from hpctrain.batch.sites import Site
from hpctrain.errors import UsageError

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
