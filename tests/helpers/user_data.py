"""Datasets as other people write them: importable, for worker processes to read."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset


class Images(Dataset[Any]):
    """As torchvision's are: PIL images, a transform that draws, a class."""

    def __init__(self, count: int = 50, transform: Any = None) -> None:
        self.pixels = np.random.default_rng(3).integers(0, 255, (count, 8, 8), np.uint8)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.pixels[index])
        return image if self.transform is None else self.transform(image), index % 10


def flip_and_noise(image: Any) -> Tensor:
    """Draw from all three generators, as transforms of three libraries do."""
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = torch.from_numpy(np.array(image, np.float32)[None]) / 255
    values = values + float(np.random.normal())  # noqa: NPY002
    return values + torch.rand(1)


class Texts(Dataset[Any]):
    """Dicts with strings, numbers and tensors; it draws nothing."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"name": f"text {index}", "ids": torch.arange(index, index + 4), "score": index / 2}


class Graph(NamedTuple):
    x: Tensor
    edges: Tensor


class Graphs(Dataset[Any]):
    """Graphs of different sizes."""

    def __len__(self) -> int:
        return 17

    def __getitem__(self, index: int) -> Graph:
        nodes = 2 + index % 5
        return Graph(torch.full((nodes, 3), float(index)), torch.arange(nodes))


def one_graph(graphs: list[Graph]) -> Graph:
    """Put graphs together: the first axis counts nodes."""
    starts = np.cumsum([0, *(len(each.x) for each in graphs)])
    return Graph(
        torch.cat([each.x for each in graphs]),
        torch.cat([each.edges + int(start) for each, start in zip(graphs, starts, strict=False)]),
    )


class LazyFile(Dataset[Any]):
    """Opens its file with the first sample, as h5py needs it in worker processes."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, None

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        if self.file is None:
            self.file = h5py.File(self.path)
        return torch.from_numpy(self.file["x"][index])


class Locked(Texts):
    """Cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class Many(Dataset[Any]):
    """Reads a whole pass at once; `noise` draws."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise
        self.calls: list[int] = []

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Tensor:
        self.calls.append(1)
        return self._one(index)

    def _one(self, index: int) -> Tensor:
        value = torch.full((2,), float(index))
        return value + torch.rand(1) if self.noise else value

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        self.calls.append(len(indices))
        return [self._one(index) for index in indices]


class Bad(Texts):
    """Does one of many things that go wrong, at one of its samples."""

    def __init__(self, how: str, at: int = 11) -> None:
        self.how, self.at = how, at

    def __getitem__(self, index: int) -> Any:
        if index != self.at:
            return super().__getitem__(index)
        if self.how == "index":
            raise IndexError("list index out of range")
        if self.how == "file":
            raise FileNotFoundError(2, "No such file or directory", "images/11.png")
        if self.how == "code":
            return undefined  # type: ignore[name-defined]  # noqa: F821
        if self.how == "none":
            return None
        if self.how == "shape":
            return {**super().__getitem__(index), "ids": torch.arange(5)}
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        raise AssertionError(self.how)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        for index in range(7):
            yield {"x": torch.full((2,), float(index)), "y": index}


def make_texts(count: int | None = None) -> Dataset[Any]:
    return Texts() if count is None else torch.utils.data.Subset(Texts(), range(count))


def make_loader(**arguments: Any) -> DataLoader[Any]:
    return DataLoader(Images(transform=flip_and_noise), **arguments)
