"""The parts of a run, put together from the config: data, model, optimizer, schedule, step."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hpctrain.config import Config
from hpctrain.config.capabilities import unsupported
from hpctrain.config.messages import did_you_mean, shown
from hpctrain.config.normalizing import Normalization
from hpctrain.data import Dataset, Order
from hpctrain.data.finding.checking import verify_share
from hpctrain.data.finding.opening import open_datasets
from hpctrain.data.loading.loader import EvaluationLoader, TrainLoader
from hpctrain.data.order.partition import served_samples
from hpctrain.data.order.permutation import derive_key
from hpctrain.data.reading.helpers import reading_threads
from hpctrain.data.reading.node_cache import hold_on_node
from hpctrain.data.state import from_state
from hpctrain.errors import ConfigError
from hpctrain.launch.agreement import raise_together
from hpctrain.launch.world import World
from hpctrain.training.batch_finishing import find_normalizations
from hpctrain.training.horizon import Horizon, Place
from hpctrain.training.optimization.learning_rate import LearningRate
from hpctrain.training.optimization.optimizers import build_optimizer, refuse_whole_tensors
from hpctrain.training.persistence import Resumed
from hpctrain.training.staging import Staging
from hpctrain.training.step.broadcast import broadcast_model
from hpctrain.training.step.precision import NumberFormat
from hpctrain.training.step.preparation import is_spread, prepare_model
from hpctrain.training.step.sync_check import check_equal_shapes
from hpctrain.training.step.train_step import TrainStep
from hpctrain.training.task import Task
from hpctrain.training.transforms import Transforms

if TYPE_CHECKING:  # torch takes its time to load what only sharded runs need
    from hpctrain.training.step.shards import Shards

Components = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The datasets of a run, the same on all ranks, and how the training data are served.

    Attributes:
        transforms: what becomes of samples between the files and the task.
        place: where the run goes on.
    """

    train: Dataset
    validation: Dataset | None
    train_loader: TrainLoader
    validation_loader: EvaluationLoader | None
    transforms: Transforms
    place: Place
    horizon: Horizon
    staging: Staging

    def stage(self, config: Config, world: World) -> None:
        """Begin to copy the shards to each node's disk, if asked for. Collective: all ranks."""
        self.staging.start(config, world, [self.train, *filter(None, [self.validation])])

    def close(self) -> None:
        """End the threads and close all files."""
        self.train_loader.close()
        if self.validation_loader is not None:
            self.validation_loader.close()
        self.transforms.close()
        self.staging.close()


