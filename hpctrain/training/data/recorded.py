"""Decoding, forms and normalization of fields: found, recorded in checkpoints, kept by a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.config import Config
from hpctrain.config.fields import Normalization, normalization_of
from hpctrain.config.schema_data import FieldTable
from hpctrain.config.semantics import recorded
from hpctrain.data.dataset import Dataset
from hpctrain.data.decoding import decoding_record
from hpctrain.data.files.contents import units_in
from hpctrain.data.loading.map_style.dataset import MapDataset
from hpctrain.data.stats import STATS_NAME, read_stats
from hpctrain.data.view import View
from hpctrain.errors import ConfigError
from hpctrain.utils.text import listed

logger = logging.getLogger("hpctrain")

DECODING = "decoding"


"""Name of the record among the values of a checkpoint."""


def decoding_to_record(train: Dataset) -> dict[str, str]:
    """Return what a checkpoint says of how fields are decoded; those that are not are left out."""
    return {name: record for name in train.fields if (record := decoding_record(train, name))}


FIELDS = "fields"


"""Name of the record among the values of a checkpoint."""


def units_of(train: Dataset) -> dict[str, str]:
    """Return the units of fields whose files say them. Opens the first file of each, once."""
    homes = {name: train.home(name) for name in train.fields}
    names: dict[str, set[str]] = {}
    for home, inside in homes.values():
        names.setdefault(home.shards[0].path, set()).add(inside)
    units = {path: units_in(path, inside) for path, inside in names.items()}
    return {
        name: unit
        for name, (home, inside) in homes.items()
        if (unit := units[home.shards[0].path].get(inside))
    }


def fields_to_record(train: Dataset | MapDataset, units: Mapping[str, str]) -> dict[str, Any]:
    """Return what a checkpoint says of a sample's fields, as a model gets them."""
    if not isinstance(train, Dataset):
        return {}
    return {
        name: {
            "shape": list(each.shape),
            "dtype": "float32" if decoding_record(train, name) else each.dtype.name,
            "units": units.get(name, ""),
        }
        for name, each in train.fields.items()
        if each.mean_rows is None
    }


FORMS = "forms"


"""Name of the record among the values of a checkpoint."""


_DECIDES = (
    *("attribute", "offsets", "counts", "batch", "max_length", "pad", "shift_by", "sparse"),
    *("image", "crop", "grey"),
)


"""Keys of a field's table that say what samples become of what is stored."""


def forms_to_record(config: Config, train: Dataset) -> dict[str, Any]:
    """Return what a checkpoint says of fields that are not delivered as they are stored."""
    usual = FieldTable()
    found: dict[str, dict[str, Any]] = {}
    for name, table in config.data.fields.items():
        said = {key: getattr(table, key) for key in _DECIDES}
        record = {key: value for key, value in said.items() if value != getattr(usual, key)}
        if record:
            found[name] = {**record, "image": list(table.image)} if table.image else record
    for name in train.fields:
        home, inside = train.home(name)
        form = home.fields[inside].form
        if form is not None:
            found[name] = {**found.get(name, {}), **form.to_json()}
    return found


def refuse_other_forms(config: Config, train: Dataset, saved: Mapping[str, Any]) -> None:
    """Check that a run goes on with the selections, classes and images that it began with.

    Args:
        config: of this job.
        train: to train with.
        saved: values of the checkpoint to go on from.

    Raises:
        ConfigError: if one is another, naming its key.
    """
    if config.checkpoint.allow_data_change:
        return
    then, now = saved.get(FORMS, {}), forms_to_record(config, train)
    for name in train.fields:
        before, after = then.get(name, {}), now.get(name, {})
        other = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        if other:
            keys = {"members": "path", "picks": "select"}
            key = f"data.fields.{name}.{keys.get(other[0], other[0])}"
            raise ConfigError(
                f"{key}: the run began with {_said(before.get(other[0]))}, and now it is "
                f"{_said(after.get(other[0]))}: the model would be given other values. Bring that "
                "back (classes may be given as a list), start a new run (run.name), or set "
                "checkpoint.allow_data_change = true"
            )


def _said(value: Any) -> str:
    return "none" if value is None else f"{value!r:.200}"


