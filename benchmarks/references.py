"""Two public programs to their end: under Lightning in one process, and here on one rank and two.

    python benchmarks/references.py digits             14 epochs; minutes for each of the three
    python benchmarks/references.py language           2 epochs
    python benchmarks/references.py digits --epochs 1
    python benchmarks/references.py digits --seeds 5   each with 5 seeds: means and spreads

The chapter's network on scikit-learn's digits, and the language model of Lightning's tutorial on
prose that Python brings (`pydoc_data`), in WikiText2's shape; both from tests/programs, unedited.
Goals: accuracy on one rank within 0.5 points of Lightning's, and the loss on two ranks within 0.05
of that on one, since the batch of all ranks together is kept. A seed decides weights, order and
dropout, and each of the three draws in its own order, so that one seed compares two draws of the
same lot: `--seeds` compares the lots.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
EPOCHS = {"digits": 14, "language": 2}
VOCABULARY, BLOCK, BLOCKS, HELD_OUT = 3000, 35, 1200, 200
WAYS = {
    "Lightning, 1 process": ("lightning.pytorch", ()),
    "hpctrain, 1 rank": ("hpctrain.lightning", ("mpirun", "-np", "1")),
    "hpctrain, 2 ranks": ("hpctrain.lightning", ("mpirun", "-np", "2")),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("program", choices=EPOCHS)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, default=1, help="train with the seeds 1 to SEEDS")
    parser.add_argument("--by", help="train by the Trainer of this package, in this process")
    parser.add_argument("--output", type=Path, help="file of the numbers that come out")
    asked = parser.parse_args()
    epochs = asked.epochs or EPOCHS[asked.program]
    if asked.by:
        trainer = importlib.import_module(asked.by).Trainer
        found = []
        for seed in range(1, 1 + asked.seeds):
            numbers = train(asked.program, epochs, trainer, seed)
            if numbers is not None:
                found.append(numbers)
                asked.output.write_text(json.dumps(found), encoding="utf-8")
        return
    print(f"{asked.program}, {epochs} epochs, seeds 1 to {asked.seeds}", flush=True)
    for name, (package, launcher) in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "numbers.json")
            command = [*launcher, sys.executable, str(Path(__file__).resolve()), asked.program]
            command += ["--epochs", str(epochs), "--seeds", str(asked.seeds)]
            command += ["--by", package, "--output", str(output)]
            root = str(TESTS.parent)
            paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            environment = os.environ | {"PYTHONPATH": paths}
            log = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            if log.returncode:
                sys.exit(f"{name} ended with {log.returncode}:\n{log.stdout}{log.stderr}")
            numbers = json.loads(output.read_text(encoding="utf-8"))
        for key in sorted(numbers[0]):
            print(f"  {name}: {key} {spread([each[key] for each in numbers])}", flush=True)


def spread(values: list[float]) -> str:
    """Return values in short: the one; or mean, standard deviation and each of several."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    each = " ".join(f"{value:.4f}" for value in values)
    return f"{statistics.mean(values):.4f} +- {statistics.stdev(values):.4f} ({each})"


def train(program: str, epochs: int, trainer_class: Any, seed: int) -> dict[str, float] | None:
    """Return the numbers of the validation samples after training; None but on rank 0."""
    import lightning.pytorch

    sys.path.insert(0, str(TESTS))
    lightning.pytorch.seed_everything(seed)
    clip = None if program == "digits" else 0.25
    model, data = digits() if program == "digits" else language()
    trainer = trainer_class(
        max_epochs=epochs, accelerator="cpu", logger=False, gradient_clip_val=clip
    )
    trainer.fit(model, *data)
    (found,) = trainer.validate(model, data[-1])
    return {key: float(value) for key, value in found.items()} if trainer.is_global_zero else None


def digits() -> tuple[Any, Any]:
    program = importlib.import_module("programs.lit_mnist")
    return program.LitMNIST(), [program.DigitsDataModule()]


def language() -> tuple[Any, Any]:
    from torch.utils.data import DataLoader, TensorDataset

    inputs, targets = prose()
    train = TensorDataset(inputs[:BLOCKS], targets[:BLOCKS])
    held_out = TensorDataset(inputs[BLOCKS:], targets[BLOCKS:])
    program = importlib.import_module("programs.language_model")
    return program.LanguageModel(VOCABULARY), [
        DataLoader(train, 20, shuffle=True),
        DataLoader(held_out, 20),
    ]


def prose() -> tuple[Any, Any]:
    """Return words of Python's manual and those that follow them, (blocks, BLOCK) int64 each."""
    from pydoc_data.topics import topics

    import torch

    words = re.findall(r"\w+|[^\w\s]", " ".join(topics[name] for name in sorted(topics)).lower())
    words = words[: (BLOCKS + HELD_OUT) * BLOCK + 1]
    most = [word for word, _ in Counter(words).most_common(VOCABULARY - 1)]
    numbers = {word: number for number, word in enumerate(most, start=1)}
    coded = torch.tensor([numbers.get(word, 0) for word in words])
    return coded[:-1].view(-1, BLOCK), coded[1:].view(-1, BLOCK)


if __name__ == "__main__":
    main()
