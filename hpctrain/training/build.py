"""Model, task, optimizer, LR scheduler and step of a run, built from its config."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from hpctrain.checkpoint.state import HasParameters
from hpctrain.config import Config
from hpctrain.config.capabilities import Combination, records_graphs, unsupported
from hpctrain.config.fields import target_mask, target_weight
from hpctrain.config.messages import shown
from hpctrain.config.registry import OWN, resolve_listed
from hpctrain.config.schema import SchedulerSection
from hpctrain.config.semantics import NEWEST, Semantics
from hpctrain.data.order.permutation import derive_key
from hpctrain.errors import ConfigError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.checkpointing.snapshot import refuse_unmade
from hpctrain.training.components import NOTHING, Brought, Components
from hpctrain.training.early_stopping import check_monitored, directions
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.preparation import cast_as_begun, is_spread, prepare_model
from hpctrain.training.model.undisturbed import seed_generators
from hpctrain.training.modules.callbacks import (
    TaskCallbacks,
    build_callbacks,
    notes_of,
    register,
    with_those_of_module,
)
from hpctrain.training.modules.hooks import OWN_STATE, OwnState, check_loaders, notes_of_module
from hpctrain.training.modules.lr_schedulers import ModuleSchedule
from hpctrain.training.modules.optimizers import configure, tried
from hpctrain.training.modules.overrides import is_module, is_own, place_of, uncompiled
from hpctrain.training.modules.run_logger import RunLogger, foreign_calls
from hpctrain.training.modules.stand_in import TrainerStandIn
from hpctrain.training.modules.task import ModuleTask
from hpctrain.training.optim.lr_scheduler import LearningRate, Schedule
from hpctrain.training.optim.optimizer import build_optimizer, refuse_whole_tensors
from hpctrain.training.optim.trial import TriedOptimizer, by_pattern, try_optimizer
from hpctrain.training.parallel.ddp import broadcast_model, check_equal_shapes
from hpctrain.training.position import StopAt
from hpctrain.training.prepare_data import fetching, prepare_data
from hpctrain.training.step import Shapes, StepOptions, TrainStep
from hpctrain.training.task.misfits import explain_misfit, ranges_checked
from hpctrain.training.task.runner import TaskRunner
from hpctrain.training.task.task import Task, adopt_task

if TYPE_CHECKING:  # torch takes its time to load what only sharded runs need
    from hpctrain.training.parallel.fsdp import ShardedModel
    from hpctrain.training.parallel.fsdp_units import Findings


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What is trained, and how; `notes` is what else the header should say of it."""

    model: nn.Module
    task: Task
    number_format: NumberFormat
    schedule: Schedule
    step: TrainStep
    callbacks: TaskCallbacks = field(default_factory=TaskCallbacks)
    notes: Sequence[str] = ()

    @property
    def trainer(self) -> TrainerStandIn | None:
        """What a module, or the callbacks of a task, know of the run; None: nobody asks."""
        asking: Any = self.task if isinstance(self.task, ModuleTask) else self.callbacks
        found: TrainerStandIn | None = asking.trainer
        return found