def refuse_other_decoding(config: Config, train: Dataset, saved: Mapping[str, Any]) -> None:
    """Check that fields are decoded as when the run began. Reads no file.

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
    then = saved.get(DECODING)
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


NORMALIZATION = "normalization"


"""Name of the numbers in use among the values of a checkpoint."""


def normalizations_to_record(
    config: Config, normalizations: Mapping[str, Normalization]
) -> dict[str, Any]:
    """Return what a checkpoint says of the numbers in use, and of what they were taken from."""
    return {
        name: {
            "given": config.data.normalize[name],
            "mean": list(each.mean),
            "std": list(each.std),
        }
        for name, each in normalizations.items()
    }


def normalizations_begun_with(config: Config, saved: Mapping[str, Any]) -> dict[str, Normalization]:
    """Return the numbers that a run began with, of fields of which the config says the same still.

    Of statistics that were measured anew since, a run that has begun takes no note.
    """
    return {
        name: Normalization(tuple(then["mean"]), tuple(then["std"]))
        for name, then in saved.get(NORMALIZATION, {}).items()
        if config.data.normalize.get(name) == then["given"]
    }


def find_normalizations(
    config: Config, train: Dataset, begun: Mapping[str, Normalization]
) -> dict[str, Normalization]:
    """Return the numbers of every field to normalise. Reads a file: for one rank to do.

    Args:
        config: says where they come from.
        train: to train with.
        begun: the numbers of fields that the run has begun with.

    Raises:
        DatasetError: if there are no statistics of the training data where they are wanted.
        ConfigError: if they cannot be those of samples.
    """
    said = {name: normalization_of(given) for name, given in config.data.normalize.items()}
    return {
        name: begun[name]
        if name in begun
        else _measured(name, _stats(name, train, each), each)
        if isinstance(each, str)
        else each
        for name, each in said.items()
    }


def _stats(name: str, train: Dataset, word: str) -> Mapping[str, Any]:
    """Return the statistics of a field, of all rows that are stored."""
    if isinstance(train, View) and name in train.static:
        return _stats_of_one(train.static[name], name)
    record = decoding_record(train, name)
    if isinstance(train, View):
        column = train.columns[name]
        part = train.parts[column.part]
        if part.constants is not None:
            rows = [shard.samples for shard in part.dataset.shards]
            return _stats_of_constants(part.constants[column.name], rows, name)
        if word == "channel_stats" and (column.steps is not None or part.axis > 0):
            raise ConfigError(
                f'data.normalize.{name} = "channel_stats": the first axis of a sample is not an '
                f"axis of the rows that `data stats` has seen, by data.fields.{name}: give mean "
                'and std as lists, or take "stats"'
            )
        name, train = column.name, part.dataset
    path = Path(train.shards[0].path).parent / STATS_NAME
    found: Mapping[str, Any] = read_stats(path, train, [name], {name: record})[name]
    return found


def _stats_of_constants(
    values: npt.NDArray[Any], rows: Sequence[int], name: str
) -> Mapping[str, Any]:
    """Return the statistics of an attribute, each value as often as there are rows with it."""
    if values.dtype.kind == "c":
        raise ConfigError(f"data.normalize.{name}: there is no mean of {values.dtype}")
    numbers = values.astype(np.float64).reshape(
        len(values), values.shape[1] if values.ndim > 1 else 1, -1
    )
    weights = np.broadcast_to(np.array(rows, np.float64)[:, None, None], numbers.shape)
    weights = np.where(np.isnan(numbers), 0.0, weights)
    known = np.nan_to_num(numbers)

    def of(axes: tuple[int, ...]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        count = np.maximum(weights.sum(axes, keepdims=True), 1)
        mean = (known * weights).sum(axes, keepdims=True) / count
        squares = ((known - mean) ** 2 * weights).sum(axes, keepdims=True) / count
        return mean.ravel(), np.sqrt(squares).ravel()

    (mean,), (std,) = of((0, 1, 2))
    means, stds = of((0, 2))
    return {
        "mean": float(mean),
        "std": float(std),
        "channels": {"mean": means.tolist(), "std": stds.tolist()},
    }


def _stats_of_one(values: npt.NDArray[Any], name: str) -> Mapping[str, Any]:
    """Return the statistics of a field that is one array for all samples."""
    if values.dtype.kind == "c" or not values.size:
        raise ConfigError(f"data.normalize.{name}: there is no mean of {values.dtype}")

    def of(part: npt.NDArray[Any]) -> tuple[float, float]:
        known = part[~np.isnan(part)]
        return (float(known.mean()), float(known.std())) if known.size else (0.0, 0.0)

    numbers = np.atleast_1d(values.astype(np.float64))
    mean, std = of(numbers)
    each = [of(channel) for channel in numbers.reshape(len(numbers), -1)]
    channels = {"mean": [mean for mean, _ in each], "std": [std for _, std in each]}
    return {"mean": mean, "std": std, "channels": channels}


def _measured(name: str, facts: Mapping[str, Any], word: str) -> Normalization:
    of_channels = word == "channel_stats"
    mean, std = (facts["channels"][key] if of_channels else [facts[key]] for key in ("mean", "std"))
    # A channel without a single value is all NaN, or all fill, whatever it is normalised by.
    mean = [each or 0.0 for each in mean]
    constant = sum(each == 0 for each in std)
    if constant:
        logger.warning(
            'data.normalize: field "%s" has the same value everywhere%s; it becomes 0',
            name,
            f" in {constant} of {len(std)} channels" if of_channels else "",
        )
    normalization = Normalization(tuple(mean), tuple(each or 1.0 for each in std))
    if len(mean) == 1:
        logger.info("data.normalize.%s: mean %.6g, std %.6g", name, mean[0], std[0])
    else:
        logger.info("data.normalize.%s: mean and std of %d channels", name, len(mean))
    return normalization
