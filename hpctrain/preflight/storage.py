"""The checks of where and how long: the run folder, its space, the time left."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from hpctrain.batch.scheduler import Deadline
from hpctrain.preflight.checks import Checks
from hpctrain.preflight.judging import storage as judging
from hpctrain.preflight.judging.walltime import WALLTIME_FIX, judge_walltime
from hpctrain.preflight.probes.folder import FolderFacts, trial_folder, try_folder
from hpctrain.preflight.probes.step import StepFacts
from hpctrain.training.datasets import Data


def check_storage(checks: Checks, steps: Sequence[StepFacts] | None) -> None:
    """Write where the run would, and leave nothing. Collective: all ranks."""
    answers = _try_folder(checks)
    facts = None if answers is None else answers[0][1]
    if answers is None or facts is None:
        checks.skip(["run folder shared", "disk space"], "the run folder cannot be written")
        return
    checkpoint_bytes = None if steps is None else steps[0].checkpoint_bytes
    checks.add(judging.judge_folder(facts, checkpoint_bytes))
    seen = zip(checks.hosts, (sees for sees, _ in answers), strict=True)
    checks.add(
        judging.judge_shared({host: sees for host, sees in seen if sees is not None}, facts.place)
    )
    section = checks.config.checkpoint
    kept = section.keep_last + (section.keep_best is not None)
    checks.add(judging.judge_space(facts.free_bytes, checkpoint_bytes, kept))


def check_walltime(checks: Checks, opened: Data | None, steps: Sequence[StepFacts] | None) -> None:
    """Hold the time left against the length of the run. Collective: all ranks."""

    def ask_here() -> tuple[float, str | None] | None:
        if not checks.topology.is_rank_zero:
            return None
        problems: list[str] = []
        deadline = Deadline(
            max_seconds=checks.config.run.max_seconds,
            environ=os.environ,
            began=time.time(),
            warn=problems.append,
        )
        deadline.refresh()
        return deadline.seconds_left(), problems[0] if problems else None

    told = checks.gather("walltime", WALLTIME_FIX, ask_here)
    if told is None or told[0] is None:
        return
    needed = None
    if opened is not None and steps is not None:
        count = opened.horizon.total_steps(opened.place)
        needed = count * max(step.seconds for step in steps)
    checks.add(judge_walltime(*told[0], needed))


def _try_folder(checks: Checks) -> list[tuple[bool | None, FolderFacts | None]] | None:
    """Return whether each node sees the folder, and how it did on rank 0."""
    config, topology = checks.config, checks.topology
    path = Path(config.run.directory, config.run.name)
    with ExitStack() as stack:
        trials = checks.gather(
            "run folder",
            judging.FOLDER_FIX,
            lambda: stack.enter_context(trial_folder(path)) if topology.is_rank_zero else None,
        )
        if trials is None or (trial := trials[0]) is None:
            return None

        def try_here() -> tuple[bool | None, FolderFacts | None]:
            sees = trial.is_dir() if topology.local_rank == 0 else None
            return sees, try_folder(trial) if topology.is_rank_zero else None

        return checks.gather("run folder", judging.FOLDER_FIX, try_here)
