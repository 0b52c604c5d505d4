"""Which directories of a node are on a disk of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.utils.files import filesystem_of
from hpctrain.utils.permissions import require_stable

VARIABLES = ("SLURM_TMPDIR", "PBS_JOBFS", "LOCAL_SCRATCH", "TMPDIR")
"""Directories that sites make for a job, in the order in which they are tried.

Source: the Digital Research Alliance of Canada (SLURM_TMPDIR), NCI (PBS_JOBFS), CSC
(LOCAL_SCRATCH), and most others (TMPDIR).
"""
PATHS = ("/local/scratch", "/mnt/bb/{user}", "/localscratch", "/tmp")
"""Where the disk of a node is mounted: ALCF's Polaris, OLCF's Summit and Frontier, others."""

IN_MEMORY = frozenset({"tmpfs", "ramfs"})
SHARED = frozenset(
    {
        *("lustre", "gpfs", "nfs", "nfs4", "beegfs", "ceph", "cephfs", "fuse.ceph", "wekafs"),
        *("panfs", "pvfs2", "orangefs", "afs", "cifs", "smb3", "dvs", "glusterfs"),
        *("fuse.glusterfs", "fuse.sshfs", "vast", "daos", "fuse.daos", "quobyte"),
    }
)


@dataclass(frozen=True, slots=True)
class Disk:
    """A directory to stage in.

    Attributes:
        directory: that is there and can be written to.
        origin: why it was tried: the variable, the config's key, or empty for a usual place.
        free_bytes: for this user.
        size_bytes: of the whole file system.
    """

    directory: str
    origin: str
    free_bytes: int
    size_bytes: int


def candidates(wanted: str | None, environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (directory, origin) of what is to be tried.

    Args:
        wanted: the config's own directory, in which $NAMES are replaced; None: the usual ones.
        environ: of this process.
    """
    if wanted is not None:
        return [(os.path.expandvars(wanted), "data.stage_directory")]
    found = [(environ[name], f"${name}") for name in VARIABLES if environ.get(name)]
    user = environ.get("USER", "")
    return found + [(path.format(user=user), "") for path in PATHS if user or "{" not in path]


def look_at(directory: str, origin: str) -> Disk | str:
    """Return what a directory offers, or why nothing can be staged in it."""
    if not Path(directory).is_dir():
        return f"{directory}: no such directory"
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"{directory}: cannot be written"
    try:
        require_stable(directory)
    except OSError as error:
        return f"{directory}: {error}"
    kind = filesystem_of(Path(directory))
    if kind in SHARED:
        return f"{directory} is on {kind}, which all nodes share"
    if kind in IN_MEMORY and origin != "data.stage_directory":
        return f"{directory} is in memory ({kind}); data.stage_directory would choose it still"
    usage = shutil.disk_usage(directory)
    return Disk(directory, origin, usage.free, usage.total)


def choose(looks: Sequence[Disk | str], wanted_bytes: int) -> Disk | str:
    """Return the first disk with room for all, else the one with most; or why there is none."""
    disks = [look for look in looks if isinstance(look, Disk)]
    if not disks:
        return "; ".join(str(look) for look in looks)
    for disk in disks:
        if disk.free_bytes >= wanted_bytes:
            return disk
    return max(disks, key=lambda disk: disk.free_bytes)
