"""Batches to come, as a step has to know them, that are one sample over and over."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hpctrain.data.loading.batch import repeated


@dataclass(frozen=True)
class OneSample:
    sample: dict[str, Tensor]
    largest_share: int
    smallest_share: int = 0
    largest_pass: int | None = None

    def example(self, count: int = 1) -> dict[str, Tensor]:
        return repeated(self.sample, count)
