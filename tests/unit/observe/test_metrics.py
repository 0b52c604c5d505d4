"""Metrics files: strict, exact, cut back on resume, and patient with a full disk."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import struct
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from google.protobuf.json_format import MessageToDict

from hpctrain.errors import CheckpointError
from hpctrain.observe import metrics, records
from hpctrain.observe.metrics import MetricsWriter
from hpctrain.observe.records import Histogram, Image, from_line, to_line
from hpctrain.utils import files
from hpctrain.utils.files import AppendedFile, replacing


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 1 / (step + 1), "seconds": {"data": 0.1}} | more


def evaluation(step: int, accuracy: float = 0.5) -> dict[str, Any]:
    return {"kind": "evaluation", "split": "validation", "step": step, "accuracy": accuracy}


def write(folder: Path, resume_step: int | None, *written: Mapping[str, Any]) -> None:
    writer = MetricsWriter(folder, resume_step, now=lambda: 1764396314.12345)
    for record in written:
        writer.write(record)
    writer.close()


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def read_lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def read_table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, restkey="too many", strict=True))


@pytest.fixture(autouse=True)
def no_temporary_file_stays(tmp_path: Path) -> Any:
    yield
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "value", [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2**53 + 1, 1e22, 123456789.123]
)
def test_numbers_keep_every_bit(value: float) -> None:
    read = json.loads(to_line({"step": 1, "x": value}))["x"]
    assert type(read) is type(value)
    assert struct.pack("d", read) == struct.pack("d", value)
    assert read == value


def test_line_of_numbers_that_are_not_finite() -> None:
    record = {
        "kind": "train",
        "step": 3,
        "loss": math.nan,
        "seconds": {"data": math.inf, "compute": 1.5},
        "norms": [1.0, -math.inf],
    }
    line = to_line(record)
    assert line == (
        b'{"kind": "train", "step": 3, "loss": null, "seconds": {"data": null, "compute": 1.5}, '
        b'"norms": [1.0, null], '
        b'"nonfinite": {"loss": "nan", "seconds.data": "inf", "norms.1": "-inf"}}\n'
    )
    read = from_line(line)
    assert read is not None
    assert records.flat(read) == {
        "kind": "train",
        "step": 3,
        "loss": "nan",
        "seconds.data": "inf",
        "seconds.compute": 1.5,
        "norms.0": 1.0,
        "norms.1": "-inf",
    }


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind": "train", "step": 1}',  # the line feed is missing: more may be
        b'{"kind": "train", "st\n',
        b'{"kind": "train"}\n',
        b'{"step": "1"}\n',
        b"[1]\n",
        b"\n",
        b"\x00\x00\x00\n",
        b"\xff\xfe\n",
    ],
)
def test_broken_lines(line: bytes) -> None:
    assert from_line(line) is None


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "9" * 400, "9" * 5000])
def test_numbers_that_no_reader_could_add_up_are_damage(number: str) -> None:
    for line in (f'{{"kind": "train", "step": 1, "a": [{number}]}}\n',):
        assert from_line(line.encode()) is None
    assert from_line(f'{{"kind": "train", "step": 1, "NaN": "{"7" * 30}", "a": 1e-308}}\n'.encode())


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(to_line({"kind": "train", "step": 1}))
    os.truncate(path, 100_000_000)
    with path.open("ab") as file:
        file.write(b"\n" + to_line({"kind": "train", "step": 2}))
    tracemalloc.start()
    try:
        assert [record["step"] for record in records.read_records(path)] == [1, 2]
        assert records.cut_back(path, 5) == 1
        assert tracemalloc.get_traced_memory()[1] < 6 * records.LONGEST_LINE
    finally:
        tracemalloc.stop()
    assert path.stat().st_size < 100


def test_files_of_a_run(tmp_path: Path) -> None:
    written = [
        train(1),
        train(2, loss=math.nan, note='a, "b"\nc', converged=False),
        evaluation(2, accuracy=1 / 3),
        train(3, loss=None),
    ]
    write(tmp_path, None, *written)
    assert [line.get("accuracy") for line in read_lines(tmp_path)] == [None, None, 1 / 3, None]
    assert (tmp_path / "metrics.csv").read_text(encoding="utf-8") == (
        "kind,step,loss,seconds.data,wall_time,note,converged,split,accuracy\n"
        "train,1,0.5,0.1,1764396314.123,,,,\n"
        'train,2,nan,0.1,1764396314.123,"a, ""b"" c",false,,\n'
        "evaluation,2,,,1764396314.123,,,validation,0.3333333333333333\n"
        "train,3,,0.1,1764396314.123,,,,\n"
    )


def test_every_record_is_on_the_disk_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, None)
    for step in range(1, 4):
        writer.write(train(step))
        assert [line["step"] for line in read_lines(tmp_path)] == list(range(1, step + 1))
        assert [row["step"] for row in read_table(tmp_path)] == [str(i) for i in range(1, step + 1)]
    writer.close()


@pytest.mark.parametrize(
    ("resume_step", "steps"),
    [
        (0, []),
        (1, [1]),
        (2, [1, 2, 2]),
        (3, [1, 2, 2, 3]),
        (4, [1, 2, 2, 3, 4, 4]),
        (99, [1, 2, 2, 3, 4, 4]),
    ],
)
def test_resume_cuts_back(tmp_path: Path, resume_step: int, steps: list[int]) -> None:
    write(tmp_path, None, train(1), train(2), evaluation(2), train(3), train(4), evaluation(4))
    write(tmp_path, resume_step, train(resume_step + 1), evaluation(resume_step + 1))
    expected = [*steps, resume_step + 1, resume_step + 1]
    assert [line["step"] for line in read_lines(tmp_path)] == expected
    table = read_table(tmp_path)
    assert [row["step"] for row in table] == [str(step) for step in expected]
    assert all("too many" not in row and None not in row.values() for row in table)


def test_resumed_files_are_those_of_one_go(tmp_path: Path) -> None:
    written = [train(1), train(2), evaluation(2), train(3, loss=math.inf), evaluation(4)]
    once, twice = tmp_path / "once", tmp_path / "twice"
    once.mkdir()
    twice.mkdir()
    write(once, None, *written)
    write(twice, None, *written[:4])
    write(twice, 2, *written[3:])
    for name in ("metrics.jsonl", "metrics.csv"):
        assert (once / name).read_bytes() == (twice / name).read_bytes()


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    write(tmp_path, None, train(1), train(2))
    for name in ("metrics.jsonl", "metrics.csv"):
        path = tmp_path / name
        os.truncate(path, path.stat().st_size - min(cut, 10 if name.endswith("csv") else cut))
    write(tmp_path, 9, train(10))
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 10]
    assert [row["step"] for row in read_table(tmp_path)] == ["1", "10"]


def test_an_untouched_file_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path, None, train(1))
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    write(tmp_path, 1, train(2))
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_a_failed_cut_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, None, train(1), train(2))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            MetricsWriter(tmp_path, 1)
    assert "run.directory" in str(caught.value)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_new_run_puts_old_metrics_aside(tmp_path: Path) -> None:
    for loss in (1.0, 2.0, 3.0):
        write(tmp_path, None, train(1, loss=loss))
    assert [line["loss"] for line in read_lines(tmp_path)] == [3.0]
    assert len(read_table(tmp_path)) == 1
    aside = sorted(tmp_path.glob("metrics-old-*.jsonl"))
    assert [json.loads(path.read_bytes())["loss"] for path in aside] == [1.0, 2.0]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        MetricsWriter(tmp_path / "missing", None)


class Disk:
    """Takes so many more bytes, then is full, as a disk: with a part of what is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free: float = math.inf
        original = files.AppendedFile.__init__

        def opened(file: AppendedFile, path: Path) -> None:
            original(file, path)
            if path.suffix == ".jsonl":
                file._file = _Limited(file._file, self)  # type: ignore[assignment]

        monkeypatch.setattr(files.AppendedFile, "__init__", opened)


