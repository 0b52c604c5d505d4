"""Batches decoded on the device: the bits of the host's decoding, whatever the files say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers.loaders import evaluation_loader, train_loader
from helpers.packed_variables import F4, RANGES, VARIABLES, stored

from hpctrain.config.schema_data import DataSection, FieldTable, SamplesTable
from hpctrain.data import open_dataset
from hpctrain.data.coding import Coding
from hpctrain.data.dataset import Dataset
from hpctrain.data.decoding import FieldDecoding, decodings
from hpctrain.data.loading.batch_transform import BatchTransform, Missing, Scale
from hpctrain.data.loading.decoder import Decoder, Decoding
from hpctrain.data.loading.preparation import SamplePreparation
from hpctrain.data.loading.worker_pool import WorkerPool
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.order.order import Order
from hpctrain.data.reading.rows import read_rows
from hpctrain.errors import ConfigError, DatasetError

CPU = torch.device("cpu")
BATCH = 8


def write(path: Path, numbers: np.ndarray, name: str = "x", **attributes: Any) -> None:
    with h5py.File(path, "a") as file:
        file[name] = numbers
        file[name].attrs.update(attributes)


def decode(
    dataset: Dataset, integers: tuple[str, ...] = (), missing: Mapping[str, Missing] | None = None
) -> Decoding:
    found = decodings([dataset], integers)[0]
    return Decoding(on_device=Decoder(found, missing or {}, CPU))


def served(dataset: Dataset, decoding: Decoding, **keywords: Any) -> dict[int, dict[str, Any]]:
    """Return every sample of an epoch by its field `id`, as training and evaluation serve it."""
    in_common: dict[str, Any] = {
        "fields": list(dataset.fields),
        "decoding": decoding,
        **keywords,
    }
    memory = in_common.pop("memory", None)
    order = Order.for_dataset(
        dataset, seed=3, global_batch_size=BATCH, is_resident=memory is not None
    )
    train = train_loader(
        dataset, order, global_batch_size=BATCH, drop_last=False, memory=memory, **in_common
    )
    validation = evaluation_loader(dataset, batch_size=BATCH, **in_common)
    found: list[dict[int, dict[str, Any]]] = []
    for loader, batches in ((train, train.epoch(0)), (validation, iter(validation))):
        samples = {}
        for batch in batches:
            for i, number in enumerate(batch.fields["id"].flatten().tolist()):
                samples[number] = {k: v[i].numpy().copy() for k, v in batch.fields.items()}
        found.append(samples)
        loader.close()
    assert found[0].keys() == found[1].keys()
    for number, sample in found[0].items():
        for name, values in sample.items():
            assert np.array_equal(
                values, found[1][number][name], equal_nan=values.dtype.kind == "f"
            )
    return found[0]


@pytest.mark.parametrize("name", [*VARIABLES, *(f"{name}_" for name in RANGES)])
def test_the_device_decodes_as_the_host_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("hpctrain.data.loading.decoder.PART_VALUES", 7)
    dtype, attributes = VARIABLES[name] if name in VARIABLES else RANGES[name[:-1]]
    write(tmp_path / "a.h5", stored(dtype), **attributes)
    # A second file that says other things: then all numbers are looked up in tables.
    others = {k: v for k, v in attributes.items() if k in ("_Unsigned", "valid_min")}
    write(tmp_path / "b.h5", stored(dtype, 1), **others)
    write(tmp_path / "c.h5", stored(dtype, 2), **others, add_offset=F4(1), scale_factor=F4(0.1))
    for pattern in ("a.h5", "[ab].h5", "*.h5"):
        dataset = open_dataset(str(tmp_path / pattern), ["x"])
        found = decodings([dataset])[0]
        if not found:
            continue
        rows = np.arange(dataset.samples)
        numbers = read_rows(dataset, rows)["x"]
        decoder = Decoder(found, {}, CPU)
        tensors = decoder.apply({"x": torch.from_numpy(numbers.copy())}, decoder.codes(rows))
        expected = found["x"].decode(numbers, found["x"].codes(rows))
        assert tensors["x"].numpy().dtype == expected.dtype
        assert np.array_equal(
            tensors["x"].numpy(), expected, equal_nan=expected.dtype.kind == "f"
        ), pattern


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Make three files of packed fields, each with a scale of its own."""
    for number, (scale, offset) in enumerate([(0.5, 1.0), (0.25, 1.0), (3.0, -7.0)]):
        numbers = np.random.default_rng(number).integers(-99, 99, (20, 2, 3), np.int16)
        numbers[::6] = -99
        path = tmp_path / f"{number}.h5"
        write(path, numbers, scale_factor=scale, add_offset=offset, _FillValue=np.int16(-99))
        write(path, np.arange(20 * number, 20 * (number + 1)), "id")
        write(path, numbers[:, 0, 0].astype("f4"), "plain")
    return tmp_path


