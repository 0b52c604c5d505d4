"""`world.run`: config, run folder and resume of an own loop, from its beginning to its end."""

from __future__ import annotations

import logging
import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from hpctrain.batch.stop import SignalFlag
from hpctrain.config import Config
from hpctrain.config.schema import (
    CheckpointSection,
    ComponentSection,
    LoggingSection,
    NotifySection,
    OptimizerSection,
    RunSection,
    TaskSection,
)
from hpctrain.config.schema_data import DataSection
from hpctrain.errors import CheckpointError, ConfigError, ExitCode, HpctrainError
from hpctrain.topology import raise_together
from hpctrain.training.build import Parts
from hpctrain.training.checkpointing.resume import restore
from hpctrain.training.loops.base import LoopWorld
from hpctrain.training.loops.loader import DEFAULT_SEED, Loader, WithoutData, use_of
from hpctrain.training.loops.run import Run
from hpctrain.training.loops.step import RATES, SCHEDULE, LearningRates, LoopStep, ScheduleState
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.position import Position
from hpctrain.training.profiling import Phases, figures_recorded
from hpctrain.training.program import Stopped
from hpctrain.training.rank_zero import prepare_rank_zero
from hpctrain.training.record import begin_record
from hpctrain.training.run import Run as JobRun
from hpctrain.training.session import ReadTrouble, Session, find_beginning, finish, session
from hpctrain.training.summary import header_text
from hpctrain.training.trainer import Plan
from hpctrain.utils.json_files import checked

