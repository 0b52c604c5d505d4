"""Samples of unequal length: what batches hold, against what h5py reads of the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers.loaders import evaluation_loader, train_loader

from hpctrain.config.schema_data import DataSection, FieldTable, SamplesTable
from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.ragged import RaggedRows
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.order.epochs import plan_epoch
from hpctrain.data.order.order import Order
from hpctrain.errors import DatasetError

GRAPHS = (40, 1, 23)
"""In each file."""


@pytest.fixture(scope="module", params=["contiguous", "gzip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Molecules as a graph library would store them: atoms, edges and their offsets, a file each.

    Some have no edge, none of the atoms of one file is above 255, and offsets are of any type.
    """
    path = tmp_path_factory.mktemp(str(request.param))
    draw = np.random.default_rng(5)
    stored: dict[str, Any] = {}
    if request.param == "gzip":
        stored = {"chunks": True, "compression": "gzip"}
    for number, graphs in enumerate(GRAPHS):
        atoms = draw.integers(1, 30, graphs)
        edges = draw.integers(0, 4, graphs) * atoms
        edges[0] = 5
        with h5py.File(path / f"{number}.h5", "w") as file:
            file.create_dataset("z", data=draw.integers(0, 90, atoms.sum(), np.uint16), **stored)
            file.create_dataset("pos", data=draw.random((atoms.sum(), 3), np.float32), **stored)
            file["ptr"] = np.concatenate(([0], np.cumsum(atoms))).astype(">i4")
            ends = draw.integers(0, np.repeat(atoms, edges)[:, None], (edges.sum(), 2), np.int64)
            file.create_dataset("edge", data=ends.astype(np.int32), **stored)
            file["num_edges"] = edges.astype(np.uint16)
            file["y"] = draw.random(graphs, np.float32)
    return path


FIELDS: dict[str, Any] = {
    "z": {"offsets": "ptr", "batch": "pad", "mask": "present", "pad": 7.0},
    "pos": {"offsets": "ptr", "batch": "concat", "sample": "batch"},
    "edge": {"counts": "num_edges", "batch": "concat", "shift_by": "pos"},
    "y": {},
}


def section(folder: Path, fields: dict[str, Any], **samples: Any) -> DataSection:
    return DataSection(
        train=str(folder / "*.h5"),
        global_batch_size=4,
        fields={name: FieldTable(**table) for name, table in fields.items()},
        samples=SamplesTable(**samples),
    )


def opened(folder: Path, fields: dict[str, Any] = FIELDS, **samples: Any) -> Dataset:
    return open_datasets(section(folder, fields, **samples), list(fields))[0]


def graphs_of(folder: Path) -> list[dict[str, np.ndarray]]:
    """Return every graph, cut out one by one."""
    graphs = []
    for path in sorted(folder.iterdir()):
        with h5py.File(path) as file:
            edge_ptr = np.concatenate(([0], np.cumsum(file["num_edges"][()].astype(int))))
            for i, (start, stop) in enumerate(zip(file["ptr"][:-1], file["ptr"][1:], strict=True)):
                graphs.append(
                    {
                        "z": file["z"][start:stop],
                        "pos": file["pos"][start:stop],
                        "edge": file["edge"][edge_ptr[i] : edge_ptr[i + 1]],
                        "y": file["y"][i],
                    }
                )
    return graphs


