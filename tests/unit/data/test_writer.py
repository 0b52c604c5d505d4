"""Writing a dataset and its index."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.loaders import evaluation_loader

from hpctrain.config.schema_data import DataSection, FieldTable
from hpctrain.data import Ragged, Writer, open_dataset
from hpctrain.data.files.index import INDEX_VERSION, damaged_shards, sealed
from hpctrain.data.files.storage import Storage
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.errors import DatasetError
from hpctrain.launch.communicators import SingleCommunicator

SAMPLES = {
    "x": np.arange(60, dtype="f4").reshape(10, 2, 3),
    "y": np.arange(10, dtype=">u2"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of 10 samples in shards of 4, 4 and 2."""
    folder = tmp_path / "data"
    with Writer(folder, shard_bytes=4 * 26, attributes={"x": {"units": "kelvin"}}) as writer:
        for i in range(3):
            writer.append({name: values[i] for name, values in SAMPLES.items()})
        writer.extend({name: values[3:] for name, values in SAMPLES.items()})
    return folder


def test_shards_are_plain_hdf5(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.json",
        "shard-000000.h5",
        "shard-000001.h5",
        "shard-000002.h5",
    ]
    parts = []
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            assert file["x"].chunks is None
            assert file["x"].attrs["units"] == "kelvin"
            assert file["y"].dtype == np.dtype("=u2")
            parts.append(file["x"][...])
    assert [len(part) for part in parts] == [4, 4, 2]
    assert (np.concatenate(parts) == SAMPLES["x"]).all()


def test_index_says_what_hdf5_says(folder: Path) -> None:
    indexed = open_dataset(str(folder))
    (folder / "index.json").unlink()
    inspected = open_dataset(str(folder))
    assert indexed.fields == inspected.fields
    for one, other in zip(indexed.shards, inspected.shards, strict=True):
        assert (one.path, one.samples, one.size) == (other.path, other.samples, other.size)
        assert one.layouts == other.layouts
    assert damaged_shards(indexed) == []


def test_select(folder: Path) -> None:
    dataset = open_dataset(str(folder), ["y"])
    assert list(dataset.fields) == list(dataset.shards[0].layouts) == ["y"]
    assert dataset.fingerprint == open_dataset(str(folder)).fingerprint
    with pytest.raises(DatasetError, match=r'there is no field "z"\. It has: x, y'):
        open_dataset(str(folder), ["z"])


def test_flipped_byte_is_found_by_checksum(folder: Path) -> None:
    path = folder / "shard-000001.h5"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert damaged_shards(open_dataset(str(folder))) == [str(path)]


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "index.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_bytes(sealed(document))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "shard-000001.h5").unlink(), r"shard-000001\.h5: this shard is missing"),
        (
            lambda f: (f / "shard-000001.h5").write_bytes(b"short"),
            r"shard-000001\.h5: 5 bytes, where index\.json says \d+: it is truncated",
        ),
        (
            lambda f: (f / "shard-000001.h5").write_bytes(bytes(10**5)),
            r"100000 bytes, .*the index is older than the file",
        ),
        (lambda f: (f / "more.h5").touch(), r"index\.json does not list more\.h5"),
        (lambda f: (f / "index.json").write_text("{"), r"index\.json: .*it is not JSON"),
        (lambda f: (f / "index.json").write_bytes(b"\xff"), r"index\.json: .*it is not JSON"),
        (lambda f: (f / "index.json").write_text("[]"), r"the document is list, not dict"),
        (lambda f: (f / "index.json.unfinished").touch(), r"still being written"),
        (edit(lambda d: d.update(version=INDEX_VERSION + 1)), r"newer hpctrain.*update hpctrain"),
        (edit(lambda d: d.pop("version")), r"version is missing"),
        (edit(lambda d: d.update(version=True)), r"version is bool, not int"),
        (edit(lambda d: d.update(samples=11)), r"samples is not the sum over the shards, 10"),
        (edit(lambda d: d.update(shards=[])), r"shards is empty"),
        (edit(lambda d: d.update(fields={})), r"shards\[0\]\.layouts is not about"),
        (edit(lambda d: d["fields"]["x"].update(dtype="f3")), r"fields\.x\.dtype .*is not a dtype"),
        (edit(lambda d: d["fields"]["x"].update(dtype="S3")), r'field "x" has dtype \|S3'),
        (edit(lambda d: d["fields"]["x"].update(shape=[-1])), r"fields\.x\.shape is -1"),
        (edit(lambda d: d["shards"][1].update(samples="4")), r"shards\[1\]\.samples is str"),
        (edit(lambda d: d["shards"][1].update(samples=0)), r"shards\[1\]\.samples is 0"),
        (edit(lambda d: d["shards"][1].update(file="../x.h5")), r"shards\[1\]\.file is not"),
        (
            edit(lambda d: d["shards"][1].update(file="shard-000000.h5")),
            r"shard-000000\.h5: this shard is missing, or listed twice",
        ),
        (
            edit(lambda d: d["shards"][1]["layouts"]["y"].update(offset=10**6)),
            r"shards\[1\]\.layouts\.y\.offset leads past the end",
        ),
    ],
)
def test_index_that_does_not_hold(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(str(folder))
    assert str(folder) in str(caught.value)


def test_writer_refuses_to_overwrite(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DatasetError, match="there is a dataset, or a part of one"), Writer(folder):
        pass
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_exception_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "data"

    def write_and_fail() -> None:
        with Writer(folder, shard_bytes=8) as writer:
            writer.extend({"x": np.arange(10)})
            assert (folder / "shard-000000.h5").exists()
            with pytest.raises(DatasetError, match="still being written"):
                open_dataset(str(folder))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"x": np.zeros(3)}, r"sample 1 has x float64 \(3,\); the first one had x float32 \(2,\)"),
        ({"x": np.zeros(2)}, r"x float64 \(2,\)"),
        ({"y": np.zeros(2, "f4")}, r"y float32"),
        ({}, r"different numbers of samples"),
    ],
)
def test_samples_that_do_not_fit(
    tmp_path: Path, second: dict[str, np.ndarray], message: str
) -> None:
    with Writer(tmp_path / "data") as writer:
        writer.append({"x": np.zeros(2, "f4")})
        with pytest.raises(DatasetError, match=message):
            writer.append(second)


