"""Figures of nodes and ranks while a job trains: what ranks note, and who records them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hpctrain.config import Config
from hpctrain.launch.process_group import World
from hpctrain.observe.machine.recorder import RankFigures, machine_recorded

if TYPE_CHECKING:
    from hpctrain.training.trainer import Phases


def figures_recorded(config: Config, world: World) -> AbstractContextManager[None]:
    """Record the figures of every node while the body runs, if the config wants them."""
    if not config.logging.machine:
        return nullcontext()
    topology = world.topology
    return machine_recorded(
        Path(config.run.directory, config.run.name),
        topology.host,
        node_rank=topology.node_rank,
        num_nodes=topology.num_nodes,
        local_rank=topology.local_rank,
        kind=world.device.type,
        notes=world.pulse.notes,
    )


def note_figures(world: World, phases: Phases, step: int, steps: int) -> None:
    """Note what this rank has done with its time, for the one that records its node.

    Args:
        world: of this rank.
        phases: its seconds.
        step: that the run stands at.
        steps: done in this job.
    """
    seconds = phases.totals()
    allocated, peak = _memory(world.device)
    index = world.device.index
    world.pulse.note(
        RankFigures(
            rank=world.topology.rank,
            device=-1 if index is None else index,
            step=step,
            steps=steps,
            elapsed=_nanoseconds(sum(seconds.values())),
            data=_nanoseconds(seconds.get("data", 0.0)),
            others=_nanoseconds(seconds.get("communication", 0.0)),
            apart=_nanoseconds(seconds.get("evaluation", 0.0) + seconds.get("checkpoint", 0.0)),
            allocated=allocated,
            peak=peak,
        )
    )


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes that torch has given out on a device, and the most so far."""
    if device.type == "cpu":
        return 0, 0
    counts: Any = getattr(torch, device.type)
    return counts.memory_allocated(device), counts.max_memory_allocated(device)