def open_data(config: Config, world: World, resumed: Resumed | None) -> Data:
    """Open the datasets on rank 0 and make the loaders of every rank. Collective: all ranks.

    Raises:
        DatasetError: on every rank, if the data are not what the config says, or not those that
            the checkpoint was trained on.
        ConfigError: on every rank, if there are more ranks than lanes, or `[data.normalize]` or
            `data.transform` do not fit the data.
    """
    fields = list(dict.fromkeys([*config.task.inputs, *filter(None, [config.task.target])]))
    opened: tuple[Dataset, Dataset | None, dict[str, Normalization]] | None = None
    with raise_together(world.communicator):
        if world.topology.is_rank_zero:
            datasets = open_datasets(config.data, fields)
            opened = (*datasets, find_normalizations(config, datasets[0]))
    train, validation_data, normalizations = world.communicator.broadcast(opened)
    section, staging = config.data, Staging()
    rank, world_size = world.topology.rank, world.topology.world_size
    if section.verify == "start":
        with raise_together(world.communicator):
            verify_share([train, *filter(None, [validation_data])], rank, world_size)
    lanes = section.lanes
    if lanes is None and resumed is not None:
        # The default stays what it was when the run began, whatever the batch size is now.
        lanes = resumed.values["data"]["lanes"]
    threads = section.threads or reading_threads(world.topology.local_world_size)
    memory = None
    if section.cache == "memory":
        memory = hold_on_node(
            train,
            world.topology,
            world.communicator,
            threads=threads,
            retries=section.read_retries,
            locate=staging.locate,
        )
    with raise_together(world.communicator):
        order = Order.for_dataset(
            train,
            seed=config.run.seed,
            global_batch_size=section.global_batch_size,
            lanes=lanes,
            window=section.window,
            is_resident=memory is not None,
        )
        place, begun = Place(), {}
        if resumed is not None:
            served = served_samples(train.samples, section.global_batch_size, section.drop_last)
            running, epoch, position = from_state(
                resumed.values["data"],
                train,
                order,
                served,
                allow_change=config.checkpoint.allow_data_change,
            )
            # Under another batch size an epoch may be over that was not when it was saved.
            place = dataclasses.replace(resumed.place, epoch=epoch, position=position)
            begun[epoch] = running
        transforms = Transforms.of(config, train, validation_data, fields, normalizations, world)
        train_loader = TrainLoader(
            train,
            order,
            fields=fields,
            global_batch_size=section.global_batch_size,
            drop_last=section.drop_last,
            rank=rank,
            world_size=world_size,
            device=world.device,
            buffer_mb=section.buffer_mb,
            threads=threads,
            begun=begun,
            memory=memory,
            read_retries=section.read_retries,
            locate=staging.locate,
            preparation=transforms.train,
            finishing=transforms.finishing,
        )
        validation_loader = validation_data and EvaluationLoader(
            validation_data,
            fields=fields,
            rank=rank,
            world_size=world_size,
            batch_size=section.micro_batch_size or train_loader.largest_share,
            device=world.device,
            buffer_mb=section.buffer_mb,
            read_retries=section.read_retries,
            locate=staging.locate,
            preparation=transforms.validation,
            finishing=transforms.finishing,
            seed=config.run.seed,
            threads=threads,
        )
    return Data(
        train=train,
        validation=validation_data,
        train_loader=train_loader,
        validation_loader=validation_loader,
        transforms=transforms,
        place=place,
        horizon=Horizon.of(config.training, train_loader.epoch_size, section.global_batch_size),
        staging=staging,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What is trained, and how."""

    model: nn.Module
    task: Task
    number_format: NumberFormat
    schedule: LearningRate
    step: TrainStep


class Shapes(Protocol):
    """What the parts have to know of the training data."""

    @property
    def largest_share(self) -> int:
        """The most samples of any rank in any batch."""
        ...

    @property
    def smallest_share(self) -> int:
        """The fewest."""
        ...

    def example(self) -> dict[str, Tensor]:
        """Return one row of every field, (1, *shape) on the device."""
        ...


def build_parts(
    config: Config,
    world: World,
    components: Components,
    shapes: Shapes,
    horizon: Horizon,
    *,
    validates: bool,
) -> Parts:
    """Build model, task, optimizer and step, the same on all ranks, and prime them.

    Collective: all ranks.

    Args:
        config: names the parts.
        world: the ranks.
        components: as resolved.
        shapes: of the training data: their loader.
        horizon: length of the run.
        validates: whether there are data to evaluate with.

    Raises:
        HpctrainError: on every rank, if a component refuses its arguments or the data.
    """
    if config.run.deterministic:
        torch.use_deterministic_algorithms(True)
    seed_generators(config.run.seed)
    with raise_together(world.communicator):
        _check_capabilities(config, world)
        training = config.training
        number_format = NumberFormat.of(
            training.precision, world.device, channels_last=training.channels_last
        )
        model = _built("model", config, components, **config.model.arguments)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model.use = {config.model.use!r} makes no torch.nn.Module")
        model = prepare_model(
            model, training, number_format, world.device, world.topology.world_size
        )
    shards: Shards | None = None
    if is_spread(training, world.topology.world_size):
        broadcast_model(world, model)  # else parts of different models could mix
        from hpctrain.training.step.shards import Shards

        with raise_together(world.communicator):
            shards = Shards(model, training, number_format, world)
    with raise_together(world.communicator):
        task = _built(
            "task",
            config,
            components,
            inputs=config.task.inputs,
            target=config.task.target,
            **config.task.arguments,
        )
        _check_best(config, task)
        optimizer = build_optimizer(
            components["optimizer"],
            shards or model,
            config.optimizer.lr,
            config.optimizer.arguments,
            groups=config.optimizer.groups,
            decay_norms_and_biases=config.optimizer.decay_norms_and_biases,
        )
        if shards is not None:
            refuse_whole_tensors(optimizer)
        schedule = LearningRate.of(
            config.scheduler, components["scheduler"], config.optimizer.lr, horizon
        )
        evaluates = config.training.evaluate_every_epochs or config.training.evaluate_every_steps
        schedule.watch(task.metrics if validates and evaluates else {})
        example = shapes.example()
    check_equal_shapes(model, world)
    step = TrainStep(
        model,
        task,
        optimizer,
        world,
        number_format=number_format,
        clip_norm=config.training.clip_norm,
        clip_value=config.training.clip_value,
        ema_decay=config.training.ema_decay,
        micro_batch_size=config.data.micro_batch_size,
        largest_share=shapes.largest_share,
        smallest_share=shapes.smallest_share,
        example=example,
        bucket_mb=config.training.bucket_mb,
        compress_gradients=config.training.compress_gradients,
        shards=shards,
    )
    step.prime()
    # From here every rank draws its own numbers.
    seed_generators(derive_key(config.run.seed, 1 + world.topology.rank))
    return Parts(model=model, task=task, number_format=number_format, schedule=schedule, step=step)


def seed_generators(seed: int) -> None:
    """Seed torch, on all devices, numpy and Python."""
    torch.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - users' transforms draw from it
    random.seed(seed)


def _built(section: str, config: Config, components: Components, **arguments: Any) -> Any:
    """Call a component; what it does not like about its arguments is the config's mistake."""
    try:
        return components[section](**arguments)
    except (TypeError, ValueError) as error:
        use = getattr(config, section).use
        raise ConfigError(f'[{section}] use = "{use}" refuses its arguments: {error}') from error


def _check_capabilities(config: Config, world: World) -> None:
    """Refuse what cannot work here; before the world was known, only a part of that was said."""
    found = unsupported(
        precision=config.training.precision,
        device=world.device.type,
        backend=world.backend,
        compress_gradients=config.training.compress_gradients,
        sync_batchnorm=config.training.sync_batchnorm and world.topology.world_size > 1,
        strategy=config.training.strategy,
        cpu_offload=config.training.cpu_offload,
        torch=torch.__version__,
    )
    if found is not None:
        key, because = found
        section, name = key.split(".")
        value = shown(getattr(getattr(config, section), name))
        raise ConfigError(f"{key} = {value}: {because}")


def _check_best(config: Config, task: Task) -> None:
    metric = config.checkpoint.keep_best
    if metric is None or metric in task.metrics:
        return
    known: Sequence[str] = sorted(task.metrics)
    raise ConfigError(
        f'checkpoint.keep_best = "{metric}": {config.task.use} has no such metric'
        f"{did_you_mean(metric, known)} (metrics: {', '.join(known)})"
    )