@pytest.mark.parametrize(
    ("samples", "attributes", "message"),
    [
        ({"x": np.array(["a"])}, {}, r'field "x" has dtype <U1'),
        ({"x": np.zeros(3), "y": np.zeros(2)}, {}, r"different numbers of samples"),
        ({"x": np.zeros(3)}, {"z": {"units": "m"}}, r"attributes for z"),
        ({"x": np.zeros(0)}, {}, r"no sample was written"),
    ],
)
def test_first_samples_that_cannot_be(
    tmp_path: Path,
    samples: dict[str, np.ndarray],
    attributes: dict[str, dict[str, str]],
    message: str,
) -> None:
    with (
        pytest.raises(DatasetError, match=message),
        Writer(tmp_path / "data", attributes=attributes) as writer,
    ):
        writer.extend(samples)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"shard_rows": 3}, [3, 3, 3, 1]),
        ({"shard_rows": 10}, [10]),
        ({"shard_bytes": 52}, [2, 2, 2, 2, 2]),
        ({"shard_bytes": 1}, [1] * 10),
        ({"shard_bytes": 52, "shard_rows": 9}, [9, 1]),
    ],
)
def test_shards_of_rows_or_bytes(tmp_path: Path, options: dict[str, int], rows: list[int]) -> None:
    with Writer(tmp_path / "data", **options) as writer:
        writer.extend(SAMPLES)
    assert [shard.samples for shard in open_dataset(str(tmp_path / "data")).shards] == rows


def test_chunks_and_filters(tmp_path: Path) -> None:
    storage = Storage("gzip", level=1, chunk_bytes=48)
    with Writer(tmp_path / "data", shard_rows=6, storage=storage) as writer:
        writer.extend(SAMPLES)
    with h5py.File(tmp_path / "data" / "shard-000001.h5") as file:
        assert (file["x"].chunks, file["y"].chunks) == ((2, 2, 3), (2,))
        assert (file["x"].compression, file["x"].compression_opts) == ("gzip", 1)
        assert (file["x"][...] == SAMPLES["x"][6:]).all()


def test_shards_are_whole_chunks_and_small_fields_contiguous(tmp_path: Path) -> None:
    values = {"x": np.zeros((40, 100), "u1"), "label": np.arange(40, dtype="u1")}
    storage = Storage("lzf", chunk_bytes=700)
    with Writer(tmp_path / "data", shard_bytes=2000, storage=storage) as writer:
        writer.extend(values)
    dataset = open_dataset(str(tmp_path / "data"))
    assert [shard.samples for shard in dataset.shards] == [14, 14, 12]
    assert dataset.slow_fields() == {}
    assert dataset.chunk_rows == 7


