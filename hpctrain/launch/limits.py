"""Limits of the process, and what libraries of a device read once, before they do."""

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


def prepare_nccl(
    timeout_seconds: float,
    *,
    has_flight_recorder: bool,
    environ: MutableMapping[str, str] = os.environ,
) -> None:
    """Have NCCL's record of collectives kept, and torch's monitor end nothing before ours does.

    What the user has set stays.

    Args:
        timeout_seconds: of the process group.
        has_flight_recorder: whether torch calls that record by this name, from 2.9 on; it warns
            of the older one. Source: torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp.
        environ: to set it in.
    """
    names = ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE")
    if not any(name in environ for name in names):
        environ[names[has_flight_recorder]] = "2000"
    environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(timeout_seconds)))


def prepare_deterministic(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have cuBLAS sum in the same order every time; to be called before CUDA starts.

    torch 2.6 to 2.9 refuse deterministic algorithms without it; newer ones do without (pull request
    161749), where it changes nothing. What the user has set stays.

    Source: docs of torch.use_deterministic_algorithms; NVIDIA's cuBLAS, "Results Reproducibility".
    """
    environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
