"""The record of a job, and in what the job differs from the one that saved its checkpoint."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import torch

from hpctrain.checkpoint.format import read_meta
from hpctrain.errors import CheckpointError
from hpctrain.launch.process_group import World
from hpctrain.observe.code import module_changes
from hpctrain.observe.job_record import JobRecord, timestamp
from hpctrain.observe.redacting import without_secrets
from hpctrain.training.folder import RunFolder
from hpctrain.training.persistence import Resumed
from hpctrain.utils.batch_job import job_identity
from hpctrain.version import __version__


def begin_record(folder: RunFolder | None, world: World) -> None:
    """Begin the record of this job on rank 0. Collective: all ranks.

    Args:
        folder: of the run, on rank 0; None on the others.
        world: the ranks.
    """
    devices = world.communicator.all_gather((world.topology.node_rank, _device_name(world.device)))
    if folder is None:
        return
    nodes = [{"host": host, "ranks": 0, "devices": []} for host in world.topology.hosts]
    for node_rank, device in devices:
        nodes[node_rank]["ranks"] += 1
        nodes[node_rank]["devices"].append(device)
    folder.record.begin(
        {
            "run": folder.path.name,
            "command": without_secrets(sys.orig_argv),
            "directory": _directory(),
            "job": job_identity(os.environ),
            "launcher": world.topology.launcher,
            "world_size": world.topology.world_size,
            "nodes": nodes,
            "start": timestamp(psutil.Process().create_time()),
            "versions": versions(world),
        }
    )


def versions(world: World) -> dict[str, str]:
    """Return the versions of what computes and reads, those that are there."""
    found: dict[str, Any] = {
        "hpctrain": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "HDF5": h5py.version.hdf5_version,
        "MPI": world.topology.mpi,
        "CUDA": torch.version.cuda if world.device.type == "cuda" else None,
        "ROCm": torch.version.hip if world.device.type == "cuda" else None,
        "device": _device_name(world.device),
    }
    if world.device.type == "cuda":
        with suppress(RuntimeError, AttributeError):  # a torch without it
            found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["cuDNN"] = torch.backends.cudnn.version()
    return {name: str(value) for name, value in found.items() if value is not None}


def made_by(record: JobRecord, world: World) -> dict[str, Any]:
    """Return what a checkpoint says of the job that saves it."""
    return {**record.checkpoint_note(), "versions": versions(world)}


def changed_since(resumed: Resumed, record: JobRecord, world: World) -> list[str]:
    """Return in what this job differs from the one that saved its checkpoint, a line for each."""
    try:
        meta = read_meta(Path(resumed.path))
    except CheckpointError:  # removed meanwhile
        return []
    note: Mapping[str, Any] = meta.get("made_by") or {}
    then = note.get("versions") or meta.get("versions", {})  # 0.1.0 has noted the latter only
    now = versions(world)
    lines = [
        f"{name} {then[name]} when saved, {now[name]} now"
        for name in now
        if name in then and then[name] != now[name]
    ]
    if note.get("modules") is None:
        return lines
    modules = record.modules()
    if modules is None:
        return [*lines, "code: your modules cannot be read at this moment, nor compared"]
    return lines + module_changes(note["modules"], modules, resumed.place.step)


def _directory() -> str | None:
    try:
        return str(Path.cwd())
    except OSError:  # removed under the job
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type
