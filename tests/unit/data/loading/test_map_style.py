"""torch Datasets in the one order: the same batches from any number of ranks and workers."""

from __future__ import annotations

import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers import user_data
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

from hpctrain.data.loading.batch import named_tensors
from hpctrain.data.loading.map_style.dataset import MapDataset, length_of, looked_at, taken_in
from hpctrain.data.loading.map_style.fetch import Fetcher
from hpctrain.data.loading.map_style.loaders import MapEvaluationLoader, MapTrainLoader
from hpctrain.data.loading.map_style.parcel import Parcel, packed, unpacked
from hpctrain.data.loading.map_style.passes import PassReader
from hpctrain.data.loading.map_style.workers import Travelling, processes
from hpctrain.data.order.batches import Batching, Epochs, EvaluationShare, RankShare
from hpctrain.data.order.order import Order
from hpctrain.errors import ConfigError, DatasetError, HpctrainError, TrainingError

CPU = torch.device("cpu")
OPEN: list[PassReader] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    for reader in OPEN:
        reader.close()
    OPEN.clear()


def map_dataset(dataset: Any, collate: Any = None, **options: Any) -> MapDataset:
    return MapDataset(
        source="mine:make",
        dataset=dataset,
        collate=collate,
        samples=length_of(dataset, "mine:make"),
        **options,
    )


def reader_of(found: MapDataset, workers: int) -> PassReader:
    pool = None
    if workers:
        parcel = Parcel.of(Travelling(found.dataset, found.collate, found.worker_init))
        environment = dict(os.environ)
        pool = processes(found.source, parcel, workers, environment, seeded=found.seeded, used=())
    fetcher = Fetcher(found.dataset, found.collate, seeded=found.seeded)
    reader = PassReader(found, fetcher, pool, CPU)
    OPEN.append(reader)
    return reader


def loader_of(
    found: MapDataset, workers: int = 0, rank: int = 0, world_size: int = 1, **options: Any
) -> MapTrainLoader:
    batching = Batching(**({"global_batch_size": 8, "micro_batch_size": 3} | options))
    size = batching.global_batch_size
    order = Order.for_dataset(found, seed=7, global_batch_size=size, is_resident=True)
    epochs = Epochs(order, found.source, batching, RankShare(rank, world_size))
    return MapTrainLoader(found, epochs, reader_of(found, workers))


def told(data: Any) -> Any:
    """Return a structure with tensors as lists, to be compared."""
    if isinstance(data, Tensor):
        return str(data.dtype), data.tolist()
    if isinstance(data, dict):
        return {name: told(each) for name, each in data.items()}
    if isinstance(data, list | tuple):
        return type(data).__name__, [told(each) for each in data]
    return data


def batches(loader: MapTrainLoader, epoch: int = 0, start: int = 0) -> list[Any]:
    return [
        (each.start, each.global_size, each.size, {k: told(v) for k, v in each.passes.items()})
        for each in loader.epoch(epoch, start)
    ]


DATASETS: dict[str, Callable[[], MapDataset]] = {
    "images": lambda: map_dataset(user_data.Images(transform=user_data.flip_and_noise)),
    "texts": lambda: map_dataset(user_data.Texts()),
    "graphs": lambda: map_dataset(user_data.Graphs(), user_data.one_graph),
    "tensors": lambda: map_dataset(
        TensorDataset(torch.arange(60.0).reshape(20, 3), torch.arange(20))
    ),
    "subset": lambda: map_dataset(Subset(user_data.Texts(), [5, 1, 20, 7, 9, 3, 2, 4, 8])),
    "concat": lambda: map_dataset(ConcatDataset([user_data.Texts(), user_data.Texts()])),
    "split": lambda: map_dataset(
        random_split(user_data.Texts(), [15, 8], torch.Generator().manual_seed(1))[0]
    ),
    "lambda": lambda: map_dataset(
        user_data.Texts(), lambda each: {"n": torch.tensor([e["score"] for e in each])}
    ),
    "list": lambda: map_dataset([{"x": float(i), "y": np.float32(i)} for i in range(11)]),
    "array": lambda: map_dataset(np.arange(24, dtype=np.float32).reshape(12, 2)),
    "many": lambda: map_dataset(user_data.Many()),
    "many that draw": lambda: map_dataset(user_data.Many(noise=1.0)),
}


