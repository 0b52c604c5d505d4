"""Tools see the values that training sees, whatever the files say of their numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpctrain.cli import main
from hpctrain.config.schema_data import DataSection, SamplesTable
from hpctrain.config.semantics import FIRST
from hpctrain.data import open_dataset
from hpctrain.data.decoding import decoded_rows, decodings
from hpctrain.data.files.index import sealed
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.reading.rows import read_rows
from hpctrain.data.stats import STATS_NAME, read_stats
from hpctrain.errors import DatasetError

FILL = np.int16(-99)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make two folders of two files: of one scale, and of different ones."""
    monkeypatch.chdir(tmp_path)
    for folder, scales in (("same", (0.5, 0.5)), ("own", (0.5, 2.0))):
        (tmp_path / folder).mkdir()
        for number, scale in enumerate(scales):
            numbers = np.random.default_rng(number).integers(-90, 90, (12, 2, 3), np.int16)
            numbers[2::5, 1] = FILL
            with h5py.File(tmp_path / folder / f"{number}.h5", "w") as file:
                file["x"], file["id"] = numbers, np.arange(12 * number, 12 * number + 12)
                said = {"scale_factor": scale, "add_offset": 280.0, "_FillValue": FILL}
                file["x"].attrs.update(units="K", **said)
    return tmp_path


