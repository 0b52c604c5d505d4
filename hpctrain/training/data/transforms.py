"""Transforms that the config wants: decoding, samples on the host, batches on the device."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hpctrain.config import Config
from hpctrain.config.fields import (
    Normalization,
    integer_fields,
    needed_fields,
    ragged_fields,
    static_fields,
)
from hpctrain.config.importing import build_transform
from hpctrain.config.registry import resolve_transform
from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.decoding import FieldDecoding, decodings
from hpctrain.data.loading.batch_transform import (
    BatchTransform,
    Constants,
    Missing,
    Scale,
    Transform,
)
from hpctrain.data.loading.decoder import Decoder, Decoding
from hpctrain.data.loading.images import Decoded, ImagePreparation
from hpctrain.data.loading.preparation import SamplePreparation
from hpctrain.data.loading.preprocessing import AS_STORED, Preparation, Preprocessing
from hpctrain.data.loading.worker_pool import WorkerPool
from hpctrain.data.reading.threads import reading_threads
from hpctrain.data.view import View
from hpctrain.errors import ConfigError
from hpctrain.launch.environment import without_rank
from hpctrain.launch.process_group import World

_KEY = "data.sample_transform"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transforms:
    """What becomes of samples between the files and the task.

    Attributes:
        train: of samples to train with.
        validation: of those to evaluate with.
        further: of each of further data to evaluate with.
        fields: by name, as they are once decoded, of what to train with.
    """

    train: Preprocessing
    validation: Preprocessing
    further: Sequence[Preprocessing]
    fields: Mapping[str, Field]
    _worker_pool: WorkerPool | None

    @classmethod
    def of(
        cls,
        config: Config,
        train: Dataset,
        validation: Dataset | None,
        fields: Sequence[str],
        normalizations: Mapping[str, Normalization],
        world: World,
        further: Sequence[Dataset] = (),
    ) -> Transforms:
        """Make them, and try what is done to samples on one; another one on each rank.

        Args:
            config: names them.
            train: to train with.
            validation: to evaluate with.
            fields: that the files hold of what the task needs.
            normalizations: by field.
            world: the ranks.
            further: to evaluate with besides `validation`.

        Raises:
            HpctrainError: if a transform cannot be made, or does not fit the data.
        """
        worker_pool = _worker_pool(config)
        given = [train, *filter(None, [validation]), *further]
        datasets = [each.select(fields) for each in given]
        decodings = Decodings.of(config, datasets)

        constants = [constants_of(config, each, normalizations, world.device) for each in datasets]
        images = images_of(config, fields)

        def preparation(index: int) -> Preparation | None:
            dataset = datasets[index]
            if images:
                assert isinstance(dataset, View)
                threads = config.data.threads or reading_threads(world.topology.local_world_size)
                return ImagePreparation(dataset, images, threads, training=index == 0)
            if worker_pool is None:
                return None
            return SamplePreparation(
                f'{_KEY} = "{config.data.sample_transform}"',
                worker_pool,
                dataset,
                needed=fields,
                row=world.topology.rank * dataset.samples // world.topology.world_size,
                training=index == 0,
                decodings=decodings.datasets[index],
            )

        def decoding(index: int, prepares: Preparation | None) -> Decoding:
            prepared = prepares.fields if isinstance(prepares, SamplePreparation) else None
            found = decodings.decoding(config, index, world.device, prepared)
            return dataclasses.replace(found, constants=constants[index])

        prepares = [preparation(index) for index in range(len(datasets))]
        first = prepares[0]
        delivered = datasets[0].fields if first is None else first.fields
        decoded = decodings.fields(delivered, prepared=isinstance(first, SamplePreparation))
        batch_transform = build_batch_transform(
            config, decoded, decodings.of_floats(decoded), normalizations, world.device
        )
        made = [
            Preprocessing(
                preparation=each, decoding=decoding(index, each), batch_transform=batch_transform
            )
            for index, each in enumerate(prepares)
        ]
        return cls(
            train=made[0],
            validation=AS_STORED if validation is None else made[1],
            further=made[len(made) - len(further) :],
            fields=decoded,
            _worker_pool=worker_pool,
        )

    @classmethod
    def none(cls) -> Transforms:
        """Return those of data that come as the task wants them."""
        return cls(train=AS_STORED, validation=AS_STORED, further=(), fields={}, _worker_pool=None)

    def close(self) -> None:
        """End all processes; no loader may be at work."""
        if self._worker_pool is not None:
            self._worker_pool.close()


def images_of(config: Config, fields: Sequence[str]) -> dict[str, Decoded]:
    """Return what encoded images become, by field."""
    return {
        name: Decoded(rows=table.image[0], columns=table.image[1], crop=table.crop, grey=table.grey)
        for name, table in config.data.fields.items()
        if table.image is not None and name in fields
    }


def _worker_pool(config: Config) -> WorkerPool | None:
    """Return who transforms samples; no process is started yet."""
    section = config.data
    if section.sample_transform is None:
        return None
    resolve_transform(config, "sample_transform")
    return WorkerPool.of(
        _KEY,
        section.sample_transform,
        section.sample_transform_arguments,
        section.workers,
        # Of workers only: squeue and its like, which the rank starts, need these variables.
        without_rank(os.environ) if section.workers_are == "processes" else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decodings:
    """What is decoded of the datasets of a run, and what becomes of missing values.

    Attributes:
        datasets: to train with, to evaluate with; by field.
        missing: by field.
    """

    datasets: Sequence[Mapping[str, FieldDecoding]]
    missing: Mapping[str, Missing]

    @classmethod
    def of(cls, config: Config, datasets: Sequence[Dataset]) -> Decodings:
        """Find out what is to be decoded.

        Args:
            config: says which fields are integers, and what becomes of missing values.
            datasets: with the fields of the task.

        Raises:
            DatasetError: if the attributes of a file cannot be followed.
            ConfigError: if nothing marks the missing values that are to be masked.
        """
        found = decodings(datasets, integer_fields(config))
        missing = {
            # Of samples of unequal length, the mask says where one has ended.
            name: Missing(table.fill, None if table.batch else table.mask)
            for name, table in config.data.fields.items()
            if not table.static
            if table.fill is not None or (table.mask is not None and not table.batch)
        }
        for name, each in missing.items():
            kind = datasets[0].fields[name].dtype.kind
            if kind != "f" and not any(name in decoded for decoded in found):
                key = "mask" if each.mask is not None else "fill"
                raise ConfigError(
                    f"data.fields.{name}.{key}: {datasets[0].source} does not say which numbers of "
                    f'"{name}" are missing (no _FillValue, missing_value or valid range): leave '
                    "the key out"
                )
        return cls(datasets=found, missing=missing)

    def fields(self, delivered: Mapping[str, Field], *, prepared: bool) -> dict[str, Field]:
        """Return the fields of a batch once it is decoded, masks of integers included.

        Args:
            delivered: fields as they come to the device.
            prepared: whether they were decoded before, for a transform of samples.
        """
        made = dict(delivered)
        for name, each in self.datasets[0].items():
            if not prepared:
                made[name] = each.field
            mask = self.missing.get(name, Missing()).mask
            if each.keeps_numbers and mask is not None:
                made[mask] = Field(made[name].shape, np.dtype(np.float32))
        return made

    def of_floats(self, fields: Mapping[str, Field]) -> dict[str, Missing]:
        """Return what becomes of NaN, by field, where the fields of a batch are these."""
        kept = {name for each in self.datasets for name in each if each[name].keeps_numbers}
        return {name: each for name, each in self.missing.items() if name not in kept & {*fields}}

    def decoding(
        self,
        config: Config,
        index: int,
        device: torch.device,
        prepared: Mapping[str, Field] | None = None,
    ) -> Decoding:
        """Return what is decoded of one of the datasets, and where.

        Args:
            config: says which class is ignored.
            index: of the dataset.
            device: where batches are.
            prepared: fields that a transform of samples makes, on the host; None: there is none.

        Raises:
            ConfigError: if a transform makes other integers of those that mark what is missing.
        """
        found = self.datasets[index]
        ignored = config.task.arguments.get("ignore_index")
        refused = [
            each
            for name, each in found.items()
            if each.keeps_numbers
            and name not in self.missing
            and any(coding.marks_others_than(ignored) for coding in each.codings)
        ]
        if prepared is None:
            return Decoding(on_device=Decoder(found, self.missing, device), refused=refused)
        marked = {n: each for n, each in found.items() if each.keeps_numbers and n in self.missing}
        for name, each in marked.items():
            made = prepared[name].dtype
            if made != each.viewed:
                raise ConfigError(
                    f'data.sample_transform makes {made} of "{name}", which is {each.viewed}: '
                    "what is missing among them could not be known any more. Return the same dtype"
                )
        decoder = Decoder(marked, self.missing, device)
        return Decoding(on_host=found, on_device=decoder, refused=refused)


def build_batch_transform(
    config: Config,
    fields: Mapping[str, Field],
    missing: Mapping[str, Missing],
    normalizations: Mapping[str, Normalization],
    device: torch.device,
) -> BatchTransform:
    """Return what is done to every batch, in training and evaluation alike.

    Args:
        config: names the transform.
        fields: as they are once decoded.
        missing: what becomes of NaN, by field.
        normalizations: by field.
        device: where the batches are.

    Raises:
        ConfigError: if the numbers do not fit the fields, or the transform its arguments.
    """
    dtype = torch.float64 if config.training.precision == "64-true" else torch.float32
    scales = {
        name: Scale.of(fields, name, each.mean, each.std, device, dtype)
        for name, each in normalizations.items()
        if name not in static_fields(config)
    }
    needed = tuple(needed_fields(config))
    return BatchTransform(scales, _transform(config), needed, missing, ragged_fields(config))


def constants_of(
    config: Config,
    dataset: Dataset,
    normalizations: Mapping[str, Normalization],
    device: torch.device,
) -> Constants:
    """Return the fields that are the same for every sample of a dataset, on the device.

    Args:
        config: says how numbers are normalised, and what becomes of missing ones.
        dataset: whose files have them.
        normalizations: by field.
        device: where the batches are.

    Raises:
        ConfigError: if the numbers do not fit a field.
    """
    static = dataset.static if isinstance(dataset, View) else {}
    dtype = torch.float64 if config.training.precision == "64-true" else torch.float32
    made = {}
    for name, values in static.items():
        # Apple's devices have no float64.
        is_short = device.type == "mps" and values.dtype == np.float64
        tensor = torch.from_numpy(values.astype(np.float32) if is_short else values).to(device)
        if (each := normalizations.get(name)) is not None:
            about = {name: Field(values.shape, values.dtype)}
            scale = Scale.of(about, name, each.mean, each.std, device, dtype)
            tensor = scale.apply(tensor[None].clone())[0]
        table = config.data.fields.get(name)
        if table is not None and table.fill is not None and tensor.is_floating_point():
            tensor = tensor.nan_to_num(nan=table.fill, posinf=torch.inf, neginf=-torch.inf)
        made[name] = tensor
    return Constants(made)


def _transform(config: Config) -> Transform | None:
    section = config.data
    if section.transform is None:
        return None
    resolve_transform(config, "transform")
    return build_transform("data.transform", section.transform, section.transform_arguments)
