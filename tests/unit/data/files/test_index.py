"""What is listed of files leads readers past HDF5: it is what was written, or it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpctrain.convert.index import make_catalogue, make_index
from hpctrain.data.files.catalogue import read_catalogue
from hpctrain.data.files.discovery import open_dataset, verify_share
from hpctrain.data.files.index import INDEX_NAME, parse_index, sealed
from hpctrain.data.reading.rows import read_rows
from hpctrain.data.view import Part, View
from hpctrain.errors import DatasetError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "shards"
    made.mkdir()
    with h5py.File(made / "a.h5", "w") as file:
        file["x"] = np.arange(24.0, dtype=">f4").reshape(4, 6)
        file.create_dataset("z", data=np.arange(8).reshape(4, 2), chunks=(2, 2), compression="gzip")
    make_index(str(made), jobs=1)
    return made


def flips(path: Path, read: Callable[[], Any]) -> tuple[int, int]:
    """Flip a bit of a file, one at a time; return how often it was refused, and harmless."""
    content, expected = path.read_bytes(), read()
    refused = harmless = 0
    for place in range(len(content)):
        for bit in (place % 4, 4 + place % 4):  # a quarter of them: of digits, any of both halves
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                found = read()
            except DatasetError:
                refused += 1
            else:
                assert found == expected, (place, bit, content[place : place + 20])
                harmless += 1
    path.write_bytes(content)
    return refused, harmless


def test_bits_of_an_index(folder: Path) -> None:
    refused, harmless = flips(folder / INDEX_NAME, lambda: parse_index(folder))
    # White space that becomes other white space, and so on.
    assert harmless < refused / 20


def test_bits_of_a_catalogue(folder: Path) -> None:
    path = folder.parent / "all.json"
    make_catalogue(str(folder / "*.h5"), path, ["x"], jobs=1)
    refused, harmless = flips(path, lambda: read_catalogue(path))
    assert harmless < refused / 20


def test_a_checksum_that_does_not_fit_is_told(folder: Path) -> None:
    path = folder / INDEX_NAME
    text = path.read_text()
    path.write_text(text.replace('"offset": 2048', '"offset": 2056'))
    with pytest.raises(DatasetError, match=r"index\.json: .*its checksum is not that of what it s"):
        open_dataset(str(folder))


def unsealed(folder: Path, change: Callable[[dict[str, Any]], object] = dict) -> Path:
    """Make of an index what 0.1.0 would have written, with one change."""
    path = folder / INDEX_NAME
    document = json.loads(path.read_text())
    del document["checksum"]
    document["version"] = 1
    change(document)
    path.write_text(json.dumps(document, indent=1))
    return path


def test_lists_of_the_first_release(folder: Path) -> None:
    catalogue = folder.parent / "all.json"
    make_catalogue(str(folder / "*.h5"), catalogue, jobs=1)
    new = [open_dataset(str(each), ["x", "z"]) for each in (folder, catalogue)]
    document = json.loads(catalogue.read_text())
    del document["checksum"]
    catalogue.write_text(json.dumps({**document, "version": 1}))
    unsealed(folder)
    assert [open_dataset(str(each), ["x", "z"]) for each in (folder, catalogue)] == new


SHARD = ("shards", 0)
LAYOUT = (*SHARD, "layouts")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((*LAYOUT, "x", "offset"), 2056, r'"x" begins at byte 2048, the index says that it begins'),
        ((*LAYOUT, "z"), {"offset": 2048}, r'"z" is in chunks of 2 rows, the index says that it b'),
        ((*LAYOUT, "z", "chunk_rows"), 3, r'"z" is in chunks of 2 rows, .* is in chunks of 3 rows'),
        (("fields", "x", "dtype"), "<f4", r'"x" is >f4 of shape \(6,\), the index says float32'),
        (("fields", "z", "shape"), [1, 2], r'"z" is int64 of shape \(2,\), .* of shape \(1, 2\)'),
        ("rows", 3, r"4 rows, the index says 3"),
    ],
)
@pytest.mark.parametrize("kind", ["of 0.1.0", "sealed anew"])
def test_verify_at_the_start(
    folder: Path, place: tuple[Any, ...], value: Any, message: str, kind: str
) -> None:
    verify_share([open_dataset(str(folder))], 0, 1)

    def change(document: dict[str, Any]) -> None:
        if place == "rows":
            document["samples"] = document["shards"][0]["samples"] = value
            return
        for key in place[:-1]:
            document = document[key]
        document[place[-1]] = value

    path = unsealed(folder, change)
    if kind == "sealed anew":
        path.write_bytes(sealed({**json.loads(path.read_text()), "version": 2}))
    dataset = open_dataset(str(folder))
    with pytest.raises(DatasetError, match=message) as caught:
        verify_share([dataset], 0, 1)
    assert str(caught.value).startswith(f"{folder}/a.h5: ")


@pytest.mark.parametrize(("dtype", "shape"), [(">i8", [2]), ("<i8", [1, 2]), ("<i4", [4])])
def test_chunks_under_an_index_without_a_checksum(
    folder: Path, dtype: str, shape: list[int]
) -> None:
    """To list chunks, their file is opened in any case: what it holds is compared."""
    unsealed(folder, lambda document: document["fields"]["z"].update(dtype=dtype, shape=shape))
    with pytest.raises(DatasetError, match=r'a\.h5: field "z" has 4 rows of int64, of shape \(2,'):
        read_rows(open_dataset(str(folder), ["z"]), np.arange(4))


def test_verify_of_fields_along_another_axis(folder: Path) -> None:
    catalogue = folder.parent / "all.json"
    with h5py.File(folder / "a.h5", "r+") as file:
        file["along"] = np.zeros((3, 4, 300), "f4")
    make_catalogue(str(folder / "*.h5"), catalogue, jobs=1)
    dataset = open_dataset(str(catalogue), ["along"], axis=1)
    view = View.of("", [Part(dataset, 1)], {}, None)  # type: ignore[arg-type]
    verify_share([view], 0, 1)
    document = json.loads(catalogue.read_text())
    document["files"][0]["arrays"]["along"]["offset"] -= 4
    catalogue.write_bytes(sealed(document))
    dataset = open_dataset(str(catalogue), ["along"], axis=1)
    with pytest.raises(DatasetError, match=r'"along" begins at byte \d+, the index says that it b'):
        verify_share([View.of("", [Part(dataset, 1)], {}, None)], 0, 1)  # type: ignore[arg-type]
