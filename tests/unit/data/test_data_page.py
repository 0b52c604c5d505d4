"""docs/data.md: what it says to do for what people have, done; and its programs, run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpctrain.config.schema_data import DataSection, FieldTable, SamplesTable
from hpctrain.data import open_dataset
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.reading.rows import read_rows

PAGE = Path(__file__).parents[3] / "docs" / "data.md"
TIMES = np.arange("2014-06", "2019-06", dtype="M8[M]").astype("M8[D]").astype("i8")


def values(*shape: int) -> Any:
    return np.arange(np.prod(shape), dtype="f4").reshape(shape)


def section(files: str, fields: dict[str, dict[str, Any]], **samples: Any) -> DataSection:
    return DataSection(
        train=files,
        global_batch_size=1,
        fields={name: FieldTable(**table) for name, table in fields.items()},
        samples=SamplesTable(**samples),
    )


def of(about: DataSection, *names: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return all samples to train with, and to evaluate with, as they are delivered."""
    train, validation = open_datasets(about, names)
    samples = [
        None if each is None else read_rows(each, np.arange(each.samples))
        for each in (train, validation)
    ]
    assert samples[0] is not None
    return samples[0], samples[1]


def reanalysis(path: Path, axis: int = 0) -> None:
    stored = values(20, 3, 4, 5)
    with h5py.File(path / "a.h5", "w") as file:
        file["z"] = np.moveaxis(stored, 0, axis)
    shared = {"path": "z", "axis": axis}
    fields = {"state": {**shared, "steps": 2}, "target": {**shared, "lead": 7}}
    found, _ = of(section(f"{path}/a.h5", fields), "state", "target")
    np.testing.assert_array_equal(found["state"][:, 1], stored[1:14])
    np.testing.assert_array_equal(found["target"], stored[7:20])


def labels_elsewhere(path: Path) -> None:
    (path / "labels").mkdir()
    for number in range(2):
        with h5py.File(path / f"events-{number}.h5", "w") as file:
            file["x"] = values(5, 2) + 10 * number
    with h5py.File(path / "labels" / "all.h5", "w") as file:
        file["label"] = np.arange(10)
    fields = {"label": {"train": f"{path}/labels/*.h5"}}
    found, _ = of(section(f"{path}/events-*.h5", fields), "x", "label")
    assert found["label"].tolist() == list(range(10))
    assert found["x"].shape == (10, 2)


def tokens(path: Path) -> None:
    with h5py.File(path / "a.h5", "w") as file:
        file["tokens"] = np.arange(5000, dtype="u2")
    about = section(f"{path}/a.h5", {"tokens": {"steps": 1025}}, stride=1024)
    found, _ = of(about, "tokens")
    assert found["tokens"][:, 0].tolist() == [0, 1024, 2048, 3072]


def every_six_hours(path: Path) -> None:
    with h5py.File(path / "a.h5", "w") as file:
        file["x"] = np.arange(24)
    found, _ = of(section(f"{path}/a.h5", {}, stride=6), "x")
    assert found["x"].tolist() == [0, 6, 12, 18]


def masks(path: Path) -> None:
    with h5py.File(path / "a.h5", "w") as file:
        file["x"], file["is_train"] = np.arange(10), np.arange(10) % 3 > 0
        file["is_test"] = np.arange(10) % 3 == 0
    about = section(f"{path}/a.h5", {}, train="/is_train", validation="/is_test")
    train, test = of(about, "x")
    assert test is not None
    assert sorted([*train["x"], *test["x"]]) == list(range(10))
    assert test["x"].tolist() == [0, 3, 6, 9]


def by_year(path: Path) -> None:
    with h5py.File(path / "a.h5", "w") as file:
        file["x"], file["time"] = np.arange(60), TIMES
        file["time"].attrs["units"] = "days since 1970-01-01"
        file["time"].make_scale("time")
        file["x"].dims[0].attach_scale(file["time"])
    years = {"train": ["1979", "2015"], "validation": ["2016", "2017"], "test": ["2018", ""]}
    ranges = {name: {"time": tuple(each)} for name, each in years.items()}
    train, validation = of(section(f"{path}/a.h5", {}, **ranges), "x")
    assert validation is not None
    assert train["x"].tolist() == list(range(19))
    assert validation["x"].tolist() == list(range(19, 43))


def no_split(path: Path, **more: Any) -> None:
    for number in range(10):
        with h5py.File(path / f"{number}.h5", "w") as file:
            file["x"] = np.arange(number * 50, number * 50 + 50)
    about = section(f"{path}/*.h5", {}, validation_fraction=0.1, **more)
    train, validation = of(about, "x")
    assert validation is not None
    assert sorted([*train["x"], *validation["x"]]) == list(range(500))
    assert 25 <= len(validation["x"]) <= 100
    if more:
        assert not set(train["x"] // 50) & set(validation["x"] // 50)


ROWS: dict[str, Callable[[Path], None]] = {
    "a reanalysis `(time, channel, lat, lon)`, to forecast 6 steps ahead from 2": reanalysis,
    "the same as `(channel, time, lat, lon)`": lambda path: reanalysis(path, 1),
    "events in one set of files, labels in another": labels_elsewhere,
    "an array of tokens, for samples of 1,025 that begin every 1,024": tokens,
    "every hour, but samples every 6 hours": every_six_hours,
    "one file with `is_train` and `is_test`": masks,
    "one set of files with a time axis, to be split by year": by_year,
    "one dataset and no split": no_split,
    "runs of a simulation, a file each, not to be torn apart": (
        lambda path: no_split(path, split_by="files")
    ),
}


def test_every_row_is_here() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("How to say what (")[2]
    table = text.partition("What holds, whatever is said:")[0]
    there = [line.split(" | ")[0].strip("| ") for line in table.splitlines() if "|" in line]
    assert there[2:] == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_what_people_have(tmp_path: Path, row: str) -> None:
    ROWS[row](tmp_path)


def test_programs_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(programs) >= 2
    for program in programs:
        exec(compile(program, str(PAGE), "exec"), {})
    assert open_dataset("sentences").samples == 3
