"""Passes of a torch Dataset: its samples, each with random draws of its own, and its `collate_fn`.

What a sample draws belongs to (seed, epoch, row), and to nothing else.
"""

from __future__ import annotations

import random
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from hpctrain.data.arrays import Int64s, UInt64s

NUMPY, PYTHON = "numpy", "python"
OTHERS = (NUMPY, PYTHON)
"""The generators that are seeded only where a Dataset draws from them."""

_WATCH = 0x5EED_CA5E
"""Seeds a generator that nobody is known to draw from; no sample's own key is that by intention."""


def _seed_numpy(key: int) -> None:
    np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002 - it is this one that users draw from


_PYTHON: Any = random.seed.__self__  # type: ignore[attr-defined]
_SEED_PYTHON = super(random.Random, _PYTHON).seed


def _seed_python(key: int) -> None:
    # As random.seed, which has a look at the type of the key first.
    _SEED_PYTHON(key)
    _PYTHON.gauss_next = None


_SEED = {NUMPY: _seed_numpy, PYTHON: _seed_python}
_NEXT: dict[str, Callable[[], float]] = {
    NUMPY: np.random.random_sample,
    PYTHON: random.random,
}


class Draws:
    """Seeds the generators of this process for one sample after the other.

    Attributes:
        used: those of OTHERS that samples are known to draw from.
    """

    def __init__(self, used: Iterable[str] = ()) -> None:
        self.used = set(used)
        self._torch = torch.default_generator
        self._watched: tuple[str, ...] = ()

    def begin(self) -> None:
        """Seed the generators that nobody is known to draw from."""
        self._watched = tuple(name for name in OTHERS if name not in self.used)
        for name in self._watched:
            _SEED[name](_WATCH)

    def seed(self, key: int) -> None:
        """Have what follows draw the numbers of one sample.

        Args:
            key: 0 to 2**64 - 1.
        """
        self._torch.manual_seed(key >> 1)
        for name in self.used:
            _SEED[name](key)

    def found(self) -> bool:
        """Tell whether samples have drawn since `begin` from more than was known; now it is."""
        news = {name for name in self._watched if _NEXT[name]() != _first_number(name)}
        self.used |= news
        return bool(news)

    def torch_state(self) -> torch.Tensor:
        """Return the state of torch's generator."""
        return self._torch.get_state()


_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
_DEEPEST, _MOST_ITEMS = 4, 32


def held_generators(dataset: Any) -> list[str]:
    """Return where a Dataset holds generators of its own, such as "transform.rng".

    Nobody but the Dataset seeds these: what they draw depends on who has read what before.
    """
    found: list[str] = []
    seen: set[int] = set()

    def look(thing: Any, path: str, depth: int) -> None:
        if isinstance(thing, _GENERATORS):
            found.append(path)
        elif depth and id(thing) not in seen:
            seen.add(id(thing))
            if isinstance(thing, list | tuple) and len(thing) <= _MOST_ITEMS:
                inside: Iterable[tuple[Any, Any]] = enumerate(thing)
            else:
                inside = list(getattr(thing, "__dict__", {}).items())
            for name, item in inside:
                look(item, f"{path}.{name}" if path else str(name), depth - 1)

    look(dataset, "", _DEEPEST)
    return found


@contextmanager
def kept_draws() -> Iterator[None]:
    """Leave the three generators as they were: the rank's own code draws from them too."""
    torch_state, states = torch.default_generator.get_state(), {n: _state(n) for n in OTHERS}
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        np.random.set_state(states[NUMPY])  # noqa: NPY002
        random.setstate(states[PYTHON])


def _state(name: str) -> Any:
    return np.random.get_state() if name == NUMPY else random.getstate()  # noqa: NPY002


@cache
def _first_number(name: str) -> float:
    """Return what a generator draws first once it is seeded to be watched."""
    generator: Any = np.random.RandomState(_WATCH) if name == NUMPY else random.Random(_WATCH)
    return float(generator.random_sample() if name == NUMPY else generator.random())


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
