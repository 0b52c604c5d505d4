"""A trained model evaluated, tested and asked for predictions, by any number of ranks."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.jobs import here, in_turn
from helpers.runs import metrics
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hpctrain import load_model
from hpctrain.errors import CheckpointError

pytestmark = pytest.mark.ranks(3)

MODULE = """
import json

from torch import nn
from hpctrain import Regression

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)
        )

    def forward(self, x):
        return self.layers(x)

class Branches(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Linear(3, 9)

class Follower:  # writes down what it is asked, with what it knows by then

    def __init__(self, file):
        self.file, self.trained, self.calls = file, 0, []

    def on_train_batch_end(self, *arguments):
        self.trained += 1

    def state_dict(self):
        return {"trained": self.trained}

    def load_state_dict(self, state):
        self.trained = state["trained"]

    def setup(self, trainer, model, stage):
        self.calls.append(stage)

    def on_test_start(self, trainer, model):
        self.calls.append([trainer.global_step, self.trained])

    def on_test_epoch_end(self, trainer, model):
        self.calls.append({n: float(value) for n, value in trainer.callback_metrics.items()})

    def on_predict_start(self, trainer, model):
        self.calls.append(trainer.state.stage)

    on_predict_end = on_predict_start

    def teardown(self, trainer, model, stage):
        if trainer.is_global_zero and stage != "fit":
            with open(self.file, "a") as file:
                file.write(json.dumps(self.calls) + "\\n")

class OfBatches:
    def on_predict_batch_end(self, *arguments):
        pass

class Both(Regression):
    def predict(self, model, fields):
        output = model(fields["x"])
        return {"y": output, "hot": output[:, 0] > 0}
"""
CONFIG = """
[run]
name = "fit"
[model]
use = "nets:Net"
[task]
use = "regression"
inputs = ["x"]
target = "y"
[data]
train = "train"
validation = "validation"
test = "test"
global_batch_size = 8
[data.normalize]
y = "stats"
x = {mean = 0.5, std = 2.0}
[optimizer]
use = "adamw"
lr = 1e-2
[training]
max_epochs = 2
ema_decay = 0.9
[checkpoint]
keep_best = "loss"
keep_last = 5
"""


def write(folder: Path, rows: int, seed: int, *, target: bool = True) -> None:
    folder.mkdir()
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, 3)).astype(np.float32)
    y = (x.sum(1, keepdims=True) * 50 + 280).astype(np.float32)
    for name, part in (("a", slice(None, rows // 2)), ("b", slice(rows // 2, None))):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["x"] = x[part]
            if target:
                file["y"] = y[part]
                file["y"].attrs["units"] = "K"
            file["x"].attrs["units"] = "m"


FOLLOWED = """
[[callbacks]]
use = "nets:Follower"
file = "calls.jsonl"
"""

LAST = ["--checkpoint", "last"]


def predictions(folder: Path, name: str = "prediction") -> npt.NDArray[Any]:
    return np.concatenate([h5py.File(path)[name][:] for path in sorted(folder.glob("shard-*.h5"))])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("inference")
    (site / "nets.py").write_text(MODULE, encoding="utf-8")
    (site / "run.toml").write_text(CONFIG, encoding="utf-8")
    (site / "followed.toml").write_text(CONFIG + FOLLOWED, encoding="utf-8")
    unseen = FOLLOWED.replace('Follower"\nfile = "calls.jsonl', "OfBatches")
    (site / "unseen.toml").write_text(CONFIG + unseen, encoding="utf-8")
    for number, (name, rows) in enumerate((("train", 40), ("validation", 13), ("test", 17))):
        write(site / name, rows, number)
    here(site, "data", "stats", "train")
    return site


def test_three_ranks_evaluate_and_predict_as_one(site: Path) -> None:
    ended = in_turn(
        site,
        3,
        ["followed.toml"],
        ["evaluate", "run.toml", "--checkpoint", "last", "--json"],
        ["test", "run.toml", "--json"],
        ["predict", "run.toml", "--output", "three"],
        ["evaluate", "run.toml", 'training.strategy="fsdp"', "--json"],
        ["predict", "run.toml", 'data.train="nowhere.h5"', "--output", "four"],
        ["test", "followed.toml", "--checkpoint", "last", "--json"],
        ["predict", "followed.toml", "--output", "followed"],
        ["predict", "unseen.toml", "--output", "unseen"],
    )
    assert [each.code for each in ended] == [0, 0, 0, 0, 0, 78, 0, 0, 78]
    # Callbacks beside a task follow it, and know what they knew when the run was saved.
    lines = (site / "calls.jsonl").read_text(encoding="utf-8").splitlines()
    in_test, in_predict = map(json.loads, lines)
    assert in_test == ["test", [10, 10], pytest.approx(json.loads(ended[6].stdout)["metrics"])]
    assert in_predict == ["predict", "predict", "predict"]
    assert "OfBatches: on_predict_batch_end is not called" in ended[8].stderr
    evaluations = metrics(site / "runs" / "fit", "evaluation")
    last = json.loads(ended[1].stdout)
    # Averages, batch statistics and all: the numbers of the run's own evaluation.
    own = {name: evaluations[-1][name] for name in last["metrics"]}
    assert last["metrics"] == pytest.approx(own, rel=1e-6)
    assert (last["weights"], last["samples"]) == ("average", 13)
    best = min(evaluations, key=lambda each: each["loss"])
    assert json.loads(ended[4].stdout)["step"] == best["step"]

    tested = json.loads(ended[2].stdout)
    assert (tested["split"], tested["samples"]) == ("test", 17)
    here(site, "predict", "run.toml", "--output", "one")
    one, three = predictions(site / "one"), predictions(site / "three")
    assert one.shape == (17, 1)
    assert np.allclose(one, three, rtol=1e-6)
    # In the unit of the files, although the model was trained on normalized numbers.
    y = predictions_of(site / "test", "y")
    scale = np.concatenate([predictions_of(site / "train", "y")]).std()
    assert np.mean((one - y) ** 2) == pytest.approx(tested["metrics"]["mse"] * scale**2, rel=1e-5)


def predictions_of(folder: Path, name: str) -> npt.NDArray[Any]:
    return np.concatenate([h5py.File(path)[name][:] for path in sorted(folder.glob("*.h5"))])


def test_what_is_not_needed_may_be_missing(site: Path, tmp_path: Path) -> None:
    """The training data, where the checkpoint knows their statistics; the targets to predict."""
    here(site, "run.toml", 'run.name="alone"')
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(site / "runs" / "alone", elsewhere / "runs" / "alone")
    for name in ("nets.py", "run.toml"):
        shutil.copy(site / name, elsewhere)
    write(elsewhere / "new", 5, 4, target=False)
    (elsewhere / "train").mkdir()
    said = ['run.name="alone"', 'data.validation="new"', 'data.test="new"']
    here(elsewhere, "predict", "run.toml", *said, "--output", "p")
    there = here(
        site, "predict", "run.toml", *said[:1], f'data.test="{elsewhere}/new"', "--output", "p"
    )
    assert "5 samples of test, average weights of the best loss of runs/alone" in there
    assert np.array_equal(predictions(elsewhere / "p"), predictions(site / "p"))
    assert '"y"' in here(elsewhere, "test", "run.toml", *said[:2], 'data.test="new"', code=65)


def test_weights_of_a_file_and_outputs_of_an_own_task(site: Path) -> None:
    here(site, "run.toml", 'run.name="weights"', "training.ema_decay=0.5")
    here(site, "ckpt", "export", "runs/weights", "w.safetensors", "--average", "--best")
    own = ["predict", "run.toml", 'run.name="weights"', "training.ema_decay=0.5"]
    here(site, *own, 'task.use="nets:Both"', "--output", "own")
    here(site, *own, "--checkpoint", "w.safetensors", "--output", "file", "--split", "test")
    hot, y = (predictions(site / "own", name) for name in ("hot", "y"))
    assert np.array_equal(hot, y[:, 0] > 0)
    # What an own method returns is stored as it is; else a target has its files' unit.
    train = predictions_of(site / "train", "y")
    assert np.allclose(y * train.std() + train.mean(), predictions(site / "file"), rtol=1e-5)


def test_a_loaded_model_takes_and_gives_what_files_hold(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `predict` does it, of a run and of an export, far from data and config."""
    here(site, "run.toml", 'run.name="loaded"', 'training.precision="bf16-mixed"')
    export = here(site, "ckpt", "export", "runs/loaded", "l.safetensors", "--average", "--best")
    assert "average weights" in export
    own = ['run.name="loaded"', 'training.precision="bf16-mixed"']
    here(site, "predict", "run.toml", *own, "--output", "of-loaded")
    monkeypatch.syspath_prepend(str(site))
    x = predictions_of(site / "test", "x")
    for path in (site / "runs" / "loaded", site / "l.safetensors"):
        model = load_model(path)
        assert (model.inputs, model.notes) == (("x",), ())
        given = model(x).numpy()
        assert np.allclose(given, predictions(site / "of-loaded"), rtol=1e-6), "other predictions"
        assert (model.units, model.target) == ({"x": "m", "y": "K"}, "y")
        with pytest.raises(TypeError, match=r"takes 1 inputs \(x\)"):
            model(x, x)


class Planted:
    """What makes a file when it is read by pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def with_member(source: Path, target: Path, name: str, content: bytes) -> None:
    """Write an archive with a member of other content, or one more."""
    with zipfile.ZipFile(source) as there, zipfile.ZipFile(target, "w") as new:
        root = there.namelist()[0].partition("/")[0]
        for each in there.namelist():
            if each != f"{root}/{name}":
                new.writestr(each, there.read(each))
        new.writestr(f"{root}/{name}", content)


def test_a_program_runs_without_its_source(site: Path, tmp_path: Path) -> None:
    """Normalization and units are part of it, for any number of samples."""
    here(site, "run.toml", 'run.name="program"')
    said = here(site, "ckpt", "export", "runs/program", str(tmp_path / "p.pt2"), "--average")
    assert "any number of samples of (3,) torch.float32, average weights of step 10" in said
    here(site, "predict", "run.toml", 'run.name="program"', *LAST, "--output", "of-program")
    expected, x = predictions(site / "of-program"), predictions_of(site / "test", "x")
    model = load_model(tmp_path / "p.pt2")
    assert (model.inputs, model.units) == (("x",), {"x": "m", "y": "K"})
    assert np.allclose(model(x).numpy(), expected, rtol=1e-5)
    assert np.allclose(model(x[:1]).numpy(), expected[:1], rtol=1e-5)
    # As anybody reads it.
    program = torch.export.load(tmp_path / "p.pt2").module()
    assert np.allclose(program(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-5)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(site.joinpath("no.pt2"))
    planted = pickle.dumps(Planted(tmp_path / "ran"))
    for name in ("data/sample_inputs/model.pt", "data/constants/opaque_obj_0"):
        with_member(tmp_path / "p.pt2", tmp_path / "evil.pt2", name, planted)
        with pytest.raises(CheckpointError, match=r"cannot be read|could run any code"):
            load_model(tmp_path / "evil.pt2")
        assert not (tmp_path / "ran").exists()


def test_what_cannot_be_traced_is_refused_with_the_reason(site: Path) -> None:
    here(site, "run.toml", 'run.name="branches"', 'model.use="nets:Branches"')
    told = here(site, "ckpt", "export", "runs/branches", "b.pt2", code=74)
    assert "torch.export cannot trace this model" in told
    assert "must not depend on values" in told
    assert not (site / "b.pt2").exists()


def test_files_of_others_are_refused(site: Path) -> None:
    here(site, "run.toml", 'run.name="others"')
    checkpoint = next((site / "runs" / "others" / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match="ckpt export"):
        load_model(checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(site / "run.toml")
    here(site, "ckpt", "export", "runs/others", "others.safetensors")
    with safe_open(site / "others.safetensors", framework="pt") as file:
        recipe = file.metadata()
    tensors = load_file(site / "others.safetensors")
    for use, argument in (("os:system", "command"), ("torch:load", "f")):
        said = json.loads(recipe["hpctrain"])
        said["model"] = {"use": use, "arguments": {argument: "touch ran"}}
        save_file(tensors, site / "evil.safetensors", {"hpctrain": json.dumps(said)})
        with pytest.raises(CheckpointError, match=f"said to be {use}, which makes none"):
            load_model(site / "evil.safetensors")


def test_what_cannot_be_done_is_told(site: Path) -> None:
    told = here(site, "evaluate", "run.toml", 'run.name="never"', code=74)
    assert "runs/never has no checkpoint: train first" in told
    here(site, "run.toml", 'run.name="told"', "training.max_epochs=1")
    told = here(site, "evaluate", "run.toml", 'run.name="told"', 'model.use="nets:Wide"', code=74)
    assert "it was saved of another model" in told
    told = here(site, "predict", "run.toml", "--split", "holdout", "--output", "x", code=78)
    assert "--split holdout" in told
    told = here(site, "test", "run.toml", 'run.name="told"', 'data.test="validation/*.nc"', code=78)
    assert "data.test" in told


FORECAST = """
[run]
name = "forecast"
[model]
use = "nets:Grid"
[task]
use = "regression"
inputs = ["now"]
target = "later"
[data]
train = "sst/*.nc"
validation = "sst/*.nc"
test = "sst/*.nc"
global_batch_size = 8
[data.fields.now]
path = "sst"
fill = 0.0
[data.fields.later]
path = "sst"
lead = 2
[data.normalize]
now = {mean = 280.0, std = 10.0}
later = {mean = 280.0, std = 10.0}
[optimizer]
use = "adamw"
lr = 1e-3
[training]
max_epochs = 1
"""
GRID = """
import torch
from torch import nn

class Grid(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale
"""


def test_predictions_lie_on_the_coordinates_of_their_source(tmp_path: Path) -> None:
    """Packed netCDF-4 by xarray, in months with units of their own and a calendar of 365 days."""
    import xarray as xr

    (tmp_path / "sst").mkdir()
    generator = np.random.default_rng(0)
    for month in ("02", "03"):
        first = f"2000-{month}-01"
        times = xr.date_range(first, periods=28, freq="D", calendar="noleap", use_cftime=True)
        values = 280 + 10 * generator.normal(size=(28, 4, 6)).astype(np.float32)
        dataset = xr.Dataset(
            {"sst": (("time", "lat", "lon"), values, {"units": "K", "long_name": "of the sea"})},
            {
                "time": times,
                "lat": ("lat", np.linspace(-45, 45, 4), {"units": "degrees_north"}),
                "lon": ("lon", np.arange(6) * 60.0, {"units": "degrees_east"}),
                "area": (("lat", "lon"), np.ones((4, 6))),
            },
        )
        packed = {"dtype": "i2", "scale_factor": 0.01, "add_offset": 280.0, "_FillValue": -32768}
        encoding = {"sst": packed, "time": {"units": f"days since {first}"}}
        dataset.to_netcdf(tmp_path / "sst" / f"{month}.nc", engine="h5netcdf", encoding=encoding)
    (tmp_path / "nets.py").write_text(GRID, encoding="utf-8")
    (tmp_path / "run.toml").write_text(FORECAST, encoding="utf-8")
    ended = in_turn(
        tmp_path,
        3,
        ["run.toml"],
        ["predict", "run.toml", "--output", "sst.nc"],
        ["test", "run.toml", "--json"],
    )
    assert [each.code for each in ended] == [0, 0, 0], [each.output for each in ended]
    assert not (tmp_path / "sst.nc.parts").exists()
    paths = sorted((tmp_path / "sst").glob("*.nc"))
    truth = xr.concat([xr.open_dataset(path, engine="h5netcdf").load() for path in paths], "time")
    with xr.open_dataset(tmp_path / "sst.nc", engine="netcdf4") as predicted:
        assert predicted.sst.dims == ("time", "lat", "lon")
        assert predicted.sst.attrs == {"units": "K", "long_name": "of the sea"}
        # Every row of the input has a prediction, those too whose target is not there yet.
        assert list(predicted.time.values) == list(truth.time.values)
        assert predicted.time.dt.calendar == "noleap"
        for name in ("lat", "lon", "area"):
            xr.testing.assert_identical(predicted[name].drop_vars("lead_time"), truth[name])
        assert predicted.lead_time.dt.days == 2
        assert list(predicted.valid_time.values[:-2]) == list(truth.time.values[2:])
        # The error against what came to be: samples do not reach from one file into the next.
        known = [*range(26), *range(28, 54)]
        error = predicted.sst.values[known] - truth.sst.values[[row + 2 for row in known]]
    tested = json.loads(ended[2].stdout)
    assert tested["samples"] == len(known)
    assert np.mean(error**2) == pytest.approx(tested["metrics"]["mse"] * 10.0**2, rel=1e-5)


MODULES = """
import json
from pathlib import Path
import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

def samples(rows, seed):
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.sum(1) > 0).long())

