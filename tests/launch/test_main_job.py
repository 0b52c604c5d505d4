"""The main job as a user runs it: real mpirun, real data, real checkpoints."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.jobs import Job, here, in_turn, train
from helpers.limits import JOB_SECONDS
from helpers.runs import losses, metrics, outcome
from helpers.waiting import wait_for

from hpctrain.watch.run_files import goodput_of

pytestmark = pytest.mark.ranks(3)

EPOCH_STEPS = 23  # 1,438 digits in batches of 64


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
    page = (run / "report.html").read_text(encoding="utf-8")
    assert '"state":"complete"' in page
    assert '"key":"accuracy"' in page
    assert (run / "latest").read_text(encoding="utf-8").strip() == "step-00000276"
    assert outcome(run)["code"] == 0
    assert len(list((run / "checkpoints").iterdir())) in (3, 4)  # the last three and the best

    assert "\r" not in output
    assert "\x1b" not in output
    for word in ("digits", "2 ranks", "MPICH", "gloo", "1,438", "64", "parameters", "accuracy"):
        assert word in output
    assert "Warning" not in output
    assert output.count("1,438 samples in") == 1  # one rank reports

    again = here(site, "run.toml")
    assert "complete" in again
    assert "max_epochs" in again
    assert metrics(run, "train") == trained

    status = here(site, "status", "runs/digits")
    assert "complete" in status
    assert "276" in status


@pytest.mark.ranks(9)
def test_the_same_losses_at_any_world_size(site: Path) -> None:
    """3 divides neither batch nor lanes, 9 are more than the 8 shards; one has no launcher."""

    def jobs(ranks: int, *precisions: str) -> list[list[str]]:
        options = ["training.max_epochs=1", "data.micro_batch_size=7", "logging.every_steps=1"]
        names = [(precision, f"run.name={precision}-{ranks}") for precision in precisions]
        return [["run.toml", name, f"training.precision={each}", *options] for each, name in names]

    both = ("32-true", "64-true")
    for job in jobs(0, *both):
        here(site, *job)
    for ranks, precisions in ((3, both), (9, both[1:])):
        for ended in in_turn(site, ranks, *jobs(ranks, *precisions)):
            assert ended.code == 0, ended.output

    def curve(precision: str, ranks: int) -> list[float]:
        return losses(site / "runs" / f"{precision}-{ranks}")

    assert len(curve("64-true", 0)) == len(curve("32-true", 0)) == EPOCH_STEPS
    for ranks in (3, 9):
        expected = pytest.approx(curve("64-true", 0), rel=1e-9, abs=1e-9)
        assert curve("64-true", ranks) == expected
    assert curve("32-true", 3)[0] == pytest.approx(curve("32-true", 0)[0], rel=1e-5)
    for precision, worlds in (("32-true", (0, 3)), ("64-true", (0, 3, 9))):
        runs = [site / "runs" / f"{precision}-{ranks}" for ranks in worlds]
        accuracies = [metrics(run, "evaluation")[-1]["accuracy"] for run in runs]
        assert max(accuracies) - min(accuracies) <= 0.005


def reached(run: Path, step: int) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and bool(re.search(rf'"step": {step}\b', path.read_text("utf-8")))


@pytest.mark.parametrize("ranks", [1, 3])
def test_ctrl_c_and_back_is_bit_for_bit(site: Path, start: Callable[..., Job], ranks: int) -> None:
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
    ended = outcome(stopped)
    assert ended["code"] == 75

    common += [f"training.max_epochs={ended['step'] // EPOCH_STEPS + 1}"]
    whole, again = in_turn(
        site, ranks, *(["run.toml", f"run.name={name}", *common] for name in ("whole", "stopped"))
    )
    assert (whole.code, again.code) == (0, 0), whole.output + again.output
    assert f"step {ended['step']}" in again.output
    assert metrics(stopped) == metrics(site / "runs" / "whole")


def test_killed_and_resumed_at_another_world_size(site: Path, start: Callable[..., Job]) -> None:
    """A killed rank ends the job; the next start goes on, with other ranks, on the same batches."""
    common = ["training.max_epochs=3", "logging.every_steps=1", "training.precision=64-true"]
    here(site, "run.toml", "run.name=whole", *common)
    job = start(3, "run.name=killed", *common, "checkpoint.every_steps=5")
    killed = site / "runs" / "killed"
    wait_for(lambda: reached(killed, 30))
    job.signal_rank(2, signal.SIGKILL)
    code, _ = job.wait()
    assert code != 0

    train(site, 2, "run.name=killed", *common, "checkpoint.every_steps=5")
    whole = site / "runs" / "whole"
    assert [record["step"] for record in metrics(killed)] == [
        record["step"] for record in metrics(whole)
    ]
    # Of a run that was killed and went on nearly every second is known.
    spent = goodput_of(killed)
    assert spent is not None
    assert spent.jobs == 2
    assert spent.unattributed < 0.01 * spent.total, spent
    assert min(spent.trained, spent.started) > 0
    # Beyond that rounding grows, as it does between any two orders of summation.
    compared = slice(2 * EPOCH_STEPS)
    assert losses(killed)[compared] == pytest.approx(losses(whole)[compared], rel=1e-9, abs=1e-9)


def test_two_jobs_never_share_a_folder(site: Path, start: Callable[..., Job]) -> None:
    first = start(0, "training.max_epochs=1000")
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


MISTAKES = {
    "model.chanels=3 optimizer.learning_rate=3": (78, ["model.chanels", "optimizer.learning_rate"]),
    "task.target=lable": (65, ['Did you mean "label"?']),
    "data.lanes=1": (78, ["data.lanes"]),
    "data.global_batch_size=2000": (65, ["1438"]),
    "checkpoint.keep_best=acuracy": (78, ["did you mean accuracy?"]),
    "data.train=damaged": (65, ["shard-000002.h5"]),
}
"""What only an import or the data show, the exit code, and what is said."""


def test_a_mistake_that_shows_later_is_told_once_too(site: Path, digits: Path) -> None:
    shutil.copytree(digits / "train", site / "damaged")
    shard = site / "damaged" / "shard-000002.h5"
    shard.write_bytes(shard.read_bytes()[:-100])
    lines = [["run.toml", "data.micro_batch_size=1", *mistakes.split()] for mistakes in MISTAKES]
    for ended, (code, words) in zip(in_turn(site, 2, *lines), MISTAKES.values(), strict=True):
        assert ended.code == code, ended.output
        for word in words:
            assert word in ended.output
        assert ended.output.count("hpctrain: error") == 1, ended.output
        assert "Traceback" not in ended.output


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
    output = here(site, "run.toml", "training.max_epochs=2")
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
    output = train(site, 2, code=70)
    assert output.count("ValueError: the second rank is unwell") == 1
    assert "rank 1@" in output
    report = json.loads((site / "runs/digits/crash-rank-1.json").read_text(encoding="utf-8"))
    assert report["code"] == 70
    assert outcome(site / "runs" / "digits")["code"] == 70


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
    here(site, "run.toml", *common)
    run = site / "runs" / "digits"
    whole = metrics(run)
    named = f"runs/digits/checkpoints/step-{EPOCH_STEPS:08d}"
    output = here(site, "run.toml", *common, f"checkpoint.resume={named}")
    assert f"resumes from step {EPOCH_STEPS}" in output
    assert metrics(run) == whole
    assert sorted(path.name for path in (run / "checkpoints-old-1").iterdir()) == [
        f"step-{2 * EPOCH_STEPS:08d}",
        f"step-{3 * EPOCH_STEPS:08d}",
    ]
    output = here(site, "run.toml", *common, "checkpoint.resume=never")
    assert "from scratch" in output
    assert metrics(run) == whole


def test_a_checkpoint_of_another_model_is_refused(site: Path) -> None:
    here(site, "run.toml", "training.max_epochs=1")
    output = here(site, "run.toml", "training.max_epochs=2", "model.widths=[16, 32]", code=74)
    assert "is of another model" in output
    assert "of another shape" in output
    assert (site / "runs/digits/checkpoints" / f"step-{EPOCH_STEPS:08d}").exists()


def test_a_broken_checkpoint_is_skipped_in_words(site: Path) -> None:
    here(site, "run.toml", "training.max_epochs=2")
    newest = site / "runs/digits/checkpoints" / f"step-{2 * EPOCH_STEPS:08d}"
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    output = here(site, "run.toml", "training.max_epochs=2")
    assert "skipped" in output
    assert newest.name in output
    assert f"resumes from step {EPOCH_STEPS}" in output
