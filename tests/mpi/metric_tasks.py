"""Tasks whose metrics are no quotient of sums, in each of the ways that a task may say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torchmetrics
from step_world import CLASSES
from torch import Tensor, nn
from torchmetrics import classification

from hpctrain.training.metrics import Gather


class _Base:
    inputs = ("features",)
    counts_samples = True

    def loss(self, model: nn.Module, fields: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        logits = model(fields["features"])
        return F.cross_entropy(logits, fields["label"], reduction="sum"), len(logits)


class Summed(_Base):
    """Counts and moments, and what follows from them at the end."""

    metrics: ClassVar = dict.fromkeys(("macro_f1", "mcc", "miou", "r2", "pearson"), "max") | {
        "loss": "min",
        "rmse": "min",
        "perplexity": "min",
    }

    def evaluate(self, model: nn.Module, fields: Mapping[str, Tensor]) -> dict[str, Any]:
        logits, label = model(fields["features"]), fields["label"]
        losses = F.cross_entropy(logits, label, reduction="none")
        number, target = logits[:, 0].double(), fields["features"][:, 0].double()
        moments = [torch.ones_like(number), number, target, number * number, target * target]
        pairs = label * CLASSES + logits.argmax(1)
        return {
            "loss": (losses.double().sum(), len(label)),
            "confusion": torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES),
            "moments": torch.stack([*moments, number * target]).sum(1),
            "nats": losses.double().sum(),
        }

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, Any]:
        confusion = sums["confusion"].double()
        right, said, true = confusion.diag(), confusion.sum(0), confusion.sum(1)
        n, x, y, xx, yy, xy = sums["moments"]
        wrong = xx - 2 * xy + yy
        spread = (n * n - said @ said) * (n * n - true @ true)
        return {
            "macro_f1": (2 * right / (said + true).clamp(min=1)).mean(),
            "mcc": (n * right.sum() - said @ true) / spread.sqrt(),
            "miou": (right / (said + true - right).clamp(min=1)).mean(),
            "r2": 1 - wrong / (yy - y * y / n),
            "pearson": (n * xy - x * y) / ((n * xx - x * x) * (n * yy - y * y)).sqrt(),
            "rmse": (wrong / n).sqrt(),
            "perplexity": (sums["nats"] / n).exp().item(),
        }


class Gathered(_Base):
    """Predictions of all samples, for what needs their order: AUROC and average precision."""

    metrics: ClassVar = {"auroc": "max", "average_precision": "max", "first": "max"}

    def evaluate(self, model: nn.Module, fields: Mapping[str, Tensor]) -> dict[str, Any]:
        scores = model(fields["features"])[:, 0]
        # The last bit of a score is for the kernel to say, which differs with the rows of a batch.
        return {
            "scores": Gather(scores),
            "positive": Gather(fields["label"] == 0),
            "features": Gather(fields["features"][:, 0]),
        }

    def finish(self, sums: Mapping[str, Tensor]) -> dict[str, Any]:
        order = sums["scores"].argsort(descending=True, stable=True)
        hits = sums["positive"][order].double()
        found, passed = hits.cumsum(0), (1 - hits).cumsum(0)
        precision = found / torch.arange(1, len(hits) + 1)
        return {
            "auroc": 1 - (hits * passed).sum() / (found[-1] * passed[-1]),
            "average_precision": (precision * hits).sum() / found[-1],
            "first": sums["features"][0],  # gathered in the order of the data
        }


class FromTorchmetrics(_Base):
    """Objects as people have them, by themselves, in a collection, and in arithmetic."""

    def __init__(self) -> None:
        names = ("loss", "f1", "macro", "auroc", "mean", "pearson", "r2", "MulticlassAccuracy")
        self.metrics = dict.fromkeys((*names, "MulticlassAveragePrecision", "error"), "max")
        of_classes: dict[str, Any] = {"task": "multiclass", "num_classes": CLASSES}
        self.f1 = torchmetrics.F1Score(**of_classes)
        self.mean = torchmetrics.MeanMetric()
        self.more = nn.ModuleDict({"macro": torchmetrics.F1Score(**of_classes, average="macro")})
        self.listed = [torchmetrics.PearsonCorrCoef(), torchmetrics.R2Score()]
        self.collection = torchmetrics.MetricCollection(
            [
                classification.MulticlassAccuracy(CLASSES, average="micro"),
                classification.MulticlassAveragePrecision(CLASSES),
            ]
        )
        self.auroc = torchmetrics.AUROC(**of_classes)
        self.error = 1 - torchmetrics.Accuracy(**of_classes)

    def evaluate(self, model: nn.Module, fields: Mapping[str, Tensor]) -> dict[str, Any]:
        logits, label = model(fields["features"]), fields["label"]
        losses = F.cross_entropy(logits, label, reduction="none").double()
        for each in (self.f1, self.more["macro"], self.collection, self.auroc, self.error):
            each.update(logits, label)
        self.mean.update(losses)
        for each in self.listed:
            each.update(logits[:, 0].double(), fields["features"][:, 0].double())
        return {
            "loss": (losses.sum(), len(label)),
            "f1": self.f1,
            "macro": self.more["macro"],
            "mean": self.mean,
            "pearson": self.listed[0],
            "r2": self.listed[1],
            "collection": self.collection,
            "auroc": self.auroc,
            "error": self.error,
        }


TASKS = (Summed, Gathered, FromTorchmetrics)
COUNTED = {
    "macro_f1",
    "mcc",
    "miou",
    "auroc",
    "first",
    "f1",
    "macro",
    "MulticlassAccuracy",
    "error",
}
"""Metrics that follow from counts, or from gathered rows: the same to the last bit."""


class BatchF1(_Base):
    """What one writes first: the macro F1 of a batch, weighed by its samples."""

    metrics: ClassVar = {"loss": "min", "f1": "max"}

    def evaluate(self, model: nn.Module, fields: Mapping[str, Tensor]) -> dict[str, Any]:
        logits, label = model(fields["features"]), fields["label"]
        said = logits.argmax(1)
        score = torchmetrics.functional.f1_score(
            said, label, "multiclass", num_classes=CLASSES, average="macro"
        )
        loss = F.cross_entropy(logits, label, reduction="sum")
        return {"loss": (loss, len(label)), "f1": (score * len(label), len(label))}
