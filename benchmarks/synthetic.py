"""A run on samples that were made before: what several benchmarks measure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hpctrain.config import Config
from hpctrain.config.toml import parse
from hpctrain.config.validate import validate
from hpctrain.data.loading.batch import Batch, repeated
from hpctrain.launch.process_group import World
from hpctrain.training.build import Parts, build_parts
from hpctrain.training.components import resolve_components
from hpctrain.training.position import StopAt

EPOCH_SAMPLES = 10**12


@dataclass(frozen=True, slots=True)
class Samples:
    """One batch, served for ever, as a loader does."""

    fields: dict[str, Tensor]
    world_size: int
    wait_seconds: float = 0.0
    largest_pass: ClassVar[None] = None

    @property
    def largest_share(self) -> int:
        return len(next(iter(self.fields.values())))

    @property
    def smallest_share(self) -> int:
        return self.largest_share

    def example(self, count: int = 1) -> dict[str, Tensor]:
        return repeated({name: tensor[:1] for name, tensor in self.fields.items()}, count)

    def epoch(self, epoch: int, position: int) -> Iterator[Batch]:
        global_size = self.largest_share * self.world_size
        while True:
            yield Batch(
                fields=self.fields,
                size=self.largest_share,
                global_size=global_size,
                epoch=epoch,
                start=position,
            )
            position += global_size


def build(text: str, samples: Samples, world: World) -> tuple[Config, Parts]:
    """Return a config and the parts that it names. Collective: all ranks."""
    config, mistakes = validate(parse(text, "benchmark"))
    if config is None:
        raise ValueError(mistakes)
    parts = build_parts(
        config,
        world,
        resolve_components(config),
        samples,
        stop_at(10**9, config),
    )
    return config, parts


def stop_at(max_steps: int, config: Config) -> StopAt:
    """Return where a run over these samples ends."""
    limits: dict[str, Any] = {"max_epochs": None, "max_samples": None, "max_steps": max_steps}
    return StopAt(
        epoch_samples=EPOCH_SAMPLES, global_batch_size=config.data.global_batch_size, **limits
    )
