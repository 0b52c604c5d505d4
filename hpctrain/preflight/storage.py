"""The checks of where and how long: the run folder, its space, the time left."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpctrain.batch.scheduler import Deadline
from hpctrain.config.schema import Config
from hpctrain.errors import CheckpointError
from hpctrain.preflight.checks import Checks
from hpctrain.preflight.compute import StepFacts
from hpctrain.preflight.quotas import Quotas, judge_quotas, read_quotas
from hpctrain.preflight.report import Finding
from hpctrain.training.checkpointing.save import group_size
from hpctrain.training.data.run_data import Data
from hpctrain.utils.batch_job import Budget, budget
from hpctrain.utils.files import filesystem_of, sync
from hpctrain.utils.run_folder import refuse_sweep
from hpctrain.utils.text import duration, listed, number, plural, size

FOLDER_FIX = (
    "set run.directory to a folder on a shared file system that you can write to (quota included)"
)
WALLTIME_FIX = "export HPCTRAIN_DEADLINE=$(($(date +%s) + SECONDS_LEFT)) in the job script"

_CHUNK_BYTES = 4 * 2**20
_MOST_BYTES = 64 * 2**20
_MOST_SECONDS = 5.0
"""Of a trial's writing: whichever comes first."""
_KEPT_FREE_BYTES = 16 * 2**20
_FLEETING = frozenset({"tmpfs", "ramfs", "overlay"})
_SHARED_FILES = 4
"""The folder of a checkpoint, training.json, config.toml and meta.json."""
_FILES_OF_A_WRITER = 2
"""Those of the model and of the training state."""
_SLOW_SAVE_SECONDS = 300.0
_LITTLE_SECONDS = 300.0
"""Before the end of a job, too little to do anything."""


def check_storage(checks: Checks, steps: Sequence[StepFacts] | None) -> None:
    """Write where the run would, and leave nothing. Collective: all ranks."""
    answers = _try_folder(checks)
    facts = None if answers is None else answers[0][1]
    if answers is None or facts is None:
        checks.skip(
            ["run folder shared", "disk space", "quota"], "the run folder cannot be written"
        )
        return
    checkpoint_bytes = None if steps is None else steps[0].checkpoint_bytes
    checks.add(judge_folder(facts, checkpoint_bytes))
    seen = zip(checks.hosts, (sees for sees, _ in answers), strict=True)
    checks.add(judge_shared({host: sees for host, sees in seen if sees is not None}, facts.place))
    section = checks.config.checkpoint
    kept = section.keep_last + (section.keep_best is not None)
    files = checkpoint_files(checks.config, checks.topology.world_size)
    checks.add(judge_space(facts, checkpoint_bytes, files, kept))
    quotas = checks.gather("quota", FOLDER_FIX, lambda: _quotas_of(checks, Path(facts.place)))
    if quotas is not None and quotas[0] is not None:
        checks.add(judge_quotas(quotas[0], checkpoint_bytes, files, kept))


