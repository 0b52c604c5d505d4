"""Ranks of a script: `devices` and `num_nodes` compared with the launched world, or started.

Where no launcher has started this process and several devices of this node are asked for, the
script begins again as so many ranks, under the mpirun of the bound MPI. A launcher's ranks are
compared with what is asked for, and a number that cannot be had is an error.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

from hpctrain.errors import ConfigError, LaunchError
from hpctrain.launch.environment import Claim
from hpctrain.lightning.objects import SINGLE_DEVICE
from hpctrain.topology import Topology
from hpctrain.utils.text import plural


def start_ranks(
    claim: Claim, devices: int | None, num_nodes: int | None, device: str
) -> str | None:
    """Become an mpirun of this script if it asks for several ranks and is none of them.

    Args:
        claim: what the launcher says of this process.
        devices: of every node that the script asks for; None: all.
        num_nodes: that it asks for; None: as many as there are.
        device: as `launch.device` has it.

    Returns:
        What to say of devices that stay idle; None: nothing.

    Raises:
        LaunchError: if they cannot be had from here.
    """
    if claim.launcher is not None:
        return None
    if num_nodes is not None and num_nodes > 1:
        ranks = num_nodes * (devices or 1)
        raise LaunchError(
            f"num_nodes={num_nodes}: no launcher has started this process, so that it is alone. "
            f"Start it on all nodes, such as by srun --nodes={num_nodes} --ntasks={ranks} python "
            f"{_script()}",
            everywhere=True,
        )
    num_gpus = _visible_gpus() if device in ("auto", "cuda") else 0
    if devices is None:
        if num_gpus < 2:
            return None
        return (
            f"1 of {num_gpus} GPUs in use; start all: python -m hpctrain run {_script()} "
            f"--devices {num_gpus}"
        )
    if devices > 1:
        if device == "cuda" or num_gpus:
            _require_gpus(devices, num_gpus)
        _become(devices)
    return None


def compare(topology: Topology, devices: int | None, num_nodes: int | None) -> None:
    """See that the launched world is the one that the script asks for.

    Raises:
        LaunchError: if it is another, the same on all ranks.
    """
    started = plural(topology.world_size, "rank")
    if num_nodes is not None and num_nodes != topology.num_nodes:
        raise LaunchError(
            f"the launcher started {started} on {plural(topology.num_nodes, 'node')}; "
            f"num_nodes={num_nodes} asks for {num_nodes}: start them on {num_nodes}, or set "
            f"num_nodes={topology.num_nodes}",
            everywhere=True,
        )
    if devices is not None and devices * topology.num_nodes != topology.world_size:
        asked = devices * topology.num_nodes
        nodes = f" on {topology.num_nodes} nodes" if topology.num_nodes > 1 else ""
        raise LaunchError(
            f"the launcher started {started}{nodes}; devices={devices} asks for {asked}: start "
            f'{asked}, or leave devices to the launcher, devices="auto"',
            everywhere=True,
        )


def _require_gpus(devices: int, num_gpus: int) -> None:
    if devices > num_gpus:
        raise LaunchError(
            f"devices={devices}: this node shows {plural(num_gpus, 'GPU')}: ask for as many, or "
            'for the CPU by accelerator="cpu"',
            everywhere=True,
        )


def _visible_gpus() -> int:
    """Return how many GPUs this process sees, without making use of one."""
    import torch

    return torch.cuda.device_count()


def _script() -> str:
    return sys.argv[0] or "SCRIPT"


def _become(num_processes: int) -> None:
    """Replace this process by an mpirun of the same command; does not return."""
    if not _is_a_script():
        raise LaunchError(
            f"devices={num_processes}: this is not a script that could be started again as "
            f"{num_processes} processes: hpctrain.launch(function, np={num_processes}) starts a "
            "function from a notebook",
            everywhere=True,
        )
    from hpctrain.launch.start_ranks import start

    sys.stdout.flush()
    sys.stderr.flush()
    start(num_processes, [sys.executable, *sys.orig_argv[1:]])


def _is_a_script() -> bool:
    """Tell whether the user's own file is what runs, and not a notebook, pytest or another tool."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if file is None or hasattr(sys, "ps1"):
        return False
    path = Path(file).resolve()
    tools = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "scripts")}
    return not any(path.is_relative_to(folder) for folder in tools)


def asked_ranks(devices: Any, num_nodes: Any, strategy: Any) -> tuple[int | None, int | None]:
    """Return how many ranks each node, and how many nodes there are to be; None: any number.

    Args:
        devices: as Lightning's Trainer takes it.
        num_nodes: likewise.
        strategy: likewise; one of them is on a single device.

    Raises:
        ConfigError: if an argument is no number of these.
    """
    if isinstance(num_nodes, bool) or not isinstance(num_nodes, int) or num_nodes < 1:
        raise ConfigError(f"num_nodes={num_nodes!r}: expected a whole number from 1")
    asked = _num_devices(devices)
    if SINGLE_DEVICE in (strategy, type(strategy).__name__):
        asked = 1
    return asked, num_nodes if num_nodes > 1 or asked is not None else None


def _num_devices(value: Any) -> int | None:
    """Return how many devices of a node are asked for; None: all."""
    if isinstance(value, str):
        text = value.strip()
        if text == "auto":
            return None
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not all(part.lstrip("-").isdecimal() for part in parts):
            raise ConfigError(f'devices={value!r}: expected "auto" or a number of devices')
        # As in Lightning: "3" is a number of devices, "3," and "0,3" are devices.
        value = [int(part) for part in parts] if "," in text else int(text)
    if isinstance(value, list | tuple | range):
        indices = list(value)
        if indices == [-1]:
            return None
        if indices and indices != list(range(len(indices))):
            shown = ",".join(str(index) for index in indices)
            raise ConfigError(
                f"devices={value!r}: which devices is for the environment to say, "
                f"CUDA_VISIBLE_DEVICES={shown}; here devices={len(indices)}"
            )
        value = len(indices)
    if value == -1:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f'devices={value!r}: expected "auto" or a number of devices from 1')
    return value
