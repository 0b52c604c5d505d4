"""What a step costs beyond the same loop written by hand, and beside the peers.

    python benchmarks/step.py
    mpirun -np 2 python benchmarks/step.py
    .venv-peers/bin/python benchmarks/step.py                        with all peers, see peers.sh
    .venv-peers/bin/mpirun -np 2 .venv-peers/bin/python benchmarks/step.py

A tiny perceptron, so that overhead shows. Blocks of 50 steps of all loops take turns in one
process; the table gives the tenth percentile and the median over blocks, microseconds per step,
the medians of differences and ratios within a round, and the tenth percentile of CPU time, which
other programs on the machine disturb less. Below it are the two ratios that a module has to keep:
to the same task by hand in hpctrain, and to Lightning's Trainer with the same logger. A peer that
is not installed is left out; Lightning is in the `test` extra.

hpctrain runs its own loop with all that a run has on: clipping, a schedule, metrics.jsonl and .csv
every ten steps, progress, the agreement to stop, heartbeats. And once more with the same model as
a module, which logs its loss and brings its optimizer and LR scheduler. Peers clip, schedule and
log as often; Lightning's Trainer with its logger, and once more with its bar and checkpoints.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from step_peers import LIGHTNING, LOG_EVERY, STEPS, TOTAL_STEPS, ByHand, Loop, peers
from synthetic import EPOCH_SAMPLES, Samples, build, stop_at
from torch import Tensor

import hpctrain
from hpctrain.batch.stop import StopAgreement
from hpctrain.launch.process_group import World
from hpctrain.observe.goodput import PhaseLog
from hpctrain.observe.metrics import MetricsWriter
from hpctrain.observe.progress import Progress
from hpctrain.training.components import NOTHING
from hpctrain.training.position import Interval, Position
from hpctrain.training.profiling import Phases
from hpctrain.training.rank_zero import RankZero, SaveClock
from hpctrain.training.run import Metrics, Run
from hpctrain.training.trainer import Plan, fit

SAMPLES = 32
TASK, A_MODULE = "hpctrain", "hpctrain, a module"
Table = dict[str, tuple[list[float], list[float]]]
"""Microseconds per step of every block, by the clock and of CPU time, by loop."""

CONFIG = """
[run]
name = "step"
[model]
use = "mlp"
in_features = 64
out_features = 10
hidden_features = [64]
[task]
use = "classification"
inputs = ["x"]
target = "y"
[data]
train = "none"
global_batch_size = %d
[optimizer]
use = "adamw"
lr = 1e-3
[scheduler]
use = "cosine"
warmup_steps = 50
[training]
max_steps = 1_000_000
clip_norm = 1.0
[logging]
every_steps = 10
"""

MODULE = """
[run]
name = "step"
[model]
use = "step_module:Net"
[data]
train = "none"
global_batch_size = %d
[training]
max_steps = 1_000_000
clip_norm = 1.0
[logging]
every_steps = 10
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=80)
    asked = parser.parse_args()
    with hpctrain.connect() as world, tempfile.TemporaryDirectory() as folder:
        fields = {"x": torch.randn(SAMPLES, 64), "y": torch.randint(10, (SAMPLES,))}
        job = Job(world, fields, Path(folder), CONFIG)
        module = Job(world, fields, Path(folder, "module"), MODULE)
        loops: dict[str, Loop] = {
            "by hand": ByHand(world, fields, clip=False),
            "by hand, clipped": ByHand(world, fields),
            TASK: job,
            A_MODULE: module,
        }
        loops |= peers(world, fields, Path(folder))
        torch.set_num_threads(1)  # last: Accelerate sets it, too
        table = measure(loops, asked.rounds)
        job.stop.flush()
        module.stop.flush()
        if world.topology.is_rank_zero:
            tell(table, world.topology.world_size)


