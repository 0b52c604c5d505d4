"""What the config wants decoded, and what it makes of missing values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hpctrain.config import Config
from hpctrain.config.fields import integer_fields
from hpctrain.data.dataset import Dataset, Field
from hpctrain.data.decoding import FieldDecoding, decodings
from hpctrain.data.loading.batch_transform import Missing
from hpctrain.data.loading.decoder import Decoder, Decoding
from hpctrain.errors import ConfigError


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
            ConfigError: if nothing tells the missing values that are to be masked.
        """
        found = decodings(datasets, integer_fields(config))
        missing = {
            name: Missing(table.fill, table.mask)
            for name, table in config.data.fields.items()
            if table.fill is not None or table.mask is not None
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
                    "what is missing among them could not be told any more. Return the same dtype"
                )
        decoder = Decoder(marked, self.missing, device)
        return Decoding(on_host=found, on_device=decoder, refused=refused)