def build_parts(
    config: Config,
    world: World,
    components: Components,
    shapes: Shapes,
    stop_at: StopAt,
    *,
    semantics: Semantics = NEWEST,
    validation_batches: Sequence[int] = (),
    brought: Brought = NOTHING,
) -> Parts:
    """Build model, task, optimizer and step, the same on all ranks, and try them in a dry run.

    Collective: all ranks.

    Args:
        config: names the parts.
        world: the ranks.
        components: as resolved.
        shapes: of the training data: their loader.
        stop_at: length of the run.
        semantics: the rules of the run.
        validation_batches: of each loader to evaluate with, of the rank that has the most.
        brought: objects in place of what the config names.

    Raises:
        HpctrainError: on every rank, if a component refuses its arguments or the data.
    """
    if config.run.deterministic:
        torch.use_deterministic_algorithms(True)
    seed_generators(config.run.seed)
    training = config.training
    with raise_together(world.communicator):
        _check_capabilities(config, world)
        model = make_model(config, components, brought)
        task = build_task(config, components)
        callbacks = _bind(task, model, config, world, stop_at, brought, validation_batches)
    if isinstance(task, ModuleTask):
        prepare_data([task], world, seconds=config.launch.prepare_timeout_seconds)
    with raise_together(world.communicator):
        if isinstance(task, ModuleTask):
            task.set_up()
        callbacks.set_up()
        model, number_format, notes = finish_model(model, config, world, semantics)
        example = shapes.example()
    sharded: ShardedModel | None = None
    if is_spread(training, world.topology.world_size):
        broadcast_model(world, model)  # else parts of different models could mix
        from hpctrain.training.parallel.fsdp import ShardedModel

        findings = _tried_out(world, model, task, number_format.cast(example, task.inputs))
        with raise_together(world.communicator):
            sharded = ShardedModel(model, training, number_format, world, findings)
    with raise_together(world.communicator):
        if not isinstance(task, ModuleTask):
            check_monitored(config, task)
        optimizer, schedule, found = _build_updates(
            config, world, components, model, task, sharded, stop_at
        )
        if isinstance(task, ModuleTask):
            uses = schedule.uses if isinstance(schedule, ModuleSchedule) else ()
            task.begin(optimizer, uses)
        else:
            callbacks.set_optimizer(optimizer)
            watch_metrics(config, task, schedule, validates=bool(validation_batches))
    check_equal_shapes(model, world)
    step = TrainStep(
        TaskRunner(
            model,
            task,
            number_format,
            graphs=_records_graphs(config) and world.device.type == "cuda",
        ),
        optimizer,
        world,
        options=StepOptions.of(config, shapes),
        shapes=shapes,
        example=example,
        sharded=sharded,
    )
    if found is not None:
        step.optimizer_state.check = found.check
    if isinstance(schedule, ModuleSchedule):
        step.registered.add("lr_schedulers", schedule.states)
    if isinstance(task, ModuleTask) and OwnState.is_of(task.module):
        step.registered.add(OWN_STATE, OwnState(task.module, task.trainer))
    notes += _register(callbacks, task, step)
    with ranges_checked(task):
        step.dry_run(lambda error, fields: explain_misfit(error, fields, config))
    # From here every rank draws its own numbers.
    seed_generators(derive_key(config.run.seed, 1 + world.topology.rank))
    return Parts(
        model=model,
        task=task,
        number_format=number_format,
        schedule=schedule,
        step=step,
        callbacks=callbacks,
        notes=notes,
    )


def _tried_out(world: World, model: nn.Module, task: Task, fields: Any) -> Findings:
    """Return what FSDP has to know of a model. Collective: all ranks."""
    from hpctrain.training.parallel.fsdp_units import try_out

    if not isinstance(task, ModuleTask):
        return try_out(world, model, task, fields)
    state = task.trainer.state
    before, state.stage = state.stage, "sanity_check"
    findings = try_out(world, model, task, fields)
    state.stage = before
    task.logs.forget_names()
    return findings


def watch_metrics(config: Config, task: Task, schedule: Schedule, *, validates: bool) -> None:
    """Tell a schedule which metrics there will be.

    Raises:
        ConfigError: if that is not what it needs.
    """
    evaluates = config.training.evaluate_every_epochs or config.training.evaluate_every_steps
    schedule.watch(directions(config, task) if validates and evaluates else {})


def _bind(
    task: Task,
    model: nn.Module,
    config: Config,
    world: World,
    stop_at: StopAt,
    brought: Brought,
    validation_batches: Sequence[int],
) -> TaskCallbacks:
    """Give a task its module, and both their callbacks.

    Returns:
        The callbacks of a hand-written task.

    Raises:
        ConfigError: if the module is none, or one of the callbacks.
    """
    adopt_task(model, task, world.device)
    given = build_callbacks(config, resolve_listed(config, "callbacks"), brought.callbacks)
    if not isinstance(task, ModuleTask):
        trainer = TrainerStandIn(config, world, stop_at, model) if given else None
        if trainer is not None:
            trainer.know_loggers(brought.shown_loggers)
        return TaskCallbacks(given, trainer)
    _refuse_half(config, model, task)
    task.bind(model, config, world, stop_at)
    task.hooks.set_callbacks(with_those_of_module(given, model))
    task.know(brought)
    task.trainer.num_val_batches = list(validation_batches)
    if brought.validation:
        check_loaders(model, "validation_step", len(brought.validation))
    return TaskCallbacks()