def collated(graphs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Put graphs together one by one, as PyTorch Geometric does."""
    longest = max(1, *(len(graph["z"]) for graph in graphs))
    z = np.full((len(graphs), longest), 7, np.uint16)
    present = np.zeros((len(graphs), longest), np.float32)
    edges, atoms = [], 0
    for row, graph in enumerate(graphs):
        z[row, : len(graph["z"])] = graph["z"]
        present[row, : len(graph["z"])] = 1
        edges.append(graph["edge"].astype(np.int64) + atoms)
        atoms += len(graph["z"])
    return {
        "z": z,
        "present": present,
        "pos": np.concatenate([graph["pos"] for graph in graphs]),
        "pos.offsets": np.cumsum([0, *(len(graph["pos"]) for graph in graphs)]),
        "batch": np.repeat(np.arange(len(graphs)), [len(graph["pos"]) for graph in graphs]),
        "edge": np.concatenate(edges),
        "edge.offsets": np.cumsum([0, *(len(graph["edge"]) for graph in graphs)]),
        "y": np.array([graph["y"] for graph in graphs]),
    }


def require_equal(fields: dict[str, torch.Tensor], expected: dict[str, np.ndarray]) -> None:
    assert fields.keys() == expected.keys()
    for name, values in expected.items():
        assert fields[name].dtype == torch.from_numpy(values[:0]).dtype, name
        np.testing.assert_array_equal(fields[name].numpy(), values, err_msg=name)


ORDERS = {
    "rows": {"lanes": 8, "window": 4, "block_rows": 1},
    "windows": {"lanes": 4, "window": 2, "block_rows": 3},
    "sequential": {"lanes": 8, "window": 4, "block_rows": 1, "sampling": "sequential"},
}


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_graphs_in_the_one_order(folder: Path, kind: str, world_size: int) -> None:
    """Every pass is what a collate of single graphs makes, from any position on."""
    dataset, graphs = opened(folder), graphs_of(folder)
    order = Order(samples=len(graphs), seed=3, **ORDERS[kind])
    plan = plan_epoch(order, 1)
    for start in (0, 16):
        seen: list[int] = []
        for rank in range(world_size):
            loader = train_loader(
                dataset,
                order,
                fields=list(FIELDS),
                global_batch_size=8,
                rank=rank,
                world_size=world_size,
            )
            for batch in loader.epoch(1, start):
                rows = loader.rows(1, batch.start, batch.start + batch.global_size)
                own = [graphs[row] for row in rows.tolist()]
                assert batch.size == len(own)
                seen += rows.tolist()
                if own:
                    require_equal(batch.fields, collated(own))
                    half = -(-len(own) // 2)
                    require_equal(batch.part(0, half), collated(own[:half]))
            loader.close()
        positions = np.arange(start, len(graphs))
        assert sorted(seen) == sorted(plan.rows(positions).tolist())
    assert len(seen) == len(graphs) - 16


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_evaluation_gives_every_graph_once(folder: Path, world_size: int) -> None:
    dataset, graphs = opened(folder), graphs_of(folder)
    row = 0
    for rank in range(world_size):
        loader = evaluation_loader(
            dataset, fields=list(FIELDS), rank=rank, world_size=world_size, batch_size=5
        )
        for batch in loader:
            require_equal(batch.fields, collated(graphs[row : row + batch.size]))
            row += batch.size
        examples = loader.examples(3)
        assert isinstance(examples, RaggedRows)
        own = [graphs[each] for each in loader.example_rows(3).tolist()]
        require_equal(examples.part(0, 3), collated(own))
        require_equal(examples.part(1, 2), collated(own[1:2]))
        loader.close()
    assert row == len(graphs)


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "back": ({"ptr": [0, 4, 3, 9]}, '"ptr", row 2: offsets go back, from 4 to 3'),
    "past": ({"ptr": [0, 4, 11, 10]}, '"ptr", row 2: the offset 11 is past the end'),
    "huge": ({"ptr": [0, 4, 2**60, 10]}, "is past the end: there are 10 rows"),
    "largest": ({"ptr": np.array([0, 4, 2**64 - 1], np.uint64)}, "is not a number of rows"),
    "negative": ({"ptr": [0, -4, 10]}, '"ptr", row 1: -4 is not a number of rows'),
    "late": ({"ptr": [2, 4, 10]}, "the offset of the first sample is 2, and not 0"),
    "floats": ({"ptr": [0.0, 4.0, 10.0]}, '"ptr" is float64'),
    "few": ({"n": [4, 4]}, "the counts make 8 rows, but there are 10"),
    "many": ({"n": [4, 2**60]}, "a sample of 1152921504606846976 rows, but there are 10"),
    "sum": ({"n": np.array([9, 2], np.uint8)}, "the counts make 11 rows, but there are 10"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_lengths_that_cannot_be_are_told(tmp_path: Path, case: str) -> None:
    arrays, problem = DAMAGED[case]
    (name,) = arrays
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["v"] = np.arange(10)
        file[name] = arrays[name]
    key = "offsets" if name == "ptr" else "counts"
    with pytest.raises(DatasetError) as error:
        opened(tmp_path, {"v": {key: name, "batch": "concat"}})
    assert problem in str(error.value)
    assert str(tmp_path / "x.h5") in str(error.value)


@pytest.mark.parametrize("ended", [False, True])
def test_offsets_with_and_without_an_end(tmp_path: Path, ended: bool) -> None:
    """The last sample of the first file is empty, which would look like an end."""
    for number, offsets in enumerate([[0, 3, 10], [0, 4, 4]]):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["v"] = np.arange(10)
            file["ptr"] = [*offsets, 10] if ended else offsets
    dataset = opened(tmp_path, {"v": {"offsets": "ptr", "batch": "pad", "max_length": 4}})
    assert dataset.samples == 6
    loader = evaluation_loader(dataset, fields=["v"], batch_size=6)
    (batch,) = loader
    loader.close()
    expected = [[0, 1, 2, 0], [3, 4, 5, 6], [0] * 4, [0, 1, 2, 3], [0] * 4, [4, 5, 6, 7]]
    assert batch.fields["v"].tolist() == expected


def test_a_split_never_cuts_a_sample(folder: Path) -> None:
    parts = open_datasets(section(folder, FIELDS, validation_fraction=0.3), list(FIELDS))
    graphs = graphs_of(folder)
    labels: list[float] = []
    for dataset in parts:
        assert dataset is not None
        loader = evaluation_loader(dataset, fields=list(FIELDS), batch_size=7)
        for batch in loader:
            of_label = [next(g for g in graphs if g["y"] == y) for y in batch.fields["y"].numpy()]
            require_equal(batch.fields, collated(of_label))
            labels += batch.fields["y"].tolist()
        loader.close()
    assert sorted(labels) == sorted(float(graph["y"]) for graph in graphs)


EPISODES = [9, 4, 12, 1, 7, 11]


@pytest.fixture(scope="module", params=["contiguous", "gzip"])
def episodes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations as robomimic writes them: a group each, observations in a group below."""
    path = tmp_path_factory.mktemp(f"episodes-{request.param}") / "demo.h5"
    draw = np.random.default_rng(2)
    stored = {"compression": "gzip"} if request.param == "gzip" else {}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(EPISODES)
        for number, steps in reversed(list(enumerate(EPISODES, 6))):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = steps
            demo.create_dataset("actions", data=draw.random((steps, 7)))
            demo.create_dataset("dones", data=np.arange(steps) == steps - 1)
            images = draw.integers(0, 256, (steps, 8, 8, 3), np.uint8)
            demo.create_dataset("obs/agentview_image", data=images, **stored)
        file["mask/train"] = np.array([f"demo_{i}".encode() for i in range(6)])
    return path


EPISODE_FIELDS: dict[str, Any] = {
    "image": {"path": "data/demo_*/obs/agentview_image", "steps": 2},
    "actions": {"path": "/data/demo_*/actions", "steps": 3, "lead": 1},
}


def test_windows_stay_inside_an_episode(episodes: Path) -> None:
    """Rows over groups, 9 before 10; the windows are those of each episode by itself."""
    dataset = open_datasets(
        DataSection(
            train=str(episodes),
            fields={name: FieldTable(**table) for name, table in EPISODE_FIELDS.items()},
        ),
        list(EPISODE_FIELDS),
    )[0]
    images, actions = [], []
    with h5py.File(episodes) as file:
        for number, steps in enumerate(EPISODES, 6):
            demo = file[f"data/demo_{number}"]
            images += [demo["obs/agentview_image"][t : t + 2] for t in range(steps - 3)]
            actions += [demo["actions"][t + 1 : t + 4] for t in range(steps - 3)]
    assert dataset.samples == len(images)
    order = Order(samples=len(images), seed=3, lanes=4, window=2, block_rows=3)
    served = []
    for rank in range(3):
        loader = train_loader(
            dataset,
            order,
            fields=list(EPISODE_FIELDS),
            global_batch_size=7,
            rank=rank,
            world_size=3,
        )
        for batch in loader.epoch(0, 7):
            rows = loader.rows(0, batch.start, batch.start + batch.global_size).tolist()
            served += rows
            if rows:
                np.testing.assert_array_equal(batch.fields["image"], [images[r] for r in rows])
                np.testing.assert_array_equal(batch.fields["actions"], [actions[r] for r in rows])
        assert loader.runs(np.array([0, 1]))[0][0].startswith("demo.h5:data/demo_6")
        loader.close()
    assert len(set(served)) == len(served) == len(images) - 7


def test_a_group_may_be_a_sample(episodes: Path) -> None:
    fields = {
        "actions": {"path": "data/demo_*/actions", "batch": "pad", "mask": "there"},
        "dones": {"path": "data/demo_*/dones", "batch": "concat"},
    }
    dataset = open_datasets(
        DataSection(
            train=str(episodes),
            fields={name: FieldTable(**table) for name, table in fields.items()},
        ),
        list(fields),
    )[0]
    assert dataset.samples == len(EPISODES)
    loader = evaluation_loader(dataset, fields=list(fields), batch_size=4)
    first, second = loader
    loader.close()
    with h5py.File(episodes) as file:
        demo = file["data/demo_9"]
        np.testing.assert_array_equal(first.fields["actions"][3, :1], demo["actions"])
        assert first.fields["there"].sum(1).tolist() == EPISODES[:4]
        assert second.fields["dones.offsets"].tolist() == [0, 7, 18]
        assert second.fields["dones"].nonzero().flatten().tolist() == [6, 17]


def test_a_group_that_lacks_an_array_is_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a_1/x"], file["a_1/y"], file["a_2/x"] = [1.0], [1.0], [1.0]
    tables = {"x": FieldTable(path="a_*/x"), "y": FieldTable(path="a_*/y")}
    with pytest.raises(DatasetError, match='"a_2" has a_\\*/x, but nothing for a_\\*/y'):
        open_datasets(DataSection(train=str(tmp_path / "x.h5"), fields=tables), ["x", "y"])
    with pytest.raises(DatasetError, match="nothing in this file fits b_\\*/x"):
        open_datasets(
            DataSection(train=str(tmp_path / "x.h5"), fields={"x": FieldTable(path="b_*/x")}),
            ["x"],
        )


DOCUMENTS = ([5, 0, 9, 3], [1, 30, 2])
"""Tokens of the documents of each file."""


@pytest.mark.parametrize("world_size", [1, 3])
def test_documents_are_cut_in_file_order(tmp_path: Path, world_size: int) -> None:
    """One stream over the files; of each token its document and its place in that, from 0."""
    tokens = np.random.default_rng(1).integers(0, 999, 50).astype(np.uint16)
    first = sum(DOCUMENTS[0])
    for number, (counts, part) in enumerate(
        zip(DOCUMENTS, (tokens[:first], tokens[first:]), strict=True)
    ):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["tokens"], file["n"] = part, np.array(counts, np.uint8)
    dataset = opened(
        tmp_path,
        {
            "tokens": {
                "counts": "n",
                "batch": "pack",
                "max_length": 8,
                "sample": "document",
                "position": "position",
            }
        },
    )
    assert dataset.samples == 6
    owners = np.repeat(np.arange(7), [*DOCUMENTS[0], *DOCUMENTS[1]])
    order = Order(samples=6, seed=3, lanes=3, window=2, block_rows=1)
    served = []
    for rank in range(world_size):
        loader = train_loader(
            dataset,
            order,
            fields=["tokens"],
            global_batch_size=3,
            rank=rank,
            world_size=world_size,
        )
        for batch in loader.epoch(0):
            rows = loader.rows(0, batch.start, batch.start + batch.global_size).tolist()
            served += rows
            for i, row in enumerate(rows):
                own = owners[row * 8 : row * 8 + 8]
                assert batch.fields["tokens"][i].tolist() == tokens[row * 8 : row * 8 + 8].tolist()
                numbers = np.unique(own, return_inverse=True)[1]
                assert batch.fields["document"][i].tolist() == numbers.tolist()
                places = np.arange(8) - np.searchsorted(own, own)
                assert batch.fields["position"][i].tolist() == places.tolist()
        assert loader.example(2)["position"].shape == (2, 8)
        loader.close()
    assert sorted(served) == list(range(6))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["rows", "windows"])
