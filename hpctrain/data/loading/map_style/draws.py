"""What a Dataset draws at random belongs to the sample: to (seed, epoch, row), and nothing else.

torch, numpy and Python each have one generator a process that any code may draw from. They are
seeded for every sample, so that an augmentation is the same at any world size, with any number of
workers, and after a restart. torch's takes a microsecond; numpy's and Python's take two and five,
which a Dataset that draws from neither need not pay: they are seeded once before every pass, and
after it the next number of each tells whether they were drawn from. If so, what the pass has made
is thrown away and made again, seeded for each sample.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch

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
