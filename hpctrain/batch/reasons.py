"""Why a job should stop, as bits that ranks can agree on: signals, the time limit, a file."""

from __future__ import annotations

from hpctrain.batch.signals import STOP_SIGNALS, bit

DEADLINE = 1 << len(STOP_SIGNALS)
STOP_FILE = DEADLINE << 1
SAVE_DUE = STOP_FILE << 1
"""No stop: a save, which all ranks have to make at the same step too."""

NUM_BITS = len(STOP_SIGNALS) + 3

STOP_FILE_NAME = "STOP"
"""A file of this name in the run folder: stop, and stay stopped until it is removed."""


def describe(reasons: int) -> str:
    """Return the reasons in words, such as "SIGTERM and the time limit"."""
    words = [item.name for item in STOP_SIGNALS if reasons & bit(item)]
    if reasons & DEADLINE:
        words.append("the time limit")
    if reasons & STOP_FILE:
        words.append(f"the file {STOP_FILE_NAME}")
    return " and ".join(words)
