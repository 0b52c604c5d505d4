"""Checkpoint of a command: `best`, `last` or a path, and which of its weights (training, EMA)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hpctrain.checkpoint.export import Weights, choose, whole_tensors
from hpctrain.checkpoint.format import TRAINING, newest_first, read_meta, resolved
from hpctrain.checkpoint.load import load_values
from hpctrain.checkpoint.tensors import tensors_from_raw
from hpctrain.config import Config
from hpctrain.errors import CheckpointError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.checkpointing.initialize import read_weights
from hpctrain.training.checkpointing.snapshot import EXTRA
from hpctrain.training.model.registered_state import REGISTERED
from hpctrain.training.parallel.ddp import broadcast_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The checkpoint that a command works with, the same on all ranks.

    Attributes:
        source: its folder, or the file of an export.
        step: at which it was saved; None: the file does not say.
        weights: which of them: training, average or evaluation.
        tensors: by name, on the host.
        values: what is no tensor of it; empty for a file.
        extra: tensors of the extra state of modules, and of callbacks, on the host.
        why: how it was chosen, such as "best accuracy of runs/digits".
    """

    source: str
    step: int | None
    weights: str
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    extra: Mapping[str, Tensor]
    why: str


def choose_checkpoint(config: Config, world: World, wanted: str | None) -> Chosen:
    """Read the weights to work with, for all ranks. Collective: all ranks.

    Those that the evaluations of the run were made with: averages where the config has
    `training.ema_decay`, evaluation weights where the optimizer has a second set.

    Args:
        config: names the run.
        world: the ranks.
        wanted: "best", "last", or the path of a checkpoint, a run, or a file of weights; None: the
            best where the run keeps one, else the last.

    Raises:
        CheckpointError: on every rank, if there is none, or it is damaged.
    """
    chosen: Chosen | None = None
    with raise_together(world.communicator):
        if world.topology.is_rank_zero:
            chosen = _read(config, wanted)
    tensors = broadcast_tensors(world, None if chosen is None else chosen.tensors)
    extra = broadcast_tensors(world, None if chosen is None else chosen.extra)
    facts = None if chosen is None else (chosen.source, chosen.step, chosen.weights, chosen.why)
    source, step, weights, why = world.communicator.broadcast(facts)
    values = world.communicator.broadcast(None if chosen is None else chosen.values)
    return Chosen(
        source=source,
        step=step,
        weights=weights,
        tensors=tensors,
        values=values,
        extra=extra,
        why=why,
    )


def _read(config: Config, wanted: str | None) -> Chosen:
    run = Path(config.run.directory, config.run.name)
    if wanted not in ("best", "last", None):
        path = Path(wanted)
        if not path.is_dir():
            return Chosen(
                source=wanted,
                step=None,
                weights="training",
                tensors=read_weights(path),
                values={},
                extra={},
                why=wanted,
            )
        source, why = resolved(path), str(path)
    elif not next(iter(newest_first(run / "checkpoints")), None):
        raise CheckpointError(
            f"{run} has no checkpoint: train first, or name another run (run.name), a checkpoint "
            "or a file of weights by --checkpoint"
        )
    else:
        source, best = choose(run, best=None if wanted is None else wanted == "best")
        why = (
            f"the last checkpoint of {run}" if best is None else f"the best {best.metric} of {run}"
        )
    values, extra = load_values(source), {}
    if values.get("extra_state") or values.get("registered"):
        training = whole_tensors(source, TRAINING, read_meta(source))
        kept = (EXTRA, REGISTERED)
        extra = tensors_from_raw({n: raw for n, raw in training.items() if n.startswith(kept)})
    weights = Weights.read(source, average=None if config.training.ema_decay else False)
    return Chosen(
        source=str(source),
        step=weights.step,
        weights=weights.which,
        tensors=tensors_from_raw(weights.tensors),
        values=values,
        extra=extra,
        why=why,
    )
