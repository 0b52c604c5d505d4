"""Resuming a run: which checkpoint it goes on from, and its state put back on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hpctrain.checkpoint.format import AVERAGE, MODEL, TRAINING, check_file, newest_first
from hpctrain.checkpoint.load import (
    Loaded,
    Rows,
    fitting_names,
    load,
    load_newest,
    load_outline,
    load_values,
)
from hpctrain.checkpoint.optimizer_state import SavedOptimizer
from hpctrain.checkpoint.state import restore_rng
from hpctrain.config import Config
from hpctrain.errors import CheckpointError, TrainingError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.checkpointing.snapshot import (
    BAD_STEPS,
    GENERATORS,
    OPTIMIZER,
    is_extra,
    model_tensors,
    own_state,
    parameter_of,
    put_weights,
    restore_extra_states,
)
from hpctrain.training.checkpointing.values import check_values
from hpctrain.training.model.preparation import is_spread
from hpctrain.training.model.wrappers import adopt_buffers, plain_state
from hpctrain.training.optim.optimizer import prepare_momentum
from hpctrain.training.parallel.ddp import broadcast_tensors
from hpctrain.training.position import Position
from hpctrain.training.step import TrainStep
from hpctrain.utils.files import replace_file
from hpctrain.utils.run_folder import LATEST, step_of
from hpctrain.utils.text import listed

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """What every rank knows of the checkpoint that the run goes on from.

    Attributes:
        path: of the checkpoint, as the user can type it.
        values: the training state that is not tensors.
        config_toml: the config that it was saved under.
        rows: what is still on disk, for each rank to read its own; None: nothing.
    """

    path: str
    model: Mapping[str, Tensor]
    training: Mapping[str, Tensor]
    values: Mapping[str, Any]
    config_toml: str
    rows: Rows | None = None

    def without_tensors(self) -> Resumed:
        """Return the same without what is in model and optimizer by now: it is as large as they."""
        return replace(self, model={}, training={}, rows=None)

    @property
    def place(self) -> Position:
        place = self.values["place"]
        return Position(**{field.name: place[field.name] for field in fields(Position)})


def share(world: World, loaded: Loaded | None) -> Resumed | None:
    """Hand what rank 0 has loaded to every rank. Collective: all ranks."""
    facts = world.communicator.broadcast(
        None
        if loaded is None
        else (str(loaded.path), loaded.values, loaded.config_toml, loaded.rows)
    )
    if facts is None:
        return None
    path, values, config_toml, rows = facts
    return Resumed(
        path=path,
        model=broadcast_tensors(world, None if loaded is None else loaded.model),
        training=broadcast_tensors(world, None if loaded is None else loaded.training),
        values=values,
        config_toml=config_toml,
        rows=rows,
    )


def restore(world: World, step: TrainStep, resumed: Resumed) -> list[str]:
    """Put the state back into the parts of the run, once these had their dry run.

    The generators of the ranks are put back where there are as many ranks as then.

    Returns:
        What the header should say of it.

    Raises:
        CheckpointError: if the checkpoint is of another model or optimizer.
    """
    restore_parameters(step, resumed)
    notes = step.registered.restore(resumed.values.get("registered", {}), resumed.training)
    training = resumed.training
    step.bad_steps.copy_(training[BAD_STEPS])
    if resumed.values["world_size"] == world.topology.world_size:
        rank = world.topology.rank
        mine = _below(training, f"{GENERATORS}{rank}/")
        restore_rng(mine, resumed.values["generators"][rank], world.device)
    return [*notes, *_restore_logged(world, step, resumed)]


def _restore_logged(world: World, step: TrainStep, resumed: Resumed) -> list[str]:
    """Put back what was logged in the epoch under way.

    Where there are not as many ranks as before, rank 0 goes on with what all had together: what is
    of the whole epoch is asked of all ranks at its end.

    Returns:
        What the header should say, where that cannot be done.
    """
    rank, logged = world.topology.rank, resumed.values.get("logged", [])
    parts = [
        (saved, _below(resumed.training, f"{GENERATORS}{of_rank}/"))
        for of_rank, saved in enumerate(logged)
    ]
    if len(logged) == world.topology.world_size:
        mine = parts[rank : rank + 1]
    else:
        mine = parts if rank == 0 else []
    mine = [each for each in mine if each[0] is not None]
    if not mine:
        return []
    try:
        step.restore_logged(mine)
    except TrainingError as error:
        if not resumed.place.position:
            return []
        return [f"there are not as many ranks as before: {error}. {_LOGGED_ANEW}"]
    return []


_LOGGED_ANEW = "It counts from here on only, in the epoch under way"


def restore_parameters(step: TrainStep, resumed: Resumed) -> None:
    """Put model and optimizer back, and what belongs to them.

    Raises:
        CheckpointError: if the checkpoint is of another model or optimizer.
    """
    resumed = _named_as_here(step, resumed)
    _load_model(step, resumed)
    restore_extra_states(
        step.model, resumed.values.get("extra_state", {}), resumed.training, step.device
    )
    state = own_state(step, resumed.training, resumed.rows, (*OPTIMIZER, AVERAGE))
    of_optimizer = {name: item for name, item in state.items() if name.startswith(OPTIMIZER)}
    step.optimizer_state.restore(
        step.held, SavedOptimizer(of_optimizer, resumed.values.get("optimizer"))
    )
    prepare_momentum(step.optimizer)  # where the checkpoint has none
    if step.average is not None:
        step.average.load(_below(state, AVERAGE))
    if resumed.values["scaler"]:
        step.scaler.load_state_dict(dict(resumed.values["scaler"]))


def roll_back(world: World, step: TrainStep, load: Callable[[], Loaded | None]) -> int:
    """Put parameters and optimizer back to a checkpoint; the run goes on from where it is.

    Collective: all ranks.

    Args:
        world: the ranks.
        step: whose parameters.
        load: returns the checkpoint on rank 0. Collective: all ranks.

    Returns:
        The step of the checkpoint.

    Raises:
        TrainingError: on every rank, if there is no checkpoint yet.
    """
    resumed = share(world, load())
    if resumed is None:
        raise TrainingError(
            "there is no checkpoint yet to go back to after steps without a finite gradient: lower "
            "optimizer.lr, or save earlier by checkpoint.every_steps",
            everywhere=True,
        )
    with raise_together(world.communicator):
        restore_parameters(step, resumed)
        step.bad_steps[:2] = 0  # in a row; all of them stay counted
    return resumed.place.step


def _named_as_here(step: TrainStep, resumed: Resumed) -> Resumed:
    """Return what is resumed under the names of the model, whatever wrappers it was saved with."""
    there = {*resumed.model, *(resumed.rows.shapes(MODEL) if resumed.rows is not None else ())}
    names = fitting_names(plain_state(step.model), there)
    if not names:
        return resumed
    rows = resumed.rows
    if rows is not None:
        keys = [*rows.shapes(MODEL), *rows.shapes(TRAINING)]
        rows = replace(
            rows,
            stored={new: key for key in keys if (new := _renamed(key, names)) != key},
            aliases={names.get(k, k): names.get(v, v) for k, v in rows.aliases.items()},
        )
    return replace(
        resumed,
        model={names.get(name, name): item for name, item in resumed.model.items()},
        training={_renamed(key, names): item for key, item in resumed.training.items()},
        rows=rows,
    )


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """Return the key of a tensor of model or training state with another name in it."""
    name = parameter_of(key) or key
    if name not in names:
        return key
    beginning, _, end = key.partition(name)
    return beginning + names[name] + end


def _load_model(step: TrainStep, resumed: Resumed) -> None:
    here, there = (
        {name: tuple(item.shape) for name, item in tensors.items() if not is_extra(name)}
        for tensors in (model_tensors(step.model), resumed.model)
    )
    if resumed.rows is not None:
        there |= resumed.rows.shapes(MODEL)
    for name in adopt_buffers(step.model, step.disturbance.buffers, resumed.model):
        here[name] = there[name]
    missing = sorted(here.keys() - there.keys())
    surplus = sorted(there.keys() - here.keys())
    changed = sorted(name for name in here.keys() & there.keys() if here[name] != there[name])
    if missing or surplus or changed:
        what = [
            f"{label}: {listed(names, 4)}"
            for label, names in (
                ("not in it", missing),
                ("in it only", surplus),
                ("of another shape", changed),
            )
            if names
        ]
        raise CheckpointError(
            f"{resumed.path} is of another model ({'; '.join(what)}): bring the old [model] back, "
            "or start a new run with another run.name"
        )
    put_weights(step, resumed.model, resumed.rows)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
