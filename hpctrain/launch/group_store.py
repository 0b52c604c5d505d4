"""How a process group finds itself: the store, and the interface that gloo is to use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.config.schema import LaunchSection
from hpctrain.launch.rendezvous import Meeting
from hpctrain.topology import Topology

if TYPE_CHECKING:
    from torch import distributed as dist

_LOOPBACK = Path("/sys/class/net/lo")


@contextmanager
def own_interface(meeting: Meeting | None) -> Iterator[None]:
    """Have gloo look up no host name for one process, which has nobody to connect to."""
    name = "GLOO_SOCKET_IFNAME"
    if meeting is not None or name in os.environ or not _LOOPBACK.exists():
        yield
        return
    os.environ[name] = _LOOPBACK.name
    try:
        yield
    finally:
        del os.environ[name]


def group_store(
    topology: Topology, meeting: Meeting | None, section: LaunchSection, timeout: timedelta
) -> dist.Store:
    """Return the key-value store through which the process group finds itself."""
    import torch
    from torch import distributed as dist

    if meeting is None:
        return dist.HashStore()
    if meeting.interface:
        # gloo would look its own host name up, and bind 127.0.1.1 on a Debian host.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", meeting.interface)
        # NCCL knows the fast networks better than we do, unless the user has named one.
        if section.interface or section.address:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={meeting.interface}")
    return dist.TCPStore(
        meeting.ip,
        meeting.port,
        topology.world_size,
        is_master=topology.is_rank_zero,
        timeout=timeout,
        wait_for_workers=False,
        # The store takes the descriptor over and closes it.
        master_listen_fd=meeting.listener.detach() if meeting.listener is not None else None,
        # Until torch 2.8 the libuv kind cannot take one.
        use_libuv=torch.__version__ >= "2.8",
    )
