"""`python -m hpctrain`."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress

INTERRUPTED = 128 + signal.SIGINT
"""What a shell makes of a process that an interrupt has ended."""


def main() -> int:
    """Run the command line of this process, and return its exit code."""
    try:
        from hpctrain.utils.streams import finish_out, open_missing

        open_missing()
        from hpctrain.cli import main as run

        code = run()
        finish_out()
    except KeyboardInterrupt:
        with suppress(OSError):
            sys.stderr.write("hpctrain: interrupted\n")
        code = INTERRUPTED
    # From here on there is nothing to interrupt: Python would only tell of its own end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code


if __name__ == "__main__":
    sys.exit(main())
