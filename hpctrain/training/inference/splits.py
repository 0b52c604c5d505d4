"""Samples of a split (train, test, NAME) for evaluation and prediction: of files or objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hpctrain.config import Config
from hpctrain.config.fields import (
    Normalization,
    normalization_of,
    static_fields,
    stored_fields,
)
from hpctrain.config.semantics import Semantics, semantics_of
from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.batch import EvaluationBatches
from hpctrain.data.loading.evaluation_loader import EvaluationLoader
from hpctrain.data.loading.loader import LoaderOptions
from hpctrain.data.loading.map_style.dataset import Intake, MapDataset
from hpctrain.data.loading.map_style.loaders import MapEvaluationLoader
from hpctrain.data.loading.map_style.passes import PassReader
from hpctrain.data.opening.open_datasets import open_for_evaluation, open_for_training, open_named
from hpctrain.data.order.batches import EvaluationShare, RankShare
from hpctrain.data.reading.threads import reading_threads
from hpctrain.errors import ConfigError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.data.recorded import find_normalizations, normalizations_begun_with
from hpctrain.training.data.transforms import Transforms
from hpctrain.training.data.user_data import all_taken, made_for, served
from hpctrain.training.inference.weights import Chosen
from hpctrain.utils.text import did_you_mean


class Split(Protocol):
    """The samples that a command works on, as a rank serves them.

    Attributes:
        dataset: the same on all ranks.
        fields: names in a batch, none where a batch has no names.
        normalizations: of those of the fields of files that are normalized.
    """

    @property
    def dataset(self) -> Dataset | MapDataset: ...
    @property
    def fields(self) -> Sequence[str]: ...
    @property
    def normalizations(self) -> Mapping[str, Normalization]: ...

    def loader(self, world: World, rows: Int64s | None = None) -> EvaluationBatches:
        """Return what serves every sample once over all ranks, or these rows on this one."""
        ...

    def close(self) -> None:
        """End what makes samples."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OfFiles:
    """Samples of HDF5 files."""

    dataset: Dataset
    normalizations: Mapping[str, Normalization]
    transforms: Transforms
    options: LoaderOptions
    fields: Sequence[str]
    batch_size: int
    max_tokens: int | None
    seed: int

    def loader(self, world: World, rows: Int64s | None = None) -> EvaluationLoader:
        """Return what serves every sample once over all ranks, or these rows on this one."""
        return EvaluationLoader(
            self.dataset,
            EvaluationShare(
                batch_size=self.batch_size,
                ranks=RankShare(world.topology.rank, world.topology.world_size),
                seed=self.seed,
                rows=rows,
                max_tokens=self.max_tokens,
            ),
            self.options,
            fields=self.fields,
            preprocessing=self.transforms.validation,
        )

    def close(self) -> None:
        """End what transforms samples."""
        self.transforms.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class OfObjects:
    """Samples of a torch Dataset."""

    dataset: MapDataset
    reader: PassReader
    batch_size: int
    seed: int
    fields: Sequence[str] = ()
    normalizations: Mapping[str, Normalization] = field(default_factory=dict)

    def loader(self, world: World, rows: Int64s | None = None) -> MapEvaluationLoader:
        """Return what serves every sample once over all ranks, or these rows on this one."""
        share = EvaluationShare(
            batch_size=self.batch_size,
            ranks=RankShare(world.topology.rank, world.topology.world_size),
            seed=self.seed,
            rows=rows,
        )
        return MapEvaluationLoader(self.dataset, share, self.reader)

    def close(self) -> None:
        """Do nothing: a loader ends its own workers."""


def open_objects(config: Config, world: World, name: str, stage: str) -> list[OfObjects]:
    """Make the torch Datasets of a split on every rank. Collective: all ranks.

    There are several where a datamodule returns several loaders.

    Args:
        config: names it, or a datamodule.
        world: the ranks.
        name: "train", "validation", "test", or a name of `data.evaluations`.
        stage: that a datamodule is set up for: "validate", "test" or "predict".

    Raises:
        HpctrainError: on every rank, if there is no such split, or it cannot be served.
    """
    given = made_for(config, world, name, stage)
    with raise_together(world.communicator):
        if given is None:
            raise ConfigError(f"--split {name}: neither [data] nor its datamodule has such data")
        intakes = all_taken(given, name, config)
    return [_of_objects(each, config, world) for each in intakes]


