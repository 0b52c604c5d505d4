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
from hpctrain.checkpoint.inspect import config_changes
from hpctrain.config import Config, to_toml
from hpctrain.config.messages import shown
from hpctrain.config.semantics import CHOOSABLE, Semantics, older_rules, semantics_of
from hpctrain.config.toml import parse
from hpctrain.config.validate import validate
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.launch.process_group import World
from hpctrain.observe.code import module_changes
from hpctrain.observe.job_record import JobRecord, timestamp
from hpctrain.observe.redacting import without_secrets
from hpctrain.training.checkpointing.resume import Resumed
from hpctrain.training.rank_zero import RunFolder
from hpctrain.utils.batch_job import job_identity
from hpctrain.utils.text import first_lines
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


# Of these a change says nothing about what is trained.
_UNREMARKABLE = ("run.", "logging.", "launch.", "checkpoint.", "trackers", "notify.")

_FIXED = {
    "optimizer.use": (
        "the state of one optimizer is none of another's. Bring the old one back, or start a new "
        "run (run.name) with checkpoint.initialize_from"
    ),
}
"""Keys that a run keeps for its life, and why. Shapes of the model are compared as tensors."""

_SHOWN = 12


def rules_and_changes(config: Config, resumed: Resumed | None) -> tuple[Semantics, list[str]]:
    """Return the rules of the run, and what is not as it was, a line for each.

    Args:
        config: of this job.
        resumed: the checkpoint that the run goes on from; None: it begins.

    Raises:
        ConfigError: if what a run keeps for its life has changed.
        CheckpointError: if the record of the rules cannot be read.
    """
    if resumed is None:
        return semantics_of(config), []
    semantics = semantics_of(config, resumed.values)
    return semantics, [
        *older_rules(semantics, config),
        *reported_changes(resumed.config_toml, config),
    ]


def reported_changes(before: str, now: Config) -> list[str]:
    """Return what has changed, a line for each key.

    Args:
        before: config.toml of the checkpoint.
        now: the config of this job.

    Raises:
        ConfigError: if what a run keeps for its life has changed.
    """
    changes = {
        key: values
        for key, values in config_changes(_with_defaults(before), to_toml(now)).items()
        if not key.startswith(_UNREMARKABLE)
        and key not in CHOOSABLE  # `semantics_of` looks at those
    }
    for key, why in _FIXED.items():
        if key in changes:
            then, here = changes[key]
            raise ConfigError(
                f"{key} = {shown(here)}, but the checkpoint to go on from has {shown(then)}: {why}",
                everywhere=True,  # all ranks compare the same two
            )
    lines = [
        f"{key}: {_text(then)} when saved, {_text(here)} now"
        for key, (then, here) in changes.items()
    ]
    return first_lines(lines, _SHOWN, noun="keys have changed")


def _with_defaults(before: str) -> str:
    """Return an older config with the keys that it did not know, at their defaults."""
    config, _ = validate(parse(before, "config.toml"))
    return before if config is None else to_toml(config)


def _text(value: Any) -> str:
    return "not set" if value is None else shown(value)
