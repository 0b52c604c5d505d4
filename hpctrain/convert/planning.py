"""What packing is to do: which folders, which samples, and what a begun one has to agree with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpctrain.convert.sources.source import Source
from hpctrain.convert.splitting import split_sizes
from hpctrain.data.index import INDEX_NAME, UNFINISHED_NAME, read_index, read_origin
from hpctrain.data.shard_file import SHARD_BYTES, cannot_write, rows_of_shard
from hpctrain.data.storage import Storage
from hpctrain.data.writing import require_vacant
from hpctrain.errors import DatasetError
from hpctrain.utils.files import replace_file
from hpctrain.utils.json_files import SMALL, parse_json, read_whole
from hpctrain.utils.text import plural


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How to pack.

    Attributes:
        splits: fractions by name, each to a folder of its own; empty: all to one folder.
        seed: of the splits, and of the order.
        shuffle: write the samples in a random order.
        shard_bytes: values in one shard, about.
        shard_rows: samples in one shard; None: as many as make `shard_bytes`.
        storage: of the fields.
    """

    splits: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    shuffle: bool = False
    shard_bytes: int = SHARD_BYTES
    shard_rows: int | None = None
    storage: Storage = field(default_factory=Storage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One folder to fill.

    Attributes:
        split: its name; "" if there is only one.
        origin: what decides about every byte of it.
        is_there: True if that was written, whole, before.
    """

    split: str
    folder: Path
    samples: int
    shard_rows: int
    origin: Mapping[str, Any]
    is_there: bool

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_rows)

    def rows_of(self, number: int) -> int:
        """Return how many samples a shard holds; the last one may be short."""
        return min(self.shard_rows, self.samples - number * self.shard_rows)

    def __str__(self) -> str:
        what = f"{plural(self.samples, 'sample')} in {plural(self.shards, 'shard')}"
        return f"{self.split} {what}" if self.split else what


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What rank 0 found and decided, for all ranks."""

    source: Source
    outputs: tuple[Output, ...]


def prepare(source: Source, folder: Path, packing: Packing) -> Plan:
    """Decide what goes where, and mark the folders as unfinished.

    Raises:
        DatasetError: if a filter is not installed, or something else is in one of the folders.
    """
    packing.storage.require_available()
    sizes = split_sizes(source.samples, packing.splits) if packing.splits else {"": source.samples}
    shard_rows = packing.shard_rows or rows_of_shard(
        source.fields, packing.shard_bytes, packing.storage
    )
    outputs = []
    for split, samples in sizes.items():
        origin = {
            "source": source.name,
            "identity": source.identity,
            "samples": source.samples,
            "split": split,
            "splits": dict(packing.splits),
            "seed": packing.seed,
            "shuffle": packing.shuffle,
            "shard_rows": shard_rows,
            "storage": str(packing.storage),
            "chunk_bytes": packing.storage.chunk_bytes,
        }
        path = folder / split if split else folder
        try:
            is_there = _claim(path, origin)
        except OSError as error:
            raise cannot_write(path, error) from error
        outputs.append(
            Output(
                split=split,
                folder=path,
                samples=samples,
                shard_rows=shard_rows,
                origin=origin,
                is_there=is_there,
            )
        )
    return Plan(source=source, outputs=tuple(outputs))


def _claim(folder: Path, origin: Mapping[str, Any]) -> bool:
    """Make a folder ready to be filled, or return True if it has been."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / UNFINISHED_NAME
    if marker.exists():
        _require_same(folder, origin, _begun(marker))
        # What a killed packer was at; nobody else writes here.
        for entry in folder.glob(".shard-*"):
            entry.unlink(missing_ok=True)
        return False
    if (folder / INDEX_NAME).exists() and read_origin(folder) == origin:
        read_index(folder)
        return True
    require_vacant(folder)
    replace_file(marker, (json.dumps(origin) + "\n").encode())
    return False


def _begun(marker: Path) -> object:
    try:
        return parse_json(read_whole(marker, SMALL))
    except ValueError:
        return None


def _require_same(folder: Path, origin: Mapping[str, Any], begun: object) -> None:
    """Check that what was begun in a folder is what is to go on."""
    if not isinstance(begun, dict):
        raise DatasetError(
            f"{folder}: another program is writing a dataset here, or was killed while it did. "
            "Wait for it, or remove the folder"
        )
    for key, value in origin.items():
        if begun.get(key) != value:
            what = (
                "the files of its source, or how they are read, are others now"
                if key == "identity"
                else f"{key} = {json.dumps(value)} was {json.dumps(begun.get(key))} then"
            )
            raise DatasetError(
                f"{folder}: packing was begun here and did not finish, and {what}. Give the same "
                "source and options to go on, or remove the folder to begin anew"
            )