class _Limited:
    def __init__(self, file: Any, disk: Disk) -> None:
        self._inner = file
        self._disk = disk

    def write(self, piece: memoryview) -> int:
        if self._disk.free == 0:
            raise OSError(28, "No space left on device")
        part = piece[: int(min(len(piece), self._disk.free))]
        self._disk.free -= len(part)
        return int(self._inner.write(part))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hpctrain")
    disk, now = Disk(monkeypatch), [0.0]
    writer = MetricsWriter(tmp_path, None, clock=lambda: now[0])
    writer.write(train(1))
    disk.free = 10
    for step in (2, 3, 4):
        writer.write(train(step))
        now[0] += 15.0
        # What the disk took of a record does not stay.
        assert [line["step"] for line in read_lines(tmp_path)] == [1]
        disk.free = min(disk.free, 5)
    assert len(caplog.messages) == 1
    assert "No space left on device" in caplog.text
    assert "Training goes on" in caplog.text

    disk.free = math.inf
    writer.write(train(5))  # it is not yet time to try again
    assert [line["step"] for line in read_lines(tmp_path)] == [1]
    now[0] += 30.0
    writer.write(train(6))
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in read_table(tmp_path)] == ["1", "2", "3", "4", "5", "6"]
    assert caplog.messages[1:] == [
        f"{tmp_path / 'metrics.jsonl'} can be written again: 5 records added"
    ]
    writer.close()
    assert len(caplog.messages) == 2