logger = logging.getLogger("hpctrain")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How long a run is, and what is saved and reported, as a config would say it.

    Attributes:
        epochs: `training.max_epochs`.
        steps: `training.max_steps`.
        max_seconds: `run.max_seconds`.
        checkpoint: what is saved.
        logging: what is reported.
        trackers: what is handed every line of metrics.
        notify: what is run when a job ends.
    """

    epochs: int | None
    steps: int | None
    max_seconds: float | None
    checkpoint: CheckpointSection
    logging: LoggingSection
    trackers: tuple[ComponentSection, ...]
    notify: NotifySection

    @classmethod
    def of(
        cls,
        *,
        epochs: int | None,
        steps: int | None,
        max_seconds: float | None,
        log_steps: int,
        progress: str,
        trackers: Sequence[Mapping[str, Any]],
        notify: Mapping[str, Any],
        **checkpoint: Any,
    ) -> RunOptions:
        """Check what `World.run` was given.

        Raises:
            ConfigError: if a number is out of its range, or a word is none.
        """
        try:
            return cls(
                epochs=epochs,
                steps=steps,
                max_seconds=max_seconds,
                checkpoint=checked(checkpoint, CheckpointSection),
                logging=checked({"every_steps": log_steps, "progress": progress}, LoggingSection),
                trackers=tuple(map(_tracker, trackers)),
                notify=checked(dict(notify), NotifySection),
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"world.run: {error}", everywhere=True) from error

    def check(self, loader: Loader | None) -> None:
        """See that a run with this loader has an end.

        Raises:
            ConfigError: if it has none, or a number is none.
        """
        if loader is not None and not loader.training:
            raise ConfigError("world.run: the loader is for evaluation: give one to train with")
        if loader is None and self.steps is None:
            raise ConfigError("world.run without a loader has no epochs: give steps=")
        for name, value in (("epochs", self.epochs), ("steps", self.steps)):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ConfigError(f"world.run: {name}={value!r}: expected a whole number from 1")
        if self.epochs is None and self.steps is None:
            raise ConfigError("world.run: how long? Give epochs= or steps=")
        if loader is None and self.epochs is not None:
            raise ConfigError("world.run without a loader has no epochs: give steps= alone")


def _tracker(table: Mapping[str, Any]) -> ComponentSection:
    """Return a table of `[[trackers]]` as a config has it."""
    arguments = {key: value for key, value in table.items() if key != "use"}
    return checked({"use": table.get("use"), "arguments": arguments}, ComponentSection)


def named_models(models: Any) -> dict[str, nn.Module]:
    """Return the models of a run by the names that their parameters have in a checkpoint."""
    if isinstance(models, nn.Module):
        return {"": models}
    if isinstance(models, Mapping):
        named = dict(models)
    elif isinstance(models, list | tuple):
        kinds = [type(model).__name__ for model in models]
        names = kinds if len(set(kinds)) == len(kinds) else [f"{k}{i}" for i, k in enumerate(kinds)]
        named = dict(zip(names, models, strict=True))
    else:
        named = {}
    if not named or not all(isinstance(model, nn.Module) for model in named.values()):
        raise ConfigError(
            "world.run takes a model, a list of them, or a dict by name, as world.setup has "
            "returned them"
        )
    if wrong := [name for name in named if not name.isidentifier()]:
        raise ConfigError(
            f"world.run: {wrong[0]!r} is not a name for a model: letters, digits and _"
        )
    return named


def config_of(
    world: LoopWorld,
    folder: Path,
    models: Mapping[str, nn.Module],
    step: LoopStep,
    loader: Loader | None,
    options: RunOptions,
) -> Config:
    """Return the config that a job like this run would have; it is saved with the run.

    Raises:
        ConfigError: if the run has no end, or no folder.
    """
    options.check(loader)
    if not folder.name:
        raise ConfigError(f"world.run: {str(folder)!r} is not a directory for a run")
    section = next(
        setup.section
        for setup in world.setups.all
        if any(model is one for model in setup.models for one in models.values())
    )
    groups = step.optimizer.param_groups
    lr = float(groups[0]["lr"])
    common: dict[str, Any] = {
        "training": replace(section, max_epochs=options.epochs, max_steps=options.steps),
        "run": RunSection(
            name=folder.name,
            directory=str(folder.parent),
            seed=DEFAULT_SEED if world.seed is None else world.seed,
            max_seconds=options.max_seconds,
        ),
        "model": ComponentSection(use=" and ".join(use_of(model) for model in models.values())),
        "optimizer": OptimizerSection(
            use=" and ".join(use_of(each.optimizer) for each in step.steppers),
            lr=lr if math.isfinite(lr) and lr > 0 else 1.0,
        ),
        "checkpoint": options.checkpoint,
        "logging": options.logging,
        "trackers": options.trackers,
        "notify": options.notify,
    }
    return _without_data(**common) if loader is None else loader.config(**common)


def _without_data(**sections: Any) -> Config:
    """Return the config of a run without data."""
    return Config(
        data=DataSection(train="none", global_batch_size=1),
        task=TaskSection(use="loop", inputs=("none",)),
        **sections,
    )


class _Hooks(JobRun):
    """What a job does between two steps, for an own loop."""

    def _explain(self, step: int) -> str:
        data: object = self._data
        if isinstance(data, WithoutData):
            return "see the losses in metrics.jsonl"
        return super()._explain(step)


class _Task:
    """Stands for a job's task: what an evaluation of the loop gives is known to the loop only."""

    def __init__(self, keep_best: str | None, mode: str | None) -> None:
        self.metrics = {} if keep_best is None else {keep_best: mode or "min"}


class _Schedule:
    """Stands for a job's schedule: the loop has its own."""

    in_groups = True
    notes: Sequence[str] = ()

    def __init__(self, step: LoopStep) -> None:
        self._step = step

    def __call__(self, place: Position, end: Position) -> float:
        """Return the learning rate of the first group."""
        return float(self._step.optimizer.param_groups[0]["lr"])

    def rates(self) -> dict[str, float]:
        """Return no further ones."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the loop's own schedules are saved by name."""
        return {}


