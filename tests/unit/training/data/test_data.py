"""What a run that has begun keeps of its data: decoding, numbers of normalisation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpctrain.config import Config
from hpctrain.config.schema import (
    CheckpointSection,
    ComponentSection,
    OptimizerSection,
    RunSection,
    TaskSection,
    TrainingSection,
)
from hpctrain.config.schema_data import DataSection, FieldTable
from hpctrain.config.semantics import FIRST, NEWEST, RECORD, semantics_of
from hpctrain.convert.stats import measure
from hpctrain.data.dataset import Dataset
from hpctrain.data.opening.open_datasets import open_datasets
from hpctrain.data.stats import STATS_NAME, read_stats, write_stats
from hpctrain.errors import ConfigError, DatasetError
from hpctrain.training.checkpointing.resume import values_to_go_on_from
from hpctrain.training.data import recorded
from hpctrain.training.data.recorded import decoding_to_record, refuse_other_decoding

RELEASE = Path(__file__).parents[3] / "data" / "0.1.0"


def config(folder: Path, *, allow_data_change: bool = False, **data: Any) -> Config:
    return Config(
        run=RunSection(name="ddp", directory=str(folder)),
        model=ComponentSection(use="mlp"),
        task=TaskSection(use="regression", inputs=("t2m",)),
        data=DataSection(train=f"{folder}/step_*.nc", global_batch_size=8, **data),
        optimizer=OptimizerSection(use="sgd", lr=0.1),
        training=TrainingSection(max_epochs=1),
        checkpoint=CheckpointSection(allow_data_change=allow_data_change),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven numbered files of packed values, each with a scale of its own."""
    for number in range(1, 12):
        with h5py.File(tmp_path / f"step_{number}.nc", "w") as file:
            file["t2m"] = np.arange(12, dtype=np.int16).reshape(6, 2) * number
            file["t2m"].attrs["scale_factor"] = 0.5 * number
            file["t2m"].attrs["add_offset"] = 280.0
    return tmp_path


def opened(config: Config, saved: dict[str, Any] | None = None) -> Dataset:
    train, _ = open_datasets(config.data, ["t2m"], semantics_of(config, saved))
    return train


def saved_by(config: Config) -> dict[str, Any]:
    """Return what a checkpoint of a run that begins now says of its decoding."""
    return {
        RECORD: semantics_of(config).to_json(),
        recorded.DECODING: decoding_to_record(opened(config)),
    }


def test_values_are_those_that_the_run_began_with(folder: Path) -> None:
    asked = config(folder)
    saved = saved_by(asked)
    refuse_other_decoding(asked, opened(asked, saved), saved)
    by_name = config(folder, file_order="name", allow_data_change=True)
    assert decoding_to_record(opened(by_name)) == saved[recorded.DECODING]
    size = (folder / "step_7.nc").stat().st_size
    with h5py.File(folder / "step_7.nc", "r+") as file:
        file["t2m"].attrs.modify("scale_factor", 3.6)
    assert (folder / "step_7.nc").stat().st_size == size  # nothing else tells
    with pytest.raises(ConfigError, match=r"^data\.decode: the numbers of t2m stand for other"):
        refuse_other_decoding(asked, opened(asked, saved), saved)
    changed = config(folder, allow_data_change=True)
    refuse_other_decoding(changed, opened(changed, saved), saved)


def test_a_run_of_the_first_release_goes_on_with_stored_numbers(folder: Path) -> None:
    asked = config(folder)
    refuse_other_decoding(asked, opened(asked, {}), {})
    of_field = config(folder, fields={"t2m": FieldTable(decode="cf")})
    with pytest.raises(ConfigError, match=r"^data\.fields\.t2m\.decode: "):
        refuse_other_decoding(of_field, opened(of_field, {}), {})
    stored = config(folder, decode="none")
    saved = saved_by(stored)
    assert saved[recorded.DECODING] == {}
    refuse_other_decoding(asked, opened(stored), saved)


@pytest.mark.parametrize("begun", [FIRST, NEWEST])
def test_statistics_are_of_the_files_in_any_order(folder: Path, begun: Any) -> None:
    """`data stats` takes files as a new run does, and a run of 0.1.0 by their names."""
    asked = config(folder, decode="none")
    write_stats(measure(opened(asked), jobs=1), folder / STATS_NAME)
    rules = dataclasses.replace(begun, decode="none")
    train, _ = open_datasets(asked.data, ["t2m"], rules)
    assert read_stats(folder / STATS_NAME, train, ["t2m"])["t2m"]["max"] == 121
    stats = measure(train, jobs=1)
    assert stats["semantics"] == NEWEST.version
    write_stats({**stats, "semantics": NEWEST.version + 1}, folder / STATS_NAME)
    with pytest.raises(DatasetError, match="a newer hpctrain has measured these"):
        read_stats(folder / STATS_NAME, train, ["t2m"])
    del stats["semantics"]  # as 0.1.0 wrote them
    write_stats(stats, folder / STATS_NAME)
    read_stats(folder / STATS_NAME, train, ["t2m"])
    part = dataclasses.replace(train, shards=train.shards[1:])
    with pytest.raises(DatasetError, match="statistics of another dataset"):
        read_stats(folder / STATS_NAME, part, ["t2m"])


def test_numbers_of_normalisation_are_those_that_the_run_began_with(folder: Path) -> None:
    asked = config(folder, normalize={"t2m": "stats"})
    train = opened(asked)
    stats = measure(train, jobs=1)
    write_stats(stats, folder / STATS_NAME)
    began = recorded.find_normalizations(asked, train, {})
    saved = {recorded.NORMALIZATION: recorded.normalizations_to_record(asked, began)}
    stats["fields"]["t2m"]["mean"] += 1
    write_stats(stats, folder / STATS_NAME)  # measured anew, by whatever rule
    kept = recorded.normalizations_begun_with(asked, saved)
    assert recorded.find_normalizations(asked, train, kept) == began
    (folder / STATS_NAME).unlink()
    assert recorded.find_normalizations(asked, train, kept) == began
    # What the user says otherwise counts.
    for other in ("channel_stats", {"mean": 1.0, "std": 2.0}):
        said = config(folder, normalize={"t2m": other})
        assert recorded.normalizations_begun_with(said, saved) == {}


def test_tools_see_the_checkpoint_that_a_job_would_go_on_from(tmp_path: Path) -> None:
    there = config(RELEASE)
    found = values_to_go_on_from(there)
    assert found is not None
    assert found["place"]["step"] == 7
    assert semantics_of(there, found) == FIRST
    assert values_to_go_on_from(config(tmp_path)) is None

    def resuming(resume: str) -> dict[str, Any] | None:
        section = dataclasses.replace(there.checkpoint, resume=resume)
        return values_to_go_on_from(dataclasses.replace(there, checkpoint=section))

    assert resuming("never") is None
    assert resuming(str(RELEASE / "fsdp")) == values_to_go_on_from(
        dataclasses.replace(there, run=RunSection(name="fsdp", directory=str(RELEASE)))
    )
