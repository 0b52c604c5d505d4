"""Classes that are not there: empty, not in the list, NaN; masked, ignored, or refused by row."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.loaders import train_loader

from hpctrain.config.schema import Config
from hpctrain.config.schema_data import DataSection, FieldTable, SourceTable
from hpctrain.data.dataset import Dataset
from hpctrain.data.opening.open_datasets import open_datasets, open_for_training
from hpctrain.data.order.order import Order
from hpctrain.data.reading.rows import read_rows
from hpctrain.errors import DatasetError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import anndata
    import pandas

KINDS = ["T", "", "B", "NK", "T", "?", "B", "T", "B", ""]
ROWS = len(KINDS)


def write(path: Path, kind: str) -> None:
    """Write classes as their kind of user would."""
    if kind == "h5ad":
        known = [each if each in ("T", "B", "NK") else None for each in KINDS]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            obs = pandas.DataFrame({"k": pandas.Categorical(known)}, index=map(str, range(ROWS)))
            anndata.AnnData(np.ones((ROWS, 2), "f4"), obs=obs).write_h5ad(path)
            assert anndata.read_h5ad(path).obs["k"].isna().sum() == 3
        return
    with h5py.File(path, "w") as file:
        if kind == "attribute":
            for number, each in enumerate(KINDS):
                group = file.create_group(f"e_{number}")
                group["x"] = np.zeros(1)
                if each:  # who did not know it has left it out
                    group.attrs["k"] = each
            return
        if kind == "enum":
            numbers = {"T": 5, "B": 1, "NK": 2}
            values = np.array([numbers.get(each, 0) for each in KINDS], "i1")
            file.create_dataset("k", data=values, dtype=h5py.enum_dtype(numbers, "i1"))
            return
        dtype = {"fixed": "S2", "variable": h5py.string_dtype()}[kind]
        texts = file.create_dataset("k", (ROWS,), dtype, fillvalue=None)
        for number, each in enumerate(KINDS):
            if each:  # the others were never written
                texts[number] = each


TABLES: dict[str, dict[str, Any]] = {
    "h5ad": {"path": "obs/k"},
    "attribute": {"path": "e_*", "attribute": "k"},
    "enum": {},
    "fixed": {},
    "variable": {},
}
CLASSES = ("T", "B", "NK")


def opened(path: Path, kind: str, **table: Any) -> Dataset:
    fields = {"k": FieldTable(**{**TABLES[kind], "classes": CLASSES, **table})}
    names = ["k"]
    if kind == "attribute":
        fields["x"] = FieldTable(path="e_*/x")
        names.append("x")
    section = DataSection(train=str(path), global_batch_size=1, fields=fields)
    return open_for_training(section, names)


@pytest.mark.parametrize("kind", TABLES)
def test_what_is_none_of_the_classes(tmp_path: Path, kind: str) -> None:
    """As a number of its own, marked as missing; or refused by file and row."""
    path = tmp_path / f"a.{'h5ad' if kind == 'h5ad' else 'h5'}"
    write(path, kind)
    for table, number in (({"missing": -100}, -100), ({"mask": "there"}, -1)):
        dataset = opened(path, kind, **table)
        wanted = [CLASSES.index(each) if each in CLASSES else number for each in KINDS]
        assert read_rows(dataset, np.arange(ROWS))["k"].tolist() == wanted
        assert dataset.codings("k")[0].missing == (number,)
    with pytest.raises(DatasetError, match=r"a\.h5.*(row 1|e_1).*") as refused:
        read_rows(opened(path, kind), np.arange(ROWS))
    if kind != "attribute":
        assert "a mask, or missing = -100 that is task.ignore_index" in str(refused.value)
    if kind in ("fixed", "variable"):
        dataset = opened(path, kind, classes="sorted", missing=7)
        assert read_rows(dataset, np.arange(3))["k"].tolist() == [3, 7, 1]  # ?, B, NK, T


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_mask_of_classes_at_any_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    from hpctrain.training.data.transforms import Decodings

    write(tmp_path / "a.h5", "variable")
    dataset = opened(tmp_path / "a.h5", "variable", mask="there")
    config = _config(FieldTable(classes=CLASSES, mask="there"))
    decodings = Decodings.of(config, [dataset])
    fields = decodings.fields(dataset.fields, prepared=False)
    assert fields["k"].dtype == np.int64, "classes stay whole numbers"
    seen = {}
    for rank in range(world_size):
        import torch

        loader = train_loader(
            dataset,
            Order(samples=ROWS, seed=1, lanes=4, window=2, block_rows=2),
            fields=["k"],
            global_batch_size=4,
            rank=rank,
            world_size=world_size,
            decoding=decodings.decoding(config, 0, torch.device("cpu")),
        )
        for batch in loader.epoch(0):
            rows = loader.rows(0, batch.start, batch.start + batch.global_size).tolist()
            both = zip(batch.fields["k"].tolist(), batch.fields["there"].tolist(), strict=True)
            seen |= dict(zip(rows, both, strict=True))
        loader.close()
    for row, each in enumerate(KINDS):
        assert seen[row][1] == (each in CLASSES)
        if each in CLASSES:
            assert seen[row][0] == CLASSES.index(each)
    # Without a mask, and with another number than the one that is ignored, none may be missing.
    unmasked = Decodings.of(_config(FieldTable(classes=CLASSES, missing=-100)), [
        opened(tmp_path / "a.h5", "variable", missing=-100)
    ])  # fmt: skip
    for ignored, refused in ((-100, 0), (-1, 1), (None, 1)):
        about = unmasked.decoding(_config(FieldTable(), ignored), 0, torch.device("cpu"))
        assert len(about.refused) == refused


def _config(table: FieldTable, ignore_index: int | None = None) -> Config:
    from types import SimpleNamespace

    arguments = {} if ignore_index is None else {"ignore_index": ignore_index}
    made: Any = SimpleNamespace(
        task=SimpleNamespace(use="classification", target="k", inputs=[], arguments=arguments),
        data=SimpleNamespace(fields={"k": table}, normalize={}),
    )
    return made


def test_nan_among_whole_numbers_as_pandas_has_it(tmp_path: Path) -> None:
    pytest.importorskip("tables")
    frame = pandas.DataFrame({"label": [3, np.nan, 1, np.nan]})
    frame.to_hdf(tmp_path / "a.h5", key="t", format="table", data_columns=["label"])

    def delivered(**table: Any) -> Any:
        fields = {"y": FieldTable(path="t/table/label", dtype="int64", **table)}
        section = DataSection(train=str(tmp_path / "a.h5"), global_batch_size=1, fields=fields)
        return read_rows(open_for_training(section, ["y"]), np.arange(4))["y"]

    wanted = frame["label"].fillna(-100).astype("int64")
    np.testing.assert_array_equal(delivered(missing=-100), wanted)
    np.testing.assert_array_equal(delivered(mask="m"), frame["label"].fillna(-1).astype("int64"))
    with pytest.raises(DatasetError, match=r"row 1: .*nan.* is not a number of int64: say what st"):
        delivered()


def test_attributes_that_say_what_is_missing_say_it_alone(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["k"] = np.array([1.0, -9.0])
        file["k"].attrs["_FillValue"] = -9.0
    section = DataSection(
        train=str(tmp_path / "a.h5"),
        global_batch_size=1,
        fields={"k": FieldTable(dtype="int64", missing=-1)},
    )
    with pytest.raises(DatasetError, match="attributes tell already which numbers are missing"):
        open_for_training(section, ["k"])


def test_sorted_classes_are_those_of_all_sources(tmp_path: Path) -> None:
    """One table, whichever source or split a text is met in."""
    for name, kinds in (("a", [b"c", b"a"]), ("b", [b"b", b"c"]), ("v", [b"c", b"b"])):
        (tmp_path / name).mkdir()
        with h5py.File(tmp_path / name / "1.h5", "w") as file:
            file["k"] = kinds
            file.attrs["year"] = kinds[0]
    sources = tuple(SourceTable(name=each, train=str(tmp_path / each)) for each in "ab")
    section = DataSection(
        sources=sources,
        validation=str(tmp_path / "v"),
        global_batch_size=1,
        fields={
            "k": FieldTable(classes="sorted"),
            "year": FieldTable(attribute="year", classes="sorted", missing=-1),
        },
    )
    train, validation = open_datasets(section, ["k", "year"])
    assert validation is not None
    values = read_rows(train, np.arange(4))
    assert values["k"].tolist() == [2, 0, 1, 2]
    assert values["year"].tolist() == [1, 1, 0, 0]
    there = read_rows(validation, np.arange(2))
    assert there["k"].tolist() == [2, 1]
    assert there["year"].tolist() == [1, 1]
    forms = [each.home("k")[0].fields[each.home("k")[1]].form for each in (train, validation)]
    assert all(form is not None and form.classes == ("a", "b", "c") for form in forms)
