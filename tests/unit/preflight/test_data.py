"""The dataset: what a node sees of it, and how that is judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpctrain.data.dataset import Dataset, Field, Layout, Shard
from hpctrain.preflight.data import (
    Reading,
    judge_dataset,
    judge_locking,
    judge_reading,
    judge_visibility,
    unseen_shards,
)


def dataset(reason: str) -> Dataset:
    layout = Layout(None if reason else 2048, reason=reason)
    return Dataset(
        source="data",
        fields={"image": Field((8, 8), np.dtype("float32"))},
        shards=(Shard("data/0.h5", 10, 4608, None, {"image": layout}),),
    )


def test_dataset() -> None:
    assert judge_dataset(dataset(""), None).status == "pass"
    assert "10 samples in 1 shard (image float32[8, 8])" in judge_dataset(dataset(""), None).fact
    slow = judge_dataset(dataset("chunked, gzip"), dataset(""))
    assert slow.status == "warn"
    assert "chunked, gzip" in slow.fact
    assert "10 for validation" in slow.fact


def test_visibility() -> None:
    assert judge_visibility({"a": [], "b": []}).status == "pass"
    finding = judge_visibility({"a": [], "b": ["/scratch/0.h5: No such file or directory"]})
    assert finding.status == "fail"
    assert "1 of 2 nodes" in finding.fact
    assert "b: /scratch/0.h5" in finding.fact


@pytest.mark.parametrize(
    ("step_rate", "status"), [(None, "pass"), (100.0, "pass"), (500.0, "warn")]
)
def test_reading(step_rate: float | None, status: str) -> None:
    reading = Reading(samples=100, batches=4, num_bytes=1000, seconds=1.0)
    finding = judge_reading([reading, reading], step_rate)
    assert finding.status == status
    assert finding.values["samples_per_second"] == 200


@pytest.mark.parametrize(
    ("failure", "off", "status"),
    [
        (None, False, "pass"),
        ("Function not implemented", False, "warn"),
        ("Function not implemented", True, "pass"),
    ],
)
def test_locking(failure: str | None, off: bool, status: str) -> None:
    assert judge_locking(failure, "lustre", off).status == status


def test_shards_that_a_node_does_not_see(tmp_path: Path) -> None:
    shards = []
    for number, (there, listed_size) in enumerate([(4, 4), (4, 5), (None, 4)]):
        path = tmp_path / f"{number}.h5"
        if there is not None:
            path.write_bytes(bytes(there))
        shards.append(Shard(str(path), 1, listed_size, None, {"x": Layout(0)}))
    dataset = Dataset("data", {"x": Field((), np.dtype("int32"))}, tuple(shards))
    assert unseen_shards(dataset) == [
        f"{tmp_path}/1.h5: 4 bytes here, 5 on rank 0",
        f"{tmp_path}/2.h5: No such file or directory",
    ]
