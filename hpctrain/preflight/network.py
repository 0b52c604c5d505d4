"""The checks between ranks: names, interface, all-reduce, and who is late."""

from __future__ import annotations

from hpctrain.launch.nccl_log import Transport, describe
from hpctrain.launch.world import World
from hpctrain.preflight.checks import HOST_FIX, Checks
from hpctrain.preflight.judging import network as judging
from hpctrain.preflight.probes import network as probes
from hpctrain.preflight.probes.reductions import time_reductions
from hpctrain.training.transport import gather_transport

_FIX = "see that no firewall is between the nodes; launch.interface names another network"


def check_network(checks: Checks, world: World) -> None:
    """Try the network of a ready process group. Collective: all ranks."""
    _check_names(checks)
    hosts = checks.hosts
    speeds = checks.gather("speed", HOST_FIX, lambda: probes.fixed_computation(world.device))
    if speeds is not None:
        checks.add(judging.judge_speed(speeds, hosts))
    if checks.topology.world_size == 1:
        checks.skip(["all-reduce", "clocks", "barrier"], "one process")
        return
    table = checks.gather("all-reduce", _FIX, lambda: time_reductions(world))
    transport = gather_transport(world)  # by now it is connected
    if table is not None:
        carrier = _carrier(checks, world, transport)
        checks.add(judging.judge_reductions(table, world.backend or "", hosts, carrier))
    if transport is not None:
        checks.add(judging.judge_transport(transport, checks.topology.num_nodes))
    offsets = checks.gather("clocks", HOST_FIX, lambda: probes.clock_offset(checks.communicator))
    if offsets is not None:
        checks.add(judging.judge_clocks(offsets, hosts))
    waits = checks.gather("barrier", HOST_FIX, lambda: probes.barrier_wait(checks.communicator))
    if waits is not None:
        checks.add(judging.judge_arrival(waits, hosts))


def _check_names(checks: Checks) -> None:
    topology = checks.topology

    def look_up() -> probes.Lookup | None:
        # One rank per node: a name server is easily overrun.
        if topology.local_rank != 0:
            return None
        return probes.look_up(topology.host, topology.hosts[0])

    lookups = checks.gather("host names", HOST_FIX, look_up)
    if lookups is None or not checks.ranks:
        return
    agreed = checks.ranks[0].addresses if topology.num_nodes > 1 else ()
    checks.add(judging.judge_names([each for each in lookups if each is not None], agreed))
    checks.add(judging.judge_interface(checks.ranks))


def _carrier(checks: Checks, world: World, transport: Transport | None) -> str:
    """Return what carries reductions, with its version and its way where these are known."""
    told = describe(transport, checks.topology.num_nodes) if transport is not None else ""
    version = checks.ranks[0].versions.get("NCCL") if checks.ranks else None
    known = f"NCCL {version}" if world.backend == "nccl" and version else world.backend or ""
    return told or known
