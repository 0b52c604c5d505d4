"""Run on every rank: what each rank has written of its rows comes back, at any world size.

sharded_saves.py FOLDER exact        saved and restored, bit for bit, in every precision
sharded_saves.py FOLDER go-on        two more steps of a run that other world sizes have begun
sharded_saves.py FOLDER save         saves without end, to be killed
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import brought
import brought_checks
import torch
from sharded_world import Tower, build, full
from step_world import alone, batch_of, samples

import hpctrain
from hpctrain.batch.stop import StopAgreement
from hpctrain.checkpoint.format import MODEL, TRAINING, part_name
from hpctrain.checkpoint.load import load, load_newest
from hpctrain.checkpoint.manager import CheckpointManager, Retention
from hpctrain.errors import CheckpointError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.training.checkpointing.resume import reading, restore, share
from hpctrain.training.checkpointing.save import TogetherSaver
from hpctrain.training.checkpointing.snapshot import capture
from hpctrain.training.position import Position
from hpctrain.training.step import TrainStep
from hpctrain.utils.run_folder import folder_name

PRECISIONS = ("32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed")


class Saves:
    """The saves of one run, as the job makes them."""

    def __init__(self, world: World, folder: Path, told: list[str], most_files: int = 0) -> None:
        self.world, self.folder, self.told = world, folder, told
        self.stop = StopAgreement(world.communicator, lambda: 0)
        self.store: CheckpointManager | None = None
        if world.topology.is_rank_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self.store = CheckpointManager(
                folder,
                retention=Retention(keep_last=100),
                confirm=lambda: None,
                warn=told.append,
            )
        world.communicator.barrier()
        self.together = TogetherSaver(world, self.stop, self.store, most_files)

    def save(self, step: TrainStep, number: int) -> None:
        snapshot = capture(
            self.world,
            step,
            Position(step=number),
            data={},
            extra={"total_steps": 9, "lr": 0.01, "metrics": {}},
            config_toml="",
            metrics=None,
        )
        if step.sharded is not None:
            assert snapshot is not None
            self.together.save(snapshot)
        elif self.store is not None and snapshot is not None:
            self.store.save(snapshot)

    def restore(self, step: TrainStep) -> int:
        loaded = None
        with (
            raise_together(self.world.communicator),
            reading(self.world, together=step.sharded is not None) as read,
        ):
            if self.world.topology.is_rank_zero:
                loaded = load_newest(self.folder / "checkpoints", self.told.append, read)
        resumed = share(self.world, loaded)
        if resumed is None:
            return 0
        assert (step.sharded is None) == (
            resumed.rows is None
        ) or self.world.topology.world_size > 1
        with raise_together(self.world.communicator):
            restore(self.world, step, resumed)
        return resumed.place.step

    def finish(self) -> None:
        self.together.finish()
        with raise_together(self.world.communicator):
            if self.store is not None:
                self.store.finish()


def trained(world: World, step: TrainStep, first: int, stop: int) -> list[dict[str, float]]:
    numbers = []
    for seed in range(first, stop):
        step(batch_of(world, samples(29 if seed % 3 else 1, seed=seed)), lr=0.01)
        assert step.average is not None
        step.average.update(seed + 1)
        numbers.append(step.read())
    return numbers


def state(world: World, step: TrainStep) -> dict[str, Any]:
    """Return parameters, averages and optimizer state: whole, and this rank's."""
    assert step.average is not None
    slots = {
        (index, slot): item
        for index, parameter in enumerate(step.optimizer.param_groups[0]["params"])
        for slot, item in step.optimizer.state[parameter].items()
    }
    return {**full(world, step), **step.average.state(), **slots}


