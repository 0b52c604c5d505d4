"""The checks of the model: its parts, real steps on synthetic data, memory."""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hpctrain.accelerator import synchronize
from hpctrain.config import Config
from hpctrain.config.registry import OWN
from hpctrain.config.semantics import Semantics
from hpctrain.data.loading.batch import moved
from hpctrain.data.staging.node_cache import host_memory
from hpctrain.launch.communicators import SingleCommunicator
from hpctrain.launch.placement import Node, place
from hpctrain.launch.process_group import World
from hpctrain.preflight.checks import CheckError, Checks, ask, failing_together
from hpctrain.preflight.numbers import STEP_FIX, check_numbers
from hpctrain.preflight.report import Finding
from hpctrain.preflight.synthetic import StandIn, stand_in
from hpctrain.training.build import build_model, build_parts, build_task
from hpctrain.training.checkpointing.snapshot import expected_bytes, host_bytes
from hpctrain.training.components import Components, resolve_components
from hpctrain.training.data.run_data import Data
from hpctrain.training.model.preparation import is_spread
from hpctrain.training.model.undisturbed import seed_generators
from hpctrain.training.parallel.fsdp_units import try_whole
from hpctrain.utils.text import number, percent, plural, size

MEMORY_FIX = (
    'lower data.micro_batch_size, or set training.precision = "bf16-mixed"; data.buffer_mb is the '
    "host memory for reading ahead"
)

_TIMED_SECONDS = 5.0
_MOST_STEPS = 10
_LEAST_FREE = 0.1
"""Of the memory: what batches, evaluation and fragmentation may still take."""


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
    loader = stand_in(opened, world)
    # Every rank by itself first: one that fails alone would leave the others in a reduction.
    together = checks.topology.world_size > 1
    # Not on the device, where a whole one may have no room.
    spread = is_spread(checks.config.training, checks.topology.world_size)
    if spread:
        steps = _try_whole(checks, world, components, loader, opened)
    else:
        seconds = 0 if together else _TIMED_SECONDS
        steps = _try(checks, alone(world), components, loader, opened, seconds)
    if steps is not None and together:
        steps = _try(checks, world, components, loader, opened, _TIMED_SECONDS)
    if steps is None:
        checks.skip(["memory", "numbers"], "no step was possible")
        return None
    checks.add(judge_step(steps))
    nodes = [rank.node_rank for rank in checks.ranks] or [0] * len(steps)
    checks.add(judge_memory(steps, checks.hosts, nodes, world.device.type))
    if world.device.type == "cuda":
        free = min(world.communicator.all_gather(host_memory()[0]))
        checks.add(judge_pinned_memory(steps, checks.hosts, nodes, free))
    check_numbers(checks, world if spread else alone(world), components, opened)
    return steps


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
    checks: Checks, world: World, components: Components, loader: StandIn, opened: Data
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
        checks.add(error.finding("step", step_fix(str(error))))
        return None
    return []


