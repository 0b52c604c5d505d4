"""Statistics, description and speed of datasets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpctrain.convert.bench import bench
from hpctrain.convert.info import describe, description
from hpctrain.convert.stats import Moments, measure, summary
from hpctrain.data import Writer, open_dataset
from hpctrain.data.files.storage import Storage
from hpctrain.data.stats import read_stats, write_stats
from hpctrain.errors import DatasetError


def write(folder: Path, values: dict[str, Any], rows: int = 7, **options: Any) -> str:
    with Writer(folder, shard_rows=rows, **options) as writer:
        writer.extend(values)
    return str(folder)


@pytest.mark.parametrize("dtype", ["u1", "i8", "f2", ">f4", "f8", "?"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_the_numbers(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    draw = np.random.default_rng(0)
    values = (100 + 50 * draw.standard_normal((40, *shape))).clip(0, 255).astype(dtype)
    folder = write(tmp_path / "data", {"x": values})
    facts = measure(open_dataset(folder), jobs=1)["fields"]["x"]
    exact = values.astype("f8")
    assert facts["count"] == values.size
    assert facts["non_finite"] == 0
    for name, value in (
        ("mean", exact.mean()),
        ("std", exact.std()),
        ("min", exact.min()),
        ("max", exact.max()),
    ):
        assert facts[name] == pytest.approx(value, rel=1e-12, abs=1e-12)
    channels = exact.reshape(40, shape[0] if shape else 1, -1)
    assert facts["channels"]["mean"] == pytest.approx(channels.mean(axis=(0, 2)).tolist(), 1e-12)
    assert facts["channels"]["std"] == pytest.approx(channels.std(axis=(0, 2)).tolist(), 1e-12)
    assert facts["channels"]["min"] == channels.min(axis=(0, 2)).tolist()
    assert facts["channels"]["max"] == channels.max(axis=(0, 2)).tolist()


def test_a_large_mean_and_a_small_deviation(tmp_path: Path) -> None:
    """Where the difference of two sums of squares would have no digit left."""
    values = 1e9 + np.random.default_rng(0).standard_normal((500, 2))
    facts = measure(open_dataset(write(tmp_path / "data", {"x": values})), jobs=1)["fields"]["x"]
    assert facts["std"] == pytest.approx(values.std(), rel=1e-11)


def test_the_same_bits_on_any_number_of_processes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((500, 3)).astype("f4")
    dataset = open_dataset(write(tmp_path / "data", {"x": values}, rows=60))
    assert measure(dataset, jobs=1) == measure(dataset, jobs=2)


@pytest.mark.parametrize("cuts", [[1], [5, 6], [3, 20, 21]])
def test_merged_is_as_of_one(cuts: list[int]) -> None:
    values = np.random.default_rng(0).standard_normal((30, 2, 3))
    values[4, 1, 2], values[:10, 0] = np.nan, np.inf
    whole = Moments.of(values)
    parts = [Moments.of(part) for part in np.split(values, cuts)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert whole.non_finite.tolist() == [30, 1]
    for name in ("count", "mean", "squares", "least", "largest", "non_finite"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-13)


def test_nan_is_left_out_and_told(tmp_path: Path) -> None:
    values = np.arange(20.0).reshape(10, 2)
    values[3] = [np.nan, -np.inf]
    stats = measure(open_dataset(write(tmp_path / "data", {"x": values})), jobs=1)
    facts = stats["fields"]["x"]
    assert (facts["count"], facts["non_finite"], facts["max"]) == (18, 2, 19.0)
    assert facts["mean"] == pytest.approx(np.nanmean(np.where(np.isinf(values), np.nan, values)))
    assert "2 NaN or Inf left out" in summary(stats)
    values[:, 1] = np.nan
    dataset = open_dataset(write(tmp_path / "all", {"x": values, "z": values * 1j}))
    with pytest.raises(DatasetError, match=r'field "x", channel 1: there is no finite value'):
        measure(dataset, jobs=1)


def test_damage_ends_it_with_the_place(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"x": np.arange(20.0)}, storage=Storage("gzip"))
    path = tmp_path / "data" / "shard-000001.h5"
    with h5py.File(path) as file:
        chunk = file["x"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + 8] = bytes(8)
    path.write_bytes(content)
    for jobs in (1, 2):
        with pytest.raises(DatasetError, match=r'shard-000001\.h5: field "x", row 0'):
            measure(open_dataset(folder), jobs=jobs)


def test_written_and_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"x": np.arange(20.0), "y": np.arange(20)})
    dataset, path = open_dataset(folder), tmp_path / "data" / "stats.json"
    with pytest.raises(DatasetError, match=r"no statistics\. Make them: .* data stats .*data"):
        read_stats(path, dataset, ["x"])
    stats = measure(dataset, jobs=1)
    write_stats(stats, path)
    assert read_stats(path, dataset, ["x"]) == {"x": stats["fields"]["x"]}
    assert open_dataset(folder) == dataset
    with pytest.raises(DatasetError, match=r"'z' is not in these statistics"):
        read_stats(path, dataset, ["z"])
    other = open_dataset(write(tmp_path / "other", {"x": np.arange(21.0)}))
    with pytest.raises(DatasetError, match="the statistics of another dataset"):
        read_stats(path, other, ["x"])
    for content in ("{", "[]", "3"):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DatasetError, match="these are not statistics"):
            read_stats(path, dataset, ["x"])


def test_description(tmp_path: Path) -> None:
    attributes = {"x": {"units": "kelvin", "levels": np.array([1.5, 2])}}
    values = {"x": np.zeros((10, 2, 3), "f4"), "y": np.zeros(10, "i2")}
    folder = write(tmp_path / "data", values, attributes=attributes, storage=Storage("gzip"))
    facts = describe(open_dataset(folder))
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["samples"], facts["shards"], facts["bytes_per_sample"]) == (10, 2, 26)
    assert (facts["indexed"], facts["checksums"], facts["statistics"]) == (True, True, False)
    assert facts["fields"]["x"] == {
        "shape": [2, 3],
        "dtype": "float32",
        "bytes": 240,
        "layout": "chunked, shuffle, deflate",
        "chunk_rows": 7,
        "decoded": None,
        "period": None,
        "attributes": {"units": "kelvin", "levels": [1.5, 2.0]},
    }
    text = description(facts)
    assert text.splitlines()[0] == f"{folder}: 10 samples in 2 shards"
    assert "units: kelvin" in text


@pytest.mark.parametrize("batch", [1, 16, 50])
@pytest.mark.parametrize("row_values", [3, 3000])
def test_speed(tmp_path: Path, batch: int, row_values: int) -> None:
    """The numbers are the machine's; what they are made of is ours."""
    rows = 5000 if row_values == 3000 else 50
    values = {"x": np.zeros((rows, row_values), "u1"), "y": np.zeros(rows)}
    folder = write(tmp_path / "data", values, rows=rows // 2)
    told: list[tuple[int, int]] = []
    speed = bench(
        open_dataset(folder),
        global_batch_size=batch,
        seconds=0.2,
        rounds=1,
        cold=batch == 1,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert speed.files_opened == 2
    bytes_per_sample = row_values + 8
    assert speed.delivered_mb_per_second == pytest.approx(
        speed.samples_per_second * bytes_per_sample / 1e6
    )
    assert math.isclose(
        speed.ratio, speed.delivered_mb_per_second / speed.raw_mb_per_second, rel_tol=1e-9
    )
    assert f"{speed.ratio:.2f} of raw" in str(speed)


def test_speed_of_what_is_too_small(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path / "data", {"x": np.zeros(10)}))
    with pytest.raises(DatasetError, match=r"a batch of 11, but .* only 10 samples: --batch 10"):
        bench(dataset, global_batch_size=11, seconds=0.1)
