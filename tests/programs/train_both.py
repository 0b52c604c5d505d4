"""Three programs as scripts train them: `python train_both.py OUTPUT`, under any launcher."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything

from hpctrain.lightning import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))

from programs.language_model import WORDS, LanguageModel, loaders
from programs.lit_mnist import DigitsDataModule, LitMNIST
from programs.shapes import Domains, DomainsDataModule
from programs.shapes import graphs as graph_program


def digits(strategy: str) -> dict[str, Any]:
    seed_everything(1)
    data, model = DigitsDataModule(batch_size=32, samples=96), LitMNIST(dropout=0.0)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        strategy=strategy,
        log_every_n_steps=1,
        limit_val_batches=3,
        limit_test_batches=3,
        limit_predict_batches=3,
    )
    # Compiled on every rank with ddp; fsdp's run, which is not, has the same numbers.
    trainer.fit(torch.compile(model, backend="eager") if strategy == "ddp" else model, data)
    tested = trainer.test(model, data)[0]
    found = trainer.predict(model, data)
    best = trainer.checkpoint_callback.best_model_path
    again = LitMNIST.load_from_checkpoint(best, weights_only=True).state_dict()
    assert all(torch.equal(item, again[name]) for name, item in model.state_dict().items())
    assert (found is None) == (not trainer.is_global_zero)
    return {
        "run": trainer.log_dir,
        "val": float(trainer.callback_metrics.get("val_loss", tested["test_loss"])),
        "test": tested,
        "predicted": [] if found is None else [batch.tolist() for batch in found],
    }


def words(strategy: str) -> dict[str, Any]:
    seed_everything(1)
    model, (train, validation) = LanguageModel(WORDS), loaders()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        strategy=strategy,
        gradient_clip_val=0.25,
        log_every_n_steps=1,
    )
    trainer.fit(model, train, validation)
    tested = trainer.test(model, validation)[0]
    return {"run": trainer.log_dir, "test": tested}


def graphs(strategy: str) -> dict[str, Any]:
    seed_everything(1)
    model, loaders, _ = graph_program()
    trainer = Trainer(max_epochs=2, accelerator="cpu", strategy=strategy, log_every_n_steps=1)
    trainer.fit(model, *loaders)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"run": trainer.log_dir, "found": found}


def domains(strategy: str) -> dict[str, Any]:
    """Three loaders of other lengths and structures, through other parts of the model."""
    seed_everything(1)
    model, data = Domains(), DomainsDataModule()
    trainer = Trainer(max_epochs=2, accelerator="cpu", strategy=strategy, log_every_n_steps=1)
    trainer.fit(model, data)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    tested, predicted = trainer.test(model, data), trainer.predict(model, data)
    listed = [] if predicted is None else [[x.tolist() for x in each] for each in predicted]
    return {"run": trainer.log_dir, "found": found, "tested": tested, "predicted": listed}


def main() -> None:
    found = {
        f"{program.__name__} {strategy}": program(strategy)
        for strategy in ("ddp", "fsdp")
        for program in (digits, words, graphs, domains)
    }
    ranks = Trainer(accelerator="cpu").is_global_zero
    if ranks:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
