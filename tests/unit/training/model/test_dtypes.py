"""Dtypes are the model's own: what is cast, what is not, and what knows complex numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers.steps import CPU, WORLD, batch, make_step
from torch import Tensor, nn

from hpctrain.checkpoint.export import export
from hpctrain.checkpoint.inspect import compared
from hpctrain.checkpoint.load import load
from hpctrain.checkpoint.manager import CheckpointManager, Retention
from hpctrain.config.schema import Precision, TrainingSection
from hpctrain.errors import ConfigError
from hpctrain.models.mlp import MLP
from hpctrain.training.checkpointing.initialize import read_weights
from hpctrain.training.checkpointing.resume import restore, share
from hpctrain.training.checkpointing.snapshot import capture
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.preparation import cast_model, prepare_model
from hpctrain.training.position import Position
from hpctrain.training.step import TrainStep

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    *(torch.complex64, torch.complex128, torch.complex32, torch.int64, torch.uint8, torch.bool),
)
EXPECTED = {
    "bf16-true": {
        **dict.fromkeys(DTYPES[:4], torch.bfloat16),
        **dict.fromkeys(DTYPES[5:8], torch.complex64),
    },
    "64-true": {
        **dict.fromkeys(DTYPES[:4], torch.float64),
        **dict.fromkeys(DTYPES[5:8], torch.complex128),
    },
}


class Wave(nn.Module):
    """Complex weights between real layers."""

    def __init__(self, dtype: torch.dtype = torch.complex64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6, dtype=dtype.to_real())
        self.turn = nn.Parameter(torch.randn(6, dtype=dtype))
        self.mix = nn.Parameter(torch.randn(6, 6, dtype=dtype) / 3)
        self.register_buffer("phase", torch.randn(6, dtype=dtype))
        self.last = nn.Linear(6, 3, dtype=dtype.to_real())

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.fft(self.first(x)) * self.turn.conj() + self.phase
        output: Tensor = self.last((waves @ self.mix).abs())
        return output


class Turned(nn.Module):
    """A gradient that torch leaves as a conjugate to be computed later."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j, 2 + 0.5j]))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = torch.view_as_real(self.turn.conj().resolve_conj())[:, 1] + x[:, :3]
        return output


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_true_precisions_cast(precision: Any, dtype: torch.dtype) -> None:
    model = nn.Module()
    real = torch.rand(4, 3, dtype=torch.float64 if dtype != torch.complex128 else dtype)
    values = real.to(dtype)
    model.own = nn.Parameter(values.clone(), requires_grad=False)
    model.register_buffer("state", values.clone())
    cast_model(model, NumberFormat.of(precision, CPU), None)
    wanted = EXPECTED.get(precision, {}).get(dtype, dtype)
    for tensor in (model.own, model.state):
        assert tensor.dtype == wanted
        assert torch.equal(tensor.view(torch.uint8), values.to(wanted).view(torch.uint8))


def test_modules_that_keep_their_dtype() -> None:
    class Norm(nn.LayerNorm):
        pass

    model = nn.Sequential(nn.Linear(6, 6), Norm(6), nn.Sequential(Norm(6), nn.Linear(6, 3)))
    model[2].shared = model[0].weight
    section = TrainingSection(
        max_steps=1, precision="bf16-true", keep_dtype=("1", "2.shared", "Norm")
    )
    with pytest.raises(ConfigError, match=r'training\.keep_dtype = "2\.shared": fits no module'):
        prepare_model(model, section, NumberFormat.of("bf16-true", CPU), CPU, 1)
    cast_model(model, NumberFormat.of("bf16-true", CPU), None, ("Norm", "2.1"))
    kinds = {name: item.dtype for name, item in model.named_parameters()}
    narrow = {name for name, dtype in kinds.items() if dtype == torch.bfloat16}
    assert narrow == {"0.weight", "0.bias"}
    assert model[2].shared is model[0].weight


