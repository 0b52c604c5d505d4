"""Shards held against what an index or a catalogue says of them, before a run trusts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpctrain.data.coding import PLAIN, Coding
from hpctrain.data.dataset import Dataset, Field, Layout, Shard
from hpctrain.data.finding.discovery import inspect_file
from hpctrain.data.finding.view import Part, View
from hpctrain.errors import DatasetError
from hpctrain.utils.files import file_checksum


def verify_share(datasets: Sequence[Dataset], rank: int, world_size: int) -> None:
    """Hold a rank's share of the shards against what is listed of them; it reads them whole.

    Bytes against their checksums; and rows, shapes, dtypes and places of the fields, which lead
    readers past HDF5, against what HDF5 says of the file.

    Raises:
        DatasetError: naming the first that is not what it was, or has no checksum.
    """
    listed: dict[str, list[tuple[Shard, Part]]] = {}
    for part in (part for dataset in datasets for part in _parts(dataset)):
        for shard in part.dataset.shards:
            listed.setdefault(shard.path, []).append((shard, part))
    for path in sorted(listed)[rank::world_size]:
        _verify(listed[path][0][0])
        for shard, part in listed[path]:
            fields = part.dataset.fields
            found = inspect_file(path, list(fields), part.axis)
            problems = unlike_listed(shard, fields, *found)
            if problems:
                raise DatasetError(f"{problems[0]}. {_REMAKE}")


_REMAKE = "Make the index anew with `python -m hpctrain data index`, or bring the file back"


def unlike_listed(
    listed: Shard,
    listed_fields: Mapping[str, Field],
    found: Shard,
    found_fields: Mapping[str, Field],
) -> list[str]:
    """Return how a file differs from what an index or a catalogue says of it."""
    problems = []
    if found.samples != listed.samples:
        problems.append(f"{found.path}: {found.samples} rows, the index says {listed.samples}")
    for name, about in listed_fields.items():
        place = f'{found.path}: field "{name}"'
        if found_fields[name] != about:
            there = describe(found_fields[name])
            problems.append(f"{place} is {there}, the index says {describe(about)}")
        elif _where(found.layouts[name]) != _where(listed.layouts[name]):
            there, said = (_where(shard.layouts[name]) for shard in (found, listed))
            problems.append(f"{place} {there}, the index says that it {said}")
        elif listed.codings is not None and _coding(found, name) != _coding(listed, name):
            problems.append(
                f"{place}: its attributes say otherwise how to decode it than the index does: make "
                "that anew with `python -m hpctrain data index`"
            )
    return problems


def _coding(shard: Shard, name: str) -> Coding:
    return (shard.codings or {}).get(name, PLAIN)


def describe(about: Field | None) -> str:
    """Return what a field is, in words."""
    return "not there" if about is None else f"{about.dtype} of shape {about.shape}"


def _where(layout: Layout) -> str:
    """Return where the rows are, in words that differ if readers go elsewhere."""
    begin = layout.base if layout.offset is None else layout.offset
    if begin is not None:
        return f"begins at byte {begin}"
    return f"is in chunks of {layout.chunk_rows} rows"


def _parts(dataset: Dataset) -> Sequence[Part]:
    return dataset.parts if isinstance(dataset, View) else [Part(dataset)]


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
