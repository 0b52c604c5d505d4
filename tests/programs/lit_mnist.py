"""The chapter's network on handwritten digits: convolutions, Adadelta, a rate that falls by epoch.

Shaped as PyTorch's MNIST example, which courses train on several GPUs; the digits are those that
scikit-learn brings, at MNIST's size.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset, random_split


class Net(nn.Module):
    def __init__(self, dropout: float = 1.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout(0.25 * dropout)
        self.dropout2 = nn.Dropout(0.5 * dropout)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return F.log_softmax(self.fc2(self.dropout2(x)), dim=1)


class LitMNIST(pl.LightningModule):
    def __init__(self, lr: float = 1.0, gamma: float = 0.7, dropout: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.nll_loss(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        x, y = batch
        output = self(x)
        self.log(f"{stage}_loss", F.nll_loss(output, y), prog_bar=True)
        self.log(f"{stage}_acc", (output.argmax(dim=1) == y).float().mean(), prog_bar=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(dim=1)

    def configure_optimizers(self) -> tuple[list[optim.Optimizer], list[StepLR]]:
        optimizer = optim.Adadelta(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [StepLR(optimizer, step_size=1, gamma=self.hparams.gamma)]


def digits() -> TensorDataset:
    """All 1,797 of them, (1, 28, 28), normalised as MNIST is."""
    images, labels = load_digits(return_X_y=True)
    small = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    large = F.interpolate(small, size=(28, 28), mode="bilinear")
    return TensorDataset((large - 0.1307) / 0.3081, torch.tensor(labels))


class DigitsDataModule(pl.LightningDataModule):
    def __init__(self, batch_size: int = 64, samples: int = 1438, shuffle: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(1)
        everything = digits()
        rest = len(everything) - 1438
        self.train, self.val = random_split(everything, [1438, rest], generator)
        self.train = torch.utils.data.Subset(self.train, range(self.hparams.samples))

    def train_dataloader(self) -> DataLoader:
        size, shuffle = self.hparams.batch_size, self.hparams.shuffle
        return DataLoader(self.train, batch_size=size, shuffle=shuffle)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=self.hparams.batch_size)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        return self.val_dataloader()