class Data(L.LightningDataModule):
    def setup(self, stage):
        assert stage in ("fit", "validate", "test", "predict")
        self.stage = stage

    def train_dataloader(self):
        return DataLoader(samples(40, 0), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(samples(13, 1), batch_size=4)

    def test_dataloader(self):
        assert self.stage == "test"
        return DataLoader(samples(11, 2), batch_size=4)

    def predict_dataloader(self):
        return DataLoader(samples(11, 2), batch_size=4)

class Writes(BasePredictionWriter):
    # Knows what it has seen in training, and writes what each rank predicts.

    def __init__(self):
        super().__init__("batch_and_epoch")
        self.steps, self.seen, self.calls = 0, [], []

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]

    def on_train_batch_end(self, *_):
        self.steps += 1

    def on_test_end(self, trainer, module):
        if trainer.is_global_zero:
            Path("tested.json").write_text(json.dumps([self.steps, module.added]))

    def on_predict_start(self, trainer, module):
        self.calls.append("start")

    def write_on_batch_end(self, trainer, module, output, rows, batch, batch_idx, dataloader_idx):
        assert len(output["y"]) == len(rows) == len(batch[0])
        self.seen += rows

    def write_on_epoch_end(self, trainer, module, outputs, rows):
        assert sum(len(each["y"]) for each in outputs) == len(self.seen)
        assert [row for batch in rows[0] for row in batch] == self.seen
        self.calls.append("epoch")

    def teardown(self, trainer, module, stage):
        if stage == "predict":
            facts = [self.steps, module.predicted, self.seen, [*self.calls, stage]]
            folder = Path(f"facts-{trainer.world_size}")
            folder.mkdir(exist_ok=True)
            (folder / f"{trainer.global_rank}.json").write_text(json.dumps(facts))

