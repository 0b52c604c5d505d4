"""A failed `connect()` that no program catches: one message and its exit code, as on the shell.

Where the program, a notebook or pytest catches it, it is an exception like any other.
"""

from __future__ import annotations

import sys
from types import TracebackType

from hpctrain.errors import HpctrainError
from hpctrain.launch.voice import tell_once


def end_quietly_if_uncaught(error: HpctrainError) -> None:
    """Have the process end with the error's message and code, should it come to the top."""
    previous = sys.excepthook

    def uncaught(
        kind: type[BaseException], found: BaseException, trace: TracebackType | None
    ) -> None:
        if found is not error:
            previous(kind, found, trace)
            return
        if not error.reported:
            tell_once(error)
        # To Python what a hook raises is an error of its own, but for this.
        raise SystemExit(int(error.exit_code))

    sys.excepthook = uncaught
