"""Packing: real files of every kind in, the same shards out however the work is done."""

from __future__ import annotations

import builtins
import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpctrain.convert import pack as packing
from hpctrain.convert.pack import Packing, pack, parse_splits, select
from hpctrain.convert.sources.opening import Reading, open_source
from hpctrain.data import Writer, open_dataset
from hpctrain.data.files.storage import Storage
from hpctrain.errors import DatasetError, UsageError
from hpctrain.launch.communicators import SingleCommunicator

ALONE = SingleCommunicator()
DRAW = np.random.default_rng(0)


def pack_from(
    texts: list[str], folder: Path, reading: Reading | None = None, **options: Any
) -> str:
    return pack(lambda: open_source(texts, reading or Reading()), folder, Packing(**options), ALONE)


def contents(folder: Path) -> dict[str, np.ndarray]:
    """Return every field, all shards after each other, as h5py reads them."""
    parts: dict[str, list[np.ndarray]] = {}
    for shard in open_dataset(str(folder)).shards:
        with h5py.File(shard.path) as file:
            for name in open_dataset(str(folder)).fields:
                parts.setdefault(name, []).append(file[name][...])
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def write_idx(path: Path, values: np.ndarray) -> None:
    codes = {"uint8": 8, "int8": 9, ">i2": 11, ">i4": 12, ">f4": 13, ">f8": 14}
    code = codes.get(values.dtype.name, codes.get(values.dtype.str, 0))
    header = bytes([0, 0, code, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
        file.write(header + values.tobytes())


def make_npy(folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    fields = {"image": DRAW.integers(0, 255, (23, 3, 4), "u1"), "label": np.arange(23)}
    for name, values in fields.items():
        np.save(folder / f"{name}.npy", values)
    return [f"{folder}/image.npy", f"{folder}/label.npy"], fields


def make_npz(folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    fields = {"x": DRAW.standard_normal((23, 4)), "y": np.arange(23, dtype=">i2")}
    for number, (begin, stop) in enumerate([(0, 9), (9, 23)]):
        save = np.savez if number else np.savez_compressed
        save(folder / f"{number}.npz", **{name: each[begin:stop] for name, each in fields.items()})
    return [f"{folder}/*.npz"], fields


def make_joined(folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """One field in pieces of .npy, another in a group of one HDF5 file."""
    x, y = DRAW.standard_normal((23, 2, 2)), np.arange(23, dtype="i4")
    np.save(folder / "x-0.npy", np.asfortranarray(x[:10]))
    np.save(folder / "x-1.npy", np.asfortranarray(x[10:]))
    with h5py.File(folder / "y.h5", "w") as file:
        file["deep/y"] = y
    return [f"x={folder}/x-*.npy", f"y={folder}/y.h5:deep/y"], {"x": x, "y": y}


def make_hdf5(folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    fields = {"a/x": DRAW.standard_normal((23, 2)).astype(">f4"), "y": np.arange(23) > 3}
    for number, rows in enumerate([slice(0, 20), slice(20, 23)]):
        with h5py.File(folder / f"{number}.h5", "w") as file:
            for name, values in fields.items():
                file.create_dataset(name, data=values[rows], chunks=number == 0 or None)
    return [str(folder)], fields


def make_idx(folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    images, labels = DRAW.integers(0, 255, (23, 5, 4), "u1"), np.arange(23, dtype="u1")
    write_idx(folder / "train-images-idx3-ubyte.gz", images)
    write_idx(folder / "train-labels-idx1-ubyte", labels)
    return [str(folder)], {"image": images[:, None], "label": labels}


def make_text(folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    texts = ["zwölf\n" * 3, "", "b" * 200]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    stream = b"\0".join([*(text.encode() for text in texts), b""])
    rows = len(stream) // 10
    return [str(folder)], {"tokens": np.frombuffer(stream, "u1")[: rows * 10].reshape(rows, 10)}


@pytest.mark.parametrize("make", [make_npy, make_npz, make_joined, make_hdf5, make_idx, make_text])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_kind_of_source(
    tmp_path: Path, make: Callable[[Path], tuple[list[str], dict[str, np.ndarray]]], shuffle: bool
) -> None:
    (tmp_path / "in").mkdir()
    texts, fields = make(tmp_path / "in")
    reading = Reading(tokens=10) if make is make_text else Reading()
    pack_from(texts, tmp_path / "out", reading, shuffle=shuffle, seed=3, shard_rows=7)
    packed = contents(tmp_path / "out")
    order = select(len(next(iter(fields.values()))), {}, 3, shuffle)[""].part(0, 10**6)
    order = order[: len(next(iter(fields.values())))]
    assert packed.keys() == fields.keys()
    for name, values in fields.items():
        assert packed[name].dtype == values.dtype.newbyteorder("=")
        assert (packed[name] == values[order]).all()
    assert shuffle == (order != np.sort(order)).any()


def test_samples_on_another_axis(tmp_path: Path) -> None:
    values = DRAW.standard_normal((3, 40, 2))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("t", data=values, chunks=(3, 7, 2), compression="gzip")
        file["t"].attrs["units"] = "kelvin"
        file["n"] = np.arange(40)
        file["n"].make_scale("time")
    np.save(tmp_path / "b.npy", np.moveaxis(values, 1, 2))
    packing_ = {"splits": {"one": 0.3, "two": 0.7}, "seed": 5, "shard_rows": 6}
    texts = [f"t={tmp_path}/a.h5:t", f"n={tmp_path}/a.h5:n", f"b={tmp_path}/b.npy"]
    pack_from(texts, tmp_path / "out", Reading(axes={"t": 1, "b": -1}), **packing_)
    one, two = contents(tmp_path / "out" / "one"), contents(tmp_path / "out" / "two")
    assert (len(one["n"]), len(two["n"])) == (12, 28)
    assert sorted([*one["n"], *two["n"]]) == list(range(40))
    for part in one, two:
        assert (np.diff(part["n"]) > 0).all()
        assert (part["t"] == np.moveaxis(values, 1, 0)[part["n"]]).all()
        assert (part["b"] == part["t"]).all()
    with h5py.File(tmp_path / "out" / "one" / "shard-000000.h5") as file:
        assert dict(file["t"].attrs) == {"units": "kelvin"}
        assert dict(file["n"].attrs) == {}


def test_keyed_arrays(tmp_path: Path) -> None:
    """Each of them is a sample, or their rows are; and never all of them one sample."""
    path = tmp_path / "all.h5"
    with h5py.File(path, "w") as file:
        for number in range(12):
            file[f"patch_{number}/image"] = np.full((1, 5, 4), number, "u1")
            file[f"patch_{number}/image"].attrs["units"] = "grey"
            file[f"patch_{number}/label"] = np.full(1, number)
    with pytest.raises(DatasetError, match=r"12 arrays patch_\*/image of 1 rows, which look like"):
        pack_from([str(path)], tmp_path / "out")
    texts = [f"image={path}:patch_*/image", f"{path}:patch_*/label"]
    told = pack_from(texts, tmp_path / "whole", Reading(axes={"": None}))
    assert told.endswith("packed 12 samples in 1 shard")
    packed = contents(tmp_path / "whole")
    assert packed["image"].shape == (12, 1, 5, 4)
    assert packed["image"][:, 0, 0, 0].tolist() == packed["label"][:, 0].tolist() == [*range(12)]
    pack_from(texts, tmp_path / "rows")
    assert contents(tmp_path / "rows")["image"].shape == (12, 5, 4)
    with h5py.File(tmp_path / "rows" / "shard-000000.h5") as file:
        assert file["image"].attrs["units"] == "grey"
    with pytest.raises(DatasetError, match="with others of the same files and groups only"):
        pack_from([*texts, f"x={path}:patch_1/label"], tmp_path / "mixed")
    with pytest.raises(DatasetError, match=r"--axis none is for arrays of groups"):
        pack_from([f"x={path}:patch_1/label"], tmp_path / "one", Reading(axes={"": None}))


def test_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = DRAW.integers(0, 255, (6, 5, 4, 3), "u1")
    for number, each in enumerate(pixels):
        folder = tmp_path / "in" / ("dog" if number % 2 else "cat")
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(each).save(folder / f"{number}.png")
    (tmp_path / "in" / "notes").mkdir()
    pack_from([str(tmp_path / "in")], tmp_path / "out")
    packed = contents(tmp_path / "out")
    assert packed["label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert (packed["image"] == pixels[[0, 2, 4, 1, 3, 5]].transpose(0, 3, 1, 2)).all()
    with h5py.File(tmp_path / "out" / "shard-000000.h5") as file:
        assert json.loads(file["label"].attrs["classes"]) == ["cat", "dog"]

    scaled = Reading(size=(8, 9), grey=True)
    pack_from([str(tmp_path / "in" / "cat")], tmp_path / "alone", scaled)
    assert contents(tmp_path / "alone")["image"].shape == (3, 1, 8, 9)
    assert list(contents(tmp_path / "alone")) == ["image"]

    image.fromarray(pixels[0, :3]).save(tmp_path / "in" / "cat" / "7.png")
    with pytest.raises(DatasetError, match=r"cat/7\.png: 3x4 pixels, but 5x4 in .*--size 5x4"):
        pack_from([str(tmp_path / "in")], tmp_path / "bad")
    content = (tmp_path / "in" / "cat" / "0.png").read_bytes()
    (tmp_path / "in" / "cat" / "7.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=r"cat/7\.png: this file cannot be read"):
        pack_from([str(tmp_path / "in")], tmp_path / "worse")


def test_images_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").touch()
    original = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("PIL"):
            raise ModuleNotFoundError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DatasetError, match=r"pip install 'hpctrain\[images\]'"):
        open_source([str(tmp_path)], Reading())


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        ([1, 2, 300], "int8", r'field "x", row 2: 300 does not fit int8'),
        ([1, -2], "uint8", r"row 1: -2 does not fit uint8"),
        ([0.5], "int64", r"row 0: 0\.5 does not fit int64"),
        ([1.0, np.nan], "int32", r"row 1: nan does not fit int32"),
        ([1.0, 1e300], "float32", r"row 1: 1e\+300 does not fit float32"),
        ([1.0, 3.0], "int16", None),
        ([1.5, np.inf], "float16", None),
    ],
)
def test_another_dtype(
    tmp_path: Path, values: list[float], dtype: str, message: str | None
) -> None:
    np.save(tmp_path / "x.npy", np.array(values))
    reading = Reading(dtypes={"x": np.dtype(dtype)})
    texts = [str(tmp_path / "x.npy")]
    if message is None:
        pack_from(texts, tmp_path / "out", reading)
        assert contents(tmp_path / "out")["x"].dtype == dtype
        return
    with pytest.raises(DatasetError, match=message):
        pack_from(texts, tmp_path / "out", reading)


def save(path: Path, values: Any) -> None:
    np.save(path, values, allow_pickle=True)


def cut(path: Path, left: int) -> None:
    path.write_bytes(path.read_bytes()[:left])


@pytest.mark.parametrize(
    ("make", "texts", "message"),
    [
        (lambda f: None, ["*.npy"], r"\*\.npy: no file has such a name"),
        (lambda f: None, ["."], r": there are no files in this folder"),
        (lambda f: (f / "a.bin").touch(), ["a.bin"], r"a\.bin: what is this\? Known are"),
        (lambda f: save(f / "x.npy", np.zeros((0, 3))), ["x.npy"], r'field "x" has no rows'),
        (lambda f: save(f / "x.npy", np.array(3.0)), ["x.npy"], r"there is no axis 0"),
        (lambda f: save(f / "x.npy", np.array(["a"])), ["x.npy"], r'"x" has dtype <U1'),
        (lambda f: save(f / "x.npy", np.array([{}])), ["x.npy"], r'"x" has dtype object'),
        (lambda f: (f / "x.npy").touch(), ["x.npy"], r"x\.npy: this file cannot be read"),
        (
            lambda f: (save(f / "x.npy", np.zeros(99)), cut(f / "x.npy", 300)),
            ["x.npy"],
            r"x\.npy: 172 bytes of values, too few for shape \(99,\): it is truncated",
        ),
        (
            lambda f: (np.savez(f / "x.npz", x=np.zeros(99)), cut(f / "x.npz", 500)),
            ["x.npz"],
            r"x\.npz: this file cannot be read",
        ),
        (
            lambda f: (save(f / "x.npy", np.zeros(3)), save(f / "y.npy", np.zeros(4))),
            ["x.npy", "y.npy"],
            r"different numbers of rows: x 3, y 4",
        ),
        (
            lambda f: (save(f / "x0.npy", np.zeros(3)), save(f / "x1.npy", np.zeros((3, 1)))),
            ["x=x?.npy"],
            r'x1\.npy: field "x" is float64 of shape \(1,\), but float64 of shape \(\) in x0',
        ),
        (
            lambda f: [
                np.savez(f / f"{i}.npz", x=np.zeros(3 + i), y=np.zeros(4 - i)) for i in (0, 1)
            ],
            ["*.npz"],
            r"\d\.npz: the fields have different numbers of rows",
        ),
        (
            lambda f: np.savez(f / "a.npz", image=np.zeros(3)),
            ["x=a.npz:imag"],
            r'a\.npz: there is no field "imag"\. Did you mean "image"',
        ),
        (
            lambda f: np.savez(f / "a.npz", a=np.zeros(3), b=np.zeros(3)),
            ["x=a.npz"],
            r"which one is to be x\? It holds a, b: write x=a\.npz:a",
        ),
        (
            lambda f: (
                write_idx(f / "i-idx1-ubyte", np.zeros(9, "u1")),
                cut(f / "i-idx1-ubyte", 12),
            ),
            ["i-idx1-ubyte"],
            r"i-idx1-ubyte: 4 bytes of values, where its header says 9: it is truncated",
        ),
        (
            lambda f: (f / "i-idx1-ubyte").write_bytes(b"no IDX"),
            ["i-idx1-ubyte"],
            r"this is not an IDX file: it begins with 6e 6f 20 49",
        ),
        (
            lambda f: (
                write_idx(f / "i-idx1-ubyte.gz", np.zeros(9, "u1")),
                cut(f / "i-idx1-ubyte.gz", 20),
            ),
            ["i-idx1-ubyte.gz"],
            r"i-idx1-ubyte\.gz: this file cannot be read",
        ),
        (lambda f: (f / "a.txt").write_text("short"), ["a.txt"], r"6 bytes of text do not make"),
        (lambda f: (f / "a.h5").write_text("no HDF5"), ["a.h5"], r"a\.h5: HDF5 cannot read"),
        (lambda f: (f / "a.h5").write_text("no HDF5"), ["x=a.h5:x"], r"a\.h5: this file cannot be"),
    ],
)
def test_bad_sources(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], object],
    texts: list[str],
    message: str,
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    make(tmp_path / "in")
    with pytest.raises(DatasetError, match=message):
        pack_from(texts, tmp_path / "out")
    # Nothing here can be taken for a dataset.
    with pytest.raises(DatasetError):
        open_dataset(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("text", "fractions"),
    [
        ("train=0.9,validation=0.1", {"train": 0.9, "validation": 0.1}),
        ("a=.5", {"a": 0.5}),
        ("a=0.9,b=0.2", None),
        ("a=0", None),
        ("a", None),
        ("a=0.1,a=0.2", None),
        ("../a=0.1", None),
        ("", None),
    ],
)
def test_fractions(text: str, fractions: dict[str, float] | None) -> None:
    if fractions is None:
        with pytest.raises(UsageError, match=r"write splits as|the fractions have to"):
            parse_splits(text)
    else:
        assert parse_splits(text) == fractions


@pytest.mark.parametrize("samples", [1, 2, 3, 10, 1000, 99_991])
@pytest.mark.parametrize("fractions", [[1.0], [0.9, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.2]])
def test_every_sample_is_in_one_split(samples: int, fractions: list[float]) -> None:
    names = {f"split{i}": fraction for i, fraction in enumerate(fractions)}
    if samples < 5 and len(fractions) > 1:
        with pytest.raises(DatasetError, match=r'"split0" gets none of \d samples'):
            select(samples, {**names, "split0": 1e-9}, 7, False)
        return
    chosen = select(samples, names, 7, False)
    rows = np.concatenate([chosen[name].part(0, chosen[name].samples) for name in names])
    assert len(np.unique(rows)) == len(rows)
    assert len(rows) == round(samples * sum(fractions))
    for name, fraction in names.items():
        assert abs(chosen[name].samples - samples * fraction) <= 1
    again, other = select(samples, names, 7, True), select(samples, names, 8, False)
    for name in names:
        assert (np.sort(again[name].part(0, samples)) == chosen[name].part(0, samples)).all()
    if samples > 100 and len(names) > 1:
        first = chosen["split0"].part(0, samples)
        assert len(np.intersect1d(first, other["split0"].part(0, samples))) < 0.95 * len(first)


@pytest.mark.parametrize(
    ("make", "name"), [(make_npy, "image.npy"), (make_npz, "0.npz"), (make_idx, "*.gz")]
)
def test_random_damage_is_an_error_or_another_value(
    tmp_path: Path, make: Callable[[Path], tuple[list[str], object]], name: str
) -> None:
    """Never another exception: the parsers of other packages raise all kinds."""
    texts, _ = make(tmp_path)
    (path,) = tmp_path.glob(name)
    whole = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.choice([1, 1, 5])):
            content[draw.randrange(min(len(content), 150))] ^= draw.randrange(1, 256)
        if draw.random() < 0.2:
            del content[draw.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            found = open_source(texts, Reading())
            found.read(np.arange(found.samples))
        except DatasetError as error:
            refused += 1
            assert str(tmp_path) in str(error)  # noqa: PT017 - some are not refused
    assert 20 < refused < 150


class Interruption(BaseException):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], None]:
    """Have packing end, as by a kill, once it has made so many shards."""
    original = packing.write_shard
    made = 0

    def write(*arguments: Any) -> Any:
        nonlocal made
        if made == after:
            # What a killed process leaves: a shard half written.
            path: Path = arguments[0]
            (path.parent / f".{path.name}.123456").write_bytes(b"half a shard")
            raise Interruption
        made += 1
        return original(*arguments)

    monkeypatch.setattr(packing, "write_shard", write)
    return lambda: monkeypatch.setattr(packing, "write_shard", original)


def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, _ = make_npy(tmp_path)
    options = {"splits": {"a": 0.6, "b": 0.4}, "shard_rows": 3}
    assert "packed a 14 samples in 5 shards, b 9 samples in 3 shards" in pack_from(
        texts, tmp_path / "whole", **options
    )
    restore = interrupt(monkeypatch, 4)
    with pytest.raises(Interruption):
        pack_from(texts, tmp_path / "out", **options)
    restore()
    for split in "ab":
        with pytest.raises(DatasetError, match=r"start the same `data pack` again"):
            open_dataset(str(tmp_path / "out" / split))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "a").glob("shard-*")}
    assert len(kept) == 4

    # One of them is not what it was: it is made anew.
    damaged = tmp_path / "out" / "a" / "shard-000002.h5"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert "(3 of them were there)" in pack_from(texts, tmp_path / "out", **options)
    for path, time in kept.items():
        assert (path.stat().st_mtime_ns == time) == (path != damaged)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")

    before = files_of(tmp_path / "out")
    assert "packed already: a 14" in pack_from(texts, tmp_path / "out", **options)
    assert before == files_of(tmp_path / "out")
    with pytest.raises(DatasetError, match="there is a dataset, or a part of one"):
        pack_from(texts, tmp_path / "out", **{**options, "seed": 1})


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"seed": 2}, r"seed = 2 was 0 then"),
        (lambda f: {"shard_rows": 4}, r"shard_rows = 4 was 3 then"),
        (lambda f: {"storage": Storage("gzip")}, r'storage = "gzip" was "contiguous" then'),
        (
            lambda f: os.utime(f / "label.npy") or {},
            r"the files of its source, or how they are read, are others",
        ),
        (
            lambda f: (f / "out" / "index.json.unfinished").write_text("") or {},
            r"another program is writing a dataset here",
        ),
    ],
)
def test_resumed_with_something_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], dict[str, Any]],
    message: str,
) -> None:
    texts, _ = make_npy(tmp_path)
    restore = interrupt(monkeypatch, 2)
    with pytest.raises(Interruption):
        pack_from(texts, tmp_path / "out", shard_rows=3)
    restore()
    with pytest.raises(DatasetError, match=message):
        pack_from(texts, tmp_path / "out", **{"shard_rows": 3, **change(tmp_path)})