def _register(callbacks: TaskCallbacks, task: Task, step: TrainStep) -> list[str]:
    """Have what callbacks know saved with the run; return what the header should say of them."""
    register(callbacks.items, step.registered, callbacks.trainer, step.model)
    if not isinstance(task, ModuleTask):
        return [*notes_of(callbacks.items), *callbacks.notes()]
    register(task.hooks.callbacks, step.registered, task.trainer, step.model)
    notes = [*notes_of_module(task.module), *notes_of(task.hooks.callbacks)]
    if isinstance(task.trainer.logger, RunLogger):
        calls = foreign_calls([task.module, *task.hooks.callbacks])
        notes += [f"{call}: only another logger has it; here it is left out" for call in calls]
    return notes


def _refuse_half(config: Config, model: nn.Module, task: ModuleTask) -> None:
    """Refuse a config that leaves to a model what that does not bring.

    Raises:
        ConfigError: naming what is missing.
    """
    name = type(model).__name__
    if is_module(model) and config.optimizer.use == OWN and not is_own(model, OPTIMIZERS):
        raise ConfigError(
            f"model.use: {name} has no configure_optimizers, and the config no [optimizer]: one of "
            "them says what trains it"
        )
    if is_module(model) and config.optimizer.use != OWN and is_own(model, OPTIMIZERS):
        raise ConfigError(
            f"[optimizer] use: {name} has configure_optimizers ({place_of(model, OPTIMIZERS)}), "
            "and both say what trains it: leave [optimizer] and [scheduler] out"
        )
    if config.optimizer.use == OWN and config.scheduler != SchedulerSection():
        raise ConfigError(
            f"[scheduler]: {name} makes its optimizer and LR schedulers in configure_optimizers "
            f"({place_of(model, OPTIMIZERS)}): leave [scheduler] out"
        )


OPTIMIZERS = "configure_optimizers"


def build_model(
    config: Config,
    world: World,
    components: Components,
    semantics: Semantics = NEWEST,
    brought: Brought = NOTHING,
) -> tuple[nn.Module, NumberFormat, list[str]]:
    """Build the model; on the host, whole, where it is to be spread over the ranks.

    Returns:
        It; the format of its inputs; and what the header should say of it.

    Raises:
        ConfigError: if the component refuses its arguments, or makes no model.
    """
    model = make_model(config, components, brought)
    return finish_model(model, config, world, semantics)


def make_model(config: Config, components: Components, brought: Brought = NOTHING) -> nn.Module:
    """Return the model as its maker makes it, or as it was brought.

    Raises:
        ConfigError: if the component refuses its arguments, or makes no model.
    """
    model = brought.model
    if model is None:
        with fetching(f'model.use = "{config.model.use}"'):
            model = _built("model", config, components, **config.model.arguments)
    model = uncompiled(model)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.use = {config.model.use!r} makes no torch.nn.Module")
    return model


def finish_model(
    model: nn.Module, config: Config, world: World, semantics: Semantics = NEWEST
) -> tuple[nn.Module, NumberFormat, list[str]]:
    """Bring a model to its device and into its number format, see `build_model`.

    Raises:
        ConfigError: if it has parameters without numbers, or a key of the config fits it not.
    """
    training = config.training
    number_format = NumberFormat.of(
        training.precision, world.device, channels_last=training.channels_last
    )
    refuse_unmade(model)
    notes = []
    if semantics.model_dtypes == "cast":
        notes = cast_as_begun(model, number_format.parameters, training.precision)
    model = prepare_model(model, training, number_format, world.device, world.topology.world_size)
    return model, number_format.for_model(model), notes


