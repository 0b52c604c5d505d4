"""Judges the run folder: writable, shared, fast and large enough for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from hpctrain.preflight.finding import Finding
from hpctrain.preflight.probes.folder import FolderFacts
from hpctrain.utils.text import duration, listed, number, plural, size

FOLDER_FIX = (
    "set run.directory to a folder on a shared file system that you can write to (quota included)"
)
_FLEETING = frozenset({"tmpfs", "ramfs", "overlay"})
_SLOW_SAVE_SECONDS = 300.0


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


def judge_space(free_bytes: int, checkpoint_bytes: int | None, kept: int) -> Finding:
    """Hold the free space against the checkpoints that are kept, and one in the making.

    Args:
        free_bytes: of the file system; a quota may leave less.
        checkpoint_bytes: of one checkpoint; None: no model could be built.
        kept: checkpoints that stay.
    """
    name = "disk space"
    free = f"{size(free_bytes)} free"
    if checkpoint_bytes is None:
        return Finding(
            name=name, status="skip", fact=f"{free}; without a model, what it needs is unknown"
        )
    needed = (kept + 1) * checkpoint_bytes
    fact = f"{free}; {kept + 1} checkpoints of {size(checkpoint_bytes)} need {size(needed)}"
    values = {"free_bytes": free_bytes, "checkpoint_bytes": checkpoint_bytes, "needed": needed}
    if free_bytes >= needed:
        return Finding(name=name, status="pass", fact=fact, values=values)
    return Finding(
        name=name,
        status="fail" if free_bytes < checkpoint_bytes else "warn",
        fact=fact,
        fix="free some space, set run.directory elsewhere, or lower checkpoint.keep_last",
        values=values,
    )
