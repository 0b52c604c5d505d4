"""Batch training for MPI clusters: launch, sharded HDF5, DDP, checkpoints, life in a queue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpctrain.version import __version__

if TYPE_CHECKING:
    from hpctrain.launch.world import connect

__all__ = ["__version__", "connect"]


def __getattr__(name: str) -> Any:
    """Load `connect` when it is asked for: nothing heavy at import."""
    if name == "connect":
        from hpctrain.launch.world import connect

        return connect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
