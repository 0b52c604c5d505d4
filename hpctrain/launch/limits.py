"""Limits of the process, and of torch's own watch over NCCL, before anything runs into them."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from contextlib import suppress


def raise_open_files() -> None:
    """Allow as many open files as the system lets us; every connection is one."""
    try:
        import resource
    except ImportError:  # not on this system
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def prepare_nccl(timeout_seconds: float, environ: MutableMapping[str, str] = os.environ) -> None:
    """Have NCCL's record of collectives kept, and torch's monitor end nothing before ours does.

    What the user has set stays.

    Source: torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp; the buffer was renamed in torch 2.9.
    """
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        environ.setdefault(name, "2000")
    environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(timeout_seconds)))
