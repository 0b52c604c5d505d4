"""Metrics that are no quotient of sums: what a task may return, and what a dry run finds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from helpers.worlds import world_of_one
from torch import Tensor, nn

from hpctrain.data.loading.batch import Batch, Rows
from hpctrain.errors import TrainingError
from hpctrain.launch.process_group import World
from hpctrain.training.dry_run.evaluation import rehearse
from hpctrain.training.evaluation import Turn, evaluate
from hpctrain.training.metric_objects import MetricObjects
from hpctrain.training.metrics import Gather
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.modules.log import Logs
from hpctrain.training.task.regression import Regression
from hpctrain.training.task.runner import TaskRunner
from hpctrain.training.task.task import Classification

CLASSES, FEATURES, COUNT = 4, 6, 50
CPU = torch.device("cpu")


@pytest.fixture
def world() -> World:
    return world_of_one("test")


@pytest.fixture
def fields() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(COUNT, FEATURES), "y": torch.randint(CLASSES, (COUNT,))}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(FEATURES, CLASSES)


class Returning:
    """A task whose evaluation returns what a function makes of outputs and labels."""

    inputs = ("x",)
    counts_samples = True
    metrics: ClassVar[Mapping[str, Any]] = {"m": "max"}

    def __init__(self, returned: Callable[[Tensor, Tensor], Any]) -> None:
        self.returned = returned

    def evaluate(self, model: nn.Module, fields: Mapping[str, Tensor]) -> Any:
        returned = self.returned(model(fields["x"]), fields["y"])
        return returned if isinstance(returned, dict) else {"m": returned}


class Finishing(Returning):
    def finish(self, sums: Mapping[str, Tensor]) -> Any:
        return {"m": sums["m"].double().mean()} if "m" in sums else {}


def measured(
    task: Any, model: nn.Module, fields: dict[str, Tensor], world: World, batch: int = 8
) -> dict[str, float]:
    batches = [
        Batch(
            fields={name: item[start : start + batch] for name, item in fields.items()},
            size=len(fields["y"][start : start + batch]),
            global_size=COUNT,
            epoch=0,
            start=0,
        )
        for start in range(0, COUNT, batch)
    ]
    metrics = evaluate(
        TaskRunner(model, task, NumberFormat.of("32-true", CPU)), [Turn(batches=batches)], world
    )
    assert metrics is not None
    return metrics


def rehearsed(
    task: Any, model: nn.Module, fields: Mapping[str, Tensor], world: World, precision: Any
) -> None:
    number_format = NumberFormat.of(precision, CPU)
    if precision in ("bf16-true", "64-true"):
        model = model.to(torch.float64 if precision == "64-true" else torch.bfloat16)
    rows = {name: item[:16] for name, item in fields.items()}
    rehearse(TaskRunner(model, task, number_format), Rows(rows), world)


def test_sums_and_rows_make_the_metrics_that_others_compute(
    world: World, model: nn.Module, fields: dict[str, Tensor]
) -> None:
    from sklearn import metrics as reference

    class Task(Returning):
        metrics: ClassVar = dict.fromkeys(("f1", "mcc", "auroc", "ap", "n"), "max")

        def finish(self, sums: Mapping[str, Tensor]) -> dict[str, Any]:
            assert sums["confusion"].dtype == torch.int64
            said, true = (sums["scores"].argmax(1), sums["y"])
            assert torch.equal(true, fields["y"])  # in the order of the data
            confusion = sums["confusion"].double()
            f1 = 2 * confusion.diag() / (confusion.sum(0) + confusion.sum(1))
            first = (true == 0, sums["scores"][:, 0])
            return {
                "f1": f1.mean(),
                "mcc": reference.matthews_corrcoef(true, said),
                "auroc": reference.roc_auc_score(*first),
                "ap": np.float64(reference.average_precision_score(*first)),
            }

    def returned(output: Tensor, label: Tensor) -> dict[str, Any]:
        pairs = label * CLASSES + output.argmax(1)
        confusion = torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES)
        return {
            "confusion": confusion.to(torch.int32),
            "scores": Gather(output),
            "y": Gather(label),
            "n": (len(label), 1.0),
        }

    found = measured(Task(returned), model, fields, world)
    output = model(fields["x"]).detach()
    expected = reference.f1_score(fields["y"], output.argmax(1), average="macro")
    assert found["f1"] == pytest.approx(expected, rel=1e-12)
    assert found["auroc"] == reference.roc_auc_score(fields["y"] == 0, output[:, 0])
    assert list(found) == list(Task.metrics)


@pytest.mark.parametrize(
    ("make", "returned", "words"),
    [
        (Returning, lambda o, y: o.sum(), r'for "m" a tensor \(\).* need a method finish\(sums\)'),
        (Returning, lambda o, y: Gather(o), r'gathers "m": a method finish\(sums\)'),
        (Returning, lambda o, y: (o.sum(0), 2), r"a tuple of a tensor \(4,\) .* and int"),
        (Returning, lambda o, y: (o.sum(), 2, 3), r"expected \(sum, weight\)"),
        (Returning, lambda o, y: 3.0, r'returned for "m" float: expected \(sum, weight\)'),
        (Returning, lambda o, y: {"m": (1, 2), "k": (1, 2)}, "gave k, which .* not declare"),
        (Returning, lambda o, y: {}, r"gave no m, which Returning.metrics declares"),
        (Finishing, lambda o, y: {"m": o.sum(), "k": (1, 2)}, "gave k"),
        (Finishing, lambda o, y: o, r"\(2, 4\), and \(8, 4\) for an earlier batch: .*Gather"),
        (Finishing, lambda o, y: Gather(o.sum()), r"a tensor \(\) .*expected .*\(samples"),
    ],
)
def test_what_is_no_metric_is_explained(
    make: Any, returned: Any, words: str, world: World, model: nn.Module, fields: dict[str, Tensor]
) -> None:
    with pytest.raises(TrainingError, match=words):
        measured(make(returned), model, fields, world)


def test_what_finish_returns_is_checked(
    world: World, model: nn.Module, fields: dict[str, Tensor]
) -> None:
    class Task(Returning):
        def finish(self, sums: Mapping[str, Tensor]) -> Any:
            return self.finished

    task = Task(lambda o, y: {"k": o.sum()})
    for finished, words in (
        (1.0, "finish returned float: expected a dict"),
        ({"m": torch.ones(4)}, r'"m" came out as a tensor \(4,\)'),
        ({"m": None}, '"m" came out as NoneType'),
        ({}, "gave no m"),
    ):
        task.finished = finished
        with pytest.raises(TrainingError, match=words):
            measured(task, model, fields, world)
    task.finished = {"m": torch.tensor([0.5])}
    assert measured(task, model, fields, world) == {"m": 0.5}


OF_BATCHES: dict[str, Any] = {
    "rmse": lambda o, y: ((o[:, 0] - y).square().mean().sqrt() * len(y), len(y)),
    "perplexity": lambda o, y: (F.cross_entropy(o, y).exp() * len(y), len(y)),
    "mean of means": lambda o, y: (F.cross_entropy(o, y), 1),
    "largest": lambda o, y: (o.max() * len(y), len(y)),
    "correlation": lambda o, y: (torch.corrcoef(torch.stack([o[:, 0], y.float()]))[0, 1], 1),
    "classes": lambda o, y: (len(set(o.argmax(1).tolist())) * len(y), len(y)),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("name", OF_BATCHES)
def test_a_metric_of_batches_is_found_in_any_precision(
    name: str, precision: Any, world: World, model: nn.Module, fields: dict[str, Tensor]
) -> None:
    with pytest.raises(TrainingError, match=r'"m" depends on how the data are cut .* 4 and 12'):
        rehearsed(Returning(OF_BATCHES[name]), model, fields, world, precision)


OF_SAMPLES: dict[str, Any] = {
    "accuracy": lambda o, y: ((o.argmax(1) == y).sum(), len(y)),
    "cross entropy": lambda o, y: (F.cross_entropy(o, y, reduction="sum"), len(y)),
    "only some": lambda o, y: ((o[:, 0] * (y == 1)).sum(), (y == 1).sum()),
    "none": lambda o, y: (o.sum() * 0, 0),
    "drawn": lambda o, y: ((o + torch.randn_like(o)).square().sum(), len(y)),
    "of probabilities": lambda o, y: (-o.softmax(1)[:, 0].log().sum(), len(y)),
    "cancelling": lambda o, y: ((o - o.mean(1, keepdim=True)).sum(), len(y)),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("name", OF_SAMPLES)
def test_a_metric_of_samples_is_not_taken_for_one(
    name: str, precision: Any, world: World, model: nn.Module, fields: dict[str, Tensor]
) -> None:
    rehearsed(Returning(OF_SAMPLES[name]), model, fields, world, precision)


def test_the_built_in_tasks_are_of_samples(
    world: World, model: nn.Module, fields: dict[str, Tensor]
) -> None:
    weighted = Classification(["x"], "y", ignore_index=2, class_weights=[1.0, 2.0, 3.0, 0.5])
    rehearsed(weighted, model, fields, world, "bf16-mixed")
    rehearsed(Regression(["x"], "y"), nn.Linear(FEATURES, 1), fields, world, "32-true")


def test_sums_are_looked_at_too(world: World, model: nn.Module, fields: dict[str, Tensor]) -> None:
    with pytest.raises(TrainingError, match='"m" depends on how'):
        rehearsed(Finishing(lambda o, y: o.mean(0)), model, fields, world, "32-true")
    with pytest.raises(TrainingError, match=r'"m" depends on how .*Gather'):
        rehearsed(Finishing(lambda o, y: o), model, fields, world, "32-true")
    rehearsed(Finishing(lambda o, y: o.sum(0)), model, fields, world, "32-true")
    rehearsed(Finishing(lambda o, y: Gather(o)), model, fields, world, "32-true")
    with pytest.raises(TrainingError, match='"m" depends on how'):
        rehearsed(Finishing(lambda o, y: Gather(o - o.mean(0))), model, fields, world, "32-true")


def test_a_loss_may_couple_samples_if_it_says_so(
    world: World, model: nn.Module, fields: dict[str, Tensor]
) -> None:
    def contrast(output: Tensor, label: Tensor) -> dict[str, Any]:
        targets = torch.arange(len(output))
        return {"loss": (F.cross_entropy(output @ output.T, targets, reduction="sum"), len(label))}

    task = Returning(contrast)
    task.metrics = {"loss": "min"}  # type: ignore[misc]
    with pytest.raises(TrainingError, match="batch_dependent_loss = True"):
        rehearsed(task, model, fields, world, "32-true")
    task.batch_dependent_loss = True  # type: ignore[attr-defined]
    rehearsed(task, model, fields, world, "32-true")


def test_a_task_that_remembers_is_refused(
    world: World, model: nn.Module, fields: dict[str, Tensor]
) -> None:
    seen = []

    def returned(output: Tensor, label: Tensor) -> Any:
        seen.append((output.argmax(1) == label).sum())
        return sum(seen), len(label)

    with pytest.raises(TrainingError, match="it keeps what it has seen"):
        rehearsed(Returning(returned), model, fields, world, "32-true")


def test_models_are_tried_as_they_are(world: World, fields: dict[str, Tensor]) -> None:
    """Outputs in a tuple, other methods than the model itself, draws, and samples that couple."""
    torch.manual_seed(2)

    class Drawing(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            output = super().forward(x)
            return output + torch.randn_like(output), {"aside": [output]}

    class Encoding(nn.Linear):
        def encode(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Through(Returning):
        def evaluate(self, model: Any, fields: Mapping[str, Tensor]) -> Any:
            output = model.encode(fields["x"]) if self.encodes else model(fields["x"])[0]
            return {"m": self.returned(output, fields["y"])}

    for encodes, model in (
        (False, Drawing(FEATURES, CLASSES)),
        (True, Encoding(FEATURES, CLASSES)),
    ):
        Through.encodes = encodes
        rehearsed(Through(OF_SAMPLES["accuracy"]), model, fields, world, "32-true")
        with pytest.raises(TrainingError, match="depends on how"):
            rehearsed(Through(OF_BATCHES["mean of means"]), model, fields, world, "32-true")
    coupling = nn.Sequential(
        nn.Linear(FEATURES, CLASSES), nn.BatchNorm1d(CLASSES, track_running_stats=False)
    )
    with pytest.raises(TrainingError, match="batch norms that have no running statistics"):
        rehearsed(Classification(["x"], "y"), coupling, fields, world, "32-true")


def test_a_task_of_whole_batches_is_told_of_it(
    world: World, model: nn.Module, fields: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    def pairs(output: Tensor, label: Tensor) -> Any:
        first, second = output.view(-1, 2, CLASSES).unbind(1)
        return (first - second).square().sum(), len(label)

    rehearsed(Returning(pairs), model, fields, world, "32-true")  # parts are even
    assert not caplog.text
    whole = Returning(lambda o, y: (o.view(16 * CLASSES).sum(), len(y)))
    rehearsed(whole, model, fields, world, "32-true")
    assert "takes 16 rows, but no part of them (RuntimeError: " in caplog.text


def test_a_rehearsal_leaves_no_trace(
    world: World, model: nn.Module, fields: dict[str, Tensor]
) -> None:
    model.register_buffer("calls", torch.zeros(()))

    def count(module: Any, inputs: Any, output: Any) -> None:
        module.calls.add_(1)

    model.register_forward_hook(count)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rehearsed(Returning(OF_SAMPLES["drawn"]), model, fields, world, "32-true")
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.calls == 0
    assert "forward" not in vars(model)
    model(fields["x"])
    assert model.calls == 1


def test_what_a_method_draws_is_no_matter_of_the_cut(
    world: World, model: nn.Module, fields: dict[str, Tensor]
) -> None:
    """As in a VAE that is reached by `encode` and `decode`: a little, so that draws are alike."""

    class Drawing(Returning):
        def evaluate(self, model: nn.Module, fields: Mapping[str, Tensor]) -> Any:
            count = len(fields["y"])
            return {"m": (count + 0.034 * torch.randn(count).sum(), count)}

    few = {name: item[:7] for name, item in fields.items()}
    rehearsed(Drawing(OF_SAMPLES["drawn"]), model, few, world, "32-true")


def test_a_task_may_call_the_model_twice(
    world: World, model: nn.Module, fields: dict[str, Tensor]
) -> None:
    class Twice(Returning):
        def evaluate(self, model: nn.Module, fields: Mapping[str, Tensor]) -> Any:
            one, other = model(fields["x"]), model(fields["x"] / 2)
            return {"m": ((2 * one - other).square().sum(), len(one))}

    rehearsed(Twice(OF_SAMPLES["drawn"]), model, fields, world, "32-true")


def test_one_row_has_no_other_cut(
    world: World, model: nn.Module, fields: dict[str, Tensor]
) -> None:
    one = {name: item[:1] for name, item in fields.items()}
    rehearsed(Returning(OF_BATCHES["mean of means"]), model, one, world, "32-true")


def test_what_few_rows_do_not_give_comes_later(
    world: World, model: nn.Module, fields: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    class Ranking(Returning):
        def finish(self, sums: Mapping[str, Tensor]) -> Any:
            if len(sums["k"]) < COUNT:
                raise ValueError("only one class in y_true")
            return {"m": 0.5}

    task = Ranking(lambda o, y: {"k": Gather(o)})
    rehearsed(task, model, fields, world, "32-true")
    assert "only one class in y_true. It is tried again with all" in caplog.text
    assert measured(task, model, fields, world) == {"m": 0.5}


class WithObject(Returning):
    def __init__(self, metric: Any) -> None:
        super().__init__(lambda o, y: None)
        self.metric = metric

    def evaluate(self, model: nn.Module, fields: Mapping[str, Tensor]) -> Any:
        self.metric.update(model(fields["x"])[:, 0], fields["y"].float())
        return {"m": self.metric}


def test_torchmetrics_begin_anew_in_every_evaluation(
    world: World, model: nn.Module, fields: dict[str, Tensor]
) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = WithObject(torchmetrics.MeanSquaredError(squared=False))
        rehearsed(task, model, fields, world, "32-true")
        found = [measured(task, model, fields, world) for _ in range(2)]
    expected = F.mse_loss(model(fields["x"])[:, 0], fields["y"].float()).sqrt().item()
    assert found[0] == found[1] == {"m": pytest.approx(expected, rel=1e-6)}
    assert task.metric.update_count == 0

    class Fresh(Returning):
        def evaluate(self, model: nn.Module, fields: Mapping[str, Tensor]) -> Any:
            return {"m": torchmetrics.MeanMetric()}

    with pytest.raises(TrainingError, match=r"torchmetrics object MeanMetric .*__init__"):
        measured(Fresh(lambda o, y: None), model, fields, world)


def test_torchmetrics_that_take_means_over_ranks_are_refused() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    from hpctrain.training.metric_objects import MetricObjects

    class Mean(torchmetrics.Metric):
        def __init__(self) -> None:
            super().__init__()
            self.add_state("value", torch.zeros(()), dist_reduce_fx="mean")

        def update(self, value: float) -> None:
            self.value = torch.as_tensor(value)

        def compute(self) -> Tensor:
            return self.value

    task = WithObject(Mean())
    objects = MetricObjects(task, CPU)
    parts = []
    for value in (1.0, 1.0, 2.0):
        objects.reset()
        task.metric.update(value)
        parts.append(objects.states())
    objects.merge(parts[:2])  # such as the range of the data: the same everywhere
    assert objects.compute("metric") == 1
    with pytest.raises(TrainingError, match='Mean takes the mean over ranks of its state "value"'):
        objects.merge(parts)


def test_the_example_of_the_docs(world: World, model: nn.Module, fields: dict[str, Tensor]) -> None:
    from sklearn import metrics as reference

    pytest.importorskip("torchmetrics")
    docs = Path(__file__).parents[3] / "docs" / "training.md"
    section = docs.read_text(encoding="utf-8").split("## Metrics")[1]
    names: dict[str, Any] = {}
    exec(section.split("```python")[1].split("```")[0], names)
    task = names["Scored"](["x"], "y", classes=CLASSES)
    rehearsed(task, model, fields, world, "32-true")
    found = measured(task, model, fields, world)
    output = model(fields["x"]).detach()
    said, true = output.argmax(1), fields["y"]
    assert found["macro_f1"] == pytest.approx(reference.f1_score(true, said, average="macro"))
    assert found["auroc"] == pytest.approx(reference.roc_auc_score(true == 0, output[:, 0]))
    expected = reference.top_k_accuracy_score(true, output, k=2)
    assert found["top_2"] == pytest.approx(expected)
    whole = measured(task, model, fields, world, batch=COUNT)
    assert found == pytest.approx(whole, rel=1e-12)


def test_what_was_logged_for_an_epoch_goes_on_on_another_number_of_ranks(world: World) -> None:
    """Of two ranks on one: sums, the smallest, and the state of metrics, as if it had been one."""
    parts, numbers = [], [[1.0, 2.0], [4.0, 0.5, 3.0]]
    for mine in numbers:
        holder = Holder()
        logs, objects = Logs(world.communicator, CPU), MetricObjects(holder, CPU)
        logs.fx, logs.records = "training_step", True
        for number in mine:
            logs.weight = number
            logs.log("mean", torch.tensor(number), on_epoch=True)
            logs.log("least", number, on_step=False, on_epoch=True, reduce_fx="min")
            holder.metric.update(torch.tensor([number, 1.0]), torch.tensor([1, 0]))
        parts.append((logs.state(), objects.states()))
    holder = Holder()
    logs, objects = Logs(world.communicator, CPU), MetricObjects(holder, CPU)
    logs.load_states([of_rank for of_rank, _ in parts])
    objects.merge_begun([of_rank for _, of_rank in parts])
    together = [number for mine in numbers for number in mine]
    mean = sum(number**2 for number in together) / sum(together)
    assert logs.end_epoch() == pytest.approx({"mean": mean, "least": 0.5}, rel=1e-12)
    assert len(holder.metric.preds) == 5
    once = torchmetrics.AUROC("binary")
    for number in together:
        once.update(torch.tensor([number, 1.0]), torch.tensor([1, 0]))
    assert holder.metric.compute() == once.compute()


class Holder:
    def __init__(self) -> None:
        self.metric = torchmetrics.AUROC("binary")
