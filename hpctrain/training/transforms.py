"""What the config wants done to samples on the host, and to batches on the device."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpctrain.config import Config
from hpctrain.config.fields import Normalization
from hpctrain.config.registry import resolve_transform
from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.loading.batch_transform import BatchTransform
from hpctrain.data.loading.decoder import Decoding
from hpctrain.data.loading.preparation import SamplePreparation
from hpctrain.data.loading.worker_pool import WorkerPool
from hpctrain.launch.environment import without_rank
from hpctrain.launch.process_group import World
from hpctrain.training.batch_finishing import build_batch_transform
from hpctrain.training.decoding import Decodings

_KEY = "data.sample_transform"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transforms:
    """What becomes of samples between the files and the task.

    Attributes:
        train: what is done to every sample to train with; None: nothing.
        validation: the same, to evaluate with.
        batch_transform: what is done to batches on the device.
        decoding: what is decoded, of what to train with.
        validation_decoding: the same, of what to evaluate with.
        fields: by name, as they are once decoded, of what to train with.
    """

    train: SamplePreparation | None
    validation: SamplePreparation | None
    decoding: Decoding
    validation_decoding: Decoding
    batch_transform: BatchTransform
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
    ) -> Transforms:
        """Make them, and try what is done to samples on one; another one on each rank.

        Args:
            config: names them.
            train: to train with.
            validation: to evaluate with.
            fields: that the files hold of what the task needs.
            normalizations: by field.
            world: the ranks.

        Raises:
            HpctrainError: if a transform cannot be made, or does not fit the data.
        """
        worker_pool = _worker_pool(config)
        datasets = [each.select(fields) for each in (train, validation) if each is not None]
        decodings = Decodings.of(config, datasets)

        def preparation(index: int) -> SamplePreparation | None:
            if worker_pool is None or index >= len(datasets):
                return None
            dataset = datasets[index]
            return SamplePreparation(
                f'{_KEY} = "{config.data.sample_transform}"',
                worker_pool,
                dataset,
                needed=fields,
                row=world.topology.rank * dataset.samples // world.topology.world_size,
                training=index == 0,
                decodings=decodings.datasets[index],
            )

        def decoding(index: int, prepares: SamplePreparation | None) -> Decoding:
            if index >= len(datasets):
                return Decoding()
            prepared = None if prepares is None else prepares.fields
            return decodings.decoding(config, index, world.device, prepared)

        prepares, validates = preparation(0), preparation(1)
        delivered = datasets[0].fields if prepares is None else prepares.fields
        decoded = decodings.fields(delivered, prepared=prepares is not None)
        return cls(
            train=prepares,
            validation=validates,
            decoding=decoding(0, prepares),
            validation_decoding=decoding(1, validates),
            batch_transform=build_batch_transform(
                config, decoded, decodings.of_floats(decoded), normalizations, world.device
            ),
            fields=decoded,
            _worker_pool=worker_pool,
        )

    def close(self) -> None:
        """End all processes; no loader may be at work."""
        if self._worker_pool is not None:
            self._worker_pool.close()


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