def _try(
    checks: Checks,
    world: World,
    components: Components,
    loader: StandIn,
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
        checks.add(error.finding("step", step_fix(str(error))))
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """What the steps of one rank have shown.

    Attributes:
        parameters: numbers in the model.
        parameter_bytes: of these.
        checkpoint_bytes: of model and optimizer state, as a checkpoint holds them.
        samples: of this rank in a step; the most there can be.
        passes: that they are computed in.
        seconds: of one step, the median.
        finite: whether loss and gradient were.
        used_bytes: the most that the process has taken: of the device, or of host memory.
        free_bytes: that were left there at the end, for all ranks together on a host.
        total_bytes: that there are.
        pinned_bytes: of host memory that a device copies from and to: reading ahead, saves.
    """

    parameters: int
    parameter_bytes: int
    checkpoint_bytes: int
    samples: int
    passes: int
    seconds: float
    finite: bool
    used_bytes: int
    free_bytes: int
    total_bytes: int
    pinned_bytes: int = 0


def alone(world: World) -> World:
    """Return a world of this rank only, on the same device."""
    here = world.topology
    topology = place(0, [Node("", here.host)], launcher=here.launcher, mpi=here.mpi)
    return replace(world, topology=topology, communicator=SingleCommunicator(), backend=None)


def try_on_host(
    config: Config,
    world: World,
    components: Components,
    loader: StandIn,
    semantics: Semantics,
) -> None:
    """Run a model that is to be spread over the ranks once, on this rank's host.

    Raises:
        Exception: what model or task raise there, if the ranks compute on their hosts; for a device
            it need not mean anything.
    """
    if config.task.use == OWN:
        return  # a module needs its trainer, and the step on all ranks gives it one
    seed_generators(config.run.seed)
    model, number_format, _ = build_model(config, world, components, semantics)
    row = moved(loader.example(), torch.device("cpu"))
    task = build_task(config, components)
    try:
        try_whole(model, task, number_format.cast(row, task.inputs))
    except Exception:
        if world.device.type == "cpu":
            raise


def take_steps(
    config: Config,
    world: World,
    components: Components,
    loader: StandIn,
    opened: Data,
    timed_seconds: float,
) -> StepFacts:
    """Build the model and train some steps; nothing of it stays. Collective: all ranks.

    In a world of `alone` it is not collective: what one rank fails of stops no other.

    Args:
        config: names the parts.
        world: the ranks.
        components: as resolved.
        loader: shapes of the data.
        opened: the data, of which only the length of the run is used.
        timed_seconds: take steps for about so long, and at least one.
    """
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    parts = build_parts(
        *(config, world, components, loader, opened.stop_at),
        semantics=opened.semantics,
        validation_batches=opened.validation_batches,
        brought=opened.brought,
    )
    step = parts.step
    batch = loader.share(world.topology.world_size, step.grad_accum_steps)
    step(batch, config.optimizer.lr)  # makes the state of the optimizer
    numbers = step.read()

    def timed() -> float:
        begin = time.perf_counter()
        step(batch, config.optimizer.lr)
        synchronize(world.device)
        return time.perf_counter() - begin

    slowest = max(world.communicator.all_gather(timed()))
    # All ranks take equally many.
    count = max(1, min(_MOST_STEPS, int(timed_seconds / max(slowest, 1e-9))))
    seconds = statistics.median(timed() for _ in range(count))
    if cuda:
        free, total = torch.cuda.mem_get_info(world.device)
        used = torch.cuda.max_memory_reserved(world.device)
    else:
        used, (free, total) = peak_resident_bytes(), host_memory()
    parameters = list(parts.model.parameters())
    loaders = [each for each in (opened.train_loader, opened.validation_loader) if each is not None]
    ahead = sum(each.buffer_bytes for each in loaders)
    saves = host_bytes(step, is_rank_zero=world.topology.is_rank_zero)
    return StepFacts(
        parameters=sum(item.numel() for item in parameters),
        parameter_bytes=sum(item.numel() * item.element_size() for item in parameters),
        checkpoint_bytes=expected_bytes(step),
        samples=batch.size,
        passes=step.grad_accum_steps,
        seconds=seconds,
        finite=numbers["loss"] - numbers["loss"] == 0 and not numbers["bad_steps"],
        used_bytes=used,
        free_bytes=free,
        total_bytes=total,
        pinned_bytes=ahead + saves if cuda else 0,
    )


def peak_resident_bytes() -> int:
    """Return the most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def step_fix(message: str) -> str:
    """Return what to do about a step that failed."""
    words = ("out of memory", "outofmemory", "can't allocate memory", "memoryerror")
    return MEMORY_FIX if any(word in message.lower() for word in words) else STEP_FIX


def judge_step(steps: Sequence[StepFacts]) -> Finding:
    """Tell model and time of a step."""
    first = steps[0]
    seconds = max(step.seconds for step in steps)
    fact = (
        f"{plural(first.parameters, 'parameter')} ({size(first.parameter_bytes)}); a step takes "
        f"{number(seconds * 1000)} ms: per rank {plural(first.samples, 'sample')} in "
        f"{plural(first.passes, 'pass', 'passes')}"
    )
    values = {
        "parameters": first.parameters,
        "checkpoint_bytes": first.checkpoint_bytes,
        "seconds": [step.seconds for step in steps],
    }
    bad = [rank for rank, step in enumerate(steps) if not step.finite]
    if bad:
        return Finding(
            name="step",
            status="warn",
            fact=f"{fact}; on synthetic data loss or gradient is not finite (rank {bad[0]})",
            fix="of numbers from 0 to 1 that is a surprise: look for logarithms, divisions, and "
            "the scale of the initial weights",
            values=values,
        )
    return Finding(name="step", status="pass", fact=fact, values=values)


def judge_memory(
    steps: Sequence[StepFacts], hosts: Sequence[str], node_ranks: Sequence[int], device: str
) -> Finding:
    """Compare what the ranks took with what there is.

    Args:
        steps: of every rank.
        hosts: of every rank.
        node_ranks: of every rank.
        device: "cpu": the ranks of a node share its memory; else each has a device of its own.
    """
    worst: tuple[float, Finding] | None = None
    for rank, step in enumerate(steps):
        node = [each for each, n in zip(steps, node_ranks, strict=True) if n == node_ranks[rank]]
        shared = device == "cpu"
        used = sum(each.used_bytes for each in node) if shared else step.used_bytes
        # Ranks of a node do not look at the same moment: the least is the most careful.
        free = min(each.free_bytes for each in node) if shared else step.free_bytes
        total = step.total_bytes
        whose = plural(len(node), "rank") if shared else f"rank {rank}"
        fact = f"{size(used)} by {whose} of {hosts[rank]}; {size(free)} of {size(total)} are left"
        tight = free < _LEAST_FREE * total
        finding = Finding(
            name="memory",
            status="warn" if tight else "pass",
            fact=f"{fact} ({percent(free, total)})" if tight else fact,
            fix=MEMORY_FIX if tight else "",
            values={"used_bytes": used, "free_bytes": free, "total_bytes": total},
        )
        if worst is None or free / total < worst[0]:
            worst = free / total, finding
    assert worst is not None
    return worst[1]


def judge_pinned_memory(
    steps: Sequence[StepFacts], hosts: Sequence[str], node_ranks: Sequence[int], free_bytes: int
) -> Finding:
    """Compare the host memory that devices copy from and to with what a node has.

    Args:
        steps: of every rank.
        hosts: of every rank.
        node_ranks: of every rank.
        free_bytes: of a node, the least of all.
    """
    taken: dict[int, int] = {}
    for step, node in zip(steps, node_ranks, strict=True):
        taken[node] = taken.get(node, 0) + step.pinned_bytes
    worst = max(taken, key=lambda node: taken[node])
    host = hosts[list(node_ranks).index(worst)]
    fact = (
        f"reading ahead and saves pin up to {size(taken[worst])} of the host's memory on {host}; "
        f"{size(free_bytes)} are free"
    )
    tight = taken[worst] > (1 - _LEAST_FREE) * free_bytes
    return Finding(
        name="host memory",
        status="warn" if tight else "pass",
        fact=fact,
        fix="lower data.buffer_mb, start fewer ranks per node, or ask for more memory: pinned "
        "memory is never swapped"
        if tight
        else "",
        values={"pinned_bytes": taken[worst], "free_bytes": free_bytes},
    )