def expected(files: Path) -> np.ndarray:
    values = []
    for path in sorted(files.glob("*.h5")):
        with h5py.File(path) as file:
            said = dict(file["x"].attrs)
            numbers = file["x"][:]
            each = (numbers * said["scale_factor"] + said["add_offset"]).astype("f4")
            each[numbers == -99] = np.nan
            values.append(each)
    return np.concatenate(values)


def test_every_sample_has_the_scale_of_its_file(files: Path) -> None:
    dataset = open_dataset(str(files))
    values = expected(files)
    plain = read_rows(dataset, np.arange(60))
    memory = {name: each.view(np.uint8).reshape(60, -1) for name, each in plain.items()}
    for keywords in ({}, {"memory": memory}, {"buffer_mb": 0.001}):
        samples = served(dataset, decode(dataset), **keywords)
        assert sorted(samples) == list(range(60))
        for number, sample in samples.items():
            assert np.array_equal(sample["x"], values[number], equal_nan=True)
            assert sample["plain"] == plain["plain"][number]


@pytest.mark.parametrize("across_files", [False, True])
def test_windows_of_rows_of_several_files(files: Path, across_files: bool) -> None:
    section = DataSection(
        train=str(files),
        global_batch_size=BATCH,
        fields={"x": FieldTable(steps=3, every=2, lead=1), "part": FieldTable(path="x", steps=1)},
        samples=SamplesTable(train=(2, 57), across_files=across_files),
    )
    view, _ = open_datasets(section, ["x", "id", "part"])
    values = expected(files)
    samples = served(view, decode(view))
    assert len(samples) == view.samples
    for number, sample in samples.items():
        rows = [number + 1, number + 3, number + 5]
        assert np.array_equal(sample["x"], values[rows], equal_nan=True)
        assert np.array_equal(sample["part"][0], values[number], equal_nan=True)


def test_a_field_can_be_taken_as_it_is_stored(files: Path) -> None:
    stored_x = FieldTable(path="x", decode="none")
    section = DataSection(
        train=str(files), global_batch_size=BATCH, fields={"raw": stored_x, "x": FieldTable()}
    )
    view, _ = open_datasets(section, ["raw", "x", "id"])
    samples = served(view, decode(view))
    raw = read_rows(view, np.arange(60))["raw"]
    assert all(np.array_equal(sample["raw"], raw[number]) for number, sample in samples.items())
    assert samples[0]["raw"].dtype == np.int16
    assert samples[0]["x"].dtype == np.float32
    plain, _ = open_datasets(
        dataclasses.replace(section, fields={"x": FieldTable(decode="none")}), ["x"]
    )
    assert plain.fingerprint == open_dataset(str(files)).fingerprint, "it is no view"
    assert decodings([plain]) == [{}]


def doubled(
    fields: dict[str, Any], generator: np.random.Generator, *, training: bool
) -> dict[str, Any]:
    assert fields["x"].dtype == np.float32
    return {**fields, "x": fields["x"] * 2}


def test_a_transform_of_samples_sees_values(files: Path) -> None:
    dataset = open_dataset(str(files))
    found = decodings([dataset])[0]
    pool = WorkerPool.of("data.sample_transform", f"{__name__}:doubled", {}, 1, None)
    preparation = SamplePreparation(
        "doubled", pool, dataset, needed=["x"], row=5, training=True, decodings=found
    )
    assert preparation.fields["x"].dtype == np.float32
    samples = served(dataset, Decoding(on_host=found), preparation=preparation)
    values = expected(files)
    for number, sample in samples.items():
        assert np.array_equal(sample["x"], 2 * values[number], equal_nan=True)
    pool.close()


