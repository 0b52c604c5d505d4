"""Batch training for MPI clusters: launch, sharded HDF5, DDP, checkpoints, life in a queue."""

from __future__ import annotations

__version__ = "0.1.0"