@pytest.mark.parametrize("name", DATASETS)
def test_the_rank_itself_serves_what_any_number_of_ranks_does(name: str) -> None:
    """Every position its sample, with its own draws, whoever reads it."""
    kept = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index] # noqa: NPY002
    whole = loader_of(DATASETS[name](), micro_batch_size=1)
    served = batches(whole, epoch=2)
    assert sum(size for _, _, size, _ in served) == whole.epoch_size
    for world_size in (2, 3):
        ranks = [
            loader_of(DATASETS[name](), rank=r, world_size=world_size) for r in range(world_size)
        ]
        rows = [np.sort(np.concatenate([each.rows(2, 0, whole.epoch_size) for each in ranks]))]
        assert rows[0].tolist() == np.sort(whole.rows(2, 0, whole.epoch_size)).tolist()
        one_by_one = [
            loader_of(DATASETS[name](), rank=r, world_size=world_size, micro_batch_size=1)
            for r in range(world_size)
        ]
        for batch, (_, _, _, passes) in zip(
            zip(*(batches(each, epoch=2) for each in one_by_one), strict=True), served, strict=True
        ):
            found = [item for _, _, _, parts in batch for item in parts.values()]
            assert sorted(map(str, found)) == sorted(map(str, passes.values()))
    assert torch.equal(torch.get_rng_state(), kept[0])  # the rank's own draws are as they were
    assert np.random.get_state()[1].tolist() == kept[1]  # type: ignore[index] # noqa: NPY002
    assert random.getstate() == kept[2]


OF_A_SCRIPT = """
from helpers.user_data import Graphs, Images, Texts, flip_and_noise

class Mine(Texts):
    def __init__(self):
        self.images, self.graphs = Images(transform=flip_and_noise), Graphs()

    def __getitem__(self, index):
        graph = self.graphs[index % len(self.graphs)]
        return {**super().__getitem__(index), "image": self.images[index + BIAS], "graph": graph}

BIAS = 5
"""


