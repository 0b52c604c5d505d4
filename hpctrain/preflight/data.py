"""The checks of the data: opened, seen by every node, locked, read fast enough."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hpctrain.config.semantics import semantics_of
from hpctrain.data.dataset import Dataset
from hpctrain.data.decoding import described
from hpctrain.data.loading.batch import TrainBatches
from hpctrain.data.loading.map_style.dataset import MapDataset
from hpctrain.data.view import View
from hpctrain.launch.process_group import World
from hpctrain.preflight.checks import Checks
from hpctrain.preflight.compute import StepFacts
from hpctrain.preflight.report import Finding
from hpctrain.training.checkpointing.resume import values_to_go_on_from
from hpctrain.training.data.run_data import Data, open_data
from hpctrain.utils.files import filesystem_of, open_regular
from hpctrain.utils.text import listed, number, plural, size

DATASET_FIX = "correct data.train, data.validation or the task's fields, or write the dataset anew"
READING_FIX = "bring the file back, or write the dataset anew"

_READ_SECONDS = 3.0
_MOST_BATCHES = 50
_MOST_SHARDS = 256


def open_and_check(checks: Checks, world: World) -> Data | None:
    """Open the datasets as a run does. Collective: all ranks."""
    begun = values_to_go_on_from(checks.config) if world.topology.is_rank_zero else None
    begun = world.communicator.broadcast(begun)
    opened = checks.keep(
        "dataset",
        DATASET_FIX,
        lambda: open_data(checks.config, world, semantics_of(checks.config, begun), None),
    )
    if opened is None:
        checks.skip(["shards", "HDF5 file locking"], "the dataset cannot be opened")
        return None
    decoded = {name: described(each) for name, each in opened.transforms.train.decoding.all.items()}
    if isinstance(opened.train, MapDataset):
        checks.add(_judge_objects(opened))
        return opened
    assert not isinstance(opened.validation, MapDataset)
    checks.add(judge_dataset(opened.train, opened.validation, decoded))
    _check_shards(checks, opened.train)
    _check_locking(checks, [shard.path for shard in opened.train.shards])
    return opened


def _judge_objects(opened: Data) -> Finding:
    """Tell what torch Datasets hold."""
    samples = {"train": opened.train.samples}
    if opened.validation is not None:
        samples["validation"] = opened.validation.samples
    return Finding(
        name="dataset", status="pass", fact="; ".join(opened.notes), values={"samples": samples}
    )


def check_reading(checks: Checks, opened: Data | None, steps: Sequence[StepFacts] | None) -> None:
    """Read real batches, for some seconds. Collective: all ranks."""
    if opened is None:
        checks.skip(["reading"], "the dataset cannot be opened")
        return
    if isinstance(opened.train, MapDataset):
        checks.skip(["reading"], "a torch Dataset reads by code of its own")
        return
    readings = checks.gather(
        "reading",
        READING_FIX,
        lambda: read_batches(opened.train_loader, opened.train.bytes_per_sample),
    )
    if readings is None:
        return
    rate = None
    if steps is not None:
        rate = opened.config.data.global_batch_size / max(step.seconds for step in steps)
    checks.add(judge_reading(readings, rate))


def _check_shards(checks: Checks, train: Dataset) -> None:
    looks = checks.topology.local_rank == 0
    unseen = checks.gather("shards", DATASET_FIX, lambda: unseen_shards(train) if looks else None)
    if unseen is not None:
        by_host = zip(checks.hosts, unseen, strict=True)
        checks.add(judge_visibility({host: each for host, each in by_host if each is not None}))


def _check_locking(checks: Checks, paths: Sequence[str]) -> None:
    def try_here() -> tuple[str | None, str, bool] | None:
        if not checks.topology.is_rank_zero:
            return None
        switch = os.environ.get("HDF5_USE_FILE_LOCKING", "").upper()
        return try_lock(paths[0]), filesystem_of(Path(paths[0])), switch in ("FALSE", "0")

    tried = checks.gather("HDF5 file locking", READING_FIX, try_here)
    if tried is not None and tried[0] is not None:
        checks.add(judge_locking(*tried[0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one rank has read: its shares of the first global batches."""

    samples: int
    batches: int
    num_bytes: int
    seconds: float


def read_batches(loader: TrainBatches, bytes_per_sample: int) -> Reading:
    """Read real batches for some seconds.

    Raises:
        DatasetError: naming file, field and row that cannot be read.
    """
    samples = batches = 0
    begin = time.perf_counter()
    try:
        for batch in islice(loader.epoch(0), _MOST_BATCHES):
            samples += batch.size
            batches += 1
            if time.perf_counter() - begin > _READ_SECONDS:
                break
        seconds = time.perf_counter() - begin
    finally:
        loader.close()
    return Reading(
        samples=samples, batches=batches, num_bytes=samples * bytes_per_sample, seconds=seconds
    )


