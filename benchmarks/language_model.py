"""A language model on bytes against the same model in a loop written by hand.

    python benchmarks/language_model.py              some two minutes on two cores
    python benchmarks/language_model.py --steps 1000

Both train on the source of the Python standard library, from the same initial weights, with the
same optimizer and schedule, each in its own random order, and are then asked how many bits they
need per byte of source that they have not seen: `email`, of the standard library too.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hpctrain.models.transformer import Transformer

ROOT = Path(__file__).parents[1]
CONTEXT, BATCH, WARMUP, LR, DECAY, FINAL = 64, 32, 50, 3e-3, 0.1, 0.1
MODEL = {"vocabulary": 256, "context": CONTEXT, "depth": 2, "width": 64, "heads": 4}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    library = sysconfig.get_path("stdlib")
    with tempfile.TemporaryDirectory() as folder:
        for split, pattern in {"train": "[a-d]*.py", "validation": "email/*.py"}.items():
            target = f"{folder}/{split}"
            hpctrain("data", "pack", f"tokens={library}/{pattern}", target, "--tokens", CONTEXT + 1)
        data = {split: rows(Path(folder, split)) for split in ("train", "validation")}
        print(
            f"{data['train'].numel():,} bytes to train on, {data['validation'].numel():,} held out"
        )
        ratios = []
        for seed in range(asked.seeds):
            begin = time.monotonic()
            ours = by_hpctrain(folder, asked.steps, seed)
            between = time.monotonic()
            theirs = by_hand(data["train"], data["validation"], asked.steps, seed)
            ratios.append(ours / theirs)
            print(
                f"seed {seed}, bits per byte: hpctrain {ours:.4f} in {between - begin:.0f} s, "
                f"by hand {theirs:.4f} in {time.monotonic() - between:.0f} s, "
                f"ratio {ratios[-1]:.4f}",
                flush=True,
            )
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"{asked.steps} steps: hpctrain needs {mean:.4f} of the bits of the loop by hand")


def hpctrain(*arguments: object) -> None:
    command = [sys.executable, "-m", "hpctrain", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def rows(folder: Path) -> Tensor:
    """Return all samples, (samples, CONTEXT + 1) int64."""
    parts = []
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as shard:
            parts.append(shard["tokens"][:])
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def by_hpctrain(folder: str, steps: int, seed: int) -> float:
    model = [f"model.{name}={value}" for name, value in MODEL.items()]
    hpctrain(
        ROOT / "configs" / "lm.toml", *model,
        f"run.name=lm-{seed}", f"run.directory={folder}", f"run.seed={seed}",
        f"data.train={folder}/train", f"data.validation={folder}/validation",
        f"data.global_batch_size={BATCH}", f"data.micro_batch_size={BATCH}",
        f"optimizer.lr={LR}", f"scheduler.warmup_steps={WARMUP}",
        f"training.max_steps={steps}", "training.max_epochs=100",
        "training.evaluate_every_epochs=0", f"training.evaluate_every_steps={steps}",
        "logging.progress=none",
    )  # fmt: skip
    lines = Path(folder, f"lm-{seed}", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [record for record in map(json.loads, lines) if record["kind"] == "evaluation"]
    return float(evaluations[-1]["bits_per_token"])


def by_hand(train: Tensor, validation: Tensor, steps: int, seed: int) -> float:
    torch.manual_seed(seed)
    model = Transformer(**MODEL)
    decayed = [
        item
        for name, item in model.named_parameters()
        if item.ndim > 1 and not name.endswith("_embedding.weight")
    ]
    plain = [item for item in model.parameters() if all(item is not other for other in decayed)]
    groups = [
        {"params": decayed, "weight_decay": DECAY},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)

    def factor(step: int) -> float:
        if step < WARMUP:
            return (step + 1) / WARMUP
        done = (step - WARMUP) / max(1, steps - WARMUP)
        return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    step = 0
    while step < steps:
        for chosen in torch.randperm(len(train)).split(BATCH):
            loss = loss_of(model, train[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step == steps:
                break
    model.eval()
    with torch.no_grad():
        losses = [float(loss_of(model, part)) * len(part) for part in validation.split(BATCH)]
    return sum(losses) / len(validation) / math.log(2)


def loss_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


if __name__ == "__main__":
    main()
