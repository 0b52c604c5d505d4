"""The checks of the data: opened, seen by every node, locked, read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hpctrain.config.semantics import settle
from hpctrain.data.decoding import described
from hpctrain.launch.world import World
from hpctrain.preflight.checks import Checks
from hpctrain.preflight.judging import data as judging
from hpctrain.preflight.probes.dataset import read_batches, try_lock, unseen_shards
from hpctrain.preflight.probes.step import StepFacts
from hpctrain.training.datasets import Data, open_data
from hpctrain.training.resuming import values_to_go_on_from
from hpctrain.utils.files import filesystem_of


def open_and_check(checks: Checks, world: World) -> Data | None:
    """Open the datasets as a run does. Collective: all ranks."""
    begun = values_to_go_on_from(checks.config) if world.topology.is_rank_zero else None
    begun = world.communicator.broadcast(begun)
    opened = checks.keep(
        "dataset",
        judging.DATASET_FIX,
        lambda: open_data(checks.config, world, settle(checks.config, begun), None),
    )
    if opened is None:
        checks.skip(["shards", "HDF5 file locking"], "the dataset cannot be opened")
        return None
    decoded = {name: described(each) for name, each in opened.transforms.decoding.all.items()}
    checks.add(judging.judge_dataset(opened.train, opened.validation, decoded))
    _check_shards(checks, opened)
    _check_locking(checks, [shard.path for shard in opened.train.shards])
    return opened


def check_reading(checks: Checks, opened: Data | None, steps: Sequence[StepFacts] | None) -> None:
    """Read real batches, for some seconds. Collective: all ranks."""
    if opened is None:
        checks.skip(["reading"], "the dataset cannot be opened")
        return
    readings = checks.gather(
        "reading",
        judging.READING_FIX,
        lambda: read_batches(opened.train_loader, opened.train.bytes_per_sample),
    )
    if readings is None:
        return
    rate = None
    if steps is not None:
        rate = checks.config.data.global_batch_size / max(step.seconds for step in steps)
    checks.add(judging.judge_reading(readings, rate))


def _check_shards(checks: Checks, opened: Data) -> None:
    looks = checks.topology.local_rank == 0
    unseen = checks.gather(
        "shards", judging.DATASET_FIX, lambda: unseen_shards(opened.train) if looks else None
    )
    if unseen is not None:
        by_host = zip(checks.hosts, unseen, strict=True)
        checks.add(
            judging.judge_visibility({host: each for host, each in by_host if each is not None})
        )


def _check_locking(checks: Checks, paths: Sequence[str]) -> None:
    def try_here() -> tuple[str | None, str, bool] | None:
        if not checks.topology.is_rank_zero:
            return None
        switch = os.environ.get("HDF5_USE_FILE_LOCKING", "").upper()
        return try_lock(paths[0]), filesystem_of(Path(paths[0])), switch in ("FALSE", "0")

    tried = checks.gather("HDF5 file locking", judging.READING_FIX, try_here)
    if tried is not None and tried[0] is not None:
        checks.add(judging.judge_locking(*tried[0]))
