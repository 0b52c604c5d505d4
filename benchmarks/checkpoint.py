"""What a checkpoint costs: the time that training waits, and the speed of the disk.

    python benchmarks/checkpoint.py                        states of 200 MB and 2 GB
    python benchmarks/checkpoint.py --mb 200 --rounds 9
    python benchmarks/checkpoint.py --kills 200            killed while saving, as often
    .venv-peers/bin/python benchmarks/checkpoint.py        with the peers, see peers.sh

The state is that of a perceptron and AdamW, after a step. All take turns, in the folder --folder
(default: runs), so that the machine's other work falls on all of them. A copy into memory that is
kept is what others cannot do without; `dd conv=fsync` of as many bytes is what the disk can do.
"waits" is the time until training may go on. What it costs in all is by how much save and the step
after it are longer than such a step alone: hpctrain copies the optimizer's state during that.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from synthetic import Samples, build
from torch import Tensor
from torch.utils.data import DataLoader

import hpctrain
from hpctrain.checkpoint.format import newest_first
from hpctrain.checkpoint.load import load
from hpctrain.checkpoint.manager import CheckpointManager, Retention
from hpctrain.checkpoint.save import Snapshot
from hpctrain.data.loading.loader import Batch
from hpctrain.errors import HpctrainError
from hpctrain.launch.process_group import World
from hpctrain.training.checkpointing.snapshot import capture
from hpctrain.training.position import Position
from hpctrain.training.step import TrainStep

WIDTH, BATCH = 1024, 64
CONFIG = """
run = {{name = "checkpoint"}}
model = {{use = "mlp", in_features = {width}, out_features = {width}, hidden_features = {hidden}}}
task = {{use = "regression", inputs = ["x"], target = "y"}}
data = {{train = "none", global_batch_size = {batch}}}
optimizer = {{use = "adamw", lr = 1e-3}}
training = {{max_steps = 1}}
"""
Method = Callable[[Path], Callable[[], None]]
"""Saves to a path and returns, as soon as training may go on, what waits for the disk."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mb", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=asked.folder))
    try:
        if asked.kills:
            kill(asked.kills, folder)
            return
        with hpctrain.connect() as world:
            for megabytes in asked.mb:
                compare(megabytes, asked.rounds, folder, world)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(slots=True)
class Measured:
    """Seconds of one method.

    Attributes:
        stalls: until training may go on.
        costs: these, and what the save adds to the step after it.
        totals: until the disk has all.
    """

    stalls: list[float]
    costs: list[float]
    totals: list[float]


def compare(megabytes: int, rounds: int, folder: Path, world: World) -> None:
    step, batch = trained(megabytes, world)
    tensors = {
        **step.model.state_dict(),
        **{
            f"{index}/{name}": item
            for index, slots in enumerate(step.optimizer.state.values())
            for name, item in slots.items()
        },
    }
    num_bytes = sum(item.numel() * item.element_size() for item in tensors.values())
    ours = Ours(step, world, folder / "hpctrain")
    methods: dict[str, Method] = {
        "copy in memory, kept": copy_of(tensors),
        "dd conv=fsync": dd_of(num_bytes),
        "hpctrain": ours,
        "torch.save": torch_save(step),
        "torch.save, fsync": torch_save(step, sync=True),
        "DCP async_save": dcp_async(step),
    }
    if importlib.util.find_spec("lightning") and importlib.util.find_spec("accelerate"):
        methods |= {"Lightning": lightning(step), "Accelerate": accelerate(step)}
    measured = {name: Measured([], [], []) for name in methods}
    for number in range(rounds + 1):  # the first round makes buffers and is told apart
        for name, method in methods.items():
            path = folder / f"{name.split()[0]}-{number}"
            os.sync()
            alone = min(seconds_of(step, batch) for _ in range(3))
            begin = time.perf_counter()
            finish = method(path)
            stall = time.perf_counter() - begin
            measured[name].stalls.append(stall)
            measured[name].costs.append(stall + seconds_of(step, batch) - alone)
            finish()
            waited = finish is not nothing
            measured[name].totals.append(time.perf_counter() - begin if waited else stall)
            ours.settle()
            if name != "hpctrain":
                subprocess.run(["rm", "-rf", path], check=True)
    shutil.rmtree(folder / "hpctrain", ignore_errors=True)
    tell(measured, num_bytes, rounds)