def _of_objects(intake: Intake, config: Config, world: World) -> OfObjects:
    """Look at a Dataset on every rank. Collective: all ranks."""
    size = config.data.global_batch_size or intake.batch_size or 1
    ready = served(intake, config, world)
    share = -(-size // world.topology.world_size)
    return OfObjects(
        dataset=ready.dataset,
        reader=ready.reader,
        batch_size=min(config.data.micro_batch_size or share, share),
        seed=config.run.seed,
    )


def open_files(
    config: Config, world: World, name: str, chosen: Chosen, fields: Sequence[str]
) -> OfFiles:
    """Open the samples of a split on rank 0, and make all ranks ready to serve them.

    Their numbers become what they were in training: by the normalization that the checkpoint
    holds. Only where it holds none, the statistics of the training data are read.

    Collective: all ranks.

    Args:
        config: names the data.
        world: the ranks.
        name: "train", "validation", "test", or a name of `data.evaluations`.
        chosen: the checkpoint.
        fields: of the samples, as they are stored; none: all that the files have.

    Raises:
        HpctrainError: on every rank, if there is no such split, or its files are not what the
            config says.
    """
    section, topology = config.data, world.topology
    semantics = semantics_of(config, chosen.values or None)
    opened: tuple[Dataset, dict[str, Normalization]] | None = None
    with raise_together(world.communicator):
        if topology.is_rank_zero:
            dataset = _open(config, name, fields, semantics)
            opened = dataset, _normalizations(config, dataset, chosen, semantics)
    dataset, normalizations = world.communicator.broadcast(opened)
    fields = fields or list(dataset.fields)
    with raise_together(world.communicator):
        # Twice the same: what is done to samples to train with is not asked for.
        there = {*fields, *static_fields(config)}
        used = {name: each for name, each in normalizations.items() if name in there}
        transforms = Transforms.of(config, dataset, dataset, fields, used, world)
    share = -(-section.global_batch_size // topology.world_size)
    return OfFiles(
        dataset=dataset,
        normalizations=normalizations,
        transforms=transforms,
        options=LoaderOptions(
            device=world.device,
            buffer_mb=section.buffer_mb,
            threads=section.threads or reading_threads(topology.local_world_size),
            read_retries=section.read_retries,
        ),
        fields=fields,
        batch_size=min(section.micro_batch_size or share, share),
        max_tokens=section.max_tokens,
        seed=config.run.seed,
    )


def _open(config: Config, name: str, fields: Sequence[str], semantics: Semantics) -> Dataset:
    section = config.data
    if name == "train":
        return open_for_training(section, fields, semantics)
    if name in section.evaluations:
        return open_named(section, name, fields, semantics)
    if name not in ("test", "validation"):
        known = ["train", "validation", "test", *section.evaluations]
        raise ConfigError(
            f"--split {name}: data.evaluations has no such name{did_you_mean(name, known)}: "
            f"expected one of {', '.join(known)}"
        )
    if name == "test":
        if section.test is None and section.samples.test is None:
            raise ConfigError(
                "data.test: missing; it names the samples to test with, as data.validation those "
                "of validation"
            )
        section = dataclasses.replace(
            section,
            validation=section.test,
            samples=dataclasses.replace(
                section.samples, validation=section.samples.test, validation_fraction=None
            ),
        )
    dataset = open_for_evaluation(section, fields, semantics)
    if dataset is None:
        raise ConfigError("data.validation: missing; name another split by --split")
    return dataset


def _normalizations(
    config: Config, dataset: Dataset, chosen: Chosen, semantics: Semantics
) -> dict[str, Normalization]:
    """Return the numbers of every field that is normalized, of the training data if need be."""
    begun = normalizations_begun_with(config, chosen.values)
    is_measured = any(
        name not in begun and isinstance(normalization_of(each), str)
        for name, each in config.data.normalize.items()
    )
    train = dataset
    if is_measured:
        train = open_for_training(config.data, stored_fields(config), semantics)
    return find_normalizations(config, train, begun)
