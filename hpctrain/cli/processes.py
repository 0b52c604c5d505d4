"""How many processes a command line asks for, where, and with what: `--np`, `--devices`, ...

The options are those of `fabric run`, and `--np`. They are read the same for a config and for a
script.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from hpctrain.cli.usage import Parser, usage_error, usage_of
from hpctrain.config.choices import (
    ACCELERATOR,
    PRECISION,
    STRATEGY,
    device_of,
    precision_of,
    training_of,
)
from hpctrain.errors import ConfigError, LaunchError, UsageError
from hpctrain.launch.environment import Claim
from hpctrain.launch.start_ranks import Nodes, nodes_of, start_on_this_node, start_over_nodes
from hpctrain.topology import Topology
from hpctrain.utils.text import plural

OPTIONS = (
    *("--np", "--devices", "--num-nodes", "--node-rank", "--main-address", "--main-port"),
    *("--accelerator", "--precision", "--strategy"),
)

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_ALL = ("auto", "-1")
_LIST = re.compile(r"\[?\s*(\d{1,4}(?:\s*,\s*\d{1,4})*)\s*,?\s*\]?")
_ONE_PROCESS = ("single_device",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a command line asks for; None is what it leaves open.

    Attributes:
        np: processes of this node.
        devices: processes of each node, or GPUs for one each.
        nodes: of which each has such a command; None: this one alone.
        accelerator, precision, strategy: as they were typed, and known to be something.
    """

    np: int | None = None
    devices: str | None = None
    nodes: Nodes | None = None
    accelerator: str | None = None
    precision: str | None = None
    strategy: str | None = None

    @property
    def choices(self) -> dict[str, str]:
        """What is chosen, as variables that a script's processes read."""
        given = {ACCELERATOR: self.accelerator, PRECISION: self.precision, STRATEGY: self.strategy}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def words(self) -> list[str]:
        """What is chosen, as options of the command line of each process."""
        given = {
            "--accelerator": self.accelerator,
            "--precision": self.precision,
            "--strategy": self.strategy,
        }
        return [f"{name}={value}" for name, value in given.items() if value is not None]

    @property
    def overrides(self) -> list[str]:
        """What is chosen, as overrides of a config."""
        keys: dict[str, object] = {}
        if self.accelerator is not None:
            keys["launch.device"] = device_of(self.accelerator)
        if self.precision is not None:
            keys["training.precision"] = precision_of(self.precision)
        if self.strategy is not None:
            keys |= {f"training.{key}": value for key, value in training_of(self.strategy).items()}
        return [
            f"{key}={str(value).lower()}" if isinstance(value, bool) else f'{key}="{value}"'
            for key, value in keys.items()
        ]


def read_wanted(
    given: Mapping[str, str | None], command: str, env: Mapping[str, str] | None = None
) -> Wanted:
    """Return what options ask for.

    Args:
        given: the text of each, by its name with dashes; None or missing: not given.
        command: whose usage is printed.
        env: the environment, where it may tell of several nodes.

    Raises:
        UsageError: if one of them does not fit.
    """

    def number(name: str, least: int) -> int | None:
        text = given.get(name)
        if text is None:
            return None
        if not re.fullmatch(r"-?[0-9]{1,9}", text):
            raise usage_error(f"{name}: invalid int value: {text!r}", usage_of(command))
        if int(text) < least:
            at_least = "at least one process is needed" if name == "--np" else f"{least} or more"
            raise usage_error(f"{name} {text}: {at_least}", usage_of(command))
        return int(text)

    for name, check in _CHECKS.items():
        if (text := given.get(name)) is not None:
            try:
                check(text)
            except ConfigError as error:
                raise usage_error(f"{name}: {error}", usage_of(command)) from error
    try:
        nodes = nodes_of(
            env or {},
            count=number("--num-nodes", 1),
            rank=number("--node-rank", 0),
            address=given.get("--main-address"),
            port=number("--main-port", 1),
        )
    except UsageError as error:
        raise usage_error(str(error), usage_of(command)) from error
    wanted = Wanted(
        np=number("--np", 1),
        devices=given.get("--devices"),
        nodes=nodes,
        **{name.removeprefix("--"): given.get(name) for name in _CHECKS},
    )
    if problem := _contradiction(wanted):
        raise usage_error(problem, usage_of(command))
    return wanted


_CHECKS: dict[str, Callable[[str], object]] = {
    "--accelerator": device_of,
    "--precision": precision_of,
    "--strategy": training_of,
}


def _contradiction(wanted: Wanted) -> str | None:
    devices = wanted.devices
    if devices is not None and devices not in _ALL and not _LIST.fullmatch(devices):
        return f"--devices {devices}: a number, a list such as 0,1, or auto"
    count = None if devices is None or devices in _ALL else _count(devices)
    if count == 0:
        return f"--devices {devices}: at least one process is needed"
    if wanted.np is not None and count not in (None, wanted.np):
        return f"--np {wanted.np} and --devices {devices} disagree: leave one of them out"
    if wanted.np is not None and wanted.nodes is not None:
        return f"--np {wanted.np} counts processes of one node: say --devices N, for each node"
    if wanted.strategy in _ONE_PROCESS and (wanted.np or count or 1) > 1:
        return f"--strategy {wanted.strategy} is of one process; ddp is of several"
    return None


def _count(devices: str) -> int:
    return len(devices.strip("[] ,").split(",")) if _is_list(devices) else int(devices)


