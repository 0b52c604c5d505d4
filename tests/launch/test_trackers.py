"""Jobs that are tracked: a user's own tracker, images, histograms, and who is told of the end."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.jobs import here, hpctrain
from helpers.module_site import module_site
from helpers.waiting import wait_for

from hpctrain.config.schema import NotifySection
from hpctrain.observe.notify import Notifier

MODULES = '''
import json
import logging
from pathlib import Path

import torch
from torch import distributed as dist

from hpctrain import Classification


class Keep:
    """A tracker of a user's own."""

    def __init__(self, file, fails=False):
        if fails:
            raise OSError("no network")
        self.file = Path(file)

    def write(self, *what):
        with self.file.open("a") as file:
            file.write(json.dumps(what) + "\\n")

    def log_hyperparams(self, params):
        self.write("config", params["optimizer.lr"], params["data.global_batch_size"])

    def log_metrics(self, metrics, step):
        self.write("metrics", step, sorted(metrics))

    def log_image(self, key, images, step):
        self.write("image", key, step, list(images[0].shape), int(images[0].max()))

    def log_histogram(self, key, counts, edges, step):
        self.write("histogram", key, step, sum(counts))

    def finalize(self, status):
        self.write(status)


class Drawing(Classification):
    def set_log(self, log):
        self.log = log

    def loss(self, model, fields):
        self.log("rows", float(len(fields["y"])))
        self.log.image("inputs", fields["x"])
        self.log.histogram("values", fields["x"])
        return super().loss(model, fields)

    def evaluate(self, model, fields):
        self.log.image("inputs", fields["x"])
        return super().evaluate(model, fields)


class Exploding(Drawing):
    def loss(self, model, fields):
        loss, weight = super().loss(model, fields)
        return loss * float("inf"), weight


class Breaking(Drawing):
    def loss(self, model, fields):
        rank = dist.get_rank()
        if rank == 1 and torch.is_grad_enabled() and self.steps.pop() == 1:
            logging.getLogger("mine").warning("about to break")
            raise ZeroDivisionError("of rank 1 alone")
        return super().loss(model, fields)

    def set_progress(self, step, epoch, stage):
        self.steps = [step]

    steps = [0] * 1000


class Wrong(Drawing):
    def loss(self, model, fields):
        self.log.image("inputs", fields["x"][None, None])
        return super().loss(model, fields)
