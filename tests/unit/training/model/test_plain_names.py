"""Names in checkpoints are those of the bare model; both kinds are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.steps import WORLD, batch, make_step
from safetensors.torch import load_file
from torch import Tensor, nn

from hpctrain.checkpoint.load import fitting_names, load
from hpctrain.checkpoint.manager import CheckpointManager, Retention
from hpctrain.checkpoint.save import Snapshot
from hpctrain.config.schema import ParameterGroup
from hpctrain.errors import CheckpointError
from hpctrain.training.checkpointing.initialize import choose
from hpctrain.training.checkpointing.resume import restore, share
from hpctrain.training.checkpointing.snapshot import capture
from hpctrain.training.model.wrappers import PlainNames
from hpctrain.training.optim.optimizer import parameter_groups
from hpctrain.training.position import Position
from hpctrain.training.step import TrainStep


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.module = nn.Linear(8, 8)  # called like a wrapper's, and none
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.module(self.encoder(x)))
        return output


def compiled_inside() -> nn.Module:
    model = Bare()
    model.encoder[0] = torch.compile(model.encoder[0], backend="eager")
    model.encoder = torch.compile(model.encoder, backend="eager")
    return model


def compiled() -> nn.Module:
    return torch.compile(Bare(), backend="eager")  # type: ignore[return-value]


def parallel() -> nn.Module:
    model = Bare()
    model.head = nn.DataParallel(model.head)  # type: ignore[assignment]
    return model


WRAPPED = [compiled_inside, compiled, parallel]


def saved(step: TrainStep, folder: Path, change: Callable[[Snapshot], Snapshot]) -> Path:
    store = CheckpointManager(
        folder, retention=Retention(keep_last=9), confirm=lambda: None, warn=lambda _: None
    )
    snapshot = capture(
        WORLD, step, Position(step=1), data={}, extra={}, config_toml="", metrics=None
    )
    assert snapshot is not None
    store.save(change(snapshot))
    store.finish()
    return folder / "checkpoints" / "step-00000001"


def as_wrapped(step: TrainStep) -> Callable[[Snapshot], Snapshot]:
    """Return what gives a snapshot the names that 0.1.0 gave it."""
    plain = PlainNames(step.model)
    raw = {plain(name): name for name in step.model.state_dict()}

    def named(key: str) -> str:
        name = max((name for name in raw if name in key), key=len, default="")
        return key.replace(name, raw[name]) if name else key

    def change(snapshot: Snapshot) -> Snapshot:
        model, training, lent = (
            {named(key): item for key, item in tensors.items()}
            for tensors in (snapshot.model, snapshot.training, snapshot.lent)
        )
        return replace(snapshot, model=model, training=training, lent=lent)

    return change


@pytest.mark.parametrize("make", WRAPPED)
def test_checkpoints_are_those_of_the_bare_model(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    first = make_step(make(), ema_decay=0.5)
    first.dry_run()
    first(batch(), 0.1)
    assert first.average is not None
    first.average.update(1)
    plain = saved(first, tmp_path / "plain", lambda snapshot: snapshot)
    old = saved(first, tmp_path / "old", as_wrapped(first))
    weights = load_file(plain / "model.safetensors")
    assert any(
        "_orig_mod" in name or "head.module" in name
        for name in load_file(old / "model.safetensors")
    )
    Bare().load_state_dict(weights)
    state = load_file(plain / "training.safetensors")
    assert not any("_orig_mod" in name or "head.module" in name for name in state)
    first(batch(), 0.1)
    expected = [item.detach() for item in first.model.state_dict().values()]
    for folder in (plain, old):
        for other in (make, Bare):
            second = make_step(other(), ema_decay=0.5)
            second.dry_run()
            resumed = share(WORLD, load(folder))
            assert resumed is not None
            restore(WORLD, second, resumed)
            assert second.average is not None
            assert torch.equal(second.average.state()["head.weight"], state["average/head.weight"])
            second(batch(), 0.1)
            for mine, item in zip(second.model.state_dict().values(), expected, strict=True):
                assert torch.equal(mine, item)


@pytest.mark.parametrize("make", [*WRAPPED, Bare])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_from_elsewhere_fit_with_and_without_wrappers(
    make: Callable[[], nn.Module], prefix: str
) -> None:
    names = {f"{prefix}{name}": item for name, item in Bare().state_dict().items()}
    fitting, told = choose(make(), names, {}, strict=True)
    assert fitting.keys() == Bare().state_dict().keys()
    assert told == "11 of 11 tensors"
    lightning = {f"model.{name}": item for name, item in names.items()}
    assert len(choose(make(), lightning, {"model.": ""}, strict=True)[0]) == 11


def test_names_that_could_be_several_are_left_alone() -> None:
    wanted = {"net.weight", "fast.weight"}
    assert fitting_names(wanted, {"net._orig_mod.weight", "net.module.weight"}) == {}
    assert fitting_names(wanted, {"net.weight", "_orig_mod.net.weight"}) == {}
    assert fitting_names({"a.module.b"}, {"a.b"}) == {"a.b": "a.module.b"}


def test_patterns_of_parameters_need_not_know_what_is_compiled() -> None:
    for pattern in ("encoder.0.*", "encoder._orig_mod.0._orig_mod.*"):
        group = ParameterGroup(pattern=pattern, lr_factor=0.5)
        groups = parameter_groups(compiled_inside(), [group], decay_norms_and_biases=True)
        assert [len(made["params"]) for made in groups] == [2, 6]


class Late(nn.Module):
    """Has buffers from its first pass on, of the shape of its data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.register_buffer("nothing", None)
        self.register_buffer("queue", torch.zeros(0, 6))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "center"):
            self.register_buffer("center", x.detach().mean(0))
            self.register_buffer("cache", x.detach(), persistent=False)
        if self.training:
            self.queue = torch.cat([self.queue, x.detach()])
            self.nothing = torch.ones(2) if self.nothing is None else self.nothing + 1
        output: Tensor = self.net(x - self.center)
        return output


def test_buffers_that_a_model_registers_in_its_first_pass_are_restored(tmp_path: Path) -> None:
    first = make_step(Late())
    first.dry_run()
    assert "center" not in first.model._buffers
    for _ in range(2):
        first(batch(), 0.1)
    folder = saved(first, tmp_path, lambda snapshot: snapshot)
    second = make_step(Late())
    second.dry_run()
    resumed = share(WORLD, load(folder))
    assert resumed is not None
    restore(WORLD, second, resumed)
    for step in (first, second):
        step(batch(), 0.1)
    assert first.model.state_dict().keys() == second.model.state_dict().keys()
    for name, item in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], item), name
    third = make_step(nn.Linear(6, 3))
    with pytest.raises(CheckpointError, match="in it only: center"):
        restore(WORLD, third, resumed)
