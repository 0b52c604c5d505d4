"""Optimizers of others go on from a checkpoint as if they had never stopped, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from helpers import optimizer_zoo as zoo
from prodigyopt import Prodigy
from torch import Tensor, nn
from torch.optim import Optimizer

from hpctrain.checkpoint.format import TRAINING
from hpctrain.checkpoint.optimizer_state import OptimizerState, SavedOptimizer
from hpctrain.checkpoint.save import HostCopies, write_part
from hpctrain.checkpoint.state import UnsavableError, decode, encode
from hpctrain.checkpoint.tensors import tensors_of
from hpctrain.config.schema import ParameterGroup
from hpctrain.errors import CheckpointError
from hpctrain.training.optim.ema import EvaluationWeights
from hpctrain.training.optim.optimizer import build_optimizer

LR = 0.01


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


class Trained:
    """A model and its optimizer, steps taken by number."""

    def __init__(
        self,
        kind: Callable[..., Any],
        arguments: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        groups: tuple[ParameterGroup, ...] = (),
    ) -> None:
        self.model = network(dtype=dtype)
        self.dtype = dtype
        self.optimizer = build_optimizer(kind, self.model, LR, arguments or {}, groups=groups)
        self.state = OptimizerState(self.optimizer)

    def train(self, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(7, 6, generator=generator).to(self.dtype)
            self.optimizer.zero_grad()
            (self.model(x) - x[:, :3]).square().mean().backward()
            for group in self.optimizer.param_groups:
                group["lr"] = LR * (1 + step / 10)
            self.optimizer.step()

    def save(self, folder: Path) -> SavedOptimizer:
        """Write the state to files and read it from there."""
        folder.mkdir(exist_ok=True)
        saved = self.state.capture(self.model)
        write_part(folder, {}, HostCopies().copy("training", saved.tensors), None)
        tensors = tensors_of((folder / TRAINING).read_bytes(), folder)
        return SavedOptimizer(tensors, json.loads(json.dumps(saved.values)))

    def weights(self) -> dict[str, Tensor]:
        return {name: item.clone() for name, item in self.model.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, item in first.items():
        assert torch.equal(item, second[name]), name


def assert_same_state(first: Trained, second: Trained) -> None:
    """Compare values and types of all that the optimizers have."""
    ours, theirs = (each.state.capture(each.model) for each in (first, second))
    assert ours.values == theirs.values
    assert_equal(dict(ours.tensors), dict(theirs.tensors))


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        *[(kind, {}) for kind in zoo.ALL],
        (Prodigy, {"d_coef": 2.0, "safeguard_warmup": True, "weight_decay": 0.0}),
        (Prodigy, {"slice_p": 3, "growth_rate": 1.02, "use_bias_correction": True}),
        (schedulefree.AdamWScheduleFree, {"warmup_steps": 3, "r": 0.5}),
        (schedulefree.AdamWScheduleFree, {"foreach": False}),
        (schedulefree.SGDScheduleFree, {"momentum": 0.8}),
        (schedulefree.RAdamScheduleFree, {}),
        (torch.optim.Adafactor, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.ASGD, {}),
        (torch.optim.Rprop, {}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_a_run_goes_on_from_files(
    tmp_path: Path, kind: Callable[..., Optimizer], arguments: dict[str, Any]
) -> None:
    whole = Trained(kind, arguments)
    for stop in (1, 4):
        whole.train(range(stop - 1 if stop == 1 else 1, stop))
        parts = Trained(kind, arguments)
        parts.model.load_state_dict(whole.weights())
        parts.state.restore(parts.model, whole.save(tmp_path / str(stop)))
        assert_same_state(whole, parts)
    whole.train(range(4, 8))
    parts.train(range(4, 8))
    assert_equal(whole.weights(), parts.weights())
    assert_same_state(whole, parts)


@pytest.mark.parametrize("kind", zoo.ALL)
def test_a_run_goes_back_to_where_it_was(tmp_path: Path, kind: type[Optimizer]) -> None:
    """In the memory that there is, and without what came after the checkpoint."""
    run = Trained(kind)
    run.train(range(1))
    saved, weights = run.save(tmp_path), run.weights()
    run.train(range(1, 4))
    after = run.weights()
    run.model.load_state_dict(weights)
    run.state.restore(run.model, saved)
    run.train(range(1, 4))
    assert_equal(run.weights(), after)


@pytest.mark.parametrize("kind", [Prodigy, zoo.GroupState, zoo.TensorGroups])
def test_groups_that_are_cut_alike_or_anew(tmp_path: Path, kind: type[Optimizer]) -> None:
    """What all groups have learned alike every new group has; what differs has no new place."""
    two = (ParameterGroup(pattern="0.*", weight_decay=0.0),) if kind is Prodigy else ()
    whole = Trained(kind, groups=two)
    whole.train(range(3))
    saved = whole.save(tmp_path)
    one = Trained(kind)
    one.model.load_state_dict(whole.weights())
    one.state.restore(one.model, saved)
    whole.train(range(3, 5))
    one.train(range(3, 5))
    assert_equal(whole.weights(), one.weights())


class OneGroupLearns(zoo.GroupState):
    def learn(self, group: dict[str, Any]) -> float:
        return super().learn(group) if group["lr"] < LR else 1.0


def test_what_groups_share_they_share_again(tmp_path: Path) -> None:
    """A default that is a list or a tensor is one and the same in all groups."""
    groups = (ParameterGroup(pattern="0.*", weight_decay=None, lr_factor=0.5),)
    whole = Trained(zoo.TensorGroups, groups=groups)
    whole.train(range(3))
    parts = Trained(zoo.TensorGroups, groups=groups)
    parts.model.load_state_dict(whole.weights())
    parts.state.restore(parts.model, whole.save(tmp_path))
    for run in (whole, parts):
        first, second = run.optimizer.param_groups
        assert first["d"] is second["d"]
        for _ in range(2):
            run.optimizer.step()


def test_groups_that_learned_differently_cannot_be_joined(tmp_path: Path) -> None:
    whole = Trained(OneGroupLearns, groups=(ParameterGroup(pattern="0.*", lr_factor=0.5),))
    whole.optimizer.step = lambda: None  # type: ignore[method-assign,assignment]
    whole.train(range(1))
    whole.optimizer.param_groups[0]["d"] = 0.5
    saved = whole.save(tmp_path)
    one = Trained(OneGroupLearns)
    with pytest.raises(CheckpointError, match=r"bring the old optimizer\.groups back"):
        one.state.restore(one.model, saved)


@pytest.mark.parametrize(
    ("kind", "before", "now", "of_config", "learned"),
    [
        (Prodigy, {"d0": 1e-6}, {"d0": 1e-5, "betas": [0.8, 0.9]}, ("d0", "betas"), ("d", "k")),
        (
            schedulefree.AdamWScheduleFree,
            {"betas": [0.9, 0.99]},
            {"betas": [0.8, 0.9], "warmup_steps": 5},
            ("betas", "warmup_steps"),
            ("k", "weight_sum", "lr_max"),
        ),
        (zoo.ArgumentState, {"d": 1e-3}, {"d": 2e-3}, ("d",), ()),
        (zoo.ArgumentState, {"d": 1e-3, "nu": [1, 2]}, {"d": 1e-3, "nu": [3]}, ("nu",), ("d",)),
        (torch.optim.AdamW, {}, {"betas": [0.5, 0.6], "weight_decay": 1.0}, ("betas",), ()),
    ],
)
def test_arguments_come_from_the_config(
    tmp_path: Path,
    kind: type[Optimizer],
    before: dict[str, Any],
    now: dict[str, Any],
    of_config: tuple[str, ...],
    learned: tuple[str, ...],
) -> None:
    whole = Trained(kind, before)
    whole.train(range(3))
    parts, fresh = Trained(kind, now), Trained(kind, now)
    parts.state.restore(parts.model, whole.save(tmp_path))
    (group,) = parts.optimizer.param_groups
    for key in of_config:
        assert group[key] == fresh.optimizer.param_groups[0][key], key
    for key in learned:
        assert group[key] == whole.optimizer.param_groups[0][key], key
        assert group[key] != fresh.optimizer.param_groups[0][key], key


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (zoo.Foreign, r"optimizer-parts/0\.weight/history is a helpers\.optimizer_zoo\.History"),
        (zoo.ForeignGroup, r"param_groups\.0\.history is a helpers\.optimizer_zoo\.History"),
        (zoo.Alias, r"keeps the parameter 0\.weight itself"),
        (zoo.OwnFactory, "a function of its own"),
    ],
)
def test_what_cannot_be_saved_is_named(kind: type[Optimizer], what: str) -> None:
    run = Trained(kind)
    run.train(range(1))
    with pytest.raises(UnsavableError, match=f"{kind.__name__} cannot be saved: .*{what}"):
        run.state.capture(run.model)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, zoo.Lion, schedulefree.AdamWScheduleFree])
def test_a_state_of_tensors_takes_no_json_a_parameter(kind: type[Optimizer]) -> None:
    """Models have thousands of parameters."""
    run = Trained(kind)
    run.train(range(2))
    values = run.state.capture(run.model).values
    assert values is not None
    assert values["slots"] == {}
    assert values["other"] == []


def test_state_on_the_host_says_so() -> None:
    """Only tensors that are elsewhere than usual; here all is on the host, and a step may be."""
    run = Trained(torch.optim.Adam, {"foreach": True})
    run.train(range(1))
    run.optimizer.param_groups[0]["capturable"] = True
    saved = run.state.capture(run.model)
    assert saved.values is not None
    assert saved.values["slots"] == {}


@pytest.mark.parametrize("kind", [zoo.SecondSet, schedulefree.AdamWScheduleFree])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_evaluation_leaves_the_weights_of_training(
    kind: type[Optimizer], dtype: torch.dtype
) -> None:
    once, often = (Trained(kind, dtype=dtype) for _ in range(2))
    weights = EvaluationWeights(often.optimizer, often.model)
    seen = []
    for step in range(5):
        once.train(range(step, step + 1))
        often.train(range(step, step + 1))
        with weights.in_model():
            seen.append(often.weights())
        assert_equal({f"{name}": item for name, item in weights.state().items()}, seen[-1])
    assert_equal(once.weights(), often.weights())
    assert_same_state(once, often)
    assert any(not torch.equal(item, seen[-1][name]) for name, item in often.weights().items())


@pytest.mark.parametrize(
    "value",
    [
        [1, 2.5, float("inf"), -0.0, None, True, "text", [], {}],
        {"a": {1: (2, [3])}, (1, "b"): {4}},
        [torch.zeros(0, 3), torch.ones(2, dtype=torch.complex64)],
        (float("nan"), 1e-320, 0.1 + 0.2, 10**40),
    ],
)
def test_trees_come_back_type_by_type(value: Any) -> None:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(value, "x", tensors))
    back = decode(json.loads(text), tensors)
    assert repr(back) == repr(value)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (object(), "x is a builtins.object"),
        ([[lambda: 0]], r"x\.0\.0 is a builtins\.function"),
        (type("Mine", (dict,), {})(), "Mine"),
        (torch.zeros(2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "on the device meta"),
        (nn.parameter.UninitializedParameter(), "lazy"),
        (torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged), "NestedTensor"),
        ({torch.ones(1): 2}, "a tensor as a key"),
    ],
)
def test_what_would_not_come_back_is_refused(value: Any, what: str) -> None:
    with pytest.raises(UnsavableError, match=what):
        encode(value, "x", {})


def test_a_container_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(UnsavableError, match="containers in one another"):
        encode(value, "x", {})


@pytest.mark.parametrize(
    "damaged", [{"tuple": 3}, {"unknown": []}, {"tensor": "no"}, {"a": 1, "b": 2}]
)
def test_damaged_values_are_an_error_in_words(damaged: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot be understood"):
        decode(damaged, {})
