"""Mean, deviation and range of many values, in parts that are merged without loss of digits."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FACTS = ("mean", "std", "min", "max")

Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moments:
    """What is known of the values of each channel so far.

    Attributes:
        count: (channels,) finite values.
        mean: (channels,) of them.
        rest: (channels,) what rounding took from the mean; merging would else lose digits of small
            deviations from a large mean.
        squares: (channels,) sum of their squared differences from the mean.
        least: (channels,) of them; inf where there are none.
        largest: (channels,) of them; -inf where there are none.
        non_finite: (channels,) values that are NaN or Inf, and in none of the others.
    """

    count: Float64s
    mean: Float64s
    rest: Float64s
    squares: Float64s
    least: Float64s
    largest: Float64s
    non_finite: Float64s

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Moments:
        """Return the moments of values, (rows, channels, rest)."""
        numbers = values.astype(np.float64)
        finite = np.isfinite(values)
        if not finite.all():
            return cls._of_finite(numbers, finite)
        count = np.full(values.shape[1], values.shape[0] * values.shape[2], np.float64)
        mean = numbers.mean(axis=(0, 2))
        numbers -= mean[:, None]
        rest = numbers.mean(axis=(0, 2))
        return cls(
            count=count,
            mean=mean,
            rest=rest,
            squares=np.einsum("rcv,rcv->c", numbers, numbers) - count * rest**2,
            least=values.min(axis=(0, 2)).astype(np.float64),
            largest=values.max(axis=(0, 2)).astype(np.float64),
            non_finite=np.zeros_like(count),
        )

    @classmethod
    def _of_finite(cls, values: Float64s, finite: npt.NDArray[np.bool_]) -> Moments:
        """Return the moments of those values that are finite; several times slower."""
        count = finite.sum(axis=(0, 2), dtype=np.float64)
        mean = values.sum(axis=(0, 2), where=finite) / np.maximum(count, 1)
        differences = np.subtract(values, mean[:, None], where=finite, out=np.zeros_like(values))
        rest = differences.sum(axis=(0, 2)) / np.maximum(count, 1)
        return cls(
            count=count,
            mean=mean,
            rest=rest,
            squares=np.square(differences).sum(axis=(0, 2)) - count * rest**2,
            least=values.min(axis=(0, 2), where=finite, initial=np.inf),
            largest=values.max(axis=(0, 2), where=finite, initial=-np.inf),
            non_finite=values.shape[0] * values.shape[2] - count,
        )

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both together.

        Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing
        sample variances" (1979).
        """
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        difference = (other.mean - self.mean) + (other.rest - self.rest)
        step = self.rest + difference * share
        mean = self.mean + step
        return Moments(
            count=count,
            mean=mean,
            rest=step - (mean - self.mean),
            squares=self.squares + other.squares + difference**2 * self.count * share,
            least=np.minimum(self.least, other.least),
            largest=np.maximum(self.largest, other.largest),
            non_finite=self.non_finite + other.non_finite,
        )

    def over_channels(self) -> Moments:
        """Return the moments of all channels together, as of one."""
        parts = [
            Moments(*(values[i : i + 1] for values in self._values()))
            for i in range(len(self.count))
        ]
        return functools.reduce(Moments.merge, parts)

    def facts(self) -> dict[str, list[float]]:
        """Return what people ask for, by name, a number a channel."""
        std = np.sqrt(np.maximum(self.squares, 0) / np.maximum(self.count, 1))
        values = (self.mean, std, self.least, self.largest)
        return {name: each_.tolist() for name, each_ in zip(FACTS, values, strict=True)}

    def _values(self) -> tuple[Float64s, ...]:
        return (
            self.count,
            self.mean,
            self.rest,
            self.squares,
            self.least,
            self.largest,
            self.non_finite,
        )
