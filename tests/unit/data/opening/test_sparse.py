"""Sparse matrices of cells and genes: their rows are what anndata and scipy make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas
import pytest
import scipy.sparse
import torch
from helpers.loaders import evaluation_loader, train_loader

from hpctrain.config.schema_data import DataSection, FieldTable, SamplesTable
from hpctrain.data.dataset import Dataset
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.order.order import Order
from hpctrain.errors import DatasetError

CELLS, GENES = (23, 1, 40), 57
DRAW = np.random.default_rng(4)
LABEL = {"path": "obs/cell_type/codes"}


def matrix(cells: int, dtype: str = "f4") -> scipy.sparse.csr_matrix:
    counts = DRAW.poisson(0.3, (cells, GENES)).astype(dtype)
    counts[cells // 2] = 0  # a cell in which nothing was found
    counts[0, -1] = 3
    return scipy.sparse.csr_matrix(counts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write cells as anndata does, with layers, raw counts and cell types."""
    path = tmp_path_factory.mktemp("cells")
    for number, cells in enumerate(CELLS):
        types = pandas.Categorical(DRAW.choice(["B", "T"], cells), categories=["B", "NK", "T"])
        data = anndata.AnnData(
            matrix(cells),
            obs=pandas.DataFrame({"cell_type": types}, index=[f"c{i}" for i in range(cells)]),
            layers={"counts": matrix(cells, "u2")},
        )
        data.raw = data.copy()
        compression: Any = "gzip" if number else None
        data.write_h5ad(path / f"{number}.h5ad", compression=compression)
    return path


def opened(folder: Path, samples: SamplesTable | None = None, **tables: dict[str, Any]) -> Dataset:
    section = DataSection(
        train=str(folder / "*"),
        global_batch_size=8,
        fields={name: FieldTable(**table) for name, table in tables.items()},
        samples=samples or SamplesTable(),
    )
    return open_datasets(section, list(tables))[0]


def expected(folder: Path, layer: str | None = None) -> np.ndarray:
    found = [anndata.read_h5ad(path) for path in sorted(folder.iterdir())]
    return np.concatenate([(each.layers[layer] if layer else each.X).toarray() for each in found])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("sparse", ["dense", "csr"])
