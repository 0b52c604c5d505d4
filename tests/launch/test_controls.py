"""Keys that shape a run: which samples, how many of them, and when it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.jobs import here, in_turn, train
from helpers.runs import losses, metrics, outcome

pytestmark = pytest.mark.ranks(1)

COMMON = ("run.toml", "logging.every_steps=1", "scheduler.use=constant", "logging.progress=none")
"""Of a job that may end and go on, and leave what another one leaves that did not."""


@pytest.mark.ranks(3)
def test_the_order_of_the_samples_at_any_world_size(site: Path) -> None:
    """Not shuffled, or drawn by weight: the same batches on 1 and 3 ranks, stopped or not."""
    labels = []
    for path in sorted((site / "data/digits/train").glob("*.h5")):
        with h5py.File(path) as file:
            labels.append(file["label"][()])
    np.save(site / "weights.npy", (np.concatenate(labels) < 5).astype(np.float32))
    orders = {
        "rows": ["data.shuffle=false"],
        "drawn": ["data.weights=weights.npy", "data.epoch_samples=1000", "training.strategy=fsdp"],
    }
    more = ["training.precision=64-true", "data.micro_batch_size=7"]

    def job(ranks: int, name: str, *overrides: str) -> list[str]:
        return [*COMMON, *more, *orders[name], f"run.name={name}-{ranks}", *overrides]

    def folder(ranks: int, name: str) -> Path:
        return site / "runs" / f"{name}-{ranks}"

    for name in orders:
        said = here(site, *job(0, name, "training.max_steps=25"))
        assert re.search("drawn by data.weights|in the dataset's order", said)
    first = [job(3, name, "training.max_steps=9") for name in orders]
    rest = [job(3, name, "training.max_steps=25") for name in orders]
    whole = [job(3, name, "training.max_steps=25", f"run.name={name}-whole") for name in orders]
    for ended in in_turn(site, 3, *first, *rest, *whole):
        assert ended.code == 0, ended.output
    for name in orders:
        assert losses(folder(3, name)) == losses(site / "runs" / f"{name}-whole")  # to the bit
    for name in orders:
        alone, together = losses(folder(0, name)), losses(folder(3, name))
        assert len(alone) == len(together) == 25
        assert together == pytest.approx(alone, rel=1e-9)
        epochs = [record["epoch"] for record in metrics(folder(0, name), "train")]
        assert epochs.index(1) == (16 if name == "drawn" else 23)
    # In the order of the rows the second epoch begins with the same batch, and it is known by now.
    assert losses(folder(0, "rows"))[23] != losses(folder(0, "rows"))[0]


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

    said = here(
        site, *COMMON, "run.name=few", "training.max_epochs=60", "training.overfit_batches=1"
    )
    assert "the samples come in the dataset's order" in said
    learned = losses(site / "runs" / "few")
    assert len(learned) == 60
    assert learned[-1] < learned[0] / 5


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


@pytest.mark.ranks(2)
def test_early_stopping_is_agreed_and_known_ever_after(site: Path) -> None:
    """Stopped anywhere and started again, a run ends where it ends without that."""
    common = [*COMMON, "early_stopping.monitor=loss", "early_stopping.patience=2"]
    common += ["training.evaluate_every_steps=3", "training.evaluate_every_epochs=0"]
    common += ["checkpoint.every_steps=4", "training.limit_validation_batches=1"]
    common += ["optimizer.lr=0.03", "early_stopping.min_delta=0.3"]
    whole = site / "runs" / "whole"
    said = here(site, *common, "run.name=whole")
    assert "early stopping: loss has not become better for 2 evaluations" in said
    ended = outcome(whole)
    step = ended["step"]
    assert (ended["code"], step % 3) == (0, 0)
    assert 9 <= step < 276
    assert "has not become better" in here(site, "status", "runs/whole")
    again = here(site, *common, "run.name=whole")  # nothing is left to do
    assert f"training.min_steps={2 * step}" in again
    assert outcome(whole)["reason"] == ended["reason"]

    # A limit makes an evaluation of its own: it has to be where one is due.
    stops = [f"training.max_steps={at}" for at in (step - 6, step - 3)]
    runs = [[*common, f"run.name={name}"] for name in ("ddp", "fsdp")]
    runs[1].append("training.strategy=fsdp")
    jobs = [[*run, stop] for run in runs for stop in stops] + runs
    longer = [*runs[0], f"training.min_steps={step + 5}", "early_stopping.patience=2"]
    undisturbed = [*common, "run.name=undisturbed"]
    for job in in_turn(site, 2, *jobs, longer, undisturbed):
        assert job.code == 0, job.output
    expected = metrics(site / "runs" / "undisturbed")
    stopped = [each for each in metrics(site / "runs" / "ddp") if each["step"] <= step]
    assert [each for each in stopped if each["kind"] == "train"] == [
        each for each in expected if each["kind"] == "train"
    ]
    for name in ("undisturbed", "fsdp"):
        assert outcome(site / "runs" / name)["step"] == step
    assert outcome(site / "runs" / "ddp")["step"] == step + 5


@pytest.mark.ranks(3)
def test_further_data_to_evaluate_with(site: Path) -> None:
    """Their metrics have names of their own, and are as good for all that goes by a metric."""
    further = [
        "data.evaluations.same=data/digits/validation",
        "data.evaluations.seen=data/digits/train",
        "training.max_epochs=2",
        "training.precision=64-true",
    ]
    by_them = [
        "checkpoint.keep_best=seen/accuracy",
        "checkpoint.keep_best_mode=max",
        "early_stopping.monitor=same/loss",
        "early_stopping.patience=9",
        "scheduler.use=plateau",
        "scheduler.metric=seen/loss",
        "training.strategy=fsdp",
    ]
    said = here(site, *COMMON, *further, "run.name=one")
    assert "seen: 1,438 samples to evaluate with as well" in said
    (job,) = in_turn(site, 3, [*COMMON, *further, *by_them, "run.name=three"])
    assert job.code == 0, job.output
    records = {name: metrics(site / "runs" / name, "evaluation") for name in ("one", "three")}
    for name, found in records.items():
        assert [each["split"] for each in found] == ["validation", "same", "seen"] * 2
        for each, same, seen in zip(found[::3], found[1::3], found[2::3], strict=True):
            assert (each["loss"], each["accuracy"]) == (same["loss"], same["accuracy"])
            assert seen["loss"] != each["loss"]
        listed = here(site, "ckpt", "ls", f"runs/{name}")
        assert f"seen/accuracy {found[-1]['accuracy']:.6g}" in listed
    for one, three in zip(records["one"], records["three"], strict=True):
        assert three["loss"] == pytest.approx(one["loss"], rel=1e-9)
    answered = here(
        site,
        "evaluate",
        *COMMON,
        *further,
        "run.name=one",
        "--split",
        "seen",
        "--checkpoint",
        "last",
    )
    assert f"{records['one'][-1]['accuracy']:.4}" in answered
    unknown = here(site, "evaluate", *COMMON, *further, "run.name=one", "--split", "sene", code=78)
    assert "did you mean seen?" in unknown


def events(path: Path) -> list[str]:
    """Return what a trace has recorded, by name."""
    return [each.get("name", "") for each in json.loads(path.read_bytes())["traceEvents"]]


@pytest.mark.ranks(3)
def test_profiles_of_chosen_ranks_and_steps(site: Path) -> None:
    chosen = ["profile.active_steps=2", "profile.wait_steps=1", "training.max_steps=6"]
    said = here(site, *COMMON, *chosen, "run.name=one", "profile.record_shapes=true")
    assert "profiled 2 steps up to step 5 on 1 rank" in said
    assert "Self CPU time total" in said
    (trace,) = (site / "runs/one/profile").iterdir()
    assert trace.name == "step-00000005-rank-00000.json"
    names = events(trace)
    assert {name for name in names if name.startswith("ProfilerStep")} == {
        "ProfilerStep#3",
        "ProfilerStep#4",
    }
    assert any("convolution" in name for name in names)

    # Over at the last step but one, or before the first that would count.
    some = [*chosen, "profile.ranks=[1,2]", "training.strategy=fsdp", "run.name=some"]
    cut = [*chosen, "training.max_steps=4", "run.name=cut"]
    short = [*chosen, "training.max_steps=2", "run.name=short"]
    none = [*chosen, "profile.ranks=[3]", "run.name=none"]
    jobs = in_turn(site, 3, *([*COMMON, *each] for each in (some, cut, short, none)))
    assert [job.code for job in jobs] == [0, 0, 0, 78], jobs[3].output
    for job, word in zip(
        jobs,
        (
            "profiled 2 steps up to step 5 on 2 ranks",
            "profiled 1 step up to step 4 on 1 rank",
            "no step was profiled: the first 3 steps of a job are not",
            "profile.ranks: no rank 3 among 3 ranks, counted from 0",
        ),
        strict=True,
    ):
        assert job.output.count(word) == 1, job.output
    traces = sorted((site / "runs/some/profile").iterdir())
    assert [each.name[-7:] for each in traces] == ["01.json", "02.json"]
    # What is recorded changes nothing.
    assert losses(site / "runs/some")[:4] == pytest.approx(losses(site / "runs/cut"), rel=1e-4)


def test_the_operation_that_made_the_first_nan_is_named(site: Path) -> None:
    (site / "sick.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, **_):\n"
        "        super().__init__()\n"
        "        self.last = torch.nn.Linear(64, 10)\n"
        "        self.steps = 0\n"
        "    def forward(self, image):\n"
        "        self.steps += self.training\n"
        "        scores = self.last(image.flatten(1).float())\n"
        "        zero = scores * 0 if self.steps > 3 else scores * scores + 1\n"
        "        return scores + zero.sqrt()\n"
    )
    model = ["model.use=sick:Net", "training.max_steps=8", "run.name=sick"]
    said = train(site, 0, *COMMON[1:], *model, "training.detect_anomaly=true", code=70)
    assert "MulBackward0" in said
    assert "zero = scores * 0 if" in said  # the line of the forward pass


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
