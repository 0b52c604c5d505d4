"""One preflight: every family of checks in its turn, and the exit code."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TextIO

import torch

from hpctrain.config import Config
from hpctrain.errors import ExitCode
from hpctrain.launch.failure import Guard
from hpctrain.launch.process_group import World
from hpctrain.observe import log
from hpctrain.preflight.checks import Checks
from hpctrain.preflight.compute import check_compute
from hpctrain.preflight.data import check_reading, open_and_check
from hpctrain.preflight.network import check_network
from hpctrain.preflight.report import exit_code, to_json, verdict
from hpctrain.preflight.storage import check_storage, check_walltime
from hpctrain.preflight.world import check_world, connect
from hpctrain.topology import Communicator, Topology
from hpctrain.utils.streams import write_out


def check(
    config: Config,
    topology: Topology,
    communicator: Communicator,
    guard: Guard,
    *,
    command: Sequence[str],
    out: TextIO,
    as_json: bool,
) -> ExitCode:
    """Try everything that the run needs, and report. Collective: all ranks.

    Args:
        config: the same on all ranks.
        topology: of this rank.
        communicator: of all ranks.
        guard: ends the job where a rank is lost.
        command: the config file and overrides, as they were given.
        out: where rank 0 writes the report.
        as_json: one JSON object at the end, in place of a line a finding as they come.

    Returns:
        DONE, or LAUNCH if a check has failed.
    """
    is_reporter = topology.is_rank_zero
    out_of_findings = out if is_reporter and not as_json else None
    checks = Checks(config, topology, communicator, guard, out=out_of_findings)
    with log.start(None, is_reporter=is_reporter), _terminable(), ExitStack() as stack:
        world = connect(checks, stack)
        # Without a network, data and storage can still be looked at.
        lonely = World(
            topology=topology,
            communicator=communicator,
            device=torch.device("cpu"),
            backend=None,
        )
        check_world(checks, world or lonely)
        if world is not None:
            check_network(checks, world)
        opened = open_and_check(checks, world or lonely)
        steps = check_compute(checks, world, opened, command)
        check_reading(checks, opened, steps)
        check_storage(checks, steps)
        check_walltime(checks, opened, steps)
    if is_reporter:
        text = f"\n{verdict(checks.findings)}"
        if as_json:
            text = to_json(command[0], topology, checks.backend, checks.ranks, checks.findings)
        write_out(f"{text}\n", out)
    return exit_code(checks.findings)


@contextmanager
def _terminable() -> Iterator[None]:
    """Have SIGTERM unwind as Ctrl-C does, so that what was written for a trial is removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