def test_disk_that_stays_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "MAX_WAITING", 3)
    disk = Disk(monkeypatch)
    writer = MetricsWriter(tmp_path, None, clock=lambda: 0.0)
    disk.free = 0
    for step in range(1, 8):
        writer.write(train(step))
    writer.close()
    assert (
        caplog.messages[-1]
        == f"{tmp_path / 'metrics.jsonl'}: 7 records could not be written and are lost"
    )
    assert read_lines(tmp_path) == []


def test_last_records_are_written_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    writer = MetricsWriter(tmp_path, None, clock=lambda: 0.0)
    disk.free = 0
    writer.write(train(1))
    disk.free = math.inf
    writer.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1]


def test_new_columns_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that could not be widened is as it was, and is widened later."""
    writer = MetricsWriter(tmp_path, None, clock=iter(range(0, 1000, 40)).__next__)
    writer.write(train(1))
    before = (tmp_path / "metrics.csv").read_bytes()

    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        writer.write(evaluation(1))
    assert (tmp_path / "metrics.csv").read_bytes() == before
    writer.write(train(2))
    writer.close()
    assert [(row["kind"], row["step"]) for row in read_table(tmp_path)] == [
        ("train", "1"),
        ("evaluation", "1"),
        ("train", "2"),
    ]


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def fail_halfway() -> None:
        with replacing(path) as file:
            file.write(b"half of the")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, None, train(1), train(2), evaluation(2), train(3), train(4))
    write(tmp_path, 2, train(3, loss=math.nan), train(4, flag=True, note="text"))
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert sorted(accumulator.Tags()["scalars"]) == [
        "train/loss",
        "train/seconds/data",
        "validation/accuracy",
    ]
    # What the first job had written after step 2 is not shown.
    losses = {event.step: event.value for event in accumulator.Scalars("train/loss")}
    assert len(accumulator.Scalars("train/loss")) == 4
    assert losses[2] == pytest.approx(1 / 3)
    assert math.isnan(losses[3])
    assert [event.step for event in accumulator.Scalars("validation/accuracy")] == [2]


def test_the_table_of_hyperparameters(tmp_path: Path) -> None:
    """As TensorBoard's own plug-in reads it."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    values = {"optimizer.lr": 0.5, "data.order": "blocks", "training.compile": False, "x": [1, 2]}
    writer = MetricsWriter(tmp_path, None, hyperparameters=values)
    writer.write(train(1))
    writer.close("failed")
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    content = accumulator.PluginTagToContent(metadata.PLUGIN_NAME)
    begin = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    assert {key: MessageToDict(value) for key, value in begin.hparams.items()} == {
        "optimizer.lr": 0.5,
        "data.order": "blocks",
        "training.compile": False,
        "x": "[1, 2]",
    }
    end = metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG])
    assert end.status == 2
    assert (
        accumulator.Tensors(metadata.SESSION_START_INFO_TAG)[0].tensor_proto == metadata.NULL_TENSOR
    )


def test_images_and_histograms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    image = Image(
        name="validation/map",
        step=3,
        wall_time=1.5,
        height=2,
        width=2,
        channels=3,
        pixels=bytes(range(12)),
    )
    histogram = Histogram(
        name="train/w", step=3, wall_time=1.5, edges=[0, 1, 2], counts=[3, 1], total=2, squares=3
    )
    writer = MetricsWriter(tmp_path, None)
    for item in (image, histogram):
        writer.write_media(item)
    writer.close()
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    (event,) = accumulator.Images("validation/map")
    shown = np.asarray(PIL.Image.open(io.BytesIO(event.encoded_image_string)))
    assert np.array_equal(shown, np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    assert np.array_equal(shown, image.array())
    (event,) = accumulator.Histograms("train/w")
    assert (event.step, event.histogram_value.num) == (3, 4)
    assert event.histogram_value.bucket == [3, 1]
    assert caplog.text == ""


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")

    monkeypatch.setattr(metrics, "TensorBoard", missing)
    write(tmp_path, None, train(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl"]


def test_broken_tensorboard_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'google.protobuf'", name="google.protobuf")

    monkeypatch.setattr(metrics, "TensorBoard", broken)
    write(tmp_path, None, train(1))
    assert "No module named 'google.protobuf'" in caplog.text


def test_cut_back_counts_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(to_line(train(1)) + b"garbage\n" + to_line(train(5)) + b'{"step": 1')
    assert records.cut_back(path, 4) == 3
    assert path.read_bytes() == to_line(train(1))
