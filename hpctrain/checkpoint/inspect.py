"""Checkpoints listed, verified and compared from the command line, without torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.checkpoint.export import best_ones, whole_tensors
from hpctrain.checkpoint.format import (
    CONFIG,
    META,
    MODEL,
    TRAINING,
    check_file,
    is_run,
    newest_first,
    read_file,
    read_meta,
    resolved,
)
from hpctrain.checkpoint.safetensors_files import RawTensor
from hpctrain.errors import CheckpointError
from hpctrain.utils.run_folder import CHECKPOINTS
from hpctrain.utils.text import first_lines, plural, printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_SHOWN = 20


def listed(run: Path) -> str:
    """Return a line for every checkpoint of a run, the oldest first.

    Raises:
        CheckpointError: if there is none.
    """
    latest, ranks = _latest(run), {best.step: rank for rank, best in enumerate(best_ones(run), 1)}
    lines = []
    for path in _of_run(run):
        try:
            meta = read_meta(path)
        except CheckpointError as error:
            lines.append(f"  {path.name}  {error}")
            continue
        size = sum(facts["bytes"] for facts in meta["files"].values())
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime((path / META).stat().st_mtime))
        metrics = meta["metrics"] or {}
        shown = [f"{printable(name)} {value:.6g}" for name, value in metrics.items()]
        if (rank := ranks.get(meta["step"])) is not None:
            shown.append("best" if rank == 1 else f"best {rank}")
        shown += ["evaluation weights too"] if "evaluation" in meta.get("weights", ()) else []
        shown += ["latest"] if path.name == latest else []
        lines.append("  ".join([f"  {path.name}", f"{size / 1e6:10,.1f} MB", saved, *shown]))
    return "\n".join([f"{run}: {plural(len(lines), 'checkpoint')}", *lines])


def verified(path: Path) -> str:
    """Compare every byte of a checkpoint, or of all of a run, with its checksums.

    Returns:
        What to say where all of them are whole.

    Raises:
        CheckpointError: naming each that is not.
    """
    paths = _of_run(path) if is_run(path) else [path]
    good, bad, total = [], [], 0
    for each in paths:
        try:
            meta = read_meta(each)
            total += sum(check_file(each, name, meta) for name in meta["files"])
            good.append(f"  {each.name}  whole")
        except CheckpointError as error:
            bad.append(str(error))
    if bad:
        raise CheckpointError(
            "\n".join([f"{len(bad)} of {len(paths)} checkpoints of {path} are not whole:", *bad])
        )
    return "\n".join([f"{path}: {total / 1e6:,.1f} MB compared with checksums", *good])


def compared(first: Path, second: Path | None) -> str:
    """Return in what two checkpoints differ: config, names, shapes, numbers.

    Args:
        first: a checkpoint, or a run, whose newest is meant.
        second: another one; None: the checkpoint of the first run before its newest.

    Raises:
        CheckpointError: if one of them is not whole, or there is no second.
    """
    if second is None:
        paths = _of_run(first)
        if len(paths) < 2:
            raise CheckpointError(f"{first} has one checkpoint: name a second one to compare it")
        before, after = paths[-2:]
    else:
        before, after = resolved(first), resolved(second)
    lines = [f"{before} and {after}:"]
    lines += [f"  config  {line}" for line in _config_changes(before, after)]
    for file in (MODEL, TRAINING):
        lines += _tensor_changes(file, before, after)
    return "\n".join(lines if lines[1:] else [f"{before} and {after} are equal bit for bit"])


def _of_run(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = list(newest_first(run / CHECKPOINTS))[::-1]
    if not found:
        raise CheckpointError(f"{run} has no checkpoints: is it the folder of a run?")
    return found


def _latest(run: Path) -> str | None:
    try:
        return resolved(run).name
    except CheckpointError:
        return None


def _flattened(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of nested tables with dots between, and their values."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def config_changes(before: str, after: str) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two configs differ, with both values; None where one has none."""
    ours, theirs = (dict(_flattened(tomllib.loads(text))) for text in (before, after))
    return {
        key: (ours.get(key), theirs.get(key))
        for key in [*ours, *(key for key in theirs if key not in ours)]
        if ours.get(key) != theirs.get(key)
    }


def _config_changes(before: Path, after: Path) -> list[str]:
    contents = [read_file(path, CONFIG, read_meta(path)) for path in (before, after)]
    try:
        changes = config_changes(*(content.decode("utf-8") for content in contents))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{before} or {after}: {CONFIG} is damaged: {error}") from error
    return [
        f"{key}: {' and '.join('not set' if value is None else str(value) for value in values)}"
        for key, values in changes.items()
    ]


def _tensor_changes(file: str, before: Path, after: Path) -> list[str]:
    kind = file.removesuffix(".safetensors")
    ours, theirs = (whole_tensors(path, file, read_meta(path)) for path in (before, after))
    lines = [
        f"  {kind}  {printable(name)}: only in {before.name}" for name in ours if name not in theirs
    ]
    lines += [
        f"  {kind}  {printable(name)}: only in {after.name}" for name in theirs if name not in ours
    ]
    both = [name for name in ours if name in theirs]
    changed = []
    for name in both:
        line = _difference(ours[name], theirs[name])
        if line is not None:
            changed.append(f"{printable(name)}: {line}")
    lines += first_lines(changed, _SHOWN, f"  {kind}  ")
    if lines:
        equal = len(both) - len(changed)
        lines.append(f"  {kind}  {equal} of {len(both)} tensors in both are equal")
    return lines


def _difference(ours: RawTensor, theirs: RawTensor) -> str | None:
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return f"{ours.dtype} {list(ours.shape)} and {theirs.dtype} {list(theirs.shape)}"
    found = difference(ours, theirs)
    if found is None:
        return None
    numbers = "" if found.largest is None else f", by at most {found.largest:.3g}"
    relative = "" if found.relative is None else f", {found.relative:.3g} of its norm"
    return f"{found.differing:,} of {found.elements:,} elements differ{numbers}{relative}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How one tensor differs from another of its name.

    Attributes:
        differing: elements, of `elements`.
        largest: absolute difference of any two elements; None where numpy has no such numbers.
        relative: norm of the difference, as a part of the norm of the first.
    """

    differing: int
    elements: int
    largest: float | None
    relative: float | None


def difference(first: RawTensor, second: RawTensor) -> Difference | None:
    """Compare two tensors of the same dtype and shape; None if they are equal bit for bit."""
    if first.data == second.data:
        return None
    ours, theirs = first.values(), second.values()
    if ours is None or theirs is None:
        return Difference(differing=1, elements=1, largest=None, relative=None)
    bytes_of = [np.frombuffer(tensor.data, np.uint8) for tensor in (first, second)]
    unequal = int(np.count_nonzero(bytes_of[0] != bytes_of[1]))
    wide = np.complex128 if np.iscomplexobj(ours) else np.float64
    before, after = ours.astype(wide), theirs.astype(wide)
    with np.errstate(invalid="ignore", over="ignore"):
        change = np.abs(after - before)
        norm = float(np.linalg.norm(before))
        relative = float(np.linalg.norm(change)) / norm if norm else None
        differing = int(np.count_nonzero(~(before == after)))
        largest = float(change.max())
    return Difference(
        differing=differing or min(unequal, before.size),
        elements=before.size,
        largest=largest,
        relative=relative,
    )
