"""What only the rank has that speaks and writes."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hpctrain.checkpoint.manager import CheckpointManager, Retention
from hpctrain.config import Config, to_toml
from hpctrain.errors import CheckpointError
from hpctrain.observe.metrics import MetricsWriter
from hpctrain.observe.progress import Progress
from hpctrain.training.assembly import Parts, directions
from hpctrain.training.datasets import Data
from hpctrain.training.folder import RunFolder
from hpctrain.training.horizon import Place
from hpctrain.training.save_clock import SaveClock
from hpctrain.training.snapshot import expected_bytes
from hpctrain.utils.files import replace_file

logger = logging.getLogger("hpctrain")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankZero:
    """The folder, the metrics and the terminal."""

    folder: RunFolder
    store: CheckpointManager
    save_clock: SaveClock
    writer: MetricsWriter
    progress: Progress


def prepare_rank_zero(
    config: Config,
    parts: Parts,
    data: Data,
    folder: RunFolder,
    place: Place,
    evaluation_owed: bool,
) -> RankZero:
    """Open all that rank 0 writes to in the run folder.

    Args:
        config: of the job, written to config.toml there.
        parts: of the step, for the size of a checkpoint.
        data: for the length of the run.
        folder: of the run, held by this job.
        place: where the job begins.
        evaluation_owed: an evaluation at `place` was cut short, and comes again.

    Raises:
        CheckpointError: if the folder cannot be written to, or has no room for a checkpoint.
    """
    try:
        replace_file(folder.path / "config.toml", to_toml(config).encode())
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder.path}: {error}") from error
    section = config.checkpoint
    keep_best = section.keep_best
    mode = directions(config, parts.task)[keep_best] if keep_best else "min"
    store = CheckpointManager(
        folder.path,
        retention=Retention(
            keep_last=section.keep_last,
            keep_every=section.keep_every,
            metric=keep_best,
            mode=mode,
        ),
        confirm=folder.confirm,
        warn=logger.warning,
        saved_within=folder.saved_within,
    )
    state_bytes = expected_bytes(parts.step)
    store.require_space(state_bytes)
    folder.expect_save(state_bytes)
    folder.record.note_modules()  # the model is built: what it needs is imported
    return RankZero(
        folder=folder,
        store=store,
        save_clock=SaveClock(section.every_minutes, lambda: store.failed),
        writer=MetricsWriter(
            folder.path,
            place.step if place.step else None,
            again="evaluation" if evaluation_owed else None,
        ),
        progress=Progress(
            data.horizon.total_steps(place),
            start_step=place.step,
            total_epochs=config.training.max_epochs,
            mode=config.logging.progress,
            every_seconds=config.logging.progress_every_seconds,
        ),
    )
