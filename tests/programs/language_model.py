"""The language model of Lightning's own tutorial, its class unedited, on text in WikiText2's shape.

The text is made up, by a rule that a model can learn: blocks of 35 words of a small vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch.demos import LightningTransformer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

WORDS, BLOCK = 60, 35


class Text(Dataset):
    """Words that follow their two predecessors, most of the time."""

    def __init__(self, blocks: int) -> None:
        generator = torch.Generator().manual_seed(blocks)
        draws = torch.randint(0, WORDS, (blocks * BLOCK + 1,), generator=generator).tolist()
        keeps = torch.rand(blocks * BLOCK + 1, generator=generator).tolist()
        words = [1, 2]
        for draw, keep in zip(draws, keeps, strict=True):
            words.append((words[-1] + words[-2]) % WORDS if keep < 0.9 else draw)
        self.words = torch.tensor(words[2:])

    def __len__(self) -> int:
        return len(self.words) // BLOCK

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * BLOCK
        return self.words[start : start + BLOCK], self.words[start + 1 : start + BLOCK + 1]


class LanguageModel(LightningTransformer):
    """With an evaluation, as the tutorial's script has it, and nothing to download."""

    def prepare_data(self) -> None: ...

    def evaluate(self, batch: tuple[Tensor, Tensor], name: str) -> None:
        inputs, target = batch
        self.log(name, F.nll_loss(self(inputs, target), target.reshape(-1)))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val_loss")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test_loss")


def loaders(blocks: int = 40) -> tuple[DataLoader, DataLoader]:
    return DataLoader(Text(blocks), 20, shuffle=True), DataLoader(Text(25), 20)
