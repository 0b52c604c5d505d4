"""Variable-length datasets in groups: rows of each group, or one sequence a group."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.loaders import train_loader
from PIL import Image

from hpctrain.config.schema_data import DataSection, FieldTable
from hpctrain.convert.index import make_catalogue
from hpctrain.data.dataset import Dataset
from hpctrain.data.loading.images import Decoded, ImagePreparation
from hpctrain.data.opening.open_datasets import open_for_training
from hpctrain.data.order.order import Order
from hpctrain.data.reading.heaps import HeapReader
from hpctrain.data.view import View
from hpctrain.errors import DatasetError

GROUPS = 12
DRAW = np.random.default_rng(5)


@pytest.fixture(scope="module", params=["contiguous", "gzip", "latest"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of episodes: hits of each event, one text and one track of each episode."""
    path = tmp_path_factory.mktemp(str(request.param))
    stored = {"gzip": {"maxshape": (None,), "chunks": (3,), "compression": "gzip"}}
    for number in range(2):
        library = {"libver": "latest"} if request.param == "latest" else {}
        with h5py.File(path / f"{number}.h5", "w", **library) as file:
            for group in range(GROUPS):
                episode = file.create_group(f"e_{group}")
                events = group % 3 + 1
                hits = episode.create_dataset(
                    "hits",
                    (events,),
                    h5py.vlen_dtype("f4"),
                    **stored.get(request.param, {}),
                )
                for event in range(events):
                    hits[event] = DRAW.random(DRAW.integers(0, 9)).astype("f4")
                episode["label"] = np.arange(events) + 100 * group + 1000 * number
                episode.create_dataset("text", (), h5py.string_dtype())[()] = "go " * group
                track = episode.create_dataset("track", (), h5py.vlen_dtype("i8"))
                track[()] = np.arange(group * 5)
                episode.attrs["robot"] = f"r{group % 2}"
    return path


def stored_in(folder: Path, name: str) -> list[Any]:
    found: list[Any] = []
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            for group in range(GROUPS):
                values = file[f"e_{group}/{name}"][()]
                found += [values] if np.ndim(values) == 0 or name == "track" else [*values]
    return found


def opened(source: object, **tables: Any) -> Dataset:
    fields = {name: FieldTable(**table) for name, table in tables.items()}
    section = DataSection(train=str(source), global_batch_size=1, fields=fields)
    return open_for_training(section, list(fields))


def delivered(dataset: Dataset, fields: list[str], world_size: int) -> dict[int, dict[str, Any]]:
    """Return the fields of every sample, by row, as all ranks together have them."""
    found: dict[int, dict[str, Any]] = {}
    for rank in range(world_size):
        loader = train_loader(
            dataset,
            Order(samples=dataset.samples, seed=1, lanes=4, window=2, block_rows=2),
            fields=fields,
            global_batch_size=6,
            rank=rank,
            world_size=world_size,
        )
        for batch in loader.epoch(0):
            own = loader.rows(0, batch.start, batch.start + batch.global_size).tolist()
            for place, row in enumerate(own):
                assert row not in found
                found[row] = {}
                for name in fields:
                    values = batch.fields[name]
                    if (offsets := batch.fields.get(f"{name}.offsets")) is None:
                        found[row][name] = values[place].numpy()
                    else:
                        found[row][name] = values[offsets[place] : offsets[place + 1]].numpy()
        loader.close()
    assert sorted(found) == list(range(dataset.samples))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rows_of_variable_length_over_groups(folder: Path, world_size: int) -> None:
    """Each row of each group is a sample, joined with the rows of other arrays of the group."""
    dataset = opened(
        folder,
        hits={"path": "e_*/hits", "batch": "concat"},
        label={"path": "e_*/label"},
        robot={"attribute": "robot", "classes": "sorted"},
    )
    hits, labels = stored_in(folder, "hits"), stored_in(folder, "label")
    found = delivered(dataset, ["hits", "label", "robot"], world_size)
    assert len(found) == len(hits) == 48
    for row, sample in found.items():
        np.testing.assert_array_equal(sample["hits"], hits[row])
        assert sample["label"] == labels[row]
        assert sample["robot"] == labels[row] // 100 % 2


