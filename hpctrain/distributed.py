"""torch.distributed, for programs that make their process group by hand: one import changed.

`import hpctrain.distributed as dist` in place of `import torch.distributed as dist`:
`dist.init_process_group()` finds all ranks that a launcher has started, whichever it is, and where
they can meet; from there on the end of one is that of all. Everything else is torch's own.
"""

from __future__ import annotations

import atexit
import sys
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hpctrain.config.schema import LaunchSection
from hpctrain.errors import LaunchError
from hpctrain.launch.process_group import connect

if TYPE_CHECKING:
    from hpctrain.launch.process_group import World

_BACKENDS = ("nccl", "gloo", "xccl")

_open: list[ExitStack] = []


def init_process_group(
    backend: str | None = None,
    init_method: str | None = None,
    timeout: Any = None,
    world_size: int = -1,
    rank: int = -1,
    **others: Any,
) -> None:
    """Make the process group of all ranks that were started. Collective: all ranks.

    Args:
        backend: None: the device's own.
        init_method: not used: where to meet is found, and proven.
        timeout: not used: hpctrain's watchdog has limits of its own.
        world_size: compared with the ranks that there are.
        rank: compared with this process's.
        others: not used, as `store` and `device_id`.

    Raises:
        LaunchError: if the processes cannot form one world, or not this one.
    """
    del init_method, timeout, others
    kind = (backend or "").rpartition(":")[2].lower()
    section = LaunchSection(backend=kind) if kind in _BACKENDS else LaunchSection()  # type: ignore[arg-type]
    stack = ExitStack()
    world = stack.enter_context(connect(section))
    _open.append(stack)
    _end_all_with_this(world)
    topology = world.topology
    for name, asked, there in (
        ("world_size", world_size, topology.world_size),
        ("rank", rank, topology.rank),
    ):
        if asked not in (-1, there):
            raise LaunchError(
                f"init_process_group({name}={asked}): {topology.launcher} has made this rank "
                f"{topology.rank} of {topology.world_size}; leave {name} out"
            )


def destroy_process_group(group: Any = None) -> None:
    """Leave the world. Collective: all ranks."""
    if group is not None or not _open:
        from torch import distributed

        distributed.destroy_process_group(group)
        return
    _open.pop().close()


def _end_all_with_this(world: World) -> None:
    """Have what this program raises end all ranks, and its end leave the world in order."""
    atexit.register(lambda: destroy_process_group() if _open else None)
    guard = world.guard
    if world.topology.world_size == 1 or guard is None:
        return
    previous = sys.excepthook

    def uncaught(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if _open:
            guard.end_job(error, trace)
        previous(kind, error, trace)

    sys.excepthook = uncaught


def __getattr__(name: str) -> Any:
    """Return what torch.distributed has of this name."""
    from torch import distributed

    return getattr(distributed, name)
