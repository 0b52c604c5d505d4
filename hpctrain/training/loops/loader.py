"""`world.loader`: batches for an own loop in the one order, and a run without any data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.config import Config
from hpctrain.config.schema import (
    ComponentSection,
    OptimizerSection,
    RunSection,
    TaskSection,
    TrainingSection,
)
from hpctrain.config.schema_data import DataSection
from hpctrain.config.semantics import NEWEST, Semantics
from hpctrain.config.semantics import RECORD as SEMANTICS
from hpctrain.data.files.discovery import open_dataset
from hpctrain.data.loading.batch import Batch, ShareOfBatch, count_passes, cut
from hpctrain.errors import ConfigError
from hpctrain.launch.process_group import World
from hpctrain.topology import on_rank_zero, raise_together
from hpctrain.training.checkpointing.resume import Resumed
from hpctrain.training.components import NOTHING, Brought
from hpctrain.training.data.run_data import Data, open_data
from hpctrain.training.data.staging import Staging
from hpctrain.training.loops.registry import Setups
from hpctrain.training.model.undisturbed import (
    copied_buffers,
    evaluating,
    kept_generators,
    with_statistics,
)
from hpctrain.training.position import Position, StopAt
from hpctrain.utils.json_files import checked
from hpctrain.utils.text import did_you_mean

DEFAULT_SEED = 1234
"""Of the order of the data, where `connect` was given none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What one forward pass of this rank is of: `batch["image"]`, or `image, label = batch`.

    In the last batch of an epoch there may be fewer samples than ranks, or passes. The other ranks
    wait for this one all the same, so its body runs on one held sample with a `size` of 0, which
    counts for nothing.

    Attributes:
        fields: by name, (size, ...) on the device; of a Dataset, whatever its `collate_fn` makes.
        size: samples of this pass.
        global_size: samples of the global batch, of all ranks and passes.
        epoch: from 0.
        is_last_pass: whether the update comes after this pass.
        is_last_batch: whether the epoch ends with this batch.
    """

    fields: Any
    size: int
    global_size: int
    epoch: int
    is_last_pass: bool = True
    is_last_batch: bool = False

    def __getitem__(self, name: Any) -> Any:
        """Return a field."""
        return self.fields[name]

    def __iter__(self) -> Iterator[Any]:
        """Yield what the fields do: names of a dict, parts of a tuple."""
        return iter(self.fields)

    def __contains__(self, name: object) -> bool:
        """Tell whether there is such a field."""
        return name in self.fields

    def keys(self) -> Any:
        """Return the names of the fields, for `**batch`."""
        return self.fields.keys()

    def __len__(self) -> int:
        """Return how many samples there are."""
        return self.size


class Loader:
    """Serves a dataset to a loop; files are opened when the first batch is wanted.

    In training the batches are global ones in the one order of (seed, epoch), of which each rank
    gets its share, and `for batch in loader` is one epoch. In an evaluation every sample comes
    exactly once, and all ranks have equally many batches.

    Attributes:
        training: whether this is data to train with.
        batch_size: samples of all ranks together.
    """

    def __init__(
        self,
        world: World,
        setups: Setups,
        source: Any,
        *,
        batch_size: int,
        training: bool,
        seed: int | None,
        fields: tuple[str, ...] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Take note of what is wanted. Collective: all ranks.

        Args:
            world: the ranks.
            setups: models of the loop, which passes without samples must not change.
            source: a folder of shards or a pattern of HDF5 files, or a torch Dataset or DataLoader.
            batch_size: samples of all ranks in one batch.
            training: whether to train with it.
            seed: of the order.
            fields: of the files, that are wanted; None: all.
            options: further keys of `[data]`.

        Raises:
            ConfigError: on every rank, if an option is none.
            DatasetError: on every rank, if there are no such files.
        """
        self.training = training
        self.batch_size = batch_size
        self._world = world
        self._setups = setups
        self._source = source
        self._is_path = isinstance(source, str | Path)
        self._options = dict(options or {})
        self._seed = DEFAULT_SEED if seed is None else seed
        self._data: Data | None = None
        self._epoch = 0
        with raise_together(world.communicator):
            self._check(source, batch_size)
        if self._is_path:
            self._fields, self._samples = self._look(fields)
        else:
            dataset = source.dataset if _is_data_loader(source) else source
            self._fields, self._samples = (), len(dataset)
        with raise_together(world.communicator):
            self.config(training=TrainingSection(max_steps=1))

    def _check(self, source: Any, batch_size: int) -> None:
        kind = type(source).__name__
        is_map = hasattr(source, "__getitem__") and hasattr(source, "__len__")
        if not (self._is_path or is_map or _is_data_loader(source)):
            raise ConfigError(
                "world.loader takes a folder or pattern of HDF5 files, or a map-style torch "
                f"Dataset, not {kind}: pack what can only be iterated with "
                "`python -m hpctrain data pack`"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size = {batch_size!r}: expected a whole number from 1")
        known = [field.name for field in dataclasses.fields(DataSection)]
        for name in self._options:
            if name not in known or name in ("train", "validation", "global_batch_size"):
                raise ConfigError(
                    f"world.loader has no argument {name!r}{did_you_mean(name, known)}; those of "
                    "[data] are known"
                )

    def _look(self, fields: tuple[str, ...] | None) -> tuple[tuple[str, ...], int]:
        """Return the fields of the files and how many samples there are. Collective: all ranks."""

        def look() -> tuple[tuple[str, ...], int]:
            found = open_dataset(str(self._source), fields)
            return tuple(found.fields), found.samples

        return on_rank_zero(self._world.communicator, look)

    def config(
        self, training: TrainingSection, run: RunSection | None = None, **sections: Any
    ) -> Config:
        """Return the config of a job that has these data.

        Args:
            training: how it trains.
            run: its name and folder.
            sections: others that are not as usual.

        Raises:
            ConfigError: if an option of the loader is of a wrong type.
        """
        source = str(self._source) if self._is_path else use_of(self._source)
        given: dict[str, Any] = {"train": source, "global_batch_size": self.batch_size}
        if not self.training:
            ranks = self._world.topology.world_size
            given |= {
                "validation": source,
                "global_batch_size": min(self._samples, max(self.batch_size, ranks)),
                "micro_batch_size": equal_rounds(self._samples, ranks, self.batch_size),
            }
        try:
            data = checked({**given, **self._options}, DataSection)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"world.loader: {error}") from error
        sections = {
            "model": ComponentSection(use="loop"),
            "task": TaskSection(use="loop", inputs=self._fields),
            "optimizer": OptimizerSection(use="loop", lr=1.0),
            **sections,
        }
        return Config(
            run=run or RunSection(name="loop", seed=self._seed),
            data=data,
            training=training,
            **sections,
        )

    def open(
        self,
        config: Config | None = None,
        semantics: Semantics = NEWEST,
        resumed: Resumed | None = None,
    ) -> Data:
        """Open the files, once. Collective: all ranks.

        Args:
            config: of the run that they are for; None: there is none.
            semantics: the rules of that.
            resumed: the checkpoint that it goes on from.
        """
        if self._data is not None and config is not None:
            self._data.close()  # a run may go on in another order than a loop before it
            self._data = None
        if self._data is None:
            config = config or self.config(TrainingSection(max_epochs=1))
            self._data = open_data(config, self._world, semantics, resumed, self._brought())
        return self._data

    def _brought(self) -> Brought:
        if self._is_path:
            return NOTHING
        return Brought(train=self._source, validation=None if self.training else self._source)

    def __len__(self) -> int:
        """Return the batches of an epoch. Collective the first time: all ranks."""
        data = self.open()
        if not self.training:
            assert data.validation_loader is not None
            return data.validation_loader.most_batches
        return data.stop_at.epoch_steps

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration be of this epoch; without that they count by themselves."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Samples]:
        """Yield an epoch to train with, or all samples to evaluate. Collective: all ranks."""
        data = self.open()
        if not self.training:
            loader = data.validation_loader
            assert loader is not None
            last = len(loader) - 1
            for number, batch in enumerate(loader):
                self._world.pulse.tick()
                yield Samples(
                    fields=batch.fields,
                    size=batch.size,
                    global_size=batch.global_size,
                    epoch=0,
                    is_last_batch=number == last,
                )
            return
        epoch, self._epoch = self._epoch, self._epoch + 1
        passes = self.count_passes()
        for batch in data.train_loader.epoch(epoch):
            yield from self.passes(batch, passes)

    def passes(self, share: ShareOfBatch, passes: int) -> Iterator[Samples]:
        """Yield the passes of a global batch, equally many on all ranks."""
        data = self._data
        assert data is not None
        ends = share.start + share.global_size >= data.stop_at.epoch_samples
        ranges = share.cuts or cut(share.size, passes)
        for number, (first, stop) in enumerate(ranges):
            self._world.pulse.tick()
            is_idle = first == stop
            samples = Samples(
                fields=data.train_loader.example() if is_idle else share.part(first, stop),
                size=stop - first,
                global_size=share.global_size,
                epoch=share.epoch,
                is_last_pass=number == len(ranges) - 1,
                is_last_batch=ends,
            )
            self._setups.current = samples
            if is_idle:
                with undisturbed(self._setups, self._world):
                    yield samples
            else:
                yield samples
        self._setups.current = None

    @property
    def is_cut(self) -> bool:
        """Whether the number of passes depends on the samples of a step."""
        return self._options.get("max_tokens") is not None

    def count_passes(self) -> int:
        """Return the passes of each step, by `micro_batch_size`."""
        assert self._data is not None
        limit = self._options.get("micro_batch_size")
        return count_passes(self._data.train_loader.largest_share, limit)