@pytest.mark.parametrize("world_size", [1, 3])
def test_one_sequence_a_group(
    folder: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts are their bytes; a text and a track of each group belong together."""
    monkeypatch.setattr(HeapReader, "_read_by_hdf5", None)  # none is read by HDF5
    dataset = opened(
        folder,
        text={"path": "e_*/text", "batch": "concat"},
        track={"path": "e_*/track", "batch": "concat"},
    )
    texts, tracks = stored_in(folder, "text"), stored_in(folder, "track")
    found = delivered(dataset, ["text", "track"], world_size)
    assert len(found) == 2 * GROUPS
    for row, sample in found.items():
        assert sample["text"].tobytes() == texts[row]
        np.testing.assert_array_equal(sample["track"], tracks[row])


def test_a_catalogue_finds_them_in_the_files(folder: Path, tmp_path: Path) -> None:
    make_catalogue(str(folder), tmp_path / "list.json", ["e_0/label"])
    tables = {"hits": {"path": "e_*/hits", "batch": "concat"}}
    found, plain = (
        delivered(opened(each, **tables), ["hits"], 1) for each in (tmp_path / "list.json", folder)
    )
    for row, sample in plain.items():
        np.testing.assert_array_equal(found[row]["hits"], sample["hits"])


def test_encoded_images_of_episodes(tmp_path: Path) -> None:
    """As ALOHA's camera images would lie in one file of many episodes."""
    images = [Image.fromarray(DRAW.integers(0, 255, (20 + i, 30, 3), "u1")) for i in range(9)]
    encoded = []
    for image in images:
        content = io.BytesIO()
        image.save(content, "PNG")
        encoded.append(np.frombuffer(content.getvalue(), "u1"))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for group in range(3):
            camera = file.create_dataset(f"e_{group}/cam", (3,), h5py.vlen_dtype("u1"))
            for step in range(3):
                camera[step] = encoded[3 * group + step]
    dataset = opened(tmp_path / "a.h5", cam={"path": "e_*/cam", "image": (16, 12)})
    assert isinstance(dataset, View)
    made = {"cam": Decoded(rows=16, columns=12)}
    loader = train_loader(
        dataset,
        Order(samples=9, seed=1, lanes=2, window=2, block_rows=2),
        fields=["cam"],
        global_batch_size=9,
        preparation=ImagePreparation(dataset, made, 1, training=False),
    )
    (batch,) = loader.epoch(0)
    for place, row in enumerate(loader.rows(0, 0, 9).tolist()):
        wanted = np.zeros((3, 16, 12), np.uint8)
        made["cam"].decode(encoded[row], wanted, 0, training=False)
        np.testing.assert_array_equal(batch.fields["cam"][place], wanted)
    loader.close()


def test_damage_is_named_by_group(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for group in range(3):
            rows = file.create_dataset(f"e_{group}/x", (2,), h5py.vlen_dtype("f4"))
            rows[0], rows[1] = np.ones(3), np.ones(2)
        place = file["e_1/x"].id.get_offset()
    whole = bytearray(path.read_bytes())
    whole[place : place + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(whole)
    with pytest.raises(DatasetError, match=r'a\.h5: field "e_1/x", row 0: it is said to have 2,1'):
        opened(path, x={"path": "e_*/x", "batch": "concat"})


def test_groups_of_both_kinds_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("e_0/x", (2,), h5py.vlen_dtype("f4"))[0] = np.ones(3)
        file["e_1/x"] = np.ones(3, "f4")
    with pytest.raises(DatasetError, match=r'a\.h5: field "e_\*/x"'):
        opened(tmp_path / "a.h5", x={"path": "e_*/x", "batch": "concat"})
