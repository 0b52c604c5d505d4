"""Waiting for events, however long they take on a busy machine."""

from __future__ import annotations

import time
from collections.abc import Callable

from helpers.limits import JOB_SECONDS


def wait_for(
    condition: Callable[[], object],
    what: str = "event that is waited for",
    *,
    seconds: float = JOB_SECONDS,
) -> None:
    """Return once a condition holds.

    Raises:
        TimeoutError: if it never does.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"no {what} within {seconds:g} s")
        time.sleep(0.02)
