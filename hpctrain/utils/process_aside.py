"""A small process beside a rank, such as its watchdog: isolated from what reaches the rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

_SOURCE = Path(__file__).parents[2]
# Variables of launchers stay behind: it is no rank. LD_PRELOADed profilers neither belong in it.
_KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG", "TZ", "LD_LIBRARY_PATH")


def start_aside(
    module: str, function: str, *arguments: str, stdin: int, pass_fds: Collection[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a function of a module that needs the standard library alone, in a process of its own.

    Isolated and without site-packages it starts in a few ms, and nothing of the user's runs in it.
    It inherits that every signal is blocked: those of a scheduler go to all processes of a job.

    Args:
        module: of hpctrain, by its name with dots.
        function: of it.
        arguments: of the function.
        stdin: a file descriptor, or `subprocess.PIPE`.
        pass_fds: further file descriptors that it inherits.

    Raises:
        OSError: if the node has no room for a process more.
    """
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        f"from {module} import {function}; {function}(*sys.argv[2:])"
    )
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", script, str(_SOURCE), *arguments],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=pass_fds,
            env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
