"""What native libraries write to stderr by themselves, past Python."""

from __future__ import annotations

import os
from collections.abc import MutableMapping


def quiet_native_libraries(environ: MutableMapping[str, str] = os.environ) -> None:
    """Ask torch's C++ side for errors only, where the user has not set a level.

    It writes its warnings to stderr by itself, once per rank. Those seen at start-up concern what
    hpctrain has settled: "Unable to resolve hostname ... using the loopback address" (gloo).
    Torch reads this when it is imported, so it has to be called before.
    """
    environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
