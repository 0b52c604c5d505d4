"""One voice for all ranks: who tells a failure, and how."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hpctrain.errors import HpctrainError
from hpctrain.utils.text import printable_lines


def tell(error: HpctrainError) -> None:
    """Print a failure, where stderr takes it."""
    with suppress(OSError):
        sys.stderr.write(f"hpctrain: error: {printable_lines(str(error))}\n")
        sys.stderr.flush()


def repeat(error: HpctrainError) -> None:
    """Print what rank 0 of another node may have told already, and may not."""
    with suppress(OSError):
        sys.stderr.write(
            f"hpctrain: {socket.gethostname()} cannot start this job either: {error}\n"
        )
        sys.stderr.flush()


def point_to_rank_zero() -> None:
    """Say where the reason is told, to who reads the output of this process alone."""
    here = " ".join(
        f"{key}={os.environ.get(key, '(not set)')}"
        for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    )
    sys.stderr.write(
        "hpctrain: this process cannot start either: rank 0 tells why. If it does not, what is "
        f"wrong is here: {here}\n"
    )
    sys.stderr.flush()


@contextmanager
def telling(is_rank_zero: bool) -> Iterator[None]:
    """Have rank 0 tell a failure that all ranks share, before any of them leaves."""
    try:
        yield
    except HpctrainError as error:
        if error.everywhere:
            if is_rank_zero and not error.reported:
                tell(error)
            error.reported = True
        raise


def tell_once(error: HpctrainError) -> None:
    """Tell a failure: what only this rank knows it has to say itself, else one speaks for all."""
    if not error.everywhere:
        tell(error)
        return
    from hpctrain.launch.speaking import (
        HEAD_START_SECONDS,
        Voice,
        find_voice,
        is_by_hand,
        let_rank_zero_end,
    )

    voice = find_voice()
    if voice is Voice.ALL:
        tell(error)
        let_rank_zero_end()
    elif voice is Voice.NODE:
        repeat(error)
    elif is_by_hand(os.environ):
        # Somebody may read the output of this process alone.
        time.sleep(HEAD_START_SECONDS)
        point_to_rank_zero()