@contextmanager
def undisturbed(setups: Setups, world: World) -> Iterator[None]:
    """Leave generators, buffers and batch statistics as they are: a pass without samples."""
    with ExitStack() as stack:
        stack.enter_context(kept_generators(world.device))
        for model in setups.models():
            if world.topology.is_rank_zero:  # an update gives the others its buffers
                stack.enter_context(copied_buffers(model))
            stack.enter_context(evaluating(with_statistics(model)))
        yield


def equal_rounds(samples: int, ranks: int, batch_size: int) -> int:
    """Return at how many samples a batch all ranks have equally many batches.

    Shares differ by one sample at most. As few more than a rank's part of `batch_size` as that
    needs, so that ranks may communicate after each batch.
    """
    size = max(1, batch_size // ranks)
    least, most = samples // ranks, -(-samples // ranks)
    while least and -(-least // size) != -(-most // size):
        size += 1
    return size


def _is_data_loader(source: Any) -> bool:
    return all(hasattr(source, name) for name in ("dataset", "collate_fn", "batch_sampler"))


def use_of(item: object) -> str:
    """Return by what name a config would use the class of an object."""
    return f"{type(item).__module__}:{type(item).__qualname__}"


_ENDLESS = 2**62
"""Samples of an epoch that never ends."""


class WithoutData:
    """Stands for the data of a run that has none: each step counts as one sample.

    Attributes:
        config: of the run.
        place: where the run goes on.
        stop_at: how long it is.
    """

    brought = NOTHING
    validations: Sequence[Any] = ()

    def __init__(self, config: Config, resumed: Resumed | None) -> None:
        self.config = config
        self.place = Position() if resumed is None else resumed.place
        self.stop_at = StopAt(
            max_epochs=None,
            max_steps=config.training.max_steps,
            max_samples=None,
            epoch_samples=_ENDLESS,
            global_batch_size=1,
        )
        self.staging = Staging()
        self.train_loader = _Steps()

    def record(self, config: Config) -> dict[str, Any]:
        """Return the rules of the run."""
        return {SEMANTICS: NEWEST.to_json()}

    def state(self, place: Position) -> dict[str, Any]:
        """Return nothing: the next step follows from no data."""
        return {}

    def close(self) -> None:
        """Do nothing: there is nothing open."""


class _Steps:
    """Serves steps without samples."""

    wait_seconds = 0.0
    failed_reads = 0
    epoch_size = _ENDLESS

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield steps for ever."""
        position = start
        while True:
            yield Batch(fields={}, size=1, global_size=1, epoch=epoch, start=position)
            position += 1