def test_a_collective_of_one(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with Writer(folder, shard_rows=6, communicator=SingleCommunicator()) as writer:
        writer.extend(SAMPLES)
    dataset = open_dataset(str(folder))
    assert [shard.name for shard in dataset.shards] == [
        "shard-000000-000000.h5",
        "shard-000000-000001.h5",
    ]
    assert (dataset.samples, damaged_shards(dataset)) == (10, [])


def test_large_fields_are_aligned(tmp_path: Path) -> None:
    with Writer(tmp_path / "data") as writer:
        writer.extend({"x": np.zeros((5, 2**22), "u1"), "label": np.zeros(5)})
    shard = open_dataset(str(tmp_path / "data")).shards[0]
    assert shard.layouts["x"].offset == 2**20
    assert shard.size < 1.07 * 5 * 2**22


LENGTHS = (0, 0, 3, 1, 0, 7, 2, 0, 0, 5, 4, 0)
SENTENCES = [np.arange(n, dtype=">u2") + 10 * i for i, n in enumerate(LENGTHS)]
ATOMS = [np.full((n % 3 + 1, 3), i, "f4") for i, n in enumerate(LENGTHS)]


def delivered(folder: Path, fields: list[str]) -> dict[str, list[list[Any]]]:
    """Return the samples of a folder by our own fields of unequal length."""
    tables = {
        name: FieldTable(counts=f"{name}_counts", batch="concat") for name in fields if name != "y"
    }
    section = DataSection(train=str(folder), global_batch_size=5, fields=tables)
    loader = evaluation_loader(open_datasets(section, fields)[0], fields=fields, batch_size=5)
    found: dict[str, list[list[Any]]] = {name: [] for name in fields}
    for batch in loader:
        for name in fields:
            values = batch.fields[name]
            if name in tables:
                offsets = batch.fields[f"{name}.offsets"].tolist()
                values = [values[a:b] for a, b in itertools.pairwise(offsets)]
            found[name] += [each.tolist() for each in values]
    loader.close()
    return found


@pytest.mark.parametrize("how", ["append", "lists", "Ragged"])
@pytest.mark.parametrize(
    ("size", "num_shards"),
    [({"shard_rows": 1}, 6), ({"shard_rows": 4}, 3), ({"shard_bytes": 60}, 5), ({}, 1)],
)
def test_samples_of_unequal_length(
    tmp_path: Path, how: str, size: dict[str, int], num_shards: int
) -> None:
    """Every shard has values, also where samples have none, and every sample its own."""
    samples = {"words": SENTENCES, "atoms": ATOMS, "y": list(range(len(LENGTHS)))}
    with Writer(tmp_path / "out", ragged=["words", "atoms"], **size) as writer:
        if how == "append":
            for i in range(len(LENGTHS)):
                writer.append({name: each[i] for name, each in samples.items()})
        else:
            of = Ragged.of if how == "Ragged" else list
            for part in (slice(0, 5), slice(5, None)):
                writer.extend(
                    {
                        name: np.array(each[part]) if name == "y" else of(each[part])
                        for name, each in samples.items()
                    }
                )
    found = delivered(tmp_path / "out", ["words", "atoms", "y"])
    assert found == {name: [np.asarray(x).tolist() for x in v] for name, v in samples.items()}
    shards = open_dataset(str(tmp_path / "out")).shards
    assert len(shards) == num_shards
    with h5py.File(shards[0].path) as file:
        assert file["words"].dtype == np.dtype("=u2")


def test_bytes_of_unequal_samples_do_not_depend_on_how_they_came(tmp_path: Path) -> None:
    for name in ("one", "other"):
        with Writer(tmp_path / name, ragged="words", shard_rows=4) as writer:
            if name == "one":
                writer.extend({"words": SENTENCES})
            else:
                for sentence in SENTENCES:
                    writer.append({"words": sentence})
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_unequal_samples_that_do_not_fit(tmp_path: Path) -> None:
    def written(*samples: dict[str, Any], ragged: tuple[str, ...] = ("x",)) -> None:
        with Writer(tmp_path / "out", ragged=ragged) as writer:
            for sample in samples:
                writer.extend(sample)

    for message, arguments in {
        r"has x float32 \(any, \*\(\)\); the first one had x float64 \(any": (
            {"x": [np.zeros(3)]},
            {"x": [np.zeros(2, "f4")]},
        ),
        r'name it in Writer\(\.\.\., ragged=\["y"\]\)': ({"y": Ragged.of([np.zeros(3)])},),
        r'there is no field "x"': ({"y": np.zeros(3)},),
        r'stored as "x_counts", and there is such a field': (
            {"x": [np.zeros(3)], "x_counts": np.zeros(1)},
        ),
        r'field "x" has no value in any of the 2 samples': ({"x": [np.zeros(0), np.zeros(0)]},),
        r'field "x": give samples of unequal length as arrays of one dtype': (
            {"x": [np.zeros(2), np.zeros(2, "i4")]},
        ),
        r"different numbers of samples: \{'x': 1, 'y': 2\}": (
            {"x": [np.zeros(2)], "y": np.zeros(2)},
        ),
    }.items():
        with pytest.raises(DatasetError, match=message):
            written(*arguments)
        assert not list((tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="the counts make 5 values, but there are 4"):
        Ragged(np.zeros(4), np.array([2, 3]))
    with pytest.raises(ValueError, match="fewer than 0"):
        Ragged(np.zeros(1), np.array([2, -1]))
