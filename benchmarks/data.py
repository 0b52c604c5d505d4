"""Shuffled batches out of the page cache or the disk, as a part of what it gives when just read.

    python benchmarks/data.py                   hpctrain: three kinds of data, four layouts
    python benchmarks/data.py --peers           also others, installed into a folder that is removed
    python benchmarks/data.py --quick           a small run
    python benchmarks/data.py --cold            every turn from the disk

All contenders of one kind of data are prepared first and then take turns of some seconds; the
table gives medians over rounds. "of raw" is over `preadv` of the same files from end to end in
windows of 4 MiB by as many processes, in the same rounds. A window stays in the processor's cache;
"raw, to memory" uses 128 MB in turn, as what is kept for training cannot stay there. What the
operating system keeps of the files in memory is not touched (they were just written, so it keeps
them) but with `--cold`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.convert.bench import forget
from hpctrain.data import Storage, Writer, open_dataset
from hpctrain.data.dataset import Dataset
from hpctrain.data.reading.threads import reading_threads

HERE = Path(__file__).parent
STORAGES = {
    "contiguous": Storage(),
    "chunked": Storage(chunk_bytes=2**17),
    "gzip:1": Storage("gzip", 1),
    "zstd": Storage("zstd"),
}
PEERS = {"webdataset": "webdataset", "litdata": "litdata", "streaming": "mosaicml-streaming"}
MOST_WORKERS = 2


@dataclass(frozen=True)
class Kind:
    """What samples look like: their shape, dtype, and how many make a batch of one rank."""

    shape: tuple[int, ...]
    dtype: str
    batch: int


KINDS = {
    "images": Kind((3, 64, 64), "u1", 64),
    "tokens": Kind((1025,), "u2", 64),
    "fields": Kind((16, 384, 576), "f4", 2),
}


@dataclass
class Contender:
    """A way to read, by so many processes, and what its turns gave."""

    label: str
    processes: Sequence[subprocess.Popen[str]]
    task: dict[str, Any]
    speeds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def turn(self, seconds: float) -> None:
        for rank, process in enumerate(self.processes):
            assert process.stdin is not None
            task = {**self.task, "rank": rank, "ranks": len(self.processes), "seconds": seconds}
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        facts = [json.loads(line_of(process)) for process in self.processes]
        self.speeds.append(sum(each["bytes"] / each["seconds"] for each in facts) / 1e6)
        done = sum(each["bytes"] for each in facts)
        self.cpu.append(sum(each["cpu"] for each in facts) / done * 1e9)

    def warm_up(self, seconds: float) -> None:
        """Take a turn that pays for imports and fresh memory, and does not count."""
        self.turn(seconds)
        self.speeds.clear()
        self.cpu.clear()


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="hpctrain-data-") as name:
        folder = Path(name)
        python = install(folder / "peers") if options.peers else None
        cache = "asked to be empty before every turn" if options.cold else "as after writing"
        print(f"{os.cpu_count()} cores, {options.megabytes} MB a dataset; page cache {cache}")
        for kind in options.kinds:
            values = make_values(KINDS[kind], options.megabytes)
            datasets = write_all(folder, kind, values, options.layouts)
            peers = [] if python is None else convert(folder, kind, values, python)
            del values
            with ExitStack() as stack:
                ours = [stack.enter_context(running(sys.executable)) for _ in range(2)]
                contenders = list(blocks(folder, kind, datasets, ours))
                if python is not None:
                    others = [stack.enter_context(running(python))]
                    contenders += rows(folder, kind, others)
                    contenders += named(folder, kind, peers, others)
                for contender in contenders:
                    contender.warm_up(options.seconds)
                for _ in range(options.rounds):
                    for contender in contenders:
                        if options.cold:
                            for dataset in datasets.values():
                                forget(dataset)
                        contender.turn(options.seconds)
            report(kind, contenders)
            for each in folder.glob(f"{kind}*"):
                shutil.rmtree(each)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How much of the file system is delivered.")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--layouts", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--peers", action="store_true", help="compare with other loaders")
    parser.add_argument("--cold", action="store_true", help="empty the page cache before turns")
    parser.add_argument("--folder", default=None, help="where to write; default: temporary files")
    parser.add_argument("--megabytes", type=int, default=256, help="of one dataset")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one turn")
    parser.add_argument("--quick", action="store_true", help="32 MB, 2 rounds of 0.3 s")
    options = parser.parse_args()
    if options.quick:
        options.megabytes, options.rounds, options.seconds = 32, 2, 0.3
    return options


def make_values(kind: Kind, megabytes: int) -> np.ndarray[Any, Any]:
    """Return samples that compress about as real ones do."""
    draw = np.random.default_rng(0)
    rows = max(4, megabytes * 10**6 // (int(np.prod(kind.shape)) * np.dtype(kind.dtype).itemsize))
    values = np.empty((rows, *kind.shape), kind.dtype)
    for part in np.array_split(values, max(1, megabytes // 16)):
        if kind.dtype == "f4":
            part[...] = draw.normal(size=part.shape).cumsum(-1).round(2)
        elif kind.dtype == "u2":
            part[...] = np.minimum(draw.zipf(1.2, part.shape), 50_000)
        else:
            light = draw.integers(0, 200, (len(part), 3, 1, 1))
            part[...] = light + draw.integers(0, 48, part.shape)
    return values


def write_all(
    folder: Path, kind: str, values: np.ndarray[Any, Any], layouts: Sequence[str]
) -> dict[str, Dataset]:
    labels = np.arange(len(values)) % 10
    datasets = {}
    for layout in layouts:
        path = folder / f"{kind}-{layout}"
        shard_bytes = max(values[:2].nbytes, values.nbytes // 8)
        with Writer(path, storage=STORAGES[layout], shard_bytes=shard_bytes) as writer:
            writer.extend({"x": values, "y": labels})
        datasets[layout] = open_dataset(str(path))
    return datasets


def blocks(
    folder: Path,
    kind: str,
    datasets: dict[str, Dataset],
    processes: Sequence[subprocess.Popen[str]],
) -> Iterator[Contender]:
    """Yield what reads HDF5 in blocks, and what only reads the bytes."""
    for ranks in (1, 2):
        of_ranks = f"{ranks} rank{'s'[: ranks - 1]}"
        task = {"batch": KINDS[kind].batch, "option": ""}
        path = folder / f"{kind}-{next(iter(datasets))}"
        for label, num_bytes in (("raw", 4 * 2**20), ("raw, to memory", 128 * 2**20)):
            yield Contender(
                f"{label}, {of_ranks}",
                processes[:ranks],
                {**task, "name": "raw", "folder": str(path), "option": str(num_bytes)},
            )
        for layout in datasets:
            for threads in sorted({reading_threads(ranks)} | ({1} if ranks == 1 else set())):
                yield Contender(
                    f"{layout}, {of_ranks}, {threads} thread{'s'[: threads - 1]}",
                    processes[:ranks],
                    {
                        "name": "hpctrain",
                        "folder": str(folder / f"{kind}-{layout}"),
                        "batch": KINDS[kind].batch,
                        "option": str(threads),
                    },
                )
        first = next(iter(datasets))
        if ranks == 1:
            for layout in (each for each in datasets if STORAGES[each].filter != "none"):
                for threads in (1, 2):
                    yield Contender(
                        f"chunks of {layout} alone, {threads} thread{'s'[: threads - 1]}",
                        processes[:1],
                        {
                            **task,
                            "name": "chunks",
                            "folder": str(folder / f"{kind}-{layout}"),
                            "option": str(threads),
                        },
                    )
            in_memory = {**task, "folder": str(folder / f"{kind}-{first}")}
            for threads in (1, 2):
                yield Contender(
                    f'cache = "memory", 1 rank, {threads} thread{"s"[: threads - 1]}',
                    processes[:1],
                    {**in_memory, "name": "memory", "option": str(threads)},
                )
            yield Contender("np.take, 1 rank", processes[:1], {**in_memory, "name": "take"})


def rows(
    folder: Path, kind: str, processes: Sequence[subprocess.Popen[str]]
) -> Iterator[Contender]:
    """Yield torch's DataLoader over h5py, where people begin."""
    for layout in ("contiguous", "chunked"):
        path = folder / f"{kind}-{layout}"
        for workers in (0, MOST_WORKERS) if path.exists() else ():
            yield Contender(
                f"DataLoader + h5py, {layout}, {workers} workers",
                processes,
                {
                    "name": "h5py",
                    "folder": str(path),
                    "batch": KINDS[kind].batch,
                    "option": str(workers),
                },
            )


