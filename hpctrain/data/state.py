"""Where a run is in its data, as a checkpoint keeps it: a few numbers, no history."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast, get_args

from hpctrain.data.dataset import DatasetFacts
from hpctrain.data.order import Order, Sampling
from hpctrain.errors import ConfigError, DatasetError

STATE_VERSION = 2
"""2 knows orders that are not shuffled; of a shuffled one, 1 is written, as older versions read."""
_NUMBERS = ("epoch", "position", "seed", "lanes", "window", "block_rows")


def to_state(order: Order, epoch: int, position: int, fingerprint: str) -> dict[str, Any]:
    """Return the state of a run that has consumed `position` samples of an epoch.

    Args:
        order: of that epoch, which may have begun under another config than the next.
        epoch: from 0.
        position: samples that all ranks together have consumed of it.
        fingerprint: of the dataset.
    """
    state = {
        "version": 1 if order.sampling == "shuffled" else STATE_VERSION,
        "epoch": epoch,
        "position": position,
        "lanes": order.lanes,
        "window": order.window,
        "block_rows": order.block_rows,
        "seed": order.seed,
        "fingerprint": fingerprint,
    }
    if order.sampling != "shuffled":
        state["sampling"] = order.sampling
    if order.weights is not None:
        state["weights"] = order.weights
    return state


def from_state(
    state: Mapping[str, Any],
    dataset: DatasetFacts,
    order: Order,
    epoch_size: int,
    *,
    allow_change: bool = False,
) -> tuple[Order, int, int]:
    """Return where to go on: the order of the running epoch, the epoch, and the position in it.

    An epoch that has begun goes on in the order that it began in; `order` holds from the next.

    Args:
        state: what `to_state` returned, perhaps in an older run.
        dataset: what is trained on now.
        order: what the config asks for now.
        epoch_size: samples that an epoch serves now; one that has served them is over.
        allow_change: go on with another dataset, from the beginning of the running epoch.

    Raises:
        ConfigError: if the running epoch was begun by other weights of samples.
        DatasetError: if the state is of another dataset, was written by a newer version, or is
            damaged.
    """
    version = state.get("version")
    if not isinstance(version, int) or version < 1:
        raise _damaged("version", version)
    if version > STATE_VERSION:
        raise DatasetError(
            f"the place in the data was saved by a newer hpctrain (version {version}; this one "
            f"reads up to {STATE_VERSION}): update hpctrain"
        )
    if state.get("fingerprint") != dataset.fingerprint:
        if allow_change:
            return order, _number(state, "epoch"), 0
        raise DatasetError(
            f"the run to resume was trained on another dataset than {dataset.source} (fingerprint "
            f"{state.get('fingerprint')}, now {dataset.fingerprint}): its shards were added, "
            "removed or written anew since. Bring the old data back, start a new run, or set "
            "checkpoint.allow_data_change = true"
        )
    numbers = {name: _number(state, name) for name in _NUMBERS}
    epoch, position = numbers.pop("epoch"), numbers.pop("position")
    sampling = _sampling(state)
    if sampling != "weighted" and position > dataset.samples:
        raise _damaged("position", position)
    if position >= epoch_size:
        epoch, position = epoch + 1, 0
    if position == 0:
        return order, epoch, 0
    if "weighted" in (sampling, order.sampling):
        if (sampling, state.get("weights")) != (order.sampling, order.weights):
            if allow_change:
                return order, epoch, 0
            raise _other_weights(epoch, sampling, order)
        return dataclasses.replace(order, seed=numbers["seed"]), epoch, position
    begun: dict[str, Any] = {**numbers, "sampling": sampling}
    return Order(samples=dataset.samples, **begun), epoch, position


def _other_weights(epoch: int, then: Sampling, order: Order) -> ConfigError:
    if then == order.sampling:
        changed = "by other weights than those of now"
    elif then == "weighted":
        changed = "by weights of samples, which are not set now"
    else:
        changed = "without weights of samples, which are set now"
    return ConfigError(
        f"data.weights: epoch {epoch} of the run to go on with was begun {changed}: an epoch "
        "ends as it began. Bring that back, start a new run (run.name), or set "
        "checkpoint.allow_data_change = true to begin that epoch anew"
    )


def _sampling(state: Mapping[str, Any]) -> Sampling:
    value: Any = state.get("sampling", "shuffled")
    if value not in get_args(Sampling):
        raise _damaged("sampling", value)
    return cast("Sampling", value)


def _number(state: Mapping[str, Any], name: str) -> int:
    value = state.get(name)
    lowest = 1 if name in ("lanes", "window", "block_rows") else 0
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise _damaged(name, value)
    return value


def _damaged(name: str, value: object) -> DatasetError:
    return DatasetError(
        f"the saved place in the data is damaged: {name} = {value!r}. "
        "Resume from another checkpoint"
    )
