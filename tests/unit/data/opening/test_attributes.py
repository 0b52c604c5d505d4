"""Attributes as fields: of files and groups that other tools wrote, values as these have them."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.loaders import evaluation_loader, train_loader

from hpctrain.config.schema_data import DataSection, FieldTable, SourceTable
from hpctrain.convert.index import make_catalogue, make_index
from hpctrain.data.dataset import Dataset
from hpctrain.data.files.discovery import in_order, verify_share
from hpctrain.data.opening.open_datasets import open_datasets, open_for_training
from hpctrain.data.order.order import Order
from hpctrain.data.reading.rows import read_rows
from hpctrain.errors import DatasetError
from hpctrain.training.data.recorded import find_normalizations

LENGTHS = (3, 5, 2, 7, 4, 3, 6, 2, 5, 3, 4)
TASKS = ("lift", "can", "größe")


def opened(source: object, more: dict[str, Any] | None = None, **tables: Any) -> Dataset:
    """Return a dataset as ranks are told it."""
    fields = {name: FieldTable(**table) for name, table in tables.items()}
    section = DataSection(train=str(source), global_batch_size=1, fields=fields, **(more or {}))
    return pickle.loads(pickle.dumps(open_for_training(section, list(fields))))


def values_of(dataset: Dataset, name: str) -> Any:
    return read_rows(dataset, np.arange(dataset.samples))[name]


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations as robomimic writes them: a group each, with attributes of their own."""
    path = tmp_path_factory.mktemp("episodes") / "demo.hdf5"
    draw = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"], data.attrs["env_args"] = sum(LENGTHS), '{"env_name": "Lift"}'
        for number, length in enumerate(LENGTHS):
            demo = data.create_group(f"demo_{number}")
            demo["actions"] = draw.normal(size=(length, 7))
            demo["obs/joint"] = draw.normal(size=(length, 3)).astype("f4")
            demo.attrs["num_samples"] = length
            demo.attrs["task"] = TASKS[number % 3]
            demo.attrs["goal"] = draw.normal(size=3).astype("f4")
            demo.attrs["success"] = np.bool_(number % 2)
            demo.attrs["mass"] = 1 if number % 2 else 0.5  # as Python has them: int and float
            demo["obs"].attrs["camera"] = np.array([b"front", b"wrist"])
            demo["actions"].attrs["hertz"] = np.uint8(20 + number)
    return path


ATTRIBUTES: dict[str, dict[str, Any]] = {
    "length": {"attribute": "num_samples"},
    "task": {"attribute": "task", "classes": "sorted"},
    "goal": {"attribute": "goal"},
    "success": {"attribute": "success"},
    "mass": {"attribute": "mass", "dtype": "float32"},
    "camera": {"path": "data/demo_*/obs", "attribute": "camera", "classes": ("wrist", "front")},
    "hertz": {"path": "data/demo_*/actions", "attribute": "hertz"},
    "total": {"path": "data", "attribute": "total"},
    "text": {"attribute": "task", "dtype": "S8"},
}


