"""A thousand damaged shards: what reading them ends in, with and without a look at checksums.

    python benchmarks/fuzz.py --shards 1000

Each shard has bytes flipped, is cut, or has other bytes for some of its own, and is read in three
ways: by its index and held against its checksum first (`data verify`, data.verify = "start"); by
its index alone; and as plain HDF5, without an index. The exit code is 1 if one of the first way
crashed, hung, failed in other words than those that name the shard, or gave other values than were
written.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpctrain.convert.parallel import each, processors
from hpctrain.data import Storage, Writer, open_dataset
from hpctrain.data.dataset import Dataset
from hpctrain.data.files.discovery import join_files, verify_share
from hpctrain.data.reading.rows import open_rows
from hpctrain.errors import DatasetError

ROWS = 30
STORAGES = {
    "contiguous": Storage(),
    "chunked": Storage(chunk_bytes=800),
    "gzip": Storage("gzip", chunk_bytes=800),
}
WAYS = ("verified", "by its index", "as plain HDF5")
OUTCOMES = ("equal", "named", "other values", "unexplained", "crashed or hung")
LIMIT_SECONDS = 30


class Task(NamedTuple):
    """One damaged shard, to be read in one way."""

    dataset: Dataset
    way: str
    values: dict[str, bytes]


def main() -> int:
    """Damage, read, and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=processors())
    parser.add_argument("--json", action="store_true")
    parsed = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, storage) in enumerate(STORAGES.items()):
            shards = len(range(number, parsed.shards, len(STORAGES)))
            tasks = damaged_shards(Path(folder, name), storage, shards, parsed.seed + number)
            for index, outcome in each(read, tasks, parsed.jobs):
                ended = OUTCOMES[-1] if isinstance(outcome, BrokenProcessPool) else outcome
                counts.setdefault(f"{name}, {tasks[index].way}", Counter())[ended] += 1
    if parsed.json:
        sys.stdout.write(f"{json.dumps(counts)}\n")
    else:
        sys.stdout.write(f"{'':28}" + "".join(f"{outcome:>17}" for outcome in OUTCOMES) + "\n")
        for row, found in sorted(counts.items()):
            numbers = "".join(f"{found[outcome]:>17}" for outcome in OUTCOMES)
            sys.stdout.write(f"{row:28}{numbers}\n")
    verified = [found for row, found in counts.items() if row.endswith(WAYS[0])]
    return int(any(found[outcome] for found in verified for outcome in OUTCOMES[2:]))


def damaged_shards(folder: Path, storage: Storage, shards: int, seed: int) -> list[Task]:
    """Write shards, damage each, and return what is to be read of them."""
    drawn = np.random.default_rng(seed)
    rows = shards * ROWS
    values: dict[str, npt.NDArray[Any]] = {
        "image": drawn.integers(0, 40, (rows, 4, 5)).astype(np.float32),  # it compresses
        "label": np.arange(rows),
    }
    with Writer(folder, shard_rows=ROWS, storage=storage) as writer:
        writer.extend(values)
    dataset = open_dataset(str(folder))
    draw = random.Random(seed)
    tasks = []
    for number, shard in enumerate(dataset.shards):
        path = Path(shard.path)
        path.write_bytes(draw.choice(DAMAGES)(bytearray(path.read_bytes()), draw))
        own = {name: array[number * ROWS :][:ROWS].tobytes() for name, array in values.items()}
        one = Dataset(shard.path, dataset.fields, (shard,))
        tasks += [Task(one, way, own) for way in WAYS]
    return tasks


def flip_one(content: bytearray, draw: random.Random) -> bytes:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def flip_many(content: bytearray, draw: random.Random) -> bytes:
    for _ in range(draw.randint(2, 50)):
        content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    return bytes(content)


def flip_in_front(content: bytearray, draw: random.Random) -> bytes:
    """Where HDF5 keeps what it knows of the file."""
    for _ in range(draw.randint(1, 4)):
        content[draw.randrange(min(800, len(content)))] ^= draw.randrange(1, 256)
    return bytes(content)


def cut(content: bytearray, draw: random.Random) -> bytes:
    return bytes(content[: draw.randrange(len(content))])


def cut_out(content: bytearray, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    del content[place : place + draw.randint(1, 2000)]
    return bytes(content)


def replaced(content: bytearray, draw: random.Random) -> bytes:
    """A page or so of zeros, or of noise, as a disk or a network leaves it."""
    place, size = draw.randrange(len(content)), draw.choice([16, 512, 4096])
    size = min(size, len(content) - place)
    content[place : place + size] = draw.choice([bytes(size), draw.randbytes(size)])
    return bytes(content)


def emptied(_: bytearray, draw: random.Random) -> bytes:
    return draw.choice([b"", b"\x89HDF\r\n\x1a\n", bytes(3000)])


Damage = Callable[[bytearray, random.Random], bytes]
DAMAGES: tuple[Damage, ...] = (
    *(flip_one, flip_one, flip_many, flip_in_front, flip_in_front),
    *(cut, cut_out, replaced, replaced, emptied),
)


def read(task: Task) -> str:
    """Return what reading all of a shard ends in; a hang ends the process."""
    signal.alarm(LIMIT_SECONDS)
    path = task.dataset.shards[0].path
    try:
        return _read(task, path)
    except DatasetError as error:
        return "named" if path in str(error) else "unexplained"
    except Exception as error:  # noqa: BLE001 - it is what is looked for
        sys.stderr.write(f"{path}: {type(error).__name__}: {error}\n")
        return "unexplained"
    finally:
        signal.alarm(0)


def _read(task: Task, path: str) -> str:
    dataset = task.dataset
    if task.way == "verified":
        verify_share([dataset], 0, 1)
    elif task.way == "as plain HDF5":
        found = join_files(path, [path], list(dataset.fields))
        if found.fields != dataset.fields or found.samples != ROWS:
            return "other values"
        dataset = found
    with closing(open_rows(dataset, retries=0)) as reader:
        for name, field in dataset.fields.items():
            out = np.empty((ROWS, field.row_bytes), np.uint8)
            reader.read_runs(name, np.array([0]), np.array([ROWS]), out, np.array([0]))
            if out.tobytes() != task.values[name]:
                return "other values"
    return "equal"


if __name__ == "__main__":
    sys.exit(main())
