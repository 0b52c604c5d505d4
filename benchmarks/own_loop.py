"""What a loop of one's own waits for after its backward pass, beside DDP by hand.

    mpirun -np 2 python benchmarks/own_loop.py

A perceptron of 20 million parameters. DistributedDataParallel reduces gradients beside the backward
pass, and so does `world.step` (as `run.step`), which knows that the update comes next. With
`loss.backward()` and `optimizer.step()` they are reduced in the latter, since nobody knows before
which backward pass is the last. Steps of all take turns in one process. Milliseconds: the smallest
and the median by the clock, the smallest of CPU time; and the median ratio to DDP within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hpctrain

WIDTH, LAYERS, SAMPLES = 1024, 19, 64
BY_HAND = "DDP by hand"
Timing = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    with hpctrain.connect(seed=1) as world:
        torch.set_num_threads(1)
        models = [make() for _ in range(3)]
        optimizers = [sgd(model) for model in models]
        for model, optimizer in zip(models[:2], optimizers[:2], strict=True):
            world.setup(model, optimizer)
        models[2] = DistributedDataParallel(models[2], gradient_as_bucket_view=True)
        x = torch.randn(SAMPLES, WIDTH)

        def beside() -> None:
            world.step(models[0](x).square().mean(), optimizers[0])

        def after(number: int) -> None:
            models[number](x).square().mean().backward()
            optimizers[number].step()
            optimizers[number].zero_grad()

        steps: dict[str, Callable[[], None]] = {
            "world.step": beside,
            "backward, then step": partial(after, 1),
            BY_HAND: partial(after, 2),
        }
        timings: dict[str, list[Timing]] = {name: [] for name in steps}
        for number in range(asked.steps + 2):
            for name, step in steps.items():
                timing = timed(step)
                if number > 1:  # before, everything is made for the first time
                    timings[name].append(timing)
        if world.is_rank_zero:
            tell(timings)


def make() -> nn.Module:
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS)]
    return nn.Sequential(*layers)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)


def timed(step: Callable[[], None]) -> Timing:
    """Return the seconds of a step, and those of the CPU."""
    dist.barrier()
    begin, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - begin, time.process_time() - cpu


def tell(timings: dict[str, list[Timing]]) -> None:
    print(f"  {'ms per step':<22}{'smallest':>9}{'median':>8}{'CPU':>8}{'ratio':>8}")
    for name, each in timings.items():
        whole, cpu = zip(*each, strict=True)
        pairs = zip(whole, timings[BY_HAND], strict=True)
        ratio = statistics.median(mine / theirs for mine, (theirs, _) in pairs)
        columns = (1000 * item for item in (min(whole), statistics.median(whole), min(cpu)))
        print(f"  {name:<22}{'{:>9.0f}{:>8.0f}{:>8.0f}'.format(*columns)}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