def told(path: Path) -> dict[str, list[Any]]:
    """Return the attributes of every episode, as h5py has them."""
    with h5py.File(path) as file:
        demos = [file["data"][f"demo_{number}"] for number in range(len(LENGTHS))]
        sorted_tasks = sorted(TASKS)
        return {
            "length": [demo.attrs["num_samples"] for demo in demos],
            "task": [sorted_tasks.index(demo.attrs["task"]) for demo in demos],
            "goal": [demo.attrs["goal"] for demo in demos],
            "success": [demo.attrs["success"] for demo in demos],
            "mass": [np.float32(demo.attrs["mass"]) for demo in demos],
            "camera": [[1, 0] for _ in demos],
            "hertz": [demo["actions"].attrs["hertz"] for demo in demos],
            "total": [file["data"].attrs["total"] for _ in demos],
            "text": [
                np.frombuffer(demo.attrs["task"].encode().ljust(8, b"\0"), "u1") for demo in demos
            ],
        }


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("whole", [False, True], ids=["windows", "an episode each"])
def test_every_sample_of_an_episode_has_its_attributes(
    episodes: Path, world_size: int, whole: bool
) -> None:
    actions = {"batch": "concat"} if whole else {"steps": 2}
    dataset = opened(
        episodes, joint={"path": "data/demo_*/obs/joint", **actions}, **ATTRIBUTES
    )  # `actions` themselves are not asked for
    wanted, owners = told(episodes), np.arange(len(LENGTHS))
    if not whole:
        owners = np.repeat(owners, np.array(LENGTHS) - 1)
    seen: list[int] = []
    for rank in range(world_size):
        loader = train_loader(
            dataset,
            Order(samples=dataset.samples, seed=1, lanes=4, window=2, block_rows=3),
            fields=["joint", *ATTRIBUTES],
            global_batch_size=6,
            rank=rank,
            world_size=world_size,
        )
        for batch in loader.epoch(0):
            own = loader.rows(0, batch.start, batch.start + batch.global_size)
            for name, values in wanted.items():
                there = np.array(values)[owners[own]]
                np.testing.assert_array_equal(batch.fields[name], there)
            seen += own.tolist()
        loader.close()
    assert sorted(seen) == list(range(len(owners)))
    assert dataset.fields["length"].dtype == np.int64
    assert dataset.fields["goal"].dtype == np.float32
    evaluated = evaluation_loader(dataset, fields=["joint", "goal"], batch_size=5)
    found = np.concatenate([batch.fields["goal"] for batch in evaluated])
    evaluated.close()
    np.testing.assert_array_equal(found, np.array(wanted["goal"])[owners])


def test_statistics_are_those_of_the_rows_that_have_them(episodes: Path) -> None:
    """Measured of what is known already: there is no stats.json of attributes."""
    dataset = opened(
        episodes,
        joint={"path": "data/demo_*/obs/joint"},
        mass={"attribute": "mass"},
        goal={"attribute": "goal"},
    )
    config: Any = SimpleNamespace(
        data=SimpleNamespace(normalize={"mass": "stats", "goal": "channel_stats"})
    )
    found = find_normalizations(config, dataset, {})
    rows = {name: values_of(dataset, name).astype(np.float64) for name in ("mass", "goal")}
    np.testing.assert_allclose(found["mass"].mean, rows["mass"].mean())
    np.testing.assert_allclose(found["mass"].std, rows["mass"].std())
    np.testing.assert_allclose(found["goal"].mean, rows["goal"].mean(0))
    np.testing.assert_allclose(found["goal"].std, rows["goal"].std(0))


def test_an_index_a_catalogue_and_mixed_sources_have_the_same(tmp_path: Path) -> None:
    """A file a sample, and files of several rows: the attribute of the file, whatever lists it."""
    for number in range(12):
        with h5py.File(tmp_path / f"run-{number}.h5", "w") as file:
            file["x"] = np.full((number % 3 + 1, 2), number, "f4")
            file.attrs["year"], file.attrs["kind"] = 1990 + number, TASKS[number % 3]
    tables = {"x": {}, "year": {"attribute": "year"}, "kind": {"attribute": "kind",
                                                               "classes": "sorted"}}  # fmt: skip
    plain = opened(tmp_path, **tables)
    x = values_of(plain, "x")[:, 0]
    np.testing.assert_array_equal(values_of(plain, "year"), 1990 + x)
    names = np.array(sorted(TASKS))
    assert names[values_of(plain, "kind")].tolist() == [TASKS[int(each) % 3] for each in x]
    make_catalogue(str(tmp_path), tmp_path / "list.json")
    make_index(str(tmp_path))
    for source in (tmp_path, tmp_path / "list.json"):
        dataset = opened(source, **tables)
        for name in ("x", "year", "kind"):
            np.testing.assert_array_equal(values_of(dataset, name), values_of(plain, name))
        verify_share([dataset], 0, 1)
    before = opened(tmp_path, **tables).fingerprint
    path = tmp_path / "run-4.h5"
    with h5py.File(path, "r+") as file:
        file.attrs.modify("year", 2020)  # in place: neither size nor shape is another
    assert opened(tmp_path, **tables).fingerprint != before
    (tmp_path / "more").mkdir()
    for number in range(12, 15):
        with h5py.File(tmp_path / "more" / f"run-{number}.h5", "w") as file:
            file["x"] = np.full((2, 2), number, "f4")
            file.attrs["year"], file.attrs["kind"] = 1990 + number, TASKS[number % 3]
    sources = (
        SourceTable(name="a", train=str(tmp_path)),
        SourceTable(name="b", train=str(tmp_path / "more")),
    )
    section = DataSection(
        sources=sources,
        global_batch_size=1,
        fields={name: FieldTable(**table) for name, table in tables.items()},
    )
    both = open_for_training(section, list(tables))
    x = values_of(both, "x")[:, 0]
    years = np.where(x == 4, 2020, 1990 + x)
    np.testing.assert_array_equal(values_of(both, "year"), years)


