"""Builds the model and takes real steps on synthetic data, measuring memory and time."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from hpctrain.accelerator import synchronize
from hpctrain.config import Config
from hpctrain.config.semantics import Semantics
from hpctrain.data.dataset import Field
from hpctrain.data.loading.batch_transform import BatchTransform, keys_on
from hpctrain.data.loading.delivery import Batch, torch_dtype
from hpctrain.data.reading.node_memory import host_memory
from hpctrain.launch.discovery import Node, place
from hpctrain.launch.single import SingleCommunicator
from hpctrain.launch.world import World
from hpctrain.training.assembly import (
    Components,
    build_model,
    build_parts,
    build_task,
    seed_generators,
)
from hpctrain.training.datasets import Data
from hpctrain.training.snapshot import expected_bytes, host_bytes
from hpctrain.training.step.trial import try_whole

TIMED_SECONDS = 5.0
_MOST_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticLoader:
    """Stands in for the loader of the training data: its shapes, none of its samples.

    Attributes:
        fields: that the task uses, as they come to the device.
        largest_share: the most samples of any rank in any batch.
        smallest_share: the fewest.
        device: where the rows are wanted.
        batch_transform: what is done to batches there.
    """

    fields: Mapping[str, Field]
    largest_share: int
    smallest_share: int
    device: torch.device
    batch_transform: BatchTransform

    def example(self) -> dict[str, torch.Tensor]:
        """Return one row of every field, (1, *shape) on the device."""
        return self.rows(1)

    def rows(self, count: int) -> dict[str, torch.Tensor]:
        """Return rows that any model takes: floats from 0 to 1, and 0, which is also a class."""
        generator = torch.Generator().manual_seed(0)
        fields = {}
        for name, field in self.fields.items():
            dtype, shape = torch_dtype(field), (count, *field.shape)
            if dtype.is_floating_point:
                tensor = torch.rand(shape, generator=generator).to(dtype)
            else:
                tensor = torch.zeros(shape, dtype=dtype)
            fields[name] = tensor.to(self.device)
        keys = keys_on(self.device, np.arange(count, dtype=np.uint64))
        return self.batch_transform.apply(fields, keys, training=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """What the steps of one rank have shown.

    Attributes:
        parameters: numbers in the model.
        parameter_bytes: of these.
        checkpoint_bytes: of model and optimizer state, as a checkpoint holds them.
        samples: of this rank in a step; the most there can be.
        passes: that they are computed in.
        seconds: of one step, the median.
        finite: whether loss and gradient were.
        used_bytes: the most that the process has taken: of the device, or of host memory.
        free_bytes: that were left there at the end, for all ranks together on a host.
        total_bytes: that there are.
        pinned_bytes: of host memory that a device copies from and to: reading ahead, saves.
    """

    parameters: int
    parameter_bytes: int
    checkpoint_bytes: int
    samples: int
    passes: int
    seconds: float
    finite: bool
    used_bytes: int
    free_bytes: int
    total_bytes: int
    pinned_bytes: int = 0


def alone(world: World) -> World:
    """Return a world of this rank only, on the same device."""
    here = world.topology
    topology = place(0, [Node("", here.host)], launcher=here.launcher, mpi=here.mpi)
    return replace(world, topology=topology, communicator=SingleCommunicator(), backend=None)


def try_on_host(
    config: Config,
    world: World,
    components: Components,
    loader: SyntheticLoader,
    semantics: Semantics,
) -> None:
    """Run a model that is to be spread over the ranks once, on this rank's host.

    Raises:
        Exception: what model or task raise there, if the ranks compute on their hosts; for a device
            it need not mean anything.
    """
    seed_generators(config.run.seed)
    model, number_format, _ = build_model(config, world, components, semantics)
    row = {name: item.cpu() for name, item in loader.example().items()}
    task = build_task(config, components)
    try:
        try_whole(model, task, number_format.cast(row, task.inputs))
    except Exception:
        if world.device.type == "cpu":
            raise


def take_steps(
    config: Config,
    world: World,
    components: Components,
    loader: SyntheticLoader,
    opened: Data,
    timed_seconds: float,
) -> StepFacts:
    """Build the model and train some steps; nothing of it stays. Collective: all ranks.

    In a world of `alone` it is not collective: what one rank fails of stops no other.

    Args:
        config: names the parts.
        world: the ranks.
        components: as resolved.
        loader: shapes of the data.
        opened: the data, of which only the length of the run is used.
        timed_seconds: take steps for about so long, and at least one.
    """
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    validates = opened.validation is not None
    parts = build_parts(
        *(config, world, components, loader, opened.horizon),
        semantics=opened.semantics,
        validates=validates,
    )
    step = parts.step
    batch = Batch(
        fields=loader.rows(loader.largest_share),
        size=loader.largest_share,
        global_size=loader.largest_share * world.topology.world_size,
        epoch=0,
        start=0,
    )
    step(batch, config.optimizer.lr)  # makes the state of the optimizer
    numbers = step.read()

    def timed() -> float:
        begin = time.perf_counter()
        step(batch, config.optimizer.lr)
        synchronize(world.device)
        return time.perf_counter() - begin

    slowest = max(world.communicator.all_gather(timed()))
    # All ranks take equally many.
    count = max(1, min(_MOST_STEPS, int(timed_seconds / max(slowest, 1e-9))))
    seconds = statistics.median(timed() for _ in range(count))
    if cuda:
        free, total = torch.cuda.mem_get_info(world.device)
        used = torch.cuda.max_memory_reserved(world.device)
    else:
        used, (free, total) = peak_resident_bytes(), host_memory()
    parameters = list(parts.model.parameters())
    loaders = [each for each in (opened.train_loader, opened.validation_loader) if each is not None]
    ahead = sum(each.buffer_bytes for each in loaders)
    saves = host_bytes(step, is_rank_zero=world.topology.is_rank_zero)
    return StepFacts(
        parameters=sum(item.numel() for item in parameters),
        parameter_bytes=sum(item.numel() * item.element_size() for item in parameters),
        checkpoint_bytes=expected_bytes(step),
        samples=batch.size,
        passes=step.grad_accum_steps,
        seconds=seconds,
        finite=numbers["loss"] - numbers["loss"] == 0 and not numbers["bad_steps"],
        used_bytes=used,
        free_bytes=free,
        total_bytes=total,
        pinned_bytes=ahead + saves if cuda else 0,
    )


def peak_resident_bytes() -> int:
    """Return the most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