def test_passes_of_so_many_values(folder: Path, kind: str, world_size: int) -> None:
    """As many passes on every rank, all samples in them once, none with too many values."""
    dataset, graphs = opened(folder), graphs_of(folder)
    order = Order(samples=len(graphs), seed=3, **ORDERS[kind])
    passes: list[list[int]] = []
    for rank in range(world_size):
        loader = train_loader(
            dataset,
            order,
            fields=list(FIELDS),
            global_batch_size=20,
            rank=rank,
            world_size=world_size,
            max_tokens=130,
            micro_batch_size=6,
        )
        assert loader.smallest_share == 0
        assert loader.largest_pass is not None
        passes.append([])
        for batch in loader.epoch(0):
            rows = loader.rows(0, batch.start, batch.start + batch.global_size).tolist()
            cuts = [cut for cut in batch.cuts if cut[0] < cut[1]]
            assert [row for first, stop in cuts for row in rows[first:stop]] == rows
            assert not batch.size or batch.cuts[-1] == cuts[-1]
            for first, stop in cuts:
                fields = batch.part(first, stop)
                require_equal(fields, collated([graphs[row] for row in rows[first:stop]]))
                assert max(fields["z"].numel(), len(fields["pos"]), len(fields["edge"])) <= 130
                assert stop - first <= 6
            passes[-1].append(len(batch.cuts))
        loader.close()
    assert max(passes[0]) > 1
    assert all(each == passes[0] for each in passes)
    with pytest.raises(DatasetError, match=r"data\.max_tokens = 20, but a sample has 29 values"):
        train_loader(dataset, order, fields=list(FIELDS), global_batch_size=20, max_tokens=20)


