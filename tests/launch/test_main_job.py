"""The main job as a user runs it: real mpirun, real data, real checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.limits import JOB_SECONDS
from helpers.waiting import wait_for

from hpctrain.convert.digits import pack_digits

pytestmark = pytest.mark.ranks(2)

ROOT = Path(__file__).parents[2]
EPOCH_STEPS = 23  # 1,438 digits in batches of 64

# Metrics compare bit for bit, except for what a clock says.
CLOCKED = {"seconds", "samples_per_second", "time"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "digits"
    pack_digits(folder)
    return folder


@pytest.fixture
def site(tmp_path: Path, digits: Path) -> Path:
    """A directory to start jobs in: the documented example and its data."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    shutil.copy(ROOT / "configs" / "run.toml", tmp_path / "run.toml")
    return tmp_path


def command(ranks: int, *arguments: str) -> list[str]:
    launcher = ["mpirun", "-np", str(ranks)] if ranks else []
    return [*launcher, sys.executable, "-m", "hpctrain", *arguments]


def hpctrain(
    site: Path, ranks: int, *arguments: str, code: int = 0, timeout: float = JOB_SECONDS
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command(ranks, *arguments),
        cwd=site,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == code, f"{result.stdout}\n{result.stderr}"
    return result


def train(site: Path, ranks: int, *overrides: str, code: int = 0) -> str:
    result = hpctrain(site, ranks, "run.toml", *overrides, code=code)
    return result.stdout + result.stderr


def metrics(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in record.items() if key not in CLOCKED}
        for record in map(json.loads, lines)
        if kind in (None, record["kind"])
    ]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in metrics(run, "train")]


def test_the_documented_run(site: Path) -> None:
    """What jobs/debug.sh starts: trains to 0.98, says what it does, leaves all files, once."""
    output = train(site, 2)
    run = site / "runs" / "digits"
    evaluations = metrics(run, "evaluation")
    assert evaluations[-1]["accuracy"] >= 0.98
    assert [record["epoch"] for record in evaluations] == list(range(12))
    assert evaluations[-1]["split"] == "validation"

    trained = metrics(run, "train")
    assert [record["step"] for record in trained] == [*range(10, 276, 10), 276]
    assert trained[-1]["samples_seen"] == 12 * 1438
    assert {"step", "epoch", "samples_seen", "loss", "lr", "grad_norm"} <= set(trained[0])

    names = {path.name for path in run.iterdir()}
    assert {"config.toml", "log.txt", "metrics.jsonl", "metrics.csv", "exit.json"} <= names
    assert (run / "latest").read_text(encoding="utf-8").strip() == "step-00000276"
    assert json.loads((run / "exit.json").read_text(encoding="utf-8"))["code"] == 0
    assert len(list((run / "checkpoints").iterdir())) in (3, 4)  # the last three and the best

    assert "\r" not in output
    assert "\x1b" not in output
    for word in ("digits", "2 ranks", "MPICH", "gloo", "1,438", "64", "parameters", "accuracy"):
        assert word in output
    assert "Warning" not in output
    assert output.count("1,438 samples in") == 1  # one rank speaks

    again = train(site, 2)
    assert "complete" in again
    assert "max_epochs" in again
    assert metrics(run, "train") == trained

    status = hpctrain(site, 0, "status", "runs/digits").stdout
    assert "complete" in status
    assert "276" in status


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_the_same_losses_at_any_world_size(site: Path, precision: str) -> None:
    """3 and 16 divide neither batch nor lanes; one process runs without any launcher."""
    curves, accuracies = {}, {}
    for ranks in (0, 3, 16) if precision == "64-true" else (0, 3):
        train(
            site,
            ranks,
            f"run.name=at-{ranks}",
            f"training.precision={precision}",
            "training.max_epochs=1",
            "data.micro_batch_size=7",
            "logging.every_steps=1",
        )
        run = site / "runs" / f"at-{ranks}"
        curves[ranks] = losses(run)
        accuracies[ranks] = metrics(run, "evaluation")[-1]["accuracy"]
    alone = curves.pop(0)
    assert len(alone) == EPOCH_STEPS
    for curve in curves.values():
        if precision == "64-true":
            assert curve == pytest.approx(alone, rel=1e-9, abs=1e-9)
        else:
            assert curve[0] == pytest.approx(alone[0], rel=1e-5)
    assert max(accuracies.values()) - min(accuracies.values()) <= 0.005


