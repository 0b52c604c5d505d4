"""The data of a run: datasets, loaders, and the position in them that the run goes on from."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpctrain.config import Config
from hpctrain.config.fields import Normalization, stored_fields
from hpctrain.config.limits import is_shuffled, train_limit, validation_limit
from hpctrain.config.semantics import RECORD as SEMANTICS
from hpctrain.config.semantics import Semantics
from hpctrain.data.dataset import Dataset, DatasetFacts
from hpctrain.data.files.discovery import verify_share
from hpctrain.data.loading.batch import EvaluationBatches, TrainBatches
from hpctrain.data.loading.evaluation_loader import EvaluationLoader
from hpctrain.data.loading.loader import LoaderOptions, TrainLoader
from hpctrain.data.loading.map_style.dataset import Intake, MapDataset
from hpctrain.data.loading.map_style.loaders import MapEvaluationLoader, MapTrainLoader
from hpctrain.data.loading.preprocessing import Preprocessing
from hpctrain.data.opening.open_datasets import open_datasets, open_named
from hpctrain.data.opening.weights import Weights, read_weights, weights_of_file
from hpctrain.data.order.batches import Batching, Begun, Epochs, EvaluationShare, RankShare
from hpctrain.data.order.mixture import Terms
from hpctrain.data.order.order import Order, Sampling, served_samples
from hpctrain.data.order.state import block_rows_of, from_state, to_state
from hpctrain.data.reading.threads import reading_threads
from hpctrain.data.staging.node_cache import hold_on_node
from hpctrain.errors import ConfigError
from hpctrain.launch.process_group import World
from hpctrain.topology import on_rank_zero, raise_together
from hpctrain.training.checkpointing.resume import Resumed
from hpctrain.training.components import NOTHING, Brought
from hpctrain.training.data.recorded import (
    DECODING,
    FIELDS,
    FORMS,
    NORMALIZATION,
    decoding_to_record,
    fields_to_record,
    find_normalizations,
    forms_to_record,
    normalizations_begun_with,
    normalizations_to_record,
    refuse_other_decoding,
    refuse_other_forms,
    units_of,
)
from hpctrain.training.data.staging import Staging
from hpctrain.training.data.transforms import Transforms
from hpctrain.training.data.user_data import Served, brings_data, served, take_data
from hpctrain.training.position import Position, StopAt

logger = logging.getLogger("hpctrain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """One of the datasets that a run evaluates with."""

    dataset: Dataset | MapDataset
    loader: EvaluationBatches


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The datasets of a run, the same on all ranks, and how the training data are served.

    Attributes:
        config: of the job, with what a DataLoader says of batches and their order.
        semantics: the rules by which the run understands its config.
        normalizations: the numbers in use, by field.
        transforms: what becomes of samples between the files and the task.
        place: where the run goes on.
        validations: to evaluate with, one of them but for a module that has several loaders.
        evaluations: further data to evaluate with, by name.
        brought: objects that the user has brought, and those that the config names.
        units: of fields whose files say them, on rank 0.
        notes: what the header should say of the data.
    """

    config: Config
    semantics: Semantics
    normalizations: Mapping[str, Normalization]
    train: Dataset | MapDataset
    train_loader: TrainBatches
    transforms: Transforms
    place: Position
    stop_at: StopAt
    staging: Staging
    notes: Sequence[str] = ()
    validations: Sequence[Evaluated] = ()
    evaluations: Mapping[str, Evaluated] = field(default_factory=dict)
    brought: Brought = NOTHING
    units: Mapping[str, str] = field(default_factory=dict)

    @property
    def evaluated(self) -> list[Dataset | MapDataset]:
        """What the run evaluates with."""
        return [each.dataset for each in (*self.validations, *self.evaluations.values())]

    @property
    def validation_batches(self) -> list[int]:
        """Batches of each loader to evaluate with, of the rank that has the most."""
        return [each.loader.most_batches for each in self.validations]

    @property
    def validation(self) -> Dataset | MapDataset | None:
        """The first of what the run evaluates with; None: there is nothing."""
        return self.validations[0].dataset if self.validations else None

    @property
    def validation_loader(self) -> EvaluationBatches | None:
        """Its loader."""
        return self.validations[0].loader if self.validations else None

    def record(self, config: Config) -> dict[str, Any]:
        """Return what a checkpoint says of how the data become numbers: rules and statistics."""
        return {
            SEMANTICS: self.semantics.to_json(),
            DECODING: decoding_to_record(self.train) if isinstance(self.train, Dataset) else {},
            FORMS: (forms_to_record(config, self.train) if isinstance(self.train, Dataset) else {}),
            NORMALIZATION: normalizations_to_record(config, self.normalizations),
            FIELDS: fields_to_record(self.train, self.units),
        }

    def state(self, place: Position) -> dict[str, Any]:
        """Return what a checkpoint says of the place in the data, which the next batch follows."""
        order = self.train_loader.order_of(place.epoch)
        return to_state(order, place.epoch, place.position, self.train.fingerprint)

    def stage(self, config: Config, world: World) -> None:
        """Begin to copy the shards to each node's disk, if asked for. Collective: all ranks."""
        files = [each for each in (self.train, *self.evaluated) if isinstance(each, Dataset)]
        self.staging.start(config, world, files)

    def close(self) -> None:
        """End the threads and close all files."""
        self.train_loader.close()
        for each in (*self.validations, *self.evaluations.values()):
            each.loader.close()
        self.transforms.close()
        self.staging.close()


