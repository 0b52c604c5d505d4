"""Samples of unequal length, beside a DataLoader that opens HDF5 as its users do: epochs in turns.

python benchmarks/ragged.py [--documents 200000] [--graphs 50000] [--turns 3]

Tokens, padded: of a variable-length dataset, and of offsets; a DataLoader reads the former row by
row, and also a whole batch at once in sorted order. Graphs, put one after the other with edges that
count the nodes of the batch: a DataLoader cuts them out by their offsets and puts them together as
PyTorch Geometric's Batch does. All shuffled; each epoch as seconds and CPU seconds of this process
and its children, the least of the turns, and what the row-by-row DataLoader takes as a multiple.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

from hpctrain.config.schema_data import DataSection, FieldTable
from hpctrain.data.loading.loader import LoaderOptions, TrainLoader
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.order.batches import Batching, Epochs, RankShare
from hpctrain.data.order.order import Order

BATCH = 512
ROUND = 50_000
"""Documents that are written at once."""


def write(path: Path, documents: int, graphs: int) -> None:
    """Write documents of 180 tokens on average, and molecules of some 18 atoms."""
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.lognormal(5.0, 0.6, documents).astype(np.int64) + 1, 2000)
    atoms = draw.integers(5, 32, graphs)
    edges = 2 * atoms + 2
    with h5py.File(path, "w") as file:
        vlen = file.create_dataset("vlen", (documents,), h5py.vlen_dtype("u2"))
        for start in range(0, documents, ROUND):
            some = lengths[start : start + ROUND]
            rows = np.empty(len(some), object)
            rows[:] = np.split(draw.integers(0, 50_000, some.sum(), "u2"), np.cumsum(some)[:-1])
            vlen[start : start + ROUND] = rows
        file["tokens"] = draw.integers(0, 50_000, lengths.sum(), "u2")
        file["token_ptr"] = np.cumsum([0, *lengths])
        file["z"] = draw.integers(1, 10, atoms.sum(), "u1")
        file["pos"] = draw.random((atoms.sum(), 3), "f4")
        file["atom_ptr"] = np.cumsum([0, *atoms])
        ends = draw.random((edges.sum(), 2)) * np.repeat(atoms, edges)[:, None]
        file["edge"] = ends.astype("i4")
        file["edge_ptr"] = np.cumsum([0, *edges])


class Documents(Dataset[Any]):
    """Rows of a variable-length dataset, one by one, or a sorted batch at once."""

    def __init__(self, path: Path) -> None:
        self.rows = h5py.File(path)["vlen"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(self.rows[row].astype(np.int64))

    def __getitems__(self, rows: list[int]) -> list[torch.Tensor]:
        return [self[row] for row in rows]


class SortedDocuments(Documents):
    """The same, a batch in one call of h5py."""

    def __getitems__(self, rows: list[int]) -> list[torch.Tensor]:
        return [torch.from_numpy(row.astype(np.int64)) for row in self.rows[sorted(rows)]]


class Graphs(Dataset[Any]):
    """Molecules, cut out of a file by their offsets."""

    def __init__(self, path: Path) -> None:
        self.file = h5py.File(path)
        self.z, self.pos, self.edge = (self.file[name] for name in ("z", "pos", "edge"))
        self.atoms, self.edges = self.file["atom_ptr"][()], self.file["edge_ptr"][()]

    def __len__(self) -> int:
        return len(self.atoms) - 1

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        first, stop = self.atoms[row], self.atoms[row + 1]
        own = slice(self.edges[row], self.edges[row + 1])
        return {
            "z": torch.from_numpy(self.z[first:stop]),
            "pos": torch.from_numpy(self.pos[first:stop]),
            "edge": torch.from_numpy(self.edge[own]).long(),
        }


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    whole = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return {"tokens": whole, "there": torch.arange(whole.shape[1]) < lengths[:, None]}


def put_together(graphs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Do what PyTorch Geometric's Batch does: concatenate, and add the nodes before to edges."""
    atoms = default_collate([len(each["z"]) for each in graphs])
    before = atoms.cumsum(0) - atoms
    return {
        "z": torch.cat([each["z"] for each in graphs]),
        "pos": torch.cat([each["pos"] for each in graphs]),
        "edge": torch.cat(
            [each["edge"] + shift for each, shift in zip(graphs, before, strict=True)]
        ),
        "batch": torch.repeat_interleave(torch.arange(len(graphs)), atoms),
    }


def peer(
    dataset: Any, collate: Callable[..., Any], workers: int = 0
) -> Callable[[], Iterator[Any]]:
    sampler = RandomSampler(dataset)
    return lambda: iter(
        DataLoader(dataset, BATCH, sampler=sampler, collate_fn=collate, num_workers=workers)
    )


def ours(path: Path, threads: int, **tables: dict[str, Any]) -> Callable[[], Iterator[Any]]:
    fields = {name: FieldTable(**table) for name, table in tables.items()}
    section = DataSection(train=str(path), global_batch_size=BATCH, fields=fields)
    dataset, _ = open_datasets(section, list(fields))
    order = Order(samples=dataset.samples, seed=0, lanes=64, window=4, block_rows=32)
    loader = TrainLoader(
        dataset,
        Epochs(order, dataset.source, Batching(global_batch_size=BATCH), RankShare()),
        LoaderOptions(device=torch.device("cpu"), buffer_mb=256.0, threads=threads),
        fields=list(fields),
    )
    epochs = iter(range(1000))
    return lambda: (batch.fields for batch in loader.epoch(next(epochs)))


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(contenders: dict[str, Callable[[], Iterator[Any]]], turns: int) -> None:
    """Print the least seconds of each, and as a part of those of the last."""
    least = {name: (float("inf"), float("inf")) for name in contenders}
    values = {}
    for _ in range(turns):
        for name, begin in contenders.items():
            start, cpu, values[name] = time.perf_counter(), cpu_seconds(), 0
            for batch in begin():
                values[name] += sum(each.numel() for each in batch.values())
            taken = time.perf_counter() - start, cpu_seconds() - cpu
            least[name] = tuple(map(min, least[name], taken))  # type: ignore[assignment]
    seconds, cpu = least[list(contenders)[-1]]
    for name, (own, own_cpu) in least.items():
        print(
            f"  {name:<44} {own:8.2f} s {own_cpu:8.2f} CPU s   {seconds / own:6.1f} x "
            f"{cpu / own_cpu:6.1f} x in CPU"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--graphs", type=int, default=50_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="to write to; None: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = Path(folder) / "samples.h5"
        write(path, given.documents, given.graphs)
        pad = {"batch": "pad", "mask": "there"}
        print(f"{given.documents:,} documents, padded")
        measure(
            {
                "hpctrain, offsets": ours(
                    path, given.threads, tokens={"offsets": "token_ptr", **pad}
                ),
                "hpctrain, variable length": ours(path, given.threads, vlen=pad),
                "DataLoader, h5py, sorted batches": peer(SortedDocuments(path), padded),
                "DataLoader, h5py, row by row": peer(Documents(path), padded),
            },
            given.turns,
        )
        atoms = {"offsets": "atom_ptr", "batch": "concat"}
        print(f"{given.graphs:,} graphs, put together")
        measure(
            {
                "hpctrain": ours(
                    path,
                    given.threads,
                    z={**atoms, "sample": "batch"},
                    pos=atoms,
                    edge={"offsets": "edge_ptr", "batch": "concat", "shift_by": "pos"},
                ),
                "DataLoader, h5py, collate as of PyG": peer(Graphs(path), put_together),
            },
            given.turns,
        )


if __name__ == "__main__":
    main()
