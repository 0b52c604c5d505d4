"""Any HDF5 as it is: what comes out of a reader, against numpy on the same arrays."""

from __future__ import annotations

import itertools
import os
import pickle
import random
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.loaders import evaluation_loader, train_loader

from hpctrain.config.schema_data import DataSection, FieldTable, SamplesTable
from hpctrain.data.dataset import Dataset
from hpctrain.data.files import contents
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.order.epochs import plan_epoch
from hpctrain.data.order.order import Order, Sampling
from hpctrain.data.reading import other_axis
from hpctrain.data.reading.rows import open_rows
from hpctrain.data.reading.scatter import Destinations
from hpctrain.data.view import View
from hpctrain.errors import DatasetError

ROWS = (7, 2, 11)
BORDERS = np.cumsum(ROWS)
TOTAL = sum(ROWS)
MAPS = np.random.default_rng(0).integers(0, 10**6, (TOTAL, 3, 4), np.int32)
IDS = np.arange(TOTAL, dtype=">i8")
IS_GOOD = np.array([row not in (3, 8, 9, 15) for row in range(TOTAL)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as others write them: in groups, samples on the second axis, labels elsewhere."""
    path = tmp_path_factory.mktemp("views")
    (path / "maps").mkdir()
    (path / "labels").mkdir()
    for number, (start, stop) in enumerate(itertools.pairwise([0, *BORDERS.tolist()])):
        with h5py.File(path / "maps" / f"{number}.h5", "w") as file:
            file["fields/maps"] = MAPS[start:stop]
            axis_1 = np.moveaxis(MAPS[start:stop], 0, 1)
            file["fields/by_channel"] = axis_1
            file.create_dataset("zipped", data=axis_1, chunks=(2, 2, 4), compression="gzip")
            file["last"] = np.moveaxis(MAPS[start:stop], 0, 2).astype(">i4")
            file["few"] = IDS[start : stop - 1]
            file["good"] = IS_GOOD[start:stop]
    for number, (start, stop) in enumerate([(0, 13), (13, TOTAL)]):
        with h5py.File(path / "labels" / f"{number}.hdf5", "w") as file:
            file["id"] = IDS[start:stop]
    return path


def section(folder: Path, fields: dict[str, Any], **samples: Any) -> DataSection:
    tables = {
        name: FieldTable(
            **(table | ({"train": str(folder / table["train"])} if "train" in table else {}))
        )
        for name, table in fields.items()
    }
    return DataSection(
        train=str(folder / "maps" / "*.h5"),
        global_batch_size=4,
        fields=tables,
        samples=SamplesTable(**samples),
    )


def read_all(dataset: Dataset, runs: list[tuple[int, int]] | None = None) -> dict[str, np.ndarray]:
    """Read runs of (first sample, count), one after the other; all of them where none are given.

    They are read in both ways that there are, of which one puts every sample to its own place.
    """
    rows, counts = np.array(runs or [(0, dataset.samples)]).T
    reader = open_rows(dataset, retries=0)
    values = {}
    for name, field in dataset.fields.items():
        out = np.full((counts.sum(), field.row_bytes), 0xAA, np.uint8)
        reader.read_runs(name, rows, counts, out, np.cumsum(counts) - counts)
        values[name] = out.view(field.dtype.newbyteorder("=")).reshape(-1, *field.shape)
        places = np.random.default_rng(0).permutation(len(out))
        scattered = np.full_like(out, 0xAA)
        into = Destinations([scattered[:3], scattered[3:]], np.array([0, 3]))
        reader.scatter_runs(name, rows, counts, into, places)
        assert (scattered[places] == out).all()
    reader.close()
    return values


MAPS_FIELD = {"path": "/fields/maps"}
LABEL = {"path": "id", "train": "labels/*.hdf5"}


@pytest.mark.parametrize(
    ("path", "axis"), [("/fields/maps", 0), ("fields/by_channel", 1), ("zipped", 1), ("/last", 2)]
)
def test_rows_along_any_axis(folder: Path, path: str, axis: int) -> None:
    train, _ = open_datasets(section(folder, {"x": {"path": path, "axis": axis}}), ["x"])
    assert train.samples == TOTAL
    assert train.fields["x"].shape == (3, 4)
    assert (read_all(train)["x"] == MAPS).all()
    runs = [(5, 6), (0, 20), (19, 1), (8, 1)]
    expected = np.concatenate([MAPS[first : first + count] for first, count in runs])
    assert (read_all(train, runs)["x"] == expected).all()


@pytest.mark.parametrize("dtype", ["<i4", ">i4"])
def test_pieces_along_an_axis_are_read_without_hdf5(
    folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "LEAST_PIECE_BYTES", 16)
    monkeypatch.setattr(other_axis, "MOST_VECTORS", 3)
    path = folder / f"pieces{dtype[0] == '<'}.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.moveaxis(MAPS, 0, 1).astype(dtype)
    made = DataSection(
        train=str(path), global_batch_size=4, fields={"x": FieldTable(axis=1, steps=2)}
    )
    train, _ = open_datasets(made, ["x"])
    assert train.slow_fields() == {}
    no_file = type("NoFile", (), {"close": None})
    monkeypatch.setattr(h5py, "File", no_file)
    assert (read_all(train)["x"] == windows(list(range(TOTAL - 1)), 0, 2, 1)).all()
    # A file system may give less than was asked for, and nothing at the end.
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: whole(fd, [into[0][:5]], at))
    assert (read_all(train)["x"] == windows(list(range(TOTAL - 1)), 0, 2, 1)).all()
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(DatasetError, match=r'h5: field "x": the file ends at byte \d+'):
        read_all(train)


def test_fields_of_several_files_are_joined_row_by_row(folder: Path) -> None:
    train, validation = open_datasets(
        section(folder, {"x": MAPS_FIELD, "label": LABEL}), ["x", "label"]
    )
    assert validation is None
    values = read_all(train)
    assert (values["x"] == MAPS).all()
    assert (values["label"] == IDS).all()
    assert len(train.shards) == 5


def test_a_file_that_several_parts_read_is_one_shard(folder: Path) -> None:
    fields = {"x": MAPS_FIELD, "y": {"path": "zipped", "axis": 1}}
    train, _ = open_datasets(section(folder, fields), ["x", "y"])
    assert [shard.name for shard in train.shards] == ["0.h5", "1.h5", "2.h5"]
    assert set(train.shards[0].layouts) == {"fields/maps", "zipped"}
    assert train.chunk_rows == 2


def windows(rows: list[int], lead: int, steps: int | None, every: int) -> np.ndarray:
    offsets = lead + np.arange(steps or 1) * every
    values = MAPS[np.array(rows)[:, None] + offsets]
    return values if steps else values[:, 0]


@pytest.mark.parametrize("seed", range(40))
def test_windows(folder: Path, seed: int) -> None:
    """Inputs t .. t + k and a target at t + lead, of masks, ranges and files."""
    draw = random.Random(seed)
    tables = {
        name: {
            "steps": draw.choice([None, 1, 2, 3]),
            "lead": draw.choice([0, 1, 2]),
            "every": draw.choice([1, 1, 2]),
        }
        for name in ("past", "future")
    }
    samples = {
        "stride": draw.choice([1, 1, 2, 3, 5]),
        "across_files": draw.random() < 0.5,
        "train": draw.choice([None, "/good", (2, 18)]),
    }
    whole = {"path": "fields/by_channel", "axis": 1} if draw.random() < 0.5 else MAPS_FIELD
    fields = {name: whole | table for name, table in tables.items()}
    fields["label"] = LABEL
    reach = max(t["lead"] + ((t["steps"] or 1) - 1) * t["every"] + 1 for t in tables.values())

    selected = np.ones(TOTAL, bool)
    if samples["train"] == "/good":
        selected = IS_GOOD
    elif samples["train"] is not None:
        selected = (np.arange(TOTAL) >= 2) & (np.arange(TOTAL) < 18)
    borders = {0, TOTAL} if samples["across_files"] else {0, 13, *BORDERS.tolist()}
    if reach == samples["stride"] == 1:
        borders = {0, TOTAL}
    expected: list[int] = []
    row = 0
    last = -(10**6)
    for row in range(TOTAL):
        begins_run = selected[row] and (row in borders or not selected[row - 1])
        if begins_run:
            last = row
        fits = row + reach <= TOTAL and selected[row : row + reach].all()
        crosses = any(row < border < row + reach for border in borders)
        if selected[row] and fits and not crosses and (row - last) % samples["stride"] == 0:
            expected.append(row)
    names = list(fields)
    if not expected:
        with pytest.raises(DatasetError, match=r"there is no sample for data\.train"):
            open_datasets(section(folder, fields, **samples), names)
        return
    train, _ = open_datasets(section(folder, fields, **samples), names)
    train = pickle.loads(pickle.dumps(train))
    assert train.samples == len(expected)
    values = read_all(train)
    assert (values["label"] == IDS[expected]).all()
    for name, table in tables.items():
        assert (values[name] == windows(expected, **table)).all(), (name, table)
    runs = [(draw.randrange(train.samples), 1) for _ in range(6)]
    picked = [expected[first] for first, _ in runs]
    for name, table in tables.items():
        assert (read_all(train, runs)[name] == windows(picked, **table)).all()


def test_overlapping_windows_read_every_row_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpctrain.data.reading import rows as views

    train, _ = open_datasets(
        section(folder, {"x": MAPS_FIELD | {"steps": 4}}, across_files=True), ["x"]
    )
    assert isinstance(train, View)
    read: list[int] = []

    class Counting:
        def __init__(self, part: Any) -> None:
            self.inner = open_rows(part.dataset)

        def read_runs(self, name: str, rows: Any, counts: Any, out: Any, places: Any) -> None:
            for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
                read.extend(range(row, row + count))
            self.inner.read_runs(name, rows, counts, out, places)

        def close(self) -> None:
            self.inner.close()

    for scratch, most in ((2**25, TOTAL), (6 * MAPS[0].nbytes, 2 * TOTAL)):
        monkeypatch.setattr(views, "SCRATCH_BYTES", scratch)
        read.clear()
        access = views.ViewReader(train, Counting)  # type: ignore[arg-type]
        out = np.empty((train.samples, train.fields["x"].row_bytes), np.uint8)
        access.read_runs("x", np.array([0]), np.array([train.samples]), out, np.array([0]))
        access.close()
        expected = windows(list(range(TOTAL - 3)), 0, 4, 1)
        assert (out.view(np.int32).reshape(expected.shape) == expected).all()
        assert set(read) == set(range(TOTAL))
        assert len(read) <= most


@pytest.mark.parametrize("split_by", ["rows", "files"])
@pytest.mark.parametrize("seed", [0, 1])
def test_validation_as_a_fraction_of_the_same_rows(folder: Path, split_by: str, seed: int) -> None:
    made = section(
        folder,
        {"label": LABEL, "x": MAPS_FIELD},
        validation_fraction=0.3,
        split_seed=seed,
        split_by=split_by,
    )
    train, validation = open_datasets(made, ["label", "x"])
    assert validation is not None
    ids, held = (read_all(each)["label"].tolist() for each in (train, validation))
    assert sorted(ids + held) == IDS.tolist()
    assert ids == sorted(ids)
    if split_by == "rows":
        assert len(held) == 6
    else:
        borders = np.unique([13, *BORDERS])
        files = [
            {int(np.searchsorted(borders, row, "right")) for row in each} for each in (ids, held)
        ]
        assert not files[0] & files[1]
    again, _ = open_datasets(made, ["label", "x"])
    assert again.fingerprint == train.fingerprint != validation.fingerprint


def test_windows_of_a_split_share_no_row(folder: Path) -> None:
    made = section(
        folder,
        {"x": MAPS_FIELD | {"steps": 2}, "label": LABEL},
        validation_fraction=0.4,
        piece_rows=4,
        across_files=True,
    )
    train, validation = open_datasets(made, ["x", "label"])
    assert validation is not None
    used = [
        {row + i for row in read_all(each)["label"].tolist() for i in (0, 1)}
        for each in (train, validation)
    ]
    assert used[0]
    assert used[1]
    assert not used[0] & used[1]


@pytest.mark.parametrize("samples", [{"validation": (15, 20)}, {"validation": "good"}])
def test_validation_of_its_own_rows(folder: Path, samples: dict[str, Any]) -> None:
    train, validation = open_datasets(
        section(folder, {"label": LABEL}, train=(0, 15), **samples), ["label"]
    )
    assert read_all(train)["label"].tolist() == list(range(15))
    assert validation is not None
    expected = IDS[IS_GOOD] if samples["validation"] == "good" else IDS[15:]
    assert (read_all(validation)["label"] == expected).all()


@pytest.mark.parametrize(
    ("fields", "samples", "message"),
    [
        ({"x": {"path": "fields/map"}}, {}, r'no field "fields/map"\. Did you mean "fields/maps"'),
        (
            {"x": {"path": "good", "axis": 1}},
            {},
            r'0\.h5: field "good" has the shape \(7,\), and no',
        ),
        (
            {"x": {"path": "few"}, "label": LABEL},
            {},
            r"joined row by row, but few of .*\*\.h5 has 17 rows and id of .*\*\.hdf5 20",
        ),
        ({"x": MAPS_FIELD | {"steps": 12}}, {}, r"one reaches over 12 rows .* has 11"),
        ({"x": MAPS_FIELD}, {"train": (0, 21)}, r"data\.samples\.train = \[0, 21\].* 20 rows"),
        ({"x": MAPS_FIELD}, {"train": "fields/maps"}, r'"fields/maps" is not a mask: it is int32'),
        ({"x": MAPS_FIELD}, {"train": "god"}, r'no field "god"\. Did you mean "good"'),
        ({"x": {"path": "few"}}, {"train": "good"}, r'mask "good" has 20 rows, .* have 17'),
        (
            {"x": MAPS_FIELD},
            {"validation_fraction": 0.1, "piece_rows": 50},
            r"make one piece only: set data\.samples\.piece_rows lower",
        ),
    ],
)
def test_what_does_not_fit_is_told(
    folder: Path, fields: dict[str, Any], samples: dict[str, Any], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        open_datasets(section(folder, fields, **samples), list(fields))


def test_fields_along_an_axis_of_different_length(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"0\.h5: the fields have different numbers of rows"):
        open_datasets(
            section(folder, {"x": MAPS_FIELD, "y": {"path": "fields/by_channel"}}), ["x", "y"]
        )


@pytest.mark.parametrize(
    ("world_size", "sampling"),
    [(1, "shuffled"), (2, "shuffled"), (3, "shuffled"), (1, "sequential"), (3, "sequential")],
)
def test_loaders_serve_views_as_any_dataset(
    folder: Path, world_size: int, sampling: Sampling
) -> None:
    """The same global batches at any world size; evaluation sees every sample exactly once."""
    made = section(
        folder,
        {
            "x": {"path": "zipped", "axis": 1, "steps": 2},
            "y": {"path": "zipped", "axis": 1, "lead": 2},
            "label": LABEL,
        },
        train="good",
        validation=(0, 20),
        across_files=True,
    )
    train, validation = open_datasets(made, list(made.fields))
    assert validation is not None
    block_rows = 2 if sampling == "shuffled" else 1
    order = Order(
        samples=train.samples,
        seed=1,
        lanes=4,
        window=2,
        block_rows=block_rows,
        sampling=sampling,
    )
    served: dict[int, list[int]] = {}
    evaluated: list[int] = []
    for rank in range(world_size):
        loader = train_loader(
            train,
            order,
            fields=list(made.fields),
            global_batch_size=4,
            rank=rank,
            world_size=world_size,
        )
        for batch in loader.epoch(0):
            labels = batch.fields["label"].tolist()
            assert (batch.fields["x"].numpy() == windows(labels, 0, 2, 1)).all() or not labels
            assert (batch.fields["y"].numpy() == windows(labels, 2, None, 1)).all() or not labels
            served.setdefault(batch.start, []).extend(labels)
        runs = loader.runs(np.arange(train.samples))
        assert sum(last - first + 1 for _, first, last in runs) == train.samples
        loader.close()
        evaluation = evaluation_loader(
            validation,
            fields=["label"],
            rank=rank,
            world_size=world_size,
            batch_size=3,
        )
        evaluated += [label for batch in evaluation for label in batch.fields["label"].tolist()]
        evaluation.close()
    assert {start: sorted(labels) for start, labels in served.items()} == _batches(train, order)
    assert sorted(evaluated) == list(range(TOTAL - 2))


def _batches(train: Dataset, order: Order) -> dict[int, list[int]]:
    labels = read_all(train)["label"]
    rows = plan_epoch(order, 0).rows(np.arange(train.samples))
    return {
        start: sorted(labels[rows[start : start + 4]].tolist())
        for start in range(0, train.samples, 4)
    }
