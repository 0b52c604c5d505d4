"""Checkpoints back from disk: verified against their checksums, or refused with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpctrain.checkpoint.format import (
    CONFIG,
    MODEL,
    TRAINING,
    VALUES,
    Spread,
    UnreadableError,
    join,
    newest_first,
    part_name,
    put_back,
    read_file,
    read_meta,
    resolved,
)
from hpctrain.checkpoint.tensors import joined_pairs, tensors_of
from hpctrain.errors import CheckpointError
from hpctrain.utils.json_files import parse_json
from hpctrain.utils.text import first_lines, plural, printable

_SHOWN = 8
_ANEW = 'or begin anew with checkpoint.resume = "never", which keeps them under another name'

_OF_WRAPPERS = frozenset(
    {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
"""What torch.compile, DataParallel and its like, FSDP and activation checkpointing add."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint in host memory, every byte compared with its checksum.

    Attributes:
        rows: tensors that were left on disk, see `load_outline`; None: there are none.
    """

    path: Path
    step: int
    model: dict[str, Tensor]
    training: dict[str, Tensor]
    values: dict[str, Any]
    config_toml: str
    rows: Rows | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The tensors of a checkpoint that are still on disk, to be read as far as they are needed.

    Attributes:
        path: folder of the checkpoint.
        spread: which part has which rows.
        aliases: further names of tensors, and the names that they are stored under.
        stored: names of tensors in the files, where they differ from their names here.
    """

    path: Path
    spread: Spread
    aliases: Mapping[str, str]
    stored: Mapping[str, str] = field(default_factory=dict)

    def shapes(self, file: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the whole tensors of a file, `model.safetensors` or the other."""
        called = {stored: name for name, stored in self.stored.items()}
        shapes = {called.get(name, name): s for name, s in self.spread.shapes[file].items()}
        if file == MODEL:
            stored = {name: first for name, first in self.aliases.items() if first in shapes}
            shapes |= {name: shapes[first] for name, first in stored.items()}
        return shapes

    def read(self, file: str, wanted: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        """Return rows of tensors, on the host.

        Args:
            file: `model.safetensors` or `training.safetensors`.
            wanted: first row and the one after the last, by name.

        Raises:
            CheckpointError: if they cannot be read.
        """
        pieces: dict[str, list[Tensor]] = {name: [] for name in wanted}
        with ExitStack() as stack:
            opened: dict[int, Any] = {}
            for called, (first, stop) in wanted.items():
                name = self.stored.get(called, called)
                for number, begin, end in self.spread.pieces(file, name, first, stop):
                    part = self.path / part_name(file, number)
                    try:
                        if number not in opened:
                            opened[number] = stack.enter_context(safe_open(part, framework="pt"))
                        found = {name: opened[number].get_slice(name)[begin:end]}
                        pieces[called].append(joined_pairs(found, opened[number].metadata())[name])
                    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
                        raise CheckpointError(
                            f"{part} cannot be read: {printable(str(error))}"
                        ) from error
        return {name: torch.cat(rows) for name, rows in pieces.items() if rows}


def load(path: Path) -> Loaded:
    """Read a checkpoint, whole.

    Raises:
        CheckpointError: if any file of it is missing or is not what was written.
    """
    path = resolved(path)
    meta = read_meta(path)
    spread = Spread.of(meta)

    def tensors(file: str) -> dict[str, Tensor]:
        def read(name: str) -> dict[str, Tensor]:
            return tensors_of(read_file(path, name, meta), path / name)

        if spread is None:
            return read(file)
        return join(spread, file, read, lambda rows, shape: torch.cat(list(rows)).reshape(shape))

    model = tensors(MODEL)
    for name, first in meta["aliases"].items():
        if first not in model:
            raise CheckpointError(f"{path} is damaged: {name} is another name of {first}: no such")
        model[name] = model[first]
    return Loaded(
        path=path,
        step=meta["step"],
        model=model,
        training=tensors(TRAINING),
        values=_values(path, meta),
        config_toml=_config(path, meta),
    )


def load_outline(path: Path, compare: Callable[[Path, Mapping[str, Any]], None]) -> Loaded:
    """Read of a checkpoint what is not spread over its parts; all of one of a single writer.

    Args:
        path: folder of the checkpoint.
        compare: check of all its files against its meta.json, which raises where they differ.

    Raises:
        CheckpointError: if any file of it is missing or is not what was written.
    """
    path = resolved(path)
    meta = read_meta(path)
    spread = Spread.of(meta)
    if spread is None:
        return load(path)
    compare(path, meta)

    def tensors(file: str) -> dict[str, Tensor]:
        name = part_name(file, 0)
        part = tensors_of(read_file(path, name, meta), path / name)
        return {name: item for name, item in part.items() if name not in spread.shapes[file]}

    model = tensors(MODEL)
    model |= {name: model[first] for name, first in meta["aliases"].items() if first in model}
    return Loaded(
        path=path,
        step=meta["step"],
        model=model,
        training=tensors(TRAINING),
        values=_values(path, meta),
        config_toml=_config(path, meta),
        rows=Rows(path=path, spread=spread, aliases=meta["aliases"]),
    )


def load_values(path: Path) -> dict[str, Any]:
    """Read the values of a checkpoint that are not tensors.

    Raises:
        CheckpointError: if it is not what was written.
    """
    path = resolved(path)
    return _values(path, read_meta(path))


def _values(path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    content = read_file(path, VALUES, meta)
    try:
        values = parse_json(content)
        if not isinstance(values, dict):
            raise ValueError(f"it is {type(values).__name__}, not an object")
    except ValueError as error:
        raise CheckpointError(f"{path / VALUES} is damaged: {error}") from error
    return values


def _config(path: Path, meta: Mapping[str, Any]) -> str:
    try:
        return read_file(path, CONFIG, meta).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path / CONFIG} is damaged: {error}") from error


def load_newest(
    checkpoints: Path, warn: Callable[[str], None], read: Callable[[Path], Loaded] = load
) -> Loaded | None:
    """Read the newest whole checkpoint of a folder; None if there is none at all.

    Args:
        checkpoints: the folder of all of them.
        warn: sink of a line on every newer one that is damaged.
        read: reader of one.

    Raises:
        CheckpointError: if the folder cannot be used, none of its checkpoints is whole, or one
            that may be whole cannot be read: to begin anew would be the loss of them all.
    """
    try:
        put_back(checkpoints)
    except OSError as error:
        raise UnreadableError(f"cannot use {checkpoints}: {error}") from error
    damaged = []
    for path in newest_first(checkpoints):
        try:
            return read(path)
        except UnreadableError as error:
            raise UnreadableError(f"{error}. It may be whole: make it readable, {_ANEW}") from error
        except CheckpointError as error:
            damaged.append(str(error))
            warn(f"skipped: {error}")
    if damaged:
        reasons = "".join(f"\n  {line}" for line in first_lines(damaged, _SHOWN))
        raise CheckpointError(
            f"none of the {plural(len(damaged), 'checkpoint')} in {checkpoints} is whole: repair "
            f"or bring back one of them, {_ANEW}{reasons}"
        )
    return None


def fitting_names(wanted: Iterable[str], there: Iterable[str]) -> dict[str, str]:
    """Return the names that tensors should have, by the ones they have, where these differ.

    Args:
        wanted: names in the model.
        there: names in a file.

    Returns:
        Of those that are no other than what wrappers have put into them, without ambiguity.
    """
    wanted, there = set(wanted), set(there)
    here, given = ({name: _bare(name) for name in names} for names in (wanted, there))
    free = {bare: name for name, bare in here.items() if name not in there}
    counts = [Counter(here.values()), Counter(given.values())]
    return {
        name: free[bare]
        for name, bare in given.items()
        if name not in wanted and bare in free and all(count[bare] == 1 for count in counts)
    }


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _OF_WRAPPERS)