def unseen_shards(dataset: Dataset) -> list[str]:
    """Return what this node does not see of the shards, evenly chosen where there are many."""
    every = max(1, len(dataset.shards) // _MOST_SHARDS)
    wrong = []
    for shard in dataset.shards[::every]:
        try:
            size = Path(shard.path).stat().st_size
            if size != shard.size:
                wrong.append(f"{shard.path}: {size} bytes here, {shard.size} on rank 0")
            elif not os.access(shard.path, os.R_OK):
                wrong.append(f"{shard.path}: not readable here")
        except OSError as error:
            wrong.append(f"{shard.path}: {error.strerror}")
    return wrong


def try_lock(path: str) -> str | None:
    """Return what the lock that HDF5 takes for reading fails of; None: it works."""
    descriptor = open_regular(path)
    try:
        # What HDF5 itself calls; through h5py HDF5_USE_FILE_LOCKING would decide it.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        os.close(descriptor)
    return None


def judge_dataset(
    train: Dataset, validation: Dataset | None, decoded: Mapping[str, str] | None = None
) -> Finding:
    """Tell what the datasets hold, and which fields are read the slow way.

    Args:
        train: to train with.
        validation: to evaluate with.
        decoded: by field, what becomes of its numbers.
    """
    fields = ", ".join(
        f"{name} {field.dtype}{list(field.shape) or ''}" for name, field in train.fields.items()
    )
    if decoded:
        fields += "; decoded: " + "; ".join(f"{name} {how}" for name, how in decoded.items())
    other = "no validation" if validation is None else f"{validation.samples:,} for validation"
    fact = (
        f"{plural(train.samples, 'sample')} in {plural(len(train.shards), 'shard')} ({fields}), "
        f"{other}"
    )
    notes = [note for each in (train, validation) if isinstance(each, View) for note in each.notes]
    fact = "; ".join([fact, *notes])
    slow = train.slow_fields()
    if slow:
        return Finding(
            name="dataset",
            status="warn",
            fact=f"{fact}; only HDF5 can read "
            + listed([f"{name} ({reason})" for name, reason in slow.items()]),
            fix="for speed write it anew by hpctrain.data.Writer, uncompressed and contiguous",
        )
    return Finding(name="dataset", status="pass", fact=fact)


def judge_visibility(unseen: Mapping[str, Sequence[str]]) -> Finding:
    """Name nodes that see other files than rank 0, or none.

    Args:
        unseen: of every host, what it does not see.
    """
    wrong = {host: each for host, each in unseen.items() if each}
    nodes = plural(len(unseen), "node")
    if wrong:
        host, each = next(iter(wrong.items()))
        return Finding(
            name="shards",
            status="fail",
            fact=f"{len(wrong)} of {nodes} do not see the dataset: {host}: {listed(each, 2)}",
            fix="put the data on a file system that all nodes mount, under the same path",
        )
    everywhere = f"all {nodes} see" if len(unseen) > 1 else "the node sees"
    return Finding(name="shards", status="pass", fact=f"{everywhere} every file at its size")


def judge_reading(readings: Sequence[Reading], step_samples_per_second: float | None) -> Finding:
    """Compare the speed of reading with that of a step.

    Args:
        readings: of every rank.
        step_samples_per_second: of all ranks, as measured; None: no step was possible.
    """
    rate = sum(each.samples / max(each.seconds, 1e-9) for each in readings)
    moved = sum(each.num_bytes / max(each.seconds, 1e-9) for each in readings)
    fact = (
        f"{plural(readings[0].batches, 'batch', 'batches')} read, {number(rate)} samples/s "
        f"({size(round(moved))}/s) over all ranks"
    )
    values = {"samples_per_second": rate, "bytes_per_second": moved}
    if step_samples_per_second is not None:
        fact += f"; steps take {number(step_samples_per_second)} samples/s"
        if rate < step_samples_per_second:
            return Finding(
                name="reading",
                status="warn",
                fact=f"{fact}: training will wait for data",
                fix="stage the data to node-local storage, store it uncompressed, or use a file "
                "system with more stripes; a first read is slower than the next",
                values=values,
            )
    return Finding(name="reading", status="pass", fact=fact, values=values)


def judge_locking(failure: str | None, filesystem: str, switched_off: bool) -> Finding:
    """Tell whether HDF5's file locks work. hpctrain reads without them.

    Args:
        failure: what a lock failed of; None: it works.
        filesystem: its type.
        switched_off: by HDF5_USE_FILE_LOCKING.
    """
    if failure is None:
        fact = f"works on the data's {filesystem}; hpctrain reads without locks"
        return Finding(name="HDF5 file locking", status="pass", fact=fact)
    fact = f"does not work on the data's {filesystem}: {failure}; hpctrain reads without locks"
    if switched_off:
        fact += ", and HDF5_USE_FILE_LOCKING switches them off for everything else"
        return Finding(name="HDF5 file locking", status="pass", fact=fact)
    return Finding(
        name="HDF5 file locking",
        status="warn",
        fact=fact,
        fix="export HDF5_USE_FILE_LOCKING=FALSE for your own h5py, also in a transform",
    )