def test_cells_of_anndata(folder: Path, sparse: str, world_size: int) -> None:
    """Dense or sparse, from any place on, cut to passes, with a layer and labels beside them."""
    dataset = opened(
        folder,
        X={"sparse": sparse},
        counts={"path": "layers/counts", "sparse": "dense"},
        raw={"path": "raw/X", "sparse": sparse},
        cell_type=LABEL,
    )
    values, counts = expected(folder), expected(folder, "counts")
    types = np.concatenate(
        [anndata.read_h5ad(each).obs.cell_type.cat.codes for each in sorted(folder.iterdir())]
    )
    order = Order(samples=sum(CELLS), seed=3, lanes=8, window=4, block_rows=2)
    seen: list[int] = []
    for rank in range(world_size):
        loader = train_loader(
            dataset,
            order,
            fields=["X", "counts", "raw", "cell_type"],
            global_batch_size=16,
            rank=rank,
            world_size=world_size,
        )
        for batch in loader.epoch(1, 16):
            rows = loader.rows(1, batch.start, batch.start + batch.global_size)
            for part in (slice(0, batch.size // 2), slice(batch.size // 2, batch.size)):
                if part.start == part.stop:
                    continue
                fields, own = batch.part(part.start, part.stop), rows[part]
                assert fields.keys() == {"X", "counts", "raw", "cell_type"}
                for name in ("X", "raw"):
                    assert fields[name].layout == (
                        torch.sparse_csr if sparse == "csr" else torch.strided
                    )
                    assert fields[name].dtype == torch.float32
                    np.testing.assert_array_equal(fields[name].to_dense().numpy(), values[own])
                np.testing.assert_array_equal(fields["counts"].numpy(), counts[own])
                np.testing.assert_array_equal(fields["cell_type"].numpy(), types[own])
            seen += rows.tolist()
        assert loader.example(2)["X"].shape == (2, GENES)
        loader.close()
    assert len(set(seen)) == len(seen) == sum(CELLS) - 16


def test_a_matrix_without_two_sides_is_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name in ("data", "indices", "indptr"):
            file[f"matrix/{name}"] = np.zeros(3, np.int32)
        file["matrix/shape"] = [2]
    with pytest.raises(DatasetError, match=r"x\.h5.*matrix/shape.*expected rows and columns"):
        opened(tmp_path, m={"path": "matrix", "sparse": "csr"})


def test_cells_of_10x_genomics(tmp_path: Path) -> None:
    """They keep genes x barcodes by columns, which are the barcodes: cells."""
    cells = matrix(30, "i4")
    by_columns = cells.T.tocsc()
    with h5py.File(tmp_path / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array([f"AAA-{i}" for i in range(30)], "S6")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(by_columns, name)
        group["shape"] = np.array(by_columns.shape, "i4")
    loader = evaluation_loader(
        opened(tmp_path, gex={"path": "matrix", "sparse": "dense"}), fields=["gex"], batch_size=30
    )
    (batch,) = loader
    loader.close()
    np.testing.assert_array_equal(batch.fields["gex"].numpy(), cells.toarray())


def test_genes_and_their_values_as_tokens(folder: Path) -> None:
    """As scGPT and Geneformer take cells: numbers of genes and values, padded."""
    table = {"offsets": "X/indptr", "batch": "pad", "max_length": 20}
    dataset = opened(
        folder,
        gene={"path": "X/indices", "mask": "there", **table},
        value={"path": "X/data", **table},
    )
    loader = evaluation_loader(dataset, fields=["gene", "value"], batch_size=sum(CELLS))
    (batch,) = loader
    loader.close()
    for row, values in enumerate(expected(folder)):
        (genes,) = np.nonzero(values)
        kept = genes[:20]
        there = batch.fields["there"][row].bool()
        assert batch.fields["gene"][row][there].tolist() == kept.tolist()
        assert batch.fields["value"][row][there].tolist() == values[kept].tolist()


def test_a_column_twice_in_a_row_is_a_sum(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", (2, 4)
        group["data"] = np.array([1, 2, 40_000, 5], "u2")
        group["indices"] = np.array([3, 3, 0, 1], "u4")
        group["indptr"] = [0, 3, 4]
    loader = evaluation_loader(opened(tmp_path, X={"sparse": "dense"}), fields=["X"], batch_size=2)
    (batch,) = loader
    loader.close()
    assert batch.fields["X"].tolist() == [[40_000, 0, 0, 3], [0, 5, 0, 0]]


def test_what_is_no_matrix_of_rows_is_refused(tmp_path: Path) -> None:
    data = anndata.AnnData(matrix(9).tocsc())
    data.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(DatasetError, match=r"a\.h5ad: .* by columns \(CSC\).*tocsr\(\)"):
        opened(tmp_path, X={"sparse": "dense"})
    with pytest.raises(DatasetError, match=r'"obs" is not a group of data, indices and indptr'):
        opened(tmp_path, obs={"sparse": "dense"})
    data.X = data.X.tocsr()
    data.write_h5ad(tmp_path / "a.h5ad")
    data[:, :50].copy().write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(DatasetError, match=r"b\.h5ad: .* 50 columns, and 57 in .*a\.h5ad"):
        opened(tmp_path, X={"sparse": "dense"})
    (tmp_path / "b.h5ad").unlink()
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        file["X/indices"][5] = 57
    loader = evaluation_loader(opened(tmp_path, X={"sparse": "dense"}), fields=["X"], batch_size=9)
    with pytest.raises(DatasetError, match=r'"X/indices", row 0: the column 57 is not one of 57'):
        list(loader)
    loader.close()
