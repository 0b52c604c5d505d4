"""What a dataset holds, for people and for scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpctrain.convert.sources.indexed import read_attributes
from hpctrain.data.dataset import Dataset
from hpctrain.data.decoding import decodings, described
from hpctrain.data.finding.times import covered
from hpctrain.data.index import INDEX_NAME
from hpctrain.data.stats import STATS_NAME
from hpctrain.data.storage import HDF5_FAILURES, open_hdf5_file
from hpctrain.errors import DatasetError
from hpctrain.utils.text import plural, printable, table

MOST_NOTES = 20
"""Attributes of a field that are shown; `--json` has them all."""
_MARKS = {"index": "indexed", "checksums": "checksums", "statistics": "statistics"}


def describe(dataset: Dataset) -> dict[str, Any]:
    """Return the facts of a dataset; all of them are JSON.

    Raises:
        DatasetError: if the first shard cannot be read.
    """
    attributes = read_attributes(dataset)
    times = [name for name, said in attributes.items() if " since " in str(said.get("units"))]
    periods = _periods(dataset, times) if times else {}
    decoded = {name: _decoded(dataset, name) for name in dataset.fields}
    folder = Path(dataset.source)
    return {
        "source": dataset.source,
        "samples": dataset.samples,
        "shards": len(dataset.shards),
        "bytes": sum(shard.size for shard in dataset.shards),
        "bytes_per_sample": dataset.bytes_per_sample,
        "fingerprint": dataset.fingerprint,
        "indexed": (folder / INDEX_NAME).exists(),
        "checksums": all(shard.checksum is not None for shard in dataset.shards),
        "statistics": (folder / STATS_NAME).exists(),
        "fields": {
            name: {
                "shape": list(field.shape),
                "dtype": field.dtype.name,
                "bytes": field.row_bytes * dataset.samples,
                "layout": _layout(dataset, name),
                "chunk_rows": max(s.layouts[name].chunk_rows for s in dataset.shards),
                "decoded": decoded[name],
                "period": periods.get(name),
                "attributes": {key: _plain(value) for key, value in attributes[name].items()},
            }
            for name, field in dataset.fields.items()
        },
    }


def description(facts: Mapping[str, Any]) -> str:
    """Return the facts as text, several lines."""
    values = facts["samples"] * facts["bytes_per_sample"]
    samples, shards = plural(facts["samples"], "sample"), plural(facts["shards"], "shard")
    lines = [
        f"{facts['source']}: {samples} in {shards}",
        f"  files {facts['bytes']:,} bytes, values {values:,} ({facts['bytes_per_sample']:,} each)",
        *(f"  {key}: {_yes(facts[name])}" for key, name in _MARKS.items()),
        f"  fingerprint: {facts['fingerprint']}",
    ]
    rows = [("field", "dtype", "shape", "stored", "")]
    for name, field in facts["fields"].items():
        shape = " x ".join(str(size) for size in field["shape"]) or "one value"
        attributes = list(field["attributes"].items())
        notes = [f"{_short(key)}: {_short(value)}" for key, value in attributes[:MOST_NOTES]]
        if attributes[MOST_NOTES:]:
            notes.append(f"and {len(attributes) - MOST_NOTES:,} more")
        if field["period"] is not None:
            notes.insert(0, field["period"])
        if field["decoded"] is not None:
            notes.insert(0, f"decoded {field['decoded']}")
        rows.append((name, field["dtype"], shape, field["layout"], ", ".join(notes)))
    return "\n".join([*map(printable, lines), *(f"  {line}" for line in table(rows))])


def _decoded(dataset: Dataset, name: str) -> str | None:
    """Return how the numbers of a field become values, or why they cannot; None: they are."""
    try:
        found = decodings([dataset.select([name])])[0].get(name)
    except DatasetError as error:
        return str(error)
    return None if found is None else described(found)


def _periods(dataset: Dataset, names: Sequence[str]) -> dict[str, str | None]:
    """Return from when to when the times of a dataset are, by field.

    Raises:
        DatasetError: if its first or last file cannot be read.
    """
    ends = [dataset.shards[index].path for index in (0, -1)]
    try:
        with open_hdf5_file(ends[0]) as first, open_hdf5_file(ends[1]) as last:
            return {name: covered(first[name], last[name]) for name in names}
    except HDF5_FAILURES as error:
        raise DatasetError(f"{ends[1]}: HDF5 cannot read this file: {error}") from error


def _layout(dataset: Dataset, name: str) -> str:
    kinds = {shard.layouts[name].reason or "contiguous" for shard in dataset.shards}
    return " / ".join(sorted(kinds))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    # numpy's scalars and arrays, complex ones as text
    plain = value.tolist() if hasattr(value, "tolist") else value
    return plain if isinstance(plain, str | int | float | list) else str(plain)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _yes(is_there: bool) -> str:
    return "yes" if is_there else "no"