def data(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["data", *arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def values(folder: str) -> np.ndarray:
    """Return the values of `x`, in the order of `id`."""
    dataset = open_dataset(folder)
    rows = np.arange(dataset.samples)
    arrays = decoded_rows(read_rows(dataset, rows), rows, decodings([dataset])[0])
    return arrays["x"][np.argsort(arrays["id"])]


def by_hand(folder: str) -> np.ndarray:
    parts = []
    for path in sorted(Path(folder).glob("*.h5")):
        with h5py.File(path) as file:
            numbers = file["x"][:]
            each = (numbers * file["x"].attrs["scale_factor"] + 280.0).astype("f4")
            each[numbers == FILL] = np.nan
            parts.append(each)
    return np.concatenate(parts)


@pytest.mark.parametrize("folder", ["same", "own"])
def test_statistics_are_those_of_values(
    site: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    expected = by_hand(folder).astype("f8")
    assert np.array_equal(values(folder), expected, equal_nan=True)
    assert "NaN or Inf left out" in data(capsys, "stats", folder, "--jobs", "1")
    facts = json.loads(Path(folder, STATS_NAME).read_text())["fields"]["x"]
    assert facts["mean"] == pytest.approx(np.nanmean(expected), rel=1e-12)
    assert facts["std"] == pytest.approx(np.nanstd(expected), rel=1e-12)
    assert facts["non_finite"] == np.isnan(expected).sum()
    of_channels = np.nanmean(expected, axis=(0, 2))
    assert facts["channels"]["mean"] == pytest.approx(of_channels, rel=1e-12)
    dataset = open_dataset(folder)
    path = Path(folder, STATS_NAME)
    assert read_stats(path, dataset, ["x", "id"])["x"] == facts
    stored = dataset.as_stored(["x"])
    with pytest.raises(DatasetError, match=r'of "x" are those of decoded values.* --stored$'):
        read_stats(path, stored, ["x"])
    data(capsys, "stats", folder, "--jobs", "1", "--stored")
    facts = json.loads(path.read_text())["fields"]["x"]
    assert facts["min"] == FILL
    assert "decoding" not in facts
    assert read_stats(path, stored, ["x"])["x"] == facts
    with pytest.raises(DatasetError, match='of "x" are those of numbers as they are stored'):
        read_stats(path, dataset, ["x"])


def test_a_channel_without_a_value_has_no_statistics(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with h5py.File("land.h5", "w") as file:
        for name in ("said", "unsaid"):
            file[name] = np.ones((4, 2, 3), "f4") * [[np.nan], [3]]
        file["said"].attrs["_FillValue"] = np.float32(np.nan)
    assert "channel 0  -" in data(capsys, "stats", "land.h5", "--fields", "said", "--jobs", "1")
    facts = json.loads(Path(STATS_NAME).read_text())["fields"]["said"]
    assert facts["channels"]["mean"] == [None, 3]
    assert facts["mean"] == 3
    assert "channel 0: there is no finite" in data(
        capsys, "stats", "land.h5", "--jobs", "1", code=65
    )


def test_verify_looks_at_values(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = by_hand("own")
    least, largest = np.nanmin(expected), np.nanmax(expected)
    told = data(capsys, "verify", "own", "--range", f"x={least}:{largest}", "--jobs", "1")
    assert "all as they should be" in told
    told = data(
        capsys, "verify", "own", "--range", f"x={least + 1}:{largest}", "--jobs", "1", code=65
    )
    assert 'field "x", row ' in told
    told = data(capsys, "verify", "own", "--range", "x=-90:90", "--jobs", "1", "--stored", code=65)
    assert 'own/0.h5: field "x", row 2: a value outside of -90 to 90' in told
    with h5py.File("own/0.h5", "a") as file:
        for name, fill in (("nan", np.nan), ("inf", np.inf), ("plain", 1e20)):
            file[name] = np.array([fill, *range(11)], "f4")
            file[name].attrs["_FillValue"] = np.float32(fill)
        file["damaged"] = np.array([np.nan, *range(11)], "f4")
        file["damaged"].attrs["_FillValue"] = np.float32(1e20)
    told = data(capsys, "verify", "own/0.h5", "--jobs", "1", code=65)
    assert "1 problem" in told
    assert 'field "damaged", row 0: NaN' in told


def test_verify_compares_attributes_with_the_index(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data(capsys, "index", "same", "--jobs", "1")
    assert open_dataset("same").codings("x")[0].scale == 0.5
    data(capsys, "verify", "same", "--jobs", "1")
    index = json.loads(Path("same/index.json").read_text())
    index["shards"][1]["codings"]["x"]["scale"] = 0.25
    Path("same/index.json").write_bytes(sealed(index))
    told = data(capsys, "verify", "same", "--jobs", "1", code=65)
    assert 'same/1.h5: field "x": its attributes say otherwise how to decode it' in told


def test_packing_keeps_numbers_or_values(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers stay with what is said of them where that is one thing; else they are decoded."""
    for folder, dtype in (("same", "<i2"), ("own", "<f4")):
        expected = by_hand(folder)
        for tool, source in (("pack", [folder]), ("repack", [folder])):
            data(capsys, tool, *source, f"{folder}-{tool}")
        data(capsys, "pack", f"x={folder}/*.h5:x", f"id={folder}/*.h5:id", f"{folder}-table")
        data(capsys, "split", folder, f"{folder}-split", "--split", "a=1.0", "--shuffle")
        for made in ("pack", "repack", "table", "split/a"):
            packed = open_dataset(f"{folder}-{made}")
            assert packed.fields["x"].dtype == np.dtype(dtype), made
            assert np.array_equal(values(f"{folder}-{made}"), expected, equal_nan=True), made
            with h5py.File(packed.shards[0].path) as file:
                assert file["x"].attrs["units"] == "K"
                assert ("scale_factor" in file["x"].attrs) == (dtype == "<i2")


def test_packing_to_another_dtype_takes_values(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = by_hand("same")
    for number, source in enumerate((["same"], ["x=same/*.h5:x", "id=same/*.h5:id"])):
        out = f"floats-{number}"
        data(capsys, "pack", *source, out, "--dtype", "x=float32")
        assert open_dataset(out).codings("x")[0].is_plain
        assert np.array_equal(values(out), expected, equal_nan=True)


def test_info_says_what_is_decoded(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = data(capsys, "info", "own")
    assert "decoded int16 x 0.5 to 2 + 280 = float32, missing: -99 (each file has its own)" in told
    facts = json.loads(data(capsys, "info", "same", "--json"))["fields"]
    assert facts["x"]["decoded"] == "int16 x 0.5 + 280 = float32, missing: -99"
    assert facts["id"]["decoded"] is None
    with h5py.File("same/0.h5", "a") as file:
        file["x"].attrs["scale_factor"] = "half"
    assert "scale_factor = 'half' is not one finite number" in data(capsys, "info", "same/0.h5")


def test_what_is_missing_in_a_mask_of_rows_is_not_true(site: Path) -> None:
    with h5py.File("same/0.h5", "a") as file:
        file["good"] = np.array([1, 0, -1, 1] * 3, "i1")
        file["good"].attrs["_FillValue"] = np.int8(-1)
    section = DataSection(
        train="same/0.h5", global_batch_size=2, samples=SamplesTable(train="good")
    )
    for semantics, rows in ((None, [0, 3]), (FIRST, [0, 2, 3])):
        options: dict[str, Any] = {} if semantics is None else {"semantics": semantics}
        train, _ = open_datasets(section, ["id"], **options)
        picked = read_rows(train, np.arange(train.samples))["id"]
        assert (picked[: len(rows)] == rows).all()