def test_packing_where_a_writer_was(tmp_path: Path) -> None:
    texts, _ = make_npy(tmp_path)
    with Writer(tmp_path / "out") as writer:
        writer.append({"x": 3.0})
    with pytest.raises(DatasetError, match="there is a dataset, or a part of one"):
        pack_from(texts, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"file: cannot write here"):
        pack_from(texts, tmp_path / "file")


@pytest.mark.parametrize(
    "text", ["gzip", "gzip:9", "lzf", "zstd:1", "lz4", "blosc2:3", "bitshuffle"]
)
def test_filters(tmp_path: Path, text: str) -> None:
    storage = Storage.parse(text, chunk_bytes=600)
    if storage.filter not in ("gzip", "lzf"):
        pytest.importorskip("hdf5plugin")
    texts, fields = make_npy(tmp_path)
    pack_from(texts, tmp_path / "out", storage=storage, shard_rows=20)
    packed = contents(tmp_path / "out")
    for name, values in fields.items():
        assert (packed[name] == values).all()
    dataset = open_dataset(str(tmp_path / "out"))
    wanted = {"gzip": "deflate"}.get(storage.filter, storage.filter)
    assert wanted in dataset.shards[0].layouts["label"].reason
    assert dataset.slow_fields() == {}
    assert dataset.shards[0].layouts["image"].chunk_rows == 20
    assert dataset.shards[1].layouts["image"].chunk_rows == 3
    (tmp_path / "out" / "index.json").unlink()
    assert open_dataset(str(tmp_path / "out")).slow_fields() == dataset.slow_fields()


@pytest.mark.parametrize("text", ["zip", "gzip:10", "lzf:1", "zstd:x", "none:1"])
def test_filters_that_are_not(text: str) -> None:
    with pytest.raises(UsageError, match=r"no such filter|the filter \w+ has"):
        Storage.parse(text)


def test_a_filter_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpctrain.data.files.storage.load_plugins", lambda: None)
    texts, _ = make_npy(tmp_path)
    with pytest.raises(DatasetError, match=r"zstd comes with .*pip install 'hpctrain\[filters\]'"):
        pack_from(texts, tmp_path / "out", storage=Storage("zstd"))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (4,), "f4", chunks=(2,), compression="gzip")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda number: False)
    with pytest.raises(DatasetError, match=r'"/x" went through HDF5 filter 1 .*\[filters\]'):
        open_dataset(str(tmp_path / "a.h5"))
