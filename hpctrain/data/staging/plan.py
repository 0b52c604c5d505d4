"""Which shards a node copies, under which names, and who copies what. No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import xxhash

from hpctrain.data.dataset import Dataset
from hpctrain.utils.files import is_checksum

COPY_NAME = re.compile(r"[0-9a-f]{16}-[0-9]{1,19}(\.[A-Za-z0-9]{1,8})?", re.ASCII)
"""Names of copies. Whatever an index says, they lead nowhere else."""
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}", re.ASCII)
SPARED = 1 / 20
"""Part of a disk that is left to others: a full one kills more than this job."""


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
