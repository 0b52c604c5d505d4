"""What is done to a batch on the device before anyone sees it: normalise, then a user's transform.

The wire carries the dtype of the dataset, such as uint8; floats are made of it only here.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hpctrain.data.arrays import UInt64s
from hpctrain.data.dataset import Field
from hpctrain.errors import ConfigError, TrainingError


class Transform(Protocol):
    """A user's own function of a batch."""

    def __call__(
        self, *, fields: dict[str, Tensor], keys: Tensor, training: bool
    ) -> Mapping[str, Tensor]:
        """Return the fields that the task will see.

        Which samples a batch holds depends on the number of ranks. So each sample is to be made of
        itself and its key alone (`hpctrain.data.random` draws from keys): then it comes out the
        same at any world size, after a restart and in any micro batch.

        Args:
            fields: by name, (samples, *shape) on the device; the callee's to change.
            keys: (samples,) uint64 on the device, of (seed, epoch, sample id); in an evaluation
                the epoch is 0.
            training: False in an evaluation.
        """
        ...


@dataclass(frozen=True, slots=True)
class Scale:
    """Values become (value - mean) / std.

    Attributes:
        mean: (channels, 1, ...) or (1,), on the device.
        std: the same.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(
        cls,
        fields: Mapping[str, Field],
        name: str,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> Scale:
        """Return the scale of a field in `dtype`, or float64 if the field is that.

        Args:
            fields: as they come to the device.
            name: of the field.
            mean: one number, or one a channel: the first axis of a sample.
            std: the same.
            device: where the batches are.
            dtype: that the field's values are to have.

        Raises:
            ConfigError: if the numbers do not fit the field.
        """
        about = fields[name]
        if about.dtype.kind == "c":
            raise ConfigError(f'data.normalize.{name}: field "{name}" is complex, without a mean')
        channels = about.shape[0] if about.shape else 1
        for key, numbers in (("mean", mean), ("std", std)):
            if len(numbers) not in (1, channels):
                raise ConfigError(
                    f"data.normalize.{name}.{key} has {len(numbers)} numbers, but samples of "
                    f"shape {about.shape} have {channels} channels (their first axis)"
                )
        if about.dtype.itemsize == 8 and about.dtype.kind == "f":
            dtype = torch.float64
        ones = [1] * (len(about.shape) - 1)
        return cls(
            *(
                torch.tensor(numbers, dtype=dtype, device=device).view(-1, *ones)
                for numbers in (mean, std)
            )
        )

    def apply(self, values: Tensor) -> Tensor:
        """Return values normalised; floats of the right dtype are changed in place."""
        return values.to(self.mean.dtype).sub_(self.mean).div_(self.std)


@dataclass(frozen=True, slots=True)
class Missing:
    """What is made of the missing values of a field.

    Attributes:
        fill: put in their place; None: they stay NaN, and integers as they are.
        mask: name of a field to make, 1 where there is a value and 0 where not; None: none.
    """

    fill: float | None = None
    mask: str | None = None

    def apply(self, name: str, values: Tensor) -> dict[str, Tensor]:
        """Return floats without NaN, if there is a fill, and their mask, if there is to be one."""
        is_missing = torch.isnan(values)
        made = {name: values if self.fill is None else values.masked_fill_(is_missing, self.fill)}
        if self.mask is not None:
            made[self.mask] = (~is_missing).to(values.dtype)
        return made


class Constants:
    """Fields that are the same for every sample: on the device once, and in every batch."""

    def __init__(self, values: Mapping[str, Tensor] | None = None) -> None:
        """Keep the values of each field, without an axis of samples, on the device."""
        self._values = dict(values or {})
        self._versions = {name: each._version for name, each in self._values.items()}

    def __bool__(self) -> bool:
        return bool(self._values)

    def spread(self, samples: int) -> dict[str, Tensor]:
        """Return the fields as a batch of so many samples has them, (samples, *shape), uncopied.

        Raises:
            TrainingError: if somebody has written to what all batches share.
        """
        for name, values in self._values.items():
            if values._version != self._versions[name]:
                raise TrainingError(
                    f'the static field "{name}" was changed in place, by data.transform, the task '
                    "or the model: all batches share its values. Have them make a new tensor, "
                    "such as x = x * 2 in place of x *= 2"
                )
        return {name: each.expand(samples, *each.shape) for name, each in self._values.items()}


@dataclass(frozen=True, slots=True)
class BatchTransform:
    """Makes of a batch as it was decoded one as the task wants it.

    Attributes:
        scales: by field.
        transform: what else is done to every batch.
        needed: fields that have to be there in the end.
        missing: what is made of NaN, by field, before the transform.
        any_length: fields whose first axis is not that of the samples.
    """

    scales: Mapping[str, Scale] = field(default_factory=dict)
    transform: Transform | None = None
    needed: Sequence[str] = ()
    missing: Mapping[str, Missing] = field(default_factory=dict)
    any_length: Container[str] = ()

    @property
    def needs_keys(self) -> bool:
        return self.transform is not None

    def apply(
        self, fields: dict[str, Tensor], keys: Tensor | None, *, training: bool
    ) -> dict[str, Tensor]:
        """Return the fields as the task will see them.

        Args:
            fields: by name, (samples, *shape) on the device; they may be changed.
            keys: (samples,) uint64 on the device, if `needs_keys`.
            training: False in an evaluation.

        Raises:
            TrainingError: if the transform does not return what is needed.
        """
        if not self.scales and not self.missing and self.transform is None:
            return fields
        return self.transformed(self.scaled(fields), keys, training=training)

    def scaled(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the fields normalised, and what is made of their missing values."""
        finished = {
            name: self.scales[name].apply(tensor) if name in self.scales else tensor
            for name, tensor in fields.items()
        }
        for name, missing in self.missing.items():
            if name in finished:
                finished |= missing.apply(name, finished[name])
        return finished

    def transformed(
        self, fields: dict[str, Tensor], keys: Tensor | None, *, training: bool
    ) -> dict[str, Tensor]:
        """Return what the user's transform makes of fields; as they are, where there is none.

        Raises:
            TrainingError: if the transform does not return what is needed.
        """
        if self.transform is None or keys is None or not len(keys):
            return fields  # nobody reads a share without samples
        returned: Any = self.transform(fields=fields, keys=keys, training=training)
        self._check(returned, len(keys))
        return dict(returned)

    def _check(self, returned: Any, samples: int) -> None:
        if not isinstance(returned, Mapping):
            raise TrainingError(
                f"data.transform returned {type(returned).__name__}; it has to return the fields, "
                "a dict of tensors by name"
            )
        for name in self.needed:
            value = returned.get(name)
            if not isinstance(value, Tensor):
                raise TrainingError(
                    f'data.transform returned no tensor "{name}", which the task needs; it returned'
                    f" {', '.join(map(str, returned)) or 'nothing'}"
                )
            if name not in self.any_length and value.shape[:1] != (samples,):
                raise TrainingError(
                    f'data.transform made {tuple(value.shape)} of "{name}"; there are {samples} '
                    "samples, and its first axis has to stay theirs"
                )


def keys_on(device: torch.device, keys: UInt64s) -> Tensor:
    """Return keys as a tensor on the device, (samples,) uint64."""
    return torch.from_numpy(keys).to(device)
