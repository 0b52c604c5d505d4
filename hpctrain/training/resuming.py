"""Which checkpoint a job goes on from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hpctrain.checkpoint.format import check_file, newest_first
from hpctrain.checkpoint.load import Loaded, load, load_newest, load_outline, load_values
from hpctrain.config import Config
from hpctrain.errors import CheckpointError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.persistence import Resumed, share
from hpctrain.training.saved_values import check_values
from hpctrain.training.step.preparation import is_spread
from hpctrain.utils.files import replace_file
from hpctrain.utils.run_folder import LATEST, step_of

logger = logging.getLogger("hpctrain")


def find_checkpoint(
    config: Config,
    world: World,
    folder: Path | None,
    resume: Callable[[str], str] = lambda wanted: wanted,
) -> Resumed | None:
    """Return the checkpoint to go on from, on every rank. Collective: all ranks.

    Args:
        config: of the job; `checkpoint.resume` says which one is wanted.
        world: of all ranks.
        folder: of the run, on rank 0; None on the others.
        resume: returns what `checkpoint.resume` is for this very job; for rank 0.

    Raises:
        CheckpointError: on every rank, if the one that the config names is not whole.
    """
    loaded: Loaded | None = None
    together = is_spread(config.training, world.topology.world_size)
    with raise_together(world.communicator), reading(world, together=together) as read:
        if folder is not None:
            checkpoints = folder / "checkpoints"
            wanted = resume(config.checkpoint.resume)
            if wanted == "auto":
                loaded = load_newest(checkpoints, logger.warning, read)
                if loaded is None:
                    _warn_of_loss(folder)
                else:
                    # Those that were passed over must not be taken for newer ones than the next.
                    _put_aside(checkpoints, loaded.step + 1, points_to=loaded.path)
            elif wanted == "never":
                _put_aside(checkpoints, 0)
                (folder / LATEST).unlink(missing_ok=True)
            else:
                loaded = read(Path(wanted))
                _put_aside(checkpoints, loaded.step + 1)
    return share(world, loaded)


def values_to_go_on_from(config: Config) -> dict[str, Any] | None:
    """Return what is no tensor of the checkpoint that a job with this config would go on from.

    For rank 0, and for tools that do not train: nothing is moved, and what is damaged is passed
    over without a message. None where a run would begin.
    """
    resume = config.checkpoint.resume
    checkpoints = Path(config.run.directory, config.run.name, "checkpoints")
    paths: Iterable[Path] = {"auto": newest_first(checkpoints), "never": ()}.get(
        resume, (Path(resume),)
    )
    with suppress(OSError):  # a folder that cannot be listed
        for path in paths:
            with suppress(CheckpointError):
                return load_values(path)
    return None


@contextmanager
def reading(world: World, *, together: bool) -> Iterator[Callable[[Path], Loaded]]:
    """Give rank 0 what reads a checkpoint; the others help until its body has ended.

    Collective: all ranks.

    Args:
        world: the ranks.
        together: leave rows on disk for each rank to read its own. The files are compared with
            their checksums all the same, each by one rank.
    """
    communicator = world.communicator

    def compare(path: Path, meta: Mapping[str, Any]) -> None:
        communicator.broadcast((path, meta))
        problems = communicator.all_gather(_problem(path, meta, world))
        if found := [problem for problem in problems if problem is not None]:
            raise found[0]

    if not together:
        yield lambda path: check_values(load(path))
    elif world.topology.is_rank_zero:
        try:
            yield lambda path: check_values(load_outline(path, compare))
        finally:
            communicator.broadcast(None)
    else:
        while (task := communicator.broadcast(None)) is not None:
            path, meta = task
            communicator.all_gather(_problem(path, meta, world))
        yield load


def _problem(path: Path, meta: Mapping[str, Any], world: World) -> CheckpointError | None:
    """Compare this rank's share of the files of a checkpoint; return what is wrong with one."""
    try:
        for name in sorted(meta["files"])[world.topology.rank :: world.topology.world_size]:
            world.pulse.tick()
            check_file(path, name, meta)
    except CheckpointError as error:
        return error
    return None


def _warn_of_loss(folder: Path) -> None:
    """Say so where a run that begins anew has had checkpoints: all of them have been removed."""
    pointer = folder / LATEST
    if pointer.exists():
        logger.warning(
            "%s names a checkpoint, and there is none in %s: the run begins anew",
            pointer,
            folder / "checkpoints",
        )


def _put_aside(checkpoints: Path, first_step: int, points_to: Path | None = None) -> None:
    """Move checkpoints from `first_step` on out of the way of a run that begins before them.

    A later job would go on from them, though they are none of this run's own past.

    Args:
        checkpoints: the folder of all of them.
        first_step: of those to move.
        points_to: the one that is the newest then; None: there is none of this run.
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
        pointer = checkpoints.parent / LATEST
        if points_to is None:
            pointer.unlink(missing_ok=True)
        else:
            replace_file(pointer, f"{points_to.name}\n".encode())
    except OSError as error:
        raise CheckpointError(f"cannot move checkpoints to {aside}: {error}") from error
    logger.info("checkpoints of another course of this run are now in %s", aside)
