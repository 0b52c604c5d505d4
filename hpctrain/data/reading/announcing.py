"""Telling the system what is read soon, as long as that helps."""

from __future__ import annotations

import os
from contextlib import suppress

from hpctrain.data.reading.helpers import LEAST_SHARED_BYTES

WARM_BYTES_PER_SECOND = 2e9
"""Faster than this per thread, the data come from the page cache: to announce them is in vain."""


class Coldness:
    """Whether what was read last came from the disk.

    Attributes:
        is_cold: the judgement; at first, yes.
    """

    def __init__(self) -> None:
        self.is_cold = True

    def judge(self, num_bytes: int, seconds: float) -> None:
        """Judge by reads of so many bytes that took so long, summed over threads."""
        if num_bytes >= LEAST_SHARED_BYTES:  # less takes its time for other reasons
            self.is_cold = num_bytes < WARM_BYTES_PER_SECOND * seconds


def announce(descriptor: int, offset: int, size: int) -> None:
    """Tell the system that these bytes are wanted soon, so that it reads them meanwhile."""
    with suppress(OSError):  # advice: a file system may refuse it
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
