"""What is logged beside numbers: images and histograms. Without torch and numpy on its own path."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BINS = 64
"""Of a histogram."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image of a step.

    Attributes:
        name: with what it belongs to, such as "validation/forecast".
        wall_time: seconds since 1970.
        height: rows.
        width: pixels of a row.
        channels: 1 grey, 3 colours, 4 with an opacity.
        pixels: bytes, row by row.
    """

    name: str
    step: int
    wall_time: float
    height: int
    width: int
    channels: int
    pixels: bytes

    def png(self) -> bytes:
        """Return it as a PNG file."""
        row = self.width * self.channels
        lines = b"".join(
            b"\0" + self.pixels[start : start + row] for start in range(0, len(self.pixels), row)
        )
        colour = {1: 0, 3: 2, 4: 6}[self.channels]
        head = struct.pack(">IIBBBBB", self.width, self.height, 8, colour, 0, 0, 0)
        # What a step waits for: the fastest level is a tenth of the default's time.
        parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in parts
        )

    def array(self) -> Any:
        """Return it as an array, (height, width, channels) uint8."""
        import numpy as np

        flat = np.frombuffer(self.pixels, np.uint8)
        return flat.reshape(self.height, self.width, self.channels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How many of some values there are in intervals of equal width.

    Attributes:
        name: with what it belongs to, such as "train/weights".
        wall_time: seconds since 1970.
        edges: of the intervals, one more than there are counts.
        counts: of values.
        total: sum of the values.
        squares: sum of their squares.
    """

    name: str
    step: int
    wall_time: float
    edges: Sequence[float]
    counts: Sequence[int]
    total: float
    squares: float
