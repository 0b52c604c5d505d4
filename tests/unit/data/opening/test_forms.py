"""Fields as they are stored: files that other tools wrote, and values as those tools give them."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from hpctrain.config.schema_data import DataSection, FieldTable
from hpctrain.convert.index import make_catalogue, make_index
from hpctrain.convert.stats import measure
from hpctrain.convert.verify import verify
from hpctrain.data.dataset import Dataset
from hpctrain.data.files.discovery import open_dataset
from hpctrain.data.opening.open_datasets import open_for_evaluation, open_for_training
from hpctrain.data.reading.rows import read_rows
from hpctrain.errors import ConfigError, DatasetError, UsageError
from hpctrain.training.data.recorded import FORMS, forms_to_record, refuse_other_forms

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import anndata
    import pandas

ROWS = 24


def _opened(file: Path, table: FieldTable, **more: Any) -> Dataset:
    section = DataSection(train=str(file), global_batch_size=1, fields={"x": table}, **more)
    return open_for_training(section, ["x"])


def _delivered(file: Path, **table: Any) -> Any:
    """Return all samples of a field, in an order that is not that of the file, put back."""
    dataset = pickle.loads(pickle.dumps(_opened(file, FieldTable(**table))))
    rows = np.random.default_rng(0).permutation(dataset.samples)
    values = read_rows(dataset, rows)["x"]
    assert values.shape == (dataset.samples, *dataset.fields["x"].shape)
    assert values.dtype == dataset.fields["x"].dtype.newbyteorder("=")
    return values[np.argsort(rows)]


def _write(path: Path, values: Any, **storage: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("v", data=values, **storage)
    return path


_JETS = np.dtype([("pt", ">f4"), ("flag", "u1"), ("xyz", ">f8", (3,)), ("in", [("a", ">i2")])])
STORAGES: list[dict[str, Any]] = [{}, {"chunks": (5,)}, {"chunks": (5,), "compression": "gzip"}]


@pytest.mark.parametrize("storage", STORAGES, ids=["contiguous", "chunks", "gzip"])
def test_members_of_compound_types_are_fields(tmp_path: Path, storage: dict[str, Any]) -> None:
    jets = np.zeros(ROWS, _JETS)
    jets["pt"], jets["xyz"] = np.arange(ROWS) / 3, np.arange(3 * ROWS).reshape(ROWS, 3)
    jets["in"]["a"] = -np.arange(ROWS)
    path = _write(tmp_path / "a.h5", jets, **storage)
    np.testing.assert_array_equal(_delivered(path, path="v/pt"), jets["pt"])
    np.testing.assert_array_equal(_delivered(path, path="v/xyz"), jets["xyz"])
    np.testing.assert_array_equal(_delivered(path, path="/v/in/a"), jets["in"]["a"])
    some = _delivered(path, path="v/xyz", select={"0": "1:"})
    np.testing.assert_array_equal(some, jets["xyz"][:, 1:])
    # Tools name them in the same way, without a config.
    named = open_dataset(str(path), ["v/pt", "v/in/a"])
    np.testing.assert_array_equal(read_rows(named, np.arange(ROWS))["v/in/a"], jets["in"]["a"])
    with pytest.raises(DatasetError, match=r'"v as x" is compound.*name a member; it has pt, flag'):
        _delivered(path, path="v", squeeze=True)
    with pytest.raises(DatasetError, match='no member "eta"; it has pt'):
        _delivered(path, path="v/eta")


def test_tools_take_members_and_lists_refuse_them(tmp_path: Path) -> None:
    jets = np.zeros(ROWS, _JETS)
    jets["pt"] = np.arange(ROWS)
    path = str(_write(tmp_path / "a.h5", jets))
    assert not verify(path, ["v/pt"]).problems
    assert measure(open_dataset(path, ["v/pt"]))["fields"]["v/pt"]["mean"] == (ROWS - 1) / 2
    for refused in (
        lambda: make_index(path, ["v/pt"]),
        lambda: make_catalogue(path, tmp_path / "list.json", ["v/pt"]),
    ):
        with pytest.raises(UsageError, match="member of a compound type"):
            refused()


def test_a_run_is_not_gone_on_with_under_other_classes(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.h5", [b"a", b"b"])

    def opened(*classes: str) -> Dataset:
        return _opened(path, FieldTable(path="v", classes=classes))

    config = _config()
    saved = {FORMS: forms_to_record(config, opened("a", "b"))}
    refuse_other_forms(config, opened("a", "b"), saved)
    for now, then in ((opened("b", "a"), saved), (opened("a", "b"), {})):
        with pytest.raises(ConfigError, match=r"data\.fields\.x\.classes: the run began with"):
            refuse_other_forms(config, now, then)


@pytest.mark.parametrize(
    ("key", "then", "now"),
    [
        ("image", {"image": (8, 8)}, {"image": (8, 16)}),
        ("crop", {"image": (8, 8), "crop": "random"}, {"image": (8, 8)}),
        ("grey", {"image": (8, 8)}, {"image": (8, 8), "grey": True}),
        ("max_length", {"offsets": "ptr", "batch": "pad"}, {"offsets": "ptr", "max_length": 9}),
        ("counts", {"counts": "n"}, {}),
    ],
)
def test_a_run_is_not_gone_on_with_under_other_samples(
    tmp_path: Path, key: str, then: dict[str, Any], now: dict[str, Any]
) -> None:
    train = _opened(_write(tmp_path / "a.h5", [b"a", b"b"]), FieldTable(path="v", dtype="S1"))
    began, goes_on = _config(x=FieldTable(**then)), _config(x=FieldTable(**now))
    # As a checkpoint has it.
    saved = json.loads(json.dumps({FORMS: forms_to_record(began, train)}))
    refuse_other_forms(began, train, saved)
    with pytest.raises(ConfigError, match=rf"data\.fields\.x\.({key}|batch)"):
        refuse_other_forms(goes_on, train, saved)


def _config(**fields: FieldTable) -> Any:
    return SimpleNamespace(
        checkpoint=SimpleNamespace(allow_data_change=False), data=SimpleNamespace(fields=fields)
    )


def test_windows_of_members_are_those_of_their_rows(tmp_path: Path) -> None:
    jets = np.zeros(ROWS, _JETS)
    jets["pt"] = np.arange(ROWS)
    path = _write(tmp_path / "a.h5", jets)
    windows = _delivered(path, path="v/pt", steps=4)
    np.testing.assert_array_equal(windows, np.arange(ROWS - 3)[:, None] + np.arange(4))


def test_pytables_and_pandas_tables(tmp_path: Path) -> None:
    pandas, tables = pytest.importorskip("pandas"), pytest.importorskip("tables")
    frame = pandas.DataFrame(
        {"e": np.arange(ROWS) / 7, "n": np.arange(ROWS), "kind": ["mu", "electron"] * (ROWS // 2)}
    )
    path = tmp_path / "pandas.h5"
    frame.to_hdf(path, key="t", format="table", data_columns=["kind"])
    values = _delivered(path, path="t/table/values_block_0")
    np.testing.assert_array_equal(values[:, 0], frame["e"])
    classes = _delivered(path, path="t/table/kind", classes="sorted")
    np.testing.assert_array_equal(classes, pandas.Categorical(frame["kind"]).codes)

    class Row(tables.IsDescription):  # type: ignore[misc, name-defined]
        a = tables.Float32Col(shape=(2,))
        good = tables.BoolCol()

    path = tmp_path / "tables.h5"
    with tables.open_file(path, "w") as file:
        table = file.create_table("/", "t", Row)
        for i in range(ROWS):
            table.row["a"], table.row["good"] = (i, -i), i % 3 == 0
            table.row.append()
        table.flush()
        wanted = table.read()
    np.testing.assert_array_equal(_delivered(path, path="t/a"), wanted["a"])
    np.testing.assert_array_equal(_delivered(path, path="t/good", dtype="bool"), wanted["good"])


def test_complex_numbers_of_matlab(tmp_path: Path) -> None:
    stored = np.zeros((ROWS, 3), [("real", "<f8"), ("imag", "<f8")])
    stored["real"] = np.arange(3 * ROWS).reshape(ROWS, 3)
    stored["imag"] = -0.5
    path = _write(tmp_path / "a.mat", stored)
    wanted = stored["real"] + 1j * stored["imag"]
    np.testing.assert_array_equal(_delivered(path, path="v", dtype="complex128"), wanted)
    np.testing.assert_array_equal(_delivered(path, path="v", dtype="complex64"), wanted)
    np.testing.assert_array_equal(_delivered(path, path="v/imag"), stored["imag"])
    with pytest.raises(DatasetError, match=r'it is complex: dtype = "complex128", or a member'):
        _delivered(path, path="v", dtype="float32")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("chunks", [None, True])
def test_selections_by_index(tmp_path: Path, axis: int, chunks: bool | None) -> None:
    values = np.arange(ROWS * 6 * 5 * 1).reshape(ROWS, 6, 5, 1)
    path = _write(tmp_path / "a.h5", np.moveaxis(values, 0, axis), chunks=chunks)

    def delivered(**table: Any) -> Any:
        return _delivered(path, path="v", axis=axis, **table)

    np.testing.assert_array_equal(delivered(select={"0": [4, 1]}), values[:, [4, 1]])
    np.testing.assert_array_equal(delivered(select={"0": "1:-1:2"}), values[:, 1:-1:2])
    np.testing.assert_array_equal(delivered(select={"1": [-1]}, squeeze=True), values[:, :, 4, 0])
    both = delivered(select={"1": "2:4", "0": [0, 5]}, dtype="float32")
    np.testing.assert_array_equal(both, values[:, [0, 5], 2:4])
    for select, problem in (
        ({"0": [6]}, "axis 0 of a sample has 6, and no index 6"),
        ({"3": [0]}, "no axis 3 to select of"),
        ({"3": "1:"}, "no axis 3 to select of"),
        ({"0": "6:9"}, "takes nothing of its axis 0"),
    ):
        with pytest.raises(DatasetError, match=problem):
            delivered(select=select)


def _bytes_read() -> int:
    """Return the bytes that this process has read so far, by whatever library."""
    return int(Path("/proc/self/io").read_text("utf-8").split()[1])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "storage",
    [
        {},
        {"chunks": (2, 2, 1, 30, 40)},
        {"chunks": (2, 2, 1, 30, 40), "compression": "gzip", "shuffle": True},
    ],
    ids=["contiguous", "chunks", "gzip"],
)
def test_no_more_is_read_than_what_is_selected(
    tmp_path: Path, storage: dict[str, Any], axis: int
) -> None:
    """One of twelve levels: of rows that can be cut there, about a twelfth of the bytes."""
    values = np.random.default_rng(1).normal(size=(6, 4, 12, 30, 40)).astype(">f4")
    path = _write(tmp_path / "a.h5", values, **storage)
    whole = np.moveaxis(values, axis, 0)
    before = _bytes_read()
    some = _delivered(path, path="v", axis=axis, select={"1": [7]})
    assert _bytes_read() - before < values.nbytes / 12 + 2**18
    np.testing.assert_array_equal(some, whole[:, :, 7:8])
    apart = _delivered(path, path="v", axis=axis, select={"1": [9, 7], "3": "5:20:3"})
    np.testing.assert_array_equal(apart, whole[:, :, [9, 7]][..., 5:20:3])


def test_categories_of_anndata_are_classes(tmp_path: Path) -> None:
    """By their texts, which are the same numbers in files that number them differently."""
    for name, kinds in (("a", ["B", "T", "NK"]), ("b", ["T", "B"])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cells = pandas.Categorical(["T", "B", "T"], categories=kinds)
            obs = pandas.DataFrame({"cell": cells}, index=["1", "2", "3"])
            anndata.AnnData(np.ones((3, 2), "f4"), obs=obs).write_h5ad(tmp_path / f"{name}.h5ad")
    files = tmp_path / "*.h5ad"
    assert _delivered(files, path="obs/cell", classes="sorted").tolist() == [2, 0, 2, 2, 0, 2]
    assert _delivered(files, path="obs/cell", classes=("T", "B")).tolist() == [0, 1, 0, 0, 1, 0]
    assert _delivered(files, path="obs/cell/codes").tolist() == [1, 0, 1, 0, 1, 0]
    with pytest.raises(DatasetError, match=r'categories, as.*classes = "sorted".*obs/cell/codes'):
        _delivered(files, path="obs/cell")
    with h5py.File(tmp_path / "b.h5ad", "r+") as file:
        file["obs/cell/codes"][1] = -1
    with pytest.raises(DatasetError, match="row 1 has no category"):
        _delivered(files, path="obs/cell", classes="sorted")


def test_selections_by_value_are_those_of_xarray(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("netCDF4")
    levels = np.array([1000.0, 850.0, 500.0, 250.1], np.float32)
    field = xarray.DataArray(
        np.arange(ROWS * 4 * 2.0).reshape(ROWS, 4, 2),
        dims=("time", "level", "lat"),
        coords={"time": np.arange(ROWS), "level": levels, "lat": [0.0, 1.0]},
        name="z",
    )
    path = tmp_path / "era.nc"
    packing = {"z": {"dtype": "i2", "scale_factor": 0.5, "_FillValue": -1}}
    field.to_netcdf(path, engine="netcdf4", encoding=packing)
    stored = np.round(field / 0.5).astype("i2")

    def delivered(**table: Any) -> Any:
        return _delivered(path, path="z", **table)

    wanted = stored.sel(level=[500, 850])
    np.testing.assert_array_equal(delivered(select={"level": [500, 850]}), wanted)
    np.testing.assert_array_equal(
        delivered(select={"level": [250.1]}, squeeze=True), stored[:, 3].to_numpy()
    )
    near = stored.sel(level=[480, 990], method="nearest")
    np.testing.assert_array_equal(delivered(select={"level": [480, 990]}, nearest=True), near)
    with pytest.raises(DatasetError, match=r'"level" has 0 values 480: .*nearest = true'):
        delivered(select={"level": [480]})
    with pytest.raises(DatasetError, match='no coordinate "hight"'):
        delivered(select={"hight": [480]})
    for select, same in (
        ({"level": [[500, 850]]}, stored.sel(level=slice(850, 500))),  # the levels descend
        ({"level": [["", 300], 1000]}, stored.sel(level=[250.1, 1000], method="nearest")),
        ({"lat": [[0.5, ""]]}, stored.sel(lat=slice(0.5, None))),
    ):
        np.testing.assert_array_equal(delivered(select=select), same)
    with pytest.raises(DatasetError, match=r'"level" has none from 600 to 700: 1000'):
        delivered(select={"level": [[600, 700]]})
    with pytest.raises(DatasetError, match=r"\"level\" has 'low', and it holds numbers"):
        delivered(select={"level": ["low"]})
    # What its numbers stand for is still known.
    dataset = _opened(path, FieldTable(path="z", select={"level": [500]}))
    assert dataset.codings("x")[0].scale == 0.5
    with pytest.raises(DatasetError, match=r"data\.fields\.x\.dtype.*leave the dtype out"):
        _opened(path, FieldTable(path="z", dtype="float64"))


def test_selections_by_date_are_those_of_xarray(tmp_path: Path) -> None:
    """Members of an ensemble are samples, times an axis of each."""
    xarray = pytest.importorskip("xarray")
    times = xarray.date_range("2000-02-25", periods=20, freq="12h", calendar="noleap",
                              use_cftime=True)  # fmt: skip
    values = np.arange(3 * 20.0).reshape(3, 20)
    field = xarray.DataArray(values, {"member": [0, 1, 2], "time": times}, name="z")
    path = tmp_path / "ensemble.nc"
    field.to_netcdf(path, engine="h5netcdf")

    def delivered(*wanted: Any, **table: Any) -> Any:
        return _delivered(path, path="z", select={"time": list(wanted)}, **table)

    days = delivered(["2000-02-27", "2000-03-01T00"])
    np.testing.assert_array_equal(days, field.sel(time=slice("2000-02-27", "2000-03-01T00")))
    np.testing.assert_array_equal(delivered("2000-03-01T12", squeeze=True), values[:, 9])
    np.testing.assert_array_equal(delivered("2000-03-01T10:00", nearest=True)[:, 0], values[:, 9])
    with pytest.raises(DatasetError, match=r'"time" has 2 values 2000-03-01: 2000-02-25, 2000-02-'):
        delivered("2000-03-01")
    with pytest.raises(DatasetError, match="has day 29 of a month of 28 in the noleap calendar"):
        delivered("2000-02-29")


@pytest.mark.parametrize("kind", ["fixed", "utf-8", "variable"])
def test_texts_as_classes_and_as_bytes(tmp_path: Path, kind: str) -> None:
    words = [["cat", "añu", "dog", "cat", "owl"][i % 5] for i in range(ROWS)]
    raw = np.array([word.encode() for word in words])
    types = {
        "fixed": raw.dtype,
        "utf-8": h5py.string_dtype("utf-8", 8),
        "variable": h5py.string_dtype(),
    }
    path = _write(tmp_path / "a.h5", raw.astype(types[kind]), dtype=types[kind])
    wanted = np.unique(raw, return_inverse=True)[1]
    np.testing.assert_array_equal(_delivered(path, path="v", classes="sorted"), wanted)
    names = ("owl", "dog", "cat", "añu")
    listed = _delivered(path, path="v", classes=names)
    assert [names[each] for each in listed] == words
    as_bytes = _delivered(path, path="v", dtype="S6")
    assert [bytes(each).rstrip(b"\0") for each in as_bytes] == raw.tolist()
    with pytest.raises(DatasetError, match=r"row \d+: .*is none of the classes"):
        _delivered(path, path="v", classes=("cat", "dog", "owl"))
    with pytest.raises(DatasetError, match=r"row \d+: .*has more than 3 bytes"):
        _delivered(path, path="v", dtype="S3")
    with pytest.raises(DatasetError, match=r'it is text: say classes = "sorted"'):
        _delivered(path, path="v", squeeze=True)


def test_an_evaluation_has_the_classes_of_the_training(tmp_path: Path) -> None:
    train = _write(tmp_path / "train.h5", [b"a", b"b", b"c"])
    validation = _write(tmp_path / "validation.h5", [b"c", b"b"])
    section = DataSection(
        train=str(train),
        validation=str(validation),
        global_batch_size=1,
        fields={"x": FieldTable(path="v", classes="sorted")},
    )
    dataset = open_for_evaluation(section, ["x"])
    assert dataset is not None
    np.testing.assert_array_equal(read_rows(dataset, np.arange(2))["x"], [2, 1])


def test_enumerations_opaque_values_and_numbers_in_other_formats(tmp_path: Path) -> None:
    kinds = h5py.enum_dtype({"dog": 7, "cat": 3}, basetype="i1")
    path = _write(tmp_path / "e.h5", np.array([7, 3, 3], "i1"), dtype=kinds)
    np.testing.assert_array_equal(_delivered(path, path="v"), [7, 3, 3])
    np.testing.assert_array_equal(_delivered(path, path="v", classes=("cat", "dog")), [1, 0, 0])
    np.testing.assert_array_equal(_delivered(path, path="v", classes="sorted"), [1, 0, 0])
    opaque = np.array([b"abc", b"\0de"], "V3")
    path = _write(tmp_path / "o.h5", opaque)
    np.testing.assert_array_equal(
        _delivered(path, path="v", dtype="bytes"), [[97, 98, 99], [0, 100, 101]]
    )
    path = _write(tmp_path / "n.h5", np.array([1, 2, 300]))
    assert _delivered(path, path="v", dtype="float16").dtype == np.float16
    with pytest.raises(DatasetError, match=r"row 2: .*300.* is not a number of uint8"):
        _delivered(path, path="v", dtype="uint8")


def test_references_are_refused_with_an_explanation(tmp_path: Path) -> None:
    path = tmp_path / "r.h5"
    with h5py.File(path, "w") as file:
        file["a"] = np.arange(3)
        file.create_dataset("v", data=[file["a"].ref] * 3, dtype=h5py.ref_dtype)
    with pytest.raises(DatasetError, match="references, to places in this file"):
        _delivered(path, path="v", dtype="bytes")


@pytest.mark.parametrize("chunk", [None, 5])
def test_types_that_numpy_lacks(tmp_path: Path, chunk: int | None) -> None:
    """Arrays as types, bitfields, whole numbers of three bytes, and times of four."""
    numbers = np.arange(ROWS, dtype=np.int32) * 70000 - 500000
    storage = {} if chunk is None else {"chunks": (chunk,), "compression": "gzip"}
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if chunk is not None:
        properties.set_chunk((chunk,))
        properties.set_deflate(1)
    odd = h5py.h5t.STD_I32BE.copy()
    odd.set_size(3)
    bits = h5py.h5t.STD_B64BE
    of_bytes = {
        "odd": (odd, numbers.astype(">i4").view("u1").reshape(ROWS, 4)[:, 1:], "V3"),
        "bits": (bits, numbers.astype(">u8"), "V8"),
        "time": (h5py.h5t.UNIX_D32LE, numbers.astype("<i4"), "V4"),
    }
    path = tmp_path / "a.h5"
    matrices = np.arange(6 * ROWS, dtype="f4").reshape(ROWS, 2, 3)
    with h5py.File(path, "w") as file:
        file.create_dataset("v", (ROWS,), "(2,3)>f4", **storage)[:] = matrices
        rows = h5py.h5s.create_simple((ROWS,))
        for name, (kind, values, raw) in of_bytes.items():
            made = h5py.h5d.create(file.id, name.encode(), kind, rows, properties)
            whole = np.ascontiguousarray(values).view(raw).reshape(ROWS)
            made.write(h5py.h5s.ALL, h5py.h5s.ALL, whole, kind)
    np.testing.assert_array_equal(_delivered(path, path="v"), matrices)
    some = _delivered(path, path="v", select={"1": [2, 0]}, dtype="float64")
    np.testing.assert_array_equal(some, matrices[:, :, [2, 0]])
    np.testing.assert_array_equal(_delivered(path, path="odd", dtype="int32"), numbers)
    np.testing.assert_array_equal(_delivered(path, path="bits"), numbers.astype("u8"))
    np.testing.assert_array_equal(_delivered(path, path="time", dtype="int64"), numbers)
    assert _delivered(path, path="odd", dtype="bytes").shape == (ROWS, 3)
    with pytest.raises(DatasetError, match='say dtype = "int64"'):
        _delivered(path, path="odd", squeeze=True)
    with pytest.raises(DatasetError, match=r"row \d+: .* is not a number of uint16"):
        _delivered(path, path="odd", dtype="uint16")