class Lit(L.LightningModule):
    predicted, added = 0, None

    def on_save_checkpoint(self, checkpoint):
        checkpoint["added"] = 7

    def on_load_checkpoint(self, checkpoint):
        self.added = checkpoint["added"]

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.accuracy = MulticlassAccuracy(2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.layers(x), y)

    def evaluated(self, batch, stage):
        x, y = batch
        logits = self.layers(x)
        self.accuracy(logits, y)
        self.log(f"{stage}_loss", F.cross_entropy(logits, y))
        self.log(f"{stage}_accuracy", self.accuracy)

    def validation_step(self, batch, batch_idx):
        self.evaluated(batch, "val")

    def test_step(self, batch, batch_idx):
        self.evaluated(batch, "test")

    def predict_step(self, batch, batch_idx):
        x, y = batch
        self.predicted += len(x)
        return {"logits": self.layers(x), "y": y}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)
"""
OF_MODULES = """
[run]
name = "lit"
[model]
use = "nets:Lit"
[data]
use = "nets:Data"
[training]
max_epochs = 2
[checkpoint]
keep_best = "val_loss"
[[callbacks]]
use = "nets:Writes"
"""


def test_a_module_has_its_own_steps(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(MODULES, encoding="utf-8")
    (tmp_path / "run.toml").write_text(OF_MODULES, encoding="utf-8")
    ended = in_turn(
        tmp_path,
        2,
        ["run.toml"],
        ["evaluate", "run.toml", "--checkpoint", "last", "--json"],
        ["test", "run.toml", "--checkpoint", "last", "--json"],
        ["predict", "run.toml", "--checkpoint", "last", "--output", "two"],
    )
    assert [each.code for each in ended] == [0] * 4, [each.output for each in ended]
    own = metrics(tmp_path / "runs" / "lit", "evaluation")[-1]
    validated, tested = (json.loads(each.stdout) for each in ended[1:3])
    assert validated["samples"] == 13
    assert validated["metrics"] == pytest.approx({k: own[k] for k in ("val_loss", "val_accuracy")})
    assert tested["samples"] == 11
    here(tmp_path, "predict", "run.toml", "--checkpoint", "last", "--output", "one")
    logits, y = (predictions(tmp_path / "two", name) for name in ("logits", "y"))
    assert np.allclose(logits, predictions(tmp_path / "one", "logits"), rtol=1e-5)
    # Hooks of module and callbacks, which know what they knew when the run was saved.
    assert json.loads((tmp_path / "tested.json").read_text()) == [10, 7]
    for ranks in (1, 2):
        facts = [json.loads(path.read_text()) for path in (tmp_path / f"facts-{ranks}").iterdir()]
        assert len(facts) == ranks
        for steps, counted, seen, calls in facts:
            # What was tried out with one sample has left no trace.
            assert (steps, counted) == (10, len(seen))
            assert calls == ["start", "epoch", "predict"]
        assert sorted(row for fact in facts for row in fact[2]) == list(range(11))
    # Macro over classes, as torchmetrics has it by default.
    by_class = [np.mean(logits[y == label].argmax(1) == label) for label in (0, 1)]
    assert tested["metrics"]["test_accuracy"] == pytest.approx(np.mean(by_class))
