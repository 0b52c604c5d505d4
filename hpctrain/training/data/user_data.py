"""Datasets and DataLoaders that users bring as objects: made, checked, served as files are."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hpctrain.config import Config
from hpctrain.config.data_rules import names_object
from hpctrain.config.fields import needed_fields
from hpctrain.config.importing import imported
from hpctrain.data.loading.map_style.dataset import (
    Intake,
    MapDataset,
    fingerprint_of,
    in_turn,
    looked_at,
    only_samples,
    taken_in,
)
from hpctrain.data.loading.map_style.fetch import Fetcher, held_generators
from hpctrain.data.loading.map_style.parcel import Parcel
from hpctrain.data.loading.map_style.passes import PassReader
from hpctrain.data.loading.map_style.workers import FetchThread, PassJob, Travelling, processes
from hpctrain.data.loading.worker_pool import Workers
from hpctrain.errors import ConfigError, DatasetError
from hpctrain.launch.environment import without_rank
from hpctrain.launch.process_group import World
from hpctrain.topology import on_all_ranks, raise_together
from hpctrain.training.components import Brought
from hpctrain.training.modules.data_trainer import DataTrainer, introduce
from hpctrain.training.modules.overrides import is_own
from hpctrain.training.modules.stand_in import TrainerStandIn
from hpctrain.training.position import StopAt
from hpctrain.training.prepare_data import fetching, name_of, prepare_data
from hpctrain.utils.text import listed, plural

logger = logging.getLogger("hpctrain")

_LOADERS = {"train": "train_dataloader", "validation": "val_dataloader", "test": "test_dataloader"}


def brings_data(config: Config, brought: Brought) -> bool:
    """Tell whether objects stand in place of files."""
    given = (config.data.use, brought.train, brought.datamodule)
    return any(each is not None for each in given) or names_object(config.data.train)


def take_data(config: Config, world: World, brought: Brought) -> tuple[Config, Brought, list[str]]:
    """Make the Datasets, and the config that their DataLoaders ask for. Collective: all ranks.

    Args:
        config: names them, where they are not brought.
        world: the ranks.
        brought: Datasets, DataLoaders, or a datamodule.

    Returns:
        The config with the batch size, the order and the end of epochs of the DataLoader; `Intake`
        objects in place of Datasets; and lines for the header.

    Raises:
        HpctrainError: on every rank, if they cannot be made, or not be served in the one order.
    """
    datamodule, made, told = _made(config, world, brought)
    further = config.data.evaluations
    with raise_together(world.communicator):
        made |= {
            name: built_object(f"data.evaluations.{name}", reference, {})
            for name, reference in further.items()
        }
        given = dict(made)
        validation = all_taken(made.pop("validation", None), "validation", config)
        taken = {name: taken_by_name(each, name, config) for name, each in made.items()}
        if "train" not in taken:
            raise ConfigError("the datamodule has no train_dataloader: nothing to train with")
        config, notes = _settled(config, taken["train"], brought.accumulated)
        notes += told
    brought = dataclasses.replace(
        brought,
        train=taken["train"],
        validation=validation,
        evaluations={name: only_samples(taken[name]) for name in further},
        datamodule=datamodule,
        given=given,
    )
    return config, brought, notes


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One Dataset of a run, as this rank reads it.

    Attributes:
        dataset: with its fingerprint.
        reader: of its passes.
        notes: what the header should say of it.
    """

    dataset: MapDataset
    reader: PassReader
    notes: Sequence[str]


def served(intake: Intake, config: Config, world: World) -> Served:
    """Look at a Dataset on every rank, and find who reads it. Collective: all ranks.

    Raises:
        DatasetError: on every rank, if it is not the same on all of them.
    """
    dataset = intake.dataset
    fetcher = Fetcher(dataset.dataset, dataset.collate, seeded=dataset.seeded)
    facts = on_all_ranks(world.communicator, lambda: looked_at(dataset, fetcher, config.run.seed))
    _require_equal(dataset.source, facts)
    dataset = dataclasses.replace(dataset, fingerprint=fingerprint_of(facts[0]))
    workers, note = _workers(dataset, fetcher)
    names = needed_fields(config)
    reader = PassReader(dataset, fetcher, workers, world.device, names)
    notes = [note]
    if held := held_generators(dataset.dataset) if dataset.seeded else ():
        notes.append(
            f"{dataset.source}: {dataset.kind} holds generators of its own, {listed(held, 3)}, "
            "which are not seeded for each sample: what they draw differs with workers, ranks and "
            "restarts. Seed them in __getitem__ from torch.initial_seed(), or draw from torch's"
        )
    return Served(dataset=dataset, reader=reader, notes=notes)


