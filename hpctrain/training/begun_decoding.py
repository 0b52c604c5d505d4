"""How the numbers of a run's files become values: the same for its life."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpctrain.config import Config
from hpctrain.config.semantics import recorded
from hpctrain.data.dataset import Dataset
from hpctrain.data.decoding import decoding_record
from hpctrain.errors import ConfigError
from hpctrain.utils.text import listed

RECORD = "decoding"
"""Name of the record among the values of a checkpoint."""


def decoding_to_record(train: Dataset) -> dict[str, str]:
    """Return what a checkpoint says of how fields are decoded; those that are not are left out."""
    return {name: record for name in train.fields if (record := decoding_record(train, name))}


def refuse_other_decoding(config: Config, train: Dataset, saved: Mapping[str, Any]) -> None:
    """See to it that fields are decoded as when the run began. Reads no file.

    Their sizes and checksums may be as they were: attributes are changed in place, and not every
    dataset has checksums.

    Args:
        config: of this job.
        train: to train with.
        saved: values of the checkpoint to go on from.

    Raises:
        ConfigError: if one is not, naming its key.
    """
    if config.checkpoint.allow_data_change:
        return
    then = saved.get(RECORD)
    if then is None:
        if recorded(saved).decode != "none":
            return
        then = {}  # 0.1.0 has noted nothing, and decoded nothing
    now = decoding_to_record(train)
    other = [name for name in train.fields if then.get(name, "") != now.get(name, "")]
    if other:
        key = f"data.fields.{other[0]}.decode" if other[0] in config.data.fields else "data.decode"
        raise ConfigError(
            f"{key}: the numbers of {listed(other)} stand for other values than when the run "
            "began: the attributes of its files were changed (scale_factor, _FillValue, ...), or "
            "the config reads them otherwise. Bring that back, start a new run (run.name), or set "
            "checkpoint.allow_data_change = true"
        )