def open_data(
    config: Config,
    world: World,
    semantics: Semantics,
    resumed: Resumed | None,
    brought: Brought = NOTHING,
) -> Data:
    """Open the datasets on rank 0 and make the loaders of every rank. Collective: all ranks.

    Args:
        config: names the data.
        world: the ranks.
        semantics: the rules of the run.
        resumed: the checkpoint that the run goes on from; None: it begins.
        brought: datasets or loaders in place of the files that the config names.

    Raises:
        DatasetError: on every rank, if the data are not what the config says, or not those that
            the checkpoint was trained on.
        ConfigError: on every rank, if there are more ranks than lanes, or `[data.normalize]` or
            `data.transform` do not fit the data.
    """
    if brings_data(config, brought):
        return _open_objects(config, world, semantics, resumed, brought)
    section, topology = config.data, world.topology
    fields = stored_fields(config)
    train, validation, further, normalizations = _open_datasets(
        config, world, fields, semantics, resumed
    )
    fields = fields or list(train.fields)  # a module that names none gets them all
    if section.verify == "start":
        with raise_together(world.communicator):
            datasets = [train, *filter(None, [validation]), *further.values()]
            verify_share(datasets, topology.rank, topology.world_size)
    weights = _open_weights(config, world, train, semantics)
    staging = Staging()
    threads = section.threads or reading_threads(topology.local_world_size)
    memory = None
    if section.cache == "memory":
        memory = hold_on_node(
            train,
            topology,
            world.communicator,
            threads=threads,
            retries=section.read_retries,
            locate=staging.locate,
        )
    with raise_together(world.communicator):
        order, place, begun = _order_and_place(
            config, train, resumed, weights, is_resident=memory is not None
        )
        transforms = Transforms.of(
            config, train, validation, fields, normalizations, world, [*further.values()]
        )
        options = LoaderOptions(
            device=world.device,
            buffer_mb=section.buffer_mb,
            threads=threads,
            read_retries=section.read_retries,
            locate=staging.locate,
        )
        begun_with = Begun(orders=begun, position=place.position)
        train_loader = TrainLoader(
            train,
            _epochs_of(config, world, train.source, order, begun_with, weights),
            options,
            fields=fields,
            preprocessing=transforms.train,
            memory=memory,
        )

        def evaluated(dataset: Dataset, preprocessing: Preprocessing) -> Evaluated:
            loader = EvaluationLoader(
                dataset,
                _evaluation_share(config, world, dataset, train_loader.largest_share),
                options,
                fields=fields,
                preprocessing=preprocessing,
            )
            return Evaluated(dataset=dataset, loader=loader)

        validations = []
        if validation is not None:
            validations.append(evaluated(validation, transforms.validation))
        evaluations = {
            name: evaluated(dataset, preprocessing)
            for (name, dataset), preprocessing in zip(
                further.items(), transforms.further, strict=True
            )
        }
    return Data(
        config=config,
        semantics=semantics,
        normalizations=normalizations,
        train=train,
        train_loader=train_loader,
        validations=validations,
        transforms=transforms,
        place=place,
        stop_at=StopAt.of(config.training, train_loader.epoch_size, section.global_batch_size),
        staging=staging,
        evaluations=evaluations,
        brought=brought,
        units=units_of(train) if topology.is_rank_zero else {},
    )


