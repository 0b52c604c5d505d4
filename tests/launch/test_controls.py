"""Keys that shape a run: which samples, how many of them, and when it ends."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers.jobs import Ended, here, in_turn
from helpers.launching import ROOT
from helpers.runs import losses, metrics, outcome

pytestmark = pytest.mark.ranks(3)

COMMON = ("run.toml", "logging.every_steps=1", "scheduler.use=constant", "logging.progress=none")
"""Of a job that may end and go on, and leave what another one leaves that did not."""


ORDERS = {
    "rows": ["data.shuffle=false"],
    "drawn": ["data.weights=weights.npy", "data.epoch_samples=1000", "training.strategy=fsdp"],
}
STOPPING = [
    *("early_stopping.monitor=loss", "early_stopping.patience=2", "early_stopping.min_delta=0.3"),
    *("training.evaluate_every_steps=3", "training.evaluate_every_epochs=0"),
    *("checkpoint.every_steps=4", "training.limit_validation_batches=1", "optimizer.lr=0.03"),
]
FURTHER = [
    "data.evaluations.same=data/digits/validation",
    "data.evaluations.seen=data/digits/train",
    "training.max_epochs=2",
    "training.precision=64-true",
]
PROFILED = ["profile.active_steps=2", "profile.wait_steps=1", "training.max_steps=6"]


def job_of_order(ranks: int, name: str, *overrides: str) -> list[str]:
    exact = ["training.precision=64-true", "data.micro_batch_size=7"]
    return [*exact, *ORDERS[name], f"run.name={name}-{ranks}", *overrides]


def jobs_of_orders() -> list[list[str]]:
    """Two runs that are stopped after 9 of 25 steps, and the same without that."""
    return [
        job_of_order(3, name, f"training.max_steps={steps}", *more)
        for name in ORDERS
        for steps, more in ((9, []), (25, []), (25, [f"run.name={name}-whole"]))
    ]


def jobs_that_stop_early(step: int) -> list[list[str]]:
    """Runs that go on twice before they end at this step, one beyond it, and one undisturbed."""
    # A limit makes an evaluation of its own: it has to be where one is due.
    limits = [[f"training.max_steps={at}"] for at in (step - 6, step - 3)]
    ddp, fsdp = ["run.name=ddp"], ["run.name=fsdp", "training.strategy=fsdp"]
    jobs = [
        [*ddp, *limits[0]],
        *([*run, *limit] for run in (ddp, fsdp) for limit in (limits[1], [])),
    ]
    jobs += [[*ddp, f"training.min_steps={step + 5}"], ["run.name=undisturbed"]]
    return [[*STOPPING, *each] for each in jobs]


def jobs_with_further_data() -> list[list[str]]:
    by_them = ["checkpoint.keep_best=seen/accuracy", "checkpoint.keep_best_mode=max"]
    by_them += ["early_stopping.monitor=same/loss", "early_stopping.patience=9"]
    by_them += ["scheduler.use=plateau", "scheduler.metric=seen/loss"]
    return [[*FURTHER, *by_them, "training.strategy=fsdp", "run.name=further"]]


ASKING = """
class Asks:
    def __init__(self, at, on):
        self.at, self.on = at, on
    def on_train_epoch_end(self, trainer, module):
        if self.at == "epoch" and trainer.current_epoch == 1 and trainer.global_rank == self.on:
            trainer.should_stop = True
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.at == "step" and trainer.global_step >= 5 and trainer.global_rank == self.on:
            trainer.should_stop = True
