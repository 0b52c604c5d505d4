"""Evaluation: metrics of a dataset, reduced over ranks, every sample counted exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import distributed as dist
from torch import nn

from hpctrain.data.loading.batch import EvaluationBatches, ShareOfBatch
from hpctrain.launch.messages import decode, encode
from hpctrain.launch.process_group import World
from hpctrain.topology import on_rank_zero
from hpctrain.training.metric_objects import MetricObjects
from hpctrain.training.metrics import Part, Totals, combine
from hpctrain.training.model.undisturbed import evaluating, kept_generators, kept_tensors
from hpctrain.training.modules.task import ModuleTask
from hpctrain.training.parallel.ddp import broadcast_buffers
from hpctrain.training.task.runner import TaskRunner
from hpctrain.training.task.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One of the datasets that an evaluation goes through, each to its end before the next.

    Attributes:
        batches: of this rank, none included; over all ranks every sample exactly once.
        rounds: the largest number of batches of any rank.
        idle_row: where the parameters are spread over the ranks, and a pass needs all of them:
            makes one row to run, and to forget, while others still have batches.
    """

    batches: Iterable[ShareOfBatch]
    rounds: int = 0
    idle_row: Callable[[], Any] | None = None

    @classmethod
    def of(cls, loader: EvaluationBatches, *, accompanies: bool = False) -> Turn:
        """Return the turn of a loader, and whether ranks without a batch accompany the others."""
        # Of its own samples: another dataset's may be something else.
        idle_row = (lambda: loader.examples(1).part(0, 1)) if accompanies else None
        return cls(batches=loader, rounds=loader.most_batches, idle_row=idle_row)


def evaluate(
    runner: TaskRunner,
    turns: Sequence[Turn],
    world: World,
    *,
    stopping: Callable[[], bool] = lambda: False,
    stage: Literal["validate", "test"] = "validate",
) -> dict[str, float] | None:
    """Return the metrics of a task over its data, None if stopped. Collective: all ranks.

    Runs the bare module: DDP's forward would broadcast buffers, and ranks have different numbers
    of batches. Parameters, buffers, generators and train flags are left as they were;
    plain attributes are the module's own.

    Args:
        runner: the task, and the bare module, its parameters the same on all ranks. Where ranks
            have buffers of their own, such as batch statistics, those of rank 0 count: a checkpoint
            holds them.
        turns: the data; several of a module only, which keeps its metrics apart by their number.
        world: the ranks.
        stopping: asked after every batch, as often on every rank, so that it may communicate; True
            on all ranks in the same round.
        stage: which of a module's steps and hooks are called.

    Raises:
        TrainingError: if the task breaks its contract, or gives other metrics than it declares.
    """
    model, task = runner.model, runner.task
    module = task if isinstance(task, ModuleTask) else None
    evaluation = _Evaluation(runner, world, stopping)
    objects = evaluation.objects
    try:
        with (
            torch.no_grad(),
            kept_generators(world.device),
            _tensors_of_rank_zero(model, world),
            evaluating(model.modules()),
            objects.local(),
            # A module's are those of its training, too, which may be in the middle of an epoch.
            nullcontext() if module is None else objects.untouched(),
        ):
            objects.reset()
            if module is not None:
                module.begin_evaluation(stage, loaders=len(turns))
            found, part = [], Part()
            for number, turn in enumerate(turns):
                if module is not None:
                    module.begin_loader(number)
                ran = evaluation.run(turn)
                if ran is None:
                    if module is not None:
                        module.cut_short()
                    return None
                part = ran
                found.append(_combined(part, task, objects, world))
                if len(turns) > 1:
                    objects.load(part.states)  # of this rank alone, for the next
            if module is None:
                return found[0]
            return module.end_evaluation(found, part, objects)
    finally:
        if module is None:
            objects.reset()
        else:
            module.leave_evaluation()


