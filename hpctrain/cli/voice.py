"""What is said once, whatever the number of ranks."""

from __future__ import annotations

from hpctrain.errors import ExitCode
from hpctrain.launch.launchers import Claim
from hpctrain.utils.streams import write_out


def say(claim: Claim, text: str) -> int:
    """Print a text once, whatever the number of ranks."""
    if claim.rank in (None, 0):
        write_out(text)
    return ExitCode.DONE
