"""Records of a run: lines of metrics.jsonl, read again and cut back; images and histograms.

Without torch, and without numpy on its own path.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from hpctrain.utils.files import open_file, replacing
from hpctrain.utils.json_files import parse_json

Record = Mapping[str, Any]
"""A JSON object with at least "kind" and "step"; values are JSON, or floats that are not finite."""

NONFINITE = "nonfinite"
"""Key of a line that says which of its nulls stand for what: {"seconds.data": "inf"}."""

WALL_TIME = "wall_time"
"""Key of the second since 1970 at which a record was written, as TensorBoard calls it."""

_TAIL_BYTES = 2**18
"""Of metrics.jsonl, in which the newest records are looked for."""

LONGEST_LINE = 2**22
"""Bytes of a line of ours, at most; a longer one is damage, and is not read into memory."""

_LARGEST = 2**63
_OUT_OF_RANGE = re.compile(rb"\d{25}|\d[eE]\+?\d{3}|NaN|Infinity")
"""Where this is found numbers are looked at one by one: next to never, and that is slow."""


def to_line(record: Record) -> bytes:
    """Return a record as one line of strict JSON, floats to the last bit.

    JSON has no NaN and no infinity: each becomes null, so that a column stays one of numbers, and
    is named under "nonfinite", so that nothing is lost.
    """
    try:
        line = _ENCODE(record)
    except (TypeError, ValueError):  # not finite, or a mapping that is no dict
        nonfinite: dict[str, str] = {}
        finite = _finite(record, "", nonfinite)
        line = _ENCODE({**finite, NONFINITE: nonfinite} if nonfinite else finite)
    return line.encode() + b"\n"


_ENCODE = json.JSONEncoder(allow_nan=False).encode


def from_line(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a whole line with kind and step; None if it is torn or damaged.

    All numbers in it are finite, and integers have 64 bits: readers may add them up and draw them.
    """
    if not line.endswith(b"\n"):
        return None
    try:
        record = parse_json(line)
        if _OUT_OF_RANGE.search(line):
            json.loads(line, parse_float=_finite_number, parse_int=_integer, parse_constant=_refuse)
    except (ValueError, OverflowError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    return record if type(record.get("step")) is int else None


def flat(record: Record) -> dict[str, Any]:
    """Return the record without nesting: {"seconds": {"data": 1.0}} is {"seconds.data": 1.0}.

    Numbers that were not finite have their names, "nan", "inf" and "-inf", again.
    """
    flattened: dict[str, Any] = {}
    _flatten(record.items(), "", flattened)
    if NONFINITE not in record:
        return flattened
    prefix = f"{NONFINITE}."
    named = {key: value for key, value in flattened.items() if key.startswith(prefix)}
    for key, name in named.items():
        del flattened[key]
        flattened[key.removeprefix(prefix)] = name
    return flattened


def numbers(record: Record) -> dict[str, float]:
    """Return what can be drawn over steps: "seconds.data" is "seconds/data"."""
    return {
        key.replace(".", "/"): value
        for key, value in flat(record).items()
        if key not in ("step", WALL_TIME)
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
    }


def tagged(record: Record) -> dict[str, float]:
    """Return the same by the names that they have beside those of other records: "train/loss"."""
    group = record.get("split", record["kind"])
    return {f"{group}/{key}": value for key, value in numbers(record).items()}


def to_row(values: Sequence[Any]) -> bytes:
    """Return one line of a CSV file; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([_cell(value) for value in values])
    return text.getvalue().encode()


def _finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is not a number of ours")
    return value


def _integer(text: str) -> int:
    value = int(text)
    if abs(value) > _LARGEST:
        raise ValueError(f"{text:.20} is not a number of ours")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")


def _finite(value: Any, path: str, nonfinite: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item, _join(path, key), nonfinite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item, _join(path, i), nonfinite) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[path] = str(float(value))
        return None
    return value


def _flatten(items: Iterable[tuple[object, Any]], path: str, flattened: dict[str, Any]) -> None:
    """Add what is nested, by keys that begin with `path`."""
    for key, item in items:
        name = f"{path}{key}"
        if type(item) in _LEAVES:
            flattened[name] = item
        elif isinstance(item, Mapping):
            _flatten(item.items(), f"{name}.", flattened)
        elif isinstance(item, (list, tuple)):
            _flatten(enumerate(item), f"{name}.", flattened)
        else:
            flattened[name] = item


_LEAVES = frozenset({int, float, str, bool, type(None)})
"""Types of nearly all values: asked in every record, and faster than what they might be."""


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _cell(value: Any) -> Any:
    # As in JSON; a line feed in a text would cut the row for line by line readers.
    if isinstance(value, bool):
        return "true" if value else "false"
    return " ".join(value.split()) if isinstance(value, str) else value


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file from where it stands; the start alone of what is too long for one.

    Only whole lines end with a line feed.
    """
    while line := file.readline(LONGEST_LINE):
        yield line
        while len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE)