def test_workers_give_what_the_rank_itself_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """In shared memory, of any structure, what a script and a lambda define."""
    main = types.ModuleType("__main__")
    exec(OF_A_SCRIPT, main.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", main)

    def collate(each: list[dict[str, Any]]) -> dict[str, Any]:
        graph = user_data.one_graph([one.pop("graph") for one in each])
        return {**default_collate(each), "graph": graph}

    found = map_dataset(main.Mine(), collate)
    here, there = loader_of(found), loader_of(found, workers=2)
    for epoch, start in ((0, 0), (1, 0), (0, 8)):
        assert batches(there, epoch, start) == batches(here, epoch, start)


def test_what_is_kept_of_a_batch_stays_as_it_was(tmp_path: Path) -> None:
    """Shared memory is used again only when nobody refers to it. The worker opens the file."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = np.arange(36.0).reshape(12, 3)
    found = map_dataset(user_data.LazyFile(tmp_path / "x.h5"))
    loader = loader_of(found, workers=1)
    kept, copies = [], []
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            kept += batch.passes.values()
            copies += [each.clone() for each in batch.passes.values()]
    assert sum(len(each) for each in kept) == 36
    assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))
    kept[0] += 1  # it is the consumer's own


def test_evaluation_serves_every_sample_once() -> None:
    found = map_dataset(user_data.Texts())
    for world_size in (1, 2, 3, 30):
        names: list[str] = []
        for rank in range(world_size):
            share = EvaluationShare(batch_size=4, ranks=RankShare(rank, world_size), seed=1)
            loader = MapEvaluationLoader(found, share, reader_of(found, 0))
            shares = list(loader)
            assert len(shares) == len(loader) <= loader.most_batches
            names += [name for each in shares for name in each.fields["name"]]
        assert names == [f"text {i}" for i in range(23)]


def test_a_batch_of_named_samples_begins_at_the_first_of_them() -> None:
    found = map_dataset(user_data.Texts())
    rows = np.array([8, 9, 10, 11, 12], np.int64)
    share = EvaluationShare(batch_size=2, ranks=RankShare(1, 2), rows=rows)
    loader = MapEvaluationLoader(found, share, reader_of(found, 0))
    assert [each.start for each in loader] == [8, 10, 12]
    assert loader.first_batch == 4
    assert [loader.rows_of(index).tolist() for index in range(3)] == [[8, 9], [10, 11], [12]]


def test_examples_are_put_together_as_they_are_asked_for() -> None:
    loader = loader_of(map_dataset(user_data.Graphs(), user_data.one_graph))
    one, three = loader.example(), loader.example(3)
    assert len(three.x) == 3 * len(one.x)
    some = loader.examples(4)
    assert some.size == 4
    assert len(some.part(0, 4).x) == len(some.part(0, 1).x) + len(some.part(1, 4).x)
    assert loader.read(np.array([1, 6]))["x"].shape[1] == 3
    assert loader.runs(np.array([1, 2, 6])) == [("mine:make", 1, 2), ("mine:make", 6, 6)]


def test_many_samples_at_once_unless_they_draw() -> None:
    keys = np.arange(5, dtype=np.uint64)
    quiet, drawing = user_data.Many(), user_data.Many(noise=1.0)
    Fetcher(quiet, None, seeded=True).samples(np.arange(5), keys)
    assert quiet.calls == [5]
    fetcher = Fetcher(drawing, None, seeded=True)
    found = fetcher.samples(np.arange(5), keys)
    assert drawing.calls == [5, 1, 1, 1, 1, 1]
    again = fetcher.samples(np.array([4, 3]), keys[[4, 3]])
    assert torch.equal(again[0], found[4])
    assert torch.equal(again[1], found[3])


@pytest.mark.parametrize(
    ("how", "kind", "workers", "expected"),
    [
        ("index", DatasetError, 0, r"sample 11 of mine:make \(Bad\): IndexError: list index out"),
        ("file", DatasetError, 0, r"sample 11 of .*No such file or directory: 'images/11.png'"),
        ("none", DatasetError, 0, r"sample 11 of mine:make \(Bad\): it is None. Every sample"),
        ("shape", TrainingError, 0, r"(?s)samples .*11.* its collate_fn failed on these samples"),
        ("code", TrainingError, 0, r"(?s)sample 11 of mine:make \(Bad\):\n.*user_data.*NameError"),
        ("code", TrainingError, 1, r"(?s)sample 11 of mine:make \(Bad\):\n.*user_data.*NameError"),
        (
            *("killed", TrainingError, 1),
            r"worker 0 of mine:make \(pid \d+\) was killed by SIGKILL.*out of memory.*11",
        ),
    ],
)
def test_what_goes_wrong_is_told_with_its_sample(
    how: str, kind: type[HpctrainError], workers: int, expected: str
) -> None:
    loader = loader_of(map_dataset(user_data.Bad(how)), workers=workers, micro_batch_size=None)
    with pytest.raises(kind, match=expected):
        batches(loader)


def test_what_cannot_be_pickled_cannot_travel() -> None:
    with pytest.raises(TypeError, match=r"cannot pickle '_thread.lock' object"):
        Parcel.of(Travelling(user_data.Locked(), None, None))


def test_values_of_a_dataset_are_shared_by_its_workers() -> None:
    parcel = Parcel.of({"x": torch.ones(1000), "y": np.ones(1000), "z": torch.empty(0)})
    assert len(parcel.payload) < 1000
    first, second = parcel.opened(), parcel.opened()
    first["x"][0] = 5  # of this process only
    assert second["x"][0] == 1
    assert second["y"].sum() == 1000
    assert second["z"].shape == (0,)
    os.close(parcel.descriptor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3),
        torch.rand(1, 2)[:, 1],  # one value, whose stride is 2
        torch.rand(3, 4).T,
        torch.rand(2, 3, dtype=torch.complex64).conj(),
        torch.rand(3).to(torch.bfloat16),
        torch.tensor([True, False]),
        torch.empty(0, 5),
        torch.eye(3).to_sparse(),
        torch.nn.Parameter(torch.ones(2)),
    ],
)
def test_tensors_of_any_kind_come_out_as_they_went_in(tensor: Tensor) -> None:
    made = packed([tensor, "text"])
    spans, size = made.spans()
    memory = np.zeros(size, np.uint8)
    made.write(memory, spans)
    found, text = unpacked(made.payload, memory, spans)
    assert text == "text"
    assert found.dtype == tensor.dtype
    assert found.shape == tensor.shape
    assert torch.equal(found.to_dense().detach(), tensor.to_dense().detach().resolve_conj())


class _Batches(BatchSampler):
    pass


def test_what_a_data_loader_says() -> None:
    texts = user_data.Texts()

    def taken(**options: Any) -> Any:
        return taken_in(DataLoader(texts, **options), "m:f", workers=5, seeded=True)

    found = taken(batch_size=6, shuffle=True, num_workers=2, drop_last=True, prefetch_factor=4)
    assert (found.batch_size, found.shuffle, found.drop_last) == (6, True, True)
    assert (found.dataset.workers, found.dataset.prefetch) == (2, 4)
    assert found.dataset.collate is None
    assert taken().shuffle is False
    assert taken(collate_fn=user_data.one_graph).dataset.collate is user_data.one_graph
    sampler = DistributedSampler(texts, num_replicas=2, rank=0, shuffle=False)
    assert taken(sampler=sampler).shuffle is False
    assert taken(batch_sampler=BatchSampler(RandomSampler(texts), 4, True)).batch_size == 4
    assert taken(sampler=SequentialSampler(texts)).shuffle is False
    subset = taken(sampler=SubsetRandomSampler([3, 1, 4]))
    assert (subset.dataset.samples, subset.shuffle) == (3, True)
    weighted = taken(sampler=WeightedRandomSampler([1.0] * 23, 40))
    assert (len(weighted.weights), weighted.draws) == (23, 40)
    plain = taken_in(texts, "m:f", workers=5, seeded=True)
    assert (plain.batch_size, plain.shuffle, plain.dataset.workers) == (None, None, 5)


WAY_OUT = r"`python -m hpctrain data pack dataset=m:f data/x`"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (user_data.Stream(), rf"m:f: Stream is a stream, .*{WAY_OUT}"),
        (DataLoader(user_data.Stream()), rf"m:f: Stream is a stream, .*{WAY_OUT}"),
        (DataLoader(user_data.Texts(), batch_size=None), rf"batch_size=None leaves.*{WAY_OUT}"),
        (
            DataLoader(
                user_data.Texts(), sampler=RandomSampler(user_data.Texts(), replacement=True)
            ),
            rf"RandomSampler with replacement or num_samples chooses.*{WAY_OUT}",
        ),
        (DataLoader(user_data.Texts(), sampler=[3, 2, 1]), rf"list chooses samples.*{WAY_OUT}"),
        (
            DataLoader(
                user_data.Texts(), batch_sampler=_Batches(RandomSampler(user_data.Texts()), 2, True)
            ),
            rf"_Batches puts batches together.*{WAY_OUT}",
        ),
        (
            [DataLoader(user_data.Texts())] * 2,
            r"m:f: 2 loaders in a list; one order is of one Dataset",
        ),
        (object(), r"m:f: object is no Dataset: it has no __getitem__"),
    ],
)
def test_what_cannot_be_served_in_the_one_order(given: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        taken_in(given, "m:f", workers=1, seeded=True)


def test_no_samples_and_no_length() -> None:
    with pytest.raises(DatasetError, match="list has no samples"):
        taken_in([], "m:f", workers=1, seeded=True)

    class Endless(user_data.Texts):
        def __len__(self) -> int:
            raise NotImplementedError

    with pytest.raises(DatasetError, match=r"len\(\) of .*Endless failed: NotImplementedError"):
        taken_in(Endless(), "m:f", workers=1, seeded=True)


def test_the_fingerprint_knows_other_samples_and_not_what_is_drawn() -> None:
    def facts(dataset: Any) -> list[str]:
        found = map_dataset(dataset)
        return looked_at(found, Fetcher(dataset, None, seeded=True), 5)

    images = user_data.Images(transform=user_data.flip_and_noise)
    assert facts(images) == facts(images)
    assert facts(images) != facts(user_data.Images())
    assert facts(Subset(images, range(20))) != facts(Subset(images, [*range(19), 40]))
    clock = [{"drawn": float(i)} for i in range(4)]

    class Unseeded(user_data.Texts):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"x": np.random.default_rng().random(3), "i": index}

    assert facts(Unseeded()) == facts(Unseeded())
    assert facts(clock) != facts(clock[:3])


def test_the_fingerprint_of_objects_is_the_same_in_every_process() -> None:
    """Of graphs and the like: where their tensors lie in memory counts for nothing."""

    class Graph:
        def __init__(self, x: float, of: Any) -> None:
            self.x, self.of, self.itself = torch.full((1, 2), x)[:, 1], of, self
            self.tags = {"a", "b", str(x)}

    class Graphs(list[Any]):
        pass

    def facts(x: float) -> list[str]:
        graphs = Graphs()
        graphs += [Graph(x + each, graphs) for each in range(3)]
        return looked_at(map_dataset(graphs), Fetcher(graphs, None, seeded=True), 5)

    kept = facts(1.0)
    assert not any("drawn anew" in fact for fact in kept)
    assert facts(1.0) == kept
    assert facts(2.0)[1:] != kept[1:]


def test_names_in_an_error_are_those_of_the_structure() -> None:
    names = [name for name, _ in named_tensors(user_data.Graphs()[0]._asdict())]
    assert names == ["x", "edges"]
