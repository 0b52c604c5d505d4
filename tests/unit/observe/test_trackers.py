"""Trackers: everything once, in order, and nothing of theirs that a job would feel."""

from __future__ import annotations

import asyncio
import logging
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.limits import JOB_SECONDS
from helpers.waiting import wait_for

from hpctrain.observe import metrics, trackers
from hpctrain.observe.metrics import MetricsWriter
from hpctrain.observe.records import Histogram, Image
from hpctrain.observe.trackers import Handed, Handing, MLflow, TrackedRun, WandB, handing


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 1 / step, "seconds": {"data": 0.5}} | more


def evaluation(step: int) -> dict[str, Any]:
    return {"kind": "evaluation", "split": "validation", "step": step, "accuracy": 0.5}


class Kept:
    """Takes down what it is handed."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.got.append((step, dict(metrics)))


class Everything(Kept):
    def begin_run(self, run: TrackedRun) -> None:
        self.got.append((run.name, run.id, run.resumed))
        assert run.folder.is_dir()

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self.got.append(dict(params))

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.got.append((key, images[0].shape, step))

    def log_histogram(self, key: str, counts: Any, edges: Any, step: int) -> None:
        self.got.append((key, counts, edges, step))

    def finalize(self, status: str) -> str:
        self.got.append(status)
        return "look there"


IMAGE = Image(
    name="train/map", step=2, wall_time=0.0, height=1, width=2, channels=3, pixels=b"abcdef"
)
HISTOGRAM = Histogram(
    name="train/w", step=2, wall_time=0.0, edges=[0, 1], counts=[3], total=1, squares=1
)


def job(run: Path, tracker: Any, resume_step: int | None, *items: Any, status: str) -> None:
    """Write what a job of a run does, for a tracker too."""
    run.mkdir(exist_ok=True)
    writer = MetricsWriter(run, resume_step)
    made = handing(run, "mine", lambda: tracker, {"optimizer.lr": 0.5}, is_new=False)
    assert made is not None
    writer.hand_to([made])
    for item in items:
        if isinstance(item, dict):
            writer.write(item)
        else:
            writer.write_media(item)
    made.close(status, JOB_SECONDS)  # a busy machine takes longer than a job would wait
    writer.close(status)


def test_no_step_comes_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    one, other = Everything(), Everything()
    run = tmp_path / "run"
    job(run, one, None, train(1), train(2), IMAGE, HISTOGRAM, evaluation(2), status="failed")
    # From an earlier checkpoint, before the evaluation, and further than the first job was.
    job(run, other, 1, train(2), IMAGE, evaluation(2), train(3), status="success")
    begun, hyperparameters, *rest, end = one.got
    assert begun[0] == "run"
    assert not begun[2]
    assert hyperparameters == {"optimizer.lr": 0.5}
    assert rest == [
        (1, {"train/loss": 1.0, "train/seconds/data": 0.5}),
        (2, {"train/loss": 0.5, "train/seconds/data": 0.5}),
        ("train/map", (1, 2, 3), 2),
        ("train/w", [3], [0, 1], 2),
        (2, {"validation/accuracy": 0.5}),
    ]
    assert end == "failed"
    assert other.got[0] == ("run", begun[1], True)
    assert [item[0] for item in other.got[2:-1]] == [3]
    assert "mine has the run up to step 2, and goes on there" in caplog.text
    assert "mine: look there" in caplog.text


def test_a_kill_costs_a_step_and_repeats_none(tmp_path: Path) -> None:
    class Killed(Kept):
        def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
            raise SystemExit

    file = Handed(tmp_path / "step")
    with pytest.raises(SystemExit):
        Handing("x", Kept, named=dict, done=file)._hand(Killed(), train(7))
    assert Handed(tmp_path / "step").steps == {"train": 7}
    (tmp_path / "step").write_bytes(b"{")
    assert Handed(tmp_path / "step").steps == {}


def test_a_new_run_in_the_same_folder(tmp_path: Path) -> None:
    ids = []
    for is_new in (True, False, True):
        tracker = Everything()
        made = handing(tmp_path, "mine", lambda tracker=tracker: tracker, {}, is_new=is_new)
        assert made is not None
        made.put(train(1))
        made.close("success")
        ids.append((tracker.got[0][1], len(tracker.got)))
    assert ids[0][0] == ids[1][0] != ids[2][0]
    assert [count for _, count in ids] == [4, 3, 4]


def test_one_that_hangs_keeps_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    free = threading.Event()

    class Slow(Kept):
        def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
            free.wait()

    handed = Handing("slow", Slow, named=dict)
    for step in range(1, trackers.MAX_WAITING + 101):
        handed.put(train(step))
    handed.close("success", 0.05)
    free.set()
    assert "slow: 10,100 records could not be handed over; metrics.jsonl has all" in caplog.text


def test_what_fails_is_told_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Kept()
    fails = iter([True, True, False])

    class Moody(Kept):
        def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
            if step == 2 and next(fails, False):
                raise ConnectionError("no \x1bnetwork")
            tracker.log_metrics(metrics, step)

    tries = iter([OSError("not yet")])

    def begin() -> Any:
        for error in tries:
            raise error
        return Moody()

    handed = Handing("moody", begin, named=dict, retry_seconds=0.01)
    for step in (1, 2, 3):
        handed.put(train(step))
    wait_for(lambda: len(tracker.got) == 3)
    handed.close("success")
    assert [step for step, _ in tracker.got] == [1, 2, 3]
    assert [record.getMessage().partition(". ")[0] for record in caplog.records] == [
        "moody: OSError: not yet",
        r"moody: ConnectionError: no \x1bnetwork",
    ]


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), KeyboardInterrupt()])
def test_one_that_would_end_its_thread_is_tried_again(
    caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    errors = iter([error])

    class Exiting(Kept):
        def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
            for each in errors:
                raise each
            super().log_metrics(metrics, step)

    tracker = Exiting()
    handed = Handing("exiting", lambda: tracker, named=dict, retry_seconds=0.01)
    handed.put(train(1))
    wait_for(lambda: len(tracker.got) == 1)
    handed.close("success")
    assert f"exiting: {type(error).__name__}: " in caplog.text
    assert "could not be handed over" not in caplog.text


FORKING = """
import os, sys, warnings
from hpctrain.observe.trackers import Handing

