"""Judges the dataset: seen by every node, readable, fast enough, lockable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpctrain.data.dataset import Dataset
from hpctrain.preflight.finding import Finding
from hpctrain.preflight.probes.dataset import Reading
from hpctrain.utils.text import listed, number, plural, size

DATASET_FIX = "correct data.train, data.validation or the task's fields, or write the dataset anew"
READING_FIX = "bring the file back, or write the dataset anew"


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
    """Hold the speed of reading against that of a step.

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
