"""What the config wants done to batches on the device: `[data.normalize]` and `data.transform`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hpctrain.config import Config
from hpctrain.config.fields import Normalization, needed_fields
from hpctrain.config.importing import build_transform
from hpctrain.config.registry import resolve_transform
from hpctrain.data.dataset import Field
from hpctrain.data.loading.batch_transform import BatchTransform, Missing, Scale, Transform


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
    }
    return BatchTransform(scales, _transform(config), tuple(needed_fields(config)), missing)


def _transform(config: Config) -> Transform | None:
    section = config.data
    if section.transform is None:
        return None
    resolve_transform(config, "transform")
    return build_transform("data.transform", section.transform, section.transform_arguments)
