"""How a rank's share of a global batch is cut into forward passes: pure arithmetic."""

from __future__ import annotations

import functools
import itertools


def count_passes(largest_share: int, micro_batch_size: int | None) -> int:
    """Return the forward passes of a step, the same on every rank.

    Args:
        largest_share: the most samples of any rank in any batch.
        micro_batch_size: at most so many samples in one pass; None: the whole share.
    """
    if micro_batch_size is None:
        return 1
    return max(1, -(-largest_share // micro_batch_size))


@functools.cache  # a run has two or three shares, and asks in every step
def cut(share: int, passes: int) -> tuple[tuple[int, int], ...]:
    """Cut `share` samples into `passes` ranges of sizes as equal as can be.

    Returns:
        (first, stop) of every pass; first == stop where there are fewer samples than passes. The
        last is empty only if the share is.
    """
    bounds = [index * share // passes for index in range(passes + 1)]
    return tuple(itertools.pairwise(bounds))
