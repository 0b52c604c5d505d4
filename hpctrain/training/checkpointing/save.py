"""Saves of a run whose parameters are spread over the ranks, which write it together.

`checkpoint.files` bounds the files of one save: a quota counts them, and a thousand ranks would
write two thousand. The ranks of a group are neighbours, whose rows of a tensor follow each other:
the first of them, its writer, is sent those of the others, and writes them all in one piece. No
rank writes to another one's file.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from threading import Event

import torch
from torch import Tensor
from torch import distributed as dist

from hpctrain.batch.stop import StopAgreement
from hpctrain.checkpoint.format import MODEL, TRAINING, Spread, rows_of
from hpctrain.checkpoint.manager import CheckpointManager, Outcome, PartWriter
from hpctrain.checkpoint.safetensors_files import Written
from hpctrain.checkpoint.save import Snapshot, aliases
from hpctrain.errors import CheckpointError, HpctrainError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together

_FILES_OF_ALL = 3
"""training.json, config.toml and meta.json; each writer has two files of its own."""


def group_size(world_size: int, most_files: int) -> int:
    """Return how many ranks share a writer, so that a checkpoint has no more files than that.

    Args:
        world_size: number of all ranks.
        most_files: bound, 5 or more; 0: none.
    """
    if not most_files:
        return 1
    return -(-world_size // max(1, (most_files - _FILES_OF_ALL) // 2))


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of all ranks, as this one sees them."""

    world: World
    size: int

    @property
    def part(self) -> int:
        """Number of the part that this rank's group writes."""
        return self.world.topology.rank // self.size

    @property
    def is_writer(self) -> bool:
        return self.world.topology.rank % self.size == 0

    def gather(self, snapshot: Snapshot, spread: Spread) -> Snapshot:
        """Return a snapshot with the rows of the whole group, on the host; none where not a writer.

        Takes host memory for all of the group's rows. Collective: all ranks.

        Args:
            snapshot: with this rank's rows.
            spread: as rank 0 has it.

        Raises:
            CheckpointError: on every rank, if one of them has other tensors, or no memory for it.
        """
        tied = {**aliases(snapshot.model), **snapshot.tied}
        mine = {
            MODEL: {name: item for name, item in snapshot.model.items() if name not in tied},
            TRAINING: {**snapshot.training, **snapshot.lent},
        }
        with self.world.pulse.long_phase():
            with raise_together(self.world.communicator):
                # Whatever may fail does so before the first rank sends, and another one waits.
                self._require_rows(spread, mine)
                host = {file: self._host(spread, file, mine[file]) for file in mine}
            for file, tensors in mine.items():
                self._exchange(spread, file, tensors, host[file])
        return replace(
            snapshot,
            model=host[MODEL],
            training=host[TRAINING],
            lent={},
            tied=tied,
            spread=replace(spread, group=self.size),
            is_copied=True,
        )

    def _host(self, spread: Spread, file: str, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of this rank's tensors, with room for the rows of its group behind them."""
        if not self.is_writer:
            return {}
        host = {}
        try:
            for name, tensor in mine.items():
                shape = spread.shapes[file].get(name)
                rows = tensor.shape[:1] if shape is None else (self._group_rows(spread, shape[0]),)
                host[name] = torch.empty((*rows, *tensor.shape[1:]), dtype=tensor.dtype)
                target = host[name] if shape is None else host[name][: tensor.shape[0]]
                target.copy_(tensor.detach())
        except RuntimeError as error:
            raise CheckpointError(
                f"no host memory for the rows of {self.size} ranks, which are one part of a "
                f"checkpoint: {error}. Raise checkpoint.files: more files are of fewer ranks each"
            ) from error
        return host

    def _require_rows(self, spread: Spread, mine: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Check that this rank has the rows of each tensor that the others will wait for.

        Raises:
            CheckpointError: naming the first that it lacks.
        """
        rank = self.world.topology.rank
        for file, tensors in mine.items():
            for name, first, stop in _rows_from(spread, file, rank, rank):
                shape = (stop - first, *spread.shapes[file][name][1:])
                if name not in tensors or tensors[name].shape != shape:
                    raise CheckpointError(
                        f"{name} cannot be saved: rank {rank} has not the rows of it that rank 0 "
                        "takes it to have: set checkpoint.files = 0"
                    )

    def _group_rows(self, spread: Spread, length: int) -> int:
        """Return how many rows of a tensor this writer's group has."""
        first = self.part * self.size
        last = min(first + self.size, spread.ranks) - 1
        return rows_of(length, spread.ranks, last)[1] - rows_of(length, spread.ranks, first)[0]

    def _exchange(
        self, spread: Spread, file: str, mine: Mapping[str, Tensor], host: Mapping[str, Tensor]
    ) -> None:
        """Send this rank's rows to its writer, or receive those of the others."""
        writer = self.part * self.size
        for rank in range(writer + 1, min(writer + self.size, spread.ranks)):
            if self.world.topology.rank not in (writer, rank):
                continue
            for name, first, stop in _rows_from(spread, file, writer, rank):
                if self.is_writer:
                    target = host[name][first:stop]
                    received = torch.empty(target.nbytes, dtype=torch.uint8, device=self._device)
                    dist.recv(received, src=rank)
                    target.copy_(received.cpu().view(target.dtype).reshape(target.shape))
                else:
                    sent = mine[name].detach().contiguous().reshape(-1).view(torch.uint8)
                    dist.send(sent.to(self._device), dst=writer)

    @property
    def _device(self) -> torch.device:
        """Return where tensors have to be for the process group to send them."""
        return torch.device("cpu") if self.world.backend == "gloo" else self.world.device


def _rows_from(spread: Spread, file: str, writer: int, rank: int) -> Iterator[tuple[str, int, int]]:
    """Yield what a rank has of each tensor: its first row within its group's part, and the stop."""
    for name in sorted(spread.shapes[file]):
        length = spread.shapes[file][name][0]
        first, stop = rows_of(length, spread.ranks, rank)
        if first < stop:
            begin = rows_of(length, spread.ranks, writer)[0]
            yield name, first - begin, stop - begin


class OthersParts:
    """Where the thread of rank 0 waits for what the others have written; it never communicates."""

    def __init__(self) -> None:
        self._there = Event()
        self._outcomes: Sequence[tuple[int, str, Outcome]] = ()

    def hand_over(self, outcomes: Sequence[tuple[int, str, Outcome]]) -> None:
        """Let the thread go on: (rank, host, outcome) of every other rank."""
        self._outcomes = outcomes
        self._there.set()

    def wait(self) -> list[Mapping[str, Written]]:
        """Return the files of every other rank.

        Raises:
            OSError: if one could not write its own.
        """
        self._there.wait()
        files: list[Mapping[str, Written]] = []
        for rank, host, outcome in self._outcomes:
            if isinstance(outcome, str):
                raise OSError(f"rank {rank} on {host}: {outcome}")
            files.append(outcome)
        return files


class TogetherSaver:
    """Saves of a run whose parameters are spread over the ranks.

    All ranks learn by the agreement that they make anyway that everybody's part is written; rank
    0's thread, which has waited for that, then writes meta.json and renames.
    """

    def __init__(
        self,
        world: World,
        stop: StopAgreement,
        store: CheckpointManager | None,
        most_files: int = 0,
    ) -> None:
        """Take part in the agreement.

        Args:
            world: the ranks.
            stop: the agreement.
            store: of checkpoints, on rank 0.
            most_files: bound of the files of a checkpoint; 0: none.
        """
        self._world = world
        self._stop = stop
        self._store = store
        self._groups = Groups(world, group_size(world.topology.world_size, most_files))
        self._writer = PartWriter(self._groups.part)
        self._begun = 0
        self._others: OthersParts | None = None
        self._open = False
        # Rank 0's own part needs no word: its thread knows.
        stop.count(lambda: self._begun if store is not None else self._writer.done)

    def save(self, snapshot: Snapshot) -> None:
        """Begin a save. Collective: all ranks.

        Raises:
            CheckpointError: on every rank, if the one before has failed or this one cannot begin.
        """
        if self._open and self._store is not None:
            self._store.report_waiting()
        self.finish()
        folder = None
        with raise_together(self._world.communicator):
            if self._store is not None:
                folder = self._store.open_folder(snapshot.step)
        folder, spread = self._world.communicator.broadcast((folder, snapshot.spread))
        if self._groups.size > 1:
            snapshot = self._groups.gather(snapshot, spread)
        self._begun += 1
        self._open = True
        with raise_together(self._world.communicator):
            if not self._groups.is_writer:
                self._writer.skip()
            elif self._store is None:
                self._writer.write(folder, snapshot)
            else:
                self._others = OthersParts()
                self._store.save(replace(snapshot, others=self._others.wait))

    def look(self) -> None:
        """Make a save whole whose parts are all written. Collective: all ranks."""
        if self._open and self._stop.least >= self._begun:
            self._hand_over()

    def finish(self) -> None:
        """Wait until the last save is on disk. Collective: all ranks.

        Raises:
            CheckpointError: on every rank, if it failed.
        """
        begin = time.perf_counter()
        with raise_together(self._world.communicator):
            if self._open:
                self._hand_over()
            if self._store is not None:
                waited = time.perf_counter() - begin
                self._store.finish()
                self._store.stall_seconds += waited

    @contextmanager
    def finished_after(self) -> Iterator[None]:
        """Finish the last save after the body, also where all ranks leave it by an error.

        Collective: all ranks.
        """
        try:
            yield
        except HpctrainError as error:
            if error.everywhere:
                # The first failure is the one to report.
                with suppress(HpctrainError), self._world.pulse.long_phase():
                    self.finish()
            raise
        with self._world.pulse.long_phase():
            self.finish()

    def _hand_over(self) -> None:
        """Tell rank 0's thread what all ranks have written. Collective: all ranks."""
        self._open = False
        mine: Outcome = {} if self._store is not None else self._writer.finish()
        everyone = self._world.communicator.all_gather((socket.gethostname(), mine))
        if self._others is not None:
            outcomes = [(rank, *item) for rank, item in enumerate(everyone) if rank]
            self._others.hand_over(outcomes)