def measure(loops: dict[str, Loop], rounds: int) -> Table:
    """Return what every block took, by loop."""
    table: Table = {name: ([], []) for name in loops}
    for number in range(rounds + 2):
        for name, loop in loops.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            loop()
            seconds = time.perf_counter() - start, time.process_time() - cpu_start
            if number > 1:  # before, everything is made for the first time
                for times, each in zip(table[name], seconds, strict=True):
                    times.append(each / STEPS * 1e6)
    return table


def tell(table: Table, ranks: int) -> None:
    base, _ = table["by hand, clipped"]
    print(f"{f'{ranks} ranks' if ranks > 1 else '1 rank'}, us per step")
    print(f"  {'':<28}{'p10':>7}{'median':>8}{'more':>7}{'ratio':>7}{'CPU p10':>9}")
    for name, (times, cpu) in table.items():
        more = statistics.median(a - b for a, b in zip(times, base, strict=True))
        p10, median, ratio = tenth(times), statistics.median(times), ratio_of(times, base)
        row = f"{p10:>7.0f}{median:>8.0f}{more:>+7.0f}{ratio:>7.2f}{tenth(cpu):>9.0f}"
        print(f"  {name:<28}{row}", flush=True)
    for other, goal in ((TASK, "at most 1.15"), (LIGHTNING, "below 1")):
        if other in table:
            both = zip(table[A_MODULE], table[other], strict=True)
            by_clock, by_cpu = (ratio_of(mine, theirs) for mine, theirs in both)
            print(f"  {A_MODULE} / {other}: {by_clock:.2f}, of CPU time {by_cpu:.2f} ({goal})")


def tenth(times: list[float]) -> float:
    return statistics.quantiles(times, n=10)[0]


def ratio_of(times: list[float], base: list[float]) -> float:
    """Return the median ratio of two loops within a round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


class _Run(Run):
    """A run that ends with every block, and saves nothing there."""

    def save(self, place: Position, metrics: Metrics | None) -> None:
        """Saves are benchmarks/checkpoint.py's."""

    def try_save(self, place: Position) -> None:
        """There is nothing to try."""


class Job:
    """The loop of a job, as `python -m hpctrain` runs it."""

    def __init__(self, world: World, fields: dict[str, Tensor], folder: Path, config: str) -> None:
        self.samples = Samples(fields, world.topology.world_size)
        text = config % (SAMPLES * world.topology.world_size)
        self.config, self.parts = build(text, self.samples, world)
        folder.mkdir(exist_ok=True)
        self.stop = StopAgreement(world.communicator, lambda: 0)
        rank_zero = None
        if world.topology.is_rank_zero:
            held: Any = SimpleNamespace(phase_log=PhaseLog(folder))
            rank_zero = RankZero(
                folder=held,
                store=held,
                save_clock=SaveClock(0.0, lambda: False),
                writer=MetricsWriter(folder, None),
                progress=Progress(TOTAL_STEPS, mode="lines", write=lambda _: None),
            )
            self.stop.add(rank_zero.save_clock.bit)
        data: Any = SimpleNamespace(
            config=self.config,
            brought=NOTHING,
            train_loader=self.samples,
            stop_at=stop_at(10**9, self.config),
            place=Position(),
        )
        counters = {
            "data": lambda: self.samples.wait_seconds,
            "communication": self.parts.step.communication_seconds,
        }
        self.place = Position()
        self.run = _Run(
            world, data, self.parts, phases=Phases(counters), stop=self.stop,
            rank_zero=rank_zero, saved={},
        )  # fmt: skip

    def __call__(self) -> None:
        never = Interval()
        plan = Plan(
            stop_at=stop_at(self.place.step + STEPS, self.config),
            log=Interval(every_steps=LOG_EVERY),
            evaluate=None,
            check=never,
            save=Interval(every_steps=EPOCH_SAMPLES, every_epochs=1),
        )
        loader: Any = self.samples
        self.place, _ = fit(
            self.place, plan, step=self.parts.step, loader=loader, schedule=self.parts.schedule,
            run=self.run,
        )  # fmt: skip


if __name__ == "__main__":
    main()
