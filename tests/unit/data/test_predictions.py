"""Files of predictions: shards in the dataset's order, and what a later job does with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from hpctrain.data import open_dataset
from hpctrain.data.dataset import Field
from hpctrain.data.predictions import PLAN_NAME, Origin, PredictionWriter
from hpctrain.errors import DatasetError
from hpctrain.launch.communicators import SingleCommunicator

ORIGIN = Origin(
    checkpoint="runs/a/checkpoints/step-00000010",
    step=10,
    weights="training",
    dataset="data/test",
    fingerprint="1f",
)
FIELDS = {"prediction": Field((2,), np.dtype(np.float32))}
SAMPLES = 11


def writer(folder: Path, origin: Origin = ORIGIN, samples: int = SAMPLES) -> PredictionWriter:
    return PredictionWriter(folder, origin, FIELDS, samples, SingleCommunicator())


def values(rows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float32]]:
    return {"prediction": np.stack([rows, -rows], axis=1).astype(np.float32)}


def stored(folder: Path) -> npt.NDArray[np.float32]:
    found = open_dataset(str(folder), ["prediction"])
    return np.concatenate([h5py.File(shard.path)["prediction"][:] for shard in found.shards])


@pytest.mark.parametrize("batch", [1, 2, 4, 100])
def test_batches_of_any_size_fill_shards(tmp_path: Path, batch: int) -> None:
    each = writer(tmp_path / "p")
    for start in range(0, len(each.rows), batch):
        each.add(values(each.rows[start : start + batch]))
    assert each.finish() == 0
    assert each.plan.num_shards > 1
    assert np.array_equal(stored(tmp_path / "p"), values(np.arange(SAMPLES))["prediction"])


def test_a_later_job_makes_what_is_missing(tmp_path: Path) -> None:
    first = writer(tmp_path)
    first.add(values(first.rows[:7]))
    assert first.finish() > 0, "a dataset of a part of the predictions"
    with pytest.raises(DatasetError, match=r"unfinished|being written"):
        open_dataset(str(tmp_path), ["prediction"])
    second = writer(tmp_path)
    # The third row of a shard that was not full is lost with the job that had it in memory.
    assert list(second.rows) == list(range(6, SAMPLES))
    second.add(values(second.rows))
    assert second.finish() == 0
    assert np.array_equal(stored(tmp_path), values(np.arange(SAMPLES))["prediction"])
    assert not writer(tmp_path).rows.size, "nothing is left to do"


@pytest.mark.parametrize(
    "other",
    [
        replace(ORIGIN, checkpoint="runs/a/checkpoints/step-00000020", step=20),
        replace(ORIGIN, weights="average"),
        replace(ORIGIN, fingerprint="2f"),
    ],
)
def test_predictions_of_another_origin_are_left_alone(tmp_path: Path, other: Origin) -> None:
    first = writer(tmp_path)
    first.add(values(first.rows))
    with pytest.raises(DatasetError, match=r"step-00000010.*--output"):
        writer(tmp_path, other)
    with pytest.raises(DatasetError, match="--output"):
        writer(tmp_path, samples=SAMPLES + 1)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shard-000000.h5").touch()
    with pytest.raises(DatasetError, match="there is a dataset"):
        writer(tmp_path)
    (tmp_path / "shard-000000.h5").unlink()
    (tmp_path / PLAN_NAME).write_text('{"samples": "many"}')
    with pytest.raises(DatasetError, match="damaged"):
        writer(tmp_path)


def test_shapes_that_change_are_refused(tmp_path: Path) -> None:
    each = writer(tmp_path)
    with pytest.raises(DatasetError, match="same shapes"):
        each.add({"prediction": np.zeros((3, 3), np.float32)})