class _Evaluation:
    """Runs what an evaluation calls for each batch.

    Attributes:
        objects: the torchmetrics objects of the task.
    """

    def __init__(self, runner: TaskRunner, world: World, stopping: Callable[[], bool]) -> None:
        self._task = task = runner.task
        self.objects = MetricObjects(task, world.device)
        self._module = task if isinstance(task, ModuleTask) else None
        self._world = world
        self._format = runner.number_format
        self._call = runner.call
        self._stopping = stopping
        self._reused = runner.graphs

    def run(self, turn: Turn) -> Part | None:
        """Return what the batches of this rank add up to, None if stopped."""
        totals = Totals(self._task, self.objects, reused=self._reused)
        rounds = turn.rounds
        for batch in turn.batches:
            self._world.pulse.tick()
            fields = self._format.cast(batch.fields, self._task.inputs)
            if self._module is not None:
                self._module.samples = batch.size
            with self._format.arithmetic():
                totals.add(self._call(self._task.evaluate, fields))
            rounds -= 1
            if self._stopping():
                return None
        # The others may have another batch, and come to another boundary.
        row = None
        for _ in range(rounds):
            if turn.idle_row is not None:
                if row is None:
                    row = self._format.cast(turn.idle_row(), self._task.inputs)
                self._accompany(row)
            if self._stopping():
                return None
        return totals.part()

    def _accompany(self, row: Any) -> None:
        """Run a pass for the sake of other ranks, which leaves no trace."""
        task, module = self._task, self._module
        with self.objects.untouched(), self._format.arithmetic():
            self._call(task.evaluate if module is None else module.accompany, row)


def _combined(part: Part, task: Task, objects: MetricObjects, world: World) -> dict[str, float]:
    """Return the metrics of all parts, the same on every rank. Collective: all ranks."""
    parts = gather_at_rank_zero(part, world)
    # Not computed by each: in its last bit a number could depend on the host.
    return on_rank_zero(world.communicator, lambda: combine(parts or (), task, objects))


@contextmanager
def _tensors_of_rank_zero(model: nn.Module, world: World) -> Iterator[None]:
    """Have rank 0's buffers on every rank in the body, and all as it was after it.

    Collective: all ranks.
    """
    with kept_tensors(model):
        if world.topology.world_size > 1:
            broadcast_buffers(world, model)
        yield


T = TypeVar("T")

_SMALL_BYTES = 64 * 1024
"""At most so much of a rank goes over the control plane."""
_BUFFER_BYTES = 256 * 1024 * 1024
"""What rank 0 receives at a time, of all ranks together."""


def gather_at_rank_zero(value: T, world: World) -> list[T] | None:
    """Return every rank's value on rank 0, in rank order, else None. Collective: all ranks.

    Small values go over the control plane, large ones the way of gradients.

    Args:
        value: of the types that `hpctrain.launch.messages` knows; tensors in it on the host. What
            comes over the network is never unpickled.
        world: the ranks.
    """
    if world.topology.world_size == 1:
        return [value]
    payload = b"" if world.topology.is_rank_zero else encode(value)
    small = payload if len(payload) <= _SMALL_BYTES else None
    messages: list[tuple[int, bytes | None]] = world.communicator.all_gather((len(payload), small))
    sizes = [0 if message is not None else size for size, message in messages]
    large = _gather_bytes(payload if small is None else b"", sizes, world)
    if large is None:
        return None
    payloads = [
        large[rank] if message is None else message for rank, (_, message) in enumerate(messages)
    ]
    return [value, *(decode(item) for item in payloads[1:])]


def _gather_bytes(payload: bytes, sizes: Sequence[int], world: World) -> list[bytearray] | None:
    """Return every rank's bytes on rank 0, else None. Collective: all ranks.

    Args:
        payload: of this rank.
        sizes: of the payloads of all ranks.
        world: the ranks.
    """
    is_rank_zero, world_size = world.topology.is_rank_zero, world.topology.world_size
    # All ranks send equally many bytes: gather knows no others.
    length = min(max(sizes), _BUFFER_BYTES // world_size)
    received = [bytearray() for _ in sizes]
    for start in range(0, max(sizes), max(1, length)):
        piece = torch.zeros(length, dtype=torch.uint8)
        mine = bytearray(payload[start : start + length])
        if mine:
            piece[: len(mine)] = torch.frombuffer(mine, dtype=torch.uint8)
        piece = piece.to(world.device)
        pieces = [torch.empty_like(piece) for _ in sizes] if is_rank_zero else None
        dist.gather(piece, pieces, dst=0)
        for rank, item in enumerate(pieces or ()):
            count = max(0, min(length, sizes[rank] - start))
            received[rank] += item[:count].cpu().numpy().tobytes()
    return received if is_rank_zero else None