def test_missing_values_become_a_number_and_a_mask(files: Path) -> None:
    dataset = open_dataset(str(files))
    scale = Scale(torch.tensor([3.0]), torch.tensor([2.0]))
    batch_transform = BatchTransform({"x": scale}, missing={"x": Missing(0.0, "x_mask")})
    samples = served(dataset, decode(dataset), batch_transform=batch_transform)
    for number, values in enumerate(expected(files)):
        is_missing = np.isnan(values)
        assert np.array_equal(samples[number]["x_mask"], (~is_missing).astype("f4"))
        normal = np.where(is_missing, 0, (values - np.float32(3)) / np.float32(2))
        assert np.array_equal(samples[number]["x"], normal)


@pytest.fixture
def labels(tmp_path: Path) -> Dataset:
    for number, fill in enumerate([-1, 7]):
        numbers = (np.arange(40).reshape(10, 4) % 5).astype("i2")
        numbers[3, 1] = fill
        write(tmp_path / f"{number}.h5", numbers, "label", _FillValue=np.int16(fill))
        write(tmp_path / f"{number}.h5", np.arange(10 * number, 10 * number + 10), "id")
    return open_dataset(str(tmp_path))


@pytest.mark.parametrize("fill", [None, 4.0])
def test_integers_stay_and_a_mask_tells_the_missing(labels: Dataset, fill: float | None) -> None:
    decoding = decode(labels, ("label",), {"label": Missing(fill, "mask")})
    samples = served(labels, decoding)
    numbers = read_rows(labels, np.arange(20))["label"]
    for number, sample in samples.items():
        is_missing = numbers[number] == (-1 if number < 10 else 7)
        assert sample["label"].dtype == np.int16
        assert np.array_equal(sample["mask"], (~is_missing).astype("f4"))
        kept = numbers[number] if fill is None else np.where(is_missing, 4, numbers[number])
        assert np.array_equal(sample["label"], kept)
    with pytest.raises(ConfigError, match=r"label\.fill = 0\.5: the field stays int16"):
        decode(labels, ("label",), {"label": Missing(0.5)})


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i8"])
def test_integers_of_every_kind_are_masked(tmp_path: Path, dtype: str) -> None:
    top = np.iinfo(dtype).max
    numbers = np.array([0, 1, top, top - 1], dtype)
    write(tmp_path / "a.h5", numbers, valid_max=numbers[3], _FillValue=numbers[1])
    dataset = open_dataset(str(tmp_path / "a.h5"))
    found = decodings([dataset], ["x"])[0]
    decoder = Decoder(found, {"x": Missing(3, "mask")}, CPU)
    made = decoder.apply({"x": torch.from_numpy(numbers.copy())}, {})
    assert made["x"].numpy().tolist() == [0, 3, 3, top - 1]
    assert made["x"].numpy().dtype == np.dtype(dtype)
    assert made["mask"].tolist() == [1, 0, 0, 1]


def test_without_a_mask_a_missing_integer_is_refused(labels: Dataset) -> None:
    found = decodings([labels], ["label"])[0]
    refusing = Decoding(on_device=Decoder(found, {}, CPU), refused=list(found.values()))
    with pytest.raises(DatasetError, match=r'[01]\.h5: field "label", row 3: (-1|7) is a missing'):
        served(labels, refusing)
    loader = evaluation_loader(
        labels,
        fields=["label"],
        batch_size=20,
        buffer_mb=1,
        decoding=refusing,
    )
    with pytest.raises(DatasetError, match=r'0\.h5: field "label", row 3: -1 is a missing'):
        loader.examples(20)


def test_fields_without_attributes_cost_nothing(tmp_path: Path) -> None:
    """The tensors are handed on as they are, and nobody asks which rows they are of."""
    write(tmp_path / "a.h5", np.arange(12.0).reshape(6, 2), units="K", scale_factor_of="none")
    found = decodings([open_dataset(str(tmp_path / "a.h5"))])[0]
    assert not found
    decoder = Decoder(found, {}, CPU)
    values = torch.ones(3)
    fields = {"x": values}
    assert decoder.apply(fields, decoder.codes(None)) is fields
    assert not Decoding(on_device=decoder).needs_samples


def test_one_coding_for_all_files_needs_no_rows(files: Path) -> None:
    one = open_dataset(str(files / "1.h5"))
    assert not decode(one).needs_samples
    assert decode(open_dataset(str(files))).needs_samples
    assert one.codings("x") == (Coding(missing=(-99,), scale=0.25, offset=1.0),)
    assert isinstance(decodings([one])[0]["x"], FieldDecoding)
