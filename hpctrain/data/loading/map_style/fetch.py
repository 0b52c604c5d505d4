"""From rows to a pass: the samples of a Dataset, each with its own draws, and its `collate_fn`."""

from __future__ import annotations

import traceback
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from hpctrain.data.arrays import Int64s, UInt64s
from hpctrain.data.loading.map_style.draws import Draws

_OF_DATA = (OSError, EOFError, IndexError, zipfile.BadZipFile, UnicodeDecodeError)
"""What a Dataset raises because of its data; all else is a mistake in its code."""


class FetchError(Exception):
    """A sample, or a pass of them, cannot be had.

    Attributes:
        index: of the sample among the rows that were asked for; None: it is not one.
        text: what happened, with the traceback of the user's code.
        of_data: whether the data are to blame, rather than code.
    """

    def __init__(self, index: int | None, text: str, *, of_data: bool) -> None:
        super().__init__(index, text, of_data)
        self.index = index
        self.text = text
        self.of_data = of_data

    def __reduce__(self) -> tuple[Callable[..., FetchError], tuple[Any, ...]]:
        return _fetch_error, (self.index, self.text, self.of_data)


def _fetch_error(index: int | None, text: str, of_data: bool) -> FetchError:
    return FetchError(index, text, of_data=of_data)


class Fetcher:
    """Reads samples of a Dataset in this process.

    Attributes:
        draws: what it is known to draw from; None: its samples are not seeded.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[Any], Any] | None,
        *,
        seeded: bool,
        used: Iterable[str] = (),
    ) -> None:
        """Take a Dataset.

        Args:
            dataset: with `__getitem__`.
            collate: makes a batch of a list of samples; None: torch's own.
            seeded: whether each sample has draws of its own.
            used: generators that it is known to draw from, besides torch's.
        """
        self._dataset = dataset
        self._collate = default_collate if collate is None else collate
        self.draws = Draws(used) if seeded else None
        self._many: Any = getattr(dataset, "__getitems__", None)

    def samples(self, rows: Int64s, keys: UInt64s) -> list[Any]:
        """Return samples, in the order of their rows.

        Args:
            rows: (count,) int64.
            keys: (count,) uint64, what each draws from.

        Raises:
            FetchError: if one cannot be had.
        """
        indices = rows.tolist()
        if self._many is not None and (found := self._at_once(indices, keys)) is not None:
            return found
        draws, seeds = self.draws, keys.tolist()
        if draws is None:
            return [self._one(at, index) for at, index in enumerate(indices)]
        while True:
            draws.begin()
            samples = []
            for at, (index, key) in enumerate(zip(indices, seeds, strict=True)):
                draws.seed(key)
                samples.append(self._one(at, index))
            if not draws.found():
                return samples

    def collated(self, rows: Int64s, keys: UInt64s) -> Any:
        """Return samples as `collate_fn` puts them together.

        Raises:
            FetchError: if one cannot be had, or they cannot be put together.
        """
        return self.together(self.samples(rows, keys))

    def together(self, samples: list[Any]) -> Any:
        """Return what `collate_fn` makes of samples.

        Raises:
            FetchError: if it fails.
        """
        try:
            return self._collate(samples)
        except Exception as error:
            raise _failed(None, error, "its collate_fn failed on these samples") from error

    def _one(self, at: int, index: int) -> Any:
        try:
            sample = self._dataset[index]
        except Exception as error:
            raise _failed(at, error) from error
        if sample is None:
            raise _none(at)
        return sample

    def _at_once(self, indices: list[int], keys: UInt64s) -> list[Any] | None:
        """Return samples that the Dataset reads together; None: they draw, each has to be alone."""
        draws = self.draws
        if draws is not None:
            draws.begin()
            draws.seed(int(keys[0]))
            quiet = draws.torch_state()
        try:
            samples: Sequence[Any] = self._many(indices)
        except Exception as error:
            raise _failed(None, error, "its __getitems__ failed") from error
        if draws is not None:
            was_torch = not torch.equal(quiet, draws.torch_state())
            if draws.found() or draws.used or was_torch:
                self._many = None
                return None
        if len(samples) != len(indices):
            text = f"its __getitems__ returned {len(samples)} samples for {len(indices)} rows"
            raise FetchError(None, text, of_data=False)
        for at, sample in enumerate(samples):
            if sample is None:
                raise _none(at)
        return list(samples)


def _none(at: int) -> FetchError:
    return FetchError(
        at,
        "it is None. Every sample counts, so that none can be left out on the way: leave it out of "
        "the Dataset (torch.utils.data.Subset), or give it a weight of 0",
        of_data=True,
    )


def _failed(at: int | None, error: Exception, what: str = "") -> FetchError:
    # The first frame is ours.
    own = error.__traceback__.tb_next if error.__traceback__ is not None else None
    lines = "".join(traceback.format_exception(type(error), error, own)).rstrip()
    return FetchError(at, f"{what}\n{lines}".lstrip(), of_data=isinstance(error, _OF_DATA))
