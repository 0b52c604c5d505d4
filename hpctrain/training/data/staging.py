"""Staging: copies of the shards on each node's disk, who makes them, what is reported of it."""

from __future__ import annotations

import logging
import os
import secrets
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hpctrain.config import Config
from hpctrain.data.dataset import Dataset
from hpctrain.data.staging.copies import Copier, StageFolder, sweep
from hpctrain.data.staging.plan import (
    Copy,
    Disk,
    candidates,
    choose,
    count_fitting,
    key_of,
    look_at,
    plan_copies,
    share_of,
)
from hpctrain.launch.process_group import World
from hpctrain.utils.text import duration, listed, plural, size

logger = logging.getLogger("hpctrain")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStage:
    """Where a node stages, as its lowest rank has found out.

    Attributes:
        directory: of the disk; None if there is none.
        origin: why it is this one.
        count: copies that there is room for, from the first.
        problem: why not all of them; empty if nothing is.
    """

    directory: str | None
    origin: str
    count: int
    problem: str


class Staging:
    """The copies of a run's shards on this node; nothing is copied before `start`."""

    def __init__(self) -> None:
        self._copier: Copier | None = None
        self._is_asked_for = False
        self._problems: list[str] = []

    def locate(self, path: str) -> str:
        """Return where a shard is to be read: its copy, once that is whole, or `path` itself."""
        return path if self._copier is None else self._copier.locate(path)

    def start(self, config: Config, world: World, datasets: Sequence[Dataset]) -> None:
        """Begin to copy, if the config asks for it. Collective: all ranks.

        Nothing that goes wrong here ends a job: the data are where they were.
        """
        if config.data.stage == "none":
            return
        topology = world.topology
        copies = plan_copies(datasets)
        if not copies:
            return
        self._is_asked_for = True
        key = key_of(copies, world.communicator.broadcast(secrets.token_hex(8)))
        folder, own = None, None
        if topology.local_rank == 0:
            folder, own = prepare_node(config.data.stage_directory, key, copies)
        stages = {
            node: stage
            for node, stage in world.communicator.all_gather((topology.node_rank, own))
            if stage is not None
        }
        if topology.is_rank_zero:
            _report(copies, [stages[node] for node in range(topology.num_nodes)], topology.hosts)
        mine = stages[topology.node_rank]
        if mine.directory is None or not mine.count:
            return
        try:
            if folder is None:
                folder = StageFolder(mine.directory, key)
                folder.join()
        except OSError as error:
            self._note(topology.host, f"{mine.directory}: {error.strerror or error}")
            return
        wanted = copies[: mine.count]
        self._copier = Copier(
            folder,
            all_copies=wanted,
            own_copies=share_of(
                wanted,
                local_rank=topology.local_rank,
                local_world_size=topology.local_world_size,
                node_rank=topology.node_rank,
                nodes=topology.num_nodes,
            ),
            done=lambda seconds: logger.info(
                "data.stage: %s on the disk of %s after %s",
                plural(mine.count, "shard"),
                topology.host,
                duration(seconds),
            ),
            report=lambda problem: self._note(topology.host, problem),
        )

    def report_problems(self, world: World) -> None:
        """Tell what rank 0 could not see: copies that failed elsewhere. Collective: all ranks."""
        if not self._is_asked_for:
            return
        of_ranks = world.communicator.all_gather(self._problems)
        others = [problem for problems in of_ranks[1:] for problem in problems]
        if world.topology.is_rank_zero and others:
            logger.warning("data.stage: %s", listed(others, 3, separator="; "))

    def _note(self, host: str, problem: str) -> None:
        """Take down a problem; rank 0's log has it at once, what others log goes nowhere."""
        self._problems.append(f"{host}: {problem}")
        logger.warning("data.stage: %s: %s", host, problem)

    def close(self) -> None:
        """Let go of the copies; the last rank of the node removes them."""
        copier, self._copier = self._copier, None
        if copier is not None:
            copier.close()


def prepare_node(
    wanted: str | None, key: str, copies: Sequence[Copy]
) -> tuple[StageFolder | None, NodeStage]:
    """Choose a disk of this node, remove what dead jobs have left on it, and hold the folder.

    For the lowest rank of a node.
    """
    tried = candidates(wanted, os.environ)
    for directory, _ in tried:
        sweep(directory, keep=key)
    disk = choose([look_at(*candidate) for candidate in tried], sum(copy.size for copy in copies))
    if not isinstance(disk, Disk):
        return None, NodeStage(directory=None, origin="", count=0, problem=disk)
    for directory, _ in tried:
        if directory != disk.directory:
            sweep(directory)
    folder = StageFolder(disk.directory, key)
    try:
        folder.join()
        free = disk.free_bytes + folder.bytes_there()
    except OSError as error:
        problem = f"{folder.path}: {error.strerror or error}"
        return None, NodeStage(directory=None, origin="", count=0, problem=problem)
    count = count_fitting(copies, free, disk.size_bytes)
    problem = "" if count == len(copies) else f"{disk.directory} has {size(free)} free"
    if not count:
        folder.leave()
    return folder if count else None, NodeStage(
        directory=disk.directory, origin=disk.origin, count=count, problem=problem
    )


def _report(copies: Sequence[Copy], stages: Sequence[NodeStage], hosts: Sequence[str]) -> None:
    """Say once, for all nodes, where the copies go and which nodes have no room for them."""
    first = next((stage for stage in stages if stage.count), None)
    if first is not None:
        origin = f" ({first.origin})" if first.origin else ""
        logger.info(
            "data.stage: %s, %s, are copied to %s%s on %s; meanwhile they are read where they are",
            plural(len(copies), "shard"),
            size(sum(copy.size for copy in copies)),
            first.directory,
            origin,
            plural(len(stages), "node"),
        )
    short: dict[tuple[int, str], list[str]] = defaultdict(list)
    for stage, host in zip(stages, hosts, strict=True):
        if stage.problem:
            short[stage.count, stage.problem].append(host)
    for (count, problem), where in short.items():
        named = listed(where, 3)
        logger.warning(
            "data.stage: room for %d of %s on %s: %s; the others are read where they are",
            count,
            plural(len(copies), "shard"),
            named,
            problem,
        )