def _made(config: Config, world: World, brought: Brought) -> tuple[Any, dict[str, Any], list[str]]:
    """Return the datamodule, what to train and evaluate with, and lines for the header.

    Collective: all ranks.
    """
    from hpctrain.training.model.undisturbed import seed_generators

    # Splits that are drawn at random are then the same on all ranks.
    seed_generators(config.run.seed)
    section, datamodule = config.data, brought.datamodule
    if datamodule is None and section.use is not None:
        with raise_together(world.communicator):
            datamodule = built_object("data.use", section.use, section.arguments)
    if datamodule is not None:
        trainer = _introduced(datamodule, config, world, "fit", brought.model)
        prepare_data([datamodule], world, seconds=config.launch.prepare_timeout_seconds)
        made = _of_datamodule(datamodule)
        return datamodule, made, [] if trainer is None else trainer.notes()
    found = {"train": brought.train, "validation": brought.validation}
    named: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
        "train": (section.train, section.train_arguments),
        "validation": (section.validation, section.validation_arguments),
    }
    with raise_together(world.communicator):
        for name, (reference, arguments) in named.items():
            if found[name] is None and brought.train is None and names_object(reference):
                found[name] = built_object(f"data.{name}", reference, arguments)
    return None, {name: each for name, each in found.items() if each is not None}, []


def _introduced(
    datamodule: Any, config: Config, world: World, stage: str, model: Any = None
) -> DataTrainer | None:
    """Give a datamodule its trainer, before the run is there of which it tells."""
    facts = TrainerStandIn(config, world, StopAt.of(config.training, 1, 1), model)
    facts.state.begin(stage)
    facts.datamodule = datamodule
    return introduce(datamodule, facts, is_bound=False)


def made_for(config: Config, world: World, name: str, stage: str) -> Any:
    """Return what the config has to evaluate with, or to predict for. Collective: all ranks.

    Args:
        config: names a Dataset, or a datamodule.
        world: the ranks.
        name: "train", "validation", "test", or a name of `data.evaluations`.
        stage: that a datamodule is set up for.

    Returns:
        A Dataset or DataLoader; None: there is none of that name.
    """
    from hpctrain.training.model.undisturbed import seed_generators

    seed_generators(config.run.seed)
    section = config.data
    if section.use is None or name in section.evaluations:
        reference: Any = section.evaluations.get(name) or getattr(section, name, None)
        with raise_together(world.communicator):
            if not names_object(reference):
                return None
            arguments = getattr(section, f"{name}_arguments", {})
            return built_object(f"data.{name}", reference, arguments)
    with raise_together(world.communicator):
        datamodule = built_object("data.use", section.use, section.arguments)
    _introduced(datamodule, config, world, stage)
    prepare_data([datamodule], world, seconds=config.launch.prepare_timeout_seconds)
    with raise_together(world.communicator):
        set_up(datamodule, "fit" if name == "train" else stage)
        if name not in _LOADERS:
            return None
        hooks = [_LOADERS[name]]
        if stage == "predict":
            hooks.insert(0, "predict_dataloader")
        makers = filter(None, (own_hook(datamodule, hook) for hook in hooks))
        make = next(makers, None)
        return None if make is None else make()


def built_object(key: str, reference: str, arguments: Mapping[str, Any]) -> Any:
    """Return what an import path makes.

    Raises:
        ConfigError: if it cannot be imported, or its arguments do not fit.
    """
    try:
        target: Any = imported(reference)
    except ConfigError as error:
        raise ConfigError(f'{key} = "{reference}": {error}') from error
    try:
        inspect.signature(target).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f'{key} = "{reference}" refuses its arguments: {error}') from error
    except ValueError:  # written in C without a signature: the call will tell
        pass
    with fetching(f'{key} = "{reference}"'):
        return target(**arguments)


_TRANSFER = "what becomes of a batch is for the module's own hook of this name, or for collate_fn"
_STATE = "a run goes on by the order of its data, which needs no state of a datamodule"
NOT_CALLED = {
    "on_before_batch_transfer": _TRANSFER,
    "transfer_batch_to_device": _TRANSFER,
    "on_after_batch_transfer": _TRANSFER,
    "state_dict": _STATE,
    "load_state_dict": _STATE,
    "on_exception": "a callback has the same hook",
}
"""Hooks of a datamodule that are not called, and the way out."""


def set_up(datamodule: Any, stage: str) -> None:
    """Have a datamodule make its data for a stage; hooks that are not called are refused.

    Raises:
        ConfigError: naming the hook and the way out.
    """
    for name, way_out in NOT_CALLED.items():
        if own_hook(datamodule, name) is not None and not isinstance(datamodule, nn.Module):
            kind = type(datamodule).__name__
            raise ConfigError(f"datamodule: {kind}.{name} is not called here: {way_out}")
    if (setup := own_hook(datamodule, "setup")) is not None:
        with fetching(f"setup of {name_of(datamodule)}"):
            setup(stage)


def _of_datamodule(datamodule: Any) -> dict[str, Any]:
    """Return what a datamodule has to train and to evaluate with."""
    set_up(datamodule, "fit")
    found = {}
    for name in ("train", "validation"):
        hook = _LOADERS[name]
        if (make := own_hook(datamodule, hook)) is not None and (made := make()) is not None:
            found[name] = made
    return found


