"""stdout kept for one report, whatever else writes there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from hpctrain.utils.streams import finish_out

_STDOUT, _STDERR = 1, 2


@contextmanager
def reserved_stdout(reserved: bool) -> Iterator[TextIO]:
    """Give a stream to stdout; where it is reserved, all other output there goes to stderr.

    That of C libraries, child processes and users' modules too: the file descriptor is exchanged.
    """
    if not reserved:
        yield sys.stdout
        return
    finish_out()
    kept = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as stream:
            yield stream
    finally:
        finish_out()
        os.dup2(kept, _STDOUT)
        os.close(kept)
