"""`self.log` and `self.log_dict` of a module, exact over passes and ranks.

A step keeps what was logged as it is, detached: no number is fetched, and no rank is asked. At log
steps the values ride in the one reduction that these make anyway. What is logged for an epoch is
added up in float64 on every rank, and summed exactly over all ranks at the epoch's end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpctrain.errors import TrainingError
from hpctrain.topology import Communicator
from hpctrain.training.modules.logged import (
    OF_LOADER,
    Entry,
    Reduction,
    Total,
    for_task,
    forked,
    joined,
    loggable,
    reduced,
    reduction_of,
    unforked,
)
from hpctrain.training.modules.media import Media

_STEP_HOOKS = frozenset(
    {
        *("training_step", "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad"),
        *("on_before_backward", "on_after_backward", "on_before_optimizer_step"),
    }
)
"""Where a value is one of the step unless it is said to be one of the epoch."""

_EPOCH_HOOKS = frozenset(
    {
        *("validation_step", "test_step", "on_train_start", "on_train_epoch_start"),
        *("on_train_epoch_end", "on_validation_start", "on_validation_epoch_start"),
        *("on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end"),
        *("on_test_start", "on_test_epoch_start", "on_test_batch_start", "on_test_batch_end"),
        "on_test_epoch_end",
    }
)
"""Where it is one of the epoch unless it is said to be one of the step."""


class Logs:
    """What a module logs, on one rank.

    Attributes:
        fx: the method of the module that runs; None: none that may log.
        stage: "train", "validate", "test"; what is logged belongs to it.
        loader: number of the loader whose batch is under way; None: there is one only.
        weight: samples that a value stands for.
        records: False in a dry run: names are taken down, and values are not.
        entries: how each name of each stage is logged.
        metrics: the torchmetrics objects of epochs, by stage and name; a dry run finds them.
        objects: those that were logged in the evaluation under way.
        last: the newest reduced values, by the names that monitors have for them.
        step_values: those of the step that was reduced last.
        samples: that this rank has seen in this epoch, or in this evaluation.
        media: images and histograms.
    """

    def __init__(self, communicator: Communicator, device: torch.device) -> None:
        self._communicator = communicator
        self._device = device
        self.fx: str | None = None
        self.stage = "train"
        self.loader: int | None = None
        self._loaders: dict[tuple[str, str], int] = {}
        self.weight: float = 0
        self.records = False
        self.entries: dict[tuple[str, str], Entry] = {}
        self.last: dict[str, float] = {}
        self.metrics: dict[tuple[str, str], Any] = {}
        self._step: dict[str, list[tuple[Tensor | float, float]]] = {}
        self._epoch: dict[str, Total] = {}
        self._batch: dict[str, list[tuple[Tensor | float, float]]] = {}
        self.objects: dict[str, Any] = {}
        self._reduced: tuple[str, ...] = ()
        self.samples = self.samples_trained = 0
        self.step_values: dict[str, float] = {}
        self.media = Media(is_rank_zero=communicator.rank == 0)

    def __deepcopy__(self, memo: Any) -> Logs:
        return self  # copies of a module, such as averages, are of the same run

    # What the module calls.

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a number, a tensor of one, or a torchmetrics object, as Lightning's `self.log`.

        Always over all ranks: `sync_dist` has nothing to do here.
        """
        del enable_graph, sync_dist, sync_dist_group, metric_attribute
        if self.loader is not None:
            name = self._of_loader(name, is_told=add_dataloader_idx)
        entry = self.entries.get((self.stage, name))
        if entry is None:
            entry = self._entry(
                name, value, on_step, on_epoch, reduce_fx, prog_bar, logger, rank_zero_only
            )
        if not self.records:
            return
        weight = self.weight if batch_size is None else batch_size
        if entry.is_metric:
            self._log_metric(name, entry, value, weight)
            return
        value = loggable(name, value)
        if self.stage != "train":
            self._batch.setdefault(name, []).append((value, weight))
            return
        if entry.on_step:
            self._step.setdefault(name, []).append((value, weight))
        if entry.on_epoch:
            total = self._epoch.get(name)
            if total is None:
                total = self._epoch[name] = Total(entry.reduction)
            total.add(value, weight)

    def _of_loader(self, name: str, *, is_told: bool) -> str:
        """Return the name of what is logged for one of several loaders.

        Raises:
            TrainingError: if two loaders share one.
        """
        if is_told:
            return f"{name}{OF_LOADER}{self.loader}"
        assert self.loader is not None
        first = self._loaders.setdefault((self.stage, name), self.loader)
        if first != self.loader:
            raise TrainingError(
                f'self.log("{name}", add_dataloader_idx=False) was called for loaders {first} and '
                f"{self.loader}: a name is of one loader. Have the name say which it is, or leave "
                "the argument out"
            )
        return name

    def log_image(self, name: str, image: Any) -> None:
        """Log an image, see `hpctrain.training.modules.media.Media.image`."""
        self.media.image(name, image, takes=self.records)

    def log_histogram(self, name: str, values: Any) -> None:
        """Log how numbers are spread, see `hpctrain.training.modules.media.Media.histogram`."""
        self.media.histogram(name, values, takes=self.records)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **keywords: Any) -> None:
        """Log several at once, or all of a collection of torchmetrics."""
        if hasattr(dictionary, "compute"):  # as Lightning takes a MetricCollection apart
            items = dictionary.items(keep_base=False, copy_state=False)  # type: ignore[call-arg]
        else:
            items = dictionary.items()
        for name, value in items:
            self.log(name, value, *args, **keywords)

    # What the step asks.

    def begin_step(self) -> None:
        """Forget what the step before has logged."""
        if self._step:
            self._step = {}

    def begin_epoch(self) -> None:
        """Forget what the epoch before has added up."""
        self.forget_sums()
        self.samples = 0

    def forget_names(self) -> None:
        """Forget all that a copy of the module has logged: its metrics are none of the module's."""
        self.entries.clear()
        self.metrics.clear()

    def forget_sums(self) -> None:
        """Forget what was added up so far."""
        self._epoch = {}

    @property
    def width(self) -> int:
        """How many numbers of a log step's reduction are its."""
        return 1 + sum(self._slots(name) for name in self._reduced)

    def fill(self, numbers: Tensor) -> None:
        """Put this step's values into numbers that are to be added up over the ranks.

        Args:
            numbers: (width,) float64 zeros. The first says that this rank has a name that the
                ranks have not agreed on. Where the smallest or largest is wanted every rank has a
                place of its own.
        """
        numbers[0] = float(any(name not in self._reduced for name in self._step))
        at = 1
        for name in self._reduced:
            reduction = self.entries["train", name].reduction
            total = Total(reduction)
            for value, weight in self._step.get(name, ()):
                total.add(value, weight)
            places = numbers[at : at + self._slots(name)]
            if reduction in ("min", "max"):
                places = places[2 * self._communicator.rank :]
            if total.weight:
                if total.on_device is not None:
                    places[0].copy_(total.on_device)
                    if reduction in ("mean", "sum"):
                        places[0] += total.on_host
                else:
                    places[0] = total.on_host
                places[1] = total.weight
            at += self._slots(name)

    def take(self, numbers: list[float]) -> bool:
        """Take note of the step's values over all ranks; False: they had to agree on names first.

        Collective in that case: all ranks.

        Args:
            numbers: what `fill` has put there, added up.

        Raises:
            TrainingError: on every rank, if only some of those with samples log a name.
        """
        if numbers[0]:
            self._agree()
            return False
        found: dict[str, float] = {}
        at = 1
        for name in self._reduced:
            entry = self.entries["train", name]
            slots = numbers[at : at + self._slots(name)]
            at += self._slots(name)
            pairs = [(slots[i], slots[i + 1]) for i in range(0, len(slots), 2)]
            there = [value for value, weight in pairs if weight]
            if not there:
                continue
            key = entry.step_name(name)
            found[key] = reduced(entry.reduction, pairs)
            self.last[key] = found[key]
            if not entry.on_epoch:
                self.last[name] = found[key]
        self.step_values = found
        return True

    def _agree(self) -> None:
        """Agree on the names of steps. Collective: all ranks."""
        ran = bool(self._step) or self.weight > 0
        mine = {name: self.entries["train", name] for name in self._step}
        everyone = self._communicator.all_gather(
            (ran, {name: entry.packed() for name, entry in mine.items()})
        )
        names = dict.fromkeys([*self._reduced, *(n for _, theirs in everyone for n in theirs)])
        for name in names:
            if name in self._reduced:
                continue
            entry = next(Entry(*theirs[name]) for _, theirs in everyone if name in theirs)
            lacking = [
                rank for rank, (ran, theirs) in enumerate(everyone) if ran and name not in theirs
            ]
            if lacking and not entry.on_rank_zero:
                first = next(rank for rank, (_, t) in enumerate(everyone) if name in t)
                raise TrainingError(
                    f'self.log("{name}"): rank {lacking[0]} has not logged it in a step in which '
                    f"rank {first} has: what is logged on a step is a mean over all ranks, so log "
                    "it on all of them, or with rank_zero_only=True",
                    everywhere=True,
                )
            self.entries.setdefault(("train", name), entry)
        self._reduced = tuple(sorted(names))

    def _slots(self, name: str) -> int:
        gathers = self.entries["train", name].reduction in ("min", "max")
        return 2 * self._communicator.world_size if gathers else 2

    # What an epoch and an evaluation ask.

    def end_epoch(self) -> dict[str, float]:
        """Return what was logged for the epoch, over all ranks. Collective: all ranks."""
        mine = {name: (total.reduction, *total.value()) for name, total in self._epoch.items()}
        return self._gathered(mine)

    def end_hook(self) -> dict[str, float]:
        """Return what was logged at the end of an evaluation. Collective: all ranks.

        In contrast to `end_epoch` each value is of its rank: weighted by the samples of that.
        """
        mine = {}
        for name, values in self._batch.items():
            total = Total(self.entries[self.stage, name].reduction)
            for value, weight in values:
                total.add(value, weight)
            mine[name] = (total.reduction, *total.value())
        self._batch = {}
        return self._gathered(mine)

    def take_batch(self) -> dict[str, Any]:
        """Return what was logged for a batch of an evaluation, as `Task.evaluate` returns it."""
        returned, self.objects = dict(self.objects), {}
        for name, values in self._batch.items():
            reduction = self.entries[self.stage, name].reduction
            returned |= for_task(name, reduction, values)
        self._batch = {}
        return returned

    def _gathered(self, mine: Mapping[str, tuple[Reduction, float, float]]) -> dict[str, float]:
        everyone = self._communicator.all_gather(dict(mine))
        found: dict[str, float] = {}
        for name in sorted({name for theirs in everyone for name in theirs}):
            parts = [theirs[name] for theirs in everyone if name in theirs]
            pairs = [(value, weight) for _, value, weight in parts]
            if any(weight for _, weight in pairs):
                found[name] = reduced(parts[0][0], pairs)
        return found

    def named(self, stage: str, values: Mapping[str, float]) -> dict[str, float]:
        """Return reduced values of an epoch under all their names."""
        named: dict[str, float] = {}
        for name, value in values.items():
            entry = self.entries.get((stage, name))
            for each in [name] if entry is None else entry.epoch_names(name):
                named[each] = value
        self.last |= named
        return named

    def written(self, stage: str, name: str) -> bool:
        """Tell whether a value goes into the metrics."""
        for ending in ("", "_step", "_epoch"):
            entry = self.entries.get((stage, unforked(name, ending) or ""))
            if entry is not None:
                return entry.written
        return True

    def shown(self) -> dict[str, float]:
        """Return the newest values that belong on the line of progress."""
        return self._newest(lambda entry: entry.shown)

    def logged(self) -> dict[str, float]:
        """Return the newest values that are written, as `trainer.logged_metrics` has them."""
        return self._newest(lambda entry: entry.written)

    def _newest(self, wanted: Callable[[Entry], bool]) -> dict[str, float]:
        names = [
            each
            for (_, name), entry in self.entries.items()
            if wanted(entry)
            for each in entry.full_names(name)
        ]
        return {name: self.last[name] for name in names if name in self.last}

    def full(self, stage: str, values: Mapping[str, float]) -> dict[str, float]:
        """Return values of an evaluation, each under one name: what `named` has added is left out.

        Args:
            stage: "validate" or "test".
            values: by all their names.
        """
        short = {name for (of, name), e in self.entries.items() if of == stage and e.on_step}
        return {
            name: value
            for name, value in values.items()
            if name not in short or forked(name, "_epoch") not in values
        }

    # What is saved.

    def state(self) -> dict[str, Tensor]:
        """Return the sums of an epoch that is under way, of this rank."""
        return {
            f"{total.reduction}/{name}": torch.tensor(total.value(), dtype=torch.float64)
            for name, total in self._epoch.items()
        } | {"samples": torch.tensor([float(self.samples)], dtype=torch.float64)}

    def load_states(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from such sums of some ranks, all of them together."""
        self.begin_epoch()
        for key in dict.fromkeys(key for state in states for key in state):
            found = [state[key].tolist() for state in states if key in state]
            if key == "samples":
                self.samples = int(sum(numbers[0] for numbers in found))
                continue
            reduction, _, name = key.partition("/")
            total = self._epoch[name] = Total(reduction)  # type: ignore[arg-type]
            total.on_host = functools.reduce(
                functools.partial(joined, total.reduction), (value for value, _ in found)
            )
            total.weight = math.fsum(weight for _, weight in found)

    # The first call of a name.

    def _entry(
        self,
        name: str,
        value: Any,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: Any,
        prog_bar: bool,
        logger: bool | None,
        rank_zero_only: bool,
    ) -> Entry:
        if self.fx not in _STEP_HOOKS and self.fx not in _EPOCH_HOOKS:
            raise TrainingError(
                f'self.log("{name}"): nothing can be logged '
                + ("outside of the module's hooks" if self.fx is None else f"in {self.fx}")
                + ": log in a step, or in a hook of an epoch"
            )
        if OF_LOADER in name and self.loader is None:
            raise TrainingError(
                f'self.log("{name}"): the ending "{OF_LOADER}N" stands for one of several loaders, '
                "and comes by itself: leave it out, or pass add_dataloader_idx=False in their steps"
            )
        is_metric = all(callable(getattr(value, each, None)) for each in ("update", "compute"))
        if not is_metric:
            loggable(name, value)
        is_step = self.fx in _STEP_HOOKS
        entry = Entry(
            on_step=is_step if on_step is None else bool(on_step),
            on_epoch=not is_step if on_epoch is None else bool(on_epoch),
            reduction=reduction_of(name, reduce_fx),
            shown=bool(prog_bar),
            written=logger is not False,
            on_rank_zero=rank_zero_only,
            is_metric=is_metric,
        )
        self.entries[self.stage, name] = entry
        if is_metric and entry.on_epoch:
            self.metrics[self.stage, name] = value
        return entry

    def _log_metric(self, name: str, entry: Entry, value: Any, weight: float) -> None:
        if self.stage != "train":
            self.objects[name] = value
            return
        if not entry.on_step:
            return
        newest = getattr(value, "_forward_cache", None)
        if newest is None:
            raise TrainingError(
                f'self.log("{name}"): the {type(value).__name__} was updated and not called, so it '
                f"has no value of this step: call it, metric(preds, target), or log it with "
                "on_step=False, on_epoch=True"
            )
        self._step.setdefault(name, []).append((loggable(name, newest), weight))


def names_of(logs: Logs, stage: str) -> list[str]:
    """Return the names that a stage has logged for its epochs, as monitors know them."""
    return [
        each
        for (of, name), entry in logs.entries.items()
        if of == stage and (entry.on_epoch or stage != "train")
        for each in entry.epoch_names(name)
    ]