def tell(measured: dict[str, Measured], num_bytes: int, rounds: int) -> None:
    copies, disk = measured["copy in memory, kept"].stalls, measured["dd conv=fsync"].totals
    print(f"\n{num_bytes / 1e6:,.0f} MB, {rounds} rounds; medians, and of ratios within a round")
    print(
        f"{'':<22}{'waits':>9}{'copies':>8}{'first':>10}{'costs':>10}"
        f"{'on disk':>10}{'MB/s':>7}{'of dd':>7}"
    )
    for name, times in measured.items():
        stall, total = statistics.median(times.stalls[1:]), statistics.median(times.totals[1:])
        print(
            f"{name:<22}{stall * 1e3:>6.0f} ms{ratio(times.stalls, copies):>8.2f}"
            f"{times.stalls[0] * 1e3:>7.0f} ms{statistics.median(times.costs[1:]) * 1e3:>7.0f} ms"
            f"{total:>8.2f} s{num_bytes / total / 1e6:>7,.0f}"
            f"{ratio(disk, times.totals):>7.2f}",
            flush=True,
        )
    ours, theirs = measured["hpctrain"], measured["torch.save"]
    print(
        f"hpctrain waits for {ratio(ours.stalls, theirs.stalls):.3f} of what torch.save does, and "
        f"costs {ratio(ours.costs, theirs.costs):.3f} of it"
    )


def ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first[1:], second[1:], strict=True))


def seconds_of(step: TrainStep, batch: Batch) -> float:
    begin = time.perf_counter()
    step(batch, 1e-3)
    return time.perf_counter() - begin


def trained(megabytes: int, world: World) -> tuple[TrainStep, Batch]:
    """Return a model whose checkpoint is so large, after one step, and a batch for it."""
    layers = max(1, round(megabytes * 1e6 / 12 / (WIDTH * WIDTH + WIDTH)) - 1)
    fields = {"x": torch.randn(BATCH, WIDTH), "y": torch.randn(BATCH, WIDTH)}
    samples = Samples(fields, 1)
    _, parts = build(
        CONFIG.format(width=WIDTH, batch=BATCH, hidden=[WIDTH] * layers), samples, world
    )
    batch = next(samples.epoch(0, 0))
    parts.step(batch, 1e-3)
    return parts.step, batch


def nothing() -> None:
    """There is nothing to wait for."""


def copy_of(tensors: dict[str, Tensor]) -> Method:
    kept = {name: torch.empty_like(item) for name, item in tensors.items()}

    def copy(_: Path) -> Callable[[], None]:
        for name, item in tensors.items():
            kept[name].copy_(item.detach())
        return nothing

    return copy


def dd_of(num_bytes: int) -> Method:
    def dd(path: Path) -> Callable[[], None]:
        blocks = ["bs=4M", f"count={round(num_bytes / 4 / 2**20)}", "conv=fsync", "status=none"]
        subprocess.run(["dd", "if=/dev/zero", f"of={path}", *blocks], check=True)
        return nothing

    return dd