@pytest.mark.parametrize("tool", ["netCDF4", "xarray"])
def test_global_attributes_of_netcdf_are_single_values(tmp_path: Path, tool: str) -> None:
    """The format has no others: it keeps each number as a list of one."""
    netcdf, xarray = pytest.importorskip("netCDF4"), pytest.importorskip("xarray")
    for number in range(4):
        path = tmp_path / f"member-{number}.nc"
        said = {"realization": np.int32(number), "model": f"m{number % 2}", "co2": [1.5, number]}
        if tool == "xarray":
            data = xarray.Dataset({"t": (("time", "x"), np.full((3, 2), float(number)))})
            data.assign_attrs(said).to_netcdf(path, engine="netcdf4")
            continue
        with netcdf.Dataset(path, "w") as file:
            file.createDimension("time", 3)
            file.createVariable("t", "f8", ("time",))[:] = number
            file.setncatts(said)
            file["t"].setncattr("level", np.int16(number))
    dataset = opened(
        tmp_path,
        t={},
        member={"attribute": "realization"},
        model={"attribute": "model", "classes": "sorted"},
        co2={"attribute": "co2"},
    )
    if tool == "xarray":
        opened_by = xarray.open_dataset
        said = [opened_by(tmp_path / f"member-{number}.nc").attrs for number in range(4)]
    else:
        said = [netcdf.Dataset(tmp_path / f"member-{number}.nc").__dict__ for number in range(4)]
    rows = np.repeat(np.arange(4), 3)
    for name, key in (("member", "realization"), ("co2", "co2")):
        there = np.array([each[key] for each in said])[rows]
        np.testing.assert_array_equal(values_of(dataset, name), there)
        assert values_of(dataset, name).dtype == there.dtype
    assert values_of(dataset, "model").tolist() == (rows % 2).tolist()
    if tool == "netCDF4":
        level = opened(tmp_path, t={}, level={"path": "t", "attribute": "level"})
        np.testing.assert_array_equal(values_of(level, "level"), rows)