'''

CONFIG = """
[run]
name = "tracked"
[model]
use = "mlp"
in_features = 6
out_features = 3
hidden_features = [8]
[task]
use = "tracked_modules:Drawing"
inputs = ["x"]
target = "y"
[optimizer]
use = "adamw"
lr = 0.001
[data]
train = "rows"
validation = "rows"
global_batch_size = 8
shuffle = false
[training]
max_steps = 4
[checkpoint]
every_steps = 2
[logging]
every_steps = 2
progress = "none"
report = false
[notify]
command = ["sh", "-c", 'echo "$HPCTRAIN_STATE $HPCTRAIN_STEP $HPCTRAIN_REASON" >> told', "x"]
[[trackers]]
use = "tracked_modules:Keep"
file = "kept.jsonl"
[[trackers]]
use = "tracked_modules:Keep"
file = "never"
fails = true
"""


pytestmark = pytest.mark.ranks(1)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    options = {"name": "tracked_modules", "modules": MODULES, "config": CONFIG, "rows": 24}
    with module_site(tmp_path, monkeypatch, **options) as folder:  # type: ignore[arg-type]
        yield folder


def kept(site: Path) -> list[Any]:
    return [json.loads(line) for line in (site / "kept.jsonl").read_text().splitlines()]


def test_a_tracked_run_over_two_jobs(site: Path) -> None:
    told = here(site, "run.toml")
    assert "keep-2: OSError: no network" in told
    first = kept(site)
    # A job that goes on from step 2 does 3 and 4 again, and further.
    (site / "runs/tracked/exit.json").unlink()
    for step in (4,):
        (site / f"runs/tracked/checkpoints/step-{step:08d}/meta.json").unlink()
    here(site, "run.toml", "training.max_steps=8")
    lines = kept(site)
    assert lines[: len(first)] == first
    assert first[0] == ["config", 0.001, 8]
    assert first[-1] == ["success"]
    steps = [line[1] for line in lines if line[0] == "metrics" and "train/loss" in line[2]]
    assert steps == [2, 4, 6, 8]
    evaluated = [line[1] for line in lines if line[0] == "metrics" and "train/loss" not in line[2]]
    assert evaluated == sorted(set(evaluated))
    images = [line[1:3] for line in lines if line[0] == "image"]
    assert len(images) == len({tuple(each) for each in images})
    assert [step for key, step in images if key == "train/inputs"] == [2, 4, 6, 8]
    assert [step for key, step in images if key == "validation/inputs"] == evaluated
    histograms = [line[1:] for line in lines if line[0] == "histogram"]
    assert histograms == [["train/values", step, 48] for step in (2, 4, 6, 8)]
    told_lines = (site / "told").read_text().splitlines()
    assert told_lines == ["end 4 complete", "end 8 complete"]


def test_what_is_no_image_is_refused_before_the_first_step(site: Path) -> None:
    told = here(site, "run.toml", 'task.use="tracked_modules:Wrong"', code=70)
    assert "log_image('inputs'): (1, 1, " in told
    assert not (site / "kept.jsonl").exists() or ["metrics"] not in [
        line[:1] for line in kept(site)
    ]
    state, step, *reason = (site / "told").read_text().split()
    assert (state, step) == ("failure", "0")
    assert "log_image" in " ".join(reason)


def test_a_loss_that_is_not_finite(site: Path) -> None:
    """Told at once; what the command is, and what it says, is no matter of a shell."""
    command = '["python3", "-c", "import os; print(os.environ, file=open(\'told\', \'a\'))"]'
    here(
        site,
        "run.toml",
        'task.use="tracked_modules:Exploding"',
        "training.max_bad_steps=4",
        f"notify.command={command}",
        code=70,
    )
    wait_for(lambda: len((site / "told").read_text().splitlines()) == 2)
    for line, state in zip(
        (site / "told").read_text().splitlines(), ("nonfinite", "failure"), strict=True
    ):
        assert f"'HPCTRAIN_STATE': '{state}'" in line
        assert "'HPCTRAIN_RUN': 'tracked'" in line
        assert "'HPCTRAIN_STEP': '" in line


@pytest.mark.ranks(2)
def test_a_failure_of_another_rank_is_told(site: Path) -> None:
    python = f"PYTHONPATH={site}:" + os.environ.get("PYTHONPATH", "")
    env = dict([python.split("=", 1)])
    task = 'task.use="tracked_modules:Breaking"'
    ended = hpctrain(site, 2, "run.toml", task, code=70, env=env)
    assert "of rank 1 alone" in ended.stderr
    (line,) = (site / "told").read_text().splitlines()
    assert line == "failure 1 ZeroDivisionError: of rank 1 alone"
    (warned,) = (site / "runs/tracked/ranks.log").read_text().splitlines()
    assert re.search(r"  rank 1 on \S+: warning: mine: about to break$", warned)


def test_what_is_told_is_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = NotifySection(command=("sh", "-c", 'printf %s "$HPCTRAIN_REASON" > told', "$(id)"))
    Notifier(section, tmp_path).notify("failure", "$(touch owned); `touch owned`\x1b]0;x\n", step=1)
    assert (tmp_path / "told").read_text() == r"$(touch owned); `touch owned`\x1b]0;x\n"
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (["/no/such/program"], "No such file"),
        (["sh", "-c", "echo lost >&2; exit 3"], "it ended with 3: lost"),
        (
            ["sh", "-c", "sleep 1000 & sleep 1000"],
            "it took longer than 0.2 s (notify.timeout_seconds)",
        ),
    ],
)
def test_a_command_that_fails_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, command: list[str], problem: str
) -> None:
    section = NotifySection(command=tuple(command), timeout_seconds=0.2)
    notifier = Notifier(section, tmp_path)
    notifier.notify("end", "complete", step=1, code=0)
    assert problem in caplog.text
    caplog.clear()
    notifier.notify("end", "complete", step=1, code=0)
    assert not caplog.text


def test_a_command_that_says_without_end_is_kept_the_end_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = ("sh", "-c", "yes | head -c 50000000 >&2; echo lost >&2; exit 3")
    tracemalloc.start()
    try:
        Notifier(NotifySection(command=command, timeout_seconds=300), tmp_path).notify(
            "end", "complete", step=1
        )
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert "it ended with 3: lost" in caplog.text
