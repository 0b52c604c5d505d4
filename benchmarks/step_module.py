"""The perceptron of benchmarks/step.py as a module with a step and an optimizer of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpctrain.models.mlp import MLP


class Net(nn.Module):
    """What a LightningModule would be; it logs its loss as those do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP(in_features=64, out_features=10, hidden_features=[64])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        loss = F.cross_entropy(self.net(batch["x"]), batch["y"])
        self.log("train_loss", loss)  # type: ignore[operator]
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer and its schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1_000_000)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