class Forking:
    def log_metrics(self, metrics, step):
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
        os.write(1, f"{step} {bool(child)}\\n".encode())

warnings.simplefilter("ignore")
handed = Handing("forking", Forking, named=dict)
for step in (1, 2, 3):
    handed.put({"kind": "train", "step": step})
handed.close("success", float(sys.argv[1]))
os.write(1, b"end\\n")
"""


def test_a_child_of_a_tracker_does_not_go_on_as_the_job() -> None:
    """What it forks and lets come back would hand over the rest a second time."""
    ended = subprocess.run(
        [sys.executable, "-c", FORKING, str(JOB_SECONDS)],
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    found = [line.split() for line in ended.stdout.splitlines()]
    expected = [[str(step), child] for step in (1, 2, 3) for child in ("False", "True")]
    assert found == [*expected, ["end"]], ended.stderr


def test_several_that_hang_take_no_longer_than_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "CLOSE_SECONDS", 0.5)
    waited: list[float] = []
    monkeypatch.setattr(Handing, "close", lambda self, status, seconds: waited.append(seconds))
    writer = MetricsWriter(tmp_path, None)
    handings = [Handing(str(i), Kept, named=dict) for i in range(3)]
    writer.hand_to(handings)
    writer.close()
    assert len(waited) == 3
    assert 0.5 >= waited[0] >= waited[1] >= waited[2]
    for each in handings:
        each._thread.join(JOB_SECONDS)  # told of the end, each of them, before any was waited for
        assert not each._thread.is_alive()


def test_one_that_always_fails_ends_with_the_job(caplog: pytest.LogCaptureFixture) -> None:
    def begin() -> Any:
        raise ImportError("no such service")

    handed = Handing("absent", begin, named=dict)
    handed.put(train(1))
    handed.close("success")
    assert "absent: 1 record could not be handed over" in caplog.text


def wandb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of W&B's own file, a log as LevelDB has them: blocks of 32 KiB."""
    place, whole = 7, b""
    while place < len(content):
        left = 32_768 - place % 32_768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if kind == 0:
            return
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield whole
            whole = b""


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs of a run, in the files that `wandb sync` sends."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "run"
    job(run, WandB(project="p"), None, train(1), train(2), IMAGE, HISTOGRAM, status="failed")
    job(run, WandB(project="p"), 1, train(2), train(3), evaluation(3), status="success")
    found: list[tuple[str, list[int]]] = []
    for path in sorted((run / "trackers" / "mine" / "wandb").glob("offline-run-*/*.wandb")):
        ids, steps = set(), []
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            elif record.HasField("history"):
                steps.append(record.history.step.num)
        found.append((ids.pop(), steps))
    (one, first), (other, second) = found
    assert one == other == (run / "trackers" / "mine" / "id").read_text().strip()
    assert (first, second) == ([1, 2], [3])


def test_mlflow_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    job(run, MLflow(), None, train(1), train(2), IMAGE, HISTOGRAM, status="failed")
    job(run, MLflow(), 1, train(2), train(3), evaluation(3), status="success")
    client = MlflowClient(tracking_uri=(run / "trackers" / "mine" / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("hpctrain")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params == {"optimizer.lr": "0.5"}
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(step, 1 / step) for step in (1, 2, 3)]
    files = [each.path for each in client.list_artifacts(found.info.run_id)]
    assert sorted(files) == ["histograms", "images"]
    assert np.asarray(IMAGE.array()).shape == (1, 2, 3)
