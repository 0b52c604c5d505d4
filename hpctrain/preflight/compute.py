"""The checks of the model: its parts, real steps on synthetic data, memory."""

from __future__ import annotations

import gc
from collections.abc import Sequence

from hpctrain.data.reading.node_memory import host_memory
from hpctrain.launch.world import World
from hpctrain.preflight.asking import CheckError, ask, failing_together
from hpctrain.preflight.checks import Checks
from hpctrain.preflight.finding import Finding
from hpctrain.preflight.judging import compute as judging
from hpctrain.preflight.probes.numbers import try_real_data
from hpctrain.preflight.probes.step import (
    TIMED_SECONDS,
    StepFacts,
    SyntheticLoader,
    alone,
    take_steps,
    try_on_host,
)
from hpctrain.training.assembly import Components
from hpctrain.training.components import resolve_components
from hpctrain.training.datasets import Data
from hpctrain.training.step.preparation import is_spread


def check_compute(
    checks: Checks, world: World | None, opened: Data | None, command: Sequence[str]
) -> list[StepFacts] | None:
    """Build what the config names and take steps. Collective: all ranks.

    Args:
        checks: takes the findings.
        world: None where there is no process group.
        opened: None where the dataset, and with it the shapes, are unknown.
        command: the config file and overrides.
    """
    components = _resolve(checks, command)
    if world is None or opened is None or components is None:
        missing = "group" if world is None else "dataset" if opened is None else "model"
        checks.skip(["step", "memory", "numbers"], f"there is no {missing} to try it with")
        return None
    loader = SyntheticLoader(
        fields=opened.transforms.fields,
        largest_share=opened.train_loader.largest_share,
        smallest_share=opened.train_loader.smallest_share,
        device=world.device,
        batch_transform=opened.transforms.batch_transform,
    )
    # Every rank by itself first: one that fails alone would leave the others in a reduction.
    together = checks.topology.world_size > 1
    # Not on the device, where a whole one may have no room.
    spread = is_spread(checks.config.training, checks.topology.world_size)
    if spread:
        steps = _try_whole(checks, world, components, loader, opened)
    else:
        seconds = 0 if together else TIMED_SECONDS
        steps = _try(checks, alone(world), components, loader, opened, seconds)
    if steps is not None and together:
        steps = _try(checks, world, components, loader, opened, TIMED_SECONDS)
    if steps is None:
        checks.skip(["memory", "numbers"], "no step was possible")
        return None
    checks.add(judging.judge_step(steps))
    nodes = [rank.node_rank for rank in checks.ranks] or [0] * len(steps)
    checks.add(judging.judge_memory(steps, checks.hosts, nodes, world.device.type))
    if world.device.type == "cuda":
        free = min(world.communicator.all_gather(host_memory()[0]))
        checks.add(judging.judge_pinned_memory(steps, checks.hosts, nodes, free))
    _try_real_data(checks, world if spread else alone(world), components, opened)
    return steps


def _try_real_data(checks: Checks, world: World, components: Components, opened: Data) -> None:
    """Take a step on real data, each rank by itself or all together. Collective: all ranks."""
    gc.collect()
    facts = checks.gather(
        "numbers",
        judging.STEP_FIX,
        failing_together(
            "numbers",
            world.topology,
            lambda: try_real_data(checks.config, world, components, opened),
        ),
    )
    if facts is not None:
        checks.add(judging.judge_numbers(facts, checks.hosts))


def _resolve(checks: Checks, command: Sequence[str]) -> Components | None:
    config = checks.config
    components = checks.keep(
        "components",
        "correct the config, or install what it names on every node",
        lambda: resolve_components(config, command[0], command[1:]),
    )
    if components is not None:
        named = (config.model, config.task, config.optimizer, config.scheduler)
        fact = f"{', '.join(part.use for part in named)}: imported, their arguments fit"
        checks.add(Finding(name="components", status="pass", fact=fact))
    return components


def _try_whole(
    checks: Checks, world: World, components: Components, loader: SyntheticLoader, opened: Data
) -> list[StepFacts] | None:
    """Run a model that is to be spread once, each rank on its host. Collective: all ranks.

    Returns:
        No facts yet; None where a rank has failed.
    """
    try:
        ask(
            checks.topology,
            checks.communicator,
            lambda: try_on_host(checks.config, world, components, loader, opened.semantics),
        )
    except CheckError as error:
        checks.add(error.finding("step", judging.step_fix(str(error))))
        return None
    return []


def _try(
    checks: Checks,
    world: World,
    components: Components,
    loader: SyntheticLoader,
    opened: Data,
    timed_seconds: float,
) -> list[StepFacts] | None:
    """Take steps in `world`: all ranks together, or each alone. Collective: all ranks."""
    gc.collect()  # a model in a reference cycle keeps its memory until then
    try:
        return ask(
            checks.topology,
            checks.communicator,
            failing_together(
                "step",
                world.topology,
                lambda: take_steps(checks.config, world, components, loader, opened, timed_seconds),
            ),
        )
    except CheckError as error:
        checks.add(error.finding("step", judging.step_fix(str(error))))
        return None