class Job:
    """A job that is interrupted while it runs."""

    def __init__(self, site: Path, ranks: int, *overrides: str) -> None:
        self.process = subprocess.Popen(
            command(ranks, "run.toml", *overrides),
            cwd=site,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait(self) -> tuple[int, str]:
        try:
            output, _ = self.process.communicate(timeout=JOB_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        return self.process.returncode, output

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def start(site: Path) -> Iterator[Any]:
    jobs: list[Job] = []

    def start(ranks: int, *overrides: str) -> Job:
        jobs.append(Job(site, ranks, *overrides))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def reached(run: Path, step: int) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and bool(re.search(rf'"step": {step}\b', path.read_text("utf-8")))


@pytest.mark.parametrize("ranks", [1, 3])
def test_ctrl_c_and_back_is_bit_for_bit(site: Path, start: Any, ranks: int) -> None:
    """Stopped anywhere and started again, the metrics are those of an uninterrupted run."""
    common = ["scheduler.use=constant", "logging.every_steps=1"]
    common += [f"data.micro_batch_size={24 // ranks}"]  # several passes a step
    job = start(ranks, "run.name=stopped", "training.max_epochs=10000", *common)
    stopped = site / "runs" / "stopped"
    wait_for(lambda: reached(stopped, EPOCH_STEPS + 5))
    job.process.send_signal(signal.SIGINT)
    code, output = job.wait()
    assert code == 75, output
    assert "Traceback" not in output
    outcome = json.loads((stopped / "exit.json").read_text(encoding="utf-8"))
    assert outcome["code"] == 75

    common += [f"training.max_epochs={outcome['step'] // EPOCH_STEPS + 1}"]
    train(site, ranks, "run.name=whole", *common)
    output = train(site, ranks, "run.name=stopped", *common)
    assert f"step {outcome['step']}" in output
    assert metrics(stopped) == metrics(site / "runs" / "whole")


def test_killed_and_resumed_at_another_world_size(site: Path, start: Any) -> None:
    """A killed rank ends the job; the next start goes on, with other ranks, on the same batches."""
    common = ["training.max_epochs=3", "logging.every_steps=1", "training.precision=64-true"]
    train(site, 0, "run.name=whole", *common)
    job = start(3, "run.name=killed", *common, "checkpoint.every_steps=5")
    killed = site / "runs" / "killed"
    wait_for(lambda: reached(killed, 30))
    victim = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and _is_rank(entry, "run.name=killed", "2")
    ]
    os.kill(victim[0], signal.SIGKILL)
    code, _ = job.wait()
    assert code != 0

    train(site, 2, "run.name=killed", *common, "checkpoint.every_steps=5")
    whole = site / "runs" / "whole"
    assert [record["step"] for record in metrics(killed)] == [
        record["step"] for record in metrics(whole)
    ]
    # Beyond that rounding grows, as it does between any two orders of summation.
    compared = slice(2 * EPOCH_STEPS)
    assert losses(killed)[compared] == pytest.approx(losses(whole)[compared], rel=1e-9, abs=1e-9)


def _is_rank(entry: Path, words: str, rank: str) -> bool:
    try:
        environment = (entry / "environ").read_bytes().split(b"\0")
        arguments = (entry / "cmdline").read_bytes()
    except OSError:
        return False
    return words.encode() in arguments and f"PMI_RANK={rank}".encode() in environment


def test_two_jobs_never_share_a_folder(site: Path, start: Any) -> None:
    first = start(2, "training.max_epochs=1000")
    wait_for((site / "runs" / "digits" / "metrics.jsonl").exists)
    output = train(site, 2, code=74)
    assert "another job trains in runs/digits (process " in output
    assert "Traceback" not in output
    assert output.count("hpctrain: error") == 1
    first.process.send_signal(signal.SIGTERM)
    assert first.wait()[0] == 75


def test_a_mistake_is_told_once(site: Path) -> None:
    output = train(site, 4, "data.globl_batch_size=3", "optimizer.lr=fast", code=78)
    assert "did you mean data.global_batch_size?" in output
    assert "optimizer.lr" in output
    assert output.count("mistakes") == 1
    assert "Traceback" not in output


def test_a_mistake_that_only_an_import_shows(site: Path) -> None:
    output = train(site, 2, "model.chanels=3", "optimizer.learning_rate=3", code=78)
    assert "model.chanels" in output
    assert "optimizer.learning_rate" in output
    assert output.count("mistakes") == 1


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("task.target=lable", 65, 'Did you mean "label"?'),
        ("data.lanes=1", 78, "data.lanes"),
        ("data.global_batch_size=2000", 65, "1438"),
        ("checkpoint.keep_best=acuracy", 78, "did you mean accuracy?"),
    ],
)
def test_a_mistake_that_only_the_data_show(
    site: Path, override: str, code: int, words: str
) -> None:
    output = train(site, 2, override, "data.micro_batch_size=1", code=code)
    assert words in output
    assert output.count("hpctrain: error") == 1
    assert "Traceback" not in output