def check_exact(world: World, folder: Path) -> None:
    """As if it had never stopped; the save is written while training goes on."""
    for precision in PRECISIONS:
        options: dict[str, Any] = {
            "sharded": True,
            "precision": precision,
            "micro_batch_size": 4,
            "ema_decay": 0.9,
        }
        told: list[str] = []
        # Some as groups of ranks that share a writer: one, or at three ranks two.
        most_files = {"64-true": 5, "bf16-mixed": 7}.get(precision, 0)
        saves = Saves(world, folder / precision, told, most_files)
        first = build(world, Tower(number=True), **options)
        trained(world, first, 0, 2)
        saves.save(first, 2)
        trained(world, first, 2, 3)
        saves.save(first, 3)
        expected = []
        for seed in range(3, 6):
            expected += trained(world, first, seed, seed + 1)
            saves.stop.boundary()
            saves.together.look()
        saves.finish()

        second = build(world, Tower(number=True), **options)
        assert saves.restore(second) == 3
        # As text: where a scaled gradient overflows, its norm is not a number.
        assert str(trained(world, second, 3, 6)) == str(expected), precision
        ours, theirs = state(world, second), state(world, first)
        assert ours.keys() == theirs.keys()
        for name, item in ours.items():
            assert torch.equal(item, theirs[name]), (precision, name)
        assert not any("skipped" in text for text in told)
    if world.topology.world_size > 1:
        check_damage(world, saves, second)
    check_parameters_that_all_ranks_hold(world, folder)


def check_parameters_that_all_ranks_hold(world: World, folder: Path) -> None:
    """Complex ones and others of their own dtype, and a teacher's."""
    for make in (brought.Mixed, brought.Teacher):
        saves = Saves(world, folder / make.__name__, [])
        first = brought_checks.build(world, make(), "32-true", sharded=True)
        brought_checks.trained(world, first)
        saves.save(first, 1)
        saves.finish()
        expected = brought_checks.trained(world, first)
        second = brought_checks.build(world, make(), "32-true", sharded=True)
        assert saves.restore(second) == 1
        assert brought_checks.trained(world, second) == expected, make
        ours, theirs = (dict(step.held.named_parameters()) for step in (first, second))
        assert all(torch.equal(theirs[name], item) for name, item in ours.items()), make


def check_damage(world: World, saves: Saves, step: TrainStep) -> None:
    """A file of one rank is missing, cut or flipped: the one before is taken, and why is told."""
    newest = saves.folder / "checkpoints" / "step-00000003"
    last = world.topology.world_size - 1
    for file in (part_name(MODEL, 0), part_name(TRAINING, last)):
        content = (newest / file).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for damaged in (None, content[:-1], bytes(flipped)):
            saves.told.clear()
            world.communicator.barrier()
            if world.topology.is_rank_zero:
                if damaged is None:
                    (newest / file).unlink()
                else:
                    (newest / file).write_bytes(damaged)
            assert saves.restore(step) == 2
            if world.topology.is_rank_zero:
                assert len(saves.told) == 1
                assert f"step-00000003/{file}" in saves.told[0]
                try:
                    load(newest)
                except CheckpointError:
                    pass
                else:
                    raise AssertionError("it was joined all the same")
                (newest / file).write_bytes(content)
    world.communicator.barrier()
    assert saves.restore(step) == 3


def check_going_on(world: World, folder: Path) -> None:
    """What other world sizes have begun goes on as one process would have it."""
    saves = Saves(world, folder, [], most_files=7)
    step = build(world, Tower(number=True), sharded=True, micro_batch_size=4, ema_decay=0.9)
    begin = saves.restore(step)
    numbers = trained(world, step, begin, begin + 2)
    reference = build(alone(), Tower(number=True), sharded=False, micro_batch_size=4, ema_decay=0.9)
    trained(alone(), reference, 0, begin)
    expected = trained(alone(), reference, begin, begin + 2)
    for ours, theirs in zip(numbers, expected, strict=True):
        assert abs(ours["loss"] - theirs["loss"]) < 1e-9, (begin, ours, theirs)
    theirs_full = full(alone(), reference)
    for name, item in full(world, step).items():
        torch.testing.assert_close(item, theirs_full[name], rtol=0, atol=1e-9)
    saves.save(step, begin + 2)
    saves.finish()
    if step.sharded is not None:
        newest = saves.folder / "checkpoints" / folder_name(begin + 2)
        assert len(list(newest.iterdir())) <= 7


def save_for_ever(world: World, folder: Path) -> None:
    saves = Saves(world, folder, [])
    step = build(world, Tower(number=True), sharded=True, ema_decay=0.9)
    number = saves.restore(step)
    while True:
        number += 1
        trained(world, step, number, number + 1)
        saves.save(step, number)
        world.pulse.step_done(number)


def main(folder: Path, what: str) -> None:
    with hpctrain.connect() as world:
        {"exact": check_exact, "go-on": check_going_on, "save": save_for_ever}[what](world, folder)
        if world.topology.is_rank_zero:
            print("passed", what, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