"""


def jobs_that_are_asked_to_end(site: Path) -> list[list[str]]:
    """One is asked at the end of its second epoch, one at step 5, each by another rank."""
    (site / "asking.py").write_text(ASKING)
    text = (site / "run.toml").read_text(encoding="utf-8")
    for at, on in (("epoch", 2), ("step", 0)):
        callback = f'[[callbacks]]\nuse = "asking:Asks"\nat = "{at}"\non = {on}\n'
        (site / f"{at}.toml").write_text(f"{text}\n{callback}", encoding="utf-8")
    few = ["training.limit_train_batches=4", "run.name=asked-epoch"]
    # No epoch ends before the limit, so that the agreement to stop has to tell it.
    far = ["data.global_batch_size=4", "data.micro_batch_size=4", "training.max_steps=350"]
    far += ["run.name=asked-step"]
    return [["epoch.toml", *few], ["epoch.toml", *few], ["step.toml", *far]]


def profiled_jobs() -> list[list[str]]:
    """Some ranks; a job that ends before the last step, and before the first; a rank too many."""
    return [
        [*PROFILED, "profile.ranks=[1,2]", "training.strategy=fsdp", "run.name=some"],
        [*PROFILED, "training.max_steps=4", "run.name=cut"],
        [*PROFILED, "training.max_steps=2", "run.name=short"],
        [*PROFILED, "profile.ranks=[3]", "run.name=none"],
    ]


@dataclass(frozen=True, slots=True)
class Three:
    """What three ranks have done, started once for all tests.

    Attributes:
        site: where they were.
        step: at which one process ends by early stopping.
        alone: what it has said.
        ended: the jobs of three ranks, by what they are for.
    """

    site: Path
    step: int
    alone: str
    ended: dict[str, list[Ended]]

    def run(self, name: str) -> Path:
        return self.site / "runs" / name


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Three:
    site = tmp_path_factory.mktemp("controls")
    (site / "data").mkdir()
    (site / "data" / "digits").symlink_to(digits)
    shutil.copy(ROOT / "configs" / "run.toml", site / "run.toml")
    labels = []
    for path in sorted((digits / "train").glob("*.h5")):
        with h5py.File(path) as file:
            labels.append(file["label"][()])
    np.save(site / "weights.npy", (np.concatenate(labels) < 5).astype(np.float32))
    alone = here(site, *COMMON, *STOPPING, "run.name=whole")
    step = int(outcome(site / "runs/whole")["step"])
    jobs = {
        "orders": jobs_of_orders(),
        "early": jobs_that_stop_early(step),
        "further": jobs_with_further_data(),
        "profiled": profiled_jobs(),
    }
    flat = [[*COMMON, *each] for group in jobs.values() for each in group]
    jobs["asked"] = jobs_that_are_asked_to_end(site)
    flat += [[config, *COMMON[1:], *each] for config, *each in jobs["asked"]]
    all_ended = iter(in_turn(site, 3, *flat))
    ended = {name: [next(all_ended) for _ in group] for name, group in jobs.items()}
    return Three(site, step, alone, ended)


def test_the_order_of_the_samples_at_any_world_size(three: Three) -> None:
    """Not shuffled, or drawn by weight: the same batches on 1 and 3 ranks, stopped or not."""
    for job in three.ended["orders"]:
        assert job.code == 0, job.output
    for name in ORDERS:
        said = here(three.site, *COMMON, *job_of_order(0, name, "training.max_steps=25"))
        assert re.search("drawn by data.weights|in the dataset's order", said)
        together = losses(three.run(f"{name}-3"))
        assert together == losses(three.run(f"{name}-whole"))  # to the bit
        alone = losses(three.run(f"{name}-0"))
        assert len(alone) == len(together) == 25
        assert together == pytest.approx(alone, rel=1e-9)
        epochs = [record["epoch"] for record in metrics(three.run(f"{name}-0"), "train")]
        assert epochs.index(1) == (16 if name == "drawn" else 23)


def test_early_stopping_is_agreed_and_known_ever_after(three: Three) -> None:
    """Stopped anywhere and started again, a run ends where it ends without that."""
    site, step = three.site, three.step
    assert "early stopping: loss has not become better for 2 evaluations" in three.alone
    assert step % 3 == 0
    assert 9 <= step < 276
    ended = outcome(three.run("whole"))
    assert ended["code"] == 0
    assert "has not become better" in here(site, "status", "runs/whole")
    again = here(site, *COMMON, *STOPPING, "run.name=whole")  # nothing is left to do
    assert f"training.min_steps={2 * step}" in again
    assert outcome(three.run("whole"))["reason"] == ended["reason"]

    for job in three.ended["early"]:
        assert job.code == 0, job.output
    expected = metrics(three.run("undisturbed"), "train")
    assert [each["step"] for each in expected] == list(range(1, step + 1))
    went_on = metrics(three.run("ddp"), "train")
    assert went_on[:step] == expected  # to the bit
    assert len(went_on) == step + 5  # as training.min_steps says
    assert [each["step"] for each in metrics(three.run("fsdp"), "train")] == [*range(1, step + 1)]


def test_a_run_ends_where_code_of_the_users_asks_for_it_on_one_rank(three: Three) -> None:
    at_epoch, again, at_step = three.ended["asked"]
    for job in (at_epoch, again, at_step):
        assert job.code == 0, job.output
    assert "complete (trainer.should_stop was set): step 8 of 48" in at_epoch.output
    ended = outcome(three.run("asked-epoch"))
    assert (ended["step"], ended["reason"]) == (8, "trainer.should_stop was set")
    assert "is complete (trainer.should_stop was set): 8 steps" in again.output
    assert 5 <= outcome(three.run("asked-step"))["step"] < 350
    assert "complete (trainer.should_stop was set)" in at_step.output


def test_further_data_to_evaluate_with(three: Three) -> None:
    """Their metrics have names of their own, and are as good for all that goes by a metric."""
    site = three.site
    said = here(site, *COMMON, *FURTHER, "run.name=one")
    assert "seen: 1,438 samples to evaluate with as well" in said
    (job,) = three.ended["further"]
    assert job.code == 0, job.output
    records = {name: metrics(three.run(name), "evaluation") for name in ("one", "further")}
    for name, found in records.items():
        assert [each["split"] for each in found] == ["validation", "same", "seen"] * 2
        for each, same, seen in zip(found[::3], found[1::3], found[2::3], strict=True):
            assert (each["loss"], each["accuracy"]) == (same["loss"], same["accuracy"])
            assert seen["loss"] != each["loss"]
        listed = here(site, "ckpt", "ls", f"runs/{name}")
        assert f"seen/accuracy {found[-1]['accuracy']:.6g}" in listed
    for one, other in zip(*records.values(), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-9)
    asked = ["evaluate", *COMMON, *FURTHER, "run.name=one", "--checkpoint", "last", "--split"]
    assert f"{records['one'][-1]['accuracy']:.4}" in here(site, *asked, "seen")
    assert "did you mean seen?" in here(site, *asked, "sene", code=78)


def events(path: Path) -> list[str]:
    """Return what a trace has recorded, by name."""
    return [each.get("name", "") for each in json.loads(path.read_bytes())["traceEvents"]]


def test_profiles_of_chosen_ranks_and_steps(three: Three) -> None:
    said = here(three.site, *COMMON, *PROFILED, "run.name=alone", "profile.record_shapes=true")
    assert "profiled 2 steps up to step 5 on 1 rank" in said
    assert "Self CPU time total" in said
    (trace,) = (three.run("alone") / "profile").iterdir()
    assert trace.name == "step-00000005-rank-00000.json"
    names = events(trace)
    steps = {name for name in names if name.startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}
    assert any("convolution" in name for name in names)

    jobs = three.ended["profiled"]
    assert [job.code for job in jobs] == [0, 0, 0, 78], jobs[3].output
    words = (
        "profiled 2 steps up to step 5 on 2 ranks",
        "profiled 1 step up to step 4 on 1 rank",
        "no step was profiled: the first 3 steps of a job are not",
        "profile.ranks: no rank 3 among 3 ranks, counted from 0",
    )
    for job, word in zip(jobs, words, strict=True):
        assert job.output.count(word) == 1, job.output
    traces = sorted((three.run("some") / "profile").iterdir())
    assert [each.name[-7:] for each in traces] == ["01.json", "02.json"]
    # What is recorded changes nothing.
    assert losses(three.run("cut"))[:2] == losses(three.run("short"))


def test_parts_of_the_data(site: Path) -> None:
    run = site / "runs" / "digits"
    said = here(
        site,
        *COMMON,
        "training.max_epochs=3",
        "training.limit_train_batches=2",
        "training.limit_validation_batches=0.5",
    )
    assert "an epoch ends after 128 of 1,438 samples" in said
    assert "an evaluation is of the first 192 of 359 samples (3 batches)" in said
    steps = [(each["step"], each["epoch"]) for each in metrics(run, "train")]
    assert steps == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert [each["epoch"] for each in metrics(run, "evaluation")] == [0, 1, 2]

    often = ["training.max_epochs=40", "training.evaluate_every_epochs=20"]
    often += ["checkpoint.every_epochs=20", "data.micro_batch_size=64"]
    said = here(site, *COMMON, *often, "run.name=few", "training.overfit_batches=1")
    assert "the samples come in the dataset's order" in said
    learned = losses(site / "runs" / "few")
    assert len(learned) == 40
    assert learned[-1] < learned[0] / 3


@pytest.mark.parametrize("steps", ["true", "3"])
def test_a_trial_of_a_few_steps(site: Path, steps: str) -> None:
    """It has a folder of its own, however often it is made, and leaves the run alone."""
    for _ in range(2):
        said = here(site, *COMMON, f"training.fast_dev_run={steps}")
        assert "logging.progress=none training.fast_dev_run=false\n" in said
        trial = site / "runs" / "digits-fast-dev-run"
        count = 1 if steps == "true" else int(steps)
        assert [each["step"] for each in metrics(trial, "train")] == list(range(1, count + 1))
        assert len(metrics(trial, "evaluation")) == 1
        assert outcome(trial)["code"] == 0
        assert not [*(trial / "checkpoints").glob("*")]
    assert not (site / "runs" / "digits").exists()


def test_anomalies_are_looked_for_while_a_job_trains(site: Path) -> None:
    (site / "looking.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self, **_):\n"
        "        super().__init__(64, 10)\n"
        "    def forward(self, image):\n"
        "        if self.training and not torch.is_anomaly_enabled():\n"
        "            raise RuntimeError('nobody looks')\n"
        "        return super().forward(image.flatten(1).float())\n"
    )
    model = ["model.use=looking:Net", "training.max_steps=2", "training.detect_anomaly=true"]
    assert "makes steps slow" in here(site, *COMMON, *model)
    assert not torch.is_anomaly_enabled()


def test_a_torch_dataset_is_drawn_by_weight_as_files_are(site: Path) -> None:
    (site / "digits.py").write_text(
        "import glob\n"
        "import h5py, numpy as np\n"
        "class Digits:\n"
        "    def __init__(self):\n"
        "        files = [h5py.File(p) for p in sorted(glob.glob('data/digits/train/*.h5'))]\n"
        "        self.images = np.concatenate([file['image'][()] for file in files])\n"
        "        self.labels = np.concatenate([file['label'][()] for file in files])\n"
        "    def __len__(self):\n"
        "        return len(self.labels)\n"
        "    def __getitem__(self, row):\n"
        "        return {'image': self.images[row], 'label': self.labels[row]}\n"
    )
    np.save(site / "weights.npy", np.arange(1438) % 7)
    common = [*COMMON, "data.weights=weights.npy", "training.max_steps=6"]
    common += ["training.evaluate_every_epochs=0", "checkpoint.keep_best_count=1"]
    here(site, *common, "run.name=files")
    text = (site / "run.toml").read_text(encoding="utf-8")
    lines = [
        each for each in text.splitlines() if not each.startswith(("validation =", "keep_best"))
    ]
    (site / "run.toml").write_text("\n".join(lines), encoding="utf-8")
    here(site, *common, "run.name=objects", "data.train=digits:Digits", "data.workers=0")
    assert losses(site / "runs/objects") == losses(site / "runs/files")
    wrong = ["data.train=digits:Digits", "data.weights=label"]
    assert "a .npy file of one number a sample" in here(site, *common, *wrong, code=78)
    np.save(site / "weights.npy", np.ones(7))
    short = here(site, *common, "run.name=short", "data.train=digits:Digits", code=65)
    assert "weights.npy has 7 numbers, but digits:Digits has 1438 samples" in short