OWN_MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10)
        )

    def forward(self, image):
        return self.layers(image)


def decay(step, total_steps, power=2.0):
    return (1 - step / total_steps) ** power


class Broken(Net):
    def forward(self, image):
        if torch.distributed.get_rank() == 1 and self.training:
            raise ValueError("the second rank is unwell")
        return super().forward(image)
"""


def test_own_model_schedule_and_optimizer(site: Path) -> None:
    (site / "mine.py").write_text(OWN_MODULE, encoding="utf-8")
    config = (site / "run.toml").read_text(encoding="utf-8")
    config = config.replace('use = "convnet"', 'use = "mine:Net"\nwidth = 64')
    config = re.sub(r"(in_channels|num_classes) = \d+.*\n", "", config)
    config = config.replace('use = "cosine"', 'use = "mine:decay"\npower = 1.5')
    config = config.replace('use = "adamw"', 'use = "torch.optim:RMSprop"')
    (site / "run.toml").write_text(config, encoding="utf-8")
    output = train(site, 2, "training.max_epochs=2")
    assert "mine:Net" in output
    evaluations = metrics(site / "runs" / "digits", "evaluation")
    assert evaluations[1]["loss"] < evaluations[0]["loss"]


def test_a_failing_rank_tells_its_story_once_and_ends_the_job(site: Path) -> None:
    (site / "mine.py").write_text(OWN_MODULE, encoding="utf-8")
    config = (site / "run.toml").read_text(encoding="utf-8")
    config = re.sub(r"(in_channels|num_classes) = \d+.*\n", "", config)
    (site / "run.toml").write_text(
        config.replace('use = "convnet"', 'use = "mine:Broken"'), encoding="utf-8"
    )
    output = train(site, 3, code=70)
    assert output.count("ValueError: the second rank is unwell") == 1
    assert "rank 1@" in output
    report = json.loads((site / "runs/digits/crash-rank-1.json").read_text(encoding="utf-8"))
    assert report["code"] == 70
    assert json.loads((site / "runs/digits/exit.json").read_text(encoding="utf-8"))["code"] == 70


def test_damaged_data_end_the_job_with_the_shard_named(site: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(site / "data" / "digits", copy)
    shard = sorted((copy / "train").glob("*.h5"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    output = train(site, 2, f"data.train={copy}/train", code=65)
    assert shard.name in output
    assert output.count("hpctrain: error") == 1


def test_without_mpi_under_torchrun(site: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", "0", "--standalone"),
            *("-m", "hpctrain", "run.toml", "training.max_epochs=1"),
        ],
        cwd=site,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert metrics(site / "runs" / "digits", "evaluation")


def test_a_run_goes_on_from_where_it_is_told(site: Path) -> None:
    """From a named checkpoint, or from none: what was beyond it is put aside, not mixed in."""
    common = ["training.max_epochs=3", "logging.every_steps=1"]
    train(site, 0, *common)
    run = site / "runs" / "digits"
    whole = metrics(run)
    named = f"runs/digits/checkpoints/step-{EPOCH_STEPS:08d}"
    output = train(site, 0, *common, f"checkpoint.resume={named}")
    assert f"resumes from step {EPOCH_STEPS}" in output
    assert metrics(run) == whole
    assert sorted(path.name for path in (run / "checkpoints-old-1").iterdir()) == [
        f"step-{2 * EPOCH_STEPS:08d}",
        f"step-{3 * EPOCH_STEPS:08d}",
    ]
    output = train(site, 0, *common, "checkpoint.resume=never")
    assert "from scratch" in output
    assert metrics(run) == whole


def test_a_checkpoint_of_another_model_is_refused(site: Path) -> None:
    train(site, 0, "training.max_epochs=1")
    output = train(site, 0, "training.max_epochs=2", "model.widths=[16, 32]", code=74)
    assert "is of another model" in output
    assert "of another shape" in output
    assert (site / "runs/digits/checkpoints" / f"step-{EPOCH_STEPS:08d}").exists()


def test_a_broken_checkpoint_is_skipped_in_words(site: Path) -> None:
    train(site, 0, "training.max_epochs=2")
    newest = site / "runs/digits/checkpoints" / f"step-{2 * EPOCH_STEPS:08d}"
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    output = train(site, 0, "training.max_epochs=2")
    assert "skipped" in output
    assert newest.name in output
    assert f"resumes from step {EPOCH_STEPS}" in output
