"""What a loop of one's own waits for after its backward pass, beside DDP by hand.

    mpirun -np 2 python benchmarks/own_loop.py

A perceptron of 20 million parameters. DistributedDataParallel reduces gradients beside the backward
pass; a loop of one's own reduces them when its optimizer steps, since nobody knows before which
backward pass is the last. Steps of both take turns in one process. Milliseconds: the smallest and
the median by the clock, the smallest of CPU seconds, and the median of what follows the backward
pass, with the update itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hpctrain

WIDTH, LAYERS, SAMPLES = 1024, 19, 64
Timing = tuple[float, float, float]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    with hpctrain.connect(seed=1) as world:
        torch.set_num_threads(1)
        ours, hand = make(), make()
        ours, optimizer = world.setup(ours, sgd(ours))
        wrapped = DistributedDataParallel(hand, gradient_as_bucket_view=True)
        steps = {
            "a loop of one's own": timed(ours, optimizer),
            "DDP by hand": timed(wrapped, sgd(hand)),
        }
        timings: dict[str, list[Timing]] = {name: [] for name in steps}
        for number in range(asked.steps + 2):
            for name, step in steps.items():
                dist.barrier()
                timing = step()
                if number > 1:  # before, everything is made for the first time
                    timings[name].append(timing)
        if world.is_rank_zero:
            tell(timings)


def make() -> nn.Module:
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS)]
    return nn.Sequential(*layers)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)


def timed(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Timing]:
    """Return a step that says its seconds, those of the CPU, and those after its backward pass."""
    x = torch.randn(SAMPLES, WIDTH)

    def step() -> Timing:
        begin, cpu = time.perf_counter(), time.process_time()
        model(x).square().mean().backward()
        ended = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        return now - begin, time.process_time() - cpu, now - ended

    return step


def tell(timings: dict[str, list[Timing]]) -> None:
    print(f"  {'ms per step':<22}{'smallest':>9}{'median':>8}{'CPU':>8}{'after backward':>16}")
    for name, each in timings.items():
        whole, cpu, after = (sorted(item) for item in zip(*each, strict=True))
        columns = whole[0], statistics.median(whole), cpu[0], statistics.median(after)
        numbers = "{:>9.0f}{:>8.0f}{:>8.0f}{:>16.0f}".format(*(1000 * item for item in columns))
        print(f"  {name:<22}{numbers}")


if __name__ == "__main__":
    main()