@contextmanager
def running(
    world: LoopWorld,
    folder: str | Path,
    models: Any,
    optimizers: Any,
    loader: Loader | None,
    *,
    schedule: Any,
    options: RunOptions,
) -> Iterator[Run]:
    """Hold a run folder in the body, as a job does. Collective: all ranks.

    See `World.run`.
    """
    with raise_together(world.communicator):
        named = named_models(models)
        step = LoopStep(world, world.setups, named)
        _check_optimizers(world, step, optimizers)
        config = config_of(world, Path(folder), named, step, loader, options)
        schedules = schedule if isinstance(schedule, list | tuple) else [schedule]
        for number, each in enumerate(schedules):
            if each is not None:
                name = SCHEDULE if len(schedules) == 1 else f"{SCHEDULE} {number}"
                step.registered.add(name, ScheduleState(each))
        step.registered.add(RATES, LearningRates(step.steppers))
    assert world.guard is not None
    with (
        _signals() as signals,
        session(config, world.communicator, signals=signals, guard=world.guard) as job,
    ):
        begin_record(job.folder, world)
        job.stack.enter_context(figures_recorded(config, world))
        run, hooks, data = _begun(world, config, step, loader, job)
        try:
            with hooks.saves_finished():
                yield run
                complete = run.end()
        except HpctrainError:
            raise
        except BaseException as error:
            if job.folder is not None and world.world_size == 1:  # else the guard reports it
                with suppress(CheckpointError):
                    job.folder.end(ExitCode.BUG, f"{type(error).__name__}: {error}")
            raise
        command = [sys.argv[0] or "python", *sys.argv[1:]]
        ending, reason = finish(config, world, hooks, data, complete=complete, command=command)
        job.end(ending, reason)
    if ending == ExitCode.STOPPED:
        raise Stopped(int(ExitCode.STOPPED))


def _begun(
    world: LoopWorld, config: Config, step: LoopStep, loader: Loader | None, job: Session
) -> tuple[Run, _Hooks, Any]:
    """Return the run where it stands, with all that it knew put back. Collective: all ranks."""
    folder = job.folder
    resumed, semantics, changes = find_beginning(config, world, folder)
    data: Any = WithoutData(config, resumed)
    if loader is not None:
        # What is saved is the config as the loop gave it, whatever a DataLoader says besides.
        data = replace(loader.open(config, semantics, resumed), config=config)
        step.grad_accum_steps = loader.count_passes()
    place = data.place
    if folder is not None:
        folder.begin(place.step)
    with raise_together(world.communicator):
        if resumed is not None:
            changes += restore(world, step, resumed)  # type: ignore[arg-type]
            resumed = resumed.without_tensors()
    keep_best, mode = config.checkpoint.keep_best, config.checkpoint.keep_best_mode
    parts = Parts(
        model=step.model,
        task=_Task(keep_best, mode),  # type: ignore[arg-type]
        number_format=NumberFormat.of(config.training.precision, world.device),
        schedule=_Schedule(step),  # type: ignore[arg-type]
        step=step,  # type: ignore[arg-type]
    )
    with raise_together(world.communicator):
        rank_zero = None
        if folder is not None:
            rank_zero = prepare_rank_zero(config, parts, data, folder, place, False)
            job.stop.add(rank_zero.save_clock.bit)
            if loader is not None:
                logger.info(
                    header_text(config, world, parts, data, resumed, place, folder, changes)
                )
        job.stop.add(ReadTrouble(data.train_loader).bit)
        stall = (lambda: rank_zero.store.stall_seconds) if rank_zero is not None else (lambda: 0.0)
        phases = Phases({"data": lambda: data.train_loader.wait_seconds, "checkpoint": stall})
    hooks = _Hooks(
        world,
        data,
        parts,
        phases=phases,
        stop=job.stop,
        rank_zero=rank_zero,
        # Of early stopping a loop saves nothing that it goes on with.
        saved={} if resumed is None else {"metrics": resumed.values["metrics"]},
    )
    run = Run(
        world, step, hooks, Plan.of(config, data), data, loader, is_resumed=resumed is not None
    )
    return run, hooks, data


@contextmanager
def _signals() -> Iterator[SignalFlag]:
    """Catch signals in the body, where that is possible: in the main thread."""
    flag = SignalFlag()
    if threading.current_thread() is not threading.main_thread():
        logger.warning("signals do not stop this run: it is not in the main thread")
        yield flag
        return
    with flag:
        yield flag


def _check_optimizers(world: LoopWorld, step: LoopStep, optimizers: Any) -> None:
    given = optimizers if isinstance(optimizers, list | tuple) else [optimizers]
    for optimizer in given:
        world.setups.stepper_of(optimizer)
    missing = [each for each in step.steppers if not any(each.optimizer is one for one in given)]
    if missing:
        kind = type(missing[0].optimizer).__name__
        raise ConfigError(f"world.run: {kind} updates a model of the run: give it as well")