def _is_list(devices: str) -> bool:
    return "," in devices or "[" in devices


def check_world(wanted: Wanted, topology: Topology) -> None:
    """Compare what was asked for with the ranks that a launcher has started.

    Raises:
        LaunchError: of all ranks, if it is something else.
    """
    devices = wanted.devices
    per_node = None if devices is None or devices in _ALL else _count(devices)
    for asked, there, of, option in (
        (wanted.np, topology.world_size, "", f"--np {wanted.np}"),
        (per_node, topology.local_world_size, f" on {topology.host}", f"--devices {devices}"),
    ):
        if asked not in (None, there):
            raise LaunchError(
                f"{topology.launcher} has started {plural(there, 'rank')}{of}; {option} asks for "
                f"{asked}: start {asked}, or leave {option} out",
                everywhere=True,
            )


def num_processes(wanted: Wanted, command: str) -> int:
    """Return how many processes are to be started on this node, and show them their GPUs.

    Raises:
        UsageError: if there are no such GPUs.
    """
    if wanted.np is not None:
        return wanted.np
    devices = wanted.devices
    if devices is None:
        return 1
    on_gpus = wanted.accelerator is None or device_of(wanted.accelerator) != "cpu"
    if devices in _ALL:
        return max(1, _num_gpus()) if on_gpus else 1
    if not _is_list(devices):
        return int(devices)
    chosen = [int(number) for number in devices.strip("[] ,").split(",")]
    there = _num_gpus() if on_gpus else 0
    absent = [number for number in chosen if number >= there]
    if absent or len(set(chosen)) < len(chosen):
        why = (
            f"torch sees {plural(there, 'GPU')} here"
            if absent
            else "a GPU is there twice, and each process needs one of its own"
        )
        cpus = "" if there else f"; --devices {len(chosen)} starts as many processes on CPUs"
        raise usage_error(f"--devices {devices}: {why}{cpus}", usage_of(command))
    shown = [each.strip() for each in os.environ.get(_VISIBLE, "").split(",") if each.strip()]
    os.environ[_VISIBLE] = ",".join(shown[number] if shown else str(number) for number in chosen)
    return len(chosen)


def _num_gpus() -> int:
    from hpctrain.launch.device import num_devices  # brings torch

    return num_devices()


def declare_processes(parser: Parser) -> None:
    """Let a command that takes a config say how many processes to start, and with what."""
    for option in OPTIONS:
        parser.add_argument(option)


def take_processes(parsed: Namespace, command: str, claim: Claim, options: Sequence[str]) -> None:
    """Add what was chosen to the overrides; where more processes are asked for, start them.

    Args:
        parsed: arguments of a parser that `declare_processes` has had; also config and overrides.
        command: that was given; "" for a run.
        claim: what a launcher says of this process.
        options: of the command itself, for each process.

    Raises:
        UsageError: if they do not fit.
        LaunchError: if there is nothing to start processes with.
    """
    given = vars(parsed)
    names = {name: name.removeprefix("--").replace("-", "_") for name in OPTIONS}
    wanted = read_wanted({name: given[key] for name, key in names.items()}, command)
    parsed.overrides += wanted.overrides
    asked = wanted.np is not None or wanted.devices is not None
    if wanted.nodes is not None or (asked and claim.launcher is None):
        words = [*filter(None, [command]), parsed.config, *parsed.overrides, *options]
        start(wanted, num_processes(wanted, command), words, claim, without_mpi=False)
    if asked:
        refuse_second_launcher(wanted, claim)


def start(
    wanted: Wanted, count: int, words: Sequence[str], claim: Claim, *, without_mpi: bool
) -> NoReturn:
    """Become what starts `python -m hpctrain WORDS` as ranks, on this node or on several.

    Args:
        wanted: with the nodes.
        count: processes of this node.
        words: of the command line of each.
        claim: what a launcher says of this process.
        without_mpi: where there is no MPI, torch's elastic agent may start them.

    Raises:
        UsageError: under a launcher, which has started this process as one of its ranks.
        LaunchError: if there is nothing to do it with.
    """
    if wanted.nodes is None:
        refuse_second_launcher(wanted, claim)
    from hpctrain.launch import start_ranks

    inner = ["-m", "hpctrain", *words]
    if wanted.nodes is not None:
        nodes = wanted.nodes
        start_ranks.report(
            f"{plural(count, 'process', 'processes')} on node {nodes.rank} of {nodes.count} under "
            f"torch's elastic agent, which meets the others at {nodes.address}:{nodes.port}"
        )
        start_over_nodes(nodes, count, inner)
    try:
        launch = start_ranks.find_launch(count)
    except LaunchError as error:
        if not without_mpi:
            raise
        start_ranks.report(f"{count} processes under torch's elastic agent, for: {error}")
        start_on_this_node(count, inner)
    start_ranks.become(launch, [sys.executable, *inner])


def refuse_second_launcher(wanted: Wanted, claim: Claim) -> None:
    """Refuse to start ranks from within a rank.

    Raises:
        UsageError: if a launcher has started this process.
    """
    if claim.launcher is None:
        return
    option = f"--np {wanted.np}" if wanted.np is not None else f"--devices {wanted.devices}"
    raise usage_error(
        f"{option} starts an mpirun of its own, but {claim.launcher.label} has "
        "started this process already: leave out one of the two"
    )
