"""What a Dataset draws at random belongs to the sample: to (seed, epoch, row), and nothing else.

torch, numpy and Python each have one generator a process that any code may draw from. They are
seeded for every sample, so that an augmentation is the same at any world size, with any number of
workers, and after a restart. torch's takes a microsecond; numpy's and Python's take two and five,
which a Dataset that draws from neither need not pay: after every pass it is looked whether they
were drawn from, and if so, what the pass has made is thrown away and made again, seeded.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

NUMPY, PYTHON = "numpy", "python"
OTHERS = (NUMPY, PYTHON)
"""The generators that are seeded only where a Dataset draws from them."""


class Draws:
    """Seeds the generators of this process for one sample after the other.

    Attributes:
        used: those of OTHERS that samples are known to draw from.
    """

    def __init__(self, used: Iterable[str] = ()) -> None:
        self.used = set(used)
        self._torch = torch.default_generator
        self._quiet: dict[str, Any] = {}

    def begin(self) -> None:
        """Note how the generators are that nobody is known to draw from."""
        self._quiet = {name: _state(name) for name in OTHERS if name not in self.used}

    def seed(self, key: int) -> None:
        """Have what follows draw the numbers of one sample.

        Args:
            key: 0 to 2**64 - 1.
        """
        self._torch.manual_seed(key >> 1)
        if NUMPY in self.used:
            np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002 - it is this one that users draw from
        if PYTHON in self.used:
            random.seed(key)

    def found(self) -> bool:
        """Tell whether samples have drawn since `begin` from more than was known; now it is."""
        news = {name for name, state in self._quiet.items() if not _same(state, _state(name))}
        self.used |= news
        return bool(news)

    def torch_state(self) -> torch.Tensor:
        """Return the state of torch's generator."""
        return self._torch.get_state()


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


def _same(one: Any, other: Any) -> bool:
    """Tell whether two states are equal, which for numpy's hold an array."""
    if isinstance(one[1], np.ndarray):
        return bool(one[2:] == other[2:] and np.array_equal(one[1], other[1]))
    return bool(one == other)
