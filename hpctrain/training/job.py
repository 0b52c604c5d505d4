"""One job of a run, from its config to its exit.json."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from hpctrain.batch.stop import SignalFlag, StopAgreement, describe
from hpctrain.config import Config
from hpctrain.config.limits import fast_dev_run
from hpctrain.errors import ConfigError, ExitCode
from hpctrain.launch.failure import Guard
from hpctrain.launch.process_group import World, prepare_deterministic, process_group
from hpctrain.launch.rendezvous import Meeting
from hpctrain.observe.trackers import handing_to_object
from hpctrain.topology import Communicator, Topology, raise_together
from hpctrain.training.build import Parts, build_parts, watch_metrics
from hpctrain.training.checkpointing.initialize import start_warm
from hpctrain.training.checkpointing.resume import Resumed, restore
from hpctrain.training.compile_cache import keep_on_node, kept_compiled
from hpctrain.training.components import NOTHING, Brought, Components, resolve_components
from hpctrain.training.data.run_data import Data, open_data
from hpctrain.training.dry_run.evaluation import MOST_ROWS, rehearse
from hpctrain.training.dry_run.step import MOST_ROWS as MOST_SAMPLES
from hpctrain.training.early_stopping import (
    check_monitored,
    ended_early,
)
from hpctrain.training.modules.task import ModuleTask
from hpctrain.training.profiling import Phases, StepProfiler, figures_recorded, profiled
from hpctrain.training.rank_zero import RankZero, RunFolder, prepare_rank_zero
from hpctrain.training.record import begin_record
from hpctrain.training.run import Run
from hpctrain.training.session import ReadTrouble, find_beginning, finish, session
from hpctrain.training.summary import (
    complete_text,
    header_text,
    is_script,
    transport_notes,
)
from hpctrain.training.task.misfits import explain_misfit, explained_indices, ranges_checked
from hpctrain.training.trainer import Plan, fit

logger = logging.getLogger("hpctrain")


def train(
    config: Config,
    topology: Topology,
    communicator: Communicator,
    *,
    meeting: Meeting | None,
    signals: SignalFlag,
    guard: Guard,
    command: Sequence[str],
    brought: Brought = NOTHING,
) -> ExitCode:
    """Train as the config says; exit.json has how it ended. Collective: all ranks.

    Args:
        config: the same on all ranks.
        topology: of this rank.
        communicator: of all ranks.
        meeting: where they meet; None for one process.
        signals: this rank's requests to stop.
        guard: takes the run folder and the steps, for its report.
        command: the config file and overrides, as they were given.
        brought: objects in place of what the config names.

    Returns:
        DONE or STOPPED.

    Raises:
        HpctrainError: on every rank, with exit.json saying the same.
    """
    guard.pulse.tick()  # from here on, standing still has a limit
    config = fast_dev_run(config)
    with session(config, communicator, signals=signals, guard=guard) as job:
        if config.run.deterministic:
            prepare_deterministic()
        if config.training.compile:
            keep_on_node()
        group = process_group(topology, communicator, config.launch, meeting, guard)
        world = job.stack.enter_context(group)
        if config.training.detect_anomaly:
            job.stack.enter_context(torch.autograd.set_detect_anomaly(True))
        begin_record(job.folder, world)
        job.stack.enter_context(figures_recorded(config, world))
        ending, reason = _train(config, world, job.stop, job.folder, command, brought)
        job.end(ending, reason)
    return ending


class Stages:
    """Logs, where details are asked for, how long each stage of a start took."""

    def __init__(self) -> None:
        self._then = time.perf_counter()

    def done(self, stage: str) -> None:
        """End a stage; the next begins."""
        now = time.perf_counter()
        logger.debug("%s: %.2f s", stage, now - self._then)
        self._then = now


def _train(
    config: Config,
    world: World,
    stop: StopAgreement,
    folder: RunFolder | None,
    command: Sequence[str],
    brought: Brought,
) -> tuple[ExitCode, str]:
    with raise_together(world.communicator):
        # A script has no file with a line for each key.
        path, overrides = (None, ()) if is_script(command) else (command[0], command[1:])
        components = resolve_components(config, path, overrides, given=brought.sections)
    stages = Stages()
    # The checkpoint first: its record has the rules and the data that the run began with.
    resumed, semantics, changes = find_beginning(config, world, folder)
    changes += brought.notes
    stages.done("the checkpoint to go on from is looked for")
    data = open_data(config, world, semantics, resumed, brought)
    stages.done("the data are opened")
    config, place = data.config, data.place
    evaluation_owed = resumed is not None and resumed.values.get("evaluation_owed", False)
    if folder is not None:
        folder.begin(place.step)
    early = None if resumed is None else ended_early(config, resumed.values, place)
    # A run that is complete already builds nothing.
    if (data.stop_at.reached(place) or early) and not evaluation_owed:
        if folder is not None and resumed is not None:
            logger.info(complete_text(config, world, data, resumed, early, command))
            folder.step = place.step
        return ExitCode.DONE, early or "complete"

    # What follows takes minutes at worst: asked before, and after.
    if reasons := stop.agree():
        return _stopped_early(reasons, data)
    with raise_together(world.communicator):
        profiler = StepProfiler.of(config, world)
    data.stage(config, world)  # copies go on beside the building
    with kept_compiled(config, world):
        parts = _build(config, world, components, data, changes, brought)
    # After the dry runs of `_build`, which leave no trace but the order in which DDP sums.
    with raise_together(world.communicator):
        if resumed is not None:
            resumed = _restored(world, parts, resumed, changes)
    stages.done("data are staged, model and optimizer are built")
    if resumed is None and config.checkpoint.initialize_from is not None:
        changes.append(start_warm(config.checkpoint, world, parts.step))
    if reasons := stop.agree():
        return _stopped_early(reasons, data)
    # Metrics and checkpoints are opened only now: what cannot be built or restored writes none.
    with raise_together(world.communicator):
        rank_zero = None
        if folder is not None:
            rank_zero = prepare_rank_zero(config, parts, data, folder, place, evaluation_owed)
            arguments = getattr(brought.model, "hparams", None) or config.model.arguments
            if parts.trainer is not None:
                parts.trainer.write_to(rank_zero.writer)
            rank_zero.writer.hand_to(handing_to_object(each, arguments) for each in brought.loggers)
            stop.add(rank_zero.save_clock.bit)
            logger.info(header_text(config, world, parts, data, resumed, place, folder, changes))
        stop.add(ReadTrouble(data.train_loader).bit)
        phases = Phases(_counters(parts, data, rank_zero))
    run = Run(
        world,
        data,
        parts,
        phases=phases,
        stop=stop,
        rank_zero=rank_zero,
        saved={} if resumed is None else resumed.values,
        profiler=profiler,
    )
    plan = Plan.of(config, data)
    run.begin(place)
    stages.done("a save is tried")
    indices = explained_indices(parts.task, data.train_loader, run.batches_under_way)
    with run.saves_finished(), indices, profiled(profiler), run.failures_reported():
        place, complete = fit(
            place,
            plan,
            step=parts.step,
            loader=data.train_loader,
            schedule=parts.schedule,
            run=run,
            evaluation_owed=evaluation_owed,
        )
    return finish(config, world, run, data, complete=complete, command=command)


def _build(
    config: Config,
    world: World,
    components: Components,
    data: Data,
    notes: list[str],
    brought: Brought,
) -> Parts:
    """Build what is trained, and try an evaluation of a few rows. Collective: all ranks.

    What the header should say besides is added to the notes.
    """
    if brought.prune is not None and Plan.of(config, data).evaluate is None:
        raise ConfigError(
            "hpctrain.train: prune is asked behind each evaluation, and this config has none: set "
            "data.validation, and training.evaluate_every_epochs or evaluate_every_steps",
            everywhere=True,
        )
    parts = build_parts(
        config,
        world,
        components,
        data.train_loader,
        data.stop_at,
        semantics=data.semantics,
        validation_batches=data.validation_batches,
        brought=data.brought,
    )
    section, validates = config.training, bool(data.validations)
    if validates and (section.evaluate_every_epochs or section.evaluate_every_steps):
        with raise_together(world.communicator):
            rows, *further = [each.loader.examples(MOST_ROWS) for each in data.validations]
        step = parts.step
        with ranges_checked(parts.task):
            rehearse(
                step.runner,
                rows,
                world,
                further=further,
                explain=lambda error, fields: explain_misfit(error, fields, config),
            )
        step.settle()
    if isinstance(parts.task, ModuleTask):
        # Its metrics are those that it has logged by now.
        with raise_together(world.communicator):
            check_monitored(config, parts.task)
            watch_metrics(config, parts.task, parts.schedule, validates=validates)
    with ranges_checked(parts.task):
        notes += _couplings(world, parts, data)
    notes += transport_notes(world)
    return parts


def _restored(world: World, parts: Parts, resumed: Resumed, notes: list[str]) -> Resumed:
    """Put the state back, and return what is still of use of it; the notes are for the header."""
    notes += restore(world, parts.step, resumed)
    parts.schedule.load_state_dict(resumed.values.get("schedule", {}))
    return resumed.without_tensors()


def _couplings(world: World, parts: Parts, data: Data) -> list[str]:
    """Return a line for the header if the loss is none of samples. Under FSDP, collective."""
    step = parts.step
    if step.sharded is None and not world.topology.is_rank_zero:
        return []
    rows = data.train_loader.examples(min(MOST_SAMPLES, max(2, step.rows)))
    if rows.size < 2:
        return []
    found = step.find_coupling(rows)
    return [] if found is None else [f"the loss is not a sum over samples: {found}"]


def _stopped_early(reasons: int, data: Data) -> tuple[ExitCode, str]:
    """Return how a job ends that was stopped before its first step: nothing is to be saved."""
    data.close()
    logger.info("stopped by %s before the first step", describe(reasons))
    return ExitCode.STOPPED, f"stopped by {describe(reasons)} before the first step"


def _counters(
    parts: Parts, data: Data, rank_zero: RankZero | None
) -> dict[str, Callable[[], float]]:
    """Return what counts its own seconds, by phase."""
    return {
        "data": lambda: data.train_loader.wait_seconds,
        "communication": parts.step.communication_seconds,
        "checkpoint": lambda: rank_zero.store.stall_seconds if rank_zero is not None else 0.0,
    }