def named(
    folder: Path, kind: str, peers: Sequence[str], processes: Sequence[subprocess.Popen[str]]
) -> Iterator[Contender]:
    """Yield the peers that could write the data."""
    for name in peers:
        for workers in (0, MOST_WORKERS):
            yield Contender(
                f"{name}, {workers} workers",
                processes,
                {
                    "name": name,
                    "folder": str(folder / f"{kind}-{name}"),
                    "batch": KINDS[kind].batch,
                    "option": str(workers),
                },
            )


@contextmanager
def running(python: str) -> Iterator[subprocess.Popen[str]]:
    # Thread pools of math libraries would count as the reader's own CPU seconds.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [python, str(HERE / "data_contenders.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a reader ended: {process.args!r}")
    return line.strip()


def report(kind: str, contenders: Sequence[Contender]) -> None:
    raw = {
        "2 ranks" in c.label: c.speeds
        for c in contenders
        if c.label in ("raw, 1 rank", "raw, 2 ranks")
    }
    print(f"\n{kind:44} {'MB/s':>8} {'of raw':>7} {'CPU s/GB':>9}")
    for contender in contenders:
        base = raw["2 ranks" in contender.label]
        ratio = statistics.median(a / b for a, b in zip(contender.speeds, base, strict=True))
        speed, cpu = statistics.median(contender.speeds), statistics.median(contender.cpu)
        print(f"{contender.label:44} {speed:8,.0f} {ratio:7.2f} {cpu:9.2f}", flush=True)


def install(folder: Path) -> str:
    """Make an environment with the peers, and with what this one has. Return its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
    # With the torch that the tests install, which is without gigabytes for GPUs.
    pins = ["--constraint", str(HERE.parent / "constraints.txt")]
    command = [str(python), "-m", "pip", "install", "--quiet", *pins, *PEERS.values()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(python)


def convert(folder: Path, kind: str, values: np.ndarray[Any, Any], python: str) -> list[str]:
    """Write the samples in the peers' formats. Return the peers that could."""
    source = folder / f"{kind}-values"
    source.mkdir()
    np.save(source / "x.npy", values)
    done = []
    for name in PEERS:
        command = [python, str(HERE / "data_formats.py"), name, str(source / "x.npy")]
        made = subprocess.run(
            [*command, str(folder / f"{kind}-{name}")],
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if made.returncode == 0:
            done.append(name)
        else:
            print(f"{name} cannot take part: {made.stderr.strip().splitlines()[-1:]}")
    return done


if __name__ == "__main__":
    main()
