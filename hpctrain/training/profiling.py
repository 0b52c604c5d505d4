"""Time of steps: seconds by phase, figures of ranks and nodes, torch's profiler."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from hpctrain.config import Config
from hpctrain.config.schema import ProfileSection
from hpctrain.errors import ConfigError
from hpctrain.launch.process_group import World
from hpctrain.observe.machine.recorder import RankFigures, machine_recorded
from hpctrain.utils.files import replacement
from hpctrain.utils.text import plural

logger = logging.getLogger("hpctrain")

FOLDER = "profile"
"""Of the traces, in the run folder."""
TABLE_ROWS = 15
MOST_ALLOCATIONS = 200_000
"""Allocations and releases of memory that a snapshot holds."""


class StepProfiler:
    """Counts the steps of a job on every rank, and records some of them on the chosen ones."""

    def __init__(self, section: ProfileSection, world: World, folder: Path) -> None:
        """Prepare; nothing is recorded before `profiled`."""
        self._section = section
        self._world = world
        self._folder = folder / FOLDER
        self._records = world.topology.rank in section.ranks
        self._done = 0
        self._last_step = 0
        self._profile: Any = None
        self._is_over = False

    @classmethod
    def of(cls, config: Config, world: World) -> StepProfiler | None:
        """Return what the config asks for, None if that is nothing.

        Raises:
            ConfigError: if it cannot be had here.
        """
        section, world_size = config.profile, world.topology.world_size
        if not section.active_steps:
            return None
        if strangers := [rank for rank in section.ranks if rank >= world_size]:
            raise ConfigError(
                f"profile.ranks: no rank {strangers[0]} among {plural(world_size, 'rank')}, "
                "counted from 0",
                everywhere=True,
            )
        if section.memory_snapshot and world.device.type != "cuda":
            raise ConfigError(
                "profile.memory_snapshot = true: only CUDA's memory has a history, and this is "
                f"{world.device.type}; profile.profile_memory has the sizes of operations"
            )
        return cls(section, world, Path(config.run.directory, config.run.name))

    def begin(self) -> None:
        """Start to count, at the first step of this job."""
        if not self._records:
            return
        from torch.profiler import ProfilerActivity, profile, schedule

        section = self._section
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        elif self._world.device.type == "xpu":
            activities.append(ProfilerActivity.XPU)
        if section.memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
        self._profile = profile(
            activities=activities,
            schedule=schedule(
                wait=section.wait_steps,
                warmup=section.warmup_steps,
                active=section.active_steps,
                repeat=1,
            ),
            record_shapes=section.record_shapes,
            with_stack=section.with_stack,
            profile_memory=section.profile_memory,
        )
        self._profile.start()

    def stop(self) -> None:
        """Record no more."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
            if self._section.memory_snapshot:
                torch.cuda.memory._record_memory_history(enabled=None)

    def step_done(self, step: int) -> bool:
        """Count a step, and write the traces behind the last that is wanted.

        Collective at that step: all ranks.

        Returns:
            Whether it is over.
        """
        self._done += 1
        self._last_step = step
        if self._profile is not None:
            self._profile.step()
        if self._done == self._first + self._section.active_steps:
            self._write(step)
        return self._is_over

    def finish(self) -> None:
        """Write what there is where a job ends before the last step. Collective: all ranks."""
        if self._is_over:
            return
        if self._done > self._first:
            self._write(self._last_step)
            return
        self._is_over = True
        self.stop()
        if self._world.topology.is_rank_zero:
            logger.warning(
                "no step was profiled: the first %s of a job are not (profile.wait_steps and "
                "warmup_steps), and this one had %d",
                plural(self._first, "step"),
                self._done,
            )

    @property
    def _first(self) -> int:
        """How many steps come before the first that is recorded."""
        return self._section.wait_steps + self._section.warmup_steps

    def _write(self, step: int) -> None:
        """Write the trace of this rank, and report all of them on rank 0. Collective: all ranks."""
        self._is_over = True
        with self._world.pulse.long_phase():
            found = self._world.communicator.all_gather(self._written(step))
        if not self._world.topology.is_rank_zero:
            return
        for problem in [problem for _, problem in found if problem]:
            logger.warning("a trace could not be written: %s", problem)
        tables = [(rank, table) for rank, (table, _) in enumerate(found) if table]
        if tables:
            rank, table = tables[0]
            logger.info(
                "profiled %s up to step %d on %s, traces for ui.perfetto.dev in %s; rank %d:\n%s",
                plural(min(self._done - self._first, self._section.active_steps), "step"),
                step,
                plural(len(self._section.ranks), "rank"),
                self._folder,
                rank,
                table,
            )

    def _written(self, step: int) -> tuple[str, str]:
        """Return the table of what this rank has recorded, and why it could not be written."""
        if self._profile is None:
            return "", ""
        profile, self._profile = self._profile, None
        profile.stop()
        device = self._world.device.type
        by = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
        table = str(profile.key_averages().table(sort_by=by, row_limit=TABLE_ROWS))
        try:
            self._folder.mkdir(exist_ok=True)
            name = f"step-{step:08d}-rank-{self._world.topology.rank:05d}"
            with replacement(self._folder / f"{name}.json") as temporary:
                profile.export_chrome_trace(str(temporary))
            if self._section.memory_snapshot:
                with replacement(self._folder / f"{name}-memory.pickle") as temporary:
                    torch.cuda.memory._dump_snapshot(str(temporary))
                torch.cuda.memory._record_memory_history(enabled=None)
        except (OSError, RuntimeError) as error:
            return table, f"{self._folder}: {error}"
        return table, ""