def test_pytables_and_anndata(tmp_path: Path) -> None:
    tables = pytest.importorskip("tables")
    with tables.open_file(tmp_path / "t.h5", "w") as file:
        for number in range(3):
            group = file.create_group("/", f"shot_{number}")
            file.create_array(group, "trace", np.full(4, number, "f4"))
            group._v_attrs.energy, group._v_attrs.kind = np.float64(number / 3), f"k{number % 2}"
    dataset = opened(
        tmp_path / "t.h5",
        trace={"path": "shot_*/trace", "axis": "none"},
        energy={"attribute": "energy"},
        kind={"attribute": "kind", "classes": "sorted"},
    )
    np.testing.assert_array_equal(values_of(dataset, "energy"), np.arange(3) / 3)
    assert values_of(dataset, "kind").tolist() == [0, 1, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import anndata

        for number in range(2):
            cells = anndata.AnnData(np.full((3, 2), number, "f4"), uns={"donor": f"d{number}"})
            cells.write_h5ad(tmp_path / f"{number}.h5ad")
    donors = opened(
        tmp_path / "*.h5ad", X={}, version={"attribute": "encoding-version", "dtype": "S5"}
    )
    assert bytes(values_of(donors, "version")[0]) == b"0.1.0"


def test_an_evaluation_has_the_classes_of_the_training(tmp_path: Path) -> None:
    for folder, kinds in (("train", "abc"), ("validation", "cb")):
        (tmp_path / folder).mkdir()
        for number, kind in enumerate(kinds):
            with h5py.File(tmp_path / folder / f"{number}.h5", "w") as file:
                file["x"] = np.zeros((2, 1))
                file.attrs["kind"] = kind
    section = DataSection(
        train=str(tmp_path / "train"),
        validation=str(tmp_path / "validation"),
        global_batch_size=1,
        fields={"kind": FieldTable(attribute="kind", classes="sorted")},
    )
    train, validation = open_datasets(section, ["x", "kind"])
    assert validation is not None
    assert values_of(train, "kind").tolist() == [0, 0, 1, 1, 2, 2]
    assert values_of(validation, "kind").tolist() == [2, 2, 1, 1]


def test_attributes_alone_are_a_sample_a_file(tmp_path: Path) -> None:
    for number in range(11):
        with h5py.File(tmp_path / f"run_{number}.h5", "w") as file:
            file.attrs["u"], file.attrs["v"] = np.array([number, 1.0]), number
    dataset = opened(tmp_path, u={"attribute": "u"}, v={"attribute": "v"})
    assert values_of(dataset, "v").tolist() == list(range(11))
    names = in_order([path.name for path in tmp_path.iterdir()])
    assert [Path(shard.path).name for shard in dataset.shards] == names


@pytest.mark.parametrize(
    ("value", "table", "problem"),
    [
        (None, {}, r'"e_1" has no attribute "a". Did you mean "ab"\? It has: ab'),
        ([1, 2], {}, r'"e_1": attribute "a" is int64 of shape \(2,\), but one int64 in .*"e_0"'),
        ("two", {}, r'"e_1": attribute "a" is one text, but one int64'),
        (h5py.Empty("f4"), {}, r'"e_1": attribute "a" has no value'),
        (300, {"dtype": "uint8"}, r'"e_1": attribute "a": .*300.* is not a number of uint8'),
        (np.uint64(2**63 + 1), {}, r'"e_1": attribute "a" is uint64, and other files'),
        (np.zeros(10_000), {}, r'"e_1": attribute "a" cannot be read: of 80,000 bytes'),
    ],
)  # fmt: skip
def test_what_cannot_be_a_field_is_named(
    tmp_path: Path, value: Any, table: dict[str, Any], problem: str
) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest") as file:
        for number in range(3):
            group = file.create_group(f"e_{number}")
            group["x"] = np.zeros(2)
            group.attrs["ab"] = 1
            if number != 1:
                group.attrs["a"] = -1 if isinstance(value, np.uint64) else 1
            elif value is not None:
                group.attrs["a"] = value
    with pytest.raises(DatasetError, match=rf"a\.h5: {problem}"):
        opened(path, x={"path": "e_*/x"}, a={"attribute": "a", **table})


def test_which_object_is_meant(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.attrs["a"], file["y"] = 9, np.zeros(4)
        for number in range(2):
            group = file.create_group(f"e_{number}")
            group["x"], group["z/z"] = np.zeros(2), np.zeros(2)
            group.attrs["a"], group.attrs["t"] = number, str(number)
    both = {"x": {"path": "e_*/x"}, "y": {}}
    assert values_of(opened(path, **both, a={"attribute": "a"}), "a").tolist() == [0, 0, 1, 1]
    root = opened(path, **both, a={"attribute": "a", "path": "/"})
    assert values_of(root, "a").tolist() == [9] * 4
    for tables, problem in (
        ({"y": {}, "a": {"path": "e_*", "attribute": "a"}}, "no other field is in groups"),
        (
            {"x": {"path": "e_*/x"}, "z": {"path": "e_*/z*/z"}, "a": {"attribute": "a"}},
            "other fields are in e_.*, e_.*/z.*: say by path whose attribute",
        ),
        ({"y": {}, "a": {"path": "no", "attribute": "a"}}, 'no group or HDF5 dataset "no"'),
        ({"y": {}, "a": {"attribute": "b"}}, 'the file has no attribute "b"'),
        ({**both, "a": {"attribute": "a", "classes": "sorted"}}, "int64, and classes are of texts"),
        ({**both, "t": {"attribute": "t"}}, 'one text: it is text: say classes = "sorted"'),
    ):
        with pytest.raises(DatasetError, match=problem):
            opened(path, **tables)