def checkpoint_files(config: Config, world_size: int) -> int:
    """Return how many files and folders a checkpoint is at most."""
    writers = 1
    if config.training.strategy == "fsdp":
        writers = -(-world_size // group_size(world_size, config.checkpoint.files))
    return _SHARED_FILES + _FILES_OF_A_WRITER * writers


def _quotas_of(checks: Checks, folder: Path) -> Quotas | None:
    return read_quotas(folder) if checks.topology.is_rank_zero else None


def check_walltime(checks: Checks, opened: Data | None, steps: Sequence[StepFacts] | None) -> None:
    """Compare the time left with the length of the run. Collective: all ranks."""

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

    left = checks.gather("walltime", WALLTIME_FIX, ask_here)
    if left is None or left[0] is None:
        return
    needed = None
    if opened is not None and steps is not None:
        count = opened.stop_at.total_steps(opened.place)
        needed = count * max(step.seconds for step in steps)
    checks.add(judge_walltime(*left[0], needed))
    checks.add(judge_cost(checks.topology.num_nodes, needed, budget(os.environ)))


def _try_folder(checks: Checks) -> list[tuple[bool | None, FolderFacts | None]] | None:
    """Return whether each node sees the folder, and how it did on rank 0."""
    config, topology = checks.config, checks.topology
    path = Path(config.run.directory, config.run.name)
    with ExitStack() as stack:
        trials = checks.gather(
            "run folder",
            FOLDER_FIX,
            lambda: stack.enter_context(trial_folder(path)) if topology.is_rank_zero else None,
        )
        if trials is None or (trial := trials[0]) is None:
            return None

        def try_here() -> tuple[bool | None, FolderFacts | None]:
            sees = trial.is_dir() if topology.local_rank == 0 else None
            return sees, try_folder(trial) if topology.is_rank_zero else None

        return checks.gather("run folder", FOLDER_FIX, try_here)


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFacts:
    """What a file system did.

    Attributes:
        place: the folder that was tried: the run folder, or the nearest one above it.
        filesystem: its type, such as "lustre".
        written_bytes: to one file.
        write_seconds: until they were on disk.
        rename_seconds: of a rename with both folders on disk.
        free_bytes: that a user may still write.
        free_files: that may still be made; None where the file system does not count.
    """

    place: str
    filesystem: str
    written_bytes: int
    write_seconds: float
    rename_seconds: float
    free_bytes: int
    free_files: int | None


def nearest_folder(path: Path) -> Path:
    """Return the folder itself, or where its first missing parent would be made.

    Raises:
        CheckpointError: if a file is in the way.
    """
    for folder in (path, *path.parents):
        if folder.is_dir():
            return folder
        if os.path.lexists(folder):
            raise CheckpointError(f"{folder} is not a directory")
    raise CheckpointError(f"{path} has no parent that is there")


@contextmanager
def trial_folder(path: Path) -> Iterator[Path]:
    """Make a hidden folder below a run folder, or beside its place, and remove it.

    Raises:
        CheckpointError: if that is not possible.
    """
    refuse_sweep(path)
    folder = nearest_folder(path) / f".hpctrain-check-{secrets.token_hex(8)}"
    try:
        folder.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot make a folder in {folder.parent}: {error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def try_folder(folder: Path) -> FolderFacts:
    """Do to a folder what saving a checkpoint does: write, sync, rename, sync.

    Raises:
        CheckpointError: naming the step that failed.
    """
    what = "written"
    try:
        free = shutil.disk_usage(folder).free
        counted = os.statvfs(folder)
        # Small where little is free: the check must not be what fills a disk.
        wanted = max(_CHUNK_BYTES, min(_MOST_BYTES, free - _KEPT_FREE_BYTES))
        temporary, final = folder / "file.tmp", folder / "file"
        written, chunk = 0, secrets.token_bytes(_CHUNK_BYTES)  # that no file system compresses
        begin = time.perf_counter()
        with temporary.open("wb") as file:
            while written < wanted and time.perf_counter() - begin < _MOST_SECONDS:
                file.write(chunk)
                written += len(chunk)
            file.flush()
            what = "synced to disk"
            os.fsync(file.fileno())
        write_seconds = time.perf_counter() - begin
        what = "renamed"
        begin = time.perf_counter()
        os.replace(temporary, final)
        sync(folder)
        rename_seconds = time.perf_counter() - begin
    except OSError as error:
        raise CheckpointError(f"a file in {folder.parent} cannot be {what}: {error}") from error
    return FolderFacts(
        place=str(folder.parent.absolute()),
        filesystem=filesystem_of(folder),
        written_bytes=written,
        write_seconds=write_seconds,
        rename_seconds=rename_seconds,
        free_bytes=free,
        free_files=counted.f_favail if counted.f_files else None,
    )


def judge_folder(facts: FolderFacts, checkpoint_bytes: int | None) -> Finding:
    """Tell how the file system did, and how long a checkpoint would take.

    Args:
        facts: as measured.
        checkpoint_bytes: of one checkpoint; None: no model could be built.
    """
    rate = facts.written_bytes / max(facts.write_seconds, 1e-9)
    fact = (
        f"{facts.place} ({facts.filesystem}): write, fsync, rename work; {size(round(rate))}/s, "
        f"rename {number(facts.rename_seconds * 1000)} ms"
    )
    values: Mapping[str, object] = {
        "folder": facts.place,
        "filesystem": facts.filesystem,
        "write_bytes_per_second": rate,
        "rename_seconds": facts.rename_seconds,
    }
    seconds = None if checkpoint_bytes is None else checkpoint_bytes / rate
    if seconds is not None:
        about = f"about {number(seconds)} s" if seconds >= 1 else "less than a second"
        fact += f"; a checkpoint takes {about}"
    if facts.filesystem in _FLEETING:
        return Finding(
            name="run folder",
            status="warn",
            fact=f"{fact}; what is on {facts.filesystem} may not outlive the job",
            fix=FOLDER_FIX,
            values=values,
        )
    if seconds is not None and seconds > _SLOW_SAVE_SECONDS:
        return Finding(
            name="run folder",
            status="warn",
            fact=f"{fact} ({duration(seconds)})",
            fix="choose a faster file system by run.directory, stripe the folder (lfs setstripe), "
            "or save more seldom",
            values=values,
        )
    return Finding(name="run folder", status="pass", fact=fact, values=values)


def judge_shared(seen: Mapping[str, bool], place: str) -> Finding:
    """Name nodes that do not see what rank 0 has written.

    Args:
        seen: by host.
        place: the folder.
    """
    name = "run folder shared"
    if len(seen) == 1:
        return Finding(name=name, status="skip", fact="one node")
    blind = [host for host, sees in seen.items() if not sees]
    if blind:
        return Finding(
            name=name,
            status="warn",
            fact=f"{listed(blind)} of {plural(len(seen), 'node')} do not see {place} of rank 0: "
            "a job that begins on another node finds no checkpoint",
            fix=FOLDER_FIX,
        )
    return Finding(name=name, status="pass", fact=f"all {plural(len(seen), 'node')} see {place}")


def judge_space(
    facts: FolderFacts, checkpoint_bytes: int | None, checkpoint_files: int, kept: int
) -> Finding:
    """Compare the free space with the checkpoints that are kept, and one in the making.

    Args:
        facts: of the file system; a quota may leave less.
        checkpoint_bytes: of one checkpoint; None: no model could be built.
        checkpoint_files: of one checkpoint.
        kept: checkpoints that stay.
    """
    name = "disk space"
    free = f"{size(facts.free_bytes)} free"
    if facts.free_files is not None:
        free += f", room for {plural(facts.free_files, 'file')}"
    if checkpoint_bytes is None:
        return Finding(
            name=name, status="skip", fact=f"{free}; without a model, what it needs is unknown"
        )
    needed, files = (kept + 1) * checkpoint_bytes, (kept + 1) * checkpoint_files
    fact = (
        f"{free}; {kept + 1} checkpoints of {size(checkpoint_bytes)} need {size(needed)} and "
        f"{plural(files, 'file')}"
    )
    values = {
        "free_bytes": facts.free_bytes,
        "free_files": facts.free_files,
        "checkpoint_bytes": checkpoint_bytes,
        "needed": needed,
        "needed_files": files,
    }
    most_files = math.inf if facts.free_files is None else facts.free_files
    if facts.free_bytes >= needed and most_files >= files:
        return Finding(name=name, status="pass", fact=fact, values=values)
    holds_one = facts.free_bytes >= checkpoint_bytes and most_files >= checkpoint_files
    return Finding(
        name=name,
        status="warn" if holds_one else "fail",
        fact=fact,
        fix="free some space, set run.directory elsewhere, or lower checkpoint.keep_last",
        values=values,
    )


def judge_cost(num_nodes: int, needed_seconds: float | None, bounds: Budget) -> Finding:
    """Tell what the run costs in node-hours, and compare it with its budget.

    Args:
        num_nodes: of this job.
        needed_seconds: of all steps of the run, as far as one step shows; None: it is unknown.
        bounds: that the job's script has set.
    """
    name, most = "cost", bounds.max_node_hours
    allowed = f"; its jobs may take {most:.6g} together (job --max-node-hours)" if most else ""
    if needed_seconds is None:
        return Finding(
            name=name, status="skip", fact=f"without a step, what the run takes is unknown{allowed}"
        )
    hours = num_nodes * needed_seconds / 3600
    fact = (
        f"all steps on {plural(num_nodes, 'node')}: about {number(hours)} node-hours, start-up, "
        f"evaluations and saves not counted{allowed}"
    )
    values = {"node_hours": hours, "max_node_hours": most or None}
    if most and hours > most:
        return Finding(
            name=name,
            status="warn",
            fact=f"{fact}: the run will stop before its end",
            fix="lower training.max_epochs or training.max_steps, or write the job script anew "
            "with a larger --max-node-hours",
            values=values,
        )
    return Finding(name=name, status="pass", fact=fact, values=values)


def judge_walltime(
    seconds_left: float, problem: str | None, needed_seconds: float | None
) -> Finding:
    """Compare the time left with the length of the run.

    Args:
        seconds_left: infinite where no end is known.
        problem: why the scheduler of this job does not say; None where it does, or there is none.
        needed_seconds: of all steps of the run, as far as one step shows; None: it is unknown.
    """
    name = "walltime"
    run = "" if needed_seconds is None else f"; all steps take about {duration(needed_seconds)}"
    if math.isinf(seconds_left):
        if problem is None:
            return Finding(name=name, status="pass", fact=f"no limit is known{run}")
        return Finding(name=name, status="warn", fact=f"{problem}{run}", fix=WALLTIME_FIX)
    fact = f"{duration(seconds_left)} left{run}"
    values = {"seconds": seconds_left}
    if seconds_left < _LITTLE_SECONDS:
        return Finding(
            name=name,
            status="fail" if seconds_left <= 0 else "warn",
            fact=fact,
            fix="ask the scheduler for more time; see that HPCTRAIN_DEADLINE, where it is set, and "
            "run.max_seconds are right",
            values=values,
        )
    if needed_seconds is not None and needed_seconds > seconds_left:
        fact += ": the run will stop, save, and has to be submitted again"
    return Finding(name=name, status="pass", fact=fact, values=values)