@contextmanager
def profiled(profiler: StepProfiler | None) -> Iterator[None]:
    """Record the steps in the body. Collective at its end, unless it fails: all ranks."""
    if profiler is None:
        yield
        return
    try:
        profiler.begin()
        yield
        profiler.finish()
    finally:
        profiler.stop()


class Phases:
    """Seconds by phase since the start, of this rank, and since the last lap.

    `evaluation` is measured by `measure`; what other parts count themselves (waiting for data,
    communication, the stall of a save) is read from them when a lap ends; `compute` is the rest.
    """

    def __init__(
        self,
        counters: Mapping[str, Callable[[], float]],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._counters = dict(counters)
        self._clock = clock
        self._start = clock()
        self._measured: dict[str, float] = {}
        self._lap = self.totals()

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Count the time in the body as `phase`."""
        begin = self._clock()
        try:
            yield
        finally:
            self._measured[phase] = self._measured.get(phase, 0.0) + self._clock() - begin

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return self._clock() - self._start

    def totals(self) -> dict[str, float]:
        """Return the seconds of every phase since the start; together they are `elapsed`."""
        elapsed = self.elapsed()
        seconds = dict(self._measured)
        for name, read in self._counters.items():
            seconds[name] = seconds.get(name, 0.0) + read()
        return {"compute": max(0.0, elapsed - sum(seconds.values())), **seconds}

    def lap(self) -> dict[str, float]:
        """Return the seconds of every phase since the last call."""
        before, self._lap = self._lap, self.totals()
        return {name: value - before.get(name, 0.0) for name, value in self._lap.items()}


def figures_recorded(config: Config, world: World) -> AbstractContextManager[None]:
    """Record the figures of every node while the body runs, if the config wants them."""
    if not config.logging.machine:
        return nullcontext()
    topology = world.topology
    return machine_recorded(
        Path(config.run.directory, config.run.name),
        topology.host,
        node_rank=topology.node_rank,
        num_nodes=topology.num_nodes,
        local_rank=topology.local_rank,
        kind=world.device.type,
        notes=world.pulse.notes,
    )


def note_figures(world: World, phases: Phases, step: int, steps: int) -> None:
    """Note what this rank has done with its time, for the one that records its node.

    Args:
        world: of this rank.
        phases: its seconds.
        step: that the run stands at.
        steps: done in this job.
    """
    seconds = phases.totals()
    allocated, peak = _memory(world.device)
    index = world.device.index
    world.pulse.note(
        RankFigures(
            rank=world.topology.rank,
            device=-1 if index is None else index,
            step=step,
            steps=steps,
            elapsed=_nanoseconds(sum(seconds.values())),
            data=_nanoseconds(seconds.get("data", 0.0)),
            others=_nanoseconds(seconds.get("communication", 0.0)),
            apart=_nanoseconds(seconds.get("evaluation", 0.0) + seconds.get("checkpoint", 0.0)),
            allocated=allocated,
            peak=peak,
        )
    )


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes that torch has given out on a device, and the most so far."""
    if device.type == "cpu":
        return 0, 0
    counts: Any = getattr(torch, device.type)
    return counts.memory_allocated(device), counts.max_memory_allocated(device)