Opened = tuple[Dataset, Dataset | None, dict[str, Dataset], dict[str, Normalization]]
"""To train with, to evaluate with, further ones by name; and normalizations by field."""


def _open_objects(
    config: Config,
    world: World,
    semantics: Semantics,
    resumed: Resumed | None,
    brought: Brought,
) -> Data:
    """Serve torch Datasets in place of files. Collective: all ranks."""
    config, brought, notes = take_data(config, world, brought)
    section, intake = config.data, brought.train
    train = served(intake, config, world)
    validations = [served(each, config, world) for each in brought.validation]
    further = {name: served(each, config, world) for name, each in brought.evaluations.items()}
    with raise_together(world.communicator):
        weights = _weights_of_objects(config, train.dataset, intake)
        # The same order as of the same samples in memory: of each its own.
        order, place, begun = _order_and_place(
            config, train.dataset, resumed, weights, is_resident=True
        )
        begun_with = Begun(orders=begun, position=place.position)
        train_loader = MapTrainLoader(
            train.dataset,
            _epochs_of(config, world, train.dataset.source, order, begun_with, weights),
            train.reader,
        )

        def evaluated(of: Served) -> Evaluated:
            share = _evaluation_share(config, world, of.dataset, train_loader.largest_share)
            loader = MapEvaluationLoader(of.dataset, share, of.reader)
            return Evaluated(dataset=of.dataset, loader=loader)

    return Data(
        config=config,
        semantics=semantics,
        normalizations={},
        train=train.dataset,
        train_loader=train_loader,
        validations=[evaluated(each) for each in validations],
        transforms=Transforms.none(),
        place=place,
        stop_at=StopAt.of(config.training, train_loader.epoch_size, section.global_batch_size),
        staging=Staging(),
        notes=[
            *(*notes, *train.notes),
            *(note for each in (*validations, *further.values()) for note in each.notes),
        ],
        evaluations={name: evaluated(each) for name, each in further.items()},
        brought=brought,
    )


def _epochs_of(
    config: Config,
    world: World,
    source: str,
    order: Order,
    begun: Begun,
    weights: Weights | None,
) -> Epochs:
    """Return what this rank serves of the epochs of a run, of files and of objects alike."""
    section = config.data
    batching = Batching(
        global_batch_size=section.global_batch_size,
        micro_batch_size=section.micro_batch_size,
        max_tokens=section.max_tokens,
        # An epoch of a mixture is cut when its order is made.
        drop_last=section.drop_last and not section.sources,
        limit=None if section.sources else train_limit(config.training),
    )
    return Epochs(order, source, batching, _rank_share(world), begun=begun, draw=weights)


def _evaluation_share(
    config: Config, world: World, dataset: DatasetFacts, largest_share: int
) -> EvaluationShare:
    """Return what this rank serves of an evaluation, in batches as large as those of a pass."""
    return EvaluationShare(
        batch_size=config.data.micro_batch_size or largest_share,
        ranks=_rank_share(world),
        seed=config.run.seed,
        samples=evaluated_samples(config, dataset.samples),
        max_tokens=config.data.max_tokens,
    )


def _rank_share(world: World) -> RankShare:
    return RankShare(world.topology.rank, world.topology.world_size)


def _open_datasets(
    config: Config,
    world: World,
    fields: Sequence[str],
    semantics: Semantics,
    resumed: Resumed | None,
) -> Opened:
    """Look into the files on rank 0, for all ranks. Collective: all ranks."""
    opened: Opened | None = None
    with raise_together(world.communicator):
        if world.topology.is_rank_zero:
            train, validation = open_datasets(config.data, fields, semantics)
            further = {
                name: open_named(config.data, name, fields, semantics)
                for name in config.data.evaluations
            }
            begun = {}
            if resumed is not None:
                refuse_other_decoding(config, train, resumed.values)
                refuse_other_forms(config, train, resumed.values)
                begun = normalizations_begun_with(config, resumed.values)
            opened = train, validation, further, find_normalizations(config, train, begun)
    opened = world.communicator.broadcast(opened)
    assert opened is not None
    return opened


