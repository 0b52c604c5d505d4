"""Which shards a node copies, under which names, who copies what, and to which of its disks."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import xxhash

from hpctrain.data.dataset import Dataset
from hpctrain.utils.files import filesystem_of, is_checksum
from hpctrain.utils.permissions import require_stable

COPY_NAME = re.compile(r"[0-9a-f]{16}-[0-9]{1,19}(\.[A-Za-z0-9]{1,8})?", re.ASCII)
"""Names of copies. Whatever an index says, they lead nowhere else."""
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}", re.ASCII)
SPARED = 1 / 20
"""Part of a disk that is left to others: a full one kills more than this job."""
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
class Copy:
    """One shard, as it is to lie on a node's disk.

    Attributes:
        source: path of the shard.
        name: of the copy; equal names are equal files.
        size: bytes.
        checksum: xxh3-64 of the whole file, hexadecimal; None where nobody computed it.
    """

    source: str
    name: str
    size: int
    checksum: str | None


def plan_copies(datasets: Sequence[Dataset]) -> tuple[Copy, ...]:
    """Return the copies of all shards of the datasets, in their order.

    A file whose values are in other files stays where it is: from another place it may not find
    them, and HDF5 would make values up.
    """
    copies = {}
    for shard in (shard for dataset in datasets for shard in dataset.shards):
        if shard.sources:
            continue
        # Without a checksum a shard is what its path says: two may have one name and one size.
        path = shard.path.encode(errors="surrogateescape")
        content = shard.checksum or xxhash.xxh3_64_hexdigest(path)
        if not is_checksum(content):
            continue  # whatever made this dataset: nothing can be compared with it
        suffix = PurePath(shard.path).suffix
        name = f"{content}-{shard.size}{suffix if _SUFFIX.fullmatch(suffix) else ''}"
        copies[shard.path] = Copy(shard.path, name, shard.size, shard.checksum)
    return tuple(copies.values())


def key_of(copies: Sequence[Copy], nonce: str) -> str:
    """Return the name of the folder for these copies, 16 hexadecimal digits.

    Jobs share a folder where checksums say that they want the same bytes. Without them a file may
    have been written anew under its name: `nonce` keeps such jobs apart.
    """
    unsure = any(copy.checksum is None for copy in copies)
    facts = [sorted(copy.name for copy in copies), nonce if unsure else ""]
    return str(xxhash.xxh3_64_hexdigest(json.dumps(facts).encode()))


def count_fitting(copies: Sequence[Copy], free_bytes: int, disk_bytes: int) -> int:
    """Return how many of the copies, from the first, a disk has room for.

    Args:
        copies: in the order in which they are wanted.
        free_bytes: of the disk.
        disk_bytes: its whole size, a part of which is spared.
    """
    left = free_bytes - int(disk_bytes * SPARED)
    for count, copy in enumerate(copies):
        left -= copy.size
        if left < 0:
            return count
    return len(copies)


def share_of(
    copies: Sequence[Copy], *, local_rank: int, local_world_size: int, node_rank: int, nodes: int
) -> tuple[Copy, ...]:
    """Return what one rank copies for its node, in its order.

    The nodes begin at different shards: they would all read the same file at once otherwise.
    """
    first = node_rank * len(copies) // nodes
    return tuple([*copies[first:], *copies[:first]][local_rank::local_world_size])


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
