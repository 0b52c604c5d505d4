"""One voice for all ranks."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hpctrain.errors import ExitCode, HpctrainError
from hpctrain.launch.launchers import Claim
from hpctrain.utils.streams import write_out
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
            if is_rank_zero:
                tell(error)
            error.told = True
        raise


def say(claim: Claim, text: str) -> int:
    """Print a text once, whatever the number of ranks."""
    if claim.rank in (None, 0):
        write_out(text)
    return ExitCode.DONE
