"""Where stacks of ranks are written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def make_private_folder() -> Path | None:
    """Return a new folder on this node, whose name nobody can have guessed and prepared."""
    with suppress(OSError):
        return Path(tempfile.mkdtemp(prefix="hpctrain-stacks-"))
    return None


def write_stacks(folder: Path, dumps: Mapping[int, str]) -> None:
    """Write one file of stacks per rank."""
    with suppress(OSError):
        for rank, dump in dumps.items():
            if dump:
                (folder / f"rank-{rank}.txt").write_text(dump, encoding="utf-8")
