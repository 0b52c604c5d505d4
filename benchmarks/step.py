"""What a step costs beyond the same loop written by hand.

    python benchmarks/step.py
    mpirun -np 2 python benchmarks/step.py

A tiny MLP, so that overhead shows. Blocks of 50 steps of the two loops take turns in one process;
the table gives the tenth percentile and the median over blocks, microseconds per step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hpctrain
from hpctrain.batch.stop import StopAgreement
from hpctrain.data.loader import Batch
from hpctrain.models.mlp import MLP
from hpctrain.observe.progress import Progress
from hpctrain.training.optimizers import build_optimizer
from hpctrain.training.precision import NumberFormat
from hpctrain.training.step import TrainStep
from hpctrain.training.task import Classification

BLOCKS, STEPS, SAMPLES = 80, 50, 32


def main() -> None:
    with hpctrain.connect() as world:
        torch.set_num_threads(1)
        fields = {"x": torch.randn(SAMPLES, 64), "y": torch.randint(10, (SAMPLES,))}
        size = world.topology.world_size
        batch = Batch(fields=fields, size=SAMPLES, global_size=SAMPLES * size, epoch=0, start=0)

        model = MLP(64, 10, [64])
        step = TrainStep(
            model,
            Classification(["x"], "y"),
            build_optimizer(torch.optim.AdamW, model, 1e-3, {}),
            world,
            number_format=NumberFormat.of("32-true", world.device),
            clip_norm=1.0,
            micro_batch_size=None,
            largest_share=SAMPLES,
            example={name: tensor[:1] for name, tensor in fields.items()},
        )
        step.prime()
        stop = StopAgreement(world.communicator, lambda: 0)
        progress = Progress(10**9, mode="none")
        count = 0

        def ours() -> None:
            nonlocal count
            count += 1
            step(batch, 1e-3)
            progress.update(count, 0)
            stop.boundary()

        bare_model: nn.Module = MLP(64, 10, [64])
        optimizer = torch.optim.AdamW(bare_model.parameters(), lr=1e-3, fused=True)
        if size > 1:
            bare_model = DistributedDataParallel(bare_model, gradient_as_bucket_view=True)

        def by_hand(clip: bool) -> None:
            loss = nn.functional.cross_entropy(bare_model(fields["x"]), fields["y"])
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(bare_model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=size == 1)

        loops = {
            "by hand": lambda: by_hand(False),
            "by hand, clipped": lambda: by_hand(True),
            "hpctrain": ours,
        }
        table = measure(loops)
        stop.flush()
        if world.topology.is_rank_zero:
            base = table["by hand, clipped"]
            print(
                f"{size} ranks" if size > 1 else "1 rank", "us per step: p10, median, ratio of p10"
            )
            for name, (p10, median) in table.items():
                print(f"  {name:<18}{p10:8.0f}{median:8.0f}{p10 / base[0]:8.2f}")


def measure(loops: dict[str, Callable[[], None]]) -> dict[str, tuple[float, float]]:
    """Return p10 and median over blocks, microseconds per step, by loop."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(BLOCKS):
        for name, loop in loops.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                loop()
            seconds[name].append((time.perf_counter() - start) / STEPS * 1e6)
    return {
        name: (statistics.quantiles(values, n=10)[0], statistics.median(values))
        for name, values in seconds.items()
    }


if __name__ == "__main__":
    main()
