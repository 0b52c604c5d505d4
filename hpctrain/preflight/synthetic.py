"""Synthetic data for steps: the shapes of the training data, and none of its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from hpctrain.data.dataset import Field
from hpctrain.data.loading.batch import Batch, ShareOfBatch, TrainBatches, cut, repeated
from hpctrain.data.loading.batch_transform import BatchTransform, Constants, keys_on
from hpctrain.data.loading.decoder import torch_dtype_of
from hpctrain.data.loading.map_style.dataset import MapDataset
from hpctrain.data.loading.map_style.passes import CollatedBatch
from hpctrain.data.view import View
from hpctrain.launch.process_group import World
from hpctrain.training.data.run_data import Data


class StandIn(Protocol):
    """What stands in for the loader of the training data."""

    @property
    def largest_share(self) -> int: ...
    @property
    def smallest_share(self) -> int: ...
    @property
    def largest_pass(self) -> int | None: ...
    def example(self, count: int = 1) -> Any:
        """Return one sample so many times, as a pass has it, on the device."""

    def share(self, world_size: int, passes: int) -> ShareOfBatch:
        """Return a share of the most samples that any rank has."""


def stand_in(opened: Data, world: World) -> StandIn:
    """Return what stands in for the loader of a run's training data."""
    loader = opened.train_loader
    if isinstance(opened.train, MapDataset) or (
        isinstance(opened.train, View) and opened.train.ragged
    ):
        return RepeatingLoader(loader)
    return SyntheticLoader(
        fields=opened.transforms.fields,
        largest_share=loader.largest_share,
        smallest_share=loader.smallest_share,
        device=world.device,
        batch_transform=opened.transforms.train.batch_transform,
        constants=opened.transforms.train.decoding.constants,
    )


@dataclass(frozen=True, slots=True)
class RepeatingLoader:
    """Stands in for a loader whose samples have no shape in common: one again and again."""

    loader: TrainBatches

    @property
    def largest_share(self) -> int:
        return self.loader.largest_share

    @property
    def smallest_share(self) -> int:
        return self.loader.smallest_share

    @property
    def largest_pass(self) -> int | None:
        return self.loader.largest_pass

    def example(self, count: int = 1) -> Any:
        """Return one sample so many times, as a pass has it, on the device."""
        return self.loader.example(count)

    def share(self, world_size: int, passes: int) -> CollatedBatch:
        """Return a share of the most samples that any rank has."""
        size = self.largest_share
        cuts = cut(size, passes)
        made = {bounds: self.example(bounds[1] - bounds[0]) for bounds in cuts}
        return CollatedBatch(made, size, size * world_size, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticLoader:
    """Stands in for the loader of the training data: its shapes, none of its samples.

    Attributes:
        fields: that the task uses, as they come to the device.
        largest_share: the most samples of any rank in any batch.
        smallest_share: the fewest.
        device: where the rows are wanted.
        batch_transform: what is done to batches there.
        constants: fields that are the same for every sample.
    """

    fields: Mapping[str, Field]
    largest_share: int
    smallest_share: int
    device: torch.device
    batch_transform: BatchTransform
    constants: Constants = field(default_factory=Constants)
    largest_pass: ClassVar[None] = None

    def example(self, count: int = 1) -> dict[str, torch.Tensor]:
        """Return one row of every field so many times, (count, *shape) on the device."""
        return repeated(self.rows(1), count)

    def share(self, world_size: int, passes: int) -> Batch:
        """Return a share of the most samples that any rank has."""
        size = self.largest_share
        return Batch(
            fields=self.rows(size), size=size, global_size=size * world_size, epoch=0, start=0
        )

    def rows(self, count: int) -> dict[str, torch.Tensor]:
        """Return rows that any model takes: floats from 0 to 1, and 0, which is also a class."""
        generator = torch.Generator().manual_seed(0)
        fields = {}
        for name, about in self.fields.items():
            dtype, shape = torch_dtype_of(about.dtype), (count, *about.shape)
            if dtype.is_floating_point:
                tensor = torch.rand(shape, generator=generator).to(dtype)
            else:
                tensor = torch.zeros(shape, dtype=dtype)
            fields[name] = tensor.to(self.device)
        fields |= self.constants.spread(count)
        keys = keys_on(self.device, np.arange(count, dtype=np.uint64))
        return self.batch_transform.apply(fields, keys, training=True)