def read_records(path: Path) -> Iterable[dict[str, Any]]:
    """Yield the whole records of a metrics.jsonl, in its order.

    Raises:
        OSError: if it cannot be read.
    """
    with open_file(path) as file:
        for line in lines_of(file):
            if (record := from_line(line)) is not None:
                yield record


def newest_records(path: Path, tail_bytes: int = _TAIL_BYTES) -> dict[str, dict[str, Any]]:
    """Return the newest records of training and of each evaluation, flat; none without a file.

    Args:
        path: of a metrics.jsonl.
        tail_bytes: of its end, in which they are looked for.
    """
    try:
        with open_file(path) as file:
            file.seek(max(0, path.stat().st_size - tail_bytes))
            lines = file.read(tail_bytes).splitlines(keepends=True)
    except OSError:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for line in reversed(lines):
        record = from_line(line)
        if record is not None:
            found.setdefault(str(record.get("split", record["kind"])), flat(record))
    return dict(sorted(found.items()))


def cut_back(path: Path, last_step: int, again: str | None = None) -> int:
    """Take from a metrics.jsonl what lies after a step, and torn lines; return how many lines.

    Records of the kind `again` at the step itself go too: they are about to be written once more.

    Raises:
        OSError: if it cannot be read or replaced; it is then as it was.
    """

    def kept(line: bytes) -> bool:
        record = from_line(line)
        if record is None or record["step"] > last_step:
            return False
        return again is None or record["step"] < last_step or record["kind"] != again

    with open_file(path) as file:
        num_cut = sum(not kept(line) for line in lines_of(file))
    if num_cut:
        with open_file(path) as old, replacing(path) as new:
            new.writelines(filter(kept, lines_of(old)))
    return num_cut


BINS = 64
"""Of a histogram."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image of a step.

    Attributes:
        name: with what it belongs to, such as "validation/forecast".
        wall_time: seconds since 1970.
        height: rows.
        width: pixels of a row.
        channels: 1 grey, 3 colours, 4 with an opacity.
        pixels: bytes, row by row.
    """

    name: str
    step: int
    wall_time: float
    height: int
    width: int
    channels: int
    pixels: bytes

    def png(self) -> bytes:
        """Return it as a PNG file."""
        row = self.width * self.channels
        lines = b"".join(
            b"\0" + self.pixels[start : start + row] for start in range(0, len(self.pixels), row)
        )
        colour = {1: 0, 3: 2, 4: 6}[self.channels]
        head = struct.pack(">IIBBBBB", self.width, self.height, 8, colour, 0, 0, 0)
        # What a step waits for: the fastest level is a tenth of the default's time.
        parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in parts
        )

    def array(self) -> Any:
        """Return it as an array, (height, width, channels) uint8."""
        import numpy as np

        flat = np.frombuffer(self.pixels, np.uint8)
        return flat.reshape(self.height, self.width, self.channels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How many of some values there are in intervals of equal width.

    Attributes:
        name: with what it belongs to, such as "train/weights".
        wall_time: seconds since 1970.
        edges: of the intervals, one more than there are counts.
        counts: of values.
        total: sum of the values.
        squares: sum of their squares.
    """

    name: str
    step: int
    wall_time: float
    edges: Sequence[float]
    counts: Sequence[int]
    total: float
    squares: float
