"""How far a tool is, for whoever shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Is told how much of the work is done; the command line draws a bar of it."""

    def __call__(self, done: int, total: int) -> object:
        """Note that `done` of `total` are done, in whatever unit."""
        ...


def silent(done: int, total: int) -> None:
    """Show nothing."""
