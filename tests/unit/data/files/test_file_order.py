"""Numbered files follow each other by their numbers, or as a run that has begun has them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpctrain.config.schema_data import DataSection, FieldTable, SamplesTable
from hpctrain.config.semantics import FIRST, NEWEST
from hpctrain.convert.index import make_catalogue, make_index
from hpctrain.convert.pack import Packing, prepare
from hpctrain.convert.sources.opening import Reading, open_source
from hpctrain.data.files.discovery import in_order, open_dataset
from hpctrain.data.files.index import INDEX_NAME
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.reading.rows import read_rows
from hpctrain.errors import DatasetError

FILES, ROWS = 12, 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files whose rows count on from one to the next."""
    made = tmp_path / "steps"
    made.mkdir()
    for number in range(FILES):
        with h5py.File(made / f"step_{number}.h5", "w") as file:
            file["t"] = np.arange(ROWS * number, ROWS * (number + 1))
    return made


@pytest.mark.parametrize(
    "paths",
    [
        ["a", "a0", "a1", "a2", "a10", "a10b", "a10b2", "a10b11", "b1"],
        ["x-7.h5", "x-007.h5", "x-8.h5", "x-0010.h5"],
        ["1999/12.nc", "2000/1.nc", "2000/2.nc", "2000/10.nc", "2000-b/1.nc"],
        ["run 2/step 1", "run 2/step 03", "run 10/step 1"],
        ["2", "10", "a", "a\N{SUPERSCRIPT TWO}", "a\N{ARABIC-INDIC DIGIT ONE}"],
        ["9" * 30, "1" + "0" * 30],
    ],
)
def test_natural_order(paths: list[str]) -> None:
    shuffled = random.Random(0).sample(paths, len(paths))
    wanted = ["x-007.h5", "x-7.h5", *paths[2:]] if paths[0] == "x-7.h5" else paths
    assert in_order(shuffled) == wanted
    assert in_order(shuffled, "name") == sorted(paths)


def windows(source: str, semantics: Any) -> list[tuple[int, int]]:
    """Return the samples of two rows, which may begin in one file and end in the next."""
    section = DataSection(
        train=source,
        global_batch_size=1,
        fields={"t": FieldTable(steps=2)},
        samples=SamplesTable(across_files=True),
    )
    dataset, _ = open_datasets(section, ["t"], semantics)
    rows = np.arange(dataset.samples)
    return [tuple(pair) for pair in read_rows(dataset, rows)["t"].tolist()]


def sources(folder: Path) -> list[str]:
    """Return what stands for these files: they themselves, an index, a catalogue."""
    pattern, catalogue = str(folder / "*.h5"), folder.parent / "all.json"
    make_catalogue(pattern, catalogue, checksums=False, jobs=1)
    return [pattern, str(catalogue), str(folder)]


def test_windows_over_numbered_files(folder: Path) -> None:
    in_turn = [(t, t + 1) for t in range(FILES * ROWS - 1)]
    by_name = sorted(range(FILES), key=str)
    rows = [t for number in by_name for t in range(ROWS * number, ROWS * (number + 1))]
    for source in sources(folder):
        if source == str(folder):
            make_index(source, jobs=1)
        assert windows(source, NEWEST) == in_turn
        # A run that 0.1.0 has begun goes on over the files as it had them.
        assert windows(source, FIRST) == list(itertools.pairwise(rows))


def test_an_index_of_the_first_release_is_no_order(folder: Path) -> None:
    make_index(str(folder), jobs=1)
    natural = open_dataset(str(folder))
    path = folder / INDEX_NAME
    text = path.read_text()
    assert text.index('"step_2.h5"') < text.index('"step_10.h5"')
    first = open_dataset(str(folder), order="name")
    assert [shard.name for shard in first.shards][:3] == ["step_0.h5", "step_1.h5", "step_10.h5"]
    assert first.fingerprint != natural.fingerprint
    assert sorted(first.shards, key=lambda each: each.path) == sorted(
        natural.shards, key=lambda each: each.path
    )


def test_packing_in_turn(folder: Path, tmp_path: Path) -> None:
    for number in range(FILES):
        np.save(folder / f"part{number}.npy", np.arange(number, number + 2))
    source = open_source([f"t={folder}/part*.npy"], Reading())
    values = source.read(np.arange(source.samples))["t"]
    assert values.tolist() == [each for n in range(FILES) for each in (n, n + 1)]


def test_what_was_begun_in_another_order_is_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    def source_of(paths: list[str]) -> Any:
        return open_source([f"t={path}:t" for path in paths], Reading())

    paths = [str(folder / f"step_{number}.h5") for number in range(FILES)]
    prepare(open_source([f"t={folder}/*.h5:t"], Reading()), tmp_path / "out", Packing())
    begun = (tmp_path / "out" / "index.json.unfinished").read_text()
    assert " 2 before 10" in begun
    (tmp_path / "out" / "index.json.unfinished").write_text(begun.replace(" 2 before 10", ""))
    with pytest.raises(DatasetError, match="the files of its source, or how they are read"):
        prepare(open_source([f"t={folder}/*.h5:t"], Reading()), tmp_path / "out", Packing())
    # Names that both orders have alike are what they were in 0.1.0.
    assert " 2 before 10" not in source_of(paths[:3]).identity