def test_tensors_that_are_shared_stay_shared_and_repeated_ones_get_their_own_memory() -> None:
    table = torch.randn(5, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    for module in model:
        module.register_buffer("table", table)
    model.register_buffer("repeated", torch.ones(1).expand(4))
    model.register_buffer("later", torch.randn(3, dtype=torch.complex64).conj())
    cast_model(model, NumberFormat.of("bf16-true", CPU), None)
    assert model[0].table is model[1].table
    assert model[0].weight is model[1].weight
    model.repeated[0] = 2
    assert model.repeated.tolist() == [2, 1, 1, 1]
    assert not model.later.is_conj()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_come_in_the_dtype_of_a_model_that_was_made_in_one(dtype: torch.dtype) -> None:
    number_format = NumberFormat.of("32-true", CPU)
    model = MLP(6, 3).to(dtype)
    assert number_format.for_model(model).parameters == dtype
    model.extra = nn.Linear(1, 1)
    assert number_format.for_model(model).parameters == torch.float32
    cast = NumberFormat.of("64-true", CPU).cast({"z": torch.ones(2, dtype=torch.cfloat)}, ["z"])
    assert cast["z"].dtype == torch.complex128


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [
        ("32-true", torch.complex64, 1e-6),
        ("64-true", torch.complex64, 1e-13),
        ("32-true", torch.complex128, 1e-13),
        ("bf16-mixed", torch.complex64, 1e-6),
    ],
)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_complex_parameters_train_as_in_a_loop_by_hand(
    precision: Any, dtype: torch.dtype, tolerance: float, optimizer: Any
) -> None:
    step = make_step(Wave(dtype), precision=precision, optimizer=optimizer, clip_norm=0.5)
    number_format = NumberFormat.of(precision, CPU)
    hand = Wave(dtype)
    cast_model(hand, number_format, None)
    theirs = optimizer(hand.parameters(), lr=0.02)
    step.dry_run()
    for _ in range(4):
        step(batch(), 0.02)
        theirs.zero_grad()
        fields = batch().fields
        with number_format.arithmetic():
            output = hand(fields["x"].to(hand.first.weight.dtype))
        if output.dtype == torch.bfloat16:
            output = output.float()
        nn.functional.cross_entropy(output, fields["y"]).backward()
        for item in hand.parameters():  # torch cannot clip what it left to be conjugated later
            item.grad = item.grad.resolve_conj()
        norm = nn.utils.clip_grad_norm_(hand.parameters(), 0.5)
        theirs.step()
        assert step.read()["grad_norm"] == pytest.approx(norm.item(), rel=10 * tolerance)
    for name, item in hand.named_parameters():
        mine = step.model.get_parameter(name)
        assert mine.dtype == item.dtype
        torch.testing.assert_close(mine, item, rtol=tolerance, atol=tolerance)
    assert step.model.turn.imag.abs().max() > 0


def test_a_gradient_that_is_a_conjugate_is_taken_for_what_it_is() -> None:
    step = make_step(Turned(), clip_norm=1.0, clip_value=0.1, optimizer=torch.optim.AdamW)
    step.dry_run()
    before = step.model.turn.detach().clone()
    step(batch(), 0.02)
    assert torch.equal(step.model.turn.real, before.real * (1 - 0.02 * 0.01))
    assert not torch.equal(step.model.turn.imag, before.imag * (1 - 0.02 * 0.01))


def test_a_moving_average_of_complex_numbers() -> None:
    step = make_step(Wave(), ema_decay=0.5, optimizer=torch.optim.SGD)
    step.dry_run()
    assert step.average is not None
    expected = step.model.turn.detach().clone()
    for number in range(1, 5):
        step(batch(), 0.1)
        step.average.update(number)
        expected.lerp_(step.model.turn.detach(), 1 - min(0.5, (1 + number) / (10 + number)))
    assert torch.equal(step.average.state()["turn"], expected)
    with step.average.in_model():
        assert torch.equal(step.model.turn.detach(), expected)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_are_saved_and_restored(tmp_path: Path, dtype: torch.dtype) -> None:
    def make() -> TrainStep:
        step = make_step(Wave(dtype), ema_decay=0.5)
        step.model.register_buffer("narrow", torch.randn(3, 2, dtype=torch.complex32))
        step.model.register_buffer("code", torch.rand(3).to(torch.float8_e5m2))
        step.dry_run()
        return step

    torch.manual_seed(1)
    first = make()
    for _ in range(2):
        first(batch(), 0.1)
    store = CheckpointManager(
        tmp_path, retention=Retention(keep_last=9), confirm=lambda: None, warn=lambda _: None
    )
    for number in (1, 2):
        snapshot = capture(
            WORLD, first, Position(step=number), data={}, extra={}, config_toml="", metrics=None
        )
        assert snapshot is not None
        store.save(snapshot)
        store.finish()
        if number == 1:
            first(batch(), 0.1)
    second = make()
    resumed = share(WORLD, load(tmp_path))
    assert resumed is not None
    restore(WORLD, second, resumed)
    for _ in range(2):
        first(batch(), 0.1)
        second(batch(), 0.1)
    weights = tmp_path / "weights.safetensors"
    export(tmp_path, weights)
    exported = read_weights(weights)
    for name, item in first.model.state_dict().items():
        assert torch.equal(
            second.model.state_dict()[name].view(torch.uint8), item.view(torch.uint8)
        )
        assert (exported[name].dtype, exported[name].shape) == (item.dtype, item.shape)
    lines = compared(tmp_path, None)
    assert "turn: 6 of 6 elements differ, by at most" in lines


def test_complex_gradients_are_not_compressed() -> None:
    section = TrainingSection(max_steps=1, compress_gradients="fp16")
    number_format = NumberFormat.of("32-true", CPU)
    with pytest.raises(ConfigError, match=r"compress_gradients.*turn, mix are complex"):
        prepare_model(Wave(), section, number_format, CPU, 2)
    prepare_model(Wave(), section, number_format, CPU, 1)  # nothing is exchanged