def test_an_evaluation_of_so_many_values(folder: Path) -> None:
    dataset, graphs = opened(folder), graphs_of(folder)
    row, batches, most = 0, [], set()
    for rank in range(3):
        loader = evaluation_loader(
            dataset, fields=list(FIELDS), rank=rank, world_size=3, batch_size=9, max_tokens=130
        )
        batches.append(len(loader))
        most.add(loader.most_batches)
        served = 0
        for batch in loader:
            require_equal(batch.fields, collated(graphs[row : row + batch.size]))
            assert batch.fields["z"].numel() <= 130
            row += batch.size
            served += 1
        assert served == batches[-1]
        loader.close()
    assert row == len(graphs)
    assert most == {max(batches)}


@pytest.fixture(scope="module", params=["groups", "files"])
def patches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One array and one label a sample, keyed by its name in one file, or a file each."""
    path = tmp_path_factory.mktemp(str(request.param))
    draw = np.random.default_rng(9)
    for number in range(12):
        one_file = request.param == "groups"
        name = "all.h5" if one_file else f"patient_{number}.h5"
        with h5py.File(path / name, "a") as file:
            group = file.create_group(f"patch_{number}") if one_file else file
            group["image"] = draw.integers(0, 255, (3, 5, 4), np.uint8)
            group["label"] = np.int64(number)
            chunked = {"chunks": (2, 3), "compression": "gzip"}
            group.create_dataset("mask", data=draw.random((5, 4)).astype(">f4"), **chunked)
    return path


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_array_a_sample(patches: Path, world_size: int) -> None:
    """Each is a row, in the natural order of keys: 2 before 10."""
    is_one_file = (patches / "all.h5").exists()
    names = ("image", "label", "mask")
    dataset = opened(
        patches,
        {n: {"path": f"patch_*/{n}" if is_one_file else n, "axis": "none"} for n in names},
    )
    assert {n: field.shape for n, field in dataset.fields.items()} == {
        "image": (3, 5, 4),
        "label": (),
        "mask": (5, 4),
    }
    stored: dict[str, Any] = {"image": np.empty((12, 3, 5, 4), "u1"), "mask": np.empty((12, 5, 4))}
    for row in range(12):
        with h5py.File(patches / ("all.h5" if is_one_file else f"patient_{row}.h5")) as file:
            for name, values in stored.items():
                values[row] = file[f"patch_{row}/{name}" if is_one_file else name]
    seen: list[int] = []
    for rank in range(world_size):
        loader = train_loader(
            dataset,
            Order(samples=12, seed=3, lanes=4, window=2, block_rows=2),
            fields=names,
            global_batch_size=5,
            rank=rank,
            world_size=world_size,
        )
        for batch in loader.epoch(0):
            rows = loader.rows(0, batch.start, batch.start + batch.global_size).tolist()
            assert batch.fields["label"].tolist() == rows
            for name, values in stored.items():
                np.testing.assert_array_equal(batch.fields[name], values[rows])
            seen += rows
        loader.close()
    assert sorted(seen) == list(range(12))


def test_a_single_value_has_no_rows(patches: Path) -> None:
    path = "patch_*/label" if (patches / "all.h5").exists() else "label"
    with pytest.raises(DatasetError, match=r'is a single value, .*axis = "none" takes it'):
        opened(patches, {"label": {"path": path}})
