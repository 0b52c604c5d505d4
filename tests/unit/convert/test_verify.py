"""Damage of every kind, found and named: shard, field, row."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpctrain.convert.index import make_index
from hpctrain.convert.parallel import each
from hpctrain.convert.verify import verify
from hpctrain.data import Writer
from hpctrain.data.files.discovery import open_dataset
from hpctrain.data.files.index import sealed
from hpctrain.data.files.storage import Storage
from hpctrain.errors import DatasetError

ROWS = 30


def samples(rows: int = ROWS) -> dict[str, np.ndarray]:
    return {
        "x": np.linspace(0, 1, rows * 6, dtype="f4").reshape(rows, 2, 3),
        "label": np.arange(rows) % 10,
    }


def write(folder: Path, values: dict[str, Any] | None = None, **options: Any) -> Path:
    """Write shards of 10 samples."""
    with Writer(folder, shard_rows=10, **options) as writer:
        writer.extend(values or samples())
    return folder


def problems(pattern: Path, **options: Any) -> list[str]:
    return list(verify(str(pattern), jobs=1, **options).problems)


def change_row(path: Path, name: str, row: int, value: float) -> None:
    with h5py.File(path, "r+") as file:
        file[name][row] = value


def cut(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def test_a_whole_dataset(tmp_path: Path) -> None:
    told = []
    verdict = verify(
        str(write(tmp_path / "data")),
        limits={"label": (0, 9)},
        jobs=2,
        progress=lambda done, total: told.append((done, total)),
    )
    assert verdict.problems == ()
    assert (verdict.shards, verdict.samples, verdict.has_checksums) == (3, ROWS, True)
    assert verdict.size == sum(p.stat().st_size for p in (tmp_path / "data").glob("*.h5"))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (lambda f: (f / "shard-000001.h5").unlink(), [r"000001\.h5: this shard is missing"]),
        (lambda f: cut(f / "shard-000002.h5", 9), [r"000002\.h5: .* bytes, .*it is truncated"]),
        (lambda f: (f / "more.h5").touch(), [r"index\.json does not list more\.h5"]),
        (lambda f: flip(f / "shard-000001.h5", -3), [r"000001\.h5: its checksum is not that"]),
        (
            lambda f: (f / "shard-000001.h5").write_bytes(
                bytes((f / "shard-000001.h5").stat().st_size)
            ),
            [r"000001\.h5: its checksum is not", r"000001\.h5: HDF5 cannot read this file"],
        ),
        (
            lambda f: [
                change_row(f / "shard-000000.h5", "x", 3, np.nan),
                change_row(f / "shard-000000.h5", "x", 7, np.inf),
                change_row(f / "shard-000000.h5", "x", 8, -np.inf),
                (f / "shard-000001.h5").unlink(),
                cut(f / "shard-000002.h5", 1),
            ],
            [
                r"000001\.h5: this shard is missing",
                r"000002\.h5: .*it is truncated",
                r"000000\.h5: its checksum is not",
                r'000000\.h5: field "x", row 3: NaN$',
                r'000000\.h5: field "x", row 7: Inf, and in 1 more of its rows$',
            ],
        ),
    ],
)
def test_damage(tmp_path: Path, damage: Callable[[Path], Any], messages: list[str]) -> None:
    folder = write(tmp_path / "data")
    damage(folder)
    found = problems(folder)
    assert len(found) == len(messages), found
    for problem, message in zip(found, messages, strict=True):
        assert re.search(message, problem), problem


def test_files_that_are_not_what_the_index_says(tmp_path: Path) -> None:
    """No checksums in the index, and files of the right size whose content is another one."""
    folder = write(tmp_path / "data")
    others: list[dict[str, np.ndarray]] = [
        {"x": np.zeros((10, 2, 3), "f4"), "label": np.arange(10, dtype="i4")},
        {"x": np.zeros((9, 2, 3), "f4"), "label": np.arange(9)},
        {"x": np.zeros((10, 2, 3), "f4")},
    ]
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    for shard, fields in zip(index["shards"], others, strict=True):
        with h5py.File(folder / shard["file"], "w") as file:
            for name, values in fields.items():
                file[name] = values
        shard["xxh3"], shard["bytes"] = None, (folder / shard["file"]).stat().st_size
        shard["layouts"]["x"]["offset"] = 8
        shard["layouts"]["label"] = {"chunk_rows": 1, "reason": "chunked"}
    (folder / "index.json").write_bytes(sealed(index))
    found = "\n".join(problems(folder))
    assert 'shard-000000.h5: field "label" is int32 of shape (), the index says int64' in found
    assert (
        'shard-000000.h5: field "x" begins at byte 2048, the index says that it begins at byte 8'
        in found
    )
    assert "shard-000001.h5: 9 rows, the index says 10" in found
    assert 'shard-000002.h5: there is no field "label". It has: x' in found


def test_files_without_an_index(tmp_path: Path) -> None:
    for number, (rows, dtype) in enumerate([(4, "f4"), (5, "f4"), (6, "f8")]):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["x"] = np.zeros((rows, 2), dtype)
            if number == 1:
                file["more"] = np.zeros(rows)
    (tmp_path / "3.h5").write_bytes(b"no HDF5")
    verdict = verify(str(tmp_path / "*.h5"), jobs=1)
    assert (verdict.shards, verdict.samples, verdict.has_checksums) == (4, 15, False)
    assert len(verdict.problems) == 3
    assert "3.h5: HDF5 cannot read" in verdict.problems[0]
    assert '1.h5: field "more" is float64 of shape (), but not there in' in verdict.problems[1]
    assert '2.h5: field "x" is float64 of shape (2,), but float32' in verdict.problems[2]
    assert verify(str(tmp_path / "[01].h5"), ["x"], jobs=1).problems == ()


@pytest.mark.parametrize(
    ("limits", "found"),
    [
        ({"label": (0, 9)}, []),
        ({"label": (0, 8)}, [(number, 9) for number in range(3)]),
        ({"label": (1, 9)}, [(number, 0) for number in range(3)]),
        ({"x": (-1.0, 0.5)}, [(1, 5), (2, 0)]),
    ],
)
def test_values_out_of_range(
    tmp_path: Path, limits: dict[str, tuple[float, float]], found: list[tuple[int, int]]
) -> None:
    folder = write(tmp_path / "data")
    (name,) = limits
    told = problems(folder, limits=limits)
    assert len(told) == len(found)
    for problem, (shard, row) in zip(told, found, strict=True):
        assert f'shard-00000{shard}.h5: field "{name}", row {row}: a value outside of' in problem


def test_what_may_be_nan(tmp_path: Path) -> None:
    values = samples()
    values["x"][13, 1, 2] = np.nan
    values["z"] = values["x"][:, 0] * np.complex64(1j)
    values["z"][29, 0] = complex(0, np.inf)
    folder = write(tmp_path / "data", values)
    assert len(problems(folder)) == 2
    assert problems(folder, nan_allowed=["x", "z"]) == []
    assert len(problems(folder, fields=["x", "label"])) == 1
    assert problems(folder, fields=["label"]) == []
    for options in ({"fields": ["labl"]}, {"limits": {"labl": (0, 1)}}, {"nan_allowed": ["labl"]}):
        with pytest.raises(DatasetError, match=r'no field "labl"\. Did you mean "label"'):
            problems(folder, **options)


@pytest.mark.parametrize("filter_", ["gzip", "zstd"])
def test_damaged_chunks_without_checksums(tmp_path: Path, filter_: str) -> None:
    if filter_ == "zstd":
        pytest.importorskip("hdf5plugin")
    folder = write(tmp_path / "data", storage=Storage(filter_, chunk_bytes=64))
    with h5py.File(folder / "shard-000001.h5") as file:
        chunk = file["label"].id.get_chunk_info(0)
    (folder / "index.json").unlink()
    content = bytearray((folder / "shard-000001.h5").read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + 8] = bytes(8)
    (folder / "shard-000001.h5").write_bytes(content)
    (problem,) = problems(folder)
    assert 'shard-000001.h5: field "label", row 0: ' in problem


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no file has such a name"):
        verify(str(tmp_path / "*.h5"))
    folder = write(tmp_path / "data")
    (folder / "index.json").write_text("{", encoding="utf-8")
    with pytest.raises(DatasetError, match="it is not JSON"):
        verify(str(folder))
    (folder / "index.json.unfinished").touch()
    with pytest.raises(DatasetError, match="still being written"):
        verify(str(folder))


@pytest.mark.parametrize("storage", [Storage(), Storage("gzip", chunk_bytes=64)])
def test_random_damage_is_always_found(tmp_path: Path, storage: Storage) -> None:
    """Any byte that is another one, or is missing, and the shard is named. Never a crash."""
    with Writer(tmp_path / "data", shard_rows=10, storage=storage) as writer:
        writer.extend(samples(1500))
    draw = random.Random(0)
    damaged = set()
    for path in sorted((tmp_path / "data").glob("*.h5")):
        kind = draw.choice(["none", "cut", "flip", "flip", "flips", "zeros"])
        content = bytearray(path.read_bytes())
        before = bytes(content)
        place = draw.randrange(len(content))
        if kind == "cut":
            del content[place:]
        elif kind == "zeros":
            content[place : place + 64] = bytes(len(content[place : place + 64]))
        elif kind != "none":
            for _ in range(1 if kind == "flip" else 8):
                content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
        if content != before:
            damaged.add(path.name)
            path.write_bytes(content)
    verdict = verify(str(tmp_path / "data"), jobs=2)
    named = {name for problem in verdict.problems for name in re.findall(r"shard-\d+\.h5", problem)}
    assert named == damaged
    # Also without anything to compare with, it is an error that names the file, or another value.
    (tmp_path / "data" / "index.json").unlink()
    for problem in verify(str(tmp_path / "data" / "*.h5"), jobs=2).problems:
        assert damaged.intersection(re.findall(r"shard-\d+\.h5", problem)), problem


def crash_on_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    return number * number


def test_a_crash_of_one_process_is_that_items_result() -> None:
    results = dict(each(crash_on_three, range(6), 2))
    assert {index: results[index] for index in (0, 1, 2, 4, 5)} == {0: 0, 1: 1, 2: 4, 4: 16, 5: 25}
    assert "terminated abruptly" in str(results[3])


def test_index_of_files_that_are_there(tmp_path: Path) -> None:
    for number in range(3):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["deep/x"] = np.full((4, 2), number, "f4")
            file["y"] = np.arange(4)
    plain = open_dataset(str(tmp_path))
    made = make_index(str(tmp_path / "*.h5"), jobs=1)
    indexed = open_dataset(str(tmp_path))
    assert indexed == made
    assert indexed.fields == plain.fields
    assert [s.layouts for s in indexed.shards] == [s.layouts for s in plain.shards]
    assert problems(tmp_path) == []

    change_row(tmp_path / "1.h5", "y", 2, 7)
    assert "1.h5: its checksum" in problems(tmp_path)[0]
    with h5py.File(tmp_path / "1.h5", "r+") as file:
        file["z"] = np.zeros(1000)
    with pytest.raises(DatasetError, match="the index is older than the file"):
        open_dataset(str(tmp_path))
    make_index(str(tmp_path), ["y"], jobs=1)  # the way out
    assert list(open_dataset(str(tmp_path)).fields) == ["y"]
    assert problems(tmp_path) == []


def test_indices_that_cannot_be(tmp_path: Path) -> None:
    for name in ("a/0.h5", "a/1.h5", "b/0.h5", "c/0.dat"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with h5py.File(path, "w") as file:
            file["x"] = np.arange(3)
    for pattern, message in (
        ("*/0.h5", r"these files are in 2 folders"),
        ("a/0.h5", r"leaves out 1\.h5: name the folder"),
        ("c/*", r"0\.dat: an index lists files that are named \*\.h5"),
        ("d/*", r"no file has such a name"),
    ):
        with pytest.raises(DatasetError, match=message):
            make_index(str(tmp_path / pattern), jobs=1)
    with pytest.raises(DatasetError, match=r'no field "y"'):
        make_index(str(tmp_path / "a"), ["y"], jobs=1)
    assert not list(tmp_path.rglob("index.json"))