def _open_weights(
    config: Config, world: World, train: Dataset, semantics: Semantics
) -> Weights | None:
    """Read the weights of samples on rank 0, for all ranks. Collective: all ranks."""
    if (given := config.data.weights) is None:
        return None
    return on_rank_zero(
        world.communicator,
        lambda: read_weights(given, train, config.data.train, semantics.file_order),
    )


def _weights_of_objects(config: Config, train: MapDataset, intake: Intake) -> Weights | None:
    """Return the weights of the samples of a torch Dataset, of its sampler or of a file."""
    if intake.weights is not None and config.data.weights is not None:
        raise ConfigError(
            f'data.weights = "{config.data.weights}": the DataLoader has a sampler that draws by '
            "weights of its own: leave one of them out"
        )
    if intake.weights is not None:
        return Weights.of(intake.weights, f"the sampler of {train.source}")
    return None if config.data.weights is None else weights_of_file(config.data.weights, train)


def evaluated_samples(config: Config, samples: int) -> int:
    """Return how many samples of an evaluation's data are used, whatever the number of ranks."""
    return served_samples(
        samples,
        config.data.global_batch_size,
        drop_last=False,
        limit=validation_limit(config.training),
    )


def terms_of(config: Config, train: Dataset) -> Terms:
    """Return by what sources are mixed; without weights, so that each is served once an epoch."""
    tables = {each.name: each for each in config.data.sources}
    return Terms(
        weights=tuple(
            float(each.samples if (given := tables[each.name].weight) is None else given)
            for each in train.sources
        ),
        repeats=tuple(tables[each.name].when_exhausted == "repeat" for each in train.sources),
    )


def _sampling(config: Config, weights: Weights | None) -> Sampling:
    if weights is not None:
        return "weighted"
    return "shuffled" if is_shuffled(config.data, config.training) else "sequential"


def _order_and_place(
    config: Config,
    train: DatasetFacts,
    resumed: Resumed | None,
    weights: Weights | None,
    *,
    is_resident: bool,
) -> tuple[Order, Position, dict[int, Order]]:
    """Return the order of the data, where the run goes on, and epochs begun in another order."""
    section = config.data
    lanes = section.lanes
    if lanes is None and resumed is not None:
        # The default stays what it was when the run began, whatever the batch size is now.
        lanes = resumed.values["data"]["lanes"]
    sampling = _sampling(config, weights)
    if section.sources:
        assert isinstance(train, Dataset)
        length = section.epoch_samples or train.samples
        # Of a mixture that is all: an epoch of it is as long as is said, not as the data are.
        length = served_samples(
            length, section.global_batch_size, section.drop_last, train_limit(config.training)
        )
        saved = {} if resumed is None else block_rows_of(resumed.values["data"], train.sources)
        order = Order.for_mixture(
            train.sources,
            terms_of(config, train),
            seed=config.run.seed,
            global_batch_size=section.global_batch_size,
            length=length,
            lanes=lanes,
            window=section.window,
            is_resident=is_resident,
            sampling=sampling,
            begun=saved,
        )
    else:
        order = Order.for_dataset(
            train,
            seed=config.run.seed,
            global_batch_size=section.global_batch_size,
            lanes=lanes,
            window=section.window,
            is_resident=is_resident,
            sampling=sampling,
            draws=section.epoch_samples,
            weights=None if weights is None else weights.fingerprint,
        )
    if resumed is None:
        return order, Position(), {}
    running, epoch, position = from_state(
        resumed.values["data"],
        train,
        order,
        order.length
        if section.sources
        else served_samples(
            order.length,
            section.global_batch_size,
            section.drop_last,
            train_limit(config.training),
        ),
        allow_change=config.checkpoint.allow_data_change,
    )
    # Under another batch size an epoch may be over that was not when it was saved.
    place = dataclasses.replace(resumed.place, epoch=epoch, position=position)
    return order, place, {epoch: running}