def build_task(config: Config, components: Components) -> Task:
    """Build the task.

    Raises:
        ConfigError: if the component refuses its arguments.
    """
    task: Task = _built(
        "task",
        config,
        components,
        inputs=config.task.inputs,
        target=config.task.target,
        **_weighing(config),
        **config.task.arguments,
    )
    return task


def _built(section: str, config: Config, components: Components, **arguments: Any) -> Any:
    """Call a component; what it does not like about its arguments is the config's mistake."""
    try:
        return components[section](**arguments)
    except (TypeError, ValueError) as error:
        use = getattr(config, section).use
        raise ConfigError(f'[{section}] use = "{use}" refuses its arguments: {error}') from error


def _weighing(config: Config) -> dict[str, str]:
    """Return mask and weight of the target, for a built-in task; others find them as fields."""
    found = {"mask": target_mask(config), "weight": target_weight(config)}
    if ":" in config.task.use:
        return {}
    return {
        key: name
        for key, name in found.items()
        if name is not None and key not in config.task.arguments
    }


def _build_updates(
    config: Config,
    world: World,
    components: Components,
    model: nn.Module,
    task: Task,
    sharded: ShardedModel | None,
    stop_at: StopAt,
) -> tuple[Optimizer, Schedule, TriedOptimizer | None]:
    """Return the optimizer, its learning rates, and what was found out about it.

    Raises:
        ConfigError: if the config's, or the module's own, cannot be built.
    """
    if isinstance(task, ModuleTask) and config.optimizer.use == OWN:
        configured = configure(model, model, sharded)
        if sharded is not None:
            refuse_whole_tensors(configured.optimizer, configured.place)
        shown = tried(
            configured,
            sharded or model,
            rows=sharded is not None,
            ranks=world.topology.world_size,
        )
        schedule = ModuleSchedule(configured, stop_at, task.scheduler_step, lambda: task.logs.last)
        return configured.optimizer, schedule, shown
    build = functools.partial(_build_optimizer, config, components)
    optimizer = build(sharded or model)
    if sharded is not None:
        refuse_whole_tensors(optimizer)
    found = try_optimizer(
        build,
        sharded or model,
        by_pattern(config.optimizer.groups),
        rows=sharded is not None,
        ranks=world.topology.world_size,
    )
    if found is not None:
        found.check_schedule(config.scheduler, config.optimizer.groups)
    assert config.optimizer.lr is not None  # the schema has seen to it
    learning_rate = LearningRate.of(
        config.scheduler, components["scheduler"], config.optimizer.lr, stop_at
    )
    return optimizer, learning_rate, found


def _build_optimizer(config: Config, components: Components, model: HasParameters) -> Optimizer:
    assert config.optimizer.lr is not None
    return build_optimizer(
        components["optimizer"],
        model,
        config.optimizer.lr,
        config.optimizer.arguments,
        groups=config.optimizer.groups,
        decay_norms_and_biases=config.optimizer.decay_norms_and_biases,
    )


def _check_capabilities(config: Config, world: World) -> None:
    """Refuse what cannot work here; before the world was known, only a part of that was said."""
    found = unsupported(
        Combination(
            precision=config.training.precision,
            device=world.device.type,
            backend=world.backend,
            compress_gradients=config.training.compress_gradients,
            sync_batchnorm=config.training.sync_batchnorm and world.topology.world_size > 1,
            strategy=config.training.strategy,
            cpu_offload=config.training.cpu_offload,
            graphs=_records_graphs(config) and world.topology.world_size > 1,
        ),
        torch=torch.__version__,
    )
    if found is not None:
        key, because = found
        section, name = key.split(".")
        value = shown(getattr(getattr(config, section), name))
        raise ConfigError(f"{key} = {value}: {because}")


def _records_graphs(config: Config) -> bool:
    return records_graphs(compile=config.training.compile, mode=config.training.compile_mode)
