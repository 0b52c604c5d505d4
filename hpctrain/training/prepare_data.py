"""`prepare_data`: what a module and its data fetch before any of them is used.

In a job one rank of a node calls it while the others wait, so it has a limit. Compute nodes mostly
have no way to the internet: what fails for that is reported with the command that fetches the same
on a login node, in one process.
"""

from __future__ import annotations

import contextvars
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hpctrain.config.choices import is_preparing
from hpctrain.errors import DatasetError
from hpctrain.launch.process_group import World
from hpctrain.topology import raise_together
from hpctrain.utils.internet import network_failure
from hpctrain.utils.text import duration

_TICK_SECONDS = 5.0


def prepare_data(owners: Iterable[object], world: World, *, seconds: float) -> None:
    """Call `prepare_data` of those that have one. Collective: all ranks.

    The lowest rank of every node calls it; where `prepare_data_per_node` of an owner is false, rank
    0 alone.

    Args:
        owners: the datamodule and the module, in this order; None is left out.
        world: of this job.
        seconds: that all of them may take together.

    Raises:
        DatasetError: on every rank, if it takes too long or finds no network.
    """
    topology = world.topology
    own = [
        owner
        for owner in owners
        if topology.local_rank == 0
        and (topology.is_rank_zero or getattr(owner, "prepare_data_per_node", True))
    ]
    with world.pulse.long_phase(), raise_together(world.communicator):
        if any(hasattr(owner, "prepare_data") for owner in own):
            _call_in_time(own, world, seconds)


def prepare_alone(owners: Iterable[object]) -> None:
    """Call `prepare_data` of those that have one, in a process that trains nothing."""
    for owner in owners:
        if hasattr(owner, "prepare_data"):
            with fetching(f"prepare_data of {name_of(owner)}"):
                owner.prepare_data()
            prepared.append(name_of(owner))


prepared: list[str] = []
"""Classes whose `prepare_data` has been called in this process."""


@contextmanager
def fetching(name: str) -> Iterator[None]:
    """Explain a failure of the network in the body.

    Args:
        name: of what fetches.

    Raises:
        DatasetError: if the network fails.
    """
    try:
        yield
    except Exception as error:
        reason = network_failure(error)
        if reason is None:
            raise
        failed = f"no internet on {socket.gethostname()}: {name} failed with {reason}"
        if is_preparing():
            raise DatasetError(f"{failed}; this is a command for a node that has it") from error
        raise DatasetError(
            f"{failed}; run `python -m hpctrain prepare {_what_runs()}` on a login node"
        ) from error


def name_of(owner: object) -> str:
    """Return the name of the user's class that an owner is of, or stands for."""
    return type(getattr(owner, "module", owner)).__name__


def _what_runs() -> str:
    """Return what `python -m hpctrain prepare` would take: the config, or the script."""
    command = sys.argv[0]
    if Path(command).parent.name != "hpctrain" and Path(command).name != "hpctrain":
        return command or "SCRIPT"
    return next((word for word in sys.argv[1:] if word.endswith(".toml")), "CONFIG")


def _call_in_time(owners: Iterable[object], world: World, seconds: float) -> None:
    """Call them in a thread, which this one does not wait for any longer than that.

    Nothing else ends a download that stands still in C, or tries again for ever.
    """
    failed: list[BaseException] = []
    done = threading.Event()
    calling: list[str] = ["prepare_data"]

    def call() -> None:
        try:
            for owner in owners:
                calling[0] = f"prepare_data of {name_of(owner)}"
                prepare_alone([owner])
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            failed.append(error)
        finally:
            done.set()

    context = contextvars.copy_context()
    threading.Thread(
        target=context.run, args=(call,), name="hpctrain-prepare-data", daemon=True
    ).start()
    left = seconds
    while not done.wait(min(_TICK_SECONDS, left)):
        world.pulse.tick()
        left -= _TICK_SECONDS
        if left <= 0:
            raise DatasetError(
                f"{calling[0]} has not ended within {duration(seconds)} on {socket.gethostname()} "
                "(launch.prepare_timeout_seconds). Without internet on compute nodes, run `python "
                f"-m hpctrain prepare {_what_runs()}` on a login node"
            )
    if failed:
        raise failed[0]