def own_hook(owner: Any, name: str) -> Any:
    """Return a hook that the user has written, None if it is only Lightning's empty one."""
    hook = getattr(owner, name, None)
    if not callable(hook):
        return None
    return hook if is_own(owner, name) else None


def taken_by_name(given: Any, name: str, config: Config) -> Intake:
    """Return what is to be served of what the user gives to train, validate, test or predict with.

    Raises:
        HpctrainError: if it cannot be served in the one order.
    """
    if isinstance(given, Intake):
        return given
    source = _called(name, config)
    return taken_in(given, source, workers=config.data.workers, seeded=config.data.seed_samples)


def all_taken(given: Any, name: str, config: Config) -> list[Intake]:
    """Return what to evaluate with of what the user gives: one after the other, every sample once.

    Raises:
        HpctrainError: if one of them cannot be served.
    """
    source = _called(name, config)
    loaders = [] if given is None else in_turn(given, source)
    section, found = config.data, []
    for number, each in enumerate(loaders):
        called = source if len(loaders) == 1 else f"{source}, loader {number}"
        intake = (
            each
            if isinstance(each, Intake)
            else taken_in(each, called, workers=section.workers, seeded=section.seed_samples)
        )
        found.append(only_samples(intake))
    return found


def _called(name: str, config: Config) -> str:
    """Return what messages call the data of a split."""
    named: Any = config.data.evaluations.get(name) or getattr(config.data, name, None)
    return named if names_object(named) else config.data.use or f"the {name} data"


def _settled(config: Config, train: Intake, accumulated: int = 1) -> tuple[Config, list[str]]:
    """Return the config with what a DataLoader says, where the config says nothing.

    Args:
        config: of the job.
        train: what it trains with.
        accumulated: batches of the DataLoader that make a step.

    Raises:
        ConfigError: if neither says how large a batch is.
    """
    section, notes = config.data, []
    changed: dict[str, Any] = {}
    if train.batch_size is None and not section.global_batch_size:
        raise ConfigError(
            f"data.global_batch_size: missing; {train.dataset.source} is a Dataset, and no "
            "DataLoader says how many samples of all ranks make a batch"
        )
    if train.batch_size is not None:
        size = section.global_batch_size or train.batch_size * accumulated
        changed["global_batch_size"] = size
        if accumulated > 1:
            changed["micro_batch_size"] = section.micro_batch_size or train.batch_size
        if size != train.batch_size:
            notes.append(
                f"data.global_batch_size = {size}, not the {train.batch_size} of the DataLoader"
            )
        elif train.from_loader:
            notes.append(f"the DataLoader's batch size, {size}, is that of all ranks together")
    if train.shuffle is False and section.shuffle:
        changed["shuffle"] = False
        notes.append("the DataLoader does not shuffle: data.shuffle = false")
    if train.draws is not None:
        changed["epoch_samples"] = section.epoch_samples or train.draws
        notes.append("samples are drawn by the weights of the DataLoader's sampler")
    if train.drop_last:
        changed["drop_last"] = True
    return dataclasses.replace(config, data=dataclasses.replace(section, **changed)), notes


def _require_equal(source: str, facts: Sequence[Sequence[str]]) -> None:
    """Check that all ranks have the same Dataset.

    Raises:
        DatasetError: naming what differs.
    """
    for rank, each in enumerate(facts):
        for ours, theirs in zip(facts[0], each, strict=False):
            if ours != theirs:
                raise DatasetError(
                    f"{source} is not the same on all ranks: {theirs} on rank {rank}, {ours} on "
                    "rank 0. A split has to be drawn from a generator with a seed of its own, and "
                    "files have to be listed in a sorted order",
                    everywhere=True,
                )


def _workers(dataset: MapDataset, fetcher: Fetcher) -> tuple[Workers[PassJob, Any] | None, str]:
    """Return who reads a Dataset beside the training, None if nobody, and a line that says so."""
    who = f"{dataset.source}: {dataset.kind} of {dataset.samples:,} samples"
    reason = "no workers are asked for (data.workers, or a DataLoader's num_workers)"
    if dataset.workers:
        try:
            parcel = Parcel.of(Travelling(dataset.dataset, dataset.collate, dataset.worker_init))
        except Exception as error:  # noqa: BLE001 - whatever the user's class raises
            reason = f"it cannot be sent to worker processes: {type(error).__name__}: {error}"
        else:
            used = () if fetcher.draws is None else tuple(sorted(fetcher.draws.used))
            found = processes(
                dataset.source,
                parcel,
                dataset.workers,
                without_rank(os.environ),
                seeded=dataset.seeded,
                used=used,
            )
            readers = plural(dataset.workers, "worker process", "worker processes")
            return found, f"{who}, read by {readers} a rank"
    if dataset.seeded:
        return None, f"{who}, read by the rank itself between steps: {reason}"
    threads = max(1, dataset.workers)
    pool: Workers[PassJob, Any] = Workers([FetchThread(fetcher) for _ in range(threads)])
    return pool, f"{who}, read by {plural(threads, 'thread')} of the rank: {reason}"
