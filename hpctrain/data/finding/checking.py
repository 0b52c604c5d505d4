"""Shards held against their checksums before a run trusts them."""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.data.dataset import Dataset, Shard
from hpctrain.errors import DatasetError
from hpctrain.utils.files import file_checksum


def verify_share(datasets: Sequence[Dataset], rank: int, world_size: int) -> None:
    """Hold a rank's share of the shards against their checksums; it reads them whole.

    Raises:
        DatasetError: naming the first that is not what it was, or has no checksum.
    """
    shards = {shard.path: shard for dataset in datasets for shard in dataset.shards}
    for path in sorted(shards)[rank::world_size]:
        _verify(shards[path])


def _verify(shard: Shard) -> None:
    if shard.checksum is None:
        raise DatasetError(
            f'{shard.path}: data.verify = "start", but this file has no checksum: make an index '
            "with `python -m hpctrain data index`"
        )
    try:
        found = file_checksum(shard.path)
    except OSError as error:
        raise DatasetError(f"{shard.path}: {error.strerror or error}") from error
    if found != shard.checksum:
        raise DatasetError(
            f"{shard.path}: its checksum is not that of the index: bytes of this file have "
            "changed. Bring the file back, or write the dataset anew"
        )
