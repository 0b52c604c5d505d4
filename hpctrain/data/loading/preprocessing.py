"""What becomes of samples between the files and the task: on the host, then on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.batch_transform import BatchTransform
from hpctrain.data.loading.decoder import Decoding
from hpctrain.data.loading.images import ImagePreparation
from hpctrain.data.loading.preparation import SamplePreparation

Preparation = SamplePreparation | ImagePreparation
"""What is done to every sample on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """What is done to the samples of one dataset, in this order.

    Attributes:
        preparation: to every sample on the host; None: nothing.
        decoding: what is decoded, on the host before that, or on the device.
        batch_transform: to batches on the device.
    """

    preparation: Preparation | None = None
    decoding: Decoding = field(default_factory=Decoding)
    batch_transform: BatchTransform = field(default_factory=BatchTransform)

    @property
    def needs_keys(self) -> bool:
        """Whether anything may draw random numbers, from the keys of the samples."""
        return self.preparation is not None or self.batch_transform.needs_keys

    def sample_bytes(self, dataset: Dataset) -> tuple[int, int]:
        """Return the bytes of a sample as it goes to the device, and those besides before that."""
        if self.preparation is None:
            return dataset.bytes_per_sample, 0
        return self.preparation.row_bytes, self.preparation.staging_bytes


AS_STORED = Preprocessing()
"""Nothing is done to samples."""
