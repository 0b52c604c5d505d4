"""A folder in which modules train, and the samples that they train on, here and under Lightning."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from hpctrain.data import Writer


class Rows(Dataset[Any]):
    """Six numbers "x" and a class "y" of three a sample."""

    def __init__(self, count: int) -> None:
        draw = np.random.default_rng(0)
        self.x = draw.standard_normal((count, 6)).astype(np.float32)
        self.y = draw.integers(3, size=count)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "y": self.y[index]}


def loaders(count: int, batch_size: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return what Lightning trains and evaluates with: the same samples, in their order."""
    rows = Rows(count)
    return DataLoader(rows, batch_size), DataLoader(rows, batch_size)


@contextmanager
def module_site(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    name: str,
    modules: str,
    config: str,
    rows: int,
) -> Iterator[Path]:
    """Write a module's source, `run.toml` and the samples, and have the module be found."""
    (folder / f"{name}.py").write_text(modules, encoding="utf-8")
    (folder / "run.toml").write_text(config, encoding="utf-8")
    samples = Rows(rows)
    with Writer(folder / "rows") as writer:
        writer.extend({"x": samples.x, "y": samples.y})
    monkeypatch.syspath_prepend(str(folder))
    try:
        yield folder
    finally:
        sys.modules.pop(name, None)
