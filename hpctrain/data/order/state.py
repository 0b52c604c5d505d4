"""Where a run is in its data, as a checkpoint keeps it: a few numbers, no history."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from hpctrain.data.dataset import DatasetFacts, SourceFacts
from hpctrain.data.order.epochs import MixedEpoch
from hpctrain.data.order.mixture import MixedSource, Mixture, Standing, Terms
from hpctrain.data.order.order import Order, Sampling
from hpctrain.errors import ConfigError, DatasetError
from hpctrain.utils.text import listed

STATE_VERSION = 3
"""2 knows orders that are not shuffled, 3 mixtures; of a plain shuffled one, 1 is written, as older
versions read."""
_NUMBERS = ("epoch", "position", "seed", "lanes", "window", "block_rows")


def to_state(order: Order, epoch: int, position: int, fingerprint: str) -> dict[str, Any]:
    """Return the state of a run that has consumed `position` samples of an epoch.

    Args:
        order: of that epoch, which may have begun under another config than the next.
        epoch: from 0.
        position: samples that all ranks together have consumed of it.
        fingerprint: of the dataset.
    """
    state: dict[str, Any] = {
        "version": 1 if order.sampling == "shuffled" else 2,
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
    if order.mixture is not None:
        state |= {"version": STATE_VERSION, "mixture": _mixture_state(order, epoch, position)}
    return state


def _mixture_state(order: Order, epoch: int, position: int) -> dict[str, Any]:
    """Return where the sources stand: a counter for each, and the round that is running."""
    pattern = MixedEpoch(order, epoch).pattern
    mixture = pattern.mixture
    standing, terms = pattern.standing(position), pattern.terms_at(position)
    consumed = pattern.consumed(position)
    return {
        "length": order.length,
        "round": standing.position,
        "round_rows": mixture.round_rows,
        "since": standing.since,
        "sources": {
            source.name: {
                "fingerprint": source.fingerprint,
                "block_rows": source.block_rows,
                "weight": terms.weights[index],
                "repeats": terms.repeats[index],
                "consumed": consumed[index],
                "consumed_at_round": standing.consumed[index],
            }
            for index, source in enumerate(mixture.sources)
        },
    }


def block_rows_of(
    state: Mapping[str, Any], facts: Sequence[SourceFacts] | Sequence[MixedSource]
) -> dict[str, int]:
    """Return the block rows of sources that a run has begun with: it keeps them for its life."""
    saved = _sources(state)
    return {
        each.name: _number(saved[each.name], "block_rows")
        for each in facts
        if each.name in saved and saved[each.name].get("fingerprint") == each.fingerprint
    }


def _sources(state: Mapping[str, Any]) -> dict[str, Any]:
    mixture = state.get("mixture", {})
    found = mixture.get("sources", {}) if isinstance(mixture, dict) else None
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise _damaged("mixture", mixture)
    return found


def _changed_sources(state: Mapping[str, Any], order: Order) -> list[str]:
    """Return the sources that came, went, or are made of other files than they were."""
    now = (
        {}
        if order.mixture is None
        else {each.name: each.fingerprint for each in order.mixture.sources}
    )
    then = {name: each.get("fingerprint") for name, each in _sources(state).items()}
    return sorted(name for name in {*now, *then} if now.get(name) != then.get(name))


def _begun_mixture(
    state: Mapping[str, Any], order: Order, epoch_size: int, position: int
) -> Mixture:
    """Return the mixture of a running epoch: its round by the terms then, the rest by those now.

    Raises:
        ConfigError: if the epoch was begun with another length.
    """
    assert order.mixture is not None
    mixture, saved = state["mixture"], _sources(state)
    names = [each.name for each in order.mixture.sources]
    if position and (length := _number(mixture, "length")) != epoch_size:
        raise ConfigError(
            f"the running epoch of this mixture was begun with {length:,} samples, and would now "
            f"end after {epoch_size:,}: an epoch ends as it began. Bring data.epoch_samples, "
            "data.drop_last and training.limit_train_batches back until it is over, start a new "
            "run (run.name), or set checkpoint.allow_data_change = true to begin that epoch anew"
        )
    terms = Terms(
        weights=tuple(_weight(saved[name]) for name in names),
        repeats=tuple(saved[name].get("repeats") is not False for name in names),
    )
    start = Standing(
        position=_number(mixture, "round"),
        since=_number(mixture, "since"),
        consumed=tuple(_number(saved[name], "consumed_at_round") for name in names),
    )
    changed = None if terms == order.mixture.terms else order.mixture.terms
    if changed is not None and start.position == position:
        terms, changed, start = changed, None, dataclasses.replace(start, since=0)
    return dataclasses.replace(
        order.mixture,
        terms=terms,
        start=start,
        later=changed,
        round_rows=_number(mixture, "round_rows"),
    )


def _weight(source: Mapping[str, Any]) -> float:
    value = source.get("weight")
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise _damaged("weight", value)
    return float(value)


def _mixture_anew(state: Mapping[str, Any], order: Order) -> Order:
    """Return the order of an epoch that begins anew, with other data: sources that stay go on."""
    if order.mixture is None:
        return order
    known = block_rows_of(state, order.mixture.sources)
    saved = _sources(state)
    consumed = tuple(
        _number(saved[each.name], "consumed") if each.name in known else 0
        for each in order.mixture.sources
    )
    mixture = dataclasses.replace(order.mixture, start=Standing(consumed=consumed))
    return dataclasses.replace(order, mixture=mixture)


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
    _require_readable(state)
    if (other := _other_data(state, dataset, order)) is not None:
        if allow_change:
            return _mixture_anew(state, order), _number(state, "epoch"), 0
        raise other
    if order.mixture is not None:
        return _go_on_mixed(state, order, epoch_size, allow_change=allow_change)
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


def _require_readable(state: Mapping[str, Any]) -> None:
    version = state.get("version")
    if not isinstance(version, int) or version < 1:
        raise _damaged("version", version)
    if version > STATE_VERSION:
        raise DatasetError(
            f"the place in the data was saved by a newer hpctrain (version {version}; this one "
            f"reads up to {STATE_VERSION}): update hpctrain"
        )


def _other_data(
    state: Mapping[str, Any], dataset: DatasetFacts, order: Order
) -> DatasetError | None:
    changed = _changed_sources(state, order)
    if state.get("fingerprint") == dataset.fingerprint and not changed:
        return None
    which = f" (data.sources: {listed(changed)})" if changed else ""
    return DatasetError(
        f"the run to resume was trained on another dataset than {dataset.source} (fingerprint "
        f"{state.get('fingerprint')}, now {dataset.fingerprint}): its shards were added, "
        f"removed or written anew since{which}. Bring the old data back, start a new run, or set "
        "checkpoint.allow_data_change = true"
    )


def _go_on_mixed(
    state: Mapping[str, Any], order: Order, epoch_size: int, *, allow_change: bool
) -> tuple[Order, int, int]:
    """Return where to go on in a mixture, as `from_state` does."""
    assert order.mixture is not None
    numbers = {name: _number(state, name) for name in _NUMBERS}
    epoch, position = numbers.pop("epoch"), numbers.pop("position")
    sampling = _sampling(state)
    if allow_change and position and state["mixture"].get("length") != epoch_size:
        return _mixture_anew(state, order), epoch, 0
    if sampling != order.sampling:
        raise ConfigError(
            f"data.shuffle: the sources of this mixture were begun {sampling}, and would go on "
            f"{order.sampling}: a run keeps that, or samples would be missing and come twice. "
            "Bring it back (as training.overfit_batches), or start a new run (run.name)"
        )
    mixture = _begun_mixture(state, order, epoch_size, position)
    if position == 0:
        mixture = dataclasses.replace(mixture, round_rows=order.mixture.round_rows)
        return dataclasses.replace(order, seed=numbers["seed"], mixture=mixture), epoch, 0
    begun: dict[str, Any] = {**numbers, "sampling": sampling, "draws": epoch_size}
    return Order(samples=order.samples, **begun, mixture=mixture), epoch, position


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