class Ours:
    """Saves as a run does, and keeps two, so that each save reads itself back and deletes one."""

    def __init__(self, step: TrainStep, world: World, run: Path) -> None:
        self.step, self.world = step, world
        self.store = CheckpointManager(
            run, retention=Retention(keep_last=2), confirm=nothing, warn=print
        )

    def __call__(self, path: Path) -> Callable[[], None]:
        place = Position(step=int(path.name.rpartition("-")[2]))
        snapshot = capture(
            self.world, self.step, place, data={}, extra={}, config_toml="", metrics=None
        )
        assert snapshot is not None
        before = self.store.newest
        self.store.save(snapshot)

        def wait() -> None:
            while self.store.newest == before:
                time.sleep(0.001)

        return wait

    def settle(self) -> None:
        """Wait until it is read back: nothing that training waits for."""
        self.store.finish()


def torch_save(step: TrainStep, *, sync: bool = False) -> Method:
    def save(path: Path) -> Callable[[], None]:
        state = {"model": step.model.state_dict(), "optimizer": step.optimizer.state_dict()}
        torch.save(state, path)
        if sync:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.rename(path.with_suffix(".pt"))
            path.with_suffix(".pt").rename(path)
        return nothing

    return save


def dcp_async(step: TrainStep) -> Method:
    from torch import distributed as dist
    from torch.distributed import checkpoint as dcp

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def save(path: Path) -> Callable[[], None]:
        state = {"model": step.model.state_dict(), "optimizer": step.optimizer.state_dict()}
        with quiet():
            future: Any = dcp.async_save(state, checkpoint_id=path)
        return future.result

    return save


def lightning(step: TrainStep) -> Method:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = step.model

        def training_step(self, batch: Tensor) -> Tensor:
            output: Tensor = self.model(batch).sum()
            return output

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), fused=True)

    with quiet():
        trainer = lightning.Trainer(
            max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Module(), DataLoader(torch.randn(2, WIDTH)))  # type: ignore[arg-type]

    def save(path: Path) -> Callable[[], None]:
        with quiet():
            trainer.save_checkpoint(path)
        return nothing

    return save


def accelerate(step: TrainStep) -> Method:
    import accelerate

    with quiet():
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.prepare(step.model, step.optimizer)

    def save(path: Path) -> Callable[[], None]:
        with quiet():
            accelerator.save_state(str(path))
        return nothing

    return save


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what the peers say besides."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


KILLED_LAYERS, KILLED_WIDTH = 20, 512


def save_for_ever(run: str, first: int) -> None:
    """Save one checkpoint after the other: every number of it is its step."""
    store = CheckpointManager(
        Path(run), retention=Retention(keep_last=2), confirm=nothing, warn=lambda _: None
    )
    for step in range(first, first + 100_000):
        store.save(
            Snapshot(
                step=step,
                model={
                    f"layer{index}": torch.full((KILLED_WIDTH, KILLED_WIDTH), float(step))
                    for index in range(KILLED_LAYERS)
                },
                training={"state": torch.full((KILLED_WIDTH,), float(step))},
                values={"step": step},
                config_toml="",
            )
        )


def kill(times: int, folder: Path) -> None:
    """Kill a process that saves, again and again; every folder with a final name has to load."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["hpctrain.checkpoint.manager"])
    draw, torn, looked_at, newest = random.Random(0), 0, 0, 0
    for number in range(times):
        writer: BaseProcess = processes.Process(
            target=save_for_ever, args=(str(folder), newest + 1), daemon=True
        )
        writer.start()
        latest, before = folder / "latest", newest
        while (int(latest.read_text()[5:]) if latest.exists() else 0) <= before:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.4)
        writer.kill()
        writer.join()
        for path in newest_first(folder / "checkpoints"):
            looked_at += 1
            try:
                loaded = load(path)
                right = all(bool((item == loaded.step).all()) for item in loaded.model.values())
                newest = max(newest, loaded.step)
            except HpctrainError as error:
                right = False
                print(error)
            torn += not right
        if (number + 1) % 50 == 0:
            print(f"{number + 1} killed, {looked_at} checkpoints read, {torn} torn", flush=True)
    print(f"{times} killed while saving, {newest} saves: {torn} of {looked_at} torn")
    sys.exit(torn > 0)


if __name__ == "__main__":
    main()
