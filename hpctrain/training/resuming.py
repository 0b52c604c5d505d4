"""Which checkpoint a job goes on from."""

from __future__ import annotations

import logging
from pathlib import Path

from hpctrain.checkpoint.layout import newest_first, step_of
from hpctrain.checkpoint.reading import Loaded, load, load_newest
from hpctrain.config import Config
from hpctrain.errors import CheckpointError
from hpctrain.launch.agreement import raise_together
from hpctrain.launch.world import World
from hpctrain.training.persistence import Resumed, share

logger = logging.getLogger("hpctrain")


def find_checkpoint(config: Config, world: World, folder: Path | None) -> Resumed | None:
    """Return the checkpoint to go on from, on every rank. Collective: all ranks.

    Args:
        config: of the job; `checkpoint.resume` says which one is wanted.
        world: of all ranks.
        folder: of the run, on rank 0; None on the others.

    Raises:
        CheckpointError: on every rank, if the one that the config names is not whole.
    """
    loaded: Loaded | None = None
    with raise_together(world.communicator):
        if folder is not None:
            checkpoints = folder / "checkpoints"
            if config.checkpoint.resume == "auto":
                loaded = load_newest(checkpoints, logger.warning)
            elif config.checkpoint.resume == "never":
                _put_aside(checkpoints, first_step=0)
            else:
                loaded = load(Path(config.checkpoint.resume))
                _put_aside(checkpoints, first_step=loaded.step + 1)
    return share(world, loaded)


def _put_aside(checkpoints: Path, first_step: int) -> None:
    """Move checkpoints from `first_step` on out of the way of a run that begins before them.

    A later job would go on from them, though they are none of this run's own past.
    """
    later = [path for path in newest_first(checkpoints) if (step_of(path.name) or 0) >= first_step]
    if not later:
        return
    number = 1
    while (aside := checkpoints.with_name(f"checkpoints-old-{number}")).exists():
        number += 1
    try:
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
        (checkpoints.parent / "latest").unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot move checkpoints to {aside}: {error}") from error
    logger.info("checkpoints of another course of this run are now in %s", aside)
