"""The bar on a terminal, and how to write while it stands."""

from __future__ import annotations

import math
import threading
from typing import Any, ClassVar, TextIO

from tqdm import tqdm

_MAX_COLUMNS = 100


class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """tqdm's bar, drawn when asked to and at no other time.

    Args:
        total: steps of a whole bar.
        initial: steps that it starts with.
        columns: width of the terminal.
        stream: where to draw; None is stderr.
    """

    # tqdm would start a thread that looks after bars that are not updated.
    monitor_interval: ClassVar[int] = 0
    # tqdm's own lock takes semaphores from /dev/shm, for worker processes. There are none here.
    _lock: ClassVar[Any] = threading.RLock()

    def __init__(self, total: int, initial: int, columns: int, stream: TextIO | None) -> None:
        super().__init__(
            total=total,
            initial=initial,
            ncols=min(columns, _MAX_COLUMNS),
            file=stream,
            bar_format="{percentage:3.0f}%|{bar}| {desc}",
            miniters=total + 1,
            mininterval=math.inf,
        )

    def show(self, step: int, line: str) -> None:
        """Draw the bar at `step`, with a line of text beside it."""
        self.n = step
        self.desc = line
        self.refresh()


class AboveBar:
    """A stream for log handlers: where a bar stands on it, text goes above the bar."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write whole lines, line feeds included."""
        Bar.write(text, file=self._stream, end="")

    def flush(self) -> None:
        self._stream.flush()
