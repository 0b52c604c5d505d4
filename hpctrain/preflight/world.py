"""The checks of the world: launcher, process group, table of the ranks, what each of them has."""

from __future__ import annotations

from contextlib import ExitStack

from hpctrain.errors import LaunchError
from hpctrain.launch.limits import prepare_deterministic
from hpctrain.launch.world import World, gathering, process_group
from hpctrain.preflight.checks import HOST_FIX, Checks
from hpctrain.preflight.finding import Finding
from hpctrain.preflight.judging import node
from hpctrain.preflight.judging import world as judging
from hpctrain.preflight.probes.process import rank_facts
from hpctrain.preflight.report import world_table


def connect(checks: Checks, stack: ExitStack) -> World | None:
    """Make the process group, for as long as `stack` lasts. Collective: all ranks.

    Returns:
        None where the network or the devices do not carry one.
    """
    checks.add(judging.judge_launcher(checks.topology))
    topology, communicator, section = checks.topology, checks.communicator, checks.config.launch
    if checks.config.run.deterministic:
        prepare_deterministic()
    try:
        meeting = stack.enter_context(gathering(topology, communicator, section, checks.guard))
        world = stack.enter_context(
            process_group(topology, communicator, section, meeting, checks.guard)
        )
    except LaunchError as error:
        if not error.everywhere:
            raise
        checks.add(Finding(name="process group", status="fail", fact=str(error)))
        return None
    checks.backend = world.backend
    fact = f"ready over {world.backend}"
    checks.add(Finding(name="process group", status="pass", fact=fact))
    return world


def check_world(checks: Checks, world: World) -> None:
    """Tell who and where the ranks are, and judge what they have. Collective: all ranks."""
    ranks = checks.gather("ranks", HOST_FIX, lambda: rank_facts(world))
    if ranks is None:
        return
    checks.ranks = ranks
    checks.say(f"\n{world_table(ranks)}\n")
    checks.add(judging.judge_versions(ranks))
    checks.add(judging.judge_devices(ranks))
    checks.add(judging.judge_peers(ranks))
    checks.add(judging.judge_gpu_aware(checks.topology, ranks))
    checks.add(node.judge_cores(ranks, checks.topology.launcher))
    checks.add(node.judge_open_files(ranks))
    checks.add(node.judge_shared_memory(ranks))
