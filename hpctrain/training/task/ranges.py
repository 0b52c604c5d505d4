"""Whole numbers that index something, such as classes and tokens, and are out of range.

A CPU says so at once. A GPU says "device-side assert triggered", some steps later, of no field and
no sample, and computes nothing from then on. So they are looked at where that costs no wait of its
own, in the dry run and after a step that was logged; what an assertion was about is found on the
host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from hpctrain.data.loading.batch import TrainBatches
from hpctrain.errors import HpctrainError, TrainingError
from hpctrain.training.nonfinite import listed_rows

_WORDS = ("device-side assert", "out of range", "out of bounds")

Batch = tuple[int, int, int]
"""Epoch, position of the first sample in it, and samples of all ranks."""


def check_range(field: str, values: Tensor, count: int, ignored: int | None = None) -> None:
    """Look for indices that are none of `count`, counted from 0. Waits for the device.

    Args:
        field: that they are of.
        values: whole numbers.
        count: of what they index.
        ignored: one that is allowed besides.

    Raises:
        TrainingError: naming the field, and what it holds.
    """
    bad = (values < 0) | (values >= count)
    if ignored is not None:
        bad &= values != ignored
    if bad.any():
        wrong = values[bad]
        raise TrainingError(out_of_range(field, wrong.min().item(), wrong.max().item(), count))


def out_of_range(field: str, least: float, most: float, count: int) -> str:
    """Return what to say of a field with numbers that index nothing."""
    held = f"{least}" if least == most else f"{least} to {most}"
    return (
        f'the field "{field}" holds {held}, and the model has {count} classes or tokens, 0 to '
        f"{count - 1}. Correct the data, the number of classes or tokens (model.num_classes, "
        "model.vocabulary, or what it is called in [model]), or task.ignore_index"
    )


@contextmanager
def ranges_checked(task: Any) -> Iterator[None]:
    """Have a task that can do so look at ranges in the body."""
    look_at_ranges(task, looks=True)
    try:
        yield
    finally:
        look_at_ranges(task, looks=False)


def look_at_ranges(task: Any, *, looks: bool) -> None:
    """Say whether a task that can do so looks at ranges from now on, which waits for the device."""
    if hasattr(task, "checks_ranges"):
        task.checks_ranges = looks


@contextmanager
def explained_indices(
    task: Any, loader: TrainBatches, batches: Callable[[], Sequence[Batch]]
) -> Iterator[None]:
    """Raise what the body raises about an index, with the samples it came from.

    Args:
        task: its `index_ranges`, if it has them, are by field how many things the numbers index,
            and a number that is allowed besides, or None.
        loader: of the batches.
        batches: returns those that may be under way, oldest first.
    """
    try:
        yield
    except (RuntimeError, IndexError) as error:
        text = str(error)
        if isinstance(error, HpctrainError) or not any(word in text.lower() for word in _WORDS):
            raise
        ranges = getattr(task, "index_ranges", {})
        found = _find(ranges, loader, batches())
        if found is not None:
            raise TrainingError(found) from error
        if _WORDS[0] not in text:
            raise  # the traceback says where
        raise TrainingError(
            "the device ended with a device-side assertion: most often a class or a token that the "
            f"model has no place for{_looked_at(ranges)}. CUDA_LAUNCH_BLOCKING=1 has the traceback "
            'point at the call, and launch.device = "cpu" says what it is'
        ) from error


def _looked_at(ranges: Mapping[str, Any]) -> str:
    names = " and ".join(f'"{name}"' for name in ranges)
    return f"; {names} as stored is not it" if names else ""


def _find(
    ranges: Mapping[str, tuple[int, int | None]], loader: TrainBatches, batches: Sequence[Batch]
) -> str | None:
    """Return what the first batch holds that is out of range, read again on the host."""
    if not ranges:
        return None
    for epoch, start, size in batches:
        try:
            rows = loader.rows(epoch, start, start + size)
            values = loader.read(rows) if len(rows) else {}
        except HpctrainError:
            continue
        for field, (count, ignored) in ranges.items():
            if field not in values:
                continue
            numbers = np.asarray(values[field]).reshape(len(rows), -1)
            bad = (numbers < 0) | (numbers >= count)
            if ignored is not None:
                bad &= numbers != ignored
            if bad.any():
                wrong = numbers[bad]
                told = out_of_range(field, wrong.min().item(), wrong.max().item(), count)
                return f"{listed_rows(loader, rows[bad.any(axis=1)])}: {told}"
    return None
