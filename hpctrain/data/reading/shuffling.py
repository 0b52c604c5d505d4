"""The shuffle filter undone by numpy: the bytes of every value side by side again."""

from __future__ import annotations

import numpy as np

from hpctrain.data.reading.pieces import Bytes

VALUES_IN_CACHE = 2**18
"""Values that are put together in one go, in several passes over them."""


def unshuffle(item_bytes: int, chunks: Bytes, out: Bytes) -> Bytes:
    """Put the bytes of every value side by side again; what is left over was not touched.

    Args:
        item_bytes: of a value.
        chunks: (chunks, bytes) uint8.
        out: of the same shape: what is returned, where there is anything to do.
    """
    values = chunks.shape[1] // item_bytes
    if item_bytes < 2 or values < 2:
        return chunks
    done = values * item_bytes
    parts = [chunks[:, i * values : (i + 1) * values] for i in range(item_bytes)]
    if item_bytes in (2, 4) and done == chunks.shape[1]:
        # Shifts of whole values: up to three times as fast as copies of single bytes.
        whole = out.view(f"<u{item_bytes}")
        for first in range(0, values, VALUES_IN_CACHE):
            some = slice(first, first + VALUES_IN_CACHE)
            whole[:, some] = parts[-1][:, some]
            for part in reversed(parts[:-1]):
                np.left_shift(whole[:, some], 8, out=whole[:, some])
                np.bitwise_or(whole[:, some], part[:, some], out=whole[:, some])
        return out
    out[:, done:] = chunks[:, done:]
    for i, part in enumerate(parts):
        out[:, i:done:item_bytes] = part
    return out
